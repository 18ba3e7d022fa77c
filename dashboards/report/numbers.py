"""Scalars as charts: which tags share one, how each line looks, and the numbers in a form that a page can hold."""

from __future__ import annotations

import base64
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np

from dashboards.runs import Run, Series
from telemetry.catalogue import Entry, find
from telemetry.charts import QUESTIONS, Chart, expanded, matcher

POINTS = 500_000
"""Points of all lines together. Above it long lines are thinned out."""

LEAST_POINTS = 200
"""Points that a line keeps however many lines there are."""

_COLORS, _DASHES = 7, 6  # the page's palettes; without a common divisor, so that 42 lines differ
_NUMBER = re.compile(r"[0-9]+")


Meaning: TypeAlias = tuple[Entry, tuple[str, ...]]
"""What the catalogue says of some tags of a chart, and notes: how they were measured on these runs."""


@dataclass(frozen=True)
class Line:
    """One scalar of one run.

    Attributes:
        name: short, unlike the other tags of the chart.
        tag: whole.
        run: number of the run.
        color: number in the page's palette; None on a chart of many ordered lines, where ``place`` says it.
        place: 0 for the first to 1 for the last of ordered lines.
        dash: number in the page's dashes.
        points: how many values were recorded.
        nonfinite: how many of them are NaN or infinite.
        last: the newest value and its step.
        low: the smallest finite value, None without one.
        high: the largest.
        steps: number of the page's array of steps.
        values: number of the page's array of values.
    """

    name: str
    tag: str
    run: int
    color: int | None
    place: float
    dash: int
    points: int
    nonfinite: int
    last: tuple[int, float]
    low: float | None
    high: float | None
    steps: int
    values: int


@dataclass(frozen=True)
class ChartView:
    """One chart of the page; ``unit`` is "" where its lines have none in common."""

    id: str
    title: str
    unit: str
    meanings: tuple[Meaning, ...]
    lines: tuple[Line, ...]


@dataclass
class Arrays:
    """Number arrays of the page, each held once: little-endian int32 (steps) and float32 (values, as in the file).

    Attributes:
        thinned: lines of which only some points are held.
    """

    points_of_a_line: int
    encoded: list[str] = field(default_factory=list)
    thinned: int = 0
    _places: dict[bytes, int] = field(default_factory=dict)

    @classmethod
    def for_runs(cls, runs: Sequence[Run]) -> Arrays:
        """Room for the scalars of these runs."""
        lines = sum(len(run.scalars) for run in runs)
        return cls(max(LEAST_POINTS, POINTS // max(lines, 1)))

    def add(self, series: Series) -> tuple[int, int]:
        """The numbers of a line's two arrays."""
        values = np.asarray(series.values, np.float32)
        kept = thin(values, self.points_of_a_line)
        self.thinned += kept.size < values.size
        steps = np.asarray(series.steps, np.int64)[kept]
        whole = steps.clip(max=2**31 - 1).astype("<i4")
        return self._held(whole), self._held(values[kept].astype("<f4"))

    def _held(self, array: np.ndarray) -> int:
        data = array.tobytes()
        if data not in self._places:
            self._places[data] = len(self.encoded)
            self.encoded.append(base64.b64encode(data).decode())
        return self._places[data]


def thin(values: np.ndarray, most: int) -> np.ndarray:
    """Indices of at most about ``most`` of the values that keep the look of the line.

    Of every stretch the lowest, the highest and a non-finite value stay, and the first and the last value of all: a
    spike of one step is still there.

    Args:
        values: ``[points]``.
        most: at least 8.
    """
    if len(values) <= most:
        return np.arange(len(values))
    kept = [0, len(values) - 1]
    for stretch in np.array_split(np.arange(len(values)), most // 3):
        finite = np.isfinite(values[stretch])
        kept += stretch[~finite][:1].tolist()
        if finite.any():
            kept.append(int(stretch[np.where(finite, values[stretch], np.inf).argmin()]))
            kept.append(int(stretch[np.where(finite, values[stretch], -np.inf).argmax()]))
    return np.unique(kept)


def natural(tag: str) -> list[tuple[int, int | str]]:
    """A key that sorts layer_2 before layer_10."""
    return [
        (0, int(part)) if part.isdecimal() and len(part) < 20 else (1, part)
        for part in re.split(r"([0-9]+)", tag)
        if part
    ]


def section_charts(section: str, tags: Sequence[str], every: Sequence[str]) -> tuple[list[Chart], list[Chart]]:
    """The charts of a section: declared ones that have a tag, and one for each kind of tag that no chart declares.

    Args:
        section: whose charts.
        tags: scalar tags of the section.
        every: scalar tags of all sections: a declared chart may show one of them beside the section's own.
    """
    declared = [
        Chart(chart.title, found)
        for question in QUESTIONS
        if question.section == section
        for chart in question.charts
        if not set(found := tuple(_matching(chart, every))).isdisjoint(tags)
    ]
    shown = {tag for chart in declared for tag in chart.tags}
    others: dict[str, list[str]] = {}
    for tag in sorted(set(tags) - shown, key=natural):
        others.setdefault(_kind(tag), []).append(tag)
    return declared, [Chart(title, tuple(together)) for title, together in others.items()]


def _matching(chart: Chart, tags: Sequence[str]) -> Iterator[str]:
    for pattern in (choice for tag in chart.tags for choice in expanded(tag)):
        yield from sorted((tag for tag in tags if matcher(pattern).fullmatch(tag)), key=natural)


def _kind(tag: str) -> str:
    """What undeclared tags of one chart have in common: all but a number, or all but one of the catalogue's choices."""
    if _NUMBER.search(tag):
        return _NUMBER.sub("<n>", tag)
    entry = find(tag)
    choices = entry is not None and entry.tag.rsplit("/", 1)[-1].startswith("{")
    return tag.rsplit("/", 1)[0] if choices else tag


def chart_view(id_: str, chart: Chart, runs: Sequence[Run], arrays: Arrays) -> ChartView:
    """A chart whose ``tags`` are tags of these runs."""
    meanings = tuple(_meanings(chart.tags, runs))
    units = {entry.unit for entry, _ in meanings}
    lines = tuple(_lines(chart.tags, runs, arrays))
    return ChartView(id_, chart.title, units.pop() if len(units) == 1 else "", meanings, lines)


def _lines(tags: Sequence[str], runs: Sequence[Run], arrays: Arrays) -> Iterator[Line]:
    names = short_names(tags)
    ordered = len(tags) > _COLORS + 1 and len({_NUMBER.sub("", tag) for tag in tags}) == 1
    rounds = math.ceil(len(tags) / _COLORS)  # how often the palette comes round within one run
    for at, (tag, name) in enumerate(zip(tags, names, strict=True)):
        for number, run in enumerate(runs):
            series = run.scalars.get(tag)
            if series is None:
                continue
            look = number if len(tags) == 1 else at
            finite = [value for value in series.values if math.isfinite(value)]
            steps, values = arrays.add(series)
            yield Line(
                name=name,
                tag=tag,
                run=number,
                color=None if ordered else look % _COLORS,
                place=at / max(len(tags) - 1, 1),
                dash=(look if len(runs) == 1 or len(tags) == 1 else number * rounds + at // _COLORS) % _DASHES,
                points=len(series.values),
                nonfinite=len(series.values) - len(finite),
                last=(series.steps[-1], series.values[-1]),
                low=min(finite, default=None),
                high=max(finite, default=None),
                steps=steps,
                values=values,
            )


def short_names(tags: Sequence[str]) -> list[str]:
    """Tags without the parts that all of them begin or end with; a tag that is alone keeps its last part."""
    parts = [tag.split("/") for tag in tags]
    if len(tags) == 1:
        return [parts[0][-1]]
    shortest = min(map(len, parts))
    head = next((at for at in range(shortest) if len({part[at] for part in parts}) > 1), shortest - 1)
    tail = next((at for at in range(shortest - head) if len({part[-1 - at] for part in parts}) > 1), 0)
    return ["/".join(part[head : len(part) - tail]) for part in parts]


def _meanings(tags: Sequence[str], runs: Sequence[Run]) -> Iterator[Meaning]:
    """One for every entry of the catalogue."""
    described: dict[Entry, list[str]] = {}
    for tag in tags:
        described.setdefault(find(tag) or Entry(tag, ""), []).append(tag)
    for entry, members in described.items():
        notes = (_note(tag, run.descriptions) for tag in members for run in runs)
        yield entry, tuple(dict.fromkeys(filter(None, notes)))


def _note(tag: str, descriptions: Mapping[str, str]) -> str:
    """What a run said of a tag beyond the catalogue's description."""
    entry = find(tag)
    said = descriptions.get(tag, "")
    return said.removeprefix(entry.description).strip() if entry else said
