"""The questions that telemetry answers, each a list of instruments."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from telemetry.instruments.activations import ActivationInstrument
from telemetry.instruments.asked import AskedLabels
from telemetry.instruments.attention import DEFAULT_QUERIES, AttentionInstrument
from telemetry.instruments.base import Instrument
from telemetry.instruments.causality import CausalityInstrument
from telemetry.instruments.chatml import ChatMLInstrument
from telemetry.instruments.clips import DEFAULT_CLIPS, MAX_NEW_TOKENS, MAX_SECONDS, ClipInstrument
from telemetry.instruments.conditioning import ConditioningInstrument
from telemetry.instruments.every_step import EveryStepInstrument
from telemetry.instruments.gradients import GradientInstrument
from telemetry.instruments.inputs import InputInstrument
from telemetry.instruments.outputs import OutputInstrument
from telemetry.instruments.reference import ReferenceInstrument
from telemetry.instruments.setup import SetupInstrument
from telemetry.instruments.text_audio_cosine import TextAudioCosine
from telemetry.instruments.throughput import ThroughputInstrument
from telemetry.instruments.transcripts import TranscriptInstrument
from telemetry.speech.base import OpinionScorer, SpeakerEncoder, Transcriber


def inputs() -> list[Instrument]:
    """Return what asks: is the data what I think it is, and the training the one that I meant?"""
    return [InputInstrument(), TranscriptInstrument(), SetupInstrument(), ThroughputInstrument()]


def outputs() -> list[Instrument]:
    """Return what asks: what does the model predict, per stream, and what is it asked for?"""
    return [OutputInstrument(), EveryStepInstrument(), AskedLabels(), CausalityInstrument()]


def shared_attention(
    layers: Sequence[int] | None = None, queries: int = DEFAULT_QUERIES, text_audio_cosine: bool = False
) -> list[Instrument]:
    """Return what asks: do text and audio look at each other, and does every part learn?

    Args:
        layers: indices of the layers to look into; by default the first, the middle and the last.
        queries: how many positions of each sequence have their attention looked at.
        text_audio_cosine: also measure ``gradients/text_audio_cosine``, for a forward and two backward passes more on
            every due step.

    Raises:
        ValueError: for a layer below 0, or fewer than one query.
    """
    found = [AttentionInstrument(layers, queries), ActivationInstrument(layers), GradientInstrument()]
    return [*found, TextAudioCosine()] if text_audio_cosine else found


def zero_shot(
    conditioning_every: int = 5,
    clips: int = DEFAULT_CLIPS,
    speaker_encoder: SpeakerEncoder | str | None = None,
    transcriber: Transcriber | str | None = None,
    max_new_tokens: int = MAX_NEW_TOKENS,
    clips_max_seconds: float = MAX_SECONDS,
    opinion_scorer: OpinionScorer | str | None = None,
) -> list[Instrument]:
    """Return what asks: is every sample a well-formed prompt, and does the model use the reference voice?

    Args:
        conditioning_every: measure the conditioning gain every so many due steps, beginning with the first, and at
            every evaluation: four forward passes. 0 never.
        clips, speaker_encoder, transcriber, opinion_scorer, max_new_tokens: what the model says freely at every
            evaluation, and what listens to it: see :class:`telemetry.instruments.clips.ClipInstrument`. 0 clips never.
        clips_max_seconds: wall time that the clips of one evaluation may take.

    Raises:
        ValueError: when a number is out of range, or what listens cannot be loaded.
    """
    return [
        ReferenceInstrument(),
        ChatMLInstrument(),
        ConditioningInstrument(conditioning_every),
        ClipInstrument(clips, speaker_encoder, transcriber, max_new_tokens, clips_max_seconds, opinion_scorer),
    ]


QUESTIONS: dict[str, Callable[..., list[Instrument]]] = {
    "inputs": inputs,
    "outputs": outputs,
    "shared_attention": shared_attention,
    "zero_shot": zero_shot,
}


def choose(components: Sequence[str] | None, options: Mapping[str, Mapping[str, Any]] | None) -> list[Instrument]:
    """Return the instruments of the chosen questions, of all by default, each made with its further arguments.

    Raises:
        ValueError: for a question that does not exist, options for one that is not chosen, or no question at all.
    """
    chosen = list(QUESTIONS) if components is None else list(dict.fromkeys(components))
    unknown = [name for name in chosen if name not in QUESTIONS]
    if unknown or not chosen:
        raise ValueError(f"unknown components {unknown}: choose from {', '.join(QUESTIONS)}")
    given = {name: dict(arguments) for name, arguments in (options or {}).items() if arguments}
    unknown = [name for name in given if name not in chosen]
    if unknown:
        raise ValueError(f"options for {unknown}, which are not among the components {chosen}")
    return [instrument for name in chosen for instrument in QUESTIONS[name](**given.get(name, {}))]
