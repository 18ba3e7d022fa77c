"""Programs in processes of their own: started, waited for, and gone when a test is over."""

from __future__ import annotations

import contextlib
import logging
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from . import fork_server

TESTS = Path(__file__).parents[1]
ROOT = TESTS.parent
# Before the arguments of Python, in the place of its path: a command that runs them as a fork, with the pipes, signals
# and end of any other. Where the interpreter's own end is not what is tested, a brief one will do.
FORK = (sys.executable, "-IS", fork_server.__file__, "--whole")
BRIEF_FORK = (*FORK[:-1], "--brief")
ENDS_WITHIN = 200.0  # a hang is all that it is there to end, on a machine with much else to do too


@dataclass(frozen=True)
class Ended:
    """A program that has ended.

    Attributes:
        status: exit status, negative for a signal.
        at: when it ended, in the seconds of ``time.monotonic()``.
        said: standard output and error.
    """

    status: int
    at: float
    said: str


class Program:
    """A program that runs."""

    def __init__(self, process: subprocess.Popen[bytes] | fork_server.Forked, log: Path) -> None:
        self.process = process
        self._log = log

    def wait(self, seconds: float = ENDS_WITHIN) -> Ended:
        """How it ended.

        Raises:
            AssertionError: when it has not in so many seconds; with what it has said.
        """
        try:
            status = self.process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"no end after {seconds} s:\n{self._said()}") from None
        return Ended(status, time.monotonic(), self._said())

    def _said(self) -> str:
        return self._log.read_text(errors="replace")


@contextlib.contextmanager
def started(
    arguments: Sequence[str], directory: Path, fresh: bool = False, brief: bool = False, **environment: str
) -> Iterator[Program]:
    """Start a program; it is gone when the context ends, however it ends.

    Args:
        arguments: of Python, see :class:`fork_server.Request`.
        directory: where what it says is kept.
        fresh: in an interpreter of its own, where the start of one is part of what is tested, not in a fork.
        brief: of a fork: see :class:`fork_server.Request`.
        environment: variables over those of this process.
    """
    log = directory / "said.txt"
    paths = [*filter(None, [environment.pop("PYTHONPATH", "")]), str(TESTS), str(ROOT)]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), **environment}
    with log.open("wb") as stream, Path(os.devnull).open("rb") as nothing:
        if fresh:
            process: subprocess.Popen[bytes] | fork_server.Forked = subprocess.Popen(
                [sys.executable, *arguments], stdin=nothing, stdout=stream, stderr=stream, env=env
            )
        else:
            descriptors = nothing.fileno(), stream.fileno(), stream.fileno()
            process = fork_server.Forked(arguments, *descriptors, env=env, brief=brief)
    try:
        yield Program(process, log)
    finally:
        if process.poll() is None:
            _end(process)


def _end(process: subprocess.Popen[bytes] | fork_server.Forked) -> None:
    """End a program that has taken too long, with what it has started."""
    with contextlib.suppress(psutil.NoSuchProcess):
        for child in psutil.Process(process.pid).children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                child.kill()
    process.kill()
    process.wait()


def run(
    arguments: Sequence[str],
    directory: Path,
    seconds: float = ENDS_WITHIN,
    fresh: bool = False,
    brief: bool = False,
    **environment: str,
) -> Ended:
    """Run a program to its end; arguments as of :func:`started`."""
    with started(arguments, directory, fresh, brief, **environment) as program:
        return program.wait(seconds)


def on_ranks(arguments: Sequence[str], ranks: int = 2, brief: bool = False) -> list[str]:
    """The arguments with which torchrun starts a program on several ranks, each of them a fork, perhaps a brief one."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}", "--no-python"]
    return [*torchrun, *(BRIEF_FORK if brief else FORK), *arguments]


def finish(arguments: Sequence[str], directory: Path, ranks: int = 1) -> None:
    """Run a program on so many ranks to its end, a brief one, which must be a good one."""
    ended = run(on_ranks(arguments, ranks, brief=True) if ranks > 1 else arguments, directory, brief=True)
    assert ended.status == 0, ended.said


class Keeper(logging.Handler):
    """Keeps what a logger says from INFO on, tracebacks included, as ``LEVEL message``; as a context, for a while."""

    def __init__(self, name: str, lines: list[str]) -> None:
        super().__init__()
        self.setFormatter(logging.Formatter("%(levelname)s %(message)s"))
        self._lines = lines
        self._logger = logging.getLogger(name)

    def __enter__(self) -> list[str]:
        self._before = self._logger.level
        self._logger.setLevel(logging.INFO)
        self._logger.addHandler(self)
        return self._lines

    def __exit__(self, *_: object) -> None:
        self._logger.setLevel(self._before)
        self._logger.removeHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        self._lines.append(self.format(record))


def wait_until(holds: Callable[[], Any], seconds: float = ENDS_WITHIN, unready: Any = ()) -> None:
    """Ask again until something holds; ``unready``: errors that say that it does not yet.

    Raises:
        AssertionError: when it does not in so many seconds.
    """
    deadline = time.monotonic() + seconds
    while True:
        with contextlib.suppress(unready):
            if holds():
                return
        assert time.monotonic() < deadline, "it never came"
        time.sleep(0.05)
