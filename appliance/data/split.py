"""The split: which side a group of rows is on, for ever.

A side is a pure function of the salt and the group, so adding rows never moves a row between train
and test, and nothing about the order or the number of rows matters.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from appliance.data.rows import Dataset
from appliance.digest import digest_json
from appliance.errors import DatasetError
from appliance.example import Example
from appliance.recipe import SplitSection

Side = Literal["train", "validation", "test"]
_SPACE = float(2**64)


@dataclass(frozen=True, slots=True)
class Splits:
    """The examples of each side, in row order."""

    train: tuple[Example, ...]
    validation: tuple[Example, ...]
    test: tuple[Example, ...]

    @property
    def digest(self) -> str:
        """SHA-256 of the sorted (content hash, side) pairs: which content is on which side."""
        sides = {"train": self.train, "validation": self.validation, "test": self.test}
        return digest_json(sorted([e.content_hash, side] for side, examples in sides.items() for e in examples))


def select_side(group_key: str, split: SplitSection) -> Side:
    """The side of one group: test below `test`, then validation, then train."""
    hashed = hashlib.sha256(f"{split.salt}\0{group_key}".encode("utf-8", "surrogatepass")).digest()
    share = int.from_bytes(hashed[:8], "big") / _SPACE
    if share < split.test:
        return "test"
    return "validation" if share < split.test + split.validation else "train"


def split_dataset(dataset: Dataset | Sequence[Example], split: SplitSection) -> Splits:
    """Divide the rows by group. Raises `DatasetError` when train or test would be empty."""
    examples = dataset.examples if isinstance(dataset, Dataset) else tuple(dataset)
    sides: dict[Side, list[Example]] = {"train": [], "validation": [], "test": []}
    for example in examples:
        sides[select_side(example.group_key, split)].append(example)
    for side in ("train", "test"):
        if not sides[side]:
            raise DatasetError(
                f"the {side} split is empty: {len(examples)} rows at test {split.test:g}; "
                "add rows, or give dataset.split other shares in the recipe"
            )
    return Splits(tuple(sides["train"]), tuple(sides["validation"]), tuple(sides["test"]))


def summarise_dataset(dataset: Dataset, splits: Splits) -> dict[str, Any]:
    """What the card says of the data; `system_prompt` is the one that every row has, else `None`."""
    examples = dataset.examples
    provenance = [e.provenance for e in examples]
    systems = {next((m.content for m in e.messages if m.role == "system"), None) for e in examples}
    return {
        "name": dataset.card.name,
        "licence": dataset.card.licence,
        "rows": len(examples),
        "train": len(splits.train),
        "validation": len(splits.validation),
        "test": len(splits.test),
        "digest": dataset.digest,
        "split_digest": splits.digest,
        "provenance": {p: provenance.count(p) for p in sorted(set(provenance))},
        "system_prompt": systems.pop() if len(systems) == 1 else None,
    }
