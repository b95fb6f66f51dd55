"""Reduced cores: smaller, and of every frame of every thread debuggers say the same as of the whole core."""

from __future__ import annotations

import difflib
import os
import signal
import struct
import subprocess
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest

from tests.support import debuggers, machine
from tests.support.containers import PlainContainer
from tests.support.patients import BALLAST, PYTHON, Held, Landed, held_crash, patient, plugins
from tests.support.receivers import dump, forwarder_installed, list_records, resident, wait_for_records
from tests.support.waiting import read_line

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

pytestmark = [
    pytest.mark.kernel,
    *(
        pytest.mark.skipif(why is not None, reason=str(why))
        for why in (machine.why_unavailable(), PlainContainer.why_unavailable(), debuggers.why_unavailable())
    ),
]
needs_pystack = pytest.mark.skipif(debuggers.why_no_pystack() is not None, reason=str(debuggers.why_no_pystack()))

MIB = 1 << 20


def _with_plugins(program: str) -> list[str]:
    return [program, *(word for path in plugins(5) for word in ("--plugin", path))]


PATIENTS: dict[str, Callable[[], list[str]]] = {
    "threads": lambda: [patient(), "--threads", "16"],
    "optimised": lambda: [*_with_plugins(patient("-O2")), "--threads", "16", "--ballast", str(50 * MIB)],
    # Without a library that only the heap knows of: that is not to be seen in a dead process.
    "plenty": lambda: [patient("-O2"), "--threads", "14", "--ballast", str(50 * MIB)],
    "deep": lambda: [patient("-O2"), "--stack", str(8 * MIB - 500_000), "--from-thread"],
    "deep-main": lambda: [patient("-O1"), "--stack", str(8 * MIB - 500_000)],
    "overflow": lambda: [patient("-O1"), "--stack", str(64 * MIB)],
    "handler": lambda: [patient("-O2"), "--stack", str(MIB), "--handler", "--threads", "2"],
    "handler-in-thread": lambda: [patient("-O2"), "--stack", str(MIB), "--handler", "--from-thread"],
    "handler-of-overflow": lambda: [patient("-O2"), "--stack", str(64 * MIB), "--handler"],
    "static": lambda: [patient("-O2", "-static"), "--threads", "5", "--ballast", str(MIB)],
    "plugins": lambda: _with_plugins(patient("-O2")),
    "python": lambda: [PYTHON, BALLAST, "8", str(60 * MIB)],
}


class Case(NamedTuple):
    """A held crash, and what debuggers say of its whole core. container: from there the process is not to be seen."""

    name: str
    held: Held
    container: PlainContainer
    said: dict[str, str]

    def landed(self, target: Path, *, seen: bool, **settings: Any) -> Landed:
        return self.held.reduce(target, container=None if seen else self.container, **settings)

    def whole_says(self, debugger: str) -> str:
        if debugger not in self.said:
            self.said[debugger] = debuggers.DEBUGGERS[debugger](self.held.program, self.held.whole)
        return self.said[debugger]


@pytest.fixture(scope="module")
def container() -> Iterator[PlainContainer]:
    with PlainContainer(tmpfs={"/small": "size=8m"}) as found:
        yield found


@pytest.fixture(scope="module")
def cases(container: PlainContainer) -> Iterator[Callable[[str], Case]]:
    """Crashes by name; each happens once, and the process stays there until the next one is asked for."""
    current: list[tuple[Case, Iterator[Held]]] = []

    def leave() -> None:
        if current:
            current.pop()[1].close()  # type: ignore[attr-defined]

    def ask(name: str) -> Case:
        if not current or current[0][0].name != name:
            leave()
            holding = _holding(PATIENTS[name]())
            current.append((Case(name, next(holding), container, {}), holding))
        return current[0][0]

    yield ask
    leave()


def _holding(argv: list[str]) -> Iterator[Held]:
    with held_crash(argv) as held:
        yield held


def same(case: Case, landed: Landed, *names: str) -> None:
    """Make sure that these debuggers say of a reduced core what they say of the whole one."""
    assert landed.record["core"]["state"] == "reduced", landed.record["core"]
    for name in names:
        whole = case.whole_says(name).splitlines()
        found = debuggers.DEBUGGERS[name](case.held.program, landed.core).splitlines()
        # Not `==`: pytest takes minutes to compare long texts.
        difference = list(difflib.unified_diff(whole, found, "whole", "reduced", lineterm="", n=0))[:40]
        assert not difference, f"{name}: " + "\n".join(difference)


# Each thread's frames.

SEEN = pytest.mark.parametrize("seen", [True, False], ids=["seen", "unseen"])
C_CASES = [name for name in PATIENTS if name != "python"]


@SEEN
@pytest.mark.parametrize("name", C_CASES)
def test_stacks_alone_are_enough(cases: Callable[[str], Case], tmp_path: Path, name: str, seen: bool) -> None:
    case = cases(name)
    landed = case.landed(tmp_path / "core", seen=seen, keep="stacks")
    same(case, landed, "gdb", "eu-stack")
    assert landed.record["core"]["size_bytes"] < landed.record["core"]["whole_bytes"] == case.held.whole.stat().st_size
    assert debuggers.readelf_warnings(landed.core) == ""


@SEEN
@pytest.mark.parametrize(
    ("name", "size"), [("threads", MIB), ("threads", 4 * MIB), ("optimised", 2 * MIB), ("optimised", 16 * MIB)]
)
def test_a_limit_in_bytes_is_enough(
    cases: Callable[[str], Case], tmp_path: Path, name: str, size: int, seen: bool
) -> None:
    case = cases(name)
    landed = case.landed(tmp_path / "core", seen=seen, keep=str(size))
    assert landed.core.stat().st_size <= size
    same(case, landed, "gdb", "eu-stack")


@SEEN
@pytest.mark.parametrize("keep", ["stacks", str(8 * MIB), str(24 * MIB)])
def test_the_native_frames_of_a_python_program(
    cases: Callable[[str], Case], tmp_path: Path, keep: str, seen: bool
) -> None:
    case = cases("python")
    landed = case.landed(tmp_path / "core", seen=seen, keep=keep)
    assert landed.core.stat().st_size < 24 * MIB
    same(case, landed, "gdb", "eu-stack")


@needs_pystack
@pytest.mark.parametrize("keep", ["stacks", str(8 * MIB), str(24 * MIB)])
def test_the_python_frames_of_a_python_program(cases: Callable[[str], Case], tmp_path: Path, keep: str) -> None:
    case = cases("python")
    landed = case.landed(tmp_path / "core", seen=True, keep=keep)
    assert landed.core.stat().st_size <= 24 * MIB < landed.record["core"]["whole_bytes"] // 4
    assert "in wait_for_queue" in case.whole_says("pystack")
    same(case, landed, "gdb", "eu-stack", "pystack")


def test_the_core_limit_of_a_process_reduces_its_core(cases: Callable[[str], Case], tmp_path: Path) -> None:
    case = cases("threads")
    landed = case.landed(tmp_path / "core", seen=True, core_limit=2 * MIB)
    assert landed.core.stat().st_size <= 2 * MIB
    assert "ulimit -c" in landed.record["core"]["reason"]
    same(case, landed, "gdb", "eu-stack")


@SEEN
@pytest.mark.parametrize("compression", ["zstd", "none"])
def test_a_store_without_room_reduces_a_core(
    cases: Callable[[str], Case], tmp_path: Path, compression: str, seen: bool
) -> None:
    """What matters least gives its room up while the core is written: its head and notes come first in it."""
    case = cases("plenty")
    landed = case.landed(tmp_path / "core", seen=seen, store_max="6M", compression=compression)
    assert landed.record["core"]["stored_bytes"] <= 6 * MIB
    same(case, landed, "gdb", "eu-stack")
    has_only_what_was_there(landed.core, case.held.whole)


@pytest.mark.parametrize("compression", ["zstd", "none"])
def test_a_full_disk_reduces_a_core(cases: Callable[[str], Case], tmp_path: Path, compression: str) -> None:
    case = cases("plenty")
    landed = case.landed(tmp_path / "core", seen=False, below="/small", compression=compression)
    same(case, landed, "gdb", "eu-stack")
    has_only_what_was_there(landed.core, case.held.whole)


@pytest.mark.parametrize("name", ["deep", "deep-main"])
def test_of_a_stack_that_does_not_fit_the_innermost_frames_stay(
    cases: Callable[[str], Case], tmp_path: Path, name: str
) -> None:
    case = cases(name)
    landed = case.landed(tmp_path / "core", seen=True, keep=str(MIB))
    assert landed.core.stat().st_size <= MIB
    whole = debuggers.functions(case.whole_says("gdb"))
    reduced = debuggers.functions(debuggers.gdb_backtraces(case.held.program, landed.core))
    assert len(whole[1]) > 900
    for number, names in reduced.items():
        # gdb may guess a frame or more where the stack ends; the guesses are behind all that is known.
        known = 80 if number == 1 else len(whole[number])
        assert names[:known] == whole[number][:known]


# The memory.


def loads(core: Path) -> list[tuple[int, int, int, int]]:
    """(address, size in memory, offset in the file, size in the file) of each PT_LOAD of a 64-bit core."""
    with core.open("rb") as file:
        header = file.read(64)
        (offset,) = struct.unpack_from("<Q", header, 32)
        size, count = struct.unpack_from("<HH", header, 54)
        file.seek(offset)
        table = file.read(size * count)
    rows = [struct.unpack_from("<IIQQQQQQ", table, at) for at in range(0, len(table), size)]
    return [(row[3], row[6], row[2], row[5]) for row in rows if row[0] == 1]


def has_only_what_was_there(reduced: Path, whole: Path) -> None:
    """Make sure that each byte of memory in a reduced core is the whole core's, and that nothing claims to be zeros."""
    known = loads(whole)
    with reduced.open("rb") as file, whole.open("rb") as all_of_it:
        for address, memory, offset, size in loads(reduced):
            at, full, base, dumped = next(row for row in known if row[0] <= address < row[0] + max(row[1], row[3], 1))
            assert address + size <= at + dumped or size == 0
            # gdb reads what is behind p_filesz as zeros: only what the kernel itself left out may be there.
            assert memory == size or (address + size >= at + dumped and address + memory == at + full)
            file.seek(offset)
            all_of_it.seek(base + address - at)
            assert file.read(size) == all_of_it.read(size)


BUDGETS = ["stacks", *map(str, (300_000, 500_000, MIB, 3 * MIB, 17 * MIB, 50 * MIB))]


@SEEN
@pytest.mark.parametrize("keep", BUDGETS)
def test_no_byte_is_invented(cases: Callable[[str], Case], tmp_path: Path, keep: str, seen: bool) -> None:
    case = cases("optimised")
    landed = case.landed(tmp_path / "core", seen=seen, keep=keep)
    assert landed.record["core"]["state"] == "reduced", landed.record["core"]
    assert landed.core.stat().st_size == landed.record["core"]["size_bytes"]
    if keep != "stacks":
        assert landed.core.stat().st_size <= int(keep)
    has_only_what_was_there(landed.core, case.held.whole)
    assert debuggers.readelf_warnings(landed.core) == ""
    # However small: who crashed, where, and with which registers.
    crashed = debuggers.gdb(case.held.program, landed.core, "bt 1", "info registers rip rsp", "info threads")
    assert "in fault (" in crashed
    assert crashed.count("LWP") >= 17


def test_more_room_never_keeps_less(cases: Callable[[str], Case], tmp_path: Path) -> None:
    case = cases("optimised")
    sizes = [
        sum(row[3] for row in loads(case.landed(tmp_path / f"core-{keep}", seen=True, keep=keep).core))
        for keep in BUDGETS[1:]
    ]
    assert sizes == sorted(sizes)


def test_absent_memory_is_absent_and_not_zero(cases: Callable[[str], Case], tmp_path: Path) -> None:
    case = cases("optimised")
    for keep in ("stacks", str(4 * MIB)):
        landed = case.landed(tmp_path / f"core-{keep}", seen=True, keep=keep)

        def value(expression: str, core: Path = landed.core) -> str:
            return debuggers.gdb_value(case.held.program, core, expression)

        assert value("ballast_size") == str(50 * MIB)
        # Its first page may be there, which a pointer points to, and what of it still fits behind that.
        for at in (25 * MIB, 50 * MIB - 2 * 4096):
            assert "Cannot access memory at address" in value(f"(int)ballast[{at}]"), keep
        # The whole core has it.
        assert value("(int)ballast[100]", case.held.whole).isdigit()


def test_global_variables_have_their_last_values(cases: Callable[[str], Case], tmp_path: Path) -> None:
    """Where a core has no bytes gdb reads the file that was mapped there, which has the first values."""
    case = cases("optimised")
    for keep in ("stacks", str(4 * MIB)):
        landed = case.landed(tmp_path / f"core-{keep}", seen=True, keep=keep)
        said = debuggers.gdb(case.held.program, landed.core, "p initialised", "p zeroed", "p (int)table[0]")
        assert [line for line in said.splitlines() if line.startswith("$")] == ["$1 = 2", "$2 = 3", "$3 = 2"], keep


def test_what_the_stack_points_to_is_there(cases: Callable[[str], Case], tmp_path: Path) -> None:
    case = cases("optimised")
    landed = case.landed(tmp_path / "core", seen=True, keep=str(4 * MIB))
    expressions = ("*kept", "kept->title[0]@5", "kept->earlier->earlier->chapter")
    values = [debuggers.gdb_value(case.held.program, landed.core, expression) for expression in expressions]
    assert "chapter = 3" in values[0]
    assert values[1:] == ['"once "', "1"]


def test_nothing_is_reduced_that_fits(cases: Callable[[str], Case], tmp_path: Path) -> None:
    case = cases("plugins")
    whole = case.held.whole.read_bytes()
    for compression in ("none", "zstd"):
        landed = case.landed(tmp_path / compression, seen=True, keep=str(len(whole)), compression=compression)
        assert landed.record["core"]["state"] == "stored"
        assert landed.core.read_bytes() == whole


# Through the forwarder, while the kernel waits.


@pytest.fixture(scope="module")
def receiving() -> Iterator[PlainContainer]:
    env = {"CORE_PIPE_KEEP": "stacks", "CORE_PIPE_KEEP_FOR": f"{PYTHON}=16M", "CORE_PIPE_STORE_MAX": "off"}
    with forwarder_installed(), PlainContainer() as found, resident(found, env=env):
        yield found


def crash_for_real(place: PlainContainer, target: Path, argv: list[str]) -> Landed:
    before = len(list_records(place))
    process = place.popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdin is not None
    assert process.stdout is not None
    assert read_line(process.stdout.fileno(), 60, "the program is ready") == b"ready\n"
    process.stdin.close()
    status = process.reaped(60)["status"]
    process.end()
    assert os.WTERMSIG(status) == signal.SIGSEGV
    assert os.WCOREDUMP(status)
    record = wait_for_records(place, before + 1)[-1]
    assert record["core"]["state"] == "reduced", record["core"]
    return Landed(record, dump(place, record["id"], target))


@pytest.mark.parametrize("name", ["threads", "optimised", "deep", "handler", "static"])
def test_a_real_crash(cases: Callable[[str], Case], receiving: PlainContainer, tmp_path: Path, name: str) -> None:
    """By the names of the functions: it is another process, at other addresses."""
    case = cases(name)
    landed = crash_for_real(receiving, tmp_path / "core", PATIENTS[name]())
    found = debuggers.functions(debuggers.gdb_backtraces(case.held.program, landed.core))
    whole = debuggers.functions(case.whole_says("gdb"))
    # The kernel's order of the threads, but for the one that crashed, is another each time.
    assert found[1] == whole[1]
    assert sorted(found.values()) == sorted(whole.values())
    assert debuggers.readelf_warnings(landed.core) == ""


@needs_pystack
def test_a_real_crash_of_a_python_program(receiving: PlainContainer, tmp_path: Path) -> None:
    landed = crash_for_real(receiving, tmp_path / "core", PATIENTS["python"]())
    said = debuggers.python_backtraces(PYTHON, landed.core)
    assert said.count("Traceback for thread") == 9
    assert [said.count(f"in {name}\n") for name in ("wait_for_lock", "wait_for_queue", "wait_in_read", "crash")] == [
        3,
        3,
        2,
        1,
    ]


def test_a_real_crash_of_a_process_with_a_core_limit(receiving: PlainContainer, tmp_path: Path) -> None:
    argv = [patient("-O2"), "--threads", "3", "--ballast", str(20 * MIB), "--core-limit", str(2 * MIB)]
    landed = crash_for_real(receiving, tmp_path / "core", argv)
    assert landed.core.stat().st_size <= 2 * MIB
    found = debuggers.functions(debuggers.gdb_backtraces(argv[0], landed.core))
    assert found[1][:3] == ["fault", "call_plugin", "descend"]
    assert all("start_thread" in names for number, names in found.items() if number > 1)
