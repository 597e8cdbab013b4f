"""The recipe: what to train, on what, and what it must prove. YAML in, a frozen `Recipe` out.

Recipes say *what*; command-line flags say *where*. Every fault of a file is reported at once, each
with its line, and a misspelt key is an error with a suggestion, never a default read as `None`.
"""

from __future__ import annotations

import difflib
import json
import math
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import AfterValidator, Field, ValidationError, model_validator

from appliance.digest import digest_json
from appliance.document import Document, load_document, parse_document
from appliance.errors import RecipeError
from appliance.method import (
    VIRTUAL_TOKENS,
    Method,
    PrefixTuningMethod,
    Section,
)

Line = dict[tuple[str | int, ...], int]


def _check_path(path: str) -> str:
    """Refuse what no file system can hold: asking for it would fail anywhere (Linux: NAME_MAX, PATH_MAX)."""
    if "\0" in path or len(path.encode()) >= 4096 or any(len(part.encode()) > 255 for part in path.split("/")):
        raise ValueError("no file can have this name: a part has at most 255 bytes; correct the path")
    return path


FilePath = Annotated[str, AfterValidator(_check_path)]
_EWC_METHODS = ("full", "lora", "qlora")


class BaseSection(Section):
    """The base model that the adapter is trained on."""

    model: FilePath = Field(
        min_length=1,
        description="hub id, local folder, .gguf file, s3:// prefix, or package:NAME/FILE.gguf of an installed package",
    )
    revision: str | None = Field(None, description="hub commit (40 hex digits); a branch name moves and is refused")

    @model_validator(mode="after")
    def _pin_hub_models(self) -> BaseSection:
        if self.is_hub and not _is_commit(self.revision):
            message = (
                "a hub model needs 'revision' with its 40-digit commit, so that a retrain uses the same weights; "
                f"`git ls-remote https://huggingface.co/{self.model} HEAD` shows it"
            )
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

    path: FilePath = Field(min_length=1, description="folder of *.jsonl files with a dataset.yaml")
    split: SplitSection = SplitSection()

    @property
    def name(self) -> str:
        """The last part of the path."""
        return Path(self.path).name


class SpeedSection(Section):
    """Which way the same numbers are computed; `auto` is right unless a library is to be ruled out.

    `standard` is what transformers and PEFT do by themselves. attention: packed rows apart, without
    a mask. head: `labelled` scores trained positions only, `fused` never holds the logits. lora: one
    pass per adapted layer. prefix: what packed rows begin with alike, such as a system prompt, once per
    micro-batch. compile: torch.compile of every decoder layer, minutes before the first step.
    """

    attention: Literal["auto", "standard"] = "auto"
    head: Literal["auto", "standard", "labelled", "fused"] = "auto"
    lora: Literal["auto", "standard"] = "auto"
    prefix: Literal["auto", "standard"] = "auto"
    compile: Literal["off", "on"] = "off"


class TrainingSection(Section):
    """How the method is optimised. Rates follow the method where left out."""

    epochs: float = Field(3.0, gt=0.0, le=100.0)
    learning_rate: float | None = Field(None, gt=0.0, le=1.0)
    effective_batch: int = Field(16, ge=1, description="rows per optimizer step")
    max_length: int = Field(1024, ge=16, description="tokens; a longer row is never cut")
    overlong: Literal["refuse", "drop"] = Field(
        "refuse", description="what becomes of rows longer than max_length; dropped rows are listed on the card"
    )
    packing: Literal["auto"] | bool = Field(
        "auto", description="rows end to end without padding; auto: wherever the method allows it"
    )
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup_ratio: float = Field(0.05, ge=0.0, le=0.5)
    weight_decay: float = Field(0.0, ge=0.0, le=1.0)
    max_grad_norm: float = Field(1.0, gt=0.0)
    seed: int = Field(17, ge=0, lt=2**31)
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    gradient_checkpointing: Literal["auto", "on", "off"] = "auto"
    checkpoints: int = Field(8, ge=1, le=1000, description="checkpoints, each with an evaluation, over the whole run")
    keep: Literal["last", "best_loss", "best_exact_match"] = Field(
        "best_loss",
        description="whose weights become the artifact; without validation rows always the last step's",
    )
    patience: int | None = Field(
        3, ge=1, le=1000, description="evaluations in a row without a better one that stop training early; null: never"
    )
    speed: SpeedSection = SpeedSection()


class ReplaySection(Section):
    """General rows mixed into the training rows, so that what the base can do is rehearsed."""

    path: FilePath | None = Field(
        None,
        min_length=1,
        description="folder of general rows; left out, the base model's own answers to the package's general prompts",
    )
    share: float = Field(0.1, gt=0.0, le=0.5, description="general rows as a share of all training rows")


class EwcSection(Section):
    """Elastic weight consolidation (Kirkpatrick et al. 2017, arXiv 1612.00796)."""

    path: FilePath | None = Field(
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


class NeedsSection(Section):
    """What the machine must have; it decides where a recipe runs, never what is made."""

    gpu: Literal["required", "optional"] = Field("optional", description="required: refuse a machine without one")
    devices: int = Field(1, ge=1, le=64, description="GPUs of one host that share out the rows of every step")


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
    needs: NeedsSection = NeedsSection()

    @model_validator(mode="after")
    def _check_combination(self) -> Recipe:
        if self.training.keep == "best_exact_match" and not self.dataset.split.validation:
            raise ValueError(
                "training.keep best_exact_match needs validation rows, and dataset.split.validation is 0; raise it"
            )
        if isinstance(self.method, VIRTUAL_TOKENS) and self.training.packing is True:
            raise ValueError(
                f"training.packing: {self.method.type} puts virtual tokens before every row, so rows cannot share one "
                "flat batch; write auto or false"
            )
        if isinstance(self.method, PrefixTuningMethod) and self.training.gradient_checkpointing == "on":
            raise ValueError(
                "training.gradient_checkpointing: prefix-tuning trains keys and values, which checkpointing would "
                "drop; write auto or off"
            )
        return self

    @model_validator(mode="after")
    def _check_devices(self) -> Recipe:
        rows, devices = self.training.effective_batch, self.needs.devices
        if rows % devices:
            raise ValueError(
                f"needs.devices: {devices} devices cannot share {rows} rows a step evenly; "
                "make training.effective_batch a multiple of it"
            )
        return self

    @model_validator(mode="after")
    def _check_ewc(self) -> Recipe:
        if self.forgetting is None or self.forgetting.ewc is None:
            return self
        if self.method.type not in _EWC_METHODS:
            raise ValueError(
                f"forgetting.ewc: method {self.method.type} changes no weight of the base; "
                f"use it with {', '.join(_EWC_METHODS)}, or use forgetting.replay"
            )
        variant = getattr(self.method, "variant", None)
        if variant in ("dora", "mica"):
            raise ValueError(
                f"forgetting.ewc: the update of variant {variant} is not that of a plain LoRA layer; "
                "use another variant, or forgetting.replay"
            )
        return self

    @property
    def digest(self) -> str:
        """SHA-256 of the recipe's values; comments, order and spelled-out defaults do not count.

        Neither does `needs`, which says where and not what; `forgetting` and `training.speed.prefix`,
        which are younger than the first versions, count only where they are given.
        """
        values = self.model_dump(mode="json", exclude={"needs"})
        if self.forgetting is None:
            del values["forgetting"]
        if self.training.speed.prefix == "auto":
            del values["training"]["speed"]["prefix"]
        return digest_json(values)


def is_packed(section: TrainingSection, method: Method) -> bool:
    """Whether rows share flat batches: as the recipe says, else wherever the method has no virtual tokens."""
    return not isinstance(method, VIRTUAL_TOKENS) if section.packing == "auto" else section.packing


def count_steps(section: TrainingSection, *, rows: int) -> int:
    """Optimizer steps of the whole run; the last batch of an epoch may be smaller."""
    return max(1, math.ceil(math.ceil(rows / section.effective_batch) * section.epochs))


def load_recipe(path: Path) -> Recipe:
    """Read and check one recipe file. Raises `RecipeError` that lists every fault with its line."""
    try:
        document = load_document(path, error=RecipeError)
    except OSError as fault:
        message = f"{path}: cannot be read ({fault}); give the path of a recipe, e.g. recipes/demo.yaml"
        raise RecipeError(message) from fault
    return _build_recipe(document, source=str(path))


def parse_recipe(text: str, *, source: str) -> Recipe:
    """A `Recipe` from YAML text; `source` is the name that messages carry."""
    return _build_recipe(parse_document(text, source=source, error=RecipeError), source=source)


def _build_recipe(document: Document, *, source: str) -> Recipe:
    values = document.values
    if not isinstance(values, dict):
        message = f"{source}:1: found {type(values).__name__}, expected keys such as name, base, dataset, method"
        raise RecipeError(message)
    lines: Line = {}
    faults = [f"{source}:{line}: {text}" for line, text in _map_lines(document.root, lines, ())]
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
    path = _strip_tags(error["loc"], lines) or _read_path(error["msg"], lines)
    line = next((lines[path[:n]] for n in range(len(path), 0, -1) if path[:n] in lines), 1)
    where = f"{source}:{line}"
    if error["type"] == "extra_forbidden":
        return f"{where}: unknown key {_dotted(path)}{_did_you_mean(error['loc'])}"
    if error["type"] == "missing":
        return f"{where}: key {_dotted(path)} is missing; add it"
    if error["type"] == "union_tag_not_found":
        return f"{where}: key {_dotted((*path, 'type'))} is missing; use one of {', '.join(_METHODS)}"
    found = f", found {error['input']!r}" if not isinstance(error["input"], dict | Recipe) else ""
    text = error["msg"].removeprefix("Value error, ").removeprefix(f"{_dotted(path)}: ")
    return f"{where}: {_dotted(path) or 'recipe'}: {text}{found}"


def _read_path(message: str, lines: Line) -> tuple[str | int, ...]:
    """The key that a fault of the whole recipe starts with, when the file has it."""
    path = tuple(message.removeprefix("Value error, ").partition(": ")[0].split("."))
    return path if path in lines else ()


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
    get_args(m.model_fields["type"].annotation)[0]: m for m in get_args(get_args(Method)[0])
}


def render_schema() -> str:
    """The JSON Schema of a recipe, for editors (`docs/recipe.schema.json`)."""
    schema = {"$schema": "https://json-schema.org/draft/2020-12/schema", **Recipe.model_json_schema()}
    return json.dumps(schema, indent=2, sort_keys=True) + "\n"
