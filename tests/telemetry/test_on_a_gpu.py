"""Where a GPU is at hand: telemetry never waits for it on the training thread, and measures what it does on a CPU."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from transformers import HiggsAudioV2ForConditionalGeneration

from telemetry import StrategicTelemetry
from telemetry.backends.memory import MemoryBackend
from telemetry.clock import StepClock
from telemetry.delivery.recorder import Recorder
from tests.benchmarks import step_time

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@contextlib.contextmanager
def waiting(mode: str) -> Iterator[None]:
    """``mode``: "error" where nothing may wait for the device, "default" where something may."""
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode(mode)
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


@pytest.fixture
def _model_may_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own forward pass indexes by masks, as in training."""
    forward = HiggsAudioV2ForConditionalGeneration.forward

    @functools.wraps(forward)
    def patient(model: Any, *args: Any, **kwargs: Any) -> Any:
        with waiting("default"):
            return forward(model, *args, **kwargs)

    monkeypatch.setattr(HiggsAudioV2ForConditionalGeneration, "forward", patient)


@pytest.mark.usefixtures("_model_may_wait")
def test_nothing_on_the_training_thread_waits_for_the_device(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Any, caplog: pytest.LogCaptureFixture
) -> None:
    running, flush = StepClock.running, Recorder.flush

    @contextlib.contextmanager
    def watched_running(clock: StepClock) -> Iterator[None]:
        with running(clock), waiting("error"):
            yield

    def watched_flush(recorder: Recorder, step: int, clock: StepClock | None = None) -> None:
        with waiting("error"):
            flush(recorder, step, clock)

    monkeypatch.setattr(StepClock, "running", watched_running)
    monkeypatch.setattr(Recorder, "flush", watched_flush)
    backend = MemoryBackend()
    callback = StrategicTelemetry(logging_steps=1, backends=[backend])
    step_time.train(step_time.make_model(), step_time.SyntheticSpeech(8), [callback], 3, str(tmp_path))
    assert "failed" not in caplog.text
    assert sorted(backend.scalars("outputs/loss/total")) == [1, 2, 3]
    assert sorted(backend.scalars("gradients/total_norm")) == [1, 2, 3]
    assert sorted(backend.scalars("zero_shot/conditioning/gain")) == [1]
