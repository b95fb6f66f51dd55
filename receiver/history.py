"""What crashed lately: a small file in the store, for the same crash again and again, and for programs in a crash loop.

Lines `TIME KIND HASH COUNT`: seconds since the epoch; `P` for a program that was offered a place for its core, `K` for
a bug (a signature) whose core is kept, `R` for one that left a record only; the hash of what it is; how many that were.
Only `R` counts further than 1, in place: a crash loop that is refused must not push out what it is refused for. Lines
are added at the end, and when it is full, the newer half replaces it. A line that is torn or damaged is none. It is a
help and no more: whatever is wrong with it, the crash is kept as if nothing had been before.

To be used with the store's lock held.
"""

from __future__ import annotations

import os
import stat

from receiver.signature import digest

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

NAME = ".history"
MAX_SIZE = 128 << 10
# So many of the newest lines are there at least.
LEAST = MAX_SIZE // 2 // 48
PROGRAM, KEPT, REFUSED = "P", "K", "R"
# Workers do not take turns by the time of their crash; a line from further ahead is of a clock that was set back.
_AHEAD = 60.0
_MOST = 99_999_999
_KINDS = (PROGRAM, KEPT, REFUSED)
_HEX = frozenset("0123456789abcdef")


class History:
    """The crashes before this one. directory: the store's descriptor, which stays the caller's.

    What a crash is counted by is any text: a signature, a program, each with its user.
    """

    def __init__(self, directory: int) -> None:
        self._directory = directory

    def count(self, kinds: str, what: str, within_seconds: float, now: float) -> int:
        """Return how many of these kinds there were in the seconds before `now` (since the epoch)."""
        wanted = digest(what)
        found = self._lines(within_seconds, now)
        return sum(count for _, kind, hashed, count, _ in found if kind in kinds and hashed == wanted)

    def add(self, kind: str, what: str, within_seconds: float, now: float) -> None:
        """Note one, unless the disk is full. within_seconds: how old a line may be that is counted further."""
        try:
            fd = self._open(os.O_RDWR | os.O_CREAT)
        except OSError:
            return
        try:
            count, at = 1, -1
            if kind == REFUSED:
                for _, known_kind, hashed, known, position in self._lines(within_seconds, now):
                    if known_kind == kind and hashed == digest(what):
                        count, at = min(known + 1, _MOST), position
            line = f"{max(now, 0):014.3f} {kind} {digest(what)} {count:08d}\n".encode("ascii")
            if at >= 0:
                os.pwrite(fd, line, at)
                return
            size = os.fstat(fd).st_size
            if size and os.pread(fd, 1, size - 1) != b"\n":
                # Torn by a full disk, or by the end of who wrote it.
                line = b"\n" + line
            if size + len(line) > MAX_SIZE:
                self._replace(_read(fd), line)
            else:
                os.pwrite(fd, line, size)
        except OSError:
            pass
        finally:
            os.close(fd)

    def _lines(self, within_seconds: float, now: float) -> Iterator[tuple[float, str, str, int, int]]:
        """Yield (time, kind, hash, count, position) of the lines of the seconds before `now`."""
        try:
            fd = self._open(os.O_RDONLY)
        except OSError:
            return
        try:
            at = max(0, os.fstat(fd).st_size - MAX_SIZE)
            known = _read(fd)
        except OSError:
            return
        finally:
            os.close(fd)
        for text in known.split(b"\n"):
            line = _parse(text)
            if line is not None and now - within_seconds <= line[0] <= now + _AHEAD:
                yield *line, at
            at += len(text) + 1

    def _open(self, flags: int) -> int:
        # Not blocking, should it be a FIFO.
        flags |= os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        fd = os.open(NAME, flags, 0o600, dir_fd=self._directory)
        if stat.S_ISREG(os.fstat(fd).st_mode):
            return fd
        os.close(fd)
        raise OSError(f"{NAME} is not a file")

    def _replace(self, known: bytes, line: bytes) -> None:
        """Keep the newer half: under another name until it is complete."""
        half = known[-(MAX_SIZE // 2) :]
        data = memoryview(half[half.find(b"\n") + 1 :] + line)
        new = NAME + ".new"
        try:
            # Left by somebody who was killed here.
            os.unlink(new, dir_fd=self._directory)
        except FileNotFoundError:
            pass
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        fd = os.open(new, flags, 0o600, dir_fd=self._directory)
        try:
            while data:
                data = data[os.write(fd, data) :]
            os.rename(new, NAME, src_dir_fd=self._directory, dst_dir_fd=self._directory)
        except OSError:
            os.unlink(new, dir_fd=self._directory)
            raise
        finally:
            os.close(fd)


def _read(fd: int) -> bytes:
    """Return the end of the file: it is no longer than that, unless somebody else wrote it."""
    size = os.fstat(fd).st_size
    return os.pread(fd, MAX_SIZE, max(0, size - MAX_SIZE))


def _parse(text: bytes) -> tuple[float, str, str, int] | None:
    parts = text.decode("ascii", "replace").split(" ")
    if len(parts) != 4 or len(text) != 42 or parts[1] not in _KINDS or not _HEX.issuperset(parts[2]):
        return None
    time, kind, hashed, count = parts
    whole, _, fraction = time.partition(".")
    if not (len(hashed) == 16 and whole.isdigit() and fraction.isdigit() and count.isdigit()):
        return None
    return float(time), kind, hashed, int(count)
