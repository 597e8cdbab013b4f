"""The collector: what is visible stays whole whatever happens, and what nobody needs goes, in two steps."""

from __future__ import annotations

import importlib
import json
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest
from test_check import DAMAGE, ActingStore, Sound, check, remove_blob, tell
from test_registry import check_readable, make_folder, make_manifest, promote, publish_new, run_killed, snapshot

from appliance import registry
from appliance.cli import main
from appliance.digest import digest_bytes
from appliance.errors import RegistryError, StoreError
from appliance.manifest import Manifest
from appliance.registry.layout import blob_key, manifest_key, tombstone_key
from appliance.registry.marks import Kind
from appliance.store import Store, open_store
from appliance.store.local import LocalStore
from appliance.store.s3 import S3Store

DAY = 86_400.0
CALLS = ("put", "put_file", "get", "head", "list", "delete", "list_uploads", "abort_upload")
WRITES = ("put", "put_file", "delete", "abort_upload")
ABANDONED, PUBLISHED = digest_bytes(b"abandoned"), digest_bytes(b"run")


def collect(store: Any, *, days: float, **options: Any) -> registry.Collection:
    """A collection in so many days from now."""
    return registry.collect_garbage(store, now=time.time() + days * DAY, **options)


def put_garbage(store: Store) -> dict[str, list[str]]:
    """Something of every kind but a version, that nobody needs; keys by kind."""
    loose = [store.put(blob_key(digest_bytes(text)), text).key for text in (b"left", b"left too")]
    lease = registry.Lease(name="demo", holder="x", actor="a", place="p", until=time.time() - 1)
    leases = [store.put("leases/model-demo.json", lease.encode()).key]
    checkpoints = [
        store.put(f"checkpoints/{run_key}/3-abc/{file}", b"{}").key
        for run_key in (ABANDONED, PUBLISHED)
        for file in ("optimizer.bin", "sealed.json")
    ]
    return {"blob": loose, "lease": leases, "checkpoint": checkpoints, "upload": [begin_upload(store)]}


def begin_upload(store: Store) -> str:
    """An upload that nobody goes on with; its key."""
    if isinstance(store, LocalStore):
        (store.root / ".tmp").mkdir(parents=True, exist_ok=True)
        (store.root / ".tmp" / "begun").write_bytes(b"12345")
        return ".tmp/begun"
    assert isinstance(store, S3Store)
    key = blob_key(digest_bytes(b"large"))
    target = {"Bucket": store.bucket, "Key": f"{store.prefix}/{key}"}
    begun = store.clients.steady.create_multipart_upload(**target)
    store.clients.steady.upload_part(**target, UploadId=begun["UploadId"], PartNumber=1, Body=b"12345")
    return key


def list_keys(objects: tuple[registry.Garbage, ...]) -> dict[str, list[str]]:
    """Keys by kind."""
    return {
        k: sorted(g.key for g in objects if g.kind == k) for k in get_args(Kind) if any(g.kind == k for g in objects)
    }


class Stepped:
    """A store that calls `meet(number, call, key, done)` around its calls of some names; it may raise or kill."""

    def __init__(self, inner: Store, names: tuple[str, ...], meet: Callable[[int, str, str, bool], None]) -> None:
        """Nothing has been called yet."""
        self._inner, self._names, self._meet, self.calls, self._lock = inner, names, meet, 0, threading.Lock()

    def __getattr__(self, name: str) -> Any:
        """The inner store's own method, met when it has one of the names."""
        method = getattr(self._inner, name)

        def call(*arguments: Any, **options: Any) -> Any:
            with self._lock:
                self.calls += 1
                number = self.calls
            key = str(arguments[0]) if arguments else ""
            self._meet(number, name, key, False)
            result = method(*arguments, **options)
            self._meet(number, name, key, True)
            return result

        return call if name in self._names else method


def let_a_second_pass(store: Store) -> None:
    """S3 tells whole seconds, and these tests write again at once what in life is a day old."""
    if isinstance(store, S3Store):
        time.sleep(1.05 - time.time() % 1)


def act_at(step: int, done: bool, act: Callable[[], object]) -> Callable[[int, str, str, bool], None]:
    """A `meet` that acts once, before or after the call of this number."""

    def meet(number: int, _name: str, _key: str, is_done: bool) -> None:
        if (number, is_done) == (step, done):
            act()

    return meet


def count_calls(make: Callable[[], Store], names: tuple[str, ...], job: Callable[[Any], object]) -> int:
    """How many calls a job makes on a store that `make` prepares."""
    stepped = Stepped(make(), names, lambda *_: None)
    job(stepped)
    assert stepped.calls > 0
    return stepped.calls


class Maker:
    """Stores of one kind, as many as a test wants: each a copy of what `build` puts into one."""

    def __init__(self, bucket: S3Store | None, folder: Path, build: Callable[[Store], object], *, stride: int) -> None:
        """In a folder when there is no bucket."""
        self._bucket, self._folder, self._build, self._stride, self._made = bucket, folder, build, stride, 0
        self.is_thorough = stride == 1

    def list_steps(self, calls: int) -> list[tuple[int, bool]]:
        """Before and after each of so many calls, or every `stride`-th of these moments."""
        return [(number, done) for number in range(1, calls + 1) for done in (False, True)][:: self._stride]

    def __call__(self) -> Store:
        """A new store; folders are copied with the times of their files."""
        self._made += 1
        if self._bucket is not None:
            store: Store = replace(self._bucket, prefix=f"{digest_bytes(str(self._folder).encode())[:12]}-{self._made}")
            self._build(store)
            return store
        first = self._folder / "first"
        if not first.exists():
            self._build(open_store(first.as_uri()))
        shutil.copytree(first, self._folder / f"{self._made}")
        return open_store((self._folder / f"{self._made}").as_uri())


@pytest.fixture(params=["file", "s3", pytest.param("s3-every-step", marks=pytest.mark.slow)])
def make(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[Callable[[Store], object]], Maker]:
    """A `Maker` of what it is given: in a folder at every step, on SeaweedFS at every thirteenth, or slowly at all."""
    bucket = None if request.param == "file" else request.getfixturevalue("bucket")
    return lambda build: Maker(bucket, tmp_path / "made", build, stride=13 if request.param == "s3" else 1)


def test_what_nobody_needs_goes_in_two_steps_and_nothing_else(store: Store, tmp_path: Path) -> None:
    """First a plan, a grace period later the deletion; a dry run says the same and writes nothing; the rest stays."""
    grace_s = 2.5

    def run(work: Callable[..., registry.Collection] = registry.collect_garbage) -> registry.Collection:
        return work(store, now=store.clock(), grace_s=grace_s)

    Sound(store, tmp_path)
    kept = snapshot(store)
    expected = put_garbage(store)
    full = snapshot(store)
    assert run() == registry.Collection((), (), (), (), None, (), ()), "too young"
    time.sleep(grace_s + 1)
    dry = run(registry.look_for_garbage)
    assert snapshot(store) == full
    began = store.clock()
    first = run()
    assert (list_keys(first.planned), first.deleted, first.waiting) == (expected, (), ())
    assert dry.planned == first.planned
    assert first.due == pytest.approx(began + grace_s, abs=2)
    (plan,) = store.list("gc/")
    assert {k: v for k, v in snapshot(store).items() if k != plan.key} == full
    again = run()
    assert (again.waiting, again.planned, again.deleted, again.spared) == (first.planned, (), (), ())
    assert again.due is not None
    time.sleep(grace_s + 1)
    dry = run(registry.look_for_garbage)
    done = run()
    assert (list_keys(done.deleted), done.planned, done.spared, done.due) == (expected, (), (), None)
    assert dry.deleted == done.deleted
    assert sum(g.size for g in done.deleted if g.kind == "upload") == 5
    assert snapshot(store) == kept
    assert list(store.list_uploads()) == []
    report = check(store, now=time.time() + 100 * DAY)
    assert (report.findings, report.unnamed) == ((), 0)
    check_readable(store, tmp_path / "pulled")


def plan_garbage(store: Store, **options: Any) -> registry.Collection:
    """What is there is garbage in eight days, and planned; a collection in 16 days deletes it."""
    return collect(store, days=8, **options)


def test_a_collector_killed_at_any_step_is_finished_by_the_next(make: Callable[..., Maker], tmp_path: Path) -> None:
    """SIGKILL around each call that writes: what is visible is whole at once, and the next run leaves no garbage."""
    prepare = make(lambda store: (Sound(store, tmp_path / "source"), put_garbage(store), plan_garbage(store)))
    steps = count_calls(prepare, WRITES, lambda s: collect(s, days=16))
    assert steps == 2 + 1 + 4 + 1 + 1
    for step, done in prepare.list_steps(steps):
        store = prepare()
        if isinstance(store, LocalStore):
            die = act_at(step, done, lambda: os.kill(os.getpid(), signal.SIGKILL))
            job = lambda store=store, die=die: collect(Stepped(store, WRITES, die), days=16)  # noqa: E731
            assert run_killed(job) == -signal.SIGKILL
        else:
            die = act_at(step, done, stop)
            with pytest.raises(KeyboardInterrupt):  # connections do not survive a fork; nothing here catches it
                collect(Stepped(store, WRITES, die), days=16)
        check_readable(store, tmp_path / f"pulled{step}{done}")
        collect(store, days=16)
        assert check(store, now=time.time() + 100 * DAY).unnamed == 0
        assert not list_left(store)


def stop() -> None:
    """Die as a process does that is told to, with no clean-up of its own."""
    raise KeyboardInterrupt


def list_left(store: Store) -> list[str]:
    """What of `put_garbage`, and of plans, is there."""
    return [o.key for p in ("gc/", "leases/", "checkpoints/") for o in store.list(p)] + [
        u.key for u in store.list_uploads()
    ]


def test_a_publisher_that_sleeps_for_weeks_at_any_step_ends_with_a_whole_version(
    make: Callable[..., Maker], tmp_path: Path
) -> None:
    """Around every call of publish and promote, two collections take all that looks loose by then."""
    folder = make_folder(tmp_path / "third", "third")
    manifest = make_manifest(folder)

    def build(store: Store) -> None:
        Sound(store, tmp_path / "source")
        for entry in manifest.files:  # left by an earlier try, and planned
            store.put_file(blob_key(entry.sha256), folder / entry.path, sha256=entry.sha256)
        plan_garbage(store)

    def publish(store: Any) -> None:
        promote(store, registry.publish(store, manifest=manifest, folder=folder))

    prepare, taken = make(build), 0
    steps = count_calls(prepare, CALLS, publish)
    for step, done in prepare.list_steps(steps):
        store = prepare()

        def sleep(store: Store = store) -> None:
            nonlocal taken
            taken += len(collect(store, days=16).deleted)
            collect(store, days=24)
            taken += len(collect(store, days=32).deleted)

        publish(Stepped(store, CALLS, act_at(step, done, sleep)))
        assert registry.resolve(store, "demo")[0] == manifest.version
        check_readable(store, tmp_path / f"pulled{step}{done}")
        assert check(store, now=time.time() + 100 * DAY).is_sound
    assert taken > 0


@pytest.fixture
def aged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Manifest]:
    """A version to publish, for whose publisher every blob that is there is an old one."""
    monkeypatch.setattr(importlib.import_module("appliance.registry.publish"), "FRESH_S", 0.0)
    folder = make_folder(tmp_path / "third", "third")
    return folder, make_manifest(folder)


def test_a_collector_that_sleeps_at_any_step_takes_nothing_that_became_a_version(
    make: Callable[..., Maker], tmp_path: Path, aged: tuple[Path, Manifest]
) -> None:
    """Old blobs that were planned are published, from first to last call, around each of the collector's calls."""
    folder, manifest = aged

    def build(store: Store) -> None:
        Sound(store, tmp_path / "source")
        for entry in manifest.files:
            store.put_file(blob_key(entry.sha256), folder / entry.path, sha256=entry.sha256)
        plan_garbage(store)

    prepare, spared = make(build), 0
    steps = count_calls(prepare, CALLS, lambda s: collect(s, days=16))
    for step, done in prepare.list_steps(steps):
        store = prepare()
        let_a_second_pass(store)
        act = act_at(step, done, lambda s=store: promote(s, registry.publish(s, manifest=manifest, folder=folder)))
        spared += len(collect(Stepped(store, CALLS, act), days=16).spared)
        check_readable(store, tmp_path / f"pulled{step}{done}")
        assert check(store, now=time.time() + 100 * DAY).is_sound
    assert spared > 0 or not prepare.is_thorough


def test_a_publisher_that_wakes_while_a_collector_sleeps_ends_with_a_whole_version(
    make: Callable[..., Maker], tmp_path: Path, aged: tuple[Path, Manifest]
) -> None:
    """It slept for weeks at any step, and goes through between the collector's marks and its first deletion."""
    folder, manifest = aged
    prepare = make(lambda store: Sound(store, tmp_path / "source"))
    steps = count_calls(prepare, CALLS, lambda s: registry.publish(s, manifest=manifest, folder=folder))
    spared = 0
    for step, done in prepare.list_steps(steps):
        store, slept, awake = prepare(), threading.Event(), threading.Event()

        def sleep(slept: threading.Event = slept, awake: threading.Event = awake) -> None:
            slept.set()
            assert awake.wait(60)

        with ThreadPoolExecutor(1) as pool:
            sleepy: Any = Stepped(store, CALLS, act_at(step, done, sleep))
            publishing = pool.submit(registry.publish, sleepy, manifest=manifest, folder=folder)
            assert slept.wait(60)
            plan_garbage(store)
            let_a_second_pass(store)

            def wake(number: int, *_: object, awake: threading.Event = awake, publishing: Any = publishing) -> None:
                if number == 1:
                    awake.set()
                    publishing.result()

            spared += len(collect(Stepped(store, ("delete",), wake), days=16).spared)
            awake.set()
            assert publishing.result() == manifest.version
        check_readable(store, tmp_path / f"pulled{step}{done}")
        assert check(store, now=time.time() + 100 * DAY).is_sound
    assert spared > 0 or not prepare.is_thorough


class Many:
    """A model with four versions, oldest data first: `never` promoted, `once` in production, `now`, and the newest."""

    def __init__(self, store: Store, folder: Path) -> None:
        """Publish and promote."""
        self.store = store
        self.never, self.once, self.now, self.newest = (
            publish_new(store, folder, f"v{day}", created_at=f"2026-01-0{day}T00:00:00Z") for day in (1, 2, 3, 4)
        )
        for version in (self.once, self.now):
            promote(store, version)

    def list_versions(self) -> list[str]:
        """What is visible."""
        return [v.version for v in registry.list_versions(self.store, "demo")]


def test_versions_go_only_when_asked_and_nobody_needs_them(store: Store, tmp_path: Path) -> None:
    """The newest N, what an alias is at, and what one was at within 90 days stay; blobs of the others go later."""
    at = Many(store, tmp_path)
    own = {e.sha256 for e in registry.load_manifest(store, "demo", at.never).files}
    shared = {e.sha256 for e in registry.load_manifest(store, "demo", at.newest).files}
    assert collect(store, days=200).planned == (), "not asked"
    assert list_keys(plan_garbage(store, keep_versions=1).planned) == {"version": [manifest_key("demo", at.never)]}
    collect(store, days=16)
    collect(store, days=16, keep_versions=2)
    assert at.list_versions() == [at.never, at.once, at.now, at.newest], "others asked for something else"
    done = collect(store, days=16, keep_versions=1)
    assert list_keys(done.deleted) == {"version": [manifest_key("demo", at.never)]}
    assert at.list_versions() == [at.once, at.now, at.newest]
    assert all(store.head(blob_key(sha256)) for sha256 in own), "who pulls it goes on to pull it"
    assert {g.key for g in done.planned} == set()
    loose = plan_garbage(store)
    assert {g.key for g in loose.planned} == {blob_key(sha256) for sha256 in own - shared}
    collect(store, days=16)
    check_readable(store, tmp_path / "pulled")
    collect(store, days=100, keep_versions=1)
    done = collect(store, days=200, keep_versions=1)
    assert list_keys(done.deleted) == {"version": [manifest_key("demo", at.once)]}, "production left it 91 days ago"
    assert check(store, now=time.time() + 200 * DAY).is_sound, "its tombstone tells it from one that was lost"
    assert registry.resolve(store, "demo")[0] == at.now
    store.delete(tombstone_key("demo", at.once))
    assert [f.kind for f in check(store).findings] == ["dangling-ref"]


def test_a_collected_version_can_be_published_and_promoted_again(store: Store, tmp_path: Path) -> None:
    """Its tombstone is older than its manifest then, and counts no more."""
    at = Many(store, tmp_path)
    plan_garbage(store, keep_versions=1)
    collect(store, days=16, keep_versions=1)
    with pytest.raises(RegistryError, match="no version"):
        promote(store, at.never)
    time.sleep(0.01)
    assert publish_new(store, tmp_path, "v1", created_at="2026-01-01T00:00:00Z") == at.never
    promote(store, at.never)
    collect(store, days=100)
    assert registry.resolve(store, "demo")[0] == at.never
    check_readable(store, tmp_path / "pulled")
    assert check(store).findings == ()


def prepare_versions(make: Callable[..., Maker], folder: Path) -> tuple[Maker, str, str]:
    """Stores in which a version is planned for collection; it, and the one that production is at."""
    seen: list[Many] = []

    def build(store: Store) -> None:
        seen.append(Many(store, folder))
        plan_garbage(store, keep_versions=1)
        let_a_second_pass(store)

    prepare = make(build)
    prepare()
    return prepare, seen[0].never, seen[0].now


def try_to_promote(store: Any, version: str) -> None:
    """As a person does; being refused is an answer."""
    with suppress(RegistryError):
        promote(store, version, reason="rollback")


def check_settled(store: Store, folder: Path, *, version: str, before: str) -> bool:
    """The alias is at the version, which is whole, or where it was before; whether it moved."""
    (now,) = {registry.resolve(store, "demo")[0]}
    assert now in (version, before)
    check_readable(store, folder)
    collect(store, days=40)
    assert registry.resolve(store, "demo")[0] == now
    assert check(store, now=time.time() + 100 * DAY).is_sound
    return now == version


def test_a_promotion_of_what_is_being_collected_is_done_or_refused(make: Callable[..., Maker], tmp_path: Path) -> None:
    """Around each of the collector's calls; the alias never points at what is not there."""
    prepare, version, before = prepare_versions(make, tmp_path / "source")
    moved: list[bool] = []
    steps = count_calls(prepare, CALLS, lambda s: collect(s, days=16, keep_versions=1))
    for step, done in prepare.list_steps(steps):
        store = prepare()
        act = act_at(step, done, lambda s=store: try_to_promote(s, version))
        found = collect(Stepped(store, CALLS, act), days=16, keep_versions=1)
        moved.append(check_settled(store, tmp_path / f"pulled{step}{done}", version=version, before=before))
        assert not (moved[-1] and found.deleted)
    assert set(moved) == {True, False} or not prepare.is_thorough


def test_a_promoter_that_sleeps_at_any_step_never_leaves_an_alias_at_nothing(
    make: Callable[..., Maker], tmp_path: Path
) -> None:
    """Around each of its calls a collector goes through; where the history has its word, the version stays."""
    prepare, version, before = prepare_versions(make, tmp_path / "source")
    moved: list[bool] = []
    steps = count_calls(prepare, CALLS, lambda s: try_to_promote(s, version))
    for step, done in prepare.list_steps(steps):
        store = prepare()
        act = act_at(step, done, lambda s=store: collect(s, days=16, keep_versions=1))
        try_to_promote(Stepped(store, CALLS, act), version)
        moved.append(check_settled(store, tmp_path / f"pulled{step}{done}", version=version, before=before))
    assert set(moved) == {True, False} or not prepare.is_thorough


def test_of_two_collectors_one_that_sleeps_does_no_harm(make: Callable[..., Maker], tmp_path: Path) -> None:
    """Around each call of one, another goes through, one that was not asked for versions, and a promotion after it."""
    prepare, version, before = prepare_versions(make, tmp_path / "source")
    steps = count_calls(prepare, CALLS, lambda s: collect(s, days=16, keep_versions=1))
    moved: list[bool] = []
    for step, done in prepare.list_steps(steps):
        for keep in (None, 1):
            store = prepare()

            def act(store: Store = store, keep: int | None = keep) -> None:
                collect(store, days=16, keep_versions=keep)
                try_to_promote(store, version)

            collect(Stepped(store, CALLS, act_at(step, done, act)), days=16, keep_versions=1)
            folder = tmp_path / f"pulled{step}{done}{keep}"
            moved.append(check_settled(store, folder, version=version, before=before))
    assert set(moved) == {True, False} or not prepare.is_thorough


def test_a_collector_killed_among_versions_is_finished_or_undone(make: Callable[..., Maker], tmp_path: Path) -> None:
    """The version is whole until it is gone; asked again it goes, not asked again it stays and can be promoted."""
    prepare, version, before = prepare_versions(make, tmp_path / "source")
    steps = count_calls(prepare, WRITES, lambda s: collect(s, days=16, keep_versions=1))
    assert steps == 3, "tombstone, manifest, plan"
    for step, done in prepare.list_steps(steps):
        for keep in (None, 1):
            store = prepare()
            with pytest.raises(KeyboardInterrupt):
                collect(Stepped(store, WRITES, act_at(step, done, stop)), days=16, keep_versions=1)
            check_readable(store, tmp_path / f"pulled{step}{done}{keep}")
            was_there = store.head(manifest_key("demo", version)) is not None
            collect(store, days=16, keep_versions=keep)
            is_there = store.head(manifest_key("demo", version)) is not None
            assert is_there is (was_there and keep is None)
            try_to_promote(store, version)
            assert registry.resolve(store, "demo")[0] == (version if is_there else before)


def test_collectors_at_once_are_one(store: Store, tmp_path: Path) -> None:
    """Four at one moment, twice: what one would have deleted is deleted, and nobody fails."""
    Sound(store, tmp_path)
    kept = snapshot(store)
    put_garbage(store)
    barrier = threading.Barrier(4)

    def attempt(days: int) -> registry.Collection:
        barrier.wait()
        return collect(store, days=days)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(attempt, [8] * 4))
        list(pool.map(attempt, [16] * 4))
    collect(store, days=24)
    assert snapshot(store) == kept


def test_a_lease_protects_what_its_holder_may_need(store: Store, tmp_path: Path) -> None:
    """All loose blobs, runs that are not published or are of its model, and its versions; nothing of other models."""
    at = Many(store, tmp_path)
    put_garbage(store)
    until = time.time() + 20 * DAY
    lease = registry.Lease(name="demo", holder="x", actor="a", place="p", until=until)
    store.put("leases/model-demo.json", lease.encode())
    plan_garbage(store, keep_versions=1)
    held = collect(store, days=16, keep_versions=1)
    assert set(list_keys(held.deleted)) == {"upload"}
    assert held.held_by == ("demo",)
    store.delete("leases/model-demo.json")
    store.put("leases/model-other.json", lease.model_copy(update={"name": "other"}).encode())
    plan_garbage(store, keep_versions=1)
    done = list_keys(collect(store, days=16, keep_versions=1).deleted)
    assert done["version"] == [manifest_key("demo", at.never)]
    assert set(done) == {"version", "checkpoint"}
    assert all(PUBLISHED in key for key in done["checkpoint"])
    collect(store, days=30)
    assert "blob" in list_keys(collect(store, days=30).deleted), "the lease has run out"


def test_a_lease_that_is_taken_again_is_not_deleted(store: Store, tmp_path: Path) -> None:
    """Between the plan and the deletion, and between the listing and the deletion."""
    put_garbage(store)
    publish_new(store, tmp_path)
    plan_garbage(store)

    def take() -> None:
        store.put("leases/model-demo.json", registry.Lease(
            name="demo", holder="y", actor="b", place="q", until=time.time() + 60
        ).encode())  # fmt: skip

    found = collect(ActingStore(store, take), days=16)
    assert [g.kind for g in found.spared] == ["lease"]
    assert registry.read_lease(store, "demo") is not None


@pytest.mark.parametrize("damage", DAMAGE, ids=lambda d: d.__name__)
def test_on_a_damaged_registry_nothing_is_deleted(tmp_path: Path, damage: Callable[[Sound], Any]) -> None:
    """What a lost manifest or ref named cannot be known: one message names it; damaged blobs and strays are none."""
    sound = Sound(open_store((tmp_path / "store").as_uri()), tmp_path / "source")
    put_garbage(sound.store)
    plan_garbage(sound.store)
    damage(sound)
    before = snapshot(sound.store)
    kinds = {kind for kind, _ in tell(check(sound.store))}
    if kinds <= {"missing-blob", "wrong-size", "wrong-bytes", "unknown-key"}:
        assert collect(sound.store, days=16).deleted
        return
    for work in (registry.collect_garbage, registry.look_for_garbage):
        with pytest.raises(RegistryError, match="nothing is collected") as fault:
            work(sound.store, now=time.time() + 16 * DAY)
        assert "\n" not in str(fault.value)
        assert "`appliance check`" in str(fault.value)
    assert snapshot(sound.store) == before


def test_a_prefix_that_is_no_registry_is_left_alone(tmp_path: Path) -> None:
    """A bucket one level too high, a folder of something else: refused; an empty one has no garbage."""
    store = open_store((tmp_path / "store").as_uri())
    assert collect(store, days=100).planned == ()
    store.put("registry/FORMAT.json", b"{}")
    store.put(f"registry/{blob_key(digest_bytes(b'x'))}", b"x")
    with pytest.raises(RegistryError, match="expected the mark of a registry"):
        collect(store, days=100)


def test_a_damaged_plan_stops_all(tmp_path: Path) -> None:
    """It may be a newer release's; it is named, and can be deleted."""
    store = open_store((tmp_path / "store").as_uri())
    publish_new(store, tmp_path)
    put_garbage(store)
    plan_garbage(store)
    (plan,) = store.list("gc/")
    store.put(plan.key, b"{}")
    with pytest.raises(RegistryError, match=f"{plan.key}: damaged or from a newer release"):
        collect(store, days=16)
    store.delete(plan.key)
    plan_garbage(store)
    assert collect(store, days=16).deleted


def test_uploads_that_cannot_be_listed_or_are_not_ours_are_left(tmp_path: Path) -> None:
    """To list uploads is a right of its own; without it the rest is collected, and that is said."""

    class Denied(ActingStore):
        def list_uploads(self) -> Any:
            raise StoreError("uploads: credentials refused")

    store = open_store((tmp_path / "store").as_uri())
    publish_new(store, tmp_path)
    put_garbage(store)
    denied = Denied(store, lambda: None)
    planned = plan_garbage(denied)
    assert planned.notes == ("unfinished uploads were not looked at: uploads: credentials refused",)
    assert "upload" not in list_keys(planned.planned)
    assert collect(denied, days=16).deleted


def test_a_version_that_goes_while_others_list_is_left_out(tmp_path: Path) -> None:
    """Who lists versions never meets one of which the collector has taken the manifest meanwhile."""
    at = Many(open_store((tmp_path / "store").as_uri()), tmp_path / "source")
    gone = ActingStore(at.store, lambda: at.store.delete(manifest_key("demo", at.never)))
    assert [v.version for v in registry.list_versions(gone, "demo")] == [at.once, at.now, at.newest]


def age_all(store: Store, days: float, pattern: str = "*") -> None:
    """Make the files of a folder so many days older."""
    assert isinstance(store, LocalStore)
    for file in (f for f in store.root.rglob(pattern) if f.is_file()):
        when = file.stat().st_mtime - days * DAY
        os.utime(file, (when, when))


@pytest.mark.parametrize("skew_days", [-30, 30])
def test_ages_are_by_the_stores_clock(
    store: Store, s3: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, skew_days: float
) -> None:
    """A machine whose clock is a month off plans nothing that is young, and in a folder finds what is old."""
    summary = tmp_path / "summary.md"
    publish_new(store, tmp_path)
    put_garbage(store)
    now = time.time
    monkeypatch.setattr(time, "time", lambda: now() + skew_days * DAY)
    assert main(["gc", "--store", store.url, "--summary", str(summary)]) == 0
    assert "no garbage" in summary.read_text()
    if isinstance(store, LocalStore):
        age_all(store, 8)
        assert main(["gc", "--store", store.url, "--summary", str(summary)]) == 0
        assert "| `checkpoint` | `0` | `4 (8 bytes)` |" in summary.read_text()


def test_the_verb_says_it_to_people_machines_and_the_nights_summary(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A row per kind, bytes, and when to come again; 1 and one line on damage; the example of the help is there."""
    store = open_store((tmp_path / "store").as_uri())
    at, summary = Sound(store, tmp_path / "source"), tmp_path / "summary.md"
    put_garbage(store)
    age_all(store, 8)
    before = snapshot(store)
    arguments = ["gc", "--store", store.url, "--summary", str(summary)]
    assert main([*arguments, "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "Would delete" in out
    assert "blob        0             2 (12 bytes)" in out
    assert f"{store.url}: dry run, nothing was written" in out
    assert snapshot(store) == before
    assert main(arguments) == 0
    assert "old enough at 20" in capsys.readouterr().out
    age_all(store, 8, "gc/*")
    assert main([*arguments, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["dry_run"], told["sizes"]["deleted"]["blob"], told["due"]) == (False, 12, None)
    assert len(told["deleted"]) == 2 + 1 + 4 + 1
    assert main(arguments) == 0
    assert "done; no garbage" in capsys.readouterr().out
    remove_blob(at)
    at.remove(manifest_key("other", at.other))
    assert main(arguments) == 1
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "nothing is collected" in line
    assert "dangling-ref" in line
    text = summary.read_text()
    assert text.count("### Garbage") == 5
    assert "| `blob` | `0` | `2 (12 bytes)` | `0` |" in text
    assert "failed (exit code 1)" in text
    assert main([*arguments, "--keep-versions", "0"]) == 2
    capsys.readouterr()
    with pytest.raises(SystemExit):
        main(["gc", "--help"])
    assert "appliance gc --dry-run --store s3://BUCKET/registry" in capsys.readouterr().out


def test_every_kind_of_garbage_is_explained() -> None:
    """The table in docs/operations.md has the kinds, each once, and no other."""
    table = (Path(__file__).parent.parent / "docs" / "operations.md").read_text("utf-8").split("| Garbage |")[1]
    rows = [line for line in table.split("\n\n")[0].splitlines()[2:] if line.startswith("|")]
    assert sorted(row.split("`")[1] for row in rows) == sorted(get_args(Kind))
