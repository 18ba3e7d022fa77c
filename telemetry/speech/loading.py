"""Loads a speaker encoder, a transcriber and an opinion scorer by name, directory or hub id, when asked for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from telemetry.probes.quiet import set_aside
from telemetry.speech.base import OpinionScorer, SpeakerEncoder, Transcriber


def load_speaker_encoder(name: str) -> SpeakerEncoder:
    """Load ``resemblyzer``, or the x-vector model at a directory or hub id.

    Raises:
        ValueError: when there is none; says the name, the reason and what to give.
    """
    wanted = "resemblyzer, or a directory or hub id of an x-vector model, such as microsoft/wavlm-base-plus-sv"
    with _loading("speaker encoder", name, wanted):
        if name == "resemblyzer":
            from telemetry.speech.packaged import Resemblyzer

            return Resemblyzer()
        from telemetry.speech.speaker import XVectorEncoder

        return XVectorEncoder(name)


def load_transcriber(name: str) -> Transcriber:
    """Load ``pocketsphinx``, or the speech recognition model at a directory or hub id.

    Raises:
        ValueError: when there is none; says the name, the reason and what to give.
    """
    wanted = "pocketsphinx, or a directory or hub id of a speech recognition model, such as openai/whisper-small"
    with _loading("transcriber", name, wanted):
        if name == "pocketsphinx":
            from telemetry.speech.packaged import PocketSphinx

            return PocketSphinx()
        from telemetry.speech.transcriber import PipelineTranscriber

        return PipelineTranscriber(name)


def load_opinion_scorer(name: str) -> OpinionScorer:
    """Load ``dnsmos``.

    Raises:
        ValueError: when it is not that or not installed; says the name, the reason and what to give.
    """
    with _loading("opinion scorer", name, "dnsmos, or an object with a method score(samples, sampling_rate)"):
        if name != "dnsmos":
            raise ValueError("there is none of this name.")
        from telemetry.speech.packaged import Dnsmos

        return Dnsmos()


@contextmanager
def _loading(what: str, name: str, wanted: str) -> Iterator[None]:
    try:
        with set_aside(nn.Module()):  # weights are made at random before they are read: training must not notice
            yield
    except Exception as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)  # transformers adds tracebacks
        raise ValueError(f"cannot load the {what} {name!r}: {reason} Give {wanted}") from error
