"""Ranks of one gloo group as forks of one process, with different things to measure: ``python rank_group.py WORLD``.

One joins late, one has no audio, one dies before the last steps. Rank 0 prints what it showed.
"""

from __future__ import annotations

import json
import logging
import math
import os
import sys
import tempfile
import time
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from telemetry.backends.base import Run
from telemetry.backends.memory import MemoryBackend
from telemetry.delivery.recorder import Recorder
from telemetry.delivery.reduction import RankGather
from telemetry.records import Max, Mean, Min, Norm, PresentSum, Scalar, Spread, Sum, UsedFraction

LATE, WITHOUT_AUDIO, DIES = 2, 1, 3
TOGETHER, ALONE = (1, 2, 3, 4), (5, 6)
NAN = 3  # a step in which the last rank has a value that is none


def audio(rank: int, step: int) -> np.ndarray | None:
    """What a rank has to measure of audio: values far from zero; None of a rank that has none, and at step 4 of all."""
    if rank == WITHOUT_AUDIO or step == 4:
        return None
    return 1e6 + np.random.default_rng([rank, step]).standard_normal(rank + 2)


def text(rank: int, step: int) -> np.ndarray:
    return np.random.default_rng([rank, step, 1]).standard_normal(2 * rank + 1) * (rank + 1)


def measure(recorder: Recorder, rank: int, step: int, world_size: int) -> None:
    own, codes = text(rank, step), audio(rank, step)
    recorder.metric("text/mean", Mean(float(own.sum()), float(own.size)), "odd" if step % 2 and rank == 1 else "")
    recorder.metric("text/norm", Norm(torch.tensor(float(np.square(own).sum()))))
    last = rank == world_size - 1
    recorder.metric("text/max", Max(math.nan if step == NAN and last else float(own.max())))
    recorder.metric("text/min", Min(float(own.min())))
    if codes is not None:
        recorder.metric("audio/mean", Mean(float(codes.sum()), float(codes.size)))
        recorder.metric(
            "audio/std", Spread(codes.size, float(codes.mean()), float(np.square(codes - codes.mean()).sum()))
        )
        recorder.metric("audio/used", UsedFraction(torch.nn.functional.one_hot(torch.tensor(rank % 3), 6)))
        recorder.metric("audio/absent", PresentSum(0.0, 0.0))
    if rank == step:
        recorder.metric(f"only/{rank}", Sum(rank))
    recorder.flush(step)


def run(rank: int, world_size: int, file: str) -> None:
    dist.init_process_group("gloo", f"file://{file}", rank=rank, world_size=world_size, timeout=timedelta(seconds=60))
    store = dist.distributed_c10d._get_default_store()
    if rank == LATE:
        time.sleep(0.5)
    backend = MemoryBackend()
    recorder = Recorder([backend] if rank == 0 else [], RankGather.join(), rank=rank)
    recorder.open(Run(Path("nowhere")))
    for step in TOGETHER:
        measure(recorder, rank, step, world_size)
    assert recorder.drain()
    dist.barrier()
    if rank == DIES:
        os._exit(9)
    began = time.monotonic()
    for step in ALONE:
        measure(recorder, rank, step, world_size)
    assert recorder.drain(50)
    if rank == 0:
        recorder.close()
        shown = {tag: backend.records[tag] for tag in backend.tags() if not tag.startswith("telemetry/")}
        scalars = {
            tag: [(step, one.value, one.note) for step, one in records if isinstance(one, Scalar)]
            for tag, records in shown.items()
        }
        print(json.dumps({"scalars": scalars, "seconds": time.monotonic() - began}), flush=True)
        store.set("over", "")
    store.wait(["over"])  # no rank learns of another by its end


def main() -> None:
    torch.set_num_threads(1)
    logging.basicConfig(format="%(message)s")
    world_size, file = int(sys.argv[1]), f"{tempfile.mkdtemp()}/store"
    children = {}
    for rank in range(world_size):
        child = os.fork()
        if not child:
            run(rank, world_size, file)
            os._exit(0)
        children[child] = rank
    for child, rank in children.items():
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        print(f"rank {rank} ended with {code}", file=sys.stderr)


if __name__ == "__main__":
    main()
