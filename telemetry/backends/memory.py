"""Keeps records in memory: for tests, notebooks and other programs."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import TypeVar

from telemetry.backends.base import Run
from telemetry.records import Record, Scalar

RecordT = TypeVar("RecordT", bound=Record)


class MemoryBackend:
    """Everything written, by tag, in the order of writing.

    Attributes:
        run: what :meth:`open` was given, or None before.
        records: tag → list of ``(step, record)``.
        closed: whether :meth:`close` was called.
    """

    name = "memory"

    def __init__(self) -> None:
        self.run: Run | None = None
        self.records: dict[str, list[tuple[int, Record]]] = defaultdict(list)
        self.closed = False

    def open(self, run: Run) -> None:
        self.run = run

    def write(self, step: int, records: Sequence[Record]) -> None:
        for record in records:
            self.records[record.tag].append((step, record))

    def close(self) -> None:
        self.closed = True

    def tags(self) -> list[str]:
        """Every tag seen, sorted."""
        return sorted(self.records)

    def scalars(self, tag: str) -> dict[int, float]:
        """Step → value of a scalar tag (the last one, should a step have several)."""
        return {step: record.value for step, record in self.records.get(tag, ()) if isinstance(record, Scalar)}

    def last(self, tag: str, kind: type[RecordT]) -> RecordT:
        """The latest record of a tag.

        Raises:
            KeyError: when no record of that kind was written under the tag.
        """
        for _, record in reversed(self.records.get(tag, [])):
            if isinstance(record, kind):
                return record
        raise KeyError(f"no {kind.__name__} under {tag!r}; there are {self.tags()}")
