"""Makes records of measured steps, in the background: waits for host copies, brings ranks together, has all judged."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Protocol

from telemetry import catalogue
from telemetry.delivery.lane import Lane
from telemetry.delivery.losses import Losses
from telemetry.delivery.measured import Deferred, Job, Measured
from telemetry.delivery.reduction import RankGather, Share, merge
from telemetry.delivery.transfer import Transfer
from telemetry.delivery.worker import Worker
from telemetry.once import Once
from telemetry.records import Alert, Audio, Cell, Image, Max, Metric, Record, Scalar, Sum, Table
from telemetry.redaction import redact
from telemetry.sound import SoundPolicy

logger = logging.getLogger(__name__)

NAMED_TAGS = 5
LOST = "telemetry/dropped_records"


class Judge(Protocol):
    """Looks at what is about to be written, and has something to say about it."""

    def check(self, step: int, records: Sequence[Record], due: bool) -> Sequence[Record]:
        """What to write beside the records; ``due`` for those of a due step."""


class Home:
    """Turns steps into records for the lanes, in the order of their steps. Nothing here waits, but :meth:`drain`.

    Args:
        lanes: the ways to the backends.
        losses: where lost records are counted: what is lost here, every lane lacks.
        gather: brings the ranks' values together; None for a single process.
        judge: adds its verdicts to what is written.
        sound: what may be heard.
        rank: of this process.
        max_bytes: how much may wait.
        repeats: whether this rank brings only what it has of its own: its batch is another's, too.

    Attributes:
        sound: see above.
    """

    def __init__(
        self,
        lanes: Sequence[Lane],
        losses: Losses,
        gather: RankGather | None,
        judge: Judge | None,
        sound: SoundPolicy,
        rank: int,
        max_bytes: int,
        repeats: bool = False,
    ) -> None:
        self.sound = sound
        self.shows = bool(lanes) and rank == 0
        self._lanes = lanes
        self._losses = losses
        self._gather = gather
        self._judge = judge
        self._rank = rank
        self._repeats = repeats
        self._once = Once(logger)
        self._absences: dict[str, str] = {}
        self._absences_shown = 0
        self._worker = Worker(self._work, max_bytes, self._count)
        self._written = threading.Lock()
        self._last = Job(0, 0.0, Measured())
        self._verdict: dict[str, float] = {}
        self._lost_elsewhere = 0  # on other ranks, when they last said it
        self._lost_shown = 0

    @property
    def computed(self) -> float:
        """Processor seconds of the thread in the background."""
        return self._worker.computed

    def begin(self, step: int) -> None:
        """The run goes on from a step."""
        self._last = Job(step, time.time(), Measured())

    def put(self, job: Job) -> None:
        """Take a step on."""
        if self._lanes or self._gather is not None:
            self._worker.put(job)
        elif job.told is not None:
            job.told(())

    def drain(self, seconds: float) -> bool:
        """Wait until the lanes have all steps, at most so long. Returns whether they have."""
        return self._worker.drain(seconds)

    def go_alone(self) -> None:
        """Wait for other ranks no longer: what is left is of this rank alone."""
        if self._gather is not None:
            self._gather.give_up()

    def close(self) -> None:
        """Take no more steps; those that wait are lost."""
        self._count(self._worker.close())

    def absent(self, tag: str, reason: str) -> None:
        """Say once for this run why a tag has no value, in the log and in the table ``telemetry/absent``."""
        if tag in self._absences:
            return  # most are said again on every due step
        self._absences[tag] = reason = redact(reason)  # it may quote an exception
        self.say_once(f"absent:{tag}", "no %s: %s", tag, reason, level=logging.INFO)

    def say_once(self, key: str, message: str, *args: object, level: int = logging.WARNING) -> None:
        """Log a message the first time its key comes up."""
        self._once.say(key, message, *args, level=level)

    def last_word(self) -> Job:
        """Return what a backend has to be told last: how much was lost since that was shown, and the verdict on it."""
        with self._written:
            lost = self._losses.total + self._lost_elsewhere
            if lost != self._lost_shown and self.shows:
                self._lost_shown = lost
                count, shown = Scalar(LOST, float(lost)), self._verdict
                verdicts = self._verdicts(self._last.step, [count], due=True)
                changed = [one for one in verdicts if not isinstance(one, Scalar) or one.value != shown.get(one.tag)]
                alerts = [one for one in self._last.measured.records if isinstance(one, Alert)]  # are raised once
                self._last = Job(self._last.step, time.time(), Measured(records=[count, *alerts, *changed]))
            return self._last

    # -- the background thread ----------------------------------------------------------------------------------------

    def _count(self, records: int) -> None:
        self._losses.add(records * max(1, len(self._lanes)))

    def _work(self, job: Job) -> None:
        if job.saved is not None:
            for lane in self._lanes:
                lane.saved(job.saved)
            return
        try:
            records: Sequence[Record] = job.measured.records
            own: list[Scalar] = []
            if job.transfer is not None:
                records, own = self._brought_home(job, job.transfer)
            if job.told is not None:
                job.told(records)
            if records:
                records = [*records, *self._new_absences(job.due)]
                verdicts = self._verdicts(job.step, records, job.due)
                self._verdict |= {one.tag: one.value for one in verdicts if isinstance(one, Scalar)}
                records = [*records, *verdicts]
            self._deliver(job, records, own)
        except Exception:  # the thread lives on
            logger.exception("telemetry failed on step %d; training goes on", job.step)
            self._count(job.drop_all())

    def _brought_home(self, job: Job, transfer: Transfer) -> tuple[Sequence[Record], list[Scalar]]:
        """The records of a step, from this rank's values, or on rank 0 from all ranks'; and this rank's own scalars."""
        step = job.measured.hosted(transfer.wait())
        lost = self._losses.total
        if job.due and (step.metrics or step.records or step.deferred):
            step.metrics["telemetry/queue_depth"] = Max(self._waiting())
            step.metrics[LOST] = Sum(lost)
        for work in step.deferred:
            if not work.shows:
                self._build(work, step)
        if self._repeats:
            step.metrics = {tag: metric for tag, metric in step.metrics.items() if catalogue.is_each_ranks_own(tag)}
        values = {metric: metric.result() for metric in step.metrics.values() if metric.shown}
        own = self._own_scalars(step, values)
        nonfinite = tuple(tag for tag, one in step.metrics.items() if not math.isfinite(values.get(one) or 0.0))
        shares = self._gathered(job.step, step, nonfinite)
        if shares is None:
            return (), own
        step.metrics, step.notes = merge(shares)
        for work in step.deferred:
            if work.shows:
                self._build(work, step)
        self._name_nonfinite(job.step, shares)
        records = [*self._scalars(step, values), *step.records]
        if LOST in step.metrics:
            self._lost_shown = int(step.metrics[LOST].result() or 0)
            self._lost_elsewhere = self._lost_shown - lost
        return _with_tables(records, shares), own

    def _waiting(self) -> int:
        """Steps that some backend has not begun to write."""
        return self._worker.waiting + max((lane.waiting for lane in self._lanes), default=0)

    def _new_absences(self, due: bool) -> list[Record]:
        absences = tuple(self._absences.items())
        if not due or len(absences) <= self._absences_shown:
            return []
        self._absences_shown = len(absences)
        return [Table("telemetry/absent", ("metric", "why"), absences)]

    def _verdicts(self, step: int, records: Sequence[Record], due: bool) -> Sequence[Record]:
        if self._judge is None:
            return ()
        try:
            return self._judge.check(step, records, due)
        except Exception:
            self._judge = None
            logger.exception("telemetry could not judge step %d: no more verdicts; training goes on", step)
            return ()

    def _gathered(self, number: int, step: Measured, nonfinite: tuple[str, ...]) -> list[Share] | None:
        share = Share(number, step.metrics, step.notes, nonfinite)
        if self._gather is None:
            return [share]
        if nonfinite and not self.shows:
            share = replace(share, tables=self._tables(step))
        try:
            return self._gather.gather(share)
        except Exception as error:  # noqa: BLE001  (a rank is gone: this one goes on alone)
            self._gather = None
            logger.warning(
                "ranks can no longer be brought together (%s): from step %d on, this rank's numbers only", error, number
            )
            return [share] if self.shows else None

    def _tables(self, step: Measured) -> tuple[Table, ...]:
        scratch = Measured()
        for work in step.deferred:
            if work.shows:
                self._build(work, scratch)
        return tuple(_without_media(record) for record in scratch.records if isinstance(record, Table))

    def _build(self, work: Deferred, step: Measured) -> None:
        if work.build is None:
            return
        try:
            work.build(work.tensors, step)
        except Exception:  # noqa: BLE001  (said once, with its traceback)
            name = getattr(work.build, "__qualname__", work.build)
            said = "telemetry could not show what %s makes; training goes on"
            self._once.say(f"build:{name}", said, name, level=logging.ERROR, traceback=True)
        for tag, reason in step.absences.items():
            self.absent(tag, reason)
        step.absences.clear()

    def _name_nonfinite(self, step: int, shares: Sequence[Share]) -> None:
        for share in shares:
            if share.nonfinite:
                rank = share.rank
                named = ", ".join(share.nonfinite[:NAMED_TAGS])
                left = len(share.nonfinite) - NAMED_TAGS
                more = f" and {left} more" if left > 0 else ""
                self.say_once(f"nonfinite:{rank}", "step %d: not finite on rank %d: %s%s", step, rank, named, more)

    def _scalars(self, step: Measured, known: Mapping[Metric, float | None]) -> list[Scalar]:
        """What is shown of a step's metrics, of which some results are known."""
        scalars = []
        for tag, metric in step.metrics.items():
            if not metric.shown:
                continue
            value = known[metric] if metric in known else metric.result()
            if value is None:
                entry = catalogue.find(tag)
                self.absent(tag, (entry.absent if entry else "") or "nothing to measure in the step")
            else:
                scalars.append(Scalar(tag, value, step.notes.get(tag, "")))
        return scalars

    def _own_scalars(self, step: Measured, values: Mapping[Metric, float | None]) -> list[Scalar]:
        """What this rank alone has measured, where some backend shows that beside what all ranks have."""
        if self._gather is None or not any(lane.every_rank for lane in self._lanes):
            return []
        known = ((tag, values.get(metric)) for tag, metric in step.metrics.items())
        return [Scalar(f"rank_{self._rank}/{tag}", value) for tag, value in known if value is not None]

    def _deliver(self, job: Job, records: Sequence[Record], own: Sequence[Scalar]) -> None:
        records = [_without_secrets(one) for one in self.sound.allowed(records)] if self.shows else []
        with self._written:
            self._last = Job(job.step, job.at, Measured())
        for lane in self._lanes:
            given = [*records, *own] if lane.every_rank else records
            if given:
                lane.put(job.step, job.at, given)


def _without_secrets(record: Record) -> Record:
    """An alert, which may quote an exception or a log; any other record as it is."""
    if not isinstance(record, Alert):
        return record
    return replace(record, title=redact(record.title), text=redact(record.text))


def _without_media(table: Table) -> Table:
    """The table with the tags of its sounds and pictures in their place: numbers and text travel between ranks."""
    rows = (tuple(cell.tag if isinstance(cell, Audio | Image) else cell for cell in row) for row in table.rows)
    return replace(table, rows=tuple(rows))


def _with_tables(records: Sequence[Record], shares: Sequence[Share]) -> list[Record]:
    """Rank 0's records with other ranks' rows after its own; their first cell says which rank they are of."""
    rows: dict[tuple[str, tuple[str, ...]], tuple[tuple[Cell, ...], ...]] = {}
    for share in shares:
        for table in share.tables:
            named = tuple((f"rank {share.rank}: {row[0]}", *row[1:]) for row in table.rows if row)
            rows[table.tag, table.columns] = rows.get((table.tag, table.columns), ()) + named
    joined = [
        replace(record, rows=record.rows + rows.pop((record.tag, record.columns), ()))
        if isinstance(record, Table)
        else record
        for record in records
    ]
    return [*joined, *(Table(tag, columns, more) for (tag, columns), more in rows.items())]
