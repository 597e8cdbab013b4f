"""Laws of `.github/scripts/appliance`: what a job runs, with which credentials, and what it leaves behind.

The appliance and the container engine are small programs that write down how they were called: what is
tested here is the script.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import pytest
import yaml
from issuer import JsonServer

GITHUB = Path(__file__).parent.parent / ".github"
SCRIPT = GITHUB / "scripts" / "appliance"
IMAGE = "registry.example.com/appliance@sha256:" + "a" * 64


def start(folder: Path, *arguments: str, **variables: str) -> subprocess.Popen[str]:
    """Start the script in a job's environment with `folder/bin` first on the PATH."""
    env = {"PATH": f"{folder / 'bin'}:/usr/local/bin:/usr/bin:/bin", "HOME": str(folder / "home"), **variables}
    return subprocess.Popen(
        [str(SCRIPT), *arguments], cwd=folder, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def call(folder: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run it to its end."""
    job = start(folder, *arguments, **variables)
    output, errors = job.communicate(timeout=60)
    return subprocess.CompletedProcess(arguments, job.returncode, output, errors)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkout with a folder for programs."""
    (tmp_path / "bin").mkdir()
    return tmp_path


def write_program(folder: Path, name: str, text: str) -> None:
    """A program on the PATH."""
    file = folder / "bin" / name
    file.write_text(f"#!/bin/bash\n{text}\n")
    file.chmod(0o755)


def test_the_runners_own_environment_is_used_without_an_image(folder: Path) -> None:
    """Arguments and exit code pass through; an unset secret is not an empty one; files go outside of the checkout."""
    write_program(folder, "appliance", 'printf "%s|" "$@"; echo; env; exit 3')
    done = call(folder, "reconcile", "--only", "a b", AWS_SESSION_TOKEN="", APPLIANCE_IMAGE="", AWS_REGION="x")
    assert done.returncode == 3, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == "reconcile|--only|a b|"
    assert "AWS_REGION=x" in lines
    assert not [line for line in lines if line.startswith(("AWS_SESSION_TOKEN", "APPLIANCE_IMAGE"))]
    (out,) = (line.partition("=")[2] for line in lines if line.startswith("APPLIANCE_OUT="))
    assert out == str(folder / "home" / ".cache" / "appliance" / "runs" / folder.name)


def test_a_stop_of_the_job_reaches_the_training(folder: Path) -> None:
    """The script waits for the checkpoint and ends with the training's own exit code."""
    write_program(
        folder, "appliance", "trap 'sleep 0.5; echo saved; exit 33' TERM; echo began; while :; do sleep 0.1; done"
    )
    for number in (signal.SIGTERM, signal.SIGINT):
        job = start(folder, "reconcile")
        assert job.stdout is not None
        assert job.stdout.readline() == "began\n"
        job.send_signal(number)
        output, _ = job.communicate(timeout=30)
        assert (job.returncode, output) == (33, "saved\n")


# A container of 12 s to save its checkpoint, which no process of the job started, as a daemon's are.
ENGINE = """
case $1 in
run) env -i PATH="$PATH" setsid {folder}/bin/container </dev/null >/dev/null 2>&1 & echo $! >{folder}/pid
    wait $!; exit 33 ;;
stop) kill -TERM "$(<{folder}/pid)"; while kill -0 "$(<{folder}/pid)"; do sleep 0.1; done ;;
esac
"""
CONTAINER = """
trap 'sleep 12; touch {folder}/saved; exit 33' TERM
touch {folder}/began
for _ in {{1..300}}; do sleep 0.1; done
"""
CHILD = """
import pathlib, signal, sys, time
def save(*_):
    time.sleep(2)
    pathlib.Path("saved").touch()
    sys.exit(33)
signal.signal(signal.SIGTERM, save)
pathlib.Path("began").touch()
time.sleep(600)
"""


def start_step(folder: Path, **variables: str) -> subprocess.Popen[bytes]:
    """A step of `retrain.yml` as GitHub's runner starts it (`bash -e FILE`), whose processes it knows by a variable."""
    shutil.copytree(GITHUB, folder / ".github")
    job = yaml.safe_load((GITHUB / "workflows" / "retrain.yml").read_text())["jobs"]["train"]
    (folder / "step.sh").write_text(job["steps"][-1]["run"])
    env = {"PATH": f"{folder / 'bin'}:/usr/local/bin:/usr/bin:/bin", "HOME": str(folder / "home"), **variables}
    env |= {"RUNNER_TRACKING_ID": str(folder), "GITHUB_STEP_SUMMARY": str(folder / "summary.md")}
    return subprocess.Popen(["bash", "-e", "step.sh"], cwd=folder, env=env)


def cancel(step: subprocess.Popen[bytes], folder: Path) -> int:
    """As the runner does (actions/runner, ProcessInvoker.cs): signals for one process, then an end to what is left."""
    for number, patience_s in ((signal.SIGINT, 7.5), (signal.SIGTERM, 2.5), (signal.SIGKILL, 10)):
        step.send_signal(number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            step.wait(patience_s)
            break
    for environment in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):
            if f"RUNNER_TRACKING_ID={folder}\0".encode() in environment.read_bytes():
                os.kill(int(environment.parent.name), signal.SIGKILL)
    return step.returncode


def wait_for(condition: Callable[[], bool]) -> None:
    """Until it holds, at most half a minute."""
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_cancelled_container_has_its_two_minutes_whatever_the_runner_does(folder: Path) -> None:
    """The runner waits ten seconds and kills the job's processes; the container is stopped, and saves after that."""
    write_program(folder, "docker", ENGINE.format(folder=folder))
    write_program(folder, "container", CONTAINER.format(folder=folder))
    step = start_step(folder, APPLIANCE_IMAGE=IMAGE)
    wait_for((folder / "began").exists)
    assert cancel(step, folder) == -signal.SIGKILL
    assert not (folder / "saved").exists()
    wait_for((folder / "saved").exists)


def test_a_container_that_is_being_pulled_when_the_job_is_cancelled_never_starts(folder: Path) -> None:
    """There is nothing to stop yet: the client is, before it makes one."""
    pull = f"trap 'exit 143' TERM; touch {folder}/pulling; sleep 20 & wait $!; touch {folder}/began"
    write_program(folder, "docker", f"case $1 in run) {pull} ;; stop) exit 1 ;; esac")
    step = start_step(folder, APPLIANCE_IMAGE=IMAGE)
    wait_for((folder / "pulling").exists)
    assert cancel(step, folder) == 143
    assert not (folder / "began").exists()


def test_a_cancelled_job_without_a_container_saves_within_the_seconds_that_it_has(folder: Path) -> None:
    """The first signal reaches the training; the job ends with its exit code."""
    (folder / "child.py").write_text(CHILD)
    write_program(folder, "appliance", f"exec {sys.executable} child.py")
    step = start_step(folder)
    wait_for((folder / "began").exists)
    assert cancel(step, folder) == 33
    assert (folder / "saved").exists()


def test_a_signal_before_there_is_a_program_is_not_lost(folder: Path) -> None:
    """While a token is fetched, say: what is started then is stopped at once."""
    write_program(folder, "curl", f'touch {folder}/asking; sleep 1; echo \'{{"value": "x"}}\'')
    write_program(folder, "appliance", "exec sleep 600")
    job = start(
        folder, "reconcile", AWS_ROLE_ARN="arn:x", ACTIONS_ID_TOKEN_REQUEST_URL="x", ACTIONS_ID_TOKEN_REQUEST_TOKEN="x"
    )
    wait_for((folder / "asking").exists)
    job.send_signal(signal.SIGINT)
    assert job.wait(timeout=30) == 128 + signal.SIGTERM


@pytest.mark.parametrize("is_contained", [False, True])
def test_what_dvc_pulled_outlives_the_checkout(folder: Path, is_contained: bool) -> None:
    """Its cache is among the runner's, not in the work tree, which every checkout cleans; a team's own word stays."""
    (folder / ".dvc").mkdir()
    write_program(folder, "appliance", "cat .dvc/config.local")
    write_program(folder, "docker", "case $1 in run) cat .dvc/config.local ;; esac")
    variables = {"APPLIANCE_IMAGE": IMAGE} if is_contained else {}
    place = "/cache/dvc" if is_contained else str(folder / "home" / "dvc")
    assert (
        call(folder, "list", APPLIANCE_CACHE=str(folder / "home"), **variables).stdout
        == f"[cache]\n    dir = {place}\n"
    )
    (folder / ".dvc" / "config.local").write_text("[core]\n")
    assert call(folder, "list", APPLIANCE_CACHE=str(folder / "home"), **variables).stdout == "[core]\n"


@pytest.mark.parametrize("path", sorted((GITHUB / "workflows").glob("*.yml")), ids=lambda p: p.stem)
def test_the_script_is_the_process_of_its_step(path: Path) -> None:
    """`exec`, in the last line: a shell before it would keep the signals; by bash: Git may have lost the mode."""
    for job in yaml.safe_load(path.read_text())["jobs"].values():
        for run in (step.get("run", "") for step in job["steps"]):
            *others, last = run.strip().splitlines() or [""]
            assert not [line for line in others if "scripts/appliance" in line]
            assert "scripts/appliance" not in last or last.startswith("exec bash .github/scripts/appliance ")


@pytest.mark.parametrize(
    ("variables", "text"),
    [
        ({}, "no appliance here: set the variable APPLIANCE_IMAGE"),
        ({"APPLIANCE_IMAGE": "appliance:latest"}, "not by digest"),
        ({"AWS_ROLE_ARN": "arn:x"}, "has no 'id-token: write' permission"),
    ],
    ids=["nothing", "a tag", "no permission"],
)
def test_what_is_missing_is_one_message(folder: Path, variables: dict[str, str], text: str) -> None:
    """And exit code 1."""
    write_program(folder, "docker", "exit 0")
    done = call(folder, "list", **variables)
    assert done.returncode == 1
    assert done.stderr.startswith("error: ")
    assert text in done.stderr


def test_an_image_runs_as_this_user_and_left_overs_are_stopped(folder: Path) -> None:
    """By digest, with a label by which the next job finds what a cancelled one left on the GPU."""
    write_program(
        folder,
        "docker",
        f'printf "%s|" "$@" >>{folder}/calls; echo >>{folder}/calls; [ "$1" = ps ] && echo left; exit 0',
    )
    summary = folder / "summary.md"
    done = call(
        folder, "reconcile", "--summary", str(summary),
        APPLIANCE_IMAGE=IMAGE, RUNNER_NAME="gpu-1", GITHUB_STEP_SUMMARY=str(summary), AWS_SECRET_ACCESS_KEY="secret",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    looked, stopped, _, ran = (folder / "calls").read_text().splitlines()
    assert looked.startswith("ps|--quiet|--filter|label=appliance.runner=gpu-1|")
    assert stopped == "stop|-t|120|left|"
    assert ran.endswith(f"|{IMAGE}|reconcile|--summary|/summary.md|")
    assert f"|--user|{os.getuid()}:{os.getgid()}|" in ran
    assert "run|--rm|" in ran
    assert "|--env|AWS_SECRET_ACCESS_KEY|" in ran
    assert "|--env|APPLIANCE_IMAGE|" in ran, "the manifest says which image made a version"
    assert "=secret" not in ran, "values never stand on a command line"
    assert f"|--volume|{folder}:/workspace|" in ran
    assert "|--read-only|--tmpfs|/tmp:exec|" in ran


@pytest.mark.parametrize("is_contained", [False, True])
def test_what_a_runner_is_told_reaches_its_jobs(folder: Path, is_contained: bool) -> None:
    """By name, in a container as without one; what names a folder of the host, or is GitHub's own, stays out of it."""
    told = {
        "APPLIANCE_MIRROR_CHECKPOINTS": "1", "HF_TOKEN": "hf_secret", "HF_HUB_OFFLINE": "1", "HF_ENDPOINT": "http://hub",
        "HTTPS_PROXY": "http://proxy", "http_proxy": "http://proxy", "NO_PROXY": "localhost",
    }  # fmt: skip
    kept = {"APPLIANCE_HOME": str(folder / "home"), "HF_HOME": "/home/hub", "GITHUB_TOKEN": "ghs_secret"}
    write_program(folder, "appliance", "compgen -e")
    write_program(folder, "docker", 'case $1 in run) printf "%s\\n" "$@" ;; esac')
    variables = {"APPLIANCE_IMAGE": IMAGE} if is_contained else {}
    done = call(folder, "reconcile", **told, **kept, **variables)
    assert told.keys() <= set(done.stdout.splitlines()), done.stderr
    if is_contained:
        assert not kept.keys() & set(done.stdout.splitlines())
        assert "secret" not in done.stdout


@pytest.mark.parametrize(
    ("says", "user"),
    [
        (" Security Options:\n  seccomp\n   Profile: builtin\n  rootless\n  cgroupns", "0:0"),
        ("  security:\n    rootless: true\n    seccompEnabled: true", "0:0"),
        (" Security Options:\n  seccomp\n   Profile: builtin\n  cgroupns", f"{os.getuid()}:{os.getgid()}"),
        ("  security:\n    rootless: false\n    seccompEnabled: true", f"{os.getuid()}:{os.getgid()}"),
    ],
    ids=["docker without root", "podman without root", "docker", "podman"],
)
def test_a_container_is_whoever_this_user_is_in_it(folder: Path, says: str, user: str) -> None:
    """Where the engine has no root, that is root: another UID there could read neither token nor checkout."""
    (folder / "info").write_text(f"{says}\n")
    write_program(folder, "docker", f'case $1 in info) cat {folder}/info ;; run) printf "%s|" "$@" ;; esac')
    done = call(folder, "list", APPLIANCE_IMAGE=IMAGE)
    assert f"|--user|{user}|" in done.stdout, done.stderr


HOST = """
import pathlib, sys
verb, *words = sys.argv[1:]
labels = {w.removeprefix("label=") for w in words if "appliance." in w and "@" not in w}
left = pathlib.Path(__file__).parent / "left"
left.mkdir(exist_ok=True)
if verb == "run":
    (left / words[words.index("--name") + 1]).write_text("\\n".join(labels))
elif verb == "ps":
    print(*(f.name for f in left.iterdir() if labels <= {*f.read_text().splitlines()}))
elif verb == "stop":
    (left / words[-1]).unlink()
"""


def test_another_repositorys_training_is_not_a_left_over(folder: Path) -> None:
    """Two repositories on one host have a runner each, both named after the host; each stops its own containers."""
    (folder / "host.py").write_text(HOST)
    write_program(folder, "docker", f'exec {sys.executable} {folder}/host.py "$@"')
    for repository, left in (("team/one", 1), ("team/two", 2), ("team/one", 2)):
        done = call(folder, "list", APPLIANCE_IMAGE=IMAGE, RUNNER_NAME="host", GITHUB_REPOSITORY=repository)
        assert done.returncode == 0, done.stderr
        assert len(list((folder / "left").iterdir())) == left


def test_jobs_of_runners_that_number_processes_alike_have_names_of_their_own(folder: Path) -> None:
    """Two runners in containers share a home and an engine, and both jobs are process 2 or so of theirs."""
    own = ["unshare", "--user", "--map-root-user", "--pid", "--fork"]
    if shutil.which("unshare") is None or subprocess.run([*own, "true"], check=False, capture_output=True).returncode:
        pytest.skip("needs namespaces of processes, which this system does not give to its users")
    write_program(folder, "docker", 'case $1 in run) echo "$4 $PPID" ;; esac')
    env = {"PATH": f"{folder / 'bin'}:/usr/local/bin:/usr/bin:/bin", "HOME": str(folder), "APPLIANCE_IMAGE": IMAGE}
    env["GITHUB_RUN_ID"] = "7"
    jobs = [
        subprocess.run([*own, str(SCRIPT), "list"], cwd=folder, env=env, check=True, capture_output=True, text=True)
        for _ in range(2)
    ]
    (one, first), (other, second) = (job.stdout.split() for job in jobs)
    assert first == second
    assert one != other


def test_the_code_of_a_stopped_container_is_told_when_it_ends_before_the_stop_does(folder: Path) -> None:
    """`docker stop` returns after the container is gone: 33 (resume) must not become the shell's own 143."""
    write_program(
        folder,
        "docker",
        f"case $1 in run) touch {folder}/running; until [ -e {folder}/stopped ]; do sleep 0.02; done; exit 33 ;;\n"
        f"stop) touch {folder}/stopped; sleep 1 ;; esac",
    )
    job = start(folder, "reconcile", APPLIANCE_IMAGE=IMAGE, RUNNER_NAME="gpu-1")
    wait_for((folder / "running").exists)
    job.send_signal(signal.SIGTERM)
    _, errors = job.communicate(timeout=60)
    assert job.returncode == 33, errors


class Minter(JsonServer):
    """A token endpoint like the runner's; `asked` has the requests it got."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[str] = []

    def answer(self, request: BaseHTTPRequestHandler) -> dict[str, Any]:
        """Another token each time."""
        self.asked.append(f"{request.path} {request.headers['Authorization']}")
        return {"count": 1, "value": f"token-{len(self.asked)}"}


@pytest.fixture
def mint() -> Iterator[tuple[str, list[str]]]:
    """The endpoint's address and the requests it got."""
    with Minter().run() as server:
        yield f"{server.url}/token?x=1", server.asked


def test_a_role_has_a_fresh_token_however_long_the_training(folder: Path, mint: tuple[str, list[str]]) -> None:
    """boto3 reads the file again when its credentials run out, so what is there must never be an old token."""
    url, asked = mint
    write_program(
        folder, "appliance", 'cat "$AWS_WEB_IDENTITY_TOKEN_FILE"; echo; sleep 2.5; cat "$AWS_WEB_IDENTITY_TOKEN_FILE"'
    )
    done = call(
        folder, "reconcile", AWS_ROLE_ARN="arn:x", ACTIONS_ID_TOKEN_REQUEST_URL=url,
        APPLIANCE_MINT_S="0.5", ACTIONS_ID_TOKEN_REQUEST_TOKEN="request",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    first, last = done.stdout.splitlines()
    assert first == "token-1"
    assert int(last.removeprefix("token-")) >= 3
    assert asked[0] == "/token?x=1&audience=sts.amazonaws.com Bearer request".replace("Bearer", "bearer")
    assert not list((folder / "home").rglob("tokens/*")), "no token is left behind"
    seen = len(asked)
    time.sleep(1.2)
    assert len(asked) == seen, "and nobody mints on"
