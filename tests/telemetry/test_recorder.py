"""The recorder: merges what a step measured, brings it to the host, and keeps backends apart from each other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from telemetry.backends.base import Run
from telemetry.backends.memory import MemoryBackend
from telemetry.recorder import MAX_FAILURES, Emitter, Recorder
from telemetry.records import Max, Mean, Min, Norm, Record, Scalar, Sum, SumOfMeans, Text, UsedFraction


def opened(*backends: Any) -> Recorder:
    recorder = Recorder(backends)
    recorder.open(Run(Path("nowhere")))
    return recorder


class Failing(MemoryBackend):
    """Raises at chosen writes (counted from 1), or when it is opened or closed."""

    name = "failing"

    def __init__(self, writes: Sequence[int] = (), verbs: Sequence[str] = ()) -> None:
        super().__init__()
        self.failing, self.verbs, self.count = writes, verbs, 0

    def open(self, run: Run) -> None:
        super().open(run)
        if "open" in self.verbs:
            raise OSError("no space left on device")

    def write(self, step: int, records: Sequence[Record]) -> None:
        self.count += 1
        if self.count in self.failing:
            raise OSError("no space left on device")
        super().write(step, records)

    def close(self) -> None:
        super().close()
        if "close" in self.verbs:
            raise OSError("no space left on device")


@given(parts=st.lists(st.tuples(st.floats(-1e6, 1e6), st.integers(0, 9)), min_size=1, max_size=6))
def test_values_of_one_tag_are_merged(parts: list[tuple[float, int]]) -> None:
    """Tensors of several dtypes and plain numbers, as they come from several microbatches."""
    backend = MemoryBackend()
    recorder = opened(backend)
    for index, (value, count) in enumerate(parts):
        total = torch.tensor(value * count, dtype=torch.float64) if index % 2 else value * count
        recorder.metric("mean", Mean(total, torch.tensor(count)))
        recorder.metric("sum", Sum(value))
        recorder.metric("max", Max(torch.tensor(value, dtype=torch.float64)))
        recorder.metric("min", Min(value))
        recorder.metric("norm", Norm(value * value))
    recorder.flush(3)

    values = [value for value, _ in parts]
    weights = sum(count for _, count in parts)
    expected = {
        "sum": sum(values),
        "max": max(values),
        "min": min(values),
        "norm": sum(value * value for value in values) ** 0.5,
    }
    if weights:
        expected["mean"] = sum(value * count for value, count in parts) / weights
    assert {tag: backend.scalars(tag) for tag in backend.tags()} == {
        tag: {3: pytest.approx(value, rel=1e-12, abs=1e-6)} for tag, value in expected.items()
    }


def test_a_flushed_step_is_over() -> None:
    backend = MemoryBackend()
    recorder = opened(backend)
    recorder.metric("a", Sum(1))
    recorder.flush(1)
    recorder.flush(2)
    recorder.metric("a", Sum(5))
    recorder.flush(3)
    assert backend.scalars("a") == {1: 1.0, 3: 5.0}


def test_a_step_with_nothing_is_not_written() -> None:
    backend = Failing(writes=[1])
    recorder = opened(backend)
    recorder.flush(1)
    recorder.metric("a", Mean(0, 0))
    recorder.flush(2)
    assert backend.count == 0


def test_a_discarded_step_leaves_nothing() -> None:
    backend = MemoryBackend()
    recorder = opened(backend)
    recorder.metric("a", Sum(1))
    recorder.record(Text("b", "text"))
    recorder.defer({}, lambda _host, emit: emit.record(Text("c", "text")))
    recorder.discard()
    recorder.flush(1)
    assert backend.tags() == []


def test_deferred_work_sees_host_copies_and_adds_to_its_step() -> None:
    backend = MemoryBackend()
    recorder = opened(backend)
    recorder.metric("count", Sum(1))

    def build(host: Mapping[str, Tensor], emit: Emitter) -> None:
        emit.metric("count", Sum(float(host["values"].sum())))
        emit.metric("mean", Mean(2, 4), note="by hand")
        emit.record(Text("text", str(host["values"].tolist())))

    recorder.defer({"values": torch.tensor([1, 2])}, build)
    recorder.defer({"values": torch.tensor([4])}, build)
    recorder.flush(9)
    assert backend.scalars("count") == {9: 8.0}
    assert backend.last("mean", Scalar) == Scalar("mean", 0.5, "by hand")
    assert [record.text for _, record in backend.records["text"]] == ["[1, 2]", "[4]"]  # type: ignore[union-attr]


def test_deferred_work_that_raises_is_said_once_and_the_rest_is_written(
    telemetry_log: pytest.LogCaptureFixture,
) -> None:
    backend = MemoryBackend()
    recorder = opened(backend)

    def broken(_host: Mapping[str, Tensor], emit: Emitter) -> None:
        emit.record(Text("half", "done"))
        raise ValueError("no such row")

    for step in (1, 2):
        recorder.defer({}, broken)
        recorder.defer({}, lambda _host, emit: emit.record(Text("whole", "done")))
        recorder.metric("a", Sum(step))
        recorder.flush(step)
    assert [step for step, _ in backend.records["whole"]] == [1, 2]
    assert backend.scalars("a") == {1: 1.0, 2: 2.0}
    errors = [record.getMessage() for record in telemetry_log.records if record.levelname == "ERROR"]
    assert len(errors) == 1
    assert "no such row" in errors[0]


def test_notes_are_kept_per_step() -> None:
    backend = MemoryBackend()
    recorder = opened(backend)
    recorder.metric("a", Sum(1), note="clipped")
    recorder.metric("a", Sum(1))
    recorder.flush(1)
    recorder.metric("a", Sum(1))
    recorder.flush(2)
    assert [record.note for _, record in backend.records["a"]] == ["clipped", ""]  # type: ignore[union-attr]


def test_many_vectors_come_back_in_their_own_shapes() -> None:
    """All components travel packed together, by dtype."""
    backend = MemoryBackend()
    recorder = opened(backend)
    recorder.metric("used", UsedFraction(torch.tensor([0, 2, 0, 1])))
    recorder.metric("sum", SumOfMeans(torch.tensor([6.0, 5.0, 9.0]), torch.tensor([2, 0, 3])))
    recorder.metric("scalar", Sum(torch.tensor(2.5, dtype=torch.bfloat16)))
    recorder.flush(1)
    assert {tag: backend.scalars(tag)[1] for tag in backend.tags()} == {"used": 0.5, "sum": 6.0, "scalar": 2.5}


def test_written_records_go_past_the_step_that_is_collected() -> None:
    backend = MemoryBackend()
    recorder = opened(backend)
    recorder.metric("a", Sum(1))
    recorder.write(4, [Scalar("train/loss", 2.0)])
    recorder.write(4, [])
    assert backend.tags() == ["train/loss"]
    recorder.flush(5)
    assert backend.scalars("a") == {5: 1.0}


def test_absence_is_said_once_a_tag_and_never_a_zero(telemetry_log: pytest.LogCaptureFixture) -> None:
    backend = MemoryBackend()
    recorder = opened(backend)
    for step in (1, 2):
        recorder.metric("outputs/loss/text", Mean(0, 0))
        recorder.metric("unknown", Max(-torch.inf))
        recorder.flush(step)
    assert backend.tags() == []
    assert [record.getMessage() for record in telemetry_log.records] == [
        "no outputs/loss/text: no supervised text token in the step, or the model computed no text logits",
        "no unknown: nothing to measure in the step",
    ]


def test_lost_records_are_counted_and_a_backend_is_left_out_after_repeated_failures(
    telemetry_log: pytest.LogCaptureFixture,
) -> None:
    good, failing = MemoryBackend(), Failing(writes=[2, 3, 5])
    recorder = opened(failing, good)
    for step in range(1, 9):
        recorder.metric("a", Sum(step))
        recorder.record(Text("b", "text"))
        recorder.flush(step)
    recorder.close()
    assert list(good.scalars("a")) == list(range(1, 9))
    assert list(failing.scalars("a")) == [1, 4]
    assert failing.count == 5  # left out after its third failure
    assert MAX_FAILURES == 3
    assert recorder.dropped_records == 2 * 3
    messages = [record.getMessage() for record in telemetry_log.records]
    assert messages == [
        "backend failing could not write; training goes on",
        "backend failing failed 3 times: left out from now on",
    ]
    assert telemetry_log.records[0].exc_info is not None
    assert good.closed


def test_a_backend_that_cannot_be_opened_is_left_out(telemetry_log: pytest.LogCaptureFixture) -> None:
    good, failing = MemoryBackend(), Failing(verbs=["open"])
    recorder = opened(failing, good)
    recorder.metric("a", Sum(1))
    recorder.flush(1)
    recorder.close()
    assert failing.count == 0
    assert not failing.closed
    assert good.scalars("a") == {1: 1.0}
    assert [record.getMessage() for record in telemetry_log.records] == [
        "backend failing could not open; training goes on"
    ]


def test_a_backend_that_cannot_be_closed_keeps_no_other_from_it(telemetry_log: pytest.LogCaptureFixture) -> None:
    good, failing = MemoryBackend(), Failing(verbs=["close"])
    recorder = opened(failing, good)
    recorder.close()
    recorder.close()
    assert good.closed
    assert [record.getMessage() for record in telemetry_log.records] == [
        "backend failing could not close; training goes on"
    ]


def test_without_backends_a_step_is_measured_and_forgotten() -> None:
    recorder = opened()
    recorder.metric("a", Sum(1))
    recorder.flush(1)
    recorder.close()
    assert recorder.dropped_records == 0
