"""Laws of the resume: killed at any moment, by anything, a run ends with the bytes of one that was not.

Kills are real (SIGKILL of a real worker in the middle of its work); only the start of a worker is
cheap, forked from a process that has imported torch (`tests/warm.py`).
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from test_training import make_job, quiet, write_job
from tiny import make_recipe, write_base
from warm import Warm

from appliance.command import WorkerEnd
from appliance.digest import digest_folder
from appliance.errors import InterruptedRunError, TrainingError
from appliance.example import Example, Message
from appliance.model import load_template
from appliance.training import TrainingJob, launch, prepare_rows, train
from appliance.training.checkpoints import (
    SEAL,
    Facts,
    count_steps_done,
    find_checkpoint,
    list_newest_first,
    prune_checkpoints,
    read_facts,
    seal_checkpoint,
)

METHODS: dict[str, dict[str, Any]] = {
    "lora": {"type": "lora", "rank": 4, "dropout": 0.1},
    "dora": {"type": "lora", "rank": 4, "variant": "dora"},
    "qlora": {"type": "qlora", "rank": 4, "dropout": 0.1},
    "full": {"type": "full"},
}
CASES = [(method, batch) for method in METHODS for batch in ("packed", "padded")]
EACH = [("lora", "packed"), ("dora", "padded"), ("qlora", "packed"), ("qlora", "padded"), ("full", "packed")]
SHORT = {"epochs": 2.5, "checkpoints": 5}  # 10 steps, the last in the middle of an epoch, a checkpoint every 2
MEDIUM = {"epochs": 10.5, "checkpoints": 14}  # 42 steps, a checkpoint every 3
LONG = {"epochs": 30.5, "checkpoints": 41}  # 122 steps, a checkpoint every 3
FACTS = Facts(threads=1, micro_batches=((0, 8),))

Moment = Callable[[TrainingJob, Callable[[], bool]], None]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny base model."""
    return write_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def uninterrupted(warm: Warm, base: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., str]:
    """The adapter's digest after a run that nothing disturbed, once for each job."""
    known: dict[str, str] = {}

    def find(method: str, **training: Any) -> str:
        key = json.dumps([method, training])
        if key not in known:
            job = build_job(base, tmp_path_factory.mktemp("whole"), method, **training)
            known[key] = finish(warm, job)
        return known[key]

    return find


def build_job(base: Path, folder: Path, method: str, **training: Any) -> TrainingJob:
    """A job on disk, ready for a worker."""
    job = make_job(base, folder, make_recipe(method=METHODS[method], training=training))
    write_job(job)
    return job


def finish(warm: Warm, job: TrainingJob) -> str:
    """Run the job to its end; the adapter's digest."""
    code = warm.run(job.folder)
    assert code == 0, (job.folder / "worker.log").read_text()[-2000:]
    steps = [
        r["step"] for r in map(json.loads, (job.folder / "metrics.jsonl").read_bytes().splitlines()) if "loss" in r
    ]
    assert steps == list(range(1, len(steps) + 1)), "the journal has every step once"
    return digest_folder(job.adapter)


def kill(warm: Warm, job: TrainingJob, moment: Moment, *, number: signal.Signals = signal.SIGKILL) -> int:
    """Start the job's worker, wait for `moment`, send the signal; the worker's exit code."""
    pid = warm.start(job.folder)
    moment(job, lambda: warm.is_running(pid))
    if warm.is_running(pid):
        os.kill(pid, number)
    return warm.wait(pid)


def wait_until(happened: Callable[[], object], is_running: Callable[[], bool]) -> None:
    """Until something happened, the worker ended or a minute has passed."""
    deadline = time.monotonic() + 60
    while not happened() and is_running() and time.monotonic() < deadline:
        time.sleep(0.0005)


def inside_a_save(delay: float) -> Moment:
    """When a new checkpoint's folder has appeared, before it is sealed, and `delay` seconds later."""

    def wait(job: TrainingJob, is_running: Callable[[], bool]) -> None:
        wait_until(lambda: any(not (c / SEAL).exists() for c in list_newest_first(job.checkpoints)), is_running)
        time.sleep(delay)

    return wait


def after_a_seal(job: TrainingJob, is_running: Callable[[], bool]) -> None:
    """When there is one more sealed checkpoint, or a newer one, than before."""
    before = set(job.checkpoints.glob(f"*/{SEAL}"))
    wait_until(lambda: set(job.checkpoints.glob(f"*/{SEAL}")) - before, is_running)


def after_steps(count: int, delay: float) -> Moment:
    """When the journal has grown by `count` lines, and `delay` seconds later."""

    def wait(job: TrainingJob, is_running: Callable[[], bool]) -> None:
        journal = job.folder / "metrics.jsonl"
        before = read_lines(journal)
        wait_until(lambda: read_lines(journal) >= before + count, is_running)
        time.sleep(delay)

    return wait


def after_start(delay: float) -> Moment:
    """`delay` seconds after the start."""
    return lambda _job, _is_running: time.sleep(delay)


def while_saving_the_artifact(delay: float) -> Moment:
    """When the artifact's hidden folder has appeared, and `delay` seconds later."""

    def wait(job: TrainingJob, is_running: Callable[[], bool]) -> None:
        staged = job.adapter.with_name(f".{job.adapter.name}.tmp")
        wait_until(staged.exists, is_running)
        time.sleep(delay)

    return wait


def read_lines(file: Path) -> int:
    """How many lines a file has; 0 without it."""
    return file.read_bytes().count(b"\n") if file.is_file() else 0


def draw_moment(rng: random.Random) -> Moment:
    """A random moment of a life: starting, stepping, evaluating, or in the middle of a save."""
    kind = rng.choice(("start", "step", "step", "save", "save", "save"))
    if kind == "start":
        return after_start(rng.uniform(0.0, 0.6))
    if kind == "step":
        return after_steps(rng.randint(1, 9), rng.uniform(0.0, 0.05))
    return inside_a_save(rng.expovariate(100.0))


def describe_wound(job: TrainingJob) -> str:
    """What a kill left: an unfinished checkpoint, or where the run stood."""
    if any(not (c / SEAL).exists() for c in list_newest_first(job.checkpoints)):
        return "inside a save"
    return "between saves" if list_newest_first(job.checkpoints) else "before the first save"


@pytest.mark.parametrize("case", EACH, ids=" ".join)
def test_a_kill_inside_a_save_changes_no_byte(
    warm: Warm, base: Path, tmp_path: Path, uninterrupted: Callable[..., str], case: tuple[str, str]
) -> None:
    """For each method: SIGKILL while the second checkpoint is written, and the end is the same."""
    method, packing = case[0], case[1] == "packed"
    job = build_job(base, tmp_path, method, packing=packing, **SHORT)
    moments: list[Moment] = [after_steps(4, 0.0), inside_a_save(0.01)]
    codes = [kill(warm, job, moment) for moment in moments]
    assert codes == [-signal.SIGKILL] * 2
    assert finish(warm, job) == uninterrupted(method, packing=packing, **SHORT)


def test_kills_at_random_moments_change_no_byte(
    warm: Warm, base: Path, tmp_path: Path, uninterrupted: Callable[..., str]
) -> None:
    """One run, killed again and again wherever it is, the end included."""
    job = build_job(base, tmp_path, "lora", **SHORT)
    check_random_kills(warm, job, kills=6)
    assert finish(warm, job) == uninterrupted("lora", **SHORT)


@pytest.mark.slow
@pytest.mark.timeout(1500)
@pytest.mark.parametrize("case", CASES, ids=" ".join)
def test_thirty_kills_change_no_byte(
    warm: Warm, base: Path, tmp_path: Path, uninterrupted: Callable[..., str], case: tuple[str, str]
) -> None:
    """Thirty SIGKILLs in one run of 122 steps, and three more while the artifact is written."""
    training = {"packing": case[1] == "packed", **LONG}
    job = build_job(base, tmp_path, case[0], **training)
    wounds = check_random_kills(warm, job, kills=30)
    assert wounds["inside a save"], "some kills hit a save"
    assert finish(warm, job) == uninterrupted(case[0], **training)


def check_random_kills(warm: Warm, job: TrainingJob, *, kills: int) -> Counter[str]:
    """Kill one run `kills` times at seeded moments, and three times at its end; where it was each time."""
    rng = random.Random(f"{job.method.type} {job.training.packing}")
    wounds: Counter[str] = Counter()
    for _ in range(kills):
        code = kill(warm, job, draw_moment(rng))
        assert code in (-signal.SIGKILL, 0), (job.folder / "worker.log").read_text()[-2000:]
        wounds[describe_wound(job) if code else "ended before"] += 1
    for _ in range(3):
        shutil.rmtree(job.adapter, ignore_errors=True)
        wounds["at the artifact"] += kill(warm, job, while_saving_the_artifact(rng.uniform(0.0, 0.02))) != 0
    sys.stdout.write(f"{job.method.type} packing={job.training.packing}: {dict(wounds)}\n")
    return wounds


def test_sigterm_ends_with_a_checkpoint_and_the_same_bytes(
    warm: Warm, base: Path, tmp_path: Path, uninterrupted: Callable[..., str]
) -> None:
    """SIGTERM and SIGINT to the worker: exit 33 at the end of a step, with a checkpoint of that very step."""
    job = build_job(base, tmp_path, "lora", **SHORT)
    assert kill(warm, job, after_steps(1, 0.0), number=signal.SIGTERM) == InterruptedRunError.exit_code
    stopped = list_newest_first(job.checkpoints)[0]
    assert read_lines(job.folder / "metrics.jsonl") == read_lines(stopped / "metrics.jsonl")
    assert kill(warm, job, after_steps(1, 0.0), number=signal.SIGINT) in (InterruptedRunError.exit_code, 0)
    assert finish(warm, job) == uninterrupted("lora", **SHORT)


def test_sigterm_before_the_first_step_is_not_waited_for(
    warm: Warm, base: Path, tmp_path: Path, uninterrupted: Callable[..., str]
) -> None:
    """While the model is loaded there is nothing to save: exit 33, no checkpoint, and later the same bytes."""
    job = build_job(base, tmp_path, "lora", **SHORT)

    def once_it_works(job: TrainingJob, is_running: Callable[[], bool]) -> None:
        wait_until((job.folder / "worker.lock").exists, is_running)

    assert kill(warm, job, once_it_works, number=signal.SIGTERM) == InterruptedRunError.exit_code
    assert not list_newest_first(job.checkpoints)
    assert finish(warm, job) == uninterrupted("lora", **SHORT)


def test_ctrl_c_to_the_parent_is_answered_with_a_checkpoint(
    warm: Warm, base: Path, tmp_path: Path, uninterrupted: Callable[..., str]
) -> None:
    """SIGINT to the process that called `train` becomes a checkpoint in its child, and code 33's error."""
    job = build_job(base, tmp_path, "lora", **MEDIUM)
    journal = job.folder / "metrics.jsonl"

    def stop_when_running() -> None:
        deadline = time.monotonic() + 200
        while time.monotonic() < deadline and not read_lines(journal):
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=stop_when_running, daemon=True).start()
    with pytest.raises(InterruptedRunError, match="run the same command to go on"):
        train(job, note=quiet)
    assert not job.adapter.exists(), "an unfinished run leaves no adapter"
    assert list_newest_first(job.checkpoints)
    assert finish(warm, job) == uninterrupted("lora", **MEDIUM)


def test_a_full_disk_leaves_the_checkpoint_before_it_valid(
    warm: Warm, base: Path, tmp_path: Path, uninterrupted: Callable[..., str]
) -> None:
    """No room for the next checkpoint: one message, exit 1; with room again the run goes on, same bytes."""
    job = build_job(base, tmp_path, "lora", **SHORT)
    pid = warm.start(job.folder)
    wait_until(
        lambda: any((c / SEAL).exists() for c in list_newest_first(job.checkpoints)), lambda: warm.is_running(pid)
    )
    held = list_newest_first(job.checkpoints)[0]
    # A limit on the size of a file: what a write beyond it gets is what a full disk gives (setrlimit(2), EFBIG).
    resource.prlimit(pid, resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
    assert warm.wait(pid) == 1
    assert "no space left" in (job.folder / "worker.log").read_text()
    assert not job.adapter.exists()
    assert (held / SEAL).is_file() or any((c / SEAL).is_file() for c in list_newest_first(job.checkpoints))
    assert finish(warm, job) == uninterrupted("lora", **SHORT)


@pytest.mark.parametrize("limit", [64, 4096, 20_000])
def test_whatever_torch_says_of_a_full_disk_is_understood(limit: int, tmp_path: Path) -> None:
    """Its writer loses the errno, and its words depend on where in the file the room ends."""
    script = (
        "import signal, torch; from resource import RLIMIT_FSIZE, setrlimit\n"
        "from appliance.errors import is_disk_full\n"
        f"signal.signal(signal.SIGXFSZ, signal.SIG_IGN); setrlimit(RLIMIT_FSIZE, ({limit}, {limit}))\n"
        f"try: torch.save(torch.zeros(20000), {str(tmp_path / 'optimizer.pt')!r})\n"
        "except Exception as fault: print(is_disk_full(fault), fault)"
    )
    done = subprocess.run([sys.executable, "-c", script], text=True, capture_output=True, check=False, timeout=120)
    assert done.stdout.startswith("True"), done.stdout + done.stderr


def flip_a_bit(file: Path) -> None:
    """One bit in the middle of a file."""
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


DAMAGES: dict[str, Callable[[Path], None]] = {
    "bit flip": lambda c: flip_a_bit(c / "adapter_model.safetensors"),
    "truncated": lambda c: os.truncate(c / "optimizer.pt", 100),
    "empty": lambda c: os.truncate(c / "rng_state.pth", 0),
    "file lost": lambda c: (c / "scheduler.pt").unlink(),
    "file added": lambda c: (c / "scaler.pt").write_bytes(b"x") and None,
    "journal changed": lambda c: (c / "metrics.jsonl").write_bytes(b"") and None,
    "seal lost": lambda c: (c / SEAL).unlink(),
    "seal torn": lambda c: os.truncate(c / SEAL, 50),
    "seal of another kind": lambda c: (c / SEAL).write_bytes(b'{"files": []}') and None,
}


def test_a_damaged_checkpoint_is_not_used(
    warm: Warm, base: Path, tmp_path: Path, uninterrupted: Callable[..., str]
) -> None:
    """Each kind of damage to the newest: the one before it is used. Damage to all: from the first step. Same bytes."""
    job = build_job(base, tmp_path / "job", "lora", **SHORT)
    kill(warm, job, after_steps(10, 0.0))
    kept = tmp_path / "kept"
    shutil.copytree(job.checkpoints, kept)
    fingerprint = json.loads((list_newest_first(kept)[0] / SEAL).read_bytes())["fingerprint"]
    for name, damage in DAMAGES.items():
        shutil.rmtree(job.checkpoints)
        shutil.copytree(kept, job.checkpoints)
        newest, before = [c for c in list_newest_first(job.checkpoints) if (c / SEAL).exists()]
        damage(newest)
        assert find_checkpoint(job.checkpoints, fingerprint=fingerprint) == before, name
        assert not newest.exists(), name
    assert finish(warm, job) == uninterrupted("lora", **SHORT)
    for checkpoint in list_newest_first(job.checkpoints):
        flip_a_bit(checkpoint / "optimizer.pt")
    assert find_checkpoint(job.checkpoints, fingerprint=fingerprint) is None
    assert len(list(job.checkpoints.glob("damaged-*"))) == 1, "one is kept for study, not all"
    assert finish(warm, job) == uninterrupted("lora", **SHORT)


def test_checkpoints_can_be_read_by_others_and_hold_their_journal(warm: Warm, base: Path, tmp_path: Path) -> None:
    """Mode 0644 on every file, and a copy of the journal as it was at the step."""
    job = build_job(base, tmp_path, "lora", **SHORT)
    finish(warm, job)
    newest, before = list_newest_first(job.checkpoints)
    assert {oct(f.stat().st_mode & 0o777) for f in newest.iterdir()} == {"0o644"}
    assert (newest / "metrics.jsonl").read_bytes() == (job.folder / "metrics.jsonl").read_bytes()
    assert (newest / "metrics.jsonl").read_bytes().startswith((before / "metrics.jsonl").read_bytes())
    assert read_facts(job.checkpoints) == FACTS


def test_another_recipe_is_refused_by_the_names_of_its_keys(warm: Warm, base: Path, tmp_path: Path) -> None:
    """A resume with another rate and rank says so, with both values and no digest."""
    job = build_job(base, tmp_path, "lora", **SHORT)
    kill(warm, job, after_a_seal)
    other = make_recipe(method={**METHODS["lora"], "rank": 8}, training={**SHORT, "learning_rate": 0.02})
    changed = {"method": other.method, "training": other.training, "fingerprint": {"run_key": "0" * 64}}
    write_job(job.model_copy(update=changed))
    assert warm.run(job.folder) == TrainingError.exit_code
    said = (job.folder / "worker.log").read_text()
    assert "(method.rank was 4, is 8, training.learning_rate was 0.01, is 0.02)" in said
    assert "0000000000" not in said
    assert "to train from the start" in said


def make_checkpoint(folder: Path, step: int, **fingerprint: str) -> Path:
    """A sealed checkpoint with one file."""
    checkpoint = folder / f"checkpoint-{step}"
    checkpoint.mkdir(parents=True)
    (checkpoint / "weights").write_bytes(bytes([step]) * 100)
    seal_checkpoint(checkpoint, fingerprint=fingerprint, facts=FACTS)
    return checkpoint


@pytest.mark.parametrize(
    ("now", "message"),
    [
        ({"run_key": "b" * 64}, "the recipe, the data or the base model changed"),
        ({"run_key": "b" * 64, "train_rows": "c" * 64}, r"\(the training rows changed\)"),
        ({"run_key": "a" * 64, "torch": "2.12.0"}, "torch was 2.13.0, is 2.12.0"),
        ({"run_key": "a" * 64, "device": "NVIDIA X"}, "device was None, is NVIDIA X"),
    ],
)
def test_what_differs_is_told_in_words(tmp_path: Path, now: dict[str, str], message: str) -> None:
    """Values where a person can read them; where they are digests, what they are of."""
    was = {"run_key": "a" * 64, "train_rows": "d" * 64, "torch": "2.13.0"}
    make_checkpoint(tmp_path, 1, **was)
    with pytest.raises(TrainingError, match=message):
        find_checkpoint(tmp_path, fingerprint={**was, **now})


def test_older_checkpoints_go_only_when_a_newer_one_is_sealed(tmp_path: Path) -> None:
    """Two sealed ones stay, and the best; an unsealed one counts for nothing."""
    for step in (1, 2, 3, 4):
        make_checkpoint(tmp_path, step)
    (tmp_path / "checkpoint-5").mkdir()
    prune_checkpoints(tmp_path, best=tmp_path / "checkpoint-1")
    assert sorted(p.name for p in tmp_path.iterdir()) == [f"checkpoint-{n}" for n in (1, 3, 4, 5)]


def test_two_workers_never_share_a_folder(warm: Warm, base: Path, tmp_path: Path) -> None:
    """The second waits for the first to end; both leave one sound result."""
    job = build_job(base, tmp_path, "lora", **LONG)
    first = warm.start(job.folder)
    wait_until(lambda: read_lines(job.folder / "metrics.jsonl"), lambda: warm.is_running(first))
    second = warm.start(job.folder)
    time.sleep(0.5)
    assert warm.is_running(second)
    held = read_lines(job.folder / "metrics.jsonl")
    os.kill(first, signal.SIGKILL)
    wait_until(lambda: read_lines(job.folder / "metrics.jsonl") > held, lambda: warm.is_running(second))
    os.kill(second, signal.SIGTERM)
    assert warm.wait(second) == InterruptedRunError.exit_code


def test_a_child_dies_with_its_parent(tmp_path: Path) -> None:
    """SIGKILL of the parent alone leaves no trainer behind that nobody listens to."""
    pid_file = tmp_path / "pid"
    child = f"import os, time; open({str(pid_file)!r}, 'w').write(str(os.getpid())); time.sleep(60)"
    parent = (
        "import sys; from pathlib import Path; from appliance.command import run_worker; "
        f"run_worker([sys.executable, '-c', {child!r}], log=Path({str(tmp_path / 'log')!r}), on_event=print)"
    )
    process = subprocess.Popen([sys.executable, "-c", parent])
    deadline = time.monotonic() + 30
    while not (pid_file.is_file() and pid_file.read_text()) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.kill()
    process.wait(timeout=10)
    worker = Path(f"/proc/{pid_file.read_text()}/stat")
    while time.monotonic() < deadline and is_alive(worker):
        time.sleep(0.02)
    assert not is_alive(worker)


INTERRUPTED_FORK = """
import os, signal, sys
from pathlib import Path
from appliance.command import run_worker

def stop(*_):
    raise KeyboardInterrupt

signal.signal(signal.SIGTERM, stop)
os.register_at_fork(after_in_parent=lambda: os.kill(os.getpid(), signal.SIGTERM))
try:
    run_worker([sys.executable, "-c", "import time; time.sleep(60)"], log=Path(sys.argv[1]), on_event=print)
except KeyboardInterrupt:
    sys.exit(33)
"""


def test_a_stop_while_a_child_is_made_is_not_lost(tmp_path: Path) -> None:
    """A signal within the fork, where a handler that raises would be ignored, stops child and parent."""
    argv = [sys.executable, "-c", INTERRUPTED_FORK, str(tmp_path / "log")]
    assert subprocess.run(argv, timeout=40, check=False).returncode == 33


def is_alive(stat: Path) -> bool:
    """Whether the process of a `/proc/N/stat` is neither gone nor a zombie."""
    with contextlib.suppress(OSError):
        return stat.read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def build_hungry_job(base: Path, folder: Path) -> TrainingJob:
    """Three steps of sixteen rows of some 1,500 tokens: the micro-batch decides how much memory is needed."""
    recipe = make_recipe(
        training={"epochs": 1, "effective_batch": 16, "max_length": 2048, "packing": False, "checkpoints": 3}
    )
    job = make_job(base, folder, recipe, micro_batch=16)
    talks = [(Message("user", f"{i} " + "word " * 300), Message("assistant", "red")) for i in range(48)]
    rows = [Example(f"r{i}", talk, provenance="program") for i, talk in enumerate(talks)]
    prepare_rows(rows, template=load_template(base), max_length=2048, file=folder / "train.rows.jsonl")
    prepare_rows([], template=load_template(base), max_length=2048, file=folder / "validation.rows.jsonl")
    write_job(job)
    return job


def train_warm(
    warm: Warm, job: TrainingJob, patch: pytest.MonkeyPatch, *, address_space: int | None = None
) -> tuple[Any, list[str]]:
    """`train` with children forked from the warm process, under a limit of the allocator; summary and notes."""
    said: list[str] = []

    def run_child(job: TrainingJob, **_rest: object) -> WorkerEnd:
        write_job(job)
        code = warm.run(job.folder, address_space=address_space)
        lines = (job.folder / "worker.log").read_text().splitlines()
        failures = [json.loads(x)["failure"] for x in lines if x.startswith('{"failure"')]
        return WorkerEnd(code, failures[-1] if failures else "")

    patch.setattr(launch, "_run_child", run_child)
    return train(job, note=said.append), said


def test_out_of_memory_goes_on_with_half_the_micro_batch(
    warm: Warm, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A limit of the allocator (RLIMIT_AS): the child is restarted smaller, from its checkpoint, and that is recorded.

    After the change the law holds as before: killed and resumed, such a run ends with the same bytes.
    """
    peaks = {}
    for micro in (16, 8):
        whole = build_hungry_job(base, tmp_path / f"whole-{micro}").model_copy(update={"micro_batch": micro})
        write_job(whole)
        finish(warm, whole)
        peaks[micro] = int((whole.folder / "peak").read_text())
    assert peaks[16] - peaks[8] > 64 << 20, "what the one needs more is more than noise"
    limit = peaks[8] + (peaks[16] - peaks[8]) // 4

    fresh = build_hungry_job(base, tmp_path / "fresh")
    summary, said = train_warm(warm, fresh, monkeypatch, address_space=limit)
    assert said == ["out of memory; again with micro-batch 8, the effective batch stays"]
    assert (summary["micro_batch"], summary["effective_batch"], summary["steps"]) == (8, 16, 3)
    assert summary["micro_batches"][-1][1] == 8, "where memory ran out is the allocator's affair"

    shrunk = build_hungry_job(base, tmp_path / "shrunk")
    kill(warm, shrunk, after_a_seal)
    step = max(count_steps_done(f.parent) for f in shrunk.checkpoints.glob(f"*/{SEAL}"))
    shutil.copytree(shrunk.folder, tmp_path / "again")
    write_job(shrunk.model_copy(update={"micro_batch": 8}))
    expected = finish(warm, shrunk)

    again = shrunk.model_copy(update={"folder": tmp_path / "again", "adapter": tmp_path / "again" / "adapter"})
    write_job(again.model_copy(update={"micro_batch": 8}))
    kill(warm, again, after_a_seal)
    assert read_facts(again.checkpoints) == Facts(threads=1, micro_batches=((0, 16), (step, 8)))
    summary, said = train_warm(warm, again, monkeypatch, address_space=limit)
    assert said == [], "what fitted last time is taken from the checkpoint, not what the plan says"
    assert summary["micro_batches"] == [[0, 16], [step, 8]]
    assert summary["adapter_sha256"] == expected


@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_run_goes_on_with_activations_computed_again(
    warm: Warm, uninterrupted: Callable[..., str], base: Path, tmp_path: Path, method: str
) -> None:
    """Gradient checkpointing that began within a run stays, is recorded, and ends in the bytes of a run without it."""
    job = build_job(base, tmp_path, method, **SHORT)
    kill(warm, job, after_a_seal)
    step = max(count_steps_done(f.parent) for f in job.checkpoints.glob(f"*/{SEAL}"))
    write_job(job.model_copy(update={"checkpointing": True}))
    kill(warm, job, after_a_seal)
    facts = read_facts(job.checkpoints)
    assert facts == Facts(threads=1, micro_batches=FACTS.micro_batches, checkpointing_since=step)
    with pytest.MonkeyPatch.context() as patch:
        summary, _ = train_warm(warm, job, patch)
    assert (summary["checkpointing"], summary["checkpointing_since"]) == (True, step)
    assert summary["adapter_sha256"] == uninterrupted(method, **SHORT)
