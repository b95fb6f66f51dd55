"""The ledger: what it names is what has no record, whoever was killed when."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from forwarder import handled, ledger_command, proc_events
from forwarder import ledger as ledgers
from forwarder.crash import Crash as Crashed
from forwarder.crash import parse
from forwarder.ledger import Book, Contents, Crash, LedgerError, Note, Notes, Watcher, judge, parse_notes, read_book
from forwarder.proc_events import Dump, ProcEvents
from tests.support.containers import Host, PlainContainer
from tests.support.crash import crash, start_crash
from tests.support.machine import exclusive, why_unavailable
from tests.support.mounts import CHECKOUT
from tests.support.receivers import BIN, forwarder_installed, list_records, resident
from tests.support.waiting import read_line, wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator

needs_kernel = pytest.mark.skipif(why_unavailable() is not None, reason=str(why_unavailable()))
# Every crash is the same here, and each shall be kept.
EACH = {"CORE_PIPE_SAME_MAX": "off", "CORE_PIPE_LOOP_MAX": "off", "CORE_PIPE_STORE_MAX": "off"}
SETTLE = 3.0


class Watching:
    """A watcher in a thread of this process, with a book of its own."""

    def __init__(self, directory: Path, **settings: Any) -> None:
        self.book = str(directory / "ledger")
        self._wake = os.pipe()
        self.events = ProcEvents()
        self.watcher = Watcher(self.events, Book(self.book), Notes(), settle_seconds=SETTLE, **settings)
        self._thread = threading.Thread(target=self.watcher.run, args=(self._wake[0],))
        self._thread.start()

    @property
    def contents(self) -> Contents:
        return self.watcher.contents

    def settled(self, pids: set[int], timeout: float = 60) -> dict[int, Crash]:
        """Wait until all of these are settled; return those of them that are named."""

        def done() -> bool:
            return not pids & {crash.pid for crash in list(self.contents.open.values())}

        wait_until(done, timeout, "the ledger has settled")
        return {crash.pid: crash for crash in list(self.contents.named.values()) if crash.pid in pids}

    def stop(self) -> None:
        os.write(self._wake[1], b"x")
        self._thread.join(20)
        assert not self._thread.is_alive()
        self.watcher.book.close()
        self.watcher.notes.close()
        self.events.close()
        for fd in self._wake:
            os.close(fd)


@contextlib.contextmanager
def watching(directory: Path, **settings: Any) -> Iterator[Watching]:
    found = Watching(directory, **settings)
    try:
        yield found
    finally:
        found.stop()


def stub_of(pid: int) -> int | None:
    """The stub that works on the crash of a process."""
    for name in os.listdir("/proc"):
        if name.isdigit():
            with contextlib.suppress(OSError):
                words = Path(f"/proc/{name}/cmdline").read_bytes().split(b"\0")
                if b"v=1" in words and b"P=%d" % pid in words:
                    return int(name)
    return None


class Killer(threading.Thread):
    """Kills stubs at random moments of their work: half of them, within some milliseconds of the dump's beginning."""

    def __init__(self, pids: set[int], seed: int) -> None:
        super().__init__()
        self.killed: set[int] = set()
        self._pids = pids
        self._random = random.Random(seed)
        self._over = threading.Event()

    def run(self) -> None:
        due: list[tuple[float, int]] = []
        with ProcEvents() as events:
            while not self._over.is_set():
                while (event := events.read()) is not None:
                    if isinstance(event, Dump) and event.pid in self._pids and self._random.random() < 0.6:
                        due.append((time.monotonic() + self._random.uniform(0, 0.06), event.pid))
                for when, pid in list(due):
                    if when <= time.monotonic():
                        due.remove((when, pid))
                        self._kill(pid)
                self._over.wait(0.001)

    def _kill(self, pid: int) -> None:
        stub = stub_of(pid)
        if stub is None:
            return
        with contextlib.suppress(ProcessLookupError):
            pidfd = os.pidfd_open(stub)
            try:
                if stub_of(pid) == stub:
                    signal.pidfd_send_signal(pidfd, signal.SIGKILL)
                    self.killed.add(pid)
            finally:
                os.close(pidfd)

    def stop(self) -> None:
        self._over.set()
        self.join(20)


@pytest.mark.kernel
@needs_kernel
def test_exactly_those_without_a_record_are_named(tmp_path: Path) -> None:
    """300 crashes, and stubs that are killed at random points of their work."""
    seed = random.randrange(1 << 30)
    print("seed", seed)
    pids: set[int] = set()
    with (
        forwarder_installed() as forwarder,
        PlainContainer() as container,
        resident(container, env=EACH),
        watching(tmp_path) as ledger,
    ):
        killer = Killer(pids, seed)
        killer.start()

        def one(_: int) -> tuple[int, int]:
            with start_crash(container, "SEGV", "--wait") as crashing:
                pids.add(crashing.host_pid)
                crashing.go()
                found = crashing.result()
                return found.host_pid, found.pid

        try:
            with ThreadPoolExecutor(6) as pool:
                inside = dict(pool.map(one, range(300)))
        finally:
            killer.stop()
        named = ledger.settled(pids)
        recorded = {record["pid"]: record for record in list_records(container)}
        hosts = {record["pid"] for record in forwarder.records()}
        without = {pid for pid in pids if inside[pid] not in recorded and pid not in hosts}
        print(f"{len(killer.killed)} killed, {len(without)} without a record, {len(named)} named")
        assert without <= set(named)
        # A receiver that had an offer and could not answer it has left a record of that, and no core.
        for pid in set(named) - without:
            assert "that it had asked" in named[pid].why
            assert recorded[inside[pid]]["core"]["state"] == "none"
            assert "the core could not be kept" in recorded[inside[pid]]["core"]["reason"]
        assert {crash.state for crash in named.values()} == {"lost"}
        assert without
        # Whoever is not named has its core, but for those killed between the receiver's answer and the passing.
        kept = [
            pid for pid in pids - set(named) if recorded.get(inside[pid], {"core": {}})["core"].get("state") != "none"
        ]
        assert len(kept) + len(named) > 290


def failing_handler(directory: Path) -> str:
    """A core_pattern like ours, whose handler takes its time and does nothing: each crash is lost."""
    stub = directory / "stub.py"
    stub.write_text("#!/bin/sh\nexec sleep 0.5\n", encoding="ascii")
    stub.chmod(0o755)
    return f"|{stub} v=1"


def script(book: str) -> list[str]:
    """A watcher as a process of its own."""
    code = (
        "import os\n"
        "from forwarder.ledger import Book, Notes, Watcher\n"
        "from forwarder.proc_events import ProcEvents\n"
        f"watcher = Watcher(ProcEvents(), Book({book!r}), Notes(), settle_seconds={SETTLE})\n"
        "print('ready', flush=True)\n"
        "watcher.run(0)\n"
    )
    return [sys.executable, "-c", code]


@contextlib.contextmanager
def watching_apart(book: str) -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen(script(book), cwd=CHECKOUT, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None
        assert read_line(process.stdout.fileno(), 20, "the watcher listens") == b"ready\n"
        yield process
    finally:
        process.kill()
        process.communicate(timeout=20)


@pytest.mark.kernel
@needs_kernel
def test_a_watcher_that_is_killed_again_and_again(tmp_path: Path) -> None:
    """What it had seen is not forgotten, what it did not see is not called fine."""
    book = str(tmp_path / "ledger")
    lost: set[int] = set()
    with exclusive() as machine, Host() as host:
        machine.core_pattern = failing_handler(tmp_path)
        for _ in range(3):
            with watching_apart(book) as watcher:
                pid = crash(host, "SEGV").host_pid
                wait_until(lambda pid=pid: pid in {one.pid for one in every(read_book(book))}, 20, "it is in the book")  # type: ignore[misc]
                lost.add(pid)
                watcher.send_signal(signal.SIGKILL)
                watcher.wait(20)
            crash(host, "SEGV")
        found = ledgers.ledger(book)
        assert {one.pid for one in found.lost} == lost, found.as_json()
        assert not found.watched
        assert [gap.why for gap in found.gaps] == ["the ledger did not watch"] * 2 + ["the ledger does not watch"]
        with watching_apart(book):
            found = wait_until(
                lambda: None if ledgers.ledger(book).pending else ledgers.ledger(book), 20, "all is settled"
            )
            assert found.watched
            assert {one.pid for one in found.lost} == lost
            assert len(found.gaps) == 3
            assert found.as_json() == json.dumps(json.loads(found.as_json()), indent=2)


def every(contents: Contents) -> list[Crash]:
    return [*contents.open.values(), *contents.named.values()]


@pytest.mark.kernel
@needs_kernel
def test_what_the_kernel_makes_no_core_of_is_not_lost(tmp_path: Path) -> None:
    with exclusive() as machine, Host() as host, watching(tmp_path) as ledger:
        machine.core_pattern = failing_handler(tmp_path)
        name = b'\xff\x1b[2J)\n{"a":'
        lost = crash(host, "SEGV", "--comm", name).host_pid
        limited = crash(host, "SEGV", "--core-limit", "1").host_pid
        hidden = crash(host, "SEGV", "--dumpable", "0").host_pid
        # A handler that cannot be started ends as soon.
        machine.core_pattern = "|/nonexistent/stub.py v=1"
        unhandled = crash(host, "SEGV").host_pid

        def known() -> int:
            found = ledger.contents
            return found.counts["unwanted"] + len(found.named) + len(found.open)

        # It looks at the pattern of the moment, so that has to stand until it has looked.
        wait_until(lambda: known() >= 4, 20, "it has heard of all four")
        machine.core_pattern = "/nonexistent/core"
        other = crash(host, "SEGV").host_pid
        wait_until(lambda: ledger.contents.counts["elsewhere"] >= 1, 20, "it has heard of the last")
        named = ledger.settled({lost, limited, hidden, unhandled, other})
        assert named[lost].comm.startswith("\\xff\x1b[2J)")
        assert named[lost].signal == signal.SIGSEGV
        assert named[lost].state == "lost"
        # One that is not dumpable may be gone before anybody can look.
        others = {pid: one for pid, one in named.items() if pid not in (lost, unhandled)}
        assert {one.state for one in others.values()} <= {"unclear"}, others
        assert unhandled in named
        assert other not in named
        assert ledger.contents.counts["unwanted"] + len(named) >= 4
        shown = "\n".join(ledger_command.lines(ledgers.ledger(ledger.book)))
        assert "\x1b" not in shown
        assert str(lost) in shown


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to enter namespaces: sudo .venv/bin/python -m pytest")
@pytest.mark.parametrize("namespaces", [["--net"], ["--pid", "--fork", "--mount-proc"], ["--user", "--map-root-user"]])
def test_elsewhere_it_says_so(namespaces: list[str]) -> None:
    done = subprocess.run(
        ["unshare", *namespaces, f"{BIN}/core-pipe-forwarder", "ledger", "--watch"],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == ledger_command.EX_UNAVAILABLE, done.stderr
    assert "Traceback" not in done.stderr


def test_pyroute2_is_nobodys_but_the_watchers() -> None:
    program = "import sys, forwarder.cli, forwarder.ledger, forwarder.stub; print('pyroute2' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=CHECKOUT)
    assert done.stdout == "False\n"


@given(data=st.binary(max_size=120))
def test_any_datagram(data: bytes) -> None:
    proc_events.parse(data)


@given(data=st.binary(max_size=300) | st.text("0123456789 -takencordu\n", max_size=300).map(str.encode))
def test_any_notes(data: bytes) -> None:
    for note in parse_notes(data):
        assert note.state in handled.STATES


@given(
    data=st.binary(max_size=300) | st.recursive(st.none() | st.text(), st.lists).map(lambda x: json.dumps(x).encode())
)
def test_any_book(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "any"
    path.write_bytes(b'{"what":"since","at":7}\n' + data)
    assert read_book(str(path)).since == 7


def crashed(pid: int = 40, pidfd: int = -1) -> Crashed:
    found = Crashed(parse(["v=1", f"P={pid}", "s=11", "t=1"]))
    found.pidfd = pidfd
    found.key = "!docker!1"
    return found


def a_crash(**values: Any) -> Crash:
    return Crash(**{"boot": "b", "began": 100, "at": 1.0, "pid": 40, "tid": 40, "seen": True, "status": 0x8B, **values})


def test_what_is_noted_is_read(tmp_path: Path) -> None:
    path, store = str(tmp_path / "run" / "handled"), tmp_path / "store"
    store.mkdir()
    pidfd = os.pidfd_open(os.getppid())
    try:
        handled.note({"store": os.fsencode(store)}, crashed(pidfd=pidfd), None, path)
        inode = handled.inode_of(pidfd)
    finally:
        os.close(pidfd)
    reason = "no receiver\ntook it \x1b"
    handled.note({"store": os.fsencode(store)}, crashed(41), reason, path)
    (store / "20261122T221353-271828-41-00719258.json").touch()
    handled.note({"store": os.fsencode(store)}, crashed(41), reason, path)
    handled.note({"store": os.fsencode(store)}, None, reason, path)
    taken, unrecorded, recorded = parse_notes(Path(path).read_bytes())
    assert (taken.pid, taken.inode, taken.state, taken.key) == (40, inode, "taken", "!docker!1")
    assert (unrecorded.state, recorded.state) == ("unrecorded", "recorded")
    assert recorded.record == "20261122T221353-271828-41-00719258"
    assert recorded.reason.isprintable()


def test_a_note_that_cannot_be_written_harms_nobody(tmp_path: Path) -> None:
    handled.note({}, crashed(), None, "/dev/full")
    handled.note({}, crashed(), None, "/proc/nonexistent/handled")
    full = tmp_path / "handled"
    with full.open("wb") as file:
        file.truncate(handled.MAX_NOTES)
    handled.note({}, crashed(), None, str(full))
    assert full.stat().st_size == handled.MAX_NOTES


def note_line(at: int, state: str, inode: int = 0, pid: int = 40) -> bytes:
    return f"\n{at} {pid} {inode} {state} k - -\n".encode()


def test_a_number_that_came_again(tmp_path: Path) -> None:
    path = tmp_path / "handled"
    path.write_bytes(
        note_line(150, "accepted", 7) + b"\n150 40 7 acc" + note_line(160, "taken", 7) + note_line(50, "taken")
    )
    notes = Notes(str(path))
    notes.read(turn=True)
    # Another process, and one that began after the note.
    assert notes.claim(a_crash(inode=8, began=200)) is None
    found = notes.claim(a_crash(inode=7))
    assert found is not None
    assert found.state == "taken"
    assert notes.claim(a_crash(inode=7)) is None
    assert notes.claim(a_crash()) is None
    with path.open("ab") as file:
        file.write(note_line(170, "accepted", 9))
    notes.read(turn=True)
    assert notes.claim(a_crash(inode=9), final=True) is None
    notes.forget(10**6, but={40})
    assert notes.claim(a_crash(inode=9)) is not None
    notes.close()


def test_notes_are_turned_over_and_none_is_lost(tmp_path: Path) -> None:
    path = tmp_path / "handled"
    notes = Notes(str(path))
    late = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.write(late, b"\n" * ledgers.TURN_NOTES + note_line(1, "taken", 1))
    notes.read(turn=True)
    assert not path.exists()
    # Who had opened it before writes on.
    os.write(late, note_line(2, "taken", 2))
    os.close(late)
    path.write_bytes(note_line(3, "taken", 3))
    notes.read(turn=True)
    assert all(notes.claim(a_crash(inode=inode)) for inode in (1, 2, 3))
    notes.close()


@pytest.mark.parametrize(
    ("values", "note", "state"),
    [
        ({}, None, "lost"),
        ({}, "asked", "lost"),
        ({}, "accepted", "handled"),
        ({}, "taken", "handled"),
        ({}, "recorded", "handled"),
        ({}, "unrecorded", "lost"),
        ({"ours": False}, None, "elsewhere"),
        ({"status": 11, "core_limit": 1}, None, "unwanted"),
        ({"status": 11, "skipped": True}, None, "unwanted"),
        ({"status": 11}, None, "lost"),
        ({"status": 11, "seen": False}, None, "unclear"),
        ({"seen": False}, None, "lost"),
        ({"status": -1}, None, "lost"),
        ({"boot": "another"}, None, "unclear"),
    ],
)
def test_judgement(values: dict[str, Any], note: str | None, state: str) -> None:
    said = None if note is None else Note(150, 40, 0, note, "k", "-", "full")
    assert judge(a_crash(**values), said, "b")[0] == state


def test_a_book_that_was_torn(tmp_path: Path) -> None:
    path = str(tmp_path / "ledger")
    book = Book(path)
    assert book.open()[1] is None
    book.write("since", at=5.0)
    book.write("crash", **asdict(a_crash(comm="\n\x1b\udcff")))
    with pytest.raises(LedgerError):
        Book(path).open()
    book.close()
    with Path(path).open("ab") as file:
        file.write(b'{"what":"crash","pid":')
    book = Book(path)
    contents, last = book.open()
    assert last is not None
    assert (contents.since, len(contents.open)) == (5.0, 1)
    # The disk is full for a while.
    real, book._fd = book._fd, os.open("/dev/full", os.O_WRONLY)
    book.write("crash", **asdict(a_crash(pid=41, state="lost")))
    os.close(book._fd)
    book._fd = real
    book.write("crash", **asdict(a_crash(pid=42, state="handled")))
    contents = read_book(path)
    assert [one.pid for one in every(contents)] == [40, 41]
    assert contents.counts["handled"] == 1
    book.rewrite(contents)
    assert read_book(path) == contents
    book.close()


def test_a_book_has_bounds() -> None:
    contents = Contents()
    for number in range(ledgers.MAX_LOST + 10):
        ledgers.enter(contents, a_crash(began=number, state="lost"))
        ledgers.add_gap(contents, ledgers.Gap(number, number, "why"))
    assert (len(contents.named), contents.forgotten, len(contents.gaps)) == (ledgers.MAX_LOST, 10, ledgers.MAX_GAPS)


def test_times() -> None:
    assert ledger_command._moment("1970-01-01T00:00:07Z") == 7
    assert abs(ledger_command._moment("2h") - (time.time() - 7200)) < 60
