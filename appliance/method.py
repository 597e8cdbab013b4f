"""The methods of training, one closed section each: what is trained, from what start, with which keys.

A combination that a library would accept and then do something else with is refused here, with the reason.
`rate` is what a method is trained with where the recipe names none, `usual_rates` what the plan does not question:
by the papers and by PEFT's own examples (docs/methods.md has the sources).
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, field_validator, model_validator
from pydantic_core import PydanticKnownError


class Section(BaseModel):
    """A part of a recipe: frozen, and closed to keys it does not know."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


def _refuse_truth(error: Literal["int_type", "float_type"]) -> BeforeValidator:
    """`true` is no number, though Python counts it as 1."""

    def refuse(value: object) -> object:
        if isinstance(value, bool):
            raise PydanticKnownError(error)
        return value

    return BeforeValidator(refuse)


WHOLE, NUMBER = _refuse_truth("int_type"), _refuse_truth("float_type")
Int = Annotated[int, WHOLE]
Float = Annotated[float, NUMBER]


def _check_targets(names: tuple[str, ...]) -> tuple[str, ...]:
    if not names:
        raise ValueError("no layer is named; name some or leave the key out")
    if "lm_head" in names:
        raise ValueError("lm_head cannot be a target: the loss takes its weights directly; leave it out")
    return names


_VARIANT = "another scale, form or start of the adapters (docs/methods.md)"
Targets = Annotated[Literal["all-linear"] | tuple[str, ...], AfterValidator(_check_targets)]


class LoraMethod(Section):
    """Low-rank adapters on a frozen base (Hu et al. 2022, arXiv 2106.09685).

    Variants change the scale (rslora, arXiv 2312.03732), the form (dora, arXiv 2402.09353) or the
    start: gaussian, orthogonal, pissa (arXiv 2404.02948), olora (arXiv 2406.01775), mica (arXiv 2604.01694).
    """

    rate: ClassVar[float] = 2e-4
    usual_rates: ClassVar[tuple[float, float]] = (1e-4, 3e-4)
    type: Literal["lora"] = Field(description="low-rank adapters on the frozen base")
    variant: Literal["plain", "rslora", "dora", "gaussian", "orthogonal", "pissa", "olora", "mica"] = Field(
        "plain", description=_VARIANT
    )
    rank: Int = Field(16, ge=1, le=1024, description="inner width of an adapter: its capacity and its size")
    alpha: Annotated[int, Field(ge=1), WHOLE] | None = Field(None, description="scale; twice the rank when left out")
    dropout: Float = Field(0.0, ge=0.0, lt=1.0, description="share of an adapter's inputs that a step leaves out")
    targets: Targets = Field(
        "all-linear",
        description="names of the layers that get adapters; all-linear: those of the language model, without its head, "
        "routers and tiny gates",
    )

    @field_validator("variant", mode="before")
    @classmethod
    def _refuse_four_bit_variants(cls, variant: object) -> object:
        if variant == "loftq":
            raise ValueError("loftq makes up for 4-bit rounding, which a 16-bit base has not; use it with qlora")
        return variant

    @model_validator(mode="after")
    def _check_rank(self) -> LoraMethod:
        if self.variant == "orthogonal" and self.rank % 2:
            raise ValueError(f"the variant orthogonal needs an even rank, found {self.rank}")
        return self


class QloraMethod(LoraMethod):
    """LoRA over a base in 4-bit NormalFloat, doubly quantised (Dettmers et al. 2023, arXiv 2305.14314).

    loftq starts from the base's rounding error (arXiv 2310.08659).
    """

    type: Literal["qlora"] = Field(description="low-rank adapters on the frozen base in 4 bits")  # type: ignore[assignment]
    variant: Literal["plain", "rslora", "dora", "gaussian", "orthogonal", "olora", "loftq"] = Field(  # type: ignore[assignment]
        "plain", description=_VARIANT
    )

    @field_validator("variant", mode="before")
    @classmethod
    def _refuse_four_bit_variants(cls, variant: object) -> object:
        if variant in ("pissa", "mica"):
            raise ValueError(
                f"{variant} decomposes the base's weights, which are in 4 bits here; use it with lora, or take loftq"
            )
        return variant


class PromptTuningMethod(Section):
    """Trained vectors before the embedded row; the base is frozen (Lester et al. 2021, arXiv 2104.08691)."""

    rate: ClassVar[float] = 3e-2
    usual_rates: ClassVar[tuple[float, float]] = (1e-2, 3e-1)
    type: Literal["prompt-tuning"] = Field(description="trained vectors before the row")
    tokens: Int = Field(20, ge=1, le=1024, description="virtual tokens before every row")
    init: Literal["vocabulary", "text", "random"] = Field(
        "vocabulary", description="start from words drawn at random, from the words of 'text', or from noise"
    )
    text: str | None = Field(None, min_length=1, description="for init: text; repeated until it fills 'tokens'")

    @model_validator(mode="after")
    def _check_text(self) -> PromptTuningMethod:
        if (self.init == "text") != (self.text is not None):
            raise ValueError("'text' and init: text go together; give both or neither")
        return self


class PrefixTuningMethod(Section):
    """Trained keys and values before the row in every layer (Li and Liang 2021, arXiv 2101.00190).

    With `projection: mlp` they are made by a two-layer network that is dropped after training.
    """

    rate: ClassVar[float] = 1e-2
    usual_rates: ClassVar[tuple[float, float]] = (1e-3, 3e-2)
    type: Literal["prefix-tuning"] = Field(description="trained keys and values before the row in every layer")
    tokens: Int = Field(20, ge=1, le=1024, description="virtual tokens before every row")
    init: Literal["zero", "random"] = Field("zero", description="what keys and values start from")
    projection: Literal["none", "mlp"] = Field(
        "none", description="mlp: they are made by a two-layer network that is dropped after training"
    )
    hidden: Annotated[int, Field(ge=1, le=65536), WHOLE] | None = Field(
        None, description="width of the projection; the keys' when left out"
    )

    @model_validator(mode="after")
    def _check_hidden(self) -> PrefixTuningMethod:
        if self.hidden is not None and self.projection == "none":
            raise ValueError("'hidden' is the width of 'projection: mlp'; remove it or add the projection")
        return self


class PTuningMethod(Section):
    """Trained vectors before the embedded row, made by a small encoder (Liu et al. 2021, arXiv 2103.10385).

    The encoder is dropped after training: the artifact holds the vectors it made.
    """

    rate: ClassVar[float] = 1e-3
    usual_rates: ClassVar[tuple[float, float]] = (1e-4, 1e-2)
    type: Literal["p-tuning"] = Field(description="trained vectors before the row, made by a small encoder")
    tokens: Int = Field(20, ge=1, le=1024, description="virtual tokens before every row")
    encoder: Literal["mlp", "lstm"] = Field("mlp", description="what makes the vectors; dropped after training")
    hidden: Int = Field(128, ge=1, le=65536, description="width of the encoder")


class Ia3Method(Section):
    """Trained scales of keys, values and inner activations (Liu et al. 2022, arXiv 2205.05638)."""

    rate: ClassVar[float] = 3e-3
    usual_rates: ClassVar[tuple[float, float]] = (1e-3, 1e-2)
    type: Literal["ia3"] = Field(description="trained scales of keys, values and inner activations")
    targets: Annotated[Literal["auto"] | tuple[str, ...], AfterValidator(_check_targets)] = Field(
        "auto", description="auto: k_proj, v_proj and down_proj"
    )
    feedforward: Literal["auto"] | tuple[str, ...] = Field(
        "auto", description="the targets whose input is scaled instead of their output; auto: down_proj"
    )

    @model_validator(mode="after")
    def _check_feedforward(self) -> Ia3Method:
        if self.feedforward != "auto" and (outside := set(self.feedforward) - set(self.scaled)):
            raise ValueError(f"feedforward: {', '.join(sorted(outside))} is not among the targets; add it to them")
        return self

    @property
    def scaled(self) -> tuple[str, ...]:
        """The layers that get scales."""
        return ("k_proj", "v_proj", "down_proj") if self.targets == "auto" else self.targets

    @property
    def scaled_at_input(self) -> tuple[str, ...]:
        """Those of them whose input is scaled."""
        return tuple(
            t for t in self.scaled if t in (("down_proj",) if self.feedforward == "auto" else self.feedforward)
        )


class FullMethod(Section):
    """All weights are trained; the artifact is a full copy of the model."""

    rate: ClassVar[float] = 2e-5
    usual_rates: ClassVar[tuple[float, float]] = (1e-5, 2e-5)
    type: Literal["full"] = Field(description="all weights; the artifact is a full copy of the model")


Method = Annotated[
    LoraMethod | QloraMethod | PromptTuningMethod | PrefixTuningMethod | PTuningMethod | Ia3Method | FullMethod,
    Field(discriminator="type"),
]

VIRTUAL_TOKENS = (PromptTuningMethod, PrefixTuningMethod, PTuningMethod)


def can_checkpoint(method: Method) -> bool:
    """Whether activations can be computed again instead of kept; prefix tuning would lose its keys and values."""
    return not isinstance(method, PrefixTuningMethod)
