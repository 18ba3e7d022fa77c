"""The built-in speaker encoder and transcriber, loaded by path."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from support.small_checkpoints import RATE, save_speaker_encoder, save_transcriber
from transformers import AutoFeatureExtractor, Wav2Vec2ForCTC, WavLMForXVector

from telemetry.speech.base import SpeakerEncoder, Transcriber
from telemetry.speech.loading import load_speaker_encoder, load_transcriber


@pytest.fixture(scope="module")
def encoder_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_speaker_encoder(tmp_path_factory.mktemp("encoder"))


@pytest.fixture(scope="module")
def transcriber_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_transcriber(tmp_path_factory.mktemp("transcriber"))


@pytest.fixture(scope="module")
def encoder(encoder_path: Path) -> SpeakerEncoder:
    return load_speaker_encoder(str(encoder_path))


@pytest.fixture(scope="module")
def transcriber(transcriber_path: Path) -> Transcriber:
    return load_transcriber(str(transcriber_path))


@pytest.fixture(scope="module")
def noise() -> np.ndarray:
    return np.random.default_rng(0).normal(scale=0.1, size=RATE // 2).astype(np.float32)


def test_a_speaker_vector_is_the_models_own(encoder: SpeakerEncoder, encoder_path: Path, noise: np.ndarray) -> None:
    model = WavLMForXVector.from_pretrained(encoder_path).eval()
    inputs = AutoFeatureExtractor.from_pretrained(encoder_path)(noise, sampling_rate=RATE, return_tensors="pt")
    with torch.no_grad():
        expected = model(**inputs).embeddings[0].numpy()
    vector = encoder.embed(noise, RATE)
    assert vector.shape == (10,)
    np.testing.assert_allclose(vector, expected, rtol=1e-5)


def test_other_rates_are_resampled(encoder: SpeakerEncoder, noise: np.ndarray) -> None:
    smooth = np.convolve(noise, np.hanning(32) / 16, "same").astype(np.float32)
    same = encoder.embed(np.repeat(smooth, 3), 3 * RATE)
    other = encoder.embed(np.repeat(smooth, 3), RATE)
    own = encoder.embed(smooth, RATE)

    def distance(vector: np.ndarray) -> float:
        return float(np.linalg.norm(vector - own))

    assert distance(same) < 0.2 * distance(other)


def test_a_clip_too_short_to_tell_a_voice_is_refused(encoder: SpeakerEncoder) -> None:
    with pytest.raises(ValueError, match=r"0\.02 s are too short"):
        encoder.embed(np.zeros(320, np.float32), RATE)
    with pytest.raises(ValueError, match="too short"):
        encoder.embed(np.zeros(0, np.float32), RATE)


def test_a_checkpoint_without_a_trained_head_is_refused(tmp_path: Path) -> None:
    path = save_speaker_encoder(tmp_path / "trunk", with_head=False)
    with pytest.raises(ValueError, match="has no x-vector head"):
        load_speaker_encoder(str(path))


def test_a_transcript_is_the_models_own(transcriber: Transcriber, transcriber_path: Path, noise: np.ndarray) -> None:
    model = Wav2Vec2ForCTC.from_pretrained(transcriber_path).eval()
    inputs = AutoFeatureExtractor.from_pretrained(transcriber_path)(noise, sampling_rate=RATE, return_tensors="pt")
    with torch.no_grad():
        ids = model(**inputs).logits[0].argmax(-1)
    letters = " |" + "abcdefghijklmnopqrstuvwxyz"
    expected = "".join(letters[token - 1] for token in torch.unique_consecutive(ids).tolist() if token > 2)
    said = transcriber.transcribe(noise, RATE, "en")
    assert said.replace(" ", "") == expected
    assert expected


@pytest.mark.parametrize("load", [load_speaker_encoder, load_transcriber])
@pytest.mark.parametrize("kind", ["missing", "empty", "other"])
def test_what_cannot_be_loaded_is_a_clear_error(load: object, kind: str, tmp_path: Path) -> None:
    path = tmp_path / "model"
    if kind != "missing":
        path.mkdir()
    if kind == "other":
        (path / "config.json").write_text('{"model_type": "llama"}', encoding="utf-8")
    with pytest.raises(
        ValueError,
        match=r"cannot load the (speaker encoder|transcriber) .*model.*Give (resemblyzer|pocketsphinx), or a directory",
    ):
        load(str(path))  # type: ignore[operator]


def test_loading_draws_no_random_number(encoder_path: Path, transcriber_path: Path) -> None:
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()  # noqa: NPY002
    load_speaker_encoder(str(encoder_path))
    load_transcriber(str(transcriber_path))
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]
    assert (np.random.get_state()[1] == before[2]).all()  # noqa: NPY002
