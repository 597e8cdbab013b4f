"""Laws of a run on several devices, here processes on a CPU: the rows and steps of one, exact resume, nobody left over.

A second process has to load torch, which takes seconds, so most of it is slow.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import test_training
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from test_resume import after_a_seal, finish, inside_a_save, kill, wait_until
from test_training import run_in_process, write_job
from tiny import make_recipe, write_base
from warm import Warm

from appliance.errors import DeviceError
from appliance.method import FullMethod, LoraMethod
from appliance.plan import Machine, check_device
from appliance.training import TrainingJob
from appliance.training.ranks import Ranks

ROWS, BATCH = 33, 4  # the last step has one row: nothing for the second device


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny base model."""
    return write_base(tmp_path_factory.mktemp("base"))


def make_job(base: Path, folder: Path, *, devices: int, full: bool = False, **training: Any) -> TrainingJob:
    """A job whose rows cannot be shared evenly, with dropout, on disk."""
    method: Any = FullMethod(type="full") if full else LoraMethod(type="lora", rank=4, dropout=0.1)
    recipe = make_recipe(
        method=method.model_dump(),
        training={"epochs": 3, "effective_batch": BATCH, **training},
        needs={"devices": devices},
    )
    job = test_training.make_job(base, folder, recipe, micro_batch=1, rows=ROWS)
    write_job(job)
    return job


def read_records(job: TrainingJob) -> list[dict[str, Any]]:
    """The journal."""
    return [json.loads(line) for line in (job.folder / "metrics.jsonl").read_bytes().splitlines()]


def test_two_devices_take_the_steps_of_one(base: Path, tmp_path: Path, warm: Warm) -> None:
    """The same rows in every step, each once: loss, tokens and validation are those of one device."""
    exact = {"precision": "fp32", "packing": True}
    one, two = (make_job(base, tmp_path / str(n), devices=n, full=True, **exact) for n in (1, 2))
    run_in_process(one)
    finish(warm, two)
    alone, shared = read_records(one), read_records(two)
    assert len(alone) == len(shared)
    for a, b in zip(alone, shared, strict=True):
        assert (a["step"], a.get("tokens")) == (b["step"], b.get("tokens"))
        for name in ("loss", "grad_norm", "validation_loss"):
            assert a.get(name, 0.0) == pytest.approx(b.get(name, 0.0), rel=1e-4), name
    summary = json.loads((two.folder / "summary.json").read_bytes())
    assert summary["devices"] == 2
    assert not list(two.folder.glob("meeting-*"))


PEERS = """
import json, os, signal, sys, time
from pathlib import Path
import torch
from appliance.errors import TrainingError
from appliance.training.ranks import join_ranks

meeting, size = Path(sys.argv[1]), 3
rank = next((r for r in range(1, size) if os.fork() == 0), 0)
torch.set_num_threads(1)
ranks = join_ranks(meeting, rank, size, torch.device("cpu"))
weights = [torch.nn.Parameter(torch.zeros(3, dtype=d)) for d in (torch.float32, torch.bfloat16)]
beside = torch.nn.Parameter(torch.ones(3))
if rank != 1:
    for w in weights:
        w.grad = torch.full_like(w, 0.5 + rank)
ranks.add_up_gradients([weights[0], beside, weights[1]])
torch.optim.AdamW([beside], weight_decay=0.5).step()
found = {
    "beside": beside.tolist(),
    "gradients": [w.grad.tolist() for w in weights],
    "counts": ranks.add_up(rank, 1),
    "any": [ranks.is_any(rank == 2), ranks.is_any(False)],
    "gathered": ranks.gather([f"row {i}" for i in ranks.take_share(range(7))]),
    "led": ranks.follow_lead(lambda: f"said by {rank}"),
}
torch.manual_seed(1)
with ranks.draw_own(7, 1, 2):
    own = torch.rand(1).item()
found["drawn"] = ranks.gather([own])
found["common"] = ranks.gather([torch.rand(1).item()])
try:
    ranks.require_same(4, "the same")
    ranks.require_same(5 if rank == 1 else 4, "their weights")
except TrainingError as fault:
    found["refused"] = str(fault)
answers = ranks.gather([found])
if rank == 0:
    print(json.dumps(answers))
"""


def test_what_ranks_tell_each_other(tmp_path: Path) -> None:
    """Sums, a rank without gradients included; shares come back in order; what differs is refused by all.

    A weight that no row reaches, as in a tower for images, is not decayed: on one device it stays as it is.
    """
    done = subprocess.run(
        [sys.executable, "-c", PEERS, str(tmp_path / "meeting")],
        capture_output=True, text=True, timeout=120, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    answers = json.loads(done.stdout)
    assert len(answers) == 3
    for found in answers:
        assert found["gradients"] == [[3.0] * 3] * 2
        assert found["beside"] == [1.0] * 3
        assert found["counts"] == [3, 3]
        assert found["any"] == [True, False]
        assert found["gathered"] == [f"row {i}" for i in range(7)]
        assert found["led"] == "said by 0"
        assert len(set(found["drawn"])) == 3
        assert len(set(found["common"])) == 1
        assert found["refused"].startswith("the devices of this run differ in their weights")


@given(st.lists(st.integers(1, 4096), max_size=40), st.integers(1, 9))
def test_every_row_is_dealt_to_one_rank_and_no_share_is_much_longer(lengths: list[int], size: int) -> None:
    """None twice or left out, no rank with more rows than its part or longer than the mean by more than a row."""
    shares = [Ranks(r, size, torch.device("cpu")).take_even_share(lengths, length=int) for r in range(size)]
    assert sorted(n for share in shares for n in share) == sorted(lengths)
    assert max(map(len, shares)) <= -(-len(lengths) // size)
    assert max(map(sum, shares)) <= sum(lengths) / size + max(lengths, default=0)


FAILING = """
import sys
from pathlib import Path
from appliance.child import run_child
from appliance.command import start_server
from appliance.training import peers

def start(argv, **options):
    return start_server(["/bin/sh", "-c", sys.argv[2]], **options)

def work(stop, emit):
    import time
    with peers.start_peers(Path(sys.argv[1]), devices=3, environment={}, emit=emit):
        time.sleep(60)

peers.start_server = start
sys.exit(run_child(work))
"""


@pytest.mark.parametrize(
    ("script", "code", "words"),
    [
        ("""echo '{"failure": "out of memory: 3 GiB"}'; exit 34""", 34, "out of memory: 3 GiB"),
        ("""echo '{"failure": "base: damaged"}'; exit 1""", 1, "base: damaged"),
        ("exit 3", 3, "ended with code 3; its log is "),
        ("kill -9 $$", -9, ""),
    ],
)
def test_a_device_that_fails_ends_the_run_as_itself(script: str, code: int, words: str, tmp_path: Path) -> None:
    """Its exit code, so that memory is answered with half the micro-batch, and its words, within seconds."""
    done = subprocess.run(
        [sys.executable, "-c", FAILING, str(tmp_path), script],
        capture_output=True, text=True, timeout=30, check=False,
    )  # fmt: skip
    assert done.returncode == code, done.stderr
    assert words in done.stdout


def test_devices_are_asked_for_in_the_recipe() -> None:
    """A machine with fewer GPUs is another machine's work, 34; rows that cannot be shared are the recipe's fault."""
    recipe = make_recipe(training={"effective_batch": 8}, needs={"devices": 4})
    check_device(recipe, Machine(4, 1 << 34, gpu="a GPU", gpu_memory_bytes=1 << 34, gpus=4))
    with pytest.raises(DeviceError, match=r"needs\.devices is 4, found 2"):
        check_device(recipe, Machine(4, 1 << 34, gpu="a GPU", gpu_memory_bytes=1 << 34, gpus=2))
    with pytest.raises(ValidationError, match="3 devices cannot share 8 rows a step evenly"):
        make_recipe(training={"effective_batch": 8}, needs={"devices": 3})
    assert make_recipe(training={"effective_batch": 8}).digest == recipe.digest


@pytest.fixture(scope="module")
def whole(base: Path, warm: Warm, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The digest of a run on two devices that nothing interrupted."""
    return finish(warm, make_job(base, tmp_path_factory.mktemp("whole"), devices=2))


def find_peer(job: TrainingJob) -> int:
    """The process of the second device."""
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = entry.read_bytes().split(b"\0")
        except OSError:
            continue
        if b"appliance.training.worker" in words and str(job.folder).encode() in words and b"1" in words:
            return int(entry.parent.name)
    raise AssertionError("no second process")


def is_gone(pid: int) -> bool:
    """Whether a process has ended."""
    try:
        return "Z" in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return True


@pytest.mark.slow
@pytest.mark.parametrize("moment", [after_a_seal, inside_a_save(0.002)])
def test_a_kill_changes_no_byte_and_leaves_nobody(
    moment: Callable[..., None], base: Path, warm: Warm, whole: str, tmp_path: Path
) -> None:
    """SIGKILL to the first process takes the second with it; the next run ends in the same adapter."""
    job = make_job(base, tmp_path, devices=2)
    peers: list[int] = []

    def wait(of: TrainingJob, is_running: Callable[[], bool]) -> None:
        moment(of, is_running)
        peers.append(find_peer(of))

    assert kill(warm, job, wait) == -signal.SIGKILL
    deadline = time.monotonic() + 10
    while not is_gone(peers[0]):
        assert time.monotonic() < deadline, "the second process works on alone"
        time.sleep(0.05)
    assert finish(warm, job) == whole


@pytest.mark.slow
def test_a_second_process_that_is_killed_ends_the_run_and_changes_no_byte(
    base: Path, warm: Warm, whole: str, tmp_path: Path
) -> None:
    """The first one ends in the same way at once, and does not wait for a sum that never comes."""
    job = make_job(base, tmp_path, devices=2)
    pid = warm.start(job.folder)
    after_a_seal(job, lambda: warm.is_running(pid))
    os.kill(find_peer(job), signal.SIGKILL)
    began = time.monotonic()
    assert warm.wait(pid) == -signal.SIGKILL
    assert time.monotonic() - began < 20
    assert finish(warm, job) == whole


@pytest.mark.slow
def test_a_stop_before_the_first_step_leaves_nobody(base: Path, warm: Warm, whole: str, tmp_path: Path) -> None:
    """SIGTERM to the first process while the models are loaded: it ends at once, and the kernel takes the other one."""
    job = make_job(base, tmp_path, devices=2)
    pid = warm.start(job.folder)
    wait_until(lambda: list(job.folder.glob("worker-1.log")), lambda: warm.is_running(pid))
    time.sleep(0.2)
    peer = find_peer(job)
    os.kill(pid, signal.SIGTERM)
    assert warm.wait(pid) == 33
    wait_until(lambda: is_gone(peer), lambda: True)
    assert is_gone(peer)
    assert finish(warm, job) == whole


@pytest.mark.slow
@pytest.mark.parametrize("lead", [True, False])
def test_a_stop_reaches_all_and_changes_no_byte(lead: bool, base: Path, warm: Warm, whole: str, tmp_path: Path) -> None:
    """SIGTERM to either process: both end their step, with a checkpoint and 33; the next run ends in the same bytes."""
    job = make_job(base, tmp_path, devices=2)
    pid = warm.start(job.folder)
    after_a_seal(job, lambda: warm.is_running(pid))
    os.kill(pid if lead else find_peer(job), signal.SIGTERM)
    assert warm.wait(pid) == 33
    assert finish(warm, job) == whole
