"""Many classes of models on the real Trainer: each loss against tokens that are gone through one by one."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from support.model_zoo import KINDS, batches
from support.speech_models import Tokens, of_step, shown, train
from support.steps import Snapshots

from telemetry import StrategicTelemetry
from telemetry.backends.memory import MemoryBackend
from telemetry.records import Table

STEPS, ACCUMULATION = 4, 2


@pytest.mark.parametrize("name", KINDS)
def test_what_is_shown_is_right_and_training_is_left_alone(
    name: str, tmp_path: Path, telemetry_log: pytest.LogCaptureFixture
) -> None:
    kind = KINDS[name]
    model, untouched, data = kind.make(), kind.make(), batches(kind)
    backend, snapshots = MemoryBackend(), Snapshots()
    torch.manual_seed(0)
    train(model, data, tmp_path, [snapshots, StrategicTelemetry(logging_steps=1, backends=[backend])])
    assert [record.getMessage() for record in telemetry_log.records if record.levelname == "ERROR"] == []
    loss, total = backend.scalars("outputs/loss/model"), backend.scalars("outputs/loss/total")
    assert list(loss) == [1, 2, 3, 4]
    if kind.read is None:
        said = {str(tag): str(why) for tag, why in backend.last("telemetry/absent", Table).rows}
        assert total == {}
        assert kind.absent in said["outputs/loss/total"]
    else:
        assert total == pytest.approx(loss, rel=1e-5)
        for step in range(1, STEPS + 1):
            values = expected(kind.read, snapshots.models[step].eval(), of_step(data, step, ACCUMULATION))
            assert shown(backend, step, values) == pytest.approx(values, rel=1e-5), step
    wanted = {*kind.shown, "gradients/total_norm", "inputs/tensor/labels/mean", "train/loss"}
    assert wanted - set(backend.tags()) == set()

    torch.manual_seed(0)
    train(untouched, data, tmp_path)
    after = untouched.state_dict()
    assert [name for name, one in model.state_dict().items() if not torch.equal(one, after[name])] == []


def expected(read: Any, model: Any, microbatches: Any) -> dict[str, float]:
    tokens = Tokens()
    for batch in microbatches:
        for stream, logits, label in read(model, batch):
            tokens.add(stream, logits, label)
    values = tokens.values() if any(isinstance(stream, int) for stream in tokens.streams) else _of_text(tokens)
    return {tag: value for tag, value in values.items() if math.isfinite(value)}


def _of_text(tokens: Tokens) -> dict[str, float]:
    """Of text alone: :meth:`Tokens.values` has audio too."""
    found = Tokens()
    found.streams["text"], found.streams[0] = tokens.streams["text"], tokens.streams["text"]
    return {tag: value for tag, value in found.values().items() if tag.endswith("/text")}


def test_the_diffusions_part_is_the_models_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kind = KINDS["VibeVoice"]
    model, backend, own = kind.make(), MemoryBackend(), []
    plain = type(model).compute_diffusion_loss

    def kept(*args: Any) -> Any:
        own.append(plain(*args))
        return own[-1]

    monkeypatch.setattr(model, "compute_diffusion_loss", kept)
    train(model, batches(kind)[:1], tmp_path, [StrategicTelemetry(["outputs"], 1, [backend])], 1, 1)
    assert backend.scalars("outputs/loss/diffusion")[1] == pytest.approx(0.25 * float(own[0]), rel=1e-4)
