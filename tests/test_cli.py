"""The command line: light, documented, and one clear message per failure."""

from __future__ import annotations

import json
import os
import pty
import resource
import select
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
import yaml
from test_command import run_beside_read_only
from tiny import make_recipe, write_base, write_dataset

from appliance import preparation, registry, release
from appliance.answers import load_pulled
from appliance.cli import VERBS, appliance, main
from appliance.cli.common import print_finished
from appliance.cli.reconcile import _print_outcome as print_outcome
from appliance.demo.storage import Storage
from appliance.digest import digest_bytes, digest_folder
from appliance.errors import RegistryError
from appliance.pipeline import Finished, run_recipe
from appliance.preparation import Origin, Workspace
from appliance.recipe import load_recipe
from appliance.reconcile import Outcome
from appliance.registry.refs import DEFAULT_ALIAS
from appliance.run import Run
from appliance.store import open_store

ROOT = Path(__file__).parent.parent
HEAVY = ("torch", "transformers", "trl", "peft", "datasets", "boto3", "botocore", "dvc", "pydantic")


def call(
    *arguments: str, cwd: Path | None = None, env: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run `appliance` as a user does."""
    return subprocess.run(
        [sys.executable, "-m", "appliance", *arguments],
        cwd=cwd,
        env={**os.environ, **(env or {})},
        capture_output=True,
        text=True,
        timeout=250,
        check=False,
    )


def walk(command: click.Command, path: tuple[str, ...] = ()) -> Iterator[tuple[str, click.Command]]:
    """Every command below `command` with its full name."""
    yield " ".join(path), command
    if isinstance(command, click.Group):
        context = click.Context(command)
        for name in command.list_commands(context):
            child = command.get_command(context, name)
            assert child is not None
            yield from walk(child, (*path, name))


def test_help_imports_nothing_heavy() -> None:
    """`appliance --help` leaves torch and its friends, boto3, dvc and pydantic out of `sys.modules`."""
    code = (
        "import sys; from appliance.cli import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: pass\n"
        f"print([m for m in {HEAVY!r} if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
    assert all(verb in done.stdout for verb in VERBS)


def test_help_takes_no_more_cpu_than_a_glance() -> None:
    """`appliance --help` uses at most 0.15 s of CPU (the best of five, so that a busy machine does not fail it)."""
    spent = []
    for _ in range(5):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        call("--help")
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        spent.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert min(spent) <= 0.15


def test_every_command_and_option_has_help() -> None:
    """Nothing on the command line is undocumented, and the list of verbs is the code's."""
    for name, command in walk(appliance):
        assert command.help, name
        for parameter in command.params:
            assert not isinstance(parameter, click.Option) or parameter.help, f"{name}: {parameter.name}"


def test_every_verb_ends_its_help_with_an_example_that_works() -> None:
    """Each has commands to copy, and each of them is a call that the command line takes."""
    for name, command in walk(appliance):
        if isinstance(command, click.Group):
            continue
        lines = [line.strip() for line in (command.epilog or "").splitlines() if line.strip().startswith("appliance ")]
        assert lines, name
        for line in lines:
            words = shlex.split(line)[1:]
            assert " ".join(words).startswith(name)
            command.make_context(name, words[len(name.split()) :])


def test_an_option_is_the_same_in_every_verb() -> None:
    """Folders and stores have one description, so that a script for one verb is right for another."""
    for option in ("root", "cache", "runs", "tensorboard", "mirror_checkpoints"):
        told = {
            (p.help, p.envvar) for name, c in walk(appliance) if name != "init" for p in c.params if p.name == option
        }
        assert len(told) == 1, option
    verbs = dict(walk(appliance))
    options = {v: {p.name for p in verbs[v].params} for v in ("run", "evaluate")}
    assert options["run"] - options["evaluate"] == {"force"}, "evaluate trains as well"


def test_verbs_that_take_a_name_say_which_version_it_is() -> None:
    """A bare NAME is an alias that no recipe moves by default, so the help of each such verb tells it."""
    taking = [c for _, c in walk(appliance) if any((p.metavar or "").startswith("NAME[@") for p in c.params)]
    assert len(taking) == 3
    assert all(f"NAME alone means NAME@{DEFAULT_ALIAS}" in " ".join((c.help or "").split()) for c in taking)


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the tiny base, a dataset and a recipe; not a Git repository."""
    root = tmp_path_factory.mktemp("project")
    write_base(root / "base")
    write_dataset(root / "datasets" / "colours")
    (root / "recipes").mkdir()
    (root / "recipes" / "colours.yaml").write_text(
        yaml.safe_dump(make_recipe().model_dump(mode="json", exclude_none=True))
    )
    return root


BAD: list[tuple[list[str], int, str]] = [
    (["run", "recipes/none.yaml"], 1, "cannot be read"),
    (["run", "bad.yaml"], 1, "bad.yaml:2: unknown key nmae; did you mean name?"),
    (["run", "no-data.yaml"], 1, "datasets/none"),
    (["run", "no-base.yaml"], 1, "nothing at"),
    (["data", "check", "datasets/empty"], 1, "rows.jsonl"),
    (["data", "check", "datasets/broken"], 1, "rows.jsonl:3"),
    (["data", "check", "--recipe", "recipes/colours.yaml"], 0, "0 errors"),
    (
        ["data", "check", "--recipe", "masked.yaml"],
        1,
        "datasets/masked/rows.jsonl:3: [mask] row r2: the answer of turn 2",
    ),
    (["data", "check", "--recipe", "no-base.yaml"], 0, "masks and token lengths are not checked: nothing at"),
    (["plan", "masked.yaml"], 1, "row r2: the answer of turn 2 holds the stop token"),
    (["run", "few.yaml"], 1, "10"),
    (["data", "check"], 2, "give either"),
    (["list", "--store", "http://example.com/x"], 1, "s3://"),
    (["list", "--store", "s3://bucket/x"], 1, "127.0.0.1:9"),
    (["pull", "colours@production", "out", "--store", "file:///tmp/appliance-no-such-store"], 1, "colours"),
    (["generate", "."], 1, "appliance pull"),
    (
        ["generate", "colours@production"],
        1,
        "`appliance pull colours@production ./colours`, then `appliance generate ./",
    ),
    (["reconcile", "--store", "file:///tmp/appliance-no-such-store"], 1, "Git repository"),
    (["rnu"], 2, "No such command 'rnu'; did you mean run?"),
    (["xyz"], 2, "No such command 'xyz'."),
    (["list"], 2, "APPLIANCE_STORE"),
    (["list", "typo", "--store", "file:///tmp/appliance-no-such-store"], 1, "no model 'typo'; there is none yet"),
    (["plan", "recipes/colour.yaml"], 1, "did you mean recipes/colours.yaml?"),
    (["generate", ".", "--prompt", "a\udcff"], 2, r"argument 'a\udcff': expected text, found bytes that are no utf-8"),
    (
        ["promote", "a@b", "c", "--reason", "\udcff", "--store", "file:///tmp/appliance-no-such-store"],
        2,
        "expected text",
    ),
    (["check", "--summary", ".", "--store", "file:///tmp/appliance-no-such-store"], 2, "'.' is a directory"),
    (
        ["check", "--summary", "bad.yaml/x.md", "--store", "file:///tmp/appliance-no-such-store"],
        1,
        "bad.yaml: file exists; name another place",
    ),
    (["plan", "recipes/colours.yaml", "--runs", "bad.yaml"], 2, "'bad.yaml' is a file"),
    (["plan", "recipes/colours.yaml", "--cache", "bad.yaml"], 2, "'bad.yaml' is a file"),
]


@pytest.mark.parametrize(
    ("arguments", "code", "text"), BAD, ids=lambda v: " ".join(v)[:40] if isinstance(v, list) else ""
)
def test_bad_input_is_one_message_and_the_documented_exit_code(
    project: Path, arguments: list[str], code: int, text: str
) -> None:
    """No traceback, no other exit code, and the message names the place."""
    write_bad_inputs(project)
    env = {
        "AWS_ENDPOINT_URL": "http://127.0.0.1:9",
        "AWS_ACCESS_KEY_ID": "x",
        "AWS_SECRET_ACCESS_KEY": "y",
        "AWS_DEFAULT_REGION": "us-east-1",
        "APPLIANCE_CACHE": str(project / "cache"),
        "GIT_CEILING_DIRECTORIES": str(project.parent),
    }
    done = call(*arguments, cwd=project, env=env)
    assert "Traceback" not in done.stderr + done.stdout
    assert text in done.stderr + done.stdout
    assert done.returncode == code


def write_bad_inputs(project: Path) -> None:
    """Recipes and datasets with one fault each."""
    good = make_recipe().model_dump(mode="json", exclude_none=True)
    dump = yaml.safe_dump
    (project / "bad.yaml").write_text("base: {model: ./base}\nnmae: x\n")
    (project / "no-data.yaml").write_text(dump({**good, "dataset": {"path": "datasets/none"}}))
    (project / "no-base.yaml").write_text(dump({**good, "base": {"model": "./none"}}))
    (project / "few.yaml").write_text(dump({**good, "dataset": {"path": "datasets/few"}}))
    (project / "masked.yaml").write_text(dump({**good, "dataset": {"path": "datasets/masked"}}))
    masked = write_dataset(project / "datasets" / "masked")
    (masked / "dataset.yaml").write_text("name: colours\n")
    (masked / "rows.jsonl").write_text((masked / "rows.jsonl").read_text().replace('"green"', '"green<|im_end|>"', 1))
    write_dataset(project / "datasets" / "few", rows=9)
    (write_dataset(project / "datasets" / "empty") / "rows.jsonl").write_bytes(b"")
    broken = write_dataset(project / "datasets" / "broken") / "rows.jsonl"
    lines = broken.read_text().splitlines()
    broken.write_text("\n".join([*lines[:2], lines[2][:-5], *lines[3:]]) + "\n")


def test_a_run_goes_from_rows_to_a_pulled_version(project: Path, tmp_path: Path) -> None:
    """run, list, show, pull, promote and generate work together on a folder store, and a second run does nothing."""
    store = f"file://{tmp_path / 'store'}"
    image = f"registry.example/appliance@sha256:{'a' * 64}"
    env = {"APPLIANCE_STORE": store, "APPLIANCE_CACHE": str(tmp_path / "cache"), "APPLIANCE_IMAGE": image}
    first = call("run", "recipes/colours.yaml", cwd=project, env=env)
    assert first.returncode in (0, 3), first.stderr
    second = call("run", "recipes/colours.yaml", cwd=project, env=env)
    assert "already there" in second.stdout, second.stderr
    assert "why       appliance show colours@2" in second.stdout, "the reasons are where they can be read"
    assert second.returncode == first.returncode, "the same command says the same again"
    trained = call("train", "recipes/colours.yaml", cwd=project, env={**env, "APPLIANCE_STORE": ""})
    assert trained.returncode == 0, "a training has no verdict, whatever was judged earlier"
    assert "verdict" not in trained.stdout
    assert "adapter " in trained.stdout
    rows = json.loads(call("list", "--json", cwd=project, env=env).stdout)
    assert len(rows) == 1
    for verb in ("list", "show", "check"):
        misspelt = call(verb, "colour", cwd=project, env=env)
        assert misspelt.returncode == 1, verb
        assert "no model 'colour'; did you mean colours?" in misspelt.stderr, verb
    version = f"colours@{rows[0]['version']}"
    assert rows[0]["version"] in call("show", version, cwd=project, env=env).stdout
    forced = call("promote", version, "production", "--force", cwd=project, env=env)
    assert forced.returncode == 0, forced.stderr
    pulled = call("pull", "colours@production", str(tmp_path / "pulled"), cwd=project, env=env)
    assert "verified" in pulled.stdout, pulled.stderr
    card = json.loads((tmp_path / "pulled" / "card" / "card.json").read_bytes())
    assert card["versions"]["image"] == image, "what it was made in is on the card and in the manifest"
    assert image in call("show", version, "--json", cwd=project, env=env).stdout
    training = card["training"]
    assert training["predicted"]["micro_batch"] == training["micro_batch"]
    assert min(training["predicted"]["peak_memory_bytes"], training["peak_memory_bytes"]) > 0
    assert "mfu" not in training, "no figure on a CPU, rather than a guess"
    said = call(
        "generate",
        str(tmp_path / "pulled"),
        "--prompt",
        "red thing 99",
        "--compare",
        "--max-new-tokens",
        "4",
        "--json",
        cwd=project,
        env=env,
    )
    assert [o["arm"] for o in json.loads(said.stdout)] == ["candidate", "zero_shot"], said.stderr
    (made,) = (project / ".appliance" / "runs").iterdir()
    same = call(
        "generate", str(made), "--prompt", "red thing 99", "--max-new-tokens", "4", "--json", cwd=project, env=env
    )
    assert json.loads(same.stdout) == json.loads(said.stdout)[:1], same.stderr
    merged = call("merge", str(tmp_path / "pulled"), str(tmp_path / "model"), "--json", cwd=project, env=env)
    figures = json.loads(merged.stdout)
    assert figures["drift"] < 0.5 * figures["effect"], merged.stderr
    assert json.loads((tmp_path / "model" / "merged.json").read_bytes())["version"] == rows[0]["version"]


def test_what_is_upgraded_after_the_training_did_not_make_the_weights(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Card and manifest name the versions that trained, whatever publishes it; of an older run, those of now."""
    notes: list[str] = []
    workspace = Workspace(project, tmp_path / "cache", tmp_path / "runs", note=notes.append)
    store, origin = open_store((tmp_path / "store").as_uri()), Origin(None, "2026-01-31T12:00:00Z", "tester")
    recipe, trained = load_recipe(project / "recipes" / "colours.yaml"), preparation.read_versions()
    done = run_recipe(recipe, workspace=workspace, store=store, origin=origin, until="train")
    monkeypatch.setattr(preparation, "__version__", "99.0.0")
    finished = run_recipe(recipe, workspace=workspace, store=store, origin=origin)
    assert finished.folder == done.folder is not None
    assert len([n for n in notes if n.startswith("training ")]) == 1
    card = json.loads((finished.folder / "card" / "card.json").read_bytes())
    manifest = registry.load_manifest(store, recipe.name, finished.version)
    assert card["versions"] == manifest.versions == trained
    run = Run(finished.folder, finished.key)
    run.finish("train", summary=run.read("train")["summary"], image="x")  # as earlier releases did
    assert release.name_versions(run) == {**trained, "appliance": "99.0.0", "image": "x"}


def test_what_is_published_was_compared_with_what_it_replaces(project: Path, tmp_path: Path) -> None:
    """An evaluation without the store, or from before the alias moved, is done again with the version in use."""
    store = f"file://{tmp_path / 'store'}"
    env = {"APPLIANCE_CACHE": str(tmp_path / "cache")}
    other = tmp_path / "other.yaml"
    other.write_text((project / "recipes" / "colours.yaml").read_text().replace("seed: 17", "seed: 18"))
    call("run", "recipes/colours.yaml", "--store", store, cwd=project, env=env)
    (first,) = json.loads(call("list", "--store", store, "--json", cwd=project, env=env).stdout)
    version = f"colours@{first['version']}"
    assert call("promote", version, "production", "--force", "--store", store, cwd=project, env=env).returncode == 0
    assert call("evaluate", str(other), cwd=project, env=env).returncode in (0, 3)
    refused = call("publish", str(other), "--store", store, cwd=project, env=env)
    assert refused.returncode == 1
    assert f"compared with no version in use, and production is {first['version']} now" in refused.stderr
    done = call("run", str(other), "--store", store, cwd=project, env=env)
    assert done.returncode in (0, 3), done.stderr
    newest = json.loads(call("list", "--store", store, "--json", cwd=project, env=env).stdout)[-1]["version"]
    shown = call("show", f"colours@{newest}", "--store", store, "--json", cwd=project, env=env)
    assert newest != first["version"]
    assert json.loads(shown.stdout)["parent"] == first["version"]
    call("promote", f"colours@{newest}", "production", "--force", "--store", store, cwd=project, env=env)
    again = call("publish", str(other), "--store", store, cwd=project, env=env)
    assert again.returncode == done.returncode, "the same command finishes, whatever was done already"
    assert newest in again.stdout


@pytest.mark.parametrize("was_done", [False, True])
@pytest.mark.parametrize(("outcome", "code"), [("ship", 0), ("hold", 3), ("reject", 3), ("inconclusive", 0), ("", 0)])
def test_the_exit_code_is_the_verdicts_whenever_it_was_made(outcome: str, code: int, was_done: bool) -> None:
    """Pinned for scripts: 3 where the verdict refuses, now or earlier; an inconclusive one is no refusal."""
    finished = Finished("m", "k", folder=None, outcome=outcome, reasons=(), version="", alias="", was_done=was_done)
    assert print_finished(finished) == code


def test_a_reconcile_that_has_nothing_to_do_says_the_verdict_that_stands(capsys: pytest.CaptureFixture[str]) -> None:
    """A held version is not told as if all were well: its verdict, and the command that says why."""
    finished = Finished("m", "k", folder=None, outcome="hold", reasons=(), version="v", alias="", was_done=True)
    print_outcome(Outcome("m", "none", "v was made from this recipe, data and base", finished), dry_run=False)
    assert capsys.readouterr().out.splitlines()[1:] == ["  verdict  hold; why: `appliance show m@v`"]


def test_what_was_just_trained_is_loaded_from_its_run_folder_or_the_adapter_in_it(tmp_path: Path) -> None:
    """With the prompt, the thinking and the base of its training: `train` prints the one, a person takes the other."""
    run, recipe = Run(tmp_path / "colours-1", "k"), make_recipe()
    run.adapter.mkdir(parents=True)
    base, kept = {"model": "./base", "revision": "r1"}, recipe.model_dump(mode="json")
    run.finish("prepare", recipe=kept, base=base, system_prompt="Name the colour.", thinking="off")
    with pytest.raises(RegistryError, match="not trained yet; `appliance train RECIPE`"):
        load_pulled(run.folder)
    (run.adapter / "adapter_model.safetensors").write_bytes(b"weights")
    run.finish("train", summary={"adapter_sha256": digest_folder(run.adapter)})
    for folder in (run.folder, run.adapter):
        pulled = load_pulled(folder)
        assert (pulled.folder, pulled.revision, pulled.is_adapter) == (run.adapter, "r1", True)
        assert (pulled.recipe, pulled.system_prompt, pulled.thinking) == (recipe, "Name the colour.", "off")
    (run.adapter / "adapter_model.safetensors").write_bytes(b"w")
    with pytest.raises(RegistryError, match=r"not what this run has trained; `appliance train RECIPE` makes it again"):
        load_pulled(run.folder)
    run.amend("prepare", recipe=None)
    with pytest.raises(RegistryError, match=r"an earlier release .* kept no recipe"):
        load_pulled(run.folder)


def test_a_damaged_version_answers_nothing(tmp_path: Path) -> None:
    """A pulled version's files are those of its manifest, or the one that is not is named; a README is anybody's."""
    names = ("adapter_model.safetensors", "card/card.json", "README.md")
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"{}")
    record = json.loads(next((ROOT / "tests" / "fixtures" / "manifests").glob("*.json")).read_bytes())
    record["files"] = [{"path": n, "size": 2, "sha256": digest_bytes(b"{}")} for n in names]
    (tmp_path / "manifest.json").write_text(json.dumps(record))
    (tmp_path / "README.md").write_text("mine")
    (tmp_path / "notes.txt").write_text("mine")
    assert load_pulled(tmp_path).is_adapter
    for name in names[:2]:
        (tmp_path / name).write_bytes(b"[]")
        with pytest.raises(RegistryError, match=rf"recorded: {name}: SHA-256 .*; make or pull them again"):
            load_pulled(tmp_path)
        (tmp_path / name).write_bytes(b"{}")


def test_a_generation_that_fails_says_why_and_names_no_log_that_is_gone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The child's last words, and the folder that was asked; its log goes with the folder that it was in."""
    run = write_run(tmp_path)
    write_base(run.adapter)
    (run.adapter / "model.safetensors").write_bytes(b"torn")
    assert main(["generate", str(run.folder), "--prompt", "red"]) == 1
    said = capsys.readouterr().err
    assert f"error: {run.adapter}: no answers: " in said
    assert "eader" in said, "safetensors' own word for it"
    assert "log" not in said


def write_run(folder: Path) -> Run:
    """A run that has trained a model of its own, as far as `generate` looks before it answers."""
    run = Run(folder / "colours-1", "k")
    recipe = make_recipe(method={"type": "full"}).model_dump(mode="json")
    run.finish("prepare", recipe=recipe, base={"revision": "r1"}, system_prompt=None, thinking="fixed")
    run.finish("train", summary={})
    return run


@pytest.mark.parametrize(
    ("text", "words"),
    [(b"a\n\xff\n", "standard input: byte 3 is no utf-8; save"), (b"\xef\xbb\xbf\n", "nothing to answer")],
)
@pytest.mark.parametrize("errors", ["strict", "surrogateescape"])  # the latter is Python's own in the C locale
def test_prompts_are_text_and_nothing_beside_it(tmp_path: Path, text: bytes, words: str, errors: str) -> None:
    """Bytes that are no text are refused by their place, and a byte-order mark is no part of a prompt."""
    done = subprocess.run(
        [sys.executable, "-m", "appliance", "generate", str(write_run(tmp_path).folder)],
        input=text, env={**os.environ, "PYTHONIOENCODING": f"utf-8:{errors}"}, capture_output=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    assert words in done.stderr.decode()


def test_what_an_output_cannot_show_ends_no_verb(tmp_path: Path) -> None:
    """A terminal in another encoding gets what it lacks escaped."""
    rows = write_dataset(tmp_path / "colours") / "rows.jsonl"
    rows.write_text(rows.read_text().replace('"user"', '"system"', 1).replace('"r0"', '"\u7ea2"', 1))
    done = call("data", "check", str(tmp_path / "colours"), env={"PYTHONIOENCODING": "latin-1"})
    assert (done.returncode, "Traceback" in done.stderr) == (1, False), done.stderr
    assert r"row \u7ea2: " in done.stdout


def test_a_terminal_that_is_asked_for_prompts_says_so(tmp_path: Path) -> None:
    """Without a word it looks like a model that is being loaded."""
    run = write_run(tmp_path)
    command = [sys.executable, "-m", "appliance", "generate", str(run.folder)]
    program = f"import sys, pty; sys.exit(pty.spawn({command!r}) >> 8)"
    done = subprocess.run(
        [sys.executable, "-c", program], input="\x04", capture_output=True, text=True, timeout=60, check=False
    )
    assert "prompts, one a line; Ctrl-D answers" in done.stdout
    assert done.returncode == 2


FULL = [
    pytest.param("60k", "free, the training writes up to 0.4 MiB", marks=pytest.mark.slow),
    ("480k", "no space left"),
]


@pytest.mark.parametrize(("size", "words"), FULL)
def test_a_full_disk_is_one_message_and_the_same_command_finishes(
    project: Path, tmp_path: Path, size: str, words: str
) -> None:
    """No room for checkpoints, or none for what comes beside them: exit 1, nothing published; then all of it."""
    out, store = tmp_path / "out", tmp_path / "store"
    out.mkdir()
    run = f"{sys.executable} -m appliance run recipes/colours.yaml"
    script = (
        f"mount -t tmpfs -o size={size} tmpfs {out} || exit 77; {run}; echo first=$?; ls {store} 2>&1; "
        f"mount -o remount,size=50m {out}; {run}; echo second=$?"
    )
    env = {**os.environ, "APPLIANCE_OUT": str(out), "APPLIANCE_STORE": store.as_uri()}
    done = subprocess.run(
        ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", script],
        cwd=project, env=env, capture_output=True, text=True, timeout=250, check=False,
    )  # fmt: skip
    if done.returncode == 77 or "unshare" in done.stderr:
        pytest.skip("this machine lets nobody mount a small file system")
    assert "Traceback" not in done.stderr
    assert words in done.stderr
    assert "first=1\n" in done.stdout, done.stdout
    assert "second=0\n" in done.stdout, done.stderr
    assert len(list(store.glob("models/**/manifest.json"))) == 1


def test_a_folder_that_may_not_be_written_is_one_message(project: Path, tmp_path: Path) -> None:
    """Runs or a repository on a read-only disk: exit 1 with the place and what to do, not a bug report."""
    out = tmp_path / "out"
    script = "; ".join(
        f"{sys.executable} -m appliance {verb}; echo $?"
        for verb in (f"train recipes/colours.yaml --runs {out}", f"init --root {out}/repository")
    )
    done = run_beside_read_only(out, script, cwd=project)
    assert "Traceback" not in done.stderr
    assert done.stdout == "1\n1\n", done.stderr
    assert f"{out}/repository: read-only file system; give this user access to it" in done.stderr


def test_a_store_that_takes_nothing_is_known_before_a_training(project: Path, tmp_path: Path) -> None:
    """A folder that cannot be made, or written once it is a registry: exit 1, and no run was begun."""
    out, runs = tmp_path / "out", tmp_path / "runs"
    stores = ("file:///proc/appliance", f"file://{out}/store", (project / "recipes" / "colours.yaml").as_uri())
    script = "; ".join(
        f"{sys.executable} -m appliance run recipes/colours.yaml --runs {runs} --store {store}; echo $?"
        for store in stores
    )
    done = run_beside_read_only(out, script, cwd=project)
    assert done.stdout == "1\n1\n1\n", done.stderr
    assert "/proc/appliance: no folder can be made here; choose another one for the store" in done.stderr
    assert f"file://{out}/store/FORMAT.json: permission denied (Read-only file system)" in done.stderr
    assert "colours.yaml is a file, expected a folder; mend the address" in done.stderr
    assert not runs.exists()


def test_a_mistyped_folder_is_told_where_it_reads_like_an_empty_registry(tmp_path: Path) -> None:
    """`list` says that it is not there, and prints what it prints of an empty one."""
    url = (tmp_path / "stroe").as_uri()
    for more, out in (((), f"no versions in {url} yet"), (("--json",), "[]")):
        done = call("list", "--store", url, *more)
        assert (done.returncode, done.stdout[: len(out)]) == (0, out)
        assert f"{url}: no such folder; look at the spelling" in done.stderr


def test_failure_json_is_of_the_last_command(tmp_path: Path) -> None:
    """In a container every failure leaves it, a wrong call too, and the next command that works leaves none."""
    env = {"APPLIANCE_OUT": str(tmp_path), "APPLIANCE_STORE": ""}
    for arguments, code, words in (
        (["plan", "none.yaml"], 1, "none.yaml: cannot be read"),
        (["list"], 2, "--store"),
        (["rnu"], 2, "No such command"),
    ):
        assert call(*arguments, env=env, cwd=tmp_path).returncode == code
        failure = json.loads((tmp_path / "failure.json").read_text())
        assert failure["exit_code"] == code
        assert words in failure["message"]
    assert call("list", "--store", (tmp_path / "store").as_uri(), env=env, cwd=tmp_path).returncode == 0
    assert not (tmp_path / "failure.json").exists()


@pytest.mark.parametrize("value", ["", "1"])
def test_no_color_means_no_color(value: str) -> None:
    """On a terminal, findings and errors are coloured unless NO_COLOR is set."""
    terminal, side = pty.openpty()
    env = {**os.environ, "NO_COLOR": value, "TERM": "xterm"}
    for verb in (["data", "check", "none"], ["run", "none.yaml"]):
        command = [sys.executable, "-m", "appliance", *verb]
        assert subprocess.run(command, env=env, stdout=side, stderr=side, timeout=60, check=False).returncode == 1
    os.close(side)
    said = os.read(terminal, 4096)
    os.close(terminal)
    assert said.count(b"error") >= 2
    assert (b"\x1b" in said) == (value == "")


def test_wrong_credentials_are_one_message(storage: Storage, project: Path) -> None:
    """The server's refusal names the bucket, what was refused and where credentials come from."""
    env = {**storage.environment, "AWS_SECRET_ACCESS_KEY": "wrong"}
    done = call("list", "--store", "s3://registry/x", cwd=project, env=env)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert "AWS_ACCESS_KEY_ID" in done.stderr
    assert "wrong" not in done.stderr


def test_a_run_interrupted_in_training_is_finished_by_the_same_command(project: Path, tmp_path: Path) -> None:
    """SIGINT gives exit 33 and one message; the same command then finishes and publishes once."""
    store = tmp_path / "store"
    env = {**os.environ, "APPLIANCE_STORE": f"file://{store}", "APPLIANCE_OUT": str(tmp_path / "out")}
    long = make_recipe(training={"epochs": 40}).model_dump(mode="json", exclude_none=True)
    (project / "long.yaml").write_text(yaml.safe_dump(long))
    command = [sys.executable, "-m", "appliance", "run", "long.yaml"]
    child = subprocess.Popen(command, cwd=project, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not any(
        f.stat().st_size for f in (tmp_path / "out").glob("*/training/metrics.jsonl")
    ):
        time.sleep(0.05)
    child.send_signal(signal.SIGINT)
    _, errors = child.communicate(timeout=120)
    assert child.returncode == 33, errors
    assert "Traceback" not in errors
    assert not list(store.glob("models/**/manifest.json")), "nothing half-made is visible"
    done = subprocess.run(command, cwd=project, env=env, capture_output=True, text=True, timeout=250, check=False)
    assert done.returncode in (0, 3), done.stderr
    assert "resuming from step" in done.stderr
    assert len(list(store.glob("models/**/manifest.json"))) == 1


ON_A_TERMINAL = (
    "import fcntl, os, sys, termios; os.setsid(); fcntl.ioctl(0, termios.TIOCSCTTY, 0); "
    "os.execv(sys.executable, [sys.executable, '-m', 'appliance', *sys.argv[1:]])"
)


@pytest.mark.parametrize("loaded", ["click.globals", "click.core", "click"])
def test_a_stop_before_anything_began_is_no_traceback(loaded: str, tmp_path: Path) -> None:
    """Ctrl-C while the command's own modules are loaded ends it as it ends any program."""
    child = subprocess.Popen(
        [sys.executable, "-X", "importtime", "-m", "appliance", "list", "--store", f"file://{tmp_path}"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    with child:
        for line in child.stderr or ():
            if line.rpartition("|")[2].strip() == loaded:
                child.send_signal(signal.SIGINT)
                break
        _, errors = child.communicate(timeout=60)
    assert "Traceback" not in errors
    assert child.returncode in (-signal.SIGINT, 33)


def test_a_closed_terminal_stops_a_run_like_sigterm(project: Path, tmp_path: Path) -> None:
    """The kernel's own SIGHUP, with output that goes nowhere from then on: a checkpoint, and exit 33."""
    out = tmp_path / "out"
    out.mkdir()
    env = {**os.environ, "APPLIANCE_OUT": str(out), "APPLIANCE_CACHE": str(tmp_path / "cache"), "TERM": "xterm"}
    long = make_recipe(training={"epochs": 100}).model_dump(mode="json", exclude_none=True)
    (project / "longer.yaml").write_text(yaml.safe_dump(long))
    terminal, side = pty.openpty()
    command = [sys.executable, "-c", ON_A_TERMINAL, "train", "longer.yaml"]
    child = subprocess.Popen(command, cwd=project, env=env, stdin=side, stdout=side, stderr=side)
    os.close(side)
    deadline = time.monotonic() + 120
    said = b""
    while time.monotonic() < deadline and not any(f.stat().st_size for f in out.glob("*/training/metrics.jsonl")):
        said += os.read(terminal, 4096) if select.select([terminal], [], [], 0.1)[0] else b""
    os.close(terminal)
    assert child.wait(timeout=120) == 33, said.decode(errors="replace")
    assert list(out.glob("*/training/checkpoints/checkpoint-*/sealed.json"))
    failure = json.loads((out / "failure.json").read_text())
    assert failure["exit_code"] == 33
    assert "run the same command to go on" in failure["message"]
