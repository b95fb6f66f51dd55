"""How much a container may make the host write: so many log lines and records in so much time, and not more (H16).

The count is a small file for each container, so it holds across stubs. Rare: only for crashes that nobody took.
"""

from __future__ import annotations

import fcntl
import os
import time

DIRECTORY = "/run/core_pipe_forwarder/said"
WINDOW_SECONDS = 3600
# A record has a few KiB: 4 MiB an hour at the most. A line has at most 1 KiB.
RECORDS = 1000
LINES = 100


class Allowance:
    """What one container has used of its window."""

    def __init__(self, key: str, directory: str = DIRECTORY) -> None:
        self._directory = directory
        self._path = f"{directory}/{key}"

    def use(self, now: float | None = None) -> tuple[bool, bool, int]:
        """Count one crash. Returns whether it may have a line, and a record, and how many before it had no record.

        Raises OSError.
        """
        os.makedirs(self._directory, mode=0o700, exist_ok=True)
        fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            _lock(fd)
            begun, used = _read(fd)
            now = time.time() if now is None else now
            kept_back = 0
            # A clock that was set back begins a new window, too.
            if not begun <= now < begun + WINDOW_SECONDS:
                kept_back = max(0, used - RECORDS)
                begun, used = now, 0
            used += 1
            os.ftruncate(fd, 0)
            os.pwrite(fd, f"{int(begun)} {used}\n".encode(), 0)
            return used <= LINES, used <= RECORDS, kept_back
        finally:
            os.close(fd)


def _lock(fd: int, seconds: float = 1.0) -> None:
    deadline = time.monotonic() + seconds
    while True:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            # Whoever holds it for so long is stuck; counting badly is better than waiting.
            if time.monotonic() > deadline:
                return
            time.sleep(0.001)
        else:
            return


def _read(fd: int) -> tuple[float, int]:
    try:
        begun, used = os.pread(fd, 128, 0).split()
        return float(int(begun)), int(used)
    except (ValueError, OverflowError):
        # New, or cut by a full /run.
        return 0.0, 0
