"""The W&B backend: a queue, a thread of its own, and bounds on everything that may wait."""

from __future__ import annotations

import importlib.util
import logging
import math
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from telemetry.backends.base import Run
from telemetry.catalogue import is_the_trainers
from telemetry.delivery import shutdown
from telemetry.delivery.worker import Worker
from telemetry.records import Alert, Record, Scalar, held_bytes

if TYPE_CHECKING:
    from telemetry.backends.wandb.client import WandbClient
    from telemetry.backends.wandb.values import Values

MAX_QUEUE_BYTES = 128 * 2**20
CLOSE_SECONDS = 25.0  # less than the recorder waits for all backends together
NUMBERS_SECONDS = 5.0  # of these, for numbers that a table has kept from the disk
ALERT_SECONDS = 600.0
MAX_HELD = 16  # steps whose tables and sounds wait for a server that is away
MAX_SENT = 4  # steps whose tables and sounds are kept for a client's process that dies with them
AWAY_SECONDS = 30.0  # before they are tried again: each try may keep numbers from the disk for 20 s

logger = logging.getLogger(__name__)


@dataclass(eq=False)
class _Job:
    """Something to do for W&B."""

    kind: Literal["open", "write", "close"]
    step: int = 0
    records: Sequence[Record] = ()

    @property
    def nbytes(self) -> int:
        return sum(held_bytes(record) for record in self.records)

    def drop_media(self) -> int:
        before = len(self.records)
        self.records = [record for record in self.records if isinstance(record, Scalar)]
        return before - len(self.records)

    def drop_all(self) -> int:
        dropped, self.records = len(self.records), ()
        return dropped


class WandbBackend:
    """Shows records in Weights & Biases.

    Joins the run that is active in the process, or opens one and finishes it. Without a key or a server it keeps the
    run on disk and says at the end how to send it. :meth:`open` and :meth:`write` return at once, whatever the server
    does: the client's calls, which may wait for it, are made on a thread of this backend's own. :meth:`close` takes
    25 seconds at most.

    A step is a row of its numbers and, where it has tables, sound or pictures, a second one, on the axis
    ``train/global_step``. A resumed run goes on where its checkpoint is.

    Args:
        trainer_logs: whether to send ``train/``, ``eval/`` and ``test/``; False where the Trainer's own WandbCallback
            does.
        every_rank: have every rank write to the one run, as a writer labelled ``rank_<r>`` with system metrics of its
            own and its own scalars, before ranks are brought together, under ``rank_<r>/``.

    Attributes:
        dropped_records: records that were lost, because they had to wait for too long or W&B gave up.
    """

    name = "wandb"

    def __init__(self, trainer_logs: bool = True, every_rank: bool = False) -> None:
        self.every_rank = every_rank
        self._trainer_logs = trainer_logs
        self._run: Run | None = None
        self._begin()

    def _begin(self) -> None:
        """As new: one backend serves the trainings of a Trainer one after the other."""
        self.dropped_records = 0
        self._worker: Worker[_Job] = Worker(self._work, MAX_QUEUE_BYTES, self._count_dropped)
        self._client: WandbClient | None = None
        self._values: Values | None = None
        self._held: deque[_Job] = deque()
        self._sent: deque[tuple[int, _Job]] = deque(maxlen=MAX_SENT)  # row, what it shows
        self._away_until = 0.0
        self._sending_held = False
        self._alerted: dict[tuple[str, str], float] = {}
        self._reopened = False
        self._given_up = False
        self._said: set[str] = set()

    @property
    def unshown_records(self) -> int:
        """Records that W&B has no way to show."""
        return self._values.unshown_records if self._values is not None else 0

    def open(self, run: Run) -> None:
        """Have a run opened, in the background.

        Raises:
            ImportError: when the client is not installed.
        """
        if importlib.util.find_spec("wandb") is None:
            raise ImportError("Weights & Biases needs its client: pip install wandb")
        self._begin()
        self._run = run
        self._worker.put(_Job("open"))

    def write(self, step: int, records: Sequence[Record]) -> None:
        """Have the records of one step sent, in the background.

        Raises:
            RuntimeError: before :meth:`open`, or when W&B was given up.
        """
        if self._run is None:
            raise RuntimeError("write() before open()")
        if self._given_up:
            raise RuntimeError("W&B was given up")
        self._worker.put(_Job("write", step, records if self._trainer_logs else _without_trainers(records)))

    def close(self) -> None:
        """Send what is left and finish the run, within 25 seconds; what is left then stays on disk."""
        if self._run is None:
            return
        self._worker.put(_Job("close"))
        done = self._worker.drain(CLOSE_SECONDS - NUMBERS_SECONDS) or self._numbers_written()
        self._worker.close()
        client = self._client
        if client is None:
            if not done:
                logger.warning("W&B could not be opened before training ended")
            return
        if not done:
            client.abandon()
            logger.warning("W&B did not take everything within %.0f s", CLOSE_SECONDS)
        if (not done or client.is_offline) and client.sync_command:
            logger.info("send this run to W&B with: %s", client.sync_command)

    def _numbers_written(self) -> bool:
        """Have the numbers written that wait behind a table which the server does not take; whether all was done."""
        if self._sending_held:
            self._away_until = math.inf
            self._worker.replace(_Job("write"))
        return self._worker.drain(NUMBERS_SECONDS)

    # -- the backend's own thread -------------------------------------------------------------------------------------

    def _work(self, job: _Job) -> None:
        try:
            if job.kind == "open":
                self._open()
            elif self._given_up or self._client is None:
                self._count_dropped(len(job.records))
            elif job.kind == "write":
                self._write(self._client, job)
            else:
                self._send_held(self._client)
                self._count_dropped(sum(held.drop_all() for held in self._held))
                self._client.finish()
        except Exception:
            if job.kind == "write" and self._client is not None and not self._client.is_alive():
                self._reopen(self._client, job)
                return
            self._count_dropped(len(job.records))
            if job.kind == "open":
                self._given_up = True
            if job.kind not in self._said:
                self._said.add(job.kind)
                logger.exception("W&B could not %s; training goes on", job.kind)

    def _open(self) -> None:
        # The client takes a second to import: not on the recorder's thread, where TensorBoard's steps wait.
        from telemetry.backends.wandb.client import WandbClient
        from telemetry.backends.wandb.values import Values

        shutdown.close_before_others()  # the import has left exit hooks, which remove files that are yet to be sent
        assert self._run is not None
        self._values = Values()
        client = WandbClient(self._run, self.every_rank)
        client.open()
        self._client = client

    def _write(self, client: WandbClient, job: _Job) -> None:
        numbers = {record.tag: record.value for record in job.records if isinstance(record, Scalar)}
        if numbers:  # first, and by themselves: a server that is away holds tables up, not numbers
            if not client.has(job.step, numbers):
                client.log(job.step, numbers, numbers)
            job.records = [record for record in job.records if not isinstance(record, Scalar)]
        while alert := next((record for record in job.records if isinstance(record, Alert)), None):
            self._alert(client, alert)
            job.records = [record for record in job.records if record is not alert]
        if job.records:
            self._held.append(job)
            if len(self._held) > MAX_HELD:
                self._count_dropped(self._held.popleft().drop_all())
            if time.monotonic() >= self._away_until:
                self._send_held(client)

    def _send_held(self, client: WandbClient) -> None:
        """Send tables, sound and pictures, those first that a server that was away has not taken."""
        assert self._values is not None
        while self._held and self._away_until < math.inf:
            job = self._held[0]
            tags = [record.tag for record in job.records]
            self._sending_held = True
            try:
                if not client.has(job.step, tags) and (values := self._values.shows(job.step, job.records)):
                    self._sent.append((client.log(job.step, values, tags), job))
            except Exception as error:
                self._values.begin_tables_again()
                if not client.is_alive():
                    raise
                if "held" not in self._said:
                    self._said.add("held")
                    logger.warning("W&B did not take the tables of step %d (%s): they are sent again", job.step, error)
                self._away_until = max(self._away_until, time.monotonic() + AWAY_SECONDS)
                return
            finally:
                self._sending_held = False
            if self._worker.is_current():
                self._held.popleft()

    def _alert(self, client: WandbClient, alert: Alert) -> None:
        """One alert of a tag and title in ten minutes: what is wrong at one due step is mostly wrong at the next."""
        rule, now = (alert.tag, alert.title), time.monotonic()
        if now - self._alerted.get(rule, -ALERT_SECONDS) >= ALERT_SECONDS:
            self._alerted[rule] = now
            client.alert(alert.title, alert.text, alert.level)

    def _reopen(self, client: WandbClient, job: _Job) -> None:
        """The client's process has died: go on in another, once."""
        if not self._reopened:
            self._reopened = True
            logger.warning("the W&B client's process has died: going on in another")
            try:
                first_lost = client.reopen()
                self._held.extendleft(sent for row, sent in reversed(self._sent) if row >= first_lost)
                self._sent.clear()
                if self._values is not None:
                    self._values.begin_tables_again()
                if job in self._held:
                    self._send_held(client)
                else:
                    self._write(client, job)
                return
            except Exception:
                logger.exception("W&B could not be opened again")
        self._given_up = True
        self._count_dropped(len(job.records) + sum(held.drop_all() for held in self._held if held is not job))
        self._held.clear()
        client.abandon()
        logger.error("W&B is given up; training goes on. Send what is on disk with: %s", client.sync_command)

    def _count_dropped(self, records: int) -> None:
        self.dropped_records += records
        if records and "dropped" not in self._said:
            self._said.add("dropped")
            logger.warning("records were lost on their way to W&B")


def _without_trainers(records: Sequence[Record]) -> list[Record]:
    return [record for record in records if not (isinstance(record, Scalar) and is_the_trainers(record.tag))]
