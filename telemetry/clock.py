"""What telemetry costs: of the training thread on one step, and of training altogether."""

from __future__ import annotations

import contextlib
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import NamedTuple

_COUNTED = contextlib.nullcontext()
_SLOWED = 1 / 3  # of what telemetry takes itself: on small models, whose weights caches hold, it was a quarter
_SMOOTHED = 8  # due steps over which what the background does is set against what the training thread waits


class StepClock:
    """Runs from its making to the end of the step.

    Attributes:
        began: when it was made: seconds, and the training thread's processor seconds.
        spent: seconds that telemetry has taken so far.
        computed: processor seconds of them; while telemetry waits it takes none.
    """

    def __init__(self) -> None:
        self.spent = 0.0
        self.computed = 0.0
        self.began = time.perf_counter(), time.thread_time()
        self._since: tuple[float, float] | None = None

    def step_seconds(self) -> float:
        """Seconds since the step began."""
        return time.perf_counter() - self.began[0]

    def running(self) -> contextlib.AbstractContextManager[object]:
        """Count the time inside, once where it is counted already."""
        return self if self._since is None else _COUNTED

    def __enter__(self) -> None:
        self._since = time.perf_counter(), time.thread_time()

    def __exit__(self, *error: object) -> None:
        assert self._since is not None
        (seconds, computed), self._since = self._since, None
        self.spent += time.perf_counter() - seconds
        self.computed += time.thread_time() - computed


class _Period(NamedTuple):
    """Seconds from one due step to the next.

    Attributes:
        seconds: in all.
        waited: that the training thread waited outside of telemetry.
        computed: that the background computed.
        spent: that telemetry took of the training thread.
        slowed: that the training thread computed longer on the due step, outside of telemetry, than on others: below 0
            where that step had less to do.
    """

    seconds: float
    waited: float
    computed: float
    spent: float
    slowed: float


class Overhead:
    """The share of the time that telemetry costs a training, from due step to due step.

    It costs what it takes of the training thread. And its own threads make the training thread wait: for the
    interpreter, or for a core. That is at most what they computed, and at most what the training thread waited outside
    of telemetry, where it waits for a device and for data too: the lesser of the two. What hooks slow down around
    themselves, by caches that they empty, shows where there are other steps to compare a due step with, and is at most
    a share of what telemetry itself takes: steps differ by their batches too. Where every step is due, it is not in it.

    Args:
        background: processor seconds that telemetry's own threads have taken so far.
    """

    def __init__(self, background: Callable[[], float]) -> None:
        self._background = background
        self._before: tuple[float, float, float] | None = None
        self._thread = 0
        self._owed = (0.0, 0.0)
        self._periods: deque[_Period] = deque(maxlen=_SMOOTHED)

    def owe(self, clock: StepClock) -> None:
        """Count what telemetry took beside the due step that comes next."""
        self._owed = self._owed[0] + clock.spent, self._owed[1] + clock.computed

    def share(self, clock: StepClock, steps: int = 1) -> float:
        """Return the share since the last due step, 0 to 1; of the first, since it began.

        Args:
            clock: what telemetry has taken of the due step.
            steps: optimizer steps since the last due step, this one included.
        """
        now = time.perf_counter(), time.thread_time(), self._background()
        before, self._before = self._before, now
        thread, self._thread = self._thread, threading.get_ident()
        if before is None or thread != self._thread:  # another thread's processor seconds are no measure of this one's
            before, self._owed, steps = (*clock.began, now[2]), (0.0, 0.0), 1
        seconds, computed, background = (new - old for new, old in zip(now, before, strict=True))
        spent = clock.spent + self._owed[0]
        outside = max(0.0, seconds - spent)
        own = max(0.0, computed - clock.computed - self._owed[1])
        slowed = 0.0
        if steps > 1:
            due = now[1] - clock.began[1] - clock.computed
            slowed = due - (own - due) / (steps - 1)
        self._owed = (0.0, 0.0)
        # On a machine with other work a second of computing takes longer, here as in the background.
        stretch = clock.spent / clock.computed if 0 < clock.computed < clock.spent else 1.0
        self._periods.append(_Period(seconds, max(0.0, outside - own), background * stretch, spent, slowed * stretch))
        # A job of the background may be counted a step after it was waited for.
        total, waited, computed, taken, slowed = (sum(part) for part in zip(*self._periods, strict=True))
        slowed = min(max(0.0, slowed), _SLOWED * taken)
        if total <= 0 or seconds <= 0:
            return 1.0
        return min(1.0, spent / seconds + (min(waited, computed) + slowed) / total)
