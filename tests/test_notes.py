"""A core's notes as they stream by: the kernel's are understood, and a stranger's are survived."""

from __future__ import annotations

import os
import shutil
import struct
import subprocess
import sys
import tracemalloc
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from receiver import notes
from receiver.notes import AARCH64, I386, NT_AUXV, NT_FILE, NT_PRSTATUS, NT_SIGINFO, X86_64, MappedFile, Parser, Thread
from tests.support import crashers, machine
from tests.support.crash import compile_crasher

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

WORD = st.integers(0, (1 << 64) - 1)


def note(kind: int, content: bytes, name: bytes = b"CORE\0") -> bytes:
    def padded(data: bytes) -> bytes:
        return data + bytes(-len(data) % 4)

    return struct.pack("<III", len(name), len(content), kind) + padded(name) + padded(content)


def prstatus(thread: Thread, machine: int = X86_64, *, signal: int = 11, link: int = 0) -> bytes:
    """An elf_prstatus, by the structures of <asm/elf.h>: a second implementation."""
    if machine == I386:
        registers = [0, 0, 0, 0, 0, thread.fp, 0, 0, 0, 0, 0, 0, thread.pc, 0, 0, thread.sp, 0]
        head = struct.pack("<iiihxxII iiii 8i", 11, 0, 0, signal, 0, 0, thread.tid, 1, 1, 1, *[0] * 8)
        return head + struct.pack("<17I", *registers) + bytes(4)
    if machine == X86_64:
        registers = [0] * 27
        registers[4], registers[16], registers[19] = thread.fp, thread.pc, thread.sp
    else:
        registers = [0] * 34
        registers[29:33] = thread.fp, link, thread.sp, thread.pc
    head = struct.pack("<iiihxxQQ iiii 8q", 11, 0, 0, signal, 0, 0, thread.tid, 1, 1, 1, *[0] * 8)
    return head + struct.pack(f"<{len(registers)}Q", *registers) + bytes(8)


def file_note(files: Iterable[MappedFile], *, is_64: bool = True, page: int = 4096) -> bytes:
    files = list(files)
    letter = "Q" if is_64 else "I"
    table = b"".join(struct.pack(f"<3{letter}", start, end, offset // page) for start, end, offset, _ in files)
    return struct.pack(f"<2{letter}", len(files), page) + table + b"".join(name + b"\0" for *_, name in files)


def siginfo(signal: int, code: int, address: int, *, is_64: bool = True) -> bytes:
    return struct.pack("<iii4xQ" if is_64 else "<iiiI", signal, 0, code, address).ljust(128, b"\0")


def parse(data: bytes, machine: int = X86_64, *, is_64: bool = True, pieces: Sequence[int] = ()) -> notes.Notes:
    parser = Parser(machine, is_64=is_64)
    rest = memoryview(data)
    for size in pieces:
        parser.feed(rest[:size])
        rest = rest[size:]
    parser.feed(rest)
    return parser.notes


def told(found: notes.Notes) -> tuple[object, ...]:
    return (list(found.threads), found.signal, list(found.files), found.auxv, found.fault, found.link)


def notes_of_core(data: bytes) -> tuple[bytes, int, bool]:
    """The notes of a plain core, e_machine, and whether it is 64-bit."""
    is_64 = data[4] == 2
    (machine,) = struct.unpack_from("<H", data, 18)
    (count,) = struct.unpack_from("<H", data, 56 if is_64 else 44)
    for index in range(count):
        at = 64 + 56 * index if is_64 else 52 + 32 * index
        kind, offset, size = struct.unpack_from("<I4xQ16xQ" if is_64 else "<II8xI", data, at)
        if kind == 4:
            return data[offset : offset + size], machine, is_64
    raise AssertionError("a core without notes")


@pytest.mark.parametrize("machine", [X86_64, I386, AARCH64])
def test_every_fact_is_found(machine: int) -> None:
    is_64 = machine != I386
    threads = [Thread(100 + number, 0x1000 + number, 0x2000 + number, 0x3000 + number) for number in range(3)]
    files = [MappedFile(0x1000, 0x3000, 0, b"/bin/a"), MappedFile(0x3000, 0x4000, 0x2000, b"/bin/a \xff (deleted)")]
    auxv = struct.pack(f"<6{'Q' if is_64 else 'I'}", 3, 0x40, 33, 0x7000, 0, 0)
    data = note(NT_PRSTATUS, prstatus(threads[0], machine, link=77))
    data += note(3, bytes(136)) + note(NT_SIGINFO, siginfo(11, 1, 0x1234, is_64=is_64)) + note(NT_AUXV, auxv)
    data += note(NT_FILE, file_note(files, is_64=is_64)) + note(2, bytes(512)) + note(0x202, bytes(2001), b"LINUX\0")
    for thread in threads[1:]:
        data += note(NT_PRSTATUS, prstatus(thread, machine, link=78)) + note(2, bytes(512))
    found = parse(data, machine, is_64=is_64)
    link = 77 if machine == AARCH64 else 0
    assert told(found) == (threads, 11, files, {3: 0x40, 33: 0x7000}, 0x1234, link)
    assert found.threads[1:] == threads[1:]
    assert found.threads[-1] == threads[-1]
    with pytest.raises(IndexError):
        found.threads[3]


def test_a_machine_without_registers() -> None:
    thread = Thread(7, 1, 2, 3)
    found = parse(note(NT_PRSTATUS, prstatus(thread, X86_64)), 243)
    assert list(found.threads) == [Thread(7, 0, 0, 0)]
    assert found.signal == 11


def test_a_signal_that_a_process_sent_has_no_address() -> None:
    # si_pid and si_uid stand where the address would be.
    assert parse(note(NT_SIGINFO, siginfo(11, 0, 4711))).fault is None
    assert parse(note(NT_SIGINFO, siginfo(6, 1, 4711))).fault is None


def test_the_first_of_a_kind_counts() -> None:
    first = [MappedFile(0x1000, 0x3000, 0, b"/bin/a")]
    data = note(NT_FILE, file_note(first)) + note(NT_FILE, file_note(first * 2))
    assert list(parse(data).files) == first


def test_others_notes_are_not_taken_for_ours() -> None:
    data = note(NT_PRSTATUS, prstatus(Thread(1, 2, 3, 4)), b"EVIL\0")
    data += note(NT_PRSTATUS, prstatus(Thread(1, 2, 3, 4)), b"COREX")
    assert len(parse(data).threads) == 0


PIECES = st.lists(st.integers(0, 500), max_size=30)


@given(
    st.lists(st.builds(Thread, st.integers(0, (1 << 31) - 1), WORD, WORD, WORD), max_size=4),
    st.lists(
        st.builds(
            MappedFile,
            WORD,
            WORD,
            st.integers(0, 1 << 40).map(lambda page: page * 4096),
            st.binary(max_size=20).map(lambda name: name.replace(b"\0", b"")),
        ),
        max_size=5,
    ),
    st.lists(st.tuples(st.integers(8, 1000), st.binary(max_size=50)), max_size=3),
    PIECES,
)
def test_pieces_make_no_difference(
    threads: list[Thread], files: list[MappedFile], others: list[tuple[int, bytes]], pieces: list[int]
) -> None:
    data = b"".join(note(NT_PRSTATUS, prstatus(thread)) for thread in threads)
    data += b"".join(note(kind, content, b"LINUX\0") for kind, content in others) + note(NT_FILE, file_note(files))
    found = parse(data, pieces=pieces)
    assert list(found.threads) == threads
    assert list(found.files) == files


HOSTILE = st.lists(
    st.one_of(
        st.binary(max_size=100),
        st.builds(
            note,
            st.sampled_from([NT_PRSTATUS, NT_AUXV, NT_FILE, NT_SIGINFO]),
            st.binary(max_size=600),
            st.sampled_from([b"CORE\0", b"", b"CORE", b"LINUX\0"]),
        ),
        st.builds(
            lambda count, page, rest: note(NT_FILE, struct.pack("<QQ", count, page) + rest), WORD, WORD, st.binary()
        ),
        # Sizes that lie.
        st.builds(struct.pack, st.just("<III"), *[st.integers(0, (1 << 32) - 1)] * 3),
    ),
    max_size=8,
).map(b"".join)


@given(HOSTILE, st.sampled_from([X86_64, I386, AARCH64, 0, 65535]), st.booleans(), PIECES)
def test_a_strangers_notes(data: bytes, machine: int, is_64: bool, pieces: list[int]) -> None:
    found = parse(data, machine, is_64=is_64, pieces=pieces)
    assert told(found) == told(parse(data, machine, is_64=is_64))
    for address in (0, 0x1000, (1 << 64) - 1):
        mapping = found.files.find(address)
        assert mapping is None or mapping.start <= address < mapping.end


def test_a_file_is_found_by_address() -> None:
    files = [MappedFile(at, at + 0x1000, 0, b"%x" % at) for at in range(0x1000, 0x100000, 0x3000)]
    found = parse(note(NT_FILE, file_note(files))).files
    for file in files:
        assert found.find(file.start) == found.find(file.end - 1) == file
        assert found.find(file.start - 1) is None
        assert found.find(file.end) is None


def test_memory_is_bounded() -> None:
    """Threads without number, and a list of files that never ends."""
    one = note(NT_PRSTATUS, prstatus(Thread(1, 2, 3, 4))) + note(2, bytes(512)) + note(0x202, bytes(2696), b"LINUX\0")
    many = one * 100
    names = b"/usr/lib/x86_64-linux-gnu/a.so\0" * 1000
    tracemalloc.start()
    try:
        parser = Parser(X86_64, is_64=True)
        for _ in range(700):
            parser.feed(many)
        assert len(parser.notes.threads) == notes.MAX_THREADS
        parser.feed(struct.pack("<III", 5, (1 << 32) - 4, NT_FILE) + b"CORE\0\0\0\0" + struct.pack("<QQ", 20000, 4096))
        parser.feed(bytes(20000 * 24))
        for _ in range(400):
            parser.feed(names)
        assert len(parser.notes.files) == 20000
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    # 2 MiB of threads; 4 MiB of files, and what a buffer that grows has in excess.
    assert peak < 10 << 20


def test_import_budget() -> None:
    code = (
        "import sys; known = set(sys.modules); import receiver.notes, receiver.signature, receiver.history;"
        "print(*sorted({'re', 'typing', 'dataclasses', 'inspect'} & set(sys.modules) - known))"
    )
    # -S: a machine's own site-packages may import whatever they like.
    done = subprocess.run([sys.executable, "-S", "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.split() == []


needs_machine = pytest.mark.skipif(machine.why_unavailable() is not None, reason=str(machine.why_unavailable()))
needs_gdb = pytest.mark.skipif(shutil.which("gdb") is None, reason="needs gdb: apt-get install gdb")
needs_compiler = pytest.mark.skipif(crashers.why_unavailable() is not None, reason=str(crashers.why_unavailable()))


def kernels_core(directory: Path, *command: str) -> bytes:
    """Let a program crash here, and return the core that the kernel writes of it. Hold the machine's settings."""
    with subprocess.Popen(["prlimit", "--core=unlimited:unlimited", *command], stdin=subprocess.DEVNULL) as process:
        process.wait(60)
    core = directory / f"{process.pid}.core"
    try:
        return core.read_bytes()
    finally:
        core.unlink(missing_ok=True)


@pytest.mark.kernel
@needs_machine
@needs_compiler
@needs_gdb
def test_a_real_core(tmp_path: Path) -> None:
    """What gdb says of it, we say, too."""
    program = compile_crasher("crash")
    with machine.exclusive() as settings:
        settings.core_pattern = f"{tmp_path}/%p.core"
        data = kernels_core(tmp_path, program, "SEGV", "--threads", "40", "--from-thread")
    (tmp_path / "core").write_bytes(data)
    found = parse(*notes_of_core(data)[:2])
    frame_pointer = "$rbp" if os.uname().machine == "x86_64" else "$x29"
    commands = [f'thread apply all printf "T %d %lx %lx %lx\\n", $_thread, $pc, $sp, {frame_pointer}']
    commands += ["info auxv", "info proc mappings", 'printf "F %lx\\n", $_siginfo._sifields._sigfault.si_addr']
    arguments = [part for command in commands for part in ("-ex", command)]
    done = subprocess.run(
        ["gdb", "-nx", "-batch", *arguments, program, str(tmp_path / "core")],
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    said = done.stdout.splitlines()
    registers = [tuple(int(value, 16) for value in line.split()[2:]) for line in said if line.startswith("T ")]
    assert len(registers) == 42
    assert sorted(registers) == sorted((thread.pc, thread.sp, thread.fp) for thread in found.threads)
    (fault,) = (int(line.split()[1], 16) for line in said if line.startswith("F "))
    assert (found.signal, found.fault) == (11, fault) == (11, 0)
    entry = next(line for line in said if " AT_ENTRY " in line)
    assert found.auxv[9] == int(entry.split()[-1], 16)
    assert len({thread.tid for thread in found.threads}) == 42
    for file in found.files:
        assert any(f"0x{file.start:x} " in line and file.name.decode() in line for line in said), file


_TINY = "static void f(volatile int *p) { *p = 1; }\nvoid _start(void) { f((int *)0x10); for (;;); }\n"


@pytest.mark.kernel
@needs_machine
@needs_compiler
@pytest.mark.skipif(os.uname().machine != "x86_64", reason="32-bit programs are i386's here")
def test_a_real_core_of_a_32_bit_program(tmp_path: Path) -> None:
    source = tmp_path / "tiny.c"
    source.write_text(_TINY)
    program = str(tmp_path / "tiny")
    flags = ["-m32", "-O0", "-fno-omit-frame-pointer", "-nostdlib", "-static", "-ffreestanding", "-fno-pie", "-no-pie"]
    subprocess.run(["gcc", *flags, "-o", program, str(source)], check=True, timeout=60)
    with machine.exclusive() as settings:
        settings.core_pattern = f"{tmp_path}/%p.core"
        data = kernels_core(tmp_path, program)
    raw, machine_number, is_64 = notes_of_core(data)
    assert (machine_number, is_64) == (I386, False)
    found = parse(raw, machine_number, is_64=is_64)
    assert (found.signal, found.fault, len(found.threads)) == (11, 0x10, 1)
    mapping = found.files.find(found.threads[0].pc)
    assert mapping is not None
    assert mapping.name == os.fsencode(program)
    assert found.threads[0].sp <= found.threads[0].fp < found.threads[0].sp + 256
    assert 0xF0000000 < found.threads[0].sp < 1 << 32
    assert found.auxv[6] == 4096
