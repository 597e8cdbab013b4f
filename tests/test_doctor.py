"""Laws of `appliance doctor`: what would stop a run is a line with what to do, and only that is a fault."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner

from appliance.cli.doctor import command
from appliance.errors import DeviceError
from appliance.plan import Check, Machine
from appliance.plan.preflight import check_folder, check_gpu, check_shared_memory, examine_machine, probe_torch

SEEN = {"torch": "2.13.0+cu130", "bitsandbytes": "0.50", "device": "cuda", "name": "H100", "cuda_fault": ""}
UNSEEN = SEEN | {"device": "cpu", "name": "", "cuda_fault": "The NVIDIA driver on your system is too old"}


def machine(gpu: str = "") -> Machine:
    """Two cores, with or without a GPU."""
    return Machine(cores=2, memory_bytes=8 << 30, gpu=gpu, gpu_memory_bytes=(80 << 30) if gpu else 0)


def test_a_machine_that_can_train_passes_with_a_line_for_each_part(tmp_path: Path) -> None:
    """This one: torch multiplies and quantises in a child, folders are written to, nothing is left in them."""
    options = ["--runs", str(tmp_path / "runs"), "--cache", str(tmp_path / "cache"), "--json"]
    done = CliRunner().invoke(command, [*options, "--store", (tmp_path / "store").as_uri()], standalone_mode=False)
    checks = {c["subject"]: c for c in json.loads(done.output)}
    assert done.return_value == 0, done.output
    assert [*checks] == ["processor", "GPU", "torch", "runs", "cache", "git", "dvc", "store"]
    assert "multiplies on cpu" in checks["torch"]["found"]
    assert not any(tmp_path.iterdir())


@pytest.fixture
def broken_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Children find a torch that cannot be imported."""
    (tmp_path / "torch.py").write_text("raise ImportError('libcudart.so.13: cannot open shared object file')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))


@pytest.mark.usefixtures("broken_torch")
def test_a_gpu_that_was_asked_for_and_is_not_there_is_a_device_fault(tmp_path: Path) -> None:
    """Exit code 34: another machine can do it."""
    done = CliRunner().invoke(command, ["--gpu", "--runs", str(tmp_path), "--cache", str(tmp_path)])
    assert isinstance(done.exception, DeviceError)
    assert "--gpus all" in str(done.exception)


@pytest.mark.parametrize(
    ("driver", "probe", "outcome", "word"),
    [
        ("", UNSEEN, "ok", "needs.gpu: required"),
        ("H100", SEEN, "ok", "torch sees it"),
        ("H100", UNSEEN, "fault", "too old"),
        ("H100", UNSEEN | {"cuda_fault": ""}, "fault", "without CUDA"),
        ("", SEEN, "fault", "nvidia-smi names none"),
    ],
    ids=["none", "both", "old-driver", "cpu-torch", "no-tool"],
)
def test_a_gpu_that_only_one_of_driver_and_torch_sees_is_a_fault(
    driver: str, probe: dict[str, str], outcome: str, word: str
) -> None:
    """The driver's tool and torch must agree, and where they do not, torch says why."""
    check = check_gpu(machine(driver), probe)
    assert check.outcome == outcome
    assert check.is_gpu == (probe is SEEN)
    assert word in check.found
    assert bool(check.action) == (outcome == "fault")


def test_further_gpus_are_told() -> None:
    """A run uses one unless its recipe asks for more."""
    assert "; 3 more for recipes with needs.devices" in check_gpu(replace(machine("H100"), gpus=4), SEEN).found


@pytest.mark.usefixtures("broken_torch")
def test_a_torch_that_does_not_start_is_a_fault_and_no_traceback() -> None:
    """The child's last line is the reason."""
    assert "libcudart.so.13" in probe_torch()["fault"]
    checks = examine_machine(machine(), folders={}, store_url=None)
    assert [c.outcome for c in checks if c.subject == "torch"] == ["fault"]


def test_a_folder_that_cannot_be_written_to_is_a_fault_with_what_to_do(tmp_path: Path) -> None:
    """A file is where the folder should be."""
    (tmp_path / "file").touch()
    check = check_folder("runs", tmp_path / "file" / "runs")
    assert (check.outcome, check.found) == ("fault", f"{tmp_path / 'file' / 'runs'}: Not a directory")
    assert "mount a folder" in check.action


@pytest.mark.parametrize(("free", "outcome"), [(0.5, "fault"), (5, "warning"), (50, "ok")])
def test_little_room_warns_and_none_is_a_fault(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, free: float, outcome: str
) -> None:
    """By what the file system says is free."""
    usage = type("Usage", (), {"free": int(free * 2**30), "total": 2**40})
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage)
    assert check_folder("runs", tmp_path).outcome == outcome


def test_the_shared_memory_of_a_plain_docker_run_is_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """64 MiB, what docker gives."""
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"total": 64 << 20}))
    assert check_shared_memory(tmp_path) == Check(
        str(tmp_path), "warning", "0.1 GiB", "give it more for several GPUs: --shm-size 8g, or --ipc host"
    )


@pytest.mark.usefixtures("broken_torch")
def test_a_store_that_does_not_answer_is_a_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One line, and the other checks are made all the same."""
    for name, value in {
        "AWS_ENDPOINT_URL": "http://127.0.0.1:9",
        "AWS_ACCESS_KEY_ID": "a",
        "AWS_SECRET_ACCESS_KEY": "b",
        "AWS_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(name, value)
    options = ["--runs", str(tmp_path), "--cache", str(tmp_path), "--store", "s3://bucket/registry"]
    done = CliRunner().invoke(command, options, standalone_mode=False)
    assert done.return_value == 1
    assert "fault    store      " in done.output
    assert "fault    torch      " in done.output
    assert "ok       git        " in done.output


@pytest.mark.usefixtures("broken_torch")
@pytest.mark.parametrize("url", ["http://example.com/x", "s3://", "file:relative"])
def test_a_store_that_cannot_be_opened_is_a_fault_among_the_others(tmp_path: Path, url: str) -> None:
    """A wrong address is one line in its column, after the other checks."""
    options = ["--runs", str(tmp_path), "--cache", str(tmp_path), "--store", url]
    done = CliRunner().invoke(command, options, standalone_mode=False)
    assert done.return_value == 1, done.output
    assert "fault    store      " in done.output
    assert f" runs       {tmp_path}: writable" in done.output


@pytest.mark.usefixtures("broken_torch")
def test_a_folder_store_that_is_not_there_or_takes_nothing_is_told(tmp_path: Path) -> None:
    """A mistyped folder reads like an empty registry: a warning, and whether the first publish could make it."""
    file = tmp_path / "file"
    file.touch()
    (tmp_path / "store").mkdir()

    def examine(folder: Path) -> Check:
        return examine_machine(machine(), folders={}, store_url=folder.as_uri())[-1]

    found = f"{(tmp_path / 'stroe').as_uri()}: no such folder; the first publish makes it; "
    absent = examine(tmp_path / "stroe")
    assert (absent.outcome, absent.found[: len(found)]) == ("warning", found)
    assert "writable" in absent.found
    assert "look at the spelling" in absent.action
    for folder in (file, file / "store"):
        assert examine(folder).outcome == "fault", folder
    there = examine(tmp_path / "store")
    assert (there.outcome, there.found) == ("ok", f"{(tmp_path / 'store').as_uri()}: readable, 0 objects below models/")
    assert not any((tmp_path / "store").iterdir())
