"""``gradients/total_norm`` is the ``grad_norm`` that the Trainer logs, in bfloat16 too, clipped or not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support.batches import Sample, Voices
from support.steps import make_trainer

from telemetry import SharedAttentionLoggerCallback
from telemetry.backends.memory import MemoryBackend

STEPS = 2
ALWAYS, NEVER = 0.5, 1e6


@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize("max_grad_norm", [ALWAYS, NEVER])
@pytest.mark.parametrize("precision", ["autocast", "weights"])
def test_equals_the_trainers(
    higgs: Any, voices: Voices, tmp_path: Path, precision: str, max_grad_norm: float, accumulation: int
) -> None:
    backend = MemoryBackend()
    callback = SharedAttentionLoggerCallback(1, [backend])

    def collate(samples: list[Sample]) -> dict[str, Any]:
        return voices.batch(voices.pad(samples))

    make_trainer(
        higgs.to(torch.bfloat16) if precision == "weights" else higgs,
        [voices.conversation(seed=i, target=2 + i) for i in range(8)],
        collate,
        tmp_path,
        [callback],
        max_steps=STEPS,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=accumulation,
        max_grad_norm=max_grad_norm,
        bf16=precision == "autocast",
    ).train()
    logged = backend.scalars("train/grad_norm")
    measured = backend.scalars("gradients/total_norm")
    assert list(measured) == [1, 2]
    for step, value in measured.items():
        assert ALWAYS < logged[step] < NEVER
        # The Trainer's own norm of bfloat16 gradients is itself a bfloat16, of three digits.
        assert value == pytest.approx(logged[step], rel=1e-4 if precision == "autocast" else 1e-2)
