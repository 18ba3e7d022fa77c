"""Collects what one step measured, and brings it to rank 0 and to every backend, on a thread of its own.

Callbacks only ever *add*: metric values (merged with what earlier microbatches of the step measured), finished
records, and work that needs host values (:meth:`Recorder.defer`, :meth:`Recorder.show`). :meth:`Recorder.flush` packs
the step's tensors, starts one copy to the host and returns. The background thread waits for the copy, does the
deferred work, gathers all ranks' values on rank 0 and writes there.

A backend that fails is reported once, and left out after repeated failures; one that blocks is skipped. What is lost is
counted and said once. Training never notices.
"""

from __future__ import annotations

import copy
import functools
import logging
import math
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol, cast

import torch
from torch import Tensor

from telemetry import catalogue
from telemetry.backends.base import Backend, Run, is_on_every_rank
from telemetry.clock import StepClock
from telemetry.delivery import shutdown
from telemetry.delivery.reduction import RankGather, Share, merge
from telemetry.delivery.transfer import Transfer
from telemetry.delivery.worker import Worker
from telemetry.records import Audio, Image, Max, Metric, Record, Scalar, Sum, Table, held_bytes
from telemetry.sound import SoundPolicy

logger = logging.getLogger(__name__)

MAX_FAILURES = 3
MAX_QUEUE_BYTES = 256 * 2**20
BLOCKED_SECONDS = 60.0
DRAIN_SECONDS = 30.0
NAMED_TAGS = 5
_PLACE = torch.empty(0)


class Emitter(Protocol):
    """Where measured things go: what deferred work is given."""

    def metric(self, tag: str, value: Metric, note: str = "") -> None:
        """Add a metric value; merged with what the step already holds under the tag."""

    def record(self, record: Record) -> None:
        """Add a finished record."""

    def absent(self, tag: str, reason: str) -> None:
        """Say, once for a run, why a tag has no value."""

    def merged(self, tag: str) -> Metric | None:
        """All ranks' value of a metric: for work that shows. None where there is none, and on ranks other than 0."""


Build = Callable[[Mapping[str, Tensor], Emitter], None]


class Judge(Protocol):
    """Looks at what is about to be written, and has something to say about it."""

    def check(self, step: int, records: Sequence[Record], due: bool) -> Sequence[Record]:
        """What to write beside the records; ``due`` for those of a due step."""


@dataclass
class _Deferred:
    """Work on host values. ``shows``: it makes records and no metric, so only rank 0 needs it."""

    tensors: Mapping[str, Tensor]
    build: Build
    shows: bool


@dataclass
class _Step:
    """What one step has measured so far."""

    metrics: dict[str, Metric] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)
    records: list[Record] = field(default_factory=list)
    deferred: list[_Deferred] = field(default_factory=list)

    def add_metric(self, tag: str, value: Metric, note: str) -> None:
        held = self.metrics.get(tag)
        self.metrics[tag] = value if held is None else held.merge(value)
        if note:
            self.notes[tag] = note

    def tensors(self) -> list[Tensor]:
        """Everything that has to come to the host, in the order that :meth:`hosted` takes it back."""
        parts = [part for metric in self.metrics.values() for part in metric.components if isinstance(part, Tensor)]
        return parts + [tensor for work in self.deferred for tensor in work.tensors.values()]

    def emptied(self) -> _Step:
        """The same step without its tensors, for which places are kept: they may be large, on a device."""
        metrics = {tag: _emptied(metric) for tag, metric in self.metrics.items()}
        deferred = [replace(work, tensors=dict.fromkeys(work.tensors, _PLACE)) for work in self.deferred]
        return _Step(metrics, self.notes, self.records, deferred)

    def hosted(self, copies: Iterable[Tensor]) -> _Step:
        """The same step over host values, which take the tensors' places."""
        rest = iter(copies)
        metrics = {
            tag: metric.with_components([_host(next(rest)) if isinstance(p, Tensor) else p for p in metric.components])
            for tag, metric in self.metrics.items()
        }
        deferred = [replace(work, tensors={name: next(rest) for name in work.tensors}) for work in self.deferred]
        return _Step(metrics, self.notes, self.records, deferred)


class _ReplacedError(Exception):
    """A thread comes back from a backend that has blocked: another has gone on in its place."""


class _Lane:
    """One backend and how it is doing."""

    def __init__(self, backend: Backend) -> None:
        self.backend = backend
        self.every_rank = is_on_every_rank(backend)
        self.failures = 0
        self.active = True
        self.opened = False
        self.busy_since: float | None = None

    def blocked(self, seconds: float) -> bool:
        """Whether it has been in one call for longer than that."""
        return self.busy_since is not None and time.monotonic() - self.busy_since > seconds


@dataclass
class _Job:
    """A step on its way: first ``measured`` (to be brought home and reduced), then ``records`` for ``lanes``.

    ``own``: this rank's scalars before ranks are brought together, for backends on every rank.
    """

    step: int
    measured: _Step | None = None
    transfer: Transfer | None = None
    records: Sequence[Record] = ()
    own: Sequence[Scalar] = ()
    lanes: list[_Lane] = field(default_factory=list)
    gather: bool = False
    due: bool = False
    closing: bool = False

    @property
    def nbytes(self) -> int:
        scalars = 64 * len(self.records) + (128 * len(self.measured.metrics) if self.measured else 0)
        return scalars + self._media_bytes() + (self.transfer.nbytes if self.transfer else 0)

    def drop_media(self) -> int:
        kept = [record for record in self.records if isinstance(record, Scalar)]
        dropped = len(self.records) - len(kept)
        self.records = kept
        if self.measured is not None:
            media = [record for record in self.measured.records if not isinstance(record, Scalar)]
            shows = [work for work in self.measured.deferred if work.shows]
            dropped += len(media) + len(shows)
            self.measured.records = [record for record in self.measured.records if isinstance(record, Scalar)]
            for work in shows:
                work.build = _nothing
        return dropped

    def drop_all(self) -> int:
        dropped = len(self.records)
        self.records = ()
        if self.measured is not None:
            dropped += len(self.measured.metrics) + len(self.measured.records) + len(self.measured.deferred)
            self.measured, self.transfer = _Step(), None
        return dropped

    def _media_bytes(self) -> int:
        held = [*self.records, *(self.measured.records if self.measured else ())]
        return sum(held_bytes(record) for record in held if not isinstance(record, Scalar))


class Recorder:
    """Collects steps and writes them to ``backends``.

    Args:
        backends: destinations; none on ranks that show nothing.
        gather: brings the ranks' values together; None for a single process.
        max_queue_bytes: how much may wait for the background thread.
        judge: adds its verdicts to what is written.
        sound: what may be heard; nothing else reaches a backend.
        rank: of this process. On ranks other than 0, backends are given its own scalars only.
    """

    def __init__(
        self,
        backends: Sequence[Backend],
        gather: RankGather | None = None,
        max_queue_bytes: int = MAX_QUEUE_BYTES,
        judge: Judge | None = None,
        sound: SoundPolicy | None = None,
        rank: int = 0,
    ) -> None:
        self.sound = sound or SoundPolicy()
        self._lanes = [_Lane(backend) for backend in backends]
        self._rank = rank
        self._shows = bool(backends) and rank == 0
        self._gather = gather
        self._judge = judge
        self._step = _Step()
        self._said: set[str] = set()
        self._absences: dict[str, str] = {}
        self._absences_shown = 0
        self._run: Run | None = None
        self._worker: Worker[_Job] = Worker(self._work, max_queue_bytes, self._count_dropped)
        self._delivery: tuple[_Job, _Lane] | None = None
        self._closed = False
        self._ended = threading.Event()
        self.dropped_records = 0
        self._counting = threading.Lock()
        self._skipping = threading.Lock()
        self._said_dropped = False
        shutdown.register(self)

    # -- the training thread ------------------------------------------------------------------------------------------

    def open(self, run: Run) -> None:
        """Have every backend opened, in the background; one that cannot be opened is left out and said."""
        self._run = run
        self._put(_Job(run.starting_step, lanes=list(self._lanes)))

    def metric(self, tag: str, value: Metric, note: str = "") -> None:
        """Add a metric value to the step. Launches device work only."""
        self._step.add_metric(tag, value, note)

    def record(self, record: Record) -> None:
        """Add a finished record to the step."""
        self._step.records.append(record)

    def defer(self, tensors: Mapping[str, Tensor], build: Build) -> None:
        """Have ``build(host_tensors, emitter)`` run in the background, on every rank: for metrics of host values.

        The tensors' values are those at :meth:`flush`: hand over what is this step's own.
        """
        self._step.deferred.append(_Deferred(tensors, build, shows=False))

    def show(self, tensors: Mapping[str, Tensor], build: Build) -> None:
        """As :meth:`defer`, for tables, audio and images, which come from rank 0.

        On another rank its tables are made only for a step in which that rank has something non-finite, and are shown
        beside rank 0's.
        """
        self._step.deferred.append(_Deferred(tensors, build, shows=True))

    def absent(self, tag: str, reason: str) -> None:
        """Say once for this run why a tag has no value, in the log and in the table ``telemetry/absent``."""
        self._absences.setdefault(tag, reason)
        self.say_once(f"absent:{tag}", "no %s: %s", tag, reason, level=logging.INFO)

    def say_once(self, key: str, message: str, *args: object, level: int = logging.WARNING) -> None:
        """Log a message the first time its key comes up."""
        if key not in self._said:
            self._said.add(key)
            logger.log(level, message, *args)

    def discard(self) -> None:
        """Forget what the step has measured so far."""
        self._step = _Step()

    def flush(self, step: int, clock: StepClock | None = None, own_state: bool = True) -> None:
        """Send what was added since the last flush on its way as ``step``. Waits for nothing.

        With several ranks, every rank must flush the same steps in the same order.

        Args:
            step: the optimizer step.
            clock: what telemetry has taken of it so far.
            own_state: whether to add how telemetry itself is doing: once a step.
        """
        collected, self._step = self._step, _Step()
        began = time.perf_counter()
        transfer = Transfer(collected.tensors())
        collected = collected.emptied()
        if own_state:
            self._add_own_state(collected)
        if clock is not None:
            clock.spent += time.perf_counter() - began
            collected.metrics["telemetry/step_seconds"] = Max(clock.spent)
            collected.metrics["telemetry/overhead_fraction"] = Max(clock.spent / max(clock.step_seconds(), clock.spent))
        self._put(
            _Job(step, collected, transfer, lanes=list(self._lanes), gather=self._gather is not None, due=own_state)
        )

    def write(self, step: int, records: Sequence[Record]) -> None:
        """Write finished records past the step that is being collected."""
        if records and self._shows:
            self._put(_Job(step, records=records, lanes=list(self._lanes)))

    def drain(self, seconds: float | None = None) -> bool:
        """Wait until all is written, at most so long (30 s by default). Returns whether it is."""
        return self._worker.drain(DRAIN_SECONDS if seconds is None else seconds, self._skip_blocked)

    def close(self, seconds: float | None = None) -> None:
        """Write out what is left, in at most so many seconds (30 by default), and close every backend."""
        seconds = DRAIN_SECONDS if seconds is None else seconds
        with self._counting:
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
        for lane in self._lanes:
            self._worker.put(_Job(0, lanes=[lane], closing=True))
        # A backend that blocks must leave the others some of the time.
        patience = min(BLOCKED_SECONDS, seconds / 2)

        def skip() -> None:
            self._skip_blocked(patience if self._worker.waiting else seconds)

        if not self._worker.drain(seconds, skip):
            logger.warning("telemetry could not write everything within %.0f s", seconds)
        lost = self._worker.close()
        if lost:
            self._count_dropped(lost)

    def _put(self, job: _Job) -> None:
        if self._lanes or job.gather:
            self._skip_blocked()
            self._worker.put(job)

    def _add_own_state(self, step: _Step) -> None:
        if step.metrics or step.records or step.deferred:
            step.metrics["telemetry/queue_depth"] = Max(self._worker.waiting)
            step.metrics["telemetry/dropped_records"] = Sum(self.dropped_records)

    def _count_dropped(self, records: int) -> None:
        with self._counting:
            self.dropped_records += records
        if records and not self._said_dropped:
            self._said_dropped = True
            logger.warning("telemetry had to drop records; telemetry/dropped_records counts them")

    def _skip_blocked(self, seconds: float | None = None) -> None:
        """Leave out a backend that has been in one call for too long, and go on behind its back."""
        seconds = BLOCKED_SECONDS if seconds is None else seconds
        with self._skipping:  # one thread skips it, and not while it comes back
            delivery = self._delivery
            if delivery is None or not delivery[1].blocked(seconds):
                return
            self._delivery = None
            job, lane = delivery
            lane.active = False
            rest = job.lanes[job.lanes.index(lane) + 1 :]
            self._worker.replace(_Job(job.step, records=job.records, own=job.own, lanes=rest))
        logger.error("backend %s has blocked for %.0f s: left out from now on", lane.backend.name, seconds)
        self._count_dropped(len(job.records))

    # -- the background thread ----------------------------------------------------------------------------------------

    def _work(self, job: _Job) -> None:
        try:
            if job.measured is not None:
                job.records = self._bring_home(job, job.measured)
            self._add_absences(job)
            self._add_verdicts(job)
            self._deliver(job)
        except _ReplacedError:
            pass
        except Exception:  # the thread lives on
            logger.exception("telemetry failed on step %d; training goes on", job.step)

    def _bring_home(self, job: _Job, measured: _Step) -> Sequence[Record]:
        """The records of a step: from this rank's values, or on rank 0 from all ranks'."""
        step = measured.hosted(job.transfer.wait() if job.transfer is not None else ())
        for work in step.deferred:
            if not work.shows:
                self._build(work, step)
        job.own = self._own_scalars(step)
        nonfinite = tuple(tag for tag, metric in step.metrics.items() if not _finite(metric))
        shares = self._gathered(job, step, nonfinite)
        if shares is None:
            return ()
        step.metrics, step.notes = merge(shares)
        for work in step.deferred:
            if work.shows:
                self._build(work, step)
        self._name_nonfinite(job.step, shares)
        records = [*self._scalars(step), *step.records]
        return _with_tables(
            records, [_of_rank(table, rank) for rank, share in enumerate(shares) for table in share.tables]
        )

    def _add_absences(self, job: _Job) -> None:
        absences = tuple(self._absences.items())
        if job.due and job.records and len(absences) > self._absences_shown:
            self._absences_shown = len(absences)
            job.records = [*job.records, Table("telemetry/absent", ("metric", "why"), absences)]

    def _add_verdicts(self, job: _Job) -> None:
        if self._judge is None or not job.records:
            return
        try:
            job.records = [*job.records, *self._judge.check(job.step, job.records, job.due)]
        except Exception:
            self._judge = None
            logger.exception("telemetry could not judge step %d: no more verdicts; training goes on", job.step)

    def _gathered(self, job: _Job, step: _Step, nonfinite: tuple[str, ...]) -> list[Share] | None:
        share = Share(job.step, step.metrics, step.notes, nonfinite)
        if self._gather is None or not job.gather:
            return [share]
        if nonfinite and not self._shows:
            share = replace(share, tables=self._tables(step))
        try:
            return self._gather.gather(share)
        except Exception as error:  # noqa: BLE001  (a rank is gone: this one goes on alone)
            self._gather = None
            logger.warning(
                "ranks can no longer be brought together (%s): from step %d on, this rank's numbers only",
                error,
                job.step,
            )
            return [share] if self._shows else None

    def _tables(self, step: _Step) -> tuple[Table, ...]:
        scratch = _Step()
        for work in step.deferred:
            if work.shows:
                self._build(work, scratch)
        return tuple(_without_media(record) for record in scratch.records if isinstance(record, Table))

    def _build(self, work: _Deferred, step: _Step) -> None:
        try:
            work.build(work.tensors, _StepEmitter(step, self))
        except Exception:
            name = getattr(work.build, "__qualname__", work.build)
            if f"build:{name}" not in self._said:
                self._said.add(f"build:{name}")
                logger.exception("telemetry could not show what %s makes; training goes on", name)

    def _name_nonfinite(self, step: int, shares: Sequence[Share]) -> None:
        for rank, share in enumerate(shares):
            if share.nonfinite:
                named = ", ".join(share.nonfinite[:NAMED_TAGS])
                left = len(share.nonfinite) - NAMED_TAGS
                more = f" and {left} more" if left > 0 else ""
                self.say_once(f"nonfinite:{rank}", "step %d: not finite on rank %d: %s%s", step, rank, named, more)

    def _scalars(self, step: _Step) -> list[Scalar]:
        scalars = []
        for tag, metric in step.metrics.items():
            if not metric.shown:
                continue
            value = metric.result()
            if value is None:
                entry = catalogue.find(tag)
                self.absent(tag, (entry.absent if entry else "") or "nothing to measure in the step")
            else:
                scalars.append(Scalar(tag, value, step.notes.get(tag, "")))
        return scalars

    def _own_scalars(self, step: _Step) -> list[Scalar]:
        """What this rank alone has measured, where some backend shows that beside what all ranks have."""
        if self._gather is None or not any(lane.every_rank for lane in self._lanes):
            return []
        values = {tag: metric.result() for tag, metric in step.metrics.items() if metric.shown}
        return [Scalar(f"rank_{self._rank}/{tag}", value) for tag, value in values.items() if value is not None]

    def _deliver(self, job: _Job) -> None:
        job.records = self.sound.allowed(job.records) if self._shows else ()
        for lane in job.lanes:
            records = [*job.records, *job.own] if lane.every_rank else job.records
            if not lane.active:
                self._count_dropped(len(records))
                continue
            if not lane.opened and self._run is not None:
                lane.opened = self._attempt(job, lane, "open", functools.partial(lane.backend.open, self._run))
                lane.active = lane.opened and lane.active
            if job.closing and lane.opened:
                self._attempt(job, lane, "close", lane.backend.close)
            elif records and lane.active:
                write = functools.partial(lane.backend.write, job.step, records)
                if not self._attempt(job, lane, "write", write):
                    self._count_dropped(len(records))

    def _attempt(self, job: _Job, lane: _Lane, verb: str, action: Callable[[], None]) -> bool:
        """Have a backend do something; whether it could.

        Raises:
            _ReplacedError: when it has blocked, and this thread is no longer the one that works.
        """
        lane.busy_since = time.monotonic()
        self._delivery = (job, lane)
        error: BaseException | None = None
        try:
            action()
        except BaseException as caught:  # noqa: BLE001  (nothing that a backend does ends this thread)
            error = caught
        with self._skipping:
            if not self._worker.is_current():
                raise _ReplacedError
            self._delivery = None
            lane.busy_since = None
        if error is not None:
            self._failed(lane, verb, error)
        return error is None

    def _failed(self, lane: _Lane, verb: str, error: BaseException) -> None:
        lane.failures += 1
        if lane.failures == 1:
            logger.error("backend %s could not %s; training goes on", lane.backend.name, verb, exc_info=error)
        if lane.failures >= MAX_FAILURES and lane.active:
            lane.active = False
            logger.error("backend %s failed %d times: left out from now on", lane.backend.name, MAX_FAILURES)


class _StepEmitter:
    """Adds to a step that has already been taken from the recorder."""

    def __init__(self, step: _Step, recorder: Recorder) -> None:
        self._step = step
        self._recorder = recorder

    def metric(self, tag: str, value: Metric, note: str = "") -> None:
        self._step.add_metric(tag, value, note)

    def record(self, record: Record) -> None:
        self._step.records.append(record)

    def absent(self, tag: str, reason: str) -> None:
        self._recorder.absent(tag, reason)

    def merged(self, tag: str) -> Metric | None:
        return self._step.metrics.get(tag)


def _nothing(_tensors: Mapping[str, Tensor], _emit: Emitter) -> None:
    """What is left of deferred work that was dropped."""


def _emptied(metric: Metric) -> Metric:
    if not any(isinstance(part, Tensor) for part in metric.components):
        return metric
    emptied = copy.copy(metric)
    emptied.components = tuple(_PLACE if isinstance(part, Tensor) else part for part in metric.components)
    return emptied


def _host(tensor: Tensor) -> Tensor | float:
    """0-d host tensors as numbers: cheaper to merge and to send."""
    return float(tensor) if tensor.dim() == 0 else tensor


def _finite(metric: Metric) -> bool:
    value = metric.result() if metric.shown else None
    return value is None or math.isfinite(value)


def _without_media(table: Table) -> Table:
    """The table with the tags of its sounds and pictures in their place: numbers and text travel between ranks."""
    rows = (tuple(cell.tag if isinstance(cell, Audio | Image) else cell for cell in row) for row in table.rows)
    return replace(table, rows=tuple(rows))


def _of_rank(table: Table, rank: int) -> Table:
    """The table with its rows' first cell saying which rank they are of."""
    return replace(table, rows=tuple((f"rank {rank}: {row[0]}", *row[1:]) for row in table.rows if row))


def _with_tables(records: list[Record], others: Sequence[Table]) -> list[Record]:
    """Rank 0's records with other ranks' rows behind its own."""
    for table in others:
        at = next(
            (
                i
                for i, own in enumerate(records)
                if isinstance(own, Table) and own.tag == table.tag and own.columns == table.columns
            ),
            None,
        )
        if at is None:
            records.append(table)
        else:
            own = cast(Table, records[at])
            records[at] = replace(own, rows=own.rows + table.rows)
    return records
