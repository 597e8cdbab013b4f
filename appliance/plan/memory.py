"""The memory of a run on one device: weights, gradients, optimizer, activations and LM head.

It is an account of the large parts, an estimate; the first step proves it, and out of memory is answered
with half the micro-batch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from appliance.method import FullMethod, Method, PrefixTuningMethod, PromptTuningMethod, PTuningMethod, QloraMethod
from appliance.model.shapes import ModelSizes, Shape, count_values, list_experts, list_linears
from appliance.plan.activations import Activations
from appliance.plan.machine import Machine
from appliance.plan.penalty import PenaltyMemory
from appliance.recipe import Recipe, is_packed

FITS = 0.8  # of a device; the rest is for what is not counted
Overhead = tuple[float, int]  # a factor on what is held, for what the allocator cannot use again; the process itself
_OVERHEAD: Overhead = (1.07, 1 << 30)
_OVERHEAD_OF_A_GPU: Overhead = (1.02, 1 << 29)  # its context; little is lost in pages that grow
_LOGIT = 12.3  # bytes for each logit that the libraries' own loss holds: in bf16, in fp32, and what it makes of them


@dataclass(frozen=True, slots=True)
class Memory:
    """What a run holds on one device: what stays, what a micro-batch adds, what elastic weight consolidation takes.

    `lengths` are those of rows, the longest first, where they lie end to end on a GPU; none where each counts as the
    longest. `loading` is held before the first step alone, where it is more than what stays. Full training in bf16
    computes with `copies` of its fp32 weights, which a backward pass gives up as it makes `gradients` (4 bytes a
    weight behind the head, whose own comes before any activation goes); the first of a step, of the `share` of rows
    that a device computes in it, has none to add to yet. With its last layer all of them are there.
    `logit`: bytes that a step holds for each logit, 0 where the head never holds them.
    """

    method: Method
    sizes: ModelSizes
    activations: Activations
    longest: int
    width: float
    static: float
    logit: float
    penalty: PenaltyMemory
    trained: float = 16.0
    overhead: Overhead = _OVERHEAD
    lengths: tuple[int, ...] = ()
    loading: float = 0.0
    copies: float = 0.0
    gradients: float = 0.0
    share: int = 0

    def estimate(self, micro_batch: int, *, checkpointing: bool) -> int:
        """Bytes at the peak of a step."""
        tokens = sum(self.lengths[:micro_batch]) or micro_batch * self.longest
        moving = self._estimate_moving(micro_batch, tokens, checkpointing=checkpointing, logit=self.logit)
        spared = self.gradients if micro_batch == self.share else 0.0
        passing = max(moving - spared, self.activations.estimate_layer(tokens), self.penalty.passing)
        return add_overhead(max(self.loading, self.static + self.penalty.kept + passing), self.overhead)

    def share_out(self, weights: Mapping[str, Shape], *, trainable: int, devices: int) -> Memory:
        """The same where each of `devices` holds its part of the `weights` in the layers.

        Two layers are whole at a time: the one in use, and the next. 4-bit weights are made whole on the device before,
        and their scales stay whole. Full training shares out all it holds, and gathers gradients as it does weights:
        of a layer on the way in fp32, of what is beside the layers all at once.
        """
        linear = count_values(list_linears(weights))
        if isinstance(self.method, FullMethod):
            layer, beside = linear / self.sizes.layers, trainable - linear
            gathered = (3.0 * self.width + 4.0) * layer + 8.0 * beside
            head = 2.0 * self.sizes.vocabulary * self.sizes.hidden if self.copies else 0.0
            gradients = self.gradients / devices
            return replace(self, static=self.static / devices + gathered, copies=head, gradients=gradients)
        is_rounded = isinstance(self.method, QloraMethod)
        layers = self.width * linear - ((self.width - 0.5) * _count_rounded(weights) if is_rounded else 0.0)
        given_up = max(0.0, layers - layers / devices - 2 * layers / self.sizes.layers)
        loading = self.static - self.trained * trainable if is_rounded else 0.0
        return replace(self, static=self.static - given_up, loading=loading)

    def fits(self, micro_batch: int, checkpointing: bool, machine: Machine) -> bool:
        """Whether a step's peak leaves the device some room."""
        return self.estimate(micro_batch, checkpointing=checkpointing) <= FITS * machine.budget_bytes

    def estimate_fisher(self, trainable: int, *, longest: int) -> int:
        """Bytes at the peak of estimating the Fisher, one row at a time, before there is an optimizer; else 0."""
        if not self.penalty.estimating:
            return 0
        moving = self._estimate_moving(1, longest, checkpointing=False, logit=_LOGIT)
        before = self.static - (self.trained - 4.0) * trainable
        return add_overhead(before + self.penalty.estimating + moving, self.overhead)

    def _estimate_moving(self, rows: int, held: int, *, checkpointing: bool, logit: float) -> float:
        """Bytes of activations, copies and head for `rows` rows of `held` tokens together.

        Virtual tokens before the embeddings cost what tokens cost; a prefix costs its keys and values.
        """
        virtual = rows * count_virtual(self.method)
        tokens = held + virtual
        moving = self.activations.estimate(tokens, checkpointing=checkpointing, copies=self.copies)
        if isinstance(self.method, PrefixTuningMethod):  # once as made and once with each layer's own keys behind it
            places = self.sizes.layers * (held + rows * self.method.tokens)
            moving += self.width * 4.0 * places * self.sizes.keys
        return moving + (logit * tokens * self.sizes.vocabulary or float(1 << 28))


def count_virtual(method: Method) -> int:
    """Virtual tokens that go through every layer with each row."""
    return method.tokens if isinstance(method, PromptTuningMethod | PTuningMethod) else 0


def measure_logit(recipe: Recipe, sizes: ModelSizes, machine: Machine) -> float:
    """Bytes that a step holds for each logit, see `training.levers`.

    The fused head on a GPU never holds them. The labelled one has them and their gradients, which may be of every
    position; the libraries' own has them in fp32 too, and what the loss makes of those.
    """
    speed = recipe.training.speed
    packed = is_packed(recipe.training, recipe.method) and not sizes.carries_state
    if packed and machine.gpu and speed.head in ("auto", "fused"):
        return 0.0
    if speed.head != "standard":
        return 8.0 if is_full_width(recipe, machine) else 4.0
    return _LOGIT


def measure_width(recipe: Recipe, machine: Machine) -> float:
    """Bytes a value of a frozen base and of an activation: 4 on a GPU that trains in fp32, else 2."""
    return 4.0 if machine.gpu and is_full_width(recipe, machine) else 2.0


def is_full_width(recipe: Recipe, machine: Machine) -> bool:
    """Whether the run computes in fp32."""
    precision = recipe.training.precision
    return precision == "fp32" or (precision == "auto" and not machine.has_bf16)


def measure_trained(method: Method, machine: Machine) -> float:
    """Bytes a trained weight: itself, its gradient, two moments in fp32; on a GPU those of `qlora` take a byte each."""
    return 10.0 if machine.gpu and isinstance(method, QloraMethod) else 16.0


def measure_overhead(recipe: Recipe, machine: Machine) -> Overhead:
    """What is held beside the account; with several GPUs they talk to each other, which takes memory too."""
    return _OVERHEAD if not machine.gpu or recipe.needs.devices > 1 else _OVERHEAD_OF_A_GPU


def list_longest(recipe: Recipe, lengths: Sequence[int], sizes: ModelSizes, machine: Machine) -> tuple[int, ...]:
    """Lengths of the rows of the largest micro-batch, the longest first: on a GPU, where none is padded."""
    packed = is_packed(recipe.training, recipe.method) and not sizes.carries_state
    return tuple(sorted(lengths, reverse=True)[: recipe.training.effective_batch]) if packed and machine.gpu else ()


def estimate_static(
    method: Method, *, weights: Mapping[str, Shape], trainable: int, width: float, trained: float = 16.0
) -> float:
    """Bytes of weights, gradients and optimizer: frozen bases, and `trained` bytes for each weight that is trained.

    4-bit matrices take 0.516 bytes a weight with their doubly quantised scales (arXiv 2305.14314).
    """
    parameters = count_values(weights)
    if isinstance(method, FullMethod):
        return trained * parameters
    rounded = _count_rounded(weights) if isinstance(method, QloraMethod) else 0
    return 0.516 * rounded + width * (parameters - rounded) + trained * trainable


def _count_rounded(weights: Mapping[str, Shape]) -> int:
    """The weights that 4-bit loading rounds."""
    return count_values(list_linears(weights)) - count_values(list_experts(weights))


def add_overhead(held: float, overhead: Overhead = _OVERHEAD) -> int:
    """With what the process itself takes, and what the allocator cannot use again."""
    factor, process = overhead
    return round(factor * held + process)
