"""A data set gone through before training: what is wrong with it is found, and named, and nothing else."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import tiny_training as tiny
from support.models import make
from support.steps import Steps

from telemetry import StrategicTelemetry, check_data
from telemetry.backends.memory import MemoryBackend

RATE, SPEAKERS, EACH = 16000, 4, 3
TEXTS = [
    "a ship sails", "the bird sings", "rain falls on", "my old friend", "under the tree", "seven white stones",
    "nobody knows", "come home soon", "fire and water", "a long road", "the last song", "open the door",
]  # fmt: skip


@dataclass(frozen=True)
class Clip:
    samples: np.ndarray
    sampling_rate: int = RATE


def sound(speaker: int, number: int, seconds: float = 0.5) -> np.ndarray:
    """A voice is a pitch; what is said is a second one. With some breath, and an end that fades."""
    at = np.arange(round(seconds * RATE)) / RATE
    made = 0.3 * np.sin(2 * np.pi * (200 + 100 * speaker) * at) + 0.1 * np.sin(2 * np.pi * (5000 + 20 * number) * at)
    return (made * np.minimum(1, 10 * (seconds - at)) + 1e-4 * np.sin(7919 * at)).astype(np.float32)


class Pitches:
    """Hears the speaker of :func:`sound`."""

    def embed(self, samples: np.ndarray, sampling_rate: int) -> np.ndarray:
        if not samples.any():
            raise ValueError("there is nothing but silence")
        power = np.abs(np.fft.rfft(samples, 8000))
        return np.array([power[round((200 + 100 * speaker) / 2)] for speaker in range(SPEAKERS)])


class Numbers:
    """Hears what is said."""

    def transcribe(self, samples: np.ndarray, sampling_rate: int, language: str | None) -> str:
        power = np.abs(np.fft.rfft(samples, 8000))
        return TEXTS[int(np.argmax([power[round((5000 + 20 * number) / 2)] for number in range(len(TEXTS))]))]


def data() -> list[dict[str, Any]]:
    """Every speaker says three texts; a reference is the speaker's next."""
    samples = []
    for number in range(SPEAKERS * EACH):
        speaker = number // EACH
        other = speaker * EACH + (number + 1) % EACH
        samples.append({
            "sample_id": f"s{number}", "speaker": f"speaker {speaker}", "language": "en",
            "ref_transcript": TEXTS[other], "target_transcript": TEXTS[number],
            "reference": [Clip(sound(speaker, other))], "target": [Clip(sound(speaker, number))],
        })  # fmt: skip
    return samples


Change = Callable[[list[dict[str, Any]]], None]


def each(key: str, value: Callable[[dict[str, Any], int], Any]) -> Change:
    def change(samples: list[dict[str, Any]]) -> None:
        made = [value(sample, at) for at, sample in enumerate(samples)]
        for sample, one in zip(samples, made, strict=True):
            sample[key] = one

    return change


def clips(kind: str, change: Callable[[np.ndarray], np.ndarray]) -> Change:
    return each(kind, lambda sample, at: [Clip(change(sample[kind][0].samples))])


WRONG: dict[str, tuple[str, Change]] = {
    "references are the targets": ("the same clip", each("reference", lambda sample, at: sample["target"])),
    "one reference for all": ("the same clip", each("reference", lambda sample, at: [Clip(sound(0, 1))])),
    "one target for all": ("the same clip", each("target", lambda sample, at: [Clip(sound(0, 1))])),
    "references of other speakers": (
        "another voice", each("reference", lambda sample, at: [Clip(sound((at // EACH + 1) % SPEAKERS, at))])),
    "transcripts of other clips": (
        "something else", each("target_transcript", lambda sample, at: TEXTS[(at * 5 + 4) % 12])),
    "transcripts of other references": (
        "something else", each("ref_transcript", lambda sample, at: TEXTS[(at + 6) % 12])),
    "targets played too fast": ("faster or slower", clips("target", lambda one: one[::2])),
    "silent references": ("silent, clipped", clips("reference", np.zeros_like)),
    "clipped targets": ("silent, clipped", clips("target", lambda one: (30 * one).clip(-1, 1))),
    "targets cut off": ("silent, clipped", clips("target", lambda one: one[: len(one) // 2])),
    "noise": ("silent, clipped",
              clips("target", lambda one: np.random.default_rng(0).standard_normal(len(one)).astype(np.float32) / 9)),
    "without high frequencies": (
        "silent, clipped", each("target", lambda sample, at: [Clip(sample["target"][0].samples, 8000)])),
}  # fmt: skip


def report(samples: Sequence[Mapping[str, Any]], **more: Any) -> Any:
    return check_data(samples, Pitches(), Numbers(), show_progress=False, **more)


def test_a_data_set_that_is_as_it_should_be() -> None:
    found = report(data())
    assert found.findings == []
    values = {tag.removeprefix("setup/data/"): value for tag, value in found.values.items()}
    assert (values["samples"], values["looked_at"]) == (12, 12)
    assert values["other_voices_nearer"] == values["target/other_texts_nearer"] == values["equal_fraction"] == 0
    assert values["commonest_target_fraction"] == pytest.approx(1 / 12)
    ratios = sorted(len(TEXTS[at]) / len(TEXTS[at // EACH * EACH + (at + 1) % EACH]) for at in range(12))
    assert values["rate_ratio"] == pytest.approx((ratios[5] + ratios[6]) / 2)


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_found_and_named(name: str) -> None:
    fault, change = WRONG[name]
    samples = data()
    change(samples)
    found = report(samples).findings
    assert fault in found[0].fault or any(fault in one.fault for one in found), found
    named = next(one for one in found if fault in one.fault)
    assert "setup/data/" in named.evidence
    assert named.advice


def test_a_few_bad_clips_are_named() -> None:
    samples = data()
    samples[7]["target"] = [Clip(np.zeros(8000, np.float32))]
    (found,) = report(samples).findings
    assert "samples s7" in found.evidence
    assert not found.failing


def test_what_cannot_be_read_is_left_out(telemetry_log: pytest.LogCaptureFixture) -> None:
    class Gone:
        @property
        def samples(self) -> np.ndarray:
            raise OSError("no such file")

    samples = data()
    samples[0]["target"] = [Gone()]
    samples[1].clear()
    assert report(samples).findings == []
    assert "s0 cannot be read" in telemetry_log.text
    assert check_data([], show_progress=False).findings == []
    assert check_data(data(), show_progress=False, seconds=0.0).values["setup/data/looked_at"] == 0


def test_it_is_shown_on_the_first_due_step(tmp_path: Path) -> None:
    samples, backend = data(), MemoryBackend()
    WRONG["one reference for all"][1](samples)
    found = check_data(samples, show_progress=False)
    telemetry = StrategicTelemetry(["inputs"], 1, [backend], instruments=[found])
    with Steps(
        make("llama", **tiny.SHAPE), [telemetry], tmp_path, loss=lambda model, batch: model(**batch).loss
    ) as run:
        for _ in range(2):
            run.step([{name: one[None] for name, one in tiny.rows(1)[0].items()}])
    assert backend.scalars("setup/data/commonest_reference_fraction") == {1: 1.0}
    assert backend.scalars("setup/data_pairs") == {1: 2.0}


ODD = st.fixed_dictionaries({}, optional={
    "sample_id": st.none() | st.text(max_size=3) | st.integers(),
    "speaker": st.none() | st.text(max_size=2),
    "ref_transcript": st.none() | st.text(max_size=5) | st.integers(),
    "target_transcript": st.none() | st.text(max_size=5),
    "reference": st.none() | st.lists(st.integers(0, 2000), max_size=1).map(
        lambda sizes: [Clip(sound(0, size)[:size]) for size in sizes]),
    "target": st.lists(st.integers(0, 2000), max_size=2).map(
        lambda sizes: [Clip(sound(1, 2)[:size]) for size in sizes]),
})  # fmt: skip


@settings(max_examples=40, deadline=None)
@given(st.lists(ODD, max_size=6))
def test_whatever_samples_say(samples: list[dict[str, Any]]) -> None:
    found = report(samples)
    assert all(math.isfinite(value) for value in found.values.values())
    assert all(one.fault and one.evidence for one in found.findings)
