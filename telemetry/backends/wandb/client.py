"""One W&B run: opening it whatever the network does, going on with an earlier one, and ending it in time."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import shlex
import socket
import subprocess
import sys
import time
import urllib.request
import weakref
from collections import deque
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import wandb
from wandb.errors import CommError, UsageError

from telemetry import shutdown
from telemetry.backends.base import Run
from telemetry.backends.wandb.attempts import Attempts, AttemptsFile, digest
from telemetry.backends.wandb.tables import shortened
from telemetry.catalogue import find
from telemetry.redaction import redact_arguments

AXIS = "train/global_step"
DEFAULT_PROJECT = "huggingface"  # as transformers' own callback
INIT_SECONDS = 20
REACH_SECONDS = 5.0  # for a server that is starting again
FINISH_SECONDS = 20.0
FLUSH_SECONDS = 0.5  # after which the client's process has written down what it was told
MAX_CONFIG_TEXT = 10_000  # characters
MAX_RECENT = 256  # rows that are kept for a client's process that dies with what it was told last

logger = logging.getLogger(__name__)

_opened: weakref.WeakSet[Any] = weakref.WeakSet()  # runs that are no user's to be joined: a training's each


class WandbClient:
    """The run that a backend writes to. All methods belong to one thread.

    Joins the run that is already active in the process, which stays its owner's to finish. Opens one otherwise, or
    where the active one is another training's: online where there is a key and the server answers, offline where not.

    A row of a joined run is its owner's too, who may number rows by the training's steps (``wandb.log(..., step=)``):
    the client drops what comes with a number that is past. So a step takes one row there, the one that is open or the
    next, and none whose number is ahead of training (:meth:`has_room`). Where the Trainer's own callback writes there
    too, which closes each of its rows and so gives whatever stands in them its step, ours are closed at once as well.

    Args:
        run: the training run.
        shared: whether every rank writes to the run, each as a labelled writer of its own.
    """

    def __init__(self, run: Run, shared: bool) -> None:
        self._run = run
        self._shared = shared
        self._is_guest = False
        self._taken = (-1, -1)  # the row of a joined run that was written last, and the step it is of
        self._ahead: int | None = None  # how far rows were ahead of steps when the first was written
        self._wandb_run: Any = None
        self._attempts: AttemptsFile | None = None
        self._owned = True
        self._offline = False
        self._next_row = 0
        # What the server has of an earlier attempt: everything before a step, and these rows (step, digest of tags).
        self._had_before = -1
        self._had: set[tuple[int, int]] = set()
        self._recent: deque[tuple[int, int, Mapping[str, Any]]] = deque(maxlen=MAX_RECENT)  # row, step, numbers
        self._defined: set[str] = set()

    @property
    def sync_command(self) -> str:
        """The shell command that sends what the run's directory holds; empty where there is nothing to send."""
        directory = getattr(getattr(self._wandb_run, "settings", None), "sync_dir", None)
        return f"wandb sync --include-online {shlex.quote(str(directory))}" if directory and self._owned else ""

    @property
    def is_offline(self) -> bool:
        """Whether nothing is sent before the user sends it."""
        return self._offline

    def open(self) -> None:
        """Join or open a run.

        Raises:
            Exception: whatever the client raises when it cannot even write to the disk.
        """
        if self._run.output_dir is not None and self._run.rank == 0 and self._run.starting_step == 0:
            Attempts.forget(self._run.output_dir)
        self._meet()

    def _meet(self) -> None:
        """Join the run that is active, or open one."""
        if wandb.run is not None and wandb.run not in _opened:
            self._join(wandb.run)
        else:
            self._open_own()
        self._wandb_run.define_metric(AXIS)

    def reopen(self) -> float:
        """Go on with the same run in another process of the client's: the one before has died.

        Numbers that it was told and that have not reached the server are sent again.

        Returns:
            The first row that has not reached the server; infinity for a run that is on disk.
        """
        run_id, project = self._wandb_run.id, self._wandb_run.project
        _tear_down()
        self._defined.clear()
        resume = None if self._offline or self._shared else "allow"
        self._begin(self._init("offline" if self._offline else "", id=run_id, project=project, resume=resume))
        self._wandb_run.define_metric(AXIS)
        first_lost = self._next_row if resume is not None else math.inf
        lost = [(step, values) for row, step, values in self._recent if row >= first_lost]
        self._recent.clear()
        for step, values in lost:
            self.log(step, values, values)
        return first_lost

    @property
    def was_ended(self) -> bool:
        """Whether somebody else has finished the run."""
        return bool(getattr(self._wandb_run, "_is_finished", False))

    def go_on(self) -> str:
        """Go on after somebody else has finished the run: in the one that is active now, or else in one of our own.

        That is the same run where a server has it; of two parts on disk, one would overwrite the other.

        Returns:
            The id of the run.
        """
        ended = self._wandb_run
        self._defined.clear()
        self._recent.clear()
        self._taken, self._ahead = (-1, -1), None
        if (wandb.run is not None and wandb.run not in _opened) or ended.offline:
            self._meet()
        else:
            self._begin(self._init("", id=ended.id, project=ended.project, resume="allow"))
            self._wandb_run.define_metric(AXIS)
        return str(self._wandb_run.id)

    def answers(self) -> bool:
        """Whether the server can be reached, if the run needs it."""
        return self._offline or _answers(wandb.setup().settings.base_url, 0.0)

    def is_alive(self) -> bool:
        """Whether the client's process still takes what it is told (whether the server does, is its business)."""
        try:
            for _ in range(3):  # what is said first to a process that is gone may seem to arrive
                self._wandb_run.define_metric(AXIS)
                time.sleep(0.05)
        except Exception:  # noqa: BLE001  (whatever the client makes of it)
            return False
        return True

    def has(self, step: int, tags: Iterable[str]) -> bool:
        """Whether an earlier attempt has sent such a row of a step, which the server could not take back."""
        return step < self._had_before or (step, digest(tags)) in self._had

    def log(self, step: int, values: Mapping[str, Any], tags: Iterable[str]) -> int:
        """Send one row, at once: a row that waited for others of its step would be on the server a step late.

        Args:
            step: the Trainer's.
            values: tag → what ``run.log`` takes.
            tags: of the records that the values were made of.

        Returns:
            The row's number.
        """
        for tag, value in values.items():
            if tag not in self._defined:
                self._defined.add(tag)
                self._define(tag, isinstance(value, float))
        if self._is_guest:
            self._log_as_guest(step, {**values, AXIS: step})
        else:
            self._wandb_run.log({**values, AXIS: step})
        if all(isinstance(value, float) for value in values.values()):
            self._recent.append((self._next_row, step, values))  # not before: who logs a row that failed does so again
        if self._attempts is not None:
            self._attempts.add(step, self._next_row, digest(tags))
        self._next_row += 1
        return self._next_row - 1

    def has_room(self, step: int, newest: int) -> bool:
        """Whether a row of a step can be written without one that is ahead of training.

        Args:
            step: the row's.
            newest: the step that training has come to.
        """
        if not self._is_guest:
            return True
        row = self._wandb_run.step
        if self._ahead is None:
            self._ahead = max(0, row - newest)
        return self._row_for(step, row) <= max(row, newest + self._ahead)

    def alert(self, title: str, text: str, level: str) -> None:
        """Notify people."""
        level = {"info": "INFO", "warning": "WARN", "error": "ERROR"}[level]
        self._wandb_run.alert(title=title, text=text, level=level, wait_duration=1)  # its own bound forgets the tag

    def finish(self) -> None:
        """Send what is left and end the run, if it is this client's."""
        if self._attempts is not None:
            self._attempts.close()
        if self._owned and self._wandb_run is not None:
            self._wandb_run.finish()

    def abandon(self) -> None:
        """Have the process end without waiting for the server: what it has not is in the run's directory."""
        if self._owned:
            # The client's own exit hook waits for the server without a bound.
            connection = getattr(wandb.setup(), "_connection", None)
            unregister = getattr(connection, "_cleanup", None)
            if unregister is not None:
                unregister()
            time.sleep(2 * FLUSH_SECONDS)

    def _row_for(self, step: int, row: int) -> int:
        """The open row, unless it holds another step."""
        taken, of = self._taken
        return row + 1 if row == taken and step != of else row

    def _log_as_guest(self, step: int, values: Mapping[str, Any]) -> None:
        is_open = self._wandb_run.step
        row = self._row_for(step, is_open)
        if row == is_open:
            self._wandb_run.log(values, commit=False)
        else:
            self._wandb_run.log(values, step=row)
            if self._wandb_run.step > row:  # its owner was quicker: the client may have dropped it
                self._wandb_run.log(values, commit=False)
        # Its owner may have gone on just before: then it is in the row that is open now.
        self._taken = max(row, self._wandb_run.step), step

    def _join(self, active: Any) -> None:
        self._wandb_run, self._owned = active, False
        closes_rows = "wandb" in str(self._run.config.get("report_to"))
        self._is_guest = not closes_rows and active.settings.mode != "shared"
        active.config.update(_config(self._run.config), allow_val_change=True)
        logger.info("telemetry goes to the W&B run that is active: %s", active.url or active.id)

    def _open_own(self) -> None:
        mode = self._mode()
        project = os.environ.get("WANDB_PROJECT") or DEFAULT_PROJECT
        if mode == "online":
            try:
                self._open_online(project)
                return
            except (CommError, UsageError, TimeoutError) as error:
                self._say_offline(f"W&B did not take the run ({error})")
                _tear_down()
                mode = "offline"
        if mode == "offline" and self._run.rank:
            mode = "disabled"  # writers of one run need its server: of runs on disk, one would overwrite the other
        self._offline = mode == "offline"
        # Of two attempts that are offline, one would overwrite the other when both are sent: each is a run of its own.
        run_id = self._run.launch_id or None
        self._begin(self._init(mode, project=project, config=_config(self._run.config), id=run_id))

    def _open_online(self, project: str) -> None:
        earlier = self._earlier(project)
        new: dict[str, Any] = {"project": project, "config": _config(self._run.config)}
        if earlier is None:
            self._begin(self._init("", id=self._run.launch_id or None, **new))
        elif self._shared:
            self._had_before = earlier.last_step() + 1
            self._begin(self._init("", id=earlier.run_id, **new))
        else:
            self._go_on(earlier, new)
        if self._run.output_dir is not None and self._run.rank == 0 and not os.environ.get("WANDB_RUN_ID"):
            self._attempts = AttemptsFile(self._run.output_dir, self._wandb_run.id, project, earlier is not None)

    def _go_on(self, earlier: Attempts, arguments: dict[str, Any]) -> None:
        """In the earlier attempt's run, after the checkpoint's step.

        The server takes the rows after it back where it can. Where it cannot, they stay, and are not sent again.
        """
        row = earlier.last_row(self._run.starting_step)
        if row is not None:
            try:
                self._begin(self._init("", resume_from=f"{earlier.run_id}?_step={row}", **arguments))
                self._next_row = row + 1
                self._had = earlier.rows_after(self._run.starting_step, row + 1)
                return
            except (CommError, UsageError) as error:
                logger.info("this W&B server does not rewind runs (%s): rows that it has are not sent again", error)
                _tear_down()
        self._begin(self._init("", id=earlier.run_id, resume="allow", **arguments))
        self._had_before = earlier.last_step(self._next_row)
        self._had = earlier.rows_after(self._had_before - 1, self._next_row)

    def _begin(self, wandb_run: Any) -> None:
        self._wandb_run, self._owned, self._is_guest = wandb_run, True, False
        _opened.add(wandb_run)
        self._next_row = wandb_run.starting_step
        shutdown.close_before_others()
        wandb_run.define_metric("*", step_metric=AXIS)

    def _init(self, mode: str, **arguments: Any) -> Any:
        directory = os.environ.get("WANDB_DIR") or str(self._run.output_dir or self._run.logging_dir)
        Path(directory).mkdir(parents=True, exist_ok=True)
        if not os.environ.get("WANDB_NAME") and self._run.name:
            arguments["name"] = self._run.name
        if wandb.run is not None:  # of another training in this process
            arguments["reinit"] = "create_new"
        shared = self._shared and not mode
        chosen: Any = "shared" if shared else mode or None
        return wandb.init(mode=chosen, dir=directory, settings=self._settings(shared), **arguments)

    def _settings(self, shared: bool) -> wandb.Settings:
        given: dict[str, Any] = {
            # Live: the least that the client takes (15 s by default), and in the file soon should the process die.
            "x_file_stream_transmit_interval": 1,
            "x_transaction_log_flush_interval": FLUSH_SECONDS,
            "init_timeout": INIT_SECONDS,
            "finish_timeout": FINISH_SECONDS,
            # Capturing the console means the client's code in every print of the training thread.
            "console": os.environ.get("WANDB_CONSOLE") or "off",
        }
        if redact_arguments(sys.argv) != sys.argv or _remote_has_secret():
            # The client writes the command line and the git remote down as they are, with nothing to change them.
            logger.info("the command line or the git remote holds a secret: W&B's own metadata is left out")
            given |= {"x_disable_meta": True, "disable_git": True}
        if shared:
            given |= {"x_label": f"rank_{self._run.rank}", "x_primary": self._run.rank == 0}
        return wandb.Settings(**given)

    def _mode(self) -> str:
        """What the environment says; else online where there is a key and a server."""
        chosen = os.environ.get("WANDB_MODE", "")
        if chosen not in ("", "online", "shared"):
            return chosen
        url = wandb.setup().settings.base_url
        if not wandb.login(prompt=False, verify=False):
            self._say_offline("no W&B key is configured (WANDB_API_KEY, or `wandb login`)")
            return "offline"
        if not _answers(url, REACH_SECONDS):
            self._say_offline(f"{url} does not answer")
            return "offline"
        return "online"

    def _say_offline(self, reason: str) -> None:
        logger.warning("%s: this run is kept on disk, to be sent with `wandb sync`", reason)

    def _earlier(self, project: str) -> Attempts | None:
        """The run to go on with. WANDB_RUN_ID leaves it to the user and the client."""
        if self._run.starting_step == 0 or self._run.output_dir is None or os.environ.get("WANDB_RUN_ID"):
            return None
        earlier = Attempts.read(self._run.output_dir)
        if earlier is None or earlier.project != project:
            logger.warning("no W&B run of an earlier attempt is known in %s: a new one begins", self._run.output_dir)
            return None
        return earlier

    def _define(self, tag: str, is_number: bool) -> None:
        entry = find(tag)
        best = {"higher": "max,last", "lower": "min,last"}.get((entry and entry.better) or "") if is_number else None
        if best is not None or not self._owned:  # of a run that is not ours only our own tags are defined
            self._wandb_run.define_metric(tag, step_metric=AXIS, summary=best)


def _config(value: Any) -> Any:
    """A configuration with its long texts cut."""
    if isinstance(value, Mapping):
        return {name: _config(held) for name, held in value.items()}
    if isinstance(value, list | tuple):
        return [_config(held) for held in value]
    return shortened(value, MAX_CONFIG_TEXT) if isinstance(value, str) else value


def _answers(url: str, patience: float) -> bool:
    """Whether something listens at an address; taken for granted behind a proxy, which only the client knows to use."""
    parts = urlsplit(url)
    host = parts.hostname or ""
    if urllib.request.getproxies().get(parts.scheme) and not urllib.request.proxy_bypass(host):
        return True
    deadline = time.monotonic() + patience
    while True:
        try:
            socket.create_connection((host, parts.port or (80 if parts.scheme == "http" else 443)), timeout=3).close()
            return True
        except OSError:
            if time.monotonic() > deadline:
                return False
            time.sleep(0.5)


def _remote_has_secret() -> bool:
    """Whether the git remote of the working directory has a user or a password in it."""
    with contextlib.suppress(OSError):  # without git the client cannot read it either
        asked = subprocess.run(
            ["git", "config", "--get", "remote.origin.url"], capture_output=True, text=True, check=False
        )
        remote = asked.stdout.strip()
        return redact_arguments([remote]) != [remote]
    return False


def _tear_down() -> None:
    """End the client's process: one that failed to open a run keeps the run's id in use."""
    with contextlib.suppress(Exception):
        wandb.teardown()
