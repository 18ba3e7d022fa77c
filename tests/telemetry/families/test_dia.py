"""Dia on the real Trainer: every codebook, against codes and logits that are gone through one by one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from support.speech_models import DELAY, DIA_END, IGNORED, Batch, Tokens, dia, dia_batch, of_step, shown, train
from support.steps import Snapshots

from telemetry import StrategicTelemetry
from telemetry.backends.memory import MemoryBackend

STEPS, ACCUMULATION = 4, 2


def batches() -> list[Batch]:
    """Text padded on the right and audio on the left, as the model's processor does; with and without a prompt."""
    return [
        dia_batch((4, 2, 3), (6, 0, 4)),
        dia_batch((3, 0, 6), (5, 3, 2), (2, 1, 1), seed=3),
        dia_batch((4, 0, 2), seed=9),
    ]


def expected(model: Any, microbatches: Sequence[Batch]) -> dict[str, float]:
    tokens = Tokens()
    for batch in microbatches:
        with torch.no_grad():
            logits = model(**batch).logits.double()
        for row, labels in enumerate(batch["labels"].tolist()):  # rows: codebooks of the first sample, of the second
            for at, code in enumerate(labels):
                if code != IGNORED:
                    tokens.add(row % len(DELAY), logits[row, at].tolist(), code, code == DIA_END)
    return tokens.values(DIA_END) | {"outputs/loss/total": tokens.mean_loss()}


def test_every_stream_is_right_and_training_is_left_alone(
    tmp_path: Path, telemetry_log: pytest.LogCaptureFixture
) -> None:
    model, untouched, data = dia(), dia(), batches()
    backend, snapshots = MemoryBackend(), Snapshots()
    train(model, data, tmp_path, [snapshots, StrategicTelemetry(logging_steps=1, backends=[backend])])
    total = backend.scalars("outputs/loss/total")
    assert list(total) == [1, 2, 3, 4]
    assert total == pytest.approx(backend.scalars("outputs/loss/model"), rel=1e-5)
    for step in range(1, STEPS + 1):
        values = expected(snapshots.models[step].eval(), of_step(data, step, ACCUMULATION))
        assert shown(backend, step, values) == pytest.approx(values, rel=1e-5), step
    assert [record.getMessage() for record in telemetry_log.records if record.levelname == "ERROR"] == []
    assert "divides the loss" not in telemetry_log.text  # by what it is the mean over

    train(untouched, data, tmp_path)
    after = untouched.state_dict()
    assert [name for name, one in model.state_dict().items() if not torch.equal(one, after[name])] == []
