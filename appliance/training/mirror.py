"""Checkpoints in the store, so that another host goes on where one was lost.

The child trains and seals; a thread of its parent uploads what is sealed, one checkpoint at a time,
the newest first and then the best one that it needs, and training never waits for it. The store
holds what the folder holds, and on a slow link at least what a host can go on from:

    checkpoints/<run key>/<step>-<digest of its seal>/<file>      sealed.json last

A checkpoint is in the store when its seal is, and it is believed only when every byte that arrives
is as the seal says. What cannot be uploaded or removed is said and is no reason to stop training.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from appliance.digest import digest_bytes, fsync_path, list_files, write_atomic
from appliance.errors import DeviceError, InterruptedRunError, PreconditionFailedError, StoreError
from appliance.manifest import check_relative_path
from appliance.store import Store
from appliance.training.checkpoints import (
    SEAL,
    count_steps_done,
    find_differences,
    is_sound,
    list_newest_first,
    name_checkpoint,
    remove_checkpoint,
)
from appliance.training.journal import read_records
from appliance.training.monitor import Keep, Rules, select_kept_step, watch_records

_PERIOD_S = 1.0


@dataclass(frozen=True, slots=True)
class Mirror:
    """Where the checkpoints of one run key are mirrored to."""

    store: Store
    run_key: str

    @property
    def prefix(self) -> str:
        """`checkpoints/<run key>/`."""
        return f"checkpoints/{self.run_key}/"

    def list_names(self, *, complete: bool) -> list[str]:
        """`<step>-<digest>` of what is in the store, newest first; with `complete`, only what has its seal."""
        keys = [o.key.removeprefix(self.prefix) for o in self.store.list(self.prefix)]
        names = {k.partition("/")[0] for k in keys if not complete or k.endswith("/" + SEAL)}
        return sorted((n for n in names if n.partition("-")[0].isdigit()), key=_read_step, reverse=True)


def fetch_checkpoints(
    mirror: Mirror, folder: Path, *, keep: Keep, fingerprint: Mapping[str, str], note: Callable[[str], None]
) -> None:
    """Bring the store's checkpoints to `folder`, if that has no sound one; the best one, if only that is not sound.

    Damaged ones and those of other software are named and left where they are. Raises `StoreError`
    when the store cannot be listed.
    """
    newest = next((c for c in list_newest_first(folder) if is_sound(c)), None)
    kept = None if newest is None else _find_kept(newest, step=count_steps_done(newest), keep=keep)
    if kept is not None and is_sound(folder / name_checkpoint(kept)):
        return
    for name in mirror.list_names(complete=True):
        target = folder / name_checkpoint(_read_step(name))
        if kept not in (None, _read_step(name)) or is_sound(target):
            continue
        try:
            _fetch_one(mirror, name, target, fingerprint=fingerprint)
        except (StoreError, ValueError) as fault:
            found, _, _ = str(fault).partition(";")  # what to do with it is said for blobs
            note(f"checkpoint {name} in the store is not used: {found}")
        else:
            note(f"checkpoint of step {_read_step(name)} fetched from {mirror.store.url}")


def _fetch_one(mirror: Mirror, name: str, target: Path, *, fingerprint: Mapping[str, str]) -> None:
    """One verified checkpoint in its place. Raises `StoreError` or `ValueError`, and then leaves nothing."""
    content, _ = mirror.store.get(f"{mirror.prefix}{name}/{SEAL}")
    if _name_mirrored(_read_step(name), content) != name:
        raise ValueError("its seal is damaged")
    seal: dict[str, Any] = json.loads(content)
    found = {k: v for k, v in seal["fingerprint"].items() if k in fingerprint}
    if differences := find_differences(found, fingerprint):
        raise ValueError(", ".join(differences))
    staged = target.with_name(f".{target.name}.fetching")
    try:
        for path, sha256 in seal["files"].items():
            mirror.store.get_file(f"{mirror.prefix}{name}/{path}", staged / check_relative_path(path), sha256=sha256)
        write_atomic(staged / SEAL, content)
        remove_checkpoint(target)
        staged.rename(target)
        fsync_path(target.parent)
    finally:
        shutil.rmtree(staged, ignore_errors=True)


@contextlib.contextmanager
def follow_checkpoints(mirror: Mirror, folder: Path, *, keep: Keep, note: Callable[[str], None]) -> Iterator[None]:
    """While active, upload each checkpoint that is sealed in `folder`.

    A run that was stopped waits for its newest one to be in the store; a finished run does not.
    """
    uploader = _Uploader(mirror, folder, keep, note)
    ended = threading.Event()

    def follow() -> None:
        while not ended.wait(_PERIOD_S):
            uploader.upload(is_wanted=lambda: not ended.is_set())

    thread = threading.Thread(target=follow, name="mirror", daemon=True)
    thread.start()
    try:
        yield
    except (InterruptedRunError, DeviceError):
        ended.set()
        thread.join()
        uploader.upload(is_wanted=lambda: True)
        raise
    finally:
        ended.set()
        thread.join()


def delete_checkpoints(mirror: Mirror, *, note: Callable[[str], None]) -> None:
    """Remove a run's checkpoints from the store: it is published."""
    try:
        for name in mirror.list_names(complete=False):
            _delete_one(mirror, name)
    except StoreError as fault:
        note(f"checkpoints stay in the store: {fault}")


def _delete_one(mirror: Mirror, name: str) -> None:
    """The seal first: what is left after an interruption is not a checkpoint."""
    mirror.store.delete(f"{mirror.prefix}{name}/{SEAL}")
    for found in list(mirror.store.list(f"{mirror.prefix}{name}/")):
        mirror.store.delete(found.key)


@dataclass(slots=True)
class _Uploader:
    """What is in the store already, each with the step whose weights it needs, and what was said about it."""

    mirror: Mirror
    folder: Path
    keep: Keep
    note: Callable[[str], None]
    uploaded: dict[str, int] = field(default_factory=dict)
    said: set[str] = field(default_factory=set)

    def upload(self, *, is_wanted: Callable[[], bool]) -> None:
        """Upload what is new, and remove from the store what is no longer in the folder.

        The newest first, then the one that it needs, though a newer one may be there by now.
        """
        try:
            while is_wanted() and (pending := self._list_pending()):
                self._upload_one(pending[0], is_wanted=is_wanted)
                self._remove_older()
        except (StoreError, OSError) as fault:
            self._say(f"checkpoints are not mirrored: {fault}")

    def _list_pending(self) -> list[tuple[str, Path]]:
        named = [(_name_local(c), c) for c in list_newest_first(self.folder)]
        pending = [(name, c) for name, c in named if name is not None and name not in self.uploaded]
        needed = self.uploaded[max(self.uploaded, key=_read_step)] if self.uploaded else 0
        return sorted(pending, key=lambda p: _read_step(p[0]) != needed)

    def _upload_one(self, pending: tuple[str, Path], *, is_wanted: Callable[[], bool]) -> None:
        name, checkpoint = pending
        with _hold_files(checkpoint) as held:
            content = (held / SEAL).read_bytes() if (held / SEAL).is_file() else b""
            if _name_mirrored(count_steps_done(checkpoint), content) != name:
                return  # it was removed in this moment; the next round sees what is there
            kept = _find_kept(held, step=_read_step(name), keep=self.keep)
            for path, sha256 in json.loads(content)["files"].items():
                if not is_wanted():
                    return
                self.mirror.store.put_file(f"{self.mirror.prefix}{name}/{path}", held / path, sha256=sha256)
        with contextlib.suppress(PreconditionFailedError):  # the same seal under the same name
            self.mirror.store.put(f"{self.mirror.prefix}{name}/{SEAL}", content, if_none_match=True)
        self.uploaded[name] = kept

    def _remove_older(self) -> None:
        """Only what is older than what is here, and once the store has what a host can go on from.

        Some identities may not delete at all.
        """
        local = {n for n in map(_name_local, list_newest_first(self.folder)) if n is not None}
        newest = max(map(_read_step, local), default=0)
        needed = self._find_needed()
        try:
            for name in self.mirror.list_names(complete=False) if needed else ():
                if name not in local | needed and _read_step(name) < newest:
                    _delete_one(self.mirror, name)
                    self.uploaded.pop(name, None)
        except StoreError as fault:
            self._say(f"older checkpoints stay in the store: {fault}")

    def _find_needed(self) -> set[str]:
        """The newest in the store that has there what it needs, and that; nothing if there is none."""
        steps = {_read_step(name): name for name in self.uploaded}
        whole = [n for n, kept in self.uploaded.items() if kept in steps]
        newest = max(whole, key=_read_step, default=None)
        return set() if newest is None else {newest, steps[self.uploaded[newest]]}

    def _say(self, text: str) -> None:
        if text not in self.said:
            self.said.add(text)
            self.note(text)


@contextlib.contextmanager
def _hold_files(checkpoint: Path) -> Iterator[Path]:
    """Hard links to a checkpoint's files, which stay while the child removes it; the seal is linked last."""
    held = checkpoint.with_name(".mirrored")
    shutil.rmtree(held, ignore_errors=True)
    try:
        held.mkdir()
        with contextlib.suppress(FileNotFoundError):
            for name in [*(n for n in list_files(checkpoint) if n != SEAL), SEAL]:
                (held / name).parent.mkdir(parents=True, exist_ok=True)
                os.link(checkpoint / name, held / name)
        yield held
    finally:
        shutil.rmtree(held, ignore_errors=True)


def _find_kept(checkpoint: Path, *, step: int, keep: Keep) -> int:
    """The step whose weights a run that goes on from this checkpoint may publish: it is no start without them."""
    rules = Rules(keep=keep, patience=None, max_steps=step)
    try:
        return select_kept_step(watch_records(read_records(checkpoint), rules), rules, last=step)
    except (OSError, ValueError, KeyError):  # a damaged journal: the child will not go on from it
        return step


def _name_local(checkpoint: Path) -> str | None:
    """The name in the store of a sealed checkpoint, `None` without a seal."""
    with contextlib.suppress(OSError):
        return _name_mirrored(count_steps_done(checkpoint), (checkpoint / SEAL).read_bytes())
    return None


def _name_mirrored(step: int, seal: bytes) -> str:
    return f"{step}-{digest_bytes(seal)[:12]}"


def _read_step(name: str) -> int:
    return int(name.partition("-")[0])
