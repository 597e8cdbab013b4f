"""`python -m appliance.model.convert FILE.gguf FOLDER`: GGUF to bf16 safetensors, in a child.

transformers reads the GGUF file; what is saved is an ordinary folder without any trace of
quantisation, so that every later load is the fast one.
"""

from __future__ import annotations

import sys
from pathlib import Path


def convert(source: Path, folder: Path) -> None:
    """Write config, tokenizer, chat template and bf16 weights of `source` into `folder`."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    place, name = str(source.parent), source.name
    loaded = AutoModelForCausalLM.from_pretrained(place, gguf_file=name, dtype=torch.float32)
    config = loaded.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config._name_or_path = ""  # noqa: SLF001 - else a label of the file's author is saved as a hub id
    config.dtype = torch.bfloat16
    plain = AutoModelForCausalLM.from_config(config).to(torch.bfloat16)
    plain.load_state_dict(loaded.state_dict(), strict=True)
    plain.tie_weights()
    plain.save_pretrained(folder)
    AutoTokenizer.from_pretrained(place, gguf_file=name).save_pretrained(folder)


if __name__ == "__main__":
    convert(Path(sys.argv[1]), Path(sys.argv[2]))
