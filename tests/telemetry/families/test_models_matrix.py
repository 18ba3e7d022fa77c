"""Many classes of models on the real Trainer: each loss against tokens that are gone through one by one."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from support.model_zoo import KINDS, batches
from support.references import setup_findings
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
    assert setup_findings(backend) <= {*kind.warned}
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
    if not tokens.streams:
        return {}
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


def test_the_parts_of_a_loss_without_tokens(tmp_path: Path) -> None:
    """SpeechT5's and PocketTTS's, value by value."""
    seen: dict[str, Any] = {}
    for name in ("SpeechT5", "PocketTTS"):
        kind, backend = KINDS[name], MemoryBackend()
        model, batch = kind.make(), batches(kind)[0]
        source = model.speech_decoder_postnet if name == "SpeechT5" else model.eos_head
        source.register_forward_hook(lambda module, args, output, name=name: seen.update({name: output}))
        train(model, [batch], tmp_path / name, [StrategicTelemetry(["outputs"], 1, [backend])], 1, 1)
        seen[f"{name} batch"], seen[f"{name} parts"] = (
            batch,
            {
                part: backend.scalars(f"outputs/loss/{part}").get(1)
                for part in ("spectrogram", "end_of_speech", "guided_attention", "flow", "model", "total")
            },
        )

    before, after, logits = (one.tolist() for one in seen["SpeechT5"])
    labels = seen["SpeechT5 batch"]["labels"].tolist()
    frames = [(row, at) for row in range(2) for at in range(8) if labels[row][at][0] != -100]
    apart = [abs(guess[row][at][k] - labels[row][at][k]) for guess in (before, after) for row, at in frames
             for k in range(4)]  # fmt: skip
    ends = [(row, at) for row, at in frames if (row, at + 1) not in frames]
    stop = [5 * _softplus(-logits[row][at]) if (row, at) in ends else _softplus(logits[row][at]) for row, at in frames]
    parts = seen["SpeechT5 parts"]
    assert parts["spectrogram"] == pytest.approx(2 * math.fsum(apart) / len(apart), rel=1e-5)
    assert parts["end_of_speech"] == pytest.approx(math.fsum(stop) / len(stop), rel=1e-5)
    assert parts["total"] == pytest.approx(parts["model"], rel=1e-5)

    logits, ids = seen["PocketTTS"][..., 0].tolist(), seen["PocketTTS batch"]["input_ids"].tolist()
    stop = []
    for row in range(2):
        audio = [at for at, one in enumerate(ids[row]) if one in (28, 29)]
        stop += [_softplus(-logits[row][at]) if at == audio[-1] else _softplus(logits[row][at]) for at in audio]
    parts = seen["PocketTTS parts"]
    assert parts["end_of_speech"] == pytest.approx(0.1 * math.fsum(stop) / len(stop), rel=1e-5)
    assert parts["flow"] == pytest.approx(parts["model"] - parts["end_of_speech"], rel=1e-5)


def _softplus(value: float) -> float:
    return math.log1p(math.exp(value))
