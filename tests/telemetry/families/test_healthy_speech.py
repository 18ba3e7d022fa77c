"""Healthy trainings of speech models that are no voice cloning: no rule finds fault with what is meant."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.speech_models import Batch, csm, csm_waveforms, dia, dia_batch, moshi, moshi_batch, taught, train

from telemetry import StrategicTelemetry
from telemetry.backends.memory import MemoryBackend
from telemetry.health import RULES
from telemetry.records import Table

TRAININGS: dict[str, tuple[Callable[[], Any], Callable[[int], Batch]]] = {
    "csm, one turn": (csm, lambda seed: csm_waveforms([(3 + seed, 4, taught(4))], [(5, 2 + seed, taught(2 + seed))])),
    "csm, turns": (
        csm,
        lambda seed: csm_waveforms(
            [(3 + seed, 4, taught(4)), (2, 3, taught(3))], [(5, 2, taught(2)), (2, 5, taught(5))]
        ),
    ),
    "dia": (dia, lambda seed: dia_batch((4 + seed, 0, 3), (6, 0, 4), seed=seed)),
    "dia, some with prompts": (dia, lambda seed: dia_batch((4 + seed, 2, 3), (6, 0, 4), seed=seed)),
    "moshi": (moshi, lambda seed: moshi_batch(5 + seed, 4, seed=seed)),
}


@pytest.mark.parametrize("kind", TRAININGS)
def test_no_rule_finds_fault(kind: str, tmp_path: Path) -> None:
    make, batch = TRAININGS[kind]
    backend = MemoryBackend()
    telemetry = StrategicTelemetry(logging_steps=4, backends=[backend])
    train(make(), [batch(seed) for seed in range(3)], tmp_path, [telemetry], 12, 1, learning_rate=3e-3)
    levels = {rule.tag: backend.scalars(rule.tag) for rule in RULES}
    assert any(levels.values())
    assert {tag: values for tag, values in levels.items() if any(values.values())} == {}
    rows = backend.last("health/checks", Table).rows if "health/checks" in backend.records else ()
    assert [row for row in rows if row[1] in ("warning", "failing")] == []
