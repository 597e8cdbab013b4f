"""Where everything in a registry lies, and which names are allowed to become part of a key.

The registry is a bucket prefix and nothing else. Only `refs/` is ever overwritten; a version exists
when its manifest does. Names are checked here and nowhere else, before they reach a store.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from appliance.digest import canonical_json
from appliance.errors import NotFoundError, PreconditionFailedError, RegistryError
from appliance.store import Store, StoredObject

FORMAT = "FORMAT.json"
MANIFEST = "manifest.json"
MODELS = "models/"
SEAL = "sealed.json"
_SCHEMA = 1
_NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,62}")
_ALIAS = re.compile(r"[a-z][a-z0-9-]{0,31}")
_VERSION = re.compile(r"[0-9]{8,20}-[0-9a-z]{1,12}-[0-9a-f]{12}")
_BEGINNING = re.compile(r"[0-9][0-9a-z-]{0,46}")
_SHA256 = re.compile(r"[0-9a-f]{64}")

Place = Literal["format", "blob", "manifest", "tombstone", "ref", "reflog", "lease", "checkpoint", "plan"]
_MODEL = rf"{MODELS}(?P<name>{_NAME.pattern})/"
_PLACES: dict[Place, re.Pattern[str]] = {
    "format": re.compile(re.escape(FORMAT)),
    "blob": re.compile(r"blobs/sha256/(?P<fold>[0-9a-f]{2})/(?P<item>(?P=fold)[0-9a-f]{62})"),
    "manifest": re.compile(rf"{_MODEL}versions/(?P<item>{_VERSION.pattern})/{re.escape(MANIFEST)}"),
    "tombstone": re.compile(rf"{_MODEL}versions/(?P<item>{_VERSION.pattern})/tombstone\.json"),
    "ref": re.compile(rf"{_MODEL}refs/(?P<item>{_ALIAS.pattern})\.json"),
    "reflog": re.compile(rf"{_MODEL}reflog/(?P<item>[0-9]{{8,}}-[0-9a-f]{{12}})\.json"),
    "lease": re.compile(rf"leases/model-(?P<name>{_NAME.pattern})\.json"),
    "checkpoint": re.compile(rf"checkpoints/(?P<item>{_SHA256.pattern})/.+"),
    "plan": re.compile(r"gc/(?P<item>[0-9]{8}T[0-9]{6}Z-[0-9a-f]{12})\.json"),
}


@dataclass(frozen=True, slots=True)
class Location:
    """What a key is by its form: its place, the model in it, and digest, version, alias or record."""

    key: str
    place: Place
    name: str = ""
    item: str = ""


def blob_key(sha256: str) -> str:
    """`blobs/sha256/ab/<hex>`."""
    if not _SHA256.fullmatch(sha256):
        raise RegistryError(f"{sha256!r}: not a SHA-256 digest; expected 64 lower-case hex digits")
    return f"blobs/sha256/{sha256[:2]}/{sha256}"


def model_prefix(name: str) -> str:
    """`models/<name>/`."""
    return f"{MODELS}{check_name(name)}/"


def manifest_key(name: str, version: str) -> str:
    """`models/<name>/versions/<vid>/manifest.json`."""
    return f"{model_prefix(name)}versions/{check_version(version)}/{MANIFEST}"


def tombstone_key(name: str, version: str) -> str:
    """`models/<name>/versions/<vid>/tombstone.json`: the version was collected, or is about to be."""
    return f"{model_prefix(name)}versions/{check_version(version)}/tombstone.json"


def plan_key(at: str, *, sha256: str) -> str:
    """`gc/<ts>-<sha12>.json`, for a UTC time 20260131T120000Z and the digest of the plan."""
    return f"gc/{at}-{sha256[:12]}.json"


def ref_key(name: str, alias: str) -> str:
    """`models/<name>/refs/<alias>.json`."""
    return f"{model_prefix(name)}refs/{check_alias(alias)}.json"


def reflog_key(name: str, *, seq: int, sha256: str) -> str:
    """`models/<name>/reflog/<seq>-<sha12>.json`; the number is padded so that keys sort."""
    return f"{model_prefix(name)}reflog/{seq:08d}-{sha256[:12]}.json"


def check_name(name: str) -> str:
    """A model name, or `RegistryError`."""
    if not _NAME.fullmatch(name):
        raise RegistryError(f"{name!r}: not a model name; expected lower-case letters, digits and '-', at most 63")
    return name


def check_alias(alias: str) -> str:
    """An alias, or `RegistryError`; it starts with a letter, so it is never mistaken for a version."""
    if not _ALIAS.fullmatch(alias):
        raise RegistryError(f"{alias!r}: not an alias; expected a letter, then letters, digits and '-', at most 32")
    return alias


def check_version(version: str) -> str:
    """A version, or `RegistryError`."""
    if not is_version(version):
        raise RegistryError(f"{version!r}: not a version; expected <commit time>-<commit>-<manifest digest>")
    return version


def is_version(text: str) -> bool:
    """Whether `text` has the form of a version."""
    return _VERSION.fullmatch(text) is not None


def is_beginning(text: str) -> bool:
    """Whether `text` can be the beginning of a version; no alias can, since it starts with a letter."""
    return _BEGINNING.fullmatch(text) is not None


def locate(key: str) -> Location | None:
    """What `key` is, `None` for a key that nothing here writes."""
    for place, form in _PLACES.items():
        if match := form.fullmatch(key):
            groups = match.groupdict()
            return Location(key, place, groups.get("name", ""), groups.get("item", ""))
    return None


def select_keys(keys: Iterable[str], place: Place) -> list[tuple[str, str]]:
    """Model and item of every key in this place; what nothing here writes is in none."""
    return [(at.name, at.item) for at in map(locate, keys) if at is not None and at.place == place]


def age_of(stored: StoredObject) -> tuple[str, float, str]:
    """Sorts the manifests of a model oldest first: by commit, and those of one commit by when they were stored."""
    return stored.key.rpartition("-")[0], stored.modified or 0.0, stored.key


def check_format(store: Store, *, create: bool = False) -> None:
    """Refuse a registry of another schema; with `create`, mark an empty store as a registry."""
    try:
        _check_schema(store)
    except NotFoundError:
        if create:
            create_format(store)


def create_format(store: Store) -> None:
    """Mark a store as a registry; where the mark is, trying to make it still tells whether the store may be written."""
    content = canonical_json({"format": "appliance-registry", "schema": _SCHEMA})
    try:
        store.put(FORMAT, content, if_none_match=True)
    except PreconditionFailedError:  # another first publisher was faster
        _check_schema(store)


def _check_schema(store: Store) -> None:
    content, _ = store.get(FORMAT)
    verify_schema(content, source=f"{store.url}/{FORMAT}")


def verify_schema(content: bytes, *, source: str) -> None:
    """Refuse what marks a registry of another schema. Raises `RegistryError`."""
    schema = decode_schema(content, source=source)
    if schema != _SCHEMA:
        raise RegistryError(f"{source}: schema {schema}, this release knows {_SCHEMA}; use a newer release")


def decode_schema(content: bytes, *, source: str) -> object:
    """The schema that `FORMAT.json` states. Raises `RegistryError` when it is damaged."""
    try:
        return json.loads(content)["schema"]
    except (ValueError, KeyError, TypeError, RecursionError) as fault:
        raise RegistryError(f"{source}: damaged; is this prefix a registry?") from fault
