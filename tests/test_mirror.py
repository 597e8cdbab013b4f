"""Laws of the mirror: a host is lost, another goes on from the store, and the end has the same bytes."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from test_registry import AT, publish_new
from test_resume import FACTS, MEDIUM, build_job, finish, flip_a_bit, make_checkpoint, wait_until
from tiny import make_recipe, write_base
from warm import Warm

from appliance.cli import main
from appliance.digest import digest_bytes
from appliance.errors import InterruptedRunError, StoreError
from appliance.pipeline import finish_published
from appliance.preparation import Origin, Workspace
from appliance.store import Store, StoredObject
from appliance.store.local import LocalStore
from appliance.training import TrainingJob
from appliance.training.checkpoints import SEAL, is_sound, list_newest_first, prune_checkpoints, seal_checkpoint
from appliance.training.mirror import Mirror, delete_checkpoints, fetch_checkpoints, follow_checkpoints
from appliance.training.monitor import Rules
from appliance.training.trainer import _find_start

KEY = {"run_key": "k"}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny base model."""
    return write_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def whole(warm: Warm, base: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The adapter's digest of a run on one undisturbed host."""
    return finish(warm, build_job(base, tmp_path_factory.mktemp("whole"), "lora", **MEDIUM))


@pytest.fixture
def build(base: Path, tmp_path: Path) -> Callable[[str], TrainingJob]:
    """A builder of that run's job in a folder of its own."""
    return lambda name: build_job(base, tmp_path / name, "lora", **MEDIUM)


def fetch(mirror: Mirror, folder: Path, **fingerprint: str) -> list[str]:
    """Fetch into `folder`; what was said."""
    said: list[str] = []
    fetch_checkpoints(mirror, folder, keep="best_loss", fingerprint={**KEY, **fingerprint}, note=said.append)
    return said


def upload(mirror: Mirror, folder: Path) -> list[str]:
    """Upload what is sealed in `folder`, as a run that was stopped does; what was said."""
    said: list[str] = []
    with pytest.raises(InterruptedRunError), follow_checkpoints(mirror, folder, keep="best_loss", note=said.append):
        raise InterruptedRunError("stopped")
    return said


HOST = """
import sys, time
from pathlib import Path
from appliance.store import open_store
from appliance.training.mirror import Mirror, follow_checkpoints
with follow_checkpoints(Mirror(open_store(sys.argv[1]), "k"), Path(sys.argv[2]), keep="best_loss", note=print):
    time.sleep(600)
"""


def test_another_host_ends_with_the_same_bytes(
    warm: Warm, build: Callable[[str], TrainingJob], store: Store, whole: str, request: pytest.FixtureRequest
) -> None:
    """SIGKILL of parent and child on one host; another folder goes on from the store's checkpoint, byte for byte."""
    if not isinstance(store, LocalStore):
        request.getfixturevalue("s3")  # the other process finds the server by its environment
    mirror = Mirror(store, "k")
    job = build("first")
    parent = subprocess.Popen([sys.executable, "-c", HOST, store.url, str(job.checkpoints)])
    worker = warm.start(job.folder)
    wait_until(lambda: len(mirror.list_names(complete=True)) > 0, lambda: parent.poll() is None)
    os.kill(worker, signal.SIGKILL)
    parent.kill()
    parent.wait(timeout=10)
    warm.wait(worker)
    shutil.rmtree(job.folder)

    other = build("second")
    said = fetch(mirror, other.checkpoints)
    fetched = list_newest_first(other.checkpoints)
    assert "fetched from" in said[0]
    assert fetched
    assert all(is_sound(c) for c in fetched)
    assert finish(warm, other) == whole
    assert "resuming from step" in (other.folder / "worker.log").read_text()
    delete_checkpoints(mirror, note=pytest.fail)
    assert list(store.list("checkpoints/")) == []


def test_the_store_holds_what_the_folder_holds(store: Store, tmp_path: Path) -> None:
    """What was removed here is removed there, and what is there already is not sent again."""
    mirror = Mirror(store, "k")
    for step in (1, 2):
        make_checkpoint(tmp_path, step, **KEY)
    assert upload(mirror, tmp_path) == []
    assert [n.partition("-")[0] for n in mirror.list_names(complete=True)] == ["2", "1"]
    make_checkpoint(tmp_path, 3, **KEY)
    prune_checkpoints(tmp_path)
    assert upload(mirror, tmp_path) == []
    assert [n.partition("-")[0] for n in mirror.list_names(complete=False)] == ["3", "2"]
    assert not list(tmp_path.glob(".*")), "no links are left"


def test_a_version_that_is_found_leaves_the_checkpoints_of_who_makes_it_again(store: Store, tmp_path: Path) -> None:
    """Another host may be at it with --force, under its lease: only who trained removes, and the collector the rest."""
    recipe, key = make_recipe(), digest_bytes(b"run")
    version = publish_new(store, tmp_path / "made", name=recipe.name, run_key=key)
    mirror = Mirror(store, key)
    make_checkpoint(tmp_path / "checkpoints", 4, **KEY)
    assert upload(mirror, tmp_path / "checkpoints") == []
    workspace = Workspace(tmp_path, tmp_path / "cache", tmp_path / "runs", note=pytest.fail, mirror=store)
    origin = Origin(commit="a" * 40, time=AT, actor="b")
    found = finish_published(recipe, version, key=key, workspace=workspace, store=store, origin=origin)
    assert (found.was_done, found.alias) == (True, "production")
    assert [n.partition("-")[0] for n in mirror.list_names(complete=True)] == ["4"]


def make_evaluated(folder: Path, step: int, *, best: int) -> Path:
    """A sealed checkpoint of a run whose best evaluation so far was at `best`."""
    checkpoint = folder / f"checkpoint-{step}"
    checkpoint.mkdir(parents=True)
    losses = {s: 1.0 + abs(s - best) for s in range(1, step + 1)}
    lines = (json.dumps({"step": s, "validation_loss": loss}) for s, loss in losses.items())
    (checkpoint / "metrics.jsonl").write_text("\n".join(lines))
    seal_checkpoint(checkpoint, fingerprint=KEY, facts=FACTS)
    return checkpoint


def test_a_slow_link_mirrors_what_a_host_can_go_on_from(tmp_path: Path) -> None:
    """A newer checkpoint is there before each one has arrived; the best one, which all need, is sent all the same."""
    run, held = tmp_path / "run", list[list[str]]()

    class Slow(LocalStore):
        def put_file(self, key: str, path: Path, *, sha256: str) -> StoredObject:
            """The child seals the next one meanwhile."""
            held.append(mirror.list_names(complete=True))
            if (step := len(held) + 3) < 12:
                make_evaluated(run, step, best=2)
                prune_checkpoints(run, best=run / "checkpoint-2")
            return super().put_file(key, path, sha256=sha256)

    mirror = Mirror(Slow(tmp_path / "store"), "k")
    for step in (2, 3):
        make_evaluated(run, step, best=2)
    assert upload(mirror, run) == []
    steps = [[int(n.partition("-")[0]) for n in names] for names in held]
    assert all(2 in s and max(s) > 2 for s in steps[2:]), steps
    assert max(map(len, steps)) <= 4, "what is not needed goes"


def test_a_damaged_best_checkpoint_is_fetched_again(tmp_path: Path) -> None:
    """The newest is sound here, and is worth nothing without the best one: the store has it."""
    mirror, run = Mirror(LocalStore(tmp_path / "store"), "k"), tmp_path / "run"
    for step in (2, 4, 5):
        make_evaluated(run, step, best=2)
    upload(mirror, run)
    flip_a_bit(run / "checkpoint-2" / "metrics.jsonl")
    shutil.rmtree(run / "checkpoint-4")
    (said,) = fetch(mirror, run)
    assert "checkpoint of step 2 fetched from" in said
    assert is_sound(run / "checkpoint-2")
    assert fetch(mirror, run) == [], "nothing else is missing"
    assert not (run / "checkpoint-4").exists()


def find_start(folder: Path) -> tuple[str, list[str]]:
    """The checkpoint that a run in this folder would go on from, and what it says."""
    said: list[str] = []

    def say(*, note: str) -> None:
        said.append(note)

    job, rules = SimpleNamespace(checkpoints=folder), Rules(keep="best_loss", patience=None, max_steps=100)
    found = _find_start(job, rules, fingerprint=KEY, emit=say)  # type: ignore[arg-type]
    return found.name if found else "", said


def test_a_best_checkpoint_damaged_in_the_store_costs_its_steps_once(tmp_path: Path) -> None:
    """A host goes on from the newest checkpoint whose best one is sound; what it made, the next one goes on from."""
    mirror = Mirror(LocalStore(tmp_path / "store"), "k")
    for step in (30, 40, 45):
        make_evaluated(tmp_path / "first", step, best=30)
    upload(mirror, tmp_path / "first")
    flip_a_bit(next((tmp_path / "store" / mirror.prefix).glob("30-*")) / "metrics.jsonl")
    second, third = tmp_path / "second", tmp_path / "third"
    (told, *_) = [line for line in fetch(mirror, second) if "not used" in line]
    assert "damaged" in told
    assert "publish" not in told, "a checkpoint is nothing that is published"
    assert find_start(second) == (
        "",
        [
            "the checkpoint of step 45 is no start: that of its best step, 30, is lost or damaged",
            "the checkpoint of step 40 is no start: that of its best step, 30, is lost or damaged",
            "no checkpoint is left to go on from: training starts over",
        ],
    )
    for step in (5, 10):
        make_evaluated(second, step, best=5)
    assert upload(mirror, second) == []
    fetch(mirror, third)
    name, said = find_start(third)
    assert (name, len(said)) == ("checkpoint-10", 2)
    assert [c.name for c in list_newest_first(third)] == ["checkpoint-10", "checkpoint-5"], "no newer one stays"


def test_a_finished_run_does_not_wait_for_its_last_upload(tmp_path: Path) -> None:
    """Checkpoints are for a run that may be lost; nothing is uploaded after its end."""
    mirror = Mirror(LocalStore(tmp_path / "store"), "k")
    with follow_checkpoints(mirror, tmp_path / "run", keep="best_loss", note=pytest.fail):
        make_checkpoint(tmp_path / "run", 1, **KEY)
    assert mirror.list_names(complete=False) == []


def copy_first(mirror: Mirror) -> str:
    """The key prefix of the newest checkpoint in the store."""
    return mirror.prefix + mirror.list_names(complete=True)[0]


@pytest.mark.parametrize("damage", ["bytes", "seal", "file lost", "unfinished"])
def test_a_damaged_checkpoint_in_the_store_is_passed_over(tmp_path: Path, damage: str) -> None:
    """The one before it is taken, and the damaged one is named; an unfinished upload does not exist."""
    mirror = Mirror(LocalStore(tmp_path / "store"), "k")
    for step in (1, 2):
        make_checkpoint(tmp_path / "first", step, **KEY)
    upload(mirror, tmp_path / "first")
    newest = tmp_path / "store" / copy_first(mirror)
    if damage == "bytes":
        flip_a_bit(newest / "weights")
    elif damage == "seal":
        flip_a_bit(newest / SEAL)
    else:
        (newest / (SEAL if damage == "unfinished" else "weights")).unlink()
    said = fetch(mirror, tmp_path / "second")
    assert [c.name for c in list_newest_first(tmp_path / "second")] == ["checkpoint-1"]
    assert [("not used" in line) for line in said] == ([False] if damage == "unfinished" else [True, False])
    assert not list((tmp_path / "second").glob(".*"))


def test_a_seal_cannot_write_outside_its_folder(tmp_path: Path) -> None:
    """Names in a seal are untrusted."""
    mirror = Mirror(LocalStore(tmp_path / "store"), "k")
    make_checkpoint(tmp_path / "first", 1, **KEY)
    seal = json.loads((tmp_path / "first" / "checkpoint-1" / SEAL).read_bytes())
    seal["files"] = {"../../escaped": seal["files"]["weights"]}
    content = json.dumps(seal).encode()
    mirror.store.put(f"{mirror.prefix}1-{digest_bytes(content)[:12]}/{SEAL}", content)
    (said,) = fetch(mirror, tmp_path / "second")
    assert "unsafe path" in said
    assert not (tmp_path / "escaped").exists()
    assert list_newest_first(tmp_path / "second") == []


def test_a_checkpoint_of_other_software_stays_in_the_store(tmp_path: Path) -> None:
    """It is named with what differs, and training starts at the first step."""
    mirror = Mirror(LocalStore(tmp_path / "store"), "k")
    make_checkpoint(tmp_path / "first", 1, **KEY, torch="2.12.0")
    upload(mirror, tmp_path / "first")
    (said,) = fetch(mirror, tmp_path / "second", torch="2.13.0")
    assert "torch was 2.12.0, is 2.13.0" in said
    assert list_newest_first(tmp_path / "second") == []


def test_what_is_here_is_not_fetched(tmp_path: Path) -> None:
    """A sound checkpoint in the folder wins over the store; a damaged one does not."""
    mirror = Mirror(LocalStore(tmp_path / "store"), "k")
    make_checkpoint(tmp_path / "first", 9, **KEY)
    upload(mirror, tmp_path / "first")
    held = make_checkpoint(tmp_path / "second", 3, **KEY)
    assert fetch(mirror, tmp_path / "second") == []
    flip_a_bit(held / "weights")
    fetch(mirror, tmp_path / "second")
    assert is_sound(tmp_path / "second" / "checkpoint-9")


def test_the_flag_needs_a_store(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Asked to mirror to nowhere, `run` says what is missing and does nothing."""
    monkeypatch.delenv("APPLIANCE_STORE", raising=False)
    assert main(["run", "nowhere.yaml", "--mirror-checkpoints"]) == 2
    assert "give --store" in capsys.readouterr().err


class Refusing(LocalStore):
    """A store whose identity may do only some things; `refused` says which not."""

    refused: str = ""

    def put_file(self, key: str, path: Path, *, sha256: str) -> StoredObject:
        """Refused, or as always."""
        self._refuse("put")
        return super().put_file(key, path, sha256=sha256)

    def delete(self, key: str) -> None:
        """Refused, or as always."""
        self._refuse("delete")
        super().delete(key)

    def _refuse(self, action: str) -> None:
        if self.refused == action:
            raise StoreError("permission denied")


@pytest.mark.parametrize(("refused", "said"), [("put", "not mirrored"), ("delete", "stay in the store")])
def test_a_store_that_refuses_is_no_reason_to_stop(tmp_path: Path, refused: str, said: str) -> None:
    """It is said once, and training goes on."""
    store = Refusing(tmp_path / "store")
    object.__setattr__(store, "refused", refused)
    mirror, heard = Mirror(store, "k"), []
    with follow_checkpoints(mirror, tmp_path / "run", keep="best_loss", note=heard.append):
        for step in (1, 2, 3):
            make_checkpoint(tmp_path / "run", step, **KEY)
            prune_checkpoints(tmp_path / "run")
            deadline = time.monotonic() + 10
            while time.monotonic() < deadline and not (heard or len(mirror.list_names(complete=True)) >= step):
                time.sleep(0.05)
    assert len(heard) == 1
    assert said in heard[0]


def test_removing_a_checkpoint_while_it_is_sent_harms_nothing(tmp_path: Path) -> None:
    """The files are held by links: what arrives is the whole checkpoint."""
    run = tmp_path / "run"
    seen: list[str] = []

    class Slow(LocalStore):
        def put_file(self, key: str, path: Path, *, sha256: str) -> StoredObject:
            """The child prunes exactly now."""
            shutil.rmtree(run / "checkpoint-1", ignore_errors=True)
            seen.append(key)
            return super().put_file(key, path, sha256=sha256)

    mirror = Mirror(Slow(tmp_path / "store"), "k")
    make_checkpoint(run, 1, **KEY)
    assert upload(mirror, run) == []
    assert seen
    assert len(mirror.list_names(complete=True)) == 1
    fetch(mirror, tmp_path / "second")
    assert is_sound(tmp_path / "second" / "checkpoint-1")
