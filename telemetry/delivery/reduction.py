"""Brings what every rank has measured together on rank 0: off the training thread and off training's process groups."""

from __future__ import annotations

import logging
import secrets
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from telemetry.ranks import all_here
from telemetry.records import Metric, Table

logger = logging.getLogger(__name__)

GATHER_SECONDS = 120.0
FIRST_POLL, LAST_POLL = 0.0002, 0.02  # seconds between two looks at whether a collective is over


@dataclass(frozen=True)
class Share:
    """What one rank has measured in a step.

    Attributes:
        step: the optimizer step.
        metrics: tag → value, its components host numbers and tensors.
        notes: tag → how it was measured.
        nonfinite: tags whose value is not finite on this rank.
        tables: from ranks other than 0: what their tables show where they have something non-finite.
    """

    step: int
    metrics: dict[str, Metric]
    notes: dict[str, str]
    nonfinite: tuple[str, ...]
    tables: tuple[Table, ...] = ()


class RankGather:
    """Two collectives a step on a gloo group of its own: sizes, then bytes. Ranks may have measured different tags.

    Use :meth:`join` on the training thread of every rank, and :meth:`gather` from one thread on every rank, for the
    same steps in the same order. It never waits inside of a collective: a thread that is in one when the interpreter
    ends takes the process down with it ("terminate called").
    """

    def __init__(self, group: Any, rank: int, world_size: int) -> None:
        self._group = group
        self._rank = rank
        self._world_size = world_size
        self._given_up = threading.Event()

    @classmethod
    def join(cls) -> RankGather | None:
        """The gather of all ranks; None for a single process, or where not every rank runs this telemetry.

        Forming a group needs every rank. So ranks first agree, over the store that formed the default group, that all
        of them are here; a rank that finds some missing says so, and all go on with numbers of their own.
        """
        if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
            return None
        world_size = dist.get_world_size()
        if not all_here(world_size):
            logger.warning("telemetry runs on some ranks only: its numbers are those of each rank alone")
            return None
        try:
            group = dist.new_group(backend="gloo", timeout=timedelta(seconds=GATHER_SECONDS))
        except RuntimeError as error:
            logger.warning("ranks cannot be brought together (%s): numbers are those of each rank alone", error)
            return None
        return cls(group, dist.get_rank(), world_size)

    def gather(self, share: Share) -> list[Share] | None:
        """Every rank's share, in the order of ranks, on rank 0; None on the others.

        Raises:
            RuntimeError: when a rank is gone, does not come in time, or is at another step, or after :meth:`give_up`.
        """
        # Arrays in the tensors' places: a pickled tensor carries the whole buffer that it is a view of.
        sent = _converted(share, lambda part: part.numpy() if isinstance(part, Tensor) else part)
        shares = self._gathered(sent)
        if shares is None:
            return None
        steps = {other.step for other in shares}
        if len(steps) != 1:
            raise RuntimeError(f"ranks are at different steps: {sorted(steps)}")
        return [
            _converted(other, lambda part: torch.from_numpy(part) if isinstance(part, np.ndarray) else part)
            for other in shares
        ]

    def give_up(self) -> None:
        """Have a gather that is under way end, and every later one: the time for it is over. Any thread may call it."""
        self._given_up.set()

    def launch_id(self) -> str:
        """Letters and digits of rank 0's choosing, the same on every rank. Call it on every rank at once."""
        chosen: list[Any] = [secrets.token_hex(4)]
        dist.broadcast_object_list(chosen, src=0, group=self._group)
        return str(chosen[0])

    def _gathered(self, sent: Share) -> list[Any] | None:
        """As ``dist.gather_object``, which cannot be given up."""
        data, size = dist.distributed_c10d._object_to_tensor(sent, torch.device("cpu"), self._group)
        sizes = [torch.zeros_like(size) for _ in range(self._world_size)]
        self._finish(dist.all_gather(sizes, size, group=self._group, async_op=True))
        longest = int(max(sizes))
        data.resize_(longest)
        parts = [torch.empty_like(data) for _ in sizes] if self._rank == 0 else None
        self._finish(dist.gather(data, parts, dst=0, group=self._group, async_op=True))
        if parts is None:
            return None
        return [
            dist.distributed_c10d._tensor_to_object(part, int(of), self._group)
            for part, of in zip(parts, sizes, strict=True)
        ]

    def _finish(self, work: Any) -> None:
        pause = FIRST_POLL
        while not work.is_completed():
            if self._given_up.wait(pause):
                raise RuntimeError("not every rank came before the end")
            pause = min(2 * pause, LAST_POLL)
        work.wait()  # raises what went wrong


def merge(shares: Sequence[Share]) -> tuple[dict[str, Metric], dict[str, str]]:
    """Metrics of all ranks as if measured together, and their notes."""
    metrics: dict[str, Metric] = {}
    notes: dict[str, str] = {}
    for share in shares:
        for tag, metric in share.metrics.items():
            metrics[tag] = metrics[tag].merge(metric) if tag in metrics else metric
        notes.update(share.notes)
    return metrics, notes


def _converted(share: Share, convert: Callable[[Any], Any]) -> Share:
    return replace(share, metrics={tag: metric.mapped(convert) for tag, metric in share.metrics.items()})
