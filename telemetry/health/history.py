"""The scalars of a run as rules read them: the latest of each tag, and a bounded past."""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Iterable, Sequence

from telemetry.records import Record, Scalar

KEPT = 100


class History:
    """Scalars by tag. Holds the first value of a tag, and at most :data:`KEPT` later ones.

    Attributes:
        step: the latest step recorded.
    """

    def __init__(self) -> None:
        self.step = 0
        self._first: dict[str, tuple[int, float]] = {}
        self._values: dict[str, deque[tuple[int, float]]] = {}
        self._notes: dict[str, str] = {}
        self._matching: dict[re.Pattern[str], list[str]] = {}  # tags, until there is a new one

    def add(self, step: int, records: Iterable[Record]) -> None:
        """Take in the scalars of a step."""
        self.step = step
        for record in records:
            if isinstance(record, Scalar):
                tag, value = record.tag, (step, record.value)
                self._notes[tag] = record.note
                if tag not in self._values:
                    self._first[tag], self._values[tag] = value, deque(maxlen=KEPT)
                    self._matching.clear()
                self._values[tag].append(value)

    def latest(self, tag: str) -> float | None:
        """The last value of a tag, or None for one never recorded."""
        values = self._values.get(tag)
        return values[-1][1] if values else None

    def note(self, tag: str) -> str:
        """What was said beside the last value of a tag; "" where nothing was."""
        return self._notes.get(tag, "")

    def past(self, tag: str, last: int = 0) -> list[tuple[int, float]]:
        """Steps and values of a tag, oldest first: the first ever, and the last ones; or only ``last`` of these."""
        values: Sequence[tuple[int, float]] = self._values.get(tag, ())
        if 0 < last <= len(values):
            return [values[place] for place in range(-last, 0)]
        return [self._first[tag], *values] if len(values) == KEPT and values[0] != self._first[tag] else [*values]

    def values(self, tag: str, last: int = 0) -> list[float]:
        """The values of :meth:`past`."""
        return [value for _, value in self.past(tag, last)]

    def matching(self, pattern: re.Pattern[str]) -> dict[str, float]:
        """The last value of every tag that matches as a whole."""
        tags = self._matching.get(pattern)
        if tags is None:
            tags = self._matching[pattern] = [tag for tag in self._values if pattern.fullmatch(tag)]
        return {tag: self._values[tag][-1][1] for tag in tags}

    def last_step(self, tag: str) -> int:
        """The step of the last value of a tag that has been recorded."""
        return self._values[tag][-1][0]

    def now(self) -> dict[str, float]:
        """The values recorded at the latest step."""
        return {tag: values[-1][1] for tag, values in self._values.items() if values[-1][0] == self.step}
