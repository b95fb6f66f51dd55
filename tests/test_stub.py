"""The stub's start-up path: its import budget, its arguments, and what it needs to run at all."""

from __future__ import annotations

import os
import subprocess
import time
from importlib.util import MAGIC_NUMBER
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from forwarder import apart, install, namespaces, staging
from forwarder.crash import ARGUMENTS, Crash, parse
from forwarder.rendezvous import Refused
from forwarder.route import Route
from receiver.auxv import is_secure
from tests.support.mounts import CHECKOUT

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

# What `forwarder/stub.py` says at its top. `_signal` to `time` are built into Debian's and Ubuntu's interpreter.
BUDGET = {
    "__future__",
    "_signal",
    "_socket",
    "_struct",
    "errno",
    "fcntl",
    "posix",
    "select",
    "time",
    "forwarder",
    "forwarder.apart",
    "forwarder.crash",
    "forwarder.handled",
    "forwarder.handoff",
    "forwarder.namespaces",
    "forwarder.rendezvous",
    "forwarder.route",
    "forwarder.share",
    "forwarder.stub",
    "receiver",
    "receiver.auxv",
    "receiver.cgroup",
    "receiver.protocol",
}


def modules(code: str) -> set[str]:
    """The modules that a bare interpreter has after running some code."""
    program = f"import sys; sys.path.append({CHECKOUT!r})\n{code}\nprint('\\n'.join(sys.modules))"
    found = subprocess.run([staging.interpreter(), "-IBS", "-c", program], capture_output=True, text=True, check=True)
    return set(found.stdout.split())


def test_import_budget() -> None:
    """Each import is paid by every process that waits in the kernel."""
    extra = modules("import forwarder.stub") - modules("") - BUDGET
    assert not extra, f"outside the budget at the top of forwarder/stub.py: {sorted(extra)}"


def test_the_budget_is_not_larger_than_what_is_used() -> None:
    assert not BUDGET - modules("import forwarder.stub")


def test_the_staged_road_is_all_that_is_imported(tmp_path: Path) -> None:
    """The launcher reads one file. Nothing on the road is looked for in the file system by the import system."""
    road = tmp_path / staging.ROAD
    road.write_bytes(staging.road(staging.sources(staging.packages_in_use())))
    program = f"""
import marshal, sys
before = set(sys.modules)
LIBRARY = "/nonexistent"
sys.path[:] = sys.meta_path[2:] = []
with open({str(road)!r}, "rb") as file:
    begin, modules = marshal.loads(file.read()[{len(MAGIC_NUMBER)}:])
exec(begin)
from forwarder.stub import main
print(main.__code__.co_filename)
print("\\n".join(set(sys.modules) - before))
"""
    found = subprocess.run([staging.interpreter(), "-IBS", "-c", program], capture_output=True, text=True, check=True)
    where, *names = found.stdout.split()
    assert where == "forwarder/stub.py"
    assert set(names) == BUDGET - modules("") - {"__future__"}


def test_memory_that_does_not_answer() -> None:
    """The receiver was reached, and the facts never come: it is refused, and the next one is asked without them."""
    crash = Crash(parse([f"P={os.getpid()}", "v=1", "s=11"]))
    crash.task = os.open("/proc/self", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    never, ends_it = os.pipe()

    def answers() -> Iterator[apart.Answer]:
        yield {"reached": b"1"}, None
        # Kernels of today give an error for a page that nobody brings, so this stands for one that does not.
        os.read(never, 1)

    route = Route(crash, seconds=1)
    try:
        route._look = apart.Look(answers, time.monotonic(), (ends_it,))
        assert route._look.answer().fields == {"reached": b"1"}
        with pytest.raises(Refused, match="memory of the process does not answer"):
            route.facts()
        # It goes on counting for its container.
        assert route.stuck
        assert route.facts() == {}
    finally:
        route.close()
        for fd in (never, ends_it, crash.task):
            os.close(fd)


def test_every_argument_of_the_pattern_is_understood() -> None:
    names = [word.partition("=")[0] for word in install.ARGUMENTS.split()]
    assert set(names) == ARGUMENTS
    assert len(set(names)) == len(names)


GOOD = {"v": "1", "P": "10", "I": "11", "p": "2", "i": "3", "s": "6", "t": "9", "c": "0", "d": "1", "u": "5", "g": "6"}


def as_arguments(values: dict[str, str]) -> list[str]:
    return [f"{name}={value}" for name, value in values.items()]


@given(order=st.permutations(as_arguments(GOOD)), noise=st.lists(st.text(max_size=20), max_size=5))
def test_arguments_in_any_order_among_any_others(order: list[str], noise: list[str]) -> None:
    """systemd#38055: positions drift with an upgrade; names do not. What is unknown is not ours to judge."""
    known = tuple(f"{name}=" for name in ARGUMENTS)
    crash = Crash(parse([*order, *(word for word in noise if not word.startswith(known))]))
    assert (crash.pid, crash.tid, crash.own_pid, crash.own_tid, crash.signal) == (10, 11, 2, 3, 6)
    assert (crash.time, crash.core_limit, crash.dumpable, crash.uid, crash.gid) == (9, 0, 1, 5, 6)
    assert crash.pidfd == -1


@given(arguments=st.lists(st.text(max_size=30) | st.sampled_from(as_arguments(GOOD)), max_size=20))
def test_any_arguments_give_a_crash_or_a_clear_error(arguments: list[str]) -> None:
    try:
        Crash(parse(arguments))
    except ValueError as error:
        assert "version" in str(error) or "argument" in str(error)


@pytest.mark.parametrize("values", [{"v": "2"}, {"P": ""}, {"P": "-1"}, {"s": "x"}, {"P": "²"}, {"F": "0"}, {"F": "4"}])
def test_wrong_arguments(values: dict[str, str]) -> None:
    with pytest.raises(ValueError, match=r"argument|version"):
        Crash(parse(as_arguments({**GOOD, **values})))


def test_what_the_kernel_does_not_tell_is_the_careful_value() -> None:
    crash = Crash(parse(["v=1", "P=10", "s=6", "d=", "F="]))
    assert crash.dumpable == 2
    assert crash.tid == 10


@given(
    name=st.binary(max_size=15).map(lambda b: b.replace(b"\n", b"\\n").replace(b"\0", b"")),
    dumping=st.booleans(),
)
def test_a_name_cannot_forge_a_line_of_status(name: bytes, dumping: bool) -> None:
    """H13: the kernel escapes newlines in "Name:", so lines are lines."""
    status = b"Name:\t" + name + b"\nTgid:\t7\nCoreDumping:\t%d\n" % dumping
    assert namespaces.status_value(status, b"CoreDumping") == [b"%d" % dumping]
    assert namespaces.status_value(status, b"Tgid") == [b"7"]


def auxv(pairs: Iterable[tuple[int, int]], size: int) -> bytes:
    return b"".join(word.to_bytes(size, "little") for pair in pairs for word in pair)


@pytest.mark.parametrize("size", [4, 8])
def test_auxiliary_vector(size: int) -> None:
    assert not is_secure(auxv([(33, 1), (6, 4096), (23, 0), (0, 0)], size))
    assert is_secure(auxv([(33, 1), (6, 4096), (23, 1), (0, 0)], size))
    assert is_secure(auxv([(33, 1), (6, 4096), (0, 0)], size))


@given(raw=st.binary(max_size=300))
def test_any_auxiliary_vector(raw: bytes) -> None:
    assert is_secure(raw) in (True, False)


def test_our_own_auxiliary_vector() -> None:
    with open("/proc/self/auxv", "rb") as file:
        assert not is_secure(file.read())
