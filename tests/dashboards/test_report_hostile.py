"""One bad value in an event file is left out and said; everything else is shown, of all runs."""

from __future__ import annotations

import io
import json
import os
import struct
import zlib
from pathlib import Path

import google_crc32c
import numpy as np
import pytest
import soundfile
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from report_runs import rich_records, write_run
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata
from tensorboard.compat.proto.tensor_pb2 import TensorProto
from tensorboard.compat.proto.tensor_shape_pb2 import TensorShapeProto
from tensorboard.compat.proto.types_pb2 import DataType

from dashboards.__main__ import main
from dashboards.report.media import collect
from dashboards.report.overview import overview
from dashboards.report.page import render
from dashboards.runs import NothingToShowError, read_runs
from telemetry.tfrecord import DamagedError, pack

NAME = "events.out.tfevents.1.h.1"
INF, NAN = float("inf"), float("nan")


def event(*values: Summary.Value, step: int = 1, wall_time: float = 1.7e9) -> bytes:
    return pack(Event(step=step, wall_time=wall_time, summary=Summary(value=values)).SerializeToString())


def number(tag: str, value: float = 1.0) -> Summary.Value:
    return Summary.Value(tag=tag, simple_value=value)


def stored(plugin: str, tensor: TensorProto, content: bytes = b"", tag: str = "a/bad") -> Summary.Value:
    data = SummaryMetadata.PluginData(plugin_name=plugin, content=content)
    return Summary.Value(tag=tag, metadata=SummaryMetadata(plugin_data=data), tensor=tensor)


def texts(*held: bytes, shape: tuple[int, ...] | None = None) -> TensorProto:
    dims = [TensorShapeProto.Dim(size=size) for size in (shape or (len(held),))]
    return TensorProto(dtype=DataType.DT_STRING, string_val=held, tensor_shape=TensorShapeProto(dim=dims))


def floats(*held: float, shape: tuple[int, ...] = (), dtype: int = DataType.DT_FLOAT) -> TensorProto:
    dims = [TensorShapeProto.Dim(size=size) for size in shape]
    return TensorProto(dtype=dtype, float_val=held, tensor_shape=TensorShapeProto(dim=dims))


def said(record: object) -> bytes:
    return SummaryMetadata.PluginData(content=json.dumps(record).encode()).SerializeToString()


def sound(frames: int, kind: str = "FLAC") -> bytes:
    stream = io.BytesIO()
    with soundfile.SoundFile(stream, "w", 8000, 1, format=kind, subtype="PCM_16") as file:
        for _ in range(0, frames, 2**20):
            file.write(np.zeros(min(frames, 2**20), np.int16))
    return stream.getvalue()


def picture(width: int, height: int) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


def damaged(data: bytes, at: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 0x40]) + data[at + 1 :]


def checksum(data: bytes) -> bytes:
    crc = google_crc32c.value(data)
    return struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF)


LENGTH = (50 * 2**30).to_bytes(8, "little")
BAD: dict[str, bytes] = {
    "length prefix of 50 GB": LENGTH + struct.pack("<I", 0),
    "true length prefix of 50 GB": LENGTH + checksum(LENGTH),
    "true length prefix of 1 GB": (length := (2**30).to_bytes(8, "little")) + checksum(length),
    "checksum of the length": damaged(event(number("a/bad")), 9),
    "checksum of the data": damaged(event(number("a/bad")), -1 % len(event(number("a/bad")))),
    "data": damaged(event(number("a/bad")), 20),
    "cut short": event(number("a/bad"))[:-6],
    "no event": pack(b"\xff\xff\xff no event"),
    "tag that is not UTF-8": pack(event(number("a/bad"))[12:-4].replace(b"a/bad", b"a/\xed\xa0\x80")),
    "empty tag": event(number("")),
    "scalar of 3 numbers": event(stored("scalars", floats(1, 2, 3, shape=(3,)))),
    "scalar of none": event(stored("scalars", floats())),
    "scalar that is text": event(stored("scalars", texts(b"x", shape=()))),
    "scalar of 1e12 values": event(stored("scalars", floats(1.0, shape=(10**6, 10**6)))),
    "scalar of a negative shape": event(stored("scalars", floats(1.0, shape=(-1,)))),
    "scalar of no dtype": event(stored("scalars", floats(1.0, dtype=99))),
    "scalar of a resource": event(stored("scalars", floats(1.0, dtype=DataType.DT_RESOURCE))),
    "settings": event(stored("hparams", floats(), b"\xff\xff\xff\x07")),
    "time NaN": event(number("a/timed"), wall_time=NAN),
    "time infinite": event(number("a/timed"), wall_time=INF),
    "time 1e18": event(number("a/timed"), wall_time=1e18),
    "time negative": event(number("a/timed"), wall_time=-1e18),
    "step 2^63": event(number("a/bad"), step=2**63 - 1),
    "step negative": event(number("a/bad"), step=-5),
}
UNREADABLE: dict[str, bytes] = {
    "text of 1e12 values": event(stored("text", texts(b"x", shape=(10**12,)))),
    "text that is a number": event(stored("text", floats(1.0))),
    "sound that is none": event(stored("audio", texts(b"no sound", b"label", shape=(1, 2)))),
    "days of silence": event(stored("audio", texts(sound(2**25 + 2**20), b"label", shape=(1, 2)))),
    "sound cut short": event(stored("audio", texts(sound(8000, "WAV")[:20], b"", shape=(1, 2)))),
    "picture that is none": event(stored("images", texts(b"1", b"1", b"no picture"))),
    "picture of 4e9 pixels": event(stored("images", texts(b"1", b"1", picture(65000, 65000)))),
    "picture of no pixels": event(stored("images", texts(b"1", b"1", picture(0, 5)))),
    "picture without a picture": event(stored("images", texts(b"1", b"1"))),
}
FOREIGN_TABLES = [
    *({}, [], "title", 5, None, {"columns": 5, "rows": []}, {"columns": ["a"], "rows": [["1", "2"]]}, {"title": "x"}),
    *(
        {"columns": ["a"], "rows": [[{"x": 1}]]},
        {"columns": ["a"], "rows": [[1]]},
        {"title": [], "text": {}, "level": 1},
    ),
    *({"columns": [None], "rows": []}, {"title": "x", "text": "y", "more": 1}),
]


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict, str]:
    """The runs of one report by name, one for every bad value, and the page."""
    directory = tmp_path_factory.mktemp("hostile")
    for name, data in {**BAD, **UNREADABLE}.items():
        (directory / name).mkdir()
        (directory / name / NAME).write_bytes(event(number("a/before")) + data + event(number("a/after"), step=2))
    page, _ = render(runs := read_runs([directory]))
    return {run.name: run for run in runs}, page


@pytest.mark.parametrize("name", [*BAD, *UNREADABLE])
def test_a_bad_value_is_left_out_and_said_and_the_others_are_shown(shown: tuple[dict, str], name: str) -> None:
    run, page = shown[0][name], shown[1]
    assert run.scalars["a/before"].values == [1.0]
    if name != "step 2^63":
        assert run.scalars["a/after"].values == [1.0]
    assert "a/bad" not in run.scalars
    assert name in page
    if name in BAD:
        assert len(run.faults) == 1, run.faults
        assert NAME in run.faults[0]
    else:
        (one,) = run.media["a/bad"]
        (shelf,) = (shelf for shelf in vars(collect([run])).values() if shelf.unreadable)
        assert (shelf.unreadable, shelf.items, one.tag) == (1, (), "a/bad")
    if name.startswith("time"):
        assert run.scalars["a/timed"].values == [1.0]
        assert run.last_time == 1.7e9


def test_numbers_that_are_not_finite_are_shown_as_such(tmp_path: Path) -> None:
    tags = ["health/x", "telemetry/dropped_records", "inputs/tensor/x/nonfinite", "outputs/loss/total", "x/" + "²" * 3]
    data = [
        event(*(number(f"{tag}", value) for tag in tags), step=step)
        for step, value in enumerate((NAN, INF, -INF, 3e38))
    ]
    (tmp_path / NAME).write_bytes(b"".join(data))
    (run,) = runs = read_runs([tmp_path])
    assert run.faults == []
    assert {one.tag for one in overview(runs, collect(runs)).nonfinite} == set(tags)
    assert "NaN or infinite" in render(runs)[0]


@pytest.mark.parametrize("record", FOREIGN_TABLES)
def test_what_is_no_table_and_no_alert_is_shown_as_text(tmp_path: Path, record: object) -> None:
    (tmp_path / NAME).write_bytes(event(stored("text", texts(b"*text*"), said(record))) + event(number("a/b")))
    runs = read_runs([tmp_path])
    assert [item.content for item in collect(runs).documents.items] == ["*text*"]
    assert "*text*" in render(runs)[0]


def test_a_directory_that_is_not_utf_8_has_a_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in (b"caf\xe9", b"other"):
        directory = Path(os.fsdecode(os.fsencode(tmp_path) + b"/" + name))
        directory.mkdir()
        (directory / NAME).write_bytes(event(number("a/b")) + b"".join([pack(b"\xff\xff\xff")]))
    output = Path(os.fsdecode(os.fsencode(tmp_path) + b"/r\xe9.html"))
    main(["report", str(tmp_path), "-o", str(output)])
    assert "caf\\udce9" in output.read_text()
    assert "r\\udce9.html" in capsys.readouterr().out


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return write_run(tmp_path_factory.mktemp("written"), {10: rich_records(10)}, config={"a": 1}).read_bytes()


CHANGES = st.lists(
    st.tuples(st.floats(0, 1), st.sampled_from(["flip", "cut", "put"]), st.binary(min_size=1, max_size=9)), max_size=4
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(changes=CHANGES, framed=st.booleans())
def test_any_bytes_are_read_or_refused(written: bytes, tmp_path: Path, changes: list, framed: bool) -> None:
    """Of changes within the events that keep to their checksums (``framed``), and of any others."""
    records = [written]
    if framed:
        records = []
        at = 0
        while at < len(written):
            length = int.from_bytes(written[at : at + 8], "little")
            records.append(written[at + 12 : at + 12 + length])
            at += length + 16
    for place, kind, data in changes:
        # Beginnings are where the structure is: the rest is mostly samples and pixels.
        number_of_record = int(place * 997) % len(records)
        record = records[number_of_record]
        at = int((place * 997) % 1 * min(len(record), 300))
        flipped = bytes(a ^ b for a, b in zip(record[at : at + len(data)], data, strict=False))
        middle = {"flip": flipped, "cut": b"", "put": data}[kind]
        rest = at if kind == "put" else at + len(data)
        records[number_of_record] = record[:at] + middle + record[rest:]
    (tmp_path / NAME).write_bytes(b"".join(map(pack, records)) if framed else records[0])
    try:
        runs = read_runs([tmp_path])
    except NothingToShowError:
        return
    media = collect(runs)
    overview(runs, media)
    for run in runs:
        assert all(0 <= step < 2**31 for series in run.scalars.values() for step in series.steps)
        for one in (one for several in run.media.values() for one in several):
            try:
                one.load()
                one.record()
            except DamagedError:
                continue
