"""Where a GPU is at hand: telemetry never waits for it on the training thread, and measures what it does on a CPU."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from transformers import HiggsAudioV2ForConditionalGeneration

from telemetry import StrategicTelemetry
from telemetry.backends.memory import MemoryBackend
from telemetry.clock import StepClock
from telemetry.delivery.recorder import Recorder
from telemetry.measures import fused_gradients
from telemetry.measures.gradients import device_rows, gradient_statistics
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_the_fused_sweep_equals_the_plain_one_and_waits_for_nothing(dtype: torch.dtype) -> None:
    pytest.importorskip("triton")
    whole = torch.randn(1_000_000, generator=torch.Generator("cuda").manual_seed(0), device="cuda").to(dtype)
    broken = whole.clone()
    broken[1], broken[70_000] = -math.inf, math.inf
    nan = broken.clone()
    nan[131_072] = math.nan
    ends = (0, 1, 7, 2048, 65_535, 65_536, 65_537, 999_999)
    tensors = [whole[start : start + size] for start in (0, 1, 3) for size in ends]
    tensors += [torch.zeros_like(whole), broken, broken[5:], nan, whole[: 1000 * 64].view(1000, 64).t()]
    tensors.append((torch.tensor([torch.finfo(dtype).tiny, 0, -0.0], dtype=torch.float64) / 2).to("cuda", dtype))
    assert all(map(fused_gradients.takes, tensors))
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side), waiting("error"):
        for tensor in (whole, broken, nan):
            tensor.mul_(0.5)  # what the sweep must come after, on its stream
        rows = fused_gradients.fused_rows(tensors)
        again, none = fused_gradients.fused_rows(tensors), fused_gradients.fused_rows([whole[:0]])
        plain, routed = device_rows(tensors), gradient_statistics(tensors)
    torch.cuda.current_stream().wait_stream(side)
    torch.testing.assert_close(rows[:, 0], plain[:, 0], rtol=2e-6, atol=0, equal_nan=True)  # norms to 1e-6
    torch.testing.assert_close(rows[:, 1:], plain[:, 1:], rtol=0, atol=0, equal_nan=True)
    assert none.tolist() == [[0, 0, 0, 0]]
    for same in (again, routed):
        assert torch.equal(rows.view(torch.int64), same.view(torch.int64)), "not the same bits"
