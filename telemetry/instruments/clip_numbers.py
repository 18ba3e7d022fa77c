"""What is measured of one generated clip."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from telemetry.families.speech import Prompt, Speech
from telemetry.measures.audio import clipping_fraction, log_mel, mel_distance, seconds, silence_fraction, silent_seconds
from telemetry.records import Clip, Mean
from telemetry.speech.base import OpinionScorer, SpeakerEncoder, Transcriber
from telemetry.speech.text import character_errors, leaked_share, normalize, word_errors

NUMBERS = (
    "speaker_similarity", "opinion_score", "wer", "cer", "duration_ratio", "speaking_rate", "silence_fraction",
    "clipping_fraction", "eos_hit_rate", "reference_leak", "codebook_use", "mel_distance", "mel_distance_shuffled",
)  # fmt: skip
NEEDS_ENCODER = ("speaker_similarity",)
NEEDS_SCORER = ("opinion_score",)
NEEDS_TRANSCRIBER = ("wer", "cer", "reference_leak")


@dataclass(frozen=True)
class HeardClip:
    """One sample and what the model has made of it. Texts are "" where the batch does not say them.

    Attributes:
        prompt: what the model was given.
        speech: what it has said.
        reference, target: as the data set holds them, or decoded from their codes; an empty clip for no reference.
        generated, teacher_forced: decoded.
    """

    sample_id: str
    speaker: str
    language: str
    target_text: str
    reference_text: str
    prompt: Prompt
    speech: Speech
    reference: Clip
    target: Clip
    generated: Clip
    teacher_forced: Clip


class Listener:
    """Measures clips.

    Args:
        encoder, transcriber, scorer: None leaves out what needs them.
        problem: is told, by the name of a number and a reason, what could not be measured.
    """

    def __init__(
        self,
        encoder: SpeakerEncoder | None,
        transcriber: Transcriber | None,
        problem: Callable[[str, str], None],
        scorer: OpinionScorer | None = None,
    ) -> None:
        self._encoder = encoder
        self._transcriber = transcriber
        self._problem = problem
        self._scorer = scorer

    def transcript(self, clip: HeardClip) -> str | None:
        """What the model says; None where nothing transcribes it."""
        if self._transcriber is None:
            return None
        heard = clip.generated
        if not len(heard.samples):
            return ""
        try:
            return self._transcriber.transcribe(heard.samples, heard.sampling_rate, clip.language or None)
        except Exception as error:  # noqa: BLE001  (whatever a transcriber raises, the other numbers are measured)
            self._problem("wer", f"the transcriber failed: {error}")
            return None

    def measure(self, clip: HeardClip, said: str | None, other: Clip | None) -> Iterator[tuple[str, Mean]]:
        """The numbers of one clip, by name: those that can be measured.

        Args:
            clip: the clip.
            said: its transcript.
            other: the target of another sample, for the distance that means nothing was learnt; None without any.
        """
        generated = clip.generated
        if len(generated.samples):
            yield from self._similarity(clip)
            yield from self._opinion(generated)
            yield from _signal(generated)
        if clip.speech.ending == "time":  # cut off by a bound that says nothing of the model
            self._problem("duration_ratio", "a clip was cut off when its time was up")
            return
        yield "eos_hit_rate", Mean(float(clip.speech.ending == "end of stream"), 1)
        if said is not None:
            yield from _words(clip, said)
        if not len(clip.target.samples):
            return
        yield "duration_ratio", Mean(_seconds(generated) / _seconds(clip.target), 1)
        yield from _rate(clip, clip.target_text if said is None else said)
        yield from _use(clip.speech.codes, clip.prompt.target)
        if len(generated.samples):
            mel = _mel(generated)
            yield "mel_distance", Mean(mel_distance(mel, _mel(clip.target)), 1)
            if other is not None:
                yield "mel_distance_shuffled", Mean(mel_distance(mel, _mel(other)), 1)

    def _similarity(self, clip: HeardClip) -> Iterator[tuple[str, Mean]]:
        if self._encoder is None or not len(clip.reference.samples):
            return
        try:
            ours, theirs = (
                np.asarray(self._encoder.embed(heard.samples, heard.sampling_rate), dtype=np.float64)
                for heard in (clip.generated, clip.reference)
            )
        except Exception as error:  # noqa: BLE001  (whatever an encoder raises, the other numbers are measured)
            self._problem("speaker_similarity", f"the speaker encoder failed: {error}")
            return
        yield "speaker_similarity", Mean(cosine(ours, theirs), 1)

    def _opinion(self, heard: Clip) -> Iterator[tuple[str, Mean]]:
        if self._scorer is None:
            return
        try:
            yield "opinion_score", Mean(float(self._scorer.score(heard.samples, heard.sampling_rate)), 1)
        except Exception as error:  # noqa: BLE001  (whatever a scorer raises, the other numbers are measured)
            self._problem("opinion_score", f"the opinion scorer failed: {error}")


def cosine(ours: np.ndarray, theirs: np.ndarray) -> float:
    """Cosine of the angle between two vectors; 0 where one of them is zero."""
    size = float(np.linalg.norm(ours) * np.linalg.norm(theirs))
    return float(ours @ theirs) / size if size else 0.0


def _signal(clip: Clip) -> Iterator[tuple[str, Mean]]:
    silence, clipping = silence_fraction(clip.samples, clip.sampling_rate), clipping_fraction(clip.samples)
    if silence is not None and clipping is not None:
        yield "silence_fraction", Mean(silence, 1)
        yield "clipping_fraction", Mean(clipping, 1)


def _words(clip: HeardClip, said: str) -> Iterator[tuple[str, Mean]]:
    for name, errors in (
        ("wer", word_errors(said, clip.target_text)),
        ("cer", character_errors(said, clip.target_text)),
    ):
        if errors is not None:
            yield name, Mean(errors.wrong, errors.length)
    leaked = leaked_share(said, clip.target_text, clip.reference_text)
    if leaked is not None:
        yield "reference_leak", Mean(leaked, 1)


def _rate(clip: HeardClip, said: str) -> Iterator[tuple[str, Mean]]:
    """Characters per second that is not silent, against the target's."""
    asked, spoken = len(normalize(clip.target_text)), len(normalize(said))
    ours, theirs = _speaking_seconds(clip.generated), _speaking_seconds(clip.target)
    if asked and ours > 0 and theirs > 0:
        yield "speaking_rate", Mean((spoken / ours) / (asked / theirs), 1)


def _speaking_seconds(clip: Clip) -> float:
    return _seconds(clip) - silent_seconds(clip.samples, clip.sampling_rate)


def _use(said: Tensor, target: Tensor) -> Iterator[tuple[str, Mean]]:
    """Different codes against as many frames of the target's, over all codebooks."""
    frames = min(said.shape[1], target.shape[1])
    if frames:
        ours, theirs = (sum(row[:frames].unique().numel() for row in codes) for codes in (said, target))
        yield "codebook_use", Mean(ours / theirs, 1)


def _mel(clip: Clip) -> np.ndarray:
    return log_mel(clip.samples, clip.sampling_rate)


def _seconds(clip: Clip) -> float:
    return seconds(clip.samples, clip.sampling_rate)
