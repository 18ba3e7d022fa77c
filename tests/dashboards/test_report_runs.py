"""What is read of a run's event files: all of it, nothing superseded, around what is damaged."""

from __future__ import annotations

import logging
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
from report_runs import HOSTILE, rich_run, tone, write_run
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata
from tensorboard.compat.proto.tensor_pb2 import TensorProto
from tensorboard.summary.writer.event_file_writer import EventFileWriter
from torch.utils.tensorboard import SummaryWriter

from dashboards.report.media import collect
from dashboards.runs import NothingToShowError, read_runs
from telemetry.records import Alert, Audio, Scalar, Table


def losses(*steps: int, value: float = 1.0) -> dict:
    return {step: [Scalar("train/loss", value)] for step in steps}


def only(directory: Path):
    (run,) = read_runs([directory])
    return run


def test_everything_that_was_written_is_read(tmp_path: Path) -> None:
    rich_run(tmp_path)
    run = only(tmp_path)
    assert run.scalars["outputs/loss/total"].steps == [10, 20, 30]
    assert run.scalars["outputs/loss/total"].values == pytest.approx([0.9, 0.45, 0.3])
    assert math.isnan(run.scalars["gradients/total_norm"].values[1])
    assert {tag: stored[0].kind for tag, stored in run.media.items()} == {
        "health/checks": "text",
        "health/alerts": "text",
        "inputs/sequence": "text",
        "inputs/note/text_summary": "text",
        "zero_shot/clips": "text",
        "zero_shot/clip_0/generated": "audio",
        "zero_shot/clip_0/reference": "audio",
        "zero_shot/clip_0/target": "audio",
        "zero_shot/clip_0/generated/images": "images",
        "attention/mass": "images",
    }
    assert run.config == {"learning_rate": 1e-4, "bf16": True, "prompt": HOSTILE}
    assert (run.ended, run.starts, run.last_step, run.faults) == (True, [0], 30, [])
    assert run.first_time is not None
    assert run.last_time is not None
    assert run.first_time <= run.last_time
    stored = run.media["zero_shot/clip_0/target"][-1]
    assert stored.step == 30
    assert stored.load()[0][0][:4] == b"RIFF"


def test_a_resumed_attempt_supersedes_the_steps_after_its_checkpoint(tmp_path: Path) -> None:
    clip = {step: [Scalar("train/loss", 1.0), Audio("inputs/target", (tone(),))] for step in (10, 20, 30, 40)}
    write_run(tmp_path, clip)
    write_run(tmp_path, losses(30, value=2.0), starting_step=20)
    run = only(tmp_path)
    assert run.scalars["train/loss"].steps == [10, 20, 30]
    assert run.scalars["train/loss"].values == [1.0, 1.0, 2.0]
    assert [stored.step for stored in run.media["inputs/target"]] == [10, 20]
    assert run.starts == [0, 21]


def test_what_only_a_superseded_attempt_measured_is_gone(tmp_path: Path) -> None:
    write_run(tmp_path, {5: [Scalar("train/old", 1.0), Audio("inputs/target", (tone(),))]})
    write_run(tmp_path, losses(1))
    assert only(tmp_path).tags == {"train/loss"}


def test_without_a_start_the_later_file_counts_from_its_first_step(tmp_path: Path) -> None:
    for steps, value in (((1, 2, 3), 1.0), ((2,), 2.0)):
        with SummaryWriter(tmp_path / "new") as writer:
            for step in steps:
                writer.add_scalar("train/loss", value, step)
                writer.add_scalar("train/tensor", value, step, new_style=True)
        (path,) = (tmp_path / "new").iterdir()
        path.rename(tmp_path / f"events.out.tfevents.{value}")
    run = only(tmp_path)
    for tag in ("train/loss", "train/tensor"):
        assert (run.scalars[tag].steps, run.scalars[tag].values) == ([1, 2], [1.0, 2.0])


def test_two_alerts_of_one_step_are_two(tmp_path: Path) -> None:
    alerts = [Alert("health/alerts", title, "") for title in ("one", "two")]
    write_run(tmp_path, {5: alerts})
    assert [stored.record() for stored in only(tmp_path).media["health/alerts"]] == alerts


def test_a_record_that_is_still_being_written_is_no_fault(tmp_path: Path) -> None:
    path = write_run(tmp_path, losses(1, 2))
    whole = path.read_bytes()
    write_run(other := tmp_path / "other", losses(1, 2, 3))
    (longer,) = other.iterdir()
    for torn in (longer.stat().st_size - 70, len(whole) - 3):
        path.write_bytes((longer if torn > len(whole) else path).read_bytes()[:torn])
        (run,) = (run for run in read_runs([tmp_path]) if run.directory == tmp_path.resolve())
        assert run.faults == []
        assert run.scalars["train/loss"].steps[:2] == [1, 2]
        assert not run.ended
        path.write_bytes(whole)


@pytest.mark.parametrize("what", ["header", "data"])
def test_a_damaged_record_is_left_out_and_named_and_what_follows_is_shown(tmp_path: Path, what: str) -> None:
    path = write_run(tmp_path, losses(1))
    size_of_one = path.stat().st_size
    path.unlink()
    path = write_run(tmp_path, losses(*range(1, 40)))
    data = bytearray(path.read_bytes())
    data[size_of_one + (2 if what == "header" else 40)] ^= 0xFF
    path.write_bytes(data)
    run = only(tmp_path)
    assert len(run.scalars["train/loss"].steps) == 38
    assert run.scalars["train/loss"].steps[-1] == 39
    assert len(run.faults) == 1
    assert path.name in run.faults[0]
    assert "damaged" in run.faults[0]


def test_runs_are_found_however_deep_and_named_apart(tmp_path: Path) -> None:
    for place in ("a/logs", "b/logs", "b/other"):
        write_run(tmp_path / place, losses(1))
    assert [run.name for run in read_runs([tmp_path, tmp_path / "a"])] == ["a", "b", "other"]
    shutil.rmtree(tmp_path / "b" / "other")
    write_run(tmp_path / "c" / "a" / "logs", losses(1))
    names = [run.name for run in read_runs([tmp_path])]
    assert len(set(names)) == 3
    assert names[1:] == [f"{tmp_path.name}/b", "c/a"]


def test_where_nothing_is_recorded_the_error_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(NothingToShowError, match="no directory: give the one that --logging_dir named"):
        read_runs([tmp_path / "missing"])
    with pytest.raises(NothingToShowError, match=r"no event file in .*: give the directory"):
        read_runs([tmp_path])
    write_run(tmp_path / "empty", {})
    with pytest.raises(NothingToShowError, match=r"nothing is recorded in .*: wait for the first due step"):
        read_runs([tmp_path])
    (tmp_path / "events.out.tfevents.1.x.1").write_bytes(b"no event file at all, but long enough to be one")
    with pytest.raises(NothingToShowError, match="is damaged: the record at byte 0"):
        read_runs([tmp_path])


def test_an_empty_run_beside_others_is_left_out_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_run(tmp_path / "empty", {})
    write_run(tmp_path / "full", losses(1))
    with caplog.at_level(logging.WARNING):
        assert [run.name for run in read_runs([tmp_path])] == ["full"]
    assert "empty is left out: nothing is recorded" in caplog.text


CELLS = [
    "",
    "a|b",
    "<|endoftext|> __init__ `x` [y](z) \\",
    "line\nbreak",
    HOSTILE,
    "a | b",
    "&amp;lt;",
    "٣ نص",
    "-- | ---",
]


@pytest.mark.parametrize("text", CELLS)
def test_tables_and_alerts_are_read_back_as_they_were(tmp_path: Path, text: str) -> None:
    alert = Alert("a/alert", f"t{text}t", text, "info")
    write_run(tmp_path, {1: [Table("a/table", ("x", text or "y"), ((text, "1"), (None, 2.5))), alert]})
    media = only(tmp_path).media
    assert media["a/table"][0].record() == Table("a/table", ("x", text or "y"), ((text, "1"), ("", "2.5")))
    assert media["a/alert"][0].record() == alert


def test_a_page_can_hold_what_a_text_may_not(tmp_path: Path) -> None:
    broken = "\x00\x1b[31m\ud800\r\n\u2028."
    write_run(tmp_path, {1: [Table("a/table", ("x",), ((broken,),)), Alert("a/alert", broken, broken)]})
    media = only(tmp_path).media
    shown = "\u2400\u241b[31m\\ud800\n\n."
    assert media["a/table"][0].record() == Table("a/table", ("x",), ((shown,),))
    assert media["a/alert"][0].record() == Alert("a/alert", shown, shown)


OTHERS = ["# Title\n\n*bold*", "| a | b |\n| --- | --- |\n| <b> | c |", "| a |\n| --- |\n| b | c |", "**x**", ""]


FOREIGN = [b"", b"{}", b"\x08\x01", b"\x12\x02[]", b"\x12\x04null", b'\x12\x0f{"columns": []}']


@pytest.mark.parametrize("data", FOREIGN)
def test_other_peoples_markdown_stays_as_it_is(tmp_path: Path, data: bytes) -> None:
    metadata = SummaryMetadata(plugin_data=SummaryMetadata.PluginData(plugin_name="text", content=data))
    writer = EventFileWriter(str(tmp_path))
    for number, text in enumerate(OTHERS):
        tensor = TensorProto(dtype="DT_STRING", string_val=[text.encode()])
        value = Summary.Value(tag=f"a/{number}", tensor=tensor, metadata=metadata)
        writer.add_event(Event(step=1, summary=Summary(value=[value])))
    writer.close()
    run = only(tmp_path)
    assert [run.media[f"a/{number}"][0].record() for number in range(len(OTHERS))] == [None] * len(OTHERS)
    assert [item.content for item in collect([run]).documents.items] == OTHERS


def test_steps_and_values_fit_after_values_are_superseded() -> None:
    from dashboards.runs import Series

    series = Series()
    for step, value in ((1, 1.0), (5, 2.0), (9, 3.0), (5, 4.0), (5, 5.0)):
        series.add(step, value)
    assert (series.steps, series.values) == ([1, 5], [1.0, 5.0])
    assert np.all(np.diff(series.steps) > 0)
