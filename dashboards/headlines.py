"""What is looked at first: a few numbers of a run, and whether they got better or worse."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from dashboards.runs import Series
from telemetry.catalogue import find
from telemetry.charts import HEADLINES

LEAST_POINTS = 4
"""Values that a number needs before it is known how much it moves between two of them."""


@dataclass(frozen=True)
class Number:
    """One number, and how it has moved since the last evaluation.

    Attributes:
        tag: of the catalogue.
        step: at which ``value`` was recorded.
        value: the newest; text where it is not finite.
        before: the newest one at the last evaluation or before it; None where there is none.
        direction: ``better``, ``worse``, ``same`` or "" where neither way is better, or nothing is known.
    """

    tag: str
    step: int
    value: float | str
    before: float | str | None
    direction: str


def headlines(scalars: Mapping[str, Series]) -> Iterator[Number]:
    """Yield of each line of :data:`HEADLINES` the first number that a run has."""
    evaluated = last_evaluation(scalars)
    for tags in HEADLINES:
        tag = next((tag for tag in tags if tag in scalars), None)
        if tag is not None:
            yield number_of(tag, scalars[tag], evaluated)


def worsened(scalars: Mapping[str, Series]) -> list[Number]:
    """Return the numbers that got worse by more than they usually move between two values, the worst first."""
    evaluated = last_evaluation(scalars)
    found = []
    for tag, series in scalars.items():
        moved = number_of(tag, series, evaluated)
        if moved.direction != "worse" or len(series.values) < LEAST_POINTS:
            continue
        if isinstance(moved.value, float) and isinstance(moved.before, float):
            usual = _usual_move(series)
            if (change := abs(moved.value - moved.before)) > usual:
                found.append((-(change / usual if usual else math.inf), tag, moved))
    return [moved for _rank, _tag, moved in sorted(found, key=lambda one: one[:2])]


def _usual_move(series: Series) -> float:
    """The median distance between two values that follow each other."""
    values = [value for value in series.values if math.isfinite(value)]
    moves = sorted(abs(later - earlier) for earlier, later in itertools.pairwise(values))
    return moves[len(moves) // 2] if moves else 0.0


def last_evaluation(scalars: Mapping[str, Series]) -> int | None:
    """Return the step of the last evaluation, None without one."""
    return max((series.steps[-1] for tag, series in scalars.items() if tag.startswith("eval/")), default=None)


def number_of(tag: str, series: Series, evaluated: int | None) -> Number:
    """Return the newest value of a scalar against the one at the last evaluation."""
    step, value = series.steps[-1], series.values[-1]
    past = [old for at, old in zip(series.steps, series.values, strict=True) if at < step]
    upto = [
        old
        for at, old in zip(series.steps, series.values, strict=True)
        if at < step and (evaluated is None or at <= evaluated)
    ]
    before = upto[-1] if upto else past[0] if past else None
    entry = find(tag)
    return Number(tag, step, _plain(value), _plain(before), _direction(value, before, entry.better if entry else None))


def _direction(value: float, before: float | None, better: str | None) -> str:
    if before is None or better is None or not (math.isfinite(value) and math.isfinite(before)):
        return ""
    if value == before:
        return "same"
    return "better" if (value > before) == (better == "higher") else "worse"


def _plain(value: float | None) -> Any:
    return value if value is None or math.isfinite(value) else str(value)
