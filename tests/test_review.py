"""Laws of a pull request's report: rows not lines, cost from the team's own file, one comment, nothing rendered."""

from __future__ import annotations

import base64
import gzip
import json
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import date
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from tiny import make_recipe, write_base, write_dataset

from appliance.changes import diff_revisions
from appliance.cli import main
from appliance.cli.changes import describe_diff
from appliance.cli.common import find_root
from appliance.cli.prices import Prices, describe_cost, describe_guess, describe_unknown, guess_hours, load_prices
from appliance.cli.sections import Section, render_sections
from appliance.data import Pointer, check_pushed, diff_folders, pull_data, run_dvc, select_side
from appliance.desired import read_commit
from appliance.errors import CommandError, DatasetError, RecipeError
from appliance.example import decode_examples
from appliance.model.shapes import read_sizes, read_weight_shapes
from appliance.recipe import SplitSection
from appliance.reconcile import plan_from_git
from appliance.training.utilisation import count_matrices

SCRIPT = Path(__file__).parent.parent / ".github" / "scripts" / "comment.py"
HEAD = "b" * 40


def edit_rows(folder: Path, edit: Any) -> Path:
    """Apply `edit` to the list of rows."""
    file = folder / "rows.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    file.write_text("".join(json.dumps(r) + "\n" for r in edit(rows)))
    return folder


def test_a_diff_tells_rows_whatever_happens_to_lines(tmp_path: Path) -> None:
    """Order means nothing; an id finds its row, a content its new id; each with place, fields and side."""
    before = write_dataset(tmp_path / "before", rows=40)
    after = write_dataset(tmp_path / "after" / "colours", rows=42)

    def edit(rows: list[Any]) -> list[Any]:
        rows[3]["messages"][1]["content"] = "red"
        rows[4]["category"] = "x"
        rows[5]["id"] = "another"
        return list(reversed([r for i, r in enumerate(rows) if i != 6]))

    split = SplitSection(validation=0.1, test=0.3)
    diff = diff_folders(before, edit_rows(after, edit), split=split)
    told = {(c.kind, c.id): c for c in diff.changes}
    assert set(told) == {
        ("added", "r40"), ("added", "r41"), ("edited", "r3"), ("edited", "r4"),
        ("renamed", "another"), ("removed", "r6"),
    }  # fmt: skip
    assert told["edited", "r3"].fields == ("answer",)
    assert told["edited", "r4"].fields == ("category",)
    assert told["edited", "r3"].where == "rows.jsonl:38"
    assert sum(new for _, new in diff.sides.values()) == 41
    assert diff.categories == {"-": (40, 40), "x": (0, 1)}
    (section,) = describe_diff(diff, revisions="A..B", limit=2)
    assert len(section.rows) == 2
    assert "2 added, 2 edited, 1 removed, 1 renamed" in section.lines
    assert any("4 more rows" in line for line in section.lines)
    assert diff_folders(before, before, split=split).changes == ()


@pytest.mark.parametrize(("side", "word"), [("before", "added"), ("after", "removed")])
def test_a_dataset_that_cannot_be_read_is_told_and_not_taken_for_an_empty_one(
    tmp_path: Path, side: str, word: str
) -> None:
    """Without its card, or with a broken one, all rows seem new or gone, and the diff says why."""
    for name in ("before", "after"):
        write_dataset(tmp_path / name / "colours", rows=20)
    card, age = tmp_path / side / "colours" / "dataset.yaml", "earlier" if side == "before" else "later"
    folders = tmp_path / "before" / "colours", tmp_path / "after" / "colours"
    assert diff_folders(*folders, split=SplitSection()).notes == ()
    for break_card in (lambda: card.write_text("name: x\ncontrct: 1\n"), card.unlink):
        break_card()
        diff = diff_folders(*folders, split=SplitSection())
        assert diff.count(word) == 20  # type: ignore[arg-type]
        (section,) = describe_diff(diff, revisions="HEAD~1..", limit=2)
        assert section.lines[0].startswith(f"all rows count as {word}: the {age} ones cannot be read: ")
        assert "dataset.yaml" in section.lines[0]
        assert diff.to_json()["notes"] == [section.lines[0]]
    assert diff_folders(tmp_path / "none", folders[side == "before"], split=SplitSection()).notes == ()


def test_a_trained_row_that_moves_to_the_test_is_told_first(tmp_path: Path) -> None:
    """An edited prompt may change its side: then the new test flatters the older versions."""
    before = write_dataset(tmp_path / "before", rows=40)
    after = write_dataset(tmp_path / "after", rows=40)
    split = SplitSection(validation=0.0, test=0.3)
    examples = decode_examples((before / "rows.jsonl").read_bytes())
    victim = next(i for i, e in enumerate(examples) if select_side(e.group_key, split) == "train")
    text = next(t for t in (f"moved {n}" for n in range(99)) if select_side(f"prompt:{t}", split) == "test")

    def edit(rows: list[Any]) -> list[Any]:
        rows[victim]["messages"][0]["content"] = text
        rows.insert(
            0, {**rows[0], "id": "first", "messages": [{"role": "user", "content": "n"}, rows[0]["messages"][1]]}
        )
        return rows

    diff = diff_folders(before, edit_rows(after, edit), split=split)
    (section,) = describe_diff(diff, revisions="A..B", limit=1)
    assert section.rows[0][1] == f"r{victim}"
    assert section.rows[0][4] == "train -> test"
    assert any("1 rows that were trained on are in the test now" in line for line in section.lines)


def run_in(root: Path, *commands: list[str]) -> None:
    """Run programs in a repository."""
    for command in commands:
        subprocess.run(command, cwd=root, check=True)


def start_repository(root: Path) -> None:
    """A Git and DVC repository with a dataset of 40 rows; nothing is committed."""
    write_dataset(root / "datasets" / "colours", rows=40)
    (root / "recipes").mkdir()
    run_in(
        root,
        ["git", "init", "--quiet", "--initial-branch", "main"],
        ["git", "config", "user.name", "t"],
        ["git", "config", "user.email", "t@t"],
        [sys.executable, "-m", "dvc", "init", "--quiet"],
        [sys.executable, "-m", "dvc", "add", "--quiet", "datasets"],
    )


def commit_split(root: Path, **split: Any) -> None:
    """Commit a recipe that divides the rows in this way."""
    recipe = make_recipe().model_dump(mode="json", exclude_none=True)
    recipe["dataset"]["split"] = split
    (root / "recipes" / "colours.yaml").write_text(json.dumps(recipe))
    run_in(root, ["git", "add", "--all"], ["git", "commit", "--quiet", "--message", "split"])


def test_a_new_salt_is_told_by_the_rows_that_it_moves(tmp_path: Path) -> None:
    """Rotating the test set changes no row: who was trained on and is in the test now is told by the older split."""
    root = tmp_path / "repository"
    start_repository(root)
    commit_split(root, salt="one", test=0.3)
    commit_split(root, salt="two", test=0.3)
    examples = decode_examples((root / "datasets" / "colours" / "rows.jsonl").read_bytes())
    before, after = (SplitSection(salt=salt, test=0.3) for salt in ("one", "two"))
    sides = [(e.id, select_side(e.group_key, before), select_side(e.group_key, after)) for e in examples]
    for revisions in (("HEAD~1", None), ("HEAD~1", "HEAD")):
        (diff,) = diff_revisions(root, *revisions)
        assert [(c.id, c.before, c.after) for c in diff.changes] == [s for s in sides if s[1] != s[2]]
        assert {c.kind for c in diff.changes} == {"moved"}
        leaks = sum(a != "test" and b == "test" for _, a, b in sides)
        assert leaks
        assert any(
            f"{leaks} rows that were trained on are in the test now" in line
            for line in describe_diff(diff, revisions="A..B", limit=1)[0].lines
        )
    (same,) = diff_revisions(root, "HEAD", None)
    assert same.changes == ()
    with pytest.raises(DatasetError, match="start in the repository's root"):
        diff_revisions(root / "recipes", "HEAD~1", "HEAD")


def test_a_broken_recipe_moves_no_row(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Where nobody can tell the new split, the old one counts and that is said; every form of a range that Git has."""
    root = tmp_path / "repository"
    start_repository(root)
    commit_split(root, salt="one", test=0.4)
    recipe = root / "recipes" / "colours.yaml"
    recipe.write_text(recipe.read_text().replace("effective_batch", "efective_batch"))
    (diff,) = diff_revisions(root, "HEAD", None)
    assert diff.changes == ()
    assert len({*diff.sides["test"]}) == 1
    told = "no recipe that can be read tells its split now: counted by the earlier one"
    assert told in describe_diff(diff, revisions="HEAD..", limit=1)[0].lines
    run_in(root, ["git", "checkout", "--quiet", "-b", "branch"])
    commit_split(root, salt="two", test=0.4)
    run_in(root, ["git", "checkout", "--quiet", "main"])
    commit_split(root, salt="three", test=0.4)
    run_in(root, ["git", "checkout", "--quiet", "branch"])
    said = {}
    for revisions in (["main...HEAD"], ["main..."], ["HEAD~1..HEAD"], ["HEAD~1"], ["main..HEAD"], []):
        assert main(["data", "diff", *revisions, "--root", str(root), "--json"]) == 0
        said["".join(revisions)] = capfd.readouterr().out
    assert said.pop("main..HEAD") not in said.values()
    assert len(set(said.values())) == 1, said
    assert main(["data", "diff", "nowhere...HEAD", "--root", str(root)]) == 1
    assert "nowhere...HEAD: no common commit of these two" in " ".join(capfd.readouterr().err.split())


def test_rows_that_no_commit_can_hold_fail_the_plan(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """A review is red where the reconcile would refuse: rows outside of the repository, or behind a link."""
    root = tmp_path / "repository"
    start_repository(root)
    commit_split(root, test=0.4)
    write_dataset(tmp_path / "outside")
    (root / "link").symlink_to(tmp_path)
    recipe = root / "recipes" / "colours.yaml"
    values = json.loads(recipe.read_text())
    for path, told in {
        str(tmp_path / "outside"): "outside: outside of the repository; bring it here",
        "../outside": "outside: outside of the repository; bring it here",
        "link/outside": "link/outside: behind a symbolic link",
    }.items():
        recipe.write_text(json.dumps(values | {"dataset": {"path": path}}))
        (planned,) = plan_from_git(root)
        assert (planned.action, told in planned.reason) == ("failed", True), planned.reason
    assert main(["review", "--root", str(root)]) == 1
    assert "behind a symbolic link" in capfd.readouterr().out


def test_a_folder_without_a_commit_is_told_by_what_it_lacks(tmp_path: Path) -> None:
    """A repository without its first commit asks for that, another folder for a repository; in no words of Git's."""
    with pytest.raises(CommandError) as outside:
        read_commit(tmp_path, actor="x")
    assert str(outside.value) == (
        f"{tmp_path}: not a Git repository; start in the team's repository, or name it with --root; "
        "`appliance init` makes one"
    )
    run_in(tmp_path, ["git", "init", "--quiet"])
    with pytest.raises(CommandError) as begun:
        read_commit(tmp_path, actor="x")
    assert str(begun.value) == f"{tmp_path}: the Git repository has no commit yet; `git add --all && git commit`"


def test_a_stop_is_never_a_finding(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """SIGTERM at any step of a review ends it with 33: it is no fault of the data, and nothing is reported."""
    root = tmp_path / "repository"
    start_repository(root)
    remote = ["remote", "add", "--quiet", "--default", "origin", str(tmp_path / "remote")]
    run_in(root, [sys.executable, "-m", "dvc", *remote], [sys.executable, "-m", "dvc", "push", "--quiet"])
    commit_split(root, salt="one", test=0.4)
    commit_split(root, salt="two", test=0.4)
    for step in ("plan_from_git", "load_pointer", "check_pushed", "diff_revisions", "load_prices", "prepare"):
        with monkeypatch.context() as patch:
            patch.setattr(f"appliance.cli.review.{step}", lambda *_args, **_more: signal.raise_signal(signal.SIGTERM))
            assert main(["review", "--root", str(root), "--since", "HEAD~1", "--cache", str(tmp_path / "cache")]) == 33
        said = capfd.readouterr()
        assert "stopped by SIGTERM" in said.err, step
        assert not said.out, step


def test_without_dvc_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever way Python says that it has no such module."""
    root = tmp_path / "repository"
    write_dataset(root / "datasets" / "colours")
    bare = tmp_path / "python"
    pointer = Pointer(root / "datasets.dvc", "datasets", "0" * 32 + ".dir", size=1, nfiles=1)
    monkeypatch.setattr(sys, "executable", str(bare))
    for words in ("No module named dvc", "ModuleNotFoundError: No module named 'dvc'"):
        bare.write_text(f'#!/bin/sh\necho "{words}" >&2\nexit 1\n')
        bare.chmod(0o755)
        with pytest.raises(DatasetError, match="install the appliance's extra 'data'"):
            pull_data(pointer, root=root)
        with pytest.raises(DatasetError, match="install the appliance's extra 'data'"):
            check_pushed(pointer, root=root)
        with pytest.raises(DatasetError, match="dvc cache failed: dvc is not installed"):
            run_dvc("cache", "dir", subject=pointer.file, cwd=root)


def test_a_folder_below_is_of_its_repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As Git and DVC do, unless --root says otherwise; a folder with recipes or data of its own is not left."""
    root = tmp_path / "repository"
    start_repository(root)
    commit_split(root, test=0.4)
    own = root / "own"
    (own / "recipes").mkdir(parents=True)
    for here in (root, root / "recipes", root / "datasets" / "colours"):
        monkeypatch.chdir(here)
        assert find_root(Path()).resolve() == root
        assert main(["data", "diff", "HEAD..HEAD"]) == 0
        assert main(["data", "diff", "HEAD..HEAD", "--root", "."]) == (here != root)
    for here in (own, tmp_path):
        monkeypatch.chdir(here)
        assert find_root(Path()) == Path()


def test_what_is_left_out_is_had_by_the_command_that_is_named(tmp_path: Path) -> None:
    """The rest of the rows: by the range that was compared, not by a command that does something else."""
    before = write_dataset(tmp_path / "before", rows=4)
    diff = diff_folders(before, write_dataset(tmp_path / "after", rows=9), split=SplitSection())
    (section,) = describe_diff(diff, revisions="origin/main..", limit=2)
    assert "... 3 more rows: `appliance data diff origin/main..`" in section.lines


def test_a_price_is_the_teams_and_has_a_day_and_a_source(tmp_path: Path) -> None:
    """Without the file, hours only; without a version, not even hours; a broken file is an error."""
    assert load_prices(tmp_path) is None
    assert describe_cost(1.5, devices=1, prices=None) == "about 1.50 hours"
    assert describe_cost(0.3, devices=1, prices=None) == "about 18 minutes"
    assert describe_cost(0.01, devices=2, prices=None) == "about 1 minute on 2 GPUs"
    assert describe_unknown(None) == (
        "hours unknown until this model has a version, or prices.yaml names the GPU that trains it"
    )
    file = tmp_path / "prices.yaml"
    file.write_text("as_of: 2026-01-31\nsource: our contract\ncurrency: EUR\ngpu_hour: 2\n")
    assert describe_cost(1.5, devices=1, prices=load_prices(tmp_path)) == (
        "about 1.50 hours, 3.00 EUR (2 an hour, our contract, 2026-01-31)"
    )
    assert describe_cost(1.5, devices=4, prices=load_prices(tmp_path)) == (
        "about 1.50 hours on 4 GPUs, 12.00 EUR (2 an hour, our contract, 2026-01-31)"
    )
    file.write_text("gpu_hour: 2\n")
    with pytest.raises(RecipeError, match=r"prices\.yaml: expected as_of"):
        load_prices(tmp_path)
    file.write_text("# as_of: later\n")
    assert load_prices(tmp_path) is None


def test_hours_are_a_range_where_nothing_was_measured(tmp_path: Path) -> None:
    """4 FLOPs a weight and token (6 where all are trained) over half to a tenth of the peak; nothing for other GPUs."""
    base = write_base(tmp_path / "base")
    weights = count_matrices(read_weight_shapes(base), read_sizes(base))
    assert weights
    prices = Prices(as_of=date(2026, 1, 31), source="x", currency="EUR", gpu_hour=2, gpu="NVIDIA H200")
    lora, full, two = make_recipe(), make_recipe(method={"type": "full"}), make_recipe(needs={"devices": 2})
    seconds = 4 * weights * 1e15 / 989e12
    for recipe, factor in ((lora, 1.0), (full, 1.5), (two, 0.5)):
        hours = guess_hours(recipe, base=base, tokens=10**15, gpu=prices.gpu)
        assert hours == pytest.approx((factor * seconds / 0.5 / 3600, factor * seconds / 0.1 / 3600))
    assert describe_guess((0.5, 2.5), devices=2, gpu=prices.gpu, prices=prices) == (
        "about 0.50 to 2.50 hours on 2 GPUs (at 50% to 10% of the peak of NVIDIA H200), "
        "2.00 to 10.00 EUR (2 an hour, x, 2026-01-31)"
    )
    fp32 = make_recipe(training={"precision": "fp32"})
    other = prices.model_copy(update={"gpu": "NVIDIA A10G"})
    for recipe, gpu in ((lora, ""), (lora, other.gpu), (fp32, prices.gpu)):
        assert guess_hours(recipe, base=base, tokens=1, gpu=gpu) is None
    assert "not NVIDIA A10G" in describe_unknown(other)


def test_nothing_of_a_dataset_is_rendered_in_a_summary() -> None:
    """Tables stay tables, and tags, mentions and links stay text."""
    text = render_sections([Section("T", ("A",), (("<img src=x>|@team `x`\n[a](http://b)",),))])
    assert "| `<img src=x>\\|@team 'x'`<br>`[a](http://b)` |" in text


BOT = {"login": "github-actions[bot]"}


@dataclass
class Api:
    """The part of the API that the script uses, over a pull request with comments."""

    url: str = ""
    log: str = ""
    hangs_up: bool = False
    comments: list[dict[str, Any]] = field(default_factory=list)
    calls: list[tuple[str, str, bool]] = field(default_factory=list)

    def answer(self, method: str, path: str, body: dict[str, Any]) -> tuple[int, Any]:
        """Status and content of one call; a status of 302 redirects to the content."""
        root = "/repos/team/models"
        if path.startswith(f"{root}/actions/runs/7/jobs"):
            return 200, {"jobs": [{"id": 70}]}
        if path == f"{root}/actions/jobs/70/logs":
            return 302, f"{self.url}/elsewhere"
        if path == "/elsewhere":
            return 200, self.log
        if path.startswith(f"{root}/pulls?"):
            assert "head=stranger%3Atopic" in path
            return 200, [{"number": 5, "head": {"sha": HEAD}}]
        if method == "GET" and path.startswith(f"{root}/issues/5/comments"):
            page = int(path.rpartition("=")[2])
            return 200, self.comments[(page - 1) * 100 : page * 100]
        if method == "POST" and path == f"{root}/issues/5/comments":
            self.comments.append({"id": len(self.comments), "user": BOT, **body})
            return 201, {}
        if method == "PATCH" and path.startswith(f"{root}/issues/comments/"):
            self.comments[int(path.rpartition("/")[2])]["body"] = body["body"]
            return 200, {}
        return 404, {}


@pytest.fixture
def api() -> Iterator[Api]:
    """A server on this machine."""
    fake = Api()

    class Answers(BaseHTTPRequestHandler):
        def answer(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers.get("Content-Length") or 0)) or b"{}")
            fake.calls.append((self.command, self.path, "Authorization" in self.headers))
            status, content = fake.answer(self.command, self.path, body)
            self.send_response(status)
            if status == 302:
                self.send_header("Location", content)
            data = content.encode() if isinstance(content, str) else json.dumps(content).encode()
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data[:1] if fake.hangs_up else data)

        do_GET = do_POST = do_PATCH = answer  # noqa: N815 - the names that http.server calls

        def log_message(self, *_: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Answers) as server:
        fake.url = f"http://127.0.0.1:{server.server_port}"
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield fake
        server.shutdown()


def encode_report(report: Any) -> str:
    """A log as GitHub serves it, with the report as `validate` writes it."""
    text = base64.b64encode(gzip.compress(json.dumps(report).encode())).decode()
    lines = [text[i : i + 100] for i in range(0, len(text), 100)]
    return "".join(f"2026-01-31T12:00:00.0000000Z appliance-report: {line}\r\n" for line in lines)


def post(api: Api, **overrides: str) -> subprocess.CompletedProcess[str]:
    """Run the script as `report.yml` does."""
    env = {
        "GITHUB_API_URL": api.url, "GITHUB_TOKEN": "t", "GITHUB_REPOSITORY": "team/models", "RUN_ID": "7",
        "RUN_URL": "https://example.com/run", "HEAD_SHA": HEAD, "HEAD_OWNER": "stranger", "HEAD_BRANCH": "topic",
    }  # fmt: skip
    return subprocess.run(
        [sys.executable, "-I", str(SCRIPT)],
        env=env | overrides,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_one_comment_is_updated_in_place(api: Api) -> None:
    """Found by marker and author beyond the first page; somebody's copy of the marker is left alone.

    GitHub's schema allows a comment whose author or text is null.
    """
    marker = "<!-- appliance-report -->"
    api.comments += [{"id": i, "user": {"login": "x"}, "body": f"{marker} mine"} for i in range(118)]
    api.comments += [{"id": 118, "user": None, "body": marker}, {"id": 119, "user": BOT, "body": None}]
    api.log = encode_report({"sections": [{"title": "Plan", "columns": ["Recipe"], "rows": [["colours"]]}]})
    first = post(api)
    assert (first.returncode, first.stdout) == (0, "comment on #5 made\n"), first.stderr
    assert "| `colours` |" in api.comments[120]["body"]
    api.log = encode_report({"sections": [{"title": "Plan", "lines": ["nothing to do"]}]})
    assert post(api).stdout == "comment on #5 updated\n"
    assert len(api.comments) == 121
    assert "- `nothing to do`" in api.comments[120]["body"]
    assert all(c["body"] == f"{marker} mine" for c in api.comments[:118])
    assert [c["body"] for c in api.comments[118:120]] == [marker, None]
    assert {sent for _, path, sent in api.calls if path == "/elsewhere"} == {False}, "the token stays with the API"
    assert all(sent for _, path, sent in api.calls if path != "/elsewhere")


BOMB = base64.b64encode(gzip.compress(b'{"a": "' + b"x" * (64 << 20) + b'"}')).decode()


@pytest.mark.parametrize(
    "log",
    [
        "no report at all",
        "appliance-report: !!!!",
        "appliance-report: QUJD",
        encode_report([1, 2]),
        encode_report({"sections": 5}),
        encode_report({"sections": [{"rows": 5, "columns": ["x"], "title": None}]}),
        f"appliance-report: {BOMB}",
    ],
    ids=["none", "no base64", "no gzip", "a list", "a number", "odd types", "a bomb"],
)
def test_a_broken_report_is_said_and_nothing_else(api: Api, log: str) -> None:
    """What comes from a pull request cannot make the job with the token fail in a way of its own."""
    api.log = log
    assert post(api).returncode == 0
    assert "The run left no report" in api.comments[0]["body"]


def test_a_report_is_text_however_it_tries(api: Api) -> None:
    """Mentions, images, tags and fences stay code, and a long report is cut at the limit."""
    evil = "` @team ![x](http://evil/?) <img src=http://evil> | ```\n\n# Approved"
    api.log = encode_report(
        {"sections": [{"title": evil, "columns": ["a"], "rows": [[evil]] * 90, "lines": [evil] * 90}] * 20}
    )
    assert post(api).returncode == 0
    body = api.comments[0]["body"]
    assert len(body) <= 65_536
    for line in body.splitlines()[4:]:
        outside = "".join(line.split("`")[::2])
        assert not set(outside) & set("@!<[#") - set("<#") or outside.startswith("### "), line
        assert "Approved" not in outside
        assert "img" not in outside


def test_an_outdated_run_says_nothing(api: Api) -> None:
    """A newer commit of the branch has a run of its own."""
    done = post(api, HEAD_SHA="c" * 40)
    assert (done.returncode, api.comments) == (0, [])
    assert "nothing to say" in done.stdout


def test_a_refusal_of_the_api_is_one_line(api: Api) -> None:
    """A token without the right: status and address, no traceback."""
    done = post(api, GITHUB_REPOSITORY="team/other")
    assert done.returncode == 1
    assert done.stderr.startswith("error: http://127.0.0.1")
    assert "HTTP 404" in done.stderr


def test_an_api_that_does_not_answer_is_one_line(api: Api) -> None:
    """Nobody listens, or the connection ends in the middle of an answer: what to do, no traceback."""
    api.hangs_up = True
    for url in ("http://127.0.0.1:9", api.url):
        done = post(api, GITHUB_API_URL=url)
        assert done.returncode == 1
        assert done.stderr.startswith("error: no answer from the API: ")
        assert done.stderr.endswith("run this job again\n")
        assert done.stderr.count("\n") == 1
