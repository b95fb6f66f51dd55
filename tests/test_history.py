"""What crashed lately: counted right, bounded, and never in the way of a crash."""

from __future__ import annotations

import os
import subprocess
import tempfile
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from receiver.history import KEPT, LEAST, MAX_SIZE, NAME, PROGRAM, REFUSED, History
from receiver.signature import digest
from receiver.store import Store

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

NOW = 1_790_000_000.25
BUG = "1000 0123456789abcdef"
OTHER = "1000 fedcba9876543210"
HOUR = 3600.0


def line_of(what: str, *, kind: str = KEPT, time: float = NOW, count: int = 1) -> str:
    return f"{time:014.3f} {kind} {digest(what)} {count:08d}"


@pytest.fixture
def directory(tmp_path: Path) -> Iterator[int]:
    fd = os.open(tmp_path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    yield fd
    os.close(fd)


def test_nothing_happened(directory: int) -> None:
    assert History(directory).count(KEPT, BUG, HOUR, NOW) == 0
    # Who only asks leaves nothing.
    assert os.listdir(directory) == []


def test_what_counts(directory: int) -> None:
    history = History(directory)
    for kind, what, ago in ((KEPT, BUG, 100), (REFUSED, BUG, 50), (KEPT, OTHER, 10), (PROGRAM, BUG, 8), (KEPT, BUG, 5)):
        history.add(kind, what, HOUR, NOW - ago)
    history.add(PROGRAM, "0 /bin/b \udcff\n", HOUR, NOW - 5)
    assert history.count(KEPT, BUG, HOUR, NOW) == 2
    assert history.count(KEPT + REFUSED, BUG, HOUR, NOW) == 3
    assert history.count(KEPT, OTHER, HOUR, NOW) == 1
    assert history.count(PROGRAM, BUG, HOUR, NOW) == 1
    assert history.count(PROGRAM, "0 /bin/b \udcff\n", HOUR, NOW) == 1
    assert history.count(PROGRAM, "0 /bin/c", HOUR, NOW) == 0
    assert history.count(KEPT + REFUSED, BUG, 60, NOW) == 2
    assert history.count(KEPT, BUG, 1, NOW) == 0
    # Another process finds the same.
    assert History(directory).count(KEPT, BUG, HOUR, NOW) == 2


def test_a_clock_that_was_set_back(directory: int) -> None:
    history = History(directory)
    history.add(KEPT, BUG, HOUR, NOW)
    # A worker that was a little faster is there; what is in the future is not.
    assert history.count(KEPT, BUG, HOUR, NOW - 1) == 1
    assert history.count(KEPT, BUG, HOUR, NOW - 86400) == 0


def test_a_time_that_is_none(directory: int) -> None:
    history = History(directory)
    for time in (float("nan"), float("inf"), -1.0, 1e300):
        history.add(KEPT, BUG, HOUR, time)
    assert history.count(KEPT, BUG, HOUR, NOW) == 0
    history.add(KEPT, BUG, HOUR, NOW)
    assert history.count(KEPT, BUG, HOUR, NOW) == 1


def test_a_loop_that_is_refused_takes_no_room(directory: int, tmp_path: Path) -> None:
    """However fast it crashes: what it is refused for stays in sight, and how often it came is known."""
    history = History(directory)
    for number in range(5):
        history.add(KEPT, BUG, HOUR, NOW + number)
    size = (tmp_path / NAME).stat().st_size
    for number in range(3000):
        history.add(REFUSED, BUG, HOUR, NOW + 5 + number / 10)
    assert (tmp_path / NAME).stat().st_size == size + len(line_of(BUG)) + 1
    assert history.count(KEPT, BUG, HOUR, NOW + 300) == 5
    assert history.count(REFUSED, BUG, HOUR, NOW + 310) == 3000
    # What is too old is not counted further.
    history.add(REFUSED, BUG, HOUR, NOW + 86400)
    assert history.count(REFUSED, BUG, HOUR, NOW + 86400) == 1


def test_it_is_bounded(directory: int, tmp_path: Path) -> None:
    history = History(directory)
    for number in range(4000):
        history.add(KEPT, BUG if number % 2 else OTHER, HOUR, NOW + number / 1000)
        assert (tmp_path / NAME).stat().st_size <= MAX_SIZE
    assert os.listdir(directory) == [NAME]
    lines = (tmp_path / NAME).read_text().splitlines()
    # The newest are there, in order, each whole.
    assert lines[-1].startswith(f"{NOW + 3.999:014.3f} {KEPT} ")
    assert lines == sorted(lines)
    assert len(lines) >= LEAST
    assert len({len(line) for line in lines}) == 1
    assert history.count(KEPT, BUG, HOUR, NOW) + history.count(KEPT, OTHER, HOUR, NOW) == len(lines)


def test_who_may_read_it(directory: int, tmp_path: Path) -> None:
    old = os.umask(0)
    try:
        History(directory).add(KEPT, BUG, HOUR, NOW)
    finally:
        os.umask(old)
    assert (tmp_path / NAME).stat().st_mode & 0o777 == 0o600


@given(st.lists(st.one_of(st.binary(max_size=200), st.text(max_size=80).map(str.encode)), max_size=10))
def test_whatever_is_in_it(parts: list[bytes]) -> None:
    """Whatever stands around a line, it counts, and so does the next one."""
    good = line_of(BUG).encode()
    with tempfile.TemporaryDirectory() as path:
        with open(os.path.join(path, NAME), "wb") as file:
            file.write(b"\n".join([part for damaged in parts for part in (damaged, good)]))
        directory = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            history = History(directory)
            assert history.count(KEPT, BUG, HOUR, NOW) == len(parts)
            history.add(KEPT, OTHER, HOUR, NOW)
            assert history.count(KEPT, OTHER, HOUR, NOW) == 1
        finally:
            os.close(directory)


def test_damaged_lines_are_none(directory: int, tmp_path: Path) -> None:
    good = line_of(BUG)
    bad = [
        "",
        " ",
        good[:-1],
        good[1:] + " ",
        good.replace(" K ", " X "),
        good[:-1] + "x",
        good + " 1",
        good.replace(".", ".x"),
        good.replace(" ", "\t"),
        good.replace(".", "e"),
        "-" + good,
        "\0" * 60,
        "\u0661" + good[1:],
        "nan".rjust(14) + good[14:],
        "9" * 400 + good,
        good[: len(good) // 2],
    ]
    (tmp_path / NAME).write_bytes("\n".join([good, *bad, good]).encode() + b"\n\xff\xfe\n" + good.encode() + b"\n")
    history = History(directory)
    assert history.count(KEPT, BUG, HOUR, NOW) == 3


def test_a_line_is_added_after_one_that_was_torn(directory: int, tmp_path: Path) -> None:
    history = History(directory)
    history.add(KEPT, BUG, HOUR, NOW)
    whole = (tmp_path / NAME).read_bytes()
    for size in range(len(whole)):
        (tmp_path / NAME).write_bytes(whole + whole[:size])
        history.add(KEPT, OTHER, HOUR, NOW)
        assert (history.count(KEPT, BUG, HOUR, NOW), history.count(KEPT, OTHER, HOUR, NOW)) == (1, 1) or size == len(
            whole
        ) - 1
    # All but the end of the line had arrived: that is the crash, too.
    assert history.count(KEPT, BUG, HOUR, NOW) == 2


def test_a_file_that_grew_beyond_measure(directory: int, tmp_path: Path) -> None:
    with (tmp_path / NAME).open("wb") as file:
        file.truncate(1 << 40)
    history = History(directory)
    assert history.count(KEPT, BUG, HOUR, NOW) == 0
    history.add(KEPT, BUG, HOUR, NOW)
    assert history.count(KEPT, BUG, HOUR, NOW) == 1
    assert (tmp_path / NAME).stat().st_size <= MAX_SIZE


@pytest.mark.parametrize("what", ["link", "fifo", "directory", "nowhere"])
def test_something_else_of_its_name(directory: int, tmp_path: Path, what: str) -> None:
    target = tmp_path / "target"
    target.write_text("mine")
    if what == "link":
        (tmp_path / NAME).symlink_to(target)
    elif what == "nowhere":
        (tmp_path / NAME).symlink_to("/nonexistent/file")
    elif what == "fifo":
        os.mkfifo(tmp_path / NAME)
    else:
        (tmp_path / NAME).mkdir()
    history = History(directory)
    history.add(KEPT, BUG, HOUR, NOW)
    assert history.count(KEPT, BUG, HOUR, NOW) == 0
    assert target.read_text() == "mine"


CALLS = ("open", "write", "pwrite", "pread", "rename", "unlink", "close", "fstat")


def _dies_at(directory: int, call: int) -> bool:
    """Add a line in a process that ends just before that system call; returns whether it got so far."""
    pid = os.fork()
    if pid == 0:
        done = 0

        def dying(real: Any) -> Any:
            def wrapper(*args: Any, **kwargs: Any) -> Any:
                nonlocal done
                done += 1
                if done > call:
                    os._exit(1)
                return real(*args, **kwargs)

            return wrapper

        try:
            for name in CALLS:
                setattr(os, name, dying(getattr(os, name)))
            History(directory).add(KEPT, OTHER, HOUR, NOW)
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 1


def test_a_worker_that_is_killed(directory: int, tmp_path: Path) -> None:
    """At whatever point, in the file that is full: all lines are there, or the newer half and the new one."""
    line = line_of(BUG) + "\n"
    full = line.encode() * (MAX_SIZE // len(line))
    calls = 0
    while True:
        (tmp_path / NAME).write_bytes(full)
        died = _dies_at(directory, calls)
        history = History(directory)
        found = (history.count(KEPT, BUG, HOUR, NOW), history.count(KEPT, OTHER, HOUR, NOW))
        half = MAX_SIZE // 2 // len(line)
        assert found in ((MAX_SIZE // len(line), 0), (half, 1))
        # The next one is not in his way.
        history.add(KEPT, OTHER, HOUR, NOW)
        assert os.listdir(directory) == [NAME]
        if not died:
            break
        calls += 1
    assert found == (half, 1)
    assert calls >= 8


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to mount: sudo .venv/bin/python -m pytest")
@pytest.mark.parametrize("pages", [1, 33, 36])
def test_a_full_disk(tmp_path: Path, pages: int) -> None:
    """No error, nothing half-written that counts, and it works again when there is room."""
    mounted = tmp_path / "full"
    mounted.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={pages * 4096}", "tmpfs", mounted], check=True, timeout=60)
    try:
        fd = os.open(mounted, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            history = History(fd)
            added = 3 * MAX_SIZE // 43
            for _ in range(added):
                history.add(KEPT, BUG, HOUR, NOW)
                assert (mounted / NAME).stat().st_size <= MAX_SIZE
            known = history.count(KEPT, BUG, HOUR, NOW)
            assert 0 < known < added
            assert os.listdir(fd) == [NAME]
            subprocess.run(["mount", "-o", "remount,size=1M", mounted], check=True, timeout=60)
            history.add(KEPT, OTHER, HOUR, NOW)
            assert history.count(KEPT, OTHER, HOUR, NOW) == 1
        finally:
            os.close(fd)
    finally:
        subprocess.run(["umount", mounted], check=True, timeout=60)


def test_many_workers(tmp_path: Path) -> None:
    """Under the store's lock, none is lost."""
    Store(str(tmp_path / "store")).close()
    children = []
    for _ in range(4):
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                store = Store(str(tmp_path / "store"))
                for _ in range(50):
                    with store.locked():
                        History(store.directory).add(REFUSED, BUG, HOUR, NOW)
                code = 0
            finally:
                os._exit(code)
        children.append(pid)
    assert [os.waitpid(pid, 0)[1] for pid in children] == [0] * 4
    store = Store(str(tmp_path / "store"))
    try:
        assert History(store.directory).count(REFUSED, BUG, HOUR, NOW) == 200
    finally:
        store.close()
