"""Strategic telemetry: what happens inside a training step, as scalars, tables, images and sound."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from telemetry.backends.console import ConsoleBackend
    from telemetry.backends.registry import DESTINATIONS, backends_for
    from telemetry.backends.tensorboard import TensorBoardBackend, launch_command
    from telemetry.backends.trackio import TrackioBackend
    from telemetry.backends.wandb import WandbBackend
    from telemetry.callbacks.questions import (
        COMPONENTS,
        InputLoggerCallback,
        OutputLoggerCallback,
        SharedAttentionLoggerCallback,
        StrategicTelemetry,
        ZeroShotVerificationLoggerCallback,
    )
    from telemetry.callbacks.trainer import StrategicCallback
    from telemetry.families.base import Family, LossPart, Stream, reads
    from telemetry.families.codec_tokens import CodecTokens
    from telemetry.instruments.base import Instrument, Step
    from telemetry.instruments.data_set import DataReport, check_data
    from telemetry.logs import printable, setup_logging
    from telemetry.loop import Telemetry
    from telemetry.sound import SoundPolicy
    from telemetry.speech.loading import load_speaker_encoder, load_transcriber

_HOMES = {
    "COMPONENTS": "telemetry.callbacks.questions",
    "CodecTokens": "telemetry.families.codec_tokens",
    "DataReport": "telemetry.instruments.data_set",
    "ConsoleBackend": "telemetry.backends.console",
    "DESTINATIONS": "telemetry.backends.registry",
    "Family": "telemetry.families.base",
    "InputLoggerCallback": "telemetry.callbacks.questions",
    "Instrument": "telemetry.instruments.base",
    "LossPart": "telemetry.families.base",
    "OutputLoggerCallback": "telemetry.callbacks.questions",
    "SharedAttentionLoggerCallback": "telemetry.callbacks.questions",
    "SoundPolicy": "telemetry.sound",
    "Step": "telemetry.instruments.base",
    "StrategicCallback": "telemetry.callbacks.trainer",
    "StrategicTelemetry": "telemetry.callbacks.questions",
    "Stream": "telemetry.families.base",
    "Telemetry": "telemetry.loop",
    "TensorBoardBackend": "telemetry.backends.tensorboard",
    "TrackioBackend": "telemetry.backends.trackio",
    "WandbBackend": "telemetry.backends.wandb",
    "ZeroShotVerificationLoggerCallback": "telemetry.callbacks.questions",
    "check_data": "telemetry.instruments.data_set",
    "backends_for": "telemetry.backends.registry",
    "load_speaker_encoder": "telemetry.speech.loading",
    "load_transcriber": "telemetry.speech.loading",
    "launch_command": "telemetry.backends.tensorboard",
    "printable": "telemetry.logs",
    "reads": "telemetry.families.base",
    "setup_logging": "telemetry.logs",
}

__all__ = [
    "COMPONENTS",
    "DESTINATIONS",
    "CodecTokens",
    "ConsoleBackend",
    "DataReport",
    "Family",
    "InputLoggerCallback",
    "Instrument",
    "LossPart",
    "OutputLoggerCallback",
    "SharedAttentionLoggerCallback",
    "SoundPolicy",
    "Step",
    "StrategicCallback",
    "StrategicTelemetry",
    "Stream",
    "Telemetry",
    "TensorBoardBackend",
    "TrackioBackend",
    "WandbBackend",
    "ZeroShotVerificationLoggerCallback",
    "backends_for",
    "check_data",
    "launch_command",
    "load_speaker_encoder",
    "load_transcriber",
    "printable",
    "reads",
    "setup_logging",
]


def __getattr__(name: str) -> Any:
    # Backends and measures are usable without importing transformers, which takes seconds.
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
