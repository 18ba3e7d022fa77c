"""What bringing ranks together costs rank 0's interpreter, with other ranks that answer at once."""

from __future__ import annotations

import statistics
import time
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor

from telemetry.delivery.reduction import RankGather, Share
from telemetry.records import Max, Mean, Metric, Perplexity, Spread

TAGS, STEPS = 400, 100
RANKS = (2, 16, 1024)


def report() -> list[tuple[str, ...]]:
    """Rows of ranks, milliseconds a step (median, quartiles), kilobytes, and the ratio to the fewest ranks."""
    rows: list[tuple[str, ...]] = []
    medians: list[float] = []
    gathers = {ranks: RankGather(None, rank=0, world_size=ranks) for ranks in RANKS}
    seconds: dict[int, list[float]] = {ranks: [] for ranks in RANKS}
    nbytes: dict[int, int] = {}
    for step in range(1, STEPS + 1):
        share = Share(step, metrics(), {"metric_0": "a note"}, ())
        for ranks, gather in gathers.items():
            seconds[ranks].append(_time(gather, share, ranks, nbytes))
    for ranks in RANKS:
        low, median, high = statistics.quantiles(seconds[ranks], n=4)
        medians.append(median)
        ratio = f"{median / medians[0]:.2f}"
        spread = f"{low * 1e3:.2f} to {high * 1e3:.2f}"
        rows.append((f"{ranks:,}", f"{median * 1e3:.2f}", spread, f"{nbytes[ranks] / 1e3:.1f}", ratio))
    return rows


def metrics() -> dict[str, Metric]:
    """Those of a due step: mostly means, and a histogram for each of 8 codebooks."""
    found: dict[str, Metric] = {f"metric_{n}": Mean(float(n), 2.0) for n in range(TAGS - 108)}
    found |= {f"largest_{n}": Max(float(n)) for n in range(50)}
    found |= {f"spread_{n}": Spread(8.0, float(n), 1.0) for n in range(50)}
    return found | {f"codebook_{k}": Perplexity(torch.ones(1026, dtype=torch.float64)) for k in range(8)}


def _time(gather: RankGather, share: Share, ranks: int, nbytes: dict[int, int]) -> float:
    over = SimpleNamespace(is_completed=lambda: True, wait=lambda: None)
    nbytes[ranks] = 0

    def reduced(tensor: Tensor, op: Any, **_: Any) -> Any:
        nbytes[ranks] += tensor.nbytes
        if op == dist.ReduceOp.SUM:
            tensor *= ranks
        return over

    with mock.patch.object(dist, "all_reduce", reduced), mock.patch.object(dist, "reduce", reduced):
        began = time.perf_counter()
        if gather.gather(share) is None:
            raise RuntimeError("rank 0 has nothing")
        return time.perf_counter() - began
