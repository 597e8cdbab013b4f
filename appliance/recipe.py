"""The recipe: what to train, on what, and what it must prove. YAML in, a frozen `Recipe` out.

Recipes say *what*; command-line flags say *where*. Every fault of a file is reported at once, each
with its line, and a misspelt key is an error with a suggestion, never a default read as `None`.
"""

from __future__ import annotations

import json
import math
from functools import reduce
from operator import getitem
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, ValidationError, ValidationInfo, field_validator, model_validator

from appliance.digest import digest_json
from appliance.document import Document, load_document, parse_document
from appliance.errors import RecipeError
from appliance.faults import ALIAS, NAME, Lines, describe_fault, map_lines, name_kind, suggest_recipes
from appliance.method import NUMBER, VIRTUAL_TOKENS, WHOLE, Float, Int, Method, Section, can_checkpoint


def _check_path(path: str) -> str:
    """Refuse what no file system can hold: asking for it would fail anywhere (Linux: NAME_MAX, PATH_MAX)."""
    if "\0" in path or len(path.encode()) >= 4096 or any(len(part.encode()) > 255 for part in path.split("/")):
        raise ValueError("no file can have this name: a part has at most 255 bytes; correct the path")
    return path


FilePath = Annotated[str, AfterValidator(_check_path)]
_EWC_METHODS = ("full", "lora", "qlora")
_YOUNGER = {  # keys that came after the first versions, and what each says where it is left out
    "forgetting": None,
    "evaluation.gates.champion_margin": None,
    "training.speed.prefix": "auto",
    "training.speed.norm": "auto",
}


class BaseSection(Section):
    """The base model that the adapter is trained on."""

    model: FilePath = Field(
        min_length=1,
        description="hub id, local folder, .gguf file, s3:// prefix, or package:NAME/FILE.gguf of an installed package",
    )
    revision: str | None = Field(
        None, validate_default=True, description="hub commit (40 hex digits); a branch name moves and is refused"
    )

    @field_validator("revision")
    @classmethod
    def _pin_hub_models(cls, revision: str | None, info: ValidationInfo) -> str | None:
        model = info.data.get("model", "")
        if _is_on_hub(model) and not _is_commit(revision):
            lack = "a hub model needs 'revision' with" if revision is None else "no commit, and a name moves; write"
            raise ValueError(
                f"{lack} its 40-digit commit, so that a retrain uses the same weights; "
                f"`git ls-remote https://huggingface.co/{model} HEAD` shows it"
            )
        return revision

    @property
    def is_hub(self) -> bool:
        """Whether `model` is an `owner/name` on the model hub."""
        return _is_on_hub(self.model)


class SplitSection(Section):
    """How groups of rows are divided; the decision depends on `salt` and the group alone."""

    validation: Float = Field(
        0.1, ge=0.0, le=0.4, description="share of the groups that is looked at during training and never trained on"
    )
    test: Float = Field(0.1, gt=0.0, le=0.5, description="share of the groups that only the evaluation sees")
    salt: str = Field(
        "appliance-1",
        description="another text draws another split: rows that the version in use was trained on come into the test",
    )


class DatasetSection(Section):
    """Where the rows are, relative to the repository's root."""

    path: FilePath = Field(min_length=1, description="folder of *.jsonl files with a dataset.yaml")
    split: SplitSection = Field(SplitSection(), description="how rows are divided into train, validation and test")

    @property
    def name(self) -> str:
        """The last part of the path."""
        return Path(self.path).name


class SpeedSection(Section):
    """Which way the same numbers are computed; `auto` is right unless a library is to be ruled out.

    `standard` is what transformers and PEFT do by themselves.
    """

    attention: Literal["auto", "standard"] = Field("auto", description="auto: packed rows apart, without a mask")
    head: Literal["auto", "standard", "labelled", "fused"] = Field(
        "auto",
        description="labelled: scores trained positions only; fused: also never holds the logits; auto: fused on CUDA "
        "with a C compiler, else labelled",
    )
    lora: Literal["auto", "standard"] = Field("auto", description="auto: one pass per adapted layer; not for qlora")
    norm: Literal["auto", "standard"] = Field("auto", description="auto: one pass per RMS norm")
    prefix: Literal["auto", "standard"] = Field(
        "auto",
        description="auto: what packed rows begin with alike (a system prompt) is computed once per micro-batch",
    )
    compile: Literal["off", "on"] = Field(
        "off", description="torch.compile of every decoder layer: minutes before the first step"
    )


class TrainingSection(Section):
    """How the method is optimised. Rates follow the method where left out."""

    epochs: Float = Field(3.0, gt=0.0, le=100.0, description="times that each training row is gone through, at most")
    learning_rate: Annotated[float, Field(gt=0.0, le=1.0), NUMBER] | None = Field(
        None, description="peak of the schedule; left out, the method's usual one (docs/methods.md)"
    )
    effective_batch: Int = Field(16, ge=1, description="rows per optimizer step")
    max_length: Int = Field(1024, ge=16, description="tokens; a longer row is never cut")
    overlong: Literal["refuse", "drop"] = Field(
        "refuse", description="what becomes of rows longer than max_length; dropped rows are listed on the card"
    )
    packing: Literal["auto"] | bool = Field(
        "auto", description="rows end to end without padding; auto: wherever method and model allow it"
    )
    schedule: Literal["cosine", "linear", "constant"] = Field(
        "cosine", description="the rate after the warm-up: to 0 along a cosine or a line, or as it is"
    )
    warmup_ratio: Float = Field(0.05, ge=0.0, le=0.5, description="share of the steps in which the rate rises from 0")
    weight_decay: Float = Field(0.0, ge=0.0, le=1.0, description="AdamW's decay of the trained weights")
    max_grad_norm: Float = Field(1.0, gt=0.0, description="a longer gradient is scaled down to this norm")
    seed: Int = Field(17, ge=0, lt=2**31, description="decides the order of rows, the start of an adapter, and dropout")
    precision: Literal["auto", "bf16", "fp32"] = Field(
        "auto",
        description="of the products, in training and evaluation; auto: bf16 where the device multiplies it natively",
    )
    gradient_checkpointing: Literal["auto", "on", "off"] = Field(
        "auto", description="on: activations are computed again instead of kept; auto: where memory needs it"
    )
    checkpoints: Int = Field(8, ge=1, le=1000, description="checkpoints, each with an evaluation, over the whole run")
    keep: Literal["last", "best_loss", "best_exact_match"] = Field(
        "best_loss",
        description="whose weights become the artifact; without validation rows always the last step's",
    )
    patience: Annotated[int, Field(ge=1, le=1000), WHOLE] | None = Field(
        3, description="evaluations in a row without a better one that stop training early; null: never"
    )
    speed: SpeedSection = Field(SpeedSection(), description="rules a speed lever out; nothing has to be turned on")


class ReplaySection(Section):
    """General rows mixed into the training rows, so that what the base can do is rehearsed."""

    path: FilePath | None = Field(
        None,
        min_length=1,
        description="folder of general rows; left out, the base model's own answers to the package's general prompts",
    )
    share: Float = Field(0.1, gt=0.0, le=0.5, description="general rows as a share of all training rows")


class EwcSection(Section):
    """Elastic weight consolidation (Kirkpatrick et al. 2017, arXiv 1612.00796)."""

    path: FilePath | None = Field(
        None,
        min_length=1,
        description="folder of general rows; left out, the base model's own answers to the package's general prompts",
    )
    rows: Int = Field(128, ge=1, le=10_000, description="general rows that the Fisher is estimated on, at most")
    strength: Float = Field(
        300.0, gt=0.0, le=1e9, description="weight of the estimated drift on general rows (nats per token) in the loss"
    )


class ForgettingSection(Section):
    """What protects the base model's abilities while the task is learned."""

    replay: ReplaySection | None = Field(None, description="general rows among the training rows; any method")
    ewc: EwcSection | None = Field(
        None, description="a price on changing weights that general answers depend on; full, lora and qlora"
    )

    @model_validator(mode="after")
    def _ask_for_one(self) -> ForgettingSection:
        if self.replay is None and self.ewc is None:
            raise ValueError("says nothing; give replay or ewc, or leave the section out")
        return self


class GateSection(Section):
    """What the candidate must show before an alias moves."""

    alpha: Float = Field(0.01, gt=0.0, le=0.2, description="two-sided level of the exact test")
    min_gain: Float = Field(0.02, ge=0.0, le=1.0, description="smallest gain worth its maintenance, as a share of rows")
    min_test_rows: Int = Field(
        100, ge=1, description="with fewer (those of one group are one) the verdict is inconclusive, or reject"
    )
    champion_margin: Float | None = Field(
        None, gt=0.0, le=1.0, description="share of rows; a loss to the champion of so much is ruled out at 95%"
    )


class EvaluationSection(Section):
    """How base and candidate are compared on the held-out test rows."""

    metric: Literal["exact_match", "contract_valid"] = Field(
        "exact_match",
        description="what makes an answer right: it equals the reference (JSON: as a value), or it keeps the contract",
    )
    system_prompt: str | None = Field(
        None, description="the best prompt for the base model; the rows' own when left out"
    )
    few_shot: Int = Field(3, ge=0, le=16, description="demonstrations from train for the few-shot arm; 0 leaves it out")
    max_new_tokens: Int = Field(256, ge=1, le=8192, description="an answer is cut here; give the longest room")
    gates: GateSection = Field(GateSection(), description="what the candidate must show")


class PublishSection(Section):
    """Where a version goes when the verdict is `ship`."""

    alias: str = Field(
        "staging",
        pattern=ALIAS,
        description="the name that `ship` moves; its version is the champion",
    )


class NeedsSection(Section):
    """What the machine must have; it decides where a recipe runs, never what is made."""

    gpu: Literal["required", "optional"] = Field("optional", description="required: refuse a machine without one")
    devices: Int = Field(1, ge=1, le=64, description="GPUs of one host that share out the rows of every step")
    weights: Literal["auto", "whole", "sharded"] = Field(
        "auto",
        description="the model on several devices: whole on each, or each its part of every layer; "
        "auto: sharded where whole ones do not fit",
    )


class Recipe(Section):
    """One adapter to keep up to date: base x dataset x method, and what it must prove."""

    name: str = Field(pattern=NAME, description="the model's name in the registry")
    base: BaseSection = Field(description="the model to start from")
    dataset: DatasetSection = Field(description="the rows, and how they are divided")
    method: Method = Field(description="what is trained; `type` chooses it")
    training: TrainingSection = Field(TrainingSection(), description="how it is optimised")
    forgetting: ForgettingSection | None = Field(None, description="what protects the base model's other abilities")
    evaluation: EvaluationSection = Field(EvaluationSection(), description="how base and candidate are compared")
    publish: PublishSection = Field(PublishSection(), description="where a version goes that ships")
    needs: NeedsSection = Field(NeedsSection(), description="what the machine must have; never what is made")

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
        if self.training.gradient_checkpointing == "on" and not can_checkpoint(self.method):
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
    def _check_weights(self) -> Recipe:
        obstacle = name_sharding_obstacle(self)
        if self.needs.weights == "sharded" and obstacle:
            raise ValueError(f"needs.weights: {obstacle}; write auto or whole")
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

        Neither does `needs`, which says where and not what; the keys in `_YOUNGER` count only where they are given:
        a new release must not train everything anew.
        """
        values = self.model_dump(mode="json", exclude={"needs"})
        for path, default in _YOUNGER.items():
            *sections, key = path.split(".")
            if (section := reduce(getitem, sections, values))[key] == default:
                del section[key]
        return digest_json(values)


def name_sharding_obstacle(recipe: Recipe) -> str:
    """Why every device of a run must hold the base whole; empty where each can keep a part of it."""
    if recipe.needs.devices == 1:
        return "there is one device, which has to hold the base whole"
    if recipe.forgetting is not None and recipe.forgetting.ewc is not None:
        return "forgetting.ewc looks at whole weights"
    if recipe.training.speed.compile == "on":
        return "training.speed.compile compiles layers whose weights are whole"
    return ""


def is_packed(section: TrainingSection, method: Method) -> bool:
    """Whether rows share flat batches: as the recipe says, else wherever the method has no virtual tokens."""
    return not isinstance(method, VIRTUAL_TOKENS) if section.packing == "auto" else section.packing


def count_steps(section: TrainingSection, *, rows: int) -> int:
    """Optimizer steps of the whole run; the last batch of an epoch may be smaller."""
    return max(1, math.ceil(math.ceil(rows / section.effective_batch) * section.epochs))


def select_learning_rate(section: TrainingSection, method: Method) -> float:
    """The recipe's rate, or the usual one of the method."""
    return section.learning_rate if section.learning_rate is not None else method.rate


def load_recipe(path: Path) -> Recipe:
    """Read and check one recipe file. Raises `RecipeError` that lists every fault with its line."""
    try:
        document = load_document(path, error=RecipeError)
    except OSError as fault:
        reason = (fault.strerror or str(fault)).lower()
        raise RecipeError(f"{path}: cannot be read, {reason}; {suggest_recipes(path)}") from fault
    return _build_recipe(document, source=str(path))


def parse_recipe(text: str, *, source: str) -> Recipe:
    """A `Recipe` from YAML text; `source` is the name that messages carry."""
    return _build_recipe(parse_document(text, source=source, error=RecipeError), source=source)


def _build_recipe(document: Document, *, source: str) -> Recipe:
    values = document.values
    if not isinstance(values, dict):
        message = f"{source}:1: found {name_kind(values)}, expected keys such as name, base, dataset, method"
        raise RecipeError(message)
    lines: Lines = {}
    faults = [f"{source}:{line}: {text}" for line, text in map_lines(document.root, lines, ())]
    try:
        recipe = Recipe.model_validate(values)
    except ValidationError as invalid:
        faults += [describe_fault(e, model=Recipe, lines=lines, source=source) for e in invalid.errors()]
    if faults:
        raise RecipeError("\n".join(dict.fromkeys(faults)))
    return recipe


def _is_on_hub(model: str) -> bool:
    looks_local = model.startswith((".", "/", "~", "s3://", "package:")) or model.endswith(".gguf")
    return not looks_local and model.count("/") == 1


def _is_commit(revision: str | None) -> bool:
    return revision is not None and len(revision) == 40 and all(c in "0123456789abcdef" for c in revision)


def render_schema() -> str:
    """The JSON Schema of a recipe, for editors (`docs/recipe.schema.json`)."""
    schema = {"$schema": "https://json-schema.org/draft/2020-12/schema", **Recipe.model_json_schema()}
    return json.dumps(schema, indent=2, sort_keys=True) + "\n"
