"""The look into a process's memory: lists that lie, memory that never comes, nothing read that the dump leaves out."""

from __future__ import annotations

import os
import struct
import time
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from receiver import elfcore, peek, plan
from receiver.notes import Parser
from tests.support import elf
from tests.support.processes import children

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from receiver.elfcore import Head
    from receiver.notes import Notes

PAGE = 4096
CODE, DATA, STACK = 0x400000, 0x500000, 0x600000
PAGES = 4


def process(memory: dict[int, bytes], path: Path, *, sp: int = STACK + 64) -> tuple[int, Head, Notes]:
    """A process's memory as a file whose offsets are addresses, and what its core would say of it."""
    loads = [elf.Load(at, bytes(PAGES * PAGE)) for at in (CODE, DATA, STACK)]
    notes = elf.prstatus(1, pc=CODE, sp=sp) + elf.auxv({3: CODE + 64, 4: 56, 5: 3, 9: CODE})
    data = elf.core(notes, loads)
    head = elfcore.read_head(data[: elfcore.head_size(data[: elfcore.first_size(data[:64])])])
    parser = Parser(head.machine, is_64=True)
    parser.feed(notes)
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC)
    os.ftruncate(fd, 1 << 24)
    for at, content in memory.items():
        os.pwrite(fd, content, at)
    return fd, head, parser.notes


def words(*values: int) -> bytes:
    return struct.pack(f"<{len(values)}Q", *values)


def program(*, dynamic: int = DATA) -> dict[int, bytes]:
    """The program headers of a program that is linked dynamically."""
    row = struct.Struct("<IIQQQQQQ")
    rows = row.pack(6, 4, 64, 64, 64, 168, 168, 8) + row.pack(2, 6, 0, dynamic - CODE, 0, 64, 64, 8)
    return {CODE + 64: rows + row.pack(1, 5, 0, 0, 0, PAGE, PAGE, PAGE)}


def list_of(*names: bytes) -> dict[int, bytes]:
    """What leads to a linker's list, and the list, its names behind it."""
    memory = program() | {DATA: words(21, DATA + 256, 0, 0), DATA + 256: words(1, DATA + 512, 0, 0, 0, 0)}
    for number, name in enumerate(names):
        at = DATA + 512 + number * 64
        following = at + 64 if number + 1 < len(names) else 0
        memory[at] = words(0, DATA + PAGE + number * 256, 0, following, 0)
        memory[DATA + PAGE + number * 256] = name + b"\0"
    return memory


def test_the_list_is_found(tmp_path: Path) -> None:
    fd, head, notes = process(list_of(b"", b"libc.so.6", b"/opt/plugin.so"), tmp_path / "mem")
    marks = peek.look(fd, head, notes)
    os.close(fd)
    found = {(start, end) for start, end, rank in marks if plan.kind_of(rank) == plan.LINKAGE}
    assert (DATA, DATA + 1024 * 8) in found
    assert {(DATA + 512 + n * 64, DATA + 512 + n * 64 + 40) for n in range(3)} <= found
    assert (DATA + PAGE + 256, DATA + PAGE + 256 + len(b"libc.so.6\0")) in found


def test_what_stacks_point_to(tmp_path: Path) -> None:
    far = {DATA + 2 * PAGE: words(DATA + 3 * PAGE), STACK + 128: words(7, DATA + 2 * PAGE, 1 << 63)}
    fd, head, notes = process(far, tmp_path / "mem")
    marks = peek.look(fd, head, notes)
    os.close(fd)
    pointed = {start: rank for start, _, rank in marks if plan.kind_of(rank) == plan.POINTED}
    assert pointed == {DATA + 2 * PAGE: plan.rank(plan.POINTED, 0), DATA + 3 * PAGE: plan.rank(plan.POINTED, 1)}


@pytest.mark.parametrize(
    "memory",
    [
        {},
        program(dynamic=1 << 47),
        program() | {DATA: words(21, 1 << 47)},
        program() | {DATA: words(21, (1 << 64) - 8)},
        # A node that follows itself, two that follow each other, a namespace that is its own next one.
        list_of() | {DATA + 512: words(0, 0, 0, DATA + 512, 0)},
        list_of() | {DATA + 512: words(0, 0, 0, DATA + 576, 0), DATA + 576: words(0, 0, 0, DATA + 512, 0)},
        list_of() | {DATA + 256: words(2, DATA + 512, 0, 0, 0, DATA + 256)},
        # A name without an end.
        list_of(b"x" * (2 * PAGE)),
        {CODE + 64: b"\xff" * 200},
    ],
)
def test_lists_that_lie(tmp_path: Path, memory: dict[int, bytes]) -> None:
    fd, head, notes = process(memory, tmp_path / "mem")
    marks = peek.look(fd, head, notes)
    os.close(fd)
    assert len(marks) < 200
    assert all(plan.ranges(head, notes, marks))


_words = st.lists(
    st.one_of(
        st.integers(0, 3),
        st.sampled_from([CODE, DATA, STACK]).flatmap(lambda at: st.integers(at - 8, at + PAGES * PAGE + 8)),
        st.integers(0, (1 << 64) - 1),
    ),
    min_size=1,
    max_size=512,
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=60)
@given(data=_words, stack=_words)
def test_any_memory(tmp_path: Path, data: list[int], stack: list[int]) -> None:
    memory = program() | {DATA: words(21, DATA, *data), STACK: words(*stack)}
    fd, head, notes = process(memory, tmp_path / "mem")
    mem = peek.Mem(fd, head, notes)
    marks = peek.libraries(mem) + peek.pointed(mem, time.monotonic() + 10)
    os.close(fd)
    assert len(marks) <= 4 * peek.MAX_LIBRARIES + peek.MAX_OBJECTS + 64
    kept = plan.ranges(head, notes, marks)
    assert sum(part.end - part.start for part in kept) == sum(segment.file_size for segment in head.segments)


def test_only_what_the_dump_reads_is_read(tmp_path: Path) -> None:
    """Elsewhere a page may lie on a file system that never answers, and the dump would not have asked for it."""
    fd, head, notes = process({DATA - 8: words(1), DATA + PAGES * PAGE: words(1)}, tmp_path / "mem")
    mem = peek.Mem(fd, head, notes)
    for address in (DATA - 8, DATA + PAGES * PAGE, 0, 1 << 63):
        with pytest.raises(peek.Unreadable, match="not in the core"):
            mem.read(address, 8)
    assert len(mem.read(DATA + PAGES * PAGE - 8, 100)) == 8
    assert peek.fetch(fd, head, notes, [(DATA, 16), (DATA - 8, 8), (DATA, 16)]) == [bytes(16), bytes(8), bytes(16)]
    os.close(fd)


@pytest.fixture
def silent_memory(tmp_path: Path) -> Iterator[int]:
    """A descriptor whose reads do not come back: a pipe is as silent as a file system, and can be cleaned up."""
    path = tmp_path / "fifo"
    os.mkfifo(path)
    fd = os.open(path, os.O_RDWR)
    yield fd
    os.close(fd)


def test_no_child_is_left(tmp_path: Path) -> None:
    """Where pid 1 does not reap, each would stay for good."""
    fd, head, notes = process(list_of(b"libc.so.6"), tmp_path / "mem")
    before = children(os.getpid())
    for _ in range(20):
        assert peek.look(fd, head, notes)
    os.close(fd)
    assert set(children(os.getpid())) <= set(before)


def test_memory_that_never_comes(tmp_path: Path, silent_memory: int, monkeypatch: pytest.MonkeyPatch) -> None:
    fd, head, notes = process({}, tmp_path / "mem")
    os.close(fd)
    monkeypatch.setattr(peek, "SECONDS", 0.2)
    monkeypatch.setattr(os, "pread", lambda fd, size, _at: os.read(fd, size))
    held, write = os.pipe()
    assert peek.look(silent_memory, head, notes) == []
    # What it left behind holds no descriptor of ours, above all not the core's.
    os.close(held)
    with pytest.raises(BrokenPipeError):
        os.write(write, b"x")
    os.close(write)
