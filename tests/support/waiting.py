"""Waits: for a condition, with a deadline, never for a time."""

from __future__ import annotations

import os
import select
import time
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable

_Result = TypeVar("_Result")
_INTERVAL_S = 0.01


def wait_until(predicate: Callable[[], _Result | None], timeout: float, what: str) -> _Result:
    """Ask until the answer is a true value, and return it.

    Raises TimeoutError, which names `what` was awaited, after `timeout` seconds.
    """
    deadline = time.monotonic() + timeout
    while True:
        answer = predicate()
        if answer:
            return answer
        if time.monotonic() >= deadline:
            raise TimeoutError(f"after {timeout:g} s still not: {what}")
        time.sleep(_INTERVAL_S)


def read_line(fd: int, timeout: float, what: str) -> bytes:
    """Read one line from a descriptor; b"" (or less than a line) when it ends before.

    Raises TimeoutError.
    """
    deadline = time.monotonic() + timeout
    line = b""
    while not line.endswith(b"\n"):
        left = deadline - time.monotonic()
        if left <= 0 or not select.select([fd], [], [], left)[0]:
            raise TimeoutError(f"after {timeout:g} s still not: {what} (so far {line!r})")
        byte = os.read(fd, 1)
        if not byte:
            break
        line += byte
    return line
