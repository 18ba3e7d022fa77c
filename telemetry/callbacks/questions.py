"""The public callbacks: one for each question, and all of them at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from telemetry.backends.base import Backend
from telemetry.callbacks.trainer import StrategicCallback, TrainerDoor
from telemetry.instruments import questions
from telemetry.instruments.attention import DEFAULT_QUERIES
from telemetry.instruments.clips import DEFAULT_CLIPS, MAX_NEW_TOKENS, MAX_SECONDS
from telemetry.session import DEFAULT_LOGGING_STEPS, Session
from telemetry.sound import SoundPolicy
from telemetry.speech.base import SpeakerEncoder, Transcriber


class InputLoggerCallback(StrategicCallback):
    """Inputs: is the data what I think it is? Everything under ``inputs/``.

    Takes the arguments of :class:`StrategicCallback`.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.instruments += questions.inputs()


class OutputLoggerCallback(StrategicCallback):
    """Outputs: what does the model predict, per stream? Everything under ``outputs/``.

    Takes the arguments of :class:`StrategicCallback`.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.instruments += questions.outputs()


class SharedAttentionLoggerCallback(StrategicCallback):
    """Shared attention: do text and audio look at each other, and does every part learn?

    Everything under ``attention/``, ``activations/`` and ``gradients/``. Takes the arguments of
    :class:`StrategicCallback` and, by name, those of :func:`telemetry.instruments.questions.shared_attention`.
    """

    def __init__(
        self,
        *args: Any,
        layers: Sequence[int] | None = None,
        queries: int = DEFAULT_QUERIES,
        text_audio_cosine: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.instruments += questions.shared_attention(layers, queries, text_audio_cosine)


class ZeroShotVerificationLoggerCallback(StrategicCallback):
    """Zero-shot: is every sample a well-formed voice-cloning prompt, and does the model use the reference voice?

    Everything under ``zero_shot/``. Takes the arguments of :class:`StrategicCallback` and, by name, those of
    :func:`telemetry.instruments.questions.zero_shot`.
    """

    def __init__(
        self,
        *args: Any,
        conditioning_every: int = 5,
        clips: int = DEFAULT_CLIPS,
        speaker_encoder: SpeakerEncoder | str | None = None,
        transcriber: Transcriber | str | None = None,
        max_new_tokens: int = MAX_NEW_TOKENS,
        clips_max_seconds: float = MAX_SECONDS,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.instruments += questions.zero_shot(
            conditioning_every, clips, speaker_encoder, transcriber, max_new_tokens, clips_max_seconds
        )


COMPONENTS: dict[str, type[StrategicCallback]] = {
    "inputs": InputLoggerCallback,
    "outputs": OutputLoggerCallback,
    "shared_attention": SharedAttentionLoggerCallback,
    "zero_shot": ZeroShotVerificationLoggerCallback,
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
