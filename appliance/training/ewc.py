"""Elastic weight consolidation: a price on changing the weights that the base's general answers depend on.

Kirkpatrick et al. 2017, arXiv 1612.00796, equation 3: strength / 2 * sum of F * dW^2, over the
trained weights themselves for full training, and over the merged update dW = scale * B A for LoRA,
less what an initialisation such as PiSSA took out of the base. Its gradient is written down in
closed form and added once per optimizer step, so one matrix of dW is held at a time and the loss
that is logged stays the data's.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.lora import LoraLayer

from appliance.child import Emit
from appliance.digest import digest_file
from appliance.errors import TrainingError
from appliance.method import FullMethod
from appliance.model.weights import Precision
from appliance.training.fisher import Fisher, estimate_inputs, estimate_weights, load_fisher
from appliance.training.launch import TrainingJob
from appliance.training.rows import load_rows

Pull = tuple[torch.Tensor, list[tuple[torch.nn.Parameter, torch.Tensor]]]
_ADAPTER = "default"


@dataclass(frozen=True, slots=True, eq=False)
class LowRankTerm:
    """One adapted matrix: fisher (out, in), a (r, in), b (out, r); `start` are a and b before training, or `None`."""

    fisher: torch.Tensor
    scale: float
    a: torch.nn.Parameter
    b: torch.nn.Parameter
    start: tuple[torch.Tensor, torch.Tensor] | None

    def pull(self) -> Pull:
        """Half of sum F dW^2, and its gradient by b and a."""
        a, b = self.a.detach().float(), self.b.detach().float()
        change = b @ a
        if self.start is not None:
            change -= self.start[1] @ self.start[0]
        change *= self.scale
        weighted = change * self.fisher
        value = 0.5 * (weighted * change).sum()
        weighted *= self.scale
        return value, [(self.b, weighted @ a.T), (self.a, b.T @ weighted)]


@dataclass(frozen=True, slots=True, eq=False)
class WeightTerm:
    """One fully trained tensor and where it started; `fisher` has its shape."""

    fisher: torch.Tensor
    weight: torch.nn.Parameter
    start: torch.Tensor

    def pull(self) -> Pull:
        """Half of sum F (w - w0)^2, and its gradient."""
        change = self.weight.detach().float() - self.start
        weighted = change * self.fisher
        return 0.5 * (weighted * change).sum(), [(self.weight, weighted)]


@dataclass(frozen=True, slots=True)
class Penalty:
    """The penalty of one run; `fisher_sha256` binds its checkpoints to the Fisher's very bytes."""

    terms: tuple[LowRankTerm | WeightTerm, ...]
    strength: float
    fisher_sha256: str

    def add_gradients(self) -> float:
        """Add the penalty's gradient to `.grad` of what is trained; returns its value in nats per token."""
        values = []
        for term in self.terms:
            value, gradients = term.pull()
            values.append(value)
            for weight, gradient in gradients:
                scaled = gradient.mul_(self.strength).to(weight.dtype)
                weight.grad = scaled if weight.grad is None else weight.grad.add_(scaled)
        total: float = sum(torch.stack(values).tolist())  # a GPU is waited for once, not for each matrix
        return self.strength * total


def build_penalty(job: TrainingJob, model: Any, *, precision: Precision, emit: Emit) -> Penalty | None:
    """The penalty that the job asks for, its Fisher estimated or read; `model` is as before the first step."""
    if job.ewc is None:
        return None
    file = job.folder / "general.rows.jsonl"
    rows = load_rows(file)
    layers = {} if isinstance(job.method, FullMethod) else _find_layers(model)

    def estimate() -> Fisher:
        was_training = model.training
        model.eval()
        try:
            if layers:
                bases = {n: layer.base_layer for n, layer in layers.items()}
                return estimate_inputs(model, bases, rows, seed=job.training.seed)
            return estimate_weights(model, rows, seed=job.training.seed)
        finally:
            model.train(was_training)

    identity = {
        "rows": digest_file(file),
        "fingerprint": {k: v for k, v in job.fingerprint.items() if k not in ("train_rows", "validation_rows")},
        "method": job.method.model_dump(mode="json"),
        "precision": precision,
        "device": model.device.type,
        "seed": job.training.seed,
    }
    fisher, digest = load_fisher(job.folder, identity=identity, estimate=estimate, emit=emit)
    fisher = {name: values.to(model.device) for name, values in fisher.items()}
    if missing := sorted(layers.keys() - fisher.keys()):
        emit(
            note=f"forgetting.ewc: no general row reaches {len(missing)} adapted layers ({missing[0]}, ...); "
            "they are trained without a penalty"
        )
    terms = _build_low_rank(layers, fisher) if layers else _build_weights(model, fisher)
    return Penalty(terms=tuple(terms), strength=job.ewc.strength, fisher_sha256=digest)


def _find_layers(model: Any) -> dict[str, Any]:
    """The adapted layers by name. Raises `TrainingError` where the update is not scale * B A of a linear layer."""
    layers = {n: m for n, m in model.named_modules() if isinstance(m, LoraLayer)}
    for name, layer in layers.items():
        if _ADAPTER in layer.lora_variant or _ADAPTER not in layer.lora_A:
            raise TrainingError(
                f"forgetting.ewc: the update of {name} is not B A of a linear layer; "
                "use another method.variant and linear method.targets, or forgetting.replay"
            )
    if not layers:
        raise TrainingError("forgetting.ewc: the model has no low-rank layer; use method full, lora or qlora")
    return layers


def _build_low_rank(layers: dict[str, Any], fisher: Fisher) -> Iterator[LowRankTerm]:
    """A term for each layer that a general row reaches; text never runs a tower for images."""
    for name, layer in layers.items():
        if name not in fisher:
            continue
        a, b = layer.lora_A[_ADAPTER].weight, layer.lora_B[_ADAPTER].weight
        begins_at_zero = not bool(b.any()) or not bool(a.any())
        start = None if begins_at_zero else (a.detach().float().clone(), b.detach().float().clone())
        yield LowRankTerm(fisher[name], float(layer.scaling[_ADAPTER]), a, b, start)


def _build_weights(model: Any, fisher: Fisher) -> Iterator[WeightTerm]:
    for name, weight in model.named_parameters():
        if name in fisher:
            yield WeightTerm(fisher[name], weight, _copy_small(weight.detach()))


def _copy_small(weight: torch.Tensor) -> torch.Tensor:
    """A copy, in bfloat16 where that loses nothing (a base stored in bfloat16)."""
    small = weight.to(torch.bfloat16)
    return small if torch.equal(small.to(weight.dtype), weight) and small.dtype != weight.dtype else weight.clone()
