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
    from telemetry.callbacks.shared_attention import SharedAttentionLoggerCallback
    from telemetry.callbacks.strategic import COMPONENTS, StrategicTelemetry
    from telemetry.callbacks.trainer import StrategicCallback
    from telemetry.callbacks.zero_shot import ZeroShotVerificationLoggerCallback
    from telemetry.instruments.inputs import InputLoggerCallback
    from telemetry.instruments.outputs import OutputLoggerCallback
    from telemetry.logs import setup_logging
    from telemetry.sound import SoundPolicy

_HOMES = {
    "COMPONENTS": "telemetry.callbacks.strategic",
    "ConsoleBackend": "telemetry.backends.console",
    "DESTINATIONS": "telemetry.backends.registry",
    "InputLoggerCallback": "telemetry.instruments.inputs",
    "OutputLoggerCallback": "telemetry.instruments.outputs",
    "SharedAttentionLoggerCallback": "telemetry.callbacks.shared_attention",
    "SoundPolicy": "telemetry.sound",
    "StrategicCallback": "telemetry.callbacks.trainer",
    "StrategicTelemetry": "telemetry.callbacks.strategic",
    "TensorBoardBackend": "telemetry.backends.tensorboard",
    "TrackioBackend": "telemetry.backends.trackio",
    "WandbBackend": "telemetry.backends.wandb",
    "ZeroShotVerificationLoggerCallback": "telemetry.callbacks.zero_shot",
    "backends_for": "telemetry.backends.registry",
    "launch_command": "telemetry.backends.tensorboard",
    "setup_logging": "telemetry.logs",
}

__all__ = [
    "COMPONENTS",
    "DESTINATIONS",
    "ConsoleBackend",
    "InputLoggerCallback",
    "OutputLoggerCallback",
    "SharedAttentionLoggerCallback",
    "SoundPolicy",
    "StrategicCallback",
    "StrategicTelemetry",
    "TensorBoardBackend",
    "TrackioBackend",
    "WandbBackend",
    "ZeroShotVerificationLoggerCallback",
    "backends_for",
    "launch_command",
    "setup_logging",
]


def __getattr__(name: str) -> Any:
    # Backends and measures are usable without importing transformers, which takes seconds.
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
