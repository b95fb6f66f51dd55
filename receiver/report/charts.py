"""Pictures in SVG, without a word in them: so they can be as wide as the page, and the words keep their size."""

from __future__ import annotations

from typing import TYPE_CHECKING

from receiver import statistics
from receiver.report.markup import Markup, joined, tag

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from receiver.statistics import Slot

_HEIGHT = 100.0
_WIDE = 10.0
_BAR = 8.0


def nice(most: int) -> int:
    """Return the end of an axis: the least round number that is no less, and has whole halves."""
    step = 1
    while True:
        for factor in (2, 4, 6, 8, 10) if step == 1 else (2, 3, 4, 5, 6, 8, 10):
            if factor * step >= most:
                return factor * step
        step *= 10


def stacked(slots: Sequence[Slot], top: int, title: Callable[[Slot], str]) -> Markup:
    """Return bars along time, each of its states from the bottom up. top: what the full height means."""
    width = _WIDE * len(slots)
    grid = [
        tag("line", x1=0, x2=width, y1=_HEIGHT * part, y2=_HEIGHT * part, class_="grid") for part in (0.0, 0.5, 1.0)
    ]
    bars = []
    for index, slot in enumerate(slots):
        height = 0.0
        parts = []
        for state in statistics.STATES:
            if slot.states[state]:
                part = _HEIGHT * slot.states[state] / top
                height += part
                x = _WIDE * index + (_WIDE - _BAR) / 2
                parts.append(tag("rect", x=x, y=_HEIGHT - height, width=_BAR, height=part, class_=state))
        if parts:
            # Over the whole height, so that a low bar can be pointed at, too.
            parts.append(tag("rect", x=_WIDE * index, y=0, width=_WIDE, height=_HEIGHT, class_="hit"))
            bars.append(tag("g", tag("title", title(slot)), *parts))
    return tag(
        "svg", *grid, *bars, view_box=f"0 0 {width:g} {_HEIGHT:g}", preserve="none", class_="time", aria_hidden="true"
    )


def spark(slots: Sequence[Slot]) -> Markup:
    """Return the same, small: one colour, as high as its highest."""
    numbers = [slot.states.total() for slot in slots]
    top = max((*numbers, 1))
    bars = [
        tag("rect", x=_WIDE * index + 1, y=_HEIGHT * (1 - number / top), width=_BAR, height=_HEIGHT * number / top)
        for index, number in enumerate(numbers)
        if number
    ]
    base = tag("line", x1=0, x2=_WIDE * len(numbers), y1=_HEIGHT, y2=_HEIGHT, class_="grid")
    box = f"0 0 {_WIDE * max(1, len(numbers)):g} {_HEIGHT:g}"
    return tag("svg", base, *bars, view_box=box, preserve="none", class_="spark", aria_hidden="true")


def line(parts: Sequence[tuple[float, str]], *, track: bool = False) -> Markup:
    """Return one bar from the left: (share of the width, class) for each part. track: show the rest of it."""
    at = 0.0
    bars = [tag("rect", x=0, y=0, width=_HEIGHT, height=10, class_="track")] if track else []
    for share, kind in parts:
        width = min(max(share, 0.0), 1.0) * _HEIGHT
        # What is there can be seen.
        width = min(max(width, 1.5) if share > 0 else 0.0, _HEIGHT - at)
        bars.append(tag("rect", x=at, y=0, width=width, height=10, class_=kind))
        at += width
    return tag("svg", joined(*bars), view_box="0 0 100 10", preserve="none", class_="line", aria_hidden="true")
