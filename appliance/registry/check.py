"""The check: every class of damage that a registry can have, told at once; it reads and changes nothing.

Aliases, history, manifests, blobs: what is pointed at is looked at in that order, after one listing, so
that what others publish and promote meanwhile is never taken for damage. Blobs that no manifest names
are told only when nobody can be about to name them.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal, TypeVar

from appliance.manifest import FileEntry
from appliance.registry.findings import REPUBLISH, RESTORE, Finding, ask, shorten
from appliance.registry.layout import blob_key
from appliance.registry.transfer import transfer_files
from appliance.registry.walk import GRACE_S, Version, find_loose, walk_registry
from appliance.store import Store, StoredObject

T = TypeVar("T")

_READERS = 8
_UNCERTAIN = ("manifest", "unreadable", "ref", "dangling-ref", "lease")  # a lost version's blobs are no orphans


@dataclass(frozen=True, slots=True)
class Report:
    """What a check found, by key, and what it looked at.

    `size` is the bytes of all blobs by their manifests, `read_size` what was read of them. `unnamed`
    counts blobs that no manifest names and that may still be published: too young, or work goes on.
    """

    findings: tuple[Finding, ...]
    models: int
    versions: int
    blobs: int
    size: int
    read_blobs: int
    read_size: int
    unnamed: int

    @property
    def is_sound(self) -> bool:
        """Whether there is no damage; notes are none."""
        return all(f.severity == "note" for f in self.findings)


def check_registry(
    store: Store, *, now: float, name: str | None = None, read: Literal["all"] | int = 0, day: int = 0
) -> Report:
    """Look at every object of the registry, or of one model, and name all that is not as it should be.

    Blobs are asked for their size; the data of `read` of them is read and hashed, those that are due on
    `day` (days in a row read all of them, see `pick_sample`). `now` is in seconds since the epoch. Raises
    `StoreError` when the store fails, `RegistryError` on an unknown model or a registry of another schema.
    """
    walk = walk_registry(store, name)
    blobs = _collect_blobs(walk.versions)
    chosen = blobs if read == "all" else pick_sample(blobs, count=read, day=day)
    faults, read_size = _check_blobs(store, blobs, chosen=chosen)
    findings = [*walk.findings, *faults]
    unnamed = 0
    if name is None:
        loose = find_loose(walk)
        is_busy = any(lease.until > now for lease in walk.leases)
        is_certain = not is_busy and not any(f.kind in _UNCERTAIN for f in findings)
        orphans = [_describe_orphan(o) for o in loose if is_certain and _is_old(o, now=now)]
        findings += orphans
        unnamed = len(loose) - len(orphans)
    return Report(
        findings=tuple(sorted(findings, key=lambda f: (f.key, f.kind))),
        models=len({at.name for place in ("manifest", "ref") for _, at in walk.select(place)}),
        versions=len(walk.found),
        blobs=len({e.sha256 for e in blobs}),
        size=sum(e.size for e in blobs),
        read_blobs=len(chosen),
        read_size=read_size,
        unnamed=unnamed,
    )


def pick_sample(blobs: Sequence[T], *, count: int, day: int) -> Sequence[T]:
    """The `count` of sorted `blobs` that are due on a day: days in a row read all, in fewer than 2 * blobs / count.

    A round has a power of two of days, so that a registry that grows changes the rhythm only when it has
    doubled. What a round has to spare is read twice, before the day's own share: blobs that were
    published meanwhile move shares by a few places, and none may slip from tomorrow's into yesterday's.
    """
    days = 1
    while 0 < days * count < len(blobs):
        days *= 2
    end = max(min(count, len(blobs)), (day % days + 1) * len(blobs) // days)
    return blobs[max(0, end - count) : end] if count else ()


def _collect_blobs(versions: dict[tuple[str, str], Version]) -> list[FileEntry]:
    """Every blob that a version names, by digest; its path says for whom: `name@version/path`.

    Two manifests that disagree about a blob's size make two entries, one of which will be wrong.
    """
    found: dict[tuple[str, int], FileEntry] = {}
    for (name, version), each in versions.items():
        for entry in each.manifest.files:
            named = entry.model_copy(update={"path": f"{name}@{version}/{entry.path}"})
            found.setdefault((entry.sha256, entry.size), named)
    return [found[key] for key in sorted(found)]


def _check_blobs(store: Store, blobs: Sequence[FileEntry], *, chosen: Sequence[FileEntry]) -> tuple[list[Finding], int]:
    """Faults of all blobs, and the bytes that were read: `chosen` are hashed, the others asked for their size."""
    faults: list[Finding] = []
    read: list[int] = []

    def hash_one(entry: FileEntry) -> None:
        key = blob_key(entry.sha256)
        got = ask(store, key, lambda: store.digest(key))
        stored = got if got is None or isinstance(got, Finding) else got[1]
        faults.extend(_judge(entry, stored, sha256=got[0] if isinstance(got, tuple) else None))
        read.append(stored.size if isinstance(stored, StoredObject) else 0)

    def ask_one(entry: FileEntry) -> list[Finding]:
        key = blob_key(entry.sha256)
        return _judge(entry, ask(store, key, lambda: store.head(key)), sha256=None)

    due = {(e.sha256, e.size) for e in chosen}
    others = [e for e in blobs if (e.sha256, e.size) not in due]
    with ThreadPoolExecutor(_READERS) as pool:
        asked = [fault for each in pool.map(ask_one, others) for fault in each]
    transfer_files(chosen, hash_one, label="reading blobs")
    return [*asked, *faults], sum(read)


def _judge(entry: FileEntry, stored: StoredObject | Finding | None, *, sha256: str | None) -> list[Finding]:
    """What is wrong with one blob: at most one thing."""
    if isinstance(stored, Finding):
        return [stored]
    key, what = blob_key(entry.sha256), f"{entry.size} bytes of {shorten(entry.path)}"
    if stored is None:
        action = f"{RESTORE}, or run `appliance publish` on its run folder"
        return [Finding("missing-blob", key, found="missing", expected=what, action=action)]
    if stored.size != entry.size:
        return [Finding("wrong-size", key, found=f"{stored.size} bytes", expected=what, action=REPUBLISH)]
    if sha256 is not None and sha256 != entry.sha256:
        found = f"other bytes, SHA-256 {sha256}"
        return [Finding("wrong-bytes", key, found=found, expected=what, action=REPUBLISH)]
    return []


def _is_old(blob: StoredObject, *, now: float) -> bool:
    """Older than any publication takes."""
    return blob.modified is not None and now - blob.modified >= GRACE_S


def _describe_orphan(blob: StoredObject) -> Finding:
    return Finding(
        "orphan",
        blob.key,
        found=f"{blob.size} bytes that no manifest names, older than {GRACE_S / 86_400:.0f} days",
        expected="a version that needs it",
        action="it could be collected (`appliance gc`), and costs nothing but room",
    )
