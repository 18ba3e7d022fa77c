"""``gradients/`` of accumulated Higgs steps against sums of squares in Python loops."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from slow_references import HIGGS_GROUPS, assert_same, gradient_values, measured_records, scalars_at
from step_runs import StepRun, measure
from voice_batches import Voices

from telemetry.backends.memory import MemoryBackend
from telemetry.callbacks.shared_attention import SharedAttentionLoggerCallback
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


def test_every_group_of_an_accumulated_step(higgs: Any, voices: Voices, tmp_path: Path) -> None:
    inputs = batches(voices)
    expected = reference(higgs, inputs)
    backend = measure(SharedAttentionLoggerCallback, higgs, tmp_path, inputs)
    assert_same(scalars_at(backend, 1, "gradients"), expected)
    assert len(expected) == 1 + len(set(HIGGS_GROUPS.values()))


def test_the_total_is_what_clipping_measures(higgs: Any, voices: Voices, tmp_path: Path) -> None:
    backend = measure(SharedAttentionLoggerCallback, higgs, tmp_path, batches(voices))
    norm = torch.nn.utils.clip_grad_norm_(higgs.parameters(), 1e9).item()
    assert backend.scalars("gradients/total_norm") == {1: pytest.approx(norm, rel=1e-6)}


def test_groups_without_gradients_are_absent(higgs: Any, voices: Voices, tmp_path: Path) -> None:
    freeze_llm(higgs)
    expected = reference(higgs, batches(voices))
    measured = scalars_at(measure(SharedAttentionLoggerCallback, higgs, tmp_path, batches(voices)), 1, "gradients")
    assert_same(measured, expected)
    assert set(measured) == {
        f"gradients/{name}"
        for name in ("total_norm", "audio_embedding/norm", "audio_ffn/norm", "audio_head/norm", "norms/norm")
    }


def test_of_a_lora_model_only_the_adapters_have_norms(higgs: Any, voices: Voices, tmp_path: Path) -> None:
    model = add_lora(higgs, rank=2, alpha=4, dropout=0.0)
    higgs.loss_function = AccumulatedLoss(higgs.config)
    backend = MemoryBackend()
    callback = SharedAttentionLoggerCallback(1, [backend])
    run = StepRun(model, [callback], tmp_path)
    run.step(batches(voices))
    run.end()
    squares = sum(
        value * value
        for name, parameter in model.named_parameters()
        if ".lora_" in name and parameter.grad is not None
        for value in parameter.grad.double().flatten().tolist()
    )
    assert squares > 0
    assert_same(
        scalars_at(backend, 1, "gradients"),
        {"gradients/lora/norm": squares**0.5, "gradients/total_norm": squares**0.5},
    )


def test_a_step_without_gradients_is_said_once(
    higgs: Any, tmp_path: Path, telemetry_log: pytest.LogCaptureFixture
) -> None:
    backend = MemoryBackend()
    run = StepRun(higgs, [SharedAttentionLoggerCallback(1, [backend])], tmp_path)
    for _ in range(2):
        run._tell("on_step_begin")
        run._tell("on_gradients", model=higgs)
        run.state.global_step += 1
        run._tell("on_step_end")
    run.end()
    assert measured_records(backend) == {}
    said = [record.getMessage() for record in telemetry_log.records]
    assert said.count("no gradients/total_norm: no parameter has a gradient") == 1


def test_gradients_are_measured_once_and_before_clipping_where_a_trainer_offers_them(
    higgs: Any, voices: Voices, tmp_path: Path
) -> None:
    """The run offers them twice, before and after clipping, as HiggsAudioTrainer does."""
    backend = measure(SharedAttentionLoggerCallback, higgs, tmp_path, batches(voices))
    shown = measured_records(backend)
    records = [record for found in shown.values() for _, record in found]
    assert len(records) == len(shown)
    assert [record.note for record in records] == [""] * len(records)  # type: ignore[union-attr]


def test_a_broken_gradient_shows(higgs: Any, voices: Voices, tmp_path: Path) -> None:
    handle = higgs.audio_lm_head.weight.register_hook(lambda gradient: gradient * float("nan"))
    backend = measure(SharedAttentionLoggerCallback, higgs, tmp_path, batches(voices))
    handle.remove()
    values = scalars_at(backend, 1, "gradients")
    broken = {tag for tag, value in values.items() if value != value}
    assert broken == {"gradients/total_norm", "gradients/audio_head/norm"}
