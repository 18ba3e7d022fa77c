"""The TensorBoard backend, asked through real servers with both of their loaders, and through its files."""

from __future__ import annotations

import errno
import html
import io
import logging
import math
import os
import re
import shlex
import shutil
import signal
import string
import struct
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image as PillowImage
from support import programs
from support.tensorboard_server import LOADERS, SAMPLES, Server, Sound, serve
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader, LegacyEventFileLoader
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.plugin_util import markdown_to_safe_html
from tensorboard.util.tensor_util import make_ndarray

from telemetry.backends.base import Run
from telemetry.backends.encoding import encode_png, encode_wav
from telemetry.backends.locks import is_locked
from telemetry.backends.tensorboard import TensorBoardBackend, launch_command
from telemetry.backends.tensorboard.hparams import flatten
from telemetry.backends.tensorboard.markdown import MAX_CELL, MAX_ROWS, escape, table_markdown, table_texts
from telemetry.catalogue import describe
from telemetry.delivery.recorder import Recorder
from telemetry.records import Alert, Audio, Cell, Clip, Image, Record, Scalar, Sum, Table

HOSTILE = (
    "a|b|c <|endoftext|> <|im_start|>",
    "<script>alert(1)</script><img src=x onerror=alert(1)>",
    "first\nsecond\r\nthird",
    "__init__ **bold** `code` # head ~~gone~~ [link](javascript:alert(1))",
    "https://evil.example/?a=1&b=2 &lt;b&gt; &#60;",
    "مرحبا بالعالم، هذا صوت",
    "\\| \\\\ $x_1$ {} ^ 100%",
    "\t- 1. > tab and list",
)
LONG = "x" * 2000
PIXELS = np.arange(12 * 20 * 3, dtype=np.uint8).reshape(12, 20, 3)

# What every program begins with.
PREAMBLE = """
import logging, os, resource, signal, sys
from pathlib import Path
from telemetry.backends.base import Run
from telemetry.backends.tensorboard import TensorBoardBackend
from telemetry.records import Alert, Scalar
logging.basicConfig(format="%(message)s")
hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
backend = TensorBoardBackend()
"""


def tone(seconds: float, rate: int, dtype: str = "float32") -> np.ndarray:
    return (0.5 * np.sin(2 * np.pi * 440 * np.arange(int(seconds * rate)) / rate)).astype(dtype)


def record_steps(directory: Path, steps: Sequence[tuple[int, Sequence[Record]]], **run: object) -> TensorBoardBackend:
    """One attempt from open to close."""
    backend = TensorBoardBackend()
    backend.open(Run(directory, **run))  # type: ignore[arg-type]
    for step, records in steps:
        backend.write(step, records)
    backend.close()
    return backend


def losses(first: int, last: int, offset: float = 0.0) -> list[tuple[int, Sequence[Record]]]:
    return [(step, [Scalar("train/loss", step + offset)]) for step in range(first, last + 1)]


def events(path: Path | None) -> list[Event]:
    """A file as TensorBoard reads it, before it turns old layouts into new ones."""
    assert path is not None
    return list(LegacyEventFileLoader(str(path)).Load())


def steps_in(path: Path | None, tag: str = "train/loss") -> list[int]:
    """Steps of a file that hold a number or tensor under a tag."""
    return [e.step for e in events(path) for value in e.summary.value if value.tag == tag and value.WhichOneof("value")]


def cells(page: str) -> list[list[str]]:
    """What a reader of the page sees in a table's rows, after its header."""
    rows = re.findall(r"<tr>(.*?)</tr>", page, re.DOTALL)
    return [[shown(cell) for cell in re.findall(r"<td>(.*?)</td>", row, re.DOTALL)] for row in rows[1:]]


def table_page(table: Table) -> str:
    """The HTML that TensorBoard makes of a table."""
    return markdown_to_safe_html(table_markdown(table_texts(table)))


def shown(fragment: str) -> str:
    """The text of a piece of HTML that holds no other tag than ``<br>``."""
    return html.unescape(fragment.replace("<br>", "\n")).replace("\N{NO-BREAK SPACE}", " ")


def plain(text: str) -> str:
    return text.replace("\r\n", "\n")


# ------------------------------------------------------------------------------------------------ against the servers


@pytest.fixture(scope="module")
def logdir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of every kind, written before any server starts."""
    root = tmp_path_factory.mktemp("logs")
    rate = 24_000
    rich: list[Record] = [
        Scalar("outputs/loss/total", 3.5, "Measured on rank 0."),
        Scalar("inputs/invalid_ids", math.nan),
        Scalar("gradients/total_norm", math.inf),
        Table(
            "inputs/sequence", ("text", "number", "set"), (*((text, 1 / 3, True) for text in HOSTILE), (LONG, None, 7))
        ),
        Table("inputs/tensors", ("row",), tuple((i,) for i in range(MAX_ROWS + 13))),
        Alert("notes/template", "hostile", "\n".join(HOSTILE), "info"),
        Alert("health/nan", "Loss is <NaN>", "step 7 | stop", "error"),
        Audio(
            "inputs/reference",
            (
                Clip(tone(0.5, rate), rate, "mono"),
                Clip(np.stack([tone(0.25, 48_000), -tone(0.25, 48_000)], axis=1), 48_000),
            ),
        ),
        Image("attention/mass", PIXELS, "by layer"),
    ]
    fewer = Audio("inputs/reference", (Clip(tone(0.5, rate), rate),))
    config = {
        "lr": 1e-4,
        "lora": {"on": True, "targets": ["q", "v"]},
        "model": "higgs|audio",
        "bad": math.nan,
        "no": None,
        "nobody_set_it": 7,
    }
    steps = [(1, rich), (2, [Scalar("outputs/loss/total", 3.25), fewer])]
    record_steps(root / "rich", steps, config=config, defaults=frozenset({"nobody_set_it"}))

    resumed = root / "resumed"
    record_steps(resumed, losses(1, 20))
    record_steps(resumed, losses(11, 30, 1000), starting_step=10)

    fresh = root / "fresh"
    record_steps(fresh, losses(1, 9))
    record_steps(fresh, losses(1, 4, 1000))
    return root


@pytest.fixture(scope="module", params=list(LOADERS))
def server(request: pytest.FixtureRequest, logdir: Path) -> Iterator[Server]:
    with serve(logdir, request.param) as server:
        server.wait_for(lambda: server.runs() == ["fresh", "resumed", "rich"])
        server.wait_for(lambda: len(server.scalars("train/loss", "resumed")) == 30)
        server.wait_for(lambda: len(server.scalars("train/loss", "fresh")) == 4)
        server.wait_for(lambda: len(server.scalars("outputs/loss/total", "rich")) == 2)
        yield server


def test_exactly_these_tags_are_on_each_page(server: Server) -> None:
    assert server.tags("scalars", "rich") == {"outputs/loss/total", "inputs/invalid_ids", "gradients/total_norm"}
    assert server.tags("text", "rich") == {"inputs/sequence", "inputs/tensors", "notes/template", "health/nan"}
    assert server.tags("audio", "rich") == {"inputs/reference"}
    assert server.tags("images", "rich") == {"attention/mass"}
    assert server.tags("scalars", "resumed") == {"train/loss"}


def test_scalars_have_their_values_nonfinite_ones_too(server: Server) -> None:
    assert server.scalars("outputs/loss/total", "rich") == [(1, 3.5), (2, 3.25)]
    assert server.scalars("inputs/invalid_ids", "rich") == [(1, "NaN")]
    assert server.scalars("gradients/total_norm", "rich") == [(1, "Infinity")]


def test_scalars_are_described_by_the_catalogue(server: Server) -> None:
    described = server.json("plugin/timeseries/tags")["scalars"]["tagDescriptions"]["outputs/loss/total"]
    assert shown(described.removeprefix("<p>").removesuffix("</p>")) == describe(
        "outputs/loss/total", "Measured on rank 0."
    )


def test_cells_show_exactly_what_they_hold(server: Server) -> None:
    page = server.texts("inputs/sequence", "rich")[1]
    *hostile, last = cells(page)
    assert [row[0].strip() for row in hostile] == [plain(text).strip() for text in HOSTILE]
    assert {(row[1], row[2]) for row in hostile} == {("0.333333", "true")}
    assert [text.replace("\n", "") for text in last] == [LONG[:MAX_CELL] + "…", "", "7"]
    assert set(re.findall(r"</?(\w+)", page)) <= {"table", "thead", "tbody", "tr", "th", "td", "br"}


def test_a_long_table_says_how_much_is_left_out(server: Server) -> None:
    shown_rows = cells(server.texts("inputs/tensors", "rich")[1])
    assert shown_rows == [*([str(i)] for i in range(MAX_ROWS)), ["… 13 more rows"]]


def test_text_and_alerts_hold_no_live_tags(server: Server) -> None:
    text = server.texts("notes/template", "rich")[1]
    assert [shown(p) for p in re.findall(r"<p>(.*?)</p>", text)] == [
        "<strong>INFO: hostile</strong>",
        plain("\n".join(HOSTILE)),
    ]
    alert = server.texts("health/nan", "rich")[1]
    assert [shown(p) for p in re.findall(r"<p>(.*?)</p>", alert)] == [
        "<strong>ERROR: Loss is <NaN></strong>",
        "step 7 | stop",
    ]
    assert set(re.findall(r"<\w+", text + alert)) <= {"<p", "<br", "<strong"}


def test_clips_are_heard_at_their_rate_and_in_all_channels(server: Server) -> None:
    mono, stereo = server.clips("inputs/reference", 0, "rich"), server.clips("inputs/reference", 1, "rich")
    assert (mono[1].rate, mono[1].samples.shape) == (24_000, (12_000, 1))
    assert (stereo[1].rate, stereo[1].samples.shape) == (48_000, (12_000, 2))
    assert mono[1].rms == pytest.approx(0.5 / math.sqrt(2), rel=0.01)
    assert stereo[1].rms == pytest.approx(0.5 / math.sqrt(2), rel=0.01)


def test_a_step_with_fewer_clips_does_not_break_the_page(server: Server) -> None:
    second = server.clips("inputs/reference", 1, "rich")
    assert sorted(second) == [1, 2]
    assert second[2].samples.size == 0


def test_clips_and_pictures_are_captioned(server: Server) -> None:
    audio = server.json("plugin/audio/tags")["rich"]["inputs/reference"]
    image = server.json("plugin/images/tags")["rich"]["attention/mass"]
    assert shown(audio["description"]) == f"<p>{describe('inputs/reference')}\nClip 1: mono</p>"
    assert audio["samples"] == 2
    assert shown(image["description"]) == f"<p>{describe('attention/mass', 'by layer')}</p>"


def test_pictures_are_lossless(server: Server) -> None:
    picture = PillowImage.open(io.BytesIO(server.images("attention/mass", "rich")[1]))
    np.testing.assert_array_equal(np.asarray(picture), PIXELS)


def test_the_configuration_is_on_the_hparams_page(server: Server) -> None:
    statuses = ["STATUS_UNKNOWN", "STATUS_SUCCESS", "STATUS_FAILURE", "STATUS_RUNNING"]
    asked = {"allowedStatuses": statuses, "startIndex": 0, "sliceSize": 10}
    groups = server.post("plugin/hparams/session_groups", asked)["sessionGroups"]
    (rich,) = [group for group in groups if group["sessions"][0]["name"] == "rich"]
    assert rich["hparams"] == {
        "lr": 1e-4,
        "lora.on": True,
        "lora.targets": '["q", "v"]',
        "model": "higgs|audio",
        "bad": "nan",
    }
    assert rich["sessions"][0]["endTimeSecs"] >= rich["sessions"][0]["startTimeSecs"] > 0


def test_a_resumed_run_is_one_line_without_duplicates(server: Server) -> None:
    expected = [(step, float(step if step <= 10 else step + 1000)) for step in range(1, 31)]
    assert server.scalars("train/loss", "resumed") == expected


def test_a_fresh_run_replaces_an_earlier_one_in_its_directory(server: Server) -> None:
    assert server.scalars("train/loss", "fresh") == [(step, step + 1000.0) for step in range(1, 5)]


@pytest.mark.parametrize("loader", LOADERS)
def test_a_clock_set_back_changes_nothing(loader: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record_steps(tmp_path, losses(1, 20))
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now - 7200)
    record_steps(tmp_path, losses(11, 30, 1000), starting_step=10)
    monkeypatch.undo()
    expected = [(step, float(step if step <= 10 else step + 1000)) for step in range(1, 31)]
    with serve(tmp_path, loader) as server:
        server.wait_for(lambda: len(server.scalars("train/loss")) == 30)
        assert server.scalars("train/loss") == expected
        wall_times = server.wall_times("train/loss")
    assert wall_times == sorted(wall_times)


@pytest.mark.parametrize("loader", LOADERS)
def test_values_show_while_the_run_goes_on(loader: str, tmp_path: Path) -> None:
    backend = TensorBoardBackend()
    backend.open(Run(tmp_path))
    backend.write(1, [Scalar("train/loss", 1.0)])
    with serve(tmp_path, loader) as server:
        server.wait_for(lambda: server.scalars("train/loss") == [(1, 1.0)])
        if loader == "python":  # its deterministic mode reads once, at the start
            backend.close()
            return
        backend.write(2, [Scalar("train/loss", 2.0)])
        server.wait_for(lambda: server.scalars("train/loss") == [(1, 1.0), (2, 2.0)])
    backend.close()


# ------------------------------------------------------------------------------------------------------ event files


def test_a_file_begins_with_its_version_then_a_session_start(tmp_path: Path) -> None:
    version, start, config, step, _ = events(record_steps(tmp_path, losses(5, 5), config={"a": 1}).path)
    assert version.file_version == "brain.Event:2"
    assert (start.session_log.status, start.step) == (SessionLog.START, 0)
    assert [value.tag for value in config.summary.value] == ["_hparams_/session_start_info"]
    assert (step.step, step.summary.value[-1].simple_value) == (5, 5.0)


def test_a_resumed_file_starts_after_the_checkpoint(tmp_path: Path) -> None:
    assert [e.step for e in events(record_steps(tmp_path, [], starting_step=10).path)][1] == 11


def test_one_event_holds_all_records_of_a_step(tmp_path: Path) -> None:
    records: list[Record] = [*(Scalar(f"many/{i}", float(i)) for i in range(4000)), Alert("notes/a", "", "b")]
    path = record_steps(tmp_path, [(3, records)]).path
    (event,) = [e for e in EventFileLoader(str(path)).Load() if e.step == 3 and len(e.summary.value) > 1]
    numbers = {
        v.tag: make_ndarray(v.tensor).item() for v in event.summary.value if v.HasField("tensor") and v.tag != "notes/a"
    }
    assert numbers == {f"many/{i}": float(i) for i in range(4000)}


def test_several_thousand_scalars_are_cheap(tmp_path: Path) -> None:
    backend = TensorBoardBackend()
    backend.open(Run(tmp_path))
    records = [Scalar(f"many/{i}", float(i)) for i in range(1000)]
    backend.write(1, records)
    started = time.process_time()
    for step in range(2, 12):
        backend.write(step, records)
    seconds = time.process_time() - started
    backend.close()
    assert seconds / 10_000 < 50e-6  # torch's writer takes 80 µs a scalar


def test_each_tag_is_described_once(tmp_path: Path) -> None:
    records = [Scalar("train/loss", 1.0), Alert("notes/a", "", "b")]
    path = record_steps(tmp_path, [(step, records) for step in (1, 2)]).path
    values = [value for event in events(path) for value in event.summary.value]
    described = [v.tag for v in values if v.metadata.summary_description]
    assert described == ["_hparams_/session_start_info", "train/loss"]
    assert len([v for v in values if v.tag == "notes/a"]) == 2


def test_what_is_written_is_in_the_file_without_close(tmp_path: Path) -> None:
    backend = TensorBoardBackend()
    backend.open(Run(tmp_path))
    for step in range(1, 6):
        backend.write(step, [Scalar("train/loss", float(step))])
    assert steps_in(backend.path) == [1, 2, 3, 4, 5]
    backend.close()


def test_a_killed_process_loses_nothing(tmp_path: Path) -> None:
    script = """
        backend.open(Run(Path(sys.argv[1])))
        for step in range(1, 101):
            backend.write(step, [Scalar("train/loss", float(step))])
        os.kill(os.getpid(), signal.SIGKILL)
    """
    path, _ = written_by(script, tmp_path, -signal.SIGKILL)
    assert steps_in(path) == list(range(1, 101))


def test_a_torn_tail_leaves_the_rest_and_the_next_attempt_whole(tmp_path: Path) -> None:
    first = record_steps(tmp_path, losses(1, 5)).path
    assert first is not None
    os.truncate(first, first.stat().st_size - 3)
    assert steps_in(first) == [1, 2, 3, 4, 5]
    second = record_steps(tmp_path, losses(6, 8), starting_step=5).path
    assert second is not None
    assert second.name > first.name
    assert steps_in(second) == [6, 7, 8]


@pytest.mark.parametrize("content", [b"", b"\x05", b"\xff" * 64, bytes(range(256))])
def test_a_broken_earlier_file_does_not_keep_a_run_from_starting(content: bytes, tmp_path: Path) -> None:
    broken = tmp_path / "events.out.tfevents.4000000000.host.1.0"
    broken.write_bytes(content)
    path = record_steps(tmp_path, losses(1, 2)).path
    assert path is not None
    assert path.name > broken.name
    assert steps_in(path) == [1, 2]


def test_times_of_a_damaged_event_are_not_believed(tmp_path: Path) -> None:
    first = record_steps(tmp_path, losses(1, 2)).path
    assert first is not None
    content = bytearray(first.read_bytes())
    year_one_million = struct.pack("<d", 3e13)
    at = content.rindex(struct.pack("<d", events(first)[-1].wall_time))
    content[at : at + 8] = year_one_million
    first.write_bytes(content)
    second = record_steps(tmp_path, losses(1, 2)).path
    assert events(second)[0].wall_time < time.time() + 60


def test_times_follow_those_of_earlier_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = [record_steps(tmp_path, losses(1, 3)).path]
    for hours in (1, 3, 2):
        now = time.time() - 3600 * hours
        monkeypatch.setattr(time, "time", lambda now=now: now)
        paths.append(record_steps(tmp_path, losses(1, 3)).path)
        monkeypatch.undo()
    names = [path.name for path in paths if path]
    assert names == sorted(set(names))
    wall_times = [event.wall_time for path in paths for event in events(path)]
    assert wall_times == sorted(wall_times)


def test_a_clock_set_back_within_a_run_does_not_turn_time_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    backend = TensorBoardBackend()
    backend.open(Run(tmp_path))
    now = time.time()
    for step, clock in enumerate((now, now - 500, now + 5), 1):
        monkeypatch.setattr(time, "time", lambda clock=clock: clock)
        backend.write(step, [Scalar("train/loss", 1.0)])
    backend.close()
    wall_times = [event.wall_time for event in events(backend.path)]
    assert wall_times == sorted(wall_times)


def test_steps_must_not_decrease(tmp_path: Path) -> None:
    backend = TensorBoardBackend()
    backend.open(Run(tmp_path))
    backend.write(7, [Scalar("train/loss", 1.0)])
    backend.write(7, [Scalar("eval/loss", 1.0)])
    with pytest.raises(ValueError, match="step 6 after step 7"):
        backend.write(6, [Scalar("train/loss", 1.0)])
    backend.close()
    assert steps_in(backend.path) == [7]


def test_writing_before_opening_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="before open"):
        TensorBoardBackend().write(1, [Scalar("train/loss", 1.0)])


def test_a_directory_that_cannot_be_made_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OSError, match="file"):
        TensorBoardBackend().open(Run(tmp_path / "file" / "logs"))


def test_a_full_disk_costs_steps_and_nothing_else(tmp_path: Path) -> None:
    """The kernel refuses to let the file grow, as it does when a disk is full, then lets it."""
    script = """
        backend.open(Run(Path(sys.argv[1])))
        backend.write(1, [Scalar("train/loss", 1.0)])
        full = backend.path.stat().st_size + 100
        resource.setrlimit(resource.RLIMIT_FSIZE, (full, hard))
        lost = []
        for step in (2, 3, 4):
            records = [Scalar("train/loss", float(step)), Scalar("eval/loss", 1.0), Alert("a/b", "", "c" * 500)]
            lost.append(backend.write(step, records))
            assert backend.path.stat().st_size == full - 100, "a torn record is left"
        assert lost == [3, 3, 3], lost
        assert backend.lost_steps == 3, backend.lost_steps
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
        lost = backend.write(5, [Scalar("train/loss", 5.0), Scalar("eval/loss", 1.0)])
        assert lost + backend.write(6, [Scalar("train/loss", 6.0)]) == 0
        backend.close()
    """
    path, said = written_by(script, tmp_path)
    assert steps_in(path) == [1, 5, 6]
    values = [value for event in events(path) for value in event.summary.value]
    assert any(v.tag == "eval/loss" and v.metadata.summary_description for v in values)
    losing, again = said.strip().splitlines()
    assert "losing steps" in losing
    assert "3 steps were lost" in again


def test_a_directory_that_is_deleted_costs_one_step_that_is_counted(
    tmp_path: Path, telemetry_log: pytest.LogCaptureFixture
) -> None:
    backend = TensorBoardBackend()
    backend.open(Run(tmp_path / "logs", config={"a": 1}))
    lost = []
    for step in range(1, 5):
        if step == 3:
            shutil.rmtree(tmp_path / "logs")
        lost.append(backend.write(step, [Scalar("train/loss", float(step)), Scalar("eval/loss", 1.0)]))
    backend.close()
    assert lost == [0, 0, 2, 0]
    (path,) = (tmp_path / "logs").iterdir()
    assert path == backend.path
    assert steps_in(path) == [4]
    assert events(path)[0].file_version == "brain.Event:2"
    assert steps_in(path, "_hparams_/session_start_info") == [0]
    values = [value for event in events(path) for value in event.summary.value]
    assert any(value.tag == "eval/loss" and value.metadata.summary_description for value in values)
    said = [record.getMessage() for record in telemetry_log.records]
    assert len(said) == 2
    assert "was deleted" in said[0]
    assert "1 steps were lost" in said[1]


def test_a_step_has_the_time_at_which_it_ended(tmp_path: Path) -> None:
    """However long its writing takes, or that of the one before."""
    gate, writing = threading.Event(), threading.Event()

    class Slow(TensorBoardBackend):
        def write(self, step: int, records: Sequence[Record]) -> int:
            writing.set()
            assert gate.wait(20)
            return super().write(step, records)

    backend = Slow()
    recorder = Recorder([backend])
    recorder.open(Run(tmp_path))
    assert recorder.drain(20)
    ended = {}
    for step in (1, 2, 3):
        recorder.metric("train/loss", Sum(float(step)))
        before = time.time()
        recorder.flush(step)
        ended[step] = (before, time.time())
    assert writing.wait(20)
    while time.time() < ended[3][1] + 0.05:
        time.sleep(0.01)
    gate.set()
    recorder.close()
    times = {
        event.step: event.wall_time
        for event in events(backend.path)
        if any(value.tag == "train/loss" for value in event.summary.value)
    }
    assert times.keys() == ended.keys()
    assert all(ended[step][0] <= times[step] <= ended[step][1] for step in ended), (times, ended)


def test_a_disk_that_is_full_from_the_start_is_written_once_it_is_not(tmp_path: Path) -> None:
    script = """
        resource.setrlimit(resource.RLIMIT_FSIZE, (20, hard))
        backend.open(Run(Path(sys.argv[1]), config={"a": 1}))
        backend.write(1, [Scalar("train/loss", 1.0)])
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
        backend.write(2, [Scalar("train/loss", 2.0)])
        backend.close()
    """
    path, _ = written_by(script, tmp_path)
    assert steps_in(path) == [2]
    assert events(path)[0].file_version == "brain.Event:2"
    assert steps_in(path, "_hparams_/session_start_info") == [0]


def test_two_that_begin_at_once_in_one_process_have_a_file_each(tmp_path: Path) -> None:
    failed: list[Exception] = []
    for attempt in range(20):
        run, backends = Run(tmp_path / str(attempt)), [TensorBoardBackend() for _ in range(4)]
        barrier = threading.Barrier(len(backends))

        def begin(backend: TensorBoardBackend, run: Run = run, barrier: threading.Barrier = barrier) -> None:
            barrier.wait()
            try:
                backend.open(run)
                backend.write(1, [Scalar("train/loss", 1.0)])
            except Exception as error:  # noqa: BLE001
                failed.append(error)

        threads = [threading.Thread(target=begin, args=(backend,)) for backend in backends]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert failed == []
        for backend in backends:
            backend.close()
        assert len(list(run.logging_dir.rglob("*tfevents*"))) == len(backends)


def test_a_forked_child_leaves_the_file_alone(tmp_path: Path) -> None:
    script = """
        backend.open(Run(Path(sys.argv[1])))
        backend.write(1, [Scalar("train/loss", 1.0)])
        child = os.fork()
        if child == 0:
            backend.write(2, [Scalar("train/loss", -1.0)])
            backend.close()
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
        backend.write(3, [Scalar("train/loss", 3.0)])
        backend.close()
    """
    path, _ = written_by(script, tmp_path)
    assert steps_in(path) == [1, 3]
    assert len(steps_in(path, "_hparams_/session_end_info")) == 1


def written_by(script: str, directory: Path, status: int = 0) -> tuple[Path, str]:
    """The event file of a program, and what it said, in a process of its own: it may be killed, limited and forked."""
    ended = programs.run(["-c", PREAMBLE + textwrap.dedent(script), str(directory / "logs")], directory)
    assert ended.status == status, ended.said
    (path,) = (directory / "logs").iterdir()
    return path, ended.said


# --------------------------------------------------------------------------------------------------------- records


def test_a_record_that_cannot_be_shown_keeps_no_other_away(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    bad = Image("attention/mass", np.zeros((4, 4, 3), np.float32))
    backend = record_steps(tmp_path, [(step, [bad, Scalar("train/loss", 1.0)]) for step in (1, 2)])
    assert backend.unshown_records == 2
    assert steps_in(backend.path) == [1, 2]
    assert [r.message for r in caplog.records] == [
        "TensorBoard cannot show attention/mass: pixels must be uint8, got float32"
    ]


def test_a_tag_taken_by_another_page_is_shown_beside_it(tmp_path: Path) -> None:
    alert = Alert("health/loss", "Loss rises", "Lower the learning rate.")
    path = record_steps(tmp_path, [(1, [Scalar("health/loss", 2.0), alert])]).path
    assert steps_in(path, "health/loss") == [1]
    assert steps_in(path, "health/loss/text") == [1]


def test_audio_that_is_all_empty_is_absent(tmp_path: Path) -> None:
    empty = Clip(np.zeros(0, np.float32), 24_000)
    path = record_steps(tmp_path, [(1, [Audio("inputs/target", (empty, empty)), Audio("inputs/reference", ())])]).path
    assert steps_in(path, "inputs/target") == []
    assert steps_in(path, "inputs/reference") == []


def test_an_empty_clip_keeps_its_place(tmp_path: Path) -> None:
    clips = (Clip(np.zeros(0, np.float32), 24_000), Clip(tone(0.1, 24_000), 24_000, "second"))
    path = record_steps(tmp_path, [(1, [Audio("inputs/target", clips)])]).path
    (value,) = [v for event in events(path) for v in event.summary.value if v.tag == "inputs/target"]
    first, label, second, _ = value.tensor.string_val
    assert (Sound(first).samples.size, Sound(second).samples.size) == (0, 2400)
    assert shown(label.decode()) == "This clip is empty."


def test_changed_samples_are_counted_and_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    samples = np.array([0.5, 1.5, -2.0, np.nan, np.inf, -np.inf], np.float32)
    audio = Audio("inputs/target", (Clip(samples, 24_000, "a voice"),))
    path = record_steps(tmp_path, [(1, [audio]), (2, [audio])]).path
    values = [v for event in events(path) for v in event.summary.value if v.tag == "inputs/target"]
    said = "a voice 3 samples were NaN or infinite and are silent here."
    said += " 2 samples were beyond full scale and are clipped here."
    assert [shown(v.tensor.string_val[1].decode()) for v in values] == [said, said]
    assert shown(values[0].metadata.summary_description).endswith(f"\nClip 1: {said}")
    assert Sound(values[0].tensor.string_val[0]).samples[:, 0].tolist() == [16384, 32767, -32767, 0, 0, 0]
    assert [said in record.message for record in caplog.records] == [True]


@pytest.mark.parametrize(
    ("samples", "expected"),
    [
        (np.array([-32768, -1, 0, 32767], np.int16), [-32768, -1, 0, 32767]),
        (np.array([-128, 0, 64], np.int8), [-32768, 0, 16384]),
        (np.array([-(2**31), 2**30, 2**31 - 1], np.int32), [-32768, 16384, 32767]),
        (np.array([0, 128, 192], np.uint8), [-32768, 0, 16384]),
        (np.array([-1.0, 0.0, 1.0], np.float16), [-32767, 0, 32767]),
        (np.array([-1.0, 0.5, 1.0], np.float64), [-32767, 16384, 32767]),
    ],
)
def test_every_type_is_scaled_by_its_range(samples: np.ndarray, expected: list[int]) -> None:
    wav = encode_wav(Clip(samples, 16_000))
    assert Sound(wav.data).samples[:, 0].tolist() == expected
    assert (wav.clipped, wav.nonfinite) == (0, 0)


@pytest.mark.parametrize(
    ("clip", "error"),
    [
        (Clip(np.zeros((2, 2, 2), np.float32), 16_000), ValueError),
        (Clip(np.zeros(8, np.float32), 0), ValueError),
        (Clip(np.zeros(8, np.complex64), 16_000), TypeError),
    ],
)
def test_what_is_no_sound_is_refused(clip: Clip, error: type[Exception]) -> None:
    with pytest.raises(error):
        encode_wav(clip)


@pytest.mark.parametrize("shape", [(3, 5), (3, 5, 3)])
def test_pictures_come_back_as_they_were(shape: tuple[int, ...]) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    np.testing.assert_array_equal(np.asarray(PillowImage.open(io.BytesIO(encode_png(pixels)))), pixels)


@pytest.mark.parametrize("shape", [(0, 5), (3, 5, 4), (3,), (1, 3, 5, 3)])
def test_what_is_no_picture_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="pixels must be"):
        encode_png(np.zeros(shape, np.uint8))


# -------------------------------------------------------------------------------------------------------- markdown


@given(st.text(alphabet=st.one_of(st.sampled_from(string.punctuation + " \t\nab1"), st.characters()), max_size=60))
@settings(max_examples=150)
def test_any_text_is_shown_as_it_is(text: str) -> None:
    page = markdown_to_safe_html(escape(f"({text})")).removeprefix("<p>").removesuffix("</p>")
    assert set(re.findall(r"<\w+", page)) <= {"<br"}
    expected = re.sub("\r\n?|[\x85\u2028\u2029]", "\n", f"({text})".encode("utf-8", "backslashreplace").decode())
    controls = {**{c: 0x2400 + c for c in range(32) if chr(c) not in "\t\n"}, 127: 0x2421}
    assert shown(page) == expected.translate(controls).replace("\N{NO-BREAK SPACE}", " ")


@pytest.mark.parametrize(
    ("cell", "text"),
    [
        (None, ""),
        (True, "true"),
        (np.False_, "false"),
        (151_643, "151643"),
        (2**60, str(2**60)),
        (0.1 + 0.2, "0.3"),
        (1 / 3e6, "3.33333e-07"),
        (np.float32(0.1), "0.1"),
        (math.nan, "nan"),
        (-math.inf, "-inf"),
        ("", ""),
        ("y" * MAX_CELL, "y" * MAX_CELL),
        ("y" * (MAX_CELL + 1), "y" * MAX_CELL + "…"),
    ],
)
def test_cells_are_written_for_people(cell: Cell, text: str) -> None:
    page = table_page(Table("a/b", ("left", "right"), (("x", cell),)))
    assert [[shown_text.replace("\n", "") for shown_text in row] for row in cells(page)] == [["x", text]]


def test_wide_columns_are_broken_after_spaces_and_narrow_ones_are_not() -> None:
    words = "check that reference and target are of one speaker " * 5
    row = ("reference_ignored", "warning", words, words)
    ((check, verdict, *wide),) = cells(table_page(Table("a/b", ("a", "b", "c", "d"), (row,))))
    assert (check, verdict) == row[:2]
    for text in wide:
        assert text.replace("\n", "") == words
        assert all(line.endswith(" ") and 30 <= len(line) <= 45 for line in text.split("\n")[:-1])


def test_a_table_that_fits_is_not_broken() -> None:
    row = ("a b " * 25 + "c", 1)
    page = table_page(Table("a/b", ("text", "number"), (row,)))
    assert cells(page) == [[row[0], "1"]]


def test_tables_without_rows_and_without_columns(tmp_path: Path) -> None:
    page = table_page(Table("a/b", ("only | column",), ()))
    assert shown(re.findall(r"<th>(.*?)</th>", page)[0]) == "only | column"
    assert steps_in(record_steps(tmp_path, [(1, [Table("a/b", (), ())])]).path, "a/b") == []


# ------------------------------------------------------------------------------------------- configuration, command


def test_configuration_is_flat_and_plain() -> None:
    nested = {"a": {"b": {"c": 1}, "empty": {}}, "list": [1, "x"], "none": None, "inf": math.inf, "path": Path("/x")}
    assert flatten(nested) == {"a.b.c": 1.0, "a.empty": "{}", "list": '[1, "x"]', "inf": "inf", "path": '"/x"'}


def test_the_command_is_safe_to_paste_and_keeps_every_sample(tmp_path: Path) -> None:
    directory = tmp_path / "it's a run; rm -rf $HOME"
    words = shlex.split(launch_command(directory / "run"))
    assert words[1:] == ["--logdir", str(directory), "--samples_per_plugin", SAMPLES]
    for inside in ("logs", "runs/telemetry"):
        assert launch_command(directory / "run" / inside) == launch_command(directory / "run")
    # All of a disk, or of a home, is no place to look for runs.
    assert shlex.split(launch_command("/run"))[2] == "/run"
    assert shlex.split(launch_command(Path.home() / "run/logs"))[2] == str(Path.home() / "run")


def test_the_command_runs_from_a_shell_that_knows_nothing_of_this_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    program = shlex.split(launch_command(tmp_path))[0]
    version = subprocess.run([program, "--version"], capture_output=True, text=True, check=True, timeout=60).stdout
    assert version.strip() == metadata.version("tensorboard")


def test_the_command_is_short_where_the_shell_finds_tensorboard(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent))
    assert launch_command("/a/b/logs").startswith("tensorboard --logdir /a ")


def test_the_writer_needs_neither_tensorflow_nor_the_server(tmp_path: Path) -> None:
    script = """
        import sys
        import telemetry.backends.tensorboard
        heavy = {"tensorflow", "tensorboard.backend.application", "tensorboard.program", "tensorboard.main"}
        assert not heavy & set(sys.modules), heavy & set(sys.modules)
    """
    ended = programs.run(["-c", textwrap.dedent(script)], tmp_path)
    assert ended.status == 0, ended.said


def test_nothing_is_logged_when_all_is_well(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG, logger="telemetry"):
        record_steps(tmp_path, losses(1, 3))
    assert caplog.records == []


def test_a_run_that_finds_another_at_work_has_a_directory_of_its_own(
    tmp_path: Path, telemetry_log: pytest.LogCaptureFixture
) -> None:
    """While the other is at work, and no longer: what goes on after it does so there."""
    first, second, third, resumed = (TensorBoardBackend() for _ in range(4))
    for backend in (first, second, third):
        backend.open(Run(tmp_path))
        backend.write(1, [Scalar("x", 1.0)])
    assert [made.path.parent for made in (first, second, third) if made.path] == [
        tmp_path, tmp_path / "run-2", tmp_path / "run-3"
    ]  # fmt: skip
    said = f"another run is writing to {tmp_path}: this one goes to {tmp_path / 'run-2'}"
    assert telemetry_log.text.count(said) == 1
    first.close()
    resumed.open(Run(tmp_path, starting_step=1))
    assert resumed.path is not None
    assert resumed.path.parent == tmp_path
    for backend in (second, third, resumed):
        backend.close()


def test_a_worker_that_outlives_a_killed_run_does_not_hold_its_directory(tmp_path: Path) -> None:
    reader, writer = os.pipe()
    run = os.fork()
    if run == 0:
        backend = TensorBoardBackend()
        backend.open(Run(tmp_path))
        worker = os.fork()
        if worker == 0:
            os.write(writer, b"%d" % os.getpid())
            signal.pause()
        signal.pause()
    worker = int(os.read(reader, 20))
    try:
        assert [path for path in tmp_path.iterdir() if is_locked(path)]
        os.kill(run, signal.SIGKILL)
        os.waitpid(run, 0)
        assert not [path for path in tmp_path.iterdir() if is_locked(path)]
    finally:
        os.kill(worker, signal.SIGKILL)
        os.close(reader)
        os.close(writer)


def test_a_file_system_without_locks_is_written_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(errno.ENOLCK, "no locks available")

    monkeypatch.setattr("telemetry.backends.locks.fcntl.flock", refuse)
    for backend in (TensorBoardBackend(), TensorBoardBackend()):
        backend.open(Run(tmp_path))
        assert backend.path is not None
        assert backend.path.parent == tmp_path
        backend.close()
