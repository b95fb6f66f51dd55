"""The core as it comes: a pipe or a socket of the kernel's, read once, with a deadline on silence."""

from __future__ import annotations

import fcntl
import os
import select

# A pipe holds 64 KiB by default; a larger one halves the switches between the dumping kernel and us. 1 MiB is what a
# process without CAP_SYS_RESOURCE may ask for (pipe-max-size, pipe(7)).
PIPE_SIZE = 1 << 20
F_SETPIPE_SZ = 1031
# poll(2) takes an int of milliseconds: 24 days, which a core that stalls for longer will not miss.
MAX_WAIT = (1 << 31) - 1


class Stalled(Exception):
    """No byte of the core came for too long."""


class Stream:
    """Reads a core. Does not own the descriptor. size: bytes read so far. ended: whether the end was met."""

    def __init__(self, fd: int, stall_seconds: float) -> None:
        self._fd = fd
        self._stall_seconds = stall_seconds
        self._poll = select.poll()
        self._poll.register(fd, select.POLLIN)
        self.size = 0
        self.ended = False
        # Not blocking: another holder of the same open file could take what poll() has promised.
        os.set_blocking(fd, False)
        try:
            fcntl.fcntl(fd, F_SETPIPE_SZ, PIPE_SIZE)
        except OSError:
            # A socket, or the user's share of pipe memory is used up (pipe-user-pages-soft).
            pass

    def fill(self, view: memoryview) -> int:
        """Fill the view, less only at the end of the stream. Returns the bytes. Raises Stalled, OSError."""
        filled = 0
        while filled < len(view):
            try:
                got = os.readv(self._fd, [view[filled:]])
            except BlockingIOError:
                if not self._poll.poll(min(self._stall_seconds * 1000, MAX_WAIT)):
                    raise Stalled(f"no byte of the core came for {self._stall_seconds:g} s") from None
                continue
            if got == 0:
                self.ended = True
                break
            filled += got
            self.size += got
        return filled

    def take(self, length: int) -> bytes:
        """Read so many bytes, less only at the end. For a head: all of it is in memory. Raises Stalled, OSError."""
        data = bytearray(max(length, 0))
        return bytes(data[: self.fill(memoryview(data))])
