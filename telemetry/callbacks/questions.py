"""The public callbacks: one for each question, and all of them at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from telemetry.backends.base import Backend
from telemetry.callbacks.trainer import StrategicCallback, TrainerDoor
from telemetry.instruments import questions
from telemetry.session import DEFAULT_LOGGING_STEPS, Session
from telemetry.sound import SoundPolicy


class _QuestionCallback(StrategicCallback):
    """A callback for one of :data:`telemetry.instruments.questions.QUESTIONS`."""

    question = ""

    def __init__(
        self,
        logging_steps: int = DEFAULT_LOGGING_STEPS,
        backends: Sequence[Backend] | None = None,
        logging_dir: str | Path | None = None,
        sound: SoundPolicy | None = None,
        **options: Any,
    ) -> None:
        instruments = questions.QUESTIONS[self.question](**options)
        super().__init__(logging_steps, backends, logging_dir, sound, instruments)


class InputLoggerCallback(_QuestionCallback):
    """Inputs: is the data what I think it is? Everything under ``inputs/``.

    Takes the arguments of :class:`StrategicCallback`.
    """

    question = "inputs"


class OutputLoggerCallback(_QuestionCallback):
    """Outputs: what does the model predict, per stream? Everything under ``outputs/``.

    Takes the arguments of :class:`StrategicCallback`.
    """

    question = "outputs"


class SharedAttentionLoggerCallback(_QuestionCallback):
    """Shared attention: do text and audio look at each other, and does every part learn?

    Everything under ``attention/``, ``activations/`` and ``gradients/``. Takes the arguments of
    :class:`StrategicCallback` and, by name, those of :func:`telemetry.instruments.questions.shared_attention`.
    """

    question = "shared_attention"


class ZeroShotVerificationLoggerCallback(_QuestionCallback):
    """Zero-shot: is every sample a well-formed voice-cloning prompt, and does the model use the reference voice?

    Everything under ``zero_shot/``. Takes the arguments of :class:`StrategicCallback` and, by name, those of
    :func:`telemetry.instruments.questions.zero_shot`.
    """

    question = "zero_shot"


COMPONENTS: dict[str, type[StrategicCallback]] = {
    kind.question: kind
    for kind in (
        InputLoggerCallback,
        OutputLoggerCallback,
        SharedAttentionLoggerCallback,
        ZeroShotVerificationLoggerCallback,
    )
}


class StrategicTelemetry(TrainerDoor):
    """All questions at once: one callback with a member for each.

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
        super().__init__()
        self.members = [
            COMPONENTS[name](logging_steps, backends, logging_dir, sound=sound, **given)
            for name, given in questions.choose(components, options).items()
        ]
        self.logging_steps = logging_steps

    def is_due(self, step: int) -> bool:
        """Return whether an optimizer step is measured: its members are due together."""
        return self.members[0].is_due(step)

    def _watch(self, session: Session | None) -> None:
        super()._watch(session)
        for member in self.members:
            member._watch(session)
