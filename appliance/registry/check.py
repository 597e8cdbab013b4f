"""The check: every class of damage that a registry can have, told at once; it reads and changes nothing.

Aliases, history, manifests, blobs: what is pointed at is looked at in that order, after one listing, so
that what others publish and promote meanwhile is never taken for damage. Blobs that no manifest names
are told only when nobody can be about to name them.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal, TypeVar

from appliance.digest import digest_bytes
from appliance.errors import RegistryError
from appliance.manifest import FileEntry, Manifest
from appliance.registry.check_aliases import check_aliases
from appliance.registry.findings import Finding, ask, describe_fault, shorten
from appliance.registry.layout import (
    FORMAT,
    MODELS,
    Location,
    blob_key,
    decode_schema,
    locate,
    model_prefix,
    verify_schema,
)
from appliance.registry.leases import read_lease
from appliance.registry.listing import check_known, verify_manifest
from appliance.registry.transfer import transfer_files
from appliance.store import Store, StoredObject

T = TypeVar("T")

GRACE_S = 7 * 86_400.0
_READERS = 8
_TOP_LEVEL = ("blobs", "models", "leases", "checkpoints", "gc", "baselines")
_RESTORE = "restore it from the bucket's object versions or a backup"
_UNCERTAIN = ("manifest", "unreadable", "ref", "dangling-ref", "lease")  # a lost version's blobs are no orphans
_REPUBLISH = f"{_RESTORE}, or remove it and run `appliance publish` on its run folder"


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


@dataclass(frozen=True, slots=True)
class _Version:
    """A version that was read: its manifest, and the SHA-256 of its bytes."""

    manifest: Manifest
    sha256: str


def check_registry(
    store: Store, *, now: float, name: str | None = None, read: Literal["all"] | int = 0, day: int = 0
) -> Report:
    """Look at every object of the registry, or of one model, and name all that is not as it should be.

    Blobs are asked for their size; the data of `read` of them is read and hashed, those that are due on
    `day` (days in a row read all of them, see `pick_sample`). `now` is in seconds since the epoch. Raises
    `StoreError` when the store fails, `RegistryError` on an unknown model or a registry of another schema.
    """
    listed = list(store.list("" if name is None else model_prefix(name)))
    if name is not None and not listed:
        check_known(store, name)
    locations = [at for at in map(locate, (o.key for o in listed)) if at]
    findings = [*_check_format(store, is_empty=not listed), *_find_strays(listed)]

    versions = _read_versions(store, [at for at in locations if at.place == "manifest"])
    sound = {target: found for target, found in versions.items() if isinstance(found, _Version)}
    findings += [found for found in versions.values() if isinstance(found, Finding)]
    sealed = {target: found.sha256 if isinstance(found, _Version) else None for target, found in versions.items()}
    findings += check_aliases(store, locations, sealed=sealed)

    blobs = _collect_blobs(sound)
    chosen = blobs if read == "all" else pick_sample(blobs, count=read, day=day)
    faults, read_size = _check_blobs(store, blobs, chosen=chosen)
    findings += faults

    unnamed = 0
    if name is None:
        damaged, is_busy = _check_leases(store, locations, now=now)
        findings += damaged
        loose = _find_loose(store, listed, versions=versions, named={e.sha256 for e in blobs})
        is_certain = not is_busy and not any(f.kind in _UNCERTAIN for f in findings)
        orphans = [_describe_orphan(o) for o in loose if is_certain and _is_old(o, now=now)]
        findings += orphans
        unnamed = len(loose) - len(orphans)
    return Report(
        findings=tuple(sorted(findings, key=lambda f: (f.key, f.kind))),
        models=len({at.name for at in locations if at.place in ("manifest", "ref")}),
        versions=len(versions),
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


def _check_format(store: Store, *, is_empty: bool) -> list[Finding]:
    """Raises `RegistryError` on another schema: its keys may mean something else."""
    source = f"{store.url}/{FORMAT}"
    got = ask(store, FORMAT, lambda: store.get(FORMAT))
    if isinstance(got, Finding):
        return [got]
    action = f"{_RESTORE}, or publish something: that makes it anew"
    if got is None:
        missing = Finding("format", FORMAT, found="missing", expected="the mark of a registry", action=action)
        return [] if is_empty else [missing]
    try:
        decode_schema(got[0], source=source)
    except RegistryError:
        return [Finding("format", FORMAT, found="damaged", expected="the mark of a registry", action=_RESTORE)]
    verify_schema(got[0], source=source)
    return []


def _find_strays(listed: Iterable[StoredObject]) -> list[Finding]:
    """Keys that nothing here writes, a finding each; what lies outside of the registry's folders, one per folder.

    The empty objects that consoles make to show a folder are none.
    """
    strays: dict[str, list[str]] = {}
    for key in (o.key for o in listed if o.size or not f"/{o.key}".endswith("/")):
        if locate(key) is None:
            top, separator, _ = key.partition("/")
            strays.setdefault(key if top in _TOP_LEVEL else top + separator, []).append(key)
    return [
        Finding(
            "unknown-key",
            group,
            found="an object" if len(members) == 1 else f"{len(members)} objects",
            expected="keys of a registry only",
            action="find out who writes here, and move it elsewhere",
        )
        for group, members in strays.items()
    ]


def _read_versions(store: Store, locations: Sequence[Location]) -> dict[tuple[str, str], _Version | Finding]:
    """Every manifest that is still there, verified."""
    with ThreadPoolExecutor(_READERS) as pool:
        found = pool.map(lambda at: ((at.name, at.item), _read_version(store, at)), locations)
        return {target: version for target, version in found if version is not None}


def _read_version(store: Store, at: Location) -> _Version | Finding | None:
    got = ask(store, at.key, lambda: store.get(at.key))
    if got is None or isinstance(got, Finding):
        return got
    source = f"{store.url}/{at.key}"
    try:
        manifest = verify_manifest(got[0], name=at.name, version=at.item, source=source)
    except RegistryError as fault:
        found = describe_fault(fault, source=source)
        expected = f"the manifest of {at.name} whose SHA-256 begins with {at.item.rpartition('-')[2]}"
        return Finding("manifest", at.key, found=found, expected=expected, action=_REPUBLISH)
    return _Version(manifest, digest_bytes(got[0]))


def _collect_blobs(versions: dict[tuple[str, str], _Version]) -> list[FileEntry]:
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
        action = f"{_RESTORE}, or run `appliance publish` on its run folder"
        return [Finding("missing-blob", key, found="missing", expected=what, action=action)]
    if stored.size != entry.size:
        return [Finding("wrong-size", key, found=f"{stored.size} bytes", expected=what, action=_REPUBLISH)]
    if sha256 is not None and sha256 != entry.sha256:
        found = f"other bytes, SHA-256 {sha256}"
        return [Finding("wrong-bytes", key, found=found, expected=what, action=_REPUBLISH)]
    return []


def _check_leases(store: Store, locations: Sequence[Location], *, now: float) -> tuple[list[Finding], bool]:
    """Damaged leases, and whether anybody is at work."""
    damaged, is_busy = [], False
    for at in (at for at in locations if at.place == "lease"):
        try:
            lease = ask(store, at.key, lambda at=at: read_lease(store, at.name))  # type: ignore[misc]
        except RegistryError as fault:
            found = describe_fault(fault, source=f"{store.url}/{at.key}")
            expected, action = f"the lease on {at.name}", "delete it when nobody trains this model"
            lease = Finding("lease", at.key, found=found, expected=expected, action=action)
        if isinstance(lease, Finding):
            damaged.append(lease)
        elif lease is not None:
            is_busy = is_busy or lease[0].until > now
    return damaged, is_busy


def _find_loose(
    store: Store, listed: Sequence[StoredObject], *, versions: Collection[tuple[str, str]], named: set[str]
) -> list[StoredObject]:
    """Listed blobs that no manifest names, those of the versions that appeared since the listing included."""
    loose = {at.item: o for o in listed if (at := locate(o.key)) and at.place == "blob" and at.item not in named}
    if not loose:
        return []
    again = [at for at in map(locate, (o.key for o in store.list(MODELS))) if at and at.place == "manifest"]
    fresh = _read_versions(store, [at for at in again if (at.name, at.item) not in versions])
    for version in fresh.values():
        if not isinstance(version, _Version):
            return []
        for entry in version.manifest.files:
            loose.pop(entry.sha256, None)
    return list(loose.values())


def _is_old(blob: StoredObject, *, now: float) -> bool:
    """Older than any publication takes."""
    return blob.modified is not None and now - blob.modified >= GRACE_S


def _describe_orphan(blob: StoredObject) -> Finding:
    return Finding(
        "orphan",
        blob.key,
        found=f"{blob.size} bytes that no manifest names, older than {GRACE_S / 86_400:.0f} days",
        expected="a version that needs it",
        action="it could be collected, and costs nothing but room",
    )
