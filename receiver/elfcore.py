"""The head of an ELF core: what it promises, and the head of a core of which parts are absent.

The kernel writes (fs/binfmt_elf.c: elf_core_dump) the ELF header, the program headers, the notes, and then the segments
in the order of their headers. A core of which parts are absent has other program headers, behind everything else: they
can only be written when all is read.
"""

from __future__ import annotations

import struct

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

HEADER_SIZE = 64
PAGE = 4096
# elf(5): so many program headers or more; their number stands in the first section header.
PN_XNUM = 0xFFFF
PT_LOAD, PT_NOTE = 1, 4
PF_X, PF_W = 1, 2
# More mappings than vm.max_map_count's default allows: such a core is kept whole or not at all.
MAX_SEGMENTS = 1 << 16

_HEADER_64 = struct.Struct("<16sHHIQQQIHHHHHH")
_HEADER_32 = struct.Struct("<16sHHIIIIIHHHHHH")
_SEGMENT_64 = struct.Struct("<IIQQQQQQ")
_SEGMENT_32 = struct.Struct("<IIIIIIII")


class NotACore(ValueError):
    """The stream does not begin as an ELF core does."""


class Segment:
    """A program header. Sizes and offsets in bytes; address: in the crashed process."""

    __slots__ = ("address", "align", "file_size", "flags", "kind", "memory_size", "offset")

    def __init__(
        self, kind: int, flags: int, offset: int, address: int, file_size: int, memory_size: int, align: int
    ) -> None:
        self.kind = kind
        self.flags = flags
        self.offset = offset
        self.address = address
        self.file_size = file_size
        self.memory_size = memory_size
        self.align = align


class Head:
    """What the first bytes of a core say. size: of the whole core, in bytes. segments: in the order of the file."""

    __slots__ = ("is_64", "machine", "segments", "size")

    def __init__(self, *, is_64: bool, machine: int, segments: list[Segment], size: int) -> None:
        self.is_64 = is_64
        self.machine = machine
        self.segments = segments
        self.size = size


def first_size(start: bytes) -> int:
    """Return how many bytes tell `head_size`. start: the first HEADER_SIZE bytes of the stream. Raises NotACore."""
    offset, entry_size, _, _ = _layout(start)
    return offset + entry_size


def head_size(first: bytes) -> int:
    """Return how many bytes `read_head` needs. first: the first `first_size` bytes. Raises NotACore.

    A count that needs more than 16 bits stands behind all segments; but the kernel's first program header is that of
    the notes, and they follow the program headers.
    """
    offset, entry_size, count, is_64 = _layout(first)
    if count == PN_XNUM:
        notes = _segment(first, offset, is_64=is_64)
        if notes.kind != PT_NOTE or (notes.offset - offset) % entry_size:
            raise NotACore("the number of its program headers cannot be known")
        count = (notes.offset - offset) // entry_size
    if count > MAX_SEGMENTS:
        raise NotACore(f"it has more than {MAX_SEGMENTS} mappings")
    return offset + entry_size * count


def read_head(head: bytes) -> Head:
    """Parse the first `head_size` bytes. Raises NotACore when the segments are not in the kernel's order."""
    offset, entry_size, count, is_64 = _layout(head)
    end = len(head)
    if (end - offset) % entry_size or (count != PN_XNUM and end != offset + entry_size * count):
        raise NotACore("its program headers are cut")
    segments = []
    position = end
    for at in range(offset, end, entry_size):
        segment = _segment(head, at, is_64=is_64)
        if segment.file_size:
            if segment.offset < position:
                raise NotACore("its segments are not in the order of the file")
            position = segment.offset + segment.file_size
        if segment.file_size > segment.memory_size and segment.kind == PT_LOAD:
            raise NotACore("a segment has more bytes than memory")
        segments.append(segment)
    if count == PN_XNUM:
        sections: int = struct.unpack_from("<Q" if is_64 else "<I", head, 40 if is_64 else 32)[0]
        if sections < position:
            raise NotACore("its section header is not at its end")
        position = sections + (64 if is_64 else 40)
    return Head(is_64=is_64, machine=struct.unpack_from("<H", head, 18)[0], segments=segments, size=position)


def _segment(head: bytes, at: int, *, is_64: bool) -> Segment:
    if is_64:
        kind, flags, offset, address, _, file_size, memory_size, align = _SEGMENT_64.unpack_from(head, at)
    else:
        kind, offset, address, _, file_size, memory_size, flags, align = _SEGMENT_32.unpack_from(head, at)
    return Segment(kind, flags, offset, address, file_size, memory_size, align)


def _layout(start: bytes) -> tuple[int, int, int, bool]:
    if len(start) < HEADER_SIZE or start[:4] != b"\x7fELF" or start[4] not in (1, 2) or start[5] != 1:
        raise NotACore("it does not begin with a little-endian ELF header")
    is_64 = start[4] == 2
    if struct.unpack_from("<H", start, 16)[0] != 4:
        raise NotACore("its ELF header is not a core's")
    if is_64:
        (offset,) = struct.unpack_from("<Q", start, 32)
        entry_size, count = struct.unpack_from("<HH", start, 54)
    else:
        (offset,) = struct.unpack_from("<I", start, 28)
        entry_size, count = struct.unpack_from("<HH", start, 42)
    if offset != (64 if is_64 else 52) or entry_size != (56 if is_64 else 32):
        raise NotACore("its program headers are not where the kernel puts them")
    return offset, entry_size, count, is_64


def table(head: Head, kept: Iterable[tuple[int, int, int, int]], position: int, start: bytes) -> tuple[bytes, bytes]:
    """Describe a core of which parts are absent. Returns the new ELF header, and the table that goes to `position`.

    Only what is kept has a row. A row of memory without bytes is no way to say "absent": debuggers read zeros there,
    which is right for the pages that the kernel itself leaves out, because nobody ever touched them.

    kept: (index of the segment, offset in it, length, offset in the new file), by index and offset.
    position: where the new file ends so far, in bytes. start: the old first HEADER_SIZE bytes, of which 64-bit cores
    use all and 32-bit ones 52; the rest is returned as it was.
    """
    rows: list[bytes] = []
    pieces = iter(kept)
    piece = next(pieces, None)
    # libdwfl (core-file.c) joins segments by their offsets, and those without bytes are no exception.
    running = 0
    for index, segment in enumerate(head.segments):
        if not segment.file_size:
            rows.append(_row(head, segment, 0, 0, segment.memory_size, running))
            continue
        joined: list[list[int]] = []
        while piece is not None and piece[0] == index:
            _, at, length, offset = piece
            piece = next(pieces, None)
            if joined and at == joined[-1][0] + joined[-1][1] and offset == joined[-1][2] + joined[-1][1]:
                joined[-1][1] += length
            else:
                joined.append([at, length, offset])
        for at, length, offset in joined:
            # What the kernel left out behind the segment's bytes is zeros still, if all before it is here.
            is_end = at + length == segment.file_size
            rows.append(_row(head, segment, at, length, segment.memory_size if is_end else at + length, offset))
            running = offset + length
    fields = list((_HEADER_64 if head.is_64 else _HEADER_32).unpack_from(start))
    where = -(-position // 8) * 8
    fields[5] = where
    fields[6] = 0
    fields[10] = len(rows)
    fields[11:14] = [0, 0, 0]
    tail = b""
    if len(rows) >= PN_XNUM:
        fields[6] = where + sum(map(len, rows))
        fields[10] = PN_XNUM
        fields[11:13] = [64 if head.is_64 else 40, 1]
        # Section 0, whose sh_info is the count.
        if head.is_64:
            tail = struct.pack("<IIQQQQIIQQ", 0, 0, 0, 0, 0, 0, 0, len(rows), 0, 0)
        else:
            tail = struct.pack("<10I", 0, 0, 0, 0, 0, 0, 0, len(rows), 0, 0)
    packed = (_HEADER_64 if head.is_64 else _HEADER_32).pack(*fields)
    return packed + start[len(packed) :], bytes(where - position) + b"".join(rows) + tail


def _row(head: Head, segment: Segment, at: int, size: int, end: int, offset: int) -> bytes:
    """Pack a program header for the memory from `at` to `end` of a segment, whose first `size` bytes are kept."""
    memory = end - at if segment.kind == PT_LOAD else segment.memory_size
    address = segment.address + at
    if head.is_64:
        return _SEGMENT_64.pack(segment.kind, segment.flags, offset, address, 0, size, memory, segment.align)
    return _SEGMENT_32.pack(segment.kind, offset, address, 0, size, memory, segment.flags, segment.align)
