"""What a reader should know before looking at any chart."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

from dashboards.report.media import Document, Item, Media
from dashboards.report.numbers import natural
from dashboards.runs import Run
from telemetry.catalogue import CATALOGUE, SECTIONS, TRAINER_SECTIONS, VERDICTS, Entry
from telemetry.charts import expanded, matcher
from telemetry.records import Table

CHECKS, SETUP = "health/checks", "setup/checks"
ALERTS = "health/alerts"


@dataclass(frozen=True)
class Nonfinite:
    """A scalar that was not finite, or that counts values that were not.

    Attributes:
        run: number of the run.
        tag: the scalar.
        what: what was found.
        steps: where it was found.
    """

    run: int
    tag: str
    what: str
    steps: tuple[int, ...]


Absent: TypeAlias = tuple[Entry, tuple[int, ...]]
"""Something of the catalogue that was not measured, and the numbers of the runs that lack it."""


@dataclass(frozen=True)
class Verdicts:
    """The newest verdicts of one run: how many rules say what, the table if there is one, and that of the set-up."""

    run: int
    step: int
    counts: tuple[tuple[str, int], ...]
    checks: Item[Document] | None
    setup: Item[Document] | None

    @property
    def worst(self) -> str | None:
        """The worst verdict of health and set-up; None where nothing has been judged."""
        said = {name for name, _count in self.counts}
        for item in (self.checks, self.setup):
            if item is not None and isinstance(item.content, Table) and "verdict" in item.content.columns:
                said |= {str(row[item.content.columns.index("verdict")]) for row in item.content.rows}
        return next((verdict for verdict in reversed(VERDICTS) if verdict in said), None)


@dataclass(frozen=True)
class Overview:
    """The first section of the report."""

    verdicts: tuple[Verdicts, ...]
    nonfinite: tuple[Nonfinite, ...]
    dropped: tuple[tuple[int, int], ...]
    absent: dict[str, tuple[Absent, ...]]


def overview(runs: Sequence[Run], media: Media) -> Overview:
    """What these runs say about themselves."""
    return Overview(
        verdicts=tuple(_verdicts(runs, media)),
        nonfinite=tuple(_nonfinite(runs)),
        dropped=tuple(_dropped(runs)),
        absent={section: found for section in SECTIONS if (found := tuple(_absent(section, runs)))},
    )


def _verdicts(runs: Sequence[Run], media: Media) -> Iterator[Verdicts]:
    for number, run in enumerate(runs):
        rules = [series for tag, series in run.scalars.items() if tag.startswith("health/")]
        checks = next((item for item in media.documents.items if (item.run, item.tag) == (number, CHECKS)), None)
        setup = next((item for item in media.documents.items if (item.run, item.tag) == (number, SETUP)), None)
        if not rules and checks is None and setup is None:
            continue
        step = max([series.steps[-1] for series in rules] + [item.step for item in (checks, setup) if item])
        newest = [series.values[-1] if math.isfinite(series.values[-1]) else len(VERDICTS) for series in rules]
        counts = Counter(VERDICTS[min(max(int(value), 0), len(VERDICTS) - 1)] for value in newest)
        yield Verdicts(
            number, step, tuple((name, counts[name]) for name in reversed(VERDICTS) if counts[name]), checks, setup
        )


def _nonfinite(runs: Sequence[Run]) -> Iterator[Nonfinite]:
    for number, run in enumerate(runs):
        for tag in sorted(run.scalars, key=natural):
            points = list(zip(run.scalars[tag].steps, run.scalars[tag].values, strict=True))
            if steps := tuple(step for step, value in points if not math.isfinite(value)):
                yield Nonfinite(number, tag, "NaN or infinite", steps)
            elif tag.endswith("/nonfinite") and (steps := tuple(step for step, value in points if value > 0)):
                yield Nonfinite(number, tag, f"up to {max(run.scalars[tag].values):g} values", steps)


def _dropped(runs: Sequence[Run]) -> Iterator[tuple[int, int]]:
    """Numbers of the runs that lost records, and how many each lost."""
    for number, run in enumerate(runs):
        series = run.scalars.get("telemetry/dropped_records")
        lost = max((value for value in series.values if math.isfinite(value)), default=0) if series else 0
        if lost > 0:
            yield number, int(lost)


def _absent(section: str, runs: Sequence[Run]) -> Iterator[Absent]:
    if section in TRAINER_SECTIONS:
        return
    for entry in CATALOGUE:
        if entry.section != section or entry.tag in (f"{section}/<name>", ALERTS):
            continue
        for tag in expanded(entry.tag):
            matches = matcher(tag).fullmatch
            lacking = tuple(n for n, run in enumerate(runs) if not any(map(matches, run.tags)))
            if lacking:
                yield replace(entry, tag=tag), lacking
