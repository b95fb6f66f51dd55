"""What the head of an ELF core says, from the first bytes of the stream."""

from __future__ import annotations

import struct

HEADER_SIZE = 64
# elf(5): so many program headers or more; their number stands in the first section header.
PN_XNUM = 0xFFFF


class NotACore(ValueError):
    """The stream does not begin as an ELF core does."""


def head_size(start: bytes) -> int:
    """Return how many bytes of the stream `whole_size` needs. start: its first 64 bytes. Raises NotACore."""
    offset, entry_size, count, is_64 = _layout(start)
    # 16,384 mappings and more are legal (vm.max_map_count); the head is a few MiB at the most.
    return (64 if is_64 else 52) if count == PN_XNUM else offset + entry_size * count


def whole_size(head: bytes) -> int:
    """Return the size in bytes that the whole core will have. head: its first `head_size` bytes. Raises NotACore.

    The kernel writes segments in the order of their headers (fs/binfmt_elf.c: elf_core_dump), so the end of the last
    one is the end of the file. With PN_XNUM one section header follows them, and its offset stands in the ELF header.
    """
    offset, entry_size, count, is_64 = _layout(head)
    if count == PN_XNUM:
        sections: int = struct.unpack_from("<Q" if is_64 else "<I", head, 40 if is_64 else 32)[0]
        return sections + (64 if is_64 else 40)
    end = offset + entry_size * count
    if len(head) < end:
        raise NotACore("its program headers are cut")
    for at in range(offset, end, entry_size):
        # p_offset and p_filesz
        segment, size = struct.unpack_from("<8xQ16xQ" if is_64 else "<4xI8xI", head, at)
        end = max(end, segment + size)
    return end


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
