"""Conditional writes to S3, settled whatever is lost on the way.

boto3's own retries are off for these (one attempt): after an answer that never came, a blind retry
would meet its own first success as a 412. Here a 412 after a lost answer is settled by reading
back. 409 on PUT means "try again", never "exists". When the outcome is unknown nothing is deleted.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import time
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from appliance.errors import StoreError
from appliance.store.s3_faults import describe_answer, describe_failure, read_answer

_ATTEMPTS = 5
_FIRST_PAUSE_S = 0.1
PART_BYTES = 32 << 20
_UNREAD = "RequestTimeout"  # status 400: the body did not arrive in time, and nothing was done


@dataclass(frozen=True, slots=True)
class Clients:
    """Two boto3 clients of one session: `steady` retries by itself, `once` never does."""

    steady: Any
    once: Any

    @property
    def endpoint(self) -> str:
        """The URL that the clients speak to."""
        return str(self.steady.meta.endpoint_url)


@dataclass(frozen=True, slots=True)
class Write:
    """What one conditional write is about: how it is called in messages, and how it is recognised.

    `is_ours` reads back and says whether the object is what this write would have made.
    """

    subject: str
    endpoint: str
    is_ours: Callable[[], bool]


class _UploadLostError(Exception):
    """The multipart upload is gone or in conflict: it must be started anew."""


@contextlib.contextmanager
def _notice_loss() -> Iterator[None]:
    """Tell the answer that an upload is lost from all others. Raises `_UploadLostError`."""
    from botocore.exceptions import ClientError

    try:
        yield
    except ClientError as fault:
        code, status = read_answer(fault)
        if status == 409 or code == "NoSuchUpload":
            raise _UploadLostError from fault
        raise


def write_once(send: Callable[[], Any], write: Write) -> None:
    """Send a conditional write until its outcome is known.

    `write.is_ours` is asked after a 412 that follows a lost answer. Raises `PreconditionFailedError` when
    the condition does not hold, `StoreError` when the store refuses or stays out of reach.
    """
    from botocore import exceptions

    lost_answer = False
    error = StoreError(f"{write.subject}: not written")
    for attempt in range(_ATTEMPTS):
        time.sleep(_FIRST_PAUSE_S * 2 ** (attempt - 1) if attempt else 0)
        try:
            send()
        except exceptions.ClientError as fault:
            code, status = read_answer(fault)
            error = describe_answer(fault, subject=write.subject, endpoint=write.endpoint)
            if status == 412 and lost_answer and write.is_ours():
                return
            if status != 409 and status < 500 and code != _UNREAD:
                raise error from fault
            lost_answer = lost_answer or status >= 500
        except exceptions.BotoCoreError as fault:
            error = describe_failure(fault, subject=write.subject, endpoint=write.endpoint)
            if not isinstance(fault, exceptions.ConnectionError | exceptions.HTTPClientError):
                raise error from fault
            lost_answer = lost_answer or isinstance(fault, exceptions.HTTPClientError)  # the others never reached it
        else:
            return
    raise error


def encode_sha256(sha256: str) -> str:
    """The hex digest in the base64 form of the S3 checksum headers."""
    return base64.b64encode(bytes.fromhex(sha256)).decode()


def encode_crc32(path: Path) -> str:
    """CRC-32 (zlib) of a file as S3 writes it: big-endian, base64."""
    value = 0
    for chunk in _read_parts(path):
        value = zlib.crc32(chunk, value)
    return base64.b64encode(value.to_bytes(4, "big")).decode()


def create_large(
    clients: Clients, target: dict[str, str], path: Path, *, sha256: str, write: Write, condition: dict[str, str]
) -> None:
    """Create an object by multipart upload, with `condition` and the full CRC-32 at the end.

    `target` holds `Bucket` and `Key`. A part or upload that the server lost (409, NoSuchUpload)
    starts the upload anew unless the object is there. Raises `PreconditionFailedError`, `StoreError`.
    """
    for _ in range(_ATTEMPTS):
        try:
            _upload(clients, target, path, sha256=sha256, write=write, condition=condition)
        except _UploadLostError:
            if write.is_ours():
                return
        else:
            return
    raise StoreError(
        f"{write.subject}: {clients.endpoint} lost the upload {_ATTEMPTS} times; look at the store and try again"
    )


def _upload(
    clients: Clients, target: dict[str, str], path: Path, *, sha256: str, write: Write, condition: dict[str, str]
) -> None:
    begun = clients.steady.create_multipart_upload(**target, ChecksumAlgorithm="CRC32", ChecksumType="FULL_OBJECT")
    upload = {**target, "UploadId": begun["UploadId"]}
    parts, crc, found = _send_parts(clients, upload, path)
    if found != sha256:
        clients.steady.abort_multipart_upload(**upload)
        raise StoreError(f"{path}: SHA-256 is {found}, expected {sha256}; the file changed, make it again")
    size = path.stat().st_size
    ending = {
        "MultipartUpload": {"Parts": parts},
        "MpuObjectSize": size,
        "ChecksumType": "FULL_OBJECT",
        "ChecksumCRC32": crc,
    }
    write_once(lambda: _complete(clients, {**upload, **ending, **condition}), write)


def _send_parts(clients: Clients, upload: dict[str, str], path: Path) -> tuple[list[dict[str, Any]], str, str]:
    parts: list[dict[str, Any]] = []
    digest, crc = hashlib.sha256(), 0
    for number, chunk in enumerate(_read_parts(path), start=1):
        digest.update(chunk)
        crc = zlib.crc32(chunk, crc)
        with _notice_loss():
            sent = clients.steady.upload_part(**upload, PartNumber=number, Body=chunk, ChecksumAlgorithm="CRC32")
        parts.append({k: v for k, v in sent.items() if k in ("ETag", "ChecksumCRC32")} | {"PartNumber": number})
    return parts, base64.b64encode(crc.to_bytes(4, "big")).decode(), digest.hexdigest()


def _complete(clients: Clients, request: dict[str, Any]) -> None:
    with _notice_loss():
        clients.once.complete_multipart_upload(**request)


def _read_parts(path: Path) -> Iterator[bytes]:
    with path.open("rb") as stream:
        while chunk := stream.read(PART_BYTES):
            yield chunk
