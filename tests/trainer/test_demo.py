"""The demonstration's clips, codec and prepared directory."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import subprocess
import sys
import textwrap
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from torch import Tensor
from transformers import (
    AutoModelForAudioTokenization,
    AutoTokenizer,
    HiggsAudioV2ForConditionalGeneration,
    HiggsAudioV2Processor,
)
from transformers.audio_utils import mel_filter_bank, spectrogram, window_function

from trainer.audio import read_audio
from trainer.chatml import load_samples
from trainer.codec import load_audio_tokenizer
from trainer.demo import synthesize as synthesis
from trainer.demo.__main__ import main
from trainer.demo.codec import DemonstrationCodec, DemonstrationCodecConfig
from trainer.demo.prepare import Demonstration, eval_samples, prepare, samples_of, train_tokenizer
from trainer.demo.synthesize import CLIPS_DIRECTORY, Clip, read_manifest, synthesize, trim_silence

CONFIG = DemonstrationCodecConfig()


def _waveform(clip: Clip) -> Tensor:
    return torch.from_numpy(read_audio(CLIPS_DIRECTORY / clip.file, CONFIG.sample_rate))


@pytest.fixture(scope="module")
def waveforms() -> dict[str, list[Tensor]]:
    """All clips at the codec's rate, by split."""
    by_split = defaultdict(list)
    for clip in read_manifest():
        by_split[clip.split].append(_waveform(clip))
    return by_split


@pytest.fixture(scope="module")
def codec(waveforms: dict[str, list[Tensor]]) -> DemonstrationCodec:
    return DemonstrationCodec.fit(waveforms["train"], CONFIG)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Demonstration:
    return prepare(tmp_path_factory.mktemp("demo"), show_progress=False)


# The clips


def test_manifest_lists_exactly_the_bundled_clips() -> None:
    listed = [clip.file for clip in read_manifest()]
    assert sorted(listed) == sorted(path.name for path in CLIPS_DIRECTORY.glob("*.flac"))
    assert sum(path.stat().st_size for path in CLIPS_DIRECTORY.iterdir()) < 2_500_000


def test_clips_are_what_the_manifest_says() -> None:
    for clip in read_manifest():
        info = soundfile.info(CLIPS_DIRECTORY / clip.file)
        assert (info.samplerate, info.channels, info.format) == (22050, 1, "FLAC")
        assert 1.0 <= clip.seconds <= 2.0
        assert clip.seconds == pytest.approx(info.duration, abs=1e-3)
        assert clip.transcript in synthesis.SENTENCES[clip.language]


def test_no_voice_is_in_both_splits() -> None:
    clips = read_manifest()
    speakers = {split: {clip.speaker for clip in clips if clip.split == split} for split in ("train", "eval")}
    assert len(speakers["train"]) >= 8
    assert not speakers["train"] & speakers["eval"]
    for split in speakers:
        assert {clip.language for clip in clips if clip.split == split} == {"en", "ar", "es"}


def test_every_speaker_says_four_sentences_and_every_sentence_has_several_voices() -> None:
    sentences, voices = defaultdict(set), defaultdict(set)
    for clip in read_manifest():
        sentences[clip.speaker].add(clip.transcript)
        voices[clip.transcript].add(clip.speaker)
    assert {len(said) for said in sentences.values()} == {4}
    assert min(len(speakers) for speakers in voices.values()) >= 2


def test_voices_of_one_sentence_differ() -> None:
    clips = [clip for clip in read_manifest() if clip.transcript == synthesis.SENTENCES["es"][0]]
    digests = {hashlib.sha256((CLIPS_DIRECTORY / clip.file).read_bytes()).digest() for clip in clips}
    assert len(digests) == len(clips) == 4


def test_trimming_keeps_speech_and_a_margin() -> None:
    samples = np.zeros(16000, dtype=np.float32)
    samples[4000:8000] = 0.5
    samples[100] = 0.004  # more than 40 dB below the peak
    assert np.flatnonzero(trim_silence(samples, 16000) == 0.5)[0] == round(0.03 * 16000)
    assert len(trim_silence(samples, 16000)) == 4000 + 2 * round(0.03 * 16000)


@pytest.mark.parametrize("length", [0, 100])
def test_silence_cannot_be_trimmed(length: int) -> None:
    with pytest.raises(ValueError, match="silent"):
        trim_silence(np.zeros(length, dtype=np.float32), 16000)


def test_synthesis_needs_espeak(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(RuntimeError, match="espeak-ng is not on the PATH"):
        synthesize(tmp_path / "clips")


def test_synthesis_writes_clips_and_manifest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tone = np.concatenate([np.zeros(22050), 0.3 * np.sin(np.arange(22050) * 0.1), np.zeros(22050)])
    soundfile.write(tmp_path / "tone.wav", tone, 22050)
    espeak = tmp_path / "espeak-ng"
    espeak.write_text(f"#!/bin/sh\nexec cat '{tmp_path / 'tone.wav'}'\n")
    espeak.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr(synthesis, "SPEAKERS", synthesis.SPEAKERS[:2])
    clips = synthesize(tmp_path / "clips")
    assert clips == read_manifest(tmp_path / "clips")
    assert len(clips) == 8
    for clip in clips:
        assert soundfile.info(tmp_path / "clips" / clip.file).duration == pytest.approx(1.06, abs=0.01)


# The codec


def _log_mel(samples: np.ndarray) -> np.ndarray:
    """Log-mel spectrogram ``[times, mels]`` in dB, made without the codec's own analysis."""
    filters = mel_filter_bank(513, 64, 0.0, 8000.0, 16000)
    mels = spectrogram(samples, window_function(1024), 1024, 256, mel_filters=filters, log_mel="dB", db_range=60.0)
    return mels.T


def _distance(first: np.ndarray, second: np.ndarray) -> float:
    a, b = _log_mel(first), _log_mel(second)
    times = min(len(a), len(b))
    return float(np.abs(a[:times] - b[:times]).mean())


def _rebuild(codec: DemonstrationCodec, waveform: Tensor) -> np.ndarray:
    codes = codec.encode(waveform[None, None]).audio_codes
    return codec.decode(codes).audio_values[0, 0].numpy()


@pytest.mark.parametrize("split", ["train", "eval"])
def test_reconstruction_is_nearer_to_its_clip_than_to_another(
    codec: DemonstrationCodec, waveforms: dict[str, list[Tensor]], split: str
) -> None:
    clips = waveforms[split][::4]  # one a speaker
    others = [*clips[1:], clips[0]]
    rebuilt = [_rebuild(codec, clip) for clip in clips]
    own = np.mean([_distance(sound, clip.numpy()) for sound, clip in zip(rebuilt, clips, strict=True)])
    other = np.mean([_distance(sound, clip.numpy()) for sound, clip in zip(rebuilt, others, strict=True)])
    assert own < 0.6 * other


@pytest.mark.parametrize("samples", [1, 639, 640, 641, 16000])
def test_lengths(codec: DemonstrationCodec, waveforms: dict[str, list[Tensor]], samples: int) -> None:
    codes = codec.encode(waveforms["train"][0][None, None, :samples]).audio_codes
    frames = -(-samples // 640)
    assert codes.shape == (1, 8, frames)
    assert codes.dtype == torch.int64
    assert 0 <= codes.min() <= codes.max() < 64
    values = codec.decode(codes).audio_values
    assert values.shape == (1, 1, frames * 640)
    assert values.dtype == torch.float32
    assert values.abs().max() <= 1.0


def test_batch_equals_single(codec: DemonstrationCodec, waveforms: dict[str, list[Tensor]]) -> None:
    batch = torch.stack([waveform[:16000] for waveform in waveforms["eval"] if len(waveform) >= 16000])[:, None]
    assert len(batch) > 4
    codes = codec.encode(batch).audio_codes
    alone = torch.cat([codec.encode(item[None]).audio_codes for item in batch])
    assert torch.equal(codes, alone)
    decoded = torch.cat([codec.decode(item[None]).audio_values for item in codes])
    assert torch.equal(codec.decode(codes).audio_values, decoded)


def test_codec_is_deterministic_and_leaves_random_state(waveforms: dict[str, list[Tensor]]) -> None:
    state = torch.random.get_rng_state()
    first, second = (DemonstrationCodec.fit(waveforms["train"], CONFIG, seed=3) for _ in range(2))
    assert torch.equal(first.codebooks, second.codebooks)
    clip = waveforms["eval"][0]
    np.testing.assert_array_equal(_rebuild(first, clip), _rebuild(second, clip))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert not torch.equal(DemonstrationCodec.fit(waveforms["train"], CONFIG, seed=4).codebooks, first.codebooks)


def test_every_stage_reduces_the_error(codec: DemonstrationCodec, waveforms: dict[str, list[Tensor]]) -> None:
    for split in ("train", "eval"):
        errors = torch.zeros(CONFIG.num_quantizers + 1)
        for waveform in waveforms[split]:
            frames = codec._analyse(waveform[None])
            codes = codec.encode(waveform[None, None]).audio_codes
            errors[0] += frames.var()
            for stages in range(1, CONFIG.num_quantizers + 1):
                errors[stages] += (frames - codec._dequantize(codes[:, :stages])).pow(2).mean()
        assert (errors.diff() < 0).all(), (split, errors)


def test_saved_codec_gives_the_same_codes(
    codec: DemonstrationCodec, waveforms: dict[str, list[Tensor]], tmp_path: Path
) -> None:
    codec.save_pretrained(tmp_path)
    loaded, report = AutoModelForAudioTokenization.from_pretrained(tmp_path, output_loading_info=True)
    assert isinstance(loaded, DemonstrationCodec)
    assert not any(report.values()), report
    assert (tmp_path / "model.safetensors").is_file()
    batch = waveforms["eval"][0][None, None]
    assert torch.equal(loaded.encode(batch).audio_codes, codec.encode(batch).audio_codes)


def test_forward_encodes_and_decodes(codec: DemonstrationCodec, waveforms: dict[str, list[Tensor]]) -> None:
    batch = waveforms["train"][0][None, None]
    output = codec(batch)
    assert torch.equal(output.audio_codes, codec.encode(batch).audio_codes)
    assert torch.equal(output.audio_values, codec.decode(output.audio_codes).audio_values)


@pytest.mark.parametrize("shape", [(1, 2, 100), (1, 1, 0), (1, 100)])
def test_only_mono_batches_are_encoded(codec: DemonstrationCodec, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"\[batch, 1, samples\]"):
        codec.encode(torch.zeros(shape))


def test_too_little_audio_to_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="25 frames cannot fill a codebook of 64 entries"):
        DemonstrationCodec.fit([torch.ones(16000)], CONFIG)


# What is prepared


def _files(directory: Path) -> dict[str, str]:
    paths = [path for path in directory.rglob("*") if path.is_file()]
    return {str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


def test_a_second_run_gives_the_same_files(made: Demonstration) -> None:
    directory = made.model.parent
    before = _files(directory)
    state = torch.random.get_rng_state()
    assert prepare(directory, show_progress=False) == made
    assert _files(directory) == before
    assert torch.equal(torch.random.get_rng_state(), state)


def test_data_files(made: Demonstration) -> None:
    for expected, path, number in (
        (samples_of("train"), made.train_file, made.train_samples),
        (eval_samples(), made.eval_file, made.eval_samples),
    ):
        samples = json.loads(path.read_text(encoding="utf-8"))
        assert samples == expected
        assert len(samples) == len({sample["misc"]["sample_id"] for sample in samples}) == number
    assert 32 <= made.train_samples <= 64
    assert 6 <= made.eval_samples <= 15


def test_evaluation_has_voices_that_are_new_and_a_few_that_are_not() -> None:
    training, evaluation = samples_of("train"), eval_samples()
    new = [sample for sample in evaluation if sample not in training]
    assert sorted(map(str, new)) == sorted(map(str, samples_of("eval")))
    assert not {sample["speaker"] for sample in new} & {sample["speaker"] for sample in training}
    kinds = [(sample["misc"]["language"], sample in training) for sample in evaluation[:6]]
    assert kinds == [(language, heard) for language in ("en", "ar", "es") for heard in (False, True)]
    assert len(evaluation) == len(new) + 3


def test_data_files_pass_validation(made: Demonstration) -> None:
    for path, number in ((made.train_file, made.train_samples), (made.eval_file, made.eval_samples)):
        assert len(load_samples(path, show_progress=False)) == number


@pytest.mark.parametrize("split", ["train", "eval"])
def test_samples_have_a_reference_of_the_same_voice(made: Demonstration, split: str) -> None:
    clips = {clip.file: clip for clip in read_manifest()}
    for sample in samples_of(split):
        assert [message["role"] for message in sample["messages"]] == ["system", "user", "assistant"]
        user, assistant = (message["content"] for message in sample["messages"][1:])
        urls = [user[1]["audio_url"], assistant[1]["audio_url"]]
        assert all((made.train_file.parent / url).is_file() for url in urls)
        reference, target = (clips[Path(url).name] for url in urls)
        assert reference.speaker == target.speaker == sample["speaker"]
        assert reference.transcript != target.transcript
        assert (user[0]["text"], assistant[0]["text"]) == (reference.transcript, target.transcript)
        assert user[2]["text"].endswith(target.transcript)
        assert assistant[1]["duration"] == target.seconds


def test_model_loads_with_every_weight(made: Demonstration) -> None:
    model, report = HiggsAudioV2ForConditionalGeneration.from_pretrained(
        made.model, use_text_head=True, output_loading_info=True
    )
    assert not any(report.values()), report
    assert model.text_lm_head is not None


def test_config_has_the_tokenizers_ids(made: Demonstration) -> None:
    tokenizer = AutoTokenizer.from_pretrained(made.model)
    config = HiggsAudioV2ForConditionalGeneration.from_pretrained(made.model, use_text_head=True).config
    ids = {
        "<|begin_of_text|>": config.bos_token_id,
        "<|end_of_text|>": config.pad_token_id,
        "<|eot_id|>": config.eos_token_id,
        "<|audio_out_bos|>": config.audio_bos_token_id,
        "<|AUDIO_OUT|>": config.audio_token_id,
        "<|reserved_special_token_6|>": config.audio_delay_token_id,
    }
    assert {token: tokenizer.convert_tokens_to_ids(token) for token in ids} == ids
    for token in (*ids, "<|start_header_id|>", "<|end_header_id|>", "<|audio_eos|>"):
        assert len(tokenizer(token)["input_ids"]) == 1
    assert config.vocab_size == len(tokenizer)
    assert (config.audio_stream_bos_id, config.audio_stream_eos_id, config.codebook_size) == (64, 65, 66)


@pytest.mark.parametrize(
    "text", ["El jardín.", "القمر جميل الليلة.", "日本語 \t\n 🦊", "".join(map(chr, range(1, 256)))]
)
def test_tokenizer_encodes_every_text(text: str) -> None:
    tokenizer = train_tokenizer()
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_processor_works_from_any_directory(
    made: Demonstration, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    processor = HiggsAudioV2Processor.from_pretrained(made.model)
    assert isinstance(processor.audio_tokenizer, DemonstrationCodec)
    sample = samples_of("eval")[0]
    text = processor.apply_chat_template(sample["messages"], tokenize=False)
    urls = [sample["messages"][1]["content"][1]["audio_url"], sample["messages"][2]["content"][1]["audio_url"]]
    audio = [read_audio(made.eval_file.parent / url, 16000) for url in urls]
    batch = processor(text=text, audio=audio, sampling_rate=16000, output_labels=True, return_tensors="pt")

    codec = load_audio_tokenizer(str(made.audio_tokenizer))
    first = codec.encode(torch.from_numpy(audio[0])[None, None]).audio_codes[0, 0]
    assert torch.equal(batch["audio_input_ids"][0, 1 : 1 + len(first), 0], first)
    assert batch["audio_input_ids"].max() == 65

    model = HiggsAudioV2ForConditionalGeneration.from_pretrained(made.model, use_text_head=True).eval()
    with torch.no_grad():
        loss = model(**batch).loss
    untrained = 8 * np.log(66) + np.log(model.config.vocab_size)  # nats: a uniform guess of 8 codes and a text token
    assert loss.item() == pytest.approx(untrained, rel=0.1)


def test_command_says_what_it_made(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="trainer.demo"):
        main(["prepare", str(tmp_path / "demo")])
    for name in ("model", "audio_tokenizer", "train.json", "eval.json"):
        assert (tmp_path / "demo" / name).exists()
        assert str(tmp_path / "demo" / name) in caplog.text


def test_command_needs_a_directory(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["prepare"])
    assert "DIR" in capsys.readouterr().err


@pytest.mark.parametrize("first", ["trainer.demo.codec", "transformers.processing_utils", "transformers.trainer"])
def test_a_processor_takes_the_codec_whatever_was_imported_first(first: str) -> None:
    script = f"""
        import importlib
        import trainer
        importlib.import_module({first!r})
        from trainer.demo.codec import DemonstrationCodec
        from transformers import processing_utils
        mixin = processing_utils.ProcessorMixin
        assert mixin.get_possibly_dynamic_module("DemonstrationCodec") is DemonstrationCodec
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(script)], check=True, timeout=120)
