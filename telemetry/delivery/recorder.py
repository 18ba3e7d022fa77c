"""Collects what one step measured, on the training thread, and sends it on its way to every backend.

Callbacks only ever *add*: metric values (merged with what earlier microbatches of the step measured), finished
records, and work that needs host values (:meth:`Recorder.defer`, :meth:`Recorder.show`). :meth:`Recorder.flush` packs
the step's tensors, starts one copy to the host and returns. One background thread (``home``) waits for the copy, does
the deferred work and gathers all ranks' values on rank 0; each backend's own (its ``lane``) writes there.

A backend that fails is reported once, and left out after repeated failures; one that blocks blocks itself. What is lost
is counted, and said once. Training never notices.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from torch import Tensor

from telemetry import shutdown
from telemetry.backends.base import Backend, Run
from telemetry.clock import Overhead, StepClock
from telemetry.delivery.home import Home, Judge
from telemetry.delivery.lane import MAX_FAILURES, Lane
from telemetry.delivery.losses import Losses
from telemetry.delivery.measured import Build, Deferred, Emitter, Job, Measured
from telemetry.delivery.reduction import RankGather
from telemetry.delivery.transfer import Transfer
from telemetry.records import Max, Metric, Record
from telemetry.sound import SoundPolicy

__all__ = ["MAX_FAILURES", "Build", "Emitter", "Recorder"]

MAX_QUEUE_BYTES = 256 * 2**20
DRAIN_SECONDS = 30.0
# Of the time that closing may take: when other ranks are waited for no longer, and this one's own numbers are taken;
# what the way home may take of it, for the backends need the rest; and when a backend that has not ended is given up,
# so that the others can still be told what was lost.
RANKS_SHARE, HOME_SHARE, LANES_SHARE = 0.4, 0.5, 0.9

logger = logging.getLogger(__name__)


class Recorder:
    """Collects steps and writes them to ``backends``.

    Args:
        backends: destinations; none on ranks that show nothing.
        gather: brings the ranks' values together; None for a single process.
        max_queue_bytes: how much may wait for the background, and then for each backend.
        judge: adds its verdicts to what is written.
        sound: what may be heard; nothing else reaches a backend.
        rank: of this process. On ranks other than 0, backends are given its own scalars only.
        repeats: whether what this rank measures of its batch another rank measures too, and brings.
    """

    def __init__(
        self,
        backends: Sequence[Backend],
        gather: RankGather | None = None,
        max_queue_bytes: int = MAX_QUEUE_BYTES,
        judge: Judge | None = None,
        sound: SoundPolicy | None = None,
        rank: int = 0,
        repeats: bool = False,
    ) -> None:
        self._losses = Losses()
        self._lanes = [Lane(backend, self._losses, max_queue_bytes) for backend in backends]
        self._home = Home(
            self._lanes, self._losses, gather, judge, sound or SoundPolicy(), rank, max_queue_bytes, repeats
        )
        self._overhead = Overhead(lambda: self._home.computed + sum(lane.computed for lane in self._lanes))
        self._step = Measured()
        self._closed = False
        self._closing = threading.Lock()
        self._ended = threading.Event()
        shutdown.register(self)

    @property
    def dropped_records(self) -> int:
        """Records that did not reach a backend, counted once for each backend that lacks them."""
        return self._losses.total

    @property
    def sound(self) -> SoundPolicy:
        """What may be heard."""
        return self._home.sound

    @sound.setter
    def sound(self, sound: SoundPolicy) -> None:
        self._home.sound = sound

    def open(self, run: Run) -> None:
        """Have every backend opened, in the background; one that cannot be opened is left out and said."""
        self._home.begin(run.starting_step)
        for lane in self._lanes:
            lane.open(run)

    def metric(self, tag: str, value: Metric, note: str = "") -> None:
        """Add a metric value to the step; it is merged with others of its tag on the host."""
        self._step.added.append((tag, value))
        if note:
            self._step.notes[tag] = note

    def record(self, record: Record) -> None:
        """Add a finished record to the step."""
        self._step.record(record)

    def defer(self, tensors: Mapping[str, Tensor], build: Build) -> None:
        """Have ``build(host_tensors, emitter)`` run in the background, on every rank: for metrics of host values.

        The tensors' values are those at :meth:`flush`: hand over what is this step's own.
        """
        self._step.deferred.append(Deferred(tensors, build, shows=False))

    def show(self, tensors: Mapping[str, Tensor], build: Build) -> None:
        """As :meth:`defer`, for tables, audio and images, which come from rank 0.

        On another rank its tables are made only for a step in which that rank has something non-finite, and are shown
        beside rank 0's.
        """
        self._step.deferred.append(Deferred(tensors, build, shows=True))

    def absent(self, tag: str, reason: str) -> None:
        """Say once for this run why a tag has no value, in the log and in the table ``telemetry/absent``."""
        self._home.absent(tag, reason)

    def say_once(self, key: str, message: str, *args: object, level: int = logging.WARNING) -> None:
        """Log a message the first time its key comes up."""
        self._home.say_once(key, message, *args, level=level)

    def discard(self) -> None:
        """Forget what the step has measured so far."""
        self._step = Measured()

    def flush(
        self,
        step: int,
        clock: StepClock | None = None,
        own_state: bool = True,
        told: Callable[[Sequence[Record]], None] | None = None,
        each: Sequence[float] = (),
    ) -> None:
        """Send what was added since the last flush on its way as ``step``. Waits for nothing.

        With several ranks, every rank must flush the same steps in the same order.

        Args:
            step: the optimizer step.
            clock: what telemetry has taken of it so far, or of what stands between steps.
            own_state: whether to add how telemetry itself is doing: once a step.
            told: called in the background with what is about to be written, on ranks other than 0 with nothing.
            each: seconds of the last due step, and of each step since; none where they are not known.
        """
        collected, self._step = self._step, Measured()
        with StepClock().running() if clock is None else clock.running():
            transfer = Transfer(collected.tensors())
            collected = collected.emptied()
        if clock is not None and own_state:
            collected.metrics["telemetry/step_seconds"] = Max(clock.spent)
            collected.metrics["telemetry/overhead_fraction"] = Max(self._overhead.share(clock, each))
            clock = StepClock()  # what follows is of the next
        with (clock := clock or StepClock()).running():
            self._home.put(Job(step, time.time(), collected, transfer, due=own_state, told=told))
        self._overhead.owe(clock)

    def write(self, step: int, records: Sequence[Record]) -> None:
        """Write finished records past the step that is being collected."""
        if records and self._home.shows:
            self._home.put(Job(step, time.time(), Measured(records=list(records))))

    def saved(self, directory: Path) -> None:
        """Tell backends of a checkpoint, after all that was handed over before."""
        if self._home.shows:
            self._home.put(Job(0, 0.0, Measured(), saved=directory))

    def drain(self, seconds: float | None = None) -> bool:
        """Wait until all is written, at most so long (30 s by default). Returns whether it is."""
        until = time.monotonic() + (DRAIN_SECONDS if seconds is None else seconds)
        waits = [self._home.drain, *(lane.drain for lane in self._lanes)]
        return all(drain(max(0.0, until - time.monotonic())) for drain in waits)

    def close(self, seconds: float | None = None) -> None:
        """Write out what is left, in at most so many seconds (30 by default), and close every backend."""
        seconds = DRAIN_SECONDS if seconds is None else seconds
        with self._closing:
            closing, self._closed = self._closed, True
        if closing:  # by another thread, when SIGTERM comes while training ends
            self._ended.wait(seconds)
            return
        try:
            self._write_out(seconds)
        finally:
            self._ended.set()
            shutdown.unregister(self)

    def _write_out(self, seconds: float) -> None:
        """Backends that learn late of what they lost end first, so that the others can show it."""
        began = time.monotonic()

        def left(share: float) -> float:
            return max(0.0, began + share * seconds - time.monotonic())

        if not self._home.drain(left(RANKS_SHARE)):
            self._home.go_alone()
        if not self._home.drain(left(HOME_SHARE)):
            logger.warning("telemetry could not bring everything home within %.0f s", HOME_SHARE * seconds)
        self._home.close()
        for late, share in ((True, LANES_SHARE), (False, 1.0)):
            for lane in self._lanes:
                if lane.learns_late == late and not lane.given_up:
                    lane.end(self._home.last_word)
            for lane in self._lanes:
                if not lane.given_up and not lane.drain(left(share)):
                    lane.give_up()
        for lane in self._lanes:
            lane.close()
