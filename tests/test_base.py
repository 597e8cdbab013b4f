"""Base models: five sources, one folder of safetensors, and nothing that runs code."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest
from tiny import write_tokenizer

from appliance.errors import ModelError
from appliance.model import Base, resolve_base
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
        ("package:no_such_package/x.gguf", "pip install no-such-package"),
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
