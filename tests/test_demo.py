"""Laws of the demo: the main job on the real base model, end to end, interrupted and repeated."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest


def start(workspace: Path, *options: str) -> subprocess.Popen[str]:
    """Start `appliance demo` with a cache of its own, and no credentials but its own."""
    env = {k: v for k, v in os.environ.items() if not k.startswith(("AWS_", "APPLIANCE_"))}
    env["APPLIANCE_CACHE"] = str(workspace.parent / "cache")
    argv = [sys.executable, "-m", "appliance", "demo", "--workspace", str(workspace), *options]
    return subprocess.Popen(argv, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(demo: subprocess.Popen[str], *, timeout: float) -> str:
    """What it said, when it ended well and left nothing running."""
    output, errors = demo.communicate(timeout=timeout)
    assert demo.returncode == 0, output + errors
    assert "Traceback" not in errors
    return output


def list_servers(workspace: Path) -> list[str]:
    """Processes that were started with the workspace on their command line and still run."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = entry.read_bytes().decode(errors="replace").replace("\0", " ")
        except OSError:
            continue
        if str(workspace) in words:
            found.append(words)
    return found


def read_verdicts(workspace: Path) -> list[dict[str, Any]]:
    """The verdict of each run, by age."""
    files = sorted(workspace.glob("repository/.appliance/runs/*/card/card.json"), key=lambda p: p.stat().st_mtime)
    return [json.loads(f.read_bytes())["verdict"] for f in files]


@pytest.mark.timeout(600)
def test_the_demo_survives_a_stop_and_is_done_once(tmp_path: Path) -> None:
    """Stopped in training it says how to go on; then it finishes; then there is nothing to do."""
    workspace = tmp_path / "demo"
    stopped = start(workspace, "--quick")
    deadline = time.monotonic() + 240
    while not list(workspace.glob("repository/.appliance/runs/*/training/metrics.jsonl")):
        assert stopped.poll() is None, stopped.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.1)
    stopped.send_signal(signal.SIGINT)
    _, errors = stopped.communicate(timeout=120)
    assert stopped.returncode == 33, errors
    assert "run the same command" in errors
    assert "Traceback" not in errors
    assert list_servers(workspace) == []

    first = finish(start(workspace, "--quick"), timeout=400)
    (version,) = set(re.findall(r"workplace-requests@(\d{14}-[0-9a-f]{12}-[0-9a-f]{12})", first))
    assert "verified" in first
    assert f"nothing to do: {version}" in first
    assert (workspace / "pulled" / "adapter_model.safetensors").is_file()
    assert list_servers(workspace) == []

    second = finish(start(workspace, "--quick"), timeout=100)
    assert second.count(f"nothing to do: {version}") == 2
    assert "trained:" not in second
    assert [v["outcome"] for v in read_verdicts(workspace)] == ["inconclusive"], "11 test rows prove nothing"


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_the_demo_shows_what_tuning_is_for(tmp_path: Path) -> None:
    """Tuned is far above the best prompt; after new rows there is a second version and the first stays."""
    workspace = tmp_path / "demo"
    said = finish(start(workspace, "--full"), timeout=2900)
    first, second = read_verdicts(workspace)
    assert first["outcome"] == "ship"
    arms = first["arms"]
    best = max(arms["zero_shot"]["score"], arms["few_shot"]["score"])
    assert arms["candidate"]["score"] > best + 0.3
    assert "champion" in second["arms"]
    assert len(set(re.findall(r"^workplace-requests@(\S+)", said.split("$ appliance list")[-1], re.MULTILINE))) == 2
