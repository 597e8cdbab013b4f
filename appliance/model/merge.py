"""`python -m appliance.model.merge BASE ADAPTER FOLDER`: a base with an adapter's change in its weights, in a child.

PEFT merges; what is added is the proof. A change below the last bit of a weight in bf16 is lost without a word, so
the merged model reads a text beside the two that it was made of.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel

from appliance.errors import ModelError
from appliance.model.shapes import read_weight_dtypes
from appliance.model.template import load_template
from appliance.model.weights import Precision, copy_beside_weights, keeping_generation, load_model

_KEPT = 0.5  # of what the adapter changes: more than half of it lost is another model
_TEXT = (
    "The customer writes that the order arrived two days late, that one of the three items is missing, and asks for "
    "a refund of 19.90 or a second delivery before Friday."
)


def merge(base: Path, adapter: Path, folder: Path) -> dict[str, float]:
    """Write the merged model with the base's tokenizer and chat template into `folder`.

    Returns `effect` and `drift`: how far the adapter moves the base's logits, and how far the merged model's are from
    there, as root mean squares. Raises `ModelError` where the drift is more than half of the effect.
    """
    precision: Precision = "fp32" if set(read_weight_dtypes(base).values()) == {"F32"} else "bf16"
    adapted = PeftModel.from_pretrained(load_model(base, precision=precision, device=torch.device("cpu")), str(adapter))
    ids = torch.tensor([load_template(base).tokenizer.encode(_TEXT).ids])
    tuned = _read(adapted, ids)
    with adapted.disable_adapter():
        plain = _read(adapted, ids)
    merged = adapted.merge_and_unload(safe_merge=True)
    effect, drift = _distance(tuned, plain), _distance(_read(merged, ids), tuned)
    if not drift <= _KEPT * effect:
        raise ModelError(
            f"merged, its logits are {drift:.3g} off, where the adapter moves them by {effect:.3g}: the change is lost "
            f"in the rounding of {precision} weights; serve the adapter"
        )
    with keeping_generation(merged, folder):
        merged.save_pretrained(folder)
    copy_beside_weights(base, folder)
    return {"effect": effect, "drift": drift}


def _read(model: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        logits: torch.Tensor = model.eval()(input_ids=ids, use_cache=False).logits[0].float()
    return logits


def _distance(left: torch.Tensor, right: torch.Tensor) -> float:
    return float((left - right).square().mean().sqrt())


if __name__ == "__main__":
    print(json.dumps(merge(*map(Path, sys.argv[1:4]))))  # noqa: T201 - the parent's answer
