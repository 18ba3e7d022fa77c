"""What 1,000 scalars a step cost the training thread, and how fast the background thread writes them."""

from __future__ import annotations

import importlib.util
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter

from telemetry.backends.base import Backend, Run
from telemetry.backends.memory import MemoryBackend
from telemetry.backends.tensorboard import TensorBoardBackend
from telemetry.delivery.recorder import Recorder
from telemetry.records import Mean, Scalar

SCALARS = 1000
STEPS = 30
TAGS = [f"train/value_{index}" for index in range(SCALARS)]


def report() -> list[tuple[str, ...]]:
    """Rows of way, milliseconds of the training thread a step (median), and the ratio to ``add_scalar``."""
    with tempfile.TemporaryDirectory() as directory:
        writers = dict(_writers(Path(directory)))
        seconds: dict[str, list[float]] = {name: [] for name in writers}
        for step in range(1, STEPS + 1):
            for name, write in writers.items():
                began = time.perf_counter()
                write(step)
                seconds[name].append(time.perf_counter() - began)
                time.sleep(0.05)  # the step that the background threads have for themselves
    base = statistics.median(seconds["SummaryWriter.add_scalar"])
    return [
        (name, f"{statistics.median(values) * 1e3:.2f}", f"{base / statistics.median(values):.1f} × cheaper")
        for name, values in seconds.items()
    ]


def throughput() -> list[tuple[str, ...]]:
    """Rows of backend and scalars a second through queue and backend."""
    with tempfile.TemporaryDirectory() as directory:
        return [
            (backend.name, f"{_throughput(backend, Path(directory)):,.0f}")
            for backend in (MemoryBackend(), TensorBoardBackend())
        ]


def _throughput(backend: Backend, directory: Path) -> float:
    with _recorder(backend, directory) as recorder:
        began = time.perf_counter()
        for step in range(1, 101):
            recorder.write(step, [Scalar(tag, 0.5) for tag in TAGS])
        if not recorder.drain(120):
            raise RuntimeError("the queue did not empty")
        return 100 * SCALARS / (time.perf_counter() - began)


def _writers(directory: Path) -> Iterator[tuple[str, Callable[[int], None]]]:
    summary_writer = SummaryWriter(str(directory / "torch"))
    yield "SummaryWriter.add_scalar", lambda step: [summary_writer.add_scalar(tag, 0.5, step) for tag in TAGS] and None
    if importlib.util.find_spec("wandb"):
        yield "wandb.log", _wandb(directory)
    recorder = Recorder([TensorBoardBackend()])
    recorder.open(Run(directory / "own"))

    def finished(step: int) -> None:
        recorder.write(step, [Scalar(tag, 0.5) for tag in TAGS])

    def measured(step: int) -> None:
        for tag in TAGS:
            recorder.metric(tag, Mean(0.5, 1.0))
        recorder.flush(step)

    yield "Recorder.write, finished scalars", finished
    yield "Recorder.metric and flush, means to reduce", measured


def _wandb(directory: Path) -> Callable[[int], None]:
    import wandb

    os.environ.setdefault("WANDB_SILENT", "true")
    run = wandb.init(mode="offline", dir=str(directory), project="benchmark")
    values = dict.fromkeys(TAGS, 0.5)
    return lambda step: run.log(values, step=step)


@contextmanager
def _recorder(backend: Backend, directory: Path) -> Iterator[Recorder]:
    recorder = Recorder([backend])
    recorder.open(Run(directory / backend.name))
    yield recorder
    recorder.close()
