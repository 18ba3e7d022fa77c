"""The recorder: merges what a step measured, brings it to the host, and keeps backends apart from each other."""

from __future__ import annotations

import gc
import threading
import time
import weakref
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.backends import Blocking, Faulty
from support.references import measured_records
from torch import Tensor

from telemetry.backends.base import Run
from telemetry.backends.memory import MemoryBackend
from telemetry.clock import StepClock
from telemetry.delivery.recorder import MAX_FAILURES, Emitter, Recorder
from telemetry.health import HealthMonitor
from telemetry.health.rules import Level
from telemetry.records import Alert, Max, Mean, Min, Norm, Perplexity, Record, Scalar, Sum, Table, UsedFraction

WRITTEN_SECONDS = 20.0  # generous: other programs share the machine


def opened(*backends: Any, **options: Any) -> Recorder:
    recorder = Recorder(backends, **options)
    recorder.open(Run(Path("nowhere")))
    return recorder


def drained(recorder: Recorder) -> None:
    """Everything that was handed over so far has been written."""
    assert recorder.drain(WRITTEN_SECONDS)


def records_of(backend: MemoryBackend, step: int) -> list[Record]:
    """All records of a step."""
    return [record for records in backend.records.values() for at, record in records if at == step]


def shown(backend: MemoryBackend) -> dict[str, dict[int, float]]:
    """Tag → step → value of what was measured."""
    return {tag: backend.scalars(tag) for tag in measured_records(backend)}


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
    drained(recorder)

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
    assert shown(backend) == {tag: {3: pytest.approx(value, rel=1e-12, abs=1e-6)} for tag, value in expected.items()}


def test_a_flushed_step_is_over() -> None:
    backend = MemoryBackend()
    recorder = opened(backend)
    recorder.metric("a", Sum(1))
    recorder.flush(1)
    recorder.flush(2)
    recorder.metric("a", Sum(5))
    recorder.flush(3)
    drained(recorder)
    assert backend.scalars("a") == {1: 1.0, 3: 5.0}


def test_a_step_with_nothing_is_not_written() -> None:
    backend = Faulty(at=())
    recorder = opened(backend)
    recorder.flush(1)
    recorder.metric("a", Mean(0, 0))
    recorder.flush(2)
    drained(recorder)
    assert backend.calls.count("write") <= 1  # that nothing was dropped in step 2
    assert measured_records(backend) == {}
    assert {step for records in backend.records.values() for step, _ in records} <= {2}


def test_a_discarded_step_leaves_nothing() -> None:
    backend = MemoryBackend()
    recorder = opened(backend)
    recorder.metric("a", Sum(1))
    recorder.record(Alert("b", "", "text"))
    recorder.defer({}, lambda _host, emit: emit.record(Alert("c", "", "text")))
    recorder.discard()
    recorder.flush(1)
    drained(recorder)
    assert backend.tags() == []


def test_deferred_work_sees_host_copies_and_adds_to_its_step() -> None:
    backend = MemoryBackend()
    recorder = opened(backend)
    recorder.metric("count", Sum(1))

    def build(host: Mapping[str, Tensor], emit: Emitter) -> None:
        emit.metric("count", Sum(float(host["values"].sum())))
        emit.metric("mean", Mean(2, 4), note="by hand")
        emit.record(Alert("text", "", str(host["values"].tolist())))

    recorder.defer({"values": torch.tensor([1, 2])}, build)
    recorder.defer({"values": torch.tensor([4])}, build)
    recorder.flush(9)
    drained(recorder)
    assert backend.scalars("count") == {9: 8.0}
    assert backend.last("mean", Scalar) == Scalar("mean", 0.5, "by hand")
    assert [record.text for _, record in backend.records["text"]] == ["[1, 2]", "[4]"]  # type: ignore[union-attr]


def test_deferred_work_that_raises_is_said_once_and_the_rest_is_written(
    telemetry_log: pytest.LogCaptureFixture,
) -> None:
    backend = MemoryBackend()
    recorder = opened(backend)

    def broken(_host: Mapping[str, Tensor], emit: Emitter) -> None:
        emit.record(Alert("half", "", "done"))
        raise ValueError("no such row")

    for step in (1, 2):
        recorder.defer({}, broken)
        recorder.defer({}, lambda _host, emit: emit.record(Alert("whole", "", "done")))
        recorder.metric("a", Sum(step))
        recorder.flush(step)
    drained(recorder)
    assert [step for step, _ in backend.records["whole"]] == [1, 2]
    assert backend.scalars("a") == {1: 1.0, 2: 2.0}
    errors = [record for record in telemetry_log.records if record.levelname == "ERROR"]
    assert len(errors) == 1
    assert errors[0].exc_info is not None
    assert str(errors[0].exc_info[1]) == "no such row"
    assert "broken" in errors[0].getMessage()


def test_notes_are_kept_per_step() -> None:
    backend = MemoryBackend()
    recorder = opened(backend)
    recorder.metric("a", Sum(1), note="clipped")
    recorder.metric("a", Sum(1))
    recorder.flush(1)
    recorder.metric("a", Sum(1))
    recorder.flush(2)
    drained(recorder)
    assert [record.note for _, record in backend.records["a"]] == ["clipped", ""]  # type: ignore[union-attr]


def test_many_vectors_come_back_in_their_own_shapes() -> None:
    """All components travel packed together, by dtype."""
    backend = MemoryBackend()
    recorder = opened(backend)
    recorder.metric("used", UsedFraction(torch.tensor([0, 2, 0, 1])))
    recorder.metric("perplexity", Perplexity(torch.tensor([6.0, 0.0, 6.0])))
    recorder.metric("scalar", Sum(torch.tensor(2.5, dtype=torch.bfloat16)))
    recorder.flush(1)
    drained(recorder)
    assert shown(backend) == {"used": {1: 0.5}, "perplexity": {1: pytest.approx(2.0)}, "scalar": {1: 2.5}}


def test_written_records_go_past_the_step_that_is_collected() -> None:
    backend = MemoryBackend()
    recorder = opened(backend)
    recorder.metric("a", Sum(1))
    recorder.write(4, [Scalar("train/loss", 2.0)])
    recorder.write(4, [])
    drained(recorder)
    assert backend.tags() == ["train/loss"]
    recorder.flush(5)
    drained(recorder)
    assert backend.scalars("a") == {5: 1.0}


def test_absence_is_said_once_a_tag_and_never_a_zero(telemetry_log: pytest.LogCaptureFixture) -> None:
    backend = MemoryBackend()
    recorder = opened(backend)
    for step in (1, 2):
        recorder.metric("outputs/loss/text", Mean(0, 0))
        recorder.metric("unknown", Max(-torch.inf))
        recorder.flush(step)
    drained(recorder)
    assert measured_records(backend) == {}
    assert [record.getMessage() for record in telemetry_log.records] == [
        "no outputs/loss/text: no supervised text token in the step, or the model computed no text logits",
        "no unknown: nothing to measure in the step",
    ]


def test_lost_records_are_counted_and_a_backend_is_left_out_after_repeated_failures(
    telemetry_log: pytest.LogCaptureFixture,
) -> None:
    good, failing = MemoryBackend(), Faulty(at=(2, 3, 5))
    recorder = opened(failing, good)
    for step in range(1, 9):
        recorder.metric("a", Sum(step))
        recorder.record(Alert("b", "", "text"))
        recorder.flush(step)
    recorder.close()
    assert list(good.scalars("a")) == list(range(1, 9))
    assert list(failing.scalars("a")) == [1, 4]
    assert failing.calls.count("write") == 5  # left out after its third failure
    assert MAX_FAILURES == 3
    lost = sum(len(records_of(good, step)) for step in (2, 3, 5, 6, 7, 8))
    assert recorder.dropped_records == lost - told_last(good, recorder)
    messages = [record.getMessage() for record in telemetry_log.records]
    assert messages == [
        "backend faulty could not write; training goes on",
        "telemetry had to drop records; telemetry/dropped_records counts them",
        "backend faulty failed 3 times: left out from now on",
    ]
    assert telemetry_log.records[0].exc_info is not None
    assert good.closed


def test_a_backend_that_cannot_be_opened_is_left_out(telemetry_log: pytest.LogCaptureFixture) -> None:
    good, failing = MemoryBackend(), Faulty("open")
    recorder = opened(failing, good)
    recorder.metric("a", Sum(1))
    recorder.flush(1)
    recorder.close()
    assert "write" not in failing.calls
    assert not failing.closed
    assert good.scalars("a") == {1: 1.0}
    assert [record.getMessage() for record in telemetry_log.records] == [
        "backend faulty could not open; training goes on",
        "telemetry had to drop records; telemetry/dropped_records counts them",
    ]
    assert recorder.dropped_records == len(records_of(good, 1)) - told_last(good, recorder) > 0


def test_a_backend_that_cannot_be_closed_keeps_no_other_from_it(telemetry_log: pytest.LogCaptureFixture) -> None:
    good, failing = MemoryBackend(), Faulty("close")
    recorder = opened(failing, good)
    recorder.close()
    recorder.close()
    assert good.closed
    assert [record.getMessage() for record in telemetry_log.records] == [
        "backend faulty could not close; training goes on"
    ]


def test_without_backends_a_step_is_measured_and_forgotten() -> None:
    recorder = opened()
    recorder.metric("a", Sum(1))
    recorder.flush(1)
    recorder.close()
    assert recorder.dropped_records == 0


class Awaited(MemoryBackend):
    """Tells when it has been given the records of a step."""

    def __init__(self) -> None:
        super().__init__()
        self.writes: list[tuple[int, Sequence[Record]]] = []
        self.given: dict[int, threading.Event] = defaultdict(threading.Event)

    def write(self, step: int, records: Sequence[Record]) -> None:
        super().write(step, records)
        self.writes.append((step, records))
        self.given[step].set()


def count_of(backend: MemoryBackend) -> int:
    """How many records a backend has."""
    return sum(map(len, backend.records.values()))


@pytest.mark.parametrize("verb", ["open", "write"])
@pytest.mark.parametrize("raises", [True, False])
@pytest.mark.parametrize("first", [True, False])
def test_a_backend_that_blocks_blocks_itself_and_the_others_have_everything_meanwhile(
    verb: str, raises: bool, first: bool, telemetry_log: pytest.LogCaptureFixture
) -> None:
    good, other, blocking = Awaited(), Awaited(), Blocking(verb, raises=raises)
    recorder = opened(*([blocking, good, other] if first else [good, blocking, other]))
    for step in range(1, 4):
        recorder.metric("a", Sum(step))
        recorder.flush(step)
    assert blocking.stuck.wait(WRITTEN_SECONDS)
    for backend in (good, other):
        assert backend.given[3].wait(WRITTEN_SECONDS)
        assert list(backend.scalars("a")) == [1, 2, 3]
    assert blocking.records == {}
    assert not recorder.drain(0)
    assert recorder.dropped_records == 0
    assert telemetry_log.records == []

    blocking.gate.set()  # it comes back when all has gone on without it
    assert blocking.woken.wait(WRITTEN_SECONDS)
    drained(recorder)
    recorder.metric("a", Sum(4))
    recorder.flush(4)
    recorder.close()
    for backend in (good, other):
        assert [(step, record.value) for step, record in backend.records["a"]] == [  # type: ignore[union-attr]
            (1, 1.0), (2, 2.0), (3, 3.0), (4, 4.0),
        ]  # fmt: skip
        assert backend.closed
    lost = {True: [1, 2, 3, 4] if verb == "open" else [1], False: []}[raises]
    assert list(blocking.scalars("a")) == [step for step in (1, 2, 3, 4) if step not in lost]
    assert blocking.calls == (["open"] if len(lost) == 4 else ["open", "write", "write", "write", "write", "close"])
    assert recorder.dropped_records == sum(len(records_of(good, step)) for step in lost) - told_last(good, recorder)
    assert good.scalars("telemetry/dropped_records")[4] == recorder.dropped_records
    messages = [record.getMessage() for record in telemetry_log.records]
    assert messages == raises * [
        f"backend blocking could not {verb}; training goes on",
        "telemetry had to drop records; telemetry/dropped_records counts them",
    ]


def told_last(backend: MemoryBackend, recorder: Recorder) -> int:
    """1 where a backend was told at the end how much others had lost since its last step: no other lacks that."""
    told = [record.value for _, record in backend.records["telemetry/dropped_records"] if isinstance(record, Scalar)]
    assert told[-1] == recorder.dropped_records
    return len(told) - len(set(backend.scalars("telemetry/dropped_records")))


@pytest.mark.parametrize("room", [25_000, 10**6], ids=["a queue that is too small", "a queue for everything"])
def test_what_a_blocked_backend_lacks_is_counted_and_shown_exactly(room: int) -> None:
    """It never comes back: what it shows is compared with what another has been given."""
    good, blocking = Awaited(), Blocking(call=2)
    recorder = opened(blocking, good, max_queue_bytes=room, judge=HealthMonitor())
    for step in range(1, 9):
        recorder.metric("a", Sum(step))
        recorder.record(Alert("text", "", "x" * 10_000))
        recorder.flush(step)
        assert good.given[step].wait(WRITTEN_SECONDS)
        assert step < 2 or blocking.stuck.wait(WRITTEN_SECONDS)
    recorder.close(1.0)
    *handed, (step, told) = good.writes
    missing = sum(len(records) for _, records in handed) - count_of(blocking)
    assert recorder.dropped_records == missing
    assert (step, told[0]) == (8, Scalar("telemetry/dropped_records", float(missing)))
    assert good.scalars("health/records_lost")[8] == Level.WARNING
    assert f"{missing}" in str(good.last("health/checks", Table).rows)
    assert len(good.records["health/alerts"]) == 1
    assert good.closed
    blocking.gate.set()


def test_a_backend_that_takes_its_time_is_not_left_out(telemetry_log: pytest.LogCaptureFixture) -> None:
    slow, good = Blocking(), MemoryBackend()
    recorder = opened(slow, good)
    recorder.metric("a", Sum(1))
    recorder.flush(1)
    assert slow.stuck.wait(WRITTEN_SECONDS)
    assert not recorder.drain(0.2)
    slow.gate.set()
    recorder.close()
    assert slow.scalars("a") == good.scalars("a") == {1: 1.0}
    assert recorder.dropped_records == 0
    assert telemetry_log.records == []


def test_closing_takes_no_longer_than_its_bound_and_others_are_written(telemetry_log: pytest.LogCaptureFixture) -> None:
    """Long before the backend counts as blocked at any other time."""
    blocking, good = Blocking(), MemoryBackend()
    recorder = opened(blocking, good)
    for step in range(1, 4):
        recorder.metric("a", Sum(step))
        recorder.flush(step)
    assert blocking.stuck.wait(WRITTEN_SECONDS)
    began = time.monotonic()
    recorder.close(1.0)
    assert time.monotonic() - began < 5.0
    assert good.scalars("a") == {1: 1.0, 2: 2.0, 3: 3.0}
    assert good.closed
    blocking.gate.set()


def test_closing_within_its_bound_where_every_backend_blocks() -> None:
    backends = [Blocking(), Blocking(), Blocking()]
    recorder = opened(*backends)
    recorder.metric("a", Sum(1))
    recorder.flush(1)
    assert backends[0].stuck.wait(WRITTEN_SECONDS)
    began = time.monotonic()
    recorder.close(0.8)
    assert 0.3 < time.monotonic() - began < 5.0
    recorder.metric("a", Sum(2))
    recorder.flush(2)
    assert recorder.dropped_records > 0
    for backend in backends:
        backend.gate.set()


def test_a_flush_costs_little_while_a_backend_blocks() -> None:
    blocking = Blocking()
    recorder = opened(blocking)
    costs = []
    for step in range(1, 301):
        recorder.metric("a", Sum(torch.tensor(1.0)))
        began = time.perf_counter()
        recorder.flush(step, StepClock())
        costs.append(time.perf_counter() - began)
    assert sorted(costs)[150] < 0.001
    blocking.gate.set()
    drained(recorder)
    assert blocking.scalars("a") == dict.fromkeys(range(1, 301), 1.0)
    assert list(blocking.scalars("a")) == list(range(1, 301))


def test_a_full_queue_costs_media_first_and_numbers_last(telemetry_log: pytest.LogCaptureFixture) -> None:
    """Texts of 10,000 bytes a step while a backend blocks, 25,000 bytes of room."""
    blocking = Blocking()
    recorder = opened(blocking, max_queue_bytes=25_000)
    for step in range(1, 9):
        recorder.metric("a", Sum(torch.tensor(float(step))))
        recorder.record(Alert("text", "", "x" * 10_000))
        recorder.flush(step)
        assert blocking.stuck.wait(WRITTEN_SECONDS)
    assert recorder._home.drain(WRITTEN_SECONDS)  # all steps are at the backend's door
    blocking.gate.set()
    drained(recorder)
    assert blocking.scalars("a") == {step: float(step) for step in range(1, 9)}
    assert [step for step, _ in blocking.records["text"]] == [1, 7, 8]
    assert recorder.dropped_records == 5
    messages = [record.getMessage() for record in telemetry_log.records]
    assert messages == ["telemetry had to drop records; telemetry/dropped_records counts them"]
    assert blocking.scalars("telemetry/dropped_records")[8] > 0
    assert blocking.scalars("telemetry/queue_depth")[8] == 6


def test_every_step_says_what_telemetry_took_of_it() -> None:
    backend = MemoryBackend()
    recorder = opened(backend)
    clock = StepClock()
    with clock.running():
        time.sleep(0.05)
    time.sleep(0.05)
    recorder.metric("a", Sum(1))
    recorder.flush(1, clock)
    drained(recorder)
    seconds = backend.scalars("telemetry/step_seconds")[1]
    assert 0.05 <= seconds < clock.step_seconds()
    assert 0 < backend.scalars("telemetry/overhead_fraction")[1] < 1
    assert backend.scalars("telemetry/dropped_records") == {1: 0.0}


def test_a_step_that_waits_keeps_no_tensor_of_the_device() -> None:
    blocking = Blocking("write")
    recorder = opened(blocking)
    recorder.write(1, [Scalar("a/b", 1.0)])
    measured, shown_tensor = torch.ones(3), torch.ones(4)
    held = [weakref.ref(measured), weakref.ref(shown_tensor)]
    seen: list[Tensor] = []
    recorder.metric("a/used", UsedFraction(measured))
    recorder.show({"x": shown_tensor}, lambda host, emit: seen.append(host["x"]))
    recorder.flush(2)
    del measured, shown_tensor
    gc.collect()
    assert [reference() for reference in held] == [None, None]
    blocking.gate.set()
    drained(recorder)
    assert torch.equal(seen[0], torch.ones(4))
    assert blocking.scalars("a/used") == {2: 1.0}


def test_what_is_absent_is_shown_with_its_reason_whenever_there_is_more_of_it() -> None:
    memory = MemoryBackend()
    recorder = Recorder([memory])
    for step, tag in ((1, "a/b"), (2, "a/b"), (3, "c/d")):
        recorder.metric("inputs/invalid_ids", Sum(0.0))
        recorder.absent(tag, f"no {tag}")
        recorder.flush(step)
        recorder.drain()
    recorder.close()
    shown = [(step, record.rows) for step, record in memory.records["telemetry/absent"] if isinstance(record, Table)]
    assert shown == [(1, (("a/b", "no a/b"),)), (3, (("a/b", "no a/b"), ("c/d", "no c/d")))]
