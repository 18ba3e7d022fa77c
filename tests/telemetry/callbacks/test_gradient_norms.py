"""``gradients/`` of accumulated Higgs steps against sums of squares in Python loops."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.batches import Voices
from support.references import HIGGS_GROUPS, assert_same, gradient_values, scalars_at, update_values
from support.steps import Steps, measure

from telemetry.backends.memory import MemoryBackend
from telemetry.callbacks.questions import SharedAttentionLoggerCallback
from telemetry.instruments.gradients import NONE_KEPT
from telemetry.records import Record, Scalar
from trainer.loss import AccumulatedLoss, supervised_counts
from trainer.model import add_lora, freeze_llm


def batches(voices: Voices) -> list[dict[str, torch.Tensor]]:
    return [
        voices.batch(voices.pad([voices.conversation(seed=1), voices.conversation(target=9, seed=2)])),
        voices.batch([voices.conversation(reference=None, target=1, seed=3)]),
    ]


def reference(model: Any, inputs: list[dict[str, torch.Tensor]]) -> dict[str, float]:
    """Norms of the gradients that the same step leaves in a copy."""
    other = copy.deepcopy(model)
    other.loss_function = AccumulatedLoss(other.config)
    counts = supervised_counts(inputs, other.config.num_codebooks)
    for batch in inputs:
        other(**batch, num_items_in_batch=counts).loss.backward()
    return gradient_values(other, HIGGS_GROUPS)


def gradient_records(backend: MemoryBackend) -> list[Record]:
    return [record for tag in backend.tags() if tag.startswith("gradients/") for _, record in backend.records[tag]]


def test_every_group_of_an_accumulated_step(higgs: Any, voices: Voices, tmp_path: Path) -> None:
    inputs = batches(voices)
    expected = reference(higgs, inputs)
    backend = measure(SharedAttentionLoggerCallback, higgs, tmp_path, inputs)
    assert_same(scalars_at(backend, 1, "gradients"), expected)
    groups, parts = set(HIGGS_GROUPS.values()), ("shared_attention", "text_ffn", "audio_ffn")
    assert set(expected) == {
        "gradients/total_norm",
        *(f"gradients/{group}/{kind}" for group in groups for kind in ("norm", "zero_fraction", "nonfinite")),
        *(f"gradients/layer_{layer}/{part}/norm" for layer in range(2) for part in parts),
    }


def test_the_total_is_what_clipping_measures(higgs: Any, voices: Voices, tmp_path: Path) -> None:
    backend = measure(SharedAttentionLoggerCallback, higgs, tmp_path, batches(voices))
    norm = torch.nn.utils.clip_grad_norm_(higgs.parameters(), 1e9).item()
    assert backend.scalars("gradients/total_norm") == {1: pytest.approx(norm, rel=1e-6)}


def test_groups_without_gradients_are_absent(higgs: Any, voices: Voices, tmp_path: Path) -> None:
    freeze_llm(higgs)
    expected = reference(higgs, batches(voices))
    measured = scalars_at(measure(SharedAttentionLoggerCallback, higgs, tmp_path, batches(voices)), 1, "gradients")
    assert_same(measured, expected)
    assert {tag for tag in measured if "layer" not in tag and tag.endswith("norm")} == {
        f"gradients/{name}"
        for name in ("total_norm", "audio_embedding/norm", "audio_ffn/norm", "audio_head/norm", "norms/norm")
    }
    assert "gradients/layer_1/audio_ffn/norm" in measured
    assert "gradients/layer_1/text_ffn/norm" not in measured


def test_of_a_lora_model_only_the_adapters_have_norms(higgs: Any, voices: Voices, tmp_path: Path) -> None:
    model = add_lora(higgs, rank=2, alpha=4, dropout=0.0)
    higgs.loss_function = AccumulatedLoss(higgs.config)
    backend = MemoryBackend()
    callback = SharedAttentionLoggerCallback(1, [backend])
    with Steps(model, [callback], tmp_path) as run:
        run.step(batches(voices))
    values = [
        value
        for name, parameter in model.named_parameters()
        if ".lora_" in name and parameter.grad is not None
        for value in parameter.grad.double().flatten().tolist()
    ]
    norm = sum(value * value for value in values) ** 0.5
    assert norm > 0
    assert_same(
        scalars_at(backend, 1, "gradients"),
        {
            "gradients/lora/norm": norm,
            "gradients/total_norm": norm,
            "gradients/lora/zero_fraction": values.count(0) / len(values),
            "gradients/lora/nonfinite": 0.0,
        },
    )


def test_a_step_without_gradients_is_said_once(
    higgs: Any, tmp_path: Path, telemetry_log: pytest.LogCaptureFixture
) -> None:
    backend = MemoryBackend()
    with Steps(higgs, [SharedAttentionLoggerCallback(1, [backend])], tmp_path) as run:
        for _ in range(2):
            with run.taken():
                run.tell("on_gradients")
    assert gradient_records(backend) == []
    said = [record.getMessage() for record in telemetry_log.records]
    assert said.count(f"no gradients/total_norm: {NONE_KEPT}") == 1


def test_gradients_are_measured_once_and_before_clipping_where_a_trainer_offers_them(
    higgs: Any, voices: Voices, tmp_path: Path
) -> None:
    """The run offers them twice, before and after clipping, as HiggsAudioTrainer does."""
    backend = measure(SharedAttentionLoggerCallback, higgs, tmp_path, batches(voices))
    records = gradient_records(backend)
    assert len(records) == len({record.tag for record in records}) > 1
    assert {record.note for record in records if isinstance(record, Scalar)} == {""}


def test_a_broken_gradient_shows(higgs: Any, voices: Voices, tmp_path: Path) -> None:
    handle = higgs.audio_lm_head.weight.register_hook(lambda gradient: gradient * float("nan"))
    backend = measure(SharedAttentionLoggerCallback, higgs, tmp_path, batches(voices))
    handle.remove()
    values = scalars_at(backend, 1, "gradients")
    broken = {tag for tag, value in values.items() if value != value}
    assert broken == {"gradients/total_norm", "gradients/audio_head/norm"}
    counts = {tag: value for tag, value in values.items() if tag.endswith("/nonfinite") and value}
    assert counts == {"gradients/audio_head/nonfinite": higgs.audio_lm_head.weight.numel()}


class Scaled:
    """An optimizer as accelerate wraps it for float16: with the scaler that has scaled the loss."""

    def __init__(self, optimizer: torch.optim.Optimizer, scale: float) -> None:
        self._optimizer = optimizer
        self.scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        self.scaler.scale(torch.zeros(()))  # makes the scale a tensor

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return self._optimizer.param_groups

    def step(self) -> None:
        self.scaler.step(self._optimizer)
        self.scaler.update()


@pytest.mark.parametrize("overflow", [False, True])
def test_gradients_of_a_scaled_loss_come_in_its_own_size(
    higgs: Any, voices: Voices, tmp_path: Path, overflow: bool
) -> None:
    """A power of two scales exactly; a step that the scaler skips for an overflow moves nothing."""
    expected = reference(higgs, batches(voices))
    scale = 1024.0
    for parameter in higgs.parameters():
        parameter.register_hook(lambda gradient: gradient * scale)
    if overflow:
        higgs.audio_lm_head.weight.register_hook(lambda gradient: gradient + math.inf)
    backend = MemoryBackend()
    optimizer = Scaled(torch.optim.SGD(higgs.parameters(), lr=0.1), scale)
    with Steps(higgs, [SharedAttentionLoggerCallback(1, [backend])], tmp_path, optimizer=optimizer) as run:
        run.step(batches(voices))
    values = scalars_at(backend, 1, "gradients")
    updates = {tag: value for tag, value in values.items() if tag.endswith("/update_ratio")}
    assert len(updates) == len(set(HIGGS_GROUPS.values()))
    assert all((value == 0) == overflow for value in updates.values())
    if overflow:
        assert values["gradients/audio_head/norm"] == math.inf
        assert values["gradients/text_head/norm"] == pytest.approx(expected["gradients/text_head/norm"], rel=1e-5)
    else:
        assert_same({tag: value for tag, value in values.items() if tag not in updates}, expected)


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW, torch.optim.Adagrad])
def test_the_update_ratio_is_of_the_step_that_the_optimizer_took(
    higgs: Any, voices: Voices, tmp_path: Path, optimizer: Callable[..., torch.optim.Optimizer]
) -> None:
    backend = MemoryBackend()
    made = optimizer([parameter for parameter in higgs.parameters() if parameter.requires_grad], lr=0.03)
    with Steps(higgs, [SharedAttentionLoggerCallback(1, [backend])], tmp_path, optimizer=made) as run:
        for step in (1, 2):
            before = copy.deepcopy(higgs)
            run.step(batches(voices))
            expected = update_values(before, higgs, HIGGS_GROUPS)
            assert run.callbacks[0].session.recorder.drain()
            values = scalars_at(backend, step, "gradients")
            assert_same({tag: value for tag, value in values.items() if tag.endswith("/update_ratio")}, expected)
    assert min(expected.values()) > 0
