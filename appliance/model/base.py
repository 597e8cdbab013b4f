"""Where a base model comes from, and the digest that pins it.

Five sources become one thing, a local folder with safetensors: a hub model at a commit, a local
folder, a `.gguf` file, an `s3://` prefix, and a GGUF file inside an installed package. Weights in
pickles (`.bin`, `.pt`, `.ckpt`) run code when they are read and are refused.
"""

from __future__ import annotations

import importlib.util
import shutil
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from appliance.command import run_command
from appliance.digest import State, digest_file, digest_folder, digest_json, fsync_folder, list_files, stat_files
from appliance.errors import CommandError, ModelError
from appliance.model.shapes import read_sizes
from appliance.recipe import BaseSection
from appliance.store import Store, StoredObject, open_store

_PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
_NEEDED = ("config.json", "tokenizer.json")
_CONVERT_TIMEOUT_S = 1800.0
_HUB_FILES = ["*.safetensors", "*.safetensors.index.json", "*.json", "*.jinja", "*.txt", "*.model"]

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
    return base


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
    action = (
        f"its folder has no {file}"
        if folders
        else f"pip install {package.replace('_', '-')} (without its dependencies)"
    )
    raise ModelError(f"base model {model}: not installed here; {action}")


def _resolve_gguf(path: Path, *, model: str, cache: Path, note: Note) -> Base:
    """A GGUF file becomes bf16 safetensors in the cache, once per content."""
    with path.open("rb") as stream:
        if stream.read(4) != b"GGUF":
            raise ModelError(f"base model {model}: {path} is not a GGUF file; download it again")
    digest = _digest(path)
    folder = cache / "bases" / f"gguf-{digest[:16]}"
    if not folder.is_dir():
        note(f"converting {path.name} to bf16 safetensors (once; kept in {folder})")
        with _staged(folder) as staged:
            _convert_gguf(path, staged, model=model)
    return Base(folder=folder, model=model, revision=f"sha256:{digest}")


def _convert_gguf(path: Path, folder: Path, *, model: str) -> None:
    """In a child, so that this process never holds torch or a model's memory."""
    try:
        run_command(
            [sys.executable, "-m", "appliance.model.convert", str(path), str(folder)],
            timeout_s=_CONVERT_TIMEOUT_S,
            env={"TQDM_DISABLE": "1"},
        )
    except CommandError as fault:
        last = str(fault).splitlines()[-1]
        raise ModelError(f"base model {model}: {path} cannot be converted ({last}); is the file complete?") from fault


def _resolve_hub(model: str, *, revision: str, cache: Path, note: Note) -> Base:
    """A snapshot of a hub model at one commit, through the hub's own client and cache layout."""
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
    except ImportError as fault:
        raise ModelError(
            f"base model {model}: hub models need the appliance's extra 'train'; install it (README, Install)"
        ) from fault
    note(f"base model {model}@{revision[:12]} from the hub")
    hub = cache / "hub"
    try:
        folder = Path(snapshot_download(model, revision=revision, cache_dir=hub, allow_patterns=_HUB_FILES))
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
    if not folder.is_dir():
        note(f"base model {url}: {sum(o.size for o in objects) / 1e6:.0f} MB to {folder}")
        with _staged(folder) as staged:
            _download(store, objects, staged)
            _check_folder(staged, model=url)
    return Base(folder=folder, model=url, revision=f"sha256:{_digest(folder)}")


def _download(store: Store, objects: list[StoredObject], folder: Path) -> None:
    for item in objects:
        target = (folder / item.key).resolve()
        if not target.is_relative_to(folder.resolve()) or item.key.endswith(_PICKLED):
            continue
        target.parent.mkdir(parents=True, exist_ok=True)
        store.get_file(item.key, target, sha256=None)


class _staged:  # noqa: N801 - used as a statement
    """A folder that appears under its name only when it is complete."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def __enter__(self) -> Path:
        self._folder.parent.mkdir(parents=True, exist_ok=True)
        self._temporary = Path(tempfile.mkdtemp(prefix=f".{self._folder.name}-", dir=self._folder.parent))
        return self._temporary

    def __exit__(self, kind: object, *_rest: object) -> None:
        if kind is None and not self._folder.exists():
            self._temporary.rename(self._folder)
            fsync_folder(self._folder.parent)
        shutil.rmtree(self._temporary, ignore_errors=True)


def _first_line(fault: BaseException) -> str:
    return (str(fault).strip().splitlines() or [type(fault).__name__])[0]
