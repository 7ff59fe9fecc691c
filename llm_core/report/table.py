"""Tables for a terminal."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence


def table_lines(header: Sequence[str], rows: Sequence[Sequence[object]], left: int = 1) -> list[str]:
    """The lines of a table: the first `left` columns aligned to the left, the others (numbers) to the right."""
    cells = [[str(cell) for cell in row] for row in (header, *rows)]
    widths = [max(_width(row[column]) for row in cells) for column in range(len(header))]
    lines = [
        "  ".join(
            _padded(cell, width, column < left)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in cells
    ]
    return [lines[0], "  ".join("-" * width for width in widths), *lines[1:]]


def _padded(text: str, width: int, left: bool) -> str:
    blanks = " " * (width - _width(text))
    return text + blanks if left else blanks + text


def _width(text: str) -> int:
    """Columns of a terminal: a Chinese character takes two."""
    return sum(2 if unicodedata.east_asian_width(character) in "WF" else 1 for character in text)
