"""Steps, tokens, micro-batch and memory of a run, from the recipe, the rows and the weights' headers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from appliance.errors import TrainingError
from appliance.method import (
    VIRTUAL_TOKENS,
    FullMethod,
    Ia3Method,
    LoraMethod,
    Method,
    PrefixTuningMethod,
    PTuningMethod,
    QloraMethod,
    can_checkpoint,
)
from appliance.model.shapes import (
    ModelSizes,
    Shape,
    check_method,
    count_values,
    has_position_table,
    is_expert,
    list_experts,
    list_linears,
    list_stacked_experts,
    read_sizes,
    read_weight_dtypes,
    read_weight_shapes,
    select_adapted,
    select_targets,
)
from appliance.plan.activations import count_activations, select_kind
from appliance.plan.answering import plan_answering
from appliance.plan.machine import Machine
from appliance.plan.memory import (
    Memory,
    count_virtual,
    estimate_static,
    list_longest,
    measure_logit,
    measure_overhead,
    measure_trained,
    measure_width,
)
from appliance.plan.penalty import PenaltyMemory, measure_penalty
from appliance.recipe import (
    Recipe,
    count_steps,
    is_packed,
    name_sharding_obstacle,
    select_learning_rate,
)

_EPOCHS = (2, 5)
_EPOCHS_OF_PROMPTS = (2, 50)
_MICRO_TOKENS = {"cpu": 4096, "gpu": 16384}  # more does not make a step faster a token
_FUSED_IN_EXPERTS = ("gate_proj", "up_proj", "w1", "w3")
_FEW_TOKENS = 1024  # fewer leave the device idle: recomputing activations is cheaper


@dataclass(frozen=True, slots=True)
class Plan:
    """What will be done; bytes are estimates of the peak."""

    rows: int
    validation_rows: int
    epochs: float
    learning_rate: float
    steps: int
    tokens: int
    trained_tokens: int
    longest: int
    micro_batch: int
    effective_batch: int
    devices: int
    sharded: bool
    checkpointing: bool
    parameters: int
    trainable_parameters: int
    peak_bytes: int
    budget_bytes: int
    warnings: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """For `plan --json` and the run folder."""
        return asdict(self)


def build_plan(
    recipe: Recipe,
    *,
    lengths: Sequence[int],
    trained_tokens: int,
    validation_rows: int,
    base: Path,
    machine: Machine,
    longest_general: int | None = None,
    longest_beside: int = 0,
) -> Plan:
    """The plan for training rows of these token `lengths` on `machine`; tokens are over all epochs.

    Of several devices, `machine` is the part that each has, and micro-batch and memory are of each.
    `longest_general` is the longest row that a Fisher is estimated on, `training.max_length` when left out;
    `longest_beside` that of those that are computed and not trained on, as far as they are known.
    """
    section, weights, sizes = recipe.training, read_weight_shapes(base), read_sizes(base)
    check_method(recipe.method, list_linears(weights), base=base)
    _check_penalty(recipe, weights)
    beyond = check_positions(recipe, weights, sizes, longest=max(*lengths, longest_beside))
    trainable = count_trainable(recipe.method, weights, sizes)
    trained = measure_trained(recipe.method, machine)
    width, is_full = measure_width(recipe, machine), isinstance(recipe.method, FullMethod)
    memory = Memory(
        method=recipe.method,
        sizes=sizes,
        activations=count_activations(
            select_kind(recipe, on_gpu=bool(machine.gpu)),
            sizes,
            weights,
            width=width,
            fused_norms=section.speed.norm == "auto",
        ),
        longest=max(lengths),
        width=width,
        static=estimate_static(recipe.method, weights=weights, trainable=trainable, width=width, trained=trained),
        logit=measure_logit(recipe, sizes, machine),
        penalty=_measure_penalty(recipe, weights=weights, base=base),
        trained=trained,
        overhead=measure_overhead(recipe, machine),
        lengths=list_longest(recipe, lengths, sizes, machine),
        copies=2.0 * count_values(list_linears(weights)) if is_full and width < 4 else 0.0,
        gradients=4.0 * (trainable - sizes.vocabulary * sizes.hidden) if is_full else 0.0,
        share=section.effective_batch // recipe.needs.devices,
    )
    micro, checkpointing = _fit(recipe, memory, machine)
    sharded = _is_sharded(recipe, fits=memory.fits(micro, checkpointing, machine))
    if sharded:
        memory = memory.share_out(weights, trainable=trainable, devices=recipe.needs.devices)
        micro, checkpointing = _fit(recipe, memory, machine)
    peak = max(
        memory.estimate(micro, checkpointing=checkpointing),
        memory.estimate_fisher(trainable, longest=longest_general or section.max_length),
    )
    return Plan(
        rows=len(lengths),
        validation_rows=validation_rows,
        epochs=section.epochs,
        learning_rate=select_learning_rate(section, recipe.method),
        steps=count_steps(section, rows=len(lengths)),
        tokens=round(sum(lengths) * section.epochs),
        trained_tokens=round(trained_tokens * section.epochs),
        longest=memory.longest,
        micro_batch=micro,
        effective_batch=section.effective_batch,
        devices=recipe.needs.devices,
        sharded=sharded,
        checkpointing=checkpointing,
        parameters=count_values(weights),
        trainable_parameters=trainable,
        peak_bytes=peak,
        budget_bytes=machine.budget_bytes,
        warnings=(
            *_warn(recipe, rows=len(lengths), peak=peak, machine=machine, penalty=memory.penalty),
            *_warn_of_experts(recipe.method, weights),
            *_warn_of_state(recipe, sizes),
            *(
                [f"{beyond}: what it learns there may not hold; a shorter training.max_length leaves such rows out"]
                if beyond
                else []
            ),
            *plan_answering(recipe, weights=weights, machine=machine).warn(),
        ),
    )


def _fit(recipe: Recipe, memory: Memory, machine: Machine) -> tuple[int, bool]:
    """The micro-batch of one device, and whether it needs gradient checkpointing."""
    return select_micro_batch(
        recipe.training.effective_batch // recipe.needs.devices,
        longest=memory.longest + count_virtual(recipe.method),
        most=_MICRO_TOKENS["gpu" if machine.gpu else "cpu"],
        wanted=recipe.training.gradient_checkpointing if can_checkpoint(recipe.method) else "off",
        fits=lambda m, c: memory.fits(m, c, machine),
    )


def _is_sharded(recipe: Recipe, *, fits: bool) -> bool:
    """Whether each device holds a part of every layer only; by itself where whole ones do not fit."""
    wanted = recipe.needs.weights
    return wanted == "sharded" or (wanted == "auto" and not fits and not name_sharding_obstacle(recipe))


def select_micro_batch(
    effective: int, *, longest: int, most: int, wanted: Literal["auto", "on", "off"], fits: Callable[[int, bool], bool]
) -> tuple[int, bool]:
    """Rows a micro-batch, and whether activations are recomputed (gradient checkpointing).

    The largest divisor of the effective batch whose worst case has at most `most` tokens and fits
    without checkpointing; with it, where that leaves too few tokens to keep the device busy.
    """
    sizes = [m for m in range(effective, 0, -1) if effective % m == 0 and (m * longest <= most or m == 1)]
    least = 0 if wanted == "off" else min(_FEW_TOKENS, sizes[0] * longest)
    plain = [m for m in sizes if m * longest >= least and fits(m, False)] if wanted != "on" else []
    if plain or wanted == "off":
        return (plain or [1])[0], False
    return next((m for m in sizes if fits(m, True)), 1), True


def count_trainable(method: Method, weights: Mapping[str, Shape], sizes: ModelSizes) -> int:
    """How many parameters the method trains, exactly; `weights` are those of the base by name."""
    if isinstance(method, FullMethod):
        return count_values(weights)
    if isinstance(method, LoraMethod):
        return _count_lora(method, select_adapted(method, list_linears(weights)))
    if isinstance(method, Ia3Method):
        scaled = select_targets(method.scaled, list_linears(weights))
        inputs = select_targets(method.scaled_at_input, scaled)
        return sum(s[1] if n in inputs else s[0] for n, s in scaled.items())
    if isinstance(method, PrefixTuningMethod):
        return _count_prefix(method, sizes)
    vectors = method.tokens * sizes.hidden
    return vectors + _count_encoder(method, sizes.hidden) if isinstance(method, PTuningMethod) else vectors


def _count_lora(method: LoraMethod, targets: Mapping[str, Shape]) -> int:
    """Rank x (in + out) of every matrix; mica trains the in-side only, dora also one magnitude per output.

    The first two matrices of an expert are one in memory, which PEFT gives twice the rank over both outputs.
    """
    if method.variant == "mica":
        return sum(method.rank * s[1] for s in targets.values())
    magnitudes = sum(s[0] for s in targets.values()) if method.variant == "dora" else 0
    fused = sum(s[0] for n, s in targets.items() if is_expert(n) and n.rpartition(".")[2] in _FUSED_IN_EXPERTS)
    return method.rank * (sum(map(sum, targets.values())) + fused) + magnitudes


def _count_prefix(method: PrefixTuningMethod, sizes: ModelSizes) -> int:
    """Keys and values of every layer for every token, or the network that makes them from `keys`-wide vectors."""
    made = 2 * sizes.layers * sizes.keys
    if method.projection == "none":
        return method.tokens * made
    inner = method.hidden or sizes.keys
    return method.tokens * sizes.keys + (sizes.keys + 1) * inner + (inner + 1) * made


def _count_encoder(method: PTuningMethod, hidden: int) -> int:
    """Three layers, or two bidirectional LSTM layers (four gates, two biases) and two layers."""
    inner = method.hidden
    if method.encoder == "mlp":
        return (hidden + 1) * inner + (inner + 1) * inner + (inner + 1) * hidden
    gates = 2 * 4 * inner * ((hidden + inner + 2) + (2 * inner + inner + 2))
    return gates + (2 * inner + 1) * 2 * inner + (2 * inner + 1) * hidden


def _check_penalty(recipe: Recipe, weights: Mapping[str, Shape]) -> None:
    """Raise `TrainingError` where the penalty would have to know what an adapter does to experts."""
    if recipe.forgetting is None or recipe.forgetting.ewc is None or not isinstance(recipe.method, LoraMethod):
        return
    if any(map(is_expert, select_adapted(recipe.method, list_linears(weights)))):
        raise TrainingError(
            "forgetting.ewc: knows what single matrices were, and the experts of this model are one tensor; "
            "name the other layers in method.targets, or use forgetting.replay"
        )


def _measure_penalty(recipe: Recipe, *, weights: Mapping[str, Shape], base: Path) -> PenaltyMemory:
    if recipe.forgetting is None or recipe.forgetting.ewc is None:
        return PenaltyMemory()
    dtypes = read_weight_dtypes(base) if isinstance(recipe.method, FullMethod) else {}
    return measure_penalty(recipe.method, weights, dtypes)


def _warn(recipe: Recipe, *, rows: int, peak: int, machine: Machine, penalty: PenaltyMemory) -> list[str]:
    """What the guide would question; each names its range."""
    found = []
    low, high = recipe.method.usual_rates
    rate = recipe.training.learning_rate
    if rate is not None and not low <= rate <= high:
        found.append(
            f"training.learning_rate {rate:g} is outside the usual {low:g} to {high:g} for {recipe.method.type}"
        )
    least, most = _EPOCHS_OF_PROMPTS if isinstance(recipe.method, VIRTUAL_TOKENS) else _EPOCHS
    if not least <= recipe.training.epochs <= most:
        found.append(f"training.epochs {recipe.training.epochs:g} is outside the usual {least} to {most}")
    if (batch := recipe.training.effective_batch) >= rows:
        found.append(
            f"training.effective_batch {batch:,} makes one step an epoch of the {rows:,} training rows, which hardly "
            "trains; write a smaller one"
        )
    if isinstance(recipe.method, FullMethod) and rows < 10_000:
        found.append(f"full training usually wants 10,000 rows or more, found {rows}; lora is the default for fewer")
    if recipe.training.precision == "bf16" and not machine.has_bf16:
        found.append(
            f"training.precision bf16 is emulated by {machine.gpu or 'this CPU'} and slower than fp32 there; "
            "write auto to use what the device computes in"
        )
    if peak > machine.budget_bytes:
        found.append(
            f"estimated peak {peak / 2**30:.1f} GiB exceeds the {machine.budget_bytes / 2**30:.1f} GiB here; "
            f"use qlora, a shorter max_length or a larger device{_advise(penalty)}"
        )
    return found


def _warn_of_experts(method: Method, weights: Mapping[str, Shape]) -> list[str]:
    """Where 4 bits are of little use, and where adapters leave out most of a model."""
    stacked = list_stacked_experts(weights)
    share = count_values(list_experts(weights) | stacked) / max(1, count_values(weights))
    found = []
    if isinstance(method, QloraMethod) and share:
        kept = f"qlora leaves the experts of this model, {share:.0%} of its weights, in 16 bits"
        found.append(
            f"{kept}: bitsandbytes rounds linear layers, and they are one tensor; lora takes about the same memory"
        )
    if isinstance(method, LoraMethod) and stacked:
        found.append(
            f"adapters leave the experts of this model, {share:.0%} of its weights, as they are: its files hold those "
            "of a layer as one tensor"
        )
    return found


def check_positions(
    recipe: Recipe, weights: Mapping[str, Shape], sizes: ModelSizes, *, longest: int, kind: str = "row"
) -> str:
    """What is longer than the base was made for; empty where nothing is, or its configuration does not tell.

    Raises `TrainingError` where positions are a table.
    """
    virtual = count_virtual(recipe.method)
    if not sizes.context or longest + virtual <= sizes.context:
        return ""
    more = f" and {virtual} virtual ones" if virtual else ""
    made = f"the base was made for {sizes.context} (its config.json)"
    beyond = f"the longest {kind} has {longest} tokens{more}, and {made}"
    if has_position_table(weights):
        raise TrainingError(f"{beyond}, and there are no others; write that as training.max_length, or another base")
    return beyond


def _warn_of_state(recipe: Recipe, sizes: ModelSizes) -> list[str]:
    """Where rows will be padded, see `training.guards`: a run finds out for sure."""
    is_open = recipe.training.packing == "auto" and is_packed(recipe.training, recipe.method)
    if not (sizes.carries_state and is_open):
        return []
    return ["layers of this model carry a state from token to token, so its rows are trained padded, which is slower"]


def _advise(penalty: PenaltyMemory) -> str:
    """What else would help where the penalty takes its part."""
    if not penalty.kept:
        return ""
    return (
        f"; forgetting.ewc takes {penalty.estimating / 2**30:.1f} GiB of it before the first step and "
        f"{penalty.kept / 2**30:.1f} after: name fewer method.targets, or use forgetting.replay"
    )
