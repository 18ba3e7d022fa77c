"""Two processes of one gloo group, each given what to do by name: ``python rank_pair.py SCENARIO RANK STORE``."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from telemetry import ranks
from telemetry.backends.base import Run
from telemetry.backends.memory import MemoryBackend
from telemetry.delivery.recorder import Emitter, Recorder
from telemetry.delivery.reduction import RankGather
from telemetry.records import Max, Mean, Scalar, Sum, Table
from telemetry.session import Session
from telemetry.setting import Setting

STEPS = 3


def recorder_of(rank: int, backend: MemoryBackend) -> Recorder:
    recorder = Recorder([backend] if rank == 0 else [], RankGather.join())
    recorder.open(Run(Path("nowhere")))
    return recorder


def measure(recorder: Recorder, rank: int, step: int) -> None:
    """Rank 1 has three times the tokens and a tag of its own; rank 0 another."""
    recorder.metric("mean", Mean(torch.tensor(10.0 * step if rank else 2.0 * step), 3 if rank else 1), f"rank {rank}")
    recorder.metric("max", Max(float(rank)))
    recorder.metric(f"only_{rank}", Sum(torch.tensor(step)))
    recorder.flush(step)


def say(backend: MemoryBackend) -> None:
    for tag in backend.tags():
        if not tag.startswith("telemetry/"):
            for step, record in backend.records[tag]:
                if isinstance(record, Scalar):
                    print(tag, step, record.value, record.note, sep="|", flush=True)
                elif isinstance(record, Table):
                    print(tag, step, record.rows, sep="|", flush=True)


def together(rank: int) -> None:
    backend = MemoryBackend()
    recorder = recorder_of(rank, backend)
    for step in range(1, STEPS + 1):
        measure(recorder, rank, step)
    recorder.close()
    say(backend)


def nonfinite(rank: int) -> None:
    backend = MemoryBackend()
    recorder = recorder_of(rank, backend)

    def build(host: Mapping[str, Tensor], emit: Emitter) -> None:
        emit.record(Table("table", ("sample",), ((f"row of {int(host['rank'])}",),)))

    for step in (1, 2):
        bad = rank == 1 and step == 2
        recorder.metric("value", Max(torch.tensor(float("nan") if bad else 1.0)))
        recorder.show({"rank": torch.tensor(rank)}, build)
        recorder.flush(step)
    recorder.close()
    say(backend)


def alone(rank: int) -> None:
    """Only rank 0 runs telemetry; both meet in training's own collectives before, between and after."""
    ranks.JOIN_SECONDS = 1.0
    tensor = torch.ones(1)
    dist.all_reduce(tensor)
    backend = MemoryBackend()
    if rank == 0:
        recorder = recorder_of(rank, backend)
        measure(recorder, rank, 1)
    dist.all_reduce(tensor)
    if rank == 0:
        recorder.close()
        say(backend)
    print("reduced", tensor.item(), flush=True)


def late(rank: int) -> None:
    """Rank 1 comes when rank 0 has given up."""
    ranks.JOIN_SECONDS = 0.5
    if rank == 1:
        time.sleep(3)
    print("gather", RankGather.join(), flush=True)
    dist.barrier()


def dies(rank: int) -> None:
    backend = MemoryBackend()
    recorder = recorder_of(rank, backend)
    measure(recorder, rank, 1)
    assert recorder.drain()
    dist.barrier()
    if rank == 1:
        os._exit(9)
    time.sleep(1)
    began = time.monotonic()
    for step in (2, 3):
        measure(recorder, rank, step)
    assert recorder.drain(30)
    recorder.close()
    print("seconds", time.monotonic() - began, flush=True)
    say(backend)
    os._exit(0)  # the default group's own end needs the rank that is gone


def other_steps(rank: int) -> None:
    backend = MemoryBackend()
    recorder = recorder_of(rank, backend)
    for step in (1, 2):
        measure(recorder, rank, step + 10 * rank * (step == 2))
    recorder.close()
    say(backend)


def ends_before_the_other(rank: int) -> None:
    """Rank 1 has its numbers when rank 0 has ended only, which was not to wait for them any longer."""
    store = dist.distributed_c10d._get_default_store()
    backend = MemoryBackend()
    recorder = recorder_of(rank, backend)
    if rank == 1:
        recorder.defer({"any": torch.zeros(1)}, lambda *_: store.wait(["over"], timedelta(seconds=50)))
    for step in (1, 2):
        measure(recorder, rank, step)
    recorder.close(2.0 if rank == 0 else 5.0)
    if rank == 0:
        say(backend)
        store.set("over", "")


def recorder_fails(rank: int) -> None:
    """On rank 1, as often as it is asked for."""
    directory = Path(tempfile.mkdtemp())
    setting = Setting(directory, directory, lambda: [MemoryBackend()], lambda: {"any": 1 // (1 - rank)}, rank=rank)
    session = Session(torch.nn.Linear(1, 1), setting)
    for _ in range(3):
        with contextlib.suppress(ZeroDivisionError):
            print(type(session.recorder).__name__)
    session.close()
    print("meetings", next(ranks._sessions), flush=True)


SCENARIOS: dict[str, Callable[[int], Any]] = {
    function.__name__: function
    for function in (together, nonfinite, alone, late, dies, other_steps, ends_before_the_other, recorder_fails)
}

if __name__ == "__main__":
    name, rank, store = sys.argv[1], int(sys.argv[2]), sys.argv[3]
    logging.basicConfig(format="%(message)s")
    host, port = store.split(":")
    dist.init_process_group(
        "gloo", init_method=f"tcp://{host}:{port}", rank=rank, world_size=2, timeout=timedelta(seconds=60)
    )
    SCENARIOS[name](rank)
    dist.destroy_process_group()
