"""Qwen3-TTS where its package is installed (``pip install --no-deps qwen-tts-hf sox einops librosa``)."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest

import trainer  # noqa: F401  # makes an installed torchaudio importable before transformers imports it

# isort: split
import torch
from support.models import sure
from support.speech_models import IGNORED, Tokens, numbers, padded, shown, train
from support.steps import Snapshots
from torch import Tensor, nn

from telemetry import StrategicTelemetry
from telemetry.backends.memory import MemoryBackend

pytest.importorskip("qwen_tts", reason="qwen-tts-hf is not installed", exc_type=ImportError)
from qwen_tts.core.models.configuration_qwen3_tts import (  # type: ignore[import-not-found]
    Qwen3TTSTalkerConfig,
)
from qwen_tts.core.models.modeling_qwen3_tts import (  # type: ignore[import-not-found]
    Qwen3TTSTalkerForConditionalGeneration,
)

GROUPS, CODES, WORDS = 4, 11, 13
SIZES: dict[str, Any] = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 1, "num_code_groups": GROUPS, "head_dim": 8,
}  # fmt: skip
ROPE = {"type": "default", "mrope_section": [2, 1, 1], "interleaved": False, "rope_type": "default"}


class Speaking(nn.Module):
    """Calls the talker on the sum of text and codes, and the sub-talker on its hidden states, as a recipe does."""

    def __init__(self) -> None:
        super().__init__()
        predictor = {**SIZES, "vocab_size": CODES}
        config = Qwen3TTSTalkerConfig(
            code_predictor_config=predictor, **SIZES, vocab_size=CODES, text_vocab_size=WORDS, text_hidden_size=16,
            rope_scaling=ROPE, codec_eos_token_id=CODES - 1, pad_token_id=0,
        )  # fmt: skip
        self.talker = Qwen3TTSTalkerForConditionalGeneration(config)

    def forward(
        self, text_ids: Tensor, codec_ids: Tensor, codec_mask: Tensor, attention_mask: Tensor, labels: Tensor
    ) -> dict[str, Tensor]:
        talker = self.talker
        tables = [talker.get_input_embeddings(), *talker.code_predictor.get_input_embeddings()]
        spoken = sum(table(codec_ids[..., k]) for k, table in enumerate(tables)) * codec_mask.unsqueeze(-1)
        given = talker.text_projection(talker.get_text_embeddings()(text_ids)) + spoken
        said = talker(inputs_embeds=given, attention_mask=attention_mask, labels=labels, output_hidden_states=True)
        hidden = said.hidden_states[0][-1][:, :-1][codec_mask[:, 1:].bool()]
        _, others = talker.forward_sub_talker_finetune(codec_ids[codec_mask.bool()], hidden)
        return {"loss": said.loss + 0.3 * others}


def batch(seed: int) -> dict[str, Tensor]:
    lengths, texts = (4, 6), (3, 2)
    rows = [[[0] * GROUPS] * text + [numbers(GROUPS, seed + 9 * row + at, 0, CODES - 1) for at in range(length)]
            for row, (text, length) in enumerate(zip(texts, lengths, strict=True))]  # fmt: skip
    most = max(map(len, rows))
    codes = torch.tensor([row + [[0] * GROUPS] * (most - len(row)) for row in rows])
    mask = padded([[0] * text + [1] * length for text, length in zip(texts, lengths, strict=True)], 0)
    return {
        "text_ids": padded([numbers(len(row), seed + at, 0, WORDS) for at, row in enumerate(rows)], 0),
        "codec_ids": codes,
        "codec_mask": mask,
        "attention_mask": padded([[1] * len(row) for row in rows], 0),
        "labels": codes[..., 0].masked_fill(mask == 0, IGNORED),
    }


@torch.no_grad()
def expected(model: Any, given: dict[str, Tensor]) -> dict[str, float]:
    """Every token by the logits that the talker and its sub-talker return, one by one."""
    logits: list[Tensor] = []
    talker = model.talker
    handle = talker.codec_head.register_forward_hook(lambda module, args, output: logits.append(output))
    heads: list[Tensor] = []
    others = [one.register_forward_hook(lambda module, args, output: heads.append(output))
              for one in talker.code_predictor.lm_head]  # fmt: skip
    model(**given)
    for one in (handle, *others):
        one.remove()
    tokens = Tokens()
    places = [(row, at) for row, at in given["codec_mask"].nonzero().tolist()]
    for number, (row, at) in enumerate(places):
        codes = given["codec_ids"][row, at].tolist()
        tokens.add(0, logits[0][row, at - 1].tolist(), codes[0])
        for k in range(2, GROUPS):  # the head of codebook k - 1 is held against codebook k
            tokens.add(k, heads[k - 2][number].tolist(), codes[k])
    return tokens.values()


def test_talker_and_sub_talker_are_read_and_training_is_left_alone(
    tmp_path: Path, telemetry_log: pytest.LogCaptureFixture
) -> None:
    telemetry_log.set_level(logging.WARNING)
    model, untouched = (sure(Speaking, 3, 0.4) for _ in range(2))
    data, backend, snapshots = [batch(at) for at in range(2)], MemoryBackend(), Snapshots()
    train(model, data, tmp_path, [snapshots, StrategicTelemetry(logging_steps=1, backends=[backend])], 2, 1)
    loss, total = backend.scalars("outputs/loss/model"), backend.scalars("outputs/loss/total")
    assert list(loss) == [1, 2]
    assert total == pytest.approx(loss, rel=1e-5)
    for step in (1, 2):
        values = expected(snapshots.models[step].eval(), data[step - 1])
        assert shown(backend, step, values) == pytest.approx(values, rel=1e-5), step
    assert {"gradients/depth_decoder/norm", "gradients/audio_head/norm"} <= set(backend.tags())
    said = [record.getMessage() for record in telemetry_log.records]
    assert any("head of the codebook before" in one for one in said), said
    train(untouched, data, tmp_path, [], 2, 1)
    after = untouched.state_dict()
    assert [name for name, one in model.state_dict().items() if not torch.equal(one, after[name])] == []


def test_without_codes_in_the_batch_the_sub_talkers_part_is_what_is_left(tmp_path: Path) -> None:
    model, backend = sure(Speaking, 3, 0.4), MemoryBackend()
    given = batch(0)

    class Renamed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def forward(self, text_ids: Tensor, frames: Tensor, codec_mask: Tensor, mask: Tensor, labels: Tensor) -> Any:
            return self.inner(text_ids, frames, codec_mask, mask, labels)

    names = {"codec_ids": "frames", "attention_mask": "mask"}
    renamed = {names.get(name, name): value for name, value in given.items()}
    talker = sure(Speaking, 3, 0.4).eval()
    whole = float(talker(**given)["loss"])
    train(Renamed(), [renamed], tmp_path, [StrategicTelemetry(logging_steps=1, backends=[backend])], 1, 1)
    first = backend.scalars("outputs/loss/codebook_0")[1]
    assert backend.scalars("outputs/loss/depth_decoder")[1] == pytest.approx(whole - first, rel=1e-4)
