"""The recipe: what to train, on what, and what it must prove. YAML in, a frozen `Recipe` out.

Recipes say *what*; command-line flags say *where*. Every fault of a file is reported at once, each
with its line, and a misspelt key is an error with a suggestion, never a default read as `None`.
"""

from __future__ import annotations

import difflib
import json
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from appliance.digest import digest_json
from appliance.errors import RecipeError

Line = dict[tuple[str | int, ...], int]
_EWC_METHODS = ("full", "lora", "qlora")


class Section(BaseModel):
    """A part of a recipe: frozen, and closed to keys it does not know."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class BaseSection(Section):
    """The base model that the adapter is trained on."""

    model: str = Field(
        min_length=1,
        description="hub id, local folder, .gguf file, s3:// prefix, or package:NAME/FILE.gguf of an installed package",
    )
    revision: str | None = Field(None, description="hub commit (40 hex digits); a branch name moves and is refused")

    @model_validator(mode="after")
    def _pin_hub_models(self) -> BaseSection:
        if self.is_hub and not _is_commit(self.revision):
            message = "a hub model needs 'revision' with its 40-digit commit, so that a retrain uses the same weights"
            raise ValueError(message)
        return self

    @property
    def is_hub(self) -> bool:
        """Whether `model` is an `owner/name` on the model hub."""
        looks_local = self.model.startswith((".", "/", "~", "s3://", "package:")) or self.model.endswith(".gguf")
        return not looks_local and self.model.count("/") == 1


class SplitSection(Section):
    """How groups of rows are divided; the decision depends on `salt` and the group alone."""

    validation: float = Field(0.1, ge=0.0, le=0.4)
    test: float = Field(0.1, gt=0.0, le=0.5)
    salt: str = "appliance-1"


class DatasetSection(Section):
    """Where the rows are, relative to the repository's root."""

    path: str = Field(min_length=1, description="folder of *.jsonl files with a dataset.yaml")
    split: SplitSection = SplitSection()

    @property
    def name(self) -> str:
        """The last part of the path."""
        return Path(self.path).name


class LoraMethod(Section):
    """Low-rank adapters on a frozen base (Hu et al. 2022, arXiv 2106.09685)."""

    type: Literal["lora"]
    variant: Literal["plain", "rslora", "dora", "pissa", "olora"] = "plain"
    rank: int = Field(16, ge=1, le=1024)
    alpha: int | None = Field(None, ge=1, description="scale; twice the rank when left out")
    dropout: float = Field(0.0, ge=0.0, lt=1.0)
    targets: Literal["all-linear"] | tuple[str, ...] = "all-linear"


class QloraMethod(LoraMethod):
    """LoRA over a base in 4-bit NormalFloat, doubly quantised (Dettmers et al. 2023, arXiv 2305.14314)."""

    type: Literal["qlora"]  # type: ignore[assignment]


class FullMethod(Section):
    """All weights are trained; the artifact is a full copy of the model."""

    type: Literal["full"]


Method = Annotated[LoraMethod | QloraMethod | FullMethod, Field(discriminator="type")]


class TrainingSection(Section):
    """How the method is optimised. Rates follow the method where left out."""

    epochs: float = Field(3.0, gt=0.0, le=100.0)
    learning_rate: float | None = Field(None, gt=0.0, le=1.0)
    effective_batch: int = Field(16, ge=1, description="rows per optimizer step")
    max_length: int = Field(1024, ge=16, description="tokens; a longer row is refused, never cut")
    packing: bool = True
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup_ratio: float = Field(0.05, ge=0.0, le=0.5)
    weight_decay: float = Field(0.0, ge=0.0, le=1.0)
    max_grad_norm: float = Field(1.0, gt=0.0)
    seed: int = Field(17, ge=0, lt=2**31)
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    gradient_checkpointing: Literal["auto", "on", "off"] = "auto"
    checkpoints: int = Field(8, ge=1, le=1000, description="checkpoints over the whole run")


class ReplaySection(Section):
    """General rows mixed into the training rows, so that what the base can do is rehearsed."""

    path: str | None = Field(
        None,
        min_length=1,
        description="folder of general rows; left out, the base model's own answers to the package's general prompts",
    )
    share: float = Field(0.1, gt=0.0, le=0.5, description="general rows as a share of all training rows")


class EwcSection(Section):
    """Elastic weight consolidation (Kirkpatrick et al. 2017, arXiv 1612.00796)."""

    path: str | None = Field(
        None,
        min_length=1,
        description="folder of general rows; left out, the base model's own answers to the package's general prompts",
    )
    rows: int = Field(128, ge=1, le=10_000, description="general rows that the Fisher is estimated on, at most")
    strength: float = Field(
        300.0, gt=0.0, le=1e9, description="weight of the estimated drift on general rows (nats per token) in the loss"
    )


class ForgettingSection(Section):
    """What protects the base model's abilities while the task is learned."""

    replay: ReplaySection | None = None
    ewc: EwcSection | None = None

    @model_validator(mode="after")
    def _ask_for_one(self) -> ForgettingSection:
        if self.replay is None and self.ewc is None:
            raise ValueError("says nothing; give replay or ewc, or leave the section out")
        return self


class GateSection(Section):
    """What the candidate must show before an alias moves."""

    alpha: float = Field(0.01, gt=0.0, le=0.2, description="two-sided level of the exact McNemar test")
    min_gain: float = Field(0.02, ge=0.0, le=1.0, description="smallest gain worth its maintenance, as a share of rows")
    min_test_rows: int = Field(100, ge=1, description="below this the verdict is inconclusive")


class EvaluationSection(Section):
    """How base and candidate are compared on the held-out test rows."""

    metric: Literal["exact_match", "contract_valid"] = "exact_match"
    system_prompt: str | None = Field(
        None, description="the best prompt for the base model; the rows' own when left out"
    )
    few_shot: int = Field(3, ge=0, le=16, description="demonstrations from train for the few-shot arm; 0 leaves it out")
    max_new_tokens: int = Field(256, ge=1, le=8192)
    gates: GateSection = GateSection()


class PublishSection(Section):
    """Where a version goes when the verdict is `ship`."""

    alias: str = Field("staging", pattern=r"^[a-z][a-z0-9-]{0,31}$")


class Recipe(Section):
    """One adapter to keep up to date: base x dataset x method, and what it must prove."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9-]{0,62}$", description="the model's name in the registry")
    base: BaseSection
    dataset: DatasetSection
    method: Method
    training: TrainingSection = TrainingSection()
    forgetting: ForgettingSection | None = None
    evaluation: EvaluationSection = EvaluationSection()
    publish: PublishSection = PublishSection()

    @model_validator(mode="after")
    def _check_ewc(self) -> Recipe:
        if self.forgetting is None or self.forgetting.ewc is None:
            return self
        if self.method.type not in _EWC_METHODS:
            raise ValueError(
                f"forgetting.ewc: method {self.method.type} changes no weight of the base; "
                f"use it with {', '.join(_EWC_METHODS)}, or use forgetting.replay"
            )
        if getattr(self.method, "variant", None) == "dora":
            raise ValueError(
                "forgetting.ewc: the update of variant dora is not B A alone; use another variant, or forgetting.replay"
            )
        return self

    @property
    def digest(self) -> str:
        """SHA-256 of the recipe's values; comments, order and spelled-out defaults do not count.

        `forgetting` counts only where it is given, so that older recipes keep their runs.
        """
        values = self.model_dump(mode="json")
        if self.forgetting is None:
            del values["forgetting"]
        return digest_json(values)


def load_recipe(path: Path) -> Recipe:
    """Read and check one recipe file. Raises `RecipeError` that lists every fault with its line."""
    try:
        text = path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as fault:
        message = f"{path}: cannot be read ({fault}); give the path of a recipe, e.g. recipes/demo.yaml"
        raise RecipeError(message) from fault
    return parse_recipe(text, source=str(path))


def parse_recipe(text: str, *, source: str) -> Recipe:
    """A `Recipe` from YAML text; `source` is the name that messages carry."""
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        values = yaml.safe_load(text)
    except yaml.YAMLError as fault:
        mark = getattr(fault, "problem_mark", None)
        line = mark.line + 1 if mark else 1
        problem = getattr(fault, "problem", None) or "not YAML"
        message = f"{source}:{line}: {problem}; check the indentation and the quotes"
        raise RecipeError(message) from fault
    if not isinstance(values, dict):
        message = f"{source}:1: found {type(values).__name__}, expected keys such as name, base, dataset, method"
        raise RecipeError(message)
    lines: Line = {}
    faults = [f"{source}:{line}: {text}" for line, text in _map_lines(root, lines, ())]
    try:
        recipe = Recipe.model_validate(values)
    except ValidationError as invalid:
        faults += [_describe(e, lines=lines, source=source) for e in invalid.errors()]
    if faults:
        raise RecipeError("\n".join(dict.fromkeys(faults)))
    return recipe


def _map_lines(node: Any, lines: Line, path: tuple[str | int, ...]) -> list[tuple[int, str]]:
    """Fill `lines` with the line of every key path; return duplicate keys as (line, fault)."""
    faults = []
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            here = (*path, key.value)
            if here in lines:
                faults.append((key.start_mark.line + 1, f"key {_dotted(here)} is given twice; keep one"))
            lines[here] = key.start_mark.line + 1
            faults += _map_lines(value, lines, here)
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            lines[(*path, index)] = value.start_mark.line + 1
            faults += _map_lines(value, lines, (*path, index))
    return faults


def _describe(error: Any, *, lines: Line, source: str) -> str:
    """One pydantic error as `file:line: key: what; next action`."""
    path = _strip_tags(error["loc"], lines)
    line = next((lines[path[:n]] for n in range(len(path), 0, -1) if path[:n] in lines), 1)
    where = f"{source}:{line}"
    if error["type"] == "extra_forbidden":
        return f"{where}: unknown key {_dotted(path)}{_did_you_mean(error['loc'])}"
    if error["type"] == "missing":
        return f"{where}: key {_dotted(path)} is missing; add it"
    found = f", found {error['input']!r}" if not isinstance(error["input"], dict) else ""
    return f"{where}: {_dotted(path) or 'recipe'}: {error['msg'].removeprefix('Value error, ')}{found}"


def _strip_tags(loc: tuple[str | int, ...], lines: Line) -> tuple[str | int, ...]:
    """Leave out what pydantic puts into a location that is no key of the file (union tags)."""
    path: tuple[str | int, ...] = ()
    for index, part in enumerate(loc):
        is_last = index == len(loc) - 1
        is_tag = part in _METHODS and path == ("method",)
        if ((*path, part) in lines or is_last) and not is_tag:
            path = (*path, part)
    return path


def _did_you_mean(loc: tuple[str | int, ...]) -> str:
    model: Any = Recipe
    for part in loc[:-1]:
        if part in _METHODS:
            model = _METHODS[str(part)]
        elif part != "method" and isinstance(part, str) and part in model.model_fields:
            model = _find_section(model.model_fields[part].annotation)
    known = list(model.model_fields)
    close = difflib.get_close_matches(str(loc[-1]), known, n=1, cutoff=0.5)
    return f"; did you mean {close[0]}?" if close else f"; known here: {', '.join(known)}"


def _find_section(annotation: Any) -> Any:
    """The section in `Section | None`, or the section itself."""
    return next(a for a in (*get_args(annotation), annotation) if isinstance(a, type) and issubclass(a, Section))


def _dotted(path: tuple[str | int, ...]) -> str:
    return ".".join(str(p) for p in path)


def _is_commit(revision: str | None) -> bool:
    return revision is not None and len(revision) == 40 and all(c in "0123456789abcdef" for c in revision)


_METHODS: dict[str, type[Section]] = {
    get_args(m.model_fields["type"].annotation)[0]: m for m in (LoraMethod, QloraMethod, FullMethod)
}


def render_schema() -> str:
    """The JSON Schema of a recipe, for editors (`docs/recipe.schema.json`)."""
    schema = {"$schema": "https://json-schema.org/draft/2020-12/schema", **Recipe.model_json_schema()}
    return json.dumps(schema, indent=2, sort_keys=True) + "\n"
