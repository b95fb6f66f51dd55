"""The name of a bug: the same for the same bug, whatever the addresses, and another for another one."""

from __future__ import annotations

import os
import random
import re
import shutil
import struct
import subprocess
import sys
from typing import TYPE_CHECKING, NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from receiver import signature as signatures
from receiver.notes import AARCH64, I386, NT_AUXV, NT_FILE, NT_PRSTATUS, NT_SIGINFO, X86_64, MappedFile, Notes, Thread
from receiver.signature import MAX_FRAMES, STACK, Frame, build_id, frames, signature
from tests.support import crashers, machine
from tests.test_notes import file_note, kernels_core, note, notes_of_core, parse, prstatus, siginfo

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

EXE, LIBRARY, LIBC, VDSO = 0x55_0000_0000, 0x7F_0000_0000, 0x7F_1000_0000, 0x7F_FF00_0000
SP = 0x7F_FE00_0000


def library(load: int, name: bytes) -> list[MappedFile]:
    """The mappings of a module: a head, code and data."""
    return [
        MappedFile(load, load + 0x1000, 0, name),
        MappedFile(load + 0x1000, load + 0x9000, 0x1000, name),
        MappedFile(load + 0x9000, load + 0xA000, 0x8000, name),
    ]


FILES = [*library(EXE, b"/usr/bin/shop"), *library(LIBRARY, b"/opt/lib shop.so"), *library(LIBC, b"/usr/lib/libc.so.6")]
BUILDS = {EXE: "e" * 40, LIBC: "c" * 40}


def crash(
    pc: int,
    *,
    fp: int = 0,
    sp: int = SP,
    files: list[MappedFile] = FILES,
    link: int = 0,
    fault: int | None = None,
    of: int = X86_64,
    auxv: dict[int, int] | None = None,
) -> Notes:
    letter = "I" if of == I386 else "Q"
    data = note(NT_PRSTATUS, prstatus(Thread(1, pc, sp, fp), of, link=link))
    if fault is not None:
        data += note(NT_SIGINFO, siginfo(11, 1, fault, is_64=of != I386))
    data += note(NT_AUXV, b"".join(struct.pack(f"<2{letter}", *pair) for pair in (auxv or {}).items()))
    if files:
        data += note(NT_FILE, file_note(files, is_64=of != I386))
    return parse(data, of, is_64=of != I386)


def is_code(address: int) -> bool:
    return any(load + 0x1000 <= address < load + 0x9000 for load in (EXE, LIBRARY, LIBC)) or (
        VDSO <= address < VDSO + 0x2000
    )


def stack(*words: int, width: str = "Q") -> bytes:
    return struct.pack(f"<{len(words)}{width}", *words)


def places(found: list[Frame]) -> list[tuple[str, int]]:
    return [(frame.module, frame.offset) for frame in found]


def test_frame_pointers_are_followed() -> None:
    data = stack(9, EXE + 0x1234, SP + 0x30, EXE + 0x2000, LIBC, EXE + 0x4321, 0, LIBRARY + 0x3000)
    found = frames(crash(EXE + 0x1111, fp=SP + 0x10), is_code, data, SP, BUILDS)
    # The words between are no frames' return addresses.
    assert found == [
        Frame("shop", 0x1111, "e" * 40),
        Frame("shop", 0x2000, "e" * 40),
        Frame("lib shop.so", 0x3000, ""),
    ]


def test_without_frame_pointers_the_place_counts() -> None:
    """Words on the stack may be left over from calls before: they say nothing when the place itself is known."""
    one = frames(crash(EXE + 0x1111, fp=5), is_code, stack(EXE + 0x1234, 7), SP, BUILDS)
    other = frames(crash(EXE + 0x1111, fp=SP), is_code, stack(7, 8, LIBRARY + 0x3000), SP, BUILDS)
    assert one == other == [Frame("shop", 0x1111, "e" * 40)]


def test_the_c_librarys_caller_is_to_blame() -> None:
    data = stack(1, LIBC + 0x2222, EXE + 0x20, EXE + 0x1234, SP + 0x30, EXE + 0x2000)
    # The address of data is none of code; the chain begins above what was found.
    found = frames(crash(LIBC + 0x1111, fp=SP + 0x20), is_code, data, SP, BUILDS)
    assert places(found) == [("libc.so.6", 0x1111), ("shop", 0x1234), ("shop", 0x2000)]
    elsewhere = frames(crash(LIBC + 0x1119, fp=SP + 0x20), is_code, data, SP, BUILDS)
    assert signature("e", "shop", 11, found) == signature("e", "shop", 11, elsewhere)


def test_a_c_library_with_frame_pointers() -> None:
    data = stack(LIBRARY + 0x4444, 0, SP + 0x20, LIBC + 0x2222, SP + 0x30, EXE + 0x1234, 0, LIBC + 0x3333)
    found = frames(crash(LIBC + 0x1111, fp=SP + 0x10), is_code, data, SP, BUILDS)
    assert places(found) == [("libc.so.6", 0x1111), ("shop", 0x1234)]


def test_a_null_functions_caller_is_to_blame() -> None:
    found = frames(crash(0, fp=3), is_code, stack(EXE + 0x1234), SP, BUILDS)
    assert places(found) == [("?", 0), ("shop", 0x1234)]


def test_a_null_functions_caller_in_the_link_register() -> None:
    data = stack(SP + 0x20, EXE + 0x2000, 0, 0)
    found = frames(crash(0, fp=SP, link=EXE + 0x1234, of=AARCH64), is_code, data, SP, BUILDS)
    assert places(found) == [("?", 0), ("shop", 0x1234), ("shop", 0x2000)]


def test_signed_return_addresses() -> None:
    """Pointer authentication: the signature stands above the address."""
    data = stack(SP + 0x20, (0x5A << 48) + EXE + 0x2000, 0, 0)
    found = frames(crash(EXE + 0x1111, fp=SP, of=AARCH64), is_code, data, SP, BUILDS)
    assert places(found) == [("shop", 0x1111), ("shop", 0x2000)]


def test_32_bit_words() -> None:
    files = library(0x8048000, b"/bin/old")
    data = stack(0xFFFF0010, 0x804A000, 0, 0, 0, 0x804A444, width="I")
    found = frames(
        crash(0x8049111, fp=0xFFFF0000, sp=0xFFFF0000, files=files, of=I386), lambda _: True, data, 0xFFFF0000
    )
    assert places(found) == [("old", 0x1111), ("old", 0x2000), ("old", 0x2444)]


def test_a_deleted_file_is_the_same() -> None:
    files = library(EXE, b"/usr/bin/shop (deleted)")
    assert places(frames(crash(EXE + 0x1111, files=files), is_code, b"", SP)) == [("shop", 0x1111)]


def test_a_file_that_is_mapped_twice() -> None:
    """As data, too, and below: the nearest beginning is the one that it was loaded at."""
    name = b"/usr/bin/shop"
    files = [MappedFile(EXE - 0x100000, EXE - 0x90000, 0, name), *library(EXE, name)]
    assert places(frames(crash(EXE + 0x1111, files=files), is_code, b"", SP)) == [("shop", 0x1111)]
    files = [MappedFile(EXE - 0x100000, EXE - 0x90000, 0, b"/etc/data"), *library(EXE, name)[1:]]
    assert places(frames(crash(EXE + 0x1111, files=files), is_code, b"", SP)) == [("shop", 0x1111)]


def test_a_name_of_rubbish() -> None:
    (frame,) = frames(crash(EXE + 0x1111, files=library(EXE, b"/x/\x1b[31m\n\xff" + b"y" * 500)), is_code, b"", SP)
    assert frame.module.startswith("\\x1b[31m\\x0a\\xff")
    assert frame.module.isprintable()
    assert len(frame.module) < 200


def test_the_kernels_own_code() -> None:
    found = frames(crash(VDSO + 0x777, auxv={33: VDSO}), is_code, stack(EXE + 0x1234), SP)
    assert places(found) == [("[vdso]", 0x777), ("shop", 0x1234)]


def test_without_a_list_of_files() -> None:
    data = stack(EXE + 0x1234, LIBRARY + 0x3456)
    found = frames(crash(0, files=[], auxv={3: EXE + 0x40}), is_code, data, SP, BUILDS)
    assert found[1] == Frame("exe", 0x1234, "e" * 40)
    # Of what is no program's, only the place within its page is the same the next time.
    again = frames(crash(LIBRARY + 0x3456, files=[]), is_code, b"", SP)
    assert places(again) == [("?", 0x456)]


def test_made_up_code_has_no_address() -> None:
    assert places(frames(crash(0x1234567890), lambda _: True, b"", SP)) == [("?", 0)]


def test_an_endless_recursion_is_one_bug() -> None:
    """Whichever of its functions meets the end of the stack, and with whatever of the cycle it begins."""
    cycle = [EXE + 0x1234, EXE + 0x2345, EXE + 0x3456]

    def endless(first: int, pc: int) -> list[Frame]:
        words = [word for number in range(100) for word in (0, cycle[(first + number) % 3])]
        return frames(crash(pc, fault=SP - 8), is_code, stack(*words), SP + 0x1000, BUILDS)

    assert endless(0, EXE + 0x1200) == endless(1, EXE + 0x2300)
    assert len(endless(2, EXE + 0x1200)) == 3
    # A fault elsewhere is a bug of its own, however deep the stack.
    words = [EXE + 0x1234] * 100
    assert places(frames(crash(EXE + 0x1200, fault=0), is_code, stack(*words), SP)) == [("shop", 0x1200)]


def test_nothing_is_known() -> None:
    assert frames(parse(b""), is_code, b"", 0) == []
    assert frames(parse(note(NT_PRSTATUS, prstatus(Thread(1, 2, 3, 4))), 243), is_code, b"", 0) == []
    assert signature(None, "", None, []) == signature(None, "", None, [])


def test_what_the_name_depends_on() -> None:
    one = [Frame("shop", 0x1111, "e" * 40), Frame("shop", 0x2222, "e" * 40)]
    names = {
        signature("e", "shop", 11, one),
        signature("f", "shop", 11, one),
        signature(None, "shop", 11, one),
        signature(None, "pub", 11, one),
        signature("e", "shop", 7, one),
        signature("e", "shop", 11, one[:1]),
        signature("e", "shop", 11, one[::-1]),
        signature("e", "shop", 11, [Frame("shop", 0x1111, ""), one[1]]),
        signature("e", "shop", 11, []),
    }
    assert len(names) == 9
    assert all(re.fullmatch("[0-9a-f]{16}", name) for name in names)
    # A copy of the program under another name has its bugs.
    assert signature("e", "shop", 11, one) == signature("e", "pub", 11, one)


ADDRESS = st.one_of(
    st.integers(0, (1 << 64) - 1),
    st.sampled_from([EXE, LIBRARY, LIBC, VDSO, SP]).flatmap(lambda at: st.integers(at - 16, at + 0x9000)),
)


@given(
    ADDRESS,
    ADDRESS,
    ADDRESS,
    st.one_of(st.none(), ADDRESS),
    st.one_of(st.binary(max_size=300), st.lists(ADDRESS, max_size=80).map(lambda words: stack(*words))),
    st.integers(SP - 64, SP + 64),
    st.sampled_from([X86_64, I386, AARCH64, 0]),
)
def test_whatever_it_is_given(pc: int, sp: int, fp: int, fault: int | None, data: bytes, start: int, of: int) -> None:
    bits = 0xFFFFFFFF if of == I386 else (1 << 64) - 1
    files = FILES if of != I386 else library(0x8048000, b"/bin/old")
    found = crash(pc & bits, sp=sp & bits, fp=fp & bits, files=files, fault=fault and fault & bits, of=of)
    result = frames(found, is_code, data, start, BUILDS)
    assert len(result) <= MAX_FRAMES
    assert all(frame.offset >= 0 for frame in result)
    assert len(signature("e", "shop", 11, result)) == 16


def test_a_stack_of_loops_ends() -> None:
    """Frame pointers that go down, or in a circle, and a stack of nothing but return addresses."""
    for data in (stack(SP, EXE + 0x1234) * 1000, stack(SP + 0x10, EXE + 0x1234, SP, EXE + 0x1234)):
        assert len(frames(crash(EXE + 0x1111, fp=SP), is_code, data, SP)) <= MAX_FRAMES
    asked = []

    def count(address: int) -> bool:
        asked.append(address)
        return False

    frames(crash(0), count, stack(*range(EXE, EXE + 100000)), SP)
    assert len(asked) <= STACK // 8 + 1


# Build ids.

_PROGRAMS = [found for name in ("sh", "gcc", "gdb", "readelf", "mount") if (found := shutil.which(name))]


@pytest.mark.skipif(shutil.which("readelf") is None, reason="needs readelf: apt-get install binutils")
@pytest.mark.parametrize("program", [os.path.realpath(sys.executable), *_PROGRAMS])
def test_build_ids_are_readelfs(program: str) -> None:
    said = subprocess.run(["readelf", "-n", program], capture_output=True, text=True, check=True, timeout=60).stdout
    wanted = re.search(r"Build ID: ([0-9a-f]+)", said)
    with open(program, "rb") as file:
        assert build_id(file.read(4096)) == (wanted[1] if wanted else None)


def elf(*, is_64: bool, notes: bytes, align: int = 4, count: int = 1, size: int | None = None) -> bytes:
    head = 64 if is_64 else 52
    entry = 56 if is_64 else 32
    at = head + entry
    length = len(notes) if size is None else size
    if is_64:
        segment = struct.pack("<IIQQQQQQ", 4, 4, at, at, at, length, length, align)
        rest = struct.pack("<HHIQQQIHHHHHH", 3, 62, 1, 0, head, 0, 0, head, entry, count, 0, 0, 0)
    else:
        segment = struct.pack("<IIIIIIII", 4, at, at, at, length, length, 4, align)
        rest = struct.pack("<HHIIIIIHHHHHH", 3, 3, 1, 0, head, 0, 0, head, entry, count, 0, 0, 0)
    return (b"\x7fELF" + bytes([2 if is_64 else 1, 1, 1]) + bytes(9) + rest + segment + notes).ljust(4096, b"\0")


@pytest.mark.parametrize("is_64", [True, False])
def test_the_build_id_among_other_notes(*, is_64: bool) -> None:
    own = note(3, bytes(range(20)), b"GNU\0")
    others = note(1, b"ABI.", b"GNU\0") + note(3, b"other!", b"Go\0\0")
    assert build_id(elf(is_64=is_64, notes=others + own)) == bytes(range(20)).hex()
    # GNU's properties: aligned to 8.
    properties = struct.pack("<III", 4, 16, 5) + b"GNU\0" + bytes(16)
    assert build_id(elf(is_64=is_64, notes=properties + own, align=8)) == bytes(range(20)).hex()
    assert build_id(elf(is_64=is_64, notes=others)) is None
    assert build_id(elf(is_64=is_64, notes=note(3, b"", b"GNU\0"))) is None


@given(st.binary(max_size=200), st.booleans(), st.integers(0, 65535), st.integers(0, (1 << 32) - 1), st.data())
def test_a_strangers_page(notes: bytes, is_64: bool, count: int, size: int, data: st.DataObject) -> None:
    page = bytearray(elf(is_64=is_64, notes=notes, count=count, size=size))
    for at in data.draw(st.lists(st.integers(4, 200), max_size=5)):
        page[at] = data.draw(st.integers(0, 255))
    for found in (build_id(bytes(page)), build_id(bytes(page)[: data.draw(st.integers(0, 300))]), build_id(notes)):
        assert found is None or re.fullmatch("([0-9a-f]{2}){1,64}", found)


# Real crashes.

BUGS = [
    "write-1",
    "write-2",
    "copy-1",
    "copy-2",
    "abort-1",
    "abort-2",
    "recurse",
    "mutual",
    "sort",
    "raise-4",
    "raise-5",
]
BUGS += ["call-1", "call-2", "wild"]
if os.uname().machine == "x86_64":
    BUGS += ["divide"]
FLAVOURS = {
    "plain": ["-O0"],
    "optimised": ["-O2", "-fomit-frame-pointer"],
    "lazy": ["-O2", "-fomit-frame-pointer", "-Wl,-z,lazy", "-Wl,--build-id=none"],
    "frame-pointers": ["-O2", "-fno-omit-frame-pointer"],
    "fixed": ["-O2", "-no-pie", "-fno-pie"],
}
# Threads' stacks do not depend on how the program was linked.
IN_THREADS = ("plain", "optimised")
RUNS = 3


class Core(NamedTuple):
    """What a core has for its signature, as it is found in a plain file."""

    notes: Notes
    is_code: Callable[[int], bool]
    stack: bytes
    stack_start: int
    builds: dict[int, str]


def read(data: bytes) -> Core:
    raw, of, is_64 = notes_of_core(data)
    found = parse(raw, of, is_64=is_64)
    (count,) = struct.unpack_from("<H", data, 56)
    loaded = []
    for index in range(count):
        kind, flags, offset, start, filed, size = struct.unpack_from("<IIQQ8xQQ", data, 64 + 56 * index)
        if kind == 1:
            loaded.append((start, start + size, flags, data[offset : offset + filed]))
    code = [(start, end) for start, end, flags, _ in loaded if flags & 1]
    sp = found.threads[0].sp
    # A stack that overflowed has its pointer below, in a page that nobody can read.
    start, held = next(
        (max(sp, start), held[max(0, sp - start) :]) for start, end, _, held in loaded if held and end > sp
    )
    return Core(
        found,
        lambda address: any(start <= address < end for start, end in code),
        held[:STACK],
        start,
        {start: name for start, _, _, held in loaded if (name := build_id(held[:4096]))},
    )


class Seen(NamedTuple):
    """The names that the runs of one bug got, and the frames of the last one."""

    names: set[str]
    frames: list[Frame]


def name_of(data: bytes) -> tuple[str, list[Frame]]:
    core = read(data)
    found = frames(*core)
    exe = next(file for file in core.notes.files if file.offset == 0)
    return signature(core.builds.get(exe.start), "bugs", core.notes.signal, found), found


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    directory = tmp_path_factory.mktemp("bugs")
    source = os.path.join(crashers.SOURCES, "bugs.c")
    for flavour, flags in FLAVOURS.items():
        command = ["gcc", "-g", "-Wall", "-Wextra", "-Wno-infinite-recursion", "-Wno-nonnull", "-pthread", *flags]
        subprocess.run([*command, "-o", f"{directory}/{flavour}", source], check=True, timeout=60)
    return {flavour: f"{directory}/{flavour}" for flavour in FLAVOURS}


@pytest.fixture(scope="module")
def crashed(programs: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str, bool], Seen]:
    """Every bug of every flavour, in the first thread and in a second, in several runs. The machine is held once."""
    directory = tmp_path_factory.mktemp("cores")
    chance = random.Random(1)
    seen: dict[tuple[str, str, bool], Seen] = {}
    with machine.exclusive() as settings:
        settings.core_pattern = f"{directory}/%p.core"
        for flavour, program in programs.items():
            for bug in BUGS:
                for in_thread in (False, True) if flavour in IN_THREADS else (False,):
                    names = set()
                    for _ in range(RUNS):
                        # Another environment: another place on the stack.
                        extra = f"EXTRA={'x' * chance.randrange(4096)}"
                        arguments = [bug, "--thread"] if in_thread else [bug]
                        data = kernels_core(directory, "env", extra, program, *arguments)
                        name, found = name_of(data)
                        names.add(name)
                    seen[flavour, bug, in_thread] = Seen(names, found)
    return seen


needs_machine = pytest.mark.skipif(machine.why_unavailable() is not None, reason=str(machine.why_unavailable()))
needs_compiler = pytest.mark.skipif(crashers.why_unavailable() is not None, reason=str(crashers.why_unavailable()))


@pytest.mark.kernel
@needs_machine
@needs_compiler
@pytest.mark.parametrize(
    ("flavour", "in_thread"), [(name, False) for name in FLAVOURS] + [(name, True) for name in IN_THREADS]
)
def test_real_bugs(crashed: dict[tuple[str, str, bool], Seen], flavour: str, *, in_thread: bool) -> None:
    """The same bug has one name in every run, and each of them has its own."""
    found = {bug: crashed[flavour, bug, in_thread] for bug in BUGS}
    assert {bug: seen.frames for bug, seen in found.items() if len(seen.names) > 1} == {}
    names = [name for seen in found.values() for name in seen.names]
    assert len(set(names)) == len(BUGS), {bug: seen.frames for bug, seen in found.items()}


@pytest.mark.kernel
@needs_machine
@needs_compiler
@pytest.mark.skipif(shutil.which("addr2line") is None, reason="needs addr2line: apt-get install binutils")
@pytest.mark.parametrize("flavour", FLAVOURS)
def test_the_frames_are_the_bugs(
    crashed: dict[tuple[str, str, bool], Seen], programs: dict[str, str], flavour: str
) -> None:
    """The frame to blame lies in the function that has the bug."""
    functions = {"recurse": "recurse", "mutual": "mutual_", "sort": "compare", "divide": "crash", "wild": "crash"}
    for bug in BUGS:
        function = "crash" if bug.startswith("raise") else functions.get(bug, "two_of_a_kind")
        blamed = next(frame for frame in crashed[flavour, bug, False].frames if frame.module == flavour)
        # A return address may be the next function's first; with -no-pie, addresses begin where the module does.
        address = blamed.offset - 1 + (0x400000 if flavour == "fixed" else 0)
        command = ["addr2line", "-f", "-i", "-e", programs[flavour], hex(address)]
        said = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
        assert function in said, (bug, said)


@pytest.mark.kernel
@needs_machine
@needs_compiler
def test_a_program_that_was_deleted(programs: dict[str, str], tmp_path: Path) -> None:
    """Updated while it ran, say."""
    names = []
    with machine.exclusive() as settings:
        settings.core_pattern = f"{tmp_path}/%p.core"
        for delete in (False, True):
            program = shutil.copy(programs["lazy"], tmp_path / "lazy")
            with subprocess.Popen(
                ["prlimit", "--core=unlimited:unlimited", program, "abort-1", "--wait"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
            ) as process:
                assert process.stdout is not None
                assert process.stdin is not None
                assert process.stdout.readline() == b"ready\n"
                if delete:
                    os.unlink(program)
                process.stdin.close()
                process.wait(60)
            names.append(name_of((tmp_path / f"{process.pid}.core").read_bytes()))
    assert names[0] == names[1]
    assert names[0][1][-1].module == "lazy"


def test_what_a_stack_takes() -> None:
    """The worker passes so much, and no more is looked at."""
    data = bytes(signatures.STACK) + stack(EXE + 0x1234)
    assert places(frames(crash(0), is_code, data, SP)) == [("?", 0)]
