"""The W&B backend: numbers at once, tables and sounds when the server takes them, and bounds on what may wait."""

from __future__ import annotations

import importlib.util
import json
import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from telemetry import shutdown
from telemetry.backends.base import Run, without_the_trainers
from telemetry.once import Once
from telemetry.records import Alert, Record, Scalar, held_bytes

if TYPE_CHECKING:
    from telemetry.backends.wandb.client import WandbClient
    from telemetry.backends.wandb.values import Values

MAX_HELD_BYTES = 128 * 2**20  # of tables and sounds that wait for their turn, or for a server that is away
MAX_SENT = 4  # steps whose tables and sounds are kept for a client's process that dies with them
SLOW_SECONDS = 5.0  # of a table: the next ones then let all numbers go first. The very first takes 3 s anywhere
AWAY_SECONDS = 30.0  # before they are tried again: each try may keep numbers from the disk for 20 s
ALERT_SECONDS = 600.0
MAX_REFUSALS = 2  # of a table, after others were taken: then it is the table, and not the server
# What the client raises for content that it cannot take, whatever the server does.
BAD_CONTENT = (TypeError, ValueError, ArithmeticError, LookupError, AttributeError)
ROOM_SECONDS = 0.05  # before a joined run is asked again whether it has gone on

logger = logging.getLogger(__name__)


@dataclass(eq=False)
class _Media:
    """What is no number of a step, or the numbers of one that has no row yet."""

    step: int
    records: Sequence[Record]
    refusals: int = 0
    refused_at: int | None = None  # when so many others had been sent


class WandbBackend:
    """Shows records in Weights & Biases.

    Joins the run that is active in the process, or opens one and finishes it. Without a key or a server it keeps the
    run on disk and says at the end how to send it. Every method may wait for the server.

    A step is a row of its numbers and, where it has tables, sound or pictures, a second one, on the axis
    ``train/global_step``. Where the server is slow or away, second rows wait until no numbers do (:meth:`catch_up`).
    A resumed run goes on where its checkpoint is.

    Args:
        trainer_logs: whether to send ``train/``, ``eval/`` and ``test/``; False where the Trainer's own WandbCallback
            does.
        every_rank: have every rank write to the one run, as a writer labelled ``rank_<r>`` with system metrics of its
            own and its own scalars, before ranks are brought together, under ``rank_<r>/``.

    Attributes:
        dropped_records: records that were lost after :meth:`write` had taken them.
        newest_step: of the steps that were handed over so far, written or waiting.
    """

    name = "wandb"

    def __init__(self, trainer_logs: bool = True, every_rank: bool = False) -> None:
        self.every_rank = every_rank
        self._trainer_logs = trainer_logs
        self._begin()

    def _begin(self) -> None:
        """As new: one backend serves the trainings of a Trainer one after the other."""
        self.dropped_records = 0
        self.newest_step = 0
        self._client: WandbClient | None = None
        self._values: Values | None = None
        self._held: deque[_Media] = deque()
        self._sent: deque[tuple[int, _Media]] = deque(maxlen=MAX_SENT)  # row, what it shows
        self._taken = 0  # so many of what was held
        self._probing = False
        self._took = 0.0
        self._away_until = 0.0
        self._gone = False
        self._alerted: dict[tuple[str, str], float] = {}
        self._bad_tags: set[str] = set()
        self._reopened = False
        self._given_up = False
        self._once = Once(logger)

    @property
    def unshown_records(self) -> int:
        """Records that W&B has no way to show."""
        return self._values.unshown_records if self._values is not None else 0

    def open(self, run: Run) -> None:
        """Open a run, or join the one that is active.

        Raises:
            ImportError: when the client is not installed.
            Exception: whatever the client raises when it cannot even write to the disk.
        """
        if importlib.util.find_spec("wandb") is None:
            raise ImportError("Weights & Biases needs its client: pip install wandb")
        self._begin()
        # The client takes a second to import.
        from telemetry.backends.wandb.client import WandbClient
        from telemetry.backends.wandb.values import Values

        shutdown.close_before_others()  # the import has left exit hooks, which remove files that are yet to be sent
        self._values = Values()
        client = WandbClient(run, self.every_rank)
        client.open()
        self._client = client

    def write(self, step: int, records: Sequence[Record]) -> None:
        """Send the records of one step, numbers first, or keep what is no number for :meth:`catch_up`.

        Raises:
            RuntimeError: before :meth:`open`, or when W&B was given up.
            Exception: whatever the client raises for numbers, of a step that is then lost.
        """
        client = self._client
        if client is None:
            raise RuntimeError("write() before open()")
        if self._given_up:
            raise RuntimeError("W&B was given up")
        self._go_on(client)
        if not self._trainer_logs:
            records = without_the_trainers(records)
        scalars = [record for record in records if isinstance(record, Scalar)]
        numbers = _numbers(scalars)
        if numbers and not client.has(step, numbers):
            if client.has_room(step, self.newest_step):
                self._tell(client, lambda: client.log(step, numbers, numbers))
            else:
                self._hold(_Media(step, scalars))
        for record in records:
            if isinstance(record, Alert):
                self._alert(client, record)
        if media := [record for record in records if not isinstance(record, Scalar | Alert)]:
            waiting = bool(self._held)
            self._hold_apart(step, media)
            if not waiting and self._took <= SLOW_SECONDS:
                self.catch_up(last=False)

    def catch_up(self, last: bool) -> bool:
        """Send the tables, sound and pictures of one step, or with ``last`` of all that the server takes.

        Returns:
            Whether there are more that it may take now.
        """
        client = self._client
        if client is None or not self._held:
            return False
        self._go_on(client)
        if not last and time.monotonic() < self._away_until:
            return False
        if not last and not client.has_room(self._held[0].step, self.newest_step):
            time.sleep(ROOM_SECONDS)
            return True
        if not last:
            return self._send_first(client) and bool(self._held)
        self._gone = self._is_gone(client)
        failed = 0
        while self._held and not self._gone and failed < 2:  # the first may be its content's fault
            failed += not self._send_first(client)
            self._gone = failed > 0 and self._is_gone(client)
        self._drop_held()
        return False

    def close(self) -> None:
        """Send what is left and finish the run. Where the server is gone, what is left stays on disk."""
        client = self._client
        if client is None or self._given_up:
            return
        self.catch_up(last=True)
        if self._gone:
            self.abandon()
            return
        client.finish()
        if client.is_offline:
            _say_how_to_send(client)

    def abandon(self) -> None:
        """Have the process end without waiting for the server."""
        self._drop_held()
        if self._client is None:
            logger.warning("W&B could not be opened before training ended")
            return
        self._client.abandon()
        logger.warning("W&B did not take everything before training ended")
        _say_how_to_send(self._client)

    def _go_on(self, client: WandbClient) -> None:
        """See that there is a run, should somebody have finished it."""
        if not client.was_ended:
            return
        assert self._values is not None
        self._values.begin_tables_again()
        self._sent.clear()
        said = "the W&B run was finished while training goes on: telemetry goes on in run %s"
        logger.warning(said, client.go_on())

    def _tell(self, client: WandbClient, action: Callable[[], object]) -> None:
        """Tell the client something, if its process has died another one."""
        try:
            action()
        except Exception:
            if client.is_alive():
                raise
            if not self._reopen(client):
                raise
            action()

    def _is_gone(self, client: WandbClient) -> bool:
        """Whether a server that has been away of late cannot even be reached."""
        return time.monotonic() < self._away_until and not client.answers()

    def _hold(self, media: _Media) -> None:
        self._held.append(media)
        while sum(held_bytes(record) for held in self._held for record in held.records) > MAX_HELD_BYTES:
            self._drop(len(self._held.popleft().records))

    def _hold_apart(self, step: int, records: Sequence[Record]) -> None:
        """Hold what a step has to show, what was refused before by itself: it is not to be the end of the others."""
        bad = [record for record in records if record.tag in self._bad_tags]
        if others := [record for record in records if record.tag not in self._bad_tags]:
            self._hold(_Media(step, others))
        for record in bad:
            self._hold(_Media(step, [record]))

    def _is_bad(self, media: _Media, error: Exception) -> bool:
        """Whether the content is to blame for an error, and not a server that is away."""
        if isinstance(error, BAD_CONTENT) and not isinstance(error, json.JSONDecodeError):  # which a server answered
            return True
        media.refusals += media.refused_at is not None and self._taken > media.refused_at
        return media.refusals >= MAX_REFUSALS

    def _is_probed(self, media: _Media, client: WandbClient) -> bool:
        """Whether the next one is to show whose fault it is, in place of one that was refused before."""
        refused_before, media.refused_at = media.refused_at is not None, self._taken
        if self._end_probe() or not refused_before or len(self._held) < 2 or not client.answers():
            return False
        self._held.rotate(-1)
        self._probing = True
        return True

    def _end_probe(self) -> bool:
        """Have the one that was refused be the first again. Returns whether another was tried in its place."""
        probed, self._probing = self._probing, False
        if probed:
            self._held.rotate(1)
        return probed

    def _part(self, media: _Media, error: Exception) -> None:
        """What cannot be taken whole is sent one by one, and what cannot be taken alone is lost."""
        assert self._values is not None
        scalars = [record for record in media.records if isinstance(record, Scalar)]
        parts: list[Record] = [*scalars, *self._values.parts(media.records)]
        if len(parts) > 1:
            self._held.extendleft(_Media(media.step, [part]) for part in reversed(parts))
            return
        self._bad_tags |= {part.tag for part in parts}
        for part in parts:
            said = "W&B cannot take %s of step %d (%s): it is lost, as what follows of it may be"
            self._once.say(f"bad:{part.tag}", said, part.tag, media.step, error)
        self._drop(len(parts))

    def _send_first(self, client: WandbClient) -> bool:
        """Send what has been held for longest. Returns whether more can be sent."""
        assert self._values is not None
        media = self._held[0]
        tags = [record.tag for record in media.records]
        began = time.monotonic()
        try:
            if not client.has(media.step, tags) and (values := self._shown(media)):
                self._sent.append((client.log(media.step, values, tags), media))
        except Exception as error:  # noqa: BLE001  (whatever the client makes of a server that is away)
            self._values.begin_tables_again(tags)
            if not client.is_alive():
                self._values.begin_tables_again()
                return self._reopen(client)
            if self._is_bad(media, error):
                self._part(self._held.popleft(), error)
                return True
            if self._is_probed(media, client):
                return True
            said = "W&B did not take the tables of step %d (%s): they are sent again"
            self._once.say("held", said, media.step, error)
            self._away_until = time.monotonic() + AWAY_SECONDS
            return False
        finally:
            self._took = time.monotonic() - began
        self._held.popleft()
        self._taken += 1
        self._end_probe()
        if self._took > SLOW_SECONDS and not client.answers():  # the client's own copy may reach the disk even so
            self._away_until = time.monotonic() + AWAY_SECONDS
        return time.monotonic() >= self._away_until

    def _shown(self, media: _Media) -> dict[str, Any]:
        assert self._values is not None
        return _numbers(media.records) | self._values.shows(media.step, media.records)

    def _alert(self, client: WandbClient, alert: Alert) -> None:
        """One alert of a tag and title in ten minutes: what is wrong at one due step is mostly wrong at the next."""
        rule, now = (alert.tag, alert.title), time.monotonic()
        if now - self._alerted.get(rule, -ALERT_SECONDS) < ALERT_SECONDS:
            return
        self._alerted[rule] = now
        try:
            self._tell(client, lambda: client.alert(alert.title, alert.text, alert.level))
        except Exception as error:  # noqa: BLE001  (the step's numbers have been taken)
            logger.warning("W&B did not take an alert: %s", error)
            self._drop(1)

    def _reopen(self, client: WandbClient) -> bool:
        """Go on in another process of the client's, once: the one before has died. Returns whether that could be."""
        assert self._values is not None
        if not self._reopened:
            self._reopened = True
            logger.warning("the W&B client's process has died: going on in another")
            try:
                first_lost = client.reopen()
            except Exception:
                logger.exception("W&B could not be opened again")
            else:
                self._held.extendleft(sent for row, sent in reversed(self._sent) if row >= first_lost)
                self._sent.clear()
                self._values.begin_tables_again()
                return True
        self._given_up = True
        self._drop_held()
        client.abandon()
        logger.error("W&B is given up; training goes on. Send what is on disk with: %s", client.sync_command)
        return False

    def _drop_held(self) -> None:
        self._drop(sum(len(media.records) for media in self._held))
        self._held.clear()

    def _drop(self, records: int) -> None:
        self.dropped_records += records
        if records:
            self._once.say("dropped", "records were lost on their way to W&B")


def _numbers(records: Sequence[Record]) -> dict[str, Any]:
    return {record.tag: record.value for record in records if isinstance(record, Scalar)}


def _say_how_to_send(client: WandbClient) -> None:
    if client.sync_command:
        logger.info("send this run to W&B with: %s", client.sync_command)
