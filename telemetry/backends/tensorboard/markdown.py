"""Plain text and tables as Markdown that TensorBoard shows as they are, whatever they hold.

TensorBoard renders every text as Markdown, then cleans the HTML: ``a|b`` loses a cell, ``<|endoftext|>`` its middle,
``__init__`` turns bold. Here every ASCII punctuation character becomes a character reference, so that no text can be
taken for markup.
"""

from __future__ import annotations

import numbers
import re
import string

import numpy as np

from telemetry.records import Alert, Cell, Table

MAX_CELL = 300
"""Characters of a cell that are shown: a longer unbroken one squeezes its neighbours out of sight."""

MAX_ROWS = 50
"""Rows of a table that are shown: the page renders every stored step's rows anew."""

_CONTROL_PICTURES = {chr(code): chr(0x2400 + code) for code in range(32)} | {"\x7f": "\u2421"}
_ESCAPES = str.maketrans(
    {
        **_CONTROL_PICTURES,
        **{character: f"&#{ord(character)};" for character in string.punctuation + "\t"},
    }
)
_NEWLINE = re.compile(r"\r\n?|[\n\x85\u2028\u2029]")
_COLLAPSING_SPACE = re.compile(r"(?:(?<=^)|(?<= )) | $")


def escape(text: str) -> str:
    """Text as one line of Markdown that shows exactly this text.

    Newlines become ``<br>``, spaces that HTML would swallow become no-break spaces, and control characters and broken
    surrogates become visible stand-ins.
    """
    text = text.encode("utf-8", "backslashreplace").decode("utf-8")
    return "<br>".join(_escape_line(line) for line in _NEWLINE.split(text))


def _escape_line(line: str) -> str:
    return _COLLAPSING_SPACE.sub("\N{NO-BREAK SPACE}", line).translate(_ESCAPES)


def table_markdown(table: Table) -> str:
    """A table of at most :data:`MAX_ROWS` rows; a last row says how many more there are."""
    shown = table.rows[:MAX_ROWS]
    lines = [_row(table.columns), "|" + " --- |" * len(table.columns)]
    lines += [_row(row) for row in shown]
    if left_out := len(table.rows) - len(shown):
        lines.append(_row((f"… {left_out} more rows", *("",) * (len(table.columns) - 1))))
    return "\n".join(lines)


def alert_markdown(alert: Alert) -> str:
    """An alert with its level and title set apart from its text."""
    return f"**{escape(f'{alert.level.upper()}: {alert.title}')}**\n\n{escape(alert.text)}"


def _row(cells: tuple[Cell, ...]) -> str:
    return "| " + " | ".join(escape(_shorten(_cell_text(cell))) for cell in cells) + " |"


def _shorten(text: str) -> str:
    return text if len(text) <= MAX_CELL else text[:MAX_CELL] + "…"


def _cell_text(cell: Cell) -> str:
    """What a cell says: nothing for None, ``true`` and ``false``, and six significant digits of a float."""
    if cell is None:
        return ""
    if isinstance(cell, bool | np.bool_):
        return "true" if cell else "false"
    if isinstance(cell, numbers.Real) and not isinstance(cell, numbers.Integral):
        return f"{float(cell):.6g}"
    return str(cell)
