"""Listeners whose weights come with packages, on the bundled speech: they hear what they are said to hear."""

from __future__ import annotations

import copy
import importlib.util
import itertools
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch

from telemetry.speech.loading import load_opinion_scorer, load_speaker_encoder, load_transcriber
from telemetry.speech.packaged import Dnsmos, PocketSphinx, Resemblyzer

CLIPS = Path(__file__).parents[3] / "trainer" / "demo" / "clips"


def clip(name: str) -> tuple[np.ndarray, int]:
    samples, rate = soundfile.read(CLIPS / f"{name}.flac", dtype="float32")
    return samples, rate


def test_clips_of_one_voice_are_nearer_than_those_of_two() -> None:
    encoder = Resemblyzer()
    voices = {name: [encoder.embed(*clip(f"{name}-{k}")) for k in (1, 2, 3)] for name in ("en-us-f4", "es-m5")}
    own = [a @ b for vectors in voices.values() for a, b in itertools.combinations(vectors, 2)]
    other = [a @ b for a in voices["en-us-f4"] for b in voices["es-m5"]]
    assert min(own) > max(other)
    assert all(np.linalg.norm(vector) == pytest.approx(1) for vectors in voices.values() for vector in vectors)
    samples, rate = clip("en-us-f4-1")
    soft, softer = (encoder.embed(samples * factor, rate) for factor in (0.01, 0.001))
    assert soft @ softer > 0.999
    for heard, why in ((samples[: rate // 4], "too short"), (np.zeros(rate, np.float32), "silence")):
        with pytest.raises(ValueError, match=why):
            encoder.embed(heard, rate)


def test_words_are_heard_and_only_english_ones() -> None:
    transcriber = PocketSphinx()
    first = transcriber.transcribe(*clip("en-us-f4-1"), "en-US")
    assert "home" in first.split()
    transcriber.transcribe(*clip("en-us-m3-1"), None)
    assert transcriber.transcribe(*clip("en-us-f4-1"), None) == first  # whatever was heard before
    assert transcriber.transcribe(np.zeros(0, np.float32), 16000, None) == ""
    with pytest.raises(ValueError, match="English, and not es"):
        transcriber.transcribe(*clip("es-m5-1"), "es")


def test_noise_and_clipping_take_from_the_opinion() -> None:
    scorer, (samples, rate) = Dnsmos(), clip("en-us-f4-1")
    noise = np.random.default_rng(0).normal(0, 0.05, len(samples)).astype(np.float32)
    good, noisy, clipped = (scorer.score(one, rate) for one in (samples, samples + noise, np.sign(samples)))
    assert 1 < noisy < good < 5
    assert clipped < good
    with pytest.raises(ValueError, match="empty"):
        scorer.score(samples[:0], rate)


@pytest.mark.parametrize("kind", [Resemblyzer, PocketSphinx, Dnsmos])
def test_they_are_copied_and_pickled_with_a_callback(kind: Callable[[], Any]) -> None:
    made, random = kind(), torch.get_rng_state()
    for again in (copy.deepcopy(made), pickle.loads(pickle.dumps(made))):
        assert type(again) is kind
    assert torch.equal(torch.get_rng_state(), random)


@pytest.mark.parametrize(
    ("load", "name", "missing", "mend"),
    [
        (load_speaker_encoder, "resemblyzer", "resemblyzer", "pip install --no-deps Resemblyzer"),
        (load_transcriber, "pocketsphinx", "pocketsphinx", "pip install 'strategic-telemetry[listeners]'"),
        (load_opinion_scorer, "dnsmos", "onnxruntime", "pip install 'strategic-telemetry[listeners]'"),
        (load_opinion_scorer, "utmos", "", "there is none of this name. Give dnsmos"),
    ],
)
def test_what_is_not_installed_is_named_with_what_to_do(
    load: Callable[[str], Any], name: str, missing: str, mend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda one, *rest: None if one == missing else find(one, *rest))
    with pytest.raises(ValueError, match="cannot load the") as refused:
        load(name)
    assert mend in str(refused.value)
    assert f"{name!r}" in str(refused.value)
