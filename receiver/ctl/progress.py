"""A bar for what takes longer than a second, on a terminal."""

from __future__ import annotations

import os
import sys
import time
from typing import TYPE_CHECKING, Self

from receiver import tables

if TYPE_CHECKING:
    from types import TracebackType

# Seconds until it shows itself, and between two looks of it.
AFTER = 1.0
STEP = 0.1
_WIDEST = 40
_CLEAR = "\r\x1b[K"


class Progress:
    """Shows on standard error how much is done, when that is a terminal; a context manager that wipes it away."""

    def __init__(self, what: str, whole: int) -> None:
        """what: a word or two. whole: bytes that there are to do."""
        self._what = what
        self._whole = max(whole, 1)
        self._terminal = sys.stderr.isatty() and os.environ.get("TERM", "dumb") != "dumb"
        self._began = time.monotonic()
        self._next = self._began + AFTER
        self._shown = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, _kind: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        if self._shown:
            sys.stderr.write(_CLEAR)
            sys.stderr.flush()

    def __call__(self, done: int) -> None:
        """Be told how many bytes are done."""
        if not self._terminal:
            return
        now = time.monotonic()
        if now < self._next:
            return
        self._next = now + STEP
        self._shown = True
        sys.stderr.write(_CLEAR + self._line(min(done, self._whole), now - self._began))
        sys.stderr.flush()

    def _line(self, done: int, seconds: float) -> str:
        part = done / self._whole
        text = f" {part:4.0%} {tables.size(done)} of {tables.size(self._whole)}"
        if part and seconds:
            text += f", {tables.size(int(done / seconds))}/s, {tables.duration(round(seconds / part - seconds))} left"
        try:
            columns = os.get_terminal_size(sys.stderr.fileno()).columns or 80
        except OSError:
            columns = 80
        room = min(_WIDEST, columns - len(self._what) - len(text) - 4)
        if room < 5:
            return f"{self._what}{text}"[: columns - 1]
        filled = int(part * room)
        return f"{self._what} [{'#' * filled}{'-' * (room - filled)}]{text}"
