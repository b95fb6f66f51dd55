"""What the handlers noted (`forwarder/handled.py`), read on as it grows."""

from __future__ import annotations

import contextlib
import os
from typing import TYPE_CHECKING, NamedTuple

from forwarder import handled
from forwarder.handled import NOTES, ON_THE_WAY

if TYPE_CHECKING:
    from collections.abc import Container

    from forwarder.ledger.book import Crash

MAX_LINE = 8192
TURN_NOTES = 1 << 19


class Note(NamedTuple):
    """A line of `forwarder/handled.py`. at: CLOCK_MONOTONIC, ns. inode: 0 when not known.

    record: the id of the host's record, or the pid of the receiver's listener in a note that is not the last word.
    reason: why no receiver had it, or its process's pids in a note that one was asked.
    """

    at: int
    pid: int
    inode: int
    state: str
    key: str
    record: str
    reason: str


def parse_notes(data: bytes) -> list[Note]:
    """Return the notes in some bytes; whatever is no whole note is passed over."""
    found = []
    for line in data.split(b"\n"):
        words = line.decode("ascii", "replace").split(" ", 6)
        if len(words) != 7 or words[3] not in handled.STATES:
            continue
        numbers = words[:3]
        if all(word.isascii() and word.isdigit() and len(word) < 21 for word in numbers):
            at, pid, inode = map(int, numbers)
            found.append(Note(at, pid, inode, *words[3:]))
    return found


class Notes:
    """What the handlers noted and nobody has claimed yet. The file is read on, and turned over when it is long.

    Several files may be open: whoever opened one before it was turned over may still write to it.
    """

    def __init__(self, path: str = NOTES) -> None:
        self.path = path
        self._files: list[tuple[int, int]] = []
        self._rest: dict[int, bytes] = {}
        self._waiting: dict[int, list[Note]] = {}

    def close(self) -> None:
        for fd, _ in self._files:
            os.close(fd)
        self._files.clear()

    def read(self, *, turn: bool) -> None:
        """Take in what is new. turn: keep the file short; only the watcher does."""
        self._open()
        for index, (fd, begun) in enumerate(self._files):
            at = begun
            with contextlib.suppress(OSError):
                while data := os.pread(fd, 1 << 16, at):
                    at += len(data)
                    data = self._rest.pop(fd, b"") + data
                    whole, _, rest = data.rpartition(b"\n")
                    # No line is that long: what is, is none.
                    self._rest[fd] = rest[:MAX_LINE]
                    for note in parse_notes(whole):
                        self._waiting.setdefault(note.pid, []).append(note)
            self._files[index] = (fd, at)
        if turn and self._files and self._files[-1][1] > TURN_NOTES:
            with contextlib.suppress(OSError):
                os.rename(self.path, self.path + ".1")

    def _open(self) -> None:
        """Open the files that are not open yet, older first, and close those that have been turned over twice."""
        opened = {(found.st_dev, found.st_ino) for found in (os.fstat(fd) for fd, _ in self._files)}
        for path in (self.path + ".1", self.path):
            with contextlib.suppress(OSError):
                fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
                found = os.fstat(fd)
                if (found.st_dev, found.st_ino) in opened:
                    os.close(fd)
                else:
                    self._files.append((fd, 0))
        while len(self._files) > 2:
            fd, _ = self._files.pop(0)
            self._rest.pop(fd, None)
            os.close(fd)

    def of(self, crash: Crash) -> list[Note]:
        """Return the notes of a crash, the last one last. They are of this boot, and so must the crash be.

        Where nobody knows an inode, the first word that is the last one ends it: what comes after is of the next
        process with that number.
        """
        found: list[Note] = []
        for note in self._waiting.get(crash.pid, []):
            if crash.inode and note.inode:
                # Numbers come again, inodes do not.
                if crash.inode == note.inode:
                    found.append(note)
            elif note.at >= crash.began and not (found and found[-1].state not in ON_THE_WAY):
                found.append(note)
        return found

    def drop(self, notes: list[Note]) -> None:
        """Take notes out: their crash is settled."""
        for note in notes:
            waiting = self._waiting.get(note.pid, [])
            waiting[:] = [other for other in waiting if other is not note]

    def forget(self, before: int, *, but: Container[int]) -> None:
        """Drop those from before a moment (CLOCK_MONOTONIC, ns). but: pids of crashes that are not over."""
        for pid, waiting in list(self._waiting.items()):
            kept = [note for note in waiting if note.at >= before or pid in but]
            if kept:
                self._waiting[pid] = kept
            else:
                del self._waiting[pid]
