"""Collects what one step measured, brings it to the host in one go, and hands records to every backend.

Callbacks only ever *add*: metric values (merged with what earlier microbatches of the step measured), finished
records, and deferred work that needs host values (:meth:`Recorder.defer`). :meth:`Recorder.flush` turns all of it
into records and writes them. A backend that fails is reported once, its lost records are counted, and it is left out
after repeated failures; training never notices.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from telemetry import catalogue
from telemetry.backends.base import Backend, Run
from telemetry.records import Metric, Record, Scalar

logger = logging.getLogger(__name__)

MAX_FAILURES = 3


class Emitter(Protocol):
    """Where measured things go: what deferred work is given."""

    def metric(self, tag: str, value: Metric, note: str = "") -> None:
        """Add a metric value; merged with what the step already holds under the tag."""

    def record(self, record: Record) -> None:
        """Add a finished record."""

    def absent(self, tag: str, reason: str) -> None:
        """Say, once for a run, why a tag has no value."""


Build = Callable[[Mapping[str, Tensor], Emitter], None]
Deferred = tuple[Mapping[str, Tensor], Build]


@dataclass
class _Step:
    """What one step has measured so far."""

    metrics: dict[str, Metric] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)
    records: list[Record] = field(default_factory=list)
    deferred: list[Deferred] = field(default_factory=list)

    def add_metric(self, tag: str, value: Metric, note: str) -> None:
        held = self.metrics.get(tag)
        self.metrics[tag] = value if held is None else held.merge(value)
        if note:
            self.notes[tag] = note


class Recorder:
    """Collects a step and writes it to ``backends``.

    Args:
        backends: destinations; none on ranks that show nothing.
    """

    def __init__(self, backends: Sequence[Backend]) -> None:
        self._backends = list(backends)
        self._failures = dict.fromkeys(range(len(self._backends)), 0)
        self._step = _Step()
        self._said: set[str] = set()
        self._opened: list[tuple[int, Backend]] = []
        self.dropped_records = 0

    def open(self, run: Run) -> None:
        """Open every backend; one that cannot be opened is left out and said."""
        for index, backend in enumerate(self._backends):
            if self._attempt(index, backend, "open", functools.partial(backend.open, run)):
                self._opened.append((index, backend))

    def metric(self, tag: str, value: Metric, note: str = "") -> None:
        """Add a metric value to the step. Launches device work only."""
        self._step.add_metric(tag, value, note)

    def record(self, record: Record) -> None:
        """Add a finished record to the step."""
        self._step.records.append(record)

    def defer(self, tensors: Mapping[str, Tensor], build: Build) -> None:
        """Have ``build(host_tensors, emitter)`` run when the step is flushed, with ``tensors`` copied to the host.

        The tensors must not change until then: hand over what is this step's own (results, or clones).
        """
        self._step.deferred.append((tensors, build))

    def absent(self, tag: str, reason: str) -> None:
        """Say once for this run why a tag has no value."""
        self.say_once(f"absent:{tag}", "no %s: %s", tag, reason, level=logging.INFO)

    def say_once(self, key: str, message: str, *args: object, level: int = logging.WARNING) -> None:
        """Log a message the first time its key comes up."""
        if key not in self._said:
            self._said.add(key)
            logger.log(level, message, *args)

    def discard(self) -> None:
        """Forget what the step has measured so far."""
        self._step = _Step()

    def flush(self, step: int) -> None:
        """Turn what was added since the last flush into the records of ``step`` and write them."""
        collected, self._step = self._step, _Step()
        hosted = _to_host(collected)
        for tensors, build in hosted.deferred:
            self._build(tensors, build, hosted)
        records = [*self._scalars(hosted), *hosted.records]
        self.write(step, records)

    def write(self, step: int, records: Sequence[Record]) -> None:
        """Write finished records now, past what the step has measured so far."""
        for index, backend in list(self._opened) if records else ():
            if not self._attempt(index, backend, "write", functools.partial(backend.write, step, records)):
                self.dropped_records += len(records)
                if self._failures[index] >= MAX_FAILURES:
                    self._opened.remove((index, backend))
                    logger.error("backend %s failed %d times: left out from now on", backend.name, MAX_FAILURES)

    def close(self) -> None:
        """Close every backend."""
        for index, backend in self._opened:
            self._attempt(index, backend, "close", backend.close)
        self._opened = []

    def _build(self, tensors: Mapping[str, Tensor], build: Build, step: _Step) -> None:
        try:
            build(tensors, _StepEmitter(step, self))
        except Exception as error:
            key = f"build:{getattr(build, '__qualname__', build)}"
            self.say_once(key, "telemetry could not show %s: %r", key, error, level=logging.ERROR)
            logger.debug("while building records", exc_info=True)

    def _scalars(self, step: _Step) -> list[Scalar]:
        scalars = []
        for tag, metric in step.metrics.items():
            value = metric.result()
            if value is None:
                entry = catalogue.find(tag)
                self.absent(tag, (entry.absent if entry else "") or "nothing to measure in the step")
            else:
                scalars.append(Scalar(tag, value, step.notes.get(tag, "")))
        return scalars

    def _attempt(self, index: int, backend: Backend, verb: str, action: Callable[[], None]) -> bool:
        try:
            action()
        except Exception:
            self._failures[index] += 1
            if self._failures[index] == 1:
                logger.exception("backend %s could not %s; training goes on", backend.name, verb)
            return False
        return True


class _StepEmitter:
    """Adds to a step that has already been taken from the recorder."""

    def __init__(self, step: _Step, recorder: Recorder) -> None:
        self._step = step
        self._recorder = recorder

    def metric(self, tag: str, value: Metric, note: str = "") -> None:
        self._step.add_metric(tag, value, note)

    def record(self, record: Record) -> None:
        self._step.records.append(record)

    def absent(self, tag: str, reason: str) -> None:
        self._recorder.absent(tag, reason)


def _to_host(step: _Step) -> _Step:
    """The step with every tensor on the host: one copy for all metric components of a device, one for each other."""
    flat = [component for metric in step.metrics.values() for component in metric.components]
    hosted = iter(_copy_packed(flat))
    metrics = {
        tag: metric.with_components([next(hosted) for _ in metric.components]) for tag, metric in step.metrics.items()
    }
    deferred: list[Deferred] = [
        ({name: tensor.cpu() for name, tensor in tensors.items()}, build) for tensors, build in step.deferred
    ]
    return _Step(metrics, step.notes, step.records, deferred)


def _copy_packed(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Host copies, made with one transfer for each device and dtype."""
    groups: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    for index, tensor in enumerate(tensors):
        groups.setdefault((tensor.device, tensor.dtype), []).append(index)
    copies: list[Tensor] = list(tensors)
    for indices in groups.values():
        packed = torch.cat([tensors[index].reshape(-1) for index in indices]).cpu()
        parts = packed.split([tensors[index].numel() for index in indices])
        for index, part in zip(indices, parts, strict=True):
            copies[index] = part.view(tensors[index].shape)
    return copies
