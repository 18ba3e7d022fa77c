"""Zero-shot: is every sample a well-formed voice-cloning prompt, and does the model use the reference voice?"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Protocol

from telemetry.callbacks.trainer import StrategicCallback
from telemetry.instruments.chatml import ChatMLLog
from telemetry.instruments.clips import DEFAULT_CLIPS, MAX_NEW_TOKENS, MAX_SECONDS, ClipLog
from telemetry.instruments.conditioning import ConditioningLog
from telemetry.instruments.reference import ReferenceLog
from telemetry.probes.forward import Microbatch
from telemetry.session import Session
from telemetry.speech.base import SpeakerEncoder, Transcriber


class Part(Protocol):
    """One thing that the callback looks at. A part that fails is switched off alone."""

    def begin(self, session: Session) -> None:
        """A due step begins: forget what one that was interrupted left behind."""

    def observe_inputs(self, microbatch: Microbatch) -> None:
        """The model is about to run on a microbatch of a due step."""

    def finish(self) -> None:
        """The due step has ended: add what is shown once a step, and let go of everything."""


class ZeroShotVerificationLoggerCallback(StrategicCallback):
    """Everything under ``zero_shot/``: ChatML compliance, reference audio, and what the model makes of it.

    Args:
        args, kwargs: as for every callback.
        conditioning_every: measure the conditioning gain every so many due steps, beginning with the first, and at
            every evaluation: three forward passes. 0 never.
        clips, speaker_encoder, transcriber, max_new_tokens: what the model says freely at every evaluation, and what
            listens to it: see :class:`telemetry.instruments.clips.ClipLog`. 0 clips never.
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
        self.clips = ClipLog(clips, speaker_encoder, transcriber, max_new_tokens, clips_max_seconds)
        self.conditioning = ConditioningLog(conditioning_every)
        self.parts: list[Part] = [ReferenceLog(), ChatMLLog(), self.conditioning]

    def begin_step(self) -> None:
        """A due step begins."""
        for part in self.parts:
            self.session.guard(part, part.begin, self.session)

    def observe_inputs(self, microbatch: Microbatch) -> None:
        """Let every part measure one microbatch."""
        for part in self.parts:
            self.session.guard(part, part.observe_inputs, microbatch)

    def finish_step(self) -> None:
        """Let every part show what the step holds."""
        for part in self.parts:
            self.session.guard(part, part.finish)

    def observe_evaluation(self, batches: Iterable[Mapping[str, Any]]) -> None:
        """Let the parts that look at evaluation batches do so."""
        self.session.guard(self.conditioning, self.conditioning.observe_evaluation, self.session, batches)
        self.session.guard(self.clips, self.clips.observe_evaluation, self.session, batches)
