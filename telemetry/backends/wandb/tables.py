"""Tables that grow: every step adds its rows, and only they are sent."""

from __future__ import annotations

import logging
import numbers
from collections.abc import Callable, Iterable
from typing import Any, Literal

import numpy as np
import wandb

from telemetry.records import Audio, Cell, Image, Table

AXIS_COLUMN = "global_step"
MAX_CELL = 10_000  # characters
# W&B shows this many increments of a table, and every one of them names all earlier ones.
MAX_INCREMENTS = 100

Kind = Literal["flag", "number", "text", "audio", "image"]
Media = Callable[[Audio | Image], Any]

logger = logging.getLogger(__name__)


class GrowingTable:
    """One table of a run, as wide as its first rows and with their kinds of cells.

    W&B refuses a column of several kinds. So a column is of the kind of its first cell that is not empty: later cells
    of another are turned into text where the column is of text; where it is not, the rows do not fit.

    Attributes:
        key: what W&B knows it by.
    """

    def __init__(self, key: str, columns: tuple[str, ...]) -> None:
        self.key = key
        self.columns = columns
        self._kinds: list[Kind | None] = [None] * len(columns)
        self._table: Any = None
        self._increments = 0

    def fits(self, table: Table) -> bool:
        """Whether the rows have these columns, and cells that they can take."""
        return table.columns == self.columns and all(
            kind is None or kind == "text" or _kind(cell) in (kind, None)
            for row in table.rows
            for kind, cell in zip(self._kinds, row, strict=True)
        )

    def grown(self, step: int, table: Table, media: Media) -> Any:
        """The ``wandb.Table`` with the rows of a step, to be logged at once."""
        if self._table is None or self._increments >= MAX_INCREMENTS:
            axis = AXIS_COLUMN if AXIS_COLUMN not in self.columns else f"{AXIS_COLUMN} (telemetry)"
            self._table = wandb.Table(columns=[axis, *self.columns], log_mode="INCREMENTAL")
            self._increments = 0
        self._increments += 1
        for at in range(len(self.columns)):
            self._kinds[at] = self._kinds[at] or _common_kind(row[at] for row in table.rows)
        for row in table.rows:
            cells = [_cell(cell, kind, media) for cell, kind in zip(row, self._kinds, strict=True)]
            self._table.add_data(step, *cells)
        return self._table

    def begin_again(self) -> None:
        """Have the next rows begin a table: the last were not taken, or another client process takes them."""
        self._table = None


class Tables:
    """The growing tables of a run by tag. Rows that no table of their tag can take begin another: ``<tag>/2``."""

    def __init__(self) -> None:
        self._by_tag: dict[str, list[GrowingTable]] = {}

    def for_rows(self, table: Table) -> GrowingTable:
        """The table that takes these rows."""
        known = self._by_tag.setdefault(table.tag, [])
        for growing in known:
            if growing.fits(table):
                return growing
        key = f"{table.tag}/{len(known) + 1}" if known else table.tag
        if known:
            logger.warning("rows of %s no longer fit its columns: W&B shows them at %s", table.tag, key)
        known.append(GrowingTable(key, table.columns))
        return known[-1]

    def begin_again(self, tags: Iterable[str] | None = None) -> None:
        """As :meth:`GrowingTable.begin_again`, for those of some tags, or all."""
        for tag in self._by_tag if tags is None else tags:
            for growing in self._by_tag.get(tag, ()):
                growing.begin_again()


def _kind(cell: Cell) -> Kind | None:
    if cell is None:
        return None
    if isinstance(cell, Audio):
        return "audio" if any(clip.samples.size for clip in cell.clips) else None
    if isinstance(cell, Image):
        return "image"
    if isinstance(cell, bool):
        return "flag"
    return "number" if isinstance(cell, numbers.Real) else "text"


def _common_kind(cells: Any) -> Kind | None:
    kinds = {kind for cell in cells if (kind := _kind(cell)) is not None}
    return next(iter(kinds)) if len(kinds) < 2 and kinds else ("text" if kinds else None)


def _cell(cell: Cell, kind: Kind | None, media: Media) -> Any:
    held = _kind(cell)
    if held is None:
        return None
    if isinstance(cell, Audio | Image):
        return media(cell) if held == kind else cell.tag
    if kind == "text":
        return shortened(str(cell), MAX_CELL)
    return cell.item() if isinstance(cell, np.generic) else cell


def shortened(text: str, characters: int) -> str:
    """A text of at most so many characters, with what was cut said at its end.

    One text of 11 MB keeps the client from sending a run's summary ever again.
    """
    if len(text) <= characters:
        return text
    return f"{text[:characters]}… ({len(text) - characters} more characters)"
