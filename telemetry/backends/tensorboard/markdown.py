"""Plain text and tables as Markdown that TensorBoard shows as they are, whatever they hold.

TensorBoard renders every text as Markdown, then cleans the HTML: ``a|b`` loses a cell, ``<|endoftext|>`` its middle,
``__init__`` turns bold. Here every ASCII punctuation character becomes a character reference, so that no text can be
taken for markup.
"""

from __future__ import annotations

import numbers
import re
import string
import sys
from collections.abc import Sequence

import numpy as np

from telemetry.records import Alert, Audio, Cell, Image, Table

MAX_CELL = 300
"""Characters of a cell that are shown: a longer unbroken one squeezes its neighbours out of sight."""

MAX_ROWS = 50
"""Rows of a table that are shown: the page renders every stored step's rows anew."""

# In characters: what a page in a window 1500 pixels wide has room for, and what a column's borders take of it.
_PAGE, _COLUMN, _NARROWEST = 130, 4, 12

_CONTROL_PICTURES = {chr(code): chr(0x2400 + code) for code in range(32)} | {"\x7f": "\u2421"}
_VISIBLE = str.maketrans({code: picture for code, picture in _CONTROL_PICTURES.items() if code not in "\n\t"})
_ESCAPES = str.maketrans({character: f"&#{ord(character)};" for character in string.punctuation + "\t"})
_NEWLINE = re.compile(r"\r\n?|[\n\x85\u2028\u2029]")
_COLLAPSING_SPACE = re.compile(r"(?:(?<=^)|(?<= )) | $")


def escape(text: str, width: int = sys.maxsize) -> str:
    """Text as one line of Markdown that shows exactly this text, in lines of at most ``width`` characters.

    Newlines become ``<br>``, spaces that HTML would swallow become no-break spaces, and what :func:`visible` replaces
    is replaced.
    """
    spaced = "  " in text or text[:1] == " " or text[-1:] == " "
    if len(text) <= width and not spaced and text.isascii() and text.isprintable():  # most cells
        return text.translate(_ESCAPES)
    lines = [part for line in visible(text).split("\n") for part in _wrap(line, width)]
    return "<br>".join(_COLLAPSING_SPACE.sub("\N{NO-BREAK SPACE}", line).translate(_ESCAPES) for line in lines)


def visible(text: str) -> str:
    """Text whose newlines are all ``\\n``, with visible stand-ins for control characters and broken surrogates."""
    if text.isascii() and text.isprintable():
        return text
    return _NEWLINE.sub("\n", text.encode("utf-8", "backslashreplace").decode("utf-8")).translate(_VISIBLE)


def _wrap(line: str, width: int) -> list[str]:
    """A line in parts that end after a space where they can; together they are the line."""
    if len(line) <= width:
        return [line]
    return re.findall(rf".{{1,{width}}}\Z|.{{0,{width - 1}}} |.{{{width}}}", line, re.DOTALL)


def table_texts(table: Table) -> list[list[str]]:
    """A table's column names and at most :data:`MAX_ROWS` rows as text; a last row says how many more there are."""
    texts = [[_cell_text(cell) for cell in row] for row in (table.columns, *table.rows[:MAX_ROWS])]
    if (left_out := len(table.rows) - MAX_ROWS) > 0:
        texts.append([f"… {left_out} more rows", *[""] * (len(table.columns) - 1)])
    return texts


def table_markdown(texts: Sequence[Sequence[str]]) -> str:
    """A table of texts, the column names first.

    Lines of wide columns are broken so that the table fits the page: the page itself breaks short words first.
    """
    width = _line_width([max(map(len, "\n".join(column).split("\n"))) for column in zip(*texts, strict=True)])
    header, *rows = ["| " + " | ".join(escape(text, width) for text in row) + " |" for row in texts]
    return "\n".join([header, "|" + " --- |" * len(texts[0]), *rows])


def alert_markdown(alert: Alert) -> str:
    """An alert with its level and title set apart from its text."""
    return f"**{escape(f'{alert.level.upper()}: {alert.title}')}**\n\n{escape(alert.text)}"


def _line_width(columns: list[int]) -> int:
    """The longest line for which columns of these widths fit side by side: narrow ones whole, wide ones equally."""
    room = _PAGE - _COLUMN * len(columns)
    for done, column in enumerate(sorted(columns)):
        share = room // (len(columns) - done)
        if column > share:
            return max(share, _NARROWEST)
        room -= column
    return MAX_CELL + 1


def _cell_text(cell: Cell) -> str:
    """What a cell visibly says, cut: where sound is, nothing for None, ``true`` or ``false``, six digits of a float."""
    if isinstance(cell, float):  # before what abstract types take long to tell
        return f"{cell:.6g}"
    if type(cell) is not str and type(cell) is not int:
        if cell is None:
            return ""
        if isinstance(cell, Audio | Image):
            return visible(f"see {cell.tag}")
        if isinstance(cell, bool | np.bool_):
            return "true" if cell else "false"
        if isinstance(cell, numbers.Real) and not isinstance(cell, numbers.Integral):
            return f"{float(cell):.6g}"
    text = str(cell)
    return visible(text if len(text) <= MAX_CELL else text[:MAX_CELL] + "…")
