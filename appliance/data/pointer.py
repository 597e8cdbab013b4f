"""The DVC pointer: which bytes a commit means, proven by hashing what is on this disk.

DVC's word that data is up to date is not taken: a corrupt cache says so too. The directory hash is
computed here, so that a reconcile that has nothing to do needs no DVC at all.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from appliance.command import run_command
from appliance.digest import list_files
from appliance.document import load_document
from appliance.errors import CommandError, DatasetError

_REASONS = (
    ("Missing cache", "the remote lacks the data of this commit; its author has to run `dvc push`"),
    ("unsaved files", "its folder has uncommitted changes, which are kept; `dvc add` and commit, or move them away"),
    ("No remote", "no DVC remote is configured; `dvc remote add --default store s3://bucket/prefix`"),
    ("no remote", "no DVC remote is configured; `dvc remote add --default store s3://bucket/prefix`"),
    (
        "Unable to locate credentials",
        "no credentials for the DVC remote; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY",
    ),
    ("ExpiredToken", "the token or the session for the DVC remote has run out; get a new one and run it again"),
    (
        "AssumeRoleWithWebIdentity",
        "check AWS_ROLE_ARN, and that the role trusts the issuer, audience and subject of this job's token",
    ),
    ("Forbidden", "the DVC remote refuses these credentials; check both keys and the bucket's policy"),
    ("InvalidAccessKeyId", "the DVC remote refuses these credentials; check AWS_ACCESS_KEY_ID"),
    ("SignatureDoesNotMatch", "the DVC remote refuses these credentials; check AWS_SECRET_ACCESS_KEY"),
    ("Could not connect", "the DVC remote cannot be reached; check the endpoint and the network"),
    ("Connect", "the DVC remote cannot be reached; check the endpoint and the network"),
    ("No module named dvc", "dvc is not installed; pip install 'appliance[data]'"),
    ("missing-files", "the remote lacks the data of this commit; its author has to run `dvc push`"),
    ("does not exist", "the remote lacks the data of this commit; its author has to run `dvc push`"),
)


@dataclass(frozen=True, slots=True)
class Pointer:
    """What `datasets.dvc` says: a folder, its DVC hash, size in bytes and number of files."""

    file: Path
    out: str
    md5: str
    size: int
    nfiles: int


def load_pointer(file: Path) -> Pointer:
    """Read a `.dvc` file with one folder. Raises `DatasetError`."""
    try:
        content = file.read_bytes()
    except OSError as fault:
        raise DatasetError(f"{file}: cannot be read; make it with `dvc add datasets` and commit it") from fault
    if any(line.startswith((b"<<<<<<<", b">>>>>>>")) for line in content.splitlines()):
        raise DatasetError(f"{file}: has conflict markers; settle the merge, run `dvc add datasets` and commit")
    expected = "expected one folder under 'outs' as `dvc add datasets` writes it"
    try:
        values = load_document(file, error=DatasetError).values
    except DatasetError as fault:
        raise DatasetError(f"{fault}; {expected}") from fault
    try:
        (out,) = values["outs"]
        return Pointer(file, str(out["path"]), str(out["md5"]), int(out["size"]), int(out["nfiles"]))
    except (TypeError, KeyError, ValueError, OverflowError) as fault:
        raise DatasetError(f"{file}: {expected}") from fault


def digest_dvc_folder(folder: Path) -> str:
    """DVC's hash of a folder: the MD5 of its sorted listing of file MD5s (dvc_data/hashfile/tree.py)."""
    return hashlib.md5(_list_dvc_folder(folder), usedforsecurity=False).hexdigest() + ".dir"


def list_objects(pointer: Pointer, root: Path) -> list[tuple[str, str, int]]:
    """What a remote has to hold of the data on this disk: (name, DVC object id, bytes), the listing first."""
    folder = root / pointer.out
    files = [(n, _digest_md5(folder / n), (folder / n).stat().st_size) for n in list_files(folder)]
    return [(pointer.out, pointer.md5, len(_list_dvc_folder(folder))), *files]


def _list_dvc_folder(folder: Path) -> bytes:
    listing = [{"md5": _digest_md5(folder / name), "relpath": name} for name in list_files(folder)]
    return json.dumps(listing, sort_keys=True).encode()


def is_current(pointer: Pointer, root: Path) -> bool:
    """Whether the bytes on this disk are those that the pointer means."""
    folder = root / pointer.out
    return folder.is_dir() and digest_dvc_folder(folder) == pointer.md5


def pull_data(pointer: Pointer, *, root: Path, env: Mapping[str, str] | None = None) -> Literal["here", "pulled"]:
    """Bring the pointer's data to `root`, and prove it; `env` is for DVC. Raises `DatasetError`: the next action."""
    if is_current(pointer, root):
        return "here"
    try:
        run_command([sys.executable, "-m", "dvc", "pull", pointer.file.name], cwd=root, env=env, timeout_s=3600.0)
    except CommandError as fault:
        raise DatasetError(f"{pointer.file}: dvc pull failed: {_explain(fault)}") from fault
    if not is_current(pointer, root):
        raise DatasetError(
            f"{pointer.file}: after dvc pull, {root / pointer.out} is not {pointer.md5}; the DVC cache is corrupt: "
            "delete .dvc/cache and run it again"
        )
    return "pulled"


def check_pushed(pointer: Pointer, *, root: Path) -> None:
    """Ask the DVC remote for every object of the data on this disk. Raises `DatasetError` when one is not there."""
    argv = [sys.executable, "-m", "appliance.data.remote", str(root), pointer.file.name]
    try:
        missing = json.loads(run_command(argv, cwd=root))
    except CommandError as fault:
        raise DatasetError(f"{pointer.file}: the DVC remote did not answer: {_explain(fault)}") from fault
    if missing:
        raise DatasetError(
            f"{pointer.file}: not on the DVC remote, or not whole there: {', '.join(missing[:3])} "
            f"({len(missing)} in all); run `dvc push`, so that others can make this version again"
        )


def _explain(fault: CommandError) -> str:
    return next((text for mark, text in _REASONS if mark in str(fault)), str(fault).splitlines()[-1])


def _digest_md5(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
