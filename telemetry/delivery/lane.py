"""One backend with a queue and a thread of its own: what it does, and how long it takes, is nobody else's business."""

from __future__ import annotations

import functools
import logging
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from telemetry.backends.base import Backend, Run, is_on_every_rank
from telemetry.delivery.losses import Losses
from telemetry.delivery.measured import Job, Measured
from telemetry.delivery.worker import Worker
from telemetry.records import Record

MAX_FAILURES = 3

logger = logging.getLogger(__name__)


class Lane:
    """The way to one backend. Nothing here raises or waits, but :meth:`drain`.

    A backend that fails is reported once, and left out after :data:`MAX_FAILURES` failures, or when it could not be
    opened. What it is given and does not show is counted.

    Args:
        backend: every call of it is made on this lane's thread, but ``abandon``.
        losses: where lost records are counted.
        max_bytes: how much may wait; beyond that the oldest media are dropped first, and numbers last.

    Attributes:
        every_rank: whether the backend is given each rank's own scalars.
        learns_late: whether the backend knows at its end only what it has lost.
        given_up: whether the backend did not end in time.
    """

    def __init__(self, backend: Backend, losses: Losses, max_bytes: int) -> None:
        self.name = backend.name
        self.every_rank = is_on_every_rank(backend)
        self._backend = backend
        self._losses = losses
        self._catch_up: Callable[[bool], bool] | None = getattr(backend, "catch_up", None)
        self.learns_late = self._catch_up is not None
        idle = functools.partial(self._catches_up, last=False) if self.learns_late else None
        self._worker = Worker(self._work, max_bytes, losses.add, idle)
        self._run: Run | None = None
        self._opened = False
        self._active = True
        self._failures = 0
        self._reported = _reported(backend)
        self._at_stake = 0  # records of the call that is being made
        self.given_up = False
        self._lock = threading.Lock()

    @property
    def waiting(self) -> int:
        """Steps that the backend has not begun to write."""
        return self._worker.waiting

    @property
    def computed(self) -> float:
        """Processor seconds that the backend has taken on its thread."""
        return self._worker.computed

    def open(self, run: Run) -> None:
        """Have the backend opened."""
        self._run = run
        self._worker.put(Job(0, 0.0, Measured()))

    def put(self, step: int, at: float, records: Sequence[Record]) -> None:
        """Have the records of a step written that was handed over at ``at``, in seconds since the epoch."""
        if hasattr(self._backend, "newest_step"):
            self._backend.newest_step = step
        self._worker.put(Job(step, at, Measured(records=list(records))))

    def saved(self, directory: Path) -> None:
        """Tell the backend of a checkpoint, where it wants to know."""
        if hasattr(self._backend, "saved"):
            self._worker.put(Job(0, 0.0, Measured(), saved=directory))

    def end(self, last_word: Callable[[], Job]) -> None:
        """Have the backend closed after all that waits. ``last_word`` is asked for when that has been written."""
        self._worker.put(Job(0, 0.0, Measured(), last_word=last_word))

    def drain(self, seconds: float) -> bool:
        """Wait until nothing is left to do, at most so long. Returns whether that is so."""
        return self._worker.drain(seconds)

    def close(self) -> None:
        """Take nothing more, and have the thread of a backend that has ended end too."""
        self._losses.add(self._worker.close())

    def give_up(self) -> None:
        """Go on without the backend, which takes too long: what it has not written is lost."""
        with self._lock:
            self.given_up = True
            lost, self._at_stake = self._at_stake, 0
        lost += self._worker.close()
        abandon = getattr(self._backend, "abandon", None)
        if abandon is not None:
            try:
                abandon()
            except Exception:
                logger.exception("backend %s could not be abandoned", self.name)
        self._losses.add(lost + self._newly_reported())
        logger.error("backend %s did not end in time, %d records are lost: left out from now on", self.name, lost)

    # -- the lane's own thread ----------------------------------------------------------------------------------------

    def _work(self, job: Job) -> None:
        if self._run is not None and self._active and not self._opened:
            self._opened, _ = self._attempt("open", functools.partial(self._backend.open, self._run))
            self._active = self._active and self._opened
        if job.last_word is not None:
            self._end(job.last_word)
        elif job.saved is not None:
            self._tell_saved(job.saved)
        else:
            self._write(job)

    def _tell_saved(self, directory: Path) -> None:
        saved: Callable[[Path], None] | None = getattr(self._backend, "saved", None)
        if self._active and saved is not None:
            self._attempt("take note of a checkpoint", functools.partial(saved, directory))

    def _write(self, job: Job) -> None:
        records = job.measured.records
        if not self._active:
            self._losses.add(len(records))
        elif records:
            if hasattr(self._backend, "step_time"):
                self._backend.step_time = job.at
            self._attempt("write", functools.partial(self._backend.write, job.step, records), len(records))

    def _catches_up(self, last: bool) -> bool:
        """Have the backend do what it has put off; whether there is more of it."""
        if self._catch_up is None or not self._active or not self._opened:
            return False
        _, more = self._attempt("catch up", functools.partial(self._catch_up, last))
        return bool(more)

    def _end(self, last_word: Callable[[], Job]) -> None:
        self._catches_up(last=True)
        if self._active:
            self._write(last_word())
        if self._active and self._opened:
            self._attempt("close", self._backend.close)
        self._losses.add(self._worker.close())  # what still comes is lost

    def _attempt(self, verb: str, action: Callable[[], Any], at_stake: int = 0) -> tuple[bool, Any]:
        """Have the backend do something, and count what that loses: whether it could, and what it says."""
        self._at_stake = at_stake
        said: Any = None
        error: BaseException | None = None
        try:
            said = action()
        except BaseException as caught:  # noqa: BLE001  (nothing that a backend does ends this thread)
            error = caught
        with self._lock:
            self._at_stake = 0
            if self.given_up:  # what it has lost has been counted, and said
                return False, None
        if error is not None:
            self._failed(verb, error)
        # What a call says that has nothing to lose, or says as a flag, is no count.
        lost = said if at_stake and isinstance(said, int) and not isinstance(said, bool) else 0
        self._losses.add((lost if error is None else at_stake) + self._newly_reported())
        return error is None, said

    def _failed(self, verb: str, error: BaseException) -> None:
        self._failures += 1
        if self._failures == 1:
            logger.error("backend %s could not %s; training goes on", self.name, verb, exc_info=error)
        if self._failures >= MAX_FAILURES and self._active:
            self._active = False
            logger.error("backend %s failed %d times: left out from now on", self.name, MAX_FAILURES)

    def _newly_reported(self) -> int:
        """Records that the backend has found lost since it was asked last."""
        before, self._reported = self._reported, _reported(self._backend)
        # One that is used again begins to count anew.
        return self._reported - before if self._reported >= before else self._reported


def _reported(backend: Backend) -> int:
    try:
        return int(getattr(backend, "dropped_records", 0))
    except Exception:  # noqa: BLE001  (whatever a property of someone else's does)
        return 0
