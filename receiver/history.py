"""What crashed lately: a small file in the store, for the same crash again and again, and for programs in a crash loop.

One line a crash, `TIME SIGNATURE EXE KEPT`: seconds since the epoch, 16 hex digits (`-` when nobody looked), 16 of the
program's hash, 1 when a core was kept. Lines are only ever added at its end; when it is full, the newer half replaces
it. A line that is torn or damaged is none. It is a help and no more: whatever is wrong with it, the crash is kept as if
nothing had been before.

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
MAX_SIZE = 64 << 10
# Workers do not take turns by the time of their crash; a line from further ahead is of a clock that was set back.
_AHEAD = 60.0
_HEX = frozenset("0123456789abcdef")


class History:
    """The crashes before this one. directory: the store's descriptor, which stays the caller's."""

    def __init__(self, directory: int) -> None:
        self._directory = directory

    def same(self, signature: str, within_seconds: float, now: float) -> int:
        """Return how often this crash was there in the seconds before `now` (since the epoch), with or without core."""
        return sum(line[1] == signature != "-" for line in self._lines(within_seconds, now))

    def cores_of(self, exe: str, within_seconds: float, now: float) -> int:
        """Return how many cores of a program were kept in the seconds before `now` (since the epoch)."""
        wanted = digest(exe)
        return sum(line[2] == wanted and line[3] == "1" for line in self._lines(within_seconds, now))

    def add(self, now: float, signature: str, exe: str, *, kept: bool) -> None:
        """Note a crash, unless the disk is full. signature: 16 hex digits; anything else stands for none."""
        text = f"{now:.3f} {signature if _is_hex(signature) else '-'} {digest(exe)} {int(kept)}"
        if _parse(text) is None:
            return
        line = text.encode("ascii") + b"\n"
        try:
            fd = self._open(os.O_RDWR | os.O_CREAT | os.O_APPEND)
        except OSError:
            return
        try:
            known = _read(fd)
            if known[-1:] not in (b"", b"\n"):
                # Torn by a full disk, or by the end of who wrote it.
                line = b"\n" + line
            if len(known) + len(line) > MAX_SIZE:
                self._replace(known, line)
            else:
                os.write(fd, line)
        except OSError:
            pass
        finally:
            os.close(fd)

    def _lines(self, within_seconds: float, now: float) -> Iterator[tuple[float, str, str, str]]:
        try:
            fd = self._open(os.O_RDONLY)
        except OSError:
            return
        try:
            known = _read(fd)
        except OSError:
            return
        finally:
            os.close(fd)
        for text in known.decode("ascii", "replace").split("\n"):
            line = _parse(text)
            if line is not None and now - within_seconds <= line[0] <= now + _AHEAD:
                yield line

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


def _is_hex(text: str) -> bool:
    return len(text) == 16 and _HEX.issuperset(text)


def _parse(text: str) -> tuple[float, str, str, str] | None:
    parts = text.split(" ")
    if len(parts) != 4 or parts[3] not in ("0", "1"):
        return None
    if not (_is_hex(parts[1]) or parts[1] == "-") or not _is_hex(parts[2]):
        return None
    whole, _, fraction = parts[0].partition(".")
    digits = whole + fraction
    # Nothing else that float() would take.
    if not (0 < len(whole) <= 12 and len(digits) <= 16 and digits.isdecimal()):
        return None
    return float(parts[0]), parts[1], parts[2], parts[3]
