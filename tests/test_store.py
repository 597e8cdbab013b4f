"""Stores: the laws that hold for a folder and for S3 alike, and what each says when it cannot keep them."""

from __future__ import annotations

import os
import resource
import signal
import socket
import subprocess
import threading
import time
import tracemalloc
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from botocore.exceptions import ClientError, ReadTimeoutError
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from appliance.demo.storage import Storage
from appliance.digest import digest_bytes, write_atomic
from appliance.errors import NotFoundError, PreconditionFailedError, StoreError
from appliance.registry import create_format
from appliance.store import Store, StoredObject, open_store, s3_writing
from appliance.store import s3 as s3_module
from appliance.store.fetching import write_verified
from appliance.store.local import LocalStore
from appliance.store.s3 import S3Store
from appliance.store.s3_writing import Clients

RACERS = 16


def race(action: Callable[[int], Any], racers: int = RACERS) -> list[Any]:
    """What `action(i)` returned or raised for threads that start at one moment."""
    barrier = threading.Barrier(racers)

    def attempt(number: int) -> Any:
        barrier.wait()
        try:
            return action(number)
        except StoreError as fault:
            return fault

    with ThreadPoolExecutor(racers) as pool:
        return list(pool.map(attempt, range(racers)))


def write_file(path: Path, content: bytes) -> str:
    """Write and return the SHA-256."""
    path.write_bytes(content)
    return digest_bytes(content)


def check_one_line(fault: pytest.ExceptionInfo[StoreError], *words: str) -> None:
    """The message is one line that contains the words."""
    message = str(fault.value)
    assert "\n" not in message
    assert all(word in message for word in words), message


def test_what_was_put_is_got_headed_and_listed_in_key_order(store: Store) -> None:
    """Bytes, size and ETag agree over put, get, digest, head and list; a prefix is not a folder."""
    for key in ("a/b/2", "a/b/10", "a-b", "a/c", "ab"):
        made = store.put(key, key.encode())
        content, stored = store.get(key)
        assert (content, stored) == (key.encode(), made)
        assert store.head(key) == made
        assert store.digest(key) == (digest_bytes(content), made)
    assert [o.key for o in store.list("")] == ["a-b", "a/b/10", "a/b/2", "a/c", "ab"]
    assert [(o.key, o.size) for o in store.list("a/b/1")] == [("a/b/10", 6)]
    assert list(store.list("nothing/")) == []


def test_a_listing_says_when_an_object_was_written(store: Store) -> None:
    """By the store's clock, to the second; writing it again makes it younger."""
    began = time.time()
    store.put("a", b"1")
    (first,) = store.list("")
    assert first.modified is not None
    assert began - 2 <= first.modified <= time.time() + 2
    time.sleep(1.1)  # S3 tells whole seconds
    store.put("a", b"2")
    (second,) = store.list("")
    assert second.modified is not None
    assert second.modified > first.modified


def test_a_head_and_the_clock_tell_time_as_a_listing_does(store: Store) -> None:
    """One clock for all: what was written a moment ago is a moment old."""
    store.put("a", b"1")
    (listed,) = store.list("")
    head = store.head("a")
    assert head is not None
    assert head.modified == listed.modified
    assert listed.modified is not None
    assert -1.1 <= store.clock() - listed.modified <= 5
    assert [o.key for o in store.list("")] == ["a"]


def test_only_the_object_that_was_listed_is_deleted(store: Store, tmp_path: Path) -> None:
    """One that was written again meanwhile, with the same bytes even, stays; one that is gone is success."""
    sha256 = write_file(tmp_path / "in", b"content")
    store.put_file("blob", tmp_path / "in", sha256=sha256)
    (listed,) = store.list("")
    assert store.put_file("blob", tmp_path / "in", sha256=sha256, max_age_s=60).etag == store.head("blob").etag  # type: ignore[union-attr]
    assert [o.modified for o in store.list("")] == [listed.modified], "a minute is not over"
    for _ in range(2):  # back and forth between the two forms that an object has on S3
        (listed,) = store.list("")
        store.put_file("blob", tmp_path / "in", sha256=sha256, max_age_s=0)
        with pytest.raises(PreconditionFailedError, match="blob: was written again"):
            store.delete("blob", only=listed)
        assert store.get("blob")[0] == b"content"
    (listed,) = store.list("")
    store.delete("blob", only=listed)
    assert store.head("blob") is None
    store.delete("blob", only=listed)


def test_an_empty_or_damaged_object_is_written_again_or_named(store: Store, tmp_path: Path) -> None:
    """What has no bytes has no parts either; other bytes are never replaced, however old."""
    empty = write_file(tmp_path / "empty", b"")
    store.put_file("empty", tmp_path / "empty", sha256=empty)
    assert store.put_file("empty", tmp_path / "empty", sha256=empty, max_age_s=0).size == 0
    sha256 = write_file(tmp_path / "in", b"content")
    store.put("blob", b"kontent")
    with pytest.raises(StoreError, match="damaged"):
        store.put_file("blob", tmp_path / "in", sha256=sha256, max_age_s=0)
    assert store.get("blob")[0] == b"kontent"


def test_sixteen_racing_rewrites_and_deletions_end_with_the_object(store: Store, tmp_path: Path) -> None:
    """Whoever deletes what was listed before takes at most that; the writers' object is there in the end."""
    sha256 = write_file(tmp_path / "in", b"content" * 100)
    store.put_file("blob", tmp_path / "in", sha256=sha256)
    (listed,) = store.list("")
    store.put_file("blob", tmp_path / "in", sha256=sha256, max_age_s=0)

    def act(number: int) -> None:
        if number % 2:
            store.put_file("blob", tmp_path / "in", sha256=sha256, max_age_s=60)
        else:
            store.delete("blob", only=listed)

    results = race(act, racers=8)
    assert [type(r) for r in results[0::2]] == [PreconditionFailedError] * 4
    assert results[1::2] == [None] * 4
    assert store.get("blob")[0] == b"content" * 100


def test_unfinished_uploads_are_listed_and_given_back(bucket: S3Store, tmp_path: Path) -> None:
    """Of this prefix only, with their bytes and begin; twice is success; no object comes of it."""
    store = replace(bucket, prefix="uploads")
    steady = bucket.clients.steady
    for key in ("uploads/a/b", "uploadsx/c"):
        begun = steady.create_multipart_upload(Bucket=bucket.bucket, Key=key)
        steady.upload_part(Bucket=bucket.bucket, Key=key, UploadId=begun["UploadId"], PartNumber=1, Body=b"12345")
    (upload,) = store.list_uploads()
    assert (upload.key, upload.size) == ("a/b", 5)
    assert -2 <= store.clock() - upload.begun <= 30
    store.abort_upload(upload)
    store.abort_upload(upload)
    assert list(store.list_uploads()) == []
    assert len(list(replace(bucket, prefix="uploadsx").list_uploads())) == 1
    assert list(store.list("")) == []


def test_what_a_killed_writer_left_in_a_folder_is_an_unfinished_upload(tmp_path: Path) -> None:
    """A temporary file of whatever writer; a token cannot lead out of their folder."""
    store = LocalStore(tmp_path / "store")
    assert list(store.list_uploads()) == []
    assert store.clock() == pytest.approx(time.time(), abs=2)
    assert not store.root.exists(), "to ask for the time makes no store"
    store.put("a", b"1")
    (store.root / ".tmp" / "left").write_bytes(b"123")
    (upload,) = store.list_uploads()
    assert (upload.key, upload.size) == (".tmp/left", 3)
    with pytest.raises(StoreError, match="plain relative path"):
        store.abort_upload(replace(upload, token="../a"))
    store.abort_upload(upload)
    store.abort_upload(upload)
    assert list(store.list_uploads()) == []


def test_an_absent_key_is_not_found_and_its_removal_is_success(store: Store, tmp_path: Path) -> None:
    """Get, get_file and digest raise `NotFoundError`, head says `None`, delete says nothing."""
    with pytest.raises(NotFoundError, match="x/y"):
        store.get("x/y")
    with pytest.raises(NotFoundError, match="x/y"):
        store.digest("x/y")
    with pytest.raises(NotFoundError, match="x/y"):
        store.get_file("x/y", tmp_path / "f", sha256="0" * 64)
    assert store.head("x/y") is None
    store.put("x/y", b"1")
    store.delete("x/y")
    store.delete("x/y")
    assert store.head("x/y") is None


def test_sixteen_racing_creations_have_exactly_one_winner(store: Store) -> None:
    """The winner's bytes stay; every other writer learns that it lost."""
    results = race(lambda i: store.put("one", b"writer %d" % i, if_none_match=True))
    winners = [i for i, r in enumerate(results) if not isinstance(r, StoreError)]
    assert len(winners) == 1
    assert all(isinstance(r, PreconditionFailedError) for i, r in enumerate(results) if i not in winners)
    assert store.get("one")[0] == b"writer %d" % winners[0]


def test_racing_replacements_have_exactly_one_winner(store: Store) -> None:
    """If-Match with one ETag succeeds once (eight writers: SeaweedFS makes each loser of its lock wait a second)."""
    etag = store.put("ref", b"old").etag
    results = race(lambda i: store.put("ref", b"writer %d" % i, if_match=etag), racers=8)
    winners = [i for i, r in enumerate(results) if not isinstance(r, StoreError)]
    assert len(winners) == 1
    assert store.get("ref")[0] == b"writer %d" % winners[0]


def test_if_match_loses_against_a_newer_object_and_against_none(store: Store) -> None:
    """A stale or invented ETag changes nothing."""
    old = store.put("ref", b"1")
    store.put("ref", b"2", if_match=old.etag)
    with pytest.raises(PreconditionFailedError):
        store.put("ref", b"3", if_match=old.etag)
    with pytest.raises(PreconditionFailedError):
        store.put("absent", b"3", if_match=old.etag)
    assert store.get("ref")[0] == b"2"
    assert store.head("absent") is None


@pytest.mark.parametrize("write", [write_atomic, lambda p, c: write_verified([c], p, sha256=None, subject="it")])
def test_two_writers_of_one_name_and_one_number_do_not_meet(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: Callable[[Path, bytes], None]
) -> None:
    """Processes of two containers that share a cache may both be number 1: each writes its own bytes, the last stay."""
    file, others = tmp_path / "f", [b"other"]
    fsync = os.fsync

    def meet(descriptor: int) -> None:
        if others:
            write(file, others.pop())
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", meet)
    write(file, b"mine")
    assert file.read_bytes() == b"mine"
    assert list(tmp_path.iterdir()) == [file]


def test_a_file_is_stored_once_and_comes_back_byte_for_byte(store: Store, tmp_path: Path) -> None:
    """put_file twice is success; get_file gives the same bytes with mode 0644 and leaves nothing beside them."""
    sha256 = write_file(tmp_path / "in", os.urandom(300_000))
    first = store.put_file("blob", tmp_path / "in", sha256=sha256)
    assert store.put_file("blob", tmp_path / "in", sha256=sha256) == first
    store.get_file("blob", tmp_path / "out" / "f", sha256=sha256)
    store.get_file("blob", tmp_path / "out" / "g", sha256=None)
    assert (tmp_path / "out" / "f").read_bytes() == (tmp_path / "in").read_bytes()
    assert (tmp_path / "out" / "f").stat().st_mode & 0o777 == 0o644
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["f", "g"]


def test_racing_writers_of_one_file_all_succeed(store: Store, tmp_path: Path) -> None:
    """Content under its own digest has no losers."""
    sha256 = write_file(tmp_path / "in", b"same" * 1000)
    results = race(lambda _: store.put_file("blob", tmp_path / "in", sha256=sha256).size, racers=4)
    assert results == [4000] * 4


def test_a_file_with_other_bytes_than_announced_is_not_stored(store: Store, tmp_path: Path) -> None:
    """The store, not the caller, has the last word on the digest."""
    write_file(tmp_path / "in", b"changed meanwhile")
    with pytest.raises(StoreError, match="SHA-256"):
        store.put_file("blob", tmp_path / "in", sha256=digest_bytes(b"as it was hashed"))
    assert store.head("blob") is None


@pytest.mark.parametrize("held", [b"conten", b"kontent"], ids=["truncated", "altered"])
def test_damage_under_a_key_is_named_and_never_overwritten_or_delivered(
    store: Store, tmp_path: Path, held: bytes
) -> None:
    """Neither a new upload nor a download accepts an object that is not what its digest says."""
    sha256 = write_file(tmp_path / "in", b"content")
    store.put("blob", held)
    with pytest.raises(StoreError, match=r"blob: damaged"):
        store.put_file("blob", tmp_path / "in", sha256=sha256)
    with pytest.raises(StoreError, match=r"blob: damaged, SHA-256"):
        store.get_file("blob", tmp_path / "out" / "f", sha256=sha256)
    assert list((tmp_path / "out").iterdir()) == []
    assert store.get("blob")[0] == held


@pytest.mark.parametrize("key", ["", "/a", "../a", "a/../b", "a//b", "a/", "./a", "a\\b", "a\nb", ".tmp/a", "a\0b"])
def test_a_key_that_is_no_plain_path_is_refused(store: Store, key: str) -> None:
    """No key reaches outside the store's folder or prefix."""
    with pytest.raises(StoreError, match="plain relative path"):
        store.put(key, b"")


@settings(derandomize=True, max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(key=st.text(alphabet="a./\\\0 é-", max_size=12))
def test_any_key_stays_inside_the_folder(tmp_path: Path, key: str) -> None:
    """A key is refused, or what it names lies below the root."""
    try:
        target = LocalStore(tmp_path)._target(key)
    except StoreError:
        return
    assert target.resolve().is_relative_to(tmp_path.resolve())
    assert target != tmp_path


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("", "no scheme"),
        ("/srv/registry", "file:///srv/registry"),
        ("file://srv/registry", "three slashes"),
        ("file:///", "absolute folder"),
        ("http://host/bucket", "unknown scheme 'http'"),
        ("s3://", "not a bucket name"),
        ("s3://Bad_Bucket/x", "not a bucket name"),
        ("s3://bucket/a/../b", "plain relative path"),
        ("s3://bucket/a?versionId=1", "'?'"),
        ("s3://key:sesame@bucket/x", "no credentials"),
        ("file://[x", "expected s3://"),
    ],
)
def test_a_url_that_names_no_store_is_refused_with_what_is_expected(url: str, words: str) -> None:
    """The message says what was found and what was expected, and repeats no secret."""
    with pytest.raises(StoreError) as fault:
        open_store(url)
    check_one_line(fault, words)
    assert "sesame" not in str(fault.value)


def test_trying_to_mark_a_registry_writes_once_and_always_asks(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """How a run learns that a registry which is there takes its version: the store keeps what is, and was asked."""
    create_format(store)
    kept = store.get("FORMAT.json")
    create_format(store)
    assert store.get("FORMAT.json") == kept
    refusal = StoreError(f"{store.url}: permission denied")

    def refuse(*_args: object, **_more: object) -> StoredObject:
        raise refusal

    monkeypatch.setattr(type(store), "put", refuse)
    with pytest.raises(StoreError, match="permission denied"):
        create_format(store)


def test_a_file_is_no_store(tmp_path: Path) -> None:
    """Where a file is in the place of the folder or above it, nothing could be read or written: no empty store."""
    (tmp_path / "file").touch()
    for place in ("file", "file/store"):
        with pytest.raises(StoreError, match=r"/file is a file, expected a folder; mend the address$"):
            open_store((tmp_path / place).as_uri())


def test_urls_name_the_store_they_open(s3: Storage, tmp_path: Path) -> None:
    """`open_store(url).url` is the URL, with spaces in folders as in URLs."""
    assert open_store("s3://registry/team/a/").url == "s3://registry/team/a"
    assert open_store("s3://registry").url == "s3://registry"
    folder = tmp_path / "with space"
    assert open_store(folder.as_uri()).url == folder.as_uri()
    open_store(folder.as_uri()).put("k", b"v")
    assert (folder / "k").read_bytes() == b"v"


def every_call(store: Store, tmp_path: Path) -> list[Callable[[], object]]:
    """Each method of a store once."""
    sha256 = write_file(tmp_path / "file", b"x")
    return [
        lambda: store.put("k", b"x"),
        lambda: store.put("k", b"x", if_none_match=True),
        lambda: store.put_file("k", tmp_path / "file", sha256=sha256),
        lambda: store.get("k"),
        lambda: store.get_file("k", tmp_path / "out", sha256=sha256),
        lambda: store.digest("k"),
        lambda: store.head("k"),
        lambda: list(store.list("")),
        lambda: list(store.list_uploads()),
        lambda: store.delete("k", only=StoredObject("k", 1, "x", 0.0)),
        store.clock,
    ]


@pytest.mark.parametrize(
    ("variable", "value"), [("AWS_SECRET_ACCESS_KEY", "wrong"), ("AWS_ACCESS_KEY_ID", "nobody")], ids=["secret", "key"]
)
def test_wrong_credentials_are_one_line_for_every_call(
    s3: Storage, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, variable: str, value: str
) -> None:
    """Endpoint and variables are named, the secret is not."""
    monkeypatch.setenv(variable, value)
    for call in every_call(open_store("s3://registry/x"), tmp_path):
        with pytest.raises(StoreError) as fault:
            call()
        check_one_line(fault, "credentials refused by", s3.endpoint, "AWS_ACCESS_KEY_ID", "s3://registry/x")
        assert s3.secret_key not in str(fault.value)


def test_a_missing_bucket_is_one_line_for_every_call(s3: Storage, tmp_path: Path) -> None:
    """Also for HEAD, which S3 answers like a missing key."""
    for call in every_call(open_store("s3://no-such-bucket/x"), tmp_path):
        with pytest.raises(StoreError) as fault:
            call()
        check_one_line(fault, "no-such-bucket", "no such bucket", s3.endpoint)
        assert not isinstance(fault.value, NotFoundError)


def test_an_unreachable_endpoint_is_one_line_within_seconds(
    s3: Storage, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A refused connection is retried a little, then named."""
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://127.0.0.1:9")
    store, began = open_store("s3://registry/x"), time.monotonic()
    for call in (lambda: store.put("k", b"", if_none_match=True), lambda: store.head("k")):
        with pytest.raises(StoreError) as fault:
            call()
        check_one_line(fault, "cannot reach http://127.0.0.1:9", "AWS_ENDPOINT_URL")
    assert time.monotonic() - began < 30


def test_no_credentials_and_broken_settings_are_one_line(s3: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    """What boto3 would raise as its own becomes a `StoreError`."""
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "not a url")
    with pytest.raises(StoreError, match="AWS_ENDPOINT_URL"):
        open_store("s3://registry/x")
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", s3.endpoint)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", os.devnull)
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    with pytest.raises(StoreError) as fault:
        open_store("s3://registry/x").get("k")
    check_one_line(fault, "no complete credentials", "AWS_ACCESS_KEY_ID")


def test_a_file_above_64_mib_goes_up_in_parts_with_one_creation(bucket: S3Store, tmp_path: Path) -> None:
    """Same bytes back; a second upload finds it equal; other bytes of the same size are named as damage."""
    store = replace(bucket, prefix="large")
    content = os.urandom(1 << 20) * 66
    sha256 = write_file(tmp_path / "in", content)
    first = store.put_file("blob", tmp_path / "in", sha256=sha256)
    assert first.etag.strip('"').endswith("-3")
    assert store.put_file("blob", tmp_path / "in", sha256=sha256) == first
    store.get_file("blob", tmp_path / "out", sha256=sha256)
    check_digest_in_pieces(store, sha256)
    other = write_file(tmp_path / "in", content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(StoreError, match="damaged"):
        store.put_file("blob", tmp_path / "in", sha256=other)


def check_digest_in_pieces(store: Store, sha256: str) -> None:
    """The object of 66 MiB under `blob` is hashed in little memory."""
    tracemalloc.start()
    try:
        assert store.digest("blob") == (sha256, store.head("blob"))
        assert tracemalloc.get_traced_memory()[1] < 16 << 20
    finally:
        tracemalloc.stop()


class FaultyClient:
    """A real client that misbehaves once: the answer to one call is lost, or another one comes instead."""

    def __init__(self, client: Any, fault: Exception, *, applied: bool) -> None:
        """`applied`: the server did what was asked before the fault."""
        self._client, self._fault, self._applied, self.calls = client, fault, applied, 0

    def __getattr__(self, name: str) -> Any:
        """The client's own method, except for the first call."""
        method = getattr(self._client, name)

        def call(**request: Any) -> Any:
            self.calls += 1
            if self.calls > 1:
                return method(**request)
            if self._applied:
                method(**request)
            raise self._fault

        return method if name == "meta" else call


def answer(code: str, status: int) -> ClientError:
    """A server's error answer."""
    return ClientError({"Error": {"Code": code}, "ResponseMetadata": {"HTTPStatusCode": status}}, "PutObject")


LOST = ReadTimeoutError(endpoint_url="http://store")
FAULTS = {
    "lost-before": (LOST, False),
    "lost-after": (LOST, True),
    "409": (answer("ConditionalRequestConflict", 409), False),
    "503-before": (answer("SlowDown", 503), False),
    "500-after": (answer("InternalError", 500), True),
    "400-unread": (answer("RequestTimeout", 400), False),
}


def make_faulty(bucket: S3Store, prefix: str, fault: str) -> S3Store:
    """A store below `prefix` whose first conditional write meets `fault`."""
    error, applied = FAULTS[fault]
    once = FaultyClient(bucket.clients.once, error, applied=applied)
    return replace(bucket, prefix=prefix, clients=Clients(bucket.clients.steady, once))


@pytest.mark.parametrize("fault", FAULTS)
def test_a_creation_with_a_lost_answer_succeeds_exactly_once(bucket: S3Store, tmp_path: Path, fault: str) -> None:
    """409, 5xx and a body that came too late are tried again; our own first success is no competitor's."""
    store = make_faulty(bucket, f"lost-{fault}", fault)
    made = store.put("ref", b"mine", if_none_match=True)
    assert store.get("ref") == (b"mine", made)
    with pytest.raises(PreconditionFailedError):
        store.put("ref", b"other", if_none_match=True)
    store = make_faulty(bucket, f"lost-{fault}", fault)
    assert store.put("ref", b"newer", if_match=made.etag) == store.head("ref")
    store = make_faulty(bucket, f"lost-{fault}", fault)
    sha256 = write_file(tmp_path / "f", b"blob")
    assert store.put_file("blob", tmp_path / "f", sha256=sha256).size == 4


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> int:
    """Multipart from 6 MiB on instead of 64, in parts of 5 MiB (the least that S3 allows); the size to use."""
    monkeypatch.setattr(s3_module, "_SINGLE_PUT_BYTES", 6 << 20)
    monkeypatch.setattr(s3_writing, "PART_BYTES", 5 << 20)
    return 7 << 20


@pytest.mark.parametrize("fault", FAULTS)
def test_a_large_upload_with_a_lost_answer_at_the_end_succeeds(
    bucket: S3Store, tmp_path: Path, small_parts: int, fault: str
) -> None:
    """409 at completion starts the upload anew; a lost answer is settled by looking."""
    store = make_faulty(bucket, f"large-{fault}", fault)
    sha256 = write_file(tmp_path / "f", bytes(small_parts))
    stored = store.put_file("blob", tmp_path / "f", sha256=sha256)
    assert stored.size == small_parts
    assert stored.etag.strip('"').endswith("-2")


class Aborting:
    """A client whose first upload is gone before its second part arrives, as after somebody's clean-up."""

    def __init__(self, client: Any) -> None:
        """`begun` counts uploads."""
        self._client, self.begun = client, 0

    def __getattr__(self, name: str) -> Any:
        """The client's own method."""
        return getattr(self._client, name)

    def create_multipart_upload(self, **request: Any) -> Any:
        """Counted."""
        self.begun += 1
        return self._client.create_multipart_upload(**request)

    def upload_part(self, **request: Any) -> Any:
        """The server's own answer, after the upload was aborted."""
        if (self.begun, request["PartNumber"]) == (1, 2):
            self._client.abort_multipart_upload(**{k: request[k] for k in ("Bucket", "Key", "UploadId")})
        return self._client.upload_part(**request)


def test_an_upload_that_is_lost_between_its_parts_is_started_anew(
    bucket: S3Store, tmp_path: Path, small_parts: int
) -> None:
    """As one that is lost at its completion: no object is missing, there is none yet."""
    steady = Aborting(bucket.clients.steady)
    store = replace(bucket, prefix="aborted", clients=Clients(steady, bucket.clients.once))
    sha256 = write_file(tmp_path / "f", bytes(small_parts))
    assert store.put_file("blob", tmp_path / "f", sha256=sha256).size == small_parts
    assert steady.begun == 2
    assert store.digest("blob")[0] == sha256


def test_a_large_object_is_written_again_as_another_one(bucket: S3Store, tmp_path: Path, small_parts: int) -> None:
    """In one piece after parts, in parts after one piece: its ETag differs each time, its bytes never."""
    store = replace(bucket, prefix="large-again")
    sha256 = write_file(tmp_path / "f", bytes(small_parts))
    etags = [
        store.put_file("blob", tmp_path / "f", sha256=sha256, max_age_s=0).etag.strip('"').partition("-")[2]
        for _ in range(3)
    ]
    assert etags == ["2", "", "2"]
    assert store.digest("blob")[0] == sha256


class WithoutConditions:
    """A client of a server that knows no conditional deletion: it says so, or deletes whatever is there."""

    def __init__(self, client: Any, *, says_so: bool) -> None:
        """`says_so`: 501, as servers that do not know a header may answer."""
        self._client, self._says_so = client, says_so

    def __getattr__(self, name: str) -> Any:
        """The client's own method, except for the condition of a deletion."""
        method = getattr(self._client, name)

        def delete(**request: Any) -> Any:
            if request.pop("IfMatch", None) and self._says_so:
                raise answer("NotImplemented", 501)
            return method(**request)

        return delete if name == "delete_object" else method


@pytest.mark.parametrize("says_so", [True, False], ids=["refuses", "ignores"])
def test_a_server_without_conditional_deletion_is_asked_before(bucket: S3Store, says_so: bool) -> None:
    """The object that was listed goes, one that was written again stays."""
    clients = Clients(WithoutConditions(bucket.clients.steady, says_so=says_so), bucket.clients.once)  # type: ignore[arg-type]
    store = replace(bucket, prefix=f"plain-{says_so}", clients=clients)
    store.put("a", b"1")
    (listed,) = store.list("")
    store.put("a", b"2")
    with pytest.raises(PreconditionFailedError):
        store.delete("a", only=listed)
    (listed,) = store.list("")
    store.delete("a", only=listed)
    assert store.head("a") is None


def test_a_large_file_that_changed_is_not_stored(bucket: S3Store, tmp_path: Path, small_parts: int) -> None:
    """The digest is taken over the parts that were sent; the upload is thrown away."""
    store = replace(bucket, prefix="changed")
    write_file(tmp_path / "f", bytes(small_parts))
    with pytest.raises(StoreError, match="the file changed"):
        store.put_file("blob", tmp_path / "f", sha256="0" * 64)
    assert store.head("blob") is None


def test_racing_large_uploads_of_one_file_all_succeed(bucket: S3Store, tmp_path: Path, small_parts: int) -> None:
    """One completion creates the object; the others find it equal."""
    store = replace(bucket, prefix="large-race")
    sha256 = write_file(tmp_path / "f", bytes(small_parts))
    found = race(lambda _: store.put_file("blob", tmp_path / "f", sha256=sha256), racers=3)
    assert found == [found[0]] * 3


def test_a_lost_answer_never_makes_a_competitors_object_ours(bucket: S3Store) -> None:
    """After a lost answer that was not applied, a 412 stays a lost race."""
    replace(bucket, prefix="rival").put("ref", b"theirs")
    store = make_faulty(bucket, "rival", "lost-before")
    with pytest.raises(PreconditionFailedError):
        store.put("ref", b"mine", if_none_match=True)


def test_a_body_that_breaks_off_is_fetched_again_or_named(s3: Storage, tmp_path: Path) -> None:
    """A server that closes in the middle of every body leaves an error and no file."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        thread = threading.Thread(target=serve, args=(server, TRUNCATED), daemon=True)
        thread.start()
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("AWS_ENDPOINT_URL_S3", f"http://127.0.0.1:{server.getsockname()[1]}")
            store = open_store("s3://registry/x")
            with pytest.raises(StoreError) as fault:
                store.get_file("k", tmp_path / "out" / "f", sha256="0" * 64)
            check_one_line(fault, "s3://registry/x/k")
            with pytest.raises(StoreError) as fault:
                store.digest("k")
            check_one_line(fault, "s3://registry/x/k")
        assert list((tmp_path / "out").iterdir()) == []


def test_a_body_that_is_not_what_the_server_once_stored_is_told_by_its_digest(s3: Storage) -> None:
    """The server's own checksum does not fit: the digest of what arrived is the answer, not an error."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        threading.Thread(target=serve, args=(server, ROTTEN), daemon=True).start()
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("AWS_ENDPOINT_URL_S3", f"http://127.0.0.1:{server.getsockname()[1]}")
            store = open_store("s3://registry/x")
            with pytest.raises(StoreError, match="checksum"):
                store.get("k")
            assert store.digest("k")[0] == digest_bytes(b"rot")


TRUNCATED = b'HTTP/1.1 200 OK\r\nContent-Length: 100\r\nETag: "x"\r\n\r\n' + b"x" * 50
ROTTEN = (
    b'HTTP/1.1 200 OK\r\nContent-Length: 3\r\nETag: "x"\r\n'
    + f"x-amz-checksum-sha256: {s3_writing.encode_sha256(digest_bytes(b'was'))}\r\n\r\nrot".encode()
)


def serve(server: socket.socket, answer: bytes) -> None:
    """Answer every request alike, then close."""
    while True:
        try:
            connection, _ = server.accept()
        except OSError:
            return
        with connection:
            connection.recv(65536)
            connection.sendall(answer)


def in_child(action: Callable[[], object]) -> int:
    """The exit status of a forked child that runs `action`: 0, 1 after an exception, or the signal as -n."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            action()
            code = 0
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def test_a_writer_killed_at_any_time_leaves_whole_objects_only(tmp_path: Path) -> None:
    """SIGKILL between the first byte and the last name: what is listed has all its bytes."""
    store, content = LocalStore(tmp_path / "store"), b"x" * 2_000_000
    for number in range(20):
        child = os.fork()
        if child == 0:
            for copy in range(1000):
                store.put(f"{number}/{copy}", content, if_none_match=True)
            os._exit(0)
        time.sleep(0.004 * (number + 1))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    assert {o.size for o in store.list("")} == {len(content)}
    store.put("after", b"the lock of a dead writer holds nobody up")
    store.put("after", b"again", if_match=store.head("after").etag)  # type: ignore[union-attr]


def test_a_full_disk_is_one_line_and_leaves_nothing_behind(tmp_path: Path) -> None:
    """On a real 1 MiB file system: no half object is visible, and the space is given back."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True, check=False).returncode != 0:
        pytest.skip("mounting a small file system is not permitted here")
    try:
        store = LocalStore(disk / "store")
        sha256 = write_file(tmp_path / "big", bytes(2_000_000))
        for call in (
            lambda: store.put("k", bytes(2_000_000)),
            lambda: store.put_file("k", tmp_path / "big", sha256=sha256),
            lambda: open_store((tmp_path / "other").as_uri()).get_file("k", disk / "f", sha256=sha256),
        ):
            open_store((tmp_path / "other").as_uri()).put("k", bytes(2_000_000))
            with pytest.raises(StoreError) as fault:
                call()
            check_one_line(fault, "no space left", str(disk), "run the same command again")
        assert list(store.list("")) == []
        store.put("small", bytes(500_000))
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_a_file_size_limit_is_reported_like_a_full_disk(tmp_path: Path) -> None:
    """`ulimit -f` (EFBIG) needs no rights to test: one line, nothing visible."""
    store = LocalStore(tmp_path / "store")

    def write() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        with pytest.raises(StoreError, match="no space left"):
            store.put("k", bytes(200_000))

    assert in_child(write) == 0
    assert list(store.list("")) == []


def test_a_folder_without_rights_is_one_line(tmp_path: Path) -> None:
    """A path through a file is refused as what it is."""
    (tmp_path / "file").write_text("x")
    with pytest.raises(StoreError) as fault:
        LocalStore(tmp_path / "file" / "store").put("k", b"")
    check_one_line(fault, "Not a directory")
