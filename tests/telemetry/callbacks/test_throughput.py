"""What steps take, between due steps too: on the real Trainer, whose clock goes on where the test says it does."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.text_training import Collator, training
from support.trl_training import llama
from torch import nn
from transformers import Trainer, TrainerCallback

from telemetry import StrategicTelemetry
from telemetry.backends.memory import MemoryBackend
from telemetry.callbacks import prepared
from telemetry.delivery.measured import Measured
from telemetry.instruments import throughput
from telemetry.instruments.by_rank import Extremes
from telemetry.loop import Telemetry
from telemetry.probes import pace
from telemetry.records import Rate

PEAK = 1e6
LOADING, PASS, UPDATE, EVALUATION = 2.0, 1.0, 0.5, 100.0
STEP = 2 * LOADING + 2 * PASS + UPDATE


def is_multiplied(name: str) -> bool:
    return "proj" in name or "lm_head" in name


class Clock:
    """Seconds that go on when somebody says so."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1.0
        for module in (pace, prepared):
            monkeypatch.setattr(module, "perf_counter", lambda: self.now)


class Slow(Trainer):
    """Its passes take a second, as does what it knows of a sample's sound: it keeps that from the model."""

    clock: Clock

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        self.clock.now += PASS
        inputs.pop("metadata")
        return super().training_step(model, inputs, num_items_in_batch)


class Between(TrainerCallback):
    def __init__(self, clock: Clock) -> None:
        self.clock = clock

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.clock.now += UPDATE

    def on_log(self, *_: Any, **__: Any) -> None:
        self.clock.now += EVALUATION


def test_means_of_all_steps_since_the_last_due_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock, backend, tokens = Clock(monkeypatch), MemoryBackend(), []
    make = Collator.__call__

    def collate(self: Collator, rows: Any) -> Any:
        clock.now += LOADING
        batch = make(self, rows)
        tokens.append(len(rows) * max(len(row["input_ids"]) for row in rows))
        return {**batch, "metadata": [{"target": [SimpleNamespace(seconds=float(n))]} for n in range(len(rows))]}

    monkeypatch.setattr(Collator, "__call__", collate)
    monkeypatch.setattr(Slow, "clock", clock, raising=False)
    monkeypatch.setattr(throughput, "peak_operations", lambda *_: PEAK)
    callbacks = [Between(clock), StrategicTelemetry(["inputs"], 3, [backend])]
    run = training(llama(0.0), tmp_path, callbacks, 6, 2, Slow, logging_strategy="steps", logging_steps=1)
    run.trainer.train()
    # Steps 2, and 3 to 5: the first warms up, and a due step has not ended when it looks.
    steps = {3: [2], 6: [3, 4, 5]}
    of_step = {step: sum(tokens[2 * step - 2 : 2 * step]) for step in range(1, 7)}
    expected = {
        "seconds_per_step": dict.fromkeys(steps, STEP),
        "loader_fraction": dict.fromkeys(steps, 2 * LOADING / STEP),
        "tokens_per_second": {due: sum(of_step[n] for n in those) / len(those) / STEP for due, those in steps.items()},
        "audio_seconds_per_second": dict.fromkeys(steps, 2 * (0 + 1) / STEP),
    }
    operations = 6 * sum(one.numel() for name, one in run.trainer.model.named_parameters() if is_multiplied(name))
    flops = {due: operations * rate for due, rate in expected["tokens_per_second"].items()}
    expected |= {"model_flops_per_second": flops}
    expected |= {"model_flops_utilization": {due: rate / PEAK for due, rate in flops.items()}}
    for name, values in expected.items():
        assert backend.scalars(f"throughput/{name}") == pytest.approx(values), name
    resident = psutil.Process().memory_info().rss
    assert all(resident / 4 < held < 4 * resident for held in backend.scalars("throughput/memory_bytes").values())
    assert not {"get_batch_samples", "_maybe_log_save_evaluate"} & set(vars(run.trainer))


def test_a_loop_of_ones_own_is_timed_and_what_it_does_not_show_is_absent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock, backend, model = Clock(monkeypatch), MemoryBackend(), nn.Linear(2, 1)
    with Telemetry(model, tmp_path, logging_steps=4, backends=[backend], components=["inputs"]) as telemetry:
        for number in range(1, 5):
            clock.now += EVALUATION
            with telemetry.step():
                clock.now += number
                model(torch.ones(1, 2)).sum().backward()
    assert backend.scalars("throughput/seconds_per_step") == {4: pytest.approx((2 + 3) / 2)}
    tags = {"throughput/loader_fraction", "throughput/tokens_per_second", "throughput/audio_seconds_per_second"}
    assert not tags & set(backend.tags())
    (_, absent), *_ = backend.records["telemetry/absent"][-1:]
    assert tags <= {row[0] for row in absent.rows}  # type: ignore[union-attr]


@given(st.lists(st.floats(allow_nan=False, allow_infinity=False, allow_subnormal=False), min_size=1, max_size=9))
def test_the_extreme_ranks_are_named(numbers: list[float]) -> None:
    step, shown = Measured(), Extremes("a/number", "most", "least")
    for rank, number in enumerate(numbers):
        shown.add(rank, step, number)
    shown.show({}, step)
    found = {tag: (metric.result(), step.notes[tag]) for tag, metric in step.metrics.items() if metric.shown}
    if len(numbers) == 1:
        assert not found
        return
    for tag, wanted in (("a/most/number", max(numbers)), ("a/least/number", min(numbers))):
        value, named = found[tag]
        assert value == pytest.approx(wanted, rel=1e-9)
        assert numbers[int(named.removeprefix("rank "))] == pytest.approx(wanted, rel=1e-9)


def test_all_ranks_tokens_count_over_the_seconds_of_the_slowest() -> None:
    assert Rate(100.0, 2.0).merge(Rate(60.0, 4.0)).result() == 40.0


def test_a_stream_that_ends_begins_no_step() -> None:
    watched = pace.Pace()
    for batches in ([{}], [{}], [], [{}]):
        watched.load(1.0, batches, "input_ids")
        watched.end()
    assert len(watched.each()) == watched.take().count == 2


def test_operations_are_counted_anew_where_others_are_trained(tmp_path: Path) -> None:
    class Freezing(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            model.lm_head.requires_grad_(state.global_step != 3)

    backend = MemoryBackend()
    run = training(llama(0.0), tmp_path, [StrategicTelemetry(["inputs"], 1, [backend]), Freezing()], 5)
    run.trainer.train()
    assert list(backend.scalars("throughput/model_flops_per_second")) == [3, 5]


def test_no_model_is_held_after_its_training(tmp_path: Path) -> None:
    run = training(llama(0.0), tmp_path, [StrategicTelemetry(["inputs"], 1, [MemoryBackend()])], 3)
    run.trainer.train()
    model = weakref.ref(run.trainer.model)
    del run
    gc.collect()
    assert model() is None


@pytest.mark.parametrize(
    ("ids", "positions"),
    [
        (torch.ones(2, 5, dtype=torch.long), 10),
        (torch.ones(2, 5, 9, dtype=torch.long), 10),  # codebooks
        (torch.ones(7, dtype=torch.long), 7),  # packed
        (torch.ones(2, 5, 80), None),  # features
        (None, None),
        ([[1, 2]], None),
    ],
)
def test_what_a_batch_is_counted_by(ids: Any, positions: int | None) -> None:
    watched = pace.Pace()
    for _ in range(2):
        watched.load(1.0, [{"input_ids": ids}], "input_ids")
        watched.end()
    assert watched.take().tokens == positions
