"""What is in a registry: versions, aliases, and the version that a run key already has.

Nothing is cached and nothing is kept beside the objects: the listing is the truth. A version whose
manifest no longer has the digest in its name is damage and is named, never skipped.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

from appliance.digest import digest_bytes
from appliance.errors import NotFoundError, RegistryError
from appliance.manifest import Manifest, Outcome, decode_manifest
from appliance.registry.layout import (
    MANIFEST,
    MODELS,
    age_of,
    manifest_key,
    model_prefix,
    select_keys,
)
from appliance.registry.moves import AliasMove, read_alias
from appliance.store import Store

T = TypeVar("T")

_READERS = 8
_SHORTEST, _LISTED = 8, 8  # the day of a version


@dataclass(frozen=True, slots=True)
class VersionInfo:
    """One published version and the aliases that point at it now."""

    name: str
    version: str
    aliases: tuple[str, ...]
    manifest: Manifest

    @property
    def verdict(self) -> Outcome:
        """What the evaluation said of it."""
        return self.manifest.verdict


def list_versions(store: Store, name: str | None = None) -> tuple[VersionInfo, ...]:
    """Every version (of one model, or of all), by name, then oldest first. An unknown name has none.

    Of those that one commit has, the one that was stored last is the newest.
    One that is collected while this reads is left out. Raises `RegistryError` on the first damage.
    """
    versions, faults = survey_versions(store, name)
    if faults:
        raise faults[0]
    return versions


def survey_versions(store: Store, name: str | None = None) -> tuple[tuple[VersionInfo, ...], tuple[RegistryError, ...]]:
    """As `list_versions`, with the damaged manifests and refs beside what is whole."""
    listed = list(store.list(MODELS if name is None else model_prefix(name)))
    versions = select_keys((o.key for o in sorted(listed, key=age_of)), "manifest")
    refs = select_keys((o.key for o in listed), "ref")
    with ThreadPoolExecutor(_READERS) as pool:
        manifests = list(pool.map(lambda pair: _catch(lambda: _read_listed(store, pair[0], pair[1])), versions))
        moves = list(pool.map(lambda pair: _catch(lambda: read_alias(store, pair[0], pair[1])), refs))
    aliases = _group(m for m in moves if isinstance(m, AliasMove))
    found = tuple(
        VersionInfo(owner, version, aliases.get((owner, version), ()), manifest)
        for (owner, version), manifest in zip(versions, manifests, strict=True)
        if isinstance(manifest, Manifest)
    )
    return found, tuple(f for f in (*manifests, *moves) if isinstance(f, RegistryError))


def _catch(read: Callable[[], T]) -> T | RegistryError:
    try:
        return read()
    except RegistryError as fault:
        return fault


def _group(moves: Iterable[AliasMove]) -> dict[tuple[str, str], tuple[str, ...]]:
    aliases: dict[tuple[str, str], tuple[str, ...]] = {}
    for move in moves:
        aliases[move.name, move.version] = (*aliases.get((move.name, move.version), ()), move.alias)
    return aliases


def list_names(store: Store) -> tuple[str, ...]:
    """Every model that has a version, by name."""
    return tuple(sorted({name for name, _ in select_keys((o.key for o in store.list(MODELS)), "manifest")}))


def find_run(store: Store, name: str, run_key: str, *, is_committed: bool = False) -> str | None:
    """The version that was made by this run key, as `select_run` has it, `None` when there is nothing yet."""
    return select_run(list_versions(store, name), run_key, is_committed=is_committed)


def select_run(versions: Iterable[VersionInfo], run_key: str, *, is_committed: bool = False) -> str | None:
    """The newest of these versions that was made by the run key and names a commit.

    Where none does, the newest of all, unless only one `is_committed` counts: nobody can make the others again.
    """
    made = [v for v in versions if v.manifest.run_key == run_key]
    held = [v for v in made if v.manifest.git_commit is not None]
    return next((v.version for v in reversed(held if held or is_committed else made)), None)


def load_manifest(store: Store, name: str, version: str) -> Manifest:
    """The verified manifest of a version. Raises `RegistryError` when it is unknown or damaged."""
    return read_manifest(store, name, version)[1]


def read_manifest(store: Store, name: str, version: str) -> tuple[bytes, Manifest]:
    """The stored bytes and the manifest in them; the digest in the version's name must be theirs."""
    try:
        return _read_stored(store, name, version)
    except NotFoundError as fault:
        raise RegistryError(_describe_missing_version(store, name, version)) from fault


def _read_listed(store: Store, name: str, version: str) -> Manifest | None:
    try:
        return _read_stored(store, name, version)[1]
    except NotFoundError:
        return None


def _read_stored(store: Store, name: str, version: str) -> tuple[bytes, Manifest]:
    key = manifest_key(name, version)
    content, _ = store.get(key)
    return content, verify_manifest(content, name=name, version=version, source=f"{store.url}/{key}")


def verify_manifest(content: bytes, *, name: str, version: str, source: str) -> Manifest:
    """The manifest in stored bytes, if it is the one of this version. Raises `RegistryError` naming `source`."""
    if not digest_bytes(content).startswith(version.rpartition("-")[2]):
        raise RegistryError(f"{source}: damaged, its SHA-256 is {digest_bytes(content)[:12]}...; pull another version")
    manifest = decode_manifest(content, source=source)
    check_files(manifest, source=source)
    if manifest.name != name:
        raise RegistryError(f"{source}: the manifest is of {manifest.name!r}, not of {name!r}; pull another version")
    return manifest


def check_files(manifest: Manifest, *, source: str) -> None:
    """Refuse file lists that no folder can hold: a path twice, below a file, or in the manifest's place."""
    paths = [entry.path for entry in manifest.files]
    folders = {p.rsplit("/", n)[0] for p in paths for n in range(1, p.count("/") + 1)}
    seen = {MANIFEST}
    for path in paths:
        if path in seen or path in folders:
            raise RegistryError(f"{source}: file path {path!r} is taken already; paths in a version must differ")
        seen.add(path)


def suggest(word: str, known: Iterable[str]) -> str:
    """`; did you mean x?` or what there is: the end of a message about an unknown `word`."""
    choices = sorted(set(known))
    close = difflib.get_close_matches(word, choices, n=1)
    if close:
        return f"; did you mean {close[0]}?"
    return f"; there is {', '.join(choices[-_LISTED:])}" if choices else "; there is none yet"


def check_known(store: Store, name: str) -> list[str]:
    """The keys of a model, versions oldest first. Raises `RegistryError` with a suggestion when it has none."""
    keys = [o.key for o in sorted(store.list(model_prefix(name)), key=age_of)]
    if not keys:
        names = (o.key.split("/")[1] for o in store.list(MODELS))
        raise RegistryError(f"{store.url}: no model {name!r}{suggest(name, names)}")
    return keys


def _list_own(store: Store, name: str) -> list[str]:
    """The versions of a model, oldest first, by their names. Raises `RegistryError` when there is no such model."""
    return [version for _, version in select_keys(check_known(store, name), "manifest")]


def complete_version(store: Store, name: str, beginning: str) -> str:
    """The one version that begins so. Raises `RegistryError` where there is none, or more than one."""
    if len(beginning) < _SHORTEST:
        message = f"{name}@{beginning}: expected an alias, or at least {_SHORTEST} characters of a version"
        raise RegistryError(message)
    versions = _list_own(store, name)
    found = [v for v in versions if v.startswith(beginning)]
    if len(found) == 1:
        return found[0]
    if found:
        listed = ", ".join(found[:_LISTED])
        words = f"{len(found)} versions of {name} begin with {beginning!r}: {listed}; give more of it"
        raise RegistryError(f"{store.url}: {words}")
    raise RegistryError(f"{store.url}: no version of {name} begins with {beginning!r}{_name_newest(name, versions)}")


def _name_newest(name: str, versions: Sequence[str]) -> str:
    return f"; the newest version is {versions[-1]}, `appliance list {name}` has all" if versions else ""


def _describe_missing_version(store: Store, name: str, version: str) -> str:
    return f"{store.url}: no version {version!r} of {name}{suggest(version, _list_own(store, name))}"


def describe_missing_alias(store: Store, name: str, alias: str) -> str:
    """The message about an alias that `name` does not have."""
    keys = check_known(store, name)
    aliases, versions = ([item for _, item in select_keys(keys, place)] for place in ("ref", "manifest"))
    return f"{store.url}: no alias {alias!r} of {name}{suggest(alias, aliases)}{_name_newest(name, versions)}"
