"""Greedy generation in left-padded batches: one loaded base, adapters switched on and off.

Rows are sorted by length and cut into batches that depend on the job alone; every arm of a row
meets the same engine, dtype and batch size.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import groupby
from pathlib import Path
from typing import Any, Literal

import torch
from peft import PeftModel

from appliance.errors import EvaluationError
from appliance.evaluation.arms import Arm, Prompt
from appliance.evaluation.beginning import Beginning
from appliance.evaluation.outputs import Output, read_said
from appliance.model import ChatTemplate
from appliance.model.weights import load_model, select_device, select_precision


def cut_batches(
    prompts: Sequence[Prompt], size: int, *, padding: Literal["left", "none"] = "left"
) -> list[list[Prompt]]:
    """Prompts by length, then id, in batches of `size`, the longest first; without padding, each has one length."""
    ordered = sorted(prompts, key=lambda p: (len(p.input_ids), p.id))
    alike = [ordered] if padding == "left" else [list(g) for _, g in groupby(ordered, key=lambda p: len(p.input_ids))]
    return [group[i : i + size] for group in alike for i in range(0, len(group), size)][::-1]


def select_padding(arm: Arm) -> Literal["left", "none"]:
    """How an arm's batches may be filled up.

    PEFT puts virtual tokens before the padding, which moves them away from the row: logits differ
    from those of the row alone by several thousandths on a toy model, so such arms get no padding.
    """
    return "none" if read_kind(arm) in ("PROMPT_TUNING", "P_TUNING") else "left"


def read_kind(arm: Arm) -> str:
    """PEFT's name for what kind of adapter an arm has; empty without one. Raises `EvaluationError`."""
    if arm.adapter is None:
        return ""
    try:
        return str(json.loads((arm.adapter / "adapter_config.json").read_bytes())["peft_type"])
    except (OSError, ValueError, KeyError, TypeError) as fault:
        raise EvaluationError(
            f"{arm.adapter}/adapter_config.json: cannot be read ({fault}); train or pull it again"
        ) from fault


def load_arms(
    arms: Sequence[Arm], *, folder: Path, precision: str, four_bit: bool = False, spread: bool = False
) -> Any:
    """The model of `folder`, in 4 bits or over all devices if asked, with the adapters of the arms that share it."""
    device = select_device()
    computed = select_precision(precision, device=device)  # type: ignore[arg-type]
    model = load_model(folder, precision=computed, device=device, four_bit=four_bit, spread=spread)
    for arm in arms:
        if arm.adapter is None:
            continue
        if isinstance(model, PeftModel):
            model.load_adapter(str(arm.adapter), adapter_name=arm.name, autocast_adapter_dtype=False)
        else:
            model = PeftModel.from_pretrained(
                model, str(arm.adapter), adapter_name=arm.name, autocast_adapter_dtype=False
            )
    return model.eval()


def order_arms(arms: Sequence[Arm], prompts: Sequence[Prompt]) -> list[tuple[Arm, list[Prompt]]]:
    """The arms with what each is asked, the one with the longest prompt first: want of memory is met early."""
    asked = [(arm, [p for p in prompts if p.arm == arm.name]) for arm in arms]
    return sorted(asked, key=lambda pair: max((len(p.input_ids) for p in pair[1]), default=0), reverse=True)


def use_arm(model: Any, arm: Arm) -> AbstractContextManager[Any]:
    """The model as this arm: its adapter active, or none."""
    if arm.adapter is not None:
        model.set_adapter(arm.name)
        return nullcontext()
    return model.disable_adapter() if isinstance(model, PeftModel) else nullcontext()


def check_effect(model: Any, arm: Arm, prompt: Prompt) -> None:
    """An adapter that was pulled or trained changes the logits. Raises `EvaluationError` when it does not.

    PEFT fills what it does not find in the file with an adapter that does nothing, and only warns.
    """
    ids = torch.tensor([prompt.input_ids], device=next(model.parameters()).device)
    with torch.inference_mode():
        tuned = model(input_ids=ids, use_cache=False).logits[0, -1]
        with model.disable_adapter():
            plain = model(input_ids=ids, use_cache=False).logits[0, -1]
    if not bool(torch.isfinite(tuned).all()):
        raise EvaluationError(f"{arm.adapter}: the logits with this adapter are not finite; pull or train it again")
    if torch.equal(tuned, plain):
        raise EvaluationError(
            f"{arm.adapter}: this adapter changes no logit of {arm.model}; it was trained on another base model, "
            "its file is damaged, or training changed nothing: pull or train it again"
        )


def generate_batch(
    model: Any,
    batch: Sequence[Prompt],
    *,
    template: ChatTemplate,
    stop_ids: Sequence[int],
    max_new_tokens: int,
    beginning: Beginning | None = None,
) -> Iterator[Output]:
    """Greedy answers to a batch, without the stop token; `stop` says whether one was met.

    All prompts go on from `beginning`, where one is given, which `model` has read.
    """
    began = time.monotonic()
    known = len(beginning.ids) if beginning is not None else 0
    longest = max(len(p.input_ids) for p in batch)
    device = next(model.parameters()).device
    pad = min(stop_ids)
    ids = torch.full((len(batch), longest), pad)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(batch):
        start = longest - len(prompt.input_ids) + known
        for part, tokens in ((slice(known), prompt.input_ids[:known]), (slice(start, None), prompt.input_ids[known:])):
            ids[row, part] = torch.tensor(tokens, dtype=ids.dtype)
            mask[row, part] = 1
    with torch.inference_mode():
        generated = model.generate(
            input_ids=ids.to(device),
            attention_mask=mask.to(device),
            past_key_values=beginning.start_cache(len(batch)) if beginning is not None else None,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            temperature=None,
            top_p=None,
            top_k=None,
            eos_token_id=list(stop_ids),
            pad_token_id=pad,
        )[:, longest:].tolist()
    seconds = (time.monotonic() - began) / len(batch)
    for prompt, tokens in zip(batch, generated, strict=True):
        end = next((i for i, t in enumerate(tokens) if t in stop_ids), None)
        answer = tokens if end is None else tokens[:end]
        yield Output(
            id=prompt.id,
            arm=prompt.arm,
            output=read_said(answer, asked=prompt.input_ids, template=template),
            stop="length" if end is None else "eos",
            tokens=len(answer),
            prompt_tokens=len(prompt.input_ids),
            seconds=round(seconds, 4),
        )
