"""The image: its size and what makes it up, and the time from `docker run` to its first line.

`make image-test` builds it and then calls this; `make image-test-cuda` does so with `--cuda`. The start
is compared, in turn, with a container of the same image that runs `true`: what is left is the appliance's own.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests"))

from containers import CUDA_IMAGE, IMAGE, Engine, open_engine  # noqa: E402

ROUNDS, SHOWN = 7, 12
_SITE = "cd /opt/appliance/lib/python3*/site-packages && du --summarize --block-size=1M -- *"
_PARTS = "du --summarize --block-size=1M /opt/appliance /usr /var /etc 2>/dev/null"


def main() -> None:
    """Print both."""
    image = CUDA_IMAGE if "--cuda" in sys.argv[1:] else IMAGE
    with tempfile.TemporaryDirectory() as folder:
        engine = open_engine(Path(folder), image=image)
        print_size(engine)
        print_start(engine)


def print_size(engine: Engine) -> None:
    """The whole, the folders, the largest packages."""
    size = int(engine.call("image", "inspect", "--format", "{{.Size}}", engine.image))
    print(f"image            {size / 1e6:6.0f} MB")
    for name, megabytes in measure(engine, _PARTS):
        print(f"  {name:<22} {megabytes:5d} MB")
    packages = sorted(measure(engine, _SITE), key=lambda item: -item[1])
    print("of the packages")
    for name, megabytes in packages[:SHOWN]:
        print(f"  {name:<22} {megabytes:5d} MB")
    print(f"  {'all others':<22} {sum(m for _, m in packages[SHOWN:]):5d} MB")


def measure(engine: Engine, command: str) -> list[tuple[str, int]]:
    """Names and megabytes by `du` inside the image."""
    argv = ["podman", "run", "--rm", "--user", "0", "--entrypoint", "/bin/sh", engine.image, "-c", command]
    done = subprocess.run(argv, env=engine.environment, text=True, capture_output=True, check=True, timeout=120)
    pairs = [line.split("\t") for line in done.stdout.splitlines()]
    return [(name, int(megabytes)) for megabytes, name in pairs]


def print_start(engine: Engine) -> None:
    """Medians over the rounds, each of both in turn."""
    help_s, true_s = [], []
    for _ in range(ROUNDS):
        true_s.append(measure_start(engine, "podman", "run", "--rm", "--entrypoint", "echo", engine.image, "x"))
        help_s.append(measure_start(engine, "podman", "run", "--rm", engine.image, "--help"))
    start, plain = statistics.median(help_s), statistics.median(true_s)
    print(f"to the first line {start:5.2f} s, the container's share {plain:.2f} s, ours {start - plain:.2f} s")


def measure_start(engine: Engine, *argv: str) -> float:
    """Seconds from the command to its first line."""
    began = time.perf_counter()
    with subprocess.Popen(argv, env=engine.environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as job:
        if not job.stdout or not job.stdout.readline():
            raise RuntimeError(f"{' '.join(argv)}: said nothing")
        seconds = time.perf_counter() - began
        job.communicate(timeout=60)
    return seconds


if __name__ == "__main__":
    main()
