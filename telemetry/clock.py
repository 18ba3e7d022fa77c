"""What telemetry takes of the training thread on one step."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator


class StepClock:
    """Runs from its making to the end of the step.

    Attributes:
        spent: seconds that telemetry has taken so far.
    """

    def __init__(self) -> None:
        self.spent = 0.0
        self._began = time.perf_counter()

    def step_seconds(self) -> float:
        """Seconds since the step began."""
        return time.perf_counter() - self._began

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Count the time inside."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self.spent += time.perf_counter() - began
