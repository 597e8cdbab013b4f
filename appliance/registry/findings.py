"""A finding of the check: one object that is not as it should be, told by key, found, expected, next action.

Damage is what a consumer or a promotion would meet, or what proves that somebody changed the past. A
note is what an interrupted publisher or promoter leaves behind by design: nothing has to be done.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeVar

from appliance.errors import ApplianceError, NotFoundError, StoreError
from appliance.registry.layout import FORMAT
from appliance.store import Store

T = TypeVar("T")

Kind = Literal[
    "format", "unknown-key", "unreadable", "lease", "ref", "dangling-ref", "broken-history",
    "manifest", "missing-blob", "wrong-size", "wrong-bytes",
    "unfinished-move", "orphan",
]  # fmt: skip
Severity = Literal["damage", "note"]

_NOTES: tuple[Kind, ...] = ("unfinished-move", "orphan")
_LONGEST = 300
RESTORE = "restore it from the bucket's object versions or a backup"
REPUBLISH = f"{RESTORE}, or remove it and run `appliance publish` on its run folder"


@dataclass(frozen=True, slots=True)
class Finding:
    """`kind` is stable and explained in docs/operations.md; `key` is below the store's prefix."""

    kind: Kind
    key: str
    found: str
    expected: str
    action: str

    @property
    def severity(self) -> Severity:
        """Whether somebody must act."""
        return "note" if self.kind in _NOTES else "damage"

    @property
    def subject(self) -> str:
        """The key as one line."""
        return shorten(self.key)

    def __str__(self) -> str:
        """One line: key, kind, found, expected, what to do."""
        return f"{self.subject}: [{self.kind}] {self.found}, expected {self.expected}; {self.action}"


def shorten(text: str) -> str:
    """Text from a store as one line that a terminal cannot take for commands."""
    line = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return line if len(line) <= _LONGEST else line[:_LONGEST] + "..."


def describe_fault(fault: ApplianceError, *, source: str) -> str:
    """What a fault says was found: its message without its subject and without its advice."""
    return shorten(str(fault).removeprefix(f"{source}: ").rpartition("; ")[0] or str(fault))


def ask(store: Store, key: str, call: Callable[[], T | None]) -> T | Finding | None:
    """What `call` got of the object under `key`, `None` when it is not there, a finding when it cannot be read.

    Raises `StoreError` when it is not the object: then the store does not answer for FORMAT.json either.
    """
    try:
        return call()
    except NotFoundError:
        return None
    except StoreError as fault:
        store.head(FORMAT)
        return Finding(
            "unreadable",
            key,
            found=describe_fault(fault, source=f"{store.url}/{key}"),
            expected="its content",
            action="look at the store's own log and repair, then check again",
        )
