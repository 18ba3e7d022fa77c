"""What one step has measured (metric values, records, work that needs host values), and its way through the threads."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeAlias

import torch
from torch import Tensor

from telemetry.delivery.transfer import Transfer
from telemetry.records import Metric, Record, Scalar, held_bytes

_PLACE = torch.empty(0)


@dataclass
class Deferred:
    """Work on host values. ``shows``: it makes records and no metric, so only rank 0 needs it."""

    tensors: Mapping[str, Tensor]
    build: Build | None  # None when it has been dropped
    shows: bool


@dataclass
class Measured:
    """What one step has measured so far. Deferred work adds to it, too.

    Attributes:
        metrics: by tag, on the host.
        added: metrics that are merged into these when their tensors have come to the host, in their order.
    """

    metrics: dict[str, Metric] = field(default_factory=dict)
    added: list[tuple[str, Metric]] = field(default_factory=list)
    notes: dict[str, str] = field(default_factory=dict)
    records: list[Record] = field(default_factory=list)
    deferred: list[Deferred] = field(default_factory=list)
    absences: dict[str, str] = field(default_factory=dict)

    def metric(self, tag: str, value: Metric, note: str = "") -> None:
        """Add a metric value; merged with what the step already holds under the tag."""
        held = self.metrics.get(tag)
        self.metrics[tag] = value if held is None else held.merge(value)
        if note:
            self.notes[tag] = note

    def record(self, record: Record) -> None:
        """Add a finished record."""
        self.records.append(record)

    def absent(self, tag: str, reason: str) -> None:
        """Say, once for a run, why a tag has no value."""
        self.absences.setdefault(tag, reason)

    def merged(self, tag: str) -> Metric | None:
        """All ranks' value of a metric: for work that shows. None where there is none, and on ranks other than 0."""
        return self.metrics.get(tag)

    @property
    def nbytes(self) -> int:
        """Roughly what it holds in memory while it waits."""
        media = sum(held_bytes(record) for record in self.records if not isinstance(record, Scalar))
        return 128 * (len(self.metrics) + len(self.added)) + 64 * len(self.records) + media

    @property
    def count(self) -> int:
        """How many records it makes, as far as that can be told: work that is still to be done counts as one."""
        shown = len({tag for tag, metric in (*self.metrics.items(), *self.added) if metric.shown})
        return shown + len(self.records) + sum(work.build is not None for work in self.deferred)

    def drop_media(self) -> int:
        """Let go of what is large and shown; returns how many records that were."""
        before = self.count
        self.records = [record for record in self.records if isinstance(record, Scalar)]
        for work in self.deferred:
            work.build = None if work.shows else work.build
        return before - self.count

    def tensors(self) -> list[Tensor]:
        """Everything that has to come to the host, in the order that :meth:`hosted` takes it back."""
        parts = [part for _, metric in self.added for part in metric.components if isinstance(part, Tensor)]
        return parts + [tensor for work in self.deferred for tensor in work.tensors.values()]

    def emptied(self) -> Measured:
        """The same without its tensors, for which places are kept: they may be large, on a device."""
        added = [(tag, metric.mapped(_emptied)) for tag, metric in self.added]
        deferred = [Deferred(dict.fromkeys(work.tensors, _PLACE), work.build, work.shows) for work in self.deferred]
        return replace(self, added=added, deferred=deferred)

    def hosted(self, copies: Iterable[Tensor]) -> Measured:
        """The same over host values, which take the tensors' places."""
        rest = iter(copies)
        host = Measured({**self.metrics}, [], {**self.notes}, [*self.records])
        for tag, metric in self.added:
            host.metric(tag, metric.mapped(lambda part: _host(next(rest)) if isinstance(part, Tensor) else part))
        host.deferred = [
            Deferred({name: next(rest) for name in work.tensors}, work.build, work.shows) for work in self.deferred
        ]
        return host


@dataclass
class Job:
    """A step on its way.

    Attributes:
        step: the optimizer step.
        at: when it was handed over, in seconds since the epoch.
        measured: what is to be brought home and reduced over ranks; without a transfer, finished records.
        transfer: the host copies of its tensors.
        due: whether it is a due step's own.
        told: called in the background with the records that all ranks' values have made, none on ranks other than 0.
        saved: where a checkpoint has been saved; such a job has nothing else.
        last_word: of a job after which nothing comes: asked for what is still to be said of the run.
    """

    step: int
    at: float
    measured: Measured
    transfer: Transfer | None = None
    due: bool = False
    told: Callable[[Sequence[Record]], None] | None = None
    saved: Path | None = None
    last_word: Callable[[], Job] | None = None

    @property
    def nbytes(self) -> int:
        """Roughly what it holds in memory while it waits."""
        return self.measured.nbytes + (self.transfer.nbytes if self.transfer is not None else 0)

    def drop_all(self) -> int:
        """Let go of everything but the step itself; returns how many records that were."""
        dropped, self.measured = self.measured.count, Measured()
        self.transfer = None if self.transfer is None else Transfer(())
        return dropped

    def drop_media(self) -> int:
        """Let go of what is large and shown; returns how many records that were."""
        return self.measured.drop_media()


Emitter: TypeAlias = Measured
"""Where deferred work puts what it makes: the step, without what is not yet measured of it."""
Build: TypeAlias = Callable[[Mapping[str, Tensor], Emitter], None]


def _emptied(part: Tensor | float) -> Tensor | float:
    return _PLACE if isinstance(part, Tensor) else part


def _host(tensor: Tensor) -> Tensor | float:
    """0-d host tensors as numbers: cheaper to merge and to send."""
    return float(tensor) if tensor.dim() == 0 else tensor.double()
