"""A tiny base model and tiny recipes: the real code paths in seconds."""

from __future__ import annotations

import json
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from appliance.data import Dataset
from appliance.data.rows import read_dataset
from appliance.recipe import Recipe
from appliance.training import TrainingJob

SPECIAL = ("<|im_start|>", "<|im_end|>")
TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def write_tokenizer(folder: Path, *, template: str = TEMPLATE, eos: str = SPECIAL[1], bos: str = SPECIAL[0]) -> int:
    """A byte-level tokenizer without merges: one token per byte, plus special tokens. Returns its size."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(t, special=True) for t in dict.fromkeys((*SPECIAL, bos, eos))])
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "TokenizersBackend", "bos_token": bos, "eos_token": eos, "pad_token": eos}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "chat_template.jinja").write_text(template)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": tokenizer.token_to_id(eos)}))
    return tokenizer.get_vocab_size()


def write_base(folder: Path) -> Path:
    """A two-layer Llama with random weights from a fixed seed, and the tokenizer above."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    size = write_tokenizer(folder)
    torch.manual_seed(7)
    config = LlamaConfig(
        vocab_size=size,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=257,
        pad_token_id=257,
    )
    kept = (folder / "generation_config.json").read_bytes()
    LlamaForCausalLM(config).save_pretrained(folder)
    (folder / "generation_config.json").write_bytes(kept)
    return folder


def make_recipe(**overrides: Any) -> Recipe:
    """A valid recipe; `training={"epochs": 1}` and the like replace single keys of a section."""
    values: dict[str, Any] = {
        "name": "colours",
        "base": {"model": "./base"},
        "dataset": {"path": "datasets/colours", "split": {"validation": 0.1, "test": 0.2}},
        "method": {"type": "lora", "rank": 4},
        "training": {"epochs": 2, "learning_rate": 0.01, "effective_batch": 8, "max_length": 256, "checkpoints": 4},
        "evaluation": {"few_shot": 1, "max_new_tokens": 8, "gates": {"min_test_rows": 5}},
        "publish": {"alias": "production"},
    }
    for key, value in overrides.items():
        values[key] = {**values.get(key, {}), **value} if isinstance(value, dict) and key != "method" else value
    return Recipe.model_validate(values)


COLOURS = ("red", "blue", "green", "black")


def write_dataset(folder: Path, *, rows: int = 64, shuffle: bool = False) -> Path:
    """Requests for things in a colour; the answer is the colour (or, with `shuffle`, any colour)."""
    folder.mkdir(parents=True, exist_ok=True)
    card = {"name": "colours", "description": "Name the colour.", "licence": "Apache-2.0"}
    card["contract"] = {"type": "labels", "labels": list(COLOURS)}  # type: ignore[assignment]
    (folder / "dataset.yaml").write_text(json.dumps(card))
    lines = []
    for index in range(rows):
        colour = COLOURS[index % len(COLOURS)]
        answer = random.Random(index).choice(COLOURS) if shuffle else colour
        messages = [
            {"role": "user", "content": f"thing {index}: {colour}"},
            {"role": "assistant", "content": answer},
        ]
        lines.append(json.dumps({"id": f"r{index}", "messages": messages, "provenance": "program"}))
    (folder / "rows.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def load_dataset(folder: Path) -> Dataset:
    """The dataset in `folder`, which can be read."""
    dataset, findings = read_dataset(folder)
    assert dataset is not None, findings
    assert not findings
    return dataset


def make_stop() -> Any:
    """A stop flag that no signal sets."""
    return SimpleNamespace(is_set=False, defer=lambda: None)


def build_adapted(job: TrainingJob) -> Any:
    """The model of a job on the CPU, in fp32, with the trainable weights of its method."""
    import torch

    from appliance.training.levers import select_levers
    from appliance.training.methods import build_model

    levers = select_levers(job.training, method=job.method, on_cuda=False)
    return build_model(job, levers=levers, precision="fp32", device=torch.device("cpu"))
