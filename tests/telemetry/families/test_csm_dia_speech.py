"""Csm and Dia speak: prompts cut from batches, free-running and teacher-forced codes, against plain loops."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from support.speaking import Processor, ToneCodec, table
from support.speech_models import (
    CODEBOOKS,
    CODES,
    DELAY,
    DIA_BEGIN,
    DIA_END,
    DIA_PAD,
    Batch,
    csm,
    csm_codes,
    csm_waveforms,
    dia,
    dia_batch,
    numbers,
    taught,
    train,
)
from torch import Tensor
from transformers import DiaProcessor

from telemetry import StrategicTelemetry
from telemetry.backends.memory import MemoryBackend
from telemetry.families import find_family
from telemetry.families.speech import Speaker


def speaker_of(model: Any) -> Speaker:
    family = find_family(model.eval())
    assert family is not None
    assert family.speaker is not None
    return family.speaker


def speech_of_csm(model: Any, embedded: Tensor, frames: int) -> list[list[int]]:
    """Frame after frame and code after code of the most likely, every pass over all that was said before."""
    said: list[list[int]] = []
    while len(said) < frames:
        backbone = model.backbone_model(inputs_embeds=embedded).last_hidden_state[:, -1]
        codes = [int(model.lm_head(backbone).argmax())]
        while len(codes) < CODEBOOKS:
            given = torch.tensor([[0, *codes]])
            depth = model.depth_decoder(given, backbone_last_hidden_state=backbone.clone(), use_cache=True)
            codes.append(int(depth.logits[0, -1].argmax()))
        said.append(codes)
        embedded = torch.cat([embedded, model.backbone_model.embed_tokens(torch.tensor([[codes]]))], dim=1)
    return said


def encoded(model: Any, batch: Batch, row: int, begin: int, end: int) -> list[list[int]]:
    made = model.codec_model.encode(batch["input_values"][row : row + 1, :, begin:end]).audio_codes
    return made[0].tolist()


@torch.no_grad()
@pytest.mark.parametrize("left", [False, True])
def test_csm_speaks_after_text_and_waveforms(left: bool) -> None:
    """All clips of the first sample are taught: those before the last are what it speaks after."""
    model = csm()
    speaker = speaker_of(model)
    batch = csm_waveforms([(3, 4, taught(4)), (2, 3, taught(3, 2))], [(5, 2, taught(2))], left=left)
    prompt = speaker.prompt(batch, 0)
    assert prompt is not None
    reference, target = encoded(model, batch, 0, 0, 32), encoded(model, batch, 0, 32, 56)
    assert prompt.reference is not None
    assert (prompt.reference.tolist(), prompt.target.tolist()) == (reference, target)
    frames = [[*zip(*reference, strict=True)], [*zip(*target, strict=True)]]
    end = torch.zeros(1, 1, CODEBOOKS, dtype=torch.long)
    embed = model.backbone_model.embed_tokens
    texts = [
        model.embed_text_tokens(torch.tensor([numbers(length, turn, 2, 30)])) for turn, length in enumerate((3, 2))
    ]
    before = torch.cat([texts[0], embed(torch.tensor([frames[0]])), embed(end), texts[1]], dim=1)
    kept = model.depth_decoder.generation_config.to_dict()
    said = speaker.generate(prompt, 6, math.inf, seed=0)
    assert model.depth_decoder.generation_config.to_dict() == kept
    expected = speech_of_csm(model, before, 6)
    assert [0] * (CODEBOOKS - 1) not in [codes[:-1] for codes in expected]
    assert said.ending == "tokens"
    assert said.codes.t().tolist() == [[min(code, CODES - 1) for code in codes] for codes in expected]
    assert speaker.generate(prompt, 6, 0.0, seed=0).ending == "time"

    whole = torch.cat([before, embed(torch.tensor([frames[1]]))], dim=1)
    hidden = model.backbone_model(inputs_embeds=whole).last_hidden_state[0, -4:-1]
    forced = speaker.teacher_forced(prompt).t().tolist()
    for at, codes in enumerate(frames[1]):
        depth = model.depth_decoder(
            torch.tensor([[0, *codes[:-1]]]), backbone_last_hidden_state=hidden[at : at + 1].clone(), use_cache=True
        )
        logits = [model.lm_head(hidden[at]), *depth.logits[0]]
        assert forced[at] == [int(one[:CODES].argmax()) for one in logits]
    assert speaker.frames_for(prompt, 2.0) == 7
    alone = speaker.prompt(batch, 1)
    assert alone is not None
    assert alone.reference is None
    assert alone.inputs["input_ids"].tolist() == [numbers(5, 100, 2, 30)]


@torch.no_grad()
def test_csm_speaks_after_codes_and_stops_at_its_end() -> None:
    model = csm()
    speaker = speaker_of(model)
    batch = csm_codes((2, 3), (0, 4), left=True)
    prompt = speaker.prompt(batch, 0)
    assert prompt is not None
    frames = batch["input_ids"][0][batch["attention_mask"][0].bool()]
    assert prompt.reference is not None
    assert (prompt.reference.t().tolist(), prompt.target.t().tolist()) == (frames[:2].tolist(), frames[3:6].tolist())
    embedded = model.backbone_model.embed_tokens(frames[None, :3])
    expected = speech_of_csm(model, embedded, 3)
    said = speaker.generate(prompt, 3, math.inf, seed=0)
    assert said.codes.t().tolist() == [[min(code, CODES - 1) for code in codes] for codes in expected]
    model.lm_head.weight.zero_()  # all ids are as likely, and 0 is the first
    model.depth_decoder.codebooks_head.weight.zero_()
    ended = speaker.generate(prompt, 3, math.inf, seed=0)
    assert (ended.ending, ended.codes.shape) == ("end of stream", (CODEBOOKS, 0))
    unlabelled = {name: tensor for name, tensor in batch.items() if name != "labels"}
    assert speaker.prompt(unlabelled, 0) is None
    speaker.idle()


def delayed(codes: list[list[int]], ended: bool) -> Tensor:
    """A stream ``[1, frames, C]`` as the model's processor makes it."""
    own = torch.tensor([[DIA_BEGIN] * len(DELAY), *zip(*codes, strict=True), *([[DIA_END] * len(DELAY)] * ended)])
    filled = torch.full((1, len(own) + max(DELAY), len(DELAY)), DIA_PAD)
    filled[0, : len(own)] = own
    places = DiaProcessor.build_indices(1, filled.shape[1], len(DELAY), list(DELAY))
    return DiaProcessor.apply_audio_delay(filled, DIA_PAD, DIA_BEGIN, places)


@torch.no_grad()
@pytest.mark.parametrize("row", [0, 1])
def test_dia_speaks_after_text_and_a_prompt(row: int) -> None:
    model = dia()
    speaker = speaker_of(model)
    lengths = ((4, 2, 3), (6, 0, 4))
    batch = dia_batch(*lengths)
    text, before, target = lengths[row]
    prompt = speaker.prompt(batch, row)
    assert prompt is not None
    codes = [numbers(before + target, 53 * row + k, 0, CODES) for k in range(len(DELAY))]
    assert prompt.target.tolist() == [codebook[before:] for codebook in codes]
    if before:
        assert prompt.reference is not None
        assert prompt.reference.tolist() == [codebook[:before] for codebook in codes]
    else:
        assert prompt.reference is None
    assert prompt.inputs["input_ids"].tolist() == [numbers(text, row, 1, 32)]
    begun = delayed([codebook[:before] for codebook in codes], ended=False)
    assert torch.equal(prompt.inputs["decoder_input_ids"], begun)

    said = speaker.generate(prompt, 9, math.inf, seed=0)
    whole = model.generate(
        inputs=prompt.inputs["input_ids"],
        attention_mask=prompt.inputs["attention_mask"],
        decoder_input_ids=begun,
        decoder_attention_mask=torch.ones(begun.shape[:2], dtype=torch.long),
        max_new_tokens=9,
        decoder_start_token_id=DIA_BEGIN,
        eos_token_id=DIA_END,
        pad_token_id=DIA_PAD,
    )
    places = DiaProcessor.build_indices(1, whole.shape[1], len(DELAY), list(DELAY), revert=True)
    straight = DiaProcessor.apply_audio_delay(whole, -1, -1, places)[0]
    stop = int((whole[0, :, 0] == DIA_END).nonzero()[0])
    expected = straight[1 + before : stop].t().clamp(0, CODES - 1)
    assert said.codes.tolist() == expected.tolist()
    assert said.ending in ("end of stream", "tokens")

    stream = delayed(codes, ended=True)
    logits = model(input_ids=prompt.inputs["input_ids"], decoder_input_ids=stream).logits
    forced = speaker.teacher_forced(prompt)
    for k, delay in enumerate(DELAY):
        for at in range(target):
            place = 1 + before + at + delay
            assert int(forced[k, at]) == int(logits[k, place - 1, :CODES].argmax())
    assert speaker.frames_for(prompt, 2.0) == 2 * target + max(DELAY) + 1
    assert speaker.prompt({name: one for name, one in batch.items() if name != "labels"}, row) is None
    speaker.idle()


@torch.no_grad()
def test_dia_is_stopped_by_a_bound_or_by_itself() -> None:
    model = dia()
    speaker = speaker_of(model)
    prompt = speaker.prompt(dia_batch((4, 2, 3)), 0)
    assert prompt is not None
    model.logits_dense.weight.zero_()  # all ids are as likely, and 0 is the first
    bounded = speaker.generate(prompt, 9, math.inf, seed=0)
    assert (bounded.ending, bounded.codes.tolist()) == ("tokens", [[0] * bounded.codes.shape[1]] * len(DELAY))
    assert bounded.codes.shape[1] == 9 - max(DELAY) - 1
    assert speaker.generate(prompt, 30, 0.0, seed=0).ending == "time"
    model.model.decoder.norm.register_forward_hook(lambda _module, _given, made: torch.ones_like(made))
    model.logits_dense.weight[DIA_END] = 1.0  # the first codebook's end is the likeliest
    ended = speaker.generate(prompt, 30, math.inf, seed=0)
    assert (ended.ending, ended.codes.shape) == ("end of stream", (len(DELAY), 0))


SPEAKING: dict[str, Any] = {
    "csm": (
        lambda: csm(attention_dropout=0.2),
        lambda: [
            csm_waveforms([(3, 4, taught(4)), (2, 3, taught(3))], [(2, 3, taught(3)), (4, 2, taught(2))]),
            csm_waveforms([(5, 2, taught(2))]),
        ],
    ),
    "dia": (dia, lambda: [dia_batch((4, 2, 3), (6, 1, 4)), dia_batch((6, 0, 4), seed=3)]),
}


@pytest.mark.parametrize("kind", SPEAKING)
def test_clips_are_heard_at_every_evaluation_and_training_is_left_alone(
    kind: str, tmp_path: Path, telemetry_log: pytest.LogCaptureFixture
) -> None:
    make, batches = SPEAKING[kind]
    model, untouched, backend, data = make(), make(), MemoryBackend(), batches()
    evaluated = {"eval_strategy": "steps", "eval_steps": 1, "eval_dataset": data}
    codec = {} if kind == "csm" else {"processing_class": Processor(None, ToneCodec())}  # Csm has one of its own
    everything: dict[str, dict[str, Any]] = {
        "shared_attention": {"text_audio_cosine": True},
        "zero_shot": {"conditioning_every": 1, "clips": 2},
    }
    telemetry = StrategicTelemetry(logging_steps=1, backends=[backend], options=everything)
    train(model, data, tmp_path, [telemetry], 2, 1, **evaluated, **codec)
    drawn = torch.get_rng_state()
    rows = table(backend, 1)
    assert [row["sample"] for row in rows] == ["sample 0", "sample 1"]
    for row, frames in zip(rows, (3, 2) if kind == "csm" else (3, 4), strict=True):
        assert row["ended by"] in ("end of stream", "tokens")
        samples = len(row["target"].clips[0].samples)
        assert samples == len(row["teacher-forced"].clips[0].samples)
        assert samples % frames == 0
        assert samples > 0
    assert backend.scalars("zero_shot/duration_ratio")[1] >= 0
    assert list(backend.scalars("zero_shot/conditioning/gain")) == [1]  # the other batch has one sample
    assert list(backend.scalars("zero_shot/conditioning/eval/gain")) == [1, 2]
    assert [record.getMessage() for record in telemetry_log.records if record.levelname == "ERROR"] == []
    train(untouched, data, tmp_path, [], 2, 1, **evaluated)
    assert torch.equal(torch.get_rng_state(), drawn)
    after = untouched.state_dict()
    assert [name for name, one in model.state_dict().items() if not torch.equal(one, after[name])] == []
