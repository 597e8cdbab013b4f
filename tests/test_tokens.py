"""Laws of the token cache: the rows are those without it, bit for bit; nothing stale or unchecked, never an error."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest
from families import FAMILIES, Family, write_family
from test_monitor import limit_file_size
from test_template import list_cases
from test_training import make_examples
from tiny import TEMPLATE, make_recipe, write_base, write_dataset, write_tokenizer

import appliance
from appliance import pipeline
from appliance.errors import TrainingError
from appliance.example import Example, Message
from appliance.model import ChatTemplate, fit_template, load_template
from appliance.preparation import Origin, Workspace, prepare
from appliance.recipe import Recipe
from appliance.run import open_run
from appliance.training import TokenCache, build_rows, prepare_rows
from appliance.training.tokens import build_key, digest_code, read_entry, write_entry

LIMITS: dict[str, Any] = {"max_length": 256, "overlong": "refuse"}


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> ChatTemplate:
    """The tiny tokenizer and its template."""
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder)
    return load_template(folder)


def fail(text: str) -> None:
    """No note is expected."""
    raise AssertionError(text)


def make_cache(folder: Path, note: Callable[[str], None] = fail) -> TokenCache:
    """A cache in `folder / tokens`."""
    return TokenCache(folder / "tokens", note=note)


def encode(rows: Any) -> bytes:
    """The bytes by which rows are compared."""
    return msgspec.json.encode(rows)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f.name)
def test_rows_are_the_same_with_and_without_the_cache(family: Family, tmp_path: Path) -> None:
    """First and second time, for every case of every family of templates; the child's file too."""
    bare, cache = load_template(write_family(tmp_path / "base", family)), make_cache(tmp_path)
    files = [tmp_path / "without.jsonl", tmp_path / "with.jsonl"]
    cases = [example for _name, example, _rows in list_cases(family)]
    for example in cases:
        template = fit_template(bare, [example])
        plain = build_rows([example] * 2, template=template, max_length=10**6)
        for _ in range(2):
            assert encode(build_rows([example] * 2, template=template, max_length=10**6, cache=cache)) == encode(plain)
        for file, kept in zip(files, (None, cache), strict=True):
            prepare_rows([example] * 2, template=template, max_length=10**6, file=file, cache=kept)
        assert files[0].read_bytes() == files[1].read_bytes()
    assert len(list(cache.folder.iterdir())) == len(cases)


def test_what_is_kept_is_what_is_read(template: ChatTemplate, tmp_path: Path) -> None:
    """The second time nothing is rendered: a sound entry is believed."""
    examples, cache = make_examples(4), make_cache(tmp_path)
    key = build_key(examples, template=template, **LIMITS)
    rows = build_rows(examples, template=template, cache=cache, **LIMITS)
    write_entry(cache, key, rows[:2])
    assert build_rows(examples, template=template, cache=cache, **LIMITS) == rows[:2]


def change(example: Example, **values: Any) -> list[Example]:
    """Four rows, the first one changed."""
    return [msgspec.structs.replace(example, **values), *make_examples(4)[1:]]


def test_each_thing_that_rows_depend_on_is_in_the_name(template: ChatTemplate, tmp_path: Path) -> None:
    """Rows, their order, limits, template, tokenizer and stop tokens: any change is another entry; a copy is not."""
    examples = make_examples(4)
    first = examples[0]
    write_tokenizer(tmp_path / "same")
    write_tokenizer(tmp_path / "text", template=TEMPLATE + "{# a remark #}")
    write_tokenizer(tmp_path / "eos", eos="<|end|>")
    for name in ("words", "tools"):
        write_tokenizer(tmp_path / name)
    words = tmp_path / "words" / "tokenizer.json"
    words.write_text(words.read_text() + " ")
    (tmp_path / "tools" / "additional_chat_templates").mkdir()
    (tmp_path / "tools" / "additional_chat_templates" / "tool_use.jinja").write_text(TEMPLATE + " ")
    keys = {
        "as it is": build_key(examples, template=template, **LIMITS),
        "id": build_key(change(first, id="r0b"), template=template, **LIMITS),
        "tools": build_key(change(first, tools="[]"), template=template, **LIMITS),
        "answer": build_key(
            change(first, messages=(first.messages[0], Message("assistant", "x"))), template=template, **LIMITS
        ),
        "order": build_key(examples[::-1], template=template, **LIMITS),
        "fewer": build_key(examples[:3], template=template, **LIMITS),
        "length": build_key(examples, template=template, max_length=255, overlong="refuse"),
        "no limit": build_key(examples, template=template, max_length=None, overlong="refuse"),
        "overlong": build_key(examples, template=template, max_length=256, overlong="drop"),
        "thinking": build_key(examples, template=replace(template, thinking="on"), **LIMITS),
        "switch": build_key(examples, template=replace(template, switch="thinking"), **LIMITS),
        "stops": build_key(examples, template=replace(template, stop_ids=frozenset({1})), **LIMITS),
        **{
            n: build_key(examples, template=load_template(tmp_path / n), **LIMITS)
            for n in ("text", "eos", "words", "tools")
        },
    }
    assert len(set(keys.values())) == len(keys), keys
    assert build_key(examples, template=load_template(tmp_path / "same"), **LIMITS) == keys["as it is"]


def test_a_changed_source_is_another_entry(tmp_path: Path) -> None:
    """One byte in any module, or one more module: nobody has to remember to count a version up."""
    package = tmp_path / "appliance"
    shutil.copytree(Path(appliance.__file__).parent, package, ignore=shutil.ignore_patterns("__pycache__"))
    seen = {digest_code(Path(appliance.__file__).parent), digest_code(package)}
    assert len(seen) == 1, "where the package lies does not matter"
    for name in ("model/mask.py", "model/environment.py", "training/rows.py", "example.py"):
        with (package / name).open("a") as stream:
            stream.write("#")
        digest_code.cache_clear()
        seen.add(digest_code(package))
    (package / "more.py").write_text("")
    digest_code.cache_clear()
    assert len(seen | {digest_code(package)}) == 6


def test_faults_are_never_kept(template: ChatTemplate, tmp_path: Path) -> None:
    """A broken mask, or a row that is too long, is found again every time, and leaves no entry."""
    cache = make_cache(tmp_path)
    mute = Example("mute", (Message("user", "a"), Message("assistant", "b<|im_end|>")), provenance="human")
    for rows, limit, said in (([*make_examples(3), mute], 256, "row mute"), (make_examples(3), 20, "nothing is cut")):
        for _ in range(2):
            with pytest.raises(TrainingError, match=said):
                build_rows(rows, template=template, max_length=limit, cache=cache)
    assert not cache.folder.exists()


def flip(file: Path) -> None:
    """One bit in the last number of the file."""
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(content)


def swap(file: Path) -> None:
    """A sound entry under the wrong name."""
    other = "0" * 64
    write_entry(TokenCache(file.parent, note=fail), other, [])
    (file.parent / f"{other}.rows").rename(file)


DAMAGES: dict[str, Callable[[Path], object]] = {
    "truncated": lambda f: os.truncate(f, f.stat().st_size // 2),
    "cut by a byte": lambda f: os.truncate(f, f.stat().st_size - 1),
    "empty": lambda f: f.write_bytes(b""),
    "grown": lambda f: f.write_bytes(f.read_bytes() + b"]"),
    "bit flip": flip,
    "not text": lambda f: f.write_bytes(os.urandom(100)),
    "of another name": swap,
    "a folder": lambda f: (f.unlink(), f.mkdir()),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_entry_is_no_entry(damage: str, template: ChatTemplate, tmp_path: Path) -> None:
    """The rows are rendered again, and the entry is whole again (a folder in its place is told and left alone)."""
    examples, notes = make_examples(4), list[str]()
    cache = make_cache(tmp_path, notes.append)
    rows = build_rows(examples, template=template, cache=cache, **LIMITS)
    key = build_key(examples, template=template, **LIMITS)
    DAMAGES[damage](cache.folder / f"{key}.rows")
    assert read_entry(cache, key) is None
    assert build_rows(examples, template=template, cache=cache, **LIMITS) == rows
    assert (read_entry(cache, key) == rows) == (notes == []) == (damage != "a folder")


def test_a_cache_that_cannot_be_written_is_a_note(template: ChatTemplate, tmp_path: Path) -> None:
    """A file where the folder should be, a full disk: the same rows, one note each, no torn entry."""
    examples, notes = make_examples(4), list[str]()
    rows = build_rows(examples, template=template, **LIMITS)
    (tmp_path / "file").write_text("")
    blocked = TokenCache(tmp_path / "file" / "tokens", note=notes.append)
    assert build_rows(examples, template=template, cache=blocked, **LIMITS) == rows
    full = make_cache(tmp_path, notes.append)
    with limit_file_size(100):
        assert build_rows(examples, template=template, cache=full, **LIMITS) == rows
    assert len(notes) == 2
    assert all("the run goes on" in n for n in notes)
    assert list(full.folder.iterdir()) == []


def test_writers_side_by_side_do_not_disturb_each_other(template: ChatTemplate, tmp_path: Path) -> None:
    """Threads stand for containers with equal process ids: even their temporary names are the same."""
    examples = make_examples(40)
    rows = build_rows(examples, template=template, **LIMITS)
    key = build_key(examples, template=template, **LIMITS)
    cache = make_cache(tmp_path, lambda _note: None)

    def work(_number: int) -> Any:
        write_entry(cache, key, rows)
        return build_rows(examples, template=template, cache=cache, **LIMITS)

    with ThreadPoolExecutor(8) as pool:
        assert all(found == rows for found in pool.map(work, range(64)))
    write_entry(make_cache(tmp_path), key, rows)
    assert read_entry(cache, key) == rows


def test_old_entries_go_and_used_ones_stay(template: ChatTemplate, tmp_path: Path) -> None:
    """The newest used stay up to the limit; what a killed writer left goes after an hour, not before."""
    rows = build_rows(make_examples(4), template=template, **LIMITS)
    big = make_cache(tmp_path)
    first, second, third, last = (c * 64 for c in "abcd")
    for age, key in ((500, first), (400, second), (300, third)):
        write_entry(big, key, rows)
        os.utime(big.folder / f"{key}.rows", times=(time.time() - age,) * 2)
    theirs = ("notes.tmp", "archive.rows")
    for age, name in ((7200, f".{first}.rows.0fa.tmp"), (10, f".{first}.rows.2.tmp"), *((9999, n) for n in theirs)):
        (big.folder / name).write_bytes(b"x")
        os.utime(big.folder / name, times=(time.time() - age,) * 2)
    assert read_entry(big, first) == rows, "a use makes it new"
    size = (big.folder / f"{first}.rows").stat().st_size
    write_entry(replace(big, most_bytes=2 * size + size // 2), last, rows)
    left = sorted(f.name for f in big.folder.iterdir())
    assert left == sorted([f".{first}.rows.2.tmp", f"{first}.rows", f"{last}.rows", *theirs]), "and what is not ours"


def test_two_runs_share_what_is_the_same_for_both(tmp_path: Path) -> None:
    """Another learning rate renders nothing anew; another length does; each run has the rows it would have alone."""
    write_base(tmp_path / "base")
    write_dataset(tmp_path / "datasets" / "colours")
    notes: list[str] = []
    workspace = Workspace(tmp_path, tmp_path / "cache", tmp_path / "runs", note=notes.append)
    recipes = [make_recipe(), make_recipe(training={"learning_rate": 0.02}), make_recipe(training={"max_length": 128})]
    files, kept = [], []
    for recipe in recipes:
        files.append(prepare_run(recipe, workspace))
        kept.append(len(list((tmp_path / "cache" / "tokens").iterdir())))
    assert kept == [3, 3, 6]
    assert files[0] == files[1] == files[2]
    assert not any("not kept" in n for n in notes)


def prepare_run(recipe: Recipe, workspace: Workspace) -> bytes:
    """The training rows that a run of this recipe prepares."""
    prepared = prepare(recipe, workspace=workspace)
    run = open_run(workspace.runs, name=recipe.name, key=prepared.key)
    pipeline._prepare_stage(run, prepared, workspace=workspace, origin=Origin(None, "2026-01-31T12:00:00Z", "me"))
    return (run.training / "train.rows.jsonl").read_bytes()
