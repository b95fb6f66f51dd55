"""What waits for whom: a file beside the records, `.notify.state`.

It has the ids of the records that were looked at, and for each callback those that it is still to be told, with its
counters. All ids and not the newest one: a crash gets its id when it comes, and its record when its core is written,
which may be hours and many crashes later. Ids whose record has gone are forgotten, so it has no more than the store.

Written under another name, then renamed, and not synced: who finds it damaged after a loss of power begins anew, and
tells the crashes of the last day again. Each is told at least once; that is what its id is for.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import random
import stat
from typing import TYPE_CHECKING, Any

from receiver.retention import FULL
from receiver.store import ID, write_all

if TYPE_CHECKING:
    from collections.abc import Iterable

    from receiver.notify.settings import Callback

STATE = ".notify.state"
LOCK = ".notify.lock"
VERSION = 1
MAX_STATE = 256 << 20
# A crash is told of for so long after it was first tried, and no longer.
GIVE_UP_SECONDS = 86400.0
FIRST_PAUSE, LONGEST_PAUSE = 1.0, 900.0
# What a server may ask for (Retry-After).
LONGEST_REQUEST = 3600.0
# Bugs that are remembered for `first` and `every`.
BUGS = 1000
COUNTERS = ("delivered", "failed", "given_up", "dropped")


def pause(failures: int) -> float:
    """Return how long to wait after so many failures in a row, seconds. With jitter: many containers wait for one."""
    longest = min(LONGEST_PAUSE, FIRST_PAUSE * 2.0 ** min(failures - 1, 20))
    return longest * random.uniform(0.5, 1.0)  # noqa: S311 - not a secret


class Waiting:
    """A crash that a callback is to be told. queued, next: seconds since the epoch. attempts: that failed."""

    __slots__ = ("attempts", "next", "queued")

    def __init__(self, queued: float, attempts: int = 0, next: float = 0.0) -> None:  # noqa: A002
        self.queued = queued
        self.attempts = attempts
        self.next = next


class Line:
    """One callback's part of the queue.

    since: crashes from before are not told, seconds since the epoch. failures: in a row. resume: nothing is tried
    before that. error: of the last attempt, while it fails. bugs: how many crashes of each bug there were, the latest
    last.
    """

    def __init__(self, since: float) -> None:
        self.since = since
        self.counters = dict.fromkeys(COUNTERS, 0)
        self.failures = 0
        self.resume = 0.0
        self.error = ""
        self.waiting: dict[str, Waiting] = {}
        self.bugs: dict[str, int] = {}

    def add(self, owner: str, now: float, most: int) -> None:
        """Queue a crash, and drop the oldest one when there are too many."""
        if owner in self.waiting:
            return
        self.waiting[owner] = Waiting(now)
        while len(self.waiting) > most:
            del self.waiting[min(self.waiting)]
            self.counters["dropped"] += 1

    def count_bug(self, bug: str) -> int:
        """Count a crash of a bug. Returns how many there were, this one included."""
        count = self.bugs.pop(bug, 0) + 1
        self.bugs[bug] = count
        while len(self.bugs) > BUGS:
            del self.bugs[next(iter(self.bugs))]
        return count

    def due(self, now: float) -> str | None:
        """Return the crash to tell now, if any: the one that was to be told first, of those the oldest.

        One that a server does not like waits by itself; a callback that fails as a whole is tried with one at a time.
        """
        if self.resume > now + LONGEST_REQUEST:
            # The clock was set back.
            self.resume = now
        if self.resume > now or not self.waiting:
            return None
        at, owner = min((waiting.next, owner) for owner, waiting in self.waiting.items())
        return owner if at <= now or at > now + LONGEST_REQUEST else None

    def next(self) -> float | None:
        """Return when there is something to do again, seconds since the epoch; None without anything."""
        if not self.waiting:
            return None
        return max(self.resume, min(waiting.next for waiting in self.waiting.values()))

    def succeeded(self, owner: str) -> bool:
        """Count a delivery. Returns whether the callback had failed before."""
        had_failed = self.failures > 0
        self.waiting.pop(owner, None)
        self.counters["delivered"] += 1
        self.failures = 0
        self.resume = 0.0
        self.error = ""
        return had_failed

    def failed(self, owner: str, error: str, now: float, retry_after: float = 0.0) -> bool:
        """Count a failure, and say when to go on. Returns whether it is the first in a row."""
        self.counters["failed"] += 1
        self.failures += 1
        self.error = error
        asked = min(max(retry_after, 0.0), LONGEST_REQUEST)
        self.resume = now + max(pause(self.failures), asked)
        waiting = self.waiting.get(owner)
        if waiting is not None:
            waiting.attempts += 1
            waiting.next = now + max(pause(waiting.attempts), asked)
            if now - waiting.queued >= GIVE_UP_SECONDS:
                del self.waiting[owner]
                self.counters["given_up"] += 1
        return self.failures == 1

    def drop(self, owner: str) -> None:
        """Count a crash that cannot be told any more: its record has gone."""
        if self.waiting.pop(owner, None) is not None:
            self.counters["dropped"] += 1

    def to_json(self) -> dict[str, Any]:
        found: dict[str, Any] = {name: getattr(self, name) for name in ("since", "failures", "resume", "error")}
        waiting = {owner: [item.queued, item.attempts, item.next] for owner, item in self.waiting.items()}
        return {"counters": self.counters, "waiting": waiting, "bugs": self.bugs, **found}

    @classmethod
    def from_json(cls, found: dict[str, Any]) -> Line:
        """Raise ValueError, TypeError, KeyError or AttributeError when it is none."""
        line = cls(float(found["since"]))
        line.failures = int(found["failures"])
        line.resume = float(found["resume"])
        line.error = str(found["error"])
        for name in COUNTERS:
            line.counters[name] = int(found["counters"].get(name, 0))
        for owner, (queued, attempts, at) in found["waiting"].items():
            if ID.fullmatch(owner):
                line.waiting[owner] = Waiting(float(queued), int(attempts), float(at))
        line.bugs = {str(bug): int(count) for bug, count in found["bugs"].items()}
        return line


class Queue:
    """All lines, and what was looked at. seen: ids of records."""

    def __init__(self) -> None:
        self.seen: set[str] = set()
        self.lines: dict[str, Line] = {}

    def attend(self, callbacks: Iterable[Callback], since: float) -> None:
        """Have a line for each of these callbacks, and for no other. since: for new ones."""
        self.lines = {callback.name: self.lines.get(callback.name) or Line(since) for callback in callbacks}

    def dumps(self) -> bytes:
        lines = {name: line.to_json() for name, line in self.lines.items()}
        return json.dumps({"version": VERSION, "lines": lines, "seen": sorted(self.seen)}).encode("ascii")

    @classmethod
    def loads(cls, data: bytes) -> Queue:
        """Raise ValueError when this is none."""
        queue = cls()
        try:
            found = json.loads(data)
            if found["version"] != VERSION:
                raise ValueError("another version wrote it")
            queue.seen = {owner for owner in found["seen"] if ID.fullmatch(owner)}
            queue.lines = {name: Line.from_json(line) for name, line in found["lines"].items()}
        except (TypeError, KeyError, AttributeError, OverflowError, RecursionError) as error:
            raise ValueError(f"{type(error).__name__}: {error}") from None
        return queue


def read(directory: int) -> Queue | None:
    """Return what the store's queue has, None without one. Raises OSError, ValueError."""
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        fd = os.open(STATE, flags, dir_fd=directory)
    except FileNotFoundError:
        return None
    with open(fd, "rb") as file:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise ValueError("it is not a file")
        data = file.read(MAX_STATE + 1)
    if len(data) > MAX_STATE:
        raise ValueError("it is too large")
    return Queue.loads(data)


def write(directory: int, queue: Queue) -> None:
    """Replace the queue on the disk. Raises OSError, and then the old one stands."""
    put(directory, f"{STATE}.new", STATE, queue.dumps())


def put(directory: int, new: str, name: str, data: bytes) -> None:
    """Write a file whole, or not at all. new: its name until it is whole. Raises OSError."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    fd = os.open(new, flags, 0o600, dir_fd=directory)
    try:
        try:
            write_all(fd, data)
        finally:
            os.close(fd)
        os.rename(new, name, src_dir_fd=directory, dst_dir_fd=directory)
    except OSError:
        os.unlink(new, dir_fd=directory)
        raise


def lock(directory: int) -> int | None:
    """Return a descriptor that makes its holder the store's only deliverer; None when there is one. Raises OSError."""
    try:
        # A file that only root opens: anybody may open the store's directory, and so keep a lock on that.
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        fd = os.open(LOCK, flags, 0o600, dir_fd=directory)
    except OSError as error:
        if error.errno not in (*FULL, errno.EROFS):
            raise
        # No room even for an empty file. Should there be two deliverers by that, some are told twice.
        fd = os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=directory)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(fd)
        return None
    except BaseException:
        os.close(fd)
        raise
    return fd
