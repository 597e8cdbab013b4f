"""The one walk over a registry: what the check judges is what the collector marks from.

One listing first, then manifests, history, refs and leases, each read as it is by then. What cannot be read
is a finding; blobs are only listed. What is published meanwhile is asked for again before it is called loose.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from appliance.digest import digest_bytes
from appliance.errors import RegistryError
from appliance.manifest import Manifest
from appliance.registry.check_aliases import check_aliases
from appliance.registry.findings import REPUBLISH, RESTORE, Finding, ask, describe_fault
from appliance.registry.history import History, read_history
from appliance.registry.layout import (
    FORMAT,
    MODELS,
    Location,
    decode_schema,
    locate,
    model_prefix,
    verify_schema,
)
from appliance.registry.leases import Lease, read_lease
from appliance.registry.listing import check_known, verify_manifest
from appliance.store import Store, StoredObject

GRACE_S = 7 * 86_400.0
_READERS = 8
_TOP_LEVEL = ("blobs", "models", "leases", "checkpoints", "gc")


@dataclass(frozen=True, slots=True)
class Version:
    """A version that was read: its manifest, and the SHA-256 of its bytes."""

    manifest: Manifest
    sha256: str


@dataclass(frozen=True, slots=True)
class Walk:
    """What there was: every object with its place, versions by name and version, leases, and all that is damaged.

    `findings` are of everything but the blobs.
    """

    store: Store
    listed: tuple[tuple[StoredObject, Location | None], ...]
    found: dict[tuple[str, str], Version | Finding]
    history: History
    leases: tuple[Lease, ...]
    findings: tuple[Finding, ...]

    @property
    def versions(self) -> dict[tuple[str, str], Version]:
        """The versions whose manifest is sound."""
        return {target: each for target, each in self.found.items() if isinstance(each, Version)}

    def select(self, place: str) -> list[tuple[StoredObject, Location]]:
        """The objects of one place, in key order."""
        return [(o, at) for o, at in self.listed if at is not None and at.place == place]


def walk_registry(store: Store, name: str | None = None) -> Walk:
    """Look at the registry, or at one model, once.

    Raises `StoreError` when the store fails, `RegistryError` on an unknown model or another schema.
    """
    listed = tuple((o, locate(o.key)) for o in store.list("" if name is None else model_prefix(name)))
    if name is not None and not listed:
        check_known(store, name)
    locations = [at for _, at in listed if at is not None]
    findings = [*_check_format(store, is_empty=not listed), *_find_strays(listed)]
    found = _read_versions(store, [at for at in locations if at.place == "manifest"])
    findings += [each for each in found.values() if isinstance(each, Finding)]
    sealed = {target: each.sha256 if isinstance(each, Version) else None for target, each in found.items()}
    history = read_history(store, locations)
    findings += check_aliases(history, sealed=sealed)
    leases = _read_leases(store, [at for at in locations if at.place == "lease"])
    findings += [each for each in leases if isinstance(each, Finding)]
    return Walk(
        store=store,
        listed=listed,
        found=found,
        history=history,
        leases=tuple(each for each in leases if isinstance(each, Lease)),
        findings=tuple(findings),
    )


def find_loose(walk: Walk) -> list[StoredObject]:
    """Listed blobs that no manifest names, those of versions that appeared since the listing included."""
    named = {entry.sha256 for each in walk.versions.values() for entry in each.manifest.files}
    loose = {at.item: o for o, at in walk.select("blob") if at.item not in named}
    if not loose:
        return []
    again = [at for at in map(locate, (o.key for o in walk.store.list(MODELS))) if at and at.place == "manifest"]
    fresh = _read_versions(walk.store, [at for at in again if (at.name, at.item) not in walk.found])
    for version in fresh.values():
        if not isinstance(version, Version):
            return []
        for entry in version.manifest.files:
            loose.pop(entry.sha256, None)
    return list(loose.values())


def _check_format(store: Store, *, is_empty: bool) -> list[Finding]:
    """Raises `RegistryError` on another schema: its keys may mean something else."""
    source = f"{store.url}/{FORMAT}"
    got = ask(store, FORMAT, lambda: store.get(FORMAT))
    if isinstance(got, Finding):
        return [got]
    action = f"{RESTORE}, or publish something: that makes it anew"
    if got is None:
        missing = Finding("format", FORMAT, found="missing", expected="the mark of a registry", action=action)
        return [] if is_empty else [missing]
    try:
        decode_schema(got[0], source=source)
    except RegistryError:
        return [Finding("format", FORMAT, found="damaged", expected="the mark of a registry", action=RESTORE)]
    verify_schema(got[0], source=source)
    return []


def _find_strays(listed: Iterable[tuple[StoredObject, Location | None]]) -> list[Finding]:
    """Keys that nothing here writes, a finding each; what lies outside of the registry's folders, one per folder.

    The empty objects that consoles make to show a folder are none.
    """
    strays: dict[str, list[str]] = {}
    for key, at in ((o.key, at) for o, at in listed if o.size or not f"/{o.key}".endswith("/")):
        if at is None:
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


def _read_versions(store: Store, locations: Sequence[Location]) -> dict[tuple[str, str], Version | Finding]:
    """Every manifest that is still there, verified."""
    with ThreadPoolExecutor(_READERS) as pool:
        found = pool.map(lambda at: ((at.name, at.item), _read_version(store, at)), locations)
        return {target: version for target, version in found if version is not None}


def _read_version(store: Store, at: Location) -> Version | Finding | None:
    got = ask(store, at.key, lambda: store.get(at.key))
    if got is None or isinstance(got, Finding):
        return got
    source = f"{store.url}/{at.key}"
    try:
        manifest = verify_manifest(got[0], name=at.name, version=at.item, source=source)
    except RegistryError as fault:
        found = describe_fault(fault, source=source)
        expected = f"the manifest of {at.name} whose SHA-256 begins with {at.item.rpartition('-')[2]}"
        return Finding("manifest", at.key, found=found, expected=expected, action=REPUBLISH)
    return Version(manifest, digest_bytes(got[0]))


def _read_leases(store: Store, locations: Sequence[Location]) -> list[Lease | Finding]:
    """Every lease, and a finding for each that is damaged."""
    leases: list[Lease | Finding] = []
    for at in locations:
        try:
            got = ask(store, at.key, lambda at=at: read_lease(store, at.name))  # type: ignore[misc]
        except RegistryError as fault:
            found = describe_fault(fault, source=f"{store.url}/{at.key}")
            expected, action = f"the lease on {at.name}", "delete it when nobody trains this model"
            leases.append(Finding("lease", at.key, found=found, expected=expected, action=action))
        else:
            leases += [got] if isinstance(got, Finding) else [got[0]] if got is not None else []
    return leases
