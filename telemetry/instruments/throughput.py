"""How fast training goes: means over all steps since the last due step, and which rank is the slowest."""

from __future__ import annotations

import functools
import os
import weakref
from collections.abc import Mapping

import psutil
import torch
from torch import Tensor, nn

from telemetry.delivery.recorder import Emitter
from telemetry.families.base import Family
from telemetry.instruments.base import NO_LAYERS, Instrument, Step
from telemetry.instruments.by_rank import Extremes
from telemetry.instruments.model_flops import UncountableError, operations_a_position, peak_operations
from telemetry.probes.pace import Steps
from telemetry.records import Max, Mean, Rate

SECONDS = "throughput/seconds_per_step"
LOADING = "throughput/loader_fraction"
FLOPS = "throughput/model_flops_per_second"
UTILIZATION = "throughput/model_flops_utilization"
RANKS = Extremes(SECONDS, "slowest_rank", "fastest_rank")
LOADERS = Extremes(LOADING, "slowest_loader", "fastest_loader")

_counted = weakref.WeakKeyDictionary[nn.Module, tuple[tuple[weakref.ref[Family] | None, list[bool]], float | str]]()


class ThroughputInstrument(Instrument):
    """Shows what the steps took that have ended since the last due step."""

    def finish(self, step: Step) -> None:
        """Send that on its way."""
        steps, recorder = step.sentinel.pace.take() if step.sentinel is not None else None, step.recorder
        if steps is None or not steps.count or steps.seconds <= 0:
            return  # before the end of the second step there is nothing to say
        counts, rank = not step.repeats_batch, step.rank if step.world_size > 1 else None
        recorder.metric(SECONDS, Mean(steps.seconds, float(steps.count)))
        RANKS.add(rank, recorder, steps.seconds / steps.count)
        if steps.loading is not None:
            recorder.metric(LOADING, Mean(steps.loading, steps.seconds))
            LOADERS.add(rank, recorder, steps.loading / steps.seconds)
        else:
            recorder.absent(LOADING, "only the Trainer shows how long it waits for data")
        if steps.tokens is not None:
            recorder.metric("throughput/tokens_per_second", Rate(float(steps.tokens) * counts, steps.seconds))
        else:
            recorder.absent("throughput/tokens_per_second", "the batches of steps that are not due are not seen")
        self._show_operations(step, steps)
        device = next((parameter.device for parameter in step.model.parameters()), torch.device("cpu"))

        def build(_host: Mapping[str, Tensor], emit: Emitter) -> None:
            emit.metric("throughput/memory_bytes", Max(_memory(device)))
            if steps.audio is not None:
                emit.metric("throughput/audio_seconds_per_second", Rate(steps.audio * counts, steps.seconds))
            else:
                emit.absent("throughput/audio_seconds_per_second", "batches do not say how long their target audio is")

        recorder.defer({}, build)
        recorder.show({}, RANKS.show)
        recorder.show({}, LOADERS.show)

    def _show_operations(self, step: Step, steps: Steps) -> None:
        """Show what is computed of the model a second, and which part that is of what the GPU could do."""
        counted = _operations_of(step)
        if isinstance(counted, str):
            step.recorder.absent(FLOPS, counted)
        elif steps.tokens is not None:
            operations = counted * steps.tokens * (not step.repeats_batch)
            step.recorder.metric(FLOPS, Rate(operations, steps.seconds))
            parameter = next(step.model.parameters())
            gpu = torch.cuda.get_device_name(parameter.device) if parameter.is_cuda else "a processor"
            dtype = step.autocast or parameter.dtype
            if step.world_size == 1 and torch.cuda.device_count() > 1:
                step.recorder.absent(UTILIZATION, "of several GPUs it is not known which work for this process")
            elif (peak := peak_operations(gpu, dtype)) is not None:
                step.recorder.metric(UTILIZATION, Mean(operations, peak * steps.seconds))
            else:
                step.recorder.absent(UTILIZATION, f"what {gpu} could do of {dtype} is not known")


def _operations_of(step: Step) -> float | str:
    """As :func:`_operations`, counted anew where others of the model's parameters are trained, or another reads it."""
    reader = None if step.family is None else weakref.ref(step.family)  # which holds the model
    known = reader, [one.requires_grad for one in step.model.parameters()]
    counted = _counted.get(step.model)
    if counted is None or counted[0] != known:
        counted = _counted[step.model] = known, _operations(step)
    return counted[1]


def _operations(step: Step) -> float | str:
    """Return the operations of a position, or why they are not counted."""
    if step.family is None or not step.family.layers():
        return NO_LAYERS
    try:
        return operations_a_position(step.model, step.family.group_of)
    except UncountableError as reason:
        return str(reason)


def _memory(device: torch.device) -> float:
    if device.type == "cuda":
        return float(torch.cuda.max_memory_allocated(device))
    return float(_process(os.getpid()).memory_info().rss)


@functools.lru_cache(maxsize=1)
def _process(pid: int) -> psutil.Process:
    """This process, which takes long to be found and no time to be asked."""
    return psutil.Process(pid)
