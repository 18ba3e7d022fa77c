"""Faults planted in a clip, and what its numbers make of them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor

from telemetry.catalogue import find
from telemetry.families.speech import Prompt, Speech
from telemetry.instruments.clip_numbers import NUMBERS, HeardClip, Listener, cosine
from telemetry.instruments.clip_records import MeasuredClip, metrics, save, shown
from telemetry.records import Clip, Table

RATE = 8000
REFERENCE_TEXT = "The red fox runs home tonight."
TARGET_TEXT = "Rain falls on the roof."


def tune(length: float, pitches: tuple[int, ...] = (300, 900, 500, 2000, 1200)) -> np.ndarray:
    """Tones one after the other: the same tune, however fast."""
    each = np.arange(round(length * RATE / len(pitches))) / RATE
    return np.concatenate([0.5 * np.sin(2 * np.pi * pitch * each) for pitch in pitches]).astype(np.float32)


def codes(entries: int = 7) -> Tensor:
    """Three codebooks over 50 frames, of so many different entries."""
    return torch.arange(50).remainder(entries).repeat(3, 1)


def heard(generated: np.ndarray, said: Tensor | None = None) -> HeardClip:
    said = codes() if said is None else said
    return HeardClip(
        sample_id="../a b",
        speaker="Ada",
        language="en",
        target_text=TARGET_TEXT,
        reference_text=REFERENCE_TEXT,
        prompt=Prompt({}, {}, None, codes()),
        speech=Speech(said, "end of stream"),
        reference=Clip(tune(1.0, (700, 400)), RATE),
        target=Clip(tune(1.0), RATE),
        generated=Clip(generated, RATE),
        teacher_forced=Clip(tune(1.0), RATE),
    )


class Loudness:
    """Tells voices by the share of high frequencies."""

    def embed(self, samples: np.ndarray, sampling_rate: int) -> np.ndarray:
        return np.abs(np.fft.rfft(samples, 256))[:128]


class Hears:
    """Hears what it is told to."""

    def __init__(self, words: str) -> None:
        self.words = words

    def transcribe(self, samples: np.ndarray, sampling_rate: int, language: str | None) -> str:
        return self.words


class Judges:
    """Likes what is loud."""

    def score(self, samples: np.ndarray, sampling_rate: int) -> float:
        return 1 + 4 * float(np.abs(samples).max())


def numbers(clip: HeardClip, words: str | None = None, other: Clip | None = None) -> dict[str, float | None]:
    transcriber = None if words is None else Hears(words)
    listener = Listener(Loudness(), transcriber, lambda name, reason: pytest.fail(f"{name}: {reason}"))
    said = listener.transcript(clip)
    assert said == words
    return {name: value.result() for name, value in listener.measure(clip, said, other)}


@pytest.fixture(scope="module")
def right() -> dict[str, float | None]:
    """What is measured where the model says the target."""
    return numbers(heard(tune(1.0)), TARGET_TEXT, Clip(tune(1.0, (2500, 400, 3000, 700, 1700)), RATE))


def test_the_target_itself(right: dict[str, float | None]) -> None:
    same = ("duration_ratio", "speaking_rate", "eos_hit_rate", "codebook_use")
    assert {name: right[name] for name in same} == pytest.approx(dict.fromkeys(same, 1.0), abs=0.01)
    none = ("wer", "cer", "reference_leak", "silence_fraction", "clipping_fraction", "mel_distance")
    assert {name: right[name] for name in none} == pytest.approx(dict.fromkeys(none, 0.0), abs=1e-3)
    assert right["mel_distance_shuffled"] is not None
    assert right["mel_distance_shuffled"] > 5


def test_a_leak_of_the_reference() -> None:
    leaking = numbers(heard(tune(2.0)), f"{REFERENCE_TEXT} {TARGET_TEXT}")
    assert leaking["reference_leak"] == 1.0
    assert leaking["wer"] == pytest.approx(6 / 5)
    assert leaking["duration_ratio"] == pytest.approx(2.0)


def test_added_silence() -> None:
    silent = numbers(heard(np.concatenate([tune(1.0), np.zeros(RATE, np.float32)])), TARGET_TEXT)
    assert silent["silence_fraction"] == pytest.approx(0.5)
    assert silent["duration_ratio"] == pytest.approx(2.0)
    assert silent["speaking_rate"] == pytest.approx(1.0, abs=0.01)


def test_speech_slower_by_a_fifth(right: dict[str, float | None]) -> None:
    slow = numbers(heard(tune(1.2)), TARGET_TEXT)
    assert slow["duration_ratio"] == pytest.approx(1.2)
    assert slow["speaking_rate"] == pytest.approx(1 / 1.2, abs=0.01)
    assert slow["mel_distance"] is not None
    assert slow["mel_distance"] < 0.3 * float(right["mel_distance_shuffled"] or 0)


def test_half_of_the_words_at_the_same_speed() -> None:
    """The rate goes by what is said, where something transcribes it, and by what should be, where nothing does."""
    short = heard(tune(0.5))
    assert numbers(short, "Rain falls")["speaking_rate"] == pytest.approx(2 * 10 / 22, abs=0.02)
    assert numbers(short)["speaking_rate"] == pytest.approx(2.0, abs=0.02)


def test_clipped_speech(right: dict[str, float | None]) -> None:
    clipped = numbers(heard(np.clip(8 * tune(1.0), -1, 1)), TARGET_TEXT)
    assert (clipped["clipping_fraction"] or 0) > 0.5
    assert clipped["duration_ratio"] == right["duration_ratio"]


def test_collapsed_codes() -> None:
    collapsed = numbers(heard(tune(1.0), codes(1)), TARGET_TEXT)
    assert collapsed["codebook_use"] == pytest.approx(1 / 7)


def test_the_voice_of_the_reference_is_told_from_another() -> None:
    own, other = numbers(heard(tune(1.0, (700, 400)))), numbers(heard(tune(1.0, (3000, 2500))))
    assert own["speaker_similarity"] == pytest.approx(1.0)
    assert (other["speaker_similarity"] or 1) < 0.5


def test_cosines() -> None:
    assert cosine(np.array([1.0, 0]), np.array([0, 2.0])) == 0
    assert cosine(np.array([1.0, 1]), np.array([-2.0, -2])) == pytest.approx(-1)
    assert cosine(np.zeros(2), np.ones(2)) == 0


def test_the_opinion_is_the_scorers_and_a_scorer_that_fails_is_said() -> None:
    clip, said = heard(tune(1.0)), []
    listener = Listener(None, None, lambda name, reason: said.append((name, reason)), Judges())
    measured = dict(listener.measure(clip, None, None))["opinion_score"].result()
    assert measured == pytest.approx(1 + 4 * float(np.abs(clip.generated.samples).max()))
    broken = Listener(None, None, lambda name, reason: said.append((name, reason)), SimpleNamespace(score=None))  # type: ignore[arg-type]
    assert "opinion_score" not in dict(broken.measure(clip, None, None))
    assert said == [("opinion_score", "the opinion scorer failed: 'NoneType' object is not callable")]


def test_speech_that_was_stopped_by_its_limits() -> None:
    endless = replace(heard(tune(2.0)), speech=Speech(codes(), "tokens"))
    assert numbers(endless, TARGET_TEXT)["eos_hit_rate"] == 0
    said: list[str] = []
    cut = replace(endless, speech=Speech(codes(), "time"))
    measured = dict(Listener(None, None, lambda name, reason: said.append(reason)).measure(cut, None, None))
    assert set(measured) == {"silence_fraction", "clipping_fraction"}
    assert said == ["a clip was cut off when its time was up"]


def test_the_catalogue_says_what_a_cut_by_time_leaves_out() -> None:
    listener = Listener(Loudness(), Hears(f"{REFERENCE_TEXT} {TARGET_TEXT}"), lambda name, reason: None, Judges())
    ended = heard(tune(1.0))
    cut = replace(ended, speech=Speech(codes(), "time"))
    of_ended, of_cut = (
        {name for name, _ in listener.measure(clip, listener.transcript(clip), ended.target)} for clip in (ended, cut)
    )
    assert of_ended == set(NUMBERS)
    for name in NUMBERS:
        entry = find(f"zero_shot/{name}")
        assert entry is not None
        assert ("cut off when its time was up" in entry.absent) == (name not in of_cut), name


def test_a_language_that_is_free_text_is_no_part_of_a_tag() -> None:
    clip = heard(tune(1.0))
    listener = Listener(None, None, lambda name, reason: None)
    for language, tag in (("EN", "language_en"), ("pt-BR", "language_pt-br"), ("my own/tongue", None), ("", None)):
        measured = MeasuredClip(replace(clip, language=language), None, dict(listener.measure(clip, None, None)))
        found = {name.split("/")[1] for name, _ in metrics([measured]) if name.count("/") == 2}
        assert found == ({tag} if tag else set())


def test_what_cannot_be_measured_is_an_empty_cell() -> None:
    tables = list(shown([MeasuredClip(heard(tune(1.0)), None, {})], {}, with_media=False))
    assert all(isinstance(found, Table) for found in tables)
    [row] = tables[0].rows  # type: ignore[union-attr]
    assert row[:5] == ("../a b", "Ada", "en", TARGET_TEXT, None)
    assert row[-12:] == (None,) * 12


def test_ids_stay_inside_the_directory(tmp_path: Path) -> None:
    save([heard(tune(0.1)), replace(heard(tune(0.1)), sample_id="x" * 999)], tmp_path / "clips", 3, 0)
    written = {path.name for path in (tmp_path / "clips" / "step_3").iterdir()}
    assert written == {
        f"rank0-{at}-{name}-{kind}.wav"
        for at, name in enumerate(("_a_b", "x" * 60))
        for kind in ("generated", "teacher_forced")
    }
    assert [path.name for path in tmp_path.iterdir()] == ["clips"]
