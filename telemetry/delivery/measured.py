"""What one step has measured: metric values, records, and work that needs host values."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch
from torch import Tensor

from telemetry.records import Metric, Record

_PLACE = torch.empty(0)


class Emitter(Protocol):
    """Where measured things go: what deferred work is given."""

    def metric(self, tag: str, value: Metric, note: str = "") -> None:
        """Add a metric value; merged with what the step already holds under the tag."""

    def record(self, record: Record) -> None:
        """Add a finished record."""

    def absent(self, tag: str, reason: str) -> None:
        """Say, once for a run, why a tag has no value."""

    def merged(self, tag: str) -> Metric | None:
        """All ranks' value of a metric: for work that shows. None where there is none, and on ranks other than 0."""


Build = Callable[[Mapping[str, Tensor], Emitter], None]


@dataclass
class Deferred:
    """Work on host values. ``shows``: it makes records and no metric, so only rank 0 needs it."""

    tensors: Mapping[str, Tensor]
    build: Build
    shows: bool


@dataclass
class Measured:
    """What one step has measured so far."""

    metrics: dict[str, Metric] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)
    records: list[Record] = field(default_factory=list)
    deferred: list[Deferred] = field(default_factory=list)

    def add_metric(self, tag: str, value: Metric, note: str) -> None:
        """Add a metric value; merged with what is held under the tag."""
        held = self.metrics.get(tag)
        self.metrics[tag] = value if held is None else held.merge(value)
        if note:
            self.notes[tag] = note

    def tensors(self) -> list[Tensor]:
        """Everything that has to come to the host, in the order that :meth:`hosted` takes it back."""
        parts = [part for metric in self.metrics.values() for part in metric.components if isinstance(part, Tensor)]
        return parts + [tensor for work in self.deferred for tensor in work.tensors.values()]

    def emptied(self) -> Measured:
        """The same without its tensors, for which places are kept: they may be large, on a device."""
        metrics = {tag: _emptied(metric) for tag, metric in self.metrics.items()}
        deferred = [replace(work, tensors=dict.fromkeys(work.tensors, _PLACE)) for work in self.deferred]
        return Measured(metrics, self.notes, self.records, deferred)

    def hosted(self, copies: Iterable[Tensor]) -> Measured:
        """The same over host values, which take the tensors' places."""
        rest = iter(copies)
        metrics = {
            tag: metric.with_components([_host(next(rest)) if isinstance(p, Tensor) else p for p in metric.components])
            for tag, metric in self.metrics.items()
        }
        deferred = [replace(work, tensors={name: next(rest) for name in work.tensors}) for work in self.deferred]
        return Measured(metrics, self.notes, self.records, deferred)


def _emptied(metric: Metric) -> Metric:
    if not any(isinstance(part, Tensor) for part in metric.components):
        return metric
    emptied = copy.copy(metric)
    emptied.components = tuple(_PLACE if isinstance(part, Tensor) else part for part in metric.components)
    return emptied


def _host(tensor: Tensor) -> Tensor | float:
    """0-d host tensors as numbers: cheaper to merge and to send."""
    return float(tensor) if tensor.dim() == 0 else tensor
