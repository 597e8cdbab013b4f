"""Laws of what a terminal shows: its width is kept, what is empty is left out, and a pipe gets whole lines."""

from __future__ import annotations

import json
import os
import pty
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from test_cli import call, walk
from tiny import make_recipe, write_base, write_dataset

from appliance.cli import appliance, main
from appliance.cli import plan as plan_verb
from appliance.cli.lines import say_count, wrap
from appliance.cli.sections import Section, print_section
from appliance.plan import read_machine


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository in a place with a long name, whose dataset has a fault and few rows."""
    root = tmp_path_factory.mktemp("a-repository-in-a-place-with-a-rather-long-name-of-its-own") / "checkout"
    write_base(root / "base")
    rows = write_dataset(root / "datasets" / "colours", rows=20) / "rows.jsonl"
    rows.write_text(rows.read_text().replace('"content": "green"}', '"content": "grene"}', 1))
    recipe = make_recipe(evaluation={"gates": {"min_test_rows": 100}}).model_dump(mode="json", exclude_none=True)
    (root / "colours.yaml").write_text(yaml.safe_dump(recipe))
    write_dataset(root / "datasets" / "good", rows=60)
    good = {**recipe, "dataset": {"path": "datasets/good"}, "training": {"epochs": 2.0}, "method": {"type": "ia3"}}
    (root / "good.yaml").write_text(yaml.safe_dump(good))
    return root


def show(*arguments: str, cwd: Path) -> list[str]:
    """The lines that a terminal of 80 columns gets."""
    terminal, side = pty.openpty()
    env = {**os.environ, "COLUMNS": "80", "NO_COLOR": "1", "TERM": "xterm", "APPLIANCE_CACHE": str(cwd / "cache")}
    command = [sys.executable, "-m", "appliance", *arguments]
    subprocess.run(command, cwd=cwd, env=env, stdout=side, stderr=side, timeout=120, check=False)
    os.close(side)
    said = b""
    while True:
        try:
            said += os.read(terminal, 65536)
        except OSError:  # the other side is closed and read to its end
            break
    os.close(terminal)
    return said.decode().splitlines()


@pytest.mark.parametrize(
    "arguments", [["data", "check", "--recipe", "colours.yaml"], ["plan", "colours.yaml"]], ids=lambda a: a[0]
)
def test_findings_are_named_from_the_root_and_keep_the_width(project: Path, arguments: list[str]) -> None:
    """On 80 columns no line is longer, and no place is the machine's; in a pipe a finding is one line."""
    shown = show(*arguments, cwd=project)
    assert max(map(len, shown)) <= 80, shown
    piped = call(*arguments, cwd=project, env={"APPLIANCE_CACHE": str(project / "cache")})
    text = piped.stdout + piped.stderr
    assert str(project) not in text
    (line,) = [line for line in text.splitlines() if "[contract]" in line]
    assert "datasets/colours/rows.jsonl:3: [contract] row r2: " in line
    assert " ".join(line.split()) in " ".join(" ".join(shown).split()), "wrapped, and nothing lost"


def test_notes_stand_on_lines_of_their_own(project: Path) -> None:
    """What is said while a verb works is wrapped, and never runs into what comes after it."""
    shown = show("plan", "good.yaml", cwd=project)
    assert len([line for line in shown if line.startswith("  warning: ")]) == 2, shown
    assert [line for line in shown if line.startswith("run  ")]
    assert max(map(len, shown)) <= 80


def test_counts_are_words_and_no_python(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`provenance program 20` and `1 error`, never a dictionary and `1 errors`."""
    assert main(["data", "check", "--recipe", str(project / "colours.yaml"), "--root", str(project)]) == 1
    said = capsys.readouterr().out
    assert "provenance   program 20\n" in said
    assert "{" not in said.partition("provenance")[2]
    assert "1 error, " in said
    assert say_count(0, "error") == "0 errors"
    assert say_count(1.5, "epoch") == "1.5 epochs"


def test_the_plan_says_of_how_many_epochs_its_tokens_are(project: Path) -> None:
    """Rows are counted once and tokens over all epochs; the rate is shown also where the recipe leaves it out."""
    done = call("plan", "good.yaml", cwd=project, env={"APPLIANCE_CACHE": str(project / "cache")})
    assert " over 2 epochs, of which " in done.stdout, done.stderr
    assert "rate        0.003\n" in done.stdout
    figures = json.loads(call("plan", "good.yaml", "--json", cwd=project).stdout)
    assert (figures["epochs"], figures["learning_rate"]) == (2.0, 0.003)


def test_the_plan_says_what_a_run_would_say(
    project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where this machine lacks what the recipe needs it is warned of; a step has no more rows than there are."""
    good = yaml.safe_load((project / "good.yaml").read_text())
    wanted = {**good, "needs": {"gpu": "required"}, "training": {**good["training"], "effective_batch": 10_000_000}}
    (project / "wanted.yaml").write_text(json.dumps(wanted))
    here = replace(read_machine(), gpu="", gpu_memory_bytes=0)
    monkeypatch.setattr(plan_verb, "read_machine", lambda: here)
    given = ["plan", str(project / "wanted.yaml"), "--root", str(project), "--cache", str(project / "cache")]
    assert main(given) == 0
    said = capsys.readouterr().out
    assert "warning: a run would be refused here: recipe colours: needs.gpu is required, found no GPU" in said
    rows = re.search(r"^rows +(\d+) train", said, re.MULTILINE)
    assert rows is not None
    assert re.search(rf"^steps +2 of {rows[1]} rows \(", said, re.MULTILINE), said
    assert f"effective_batch 10,000,000 makes one step an epoch of the {rows[1]} training rows" in said
    assert main([*given, "--json"]) == 0
    assert "would be refused" in json.loads(capsys.readouterr().out)["warnings"][0]


def test_the_plan_says_how_long_it_may_take(
    project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A range of hours on the GPU that is here, else on the one that has a price; nothing where none is known."""
    given = ["plan", str(project / "good.yaml"), "--root", str(project), "--cache", str(project / "cache")]

    def tell() -> str:
        assert main(given) == 0
        return next((x for x in capsys.readouterr().out.splitlines() if x.startswith("time  ")), "")

    here = replace(read_machine(), gpu="", gpu_memory_bytes=0)
    monkeypatch.setattr(plan_verb, "read_machine", lambda: here)
    assert tell() == ""
    (project / "prices.yaml").write_text("{as_of: 2026-01-31, source: x, currency: EUR, gpu_hour: 2, gpu: NVIDIA L4}")
    assert "(at 50% to 10% of the peak of NVIDIA L4), 0.00 to " in tell()
    h200 = replace(here, gpu="NVIDIA H200", gpu_memory_bytes=141 << 30, gpus=1, has_bf16=True)
    monkeypatch.setattr(plan_verb, "read_machine", lambda: h200)
    assert tell() == "time        about 1 minute (at 50% to 10% of the peak of NVIDIA H200)"
    assert main([*given, "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures["gpu"] == "NVIDIA H200"
    assert 0 < figures["hours"][0] < figures["hours"][1] < 0.01


def test_empty_columns_are_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    """A plan has no verdict yet, so it has no column of them."""
    rows = (("a", "would train", "", "x"), ("b", "failed", "", ""))
    print_section(Section("Plan", ("Recipe", "Action", "Verdict", "Why"), rows, lines=("1 more",)))
    assert capsys.readouterr().out.splitlines() == [
        "Plan", "  Recipe  Action       Why", "  a       would train  x", "  b       failed", "  1 more",
    ]  # fmt: skip
    print_section(Section("Empty", ("Recipe",), ()))
    assert capsys.readouterr().out == "Empty\n"


def test_a_line_in_a_pipe_is_whole() -> None:
    """Scripts read lines, so nothing is broken where no terminal is."""
    with Path(os.devnull).open("w") as pipe:
        assert wrap("word " * 100, indent=2, stream=pipe) == "word " * 100


def test_no_summary_of_a_command_is_cut() -> None:
    """A list of commands with an ellipsis tells half."""
    for name, command in walk(appliance):
        assert name.count(" ") == 0 or not command.get_short_help_str(60).endswith("..."), name
