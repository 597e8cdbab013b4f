"""The diagonal Fisher of the base model on general rows: which weights its answers there depend on.

What is estimated is the true Fisher of the model's own distribution, with answers sampled from the
model at the rows' positions (Martens, "New insights and perspectives on the natural gradient
method", arXiv 1412.1193, section 9.1), not the "empirical" one at the reference answers, which is
no approximation of it where the model has not converged on those rows (Kunstner et al. 2019,
arXiv 1905.12558). It is divided by the number of sampled tokens, so that half of it times a squared
change of the weights is the quadratic estimate of the KL divergence per token on the general rows,
in nats, whatever the model's size: that is what gives `strength` one meaning across models.

It is estimated once and kept beside the job, so that a resumed run uses the very same values.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional

from appliance.child import Emit
from appliance.digest import canonical_json, digest_file, digest_json, write_atomic
from appliance.errors import TrainingError
from appliance.model import TokenRow

Fisher = dict[str, torch.Tensor]


def load_fisher(
    folder: Path, *, identity: dict[str, Any], estimate: Callable[[], Fisher], emit: Emit
) -> tuple[Fisher, str]:
    """The Fisher in `folder`, estimated first where there is none of this `identity`; with its SHA-256."""
    file, seal = folder / "fisher.safetensors", folder / "fisher.json"
    of = digest_json(identity)
    found = _read_seal(file, seal)
    if found is None or found["of"] != of:
        emit(note="estimating the Fisher on general rows (once)")
        fisher = estimate()
        check_fisher(fisher)
        _save(fisher, file)
        found = {"of": of, "sha256": digest_file(file)}
        write_atomic(seal, canonical_json(found))
    return load_file(file), found["sha256"]


def check_fisher(fisher: Fisher) -> None:
    """Refuse a Fisher that protects nothing or is not finite."""
    for name, values in fisher.items():
        if not bool(torch.isfinite(values).all()):
            raise TrainingError(f"forgetting.ewc: the Fisher of {name} is not finite; set training.precision: fp32")
    if not any(bool(values.any()) for values in fisher.values()):
        raise TrainingError(
            "forgetting.ewc: the Fisher is zero everywhere, so nothing would be protected; "
            "give other general rows, or train fp32"
        )


def estimate_inputs(model: Any, modules: dict[str, torch.nn.Module], rows: Sequence[TokenRow], *, seed: int) -> Fisher:
    """The Fisher of the weights of linear `modules`, (out, in) each, by name.

    The gradient of a linear weight is (gradient of its output)' x (its input), so frozen and 4-bit
    weights need no gradient of their own and one matrix is held at a time. A module is taken to
    run once in a forward pass.
    """
    totals: Fisher = {}

    def square(name: str, given: torch.Tensor, gradient: torch.Tensor) -> None:
        product = gradient.flatten(0, -2).float().T @ given.flatten(0, -2).float()
        _add_square(totals, name, product)

    def watch(name: str) -> Callable[..., None]:
        def hook(_module: Any, given: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
            output.register_hook(lambda gradient: square(name, given[0].detach(), gradient))

        return hook

    hooks = [module.register_forward_hook(watch(name)) for name, module in modules.items()]
    hooks.append(model.get_input_embeddings().register_forward_hook(lambda _m, _i, o: o.requires_grad_(True)))
    try:
        with _frozen(model):
            tokens = sum(_backward(model, row, generator=g) for row, g in _with_generator(rows, seed))
    finally:
        for hook in hooks:
            hook.remove()
    return _finish(totals, tokens)


def estimate_weights(model: Any, rows: Sequence[TokenRow], *, seed: int) -> Fisher:
    """The Fisher of every trainable parameter, in its shape, by name; one gradient is held at a time."""
    totals: Fisher = {}

    def take(name: str) -> Callable[[torch.Tensor], None]:
        def hook(weight: torch.Tensor) -> None:
            gradient, weight.grad = weight.grad, None
            if gradient is not None:
                _add_square(totals, name, gradient.float())

        return hook

    trained = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    hooks = [p.register_post_accumulate_grad_hook(take(n)) for n, p in trained]
    try:
        tokens = sum(_backward(model, row, generator=g) for row, g in _with_generator(rows, seed))
    finally:
        for hook in hooks:
            hook.remove()
    return _finish(totals, tokens)


def _with_generator(rows: Sequence[TokenRow], seed: int) -> Iterator[tuple[TokenRow, torch.Generator]]:
    """Each row with the one source of chance, on the CPU so that no device changes the draws."""
    generator = torch.Generator().manual_seed(seed)
    for row in rows:
        yield row, generator


def _backward(model: Any, row: TokenRow, *, generator: torch.Generator) -> int:
    """Backward of the log-likelihood of answers that the model itself samples; returns their number."""
    device = model.device
    kept = [i - 1 for start, end in row.spans for i in range(start, end)]
    with torch.autocast(device.type, torch.bfloat16, enabled=model.dtype == torch.bfloat16):
        logits = model(
            input_ids=torch.tensor([row.input_ids], device=device),
            logits_to_keep=torch.tensor(kept, device=device),
            use_cache=False,
        ).logits[0]
    shares = torch.softmax(logits.detach().float().cpu(), -1)
    drawn = torch.multinomial(shares, 1, generator=generator)[:, 0].to(device)
    functional.cross_entropy(logits.float(), drawn, reduction="sum").backward()
    return len(kept)


def _add_square(totals: Fisher, name: str, gradient: torch.Tensor) -> None:
    if name not in totals:
        totals[name] = torch.zeros_like(gradient, dtype=torch.float32)
    totals[name].addcmul_(gradient, gradient)


def _finish(totals: Fisher, tokens: int) -> Fisher:
    """Per token, in bfloat16: 2 bytes a weight, with the range of fp32 and more digits than the estimate has."""
    return {name: totals.pop(name).div_(tokens).to(torch.bfloat16) for name in sorted(totals)}


@contextmanager
def _frozen(model: Any) -> Iterator[None]:
    """No trained weight takes a gradient meanwhile."""
    trained = [p for p in model.parameters() if p.requires_grad]
    for weight in trained:
        weight.requires_grad_(False)
    try:
        yield
    finally:
        for weight in trained:
            weight.requires_grad_(True)


def _save(fisher: Fisher, file: Path) -> None:
    """Under its name only when complete and on the disk."""
    staged = file.with_name(f".{file.name}.tmp")
    save_file(fisher, staged)
    staged.chmod(0o644)
    with staged.open("rb") as stream:
        os.fsync(stream.fileno())
    staged.replace(file)


def _read_seal(file: Path, seal: Path) -> dict[str, str] | None:
    """The seal of an undamaged Fisher, else `None`."""
    try:
        found: dict[str, str] = json.loads(seal.read_bytes())
        sound = digest_file(file) == found["sha256"] and "of" in found
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return found if sound else None
