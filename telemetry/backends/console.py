"""Shows the records of a step as a readable tree in the log."""

from __future__ import annotations

import io
import logging
import math
import os
import re
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TypeVar

from rich import box
from rich.cells import cell_len
from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.table import Column
from rich.table import Table as RichTable
from rich.text import Text as RichText
from rich.tree import Tree

from telemetry.backends.base import Run, without_the_trainers
from telemetry.catalogue import SECTIONS
from telemetry.logs import printable
from telemetry.records import Alert, Audio, Cell, Image, Record, Scalar, Table

_LOGGER = logging.getLogger("telemetry.console")
_WIDTH = 120  # columns where there is no terminal
_GUIDES = 8  # columns that the tree's lines take in front of a section's content
_ROWS = 12
_COLUMNS = 12
_WIDE_ROWS = 4  # of a table with more columns than that
_NAMED = 12
_CELL_CHARACTERS = 200
_TEXT_CHARACTERS = 2000
_GAP = 2  # blank columns between numbers
_NUMBERS = 400  # of a section

RecordT = TypeVar("RecordT", bound=Record)


class ConsoleBackend:
    """One message for every write, at INFO on the logger ``telemetry.console``.

    A tree of the sections in the catalogue's order, each with the question that it answers; numbers in aligned grids,
    non-finite ones marked with ``!`` and named in the headline; tables (their first rows), alerts, and a line for each
    clip and image. Of a section's numbers the first 400 are shown, and how many more there are. As wide as the
    terminal, or 120 columns where stderr is none, without colours or cursor movements, so that log files stay readable.

    A write that holds nothing but scalars that the Trainer logs is not shown: the Trainer prints those.
    A scalar's note is shown with the first write that carries it. Nothing shows unless the logger lets INFO through
    (see :func:`telemetry.logs.setup_logging`).
    """

    name = "console"

    def __init__(self) -> None:
        self._notes: set[str] = set()

    def open(self, run: Run) -> None:
        """Nothing to get ready."""

    def write(self, step: int, records: Sequence[Record]) -> None:
        if without_the_trainers(records) and _LOGGER.isEnabledFor(logging.INFO):
            _LOGGER.info("%s", self._render(step, records))

    def close(self) -> None:
        """Nothing to let go of."""

    def _render(self, step: int, records: Sequence[Record]) -> str:
        width = _terminal_width()
        tree = Tree(_plain(_headline(step, records)))
        by_section = defaultdict(list)
        for record in records:
            by_section[record.tag.split("/", 1)[0]].append(record)
        known = [section for section in SECTIONS if section in by_section]
        for section in dict.fromkeys([*known, *by_section]):
            branch = tree.add(_plain(f"{section} — {SECTIONS[section]}" if section in SECTIONS else section))
            for part in self._section(by_section[section], max(width - _GUIDES, 1)):
                branch.add(part)
        shown = io.StringIO()
        Console(file=shown, width=width, color_system=None, markup=False, emoji=False, highlight=False).print(tree)
        return "\n".join(line.rstrip() for line in shown.getvalue().splitlines())

    def _section(self, records: Sequence[Record], width: int) -> Iterator[RenderableType]:
        """The parts of one section: alerts first, then numbers, then everything else in the order of writing."""
        yield from (_alert(alert) for alert in _of_kind(records, Alert))
        scalars = _of_kind(records, Scalar)
        yield from _grids(scalars[:_NUMBERS], width)
        if (more := len(scalars) - _NUMBERS) > 0:
            yield _plain(f"… {_counted(more, 'more number')}")
        for note in dict.fromkeys(scalar.note for scalar in scalars if scalar.note):
            if note not in self._notes:
                self._notes.add(note)
                yield _plain(f"note: {note}")
        for record in records:
            yield from _content(record)


def _of_kind(records: Iterable[Record], kind: type[RecordT]) -> list[RecordT]:
    return [record for record in records if isinstance(record, kind)]


def _terminal_width() -> int:
    try:
        return os.get_terminal_size(sys.stderr.fileno()).columns or _WIDTH
    except (OSError, ValueError, AttributeError):  # not a terminal, closed, or no stderr at all
        return _WIDTH


def _plain(text: str) -> RichText:
    """Text as it is: no markup, control characters spelled out so that they cannot move the cursor."""
    return RichText(printable(text), overflow="fold")


def _shortened(text: str, limit: int) -> str:
    return text if len(text) <= limit else f"{text[:limit]} … {len(text) - limit:,} more characters"


def _headline(step: int, records: Sequence[Record]) -> str:
    parts = [f"step {step:,}", _counted(len(records), "record")]
    odd = [scalar.tag for scalar in _of_kind(records, Scalar) if _number(scalar.value).startswith("!")]
    if odd:
        more = f", … {len(odd) - _NAMED:,} more" if len(odd) > _NAMED else ""
        parts.append(f"{_counted(len(odd), 'non-finite value')}: {', '.join(odd[:_NAMED])}{more}")
    return " · ".join(parts)


def _counted(number: int, thing: str) -> str:
    return f"{number:,} {thing}{'' if number == 1 else 's'}"


def _number(value: float) -> str:
    """Four digits, thousands separated in whole numbers; ``!nan``, ``!inf`` and ``!-inf`` where it is not finite."""
    if not math.isfinite(value):
        return f"!{float(value)}"
    if value == int(value) and abs(value) < 1e15:
        return f"{int(value):,}"
    return f"{value:.4g}"


def _grids(scalars: Sequence[Scalar], width: int) -> Iterator[RenderableType]:
    """Scalars as grids: a row for each shared prefix, a column for each last part of the tag; pairs for the rest."""
    rows: dict[str, dict[str, str]] = defaultdict(dict)
    for scalar in scalars:
        prefix, _, leaf = scalar.tag.rpartition("/")
        rows[prefix.partition("/")[2]][leaf] = _number(scalar.value)
    single = {leaf: {"": number} for leaf, number in rows.pop("", {}).items()}
    for grid in [single, *_related(rows)] if single else _related(rows):
        yield from _grid(grid, list(dict.fromkeys(leaf for cells in grid.values() for leaf in cells)), width)


def _related(rows: Mapping[str, Mapping[str, str]]) -> list[Mapping[str, Mapping[str, str]]]:
    """Rows that share a column, directly or through others, belong in one grid. Order of first appearance."""
    grids: dict[int, dict[str, Mapping[str, str]]] = {}
    grid_of: dict[str, int] = {}  # by column
    columns: dict[int, list[str]] = {}
    for number, (name, cells) in enumerate(rows.items()):
        first, *others = sorted({grid_of[column] for column in cells if column in grid_of}) or [number]
        for other in others:
            grids[first] |= grids.pop(other)
            columns[first] += columns[other]
            grid_of |= dict.fromkeys(columns.pop(other), first)
        grids.setdefault(first, {})[name] = cells
        columns.setdefault(first, []).extend(column for column in cells if column not in grid_of)
        grid_of |= dict.fromkeys(cells, first)
    return list(grids.values())


def _grid(rows: Mapping[str, Mapping[str, str]], columns: Sequence[str], width: int) -> Iterator[RenderableType]:
    """One aligned grid, or several below each other where the columns do not fit side by side."""
    taken = max(cell_len(name) for name in rows)
    start = 0
    while start < len(columns):
        left, stop = width - taken, start
        while stop < len(columns):
            cells = (
                _heading(columns[start:stop], columns[stop]),
                *(row.get(columns[stop], "") for row in rows.values()),
            )
            left -= _GAP + max(map(cell_len, cells))
            if left < 0 and stop > start:
                break
            stop += 1
        yield _grid_part(rows, columns[start:stop])
        start = stop


def _grid_part(rows: Mapping[str, Mapping[str, str]], columns: Sequence[str]) -> RenderableType:
    grid = RichTable(box=None, padding=(0, _GAP, 0, 0), pad_edge=False, show_header=any(columns))
    grid.add_column("")
    for place, column in enumerate(columns):
        grid.add_column(_plain(_heading(columns[:place], column)), justify="right")
    for name, cells in rows.items():
        if any(column in cells for column in columns):
            grid.add_row(_plain(name), *(_plain(cells.get(column, "")) for column in columns))
    return grid


def _heading(before: Sequence[str], column: str) -> str:
    """The column's name; ``_3`` for ``codebook_3`` after another codebook, so that all of them fit on a line."""
    stem, separator, index = column.rpartition("_")
    follows = bool(before) and re.fullmatch(re.escape(stem) + "_[0-9]+", before[-1]) is not None
    return separator + index if follows and index.isdecimal() else column


def _alert(alert: Alert) -> RichText:
    text = f"\n{_shortened(alert.text, _TEXT_CHARACTERS)}" if alert.text else ""
    return _plain(f"{alert.level.upper()} {alert.tag}: {alert.title}{text}")


def _content(record: Record) -> Iterator[RenderableType]:
    """What is shown of a record that is neither a scalar nor an alert."""
    path = record.tag.partition("/")[2] or record.tag
    if isinstance(record, Table):
        yield Group(_plain(path), *_table(record))
    elif isinstance(record, Audio):
        for clip in record.clips:
            seconds = f"{len(clip.samples) / clip.sampling_rate:.1f} s" if clip.sampling_rate > 0 else "? s"
            caption = f", {clip.caption}" if clip.caption else ""
            yield _plain(f"{path}: {seconds} at {clip.sampling_rate:,} Hz{caption}")
    elif isinstance(record, Image):
        height, width = record.pixels.shape[:2]
        yield _plain(f"{path}: image of {width} × {height}" + (f", {record.caption}" if record.caption else ""))


def _table(table: Table) -> Iterator[RenderableType]:
    """The first rows, and how many more there are. A wide table is on its side: a line for every column with a cell."""
    is_wide = len(table.columns) > _COLUMNS
    most = _WIDE_ROWS if is_wide else _ROWS
    lines = [table.columns, *table.rows[:most]]
    if is_wide:
        lines = [line for line in zip(*lines, strict=True) if any(cell is not None for cell in line[1:])]
    heading, *rows = [[_plain(_shortened(_cell(cell), _CELL_CHARACTERS)) for cell in line] for line in lines] or [[]]
    shown = RichTable(
        *(Column(cell, overflow="fold") for cell in heading), box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False
    )
    for row in rows:
        shown.add_row(*row)
    yield Padding(shown, (0, 0, 0, 2))
    if (more := len(table.rows) - most) > 0:
        yield _plain(f"  … {_counted(more, 'more row')}")


def _cell(cell: Cell) -> str:
    if cell is None:
        return ""
    if isinstance(cell, Audio | Image):
        return f"see {cell.tag}"
    return _number(cell) if isinstance(cell, float) else str(cell)
