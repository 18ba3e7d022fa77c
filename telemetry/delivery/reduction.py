"""Brings what every rank has measured together on rank 0: off the training thread and off training's process groups."""

from __future__ import annotations

import contextlib
import logging
import math
import secrets
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from telemetry.delivery.layout import Entry, Layout, entries_of, is_flat
from telemetry.ranks import all_here
from telemetry.records import Metric, Table

logger = logging.getLogger(__name__)

GATHER_SECONDS = 120.0
MAX_LAYOUTS = 64
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
        rank: whose it is.
    """

    step: int
    metrics: dict[str, Metric]
    notes: dict[str, str]
    nonfinite: tuple[str, ...]
    tables: tuple[Table, ...] = ()
    rank: int = 0


class RankGather:
    """Brings values together on rank 0, on a gloo group of its own, at a cost that is that of one rank's values.

    Ranks agree first, in one small maximum: on the step, and on what they have measured, by a hash (:class:`Layout`).
    Then one sum and one maximum of flat vectors bring all values together. Where ranks have not measured the same, they
    exchange names once, and from then on send what every one of them may have. What is no number (names of non-finite
    values and their tables, notes that are new) is gathered in the steps in which a rank has any.

    Use :meth:`join` on the training thread of every rank, and :meth:`gather` from one thread on every rank, for the
    same steps in the same order. It never waits inside of a collective: a thread that is in one when the interpreter
    ends takes the process down with it ("terminate called").
    """

    def __init__(self, group: Any, rank: int, world_size: int) -> None:
        self._group = group
        self._rank = rank
        self._world_size = world_size
        self._given_up = threading.Event()
        self._left = False
        self._sent: tuple[Tensor, ...] = ()
        self._own = Layout(())
        self._own_entries: tuple[Entry, ...] = ()
        # What ranks may have that have not measured the same, by the largest and smallest id of their layouts.
        self._common: dict[tuple[int, int], Layout] = {}
        self._made: dict[Entry, Metric] = {}  # of each entry of these one metric, for its kind
        self._told: dict[str, str] = {}  # this rank's notes, as rank 0 knows them
        self._notes: dict[str, dict[int, str]] = {}  # on rank 0: tag → rank → note

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
        """All ranks' metrics and notes, as rank 0's share, before the shares of ranks that say more; only on rank 0.

        Raises:
            RuntimeError: when a rank is gone, does not come in time, or is at another step, or after :meth:`give_up`.
        """
        if self._left:
            raise RuntimeError("this rank has left the others")
        try:
            return self._brought_together(share)
        except Exception:
            self._leave()
            raise

    def give_up(self) -> None:
        """Have a gather that is under way end, and every later one: the time for it is over. Any thread may call it."""
        self._given_up.set()

    def launch_id(self) -> str:
        """Letters and digits of rank 0's choosing, the same on every rank. Call it on every rank at once."""
        chosen: list[Any] = [secrets.token_hex(4)]
        dist.broadcast_object_list(chosen, src=0, group=self._group)
        return str(chosen[0])

    def _brought_together(self, share: Share) -> list[Share] | None:
        flat = {tag: metric for tag, metric in share.metrics.items() if is_flat(metric)}
        entries = entries_of(flat)
        measured = dict(zip(entries, flat.values(), strict=True))
        if entries != self._own_entries:
            self._own_entries, self._own = entries, Layout(entries)
        others = {tag: metric.mapped(_copied) for tag, metric in share.metrics.items() if tag not in flat}
        said = replace(share, metrics=others, notes=self._new_notes(share), rank=self._rank)
        says = self._rank > 0 and bool(said.metrics or said.notes or said.nonfinite or said.tables)
        sums, extremes = self._own.pack(measured)
        agreement = self._agreed(share.step, self._own.id, says, bool(np.isnan(extremes).any()))

        layout, present = self._own, None
        if agreement.largest != agreement.smallest:
            layout = self._layout_of_all((agreement.largest, agreement.smallest), measured)
            sums, extremes = layout.pack(measured)
            present = layout.present(measured)
        nans = None
        if agreement.nans:  # of which a maximum makes what it likes; a sum does not
            nans = np.where(np.isnan(extremes), math.nan, 0.0)
            extremes = np.where(np.isnan(extremes), -math.inf, extremes)
        if layout.has_spreads:
            layout.centre(sums, self._all_reduced(layout.first_moments(sums), dist.ReduceOp.SUM), self._rank == 0)
        parts = [part for part in (sums, nans, present) if part is not None]
        summed = self._reduced(np.concatenate(parts), dist.ReduceOp.SUM)
        extremes = self._reduced(extremes, dist.ReduceOp.MAX)
        shares = self._gathered(said) if agreement.says else []
        if shares is None or self._rank > 0:
            return None

        sums, rest = np.split(summed, [layout.sums])
        if nans is not None:
            extremes = extremes + rest[: layout.extremes]
        there = None if present is None else rest[-len(present) :] > 0
        self._keep_notes(shares)
        whole, apart = dict(share.metrics), []
        for number, entry in enumerate(layout.entries):
            if there is not None and not there[number]:
                continue
            tag, made = entry[0], measured[entry] if entry in measured else self._made[entry]
            metric = _of_parts(made, layout.unpack(sums, extremes, entry))
            if entry in measured or tag not in whole:
                whole[tag] = metric
            else:  # ranks have it in several kinds or shapes
                apart.append(Share(share.step, {tag: metric}, {}, ()))
        notes = share.notes | {tag: of[max(of)] for tag, of in self._notes.items() if tag in whole}
        return [
            replace(share, metrics=whole, notes=notes),
            *apart,
            *(replace(other, notes={}) for other in shares if other.rank > 0),
        ]

    def _agreed(self, step: int, layout: int, says: bool, nans: bool) -> _Agreement:
        """What all ranks make of a step."""
        mine = np.array([step, -step, layout, -layout, says, nans], dtype=np.int64)
        latest, earliest, largest, smallest, any_says, any_nans = map(int, self._all_reduced(mine, dist.ReduceOp.MAX))
        if latest != -earliest:
            raise RuntimeError(f"ranks are at different steps: {[-earliest, latest]}")
        return _Agreement(largest, -smallest, bool(any_says), bool(any_nans))

    def _layout_of_all(self, key: tuple[int, int], measured: Mapping[Entry, Metric]) -> Layout:
        """The layout of what any rank has measured: where one finds something missing, all exchange their names."""
        common = self._common.get(key)
        missing = np.array([common is None or not common.covers(measured)], dtype=np.int64)
        if common is None or self._all_reduced(missing, dist.ReduceOp.MAX)[0]:
            if common is None and len(self._common) >= MAX_LAYOUTS:
                self._common, self._made = {}, {}
            found = self._gathered({entry: metric.mapped(lambda _: 0.0) for entry, metric in measured.items()})
            joined = None if found is None else {entry: made for other in found for entry, made in other.items()}
            told: dict[Entry, Metric] = self._told_to_all(joined)
            self._made |= told
            common = self._common[key] = Layout([*(common.entries if common else ()), *told])
        return common

    def _new_notes(self, share: Share) -> dict[str, str]:
        """The notes that rank 0 does not know; "" for one that is no more."""
        if self._rank == 0:
            return {}
        now = {tag: share.notes.get(tag, "") for tag in share.metrics}
        new = {tag: note for tag, note in now.items() if note != self._told.get(tag, "")}
        self._told |= new
        return new

    def _keep_notes(self, shares: Sequence[Share]) -> None:
        for share in shares:
            for tag, note in share.notes.items():
                if share.rank > 0:
                    of = self._notes.setdefault(tag, {})
                    of[share.rank] = note
                    if not note:
                        del of[share.rank]
                    if not of:
                        del self._notes[tag]

    def _leave(self) -> None:
        """Close this rank's connections: a rank that waits for one that is gone through others is told by nobody else.

        Not where a collective may be under way, whose end that would wait for.
        """
        self._left = True
        if self._group is not None and not self._given_up.is_set():
            group, self._group = self._group, None
            with contextlib.suppress(Exception):
                dist.destroy_process_group(group)

    # -- collectives, none of which is waited for inside --------------------------------------------------------------

    def _reduced(self, values: np.ndarray, op: Any) -> np.ndarray:
        """All ranks' values, on rank 0."""
        tensor = torch.from_numpy(values)
        if values.size:
            self._finish(dist.reduce(tensor, dst=0, op=op, group=self._group, async_op=True), tensor)
        return tensor.numpy()

    def _all_reduced(self, values: np.ndarray, op: Any) -> np.ndarray:
        """All ranks' values, on every rank."""
        tensor = torch.from_numpy(values)
        self._finish(dist.all_reduce(tensor, op=op, group=self._group, async_op=True), tensor)
        return tensor.numpy()

    def _told_to_all(self, said: Any) -> Any:
        """What rank 0 says, on every rank: as ``dist.broadcast_object_list``, which cannot be given up."""
        data, size = dist.distributed_c10d._object_to_tensor(said, torch.device("cpu"), self._group)
        self._finish(dist.broadcast(size, src=0, group=self._group, async_op=True), size)
        data.resize_(int(size))
        self._finish(dist.broadcast(data, src=0, group=self._group, async_op=True), data)
        return dist.distributed_c10d._tensor_to_object(data, int(size), self._group)

    def _gathered(self, sent: Any) -> list[Any] | None:
        """What every rank says, on rank 0: as ``dist.gather_object``, which cannot be given up."""
        data, size = dist.distributed_c10d._object_to_tensor(sent, torch.device("cpu"), self._group)
        sizes = [torch.zeros_like(size) for _ in range(self._world_size)]
        self._finish(dist.all_gather(sizes, size, group=self._group, async_op=True), size, *sizes)
        longest = int(max(sizes))
        data.resize_(longest)
        parts = [torch.empty_like(data) for _ in sizes] if self._rank == 0 else None
        self._finish(dist.gather(data, parts, dst=0, group=self._group, async_op=True), data, *(parts or ()))
        if parts is None:
            return None
        return [
            dist.distributed_c10d._tensor_to_object(part, int(of), self._group)
            for part, of in zip(parts, sizes, strict=True)
        ]

    def _finish(self, work: Any, *tensors: Tensor) -> None:
        self._sent = tensors  # gloo's thread, which the group's end waits for, must not be the last to let go of them
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


class _Agreement(NamedTuple):
    """The largest and smallest id of ranks' layouts; whether any says more, or has a NaN among its extremes."""

    largest: int
    smallest: int
    says: bool
    nans: bool


def _of_parts(made: Metric, parts: Sequence[np.ndarray]) -> Metric:
    rest = iter(parts)
    return made.mapped(lambda _: _component(next(rest)))


def _component(part: np.ndarray) -> Tensor | float:
    return torch.from_numpy(part) if part.ndim else float(part)


def _copied(part: Tensor | float) -> Tensor | float:
    """A tensor without the rest of the buffer that it is a view of, which would be sent with it."""
    return part.clone() if isinstance(part, Tensor) else part
