"""What a terminal is shown: tables, sizes and times for people, and nothing that moves the cursor."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

# Every row is as long as the longest: one record of a stranger's must not make a gigabyte of them all.
LONGEST_CELL = 1000


def shown(value: object) -> str:
    """Return a value for a terminal: what a crashed program named itself must not move the cursor."""
    text = str(value)
    return text if text.isprintable() else "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def cut(text: str, longest: int) -> str:
    """Return a text, and no more than so many characters of it."""
    return text if len(text) <= longest else f"{text[: longest - 3]}..."


def size(number: int) -> str:
    """Return bytes as `12.3M`."""
    scaled = float(number)
    for unit in ("B", "K", "M", "G", "T"):
        # 1023.7 K are 1.0M: no unit has 1024 of the one before.
        if scaled < 1023.5 or unit == "T":
            return f"{scaled:.0f}{unit}" if unit == "B" or scaled >= 100 else f"{scaled:.1f}{unit}"
        scaled /= 1024
    raise AssertionError


def duration(seconds: int) -> str:
    """Return seconds in the largest unit that leaves nothing important out, as the settings write them."""
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length or (seconds and seconds % length == 0):
            return f"{seconds // length}{unit}"
    return f"{seconds}s"


def lines(
    rows: Sequence[Sequence[object]],
    right: frozenset[int] = frozenset(),
    paint: Callable[[int, int], str] | None = None,
    widths: list[int] | None = None,
) -> list[str]:
    """Return rows, the first of which is the heading, in columns.

    right: columns that stand at their right. paint: gives the colour (output.Colours) of a cell by its row and column.
    widths: at least so wide is each column; they grow with what is shown, for a table that comes in pieces.
    """
    if not rows:
        return []
    texts = [[cut(shown(cell), LONGEST_CELL) for cell in row] for row in rows]
    widths = [0] * len(texts[0]) if widths is None else widths
    widths[:] = [max(least, *(len(row[column]) for row in texts)) for column, least in enumerate(widths)]
    found = []
    for number, row in enumerate(texts):
        cells = [
            cell.rjust(width) if column in right else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        cells[-1] = cells[-1].rstrip()
        if paint is not None:
            cells = [f"{code}{cell}\x1b[0m" if (code := paint(number, at)) else cell for at, cell in enumerate(cells)]
        found.append(" ".join(cells).rstrip())
    return found
