"""Moshi on the real Trainer: text and every codebook, against tokens and logits that are gone through one by one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from support.references import group_of, setup_findings
from support.speech_models import CODEBOOKS, CODES, Batch, Tokens, moshi, moshi_batch, of_step, shown, train
from support.steps import Snapshots

from telemetry import StrategicTelemetry
from telemetry.backends.memory import MemoryBackend
from telemetry.families import MoshiFamily
from telemetry.records import Table

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
    assert setup_findings(backend) == set()
    assert [record.getMessage() for record in telemetry_log.records if record.levelname == "ERROR"] == []

    train(untouched, data, tmp_path)
    after = untouched.state_dict()
    assert [name for name, one in model.state_dict().items() if not torch.equal(one, after[name])] == []


GROUPS = {
    r"decoder\.lm_head\.weight": "text_head",
    r"decoder\.model\.embed_tokens\.weight": "text_embedding",
    r"embed_tokens\.\d\.weight": "audio_embedding",
    r"decoder\.model\.layers\.\d\.self_attn\.[qkvo]_proj\.linear\.weight": "shared_attention",
    r"decoder\.model\.layers\.\d\.mlp\.fc[12]\.weight": "text_ffn",
    r"decoder\.model\.(layers\.\d\.(input|post_attention)_layernorm|norm)\.weight": "norms",
    r"depth_decoder\..*": "depth_decoder",
    r"audio_encoder\..*": "other",
}


def test_every_parameter_has_its_group() -> None:
    model = moshi()
    family = MoshiFamily(model)
    groups = {name: family.group_of(name) for name, _ in model.named_parameters()}
    assert groups == {name: group_of(name, GROUPS) for name in groups}
    assert set(groups.values()) == set(GROUPS.values())


def test_text_and_layers_are_read(tmp_path: Path) -> None:
    """Every position is text; both speakers' audio lies under it."""
    backend = MemoryBackend()
    train(moshi(), [moshi_batch(5, 3)], tmp_path, [StrategicTelemetry(logging_steps=1, backends=[backend])], 1, 1)
    assert backend.scalars("inputs/tokens/text_fraction")[1] == 1
    assert backend.scalars("inputs/invalid_ids")[1] == 0
    assert backend.scalars("attention/layer_0/text_to_text")[1] == pytest.approx(1)
    wanted = {"activations/layer_1/text_ffn/rms", "gradients/depth_decoder/norm", "gradients/text_audio_cosine"}
    assert wanted - set(backend.tags()) == {"gradients/text_audio_cosine"}  # not asked for
    said = {str(tag): str(why) for tag, why in backend.last("telemetry/absent", Table).rows}
    assert said["zero_shot/conditioning/gain"] == "references of this kind of model cannot be changed"
    assert "inputs/tokens/reference_audio_fraction" not in backend.tags()


def test_a_loss_of_text_alone_is_read_whole(tmp_path: Path) -> None:
    backend = MemoryBackend()
    batch = moshi_batch(5, 3, audio=False) | {"attention_mask": torch.tensor([[1] * 5, [1, 1, 1, 0, 0]])}
    train(moshi(), [batch], tmp_path, [StrategicTelemetry(logging_steps=1, backends=[backend])], 1, 1)
    assert backend.scalars("outputs/loss/total") == pytest.approx(backend.scalars("outputs/loss/model"), rel=1e-5)
    assert backend.scalars("inputs/tokens/padding_fraction")[1] == pytest.approx(0.2)
    assert "outputs/loss/audio" not in backend.tags()
