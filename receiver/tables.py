"""What a terminal is shown: tables, sizes and times for people, and nothing that moves the cursor."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence


def shown(value: object) -> str:
    """Return a value for a terminal: what a crashed program named itself must not move the cursor."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in str(value))


def size(number: int) -> str:
    """Return bytes as `12.3M`."""
    scaled = float(number)
    for unit in ("B", "K", "M", "G", "T"):
        if scaled < 1024 or unit == "T":
            return f"{scaled:.0f}{unit}" if unit == "B" or scaled >= 100 else f"{scaled:.1f}{unit}"
        scaled /= 1024
    raise AssertionError


def duration(seconds: int) -> str:
    """Return seconds in the largest unit that leaves nothing important out, as the settings write them."""
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length or (seconds and seconds % length == 0):
            return f"{seconds // length}{unit}"
    return f"{seconds}s"


def lines(rows: Sequence[Sequence[object]], right: frozenset[int] = frozenset()) -> list[str]:
    """Return rows, the first of which is the heading, in columns. right: columns that stand at their right."""
    texts = [[shown(cell) for cell in row] for row in rows]
    widths = [max(len(row[column]) for row in texts) for column in range(len(texts[0]))]
    return [
        " ".join(
            cell.rjust(width) if column in right else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in texts
    ]
