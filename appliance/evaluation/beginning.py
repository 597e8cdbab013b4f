"""What every prompt of an arm begins with, read once: a long system prompt is most of what the prompted arms read.

A model can go on from a beginning that was read before where all that it keeps of a text is keys and values of every
token: no window, no state. Rows of other lengths are filled up between the beginning and what follows it, so the model
has to take positions as they are given. Each arm is measured; where it does not, prompts are read whole.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from transformers.cache_utils import DynamicCache, DynamicLayer

from appliance.evaluation.arms import Prompt

_LEAST = 16  # tokens; fewer are not worth a pass of their own
_GAP = 3
_ROUNDING = {torch.float32: 1e-3}  # of the largest logit; in 16 bits a twentieth


@dataclass(frozen=True, slots=True)
class Beginning:
    """The tokens, and each layer's keys and values of them: [1, heads, tokens, width], on the layer's device."""

    ids: tuple[int, ...]
    layers: tuple[tuple[torch.Tensor, torch.Tensor], ...]

    def start_cache(self, rows: int) -> DynamicCache:
        """A cache of so many rows that have all read the beginning."""
        cache = DynamicCache()
        for number, pair in enumerate(self.layers):
            keys, values = (t.expand(rows, *t.shape[1:]) for t in pair)
            cache.update(keys, values, number)
        return cache


def read_beginning(model: Any, prompts: Sequence[Prompt]) -> Beginning | None:
    """The longest beginning that the prompts share, as `model` reads it now; `None` where it is short or unsound."""
    ids = _find_shared(prompts)
    if not ids or _reads_more(model):
        return None
    device = next(model.parameters()).device
    with torch.inference_mode():
        cache = model(input_ids=torch.tensor([ids], device=device), use_cache=True).past_key_values
    if type(cache) is not DynamicCache or any(type(layer) is not DynamicLayer for layer in cache.layers):
        return None
    beginning = Beginning(tuple(ids), tuple((layer.keys, layer.values) for layer in cache.layers))
    shortest = min(prompts, key=lambda p: (len(p.input_ids), p.id))
    return beginning if _is_sound(model, beginning, shortest.input_ids) else None


def _find_shared(prompts: Sequence[Prompt]) -> list[int]:
    """The tokens that all of several begin with; a token of each is left, which the answer is read from."""
    if len(prompts) < 2:
        return []
    first, last = (pick(p.input_ids for p in prompts) for pick in (min, max))
    shared = next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), len(first))
    shared = min(shared, *(len(p.input_ids) - 1 for p in prompts))
    return first[:shared] if shared >= _LEAST else []


def _reads_more(model: Any) -> bool:
    """Whether virtual tokens stand before every prompt, or positions cannot be given."""
    is_adapted = isinstance(model, PeftModel)
    if is_adapted and model.active_peft_config.is_prompt_learning:
        return True
    base = model.get_base_model() if is_adapted else model
    return "position_ids" not in inspect.signature(type(base).forward).parameters


def _is_sound(model: Any, beginning: Beginning, ids: Sequence[int]) -> bool:
    """Whether the last logits of a row that is filled up behind the beginning are those of the row read whole."""
    device, known = next(model.parameters()).device, len(beginning.ids)
    mask = torch.tensor([[1] * known + [0] * _GAP + [1] * (len(ids) - known)], device=device)
    filled = torch.tensor([[ids[0]] * _GAP + list(ids[known:])], device=device)
    with torch.inference_mode():
        whole = model(input_ids=torch.tensor([list(ids)], device=device), use_cache=False).logits
        apart = model(
            input_ids=filled,
            attention_mask=mask,
            position_ids=(mask.cumsum(-1) - 1)[:, known:],
            past_key_values=beginning.start_cache(1),
            use_cache=True,
        ).logits
    whole, apart = (logits[0, -1].float() for logits in (whole, apart))
    allowed = _ROUNDING.get(next(model.parameters()).dtype, 0.05)
    return bool((whole - apart).abs().max() <= allowed * whole.abs().max())
