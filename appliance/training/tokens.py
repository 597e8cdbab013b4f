"""Token rows kept from run to run: equal rows under an equal template are rendered and masked once.

An entry is named by the digest of everything that its rows are a function of: the examples, the
template and its tokenizer, the limits, this package's code and the libraries that render. So an entry
cannot be stale, only unused. It is read only when its own digest is right, and written only with rows
that passed every check; a fault is never kept. Without a folder that can be written the rows are
rendered as if there were no cache.
"""

from __future__ import annotations

import contextlib
import os
import platform
import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from importlib import metadata
from pathlib import Path

import msgspec

import appliance
from appliance.digest import digest_bytes, digest_file, digest_json, write_atomic
from appliance.example import Example, encode_examples
from appliance.model import ChatTemplate, TokenRow

_MOST_BYTES = 2 << 30
_ABANDONED_S = 3600.0
_LIBRARIES = ("jinja2", "tokenizers")
_OWN = re.compile(r"[0-9a-f]{64}\.rows|\.[0-9a-f]{64}\.rows\.[0-9a-f]+\.tmp")


@dataclass(frozen=True, slots=True)
class TokenCache:
    """The folder of the entries, whom to tell when it cannot be used, and the bytes of the newest that stay."""

    folder: Path
    note: Callable[[str], None]
    most_bytes: int = _MOST_BYTES


def build_key(examples: Sequence[Example], *, template: ChatTemplate, **limits: int | str | None) -> str:
    """The name of an entry: the SHA-256 of all that rendering and masking `examples` depends on."""
    return digest_json(
        {
            "examples": digest_bytes(encode_examples(tuple(examples))),
            "template": template.digest,
            "constants": template.constants,
            "stop_ids": sorted(template.stop_ids),
            "added_ids": sorted(template.added_ids),
            "bos_id": template.bos_id,
            "calls": asdict(template.calls) if template.calls else None,
            "thinking": [template.switch, template.thinking],
            "limits": limits,
            "code": digest_code(Path(appliance.__file__).parent),
        }
    )


@cache
def digest_code(package: Path) -> str:
    """The digest of a package's sources and of the versions that it renders with.

    All sources, not a list of those that render: nobody can forget one. Read once per process.
    """
    sources = [[f.relative_to(package).as_posix(), digest_file(f)] for f in sorted(package.rglob("*.py"))]
    versions = [appliance.__version__, platform.python_version(), *map(metadata.version, _LIBRARIES)]
    return digest_json([sources, versions])


def read_entry(kept: TokenCache, key: str) -> tuple[TokenRow, ...] | None:
    """The rows of the entry `key`; `None` when there is none, or its bytes are not those that were written."""
    file = _place(kept, key)
    try:
        seal, _, payload = file.read_bytes().partition(b"\n")
    except OSError:
        return None
    if seal != _seal(key, payload):
        return None
    with contextlib.suppress(OSError):  # a folder that can only be read is a cache too
        os.utime(file)  # what was used last goes last
    return tuple(msgspec.json.decode(payload, type=list[TokenRow]))


def write_entry(kept: TokenCache, key: str, rows: Sequence[TokenRow]) -> None:
    """Keep rows that passed every check; a folder that cannot be written is told and changes nothing else."""
    payload = msgspec.json.encode(rows)
    try:
        write_atomic(_place(kept, key), _seal(key, payload) + b"\n" + payload)
        _prune(kept)
    except OSError as fault:
        kept.note(f"{kept.folder}: token rows are not kept ({fault}); the run goes on, the next one renders them again")


def _place(kept: TokenCache, key: str) -> Path:
    return kept.folder / f"{key}.rows"


def _seal(key: str, payload: bytes) -> bytes:
    """The digest of content and name: a file under the name of another is not taken for it."""
    return digest_json([key, digest_bytes(payload)]).encode()


def _prune(kept: TokenCache) -> None:
    """Leave the newest entries up to `most_bytes`, and no temporary file of a writer that was killed."""
    total = 0
    for age, size, file in sorted(_list_files(kept.folder)):
        total += size
        if total > kept.most_bytes or (file.suffix == ".tmp" and age > _ABANDONED_S):
            file.unlink(missing_ok=True)


def _list_files(folder: Path) -> Iterator[tuple[float, int, Path]]:
    """Age in seconds, size and path of what this module wrote there; another process may be pruning too."""
    now = time.time()
    for file in (f for f in folder.iterdir() if _OWN.fullmatch(f.name)):
        with contextlib.suppress(FileNotFoundError):
            found = file.stat()
            yield now - found.st_mtime, found.st_size, file
