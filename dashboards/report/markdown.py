"""Texts of an event file, read back from the Markdown that keeps TensorBoard from taking them for markup.

Every ASCII punctuation character of a text stands there as a character reference (``&#124;``) and a newline as
``<br>``; tables and alerts are the only markup around texts. Anything else is somebody's own Markdown, left as it is.
"""

from __future__ import annotations

import html
import re
from dataclasses import dataclass
from typing import Literal, cast

Level = Literal["info", "warning", "error"]

_ESCAPED = r"(?:[^!-/:-@\[-`{-~\n]|&#[0-9]+;|<br>)*"
_TEXT = re.compile(_ESCAPED)
_CELL_BORDER = " | "
_ALERT = re.compile(rf"\*\*(INFO|WARNING|ERROR)&#58; ({_ESCAPED})\*\*\n\n({_ESCAPED})")


@dataclass(frozen=True)
class ReadTable:
    """A table's cells as plain text."""

    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class ReadAlert:
    """An alert as plain text."""

    level: Level
    title: str
    text: str


@dataclass(frozen=True)
class ReadText:
    """A text; ``markdown`` where it is not one of telemetry's own and stands as it was written."""

    text: str
    markdown: bool = False


def read(markdown: str) -> ReadTable | ReadAlert | ReadText:
    """What a text of an event file says."""
    if (alert := _ALERT.fullmatch(markdown)) is not None:
        return ReadAlert(cast(Level, alert[1].lower()), unescape(alert[2]), unescape(alert[3]))
    if (table := _table(markdown)) is not None:
        return table
    if _TEXT.fullmatch(markdown):
        return ReadText(unescape(markdown))
    return ReadText(markdown, markdown=True)


def unescape(line: str) -> str:
    """One line of escaped Markdown as the text that it shows."""
    return "\n".join(html.unescape(part) for part in line.split("<br>"))


def _table(markdown: str) -> ReadTable | None:
    lines = markdown.split("\n")
    if len(lines) < 2:
        return None
    header = _cells(lines[0])
    if header is None or lines[1] != "|" + " --- |" * len(header):
        return None
    rows = [_cells(line) for line in lines[2:]]
    whole = tuple(row for row in rows if row is not None and len(row) == len(header))
    return ReadTable(header, whole) if len(whole) == len(rows) else None


def _cells(line: str) -> tuple[str, ...] | None:
    if len(line) < 4 or not line.startswith("| ") or not line.endswith(" |"):
        return None
    cells = line[2:-2].split(_CELL_BORDER)
    return tuple(map(unescape, cells)) if all(map(_TEXT.fullmatch, cells)) else None
