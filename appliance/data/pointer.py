"""The DVC pointer: which bytes a commit means, proven by hashing what is on this disk.

DVC's word that data is up to date is not taken: a corrupt cache says so too. The directory hash is
computed here, so that a reconcile that has nothing to do needs no DVC at all.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from appliance.command import run_command
from appliance.document import load_document
from appliance.errors import CommandError, DatasetError, UnreachableDataError

_UNREACHABLE = (
    # a frame of botocore's: DVC takes a token file that is not there for data that are not there
    (
        "open(self._web_identity_token_path)",
        "check that AWS_WEB_IDENTITY_TOKEN_FILE names a file with this job's token",
    ),
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
    ("Access Denied", "the DVC remote refuses these credentials; check both keys and the bucket's policy"),
    ("InvalidAccessKeyId", "the DVC remote refuses these credentials; check AWS_ACCESS_KEY_ID"),
    ("SignatureDoesNotMatch", "the DVC remote refuses these credentials; check AWS_SECRET_ACCESS_KEY"),
    ("Could not connect", "the DVC remote cannot be reached; check the endpoint and the network"),
    ("Connect", "the DVC remote cannot be reached; check the endpoint and the network"),
    ("no end after", "the DVC remote does not come to an end; check the endpoint and the network"),
)
_INSTALL = "install the appliance's extra 'data' (in its clone: `uv pip install '.[data]'`)"
_REASONS = (
    ("Missing cache", "the remote lacks the data of this commit; its author has to run `dvc push`"),
    ("unsaved files", "its folder has uncommitted changes, which are kept; `dvc add` and commit, or move them away"),
    ("No remote", "no DVC remote is configured; `dvc remote add --default store s3://bucket/prefix`"),
    ("no remote", "no DVC remote is configured; `dvc remote add --default store s3://bucket/prefix`"),
    *((f"No module named {name}", f"dvc is not installed; {_INSTALL}") for name in ("dvc", "'dvc'")),
    ("missing-files", "the remote lacks the data of this commit; its author has to run `dvc push`"),
    ("does not exist", "the remote lacks the data of this commit; its author has to run `dvc push`"),
)
# DVC's word for whatever else a backend says when it is first asked (dvc_data/index/fetch.py).
_LAST = (("failed to connect to", "the DVC remote cannot be reached; check the endpoint and the network"),)


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


def list_dvc_files(folder: Path) -> list[str]:
    """The files that `dvc add` takes from a folder, as sorted POSIX paths: hidden ones and links to files too.

    DVC never takes `.git`, folders `.hg` and `.dvc`, a folder with a `.dvc` in it, and what is behind a linked folder
    (dvc/ignore.py, `LocalFileSystem.walk` of dvc_objects). Patterns in a `.dvcignore` are not followed here.
    """
    found: list[str] = []
    for place, folders, files in os.walk(folder):
        here = Path(place)
        folders[:] = [f for f in folders if f not in (".git", ".hg", ".dvc") and not os.path.lexists(here / f / ".dvc")]
        found += [(here / f).relative_to(folder).as_posix() for f in files if f != ".git" and (here / f).is_file()]
    return sorted(found)


def digest_dvc_folder(folder: Path) -> str:
    """DVC's hash of a folder: the MD5 of its sorted listing of file MD5s (dvc_data/hashfile/tree.py)."""
    return _digest_listing(_digest_files(folder))


def read_listing(pointer: Pointer, root: Path) -> dict[str, str] | None:
    """Name and MD5 of every file that the pointer means, proven by its hash; `None` where this disk has others.

    Only where the hash of all files is another one, and a `.dvcignore` has patterns, DVC is asked which it takes.
    Raises `DatasetError` when it cannot be.
    """
    folder = root / pointer.out
    if not folder.is_dir():
        return None
    found = _digest_files(folder)
    if _digest_listing(found) != pointer.md5 and _has_patterns(folder):
        argv = [sys.executable, "-m", "appliance.data.ignored", str(root), pointer.out]
        try:
            taken = json.loads(run_command(argv, cwd=root))
        except CommandError as fault:
            raise _explain(f"{pointer.file}: DVC does not say what it ignores", fault) from fault
        found = {name: md5 for name, md5 in found.items() if name in taken}
    return found if _digest_listing(found) == pointer.md5 else None


def is_current(pointer: Pointer, root: Path) -> bool:
    """Whether the bytes on this disk are those that the pointer means."""
    return read_listing(pointer, root) is not None


def list_objects(pointer: Pointer, root: Path) -> list[tuple[str, str, int]]:
    """What a remote has to hold of the data on this disk: (name, DVC object id, bytes), the listing first."""
    folder, listing = root / pointer.out, read_listing(pointer, root)
    if listing is None:
        raise DatasetError(f"{pointer.file}: {folder} was changed meanwhile; run it again")
    files = [(name, md5, (folder / name).stat().st_size) for name, md5 in listing.items()]
    return [(pointer.out, pointer.md5, len(_encode_listing(listing))), *files]


def _digest_files(folder: Path) -> dict[str, str]:
    return {name: _digest_md5(folder / name) for name in list_dvc_files(folder)}


def _encode_listing(files: Mapping[str, str]) -> bytes:
    return json.dumps([{"md5": md5, "relpath": name} for name, md5 in sorted(files.items())], sort_keys=True).encode()


def _digest_listing(files: Mapping[str, str]) -> str:
    return hashlib.md5(_encode_listing(files), usedforsecurity=False).hexdigest() + ".dir"


def _has_patterns(folder: Path) -> bool:
    """Whether a `.dvcignore` between the folder and the root of its DVC repository says anything."""
    for above in folder.absolute().parents:
        file = above / ".dvcignore"
        lines = file.read_text("utf-8").splitlines() if file.is_file() else []
        if any(line.strip() and not line.strip().startswith("#") for line in lines):
            return True
        if (above / ".dvc").is_dir():
            break
    return False


def pull_data(pointer: Pointer, *, root: Path, env: Mapping[str, str] | None = None) -> dict[str, str]:
    """Bring the pointer's data to `root`, and prove it: `read_listing` of it; `env` is for DVC.

    Raises `DatasetError` with the next action, `UnreachableDataError` where the remote cannot be asked from here.
    """
    here = read_listing(pointer, root)
    if here is not None:
        return here
    run_dvc("pull", pointer.file.name, subject=pointer.file, cwd=root, env=env, timeout_s=3600.0)
    pulled = read_listing(pointer, root)
    if pulled is None:
        raise DatasetError(f"{pointer.file}: after dvc pull, {_describe_difference(pointer, root=root, env=env)}")
    return pulled


def run_dvc(
    *arguments: str, subject: Path, cwd: Path, env: Mapping[str, str] | None = None, timeout_s: float = 600.0
) -> str:
    """Run DVC and return its standard output. Raises `DatasetError` as `pull_data` does."""
    try:
        return run_command([sys.executable, "-m", "dvc", *arguments], cwd=cwd, env=env, timeout_s=timeout_s)
    except CommandError as fault:
        raise _explain(f"{subject}: dvc {arguments[0]} failed", fault) from fault


def check_pushed(pointer: Pointer, *, root: Path) -> None:
    """Ask the DVC remote for every object of the data on this disk. Raises as `pull_data` does."""
    argv = [sys.executable, "-m", "appliance.data.remote", str(root), pointer.file.name]
    try:
        missing = json.loads(run_command(argv, cwd=root))
    except CommandError as fault:
        raise _explain(f"{pointer.file}: the DVC remote did not answer", fault) from fault
    if missing:
        raise DatasetError(
            f"{pointer.file}: not on the DVC remote, or not whole there: {', '.join(missing[:3])} "
            f"({len(missing)} in all); run `dvc push`, so that others can make this version again"
        )


def _describe_difference(pointer: Pointer, *, root: Path, env: Mapping[str, str] | None) -> str:
    """Why the data that DVC has just put here is not what the pointer means: by its own listing, file by file."""
    folder = root / pointer.out
    cache = Path(run_dvc("cache", "dir", subject=pointer.file, cwd=root, env=env).strip())
    listing = _find_object(cache, pointer.md5)
    if not listing.is_file():  # DVC before 3.0 kept and hashed it another way
        return f"{folder} is not {pointer.md5}, which DVC keeps no listing of; run `dvc add`, commit and push"
    meant = {entry["relpath"]: entry["md5"] for entry in json.loads(listing.read_bytes())}
    found = _digest_files(folder)
    wrong = sorted(n for n in meant if n in found and found[n] != meant[n])
    if wrong:  # DVC remembers the damaged file as good, so it has to go too
        damaged = " ".join(f"{_find_object(cache, meant[n])} {folder / n}" for n in wrong)
        place = folder / wrong[0]
        return f"{place} is not what the commit says; the DVC cache is corrupt: delete {damaged}, and run it again"
    odd = sorted(found.keys() ^ meant.keys())
    return (
        f"{folder} has other files than the commit: {', '.join(odd[:3])} ({len(odd)} in all); "
        "if .dvcignore names one, move it away, or correct .dvcignore, run `dvc add`, commit and push"
    )


def _find_object(cache: Path, md5: str) -> Path:
    return cache / "files" / "md5" / md5[:2] / md5[2:]


def _explain(subject: str, fault: CommandError) -> DatasetError:
    """What DVC's words mean and ask for; `UnreachableDataError` where they say nothing of the data itself."""
    text = str(fault)
    for kind, reasons in (
        (UnreachableDataError, _UNREACHABLE),
        (DatasetError, _REASONS),
        (UnreachableDataError, _LAST),
    ):
        for mark, words in reasons:
            if mark in text:
                return kind(f"{subject}: {words}")
    return DatasetError(f"{subject}: {fault.last_line}")


def _digest_md5(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
