"""Trainings that report to W&B while something goes wrong, as a program: ``wandb_scenarios.py DIRECTORY [NAME...]``.

Each scenario is a fork with a server of its own, so that all wait at the same time and the imports are paid once. Its
directory holds what it has seen (``seen.json``), the server's journal (``server``) and the client's files
(``client``). How all ended lies in ``ended.json``.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
import wandb.apis.public  # the client takes its time over these: once, before the forks
import wandb.sdk.launch.inputs.internal  # noqa: F401
from support import programs
from support.wandb_server import Fault, Server, client_environment, serve
from wandb.sdk.data_types._private import MEDIA_TMP

import telemetry.backends.wandb.client
import telemetry.backends.wandb.values
import telemetry.delivery.recorder
from telemetry.backends.base import Run
from telemetry.backends.wandb import WandbBackend
from telemetry.records import Audio, Clip, Mean, Table

LOSS, TOKENS, CLIPS = "outputs/loss/total", "inputs/tokens/total", "zero_shot/clips"
SEEN, STEPS, ENDED = "seen.json", "steps.txt", "ended.json"
STEP_SECONDS = 0.05
TABLE_EVERY = 10
FAULT_SECONDS = 4.0
CALM_SECONDS = 1.0
AT_ONCE = 6
RATE = 16_000
COLUMNS = ("step", "said", "sound")


@dataclass
class Seen:
    """What the training thread of a scenario has seen.

    Attributes:
        steps: how many were recorded.
        open_seconds: how long opening the recorder took.
        stalls: seconds that each step's calls took, on a machine with cores to spare.
        close_seconds: how long closing took.
        dropped: records that telemetry has counted as lost.
        streamed: a step that the server had a second before the trainer was killed.
    """

    steps: int = 0
    open_seconds: float = 0.0
    stalls: list[float] = field(default_factory=list)
    close_seconds: float = 0.0
    dropped: int = 0
    streamed: int = 0
    said: list[str] = field(default_factory=list)


class Stopwatch:
    """Times calls of the training thread, less the time in which no core was free for the thread that was to go on.

    That is this one, and then the one that held the interpreter's lock: of the others, the one that has waited longest.
    """

    @contextlib.contextmanager
    def timed(self, into: list[float]) -> Iterator[None]:
        waited, began = self._waited(), time.perf_counter()
        yield
        seconds, now = time.perf_counter() - began, self._waited()
        shortages = {thread: now[thread] - waited.get(thread, 0.0) for thread in now}
        own = shortages.pop(str(threading.get_native_id()), 0.0)
        into.append(max(0.0, seconds - own - max(shortages.values(), default=0.0)))

    def _waited(self) -> dict[str, float]:
        """Thread to the seconds that it has been ready to run and has not."""
        found = {}
        for task in Path("/proc/self/task").iterdir():
            with contextlib.suppress(OSError):  # it has just ended
                found[task.name] = int((task / "schedstat").read_text().split()[1]) / 1e9
        return found


class Training:
    """A loop that records steps as a training would: losses at each, a table with a sound at some."""

    def __init__(self, directory: Path, address: str) -> None:
        self.seen = Seen()
        self._directory = directory
        self._stopwatch = Stopwatch()
        os.environ.update(client_environment(address, directory / "client"))
        programs.Keeper("telemetry", self.seen.said).__enter__()
        began = time.perf_counter()
        self.recorder = telemetry.delivery.recorder.Recorder([WandbBackend()])
        self.recorder.open(Run(directory / "logs", name=directory.name, config={"scenario": directory.name}))
        self.seen.open_seconds = time.perf_counter() - began

    def steps(self, seconds: float) -> None:
        """Train for so long."""
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            time.sleep(STEP_SECONDS)
            self.seen.steps += 1
            with self._stopwatch.timed(self.seen.stalls):
                self._record(self.seen.steps)
            with (self._directory / STEPS).open("a") as file:
                file.write(f"{self.seen.steps} {time.monotonic()}\n")

    def _record(self, step: int) -> None:
        self.recorder.metric(LOSS, Mean(torch.tensor(1.0 / step), torch.tensor(1.0)))
        self.recorder.metric(TOKENS, Mean(float(step), 1.0))
        if step % TABLE_EVERY == 1:
            self.recorder.show({"codes": torch.arange(RATE // 10)}, functools.partial(clips, step))
        self.recorder.flush(step)

    def close(self) -> None:
        began = time.perf_counter()
        self.recorder.close()
        self.seen.close_seconds = time.perf_counter() - began
        self.seen.dropped = self.recorder.dropped_records
        self.keep()

    def keep(self) -> None:
        """Keep what was seen."""
        (self._directory / SEEN).write_text(json.dumps(asdict(self.seen)))


def clips(step: int, tensors: Any, emit: Any) -> None:
    """A table of a row with a sound in it, and the sound."""
    samples = 0.5 * np.sin(2 * np.pi * (200 + step) * tensors["codes"].numpy() / RATE)
    sound = Audio("zero_shot/clip_0/generated", (Clip(samples.astype(np.float32), RATE),))
    emit.record(Table(CLIPS, COLUMNS, ((step, f"sentence {step}", sound),)))
    emit.record(sound)


# ------------------------------------------------------------------------------------------------------------ scenarios

Scenario = Callable[[Training, Server], None]


def nothing_wrong(training: Training, server: Server) -> None:
    training.steps(FAULT_SECONDS)


def failing(status: int, training: Training, server: Server) -> None:
    """Everything is answered with an error for some seconds."""
    server.fail(Fault(status=status, seconds=FAULT_SECONDS))
    training.steps(FAULT_SECONDS + CALM_SECONDS)


def killed_and_back(training: Training, server: Server) -> None:
    server.kill()
    training.steps(FAULT_SECONDS)
    server.start()
    training.steps(CALM_SECONDS)


def slow(training: Training, server: Server) -> None:
    server.fail(Fault(delay=1.0))
    training.steps(FAULT_SECONDS)
    server.heal()


def gone_for_good(training: Training, server: Server) -> None:
    server.kill()
    training.steps(FAULT_SECONDS)


def stream_refused(status: int, training: Training, server: Server) -> None:
    """One answer with which the client stops to stream."""
    server.fail(Fault(of="file_stream", status=status, calls=1))
    training.steps(FAULT_SECONDS)


def blobs_forbidden(training: Training, server: Server) -> None:
    server.fail(Fault(of="upload", status=403))
    training.steps(FAULT_SECONDS)


def client_killed(training: Training, server: Server) -> None:
    """The client's own background process is gone."""
    for process in psutil.Process().children(recursive=True):
        if process.name().startswith("wandb-core"):
            process.kill()
    training.steps(FAULT_SECONDS)


def trainer_killed(training: Training, server: Server) -> None:
    """As soon as the client has had the time to write down what the server has."""
    training.steps(FAULT_SECONDS)
    training.seen.streamed = reached = training.seen.steps
    while server.run().points(LOSS)[-1][0] < reached:
        training.steps(0.2)
    training.steps(CALM_SECONDS)
    training.keep()
    os.kill(os.getpid(), signal.SIGKILL)


SCENARIOS: dict[str, Scenario] = {  # the longest first
    "gone for good": gone_for_good,
    "nothing wrong": nothing_wrong,
    "500 for a while": functools.partial(failing, 500),
    "429 for a while": functools.partial(failing, 429),
    "killed and back": killed_and_back,
    "slow": slow,
    "401 on the stream": functools.partial(stream_refused, 401),
    "404 on the stream": functools.partial(stream_refused, 404),
    "409 on the stream": functools.partial(stream_refused, 409),
    "403 on blobs": blobs_forbidden,
    "client killed": client_killed,
    "trainer killed": trainer_killed,
}
NEVER_REACHABLE = "never reachable"
NAMES = (NEVER_REACHABLE, *SCENARIOS)


def perform(name: str, directory: Path) -> None:
    """One scenario: a while without a fault, then what it is about."""
    if name == NEVER_REACHABLE:
        training = Training(directory, "http://127.0.0.1:9")
        training.steps(FAULT_SECONDS + CALM_SECONDS)
        training.close()
    else:
        with serve(directory / "server") as server:
            training = Training(directory, server.url)
            until_it_streams(training, server)
            SCENARIOS[name](training, server)
            training.close()


def until_it_streams(training: Training, server: Server) -> None:
    """Faults come in the middle of a run."""
    programs.wait_until(lambda: training.steps(0.2) or any(run.history() for run in server.runs()), 20)


def forked(name: str, directory: Path) -> int:
    """Start a scenario; its process. The fork ends as a program does, with all that wants to be done at its exit."""
    directory.mkdir()
    child = os.fork()
    if child:
        return child
    said = os.open(directory / "said.txt", os.O_WRONLY | os.O_CREAT)
    os.dup2(said, 1)
    os.dup2(said, 2)
    _own_media(directory / "media")
    perform(name, directory)
    sys.exit()


def _own_media(directory: Path) -> None:
    """The client makes its directory for media when it is imported: forks would remove each other's."""
    directory.mkdir()
    MEDIA_TMP.name = str(directory)


def main(directory: Path, names: Sequence[str]) -> None:
    gc.freeze()  # the end of a fork then need not go through all that was imported
    waiting, running, ended = list(names), {}, {}
    while waiting or running:
        while waiting and len(running) < AT_ONCE:
            name = waiting.pop(0)
            running[forked(name, directory / name)] = name
        child, status = os.wait()
        ended[running.pop(child)] = {"status": os.waitstatus_to_exitcode(status), "at": time.monotonic()}
    (directory / ENDED).write_text(json.dumps(ended))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:] or NAMES)
