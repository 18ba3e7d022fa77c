"""The TensorBoard backend: one event file per (re)start, one event per step."""

from __future__ import annotations

import contextlib
import itertools
import logging
import shlex
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from telemetry.backends.base import Run
from telemetry.backends.tensorboard.event_file import EventFile, InUseError
from telemetry.backends.tensorboard.hparams import session_end, session_start
from telemetry.backends.tensorboard.layout import Layout
from telemetry.backends.tensorboard.summaries import Summaries
from telemetry.records import Record, Scalar

# TensorBoard keeps 10 clips and images of a tag by default and thins out the others; 0 would keep none.
_LOGS = (Path("logs"), Path("runs/telemetry"))
"""Where runs log by default, in their own directory: that names no run."""

_SAMPLES = "scalars=100000,text=1000,audio=200,images=200"


logger = logging.getLogger(__name__)


class TensorBoardBackend:
    """Shows records in TensorBoard.

    A resumed run supersedes what an earlier attempt left in the same directory after the checkpoint's step; a run that
    finds another at work there goes to a directory of its own inside, ``run-2``. A step is
    in the file when :meth:`write` returns, unless the disk refuses it: that is counted, logged once, and tried again
    with the next step. So is a file that was deleted: the next step is in a new one.

    Attributes:
        path: the event file, or None before :meth:`open`.
        step_time: when the step that is written next ended, in seconds since the epoch; None for now.
    """

    name = "tensorboard"

    def __init__(self) -> None:
        self.path: Path | None = None
        self.step_time: float | None = None
        self._file: EventFile | None = None
        self._summaries = Summaries()
        self._layout = Layout()
        self._step = 0

    @property
    def lost_steps(self) -> int:
        """Writes that the disk refused."""
        return self._file.lost_steps if self._file else 0

    @property
    def unshown_records(self) -> int:
        """Records that TensorBoard has no way to show."""
        return self._summaries.unshown_records

    def open(self, run: Run) -> None:
        """Begin an event file.

        Raises:
            OSError: when the directory or the file cannot be made.
        """
        # Records of the checkpoint's own step are kept: the first step of this attempt is the one after.
        first_step = run.starting_step + 1 if run.starting_step > 0 else 0
        opening = session_start(run.config, run.defaults, time.time())
        self._file = _file_of_its_own(Path(run.logging_dir), first_step, [opening])
        self.path = self._file.path
        self._step = run.starting_step

    def write(self, step: int, records: Sequence[Record]) -> int:
        """Show the records of one step.

        Returns:
            How many of them the disk has refused.

        Raises:
            RuntimeError: before :meth:`open`.
            ValueError: when the step is before an earlier one: readers would drop what lies between.
        """
        if self._file is None:
            raise RuntimeError("write() before open()")
        if step < self._step:
            raise ValueError(f"step {step} after step {self._step}: steps must not decrease")
        self._step = step
        layout = self._layout.update(record.tag for record in records if isinstance(record, Scalar))
        unshown = self.unshown_records
        values = [*([layout] if layout is not None else []), *self._summaries.encode(records)]
        if not values or self._file.append(step, values, self.step_time):
            return 0
        self._summaries.describe_again()
        self._layout.forget()
        return len(records) - (self.unshown_records - unshown)

    def close(self) -> None:
        """End the session and let go of the file."""
        if self._file is not None:
            self._file.append(self._step, [session_end(time.time())])
            self._file.close()


def _file_of_its_own(directory: Path, *beginning: Any) -> EventFile:
    """Two runs in one directory would be shown as one, of which readers take the later."""
    for number in itertools.count(1):
        within = directory if number == 1 else directory / f"run-{number}"
        with contextlib.suppress(InUseError):
            file = EventFile(within, *beginning)
            if number > 1:
                logger.warning("another run is writing to %s: this one goes to %s", directory, within)
            return file
    raise AssertionError("unreachable")


def launch_command(logging_dir: str | Path) -> str:
    """Return the shell command that shows a run beside its neighbours, with every sample that a long run needs.

    TensorBoard names runs by their path below the directory that it opens, so that is the one above the run: of
    ``runs/my_voice/logs`` it is ``runs``. ``tensorboard`` is named by its path where a shell would not find the one of
    this Python environment.
    """
    return f"{_program()} --logdir {shlex.quote(str(_above(Path(logging_dir))))} --samples_per_plugin {_SAMPLES}"


def _above(logging_dir: Path) -> Path:
    """The directory that holds a run; the run itself where that holds much else (a disk, a home, temporary files)."""
    run = logging_dir.resolve()
    for place in _LOGS:
        if run.parts[-len(place.parts) :] == place.parts:
            run = run.parents[len(place.parts) - 1]
    above = run.parent
    return run if above in (Path(above.anchor), Path.home(), Path(tempfile.gettempdir())) else above


def _program() -> str:
    beside = Path(sys.executable).parent / "tensorboard"
    found = shutil.which("tensorboard")
    if not beside.exists() or (found and Path(found).samefile(beside)):
        return "tensorboard"
    return shlex.quote(str(beside))
