"""`python -m appliance.model.convert SOURCE FOLDER`: a GGUF file, or a model in 4 or 8 bits, to bf16, in a child.

transformers reads both; what is saved is an ordinary folder of safetensors without any trace of
quantisation, so that every later load is the fast one.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from appliance.errors import ModelError
from appliance.model.shapes import read_weight_dtypes
from appliance.model.weights import copy_beside_weights, keeping_generation, load_model, select_class


def convert(source: Path, folder: Path) -> None:
    """Write config, tokenizer, chat template and bf16 weights of `source` into `folder`."""
    if source.is_file():
        _convert_gguf(source, folder)
    else:
        _dequantise(source, folder)


def _convert_gguf(source: Path, folder: Path) -> None:
    place, name = str(source.parent), source.name
    loaded = AutoModelForCausalLM.from_pretrained(place, gguf_file=name, dtype=torch.float32)
    loaded.config._name_or_path = ""  # noqa: SLF001 - else a label of the file's author is saved as a hub id
    _save_plain(loaded.to(torch.bfloat16), folder)
    AutoTokenizer.from_pretrained(place, gguf_file=name).save_pretrained(folder)


def _dequantise(source: Path, folder: Path) -> None:
    """What is not weights is copied as it is, the chat template and the tokenizer among it."""
    _check_scales(source)
    loaded = load_model(source, precision="bf16", device=torch.device("cpu"), dequantise=True)
    _save_plain(loaded, folder)
    copy_beside_weights(source, folder)


def _check_scales(source: Path) -> None:
    """Raise `ModelError` for 8-bit weights without a scale: transformers would take them for the values themselves."""
    dtypes = read_weight_dtypes(source)
    for name in (n for n, dtype in dtypes.items() if dtype.startswith("F8_") and "scale" not in n):
        layer = name.removesuffix(".weight")
        if not {f"{name}_scale_inv", f"{layer}.scale", f"{layer}.qscale_weight"} & dtypes.keys():
            raise ModelError(
                f"{name} is in 8 bits and its files have no {name}_scale_inv beside it; fetch the model again"
            )


def _save_plain(loaded: Any, folder: Path) -> None:
    """Save the values in a model that never was quantised: the loaded one would be saved in its own form again."""
    config = loaded.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config.dtype = torch.bfloat16
    with torch.device("meta"):
        plain = select_class(config).from_config(config)
    plain.load_state_dict(loaded.state_dict(), strict=True, assign=True)
    plain.tie_weights()
    with keeping_generation(plain, folder):
        plain.save_pretrained(folder)


if __name__ == "__main__":
    convert(Path(sys.argv[1]), Path(sys.argv[2]))
