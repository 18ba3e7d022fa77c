"""Charts as SVG, drawn when the report is made: there at once, without a script, on a screen and on paper."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np
from markupsafe import Markup

from dashboards.report.numbers import ChartView, Line, thin
from dashboards.runs import Run, Series

WIDTH, HEIGHT = 440, 264
POINTS = 150
"""Points of a drawn line: about one for three of its pixels, of every stretch the lowest and the highest."""

STROKES = ("", "6 4", "2 3", "6 3 2 3", "10 4", "10 4 2 4")
"""How the lines of the page are dashed, by the number of a line's dash."""

_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 14, 10, 40
_SCALE = 4  # spans between the colors of the page's scale
_SPARK_WIDTH, _SPARK_HEIGHT = 160, 36


def drawn(chart: ChartView, runs: Sequence[Run]) -> Markup:
    """Return a chart of lines over steps."""
    series = [runs[line.run].scalars[line.tag] for line in chart.lines]
    x = _Axis(*_bounds(step for one in series for step in (one.steps[0], one.steps[-1])), _LEFT, WIDTH - _RIGHT)
    finite = [height for line in chart.lines for height in (line.low, line.high) if height is not None]
    low, high = _bounds(finite)
    y = _Axis(low if low < 0 else 0.0 if low < 0.6 * high else low, high, HEIGHT - _BOTTOM, _TOP)
    parts = [*_grid(x, y, chart.unit)]
    for number, (line, one) in enumerate(zip(chart.lines, series, strict=True)):
        parts.append(Markup('<g data-line="{}" data-run="{}">{}</g>').format(number, line.run, _line(line, one, x, y)))
    return Markup('<svg class="still" viewBox="0 0 {} {}" aria-hidden="true">{}</svg>').format(
        WIDTH, HEIGHT, Markup("").join(parts)
    )


def swatch(line: Line) -> Markup:
    """Return a short piece of a line, for the list of lines."""
    look = Markup("{}{}").format(_look(line), _dashes(line))
    return Markup('<svg class="swatch" viewBox="0 0 28 8" aria-hidden="true"><path {} d="M1 4H27"/></svg>').format(look)


def label(line: Line, chart: ChartView, runs: Sequence[Run]) -> str:
    """Return the name of a line: its own, its run's, or both."""
    if len(runs) == 1:
        return line.name
    alone = all(other.name == line.name for other in chart.lines)
    return runs[line.run].name if alone else f"{line.name} · {runs[line.run].name}"


def spark(series: Series) -> Markup:
    """Return a small line without axes; "" where fewer than two values are finite."""
    values = np.asarray(series.values, np.float64)
    if np.isfinite(values).sum() < 2:
        return Markup("")
    finite = values[np.isfinite(values)]
    x = _Axis(*_bounds([series.steps[0], series.steps[-1]]), 2, _SPARK_WIDTH - 4)
    y = _Axis(*_bounds([float(finite.min()), float(finite.max())]), _SPARK_HEIGHT - 4, 4)
    path, _marks = _path(series, x, y)
    return Markup(
        '<svg class="spark" viewBox="0 0 {} {}" aria-hidden="true"><path style="stroke:var(--series-0)" d="{}"/></svg>'
    ).format(_SPARK_WIDTH, _SPARK_HEIGHT, path)


class _Axis:
    """From values to places of the drawing."""

    def __init__(self, low: float, high: float, start: float, end: float) -> None:
        self.low, self.high, self.start, self.end = low, high, start, end

    def place(self, value: float) -> float:
        """Return where a value stands."""
        return self.start + (value / 2 - self.low / 2) / (self.high / 2 - self.low / 2) * (self.end - self.start)

    def ticks(self) -> Iterator[tuple[float, str]]:
        """Yield round values with how they are written."""
        span = self.high - self.low
        if not 0 < span < math.inf:
            return
        size = 10.0 ** math.floor(math.log10(span / 4))
        if not size:
            return
        step = next((size * factor for factor in (1, 2, 5) if span / (size * factor) <= 5), size * 10)
        first = math.ceil(self.low / step)
        for number in range(first, first + 7):
            value = number * step
            if value > self.high + step * 1e-9:
                return
            yield value, _short(value)


def _bounds(values: Sequence[float] | Iterator[float]) -> tuple[float, float]:
    """The lowest and the highest, with room where they are one."""
    known = list(values) or [0.0, 1.0]
    low, high = float(min(known)), float(max(known))
    if high > low:
        return low, high
    room = abs(low) / 2 or 0.5
    return low - room, high + room


def _short(value: float) -> str:
    size = abs(value)
    for sign, unit in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if unit <= size < unit * 1e3:
            return f"{value / unit:.4g}{sign}"
    return f"{value:.4g}"


def _grid(x: _Axis, y: _Axis, unit: str) -> Iterator[Markup]:
    for value, text in y.ticks():
        at = round(y.place(value), 1)
        yield Markup('<path class="grid" d="M{} {}H{}"/>').format(_LEFT, at, WIDTH - _RIGHT)
        yield Markup('<text class="end" x="{}" y="{}">{}</text>').format(_LEFT - 6, at + 4, text)
    for value, text in x.ticks():
        yield Markup('<text class="middle" x="{}" y="{}">{}</text>').format(
            round(x.place(value), 1), HEIGHT - _BOTTOM + 16, text
        )
    yield Markup('<text class="middle" x="{}" y="{}">optimizer step</text>').format(
        (_LEFT + WIDTH - _RIGHT) / 2, HEIGHT - 6
    )
    if unit:
        yield Markup('<text class="middle" transform="translate(11 {}) rotate(-90)">{}</text>').format(
            (HEIGHT - _BOTTOM + _TOP) / 2, unit
        )


def _line(line: Line, series: Series, x: _Axis, y: _Axis) -> Markup:
    path, marks = _path(series, x, y)
    look = _look(line)
    drawing = Markup('<path {}{} d="{}"/>').format(look, _dashes(line), path) if path else Markup("")
    if marks:
        drawing += Markup('<path class="mark" {} d="{}"/>').format(look, marks)
    return drawing


def _look(line: Line) -> Markup:
    """The color: of the palette, or a place on the page's scale."""
    if line.color is not None:
        return Markup('style="stroke:var(--series-{})"').format(line.color)
    at = min(line.place * _SCALE, _SCALE - 0.0001)
    share = round(100 * (1 - at % 1))
    return Markup('style="stroke:color-mix(in srgb,var(--scale-{}) {}%,var(--scale-{}))"').format(
        int(at), share, int(at) + 1
    )


def _dashes(line: Line) -> Markup:
    strokes = STROKES[line.dash]
    return Markup(' stroke-dasharray="{}"').format(strokes) if strokes else Markup("")


def _path(series: Series, x: _Axis, y: _Axis) -> tuple[str, str]:
    """The line, open where a value is not finite, and crosses where the last finite one was."""
    values = np.asarray(series.values, np.float64)
    line, marks = [], []
    pen, height = "M", next((value for value in series.values if math.isfinite(value)), 0.0)
    alone = False
    for index in thin(values, POINTS):
        at, value = round(x.place(series.steps[index]), 1), float(values[index])
        if math.isfinite(value):
            height = value
            line.append(f"{pen}{at:g} {y.place(value):.1f}")
            alone = pen == "M"
            pen = "L"
            continue
        if alone:
            line.append("h.01")
        marks.append(f"M{at - 5:g} {y.place(height) - 5:.1f}l10 10m0 -10l-10 10")
        pen, alone = "M", False
    if alone:
        line.append("h.01")  # a round end makes a point of it
    return "".join(line), "".join(marks)
