"""Laws of `.github/scripts/appliance`: what a job runs, with which credentials, and what it leaves behind.

The appliance and the container engine are small programs that write down how they were called: what is
tested here is the script.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import pytest
from issuer import JsonServer

SCRIPT = Path(__file__).parent.parent / ".github" / "scripts" / "appliance"
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
    assert looked == "ps|--quiet|--filter|label=appliance.runner=gpu-1|"
    assert stopped == "stop|-t|120|left|"
    assert ran.endswith(f"|{IMAGE}|reconcile|--summary|/summary.md|")
    assert f"|--user|{os.getuid()}:{os.getgid()}|" in ran
    assert "run|--rm|" in ran
    assert "|--env|AWS_SECRET_ACCESS_KEY|" in ran
    assert "|--env|APPLIANCE_IMAGE|" in ran, "the manifest says which image made a version"
    assert "=secret" not in ran, "values never stand on a command line"
    assert f"|--volume|{folder}:/workspace|" in ran
    assert "|--read-only|--tmpfs|/tmp:exec|" in ran


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


def test_the_code_of_a_stopped_container_is_told_when_it_ends_before_the_stop_does(folder: Path) -> None:
    """`docker stop` returns after the container is gone: 33 (resume) must not become the shell's own 143."""
    write_program(
        folder,
        "docker",
        f"case $1 in run) touch {folder}/running; until [ -e {folder}/stopped ]; do sleep 0.02; done; exit 33 ;;\n"
        f"stop) touch {folder}/stopped; sleep 1 ;; esac",
    )
    job = start(folder, "reconcile", APPLIANCE_IMAGE=IMAGE, RUNNER_NAME="gpu-1")
    deadline = time.monotonic() + 30
    while not (folder / "running").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
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
