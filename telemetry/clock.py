"""What telemetry costs: of the training thread on one step, and of training altogether."""

from __future__ import annotations

import contextlib
import statistics
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import NamedTuple

_COUNTED = contextlib.nullcontext()
_SLOWED = 1 / 2  # of what telemetry takes itself: by at most so much it slows down what is around it
_AROUND = 1 / 5  # of that: by about so much, where no other steps show it
_OTHERS = 3  # steps at least that a due step and the next are compared with
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
        spent: that telemetry took of the due step.
        longer: that the due step before and the one after it took longer than others, beside what telemetry took of
            the training thread: below 0 where they had less to do. None where there are too few others.
    """

    seconds: float
    waited: float
    computed: float
    spent: float
    longer: float | None


class Overhead:
    """The share of the time that telemetry costs a training, from due step to due step.

    It costs what it takes of the training thread; and the training thread goes slower around that, and while
    telemetry's own threads work: it waits for the interpreter or for a core, and caches are emptied. Where there are
    other steps, a due step and the next show it by how much longer they take. Steps differ by their batches too: it is
    averaged, and at most what those threads computed and a share of what telemetry itself takes.

    Where every step is due, or nearly, it is estimated: what the training thread waited outside of telemetry, where it
    waits for a device and for data too, or what telemetry's own threads computed, the lesser of the two; and a part of
    what telemetry takes itself, as it was measured on small models.

    Args:
        background: processor seconds that telemetry's own threads have taken so far.
    """

    def __init__(self, background: Callable[[], float]) -> None:
        self._background = background
        self._before: tuple[float, float, float] | None = None
        self._thread = 0
        self._took: float | None = None  # of the last due step
        self._owed = (0.0, 0.0)
        self._periods: deque[_Period] = deque(maxlen=_SMOOTHED)

    def owe(self, clock: StepClock) -> None:
        """Count what telemetry took beside the due step that comes next."""
        self._owed = self._owed[0] + clock.spent, self._owed[1] + clock.computed

    def share(self, clock: StepClock, each: Sequence[float] = ()) -> float:
        """Return the share since the last due step, 0 to 1; of the first, since it began.

        Args:
            clock: what telemetry has taken of the due step.
            each: seconds of the last due step, and of each step since; none where they are not known.
        """
        now = time.perf_counter(), time.thread_time(), self._background()
        before, self._before = self._before, now
        thread, self._thread = self._thread, threading.get_ident()
        first = before is None or thread != self._thread  # another thread's processor seconds are no measure of its own
        if before is None or first:
            before, self._owed, self._took = (*clock.began, now[2]), (0.0, 0.0), None
        seconds, computed, background = (new - old for new, old in zip(now, before, strict=True))
        spent = clock.spent + self._owed[0]
        outside = max(0.0, seconds - spent)
        own = max(0.0, computed - clock.computed - self._owed[1])
        longer = None
        if self._took is not None and len(each) >= 2 + _OTHERS:
            longer = each[0] + each[1] - 2 * statistics.fmean(each[2:]) - self._took
        self._owed, self._took = (0.0, 0.0), clock.spent
        # On a machine with other work a second of computing takes longer, here as in the background.
        stretch = clock.spent / clock.computed if 0 < clock.computed < clock.spent else 1.0
        self._periods.append(_Period(seconds, max(0.0, outside - own), background * stretch, clock.spent, longer))
        if seconds <= 0:
            return 1.0
        slower = self._slower()
        if slower is None:
            slower = self._waited() + (0.0 if first else _AROUND * clock.spent / seconds)  # set-up checks are no rule
        return min(1.0, spent / seconds + slower)

    def _slower(self) -> float | None:
        """By what share training is slower, beside what telemetry takes; None where no other steps show it."""
        compared = [one for one in self._periods if one.longer is not None]
        if not compared:
            return None
        most = sum(one.computed + _SLOWED * one.spent for one in compared)
        return min(max(0.0, sum(one.longer or 0.0 for one in compared)), most) / sum(one.seconds for one in compared)

    def _waited(self) -> float:
        """What share the training thread may have waited for the background, which is counted some steps later."""
        total, waited, computed = (sum(part) for part in zip(*(one[:3] for one in self._periods), strict=True))
        return min(waited, computed) / total
