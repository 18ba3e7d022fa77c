"""TFRecord framing, against TensorBoard's own reader and writer."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import PyRecordReader_New
from tensorboard.summary.writer.record_writer import RecordWriter

from telemetry.tfrecord import OVERHEAD, DamagedError, pack, read_record

DATA = st.lists(st.binary(max_size=80), max_size=5)


@given(DATA)
def test_records_are_what_tensorboard_writes(written: list[bytes]) -> None:
    file = io.BytesIO()
    writer = RecordWriter(file)
    for data in written:
        writer.write(data)
    assert b"".join(map(pack, written)) == file.getvalue()


@given(DATA)
def test_what_is_packed_is_read_back_and_a_torn_record_is_none(written: list[bytes]) -> None:
    packed = b"".join(map(pack, written))
    file = io.BytesIO(packed)
    assert [read_record(file) for _ in written] == written
    assert read_record(file) is None
    torn = io.BytesIO(packed[:-1])
    assert [read_record(torn) for _ in written] == [*written[:-1], *([None] if written else [])]


def test_tensorboard_reads_what_is_packed(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(pack(b"first") + pack(b""))
    reader = PyRecordReader_New(str(tmp_path / "file"))
    reader.GetNext()
    assert reader.record() == b"first"
    reader.GetNext()
    assert reader.record() == b""


@pytest.mark.parametrize("at", range(len(b"data") + OVERHEAD))
def test_every_changed_byte_is_found(at: int) -> None:
    packed = bytearray(pack(b"data"))
    packed[at] ^= 1
    with pytest.raises(DamagedError, match="the record at byte 0 does not fit its checksum"):
        read_record(io.BytesIO(bytes(packed)))
