"""Many files at once between a folder and the blobs of a store; the first fault stops the rest."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed

from appliance.manifest import FileEntry
from appliance.progress import Progress

_WORKERS = 8
_MEGABYTE = 1_000_000
_SHOWN_FROM = 32 * _MEGABYTE


def transfer_files(files: Sequence[FileEntry], move: Callable[[FileEntry], None], *, label: str) -> None:
    """Call `move` for every file, eight at a time, with a bar from 32 MB on; raises what the first fault raised."""
    total, done = sum(entry.size for entry in files), 0
    with Progress(label, unit=" MB") as bar, ThreadPoolExecutor(_WORKERS) as pool:
        moving = {pool.submit(move, entry): entry.size for entry in files}
        try:
            for finished in as_completed(moving):
                finished.result()
                done += moving[finished]
                if total >= _SHOWN_FROM:
                    bar.advance(done // _MEGABYTE, total=total // _MEGABYTE)
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
