"""TFRecord, the framing of event files: how data is packed into records and read back."""

from __future__ import annotations

import os
import struct
from typing import BinaryIO

import google_crc32c

HEADER = struct.Struct("<QI")
"""The number of bytes of a record's data, and the checksum of that number."""

_CHECKSUM = struct.Struct("<I")
LONGEST = 2**31 - 1
"""Bytes of a record's data: no event can be longer."""

OVERHEAD = HEADER.size + _CHECKSUM.size
"""Bytes of a record besides its data."""


class DamagedError(Exception):
    """A record that is not what was written."""


def pack(data: bytes) -> bytes:
    """Data as one record."""
    length = struct.pack("<Q", len(data))
    return b"".join((length, _masked_crc(length), data, _masked_crc(data)))


def read_record(file: BinaryIO) -> bytes | None:
    """The data of the record at a file's position, or None where there is no whole one (yet).

    Raises:
        DamagedError: when the record does not fit its checksums, or is longer than any can be.
        OSError: when the file cannot be read.
    """
    offset, header = file.tell(), file.read(HEADER.size)
    if len(header) < HEADER.size:
        return None
    length, _ = HEADER.unpack(header)
    if is_header(header):
        if length > LONGEST:
            raise DamagedError(f"the record at byte {offset} states a length of {length:,} bytes")
        end = file.seek(0, os.SEEK_END)
        if end < offset + OVERHEAD + length:  # not asked for: reading makes room for all of it
            return None
        file.seek(offset + HEADER.size)
        data, checksum = file.read(length), file.read(_CHECKSUM.size)
        if checksum == _masked_crc(data):
            return data
    raise DamagedError(f"the record at byte {offset} does not fit its checksum")


def is_header(data: bytes) -> bool:
    """Whether these bytes begin a record: a length, and its checksum."""
    return data[8:] == _masked_crc(data[:8])


def _masked_crc(data: bytes) -> bytes:
    """CRC-32C, rotated and shifted as TFRecord asks, so that data holding checksums checks well itself."""
    crc = google_crc32c.value(data)
    return _CHECKSUM.pack(((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF)
