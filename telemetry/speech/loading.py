"""Loads the built-in speaker encoder and transcriber by path, when they are asked for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from telemetry.probes.quiet import set_aside
from telemetry.speech.base import SpeakerEncoder, Transcriber


def load_speaker_encoder(path: str) -> SpeakerEncoder:
    """The speaker encoder at a directory or hub id: :class:`telemetry.speech.speaker.XVectorEncoder`.

    Raises:
        ValueError: when there is none; says the path, the reason and what to give.
    """
    with _loading("speaker encoder", path, "an x-vector model, such as microsoft/wavlm-base-plus-sv"):
        from telemetry.speech.speaker import XVectorEncoder

        return XVectorEncoder(path)


def load_transcriber(path: str) -> Transcriber:
    """The transcriber at a directory or hub id: :class:`telemetry.speech.transcriber.PipelineTranscriber`.

    Raises:
        ValueError: when there is none; says the path, the reason and what to give.
    """
    with _loading("transcriber", path, "a speech recognition model, such as openai/whisper-small"):
        from telemetry.speech.transcriber import PipelineTranscriber

        return PipelineTranscriber(path)


@contextmanager
def _loading(what: str, path: str, wanted: str) -> Iterator[None]:
    try:
        with set_aside(nn.Module()):  # weights are made at random before they are read: training must not notice
            yield
    except Exception as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)  # transformers adds tracebacks
        raise ValueError(f"cannot load the {what} {path!r}: {reason} Give a directory or hub id of {wanted}") from error
