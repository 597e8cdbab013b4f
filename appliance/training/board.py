"""The journal as a TensorBoard event file, written without TensorBoard: a record format of a few lines.

An event file is TFRecords of `Event` messages: length, its masked CRC-32C, the message, its masked
CRC-32C (tensorflow/core/lib/io/record_writer.h, tensorflow/core/util/event.proto). It is written anew
when a run resumes, so that steps after the checkpoint are not shown twice.
"""

from __future__ import annotations

import json
import struct
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO

from appliance.errors import TrainingError

_SCALARS = {
    "loss": "loss/train",
    "validation_loss": "loss/validation",
    "validation_exact_match": "exact_match/validation",
    "learning_rate": "learning_rate",
    "grad_norm": "gradient_norm",
    "tokens_per_second": "tokens_per_second",
    "mfu": "mfu",
    "memory_bytes": "memory_bytes",
}
_SUFFIX = "appliance"


@contextmanager
def open_board(folder: Path | None, *, journal: Path, note: Callable[[str], None]) -> Iterator[Callable[[], None]]:
    """Yield what copies the journal's new records into an event file in `folder`; does nothing without one.

    Raises `TrainingError` when the folder cannot be written; a fault later is noted and ends the copy, not the run.
    """
    if folder is None:
        yield lambda: None
        return
    try:
        stream = _create_file(folder)
    except OSError as fault:
        raise TrainingError(f"{folder}: cannot be written ({fault}); give --tensorboard another folder") from fault
    copied = 0
    is_broken = False

    def copy() -> None:
        nonlocal copied, is_broken
        if is_broken:
            return
        try:
            with journal.open("rb") as source:
                source.seek(copied)
                copied += _copy_lines(source, stream)
        except OSError as fault:
            is_broken = True
            note(f"{stream.name}: cannot be written ({fault}); the run goes on, metrics.jsonl has everything")

    with stream:
        yield copy


def _create_file(folder: Path) -> BinaryIO:
    """A new event file, unbuffered, in place of those of an earlier attempt."""
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob(f"events.out.tfevents.*.{_SUFFIX}"):
        old.unlink()
    stream = (folder / f"events.out.tfevents.{int(time.time())}.{_SUFFIX}").open("wb", buffering=0)
    stream.write(frame_record(_encode_event(time.time(), version="brain.Event:2")))
    return stream


def _copy_lines(source: BinaryIO, stream: BinaryIO) -> int:
    """Copy whole lines; return their bytes."""
    size = 0
    for line in source:
        if not line.endswith(b"\n"):
            break
        size += len(line)
        record = json.loads(line)
        stream.write(frame_record(_encode_event(time.time(), step=record["step"], scalars=_select_scalars(record))))
    return size


def _select_scalars(record: dict[str, Any]) -> dict[str, float]:
    return {tag: float(record[key]) for key, tag in _SCALARS.items() if record.get(key) is not None}


def frame_record(data: bytes) -> bytes:
    """One TFRecord."""
    length = struct.pack("<Q", len(data))
    return length + struct.pack("<I", _mask(crc32c(length))) + data + struct.pack("<I", _mask(crc32c(data)))


def crc32c(data: bytes) -> int:
    """CRC-32C (Castagnoli, RFC 3720 section 12.1)."""
    table, crc = _build_table(), 0xFFFFFFFF
    for byte in data:
        crc = table[(crc ^ byte) & 0xFF] ^ (crc >> 8)
    return crc ^ 0xFFFFFFFF


@cache
def _build_table() -> tuple[int, ...]:
    table = []
    for entry in range(256):
        value = entry
        for _ in range(8):
            value = (value >> 1) ^ (0x82F63B78 if value & 1 else 0)
        table.append(value)
    return tuple(table)


def _mask(crc: int) -> int:
    return (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF


def _encode_event(
    wall_time: float, *, step: int = 0, version: str = "", scalars: dict[str, float] | None = None
) -> bytes:
    """`Event`: wall_time = 1 (double), step = 2 (varint), file_version = 3 or summary = 5."""
    head = b"\x09" + struct.pack("<d", wall_time) + (b"\x10" + _varint(step) if step else b"")
    if version:
        return head + _field(3, version.encode())
    values = (
        _field(1, _field(1, tag.encode()) + b"\x15" + struct.pack("<f", value))
        for tag, value in (scalars or {}).items()
    )
    return head + _field(5, b"".join(values))


def _field(number: int, data: bytes) -> bytes:
    """A length-delimited field."""
    return _varint(number << 3 | 2) + _varint(len(data)) + data


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)
