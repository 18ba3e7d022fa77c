"""The public callbacks: one for each question, and all of them at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from telemetry.backends.base import Backend
from telemetry.callbacks.trainer import StrategicCallback
from telemetry.instruments.questions import choose
from telemetry.session import DEFAULT_LOGGING_STEPS
from telemetry.sound import SoundPolicy


class InputLoggerCallback(StrategicCallback):
    """Inputs: is the data what I think it is? Everything under ``inputs/``."""

    question = "inputs"


class OutputLoggerCallback(StrategicCallback):
    """Outputs: what does the model predict, per stream? Everything under ``outputs/``."""

    question = "outputs"


class SharedAttentionLoggerCallback(StrategicCallback):
    """Shared attention: do text and audio look at each other, and does every part learn?

    Everything under ``attention/``, ``activations/`` and ``gradients/``. Takes ``layers``, ``queries`` and
    ``text_audio_cosine`` too: see :func:`telemetry.instruments.questions.shared_attention`.
    """

    question = "shared_attention"


class ZeroShotVerificationLoggerCallback(StrategicCallback):
    """Zero-shot: is every sample a well-formed voice-cloning prompt, and does the model use the reference voice?

    Everything under ``zero_shot/``. Takes ``conditioning_every``, ``clips``, ``speaker_encoder``, ``transcriber``,
    ``max_new_tokens`` and ``clips_max_seconds`` too: see :func:`telemetry.instruments.questions.zero_shot`.
    """

    question = "zero_shot"


COMPONENTS: dict[str, type[StrategicCallback]] = {
    "inputs": InputLoggerCallback,
    "outputs": OutputLoggerCallback,
    "shared_attention": SharedAttentionLoggerCallback,
    "zero_shot": ZeroShotVerificationLoggerCallback,
}


class StrategicTelemetry(StrategicCallback):
    """All questions at once.

    Args:
        components: which of :data:`COMPONENTS`; all by default.
        logging_steps, backends, logging_dir, sound: as for each callback alone.
        options: further arguments of single components: ``{"shared_attention": {"layers": [0, 5]}}``.

    Raises:
        ValueError: for a component that does not exist, options for one that is not chosen, or no component at all.
    """

    def __init__(
        self,
        components: Sequence[str] | None = None,
        logging_steps: int = DEFAULT_LOGGING_STEPS,
        backends: Sequence[Backend] | None = None,
        logging_dir: str | Path | None = None,
        options: Mapping[str, Mapping[str, Any]] | None = None,
        sound: SoundPolicy | None = None,
    ) -> None:
        super().__init__(logging_steps, backends, logging_dir, sound, choose(components, options))
