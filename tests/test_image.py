"""Laws of the image, on the real one (`make image-test`): any user, no network, no writable root, no lost work.

Built once from the Dockerfile that is shipped, without CUDA; each test is a `docker run` as a user
would type it, by podman and runc.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import time
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from containers import CUDA_IMAGE, IMAGE, ROOT, USER, Engine, build_image, execute, give_away, open_engine
from test_reconcile import Project, base, make_project  # noqa: F401 - two are fixtures
from tiny import make_recipe, write_dataset

from appliance.demo.storage import Storage

pytestmark = pytest.mark.image
# As docker does it: podman alone would make /tmp, /run and /var/tmp writable.
SEALED = ("--user", f"{USER}:{USER}", "--read-only", "--read-only-tmpfs=false", "--tmpfs", "/tmp", "--cap-drop", "all")  # noqa: S108
STRANGER = (*SEALED, "--network", "none")


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    """podman, and the image in it."""
    folder = tmp_path_factory.mktemp("image")
    engine = open_engine(folder)
    build_image()
    return engine


@pytest.fixture
def workspace(base: Path, tmp_path: Path) -> Path:  # noqa: F811
    """A repository that anybody may read."""
    root = tmp_path / "workspace"
    write_recipe(root)
    shutil.copytree(base, root / "base")
    write_dataset(root / "datasets" / "colours", rows=64)
    for place in (root, *root.rglob("*")):
        place.chmod(0o755 if place.is_dir() else 0o644)
    return root


def write_recipe(root: Path, name: str = "colours", **overrides: Any) -> None:
    """`recipes/NAME.yaml`."""
    (root / "recipes").mkdir(parents=True, exist_ok=True)
    text = yaml.safe_dump(make_recipe(**overrides).model_dump(mode="json", exclude_none=True))
    (root / "recipes" / f"{name}.yaml").write_text(text)


def mount(workspace: Path, out: Path, cache: Path | None = None) -> tuple[str, ...]:
    """The contract: /workspace to read, /out and /cache to write."""
    cache = cache or out.with_name(f"{out.name}-cache")
    for folder in (out, cache):
        folder.mkdir(exist_ok=True)
        folder.chmod(0o777)
    return ("--volume", f"{workspace}:/workspace:ro", "--volume", f"{out}:/out", "--volume", f"{cache}:/cache")


def read_adapter(out: Path) -> str:
    """The SHA-256 of the adapter that was published to `/out/registry`."""
    (manifest,) = (out / "registry" / "models" / "colours" / "versions").rglob("*.json")
    files = json.loads(manifest.read_text())["files"]
    return str(next(f["sha256"] for f in files if f["path"].endswith("adapter_model.safetensors")))


RUN = ("run", "recipes/colours.yaml", "--store", "file:///out/registry")


def test_the_help_is_the_first_thing_that_it_says(engine: Engine) -> None:
    """Without arguments too; as root, as UID 1000 and as nobody in particular."""
    for options in ((), ("--user", "0"), STRANGER):
        done = engine.run(*options)
        assert done.returncode == 0, done.stderr
        assert done.stdout.startswith("Usage: appliance [OPTIONS] COMMAND")


def test_it_is_nobody_and_says_what_it_is(engine: Engine) -> None:
    """Not root, labelled after the OCI's annotations, an init as entrypoint."""
    config = json.loads(engine.call("image", "inspect", IMAGE))[0]["Config"]
    assert config["User"] == "1000:1000"
    assert config["Entrypoint"] == ["/usr/bin/tini", "-s", "--", "appliance"]
    labels = config["Labels"]
    assert labels["org.opencontainers.image.revision"] == execute("git", "rev-parse", "HEAD", cwd=ROOT).strip()
    assert {f"org.opencontainers.image.{k}" for k in ("title", "licenses", "created", "version", "source")} <= set(
        labels
    )


def test_the_doctor_finds_nothing_amiss(engine: Engine, tmp_path: Path) -> None:
    """As UID 1000 and as a stranger without network and writable root; git, dvc and torch are there."""
    for options in ((), STRANGER):
        done = engine.run(*options, *mount(tmp_path, tmp_path / "out"), arguments=("doctor", "--json"))
        assert done.returncode == 0, done.stdout + done.stderr
        assert {c["subject"].split()[0] for c in json.loads(done.stdout)} >= {"torch", "git", "dvc", "runs", "cache"}


def test_a_stranger_without_network_trains_and_publishes(engine: Engine, workspace: Path, tmp_path: Path) -> None:
    """From a repository that is read-only to a store that is a folder; a second time there is nothing to do."""
    folders = mount(workspace, tmp_path / "out")
    first = engine.run(*STRANGER, *folders, arguments=RUN)
    assert first.returncode in (0, 3), first.stdout + first.stderr
    again = engine.run(*STRANGER, *folders, arguments=RUN)
    assert "(already there)" in again.stdout, again.stdout + again.stderr
    owners = {p.stat().st_uid for p in (tmp_path / "out").rglob("*")}
    assert owners == {USER}, "nothing is left that the job's user cannot delete"


def test_a_stranger_reconciles_a_commit_from_s3(
    engine: Engine,
    make_project: Callable[[], Project],  # noqa: F811
    storage: Storage,
    tmp_path: Path,
) -> None:
    """Git, DVC and the registry on SeaweedFS: the data are pulled, a version is published; the next call makes none."""
    project = make_project()
    project.commit_data(rows=64)
    shutil.rmtree(project.root / "datasets")
    give_away(project.root)
    _, _, *folders = mount(project.root, tmp_path / "out")
    variables = {**storage.environment, "APPLIANCE_STORE": project.environment["APPLIANCE_STORE"]}
    options = [word for name, value in variables.items() for word in ("--env", f"{name}={value}")]
    options += [*SEALED, "--network", "host", "--volume", f"{project.root}:/workspace", *folders]
    done = engine.run(*options, arguments=("reconcile",))
    assert done.returncode in (0, 3), done.stdout + done.stderr
    assert len(project.versions()) == 1
    again = engine.run(*options, arguments=("reconcile",))
    assert "colours: nothing to do" in again.stdout, again.stdout + again.stderr


def test_a_stop_in_training_is_gone_on_from_with_the_same_adapter(
    engine: Engine, workspace: Path, tmp_path: Path
) -> None:
    """`docker stop` ends it with 33 and a checkpoint; the next run publishes the bytes of an undisturbed one."""
    write_recipe(workspace, training={"epochs": 40})
    engine.run(*mount(workspace, tmp_path / "whole"), arguments=RUN)
    folders = mount(workspace, tmp_path / "stopped")
    job = engine.start("--name", f"stopped-{os.getpid()}", *folders, arguments=RUN)
    wait_until(lambda: list((tmp_path / "stopped").glob("*/training/checkpoints/checkpoint-*/sealed.json")), job)
    engine.call("stop", "--time", "110", f"stopped-{os.getpid()}")
    output, _ = job.communicate(timeout=120)
    assert job.returncode == 33, output
    assert json.loads((tmp_path / "stopped" / "failure.json").read_text())["exit_code"] == 33
    engine.run(*folders, arguments=RUN)
    assert read_adapter(tmp_path / "stopped") == read_adapter(tmp_path / "whole")


def wait_until(happened: Any, job: subprocess.Popen[str]) -> None:
    """Wait for something that a container does; its end before that is a failure."""
    deadline = time.monotonic() + 300
    while not happened():
        assert time.monotonic() < deadline, "it did not happen within five minutes"
        if job.poll() is not None:
            raise AssertionError(job.communicate()[0])
        time.sleep(0.05)


def test_a_full_disk_is_one_message(engine: Engine, workspace: Path, tmp_path: Path) -> None:
    """/out has 512 KiB: exit 1, what is full, what to do, and no traceback."""
    folders = mount(workspace, tmp_path / "unused")[:2] + mount(workspace, tmp_path / "unused")[4:]
    done = engine.run(*folders, "--tmpfs", "/out:rw,size=512k,mode=1777", arguments=RUN)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "no space left" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_gpu_that_is_needed_and_missing_is_a_device_fault(engine: Engine, workspace: Path, tmp_path: Path) -> None:
    """Exit 34 for the scheduler, one line for the person, `failure.json` for machines."""
    write_recipe(workspace, needs={"gpu": "required"})
    done = engine.run(*mount(workspace, tmp_path / "out"), arguments=RUN)
    assert done.returncode == 34, done.stdout + done.stderr
    assert "needs.gpu is required, found no GPU" in done.stderr
    assert "Traceback" not in done.stderr
    failure = json.loads((tmp_path / "out" / "failure.json").read_text())
    assert failure["exit_code"] == 34


def test_the_demo_runs_without_network(engine: Engine, tmp_path: Path) -> None:
    """S3 server, Git, DVC and the real base model in one container (`--build-arg EXTRAS="train data demo"`)."""
    arguments = ("demo", "--quick", "--workspace", "/out/demo")
    done = engine.run("--network", "none", *mount(tmp_path, tmp_path / "out"), arguments=arguments, timeout_s=1200)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "nothing to do" in done.stdout + done.stderr
    assert list((tmp_path / "out" / "demo" / "pulled").glob("*.safetensors"))


@pytest.fixture
def job(engine: Engine, workspace: Path, tmp_path: Path) -> Iterator[dict[str, str]]:
    """The environment of a job whose `docker` is this machine's podman, with the image by digest."""
    programs = tmp_path / "bin"
    programs.mkdir()
    (programs / "docker").symlink_to(shutil.which("podman") or "podman")
    yield {
        **engine.environment,
        "PATH": f"{programs}:{os.environ['PATH']}",
        "HOME": str(tmp_path / "home"),
        "APPLIANCE_IMAGE": engine.find_digest(),
        "RUNNER_NAME": f"test-{os.getpid()}",
    }
    for left in engine.call("ps", "--quiet", "--filter", f"label=appliance.runner=test-{os.getpid()}").split():
        engine.call("kill", left)


def test_a_job_runs_in_the_image(job: dict[str, str], workspace: Path) -> None:
    """The workflows' script: this checkout, this user, runs outside of the checkout."""
    done = start_job(job, workspace, "run", "recipes/colours.yaml")
    output, _ = done.communicate(timeout=600)
    assert done.returncode in (0, 3), output
    assert list(Path(job["HOME"]).glob(".cache/appliance/runs/*/colours-*/card/card.html"))


def start_job(job: dict[str, str], workspace: Path, *arguments: str) -> subprocess.Popen[str]:
    """`.github/scripts/appliance` in the checkout."""
    return subprocess.Popen(
        [str(ROOT / ".github" / "scripts" / "appliance"), *arguments],
        cwd=workspace, env=job, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


def test_a_cancelled_job_leaves_no_container(job: dict[str, str], workspace: Path, engine: Engine) -> None:
    """The signal reaches the training, which saves a checkpoint and says 33; nothing keeps the GPU."""
    write_recipe(workspace, training={"epochs": 40})
    running = start_job(job, workspace, "run", "recipes/colours.yaml")
    checkpoints = ".cache/appliance/runs/*/colours-*/training/checkpoints/checkpoint-*/sealed.json"
    wait_until(lambda: list(Path(job["HOME"]).glob(checkpoints)), running)
    running.send_signal(signal.SIGTERM)
    output, _ = running.communicate(timeout=180)
    assert running.returncode == 33, output
    assert not engine.call("ps", "--quiet", "--filter", f"label=appliance.runner={job['RUNNER_NAME']}")


def test_a_container_that_a_dead_job_left_is_stopped_by_the_next(
    job: dict[str, str], workspace: Path, engine: Engine
) -> None:
    """A runner that was killed cannot stop its container; the next job does, and goes on from its checkpoint."""
    write_recipe(workspace, training={"epochs": 40})
    killed = start_job(job, workspace, "run", "recipes/colours.yaml")
    checkpoints = ".cache/appliance/runs/*/colours-*/training/checkpoints/checkpoint-*/sealed.json"
    wait_until(lambda: list(Path(job["HOME"]).glob(checkpoints)), killed)
    killed.kill()
    label = f"label=appliance.runner={job['RUNNER_NAME']}"
    (left,) = engine.call("ps", "--quiet", "--filter", label).split()
    done = start_job(job, workspace, "run", "recipes/colours.yaml")
    output, _ = done.communicate(timeout=600)
    assert f"stopping a container that an earlier job left: {left}" in output
    assert done.returncode in (0, 3), output
    assert "goes on" in output or "resum" in output, output


_VERSIONS = """
import json
from importlib import metadata
import torch
print(json.dumps({"cuda": torch.version.cuda, **{d.name: d.version for d in metadata.distributions()}}))
"""


@pytest.mark.slow
def test_the_cuda_variant_is_the_same_file_with_another_argument(workspace: Path, tmp_path: Path) -> None:
    """All as locked; without a GPU it trains on the CPU, and says so in one line where one is demanded."""
    build_image(torch="cuda", image=CUDA_IMAGE)
    engine = open_engine(tmp_path, image=CUDA_IMAGE)
    done = engine.run("--entrypoint", "python", arguments=("-c", _VERSIONS))
    assert done.returncode == 0, done.stderr
    found: dict[str, str] = json.loads(done.stdout)
    locked = {(p["name"], p.get("version")) for p in tomllib.loads((ROOT / "uv.lock").read_text())["package"]}
    assert found.pop("cuda").startswith("13.")
    installed = {(re.sub(r"[-_.]+", "-", name).lower(), version) for name, version in found.items()}
    assert {name for name, _ in installed - locked} <= {"appliance"}
    folders = mount(workspace, tmp_path / "out")
    demanded = engine.run(*STRANGER, *folders, arguments=("doctor", "--gpu"))
    assert demanded.returncode == 34, demanded.stdout + demanded.stderr
    assert "found no usable GPU" in demanded.stderr
    trained = engine.run(*STRANGER, *folders, arguments=RUN)
    assert trained.returncode in (0, 3), trained.stdout + trained.stderr
    assert read_adapter(tmp_path / "out")
