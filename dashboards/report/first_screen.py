"""What a reader wants to know first: is it well, how far is it, what got worse, since when, and where runs part."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from dashboards.headlines import Number, headlines, worsened
from dashboards.report.drawing import spark
from dashboards.runs import Run, Series
from telemetry.catalogue import VERDICTS

NUMBERS = 5
WORSE = 5
PARTED = 5
_OF_THE_MACHINE = re.compile(r"telemetry/.*|.*runtime|.*_per_second")
"""Numbers that differ between two runs of one training: how long things took."""


@dataclass(frozen=True)
class Card:
    """A number with its course."""

    number: Number
    course: Markup


@dataclass(frozen=True)
class Progress:
    """How one run does.

    Attributes:
        run: number of the run.
        cards: what is looked at first.
        worse: what got worse since the last evaluation, the worst first.
        more_worse: how many others did.
    """

    run: int
    cards: tuple[Card, ...]
    worse: tuple[Card, ...]
    more_worse: int


@dataclass(frozen=True)
class Span:
    """A verdict that stood for some steps. ``start`` and ``width`` are shares of the run."""

    verdict: str
    first: int
    last: int
    start: float
    width: float


@dataclass(frozen=True)
class Row:
    """One rule over the steps of a run."""

    rule: str
    spans: tuple[Span, ...]

    @property
    def since(self) -> str:
        """Since when the newest verdict stands."""
        return f"since step {self.spans[-1].first}" if len(self.spans) > 1 else "at every step"


@dataclass(frozen=True)
class Timeline:
    """The rules of one run that were not always well, and how many were."""

    run: int
    first: int
    last: int
    rows: tuple[Row, ...]
    always_ok: int


@dataclass(frozen=True)
class Parting:
    """Where two runs part.

    Attributes:
        step: the first at which a number differs; None where none does.
        compared: values that both recorded at the same step.
        numbers: tag and both values, the largest difference first.
        more: how many other numbers differ at that step.
    """

    step: int | None
    compared: int
    numbers: tuple[tuple[str, float, float], ...]
    more: int


def progress(runs: Sequence[Run]) -> Iterator[Progress]:
    """Yield of every run how it does."""
    for number, run in enumerate(runs):
        cards = tuple(_cards(run, itertools.islice(headlines(run.scalars), NUMBERS)))
        shown = {card.number.tag for card in cards}
        worse = [one for one in worsened(run.scalars) if one.tag not in shown]
        yield Progress(number, cards, tuple(_cards(run, worse[:WORSE])), max(len(worse) - WORSE, 0))


def _cards(run: Run, numbers: Sequence[Number] | Iterator[Number]) -> Iterator[Card]:
    for number in numbers:
        yield Card(number, spark(run.scalars[number.tag]))


def timelines(runs: Sequence[Run]) -> Iterator[Timeline]:
    """Yield of every run that was judged the verdicts of its rules over its steps."""
    for number, run in enumerate(runs):
        rules = {tag: series for tag, series in run.scalars.items() if tag.startswith("health/")}
        if not rules:
            continue
        first = min(series.steps[0] for series in rules.values())
        last = max(max(series.steps[-1] for series in rules.values()), first + 1)
        bad = {tag: series for tag, series in rules.items() if any(_level(value) for value in series.values)}
        rows = [Row(_rule(tag), tuple(_spans(series, first, last))) for tag, series in bad.items()]
        rows.sort(key=lambda row: (-VERDICTS.index(row.spans[-1].verdict), row.spans[-1].first, row.rule))
        yield Timeline(number, first, last, tuple(rows), len(rules) - len(bad))


def _rule(tag: str) -> str:
    return tag.split("/", 1)[1].replace("_", " ")


def _level(value: float) -> int:
    """A verdict that is not finite, or none that is known, is the worst."""
    return min(max(int(value), 0), len(VERDICTS) - 1) if math.isfinite(value) else len(VERDICTS) - 1


def _spans(series: Series, first: int, last: int) -> Iterator[Span]:
    """Each verdict until the next one that differs; the last one until the run's end."""
    judged = [(step, _level(value)) for step, value in zip(series.steps, series.values, strict=True)]
    groups = [list(group) for _level, group in itertools.groupby(judged, key=lambda one: one[1])]
    ends = [group[0][0] for group in groups[1:]] + [last]
    for group, end in zip(groups, ends, strict=True):
        start = (group[0][0] - first) / (last - first)
        # A verdict of the last step has no length: it keeps a hundredth, to be seen.
        width = max((end - first) / (last - first) - start, 0.01)
        yield Span(VERDICTS[group[0][1]], group[0][0], group[-1][0], min(start, 0.99), width)


def parting(runs: Sequence[Run]) -> Parting | None:
    """Return where two runs part, by the numbers that both recorded at the same step; None for any other number."""
    if len(runs) != 2:
        return None
    compared = 0
    differing: dict[int, list[tuple[str, float, float]]] = {}
    for tag in runs[0].scalars.keys() & runs[1].scalars.keys():
        if _OF_THE_MACHINE.fullmatch(tag):
            continue
        ours, theirs = (dict(zip(run.scalars[tag].steps, run.scalars[tag].values, strict=True)) for run in runs)
        for step in ours.keys() & theirs.keys():
            compared += 1
            one, other = ours[step], theirs[step]
            if one != other and not (math.isnan(one) and math.isnan(other)):
                differing.setdefault(step, []).append((tag, one, other))
    if not differing:
        return Parting(None, compared, (), 0)
    step = min(differing)
    numbers = sorted(differing[step], key=lambda found: (-_difference(found[1], found[2]), found[0]))
    return Parting(step, compared, tuple(numbers[:PARTED]), max(len(numbers) - PARTED, 0))


def _difference(one: float, other: float) -> float:
    """How far two values are apart, as a share of the larger."""
    if not (math.isfinite(one) and math.isfinite(other)):
        return math.inf
    return abs(one - other) / max(abs(one), abs(other))
