"""Zero-shot: is every sample a well-formed voice-cloning prompt, and does the model use the reference voice?"""

from __future__ import annotations

from typing import Any, Protocol

from telemetry.callbacks.base import StrategicCallback
from telemetry.callbacks.chatml_log import ChatMLLog
from telemetry.callbacks.reference_log import ReferenceLog
from telemetry.callbacks.session import Session
from telemetry.probes.forward import Microbatch


class Part(Protocol):
    """One thing that the callback looks at. A part that fails is switched off alone."""

    def begin(self, session: Session) -> None:
        """A due step begins: forget what one that was interrupted left behind."""

    def observe_inputs(self, microbatch: Microbatch) -> None:
        """The model is about to run on a microbatch of a due step."""

    def finish(self) -> None:
        """The due step has ended: add what is shown once a step, and let go of everything."""


class ZeroShotVerificationLoggerCallback(StrategicCallback):
    """Everything under ``zero_shot/``: ChatML compliance and reference audio."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.parts: list[Part] = [ReferenceLog(), ChatMLLog()]

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
