"""Every step's losses, those of steps that are not due too: is each finite, and none exactly zero?"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from telemetry.delivery.recorder import Emitter
from telemetry.instruments.base import Instrument, Step
from telemetry.instruments.by_rank import Extremes
from telemetry.probes.sentinel import Names
from telemetry.records import Mean, Metric, Sum

NONFINITE, ZERO, MEDIAN = "steps/nonfinite_losses", "steps/zero_losses", "steps/median_loss"
NOT_SHOWN = "only the Trainer shows the loss of every step"
NAMED = 3  # samples
ODD_RANK = Extremes(MEDIAN, "highest_rank", "lowest_rank")


class First(Metric):
    """The first microbatch of a kind, on all ranks: its step, and what it is called. Shows nothing of its own."""

    shown = False

    def __init__(self, step: int, name: str) -> None:
        super().__init__()
        self.step, self.name = step, name

    def merge(self, other: Metric) -> First:
        """The earlier of both."""
        if not isinstance(other, First):
            raise TypeError(f"cannot merge First with {type(other).__name__}")
        return self if self.step <= other.step else other


class EveryStepInstrument(Instrument):
    """Counts microbatches since the last due step whose loss was not finite, or exactly 0; names the first of each.

    A loss of 0 has been put in the place of another, or there were no labels.
    """

    def finish(self, step: Step) -> None:
        """Send the losses on their way."""
        sentinel, recorder = step.sentinel, step.recorder
        if sentinel is None or not sentinel.watches:
            recorder.absent(NONFINITE, NOT_SHOWN)
            return
        seen = sentinel.take()
        if not seen:
            return
        device = seen[0][1].device
        losses = torch.stack([loss.to(device, torch.float32, non_blocking=True).reshape(()) for _, loss, _ in seen])
        named = [(number, names) for number, _, names in seen]
        rank = step.rank if step.world_size > 1 else None

        def build(host: Mapping[str, Tensor], emit: Emitter) -> None:
            values = host["losses"].tolist()
            if finite := [value for value in values if math.isfinite(value)]:
                median = statistics.median(finite)
                emit.metric(MEDIAN, Mean(median, 1))
                ODD_RANK.add(rank, emit, median)
            for tag, count, first in judged(named, values, rank):
                emit.metric(tag, Sum(count))
                if first is not None:
                    emit.metric(f"{tag}/first", first)

        def show(_host: Mapping[str, Tensor], emit: Emitter) -> None:
            for tag in (NONFINITE, ZERO):
                if isinstance(first := emit.merged(f"{tag}/first"), First):
                    emit.notes[tag] = first.name

        recorder.defer({"losses": losses}, build)
        recorder.show({}, show)
        recorder.show({}, ODD_RANK.show)


def judged(
    named: Sequence[tuple[int, Names]], losses: Sequence[float], rank: int | None
) -> Iterable[tuple[str, int, First | None]]:
    """Count the losses of each kind, and name the first.

    Args:
        named: the step of each, and what its samples are called.
        losses: as many.
        rank: that they are of; None of a single process.
    """
    known = list(zip(named, losses, strict=True))
    for tag, bad in ((NONFINITE, lambda loss: not math.isfinite(loss)), (ZERO, lambda loss: loss == 0)):
        found = [one for one, loss in known if bad(loss)]
        yield tag, len(found), _first(*found[0], rank) if found else None


def _first(step: int, known: Names, rank: int | None) -> First:
    names = [str(name) for name in known if name is not None]
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    samples = f" (samples {', '.join(names[:NAMED])}{more})" if names else ""
    return First(step, f"first at step {step}{'' if rank is None else f' on rank {rank}'}{samples}")
