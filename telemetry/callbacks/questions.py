"""The public callbacks: one for each question, and all of them at once. Each is a list of instruments."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from telemetry.backends.base import Backend
from telemetry.callbacks.trainer import DEFAULT_LOGGING_STEPS, StrategicCallback, TrainerDoor
from telemetry.instruments.activations import ActivationInstrument
from telemetry.instruments.attention import DEFAULT_QUERIES, AttentionInstrument
from telemetry.instruments.chatml import ChatMLInstrument
from telemetry.instruments.clips import DEFAULT_CLIPS, MAX_NEW_TOKENS, MAX_SECONDS, ClipInstrument
from telemetry.instruments.conditioning import ConditioningInstrument
from telemetry.instruments.gradients import GradientInstrument
from telemetry.instruments.inputs import InputInstrument
from telemetry.instruments.outputs import OutputInstrument
from telemetry.instruments.reference import ReferenceInstrument
from telemetry.instruments.text_audio_cosine import TextAudioCosine
from telemetry.session import Session
from telemetry.sound import SoundPolicy
from telemetry.speech.base import SpeakerEncoder, Transcriber


class InputLoggerCallback(StrategicCallback):
    """Inputs: is the data what I think it is? Everything under ``inputs/``.

    Args:
        args, kwargs: as of every :class:`StrategicCallback`.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.instruments.append(InputInstrument())


class OutputLoggerCallback(StrategicCallback):
    """Outputs: what does the model predict, per stream? Everything under ``outputs/``.

    Args:
        args, kwargs: as of every :class:`StrategicCallback`.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.instruments.append(OutputInstrument())


class SharedAttentionLoggerCallback(StrategicCallback):
    """Shared attention: do text and audio look at each other, and does every part learn?

    Everything under ``attention/``, ``activations/`` and ``gradients/``.

    Args:
        args, kwargs: as of every :class:`StrategicCallback`.
        layers: indices of the layers to look into; by default the first, the middle and the last.
        queries: how many positions of each sequence have their attention looked at.
        text_audio_cosine: also measure ``gradients/text_audio_cosine``, for a forward and two backward passes more on
            every due step.

    Raises:
        ValueError: for a layer below 0, or fewer than one query.
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
        self.instruments += [AttentionInstrument(layers, queries), ActivationInstrument(layers), GradientInstrument()]
        self.instruments += [TextAudioCosine()] if text_audio_cosine else []


class ZeroShotVerificationLoggerCallback(StrategicCallback):
    """Zero-shot: is every sample a well-formed voice-cloning prompt, and does the model use the reference voice?

    Everything under ``zero_shot/``.

    Args:
        args, kwargs: as of every :class:`StrategicCallback`.
        conditioning_every: measure the conditioning gain every so many due steps, beginning with the first, and at
            every evaluation: three forward passes. 0 never.
        clips, speaker_encoder, transcriber, max_new_tokens: what the model says freely at every evaluation, and what
            listens to it: see :class:`telemetry.instruments.clips.ClipInstrument`. 0 clips never.
        clips_max_seconds: wall time that the clips of one evaluation may take.
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
        self.clips = ClipInstrument(clips, speaker_encoder, transcriber, max_new_tokens, clips_max_seconds)
        self.conditioning = ConditioningInstrument(conditioning_every)
        self.instruments += [ReferenceInstrument(), ChatMLInstrument(), self.conditioning, self.clips]


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
        chosen = list(COMPONENTS) if components is None else list(dict.fromkeys(components))
        unknown = [name for name in chosen if name not in COMPONENTS]
        if unknown or not chosen:
            raise ValueError(f"unknown components {unknown}: choose from {', '.join(COMPONENTS)}")
        given = {name: dict(arguments) for name, arguments in (options or {}).items() if arguments}
        unknown = [name for name in given if name not in chosen]
        if unknown:
            raise ValueError(f"options for {unknown}, which are not among the components {chosen}")
        self.members = [
            COMPONENTS[name](logging_steps, backends, logging_dir, sound=sound, **given.get(name, {}))
            for name in chosen
        ]
        self.logging_steps = logging_steps

    def is_due(self, step: int) -> bool:
        """Return whether an optimizer step is measured: its members are due together."""
        return self.members[0].is_due(step)

    def _watch(self, session: Session | None) -> None:
        super()._watch(session)
        for member in self.members:
            member._watch(session)
