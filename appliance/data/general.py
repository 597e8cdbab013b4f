"""General rows: what the base model must keep doing while it learns the task.

They have the schema of every row and are checked like every row, but they stand outside the
reviewed set: `provenance: general` says that no person vouches for them, they are never split, and
they never reach validation or test. A recipe that names no folder gets the prompts that ship with
the package, which the base model is still to answer itself.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

from appliance.data.check import check_dataset
from appliance.data.findings import Finding
from appliance.data.rows import Dataset
from appliance.data.split import Splits
from appliance.digest import digest_json
from appliance.errors import DatasetError
from appliance.example import Example, normalise_text
from appliance.recipe import EwcSection, ForgettingSection, ReplaySection

OWN_ANSWER_TOKENS = 160
_PROMPTS = Path(__file__).with_name("general-prompts.txt")
_SHOWN = 20


@dataclass(frozen=True, slots=True)
class GeneralRows:
    """The rows behind one key of the recipe; `examples` is `None` where the base model is still to answer."""

    key: str
    examples: tuple[Example, ...] | None
    digest: str


def load_general(section: ReplaySection | EwcSection, *, root: Path) -> GeneralRows:
    """The general rows a section asks for. Raises `DatasetError` listing every fault of the folder."""
    key = f"forgetting.{'replay' if isinstance(section, ReplaySection) else 'ewc'}.path"
    if section.path is None:
        return GeneralRows(key, None, digest_json([list(load_prompts()), OWN_ANSWER_TOKENS]))
    dataset, faults = check_general(root / section.path)
    if dataset is None or faults:
        more = f"\n... and {len(faults) - _SHOWN} more" if len(faults) > _SHOWN else ""
        lines = (f"{key}: {f}".replace(f"{root}/", "") for f in faults[:_SHOWN])
        raise DatasetError("\n".join(lines) + more)
    return GeneralRows(key, dataset.examples, dataset.digest)


def check_general(folder: Path) -> tuple[Dataset | None, tuple[Finding, ...]]:
    """The folder of general rows, and what keeps it from being used; no dataset where it cannot be read.

    They may be few and share prompts, since they are never split.
    """
    if not folder.is_dir():
        fix = "run `dvc pull`, correct the path, or leave it out to use the base model's own answers"
        return None, (Finding("error", "missing", str(folder), "no such folder", fix),)
    report = check_dataset(folder)
    rows = report.dataset.rows if report.dataset is not None else ()
    general = {r.where for r in rows if r.example.provenance == "general"}
    return report.dataset, tuple(
        f
        for f in report.errors
        if f.rule not in ("volume", "shared-prompt") and not (f.rule == "unreviewed" and f.where in general)
    )


def digest_general(
    section: ForgettingSection | None, replay: GeneralRows | None, ewc: GeneralRows | None
) -> str | None:
    """What the run key takes from general rows: the content behind each key; `None` without a section."""
    if section is None:
        return None
    return digest_json({"replay": replay.digest if replay else None, "ewc": ewc.digest if ewc else None})


def load_prompts() -> tuple[str, ...]:
    """The general prompts of the package, one a line, in order."""
    lines = _PROMPTS.read_text("utf-8").splitlines()
    return tuple(line for line in lines if line.strip() and not line.startswith("#"))


def check_apart(general: GeneralRows, splits: Splits) -> None:
    """No general row asks what a row of the dataset asks. Raises `DatasetError` naming the pairs.

    A general row would carry the test's question into training, or contradict a training row.
    """
    asked = find_shared(general.examples or (), splits)
    if asked:
        lines = [
            f"{general.key}: row {g} has the prompt of {side} row {e}; remove it" for g, (side, e) in asked.items()
        ]
        more = f"\n... and {len(lines) - _SHOWN} more" if len(lines) > _SHOWN else ""
        raise DatasetError("\n".join(lines[:_SHOWN]) + more)


def find_shared(general: Iterable[Example], splits: Splits) -> dict[str, tuple[str, str]]:
    """Ids of general rows that ask what a row of the dataset asks, with that row's side and id."""
    sides = (("train", splits.train), ("validation", splits.validation), ("test", splits.test))
    prompts = {e.normalised_prompt: (side, e.id) for side, examples in sides for e in examples}
    return {g.id: prompts[asked[0]] for g in general if (asked := [p for p in _list_prompts(g) if p in prompts])}


def _list_prompts(example: Example) -> list[str]:
    """Every beginning of the conversation that an assistant turn answers, and every turn alone."""
    turns = [normalise_text(m.content) for m in example.prompt if m.role != "system"]
    return [*turns, *accumulate(turns, lambda a, b: f"{a}\n{b}")]


def order_general(examples: Iterable[Example]) -> list[Example]:
    """The rows in an order of their content alone, so that a choice does not depend on files or lines."""
    return sorted(examples, key=lambda e: hashlib.sha256(f"general\0{e.content_hash}".encode()).digest())


def count_replayed(share: float, *, train_rows: int) -> int:
    """How many general rows make `share` of all training rows; at least one."""
    return max(1, round(train_rows * share / (1.0 - share)))
