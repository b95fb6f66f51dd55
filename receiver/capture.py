"""The core, read once as a stream and written down with bounded memory."""

from __future__ import annotations

import fcntl
import os
import select
from typing import TYPE_CHECKING, Protocol

from receiver import elfcore
from receiver.store import write_all

if TYPE_CHECKING:
    from collections.abc import Callable

    from receiver.store import Entry

# A pipe holds 64 KiB by default; a larger one halves the switches between the dumping kernel and us. 1 MiB is what a
# process without CAP_SYS_RESOURCE may ask for (pipe-max-size, pipe(7)).
PIPE_SIZE = 1 << 20
F_SETPIPE_SZ = 1031
BLOCK = 256 << 10
PAGE = 4096
# poll(2) takes an int of milliseconds: 24 days, which a core that stalls for longer will not miss.
MAX_WAIT = (1 << 31) - 1
_ZERO = bytes(1 << 20)


class TooLarge(Exception):
    """The core would be larger than is allowed. The text names the limit."""


class Stalled(Exception):
    """No byte of the core came for too long."""


class Sink(Protocol):
    """Takes the core's bytes in order."""

    def write(self, block: memoryview) -> None: ...
    def finish(self) -> None: ...


class PlainSink:
    """Writes the core as it is; pages of zeros become holes."""

    def __init__(self, entry: Entry) -> None:
        self.entry = entry
        self.fd = entry.open_core()
        self.position = 0
        self.used = 0

    def write(self, block: memoryview) -> None:
        """Raises NoRoom, OSError, StoreError."""
        self.used += write_sparse(self.fd, block, self.position, before=lambda size: self.entry.grow(self.used + size))
        self.position += len(block)

    def finish(self) -> None:
        os.ftruncate(self.fd, self.position)


def write_sparse(fd: int, block: memoryview, position: int, before: Callable[[int], None] = lambda _size: None) -> int:
    """Write a block to a new file without its pages of zeros. Returns how many bytes were written.

    position: where the block begins, a multiple of PAGE for the holes' sake. before: is called with the bytes of this
    block that will have been written after the next write.
    """
    size = len(block)
    if block == _ZERO[:size]:
        return 0
    written = start = 0
    for at in range(0, size + PAGE, PAGE):
        is_hole = at >= size or block[at : at + PAGE] == _ZERO[: min(PAGE, size - at)]
        if is_hole and at > start:
            data = block[start : min(at, size)]
            before(written + len(data))
            os.lseek(fd, position + start, os.SEEK_SET)
            write_all(fd, data)
            written += len(data)
        if is_hole:
            start = at + PAGE
    return written


class ZstdSink:
    """Writes the core as one zstd frame with a checksum; pages of zeros all but vanish."""

    def __init__(self, entry: Entry, level: int) -> None:
        import zstandard  # noqa: PLC0415 - 10 ms that a plain store need not pay

        self.entry = entry
        self.fd = entry.open_core()
        self.used = 0
        self._compressor = zstandard.ZstdCompressor(level=level, write_checksum=True).compressobj()

    def write(self, block: memoryview) -> None:
        """Raises NoRoom, OSError, StoreError."""
        self._store(self._compressor.compress(block))

    def finish(self) -> None:
        self._store(self._compressor.flush())

    def _store(self, data: bytes) -> None:
        if data:
            self.used += len(data)
            self.entry.grow(self.used)
            write_all(self.fd, data)


def sink_for(entry: Entry, compression: str, level: int) -> Sink:
    return PlainSink(entry) if compression == "none" else ZstdSink(entry, level)


class Reader:
    """Reads a core from the kernel's pipe or socket. Does not own the descriptor.

    size: bytes read so far. expected: bytes that the whole core has, by its own headers; None when it is no ELF core.
    """

    def __init__(self, fd: int, stall_seconds: float) -> None:
        self._fd = fd
        self._stall_seconds = stall_seconds
        self._buffer = bytearray(BLOCK)
        self._poll = select.poll()
        self._poll.register(fd, select.POLLIN)
        self._start: list[bytes] = []
        self.size = 0
        self.expected: int | None = None
        # Not blocking: another holder of the same open file could take what poll() has promised.
        os.set_blocking(fd, False)
        try:
            fcntl.fcntl(fd, F_SETPIPE_SZ, PIPE_SIZE)
        except OSError:
            # A socket, or the user's share of pipe memory is used up (pipe-user-pages-soft).
            pass

    def _fill(self, view: memoryview) -> int:
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
                break
            filled += got
        self.size += filled
        return filled

    def begin(self, limit: int | None) -> None:
        """Read the head. Raises TooLarge when it promises more than `limit` bytes; Stalled, OSError."""
        start = self._take(elfcore.HEADER_SIZE)
        try:
            head = start + self._take(elfcore.head_size(start) - len(start))
            self.expected = elfcore.whole_size(head)
        except elfcore.NotACore:
            return
        if limit is not None and self.expected > limit:
            raise TooLarge(f"its {self.expected} bytes are more than {limit}")

    def _take(self, length: int) -> bytes:
        data = bytearray(max(length, 0))
        taken = bytes(data[: self._fill(memoryview(data))])
        self._start.append(taken)
        return taken

    def copy(self, sink: Sink, limit: int | None) -> None:
        """Read to the end. Raises TooLarge after `limit` bytes, Stalled, OSError and what the sink raises."""
        view = memoryview(self._buffer)
        start = b"".join(self._start)
        while True:
            # The head goes through the same blocks, so that pages keep their alignment.
            head, start = start[:BLOCK], start[BLOCK:]
            view[: len(head)] = head
            got = len(head) + self._fill(view[len(head) :])
            if got:
                sink.write(view[:got])
            if limit is not None and self.size > limit:
                raise TooLarge(f"it has more than {limit} bytes")
            if got < BLOCK:
                break
        sink.finish()
