"""Shows the records of a step as a readable tree in the log."""

from __future__ import annotations

import io
import logging
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
from rich.table import Table as RichTable
from rich.text import Text as RichText
from rich.tree import Tree

from telemetry.backends.base import Run
from telemetry.catalogue import SECTIONS, is_the_trainers
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
_CONTROL = {code: f"\\x{code:02x}" for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}

RecordT = TypeVar("RecordT", bound=Record)


class ConsoleBackend:
    """One message for every write, at INFO on the logger ``telemetry.console``.

    A tree of the sections in the catalogue's order, each with the question that it answers; numbers in aligned grids,
    non-finite ones marked with ``!`` and named in the headline; tables (their first rows), alerts, and a line for each
    clip and image. As wide as the terminal, or 120 columns where stderr is none, without colours
    or cursor movements, so that log files stay readable.

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
        printed = all(isinstance(record, Scalar) and is_the_trainers(record.tag) for record in records)
        if not printed and _LOGGER.isEnabledFor(logging.INFO):
            _LOGGER.info("%s", self._render(step, records))

    def close(self) -> None:
        """Nothing to let go of."""

    def _render(self, step: int, records: Sequence[Record]) -> str:
        width = _terminal_width()
        tree = Tree(_plain(_headline(step, records)))
        by_section = defaultdict(list)
        for record in records:
            by_section[record.tag.split("/", 1)[0]].append(record)
        for section in sorted(by_section, key=_section_order):
            question = SECTIONS.get(section)
            branch = tree.add(_plain(f"{section} — {question}" if question else section))
            for part in self._section(by_section[section], max(width - _GUIDES, 1)):
                branch.add(part)
        console = Console(
            file=io.StringIO(), width=width, color_system=None, force_terminal=False, markup=False, emoji=False
        )
        with console.capture() as capture:
            console.print(tree, highlight=False)
        return "\n".join(line.rstrip() for line in capture.get().splitlines())

    def _section(self, records: Sequence[Record], width: int) -> Iterator[RenderableType]:
        """The parts of one section: alerts first, then numbers, then everything else in the order of writing."""
        yield from (_alert(alert) for alert in _of_kind(records, Alert))
        scalars = _of_kind(records, Scalar)
        yield from _grids(scalars, width)
        for note in dict.fromkeys(scalar.note for scalar in scalars if scalar.note):
            if note not in self._notes:
                self._notes.add(note)
                yield _plain(f"note: {note}")
        for record in records:
            yield from _content(record)


def _section_order(section: str) -> int:
    return list(SECTIONS).index(section) if section in SECTIONS else len(SECTIONS)


def _of_kind(records: Iterable[Record], kind: type[RecordT]) -> list[RecordT]:
    return [record for record in records if isinstance(record, kind)]


def _terminal_width() -> int:
    try:
        return os.get_terminal_size(sys.stderr.fileno()).columns or _WIDTH
    except (OSError, ValueError, AttributeError):  # not a terminal, closed, or no stderr at all
        return _WIDTH


def _plain(text: str) -> RichText:
    """Text as it is: no markup, control characters spelled out so that they cannot move the cursor."""
    return RichText(text.encode("utf-8", "backslashreplace").decode().translate(_CONTROL), overflow="fold")


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
    if value != value or value in (float("inf"), float("-inf")):
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
    single = rows.pop("", None)
    if single:
        yield _pairs(single)
    for names in _related(rows):
        columns = list(dict.fromkeys(leaf for name in names for leaf in rows[name]))
        yield from _grid({name: rows[name] for name in names}, columns, width)


def _pairs(cells: Mapping[str, str]) -> RenderableType:
    pairs = RichTable.grid(padding=(0, _GAP, 0, 0))
    pairs.add_column()
    pairs.add_column(justify="right")
    for name, number in cells.items():
        pairs.add_row(_plain(name), _plain(number))
    return pairs


def _related(rows: Mapping[str, Mapping[str, str]]) -> list[list[str]]:
    """Rows that share a column, directly or through others, belong in one grid. Order of first appearance."""
    grids: list[tuple[set[str], list[str]]] = []
    for name, cells in rows.items():
        joined, others = (set(cells), [name]), []
        for columns, names in grids:
            if columns & joined[0]:
                joined = (columns | joined[0], names + joined[1])
            else:
                others.append((columns, names))
        grids = [*others, joined]
    order = {name: place for place, name in enumerate(rows)}
    return sorted((sorted(names, key=order.__getitem__) for _, names in grids), key=lambda names: order[names[0]])


def _grid(rows: Mapping[str, Mapping[str, str]], columns: Sequence[str], width: int) -> Iterator[RenderableType]:
    """One aligned grid, or several below each other where the columns do not fit side by side."""
    taken = max(cell_len(name) for name in rows)
    start = 0
    while start < len(columns):
        left, stop = width - taken, start
        while stop < len(columns):
            left -= _GAP + _column_width(columns[start:stop], columns[stop], rows)
            if left < 0 and stop > start:
                break
            stop += 1
        yield _grid_part(rows, columns[start:stop])
        start = stop


def _column_width(before: Sequence[str], column: str, rows: Mapping[str, Mapping[str, str]]) -> int:
    return max(cell_len(_heading(before, column)), *(cell_len(cells.get(column, "")) for cells in rows.values()))


def _grid_part(rows: Mapping[str, Mapping[str, str]], columns: Sequence[str]) -> RenderableType:
    grid = RichTable(box=None, padding=(0, _GAP, 0, 0), pad_edge=False)
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
    return _plain(
        f"{alert.level.upper()} {alert.tag}: {alert.title}"
        + (f"\n{_shortened(alert.text, _TEXT_CHARACTERS)}" if alert.text else "")
    )


def _content(record: Record) -> Iterator[RenderableType]:
    """What is shown of a record that is neither a scalar nor an alert."""
    path = record.tag.partition("/")[2] or record.tag
    if isinstance(record, Table):
        yield Group(_plain(path), Padding(_table(record), (0, 0, 0, 2)), *_more_rows(record))
    elif isinstance(record, Audio):
        for clip in record.clips:
            seconds = f"{len(clip.samples) / clip.sampling_rate:.1f} s" if clip.sampling_rate > 0 else "? s"
            yield _plain(
                f"{path}: {seconds} at {clip.sampling_rate:,} Hz" + (f", {clip.caption}" if clip.caption else "")
            )
    elif isinstance(record, Image):
        height, width = record.pixels.shape[:2]
        yield _plain(f"{path}: image of {width} × {height}" + (f", {record.caption}" if record.caption else ""))


def _table(table: Table) -> RichTable:
    rows = table.rows[: _rows_shown(table)]
    lines = [table.columns, *rows]
    if _is_wide(table):  # on its side: a line for every column that holds anything
        lines = [line for line in zip(*lines, strict=True) if any(cell is not None for cell in line[1:])]
    shown = RichTable(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for cell in lines[0] if lines else ():
        shown.add_column(_plain(_shortened(_cell(cell), _CELL_CHARACTERS)), overflow="fold")
    for line in lines[1:]:
        shown.add_row(*(_plain(_shortened(_cell(cell), _CELL_CHARACTERS)) for cell in line))
    return shown


def _is_wide(table: Table) -> bool:
    return len(table.columns) > _COLUMNS


def _rows_shown(table: Table) -> int:
    return _WIDE_ROWS if _is_wide(table) else _ROWS


def _more_rows(table: Table) -> list[RichText]:
    more = len(table.rows) - _rows_shown(table)
    return [_plain(f"  … {_counted(more, 'more row')}")] if more > 0 else []


def _cell(cell: Cell) -> str:
    if cell is None:
        return ""
    if isinstance(cell, Audio | Image):
        return f"see {cell.tag}"
    return _number(cell) if isinstance(cell, float) else str(cell)
