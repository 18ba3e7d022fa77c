"""Clips on a real Trainer: what is shown, that it is right, and that training does not notice."""

from __future__ import annotations

import copy
import gc
import random
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from support.batches import Voices
from support.speaking import (
    FRAME,
    RATE,
    Collator,
    DrawingEncoder,
    FixedTranscriber,
    ToneCodec,
    make_trainer,
    rows,
    sounds,
    speaking_callback,
    table,
)
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from transformers import TrainerCallback

from telemetry import SoundPolicy
from telemetry.backends.memory import MemoryBackend
from telemetry.catalogue import find
from telemetry.families import HiggsAudioV2Family
from telemetry.instruments import clips as clip_log
from telemetry.records import Audio, Image
from telemetry.speech.text import character_errors, word_errors

KINDS = ("reference", "target", "generated", "teacher_forced")
SILENT = SoundPolicy(enabled=False)  # where sounds do not matter: pictures take their time
SIGNAL = {
    "duration_ratio", "speaking_rate", "silence_fraction", "clipping_fraction", "eos_hit_rate", "codebook_use",
    "mel_distance", "mel_distance_shuffled",
}  # fmt: skip


@pytest.fixture
def backend() -> MemoryBackend:
    return MemoryBackend()


def clip_tags(backend: MemoryBackend, step: int) -> set[str]:
    """Numbers of the clips at a step."""
    parts = ("zero_shot/reference/", "zero_shot/chatml", "zero_shot/conditioning")
    tags = {tag for tag in backend.records if tag.startswith("zero_shot/") and not tag.startswith(parts)}
    return {tag.removeprefix("zero_shot/") for tag in tags if step in backend.scalars(tag)}


def test_every_evaluation_and_the_start_are_heard(
    higgs: Any, voices: Voices, backend: MemoryBackend, tmp_path: Path, telemetry_log: pytest.LogCaptureFixture
) -> None:
    transcriber = FixedTranscriber()
    callback = speaking_callback(backend, speaker_encoder=DrawingEncoder(), transcriber=transcriber, clips=3)
    make_trainer(higgs, voices, tmp_path, [callback]).train()

    for step in (0, 1):
        shown, heard = table(backend, step), sounds(backend, step)
        assert [row["sample"] for row in shown] == ["sample 0/é", "sample 1/é", "sample 2/é"]
        assert [row["target text"] for row in shown] == [f"A ship sails {index}." for index in range(3)]
        assert {row["transcript"] for row in shown} == {transcriber.words}
        assert set(heard) == {f"zero_shot/clip_{index}/{kind}" for index in range(3) for kind in KINDS}
        for index, row in enumerate(shown):
            for column, kind in zip(("reference", "target", "generated", "teacher-forced"), KINDS, strict=True):
                own = heard[f"zero_shot/clip_{index}/{kind}"]
                assert row[column] is own
                assert len(own.clips) == 1
                assert own.clips[0].caption == f"sample {index}/é, speaker {index % 2}, {('en', 'pt-BR')[index % 2]}"
            picture = row["spectrogram"]
            assert isinstance(picture, Image)
            assert picture.voice
            assert any(record is picture for _, record in backend.records[f"zero_shot/clip_{index}/spectrogram"])
            assert row["target"].clips[0].samples.size == row["teacher-forced"].clips[0].samples.size
        numbers = SIGNAL | {"speaker_similarity", "wer", "cer", "reference_leak"}
        languages = {f"language_{language}/{number}" for language in ("en", "pt-br") for number in numbers}
        assert clip_tags(backend, step) == numbers | languages
    assert set(transcriber.languages) == {"en", "pt-BR"}
    assert all(find(tag) for tag in backend.records)
    assert not [record for record in telemetry_log.records if record.levelname in ("WARNING", "ERROR")]


def test_numbers_are_those_of_the_clips(higgs: Any, voices: Voices, backend: MemoryBackend, tmp_path: Path) -> None:
    callback = speaking_callback(backend, transcriber=FixedTranscriber("a boat"), clips=5)
    make_trainer(higgs, voices, tmp_path, [callback]).train()
    shown = table(backend, 0)
    assert len(shown) == 5
    ratios = [row["generated"].clips[0].samples.size / row["target"].clips[0].samples.size for row in shown]
    assert backend.scalars("zero_shot/duration_ratio")[0] == pytest.approx(np.mean(ratios))
    assert [row["duration_ratio"] for row in shown] == pytest.approx(ratios)
    english = [ratio for index, ratio in enumerate(ratios) if index % 2 == 0]
    assert backend.scalars("zero_shot/language_en/duration_ratio")[0] == pytest.approx(np.mean(english))
    for tag, count in (("wer", word_errors), ("cer", character_errors)):
        errors = [count("a boat", row["target text"]) for row in shown]
        assert backend.scalars(f"zero_shot/{tag}")[0] == pytest.approx(
            sum(found.wrong for found in errors if found) / sum(found.length for found in errors if found)
        )
    by_speaker = {row["speaker"]: row for row in table(backend, 0, "zero_shot/clips_by_speaker")}
    assert {name: row["clips"] for name, row in by_speaker.items()} == {"speaker 0": 3, "speaker 1": 2}
    assert by_speaker["speaker 0"]["duration_ratio"] == pytest.approx(np.mean(english))
    ended = [row["ended by"] == "end of stream" for row in shown]
    assert backend.scalars("zero_shot/eos_hit_rate")[0] == pytest.approx(np.mean(ended))


def test_a_clip_is_compared_with_itself_before_training(
    higgs: Any, voices: Voices, backend: MemoryBackend, tmp_path: Path
) -> None:
    make_trainer(higgs, voices, tmp_path, [speaking_callback(backend, clips=2)], learning_rate=0.5).train()
    first, later = table(backend, 0), table(backend, 1)
    assert [row["since before training"] for row in first] == [None, None]
    for before, after in zip(first, later, strict=True):
        expected = []
        for name, better in (
            ("silence_fraction", -1), ("clipping_fraction", -1), ("eos_hit_rate", 1), ("mel_distance", -1),
        ):  # fmt: skip
            change = after[name] - before[name]
            verdict = "better" if change * better > 0 else "worse"
            expected.append(f"{name} {change:+.3g} {verdict}" if change else f"{name} same")
        assert after["since before training"] == ", ".join(expected)
        assert "better" in after["since before training"] or "worse" in after["since before training"]


def test_without_listeners_their_numbers_are_absent_and_said(
    higgs: Any, voices: Voices, backend: MemoryBackend, tmp_path: Path, telemetry_log: pytest.LogCaptureFixture
) -> None:
    make_trainer(higgs, voices, tmp_path, [speaking_callback(backend, sound=SILENT)]).train()
    assert {tag for tag in clip_tags(backend, 1) if "language" not in tag} == SIGNAL
    said = [record.getMessage() for record in telemetry_log.records]
    assert said.count("no zero_shot/speaker_similarity: no speaker encoder was given") == 1
    for name in ("wer", "cer", "reference_leak"):
        assert said.count(f"no zero_shot/{name}: no transcriber was given") == 1


def test_files_are_kept(higgs: Any, voices: Voices, backend: MemoryBackend, tmp_path: Path) -> None:
    make_trainer(higgs, voices, tmp_path, [speaking_callback(backend, clips=2)]).train()
    clips = tmp_path / "clips"
    names = [f"rank0-{index}-sample_{index}_é" for index in range(2)]
    assert [len(table(backend, step)) for step in (0, 1)] == [2, 2]
    files = {str(path.relative_to(clips)) for path in clips.rglob("*.wav")}
    made = {f"step_{step}/{n}-{k}.wav" for step in range(2) for n in names for k in ("generated", "teacher_forced")}
    assert files == made | {f"dataset/{name}-{kind}.wav" for name in names for kind in ("reference", "target")}
    read, rate = soundfile.read(clips / "step_1" / f"{names[1]}-generated.wav")
    assert rate == RATE
    np.testing.assert_allclose(read, table(backend, 1)[1]["generated"].clips[0].samples, atol=1e-4)


def test_where_sound_is_off_nothing_is_heard_or_kept(
    higgs: Any, voices: Voices, backend: MemoryBackend, tmp_path: Path
) -> None:
    make_trainer(higgs, voices, tmp_path, [speaking_callback(backend, sound=SILENT)]).train()
    assert not (tmp_path / "clips").exists()
    assert not any(isinstance(record, Audio) for held in backend.records.values() for _, record in held)
    assert {tag for tag in clip_tags(backend, 1) if "language" not in tag} == SIGNAL


def test_codes_are_decoded_where_there_is_no_waveform(
    higgs: Any, voices: Voices, backend: MemoryBackend, tmp_path: Path
) -> None:
    make_trainer(higgs, voices, tmp_path, [speaking_callback(backend)], rows(voices, 2, waveforms=False)).train()
    for row, own in zip(table(backend, 0), rows(voices, 2), strict=True):
        frames = sum(position.kind == "target" for position in own.sample) - 1 - 3
        assert row["target"].clips[0].samples.size == frames * FRAME
        assert row["reference"].clips[0].samples.size > 0


def test_a_missing_clip_is_an_empty_one(higgs: Any, voices: Voices, backend: MemoryBackend, tmp_path: Path) -> None:
    """A model that says nothing: the tag keeps its one clip, and what cannot be measured is absent."""

    def at_once(_module: Any, _inputs: Any, output: Tensor) -> Tensor:
        end = torch.zeros(3, voices.config.codebook_size)
        end[:, voices.config.audio_stream_eos_id] = 1e9
        return output + end.flatten()

    handle = higgs.audio_lm_head.register_forward_hook(at_once)
    make_trainer(higgs, voices, tmp_path, [speaking_callback(backend)]).train()
    handle.remove()
    assert [len(audio.clips) for audio in sounds(backend, 0).values()] == [1] * 8
    assert [row["generated"].clips[0].samples.size for row in table(backend, 0)] == [0, 0]
    numbers = {tag for tag in clip_tags(backend, 0) if "language" not in tag}
    assert numbers == {"duration_ratio", "eos_hit_rate"}
    assert backend.scalars("zero_shot/eos_hit_rate")[0] == 1.0
    assert backend.scalars("zero_shot/duration_ratio")[0] == 0.0


def test_speech_that_never_ends_is_bounded_and_found(
    higgs: Any, voices: Voices, backend: MemoryBackend, tmp_path: Path
) -> None:
    higgs.register_forward_hook(_never_ending(voices))
    make_trainer(higgs, voices, tmp_path, [speaking_callback(backend, max_new_tokens=10)]).train()
    assert backend.scalars("zero_shot/eos_hit_rate")[0] == 0.0
    assert {row["ended by"] for row in table(backend, 0)} == {"tokens"}
    assert max(row["generated"].clips[0].samples.size for row in table(backend, 0)) <= 10 * FRAME


def _never_ending(voices: Voices) -> Callable[..., Any]:
    def never(_module: Any, _inputs: Any, output: Any) -> Any:
        shape = (*output.logits.shape[:2], voices.config.num_codebooks, voices.config.codebook_size)
        logits = output.logits.view(shape).clone()
        logits[..., voices.config.audio_stream_eos_id] = -1e9
        output.logits = logits.flatten(2)
        return output

    return never


def test_clips_without_time_left_are_said_and_their_numbers_left_out(
    higgs: Any, voices: Voices, backend: MemoryBackend, tmp_path: Path, telemetry_log: pytest.LogCaptureFixture
) -> None:
    make_trainer(higgs, voices, tmp_path, [speaking_callback(backend, clips_max_seconds=1e-6)]).train()
    assert clip_tags(backend, 1) == set()
    assert [r.getMessage() for r in telemetry_log.records if "no time is left for clip" in r.getMessage()]
    assert len(backend.scalars("train/loss")) == 1


@pytest.mark.parametrize("options", [{"clips": -1}, {"max_new_tokens": 0}, {"clips_max_seconds": 0}])
def test_options_out_of_range(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="must be at least 0"):
        speaking_callback(MemoryBackend(), **options)


@pytest.mark.parametrize("option", ["speaker_encoder", "transcriber"])
def test_a_model_that_cannot_be_loaded_is_an_error_before_training(option: str) -> None:
    with pytest.raises(ValueError, match=r"cannot load the .* 'no/such/directory/at/all'"):
        speaking_callback(MemoryBackend(), **{option: "no/such/directory/at/all"})


class _FailingCodec(ToneCodec):
    """Fails on the first of every three calls, which a clip that fails and one that does not take together."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def decode(self, codes: Tensor) -> Any:
        self.calls += 1
        if self.calls % 3 == 1:
            raise RuntimeError("no such codec")
        return super().decode(codes)


class _FailingListener(FixedTranscriber, DrawingEncoder):
    def transcribe(self, samples: np.ndarray, sampling_rate: int, language: str | None) -> str:
        raise RuntimeError("deaf")

    def embed(self, samples: np.ndarray, sampling_rate: int) -> np.ndarray:
        raise RuntimeError("deaf")


def test_a_clip_that_fails_is_left_out(
    higgs: Any, voices: Voices, backend: MemoryBackend, tmp_path: Path, telemetry_log: pytest.LogCaptureFixture
) -> None:
    trainer = make_trainer(higgs, voices, tmp_path, [speaking_callback(backend, sound=SILENT)], codec=_FailingCodec())
    trainer.train()
    assert len(table(backend, 0)) == 1  # the second: a clip takes two calls
    assert len(table(backend, 1)) == 1
    said = [record for record in telemetry_log.records if "could not be decoded" in record.getMessage()]
    assert len(said) == 1
    assert said[0].exc_info
    assert trainer.state.global_step == 1


def test_listeners_that_fail_take_their_own_numbers_only(
    higgs: Any, voices: Voices, backend: MemoryBackend, tmp_path: Path
) -> None:
    deaf = _FailingListener()
    callback = speaking_callback(backend, speaker_encoder=deaf, transcriber=deaf, sound=SILENT)
    make_trainer(higgs, voices, tmp_path, [callback]).train()
    assert {tag for tag in clip_tags(backend, 1) if "language" not in tag} == SIGNAL


class _Nonsense(FixedTranscriber):
    """Gives a number for words, the first time."""

    def transcribe(self, samples: np.ndarray, sampling_rate: int, language: str | None) -> Any:
        words = super().transcribe(samples, sampling_rate, language)
        return 7 if len(self.languages) == 1 else words


def test_a_clip_that_cannot_be_measured_is_left_out(
    higgs: Any, voices: Voices, backend: MemoryBackend, tmp_path: Path, telemetry_log: pytest.LogCaptureFixture
) -> None:
    callback = speaking_callback(backend, transcriber=_Nonsense(), sound=SILENT)
    make_trainer(higgs, voices, tmp_path, [callback]).train()
    assert [row["sample"] for row in table(backend, 0)] == ["sample 1/é"]
    assert len(table(backend, 1)) == 2
    assert [r for r in telemetry_log.records if "could not be measured and is left out" in r.getMessage()]


class _BrokenAtFirst(list[Any]):
    """A data set that cannot be read the first time."""

    broken = True

    def __getitem__(self, index: Any) -> Any:
        was, self.broken = self.broken, False
        if was:
            raise OSError("no such disk")
        return super().__getitem__(index)


def test_evaluation_data_that_cannot_be_read(
    higgs: Any, voices: Voices, backend: MemoryBackend, tmp_path: Path, telemetry_log: pytest.LogCaptureFixture
) -> None:
    trainer = make_trainer(
        higgs, voices, tmp_path, [speaking_callback(backend, sound=SILENT)], _BrokenAtFirst(rows(voices, 3))
    )
    trainer.train()
    assert [r for r in telemetry_log.records if "evaluation samples could not be read" in r.getMessage()]
    assert "zero_shot/clips" in backend.records
    assert len(table(backend, 1)) == 2
    assert trainer.state.global_step == 1


def test_no_codec_is_absent(
    higgs: Any, voices: Voices, backend: MemoryBackend, tmp_path: Path, telemetry_log: pytest.LogCaptureFixture
) -> None:
    trainer = make_trainer(higgs, voices, tmp_path, [speaking_callback(backend)])
    trainer.processing_class.audio_tokenizer = None  # type: ignore[union-attr]
    trainer.train()
    assert "zero_shot/clips" not in backend.records
    assert [r for r in telemetry_log.records if r.getMessage().startswith("no zero_shot/clips: there is no codec")]


def test_two_evaluation_sets_are_one_set_of_clips(
    higgs: Any, voices: Voices, backend: MemoryBackend, tmp_path: Path
) -> None:
    sets = {"a": rows(voices, 3), "b": rows(voices, 4)}
    make_trainer(higgs, voices, tmp_path, [speaking_callback(backend, sound=SILENT)], sets).train()
    assert len(table(backend, 1)) == 2


# -- training does not notice -----------------------------------------------------------------------------------------


def _trained(
    make_higgs: Callable[..., Any], voices: Voices, directory: Path, callbacks: list[Any], **arguments: Any
) -> dict[str, Any]:
    model = make_higgs()
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.2
    model.model.layers[0].self_attn.training = False
    model.generation_config.do_sample = True
    before = copy.deepcopy(model.generation_config.to_dict())
    torch.manual_seed(3)
    random.seed(3)
    np.random.seed(3)  # noqa: NPY002
    trainer = make_trainer(
        model, voices, directory, callbacks, max_steps=2, gradient_accumulation_steps=2,
        gradient_checkpointing=True, **arguments,
    )  # fmt: skip
    trainer.train()
    assert model.generation_config.to_dict() == before
    state: dict[str, Any] = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for index, values in trainer.optimizer.state_dict()["state"].items():  # type: ignore[union-attr]
        state |= {f"{index}/{name}": torch.as_tensor(value).clone() for name, value in values.items()}
    state["torch"] = torch.get_rng_state()
    state["numpy"] = torch.from_numpy(np.random.get_state()[1].astype(np.int64))  # noqa: NPY002
    state["python"] = torch.tensor(random.getstate()[1])
    state["training"] = torch.tensor([module.training for module in model.modules()])
    state["config"] = model.config.to_dict()
    return state


@pytest.mark.parametrize("precision", [{}, {"bf16": True}])
def test_training_is_the_same_bit_for_bit(
    make_higgs: Callable[..., Any], voices: Voices, backend: MemoryBackend, tmp_path: Path, precision: dict[str, bool]
) -> None:
    listener = DrawingEncoder()
    callback = speaking_callback(backend, speaker_encoder=listener, transcriber=FixedTranscriber(), sound=SILENT)
    without = _trained(make_higgs, voices, tmp_path / "without", [], **precision)
    with_clips = _trained(make_higgs, voices, tmp_path / "with", [callback], **precision)
    assert len(table(backend, 2)) == 2
    assert without.keys() == with_clips.keys()
    for name, value in without.items():
        same = torch.equal(value, with_clips[name]) if isinstance(value, Tensor) else value == with_clips[name]
        assert same, name


class _Live(TorchDispatchMode):
    """Bytes of the storages that operations have made and that are still held, and their peak."""

    def __init__(self, *held: Tensor) -> None:
        super().__init__()
        self.now = self.peak = 0
        # Operations also give views of what was there before.
        self._seen: set[int] = {tensor.untyped_storage()._cdata for tensor in held}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for value in tree_iter(made):
            if isinstance(value, Tensor):
                self._count(value.untyped_storage())
        return made

    def _count(self, storage: Any) -> None:
        key = storage._cdata
        if key in self._seen or not storage.nbytes():
            return
        self._seen.add(key)
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._freed, key, storage.nbytes())

    def _freed(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.now -= size


def _batches(voices: Voices, size: int) -> Iterator[dict[str, Any]]:
    collate, data = Collator(voices), rows(voices, 4)
    return (collate(data[at : at + size]) for at in range(0, len(data), size))


def test_memory_is_that_of_an_evaluation_and_freed(voices: Voices, make_higgs: Callable[..., Any]) -> None:
    model = make_higgs().eval()
    speech = HiggsAudioV2Family(model).speaker
    assert speech is not None
    [batch] = _batches(voices, 4)
    inputs = {name: value for name, value in batch.items() if name != "metadata"}
    weights = [*model.parameters(), *model.buffers()]
    with torch.no_grad(), _Live(*weights) as plain:
        model(**inputs)
    prompts = [prompt for row in range(4) if (prompt := speech.prompt(batch, row)) is not None]
    given = [tensor for prompt in prompts for tensor in (*prompt.inputs.values(), *prompt.spoken.values())]
    assert len(prompts) == 4
    cache = 0
    gc.collect()
    with torch.no_grad(), _Live(*weights, *given) as live:
        for prompt in prompts:
            limit = speech.frames_for(prompt, clip_log.LENGTH_RATIO)
            positions = prompt.inputs["input_ids"].shape[1] + limit
            width = model.config.num_key_value_heads * model.config.head_dim * model.config.num_hidden_layers
            cache = max(cache, 2 * 4 * positions * width)
            said, forced = speech.generate(prompt, limit, 100.0, 0), speech.teacher_forced(prompt)
            del said, forced
        gc.collect()
        left = live.now
    # A cache that grows is for a moment there twice, and so is its layer while it is joined.
    assert live.peak <= plain.peak + 2 * cache
    assert left == 0


class _Count(TrainerCallback):
    """How many tensors there are when a step begins, once all is written and what is garbage is collected."""

    def __init__(self, watched: Any) -> None:
        self._watched = watched
        self.tensors: dict[int, int] = {}

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step not in (2, 5):  # an epoch apart
            return
        assert self._watched.session.recorder.drain()
        gc.collect()
        self.tensors[state.global_step] = sum(issubclass(type(held), Tensor) for held in gc.get_objects())


def test_evaluations_leave_nothing_behind(higgs: Any, voices: Voices, backend: MemoryBackend, tmp_path: Path) -> None:
    callback = speaking_callback(backend, transcriber=FixedTranscriber(), sound=SILENT)
    count = _Count(callback)
    make_trainer(higgs, voices, tmp_path, [callback, count], max_steps=6).train()
    assert len(table(backend, 6)) == 2
    assert count.tensors[5] == count.tensors[2] + 3  # losses, one a step until the next due step
