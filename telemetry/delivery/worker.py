"""One background thread with a queue bounded by bytes."""

from __future__ import annotations

import contextvars
import functools
import logging
import threading
import time
from collections import deque
from collections.abc import Callable

from telemetry.delivery.measured import Job
from telemetry.once import Once

logger = logging.getLogger(__name__)
END_SECONDS = 5.0  # what a thread that has nothing to do may need to end, on a machine that is busy
_once = Once(logger)  # for all: what one thread lacks, the others do too


class Worker:
    """Works through jobs in order, on a thread that starts with the first.

    When more than ``max_bytes`` wait, the oldest jobs lose their media first, and only then their numbers; every job
    is still worked on, for other ranks may be waiting for its step.

    Args:
        work: called with each job on the thread; must not raise.
        max_bytes: how much may wait.
        on_drop: told how many records were dropped.
        idle: called on the thread after a job, when no other waits, and again for as long as it returns True; must not
            raise.

    Attributes:
        computed: processor seconds that its thread has taken, when it last ended a job.
    """

    def __init__(
        self,
        work: Callable[[Job], None],
        max_bytes: int,
        on_drop: Callable[[int], None],
        idle: Callable[[], bool] | None = None,
    ) -> None:
        self._work = work
        self._max_bytes = max_bytes
        self._on_drop = on_drop
        self._idle = idle
        self._queue: deque[tuple[Job, int]] = deque()  # with the bytes that it holds
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._held = 0
        self.computed = 0.0
        self._busy = False
        self._closed = False

    @property
    def waiting(self) -> int:
        """Jobs not yet begun."""
        return len(self._queue)

    def put(self, job: Job) -> None:
        """Hand a job over; returns at once."""
        with self._changed:
            if self._closed:
                self._on_drop(job.drop_all())
                return
            if not self._has_thread():
                self._on_drop(job.drop_all())
                return
            nbytes = job.nbytes
            self._queue.append((job, nbytes))
            self._held += nbytes
            if self._held > self._max_bytes:
                self._make_room()
            self._changed.notify_all()

    def drain(self, seconds: float) -> bool:
        """Wait until all jobs are done, at most so long. Returns whether they are."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._queue and not self._busy, seconds)

    def close(self) -> int:
        """Take no more jobs and end the thread after the job in hand; returns how many records were still waiting.

        A thread without a job has ended when this returns: one that lets go of a tensor while the interpreter ends
        takes the process down with it ("terminate called").
        """
        with self._changed:
            self._closed = True
            dropped = sum(job.drop_all() for job, _ in self._queue)
            self._queue.clear()
            self._held = 0
            idle = not self._busy
            self._changed.notify_all()
        if idle and self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(END_SECONDS)
        return dropped

    def _has_thread(self) -> bool:
        """Whether there is a thread to work on jobs: one that could not be started is tried again with the next."""
        if self._thread is None:
            # A daemon: nothing here keeps the process from ending. In the context of who began: some clients keep there
            # which run is active.
            target = functools.partial(contextvars.copy_context().run, self._run)
            thread = threading.Thread(target=target, name="telemetry", daemon=True)
            try:
                thread.start()
            except RuntimeError as error:
                _once.say("thread", "telemetry loses what it measures (%s); training goes on", error)
                return False
            self._thread = thread
        return True

    def _make_room(self) -> None:
        for drop in ("drop_media", "drop_all"):
            for place, (job, before) in enumerate(self._queue):
                if self._held <= self._max_bytes:
                    return
                dropped = getattr(job, drop)()
                self._queue[place] = (job, job.nbytes)
                self._held -= before - job.nbytes
                if dropped:
                    self._on_drop(dropped)

    def _run(self) -> None:
        more = False
        while True:
            with self._changed:
                self._busy = more and not self._closed
                self._changed.notify_all()
                while not self._queue and not self._busy and not self._closed:
                    self._changed.wait()
                if not self._queue and self._closed:
                    return
                job, nbytes = self._queue.popleft() if self._queue else (None, 0)
                self._held -= nbytes
                self._busy = True
            if job is not None:
                self._work(job)
                job = None  # nothing of it is held while no other comes
                more = self._idle is not None
            elif self._idle is not None:
                more = self._idle()
            self.computed = time.thread_time()
