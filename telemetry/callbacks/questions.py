"""The public callbacks: one for each question, and all of them at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from telemetry.backends.base import Backend
from telemetry.callbacks.trainer import StrategicCallback
from telemetry.families.base import FamilyMaker
from telemetry.instruments.attention import DEFAULT_QUERIES
from telemetry.instruments.base import Instrument
from telemetry.instruments.clips import DEFAULT_CLIPS, MAX_NEW_TOKENS, MAX_SECONDS
from telemetry.instruments.questions import choose
from telemetry.session import DEFAULT_LOGGING_STEPS
from telemetry.sound import SoundPolicy
from telemetry.speech.base import OpinionScorer, SpeakerEncoder, Transcriber


class InputLoggerCallback(StrategicCallback):
    """Inputs: is the data what I think it is? Everything under ``inputs/``."""

    question = "inputs"


class OutputLoggerCallback(StrategicCallback):
    """Outputs: what does the model predict, per stream? Everything under ``outputs/``."""

    question = "outputs"


class SharedAttentionLoggerCallback(StrategicCallback):
    """Shared attention: do text and audio look at each other, and does every part learn?

    Everything under ``attention/``, ``activations/`` and ``gradients/``. See
    :func:`telemetry.instruments.questions.shared_attention`.
    """

    question = "shared_attention"

    def __init__(
        self,
        *args: Any,
        layers: Sequence[int] | None = None,
        queries: int = DEFAULT_QUERIES,
        text_audio_cosine: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, layers=layers, queries=queries, text_audio_cosine=text_audio_cosine, **kwargs)


class ZeroShotVerificationLoggerCallback(StrategicCallback):
    """Zero-shot: is every sample a well-formed voice-cloning prompt, and does the model use the reference voice?

    Everything under ``zero_shot/``. See :func:`telemetry.instruments.questions.zero_shot`.
    """

    question = "zero_shot"

    def __init__(
        self,
        *args: Any,
        conditioning_every: int = 5,
        clips: int = DEFAULT_CLIPS,
        speaker_encoder: SpeakerEncoder | str | None = None,
        transcriber: Transcriber | str | None = None,
        max_new_tokens: int = MAX_NEW_TOKENS,
        clips_max_seconds: float = MAX_SECONDS,
        opinion_scorer: OpinionScorer | str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            *args,
            conditioning_every=conditioning_every,
            clips=clips,
            speaker_encoder=speaker_encoder,
            transcriber=transcriber,
            max_new_tokens=max_new_tokens,
            clips_max_seconds=clips_max_seconds,
            opinion_scorer=opinion_scorer,
            **kwargs,
        )


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
        logging_steps, backends, logging_dir, sound, alert_to, stop_on, health_rules, family: as for each callback
            alone.
        options: further arguments of single components: ``{"shared_attention": {"layers": [0, 5]}}``.
        instruments: further ones of one's own, and what :func:`telemetry.check_data` has found.

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
        alert_to: str | Sequence[str] | None = None,
        stop_on: str | Sequence[str] = (),
        health_rules: str | Path | Mapping[str, Any] | None = None,
        family: FamilyMaker | None = None,
        instruments: Sequence[Instrument] = (),
    ) -> None:
        chosen = [*choose(components, options), *instruments]
        super().__init__(logging_steps, backends, logging_dir, sound, chosen, alert_to, stop_on, health_rules, family)

    @property
    def members(self) -> Sequence[StrategicCallback]:
        """The callbacks that watch: this one, for all of its questions."""
        return (self,)
