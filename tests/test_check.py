"""The check: each class of damage is named with its key, all of it at once, and nothing that is sound is."""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest
from test_registry import WatchedStore, make_folder, make_manifest, promote, publish_new

from appliance import registry
from appliance.cli import main
from appliance.demo.storage import Storage
from appliance.digest import canonical_json, digest_bytes
from appliance.errors import RegistryError, StoreError
from appliance.registry.check import GRACE_S, pick_sample
from appliance.registry.findings import Kind
from appliance.registry.layout import blob_key, locate, manifest_key, ref_key, reflog_key
from appliance.store import Store, open_store
from appliance.store.s3 import S3Store

Found = list[tuple[str, str]]
REF = ref_key("demo", "production")
LATER = 2 * GRACE_S


def check(store: Any, **options: Any) -> registry.Report:
    """Everything read, now."""
    return registry.check_registry(store, **({"now": time.time(), "read": "all"} | options))


def tell(report: registry.Report) -> Found:
    """Kind and key of every finding."""
    return [(f.kind, f.key) for f in report.findings]


class Sound:
    """A registry of two models: `demo` with three moves of production and one of staging, and `other`."""

    def __init__(self, store: Store, folder: Path) -> None:
        """Publish and promote."""
        self.store = store
        self.first, self.second = (publish_new(store, folder, t) for t in ("first", "second"))
        self.other = publish_new(store, folder, "other", name="other")
        self.moves = [
            promote(store, v, reason=r) for v, r in ((self.first, "1"), (self.second, "2"), (self.first, "3"))
        ]
        promote(store, self.second, "staging")
        promote(store, self.other, name="other")

    def find_blob(self, version: str, path: str = "adapter.safetensors") -> str:
        """The key of a file of a version of `demo`."""
        manifest = registry.load_manifest(self.store, "demo", version)
        return next(blob_key(e.sha256) for e in manifest.files if e.path == path)

    def find_record(self, seq: int) -> str:
        """The key of a move of production."""
        return reflog_key("demo", seq=seq, sha256=digest_bytes(self.moves[seq - 1].encode()))

    def change(self, key: str, change: Callable[[bytes], bytes]) -> str:
        """Replace an object by what `change` makes of it; its key."""
        self.store.put(key, change(self.store.get(key)[0]))
        return key

    def remove(self, key: str) -> str:
        """Delete an object; its key."""
        self.store.delete(key)
        return key


def flip(content: bytes) -> bytes:
    """The same size, one bit in the middle changed."""
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


@pytest.fixture
def sound(tmp_path: Path) -> Sound:
    """A sound registry in a folder."""
    return Sound(open_store((tmp_path / "store").as_uri()), tmp_path / "source")


def remove_blob(at: Sound) -> Found:
    """A blob is gone."""
    return [("missing-blob", at.remove(at.find_blob(at.first)))]


def shorten_blob(at: Sound) -> Found:
    """A blob lost its last byte."""
    return [("wrong-size", at.change(at.find_blob(at.second), lambda c: c[:-1]))]


def flip_blob(at: Sound) -> Found:
    """A blob has its size and other bytes."""
    return [("wrong-bytes", at.change(at.find_blob(at.second, "card/card.md"), flip))]


def flip_manifest(at: Sound) -> Found:
    """A manifest is not the one in its version's name."""
    return [("manifest", at.change(manifest_key("other", at.other), flip))]


def remove_manifest(at: Sound) -> Found:
    """A version that an alias points at lost its manifest: its blobs are not called loose."""
    at.remove(manifest_key("other", at.other))
    return [("dangling-ref", ref_key("other", "production"))]


def write_foreign_manifest(at: Sound) -> Found:
    """A manifest is sealed by its name, and no release can read it."""
    content = canonical_json({"schema": 1, "files": "none\n" * 200})
    key = manifest_key("demo", f"20270101000000-cccccccccccc-{digest_bytes(content)[:12]}")
    at.store.put(key, content)
    return [("manifest", key)]


def remove_version(at: Sound) -> Found:
    """A version is gone; an alias is there now, another was once."""
    at.remove(manifest_key("demo", at.second))
    return [("dangling-ref", at.find_record(2)), ("dangling-ref", ref_key("demo", "staging"))]


def cut_ref(at: Sound) -> Found:
    """A ref is no JSON."""
    return [("ref", at.change(REF, lambda c: c[:-1]))]


def swap_ref(at: Sound) -> Found:
    """A ref holds the move of another alias."""
    staging = ref_key("demo", "staging")
    return [("ref", at.change(staging, lambda _: at.store.get(REF)[0]))]


def alter_ref(at: Sound) -> Found:
    """A ref was written by hand: it holds no record of the history."""
    return [("ref", at.change(REF, lambda c: c.replace(b'"ci"', b'"me"')))]


def set_ref_back(at: Sound) -> Found:
    """A ref is where it was two moves ago, although the history went on."""
    return [("ref", at.change(REF, lambda _: at.moves[0].encode()))]


def remove_ref(at: Sound) -> Found:
    """A ref is gone although its alias was moved."""
    return [("ref", at.remove(REF))]


def aim_at_nothing(at: Sound) -> Found:
    """An alias was moved, by the protocol, to what never was a version."""
    last = digest_bytes(at.moves[-1].encode())
    move = at.moves[-1].model_copy(update={"version": "../../secret", "seq": 4, "prev": last})
    at.store.put(reflog_key("demo", seq=4, sha256=digest_bytes(move.encode())), move.encode())
    at.store.put(REF, move.encode())
    return [("dangling-ref", REF)]


def remove_record(at: Sound) -> Found:
    """The chain has a gap."""
    return [("broken-history", at.remove(at.find_record(2)))]


def remove_newest_record(at: Sound) -> Found:
    """The ref's own record is gone."""
    at.remove(at.find_record(3))
    return [("ref", REF)]


def alter_record(at: Sound) -> Found:
    """A record says something else than when it was sealed."""
    return [("broken-history", at.change(at.find_record(1), lambda c: c.replace(b'"ci"', b'"me"')))]


def begin_late(at: Sound) -> Found:
    """A history whose first record is not number one."""
    move = at.moves[0].model_copy(update={"alias": "late", "seq": 7})
    at.store.put(reflog_key("demo", seq=7, sha256=digest_bytes(move.encode())), move.encode())
    at.store.put(ref_key("demo", "late"), move.encode())
    return [("broken-history", ref_key("demo", "late"))]


def put_strays(at: Sound) -> Found:
    """Keys of nobody: in the registry's folders one by one, elsewhere a folder at a time."""
    inside = ["blobs/sha256/ab/cd", "models/Demo/refs/production.json", f"models/demo/versions/{at.first}/notes"]
    for key in (*inside, "dvc/files/1", "dvc/files/2", "notes.txt"):
        at.store.put(key, b"x")
    return [("unknown-key", key) for key in (*inside, "dvc/", "notes.txt")]


def remove_format(at: Sound) -> Found:
    """The mark of a registry is gone."""
    return [("format", at.remove("FORMAT.json"))]


def damage_format(at: Sound) -> Found:
    """The mark of a registry says nothing."""
    return [("format", at.change("FORMAT.json", lambda _: b"<html>"))]


def damage_lease(at: Sound) -> Found:
    """Nobody can train the model."""
    at.store.put("leases/model-demo.json", b"{")
    return [("lease", "leases/model-demo.json")]


DAMAGE: list[Callable[[Sound], Found]] = [
    remove_blob, shorten_blob, flip_blob, flip_manifest, remove_manifest, write_foreign_manifest, remove_version,
    cut_ref, swap_ref, alter_ref, set_ref_back, remove_ref, aim_at_nothing, remove_record, remove_newest_record,
    alter_record, begin_late, put_strays, remove_format, damage_format, damage_lease,
]  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGE, ids=lambda d: d.__name__)
def test_each_class_of_damage_is_named_with_its_key(sound: Sound, damage: Callable[[Sound], Found]) -> None:
    """That key and no other; found, expected and what to do are each one plain line; nothing is changed."""
    expected = damage(sound)
    before = {o.key: sound.store.get(o.key)[0] for o in sound.store.list("")}
    report = check(sound.store, now=time.time() + LATER)
    assert sorted(tell(report)) == sorted(expected)
    assert not report.is_sound
    for finding in report.findings:
        assert finding.severity == "damage"
        assert str(finding).isprintable()
        assert len(str(finding)) < 1000
        assert finding.found
        assert finding.expected
        assert finding.action
    assert {o.key: sound.store.get(o.key)[0] for o in sound.store.list("")} == before


APART = [
    remove_blob, shorten_blob, flip_blob, flip_manifest, write_foreign_manifest, swap_ref, aim_at_nothing,
    remove_record, alter_record, begin_late, put_strays, damage_format, damage_lease,
]  # fmt: skip


def test_all_damage_is_told_at_once(store: Store, tmp_path: Path) -> None:
    """On a folder and on S3, one pass finds one of every class; what a damaged manifest named is not called loose."""
    at = Sound(store, tmp_path)
    expected = [found for damage in APART for found in damage(at)]
    store.put(blob_key(digest_bytes(b"left")), b"left")
    report = check(store, now=time.time() + LATER)
    assert sorted(tell(report)) == sorted(expected)
    assert {k for k, _ in expected} == {
        "ref",
        *(k for k in get_args(Kind) if k not in ("unreadable", "unfinished-move", "orphan")),
    }
    assert report.unnamed == 2 + 1


def test_a_sound_registry_is_sound(store: Store, tmp_path: Path) -> None:
    """However much is read; the counts are those of the registry, equal content counts once."""
    Sound(store, tmp_path)
    size = sum({e.sha256: e.size for t in ("first", "second", "other") for e in list_entries(tmp_path, t)}.values())
    for read in (0, 3, "all"):
        report = check(store, read=read, now=time.time() + LATER)
        assert report.findings == ()
        assert (report.models, report.versions, report.blobs, report.size) == (2, 3, 7, size)
        assert report.read_blobs == (7 if read == "all" else read)
    assert report.read_size == size
    one = check(store, name="other")
    assert (one.findings, one.models, one.versions, one.blobs) == ((), 1, 1, 3)
    with pytest.raises(RegistryError, match="no model 'othr'; did you mean other"):
        check(store, name="othr")
    with registry.hold_model(store, "demo", folder=tmp_path / "runs", actor="a"):
        assert check(store).findings == ()


def list_entries(folder: Path, text: str) -> tuple[Any, ...]:
    """The files that `publish_new` published for a text."""
    return make_manifest(folder / digest_bytes(text.encode())[:8]).files


def test_every_byte_of_a_registry_counts(sound: Sound) -> None:
    """Whatever object is removed, emptied, cut, flipped or replaced, the check is not sound and never raises.

    Only a ref that was moved but once may vanish with a note: so looks a first promotion that was cut off.
    """
    store, moved_once = sound.store, (ref_key("demo", "staging"), ref_key("other", "production"))
    contents = {o.key: store.get(o.key)[0] for o in store.list("") if o.key != "FORMAT.json"}
    assert len(contents) == 7 + 3 + 5 + 3
    for key, content in contents.items():
        for changed in (None, b"", content[:-1], flip(content), content + b" ", b"\xff\0[", b'{"schema":1}', b"[]"):
            if changed is None:
                store.delete(key)
            elif changed != content:
                store.put(key, changed)
            report = check(store)
            if changed is None and key in moved_once:
                assert [f.kind for f in report.findings] == ["unfinished-move"]
            else:
                assert report.is_sound is (changed == content), (key, changed)
        store.put(key, content)
    assert check(store).findings == ()


def test_what_is_being_published_and_promoted_is_never_damage(sound: Sound, tmp_path: Path) -> None:
    """Before and after each write of a first publication, of one into a registry, and of a move: at most a note.

    So it is after a crash there. Weeks later, what the crash left is told as what could be collected or promoted.
    """
    seen: list[tuple[str, Found, Found]] = []
    for store in (open_store((tmp_path / "new").as_uri()), sound.store):

        def look(_number: int, key: str, done: bool, store: Store = store) -> None:
            report, later = check(store), check(store, now=time.time() + LATER)
            assert report.is_sound
            assert later.is_sound
            seen.append((key if done else "", tell(report), tell(later)))

        promote(WatchedStore(store, look), publish_new(WatchedStore(store, look), tmp_path, "third"))
    assert len(seen) == 2 * (7 + 6)
    notes = [now for key, now, _ in seen if now]
    assert {kind for now in notes for kind, _ in now} == {"unfinished-move"}
    assert len(notes) == 2 * 2, "after the record, and before the ref"
    shared = blob_key(digest_bytes(b"{}"))
    blobs = [(key, later) for key, _, later in seen if key.startswith("blobs/") and key != shared]
    assert len(blobs) == 2 * 2
    assert all(("orphan", key) in later for key, later in blobs)


def test_a_move_that_lost_its_race_is_nothing(sound: Sound) -> None:
    """Its record stays in the history and was never a part of it."""
    lost = sound.moves[1].model_copy(update={"op_id": "loser", "version": sound.first})
    sound.store.put(reflog_key("demo", seq=2, sha256=digest_bytes(lost.encode())), lost.encode())
    assert check(sound.store).findings == ()


class ActingStore:
    """A store that does something once, right after it was first listed."""

    def __init__(self, inner: Store, act: Callable[[], object]) -> None:
        """`act` is what another program does meanwhile."""
        self._inner, self._act, self._acted = inner, act, False

    def __getattr__(self, name: str) -> Any:
        """The inner store's own method."""
        return getattr(self._inner, name)

    def list(self, prefix: str) -> Iterator[Any]:
        """The listing as it was, then the act."""
        found = list(self._inner.list(prefix))
        if not self._acted:
            self._acted = True
            self._act()
        return iter(found)


def test_what_happens_after_the_listing_is_not_taken_for_damage(sound: Sound, tmp_path: Path) -> None:
    """A version that is finished from old blobs is no orphan, and an alias that moves on to it does not dangle."""
    folder = make_folder(tmp_path / "third", "third")
    for entry in make_manifest(folder).files:
        sound.store.put_file(blob_key(entry.sha256), folder / entry.path, sha256=entry.sha256)

    def act() -> None:
        version = registry.publish(sound.store, manifest=make_manifest(folder), folder=folder)
        for target in (version, sound.first, version):
            promote(sound.store, target)
            promote(sound.store, target, "new")

    report = check(ActingStore(sound.store, act), now=time.time() + LATER)
    assert (report.findings, report.unnamed) == ((), 0)
    assert check(sound.store, now=time.time() + LATER).findings == ()


def test_only_what_nobody_can_be_about_to_name_is_an_orphan(sound: Sound, tmp_path: Path) -> None:
    """Not while it is young, not while a lease runs, not while a manifest or a ref is damaged."""
    key = blob_key(digest_bytes(b"left"))
    sound.store.put(key, b"left")
    young, old = check(sound.store), check(sound.store, now=time.time() + LATER)
    assert (young.findings, young.unnamed) == ((), 1)
    assert (tell(old), old.unnamed, old.is_sound) == ([("orphan", key)], 0, True)
    assert "could be collected" in str(old.findings[0])
    until = time.time() + LATER + 60
    lease = registry.Lease(name="demo", holder="x", actor="a", place="p", until=until)
    sound.store.put("leases/model-demo.json", lease.encode())
    held = check(sound.store, now=time.time() + LATER)
    assert (held.findings, held.unnamed) == ((), 1)
    assert tell(check(sound.store, now=until + 1)) == [("orphan", key)]
    broken = sound.change(manifest_key("demo", sound.second), flip)
    doubtful = check(sound.store, now=until + 1)
    assert tell(doubtful) == [("manifest", broken)]
    assert doubtful.unnamed > 1


@pytest.mark.parametrize(
    "content", [b"[" * 100_000, b'{"files":[' * 5000, b"\xed\xa0\x80", b'"\\ud800"', b"1e999", b""]
)
def test_what_a_hostile_writer_puts_is_named_and_stops_nothing(sound: Sound, content: bytes) -> None:
    """Content that breaks parsers, under names that seal it: a manifest, a record, a ref, a lease, the format."""
    sealed = digest_bytes(content)
    keys = {
        "manifest": manifest_key("demo", f"20270101000000-cccccccccccc-{sealed[:12]}"),
        "broken-history": reflog_key("demo", seq=9, sha256=sealed),
        "ref": ref_key("demo", "evil"),
        "lease": "leases/model-demo.json",
        "format": "FORMAT.json",
    }
    for key in keys.values():
        sound.store.put(key, content)
    assert sorted(tell(check(sound.store))) == sorted(keys.items())


@pytest.mark.parametrize("alias", ["../../x", "Loud", "a\n\x1b[2J" + "b" * 2000, ""])
def test_a_record_of_what_can_be_no_alias_is_named(sound: Sound, alias: str) -> None:
    """Its digest and number are right; no key is made of it."""
    move = sound.moves[0].model_copy(update={"alias": alias})
    key = reflog_key("demo", seq=1, sha256=digest_bytes(move.encode()))
    sound.store.put(key, move.encode())
    (finding,) = check(sound.store).findings
    assert (finding.kind, finding.key) == ("broken-history", key)
    assert str(finding).isprintable()


def test_a_path_in_a_manifest_cannot_write_to_a_terminal(sound: Sound) -> None:
    """A path is text of whoever published: it is told as one plain line."""
    body = registry.load_manifest(sound.store, "demo", sound.first).model_dump(mode="json", by_alias=True)
    body["files"] = [{"path": "a\n\x1b[2Jb" + "c" * 2000, "size": 1, "sha256": "0" * 64}]
    content = canonical_json(body)
    sound.store.put(manifest_key("demo", f"20270101000000-cccccccccccc-{digest_bytes(content)[:12]}"), content)
    (finding,) = check(sound.store).findings
    assert finding.kind == "missing-blob"
    assert str(finding).isprintable()
    assert len(str(finding)) < 1000


def test_a_store_that_cannot_give_one_object_is_told_from_one_that_fails(sound: Sound) -> None:
    """One object that cannot be read is a finding among others; a store that answers for nothing raises."""
    file = Path(sound.store.url.removeprefix("file://")) / sound.find_blob(sound.first)
    file.unlink()
    file.symlink_to(file)
    other = sound.remove(sound.find_blob(sound.second))
    assert sorted(kind for kind, _ in tell(check(sound.store))) == ["missing-blob", "unreadable"]
    assert other in {key for _, key in tell(check(sound.store, read=0))}

    class Failing(ActingStore):
        def head(self, key: str) -> Any:
            raise StoreError(f"{key}: cannot reach the store")

    with pytest.raises(StoreError, match="cannot reach"):
        check(Failing(sound.store, lambda: None), read=0)


@pytest.mark.parametrize("count", [1, 2, 3, 7, 20])
def test_days_in_a_row_read_all(count: int) -> None:
    """Never more than `count` a day, everything in fewer than 2 * blobs / count days, from whatever day on."""
    for size in range(130):
        blobs = range(size)
        days = next(d for d in (1, 2, 4, 8, 16, 32, 64, 128, 256) if d * count >= size)
        assert days == 1 or days < 2 * size / count
        for start in (0, 739_580):
            read = [pick_sample(blobs, count=count, day=start + d) for d in range(days)]
            assert {b for each in read for b in each} == set(blobs)
            assert all(len(each) == min(count, size) for each in read)


def test_a_registry_that_grows_every_night_is_read_all_the_same() -> None:
    """With ten new blobs a night at random places, each is read again and again; the longest wait is two rounds."""
    blobs = sorted(digest_bytes(b"%d" % n) for n in range(200))
    waits = dict.fromkeys(blobs, 0)
    for day in range(739_580, 739_580 + 120):
        chosen = set(pick_sample(blobs, count=20, day=day))
        waits = {blob: 0 if blob in chosen else waits.get(blob, 0) + 1 for blob in blobs}
        assert max(waits.values()) <= 2 * 2 * len(blobs) / 20
        blobs = sorted([*blobs, *(digest_bytes(b"%d-%d" % (day, n)) for n in range(10))])


def test_a_flipped_byte_is_found_within_a_round(sound: Sound) -> None:
    """Sizes alone do not tell it; a sample of two of seven blobs has it after four nights at the latest."""
    (expected,) = flip_blob(sound)
    assert check(sound.store, read=0).findings == ()
    found = [tell(check(sound.store, read=2, day=day)) for day in range(100, 104)]
    assert expected in [f for each in found for f in each]
    assert [f for each in found for f in each if f != expected] == []


@pytest.mark.slow
def test_rot_on_the_servers_own_disk_is_found(storage: Storage, bucket: S3Store, tmp_path: Path) -> None:
    """A bit flipped in the volume of the S3 server, behind its back: one finding, and the rest is checked.

    Slow because SeaweedFS, whose own checksum tells it, tries for 40 s before it says so.
    """
    store, weights = replace(bucket, prefix="rot"), os.urandom(100_000)
    folder = make_folder(tmp_path / "source")
    (folder / "adapter.safetensors").write_bytes(weights)
    registry.publish(store, manifest=make_manifest(folder), folder=folder)
    assert check(store).findings == ()
    key = blob_key(digest_bytes(weights))
    assert rot(storage.log.parent / "data", weights), "the bytes are on the disk as they are"
    (finding,) = check(store).findings
    assert finding.key == key
    assert finding.kind in ("wrong-bytes", "unreadable")


def rot(folder: Path, content: bytes) -> int:
    """Flip a bit in every copy of `content` below a folder; how many there were."""
    count = 0
    for file in (f for f in folder.rglob("*") if f.is_file()):
        at = file.read_bytes().find(content)
        if at >= 0:
            with file.open("r+b") as stream:
                stream.seek(at)
                stream.write(bytes([content[0] ^ 1]))
                os.fsync(stream.fileno())
            count += 1
    return count


def test_the_verb_says_it_to_people_machines_and_the_nights_summary(
    sound: Sound, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """0 and one line when sound, with notes too; 1 and a line per finding when not; names write to no terminal."""
    url, summary = sound.store.url, tmp_path / "summary.md"
    arguments = ["check", "--store", url]
    assert main([*arguments, "--sample", "2", "--date", "2026-01-31"]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith(f"{url}: sound: 2 models, 3 versions, 7 blobs, ")
    assert "; 2 blobs, " in line
    old = sound.store.put(blob_key(digest_bytes(b"left")), b"left").key
    os.utime(Path(url.removeprefix("file://")) / old, (0, 0))
    assert main([*arguments, "--summary", str(summary)]) == 0
    assert capsys.readouterr().out.startswith(f"note: {old}: [orphan] 4 bytes")
    (Path(url.removeprefix("file://")) / "blobs" / "a\n\x1b[2J|`b").write_bytes(b"x")
    flipped = flip_blob(sound)[0][1]
    assert main([*arguments, "--read-data", "--summary", str(summary)]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3 + 1, "the note, the damage, the stray key, the sum"
    assert all(line.isprintable() for line in lines)
    assert sum(line.startswith(f"damage: {flipped}: [wrong-bytes] other bytes, ") for line in lines) == 1
    assert ": 2 damaged: " in lines[-1]
    text = summary.read_text()
    assert text.count("### Check") == 2
    assert f"| `damage` | `wrong-bytes` | `{flipped}` |" in text
    assert "\x1b" not in text
    assert main([*arguments, "--json"]) == 1
    told = json.loads(capsys.readouterr().out)
    assert (told["sound"], told["versions"], told["read_blobs"]) == (False, 3, 0)
    assert {f["kind"] for f in told["findings"]} == {"unknown-key", "orphan"}


def test_what_is_no_registry_is_an_error_or_said(
    tmp_path: Path, s3: Storage, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nothing yet is said; no folder, another schema, a store that refuses and two ways of reading are errors."""
    store = open_store((tmp_path / "store").as_uri())
    assert main(["check", "--store", store.url]) == 1
    assert f"{store.url}: no such folder; look at the spelling" in capsys.readouterr().err
    (tmp_path / "store").mkdir()
    assert main(["check", "--store", store.url]) == 0
    told = capsys.readouterr().out
    assert "nothing is published here yet" in told
    assert "sound" not in told
    store.put("FORMAT.json", b'{"schema":2}')
    summary = tmp_path / "summary.md"
    assert main(["check", "--store", store.url, "--summary", str(summary)]) == 1
    assert "schema 2, this release knows 1" in capsys.readouterr().err
    assert "failed (exit code 1)" in summary.read_text()
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    assert main(["check", "--store", "s3://registry/x"]) == 1
    assert "credentials refused" in capsys.readouterr().err
    assert main(["check", "--store", store.url, "--sample", "2", "--read-data"]) == 2
    assert main(["check", "--store", store.url, "--sample", "0"]) == 2
    assert "give either --read-data" in capsys.readouterr().err


def test_every_key_that_is_written_has_a_place() -> None:
    """The places of the layout, and near misses."""
    sha256 = "ab" + "0" * 62
    places = {
        "FORMAT.json": "format",
        blob_key(sha256): "blob",
        f"checkpoints/{sha256}/10-abc/sealed.json": "checkpoint",
        "leases/model-demo.json": "lease",
        "gc/1.json": None,
        "baselines/1.json": None,
        f"blobs/sha256/ac/{sha256}": None,
        f"{blob_key(sha256)}\n": None,
        "models/demo/refs/Production.json": None,
        "models/demo/reflog/1-abc.json": None,
        "models/demo/versions/latest/manifest.json": None,
        "format.json": None,
    }
    assert {k: at.place if (at := locate(k)) else None for k in places} == places


def test_every_kind_is_explained() -> None:
    """The table in docs/operations.md has the check's kinds, each once, and no other."""
    table = (Path(__file__).parent.parent / "docs" / "operations.md").read_text("utf-8").split("| Finding |")[1]
    rows = [line for line in table.split("\n\n")[0].splitlines()[2:] if line.startswith("|")]
    assert sorted(kind for row in rows for kind in re.findall(r"`([a-z-]+)`", row.split("|")[1])) == sorted(
        get_args(Kind)
    )
