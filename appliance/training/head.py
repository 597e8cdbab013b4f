"""The loss of scored positions without their logits in fp32: cross-entropy, a few rows at a time, forward and backward.

transformers casts all logits to fp32, its loss makes two more tensors of that size on the way back, and accelerate
casts them once more for whoever may read them: with 49,000 tokens a quarter of a step on a CPU. Here a few rows at
a time are in fp32, in the processor's cache. The way back needs the logits as the model gave them and a number a row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from types import MethodType
from typing import Any

import torch
from transformers.loss.loss_utils import ForCausalLMLoss

from appliance.model.weights import strip_adapter

_VALUES = 1 << 19  # at a time, on a CPU: 2 MiB in fp32, in its cache
_GPU_VALUES = 1 << 26  # 256 MiB, what `plan` counts for a head there; a few rows at a time would be all launches


def lighten_loss(model: Any) -> None:
    """Give a causal language model this loss wherever positions were chosen; one with a loss of its own keeps it."""
    base = strip_adapter(model)
    if base.loss_function is ForCausalLMLoss:
        base.loss_function = _find_loss
        base.forward = MethodType(_drop_logits(type(base).forward), base)


@contextmanager
def scoring_only(model: Any, batch: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The LM head meets only those positions of a padded batch that predict a label.

    Gives what the model is called with; its logits are (1, K, V) in here, for the batch's `shift_labels` (1, K).
    """
    rows, columns = batch["label_rows"], batch["label_columns"]

    def choose(_head: Any, given: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        return (given[0][rows, columns][None],)

    hook = model.get_output_embeddings().register_forward_pre_hook(choose)
    try:
        yield {k: v for k, v in batch.items() if k not in ("label_rows", "label_columns")}
    finally:
        hook.remove()


def sum_entropies(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """The sum over rows of -log softmax(logits)[target]: a scalar in fp32, for logits (N, V) and targets (N,)."""
    total: torch.Tensor = _Entropies.apply(logits, targets)
    return total


def _find_loss(
    logits: torch.Tensor,
    labels: torch.Tensor,
    vocab_size: int,
    num_items_in_batch: Any = None,
    shift_labels: torch.Tensor | None = None,
    **options: Any,
) -> Any:
    """What `ForCausalLMLoss` gives where every position has a label; elsewhere that one itself (transformers)."""
    if shift_labels is None:
        return ForCausalLMLoss(logits, labels, vocab_size, num_items_in_batch, **options)
    count = shift_labels.numel() if num_items_in_batch is None else num_items_in_batch
    return sum_entropies(logits.view(-1, vocab_size), shift_labels.flatten()) / count


def _drop_logits(forward: Callable[..., Any]) -> Callable[..., Any]:
    """The forward pass, which in training gives the loss alone."""

    @wraps(forward)
    def give_loss(model: Any, *arguments: Any, **options: Any) -> Any:
        outputs = forward(model, *arguments, **options)
        if model.training and outputs.loss is not None:
            outputs.logits = None
        return outputs

    return give_loss


class _Entropies(torch.autograd.Function):  # type: ignore[misc]
    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        norms = torch.empty(len(logits), device=logits.device)  # log of the sum of exponentials
        for rows, some in _take_rows(logits):
            most = some.amax(-1, keepdim=True)
            norms[rows] = most[:, 0] + some.sub_(most).exp_().sum(-1).log_()
        ctx.save_for_backward(logits, targets, norms)
        return (norms - logits.gather(1, targets[:, None])[:, 0]).sum()

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        """softmax(logits), less one at the target, times the gradient of the sum; rounded once."""
        logits, targets, norms = ctx.saved_tensors
        found = torch.empty_like(logits)
        for rows, some in _take_rows(logits):
            some.sub_(norms[rows, None]).exp_()
            some[torch.arange(len(some), device=some.device), targets[rows]] -= 1
            found[rows] = some.mul_(gradients[0])
        return found, None


def _take_rows(logits: torch.Tensor) -> Iterator[tuple[slice, torch.Tensor]]:
    """A few rows at a time, and their logits in fp32; one piece of memory serves all."""
    size = max(1, (_GPU_VALUES if logits.is_cuda else _VALUES) // logits.shape[1])
    memory = torch.empty(size, logits.shape[1], dtype=torch.float32, device=logits.device)
    for start in range(0, len(logits), size):
        rows = slice(start, min(start + size, len(logits)))
        yield rows, memory[: rows.stop - start].copy_(logits[rows])
