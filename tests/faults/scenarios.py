"""Trainings in which something goes wrong, as programs: ``python scenarios.py NAME DIRECTORY``."""

from __future__ import annotations

import contextlib
import functools
import gc
import json
import math
import os
import resource
import signal
import sys
import threading
import time
import tracemalloc
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import fault_runs
import psutil
import torch
from fault_runs import LOGGED, LOGS, MEASURED
from support import programs
from support import tiny_training as tiny
from support.backends import Faulty
from torch import Tensor
from transformers import TrainerCallback

import telemetry.delivery.recorder
from telemetry import ConsoleBackend, Step, StrategicTelemetry, TensorBoardBackend
from telemetry.backends.memory import MemoryBackend
from telemetry.instruments.outputs import OutputInstrument

BROKEN_FROM = 100
BLOCKED_FROM = 5
FULL_FROM, FREE_FROM = 6, 11
POISONED = 7
HELD = "held.json"
KILLED = 8
RAISES = 9
PAUSE = 0.15
ODD_BATCHES = {"no samples": (0, 6), "no positions": (2, 0), "one token": (1, 1), "two tokens": (1, 2)}
LEFT_OUT = "left out from now on"


def fail() -> None:
    raise ConnectionError("the fault of this test")


def dawdling() -> Faulty:
    """Each write takes longer than a step."""
    return Faulty(fault=lambda: time.sleep(PAUSE))


def block() -> None:
    threading.Event().wait()


def watched(directory: Path, *others: Any, **arguments: Any) -> StrategicTelemetry:
    """Telemetry at every step, to TensorBoard behind other backends."""
    return StrategicTelemetry(
        logging_steps=1, backends=[*others, TensorBoardBackend()], logging_dir=directory / LOGS, **arguments
    )


def run_beside(directory: Path, *backends: Faulty, steps: int = 20) -> None:
    tiny.train(directory, [tiny.Progress(directory), watched(directory, *backends)], steps)
    (directory / "writes.json").write_text(json.dumps({one.name: one.calls.count("write") for one in backends}))


# ------------------------------------------------------------------------------------------------------------ backends


def backends_raise(directory: Path) -> None:
    """Always, once, and after 100 writes; there are two writes a step."""
    always = Faulty(fault=fail, name="always")
    once = Faulty(fault=fail, at={5}, name="once")
    late = Faulty(fault=fail, at=range(BROKEN_FROM + 1, 10**6), name="late")
    run_beside(directory, always, once, late, steps=70)


def backend_blocks(directory: Path) -> None:
    telemetry.delivery.recorder.DRAIN_SECONDS = 2.0
    run_beside(directory, Faulty(fault=block, at={BLOCKED_FROM}))


def backend_blocks_until_the_end(directory: Path) -> None:
    """With less time for the end."""
    telemetry.delivery.recorder.DRAIN_SECONDS = 4.0
    run_beside(directory, Faulty(fault=block, at={BLOCKED_FROM}))


class Disk(TrainerCallback):
    """Has no room left from the end of one step to the end of another."""

    def __init__(self, watching: StrategicTelemetry, logs: Path) -> None:
        self._watching, self._logs = watching, logs

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step + 1 not in (FULL_FROM, FREE_FROM):
            return
        assert self._watching.session.recorder.drain()
        (file,) = self._logs.iterdir()
        room = file.stat().st_size + 50 if state.global_step + 1 == FULL_FROM else resource.RLIM_INFINITY
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, resource.RLIM_INFINITY))


def disk_is_full_for_a_while(directory: Path) -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    given = MemoryBackend()
    watching = watched(directory, given)
    tiny.train(directory, [watching, Disk(watching, directory / LOGS)])
    (directory / "given.json").write_text(
        json.dumps([(step, tag) for tag in given.records for step, _ in given.records[tag]])
    )


def threads_run_out(directory: Path) -> None:
    """From the first step on, with descriptors."""

    def run_out(**_: Any) -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (64, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
        with contextlib.suppress(OSError):
            while True:
                taken.append(os.open(os.devnull, os.O_RDONLY))
        threading.Thread.start = refuse  # type: ignore[method-assign]

    def refuse(_thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    def give_back(**_: Any) -> None:
        for descriptor in taken:
            os.close(descriptor)

    taken: list[int] = []
    tiny.train(directory, [Acts(1, run_out), Acts(20, give_back), watched(directory)])


# ----------------------------------------------------------------------------------------------------------------- ends


class Acts(TrainerCallback):
    """Does something when a step begins."""

    def __init__(self, step: int, action: Callable[..., Any]) -> None:
        self._step, self._action = step, action

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step + 1 == self._step:
            self._action(**kwargs)


def slow_steps(directory: Path) -> None:
    """More than there is time for before a signal comes. Each takes as long as writing the one before."""

    def wait_for_the_last_one(step: int) -> None:
        programs.wait_until(lambda: all(fault_runs.wrote(directory, tag, step - 1) for tag in (MEASURED[0], LOGGED)))

    tiny.train(directory, [tiny.Progress(directory, wait_for_the_last_one), watched(directory)], steps=2000)


def terminated_while_writing(directory: Path) -> None:
    """The first write waits for the end of training, and is interrupted by SIGTERM; the others take their time."""

    def write() -> None:
        if backend.calls.count("write") == 1:
            programs.wait_until((directory / tiny.OVER).exists)
            os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(PAUSE / 5)

    backend = Faulty(fault=write)
    run_beside(directory, backend)


def forked_child_exits(directory: Path) -> None:
    """In a program that handles SIGTERM itself, a copy of the process ends while a backend is at work."""
    signal.signal(signal.SIGTERM, lambda *_: None)
    seconds: list[float] = []

    def fork(**_: Any) -> None:
        began = time.monotonic()
        child = os.fork()
        if child == 0:
            sys.exit(0)
        assert os.waitpid(child, 0)[1] == 0
        seconds.append(time.monotonic() - began)

    backend = Faulty(fault=lambda: time.sleep(PAUSE), at={BLOCKED_FROM})
    tiny.train(directory, [watched(directory, backend), Acts(RAISES, fork)])
    (directory / "seconds.json").write_text(json.dumps(seconds))


def training_raises(directory: Path) -> None:
    def stop(**_: Any) -> None:
        raise ZeroDivisionError("the fault of this test")

    tiny.train(directory, [tiny.Progress(directory), watched(directory, dawdling()), Acts(RAISES, stop)])


def forked_loaders(directory: Path) -> None:
    """Three epochs, so that loaders are forked while telemetry's thread is at work."""
    backends = [ConsoleBackend(), TensorBoardBackend()]
    watching = StrategicTelemetry(logging_steps=1, backends=backends, logging_dir=directory / LOGS)
    loaders: set[int] = set()

    class Children(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            loaders.update(children())

    arguments: dict[str, Any] = {"dataloader_num_workers": 2, "dataset": tiny.rows(16)}
    tiny.train(directory, [tiny.Progress(directory), watching, Children()], steps=24, **arguments)
    gc.collect()  # iterators of loaders end their processes
    (directory / "loaders.json").write_text(json.dumps({"seen": sorted(loaders), "left": sorted(children())}))


def children() -> list[int]:
    """Processes that this one has started and that have not ended."""
    return [int(pid) for task in Path("/proc/self/task").iterdir() for pid in (task / "children").read_text().split()]


# ----------------------------------------------------------------------------------------------------------------- data


def logits_are_nan(directory: Path) -> None:
    def poison(model: Any, **_: Any) -> None:
        with torch.no_grad():
            model.lm_head.weight[3, 2] = float("nan")

    tiny.train(directory, [watched(directory), Acts(POISONED, poison)])


def with_and_without(directory: Path, shape: tuple[int, int]) -> None:
    """The same training on batches of a shape twice, first without telemetry."""
    for name in ("without", "with"):
        part = directory / name
        part.mkdir()
        callbacks: list[TrainerCallback] = [watched(part)] if name == "with" else []
        try:
            tiny.train(part, callbacks, steps=4, collator=functools.partial(batch_of, shape))
        except (RuntimeError, IndexError) as error:
            print(f"{name}: {error!r}", file=sys.stderr)  # what ended it is in the outcome


def batch_of(shape: tuple[int, int], samples: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.ones(shape, dtype=torch.long) for name in samples[0]}


def odd_batches(directory: Path) -> None:
    for name, shape in ODD_BATCHES.items():
        part = directory / name
        part.mkdir()
        with_and_without(part, shape)


# ---------------------------------------------------------------------------------------------------------------- ranks


def is_second_rank() -> bool:
    return os.environ.get("RANK") == "1"


def on_ranks(directory: Path, callbacks: Sequence[TrainerCallback], steps: int = 20) -> None:
    noted = [] if is_second_rank() else [tiny.Progress(directory)]
    tiny.train(directory, [*noted, *callbacks], steps, ddp_backend="gloo")
    torch.distributed.destroy_process_group()


def kill(**_: Any) -> None:
    if is_second_rank():
        os.kill(os.getpid(), signal.SIGKILL)


def rank_is_killed(directory: Path) -> None:
    on_ranks(directory, [watched(directory), Acts(KILLED, kill)])


def rank_is_killed_without_telemetry(directory: Path) -> None:
    on_ranks(directory, [Acts(KILLED, kill)])


def poison(model: Any = None, **_: Any) -> None:
    with torch.no_grad():
        next(model.parameters())[1, 7] = math.nan


def finding_stops_ranks(directory: Path) -> None:
    """Rank 0 alone sees the finding. The step after it begins when that has been judged."""
    watching = watched(directory, stop_on="failing")
    judged = Acts(RAISES + 1, lambda **_: watching.session.recorder.drain())
    on_ranks(directory, [watching, Acts(RAISES, poison), judged])
    print(f"stopped: {watching.stopped}\n", end="", flush=True)


class BreaksOnOneRank(OutputInstrument):
    """Raises on rank 1, before and after it has measured."""

    def outputs(self, step: Step, *args: Any) -> None:
        if is_second_rank() and step.number % 2 == 0:
            raise ValueError("the fault of this test")
        super().outputs(step, *args)
        if is_second_rank():
            raise ValueError("the fault of this test")


def rank_raises_in_a_measure(directory: Path) -> None:
    watching = watched(directory)
    watching.instruments = [
        BreaksOnOneRank() if isinstance(one, OutputInstrument) else one for one in watching.instruments
    ]
    on_ranks(directory, [watching])


# ------------------------------------------------------------------------------------------------------------ endurance


class Resources(TrainerCallback):
    """Notes what the process holds, each time with nothing waiting to be written.

    Args:
        watching: what writes.
        every: so many steps.
        trace: whether to count what Python has allocated since the first note too, which slows everything down.
    """

    def __init__(self, watching: StrategicTelemetry, every: int, trace: bool) -> None:
        self._watching, self._every, self._trace = watching, every, trace
        self.held: list[dict[str, int]] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 0 or state.global_step % self._every:
            return
        assert self._watching.session.recorder.drain()
        gc.collect()
        if self._trace and not self.held:
            tracemalloc.start()
        process = psutil.Process()
        self.held.append(
            {
                "step": state.global_step,
                "bytes": process.memory_info().rss,
                "allocated": tracemalloc.get_traced_memory()[0],
                "files": process.num_fds(),
                "threads": process.num_threads(),
            }
        )


def endures(directory: Path, steps: str, every: str, trace: str = "") -> None:
    """Many due steps. The Trainer logs none of them: its own history would grow."""
    watching = watched(directory)
    resources = Resources(watching, int(every), trace == "trace")
    dataset = tiny.rows(64) * (int(steps) // 32 + 1)
    arguments: dict[str, Any] = {"dataset": dataset, "logging_strategy": "no"}
    tiny.train(directory, [watching, resources], steps=int(steps) + 1, **arguments)
    (directory / HELD).write_text(json.dumps(resources.held))


if __name__ == "__main__":
    # Under its import name, so that what it stores is found again by the tests.
    import scenarios

    getattr(scenarios, sys.argv[1])(Path(sys.argv[2]), *sys.argv[3:])
