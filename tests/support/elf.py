"""ELF cores by construction, and a second reader of them, for what the product writes."""

from __future__ import annotations

import struct
from dataclasses import dataclass

PAGE = 4096
NT_PRSTATUS, NT_AUXV, NT_FILE, NT_SIGINFO = 1, 6, 0x46494C45, 0x53494749


@dataclass
class Load:
    """Memory for a core: its bytes, and how much more of it there is that the core does not have."""

    address: int
    data: bytes
    more: int = 0
    flags: int = 6

    @property
    def memory_size(self) -> int:
        return len(self.data) + self.more


def note(kind: int, content: bytes, name: bytes = b"CORE\0") -> bytes:
    padded = name.ljust(-(-len(name) // 4) * 4, b"\0")
    return struct.pack("<III", len(name), len(content), kind) + padded + content.ljust(-(-len(content) // 4) * 4, b"\0")


def prstatus(tid: int, *, pc: int, sp: int, fp: int = 0) -> bytes:
    """A thread of x86-64: struct elf_prstatus."""
    content = bytearray(336)
    struct.pack_into("<I", content, 32, tid)
    struct.pack_into("<Q", content, 112 + 4 * 8, fp)
    struct.pack_into("<Q", content, 112 + 16 * 8, pc)
    struct.pack_into("<Q", content, 112 + 19 * 8, sp)
    return note(NT_PRSTATUS, bytes(content))


def auxv(values: dict[int, int]) -> bytes:
    return note(NT_AUXV, b"".join(struct.pack("<QQ", *pair) for pair in [*values.items(), (0, 0)]))


def files(*mapped: tuple[int, int, int, bytes]) -> bytes:
    """NT_FILE of (start, end, offset in bytes, name)."""
    content = struct.pack("<QQ", len(mapped), PAGE)
    content += b"".join(struct.pack("<QQQ", start, end, offset // PAGE) for start, end, offset, _ in mapped)
    return note(NT_FILE, content + b"".join(name + b"\0" for *_, name in mapped))


def core(notes: bytes, loads: list[Load], *, is_64: bool = True) -> bytes:
    """A core as the kernel lays it out."""
    number = len(loads) + 1
    size = 64 if is_64 else 52
    ident = (b"\x7fELF\2\1\1" if is_64 else b"\x7fELF\1\1\1").ljust(16, b"\0")
    row = 56 if is_64 else 32
    head = ident + struct.pack(
        "<HHIQQQIHHHHHH" if is_64 else "<HHIIIIIHHHHHH",
        *(4, 62 if is_64 else 3, 1, 0, size, 0, 0, size, row, number, 0, 0, 0),
    )
    at = size + row * number
    rows = [_row(4, 0, at, 0, len(notes), 0, 4, is_64=is_64)]
    at = -(-(at + len(notes)) // PAGE) * PAGE
    first = at
    for load in loads:
        rows.append(_row(1, load.flags, at, load.address, len(load.data), load.memory_size, PAGE, is_64=is_64))
        at += len(load.data)
    return (head + b"".join(rows) + notes).ljust(first, b"\0") + b"".join(load.data for load in loads)


def _row(kind: int, flags: int, offset: int, address: int, size: int, memory: int, align: int, *, is_64: bool) -> bytes:
    if is_64:
        return struct.pack("<IIQQQQQQ", kind, flags, offset, address, 0, size, memory, align)
    return struct.pack("<IIIIIIII", kind, offset, address, 0, size, memory, flags, align)


def read(data: bytes) -> tuple[bytes, list[Load]]:
    """The notes, and the memory of a core."""
    assert data[:4] == b"\x7fELF"
    is_64 = data[4] == 2
    table, sections = struct.unpack_from("<QQ" if is_64 else "<II", data, 32 if is_64 else 28)
    size, number, section_size, section_number, _ = struct.unpack_from("<HHHHH", data, 54 if is_64 else 42)
    if number == 0xFFFF:
        assert (section_size, section_number) == ((64, 1) if is_64 else (40, 1))
        (number,) = struct.unpack_from("<I", data, sections + (44 if is_64 else 28))
    assert table % 4 == 0
    assert table + size * number <= len(data)
    notes = b""
    loads = []
    for at in range(table, table + size * number, size):
        if is_64:
            kind, flags, offset, address, _, length, memory, _ = struct.unpack_from("<IIQQQQQQ", data, at)
        else:
            kind, offset, address, _, length, memory, flags, _ = struct.unpack_from("<IIIIIIII", data, at)
        content = data[offset : offset + length]
        assert len(content) == length
        if kind == 4:
            notes += content
        else:
            loads.append(Load(address, content, memory - length, flags))
    return notes, loads
