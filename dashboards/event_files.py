"""Event files, read record by record.

TensorBoard's own loader checks what it reads with a CRC in pure Python, 7 MB a second: a run with sound would take
minutes.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from google.protobuf.message import DecodeError
from tensorboard.compat.proto.event_pb2 import Event

from telemetry.tfrecord import DamagedError, read_record


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
    data = read_record(file)
    try:
        return None if data is None else Event.FromString(data)
    except DecodeError as error:
        raise DamagedError(f"the record at byte {offset} is no event") from error
