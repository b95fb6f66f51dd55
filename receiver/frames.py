"""The file of a core: written once from front to back, in pieces that can be given up again, plain or as zstd frames.

A core that does not fit gives up what matters least, even when that is written already: the piece becomes a hole, and
nothing is copied. For zstd each piece is a frame of its own (RFC 8878), so a reader needs the memory of one frame; a
frame that was given up becomes a skippable frame over a hole. The file ends with the table of zstd's seekable format
(contrib/seekable_format in zstd's source), by which a reader finds the frame of an offset.
"""

from __future__ import annotations

import errno
import os
import struct

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import Any, Protocol

    Bytes = bytes | memoryview

    class CoreFile(Protocol):
        """A core's file. Owns no descriptor. Positions and sizes in bytes of the file."""

        # Where the next piece goes.
        end: int
        # Whether positions are the core's own offsets.
        is_plain: bool

        def prepare(self, data: bytearray, size: int, *, plain: bool) -> list[Bytes]:
            """Return what `append` writes for the first `size` bytes of `data`; it may refer to them.

            plain: spend no time on compression, as for the ELF header, which `replace_header` finds by its place.
            May run in any thread.
            """

        def at_once(self, data: bytearray, size: int) -> list[Bytes] | None:
            """Return the same when that costs less than to hand it to another thread, else None.

            Runs in the thread that reads.
            """

        def append(self, parts: Sequence[Bytes], plain_size: int) -> int:
            """Write a piece at the end; returns its position. Raises OSError, when nothing of it is left."""

        def cost(self, parts: Sequence[Bytes]) -> int:
            """Return how many bytes on disk these will take, at most."""

        def drop(self, position: int, plain_size: int, taken: int) -> int:
            """Give a piece up; returns how many bytes became free, 0 when it cannot be and is still there."""

        def cut(self, position: int) -> None:
            """Forget what was appended from a position on."""

        def replace_header(self, header: bytes) -> None:
            """Replace the ELF header, which was the first piece."""

        def finish(self) -> None:
            """Complete the file."""


PAGE = 4096
BLOCK = 4096
# The largest piece, and so what a reader of a frame needs.
FRAME = 1 << 20
ZEROS = bytes(FRAME)
_ZERO_PAGE = bytes(PAGE)

# RFC 8878, 3.1.1: single segment, four bytes of content size, no checksum; then blocks of at most 128 KiB.
_FRAME_HEADER = struct.Struct("<IBI")
_MAGIC, _DESCRIPTOR = 0xFD2FB528, 0xA0
_MAX_BLOCK = 128 << 10
_RAW, _RLE = 0, 1
SKIPPABLE_MAGIC, TABLE_MAGIC, SEEKABLE_MAGIC = 0x184D2A50, 0x184D2A5E, 0x8F92EAB1
_SKIPPABLE = struct.Struct("<II")

FALLOC_FL_KEEP_SIZE, FALLOC_FL_PUNCH_HOLE = 1, 2


def runs(data: bytearray, size: int) -> list[tuple[bool, int, int]]:
    """Return (is it zeros, start, end) of the runs of pages in the first `size` bytes, at most FRAME.

    bytearray.startswith() compares at the speed of memory; memoryviews compare item by item, 20 times slower. And a
    page is only looked at when its first byte is 0: a slice has all of these at the cost of one look.
    """
    if size == FRAME and data.startswith(ZEROS):
        return [(True, 0, size)]
    found: list[tuple[bool, int, int]] = []
    firsts = data[:size:PAGE]
    # Where the run of other pages began.
    start = 0
    page = firsts.find(0)
    while page >= 0:
        first = at = page * PAGE
        while at < size and data.startswith(_ZERO_PAGE if at + PAGE <= size else bytes(size - at), at):
            at += PAGE
        if at == first:
            page = firsts.find(0, page + 1)
            continue
        at = min(at, size)
        if first > start:
            found.append((False, start, first))
        found.append((True, first, at))
        start = at
        page = firsts.find(0, -(-at // PAGE))
    if start < size:
        found.append((False, start, size))
    return found


def raw_frame(data: bytearray, size: int) -> list[Bytes]:
    """Return a zstd frame that cost no compression: pages of zeros as RLE blocks, all others as they are."""
    view = memoryview(data)
    parts: list[Bytes] = [_FRAME_HEADER.pack(_MAGIC, _DESCRIPTOR, size)]
    for zeros, start, end in runs(data, size):
        for at in range(start, end, _MAX_BLOCK):
            length = min(_MAX_BLOCK, end - at)
            kind = _RLE if zeros else _RAW
            last = at + length == size
            parts.append((last | kind << 1 | length << 3).to_bytes(3, "little"))
            parts.append(b"\0" if zeros else view[at : at + length])
    return parts


def punch(fd: int, start: int, end: int) -> int:
    """Make a hole of the whole blocks between two positions. Returns how many bytes that were."""
    start, end = -(-start // BLOCK) * BLOCK, end // BLOCK * BLOCK
    if start >= end:
        return 0
    if _libc.fallocate(fd, FALLOC_FL_KEEP_SIZE | FALLOC_FL_PUNCH_HOLE, start, end - start) != 0:
        # A file system without holes (some of FUSE's, old NFS): what is written stays.
        return 0
    return end - start


def _load_libc() -> Any:
    # The standard library has posix_fallocate(3) only, which makes no holes.
    import ctypes  # noqa: PLC0415

    libc = ctypes.CDLL(None, use_errno=True)
    libc.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
    return libc


class _Libc:
    """libc, loaded when a hole is made: ctypes costs milliseconds, and few cores need one."""

    _loaded: Any = None

    def fallocate(self, fd: int, mode: int, start: int, size: int) -> int:
        if _Libc._loaded is None:
            _Libc._loaded = _load_libc()
        return int(_Libc._loaded.fallocate(fd, mode, start, size))


_libc = _Libc()


class PlainFile:
    """The core as it is; pages of zeros are holes. The file has the core's own offsets, given-up pieces included."""

    is_plain = True

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self.end = 0
        # Up to where there may be bytes that could not be taken back, and no hole.
        self._dirty = 0

    def prepare(self, data: bytearray, size: int, *, plain: bool) -> list[Bytes]:
        """Return runs of pages: data as it is, and zeros as `bytes`."""
        del plain
        view = memoryview(data)
        # The zeros are written only where something else may stand, see append().
        return [ZEROS[: end - start] if zeros else view[start:end] for zeros, start, end in runs(data, size)]

    def at_once(self, data: bytearray, size: int) -> list[Bytes] | None:
        return self.prepare(data, size, plain=True)

    def append(self, parts: Sequence[Bytes], plain_size: int) -> int:
        position = at = self.end
        try:
            for part in parts:
                if isinstance(part, memoryview) or at < self._dirty:
                    _write(self._fd, [part], at)
                at += len(part)
        except OSError:
            self._take_back(position, at + len(part))
            raise
        self.end = position + plain_size
        return position

    def cost(self, parts: Sequence[Bytes]) -> int:
        return sum(-(-len(part) // BLOCK) * BLOCK for part in parts if isinstance(part, memoryview))

    def drop(self, position: int, plain_size: int, taken: int) -> int:
        return taken if punch(self._fd, position, position + plain_size) else 0

    def cut(self, position: int) -> None:
        self._take_back(position, self.end)
        self.end = position

    def _take_back(self, position: int, end: int) -> None:
        if not _take_back(self._fd, position):
            self._dirty = max(self._dirty, end)

    def replace_header(self, header: bytes) -> None:
        os.pwrite(self._fd, header, 0)

    def finish(self) -> None:
        # It may end in a hole.
        os.ftruncate(self._fd, self.end)


class Samples:
    """Tells by samples which frames do not shrink, so that no time is spent on them: pictures, keys, packed data.

    Nothing is believed before a whole frame was compressed in vain, and each CHECKth that the samples would let by is
    compressed all the same. Samples cannot see what repeats at a distance: when such a check shows a frame that does
    shrink, they are not asked again in this core.

    So what they cost on disk is bounded. Once in a core: the frames between two checks, and those that come while the
    second is under way. Always: frames that would shrink a little. Nobody can know where the PIECES samples are taken;
    if a part S of a frame shrinks to nothing, all miss it with a chance of (1 - S) ** PIECES, so S (1 - S) ** PIECES of
    the frame is lost: 2.3 % at the worst (S = 1/17), besides the 2 % that are not worth the time.
    """

    CHECK = 16
    PIECES = 16
    PIECE = 1024
    # Pieces of smaller frames are too few, or too large a part of them.
    SMALLEST = 256 << 10
    # What is left of the samples, with 0.05 % for what surrounds them, when there is nothing to gain.
    DENSE = 0.98

    def __init__(self, compress: Callable[[bytes], bytes]) -> None:
        self._compress = compress
        self._believed = True
        # So many may go by until one is compressed all the same; nothing goes by in the beginning.
        self._left = 0
        # The frame (its buffer) that is compressed as a check.
        self._checked: bytearray | None = None

    def tell_dense(self, data: bytearray, size: int) -> bool:
        """Whether to store a frame as it is. One thread alone may ask."""
        if self._believed and self._left and size >= self.SMALLEST and self._look_dense(data, size):
            self._left -= 1
            if self._left:
                return True
            # It is known to look dense: what comes of it says what samples are worth.
            self._checked = data
            self._left = self.CHECK
        return False

    def _look_dense(self, data: bytearray, size: int) -> bool:
        step = size // self.PIECES
        span = step - self.PIECE
        # One in each stretch of the frame, wherever that falls.
        places = enumerate(memoryview(os.urandom(2 * self.PIECES)).cast("H"))
        starts = [n * step + place % span for n, place in places]
        joined = b"".join([data[at : at + self.PIECE] for at in starts])
        return len(self._compress(joined)) >= len(joined) * self.DENSE

    def compressed(self, data: bytearray, size: int, packed: int) -> None:
        """Be told what became of a frame that was compressed. Any thread may tell."""
        dense = packed >= size * self.DENSE
        if self._checked is data:
            self._checked = None
            self._believed = self._believed and dense
        elif dense and not self._left and size >= self.SMALLEST:
            self._left = self.CHECK


class ZstdFile:
    """The core as zstd frames, and their table."""

    is_plain = False

    def __init__(self, fd: int, level: int) -> None:
        import zstandard  # noqa: PLC0415 - 15 ms that a plain store need not pay

        self._fd = fd
        self._compressor_of = zstandard.ZstdCompressor
        self._level = level
        self._idle: list[zstandard.ZstdCompressor] = []
        self._samples = Samples(self._compress)
        self.end = 0
        # (bytes in the file, bytes of the core) of each frame.
        self._table: list[tuple[int, int]] = []
        self._index: dict[int, int] = {}

    def prepare(self, data: bytearray, size: int, *, plain: bool) -> list[Bytes]:
        if plain or (size == FRAME and data.startswith(ZEROS)):
            return raw_frame(data, size)
        packed = self._compress(memoryview(data)[:size])
        self._samples.compressed(data, size, len(packed))
        return [packed]

    def at_once(self, data: bytearray, size: int) -> list[Bytes] | None:
        if (size == FRAME and data.startswith(ZEROS)) or self._samples.tell_dense(data, size):
            return raw_frame(data, size)
        return None

    def _compress(self, data: Bytes) -> bytes:
        # A compressor works for one thread at a time; list.pop() and append() are atomic.
        try:
            compressor = self._idle.pop()
        except IndexError:
            compressor = self._compressor_of(level=self._level, write_checksum=True, write_content_size=True)
        try:
            return compressor.compress(data)
        finally:
            self._idle.append(compressor)

    def append(self, parts: Sequence[Bytes], plain_size: int) -> int:
        position = self.end
        try:
            _write(self._fd, parts, position)
        except OSError:
            _take_back(self._fd, position)
            raise
        size = sum(map(len, parts))
        self.end += size
        self._index[position] = len(self._table)
        self._table.append((size, plain_size))
        return position

    def cost(self, parts: Sequence[Bytes]) -> int:
        return sum(map(len, parts))

    def drop(self, position: int, plain_size: int, taken: int) -> int:
        del plain_size
        freed = punch(self._fd, position + _SKIPPABLE.size, position + taken)
        if freed:
            os.pwrite(self._fd, _SKIPPABLE.pack(SKIPPABLE_MAGIC, taken - _SKIPPABLE.size), position)
            self._table[self._index[position]] = (taken, 0)
        return freed

    def cut(self, position: int) -> None:
        _take_back(self._fd, position)
        while self.end > position:
            self.end -= self._table.pop()[0]

    def replace_header(self, header: bytes) -> None:
        os.pwrite(self._fd, header, _FRAME_HEADER.size + 3)

    def finish(self) -> None:
        rows = b"".join(struct.pack("<II", *row) for row in self._table)
        footer = struct.pack("<IBI", len(self._table), 0, SEEKABLE_MAGIC)
        table = _SKIPPABLE.pack(TABLE_MAGIC, len(rows) + len(footer)) + rows + footer
        _write(self._fd, [table], self.end)
        # What a piece left behind that could not be taken back.
        os.ftruncate(self._fd, self.end + len(table))


def _take_back(fd: int, position: int) -> bool:
    """Give back what was written of a piece before it failed. Returns whether that was possible."""
    try:
        os.ftruncate(fd, position)
    except OSError:
        # btrfs over its quota takes nothing back either. The next piece is written over it.
        return False
    return True


# uio(7): IOV_MAX.
_MAX_PARTS = 1024


def _write(fd: int, parts: Sequence[Bytes], position: int) -> None:
    """Write all parts, one after the other: one call moves at most 0x7ffff000 bytes, and less when it likes (H19)."""
    rest = [memoryview(part) for part in parts if part]
    while rest:
        written = os.pwritev(fd, rest[:_MAX_PARTS], position)
        if written == 0:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        position += written
        while rest and written >= len(rest[0]):
            written -= len(rest.pop(0))
        if written:
            rest[0] = rest[0][written:]
