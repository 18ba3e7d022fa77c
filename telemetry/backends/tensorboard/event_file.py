"""An event file that survives what happens to long runs: kill -9, full disks, forks, restarts, clocks set back.

Every record of the file (:mod:`telemetry.tfrecord`) is one ``Event`` proto, and goes to the kernel in one write on an
append-only descriptor: what was written is kept when the process dies.
"""

from __future__ import annotations

import logging
import math
import os
import re
import socket
import threading
import time
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary

from telemetry import tfrecord
from telemetry.backends.locks import is_locked, lock, unlock

logger = logging.getLogger(__name__)

_NAME = re.compile(r"tfevents\.(\d+)")

_naming = threading.Lock()  # two that begin in one second and process would take one name

_files: weakref.WeakSet[EventFile] = weakref.WeakSet()


class InUseError(Exception):
    """Another run writes to the directory."""


class EventFile:
    """The only writer of a directory's newest event file.

    The file begins with its version, a START of session, on which readers drop what an earlier attempt left at
    ``first_step`` and later, and ``first_values`` at that step. Its name and its times come after those of every event
    file in the directory, also when the clock does not: readers take files in the order of their names.

    In a forked child every method does nothing, so that a copy of the writer (in a data loader's worker) cannot
    disturb the file.

    While it writes, it holds a lock on the file, which ends with the process: so another run sees that the directory is
    in use, and one that goes on where a process was killed that it is not.

    Attributes:
        path: where the file is.
        lost_steps: events that could not be written.

    Raises:
        InUseError: when another run writes to the directory.
        OSError: when the directory or the file cannot be made.
    """

    def __init__(self, directory: Path, first_step: int, first_values: Sequence[Summary.Value] = ()) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self.lost_steps = 0
        self._owner = os.getpid()
        self._size = 0
        self._failing = False
        self._descriptor: int | None = None
        with _naming:
            seconds, self._clock = _after(directory)
            self.path = directory / f"events.out.tfevents.{seconds:010d}.{socket.gethostname()}.{os.getpid()}"
            self._descriptor = self._made()
        _files.add(self)
        self._beginning = b"".join(
            (
                self._record(file_version="brain.Event:2"),
                self._record(step=first_step, session_log=SessionLog(status=SessionLog.START)),
                self._record(step=first_step, summary=Summary(value=first_values)),
            )
        )
        # Kept until it is in the file: without it readers misplace everything that follows.
        self._preamble = self._beginning
        self._try_write(b"")

    def append(self, step: int, values: Sequence[Summary.Value], at: float | None = None) -> bool:
        """Write one event, and say whether it is in the file. A disk that fails costs events, never an exception.

        ``at`` is when it happened, in seconds since the epoch; None for now.
        """
        if self._descriptor is None or self._owner != os.getpid():
            return False
        written = self._try_write(self._record(at, step=step, summary=Summary(value=values)))
        self.lost_steps += not written
        return written

    def close(self) -> None:
        """Let go of the file. What was appended is in it already."""
        if self._descriptor is not None and self._owner == os.getpid():
            unlock(self._descriptor)
            self.let_go()

    def let_go(self) -> None:
        """Close the descriptor in this process, be it the writer's or a copy of it."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def _made(self) -> int:
        """The file, empty and locked; there for others when it has been locked."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        before = self.path.with_name(f".{self.path.name.replace('tfevents', 'begun')}")
        descriptor = os.open(before, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND, 0o644)
        try:
            lock(descriptor)
            before.rename(self.path)
            if self._descriptor is None and any(map(is_locked, _others(self.path))):
                self.path.unlink()
                raise InUseError(f"another run writes to {self.path.parent}")
        except BaseException:
            os.close(descriptor)
            raise
        finally:
            before.unlink(missing_ok=True)
        return descriptor

    def _make_again(self) -> None:
        """Begin the file anew, for later steps: someone has deleted it."""
        descriptor = self._made()
        assert self._descriptor is not None
        os.close(self._descriptor)
        self._descriptor, self._size, self._preamble = descriptor, 0, self._beginning

    def _record(self, at: float | None = None, **fields: Any) -> bytes:
        return tfrecord.pack(Event(wall_time=self._clock.time(at), **fields).SerializeToString())

    def _try_write(self, record: bytes) -> bool:
        try:
            self._write(self._preamble + record)
        except OSError as error:
            if not self._failing:
                logger.warning("cannot write %s (%s): losing steps until it can be written again", self.path, error)
            self._failing = True
            return False
        self._preamble = b""
        if self._failing:
            logger.warning("writing %s again; %d steps were lost", self.path, self.lost_steps)
        self._failing = False
        return True

    def _write(self, data: bytes) -> None:
        """All of ``data`` after the last whole record, or none of it: a torn record would hide all later ones."""
        assert self._descriptor is not None
        if not self.path.exists():
            self._make_again()
            raise FileNotFoundError(f"{self.path.name} was deleted")
        if self._failing:
            os.ftruncate(self._descriptor, self._size)
        try:
            rest = memoryview(data)
            while rest:
                rest = rest[os.write(self._descriptor, rest) :]
        except OSError:
            os.ftruncate(self._descriptor, self._size)
            raise
        self._size += len(data)


def _others(path: Path) -> list[Path]:
    """Event files of runs that have begun before this one's."""
    return [other for other in path.parent.iterdir() if _NAME.search(other.name) and other.name < path.name]


def _let_go_in_child() -> None:
    """A lock is the descriptor's, which a forked child has too: it might outlive the run."""
    for file in list(_files):
        file.let_go()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_let_go_in_child)


class _Clock:
    """Seconds since the epoch that never go back, shifted to begin at ``start`` where the clock is earlier."""

    def __init__(self, start: float) -> None:
        self._shift = max(0.0, start - time.time())
        self._last = start

    def time(self, at: float | None = None) -> float:
        self._last = max(self._last, (time.time() if at is None else at) + self._shift)
        return self._last


def _after(directory: Path) -> tuple[int, _Clock]:
    """Whole seconds for the name of a new event file, and a clock for its events, after all that are there."""
    named = [(int(match[1]), path) for path in directory.iterdir() if (match := _NAME.search(path.name))]
    now = int(time.time())
    if not named:
        return now, _Clock(now)
    newest, path = max(named)
    seconds = max(now, newest + 1, math.ceil(_last_time(path)))
    return seconds, _Clock(seconds)


def _last_time(path: Path) -> float:
    """When the last whole event of a file was written; 0 where none can be read. Reads lengths, and only one event."""
    size = path.stat().st_size
    last = offset = 0
    with path.open("rb", buffering=0) as file:
        while len(header := os.pread(file.fileno(), tfrecord.HEADER.size, offset)) == tfrecord.HEADER.size:
            end = offset + tfrecord.OVERHEAD + tfrecord.HEADER.unpack(header)[0]
            if end > size:
                break
            last, offset = offset, end
        file.seek(last)
        try:  # bytes that are no event may still parse as one, from any year: what is damaged is left out
            data = tfrecord.read_record(file)
        except tfrecord.DamagedError:
            return 0.0
    return Event.FromString(data).wall_time if data else 0.0
