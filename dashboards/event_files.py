"""Event files, read record by record.

TensorBoard's own loader checks what it reads with a CRC in pure Python, 7 MB a second: a run with sound would take
minutes.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import google_crc32c
from google.protobuf.message import DecodeError
from tensorboard.compat.proto.event_pb2 import Event

_LENGTH = struct.Struct("<QI")
_CHECKSUM = struct.Struct("<I")


class DamagedError(Exception):
    """A record that is not what was written. Nothing behind it can be found."""


def read_events(path: Path) -> Iterator[tuple[int, Event]]:
    """The events of a file with their offsets in bytes. A record that is still being written ends them.

    Raises:
        DamagedError: at a record that does not fit its checksum, or is no event.
        OSError: when the file cannot be read.
    """
    with path.open("rb") as file:
        while (event := _next_event(file, offset := file.tell())) is not None:
            yield offset, event


def read_event(path: Path, offset: int) -> Event:
    """The event at an offset that :func:`read_events` gave.

    Raises:
        DamagedError: when there is none any more.
        OSError: when the file cannot be read.
    """
    with path.open("rb") as file:
        file.seek(offset)
        event = _next_event(file, offset)
    if event is None:
        raise DamagedError(f"no event at byte {offset}")
    return event


def _next_event(file: BinaryIO, offset: int) -> Event | None:
    header = file.read(_LENGTH.size)
    if len(header) < _LENGTH.size:
        return None
    length, checksum = _LENGTH.unpack(header)
    if checksum != _masked_crc(header[:8]):
        raise DamagedError(f"the record at byte {offset} does not fit its checksum")
    data, end = file.read(length), file.read(_CHECKSUM.size)
    if len(end) < _CHECKSUM.size:
        return None
    if end != _CHECKSUM.pack(_masked_crc(data)):
        raise DamagedError(f"the record at byte {offset} does not fit its checksum")
    try:
        return Event.FromString(data)
    except DecodeError as error:
        raise DamagedError(f"the record at byte {offset} is no event") from error


def _masked_crc(data: bytes) -> int:
    """CRC-32C as TFRecord masks it."""
    crc = google_crc32c.value(data)
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF
