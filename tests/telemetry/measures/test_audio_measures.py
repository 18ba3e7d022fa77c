"""Signal measures against sounds whose answer is known."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from telemetry.measures.audio import (
    clipping_fraction,
    ends_abruptly,
    level_db,
    log_mel,
    mel_distance,
    narrow_band,
    seconds,
    silence_fraction,
    silent_seconds,
    spectral_flatness,
)

RATE = 8000


def tone(frequency: float, length: float, amplitude: float = 0.5) -> np.ndarray:
    return (amplitude * np.sin(2 * np.pi * frequency * np.arange(round(length * RATE)) / RATE)).astype(np.float32)


def sweep(length: float, frequencies: tuple[float, ...] = (300, 900, 500, 2000, 1200)) -> np.ndarray:
    """Tones one after the other: the same tune, however fast."""
    return np.concatenate([tone(frequency, length / len(frequencies)) for frequency in frequencies])


def test_the_level_of_a_tone() -> None:
    assert level_db(tone(440, 1.0, amplitude=1.0)) == pytest.approx(10 * math.log10(0.5), abs=0.01)
    assert level_db(0.1 * tone(440, 1.0, amplitude=1.0)) == pytest.approx(10 * math.log10(0.5) - 20, abs=0.01)
    assert level_db(np.zeros(100, np.float32)) == -math.inf
    assert level_db(np.zeros(0, np.float32)) == -math.inf


def test_planted_silence_is_found() -> None:
    sound = np.concatenate([tone(440, 0.6), np.zeros(round(0.3 * RATE), np.float32), tone(440, 0.1, amplitude=1e-3)])
    assert silence_fraction(sound, RATE) == pytest.approx(0.4, abs=1e-6)
    assert silent_seconds(sound, RATE) == pytest.approx(0.4, abs=1e-6)
    assert silence_fraction(np.zeros(0, np.float32), RATE) is None


def test_what_is_louder_than_the_threshold_is_no_silence() -> None:
    quiet = tone(440, 1.0, amplitude=10 ** (-46 / 20))  # -49 dB
    assert silence_fraction(quiet, RATE) == 0
    assert silence_fraction(quiet / 2, RATE) == 1


@given(st.integers(1, 2000))
def test_silence_counts_a_last_piece_as_its_length(samples: int) -> None:
    assert silent_seconds(np.zeros(samples, np.float32), RATE) == pytest.approx(seconds(np.zeros(samples), RATE))


def test_nan_is_no_silence() -> None:
    assert silence_fraction(np.full(400, np.nan, np.float32), RATE) == 0


def test_planted_clipping_is_found() -> None:
    sound = tone(440, 1.0)
    sound[100:180] = 1.0
    sound[300:320] = -1.2
    assert clipping_fraction(sound) == pytest.approx(100 / RATE)
    assert clipping_fraction(np.clip(4 * tone(440, 1.0), -1, 1)) > 0.5  # type: ignore[operator]
    assert clipping_fraction(np.zeros(0, np.float32)) is None


def test_a_tone_lies_in_its_mel_band() -> None:
    mel = log_mel(tone(1000, 0.5), RATE)
    assert mel.shape == (25, 64)
    top = 2595 * math.log10(1 + RATE / 2 / 700)
    expected = 2595 * math.log10(1 + 1000 / 700) / top * 65 - 1
    assert abs(int(mel[10].argmax()) - expected) <= 1
    assert mel.max() == pytest.approx(0, abs=1e-9)
    assert mel.min() >= -60


def test_loudness_does_not_count() -> None:
    assert mel_distance(log_mel(sweep(1.0), RATE), log_mel(0.1 * sweep(1.0), RATE)) == pytest.approx(0, abs=1e-6)


def test_a_stretched_clip_is_near_and_another_is_far() -> None:
    own = log_mel(sweep(1.0), RATE)
    stretched = mel_distance(own, log_mel(sweep(1.2), RATE))
    other = mel_distance(own, log_mel(sweep(1.0, (2500, 400, 3000, 700, 1700)), RATE))
    assert stretched < 0.3 * other


def test_no_samples_are_one_silent_frame() -> None:
    assert log_mel(np.zeros(0, np.float32), RATE).shape == (1, 64)


def slow_distance(ours: np.ndarray, theirs: np.ndarray) -> float:
    """The recursion as Sakoe and Chiba write it, cell by cell."""
    rows, columns = len(ours), len(theirs)
    best = np.full((rows, columns), np.inf)
    for i in range(rows):
        for j in range(columns):
            cost = math.sqrt(float(np.mean((ours[i] - theirs[j]) ** 2)))
            ways = [2 * cost] if i == j == 0 else []
            ways += [best[i - 1, j] + cost] if i else []
            ways += [best[i, j - 1] + cost] if j else []
            ways += [best[i - 1, j - 1] + 2 * cost] if i and j else []
            best[i, j] = min(ways)
    return float(best[-1, -1]) / (rows + columns)


@pytest.mark.parametrize("shape", [(1, 1), (1, 6), (7, 1), (5, 9), (9, 5), (8, 8)])
def test_the_distance_is_that_of_the_plain_recursion(shape: tuple[int, int]) -> None:
    draw = np.random.default_rng(sum(shape))
    ours, theirs = draw.normal(size=(shape[0], 3)), draw.normal(size=(shape[1], 3))
    assert mel_distance(ours, theirs) == pytest.approx(slow_distance(ours, theirs), rel=1e-9)
    assert mel_distance(ours, theirs) == pytest.approx(mel_distance(theirs, ours), rel=1e-9)


def noise(length: float, rate: int, seed: int = 0) -> np.ndarray:
    return (0.1 * np.random.default_rng(seed).standard_normal(round(length * rate))).astype(np.float32)


def test_noise_is_flat_and_a_tone_is_not() -> None:
    assert spectral_flatness(noise(1.0, 16000), 16000) > 0.8
    assert spectral_flatness(tone(440, 1.0), RATE) < 0.05
    assert math.isnan(spectral_flatness(np.zeros(800, np.float32), RATE))


def test_sound_without_high_frequencies_is_narrow() -> None:
    rate, at = 16000, np.arange(16000) / 16000
    low, high = (np.sin(2 * np.pi * frequency * at).astype(np.float32) for frequency in (900, 6000))
    assert narrow_band(low, rate)
    assert not narrow_band(low + 0.1 * high, rate)  # a hundredth of the power
    assert not narrow_band(np.zeros(16000, np.float32), rate)


def test_a_clip_that_is_cut_off_ends_as_loud_as_it_is() -> None:
    whole = tone(440, 1.0)
    fades = whole * np.linspace(1, 0, len(whole), dtype=np.float32)
    assert ends_abruptly(whole, RATE)
    assert not ends_abruptly(fades, RATE)
    assert ends_abruptly(fades[: len(fades) // 3], RATE)
    assert not ends_abruptly(np.zeros(RATE, np.float32), RATE)
    assert not ends_abruptly(np.zeros(0, np.float32), RATE)


@given(st.integers(0, 400), st.integers(1, 48000), st.sampled_from((0.0, 1e-30, 1.0, 1e30)))
def test_any_sound_can_be_asked(count: int, rate: int, scale: float) -> None:
    sound = (noise(1.0, 400)[:count] * scale).astype(np.float32)
    flatness = spectral_flatness(sound, rate)
    assert math.isnan(flatness) or 0 <= flatness <= 1 + 1e-9
    assert narrow_band(sound, rate) in (True, False)
    assert ends_abruptly(sound, rate) in (True, False)
