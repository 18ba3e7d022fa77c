"""Moshi on the real Trainer: text and every codebook, against tokens and logits that are gone through one by one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from support.speech_models import CODEBOOKS, CODES, Batch, Tokens, moshi, moshi_batch, of_step, shown, train
from support.steps import Snapshots

from telemetry import StrategicTelemetry
from telemetry.backends.memory import MemoryBackend

STEPS, ACCUMULATION = 4, 2


def batches() -> list[Batch]:
    """Unequal lengths: the model takes no mask of padding together with labels of audio."""
    return [moshi_batch(5, 3), moshi_batch(2, 6, 4, seed=40), moshi_batch(3, 3, left=True, seed=80)]


def expected(model: Any, microbatches: Sequence[Batch]) -> dict[str, float]:
    tokens, losses = Tokens(), []
    for batch in microbatches:
        with torch.no_grad():
            outputs = model(**batch)
        one = Tokens()
        text, audio = outputs.logits.double(), outputs.audio_logits.double()
        length = batch["input_ids"].shape[1]
        for row, labels in enumerate(batch["text_labels"].tolist()):
            for at in range(1, length):
                one.add("text", text[row, at - 1].tolist(), labels[at])
            for at in range(length):
                for k in range(CODEBOOKS):
                    earlier = at - (k > 0)  # all codebooks but the first are said one position later
                    code = int(batch["audio_labels"][row, k, earlier]) if earlier >= 0 else CODES
                    if code != CODES:
                        one.add(k, audio[row * length + at, k].tolist(), code)
        losses.append(one.mean_loss("text") + one.mean_loss())
        tokens.extend(one)
    return tokens.values() | {"outputs/loss/total": sum(losses) / len(losses)}


def test_every_stream_is_right_and_training_is_left_alone(
    tmp_path: Path, telemetry_log: pytest.LogCaptureFixture
) -> None:
    model, untouched, data = moshi(), moshi(), batches()
    backend, snapshots = MemoryBackend(), Snapshots()
    train(model, data, tmp_path, [snapshots, StrategicTelemetry(logging_steps=1, backends=[backend])])
    total = backend.scalars("outputs/loss/total")
    assert list(total) == [1, 2, 3, 4]
    assert total == pytest.approx(backend.scalars("outputs/loss/model"), rel=1e-5)
    for step in range(1, STEPS + 1):
        values = expected(snapshots.models[step].eval(), of_step(data, step, ACCUMULATION))
        assert shown(backend, step, values) == pytest.approx(values, rel=1e-5), step
    assert [record.getMessage() for record in telemetry_log.records if record.levelname == "ERROR"] == []

    train(untouched, data, tmp_path)
    after = untouched.state_dict()
    assert [name for name, one in model.state_dict().items() if not torch.equal(one, after[name])] == []
