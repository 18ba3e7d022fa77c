"""Prompts cut from batches, free-running and teacher-forced codes, against plain loops over known samples."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from support.batches import Sample, Voices, every
from torch import Tensor

from telemetry.families import HiggsAudioV2Family, find_family
from telemetry.families.speech import Prompt, Speaker
from telemetry.probes.quiet import set_aside

LENGTHS = [(4, 5), (1, 9), (6, 1)]


@pytest.fixture
def speech(higgs: Any) -> Speaker:
    family = find_family(higgs)
    assert family is not None
    assert family.speaker is not None
    return family.speaker


def conversations(voices: Voices) -> list[Sample]:
    return [voices.conversation(reference, target, seed) for seed, (reference, target) in enumerate(LENGTHS)]


def planted(sample: Sample, kind: str, codebooks: int) -> list[list[int]]:
    """The codes of the only clip of a kind, the delay undone frame by frame."""
    frames = [position.codes for position in sample if position.kind == kind]
    length = len(frames) - 1 - codebooks
    return [[frames[1 + t + k][k] for t in range(length)] for k in range(codebooks)]  # type: ignore[index]


@pytest.mark.parametrize("left", [False, True])
def test_a_prompt_is_everything_before_the_target(voices: Voices, speech: Speaker, left: bool) -> None:
    samples = conversations(voices)
    batch = voices.batch(voices.pad(samples, left), frame_padding=2, frames_left=left)
    for row, sample in enumerate(samples):
        prompt = speech.prompt(batch, row)
        assert prompt is not None
        begin = next(index for index, position in enumerate(sample) if position.kind == "target")
        end = max(index for index, position in enumerate(sample) if position.kind == "target") + 1
        for inputs, upto in ((prompt.inputs, begin), (prompt.spoken, end)):
            assert inputs["input_ids"].tolist() == [[position.token for position in sample[:upto]]]
            assert inputs["audio_input_ids"].tolist() == [[list(p.codes) for p in sample[:upto] if p.codes]]
            assert bool(inputs["attention_mask"].all())
            assert inputs["audio_input_ids_mask"].shape == inputs["audio_input_ids"].shape[:2]
            assert bool(inputs["audio_input_ids_mask"].all())
            assert not {"labels", "audio_labels"} & set(inputs)
        assert prompt.inputs["input_ids"][0, -1] == voices.config.audio_bos_token_id
        assert prompt.target.tolist() == planted(sample, "target", 3)
        assert prompt.reference is not None
        assert prompt.reference.tolist() == planted(sample, "reference", 3)


def test_samples_without_reference_or_target(voices: Voices, speech: Speaker) -> None:
    samples = [voices.conversation(None, 5, 1), voices.conversation(4, None, 2)]
    batch = voices.batch(voices.pad(samples))
    prompt = speech.prompt(batch, 0)
    assert prompt is not None
    assert prompt.reference is None
    assert "audio_input_ids" not in prompt.inputs
    assert prompt.target.tolist() == planted(samples[0], "target", 3)
    assert speech.prompt(batch, 1) is None


def test_a_model_of_another_kind_does_not_speak(llama: Any) -> None:
    family = find_family(llama)
    assert family is not None
    assert family.speaker is None


def _prompt(voices: Voices, speech: Speaker, seed: int = 0, reference: int | None = 4) -> Prompt:
    prompt = speech.prompt(voices.batch([voices.conversation(reference, 5, seed)]), 0)
    assert prompt is not None
    return prompt


def slow_greedy(model: Any, prompt: Prompt, steps: int) -> list[list[int]]:
    """Frames of codes, one forward pass over everything for each, without a cache; no stream ends before ``steps``."""
    config = model.config
    ids = prompt.inputs["input_ids"]
    frames = prompt.inputs.get("audio_input_ids", torch.zeros(1, 0, config.num_codebooks, dtype=torch.long))
    said: list[list[int]] = []
    for step in range(steps):
        with torch.no_grad():
            inputs: dict[str, Tensor] = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
            if frames.shape[1]:
                inputs |= {"audio_input_ids": frames, "audio_input_ids_mask": torch.ones_like(frames[..., 0]).bool()}
            logits = model(**inputs).logits[0, -1].view(config.num_codebooks, config.codebook_size)
        frame = [config.audio_stream_bos_id if step <= k else int(logits[k].argmax()) for k in range(len(logits))]
        assert config.audio_stream_eos_id not in frame
        said.append(frame)
        frames = torch.cat([frames, torch.tensor([[frame]])], dim=1)
        ids = torch.cat([ids, torch.full((1, 1), config.audio_token_id)], dim=1)
    return said


@contextmanager
def ends(model: Any, offset: float) -> Iterator[None]:
    """The stream end made more or less likely at every position."""

    def moved(_module: Any, _inputs: Any, output: Tensor) -> Tensor:
        logits = output.view(*output.shape[:-1], model.config.num_codebooks, model.config.codebook_size).clone()
        logits[..., model.config.audio_stream_eos_id] += offset
        return logits.view_as(output)

    handle = model.audio_lm_head.register_forward_hook(moved)
    try:
        yield
    finally:
        handle.remove()


@pytest.mark.parametrize("reference", [4, None])
def test_free_running_codes_are_those_of_a_plain_loop(voices: Voices, speech: Speaker, reference: int | None) -> None:
    prompt, steps = _prompt(voices, speech, reference=reference), 12
    with set_aside(speech.model), ends(speech.model, -1e9):
        frames = slow_greedy(speech.model, prompt, steps)
        said = speech.generate(prompt, steps, 100.0, seed=0)
    codes = [[frames[1 + t + k][k] for t in range(steps - 3)] for k in range(3)]
    highest = voices.config.audio_stream_bos_id - 1
    assert said.codes.tolist() == [[min(code, highest) for code in row] for row in codes]
    assert said.ending == "tokens"


def test_speech_that_ends_at_once(voices: Voices, speech: Speaker) -> None:
    with set_aside(speech.model), ends(speech.model, 1e9):
        said = speech.generate(_prompt(voices, speech), 20, 100.0, seed=0)
    assert said.ending == "end of stream"
    assert said.codes.shape == (3, 0)


def test_speech_that_is_out_of_time(voices: Voices, speech: Speaker) -> None:
    with set_aside(speech.model), ends(speech.model, -1e9):
        said = speech.generate(_prompt(voices, speech), 50, 1e-9, seed=0)
    assert said.ending == "time"


def test_the_seed_decides_where_the_model_samples(voices: Voices, speech: Speaker) -> None:
    speech.model.generation_config.do_sample = True  # type: ignore[union-attr]
    prompt = _prompt(voices, speech)

    def say(seed: int) -> list[list[int]]:
        torch.rand(3)
        with set_aside(speech.model), ends(speech.model, -1e9):
            return speech.generate(prompt, 12, 100.0, seed).codes.tolist()

    assert say(1) == say(1)
    assert say(1) != say(2)


def test_generating_changes_no_setting_of_the_model(voices: Voices, speech: Speaker) -> None:
    settings, config = (
        copy.deepcopy(getattr(speech.model, name).to_dict()) for name in ("generation_config", "config")
    )
    with set_aside(speech.model):
        speech.generate(_prompt(voices, speech), 6, 100.0, seed=0)
    assert speech.model.generation_config.to_dict() == settings  # type: ignore[union-attr, operator]
    assert speech.model.config.to_dict() == config  # type: ignore[union-attr, operator]


def test_teacher_forced_codes_are_the_likeliest_at_every_position(
    voices: Voices, make_higgs: Callable[..., Any]
) -> None:
    model = make_higgs().eval()
    speech = HiggsAudioV2Family(model).speaker
    sample = voices.conversation(4, 5, 0)
    batch = voices.batch([sample])
    prompt = speech.prompt(batch, 0)
    assert prompt is not None
    with torch.no_grad():
        logits = model(**{name: value for name, value in batch.items() if "labels" not in name}).logits[0]
        forced = speech.teacher_forced(prompt)
    config = voices.config
    start = next(index for index, position in enumerate(sample) if position.kind == "target")
    table = logits.view(len(sample), config.num_codebooks, config.codebook_size)[..., : config.audio_stream_bos_id]
    expected = [[int(table[start + t + k][k].argmax()) for t in range(5)] for k in range(config.num_codebooks)]
    assert forced.tolist() == expected
    assert len(every([sample])) == len(logits)


def test_an_idle_pass_runs_every_module_that_always_runs(speech: Speaker) -> None:
    called: list[Any] = []
    always = list(speech.runs_always())
    handles = [module.register_forward_hook(lambda module, *_: called.append(module)) for module in always]
    with torch.no_grad():
        speech.idle()
    for handle in handles:
        handle.remove()
    assert {id(module) for module in called} == {id(module) for module in always}
