"""The registry: complete or invisible, immutable, verified on both ways, and safe between writers."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
from click.testing import CliRunner

from appliance import registry
from appliance.cli import main
from appliance.cli.promote import command as promote_command
from appliance.digest import canonical_json, digest_bytes, digest_file, list_files
from appliance.errors import ApplianceError, PreconditionFailedError, RegistryError, StoreError
from appliance.manifest import FileEntry, Manifest, decode_manifest
from appliance.recipe import Recipe
from appliance.registry.layout import MANIFEST, blob_key, manifest_key, ref_key
from appliance.store import Store, StoredObject, open_store
from appliance.store.s3 import S3Store

AT = "2026-01-31T12:00:00Z"
RELEASED = Path(__file__).parent / "fixtures" / "manifests"


def make_folder(folder: Path, text: str = "weights") -> Path:
    """An adapter folder of three files, one below a folder."""
    (folder / "card").mkdir(parents=True, exist_ok=True)
    (folder / "adapter.safetensors").write_bytes(text.encode() * 1000)
    (folder / "adapter_config.json").write_bytes(b"{}")
    (folder / "card" / "card.md").write_bytes(f"# {text}".encode())
    return folder


def make_manifest(folder: Path, **overrides: Any) -> Manifest:
    """The manifest of a folder; keyword arguments replace fields."""
    files = tuple(
        FileEntry(path=n, size=(folder / n).stat().st_size, sha256=digest_file(folder / n)) for n in list_files(folder)
    )
    facts: dict[str, Any] = {
        "schema": 1,
        "name": "demo",
        "kind": "adapter",
        "run_key": digest_bytes(b"run"),
        "created_at": AT,
        "git_commit": "a" * 40,
        "files": files,
        "recipe": {},
        "recipe_digest": digest_bytes(b"recipe"),
        "data_digest": digest_bytes(b"data"),
        "split_digest": digest_bytes(b"split"),
        "base": {"model": "tiny"},
        "verdict": "ship",
        "metrics": {},
        "training": {},
        "versions": {},
    }
    return Manifest(**(facts | overrides))


def publish_new(store: Store, folder: Path, text: str = "weights", **overrides: Any) -> str:
    """Publish a version of its own content; the version."""
    made = make_folder(folder / digest_bytes(text.encode())[:8], text)
    return registry.publish(store, manifest=make_manifest(made, **overrides), folder=made)


def promote(store: Store, version: str, alias: str = "production", **overrides: Any) -> registry.AliasMove:
    """Promote a version of `demo`."""
    facts: dict[str, Any] = {"name": "demo", "actor": "ci", "reason": "verdict ship", "at": AT}
    return registry.promote(store, version=version, alias=alias, **(facts | overrides))


def read_history(store: Store, alias: str = "production") -> list[registry.AliasMove]:
    """Every move of an alias of `demo`, newest first."""
    return list(registry.follow_alias(store, "demo", alias))


def snapshot(store: Store) -> dict[str, bytes]:
    """Every key and its bytes."""
    return {o.key: store.get(o.key)[0] for o in store.list("")}


@pytest.mark.parametrize("file", sorted(RELEASED.glob("*.json")), ids=lambda f: f.stem)
def test_a_manifest_that_was_ever_published_is_read_for_ever(file: Path) -> None:
    """Its version is that of its bytes, its recipe still a recipe, and the same one: none is ever removed from here.

    A recipe whose digest changed with a release is trained anew everywhere, for nothing.
    """
    content = file.read_bytes()
    manifest = decode_manifest(content, source=str(file))
    assert manifest.encode() == content
    assert manifest.version == file.stem
    assert Recipe.model_validate(manifest.recipe).digest == manifest.recipe_digest


def test_a_published_version_comes_back_byte_for_byte_under_every_name(store: Store, tmp_path: Path) -> None:
    """By version, by alias and by bare name; the manifest lies beside the files."""
    version = publish_new(store, tmp_path)
    promote(store, version)
    for number, reference in enumerate([f"demo@{version}", "demo@production", "demo"]):
        manifest = registry.pull(store, reference, tmp_path / f"out{number}")
        assert registry.resolve(store, reference) == (version, manifest)
        registry.verify_folder(tmp_path / f"out{number}", manifest)
        assert digest_file(tmp_path / f"out{number}" / "manifest.json").startswith(version[-12:])
    assert list_files(tmp_path / "out0") == [
        "adapter.safetensors",
        "adapter_config.json",
        "card/card.md",
        "manifest.json",
    ]
    assert (tmp_path / "out0").stat().st_mode & 0o777 == 0o755
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]


def test_publishing_twice_is_publishing_once(store: Store, tmp_path: Path) -> None:
    """The second call changes no byte of the store and gives the same version."""
    version = publish_new(store, tmp_path)
    before = snapshot(store)
    assert publish_new(store, tmp_path) == version
    assert snapshot(store) == before


def test_the_layout_is_the_documented_one(store: Store, tmp_path: Path) -> None:
    """Other programs may rely on these keys."""
    version = publish_new(store, tmp_path)
    move = promote(store, version)
    keys = [o.key for o in store.list("")]
    blobs = sorted(
        f"blobs/sha256/{e.sha256[:2]}/{e.sha256}" for e in registry.load_manifest(store, "demo", version).files
    )
    entry = digest_bytes(move.encode())[:12]
    assert keys == [
        "FORMAT.json",
        *blobs,
        f"models/demo/reflog/00000001-{entry}.json",
        "models/demo/refs/production.json",
        f"models/demo/versions/{version}/manifest.json",
    ]
    assert b'"vid":' in move.encode()


def test_versions_are_listed_oldest_first_with_aliases_and_found_by_run_key(store: Store, tmp_path: Path) -> None:
    """The listing is the truth that reconcile compares with."""
    newer = publish_new(store, tmp_path, "b", created_at="2026-02-01T00:00:00Z", run_key=digest_bytes(b"2"))
    older = publish_new(store, tmp_path, "a", verdict="hold")
    publish_new(store, tmp_path, "c", name="another")
    promote(store, newer)
    promote(store, newer, "staging")
    listed = registry.list_versions(store, "demo")
    assert [(v.version, v.aliases, v.verdict) for v in listed] == [
        (older, (), "hold"),
        (newer, ("production", "staging"), "ship"),
    ]
    assert [v.name for v in registry.list_versions(store)] == ["another", "demo", "demo"]
    assert registry.list_versions(store, "unknown") == ()
    assert registry.find_run(store, "demo", digest_bytes(b"2")) == newer
    assert registry.find_run(store, "demo", digest_bytes(b"3")) is None
    assert registry.find_run(store, "unknown", digest_bytes(b"2")) is None


@pytest.mark.parametrize("first", ["one", "other"])
def test_of_one_commits_versions_the_last_one_is_the_newest(tmp_path: Path, first: str) -> None:
    """What --force made again is newer than what it repeats, whatever their digests: when listed, chosen, collected."""
    store, made = open_store((tmp_path / "store").as_uri()), []
    for hours, text in enumerate([first, "other" if first == "one" else "one"]):
        made.append(publish_new(store, tmp_path, text))
        written = time.time() - 86_400 + 3600 * hours
        os.utime(tmp_path / "store" / manifest_key("demo", made[-1]), (written, written))
    assert [v.version for v in registry.list_versions(store)] == made
    assert registry.find_run(store, "demo", digest_bytes(b"run")) == made[-1]
    with pytest.raises(RegistryError, match=f"the newest version is {made[-1]}"):
        registry.resolve(store, "demo@nowhere")
    found = registry.look_for_garbage(store, now=time.time() + 30 * 86_400, keep_versions=1)
    assert [g.key for g in found.planned if g.kind == "version"] == [manifest_key("demo", made[0])]


def test_a_stray_object_stops_nobody(store: Store, tmp_path: Path) -> None:
    """A copy under a name that nothing here writes is told by `check`, and is neither version, alias nor model."""
    version = publish_new(store, tmp_path)
    promote(store, version)
    ref, content = store.get("models/demo/refs/production.json")[0], store.get(manifest_key("demo", version))[0]
    for stray in (
        "models/demo/refs/Production.json",
        "models/demo/refs/production (1).json",
        "models/Demo/refs/a.json",
    ):
        store.put(stray, ref)
    store.put(f"models/Demo/versions/{version}/{MANIFEST}", content)
    ((found,), faults) = registry.survey_versions(store)
    assert (found.version, found.aliases, faults) == (version, ("production",), ())
    assert registry.find_run(store, "demo", digest_bytes(b"run")) == version
    assert registry.list_names(store) == ("demo",)
    with pytest.raises(RegistryError, match=r"no alias 'prod' of demo; there is production; the newest"):
        registry.resolve(store, "demo@prod")
    assert {f.kind for f in registry.check_registry(store, now=store.clock()).findings} == {"unknown-key"}


def test_a_second_move_keeps_the_first_in_the_history(store: Store, tmp_path: Path) -> None:
    """Newest first, chained by hash; a rollback is a new move; repeating a move is none."""
    first, second = publish_new(store, tmp_path, "a"), publish_new(store, tmp_path, "b")
    moves = [promote(store, v, reason=r) for v, r in ((first, "1"), (second, "2"), (first, "rollback"))]
    assert promote(store, first) == moves[-1]
    promote(store, second, "staging")
    assert read_history(store) == list(reversed(moves))
    assert [m.seq for m in moves] == [1, 2, 3]
    assert moves[2].prev == digest_bytes(moves[1].encode())
    assert len(read_history(store, "staging")) == 1
    assert registry.read_alias(store, "demo", "production") == moves[-1]
    assert registry.read_alias(store, "demo", "nowhere") is None
    assert read_history(store, "nowhere") == []


def test_show_says_which_aliases_are_at_a_version_and_how_they_came_there(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Who moved an alias, when, from where and why is shown, not only kept; to programs all of it."""
    store = open_store((tmp_path / "store").as_uri())
    base = {"model": "tiny", "revision": "1"}
    first = publish_new(store, tmp_path, "a", base=base)
    second = publish_new(store, tmp_path, "b", base=base, verdict="hold")
    for number in range(3):
        promote(store, first, reason=f"shipped {number}")
        promote(store, second, force=True, actor="ann", reason="she knows\nbetter")
    promote(store, second, "staging", force=True)

    def show(*arguments: str) -> str:
        assert main(["show", *arguments, "--store", store.url]) == 0
        return capsys.readouterr().out

    said = show("demo")
    assert "aliases    production, staging\n" in said
    assert f"moved      {AT}  production: {first} -> {second}  ann: she knows better (--force)\n" in said
    assert said.count("moved ") == 5
    assert "and 1 moves before" not in said
    assert "and 1 move before; --json has all\n" in said
    assert "moved" not in show(f"demo@{first}"), "a version has no history of its own"
    assert "aliases    -\n" in show(f"demo@{first}")
    assert f"moved      {AT}  staging: nothing -> {second}  ci: verdict ship (--force)\n" in show("demo@staging")
    facts = json.loads(show("demo@production", "--json"))
    assert (facts["version"], facts["aliases"], len(facts["moves"])) == (second, ["production", "staging"], 6)
    oldest = {
        "alias": "production",
        "seq": 1,
        "at": AT,
        "actor": "ci",
        "reason": "shipped 0",
        "forced": False,
        "asked_by": None,
    }
    assert facts["moves"][-1] == {**oldest, "from": None, "to": first}
    assert json.loads(show(f"demo@{first}", "--json"))["moves"] == []
    store.delete(next(o.key for o in store.list("models/demo/reflog/00000004-")))
    assert main(["show", "demo", "--store", store.url]) == 0
    broken = capsys.readouterr()
    assert f"production: ? -> {first}  ci: shipped 2\n" in broken.out, "what is not known is not called nothing"
    assert "missing, the history of production is broken here" in broken.err


def test_a_rewritten_history_is_named(store: Store, tmp_path: Path) -> None:
    """The ref seals every record before it."""
    promote(store, publish_new(store, tmp_path, "a"))
    old = next(iter(store.list("models/demo/reflog/"))).key
    promote(store, publish_new(store, tmp_path, "b"))
    store.put(old, store.get(old)[0].replace(b'"ci"', b'"me"'))
    with pytest.raises(RegistryError, match=r"altered, the history of production"):
        read_history(store)
    store.delete(old)
    with pytest.raises(RegistryError, match=r"missing, the history of production"):
        read_history(store)


@pytest.mark.parametrize("verdict", ["hold", "inconclusive", "reject"])
def test_only_a_ship_verdict_is_promoted_and_a_refusal_changes_nothing(
    store: Store, tmp_path: Path, verdict: str
) -> None:
    """The failed call writes no key; with force the move says that it was forced."""
    version = publish_new(store, tmp_path, verdict=verdict)
    before = snapshot(store)
    with pytest.raises(RegistryError, match=f"verdict {verdict}, expected ship"):
        promote(store, version)
    assert snapshot(store) == before
    assert promote(store, version, force=True).forced


def test_a_promotion_that_expected_another_version_changes_nothing(store: Store, tmp_path: Path) -> None:
    """`expected` is the caller's own compare-and-swap."""
    first, second = publish_new(store, tmp_path, "a"), publish_new(store, tmp_path, "b")
    with pytest.raises(RegistryError, match="points at nothing"):
        promote(store, second, expected=first)
    promote(store, first)
    before = snapshot(store)
    with pytest.raises(RegistryError, match=f"points at {first}"):
        promote(store, second, expected=second[:-1] + "0")
    assert snapshot(store) == before
    assert promote(store, second, expected=first).seq == 2


def test_a_mistyped_alias_is_refused_and_a_new_one_is_called_new(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """An alias is for ever: one that reads like another is only made where it is said that there is none yet."""
    store = open_store((tmp_path / "store").as_uri())
    first, second = publish_new(store, tmp_path, "a"), publish_new(store, tmp_path, "b")
    promote(store, first)
    before = snapshot(store)
    with pytest.raises(RegistryError, match=r"'prodution' of demo; did you mean production\?.*--expected nothing"):
        promote(store, second, "prodution")
    assert snapshot(store) == before
    assert promote(store, second, "production-eu", expected="nothing").seq == 1
    assert main(["promote", f"demo@{second}", "canary", "--store", store.url]) == 0
    assert "canary is a new alias; not moved: production, production-eu\n" in capsys.readouterr().out
    assert main(["promote", f"demo@{second}", "production", "--store", store.url]) == 0
    assert capsys.readouterr().out == f"demo@production is now {second}\n"


def test_a_version_without_all_its_blobs_is_not_promoted(store: Store, tmp_path: Path) -> None:
    """An alias never points at what cannot be pulled."""
    version = publish_new(store, tmp_path)
    entry = registry.load_manifest(store, "demo", version).files[0]
    store.delete(blob_key(entry.sha256))
    with pytest.raises(RegistryError, match=r"adapter.safetensors\) is missing"):
        promote(store, version)
    assert registry.read_alias(store, "demo", "production") is None


@pytest.mark.parametrize("racers", [16])
def test_racing_promotions_lose_no_move(tmp_path: Path, racers: int) -> None:
    """Every writer's move is in the chain exactly once, whatever the order."""
    check_race(open_store((tmp_path / "store").as_uri()), tmp_path, racers)


def test_racing_promotions_on_s3_lose_no_move(bucket: S3Store, tmp_path: Path) -> None:
    """The same over a real S3 server (three writers: each lost lock costs a second there)."""
    check_race(replace(bucket, prefix="promotions"), tmp_path, 3)


def check_race(store: Store, folder: Path, racers: int) -> None:
    """`racers` promotions of as many versions at one moment."""
    versions = [publish_new(store, folder, f"{n}") for n in range(racers)]
    barrier = threading.Barrier(racers)

    def attempt(version: str) -> registry.AliasMove:
        barrier.wait()
        return promote(store, version)

    with ThreadPoolExecutor(racers) as pool:
        moves = list(pool.map(attempt, versions))
    chain = read_history(store)
    assert sorted(m.version for m in chain) == sorted(versions)
    assert sorted(moves, key=lambda m: -m.seq) == chain


class WatchedStore:
    """A store whose writing calls are counted and handed to `meet` before and after they are done."""

    def __init__(self, inner: Store, meet: Callable[[int, str, bool], None]) -> None:
        """`meet(number, key, done)` may raise or kill."""
        self._inner, self._meet, self._calls, self._lock = inner, meet, 0, threading.Lock()

    def __getattr__(self, name: str) -> Any:
        """The inner store's own method, watched when it writes."""
        method = getattr(self._inner, name)

        def call(key: str, *arguments: Any, **options: Any) -> StoredObject:
            with self._lock:
                self._calls += 1
                number = self._calls
            self._meet(number, key, False)
            result: StoredObject = method(key, *arguments, **options)
            self._meet(number, key, True)
            return result

        return call if name.startswith("put") else method


def test_a_promotion_that_was_applied_and_overtaken_is_not_made_twice(tmp_path: Path) -> None:
    """The answer is lost, another writer moves on, the retry finds its own op_id in the chain."""
    inner = open_store((tmp_path / "store").as_uri())
    first, second = publish_new(inner, tmp_path, "a"), publish_new(inner, tmp_path, "b")
    lost: list[str] = []

    def lose(_number: int, key: str, done: bool) -> None:
        if done and "/refs/" in key and not lost:
            lost.append(key)
            promote(inner, second)
            raise PreconditionFailedError(key)

    store: Any = WatchedStore(inner, lose)
    mine = promote(store, first, op_id="mine")
    assert (mine.seq, mine.op_id) == (1, "mine")
    assert [m.version for m in read_history(inner)] == [second, first]


def check_readable(store: Store, folder: Path) -> None:
    """Every visible manifest is fully readable and every alias resolves: the invariant of publication."""
    for info in registry.list_versions(store):
        registry.pull(store, f"{info.name}@{info.version}", folder / info.version)
        for alias in info.aliases:
            assert registry.resolve(store, f"{info.name}@{alias}")[0] == info.version


def run_killed(job: Callable[[], object], *, after_s: float | None = None) -> int:
    """Run `job` in a forked child, SIGKILL it after a time if one is given; its exit status."""
    child = os.fork()
    if child == 0:
        try:
            job()
        finally:
            os._exit(0)
    if after_s is not None:
        time.sleep(after_s)
        os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.mark.parametrize("done", [False, True], ids=["before", "after"])
def test_a_publisher_killed_at_any_step_leaves_only_whole_versions(tmp_path: Path, done: bool) -> None:
    """SIGKILL around each write of publish and promote; the same commands then finish the job."""
    source, steps = make_folder(tmp_path / "source"), 0

    def job(target: Any) -> str:
        version = registry.publish(target, manifest=make_manifest(source), folder=source)
        promote(target, version)
        return version

    for step in range(1, 20):
        store = open_store((tmp_path / f"store{step}").as_uri())

        def die(number: int, _key: str, is_done: bool, step: int = step) -> None:
            if (number, is_done) == (step, done):
                os.kill(os.getpid(), signal.SIGKILL)

        watched = WatchedStore(store, die)
        killed = run_killed(lambda watched=watched: job(watched)) == -signal.SIGKILL
        steps += killed
        check_readable(store, tmp_path / f"pulled{step}")
        version = job(store)
        assert registry.resolve(store, "demo")[0] == version
        assert len(read_history(store)) == 1
        if not killed:
            break
    assert steps == 7  # FORMAT.json, three blobs, manifest, reflog, ref


def test_a_publisher_killed_at_any_moment_leaves_only_whole_versions(tmp_path: Path) -> None:
    """SIGKILL at times that no step boundary explains; the survivors go on with the same store."""
    store = open_store((tmp_path / "store").as_uri())
    began = time.monotonic()
    promote(store, publish_new(store, tmp_path / "source", "whole" * 500))
    takes_s = time.monotonic() - began  # here and now: the machine may be busy
    for number in range(12):

        def job(number: int = number) -> None:
            for copy in range(100):
                promote(store, publish_new(store, tmp_path / "source", f"{number}-{copy}" * 500))

        run_killed(job, after_s=takes_s * (number + 1) / 3)
        check_readable(store, tmp_path / f"pulled{number}")
        read_history(store)
    assert len(registry.list_versions(store)) > 1


@pytest.mark.parametrize("change", [lambda b: b[:-1], lambda b: b[:-1] + b"X", lambda b: b + b"!", None])
def test_a_damaged_blob_is_named_on_pull_and_nothing_appears(
    store: Store, tmp_path: Path, change: Callable[[bytes], bytes] | None
) -> None:
    """Truncated, altered, longer or missing: the target folder is not even made."""
    version = publish_new(store, tmp_path)
    key = blob_key(registry.load_manifest(store, "demo", version).files[0].sha256)
    if change is None:
        store.delete(key)
    else:
        store.put(key, change(store.get(key)[0]))
    with pytest.raises(ApplianceError, match=key) as fault:
        registry.pull(store, f"demo@{version}", tmp_path / "out" / "here")
    assert "\n" not in str(fault.value)
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize(
    "path", ["../evil", "/etc/evil", "a/../../evil", "a\\..\\evil", "a//b", ".", "manifest.json", "adapter.safetensors"]
)
def test_a_manifest_with_an_unsafe_path_is_refused_on_pull(tmp_path: Path, path: str) -> None:
    """A hostile manifest with a right digest writes nothing anywhere."""
    store = open_store((tmp_path / "store").as_uri())
    version = publish_new(store, tmp_path)
    body = registry.load_manifest(store, "demo", version).model_dump(mode="json", by_alias=True)
    body["files"].append({**body["files"][0], "path": path})
    content = canonical_json(body)
    hostile = f"{version.rpartition('-')[0]}-{digest_bytes(content)[:12]}"
    store.put(manifest_key("demo", hostile), content)
    before = sorted(p.name for p in tmp_path.iterdir())
    with pytest.raises(RegistryError, match=hostile):
        registry.pull(store, f"demo@{hostile}", tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == before


def test_an_altered_manifest_is_refused(store: Store, tmp_path: Path) -> None:
    """The digest in the version's name seals it."""
    version = publish_new(store, tmp_path, verdict="hold")
    key = manifest_key("demo", version)
    store.put(key, store.get(key)[0].replace(b'"hold"', b'"ship"'))
    for call in (
        lambda: registry.pull(store, f"demo@{version}", tmp_path / "out"),
        lambda: promote(store, version),
        lambda: registry.list_versions(store),
    ):
        with pytest.raises(RegistryError, match="damaged"):
            call()
    assert not (tmp_path / "out").exists()


def test_pulling_again_verifies_and_leaves_the_folder(tmp_path: Path) -> None:
    """The same version in place is success, and nothing of it is written."""
    store = open_store((tmp_path / "store").as_uri())
    version = publish_new(store, tmp_path)
    registry.pull(store, f"demo@{version}", tmp_path / "out")
    inode = (tmp_path / "out" / "adapter_config.json").stat().st_ino
    registry.pull(store, f"demo@{version}", tmp_path / "out")
    assert (tmp_path / "out" / "adapter_config.json").stat().st_ino == inode


def test_pulling_again_follows_the_alias_and_mends_what_was_damaged(tmp_path: Path) -> None:
    """Another version of the name gives way, a damaged one too; it is said which; nothing is left beside it."""
    store, out, said = open_store((tmp_path / "store").as_uri()), tmp_path / "out", list[str]()
    first, second = publish_new(store, tmp_path, "a"), publish_new(store, tmp_path, "b")
    promote(store, first)
    registry.pull(store, "demo", out, note=said.append)
    out.chmod(0o750)
    promote(store, second)
    manifest = registry.pull(store, "demo", out, note=said.append)
    assert manifest.version == second
    registry.verify_folder(out, manifest)
    assert said.pop() == f"{out}: demo@{first} was here, now it is demo@{second}"
    (out / "adapter_config.json").write_bytes(b"[]")
    (out / "card" / "card.md").unlink()
    registry.verify_folder(out, registry.pull(store, "demo", out, note=said.append))
    assert "adapter_config.json: SHA-256" in said[0], said
    assert "card.md: missing" in said[0]
    assert out.stat().st_mode & 0o777 == 0o750, "who may read it stays"
    (tmp_path / "link").symlink_to(out)
    promote(store, first)
    registry.verify_folder(out, registry.pull(store, "demo", tmp_path / "link"))
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]


@pytest.mark.parametrize("name", ["extra.bin", "card/.notes", ".git/HEAD"])
def test_what_no_version_brought_is_never_swapped_away(tmp_path: Path, name: str) -> None:
    """A file of the user's own, hidden too, is named, and the folder stays as it is."""
    store, out = open_store((tmp_path / "store").as_uri()), tmp_path / "out"
    first, second = publish_new(store, tmp_path, "a"), publish_new(store, tmp_path, "b")
    registry.pull(store, f"demo@{first}", out)
    (out / name).parent.mkdir(exist_ok=True)
    (out / name).write_bytes(b"mine")
    with pytest.raises(RegistryError, match=rf"holds {name}, which is not of demo@{first}; move it away"):
        registry.pull(store, f"demo@{second}", out)
    (out / "adapter_config.json").write_bytes(b"[]")
    with pytest.raises(RegistryError, match=rf"holds {name}"):
        registry.pull(store, f"demo@{first}", out)
    assert (out / name).read_bytes() == b"mine"
    assert (out / "adapter_config.json").read_bytes() == b"[]"


@pytest.mark.parametrize("content", [b"{", b"", None], ids=["damaged", "empty", "another name"])
def test_a_folder_that_is_not_of_this_name_is_never_swapped_away(tmp_path: Path, content: bytes | None) -> None:
    """Only a readable manifest of the same model proves that the folder is a pulled one."""
    store, out = open_store((tmp_path / "store").as_uri()), tmp_path / "out"
    other, version = publish_new(store, tmp_path, name="another"), publish_new(store, tmp_path, "b")
    registry.pull(store, f"another@{other}", out)
    if content is not None:
        (out / "manifest.json").write_bytes(content)
    before = {n: (out / n).read_bytes() for n in list_files(out)}
    with pytest.raises(RegistryError, match=f"something other than demo@{version}; choose an empty folder"):
        registry.pull(store, f"demo@{version}", out)
    assert {n: (out / n).read_bytes() for n in list_files(out)} == before


@pytest.mark.parametrize("is_swapped_at_once", [True, False], ids=["exchange", "two-renames"])
def test_a_pull_killed_at_any_line_leaves_a_whole_version(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_swapped_at_once: bool
) -> None:
    """SIGKILL before each line that writes: the folder is the old version or the new one, and the next pull ends it.

    Where the file system cannot exchange two folders, there is one moment with none, and never a mix.
    """
    store, out, seen = open_store((tmp_path / "store").as_uri()), tmp_path / "out", set()
    first, second = publish_new(store, tmp_path, "a"), publish_new(store, tmp_path, "b")
    module = sys.modules[registry.pull.__module__]
    if not is_swapped_at_once:
        monkeypatch.setattr(module, "_exchange", lambda *_: False)
    for step in range(1, 200):
        shutil.rmtree(out, ignore_errors=True)
        registry.pull(store, f"demo@{first}", out)
        killed = run_killed(lambda step=step: pull_dying(store, f"demo@{second}", out, line=step)) == -signal.SIGKILL
        if out.exists() or is_swapped_at_once:
            held = registry.load_manifest(
                store, "demo", decode_manifest((out / MANIFEST).read_bytes(), source="").version
            )
            registry.verify_folder(out, held)
            seen.add(held.version)
        else:
            seen.add("nothing")
        registry.verify_folder(out, registry.pull(store, f"demo@{second}", out))
        if not killed:
            break
    assert not killed
    assert seen == {first, second} | (set() if is_swapped_at_once else {"nothing"})


def pull_dying(store: Store, reference: str, folder: Path, *, line: int) -> None:
    """A pull that is killed before the `line`-th line of what puts the folder in its place."""
    left = [line]

    def trace(frame: FrameType, event: str, _argument: object) -> Any:
        if frame.f_code.co_name not in ("_fetch", "_swap", "_exchange"):
            return None
        left[0] -= event == "line"
        if not left[0]:
            os.kill(os.getpid(), signal.SIGKILL)
        return trace

    sys.settrace(trace)
    registry.pull(store, reference, folder)


def test_a_folder_with_something_else_is_never_pulled_into(tmp_path: Path) -> None:
    """An empty folder is used, a foreign one and a file are refused."""
    store = open_store((tmp_path / "store").as_uri())
    version = publish_new(store, tmp_path)
    (tmp_path / "empty").mkdir()
    registry.pull(store, f"demo@{version}", tmp_path / "empty")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("mine")
    with pytest.raises(RegistryError, match=f"something other than demo@{version}"):
        registry.pull(store, f"demo@{version}", tmp_path / "full")
    with pytest.raises(RegistryError, match="is a file"):
        registry.pull(store, f"demo@{version}", tmp_path / "full" / "thesis.txt")
    with pytest.raises(StoreError, match="File exists"):
        registry.pull(store, f"demo@{version}", tmp_path / "full" / "thesis.txt" / "x")
    assert list_files(tmp_path / "full") == ["thesis.txt"]


def test_verification_names_every_fault(tmp_path: Path) -> None:
    """Missing, shortened, altered, linked and foreign files are told in one message."""
    folder = make_folder(tmp_path / "f")
    (folder / "link.txt").write_text("x")
    manifest = make_manifest(folder)
    (folder / "adapter.safetensors").unlink()
    (folder / "adapter_config.json").write_bytes(b"{}  ")
    (folder / "card" / "card.md").write_bytes(b"# weightz")
    (folder / "link.txt").rename(tmp_path / "elsewhere")
    (folder / "link.txt").symlink_to(tmp_path / "elsewhere")
    (folder / "new").write_text("")
    with pytest.raises(RegistryError) as fault:
        registry.verify_folder(folder, manifest)
    for words in (
        "safetensors: missing",
        "4 bytes, expected 2",
        "card.md: SHA-256",
        "link.txt: is a link",
        "new: does not",
    ):
        assert words in str(fault.value)


def test_files_that_changed_since_the_manifest_are_not_published(store: Store, tmp_path: Path) -> None:
    """Nothing is written when the folder is not the one that was judged."""
    folder = make_folder(tmp_path / "f")
    manifest = make_manifest(folder)
    (folder / "adapter_config.json").write_bytes(b"[]")
    with pytest.raises(RegistryError, match=r"adapter_config.json: SHA-256"):
        registry.publish(store, manifest=manifest, folder=folder)
    assert list(store.list("")) == []


def test_another_manifest_under_the_version_is_a_loud_error(store: Store, tmp_path: Path) -> None:
    """What is visible never changes, not even into what it should have been."""
    folder = make_folder(tmp_path / "f")
    manifest = make_manifest(folder)
    store.put(manifest_key("demo", manifest.version), b"{}")
    with pytest.raises(RegistryError, match="another manifest has this version"):
        registry.publish(store, manifest=manifest, folder=folder)
    assert store.get(manifest_key("demo", manifest.version))[0] == b"{}"


def test_a_damaged_blob_in_the_store_stops_a_publication(store: Store, tmp_path: Path) -> None:
    """No manifest is written over a blob that is not its content."""
    folder = make_folder(tmp_path / "f")
    manifest = make_manifest(folder)
    store.put(blob_key(manifest.files[0].sha256), b"rot")
    with pytest.raises(StoreError, match="damaged"):
        registry.publish(store, manifest=manifest, folder=folder)
    assert registry.list_versions(store) == ()


@pytest.mark.parametrize(
    ("reference", "words"),
    [
        ("dmo@production", "no model 'dmo'; did you mean demo?"),
        ("dmo", "no model 'dmo'; did you mean demo?"),
        ("demo@prodution", "no alias 'prodution' of demo; did you mean production?"),
        ("demo@zzz", "no alias 'zzz' of demo; there is production"),
        ("held", "`appliance list held` has all; held alone means held@production"),
        (
            "held",
            "no alias 'production' of held; there is staging; the newest version is 20260131120000-aaaaaaaaaaaa-",
        ),
        (
            "demo@20260131120000-aaaaaaaaaaaa-000000000000",
            "no version '20260131120000-aaaaaaaaaaaa-000000000000' of demo; did",
        ),
        ("../demo@production", "not a model name"),
        ("demo@../x", "not an alias"),
        ("demo@", "not an alias"),
        ("", "not a model name"),
        ("Demo\n@production", "not a model name"),
    ],
)
def test_an_unknown_or_malformed_reference_says_what_there_is(tmp_path: Path, reference: str, words: str) -> None:
    """Model, alias and version are each named, with the nearest that exists."""
    store = open_store((tmp_path / "store").as_uri())
    promote(store, publish_new(store, tmp_path))
    promote(store, publish_new(store, tmp_path, name="held"), "staging", name="held")
    with pytest.raises(RegistryError) as fault:
        registry.resolve(store, reference)
    assert words in str(fault.value)
    assert "\n" not in str(fault.value)


def test_the_beginning_of_a_version_is_enough_to_read_it_and_never_to_promote_it(tmp_path: Path) -> None:
    """From eight characters on, where only one version begins with it; else it is said what there is."""
    store = open_store((tmp_path / "store").as_uri())
    first = publish_new(store, tmp_path, "a")
    second = publish_new(store, tmp_path, "b", created_at="2026-02-01T00:00:00Z")
    third = publish_new(store, tmp_path, "c", created_at="2026-02-01T00:00:00Z", git_commit="b" * 40)
    for prefix in (first[:8], first[:14], first[:-1]):
        assert registry.resolve(store, f"demo@{prefix}")[0] == first
    assert registry.pull(store, f"demo@{first[:8]}", tmp_path / "out").version == first
    assert registry.resolve(store, f"demo@{second[:18]}")[0] == second
    newest = f"the newest version is {third}, `appliance list demo` has all"
    for rest, words in {
        second[:14]: f"2 versions of demo begin with '{second[:14]}': {second}, {third}; give more of it",
        "20991231": f"no version of demo begins with '20991231'; {newest}",
        "2026013": "at least 8 characters of a version",
        "latest": f"no alias 'latest' of demo; there is none yet; {newest}",
    }.items():
        with pytest.raises(RegistryError, match=re.escape(words)):
            registry.resolve(store, f"demo@{rest}")
    arguments = [f"demo@{first[:14]}", "production", "--store", store.url]
    with pytest.raises(RegistryError, match=f"{first[:14]}: .*give the whole version, {first}"):
        CliRunner().invoke(promote_command, arguments, catch_exceptions=False)
    assert registry.read_alias(store, "demo", "production") is None


def test_an_empty_store_says_that_there_is_nothing_yet(store: Store) -> None:
    """Reading a registry that was never written is no traceback and no write."""
    with pytest.raises(RegistryError, match="no model 'demo'; there is none yet"):
        registry.resolve(store, "demo@production")
    assert registry.list_versions(store) == ()
    assert list(store.list("")) == []


@pytest.mark.parametrize(
    ("content", "words"),
    [(b'{"schema":2}', "schema 2, this release knows 1"), (b"<html>", "is this prefix a registry")],
)
def test_a_registry_of_another_schema_is_not_touched(store: Store, tmp_path: Path, content: bytes, words: str) -> None:
    """Neither read nor written by a release that does not know it."""
    store.put("FORMAT.json", content)
    for call in (
        lambda: publish_new(store, tmp_path),
        lambda: registry.resolve(store, "demo"),
        lambda: promote(store, "20260131120000-aaaaaaaaaaaa-000000000000"),
    ):
        with pytest.raises(RegistryError, match=words):
            call()
    assert [o.key for o in store.list("")] == ["FORMAT.json"]


def test_a_damaged_ref_is_named(store: Store, tmp_path: Path) -> None:
    """Neither rubbish nor another alias's record is followed."""
    promote(store, publish_new(store, tmp_path))
    ref = store.get(ref_key("demo", "production"))[0]
    store.put(ref_key("demo", "staging"), ref)
    with pytest.raises(RegistryError, match="belongs to demo@production"):
        registry.resolve(store, "demo@staging")
    store.put(ref_key("demo", "staging"), ref[:-5])
    with pytest.raises(RegistryError, match=r"refs/staging.json: damaged"):
        promote(store, registry.resolve(store, "demo")[0], "staging")


@pytest.mark.parametrize("options", [[], ["demo"], ["--json"]], ids=["all", "one", "json"])
def test_a_listing_shows_what_is_whole_beside_what_is_damaged(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str]
) -> None:
    """One damaged ref and one damaged manifest hide no other version; each is named, and the exit code is 1."""
    store = open_store((tmp_path / "store").as_uri())
    first, second, third = (publish_new(store, tmp_path, t) for t in "abc")
    promote(store, first)
    promote(store, second, "staging")
    for key in (ref_key("demo", "staging"), manifest_key("demo", third)):
        store.put(key, store.get(key)[0][:-5])
    assert main(["list", *options, "--store", store.url]) == 1
    told = capsys.readouterr()
    assert first in told.out
    assert "production" in told.out
    assert second in told.out
    assert third not in told.out
    assert "refs/staging.json: damaged" in told.err
    assert f"{third}/manifest.json: damaged" in told.err
    with pytest.raises(RegistryError, match=f"{third}/manifest.json: damaged"):
        registry.list_versions(store)


def test_an_unreachable_store_is_one_line_for_every_verb(
    s3: object, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The registry adds nothing to what the store says."""
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    store = open_store("s3://registry/denied")
    for call in (
        lambda: publish_new(store, tmp_path),
        lambda: registry.pull(store, "demo@production", tmp_path / "out"),
        lambda: registry.list_versions(store),
        lambda: promote(store, "20260131120000-aaaaaaaaaaaa-000000000000"),
    ):
        with pytest.raises(StoreError, match="credentials refused") as fault:
            call()
        assert "\n" not in str(fault.value)
    assert not (tmp_path / "out").exists()
