"""A stored core, read as the plain ELF core that it stands for: at any offset, and whatever became of its file.

A store may be a stranger's (a container's, read by the host), so nothing in a file is believed before it is bounded:
at most one frame is in memory beside the few that were read last, and a file that says more frames or blocks than a
core can have is damaged. What is damaged is said with what can be read all the same; frames are independent, so
the damage of one costs its piece alone.
"""

from __future__ import annotations

import errno
import os
import stat
import struct
import sys
from array import array
from bisect import bisect_right
from typing import TYPE_CHECKING

from receiver.frames import FRAME, SEEKABLE_MAGIC, SKIPPABLE_MAGIC, TABLE_MAGIC, ZEROS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import zstandard

# 4 TiB of a core. The table in memory takes 8 bytes a frame.
MAX_FRAMES = 1 << 22
# What FRAME bytes that do not compress can become; a frame that is longer is not one of ours.
MAX_COMPRESSED = FRAME + (64 << 10)
# Block headers that are looked at in a file without a table: 512 GiB of a core, or some seconds of a hostile file.
MAX_BLOCKS = 1 << 22
# zstd's own bound for what a decoder should have to support (RFC 8878, 3.1.1.1.2), and what level 19 asks for.
MAX_WINDOW = 8 << 20
# The frames that were read last. A debugger goes back and forth between a few stacks and tables.
KEPT = 8

_ZSTD_MAGIC = 0xFD2FB528
# RFC 8878, 3.1.1.2: a block's header, and the bound of its content.
_BLOCK_HEADER, _MAX_BLOCK = 3, 128 << 10
_RLE, _COMPRESSED, _RESERVED = 1, 2, 3
_FOOTER = struct.Struct("<IBI")
_CHECKSUMS = 0x80
_PEEK = 4096
# Frames with one place in the index.
_STEP = 64


class Damaged(Exception):
    """The file is not what was stored. The text says what is wrong, and what can be read all the same.

    start, end: the bytes of the core that cannot be read; end is None when that is all from start on.
    """

    def __init__(self, what: str, start: int, end: int | None = None) -> None:
        if end is not None:
            readable = f"bytes {start} to {end} of the core cannot be read, the others can"
        elif start:
            readable = f"the first {start} bytes of the core can be read"
        else:
            readable = "nothing of the core can be read"
        super().__init__(f"the stored core is damaged ({what}); {readable}")
        self.start = start
        self.end = end


class _Bad(Exception):
    """A frame or table is not as it has to be; a fact, without its place in the core. at: its place in the file."""

    def __init__(self, what: str, at: int = 0) -> None:
        super().__init__(what)
        self.at = at


class StoredCore:
    """A core in a store. Does not own the descriptor, and does not move its position when it is compressed.

    Damage is no error before it is met: what can be read is read.
    """

    def __init__(self, fd: int, compression: str | None) -> None:
        """compression: as the record has it. Raises Damaged when the file or that is no core's at all, OSError."""
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise Damaged("it is not a file", 0)
        self._form: _Plain | _Frames | _OneFrame
        if (compression or "none") == "none":
            self._form = _Plain(fd)
        elif compression == "zstd":
            self._form = _zstd_form(fd)
        else:
            raise Damaged(f"it is compressed with {ascii(compression)[:80]}, which this version does not know", 0)

    @property
    def size(self) -> int:
        """The bytes of the plain core that can be read, damaged ones between them included.

        An old file of one single frame may have to be read for it.
        """
        return self._form.size

    def read(self, offset: int, length: int) -> bytes:
        """Return `length` bytes from an offset, less only at the end of the core. Raises Damaged, OSError."""
        if offset < 0 or length < 0:
            raise ValueError("offsets and lengths are not negative")
        return self._form.read(offset, length)

    def blocks(self, on_damage: Callable[[Damaged], None] | None = None) -> Iterator[bytes]:
        """Yield the whole core in order, in blocks of at most FRAME bytes, verified as far as it has checksums.

        on_damage: told of what is damaged, and then zeros stand for it where something readable follows. Without it
        the first damage is raised. Raises Damaged, OSError.
        """

        def report(damage: Damaged) -> None:
            if on_damage is None:
                raise damage
            on_damage(damage)

        return self._form.blocks(report)


def _pread(fd: int, length: int, offset: int) -> bytes:
    """Read so many bytes, less only at the end of the file."""
    parts = []
    while length > 0 and (part := os.pread(fd, length, offset)):
        parts.append(part)
        offset += len(part)
        length -= len(part)
    return parts[0] if len(parts) == 1 else b"".join(parts)


class _Plain:
    """A core that is stored as it is."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self.size = os.fstat(fd).st_size

    def read(self, offset: int, length: int) -> bytes:
        return _pread(self._fd, min(length, max(0, self.size - offset)), offset)

    def blocks(self, report: Callable[[Damaged], None]) -> Iterator[bytes]:
        at = 0
        while at < self.size:
            data = self._data_after(at)
            if data > at:
                block = ZEROS[: min(data - at, FRAME)]
            else:
                block = _pread(self._fd, min(FRAME, self.size - at), at)
                if not block:
                    report(Damaged("its file became shorter", at))
                    return
            yield block
            at += len(block)

    def _data_after(self, at: int) -> int:
        """Return where the next data is: holes need not be read, a core may have terabytes of them."""
        try:
            return os.lseek(self._fd, at, os.SEEK_DATA)
        except OSError as error:
            # A hole up to the end, which may be nearer by now than it was.
            return min(self.size, os.fstat(self._fd).st_size) if error.errno == errno.ENXIO else at


class _Walk:
    """Looks at a file's frames by their headers, which takes a few bytes of each, and decodes a single one."""

    def __init__(self, fd: int) -> None:
        import zstandard  # noqa: PLC0415 - 15 ms that a plain core need not pay

        self.fd = fd
        self.size = os.fstat(fd).st_size
        self.zstandard = zstandard
        self._decoder = zstandard.ZstdDecompressor(max_window_size=MAX_WINDOW)
        self._blocks = MAX_BLOCKS
        self._peeked = b""
        self._peeked_at = 0

    def _peek(self, at: int, length: int) -> bytes:
        start = at - self._peeked_at
        if start < 0 or start + length > len(self._peeked):
            self._peeked, self._peeked_at, start = _pread(self.fd, _PEEK, at), at, 0
        return self._peeked[start : start + length]

    def frame(self, at: int) -> tuple[int, int | None]:
        """Return the end of the frame at `at`, and its plain size when its headers tell it. Raises _Bad, OSError."""
        head = self._peek(at, 18)
        if len(head) < 8:
            raise self._cut()
        magic, length = struct.unpack_from("<II", head)
        if magic & ~0xF == SKIPPABLE_MAGIC:
            found: tuple[int, int | None] = at + 8 + length, 0
        else:
            found = self._data_frame(at, head, magic)
        if found[0] > self.size:
            raise self._cut()
        return found

    def _cut(self) -> _Bad:
        return _Bad(f"it is cut at byte {self.size}", self.size)

    def _data_frame(self, at: int, head: bytes, magic: int) -> tuple[int, int | None]:
        if magic != _ZSTD_MAGIC:
            raise _Bad(f"there is no zstd frame at byte {at}")
        try:
            parameters = self.zstandard.get_frame_parameters(head)
            end = at + self.zstandard.frame_header_size(head)
        except self.zstandard.ZstdError as error:
            raise _Bad(f"frame at byte {at}: {error}") from None
        plain: int | None = 0
        last = 0
        while not last:
            self._blocks -= 1
            raw = self._peek(end, _BLOCK_HEADER)
            if len(raw) < _BLOCK_HEADER:
                raise self._cut()
            header = int.from_bytes(raw, "little")
            last, kind, length = header & 1, header >> 1 & 3, header >> 3
            if kind == _RESERVED or length > _MAX_BLOCK:
                raise _Bad(f"there is no block of a zstd frame at byte {end}", end)
            if self._blocks < 0:
                raise _Bad("it has more blocks than a core can have", end)
            end += _BLOCK_HEADER + (1 if kind == _RLE else length)
            plain = None if kind == _COMPRESSED or plain is None else plain + length
        if parameters.has_checksum:
            end += 4
        if parameters.content_size != self.zstandard.CONTENTSIZE_UNKNOWN:
            plain = parameters.content_size
        return end, plain

    def plain_size(self, at: int, end: int) -> int:
        """Return the plain size of a frame that does not tell it, by decoding it. Raises _Bad, OSError."""
        # It counts as the blocks that could be looked at meanwhile.
        self._blocks -= 256
        return len(self.decode(at, end, None))

    def decode(self, at: int, end: int, plain: int | None) -> bytes:
        """Return what is in a frame: `plain` bytes, at most FRAME when that is None. Raises _Bad, OSError."""
        if end - at > MAX_COMPRESSED:
            raise _Bad(f"frame at byte {at}: it is too long")
        data = _pread(self.fd, end - at, at)
        try:
            told = self.zstandard.get_frame_parameters(data).content_size
            # The decoder makes room for what the frame tells.
            if told == self.zstandard.CONTENTSIZE_UNKNOWN:
                told = FRAME if plain is None else plain
            if told > FRAME or (plain is not None and told != plain):
                raise _Bad(f"frame at byte {at}: it says that it has {told} bytes")
            found = self._decoder.decompress(data, max_output_size=told, allow_extra_data=False)
        except self.zstandard.ZstdError as error:
            raise _Bad(f"frame at byte {at}: {error}") from None
        if plain is not None and len(found) != plain:
            raise _Bad(f"frame at byte {at}: it has {len(found)} bytes and not {plain}")
        return found

    def stream(self, end: int) -> zstandard.ZstdDecompressionReader:
        """Return a reader of the first frame alone, and of the file up to `end`."""
        return self._decoder.stream_reader(_File(self.fd, end), read_across_frames=False)  # type: ignore[arg-type]


class _File:
    """The beginning of a file, with a position of its own."""

    def __init__(self, fd: int, end: int) -> None:
        self._fd = fd
        self._end = end
        self._position = 0

    def read(self, length: int) -> bytes:
        found = os.pread(self._fd, min(length, self._end - self._position), self._position)
        self._position += len(found)
        return found


def _zstd_form(fd: int) -> _Frames | _OneFrame:
    walk = _Walk(fd)
    if walk.size == 0:
        return _Frames(walk, array("I"), "its file is empty")
    bad: str | None = None
    try:
        sizes = _read_table(fd, walk.size)
    except _Bad as error:
        bad, sizes = str(error), None
    if sizes is not None:
        return _Frames(walk, sizes, None)
    # Without a table the frames are looked at themselves. Old stores have a single one, for the whole core.
    try:
        end, plain = walk.frame(0)
    except _Bad as error:
        # What its headers do not lead to is not decoded: that could go on for ever.
        return _OneFrame(walk, error.at, None, str(error))
    try:
        if plain is None:
            plain = walk.plain_size(0, end)
    except _Bad:
        pass
    if plain is None or plain > FRAME:
        follow = f"{walk.size - end} bytes follow its end" if end < walk.size else None
        return _OneFrame(walk, end, plain, follow)
    sizes, worse = _walked(walk)
    return _Frames(walk, sizes, worse or bad)


def _walked(walk: _Walk) -> tuple[array[int], str | None]:
    """Return the sizes of the frames as a table has them, and what is wrong after the last one."""
    sizes = array("I")
    at = 0
    try:
        while at < walk.size:
            end, plain = walk.frame(at)
            if plain is None:
                plain = walk.plain_size(at, end)
            if plain > FRAME or end - at > 0xFFFFFFFF:
                raise _Bad(f"frame at byte {at}: it is too large")
            if len(sizes) >= 2 * MAX_FRAMES:
                raise _Bad("it has more frames than a core can have")
            sizes.extend((end - at, plain))
            at = end
    except _Bad as error:
        return sizes, str(error)
    return sizes, None


def _read_table(fd: int, size: int) -> array[int] | None:
    """Return the sizes of all frames, in the file and plain, by turns; None without a table. Raises _Bad, OSError."""
    footer = _pread(fd, _FOOTER.size, max(0, size - _FOOTER.size))
    if len(footer) < _FOOTER.size:
        return None
    count, descriptor, magic = _FOOTER.unpack(footer)
    if magic != SEEKABLE_MAGIC:
        return None
    row = 12 if descriptor & _CHECKSUMS else 8
    length = count * row + _FOOTER.size
    start = size - length - 8
    if count > MAX_FRAMES or start < 0 or _pread(fd, 8, start) != struct.pack("<II", TABLE_MAGIC, length):
        raise _Bad("its table of frames is not where it says")
    sizes = array("I", _pread(fd, count * row, start + 8))
    if sys.byteorder == "big":
        sizes.byteswap()
    if descriptor & _CHECKSUMS:
        # The frames have their own.
        del sizes[2::3]
    if len(sizes) != 2 * count or sum(sizes[0::2]) != start or (count and max(sizes[1::2]) > FRAME):
        raise _Bad("its table of frames does not fit the file")
    return sizes


class _Frames:
    """A core in frames that are decoded one by one."""

    def __init__(self, walk: _Walk, sizes: array[int], bad: str | None) -> None:
        """sizes: of each frame, in the file and plain, by turns. bad: what is wrong with the file as a whole."""
        self._walk = walk
        self._sizes = sizes
        self._bad = bad
        # Where each _STEPth frame begins, in the file and in the core.
        self._file_index = array("Q")
        self._index = array("Q")
        at = plain = 0
        for start in range(0, len(sizes), 2 * _STEP):
            self._file_index.append(at)
            self._index.append(plain)
            at += sum(sizes[start : start + 2 * _STEP : 2])
            plain += sum(sizes[start + 1 : start + 2 * _STEP : 2])
        self.size = plain
        self._kept: dict[int, bytes] = {}

    def _frames(self, offset: int) -> Iterator[tuple[int, int, int, int]]:
        """Yield (start, plain size, position in the file, end there) of the frames from the one at an offset on."""
        step = max(0, bisect_right(self._index, offset) - 1)
        if step >= len(self._index):
            return
        start, at = self._index[step], self._file_index[step]
        for frame in range(step * _STEP, len(self._sizes) // 2):
            length, plain = self._sizes[2 * frame], self._sizes[2 * frame + 1]
            if plain and start + plain > offset:
                yield start, plain, at, at + length
            start += plain
            at += length

    def _decode(self, start: int, plain: int, at: int, end: int) -> bytes:
        try:
            return self._walk.decode(at, end, plain)
        except _Bad as error:
            raise Damaged(str(error), start, start + plain) from None

    def _damage_at_end(self) -> Damaged | None:
        return None if self._bad is None else Damaged(self._bad, self.size)

    def read(self, offset: int, length: int) -> bytes:
        parts = []
        for start, plain, at, end in self._frames(offset):
            if start >= offset + length:
                break
            found = self._kept.pop(at, None)
            if found is None:
                found = self._decode(start, plain, at, end)
                if len(self._kept) >= KEPT:
                    del self._kept[next(iter(self._kept))]
            # Last in the order of a dict: the first is the one that was not used for longest.
            self._kept[at] = found
            parts.append(found[max(0, offset - start) : offset + length - start])
        damage = self._damage_at_end()
        if damage is not None and length and offset + length > self.size:
            raise damage
        return b"".join(parts)

    def blocks(self, report: Callable[[Damaged], None]) -> Iterator[bytes]:
        for start, plain, at, end in self._frames(0):
            try:
                block = self._decode(start, plain, at, end)
            except Damaged as damage:
                report(damage)
                block = ZEROS[:plain]
            yield block
        if (rest := self._damage_at_end()) is not None:
            report(rest)


class _OneFrame:
    """A core in a single frame, as older versions stored it: read from its beginning only."""

    def __init__(self, walk: _Walk, end: int, told: int | None, bad: str | None) -> None:
        """end: in the file. told: size of the plain core, by its header. bad: what is wrong with it, by its headers."""
        self._walk = walk
        self._end = end
        self._told = told
        self._bad = bad
        self._size: int | None = None
        self._reader: Iterator[bytes] | None = None
        self._block = b""
        self._start = 0

    @property
    def size(self) -> int:
        if self._size is None:
            size = 0
            for block in self.blocks(lambda _damage: None):
                size += len(block)
            self._size = size
        return self._size

    def read(self, offset: int, length: int) -> bytes:
        """Read on from the last block, or once more from the beginning."""
        parts: list[bytes] = []
        if self._reader is None or offset < self._start:
            self._reader, self._block, self._start = self._decoded(), b"", 0
        while length > 0:
            found = self._block[max(0, offset - self._start) :][:length]
            if found:
                parts.append(found)
                offset += len(found)
                length -= len(found)
            if length > 0:
                try:
                    block = next(self._reader, b"")
                except Damaged:
                    # The next read meets it again.
                    self._reader = None
                    raise
                if not block:
                    break
                self._start += len(self._block)
                self._block = block
        return b"".join(parts)

    def blocks(self, report: Callable[[Damaged], None]) -> Iterator[bytes]:
        try:
            yield from self._decoded()
        except Damaged as damage:
            report(damage)

    def _decoded(self) -> Iterator[bytes]:
        at = 0
        with self._walk.stream(self._end) as reader:
            while True:
                try:
                    block = reader.read(FRAME)
                except self._walk.zstandard.ZstdError as error:
                    raise Damaged(str(error), at) from None
                if not block:
                    break
                at += len(block)
                yield block
        # A frame that is cut is no error to zstandard.
        if self._bad is not None:
            raise Damaged(self._bad, at)
        if self._told not in (None, at):
            raise Damaged(f"it has {at} bytes and says that it has {self._told}", at)
