"""Laws of child processes: who killed a child decides what is done about it, and a closed terminal is a stop."""

from __future__ import annotations

import fcntl
import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

import pytest
from test_training import make_job, quiet
from tiny import write_base

from appliance import command
from appliance.command import WorkerEnd, count_memory_kills, run_command, run_worker
from appliance.digest import write_atomic
from appliance.errors import CommandError, DeviceError, TrainingError
from appliance.training import TrainingJob, launch, train

EVENTS = "low 0\nhigh 0\nmax 12\noom 3\noom_kill {kills}\noom_group_kill 0\n"


@pytest.fixture
def events(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """`memory.events` of a cgroup that this process seems to be in; the kernel has killed once already."""
    cgroups = tmp_path / "cgroup"
    file = cgroups / "jobs" / "one" / "memory.events"
    write_atomic(file, EVENTS.format(kills=1).encode())
    write_atomic(cgroups / "memory.events", EVENTS.format(kills=99).encode())
    (tmp_path / "own").write_text("0::/jobs/one\n")
    monkeypatch.setattr(command, "_CGROUPS", cgroups)
    monkeypatch.setattr(command, "_OWN_CGROUP", tmp_path / "own")
    return file


def test_the_kernels_kills_are_those_of_the_own_cgroup(events: Path, tmp_path: Path) -> None:
    """Its own folder first; where a container sees that as the root, the root; elsewhere none."""
    assert count_memory_kills() == 1
    own = tmp_path / "own"
    own.write_text("4:memory:/x\n0::/../elsewhere\n")
    assert count_memory_kills() == 99
    for text in ("4:memory:/x\n", ""):
        own.write_text(text)
        assert count_memory_kills() == 0, "version 1 of cgroups does not tell"
    own.write_text("0::/\n")
    (events.parents[2] / "memory.events").write_text("low 0\nhigh 0\n")
    assert count_memory_kills() == 0, "a kernel before 4.13"


@pytest.mark.parametrize(
    ("program", "said"),
    [
        ("from appliance.errors import ModelError; raise ModelError('base: copy it again')", "base: copy it again"),
        ("raise ValueError('no such thing')", "ValueError: no such thing"),
    ],
)
def test_what_a_program_said_last_has_no_name_of_our_errors(program: str, said: str) -> None:
    """It goes into the message of another error; a bug's own name stays."""
    with pytest.raises(CommandError) as caught:
        run_command([sys.executable, "-c", program])
    assert caught.value.last_line == said


KILLED = "import os; os.write(os.open({path!r}, os.O_WRONLY | os.O_TRUNC), {text!r}); os.kill(os.getpid(), {number})"


def run_killed(events: Path, *, kills: int, number: str = "SIGKILL") -> WorkerEnd:
    """How a real child ends that a signal kills while the counter grows to `kills`."""
    text = EVENTS.format(kills=kills).encode()
    code = KILLED.format(path=str(events), text=text, number=int(getattr(signal, number)))
    return run_worker([sys.executable, "-c", code], log=events.parent / "log", on_event=lambda _event: None)


HOLDS = (
    "import fcntl, sys, time; f = open(sys.argv[1], 'a'); fcntl.flock(f, 2); f.write('x'); f.flush(); time.sleep(99)"
)
RUNS = "import sys; from appliance.command import run_command; run_command(sys.argv[1:])"


def test_a_program_does_not_outlive_the_process_that_ran_it(tmp_path: Path) -> None:
    """A base that is made ready or rows that are pulled: the next run would do it beside them, in the same memory."""
    file = tmp_path / "lock"
    parent = subprocess.Popen([sys.executable, "-c", RUNS, sys.executable, "-c", HOLDS, str(file)])
    try:
        wait_until(lambda: file.exists() and file.read_text() == "x")
    finally:
        parent.kill()
        parent.wait()
    with file.open() as lock:
        wait_until(lambda: is_free(lock))


def is_free(lock: TextIO) -> bool:
    """Nobody holds the lock any more."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def wait_until(is_so: Callable[[], bool]) -> None:
    """At most half a minute."""
    until = time.monotonic() + 30
    while not is_so():
        assert time.monotonic() < until
        time.sleep(0.05)


def test_a_kill_by_the_kernel_for_memory_is_out_of_memory(events: Path) -> None:
    """SIGKILL while the counter grew ends like a child that ran out of memory by itself, in words and code."""
    end = run_killed(events, kills=2)
    assert end.code == DeviceError.exit_code
    assert "killed by the kernel, out of memory" in end.failure
    assert str(events.parent / "log") in end.failure


@pytest.mark.parametrize(("kills", "number"), [(1, "SIGKILL"), (2, "SIGTERM")], ids=["by someone", "other signal"])
def test_any_other_kill_is_a_kill(events: Path, kills: int, number: str) -> None:
    """SIGKILL without growth, however many the kernel killed before; another signal whatever the counter says."""
    end = run_killed(events, kills=kills, number=number)
    assert end.code == -getattr(signal, number)
    assert f"killed by signal {-end.code}" in end.failure


def run_beside_read_only(out: Path, script: str, *arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run a shell script that finds the new folder `out` a read-only file system; `arguments` are its $0, $1, ..."""
    out.mkdir()
    mounted = f"mount -t tmpfs -o ro tmpfs {out} || exit 77; {script}"
    command = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", mounted, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=250, check=False, **options)
    if done.returncode == 77 or "unshare" in done.stderr:
        pytest.skip("this machine lets nobody mount a small file system")
    return done


def test_a_child_tells_a_place_that_became_read_only(tmp_path: Path) -> None:
    """The place and what to do, with code 1: a disk that turns read-only in the night is no bug."""
    out = tmp_path / "out"
    work = f"lambda stop, emit: pathlib.Path({str(out / 'x')!r}).write_bytes(b'')"
    child = f"import pathlib; from appliance.child import run_child; raise SystemExit(run_child({work}))"
    done = run_beside_read_only(out, f'exec "$0" -c "{child}"', sys.executable)
    assert done.returncode == 1, done.stderr
    told = json.loads(done.stdout)["failure"]
    assert told == f"{out / 'x'}: read-only file system; give this user access to it, or name another place"


@pytest.mark.parametrize(
    ("visible", "devices", "seen"),
    [
        (None, 1, "0"),
        ("2,3", 1, "2"),
        ("GPU-5a", 1, "GPU-5a"),
        ("", 1, ""),
        (None, 2, "0,1"),
        ("7,2, 3", 2, "7,2"),
    ],
)
def test_a_worker_sees_as_many_gpus_as_it_has_devices(
    visible: str | None, devices: int, seen: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first that this process may use; a trainer that sees more would share out the batch among them."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    events: list[dict[str, Any]] = []
    script = 'printf \'{"gpu": "%s", "order": "%s"}\' "$CUDA_VISIBLE_DEVICES" "$CUDA_DEVICE_ORDER"'
    end = run_worker(["/bin/sh", "-c", script], log=tmp_path / "log", on_event=events.append, devices=devices)
    assert end.code == 0
    assert events == [{"gpu": seen, "order": "PCI_BUS_ID"}]


@pytest.mark.parametrize(
    ("said", "heard"),
    [
        (None, "glibc.malloc.hugetlb=1"),
        ("glibc.malloc.check=1", "glibc.malloc.check=1:glibc.malloc.hugetlb=1"),
        ("glibc.malloc.hugetlb=0", "glibc.malloc.hugetlb=0"),
    ],
)
def test_a_worker_asks_for_large_pages_unless_somebody_decided(
    said: str | None, heard: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What else is said to the C library stays said."""
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    if said is not None:
        monkeypatch.setenv("GLIBC_TUNABLES", said)
    events: list[dict[str, Any]] = []
    script = 'printf \'{"tunables": "%s"}\' "$GLIBC_TUNABLES"'
    assert run_worker(["/bin/sh", "-c", script], log=tmp_path / "log", on_event=events.append).code == 0
    assert events == [{"tunables": heard}]


WORKER = """#!/bin/sh
grep -o '"micro_batch": [0-9]*' "$3/job.json" >> "$3/tried"
if grep -q '"micro_batch": [48],' "$3/job.json"; then
    {before}
    kill -9 $$
fi
echo '{{"trained": true}}' > "$3/summary.json"
"""


def prepare_job(folder: Path, patch: pytest.MonkeyPatch, *, before: str) -> TrainingJob:
    """A job whose worker is a real process that does `before` and dies by SIGKILL until its micro-batch is below 4."""
    job = make_job(write_base(folder / "base"), folder / "job")
    worker = folder / "worker"
    worker.write_text(WORKER.format(before=before))
    worker.chmod(0o755)
    patch.setattr(launch.sys, "executable", str(worker))
    return job


def read_tried(job: TrainingJob) -> list[int]:
    """The micro-batch of every attempt."""
    return [int(line.split()[1]) for line in (job.folder / "tried").read_text().splitlines()]


def test_training_goes_on_smaller_after_a_kill_for_memory(
    events: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half the micro-batch, the same effective batch, as often as the kernel says so."""
    grow = f"n=$(sed -n 's/^oom_kill //p' {events}); echo \"oom_kill $((n + 1))\" > {events}"
    job = prepare_job(tmp_path, monkeypatch, before=grow)
    said: list[str] = []
    summary = train(job, note=said.append)
    assert summary == {"trained": True}
    assert read_tried(job) == [8, 4, 2]
    assert said == [f"out of memory; again with micro-batch {n}, the effective batch stays" for n in (4, 2)]
    written: dict[str, Any] = json.loads((job.folder / "job.json").read_bytes())
    assert (written["micro_batch"], written["training"]["effective_batch"]) == (2, 8)


def test_training_killed_by_someone_is_not_tried_again(
    events: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One attempt, and the words of a kill."""
    job = prepare_job(tmp_path, monkeypatch, before="true")
    with pytest.raises(TrainingError, match="killed by signal 9"):
        train(job, note=quiet)
    assert read_tried(job) == [8]


STOPS = "from appliance.child import list_stop_signals; print(*(s.name for s in list_stop_signals()))"


@pytest.mark.parametrize(
    ("lead", "names"),
    [
        ("", "SIGTERM SIGINT SIGHUP"),
        ("trap '' HUP;", "SIGTERM SIGINT"),
        ("trap '' INT;", "SIGTERM SIGHUP"),
        ("trap '' INT TERM HUP;", "SIGTERM"),
    ],
)
def test_who_is_to_outlive_the_terminal_does(lead: str, names: str) -> None:
    """A closed terminal stops a process, unless it was started to ignore that (nohup)."""
    argv = ["sh", "-c", f'{lead} exec "$0" -c "$1"', sys.executable, STOPS]
    assert subprocess.run(argv, capture_output=True, text=True, timeout=60, check=True).stdout.strip() == names


def test_a_second_stop_signal_may_come_while_the_first_is_answered(tmp_path: Path) -> None:
    """Two in one moment, at the worst of places: the child is asked to stop, and nothing is left ticking."""

    class Impatient(subprocess.Popen[str]):
        """A real child; whoever first prepares its kill is signalled again meanwhile."""

        again = True

        @property
        def kill(self) -> Any:
            if self.again:
                self.again = False
                signal.raise_signal(signal.SIGTERM)
            return super().kill

    child = Impatient(["sleep", "60"])
    before = threading.active_count()
    with command.forward_signals(child) as received:
        signal.raise_signal(signal.SIGTERM)
        assert child.wait(timeout=10) == -signal.SIGTERM
    assert received == [signal.SIGTERM, signal.SIGTERM]
    for _ in range(100):
        if threading.active_count() == before:
            break
        time.sleep(0.05)
    assert threading.active_count() == before, "timers end with what they were for"


PATIENT = """
import signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: (time.sleep(0.5), sys.exit(33)))
print('{"ready": true}', flush=True)
time.sleep(60)
"""


def test_a_stop_is_told_while_the_child_saves(tmp_path: Path) -> None:
    """One line at the first signal, and none for the next ones."""
    said: list[str] = []

    def follow(event: dict[str, Any]) -> None:
        if "ready" in event:
            for _ in range(2):
                signal.raise_signal(signal.SIGINT)
        else:
            said.append(event["note"])

    argv = [sys.executable, "-c", PATIENT]
    end = run_worker(argv, log=tmp_path / "log", on_event=follow)
    assert end.code == 33
    assert said == ["stopping: what is done is saved first (at most 120 s)"]
    assert not end.failure, "how far it was is the child's to say"
