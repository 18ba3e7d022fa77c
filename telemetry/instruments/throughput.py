"""How fast training goes: means over all steps since the last due step, and which rank is the slowest."""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping

import numpy as np
import psutil
import torch
from torch import Tensor

from telemetry.delivery.recorder import Emitter
from telemetry.instruments.base import Instrument, Step
from telemetry.records import Max, Mean, Metric, Min, Rate

SECONDS = "throughput/seconds_per_step"
BY_RANK = "throughput/by_rank"


class ByRank(Metric):
    """One number of each rank, a vector that is 0 but for a rank's own place."""

    ops = ("sum",)
    shown = False


class ThroughputInstrument(Instrument):
    """Shows what the steps took that have ended since the last due step."""

    def finish(self, step: Step) -> None:
        """Send that on its way."""
        steps, recorder = step.sentinel.pace.take() if step.sentinel is not None else None, step.recorder
        if steps is None or not steps.count or steps.seconds <= 0:
            return  # before the end of the second step there is nothing to say
        counts = not step.repeats_batch
        recorder.metric(SECONDS, Mean(steps.seconds, float(steps.count)))
        if steps.loading is not None:
            recorder.metric("throughput/loader_fraction", Mean(steps.loading, steps.seconds))
        else:
            recorder.absent("throughput/loader_fraction", "only the Trainer shows how long it waits for data")
        if steps.tokens is not None:
            recorder.metric("throughput/tokens_per_second", Rate(float(steps.tokens) * counts, steps.seconds))
        else:
            recorder.absent("throughput/tokens_per_second", "the batches of steps that are not due are not seen")
        if step.world_size > 1:
            own = torch.zeros(step.world_size, dtype=torch.float64)
            own[step.rank] = steps.seconds / steps.count
            recorder.metric(BY_RANK, ByRank(own))
            recorder.show({}, _extremes)
        device = next((parameter.device for parameter in step.model.parameters()), torch.device("cpu"))

        def build(_host: Mapping[str, Tensor], emit: Emitter) -> None:
            emit.metric("throughput/memory_bytes", Max(_memory(device)))
            if steps.audio is not None:
                emit.metric("throughput/audio_seconds_per_second", Rate(steps.audio * counts, steps.seconds))
            else:
                emit.absent("throughput/audio_seconds_per_second", "batches do not say how long their target audio is")

        recorder.defer({}, build)


def _extremes(_host: Mapping[str, Tensor], emit: Emitter) -> None:
    """Name the slowest and the fastest of the ranks that were heard."""
    merged = emit.merged(BY_RANK)
    if merged is None:
        return
    each = np.asarray(merged.components[0])
    heard = np.flatnonzero(each)
    if heard.size > 1:
        slowest, fastest = heard[each[heard].argmax()], heard[each[heard].argmin()]
        emit.metric("throughput/slowest_rank/seconds_per_step", Max(float(each[slowest])), f"rank {slowest}")
        emit.metric("throughput/fastest_rank/seconds_per_step", Min(float(each[fastest])), f"rank {fastest}")


def _memory(device: torch.device) -> float:
    if device.type == "cuda":
        return float(torch.cuda.max_memory_allocated(device))
    return float(_process(os.getpid()).memory_info().rss)


@functools.lru_cache(maxsize=1)
def _process(pid: int) -> psutil.Process:
    """This process, which takes long to be found and no time to be asked."""
    return psutil.Process(pid)
