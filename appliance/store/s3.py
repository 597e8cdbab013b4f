"""A store in an S3 bucket, on AWS or any server that honours conditional writes.

Endpoint, region and credentials are boto3's business (environment, profiles, instance roles). With
an endpoint outside AWS, buckets are addressed by path. The store is trusted with nothing that can be
checked: checksums travel with every write, and reads are hashed.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any, TypeVar

from appliance.digest import digest_bytes
from appliance.errors import NotFoundError, PreconditionFailedError, StoreError
from appliance.store.base import StoredObject, Upload, check_key
from appliance.store.fetching import describe_disk_fault, write_verified
from appliance.store.s3_faults import read_answer, renew_credentials, translate_faults
from appliance.store.s3_writing import Clients, Write, create_large, encode_crc32, encode_sha256, write_once

T = TypeVar("T")

_SINGLE_PUT_BYTES = 64 << 20
_LARGEST_PUT_BYTES = 5 << 30
_CHUNK = 1 << 20
_ATTEMPTS = 3
_CONNECT_S, _READ_S, _CONNECTIONS = 5, 60, 32


def connect_s3(*, bucket: str, prefix: str) -> S3Store:
    """An `S3Store` with clients from the AWS settings around it. Raises `StoreError` on broken settings."""
    from botocore.exceptions import BotoCoreError

    try:
        session = _open_session()
        credentials, clients = session.get_credentials(), _build_clients(session)
    except (BotoCoreError, ValueError) as fault:
        raise StoreError(f"s3://{bucket}: {fault}; check AWS_ENDPOINT_URL, AWS_PROFILE and AWS_REGION") from fault
    store = S3Store(bucket, prefix, clients)
    for client in (clients.steady, clients.once):  # what goes wrong while signing would be taken for the store's answer
        client.meta.events.register("before-sign.s3", lambda **_: renew_credentials(credentials, subject=store.url))
    return store


def _open_session() -> Any:
    """With settings that also hold for its requests for a role's credentials, which boto3 makes by itself."""
    from boto3.session import Session
    from botocore.config import Config
    from botocore.session import get_session

    core = get_session()
    core.set_default_client_config(
        Config(
            connect_timeout=_CONNECT_S,
            read_timeout=_READ_S,
            max_pool_connections=_CONNECTIONS,
            retries={"mode": "standard", "total_max_attempts": _ATTEMPTS},
            user_agent_extra="appliance",
        )
    )
    return Session(botocore_session=core)


def _build_clients(session: Any) -> Clients:
    """The endpoint that the settings lead to is known only from a client, hence the first one."""
    from botocore.config import Config

    config = Config()
    steady = session.client("s3")
    chosen = (steady.meta.config.s3 or {}).get("addressing_style")
    if not chosen and ".amazonaws.com" not in steady.meta.endpoint_url:
        config = Config(s3={"addressing_style": "path"})
        steady = session.client("s3", config=config)
    return Clients(steady, session.client("s3", config=config.merge(Config(retries={"total_max_attempts": 1}))))


@dataclass(frozen=True, slots=True)
class S3Store:
    """Objects below `prefix` in `bucket`."""

    bucket: str
    prefix: str
    clients: Clients

    @property
    def url(self) -> str:
        """`s3://bucket/prefix`."""
        return f"s3://{self.bucket}/{self.prefix}".rstrip("/")

    def put(
        self, key: str, content: bytes, *, if_none_match: bool = False, if_match: str | None = None
    ) -> StoredObject:
        """See `Store.put`."""
        condition: dict[str, str] = {"IfNoneMatch": "*"} if if_none_match else {}
        condition |= {"IfMatch": if_match} if if_match is not None else {}
        request = {**self._target(key), "Body": content, "ChecksumSHA256": encode_sha256(digest_bytes(content))}
        answers: list[str] = []
        try:
            write_once(
                lambda: answers.append(self.clients.once.put_object(**request, **condition)["ETag"]),
                self._write(key, is_ours=lambda: self._holds(key, content)),
            )
        except NotFoundError as fault:  # AWS answers If-Match on an absent key with 404
            raise PreconditionFailedError(f"{self._subject(key)}: is gone") from fault
        return StoredObject(key, len(content), answers[0]) if answers else self.get(key)[1]

    def put_file(self, key: str, path: Path, *, sha256: str, max_age_s: float = math.inf) -> StoredObject:
        """See `Store.put_file`."""
        with self._faults(key):
            found = self._find_equal(key, path, sha256)
            if found is None:
                self._create_file(key, path, sha256)
            elif max_age_s < math.inf and self.clock() - (found.modified or 0.0) >= max_age_s:
                self._rewrite_file(found, path, sha256)
            else:
                return found
            found = self._find_equal(key, path, sha256)
        if found is None:
            raise StoreError(
                f"{self._subject(key)}: vanished after it was written; look for a clean-up job on the bucket"
            )
        return found

    def get(self, key: str) -> tuple[bytes, StoredObject]:
        """See `Store.get`."""

        def read(answer: dict[str, Any]) -> tuple[bytes, StoredObject]:
            content: bytes = answer["Body"].read()
            return content, StoredObject(key, len(content), answer["ETag"])

        return self._fetch(key, read)

    def get_file(self, key: str, path: Path, *, sha256: str | None) -> None:
        """See `Store.get_file`."""

        def write(answer: dict[str, Any]) -> None:
            write_verified(answer["Body"].iter_chunks(_CHUNK), path, sha256=sha256, subject=self._subject(key))

        self._fetch(key, write)

    def digest(self, key: str) -> tuple[str, StoredObject]:
        """See `Store.digest`."""

        def read(answer: dict[str, Any]) -> tuple[str, StoredObject]:
            sha256, size = _hash_body(answer["Body"])
            return sha256, StoredObject(key, size, answer["ETag"])

        return self._fetch(key, read)

    def head(self, key: str) -> StoredObject | None:
        """See `Store.head`."""
        with self._faults(key):
            answer = self._head(key)
        return None if answer is None else _describe(key, answer)

    def list(self, prefix: str) -> Iterator[StoredObject]:
        """See `Store.list`; sorted here, because some servers list in folder order."""
        start = len(self.prefix) + 1 if self.prefix else 0
        with self._faults(prefix):
            pages = self.clients.steady.get_paginator("list_objects_v2").paginate(
                Bucket=self.bucket, Prefix=self._full(prefix)
            )
            found = [
                StoredObject(o["Key"][start:], o["Size"], o["ETag"], o["LastModified"].timestamp())
                for p in pages
                for o in p.get("Contents", ())
            ]
        yield from sorted(found, key=lambda o: o.key)

    def delete(self, key: str, *, only: StoredObject | None = None) -> None:
        """See `Store.delete`; a server that ignores If-Match is asked right before, which leaves it a moment."""
        with self._faults(key), contextlib.suppress(NotFoundError):
            if only is None:
                self.clients.steady.delete_object(**self._target(key))
                return
            if self._is_same(key, only):
                try:
                    self._delete_matching(key, etag=only.etag)
                except PreconditionFailedError:  # also the answer to a retry whose first answer was lost
                    if self._is_same(key, only):
                        raise

    def list_uploads(self) -> Iterator[Upload]:
        """See `Store.list_uploads`."""
        start = len(self._full(""))
        with self._faults(""):
            pages = self.clients.steady.get_paginator("list_multipart_uploads").paginate(
                Bucket=self.bucket, Prefix=self._full("")
            )
            found = [u for page in pages for u in page.get("Uploads", ())]
        for each in found:
            size = self._measure_upload(each["Key"], each["UploadId"])
            if size is not None:
                yield Upload(each["Key"][start:], each["UploadId"], size, each["Initiated"].timestamp())

    def abort_upload(self, upload: Upload) -> None:
        """See `Store.abort_upload`."""
        with self._faults(upload.key), contextlib.suppress(NotFoundError):
            self.clients.steady.abort_multipart_upload(**self._target(upload.key), UploadId=upload.token)

    def clock(self) -> float:
        """See `Store.clock`: the time in the header of an answer, to the second."""
        from botocore.exceptions import ClientError

        with self._faults(""):
            try:
                answer = self.clients.steady.head_bucket(Bucket=self.bucket)
            except ClientError:
                self._check_bucket()
                raise
        try:
            return parsedate_to_datetime(answer["ResponseMetadata"]["HTTPHeaders"]["date"]).timestamp()
        except (KeyError, ValueError) as fault:
            raise StoreError(
                f"{self.url}: {self.clients.endpoint} does not say what time it is (no Date header), "
                "so that nothing in it has an age; look at what is between here and the store"
            ) from fault

    def _fetch(self, key: str, use: Callable[[dict[str, Any]], T]) -> T:
        """What `use` made of a GET's answer; a body that broke off is fetched anew, which boto3 does not do."""
        from botocore.exceptions import HTTPClientError

        for attempt in range(1, _ATTEMPTS + 1):
            with self._faults(key):
                try:
                    return use(self.clients.steady.get_object(**self._target(key)))
                except HTTPClientError:
                    if attempt == _ATTEMPTS:
                        raise
        raise AssertionError

    def _create_file(self, key: str, path: Path, sha256: str) -> None:
        """Create `key`; that another writer was faster is no fault, the caller compares."""
        target, checksum = self._target(key), encode_sha256(sha256)
        write = self._write(key, is_ours=lambda: self._head(key) is not None)

        def send() -> None:
            with path.open("rb") as body:
                self.clients.once.put_object(**target, Body=body, IfNoneMatch="*", ChecksumSHA256=checksum)

        try:
            if path.stat().st_size > _SINGLE_PUT_BYTES:
                create_large(self.clients, target, path, sha256=sha256, write=write, condition={"IfNoneMatch": "*"})
            else:
                write_once(send, write)
        except PreconditionFailedError:
            return
        except OSError as fault:
            raise StoreError(describe_disk_fault(fault, str(path))) from fault

    def _rewrite_file(self, found: StoredObject, path: Path, sha256: str) -> None:
        """The same bytes as another object: in parts if it was in one piece, or the reverse, for another ETag."""
        target, size = self._target(found.key), path.stat().st_size
        write = self._write(found.key, is_ours=lambda: False)

        def send() -> None:
            with path.open("rb") as body:
                self.clients.once.put_object(**target, Body=body, ChecksumSHA256=encode_sha256(sha256))

        if size == 0 or ("-" in found.etag and size <= _LARGEST_PUT_BYTES):
            write_once(send, write)
        else:
            create_large(self.clients, target, path, sha256=sha256, write=write, condition={})

    def _is_same(self, key: str, listed: StoredObject) -> bool:
        """Whether the object is there. Raises `PreconditionFailedError` if it is not the one that was listed."""
        answer = self._head(key)
        if answer is None:
            return False
        found = _describe(key, answer)
        if (found.etag, found.modified) != (listed.etag, math.floor(listed.modified or 0.0)):
            raise PreconditionFailedError(f"{self._subject(key)}: was written again meanwhile")
        return True

    def _delete_matching(self, key: str, *, etag: str) -> None:
        from botocore.exceptions import ClientError

        with self._faults(key):
            try:
                self.clients.steady.delete_object(**self._target(key), IfMatch=etag)
            except ClientError as fault:
                if read_answer(fault)[0] != "NotImplemented":
                    raise
                self.clients.steady.delete_object(**self._target(key))

    def _measure_upload(self, full_key: str, upload_id: str) -> int | None:
        """The bytes of the parts that have arrived, `None` when the upload has ended meanwhile."""
        from botocore.exceptions import ClientError

        pages = self.clients.steady.get_paginator("list_parts")
        with self._faults(full_key):
            try:
                parts = [
                    part
                    for page in pages.paginate(Bucket=self.bucket, Key=full_key, UploadId=upload_id)
                    for part in page.get("Parts", ())
                ]
            except ClientError as fault:
                if read_answer(fault)[0] != "NoSuchUpload":
                    raise
                return None
        return sum(int(part["Size"]) for part in parts)

    def _find_equal(self, key: str, path: Path, sha256: str) -> StoredObject | None:
        """The object under `key` if it is this file, `None` if absent. Raises `StoreError` if it is another."""
        answer = self._head(key)
        if answer is None:
            return None
        size = path.stat().st_size
        if answer["ContentLength"] != size or not _agrees(answer, path, sha256):
            raise StoreError(
                f"{self._subject(key)}: damaged, it holds {answer['ContentLength']} bytes that are not the expected "
                f"{size} bytes, SHA-256 {sha256}; remove the object and publish again"
            )
        return _describe(key, answer)

    def _head(self, key: str) -> dict[str, Any] | None:
        """The HEAD answer, or `None`; a missing bucket is told apart, since HEAD answers 404 to both."""
        from botocore.exceptions import ClientError

        try:
            answer: dict[str, Any] = self.clients.steady.head_object(**self._target(key), ChecksumMode="ENABLED")
        except ClientError as fault:
            if fault.response["ResponseMetadata"]["HTTPStatusCode"] != 404:
                raise
            self._check_bucket()
            return None
        return answer

    def _check_bucket(self) -> None:
        from botocore.exceptions import ClientError

        try:
            self.clients.steady.head_bucket(Bucket=self.bucket)
        except ClientError as fault:
            if fault.response["ResponseMetadata"]["HTTPStatusCode"] == 404:
                message = f"{self.url}: {self.clients.endpoint} has no such bucket; create it or correct the store URL"
                raise StoreError(message) from fault

    def _holds(self, key: str, content: bytes) -> bool:
        try:
            return self.get(key)[0] == content
        except NotFoundError:
            return False

    def _target(self, key: str) -> dict[str, str]:
        return {"Bucket": self.bucket, "Key": self._full(check_key(key))}

    def _full(self, key: str) -> str:
        return f"{self.prefix}/{key}" if self.prefix else key

    def _write(self, key: str, *, is_ours: Callable[[], bool]) -> Write:
        return Write(self._subject(key), self.clients.endpoint, is_ours)

    def _subject(self, key: str) -> str:
        return f"{self.url}/{key}"

    def _faults(self, key: str) -> Any:
        return translate_faults(self._subject(key), endpoint=self.clients.endpoint)


def _describe(key: str, answer: dict[str, Any]) -> StoredObject:
    """What a HEAD answer says of an object."""
    return StoredObject(key, answer["ContentLength"], answer["ETag"], answer["LastModified"].timestamp())


def _hash_body(body: Any) -> tuple[str, int]:
    """SHA-256 and size of a body; a checksum of the server's that does not fit is told by the SHA-256, too."""
    from botocore.exceptions import FlexibleChecksumError

    digest, size = hashlib.sha256(), 0
    with contextlib.suppress(FlexibleChecksumError):  # raised at the end, when every byte was read
        for chunk in body.iter_chunks(_CHUNK):
            digest.update(chunk)
            size += len(chunk)
    return digest.hexdigest(), size


def _agrees(answer: dict[str, Any], path: Path, sha256: str) -> bool:
    """Whether the checksums that the server keeps for the whole object are those of the file."""
    if "-" not in answer.get("ChecksumSHA256", "-"):
        return bool(answer["ChecksumSHA256"] == encode_sha256(sha256))
    if answer.get("ChecksumType") == "FULL_OBJECT" and "ChecksumCRC32" in answer:
        return bool(answer["ChecksumCRC32"] == encode_crc32(path))
    return True
