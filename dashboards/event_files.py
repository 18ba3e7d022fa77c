"""Event files, read record by record.

TensorBoard's own loader checks what it reads with a CRC in pure Python, 7 MB a second: a run with sound would take
minutes.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from google.protobuf.message import DecodeError
from tensorboard.compat.proto.event_pb2 import Event

from telemetry.tfrecord import HEADER, DamagedError, is_header, read_record

_WINDOW = 16 * 2**20
# What may be the length of a record: not 0, and below 4 GiB.
_LENGTH = re.compile(rb"(?=(?!\0{4})[\s\S]{4}\0{4}[\s\S]{4})")


def read_events(path: Path) -> Iterator[tuple[int, Event | DamagedError]]:
    """The events of a file with their offsets in bytes. A record that is still being written ends them.

    Where a record is damaged, or is no event, its error stands in the event's place, and what follows is looked for.

    Raises:
        OSError: when the file cannot be read.
    """
    with path.open("rb") as file:
        offset: int | None = 0
        while offset is not None:
            file.seek(offset)
            try:
                event = _next_event(file, offset)
            except _NoEventError as error:
                yield offset, error
                offset = file.tell()
                continue
            except DamagedError as error:
                yield offset, error
                offset = _next_record(file, offset + 1)
                continue
            if event is not None:
                yield offset, event
                offset = file.tell()
            elif (following := _next_record(file, offset + 1)) is None:
                return
            else:
                yield offset, DamagedError(f"the record at byte {offset} is cut short")
                offset = following


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


class _NoEventError(DamagedError):
    """A whole record that is no event: the next one stands right after it."""


def _next_event(file: BinaryIO, offset: int) -> Event | None:
    data = read_record(file)
    try:
        return None if data is None else Event.FromString(data)
    except DecodeError as error:
        raise _NoEventError(f"the record at byte {offset} is no event") from error


def _next_record(file: BinaryIO, start: int) -> int | None:
    """The offset of the first record at a place or after it."""
    while True:
        file.seek(start)
        window = file.read(_WINDOW)
        for found in _LENGTH.finditer(window):
            if is_header(window[found.start() : found.start() + HEADER.size]):
                return start + found.start()
        if len(window) < _WINDOW:
            return None
        start += len(window) - HEADER.size + 1
