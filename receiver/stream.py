"""The core as it comes: a pipe or a socket of the kernel's, read once, with a deadline on silence."""

from __future__ import annotations

import errno
import fcntl
import os
import select
import stat

# A pipe holds 64 KiB by default; a larger one halves the switches between the dumping kernel and us. 1 MiB is what a
# process without CAP_SYS_RESOURCE may ask for (pipe-max-size, pipe(7)).
PIPE_SIZE = 1 << 20
F_SETPIPE_SZ = 1031
# What splice(2) says where a sandbox or the other end does not have it.
_NO_SPLICE = (errno.EINVAL, errno.EPERM, errno.ENOSYS)
# So much of a core is read before it gets a reserve: most are over by then.
SMALL = 4 << 20
# poll(2) takes an int of milliseconds: 24 days, which a core that stalls for longer will not miss.
MAX_WAIT = (1 << 31) - 1


class Stalled(Exception):
    """No byte of the core came for too long."""


class Reserve:
    """A pipe of our own, into which a core moves while we are busy: the dumping kernel goes on. Owns it.

    Reading from the kernel's own pipe keeps it from writing there for as long as the bytes are copied, page by page;
    splice(2) takes the pages themselves, which is done at once. And a socket holds no more than 100 KiB.
    """

    def __init__(self, fd: int) -> None:
        """Raises OSError when there is no room for a pipe of PIPE_SIZE."""
        self._fd = fd
        self._out, self._in = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self._held = 0
        try:
            fcntl.fcntl(self._in, F_SETPIPE_SZ, PIPE_SIZE)
        except OSError:
            self.close()
            raise

    def take(self) -> bool:
        """Move what is there, as far as there is room. Returns False at the end of the core. Raises OSError.

        BlockingIOError: there was nothing, or no room.
        """
        moved = os.splice(self._fd, self._in, PIPE_SIZE)
        self._held += moved
        return moved > 0

    def read(self, view: memoryview) -> int:
        """Return how many bytes of the view were filled, 0 when nothing is held. Raises OSError."""
        if not self._held:
            return 0
        got = os.readv(self._out, [view])
        self._held -= got
        return got

    def close(self) -> None:
        os.close(self._out)
        os.close(self._in)


class Stream:
    """Reads a core. Does not own the descriptor. size: bytes read so far. ended: whether the end was met.

    reserved: whether large cores get a reserve; it has to be closed then.
    """

    def __init__(self, fd: int, stall_seconds: float, *, reserved: bool = False) -> None:
        self._fd = fd
        self._reserve: Reserve | None = None
        kind = stat.S_IFMT(os.fstat(fd).st_mode)
        self._wants_reserve = reserved and kind in (stat.S_IFIFO, stat.S_IFSOCK)
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
        if self._wants_reserve and self.size >= SMALL:
            self._wants_reserve = False
            try:
                self._reserve = Reserve(self._fd)
            except OSError:
                # No descriptors, or no more pipe memory for this user: it goes without.
                pass
        while filled < len(view):
            try:
                got = self._read(view[filled:])
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

    def _read(self, view: memoryview) -> int:
        reserve = self._reserve
        if reserve is None:
            return os.readv(self._fd, [view])
        # First what is held, or it would come too late.
        got = reserve.read(view)
        if got:
            return got
        try:
            return reserve.read(view) if reserve.take() else 0
        except OSError as error:
            if error.errno not in _NO_SPLICE:
                raise
        # It is empty, and will stay so.
        self.close()
        return os.readv(self._fd, [view])

    def close(self) -> None:
        """Give the reserve up."""
        if self._reserve is not None:
            self._reserve.close()
            self._reserve = None

    def take(self, length: int) -> bytes:
        """Read so many bytes, less only at the end. For a head: all of it is in memory. Raises Stalled, OSError."""
        data = bytearray(max(length, 0))
        return bytes(data[: self.fill(memoryview(data))])
