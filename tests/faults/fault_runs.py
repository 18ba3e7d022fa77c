"""Runs programs in processes of their own, and reads what they leave behind."""

from __future__ import annotations

import contextlib
import math
import os
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import psutil
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
from tensorboard.compat.proto.types_pb2 import DT_FLOAT
from tensorboard.util.tensor_util import make_ndarray

ROOT = Path(__file__).parents[2]
HERE = Path(__file__).parent
LOGS = "logs"
ENVIRONMENT = {
    "PYTHONPATH": os.pathsep.join(map(str, (ROOT, HERE))),
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
}

# What the callbacks measure of each due step of the tiny text model, one tag of each; and what the Trainer logs.
MEASURED = ("inputs/tokens/total", "outputs/loss/text", "gradients/total_norm", "telemetry/step_seconds")
LOGGED = "train/loss"


@dataclass(frozen=True)
class Ended:
    """A program that has ended.

    Attributes:
        status: exit status, negative for a signal.
        seconds: how long it ran.
        at: when it ended, in the seconds of ``time.monotonic()``.
        said: standard output and error.
    """

    status: int
    seconds: float
    at: float
    said: str


class Program:
    """A program that runs."""

    def __init__(self, process: subprocess.Popen[bytes], log: Path) -> None:
        self.process = process
        self._log = log
        self._began = time.monotonic()

    def wait(self, seconds: float) -> Ended:
        """How it ended; it has this long."""
        status = self.process.wait(timeout=seconds)
        now = time.monotonic()
        return Ended(status, now - self._began, now, self._log.read_text(errors="replace"))


@contextlib.contextmanager
def started(command: Sequence[str], directory: Path, **environment: str) -> Iterator[Program]:
    """Start a program; it is gone when the context ends, however it ends."""
    log = directory / "said.txt"
    with log.open("wb") as stream:
        program = Program(_popen(command, stream, {**ENVIRONMENT, **environment}), log)
    try:
        yield program
    finally:
        if program.process.poll() is None:
            _end(program.process)


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a program that has taken too long, with what it has started."""
    processes = [*psutil.Process(process.pid).children(recursive=True), process]
    for one in processes:
        one.kill()
    process.wait()


def _popen(command: Sequence[str], stream: IO[bytes], environment: Mapping[str, str]) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=stream, stderr=subprocess.STDOUT, env={**os.environ, **environment}
    )


def scenario(name: str, directory: Path) -> list[str]:
    """The command of one scenario."""
    return [sys.executable, str(HERE / "scenarios.py"), name, str(directory)]


def run(name: str, directory: Path, seconds: float = 90) -> Ended:
    """Run a scenario to its end."""
    with started(scenario(name, directory), directory) as program:
        return program.wait(seconds)


def on_two_ranks(name: str, directory: Path, seconds: float = 120) -> Ended:
    """Run a scenario on two ranks, by torchrun."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    with started([*torchrun, *scenario(name, directory)[1:]], directory) as program:
        return program.wait(seconds)


def wait_until(holds: Callable[[], bool], seconds: float = 60) -> None:
    """Ask again until something holds."""
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, "it never came"
        time.sleep(0.05)


def points(path: Path) -> dict[str, list[tuple[int, float]]]:
    """Tag → ``(step, value)`` in the order of an event file, twice where it is there twice."""
    found: dict[str, list[tuple[int, float]]] = defaultdict(list)
    for event in EventFileLoader(str(path)).Load():
        for value in event.summary.value:
            if value.tensor.dtype == DT_FLOAT and not value.tensor.tensor_shape.dim:
                found[value.tag].append((event.step, float(make_ndarray(value.tensor))))
    return found


def scalars(directory: Path) -> dict[str, list[tuple[int, float]]]:
    """What is in a run's only event file."""
    (path,) = (directory / LOGS).iterdir()
    return points(path)


def steps_of(directory: Path) -> dict[str, list[int]]:
    """Tag → steps in the order of a run's only event file."""
    return {tag: [step for step, _ in found] for tag, found in scalars(directory).items()}


def steps_in_files(directory: Path, tag: str) -> list[int]:
    """Steps that hold a tag in the event files of all attempts of a run, in their order."""
    paths = sorted((directory / LOGS).iterdir()) if (directory / LOGS).is_dir() else []
    return [step for path in paths for step, _ in points(path).get(tag, ())]


def assert_every_step(directory: Path, steps: Sequence[int]) -> None:
    """Each of these steps is there once, in order, of every callback and of the Trainer; finite."""
    found = scalars(directory)
    for tag in (*MEASURED, LOGGED):
        assert [step for step, _ in found[tag]] == list(steps), tag
        assert all(math.isfinite(value) for _, value in found[tag]), tag
