"""The ledger: what it names is what has no record, whoever was killed when."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from forwarder import handled, ingress, install, ledger_command, ledger_unit, proc_events
from forwarder import ledger as ledgers
from forwarder.crash import Crash as Crashed
from forwarder.crash import parse
from forwarder.ledger import book as books
from forwarder.ledger import notes as noted
from forwarder.ledger import stores
from forwarder.ledger.book import Book, Contents, Crash, LedgerError, read_book
from forwarder.ledger.judge import judge
from forwarder.ledger.notes import Note, Notes, parse_notes
from forwarder.ledger.watch import Watcher
from forwarder.proc_events import Dump, ProcEvents
from forwarder.quota.events import NETLINK_GENERIC, kernel_tells
from forwarder.staging import InstallError
from forwarder.status import status
from tests.support import manager, processes
from tests.support.containers import Host, PlainContainer
from tests.support.crash import crash, start_crash
from tests.support.machine import exclusive, why_unavailable
from tests.support.mounts import CHECKOUT
from tests.support.receivers import (
    BIN,
    INGRESSES,
    Forwarder,
    fake_receiver,
    forwarder_installed,
    list_records,
    resident,
    wait_for_records,
)
from tests.support.waiting import read_line, wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator

needs_kernel = pytest.mark.skipif(why_unavailable() is not None, reason=str(why_unavailable()))
# Every crash is the same here, and each shall be kept.
EACH = {"CORE_PIPE_SAME_MAX": "off", "CORE_PIPE_LOOP_MAX": "off", "CORE_PIPE_STORE_MAX": "off"}
SETTLE = 3.0
# From then on a receiver that was asked has a record or none; here it has little else to do.
ASKED = 8.0


class Watching:
    """A watcher in a thread of this process, with a book of its own."""

    def __init__(self, directory: Path, **settings: Any) -> None:
        self.book = str(directory / "ledger")
        self._wake = os.pipe()
        self.events = ProcEvents()
        self.watcher = Watcher(
            self.events, Book(self.book), Notes(), settle_seconds=SETTLE, asked_seconds=ASKED, **settings
        )
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


def handler_of(pid: int, forwarder: Forwarder) -> int | None:
    """The process that works on the crash of a process: a stub, or a child of the socket's service."""
    if forwarder.service is None:
        for name in os.listdir("/proc"):
            if name.isdigit():
                with contextlib.suppress(OSError):
                    words = Path(f"/proc/{name}/cmdline").read_bytes().split(b"\0")
                    if b"v=1" in words and b"P=%d" % pid in words:
                        return int(name)
        return None
    for child in processes.children(forwarder.service.pid):
        with contextlib.suppress(OSError):
            for fd in os.listdir(f"/proc/{child}/fdinfo"):
                # The kernel's pidfd.
                if f"\nPid:\t{pid}\n" in Path(f"/proc/{child}/fdinfo/{fd}").read_text(encoding="ascii"):
                    return child
    return None


class Killer(threading.Thread):
    """Kills handlers at random moments of their work: half of them, some milliseconds after the dump's beginning."""

    def __init__(self, pids: set[int], seed: int, forwarder: Forwarder) -> None:
        super().__init__()
        self.killed: set[int] = set()
        self._pids = pids
        self._random = random.Random(seed)
        self._over = threading.Event()
        self._forwarder = forwarder
        # From the dump's beginning to the end of a handler's work, on a quiet machine and on a busy one.
        self._longest = (0.015, 0.06)

    def run(self) -> None:
        due: list[tuple[float, int]] = []
        with ProcEvents() as events:
            while not self._over.is_set():
                while (event := events.read()) is not None:
                    if isinstance(event, Dump) and event.pid in self._pids and self._random.random() < 0.6:
                        due.append(
                            (time.monotonic() + self._random.uniform(0, self._random.choice(self._longest)), event.pid)
                        )
                for when, pid in list(due):
                    if when <= time.monotonic():
                        due.remove((when, pid))
                        self._kill(pid)
                self._over.wait(0.001)

    def _kill(self, pid: int) -> None:
        handler = handler_of(pid, self._forwarder)
        if handler is None:
            return
        with contextlib.suppress(ProcessLookupError):
            pidfd = os.pidfd_open(handler)
            try:
                if handler_of(pid, self._forwarder) == handler:
                    signal.pidfd_send_signal(pidfd, signal.SIGKILL)
                    self.killed.add(pid)
            finally:
                os.close(pidfd)

    def stop(self) -> None:
        self._over.set()
        self.join(20)


@pytest.mark.kernel
@needs_kernel
@pytest.mark.parametrize("ingress", INGRESSES)
def test_exactly_those_without_a_record_are_named(tmp_path: Path, ingress: str) -> None:
    """300 crashes, and handlers that are killed at random points of their work."""
    seed = random.randrange(1 << 30)
    print("seed", seed)
    pids: set[int] = set()
    with (
        forwarder_installed(ingress) as forwarder,
        PlainContainer() as container,
        resident(container, env=EACH) as receiver,
        watching(tmp_path, store=forwarder.store) as ledger,
    ):
        killer = Killer(pids, seed, forwarder)
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
        # It ends what it has begun: then all the records there will ever be are there.
        assert receiver.stop() == 0
        recorded = {record["pid"] for record in list_records(container)}
        hosts = {record["pid"] for record in forwarder.records()}
        without = {pid for pid in pids if inside[pid] not in recorded and pid not in hosts}
        asked = sum("while it asked" in crash.why for crash in named.values())
        rescued = {
            pid for pid in killer.killed - set(named) if (notes := last_notes(pid)) and notes[-1] in handled.ON_THE_WAY
        }
        print(
            f"{len(killer.killed)} killed, {len(without)} without a record, {len(named)} named, {asked} of them while "
            f"a receiver was asked; {len(rescued)} killed on the way have a record"
        )
        states = {pid: crash.state for pid, crash in named.items()}
        print([(crash, last_notes(pid), pid in without) for pid, crash in named.items() if crash.state != "lost"])
        # One whose handler was killed at once may be over before it could be looked at: it might have been one that the
        # kernel makes no core of. It is named all the same.
        assert set(states.values()) <= {"lost", "unclear"}
        assert all(states[pid] == "lost" or not named[pid].seen for pid in states)
        assert list(states.values()).count("lost") > len(states) / 2
        assert set(named) == without
        assert without <= killer.killed
        # Both kinds of death were among them, or this shows little.
        assert without
        assert rescued
        assert ledger.contents.counts["handled"] >= 300 - len(without)


def last_notes(pid: int) -> list[str]:
    """The states that were noted of a process."""
    data = b"".join(path.read_bytes() for path in (Path(f"{handled.NOTES}.1"), Path(handled.NOTES)) if path.exists())
    return [note.state for note in parse_notes(data) if note.pid == pid]


@pytest.mark.kernel
@needs_kernel
@pytest.mark.parametrize("ingress", INGRESSES)
@pytest.mark.parametrize("mode", ["silent", "stop"])
def test_a_receiver_whose_store_cannot_be_seen(tmp_path: Path, ingress: str, mode: str) -> None:
    """It had been asked, or had the core, when the handler was killed: that is no lost crash, and no good end."""
    with (
        forwarder_installed(ingress) as forwarder,
        PlainContainer() as container,
        fake_receiver(container, mode),
        watching(tmp_path, store=forwarder.store) as ledger,
        start_crash(container, "SEGV", "--wait") as crashing,
    ):
        crashing.go()
        pid = crashing.host_pid
        wanted = "asked" if mode == "silent" else "accepted"
        wait_until(lambda: last_notes(pid)[-1:] == [wanted], 20, f"it is noted: {wanted}")
        handler = handler_of(pid, forwarder)
        assert handler is not None
        os.kill(handler, signal.SIGKILL)
        # A receiver that keeps the core would keep its process in the dump.
        crashing.kill()
        crashing.result()
        named = ledger.settled({pid})
        assert named[pid].state == "passed"
        assert ("had been asked" if mode == "silent" else "had accepted it") in named[pid].why
        shown = ledgers.ledger(ledger.book, store=forwarder.store)
        assert shown.lost == []


@pytest.mark.kernel
@needs_kernel
@pytest.mark.parametrize("ingress", INGRESSES)
def test_a_record_of_the_hosts_own_counts(tmp_path: Path, ingress: str) -> None:
    """The handler is killed after it has left a record on the host, and before it could note that."""
    with (
        forwarder_installed(ingress) as forwarder,
        PlainContainer() as container,
        watching(tmp_path, store=forwarder.store) as ledger,
        no_notes(),
    ):
        found = crash(container, "SEGV")
        wait_for_records(Host(), store=forwarder.store)
        assert Path(handled.NOTES).is_dir()
        assert ledger.settled({found.host_pid}) == {}
        assert ledger.contents.counts["handled"] == 1


@contextlib.contextmanager
def no_notes() -> Iterator[None]:
    """No note can be written: something else has the name."""
    path = Path(handled.NOTES)
    path.parent.mkdir(mode=0o700, exist_ok=True)
    aside = path.with_name("handled.aside")
    if path.exists():
        path.rename(aside)
    path.mkdir()
    try:
        yield
    finally:
        path.rmdir()
        if aside.exists():
            aside.rename(path)


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
        "from forwarder.ledger.book import Book\n"
        "from forwarder.ledger.notes import Notes\n"
        "from forwarder.ledger.watch import Watcher\n"
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


@contextlib.contextmanager
def inaccessible_nodes() -> Iterator[None]:
    """What systemd as pid 1 has ready, to be mounted over what a service must not reach."""
    directory = Path("/run/systemd/inaccessible")
    with contextlib.ExitStack() as stack:
        if not directory.exists():
            directory.mkdir(parents=True)
            stack.callback(shutil.rmtree, directory)
            (directory / "dir").mkdir(mode=0)
            for name, kind in {"reg": stat.S_IFREG, "sock": stat.S_IFSOCK, "fifo": stat.S_IFIFO}.items():
                os.mknod(directory / name, kind)
        yield


def joined_groups(pid: int, protocol: int) -> int:
    """How many of a process's netlink sockets listen to a group."""
    sockets = set()
    for fd in os.listdir(f"/proc/{pid}/fd"):
        with contextlib.suppress(OSError):
            sockets.add(os.readlink(f"/proc/{pid}/fd/{fd}"))
    # sk Eth Pid Groups Rmem Wmem Dump Locks Drops Inode
    rows = [line.split() for line in Path(f"/proc/{pid}/net/netlink").read_text(encoding="ascii").splitlines()[1:]]
    return sum(int(row[1]) == protocol and int(row[3], 16) != 0 and f"socket:[{row[9]}]" in sockets for row in rows)


@pytest.mark.system
@needs_kernel
@pytest.mark.skipif(manager.why_unavailable() is not None, reason=str(manager.why_unavailable()))
def test_the_service_under_systemd(tmp_path: Path) -> None:
    """With its sandbox, by a real systemd: it becomes ready, is watched over, and its book survives what happens."""
    unit = ledger_unit.UNIT
    # A place in the read-only /var has to stand already.
    Path(books.BOOK).parent.mkdir(exist_ok=True)
    with (
        exclusive() as machine,
        Host() as host,
        inaccessible_nodes(),
        manager.Manager() as systemd,
        tempfile.TemporaryDirectory(dir="/run", prefix="core_pipe-tests-") as state,
    ):
        book = Path(state, "ledger")
        machine.core_pattern = failing_handler(tmp_path)
        text = Path(CHECKOUT, "systemd", unit).read_text(encoding="ascii")
        # (A virtual machine may look like a container to it.)
        text = text.replace("/usr/bin/core-pipe-forwarder", f"{BIN}/core-pipe-forwarder").replace("ConditionV", "#")
        (systemd.units / unit).write_text(text, encoding="ascii")
        systemd.drop_in(
            unit,
            [
                "[Service]",
                # root's own manager has other places for StateDirectory= and RuntimeDirectory=.
                # Its socket for sd_notify(3) is below /tmp.
                "InaccessiblePaths=",
                "StateDirectory=",
                "RuntimeDirectory=",
                f"BindPaths={state}:{os.path.dirname(books.BOOK)} {handled.DIRECTORY}",
                # To see the watchdog being fed takes two of its rounds.
                "WatchdogSec=15s",
                "RestartSec=100ms",
            ],
        )
        Path(handled.DIRECTORY).mkdir(mode=0o700, exist_ok=True)
        systemd.systemctl("daemon-reload")
        # Type=notify: it comes back when the watcher has said that it listens.
        systemd.systemctl("start", unit)
        sandboxed = systemd.main_pid(unit)
        assert processes.namespace(sandboxed, "mnt") != processes.namespace("self", "mnt")
        status = Path(f"/proc/{sandboxed}/status").read_text(encoding="ascii")
        assert "Seccomp:\t2" in status
        assert "NoNewPrivs:\t1" in status
        # The sandbox lets it hear of quotas, too.
        assert not kernel_tells() or joined_groups(sandboxed, NETLINK_GENERIC) == 1
        fed = systemd.show(unit, "WatchdogTimestampMonotonic")

        def lost() -> set[int]:
            return {one.pid for one in ledgers.ledger(str(book)).lost}

        crashed = {crash(host, "SEGV", "--comm", "first").host_pid}
        found = wait_until(lambda: ledgers.ledger(str(book)) if lost() == crashed else None, 40, "it is named")
        assert found.watched
        # It could look at the process.
        assert [(one.comm, one.uid, one.signal) for one in found.lost] == [("first", 0, signal.SIGSEGV)]
        wait_until(lambda: systemd.show(unit, "WatchdogTimestampMonotonic") != fed, 30, "the watchdog is fed again")

        # And into a container's store, of whose receiver a handler has said that it was asked.
        with PlainContainer() as container:
            other = crash(container, "SEGV")
            stamp = time.strftime("%Y%m%dT%H%M%S", time.gmtime())
            name = f"/var/lib/core_pipe/{stamp}-000000-{other.pid}-0123abcd.json"
            container.run(["sh", "-c", f"mkdir /var/lib/core_pipe && touch {name}"], check=True)
            with Path(handled.NOTES).open("a", encoding="ascii") as file:
                pids = f"{other.host_pid} {other.pid}"
                file.write(
                    f"\n{time.monotonic_ns()} {other.host_pid} 0 asked key {container.init_pid} {pids}\n",
                )
            wait_until(lambda: ledgers.ledger(str(book)).counts["handled"] == 1, 40, "its record is seen")

        systemd.systemctl("restart", unit)
        systemd.systemctl("kill", "--signal=KILL", unit)
        wait_until(lambda: systemd.main_pid(unit) and ledgers.ledger(str(book)).watched, 30, "it is started again")
        crashed.add(crash(host, "SEGV").host_pid)
        wait_until(lambda: lost() == crashed, 40, "both are named")
        assert len(ledgers.ledger(str(book)).gaps) == 2
        systemd.systemctl("stop", unit)
        assert systemd.show(unit, "Result") == "success"
        assert not ledgers.ledger(str(book)).watched
    with contextlib.suppress(OSError):
        # Unless there is something in it.
        Path(books.BOOK).parent.rmdir()


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="needs systemd-analyze. Run: apt install systemd")
def test_the_unit_is_one(tmp_path: Path) -> None:
    text = Path(CHECKOUT, "systemd", ledger_unit.UNIT).read_text(encoding="ascii")
    unit = tmp_path / ledger_unit.UNIT
    unit.write_text(text.replace("/usr/bin/core-pipe-forwarder", f"{BIN}/core-pipe-forwarder"), encoding="ascii")
    for arguments in (["verify", "--man=no"], ["security", "--offline=true", "--threshold=25", "--no-pager"]):
        done = subprocess.run(
            ["systemd-analyze", *arguments, str(unit)], capture_output=True, text=True, check=False, timeout=60
        )
        assert done.returncode == 0, done.stdout + done.stderr
        assert [line for line in done.stderr.splitlines() if "core_pipe" in line] == []


@needs_kernel
@pytest.mark.parametrize("runtime", [False, True])
def test_the_unit_comes_and_goes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, runtime: bool) -> None:
    paths = install.Paths(prefix=str(tmp_path))
    asked: list[str] = []
    kind = "run" if runtime else "etc"
    unit = tmp_path / kind / "systemd/system" / ledger_unit.UNIT
    (said,) = ledger_unit.set_up(paths, runtime=runtime)
    assert "core-pipe-forwarder ledger --watch" in said
    assert not unit.exists()
    assert ledger_unit.take_down(paths) == []

    monkeypatch.setattr(ingress, "systemd_keeps", lambda _paths: True)
    monkeypatch.setattr(ingress, "_systemctl", lambda *words: asked.append(" ".join(words)))
    # What the other kind left goes.
    ledger_unit.set_up(paths, runtime=not runtime)
    asked.clear()
    ledger_unit.set_up(paths, runtime=runtime)
    assert ledger_unit.unit_files(paths) == [str(unit)]
    enabled = [] if runtime else [f"enable {ledger_unit.UNIT}"]
    assert asked[-2 - len(enabled) :] == ["daemon-reload", *enabled, f"start {ledger_unit.UNIT}"]
    assert f"ExecStart={sys.prefix}/bin/core-pipe-forwarder ledger --watch\n" in unit.read_text(encoding="ascii")
    problems = [problem.what for problem in status(paths).problems]
    assert [ledger_unit.UNIT in what for what in problems].count(True) == 1

    assert ledger_unit.take_down(paths) == [f"removed {unit}"]
    assert asked[-2:] == [f"disable --now {ledger_unit.UNIT}", "daemon-reload"]
    assert not unit.exists()

    def fail(*words: str) -> None:
        raise InstallError(f"systemctl {words[0]} failed", "see journalctl -xe")

    # It is on no crash's way: the installation goes on.
    monkeypatch.setattr(ingress, "_systemctl", fail)
    (said,) = ledger_unit.set_up(paths, runtime=runtime)
    assert said.startswith("the ledger does not watch: systemctl")


def test_the_line_in_status(tmp_path: Path) -> None:
    path = str(tmp_path / "ledger")
    assert ledger_command.in_short(ledgers.summary(path)) == "not watching"
    book = Book(path)
    book.open()
    book.write("since", at=5.0)
    for pid, state in enumerate(("lost", "lost", "passed", "unclear", "handled")):
        book.write("crash", **asdict(a_crash(pid=pid, state=state)))
    found = ledgers.summary(path)
    assert (found.watched, found.since, found.lost, found.passed, found.unclear) == (True, 5.0, 2, 1, 1)
    assert ledger_command.in_short(found) == "watching; 2 lost since 1970-01-01 00:00:05 UTC"
    book.close()
    assert ledger_command.in_short(ledgers.summary(path)) == "not watching; 2 lost since 1970-01-01 00:00:05 UTC"
    assert ledger_command.in_short(ledgers.Summary()) == "not known: ask as root"


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
    program = "import sys, forwarder.cli, forwarder.ledger.watch, forwarder.stub; print('pyroute2' in sys.modules)"
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
    assert notes.of(a_crash(inode=8, began=200)) == []
    found = notes.of(a_crash(inode=7))
    assert [note.state for note in found] == ["accepted", "taken"]
    notes.drop(found)
    assert notes.of(a_crash(inode=7)) == []
    assert notes.of(a_crash()) == []
    with path.open("ab") as file:
        file.write(note_line(170, "accepted", 9))
        # Of a kernel that has no inodes: two processes, one after the other.
        file.write(note_line(180, "asked") + note_line(190, "taken") + note_line(200, "asked"))
    notes.read(turn=True)
    assert [note.state for note in notes.of(a_crash(began=175))] == ["asked", "taken"]
    assert [note.state for note in notes.of(a_crash(began=195))] == ["asked"]
    notes.forget(10**6, but={40})
    assert notes.of(a_crash(inode=9))
    notes.forget(10**6, but=())
    assert notes.of(a_crash(inode=9)) == []
    notes.close()


def test_notes_are_turned_over_and_none_is_lost(tmp_path: Path) -> None:
    path = tmp_path / "handled"
    notes = Notes(str(path))
    late = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.write(late, b"\n" * noted.TURN_NOTES + note_line(1, "taken", 1))
    notes.read(turn=True)
    assert not path.exists()
    # Who had opened it before writes on.
    os.write(late, note_line(2, "taken", 2))
    os.close(late)
    path.write_bytes(note_line(3, "taken", 3))
    notes.read(turn=True)
    assert all(notes.of(a_crash(inode=inode)) for inode in (1, 2, 3))
    notes.close()


@pytest.mark.parametrize(
    ("values", "noted", "receivers", "hosts", "state"),
    [
        ({}, "", "unseen", "nothing", "lost"),
        ({}, "", "unseen", "found", "handled"),
        ({}, "", "unseen", "unseen", "unclear"),
        ({}, "asked", "nothing", "nothing", "lost"),
        ({}, "asked", "unseen", "nothing", "passed"),
        ({}, "asked", "found", "nothing", "handled"),
        ({}, "asked", "nothing", "found", "handled"),
        ({}, "asked", "nothing", "unseen", "passed"),
        ({}, "asked accepted", "found", "nothing", "handled"),
        ({}, "asked accepted", "nothing", "nothing", "passed"),
        ({}, "asked accepted", "unseen", "nothing", "passed"),
        ({}, "asked accepted taken", "unseen", "unseen", "handled"),
        ({}, "asked recorded", "unseen", "unseen", "handled"),
        ({}, "unrecorded", "unseen", "nothing", "lost"),
        ({}, "asked unrecorded", "unseen", "nothing", "lost"),
        ({}, "asked accepted unrecorded", "unseen", "nothing", "passed"),
        ({}, "asked accepted unrecorded", "nothing", "nothing", "lost"),
        ({}, "asked accepted unrecorded", "found", "nothing", "handled"),
        ({"ours": False}, "", "unseen", "nothing", "elsewhere"),
        ({"status": 11, "core_limit": 1}, "", "unseen", "nothing", "unwanted"),
        # The kernel's socket does not ask for it.
        ({"status": 11, "core_limit": 1, "by_socket": True}, "", "unseen", "nothing", "lost"),
        ({"status": 11, "skipped": True}, "", "unseen", "nothing", "unwanted"),
        ({"status": 11}, "", "unseen", "nothing", "lost"),
        ({"status": 11, "seen": False}, "", "unseen", "nothing", "unclear"),
        ({"status": 11, "seen": False, "by_socket": True}, "", "unseen", "nothing", "unclear"),
        ({"seen": False}, "", "unseen", "nothing", "lost"),
        ({"status": -1}, "", "unseen", "nothing", "lost"),
        ({"boot": "another"}, "", "unseen", "nothing", "unclear"),
    ],
)
def test_judgement(values: dict[str, Any], noted: str, receivers: str, hosts: str, state: str) -> None:
    said = [Note(150, 40, 0, word, "k", "7", "full") for word in noted.split()]
    assert judge(a_crash(**values), said, "b", receivers=receivers, hosts=hosts)[0] == state


def test_which_record_is_whose() -> None:
    at = 1764000000.0
    crash = stores.wanted("4000 17", at)
    stamp = time.strftime("%Y%m%dT%H%M%S", time.gmtime(at))
    before = time.strftime("%Y%m%dT%H%M%S", time.gmtime(at - 60))

    def search(*names: str, depth: int = 1) -> str:
        (found,) = stores.search(names, [crash], depth)
        return found

    assert search() == "nothing"
    assert search(f"{stamp}-000000-17-0123abcd.json") == "found"
    # Its number on the host is another's in the container, and the other way round.
    assert search(f"{stamp}-000000-4000-0123abcd.json") == "nothing"
    assert search(f"{stamp}-000000-4000-0123abcd.json", depth=0) == "found"
    assert search(f"{stamp}-000000-17-0123abcd.json", depth=0) == "nothing"
    # A receiver that is deeper than the process does not see it.
    assert search(f"{stamp}-000000-17-0123abcd.json", depth=2) == "nothing"
    assert search(f"{stamp}-000000-0-0123abcd.json", depth=2) == "unseen"
    # One that is being written.
    assert search(f".{stamp}-000000-17-0123abcd.json") == "found"
    assert search(f"{before}-000000-17-0123abcd.json", f"{stamp}-000000-18-0123abcd.json") == "nothing"
    assert search(f"{stamp}-000000-17-0123abcd.core.zst", "\udcff\n", ".lock") == "nothing"
    # Whose process the receiver did not see.
    assert search(f"{stamp}-000000-0-0123abcd.json") == "unseen"
    assert search(f"{stamp}-000000-0-0123abcd.json", f"{stamp}-000000-17-0123abcd.json") == "found"


@pytest.mark.kernel
@needs_kernel
def test_what_a_container_may_show_for_its_store(tmp_path: Path) -> None:
    """Links lead nowhere, what is no store is not seen, and whoever hangs is left behind."""
    at = time.time()
    crash = stores.wanted("4000 17", at)
    name = time.strftime("%Y%m%dT%H%M%S-000000-17-0123abcd.json", time.gmtime(at))
    (tmp_path / name).touch()
    with PlainContainer() as container:
        noted = time.monotonic_ns()

        def look(listener: int = container.init_pid, when: int = noted) -> str:
            looking = stores.Look(listener, when, [crash], 20)
            (found,) = wait_until(looking.answers, 20, "it has looked")
            return str(found)

        def inside(*words: str) -> None:
            container.run(list(words), check=True)

        assert look() == "unseen"
        inside("ln", "-s", str(tmp_path), "/var/lib/core_pipe")
        assert look() == "unseen"
        inside("rm", "/var/lib/core_pipe")
        inside("mkdir", "/var/lib/core_pipe")
        assert look() == "nothing"
        inside("touch", f"/var/lib/core_pipe/{name}")
        assert look() == "found"
        # It was another process's number when that was noted.
        assert look(when=0) == "unseen"
        inside("sh", "-c", "mkdir -p /etc/core_pipe /srv/s && echo 'store = \"/srv/s\"' >/etc/core_pipe/receiver.toml")
        assert look() == "nothing"
        inside("sh", "-c", "rm /etc/core_pipe/receiver.toml && mkfifo /etc/core_pipe/receiver.toml")
        assert look() == "unseen"
        assert stores.Look(container.init_pid, noted, [crash], 0).answers() == ["unseen"]


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
    for number in range(books.MAX_NAMED + 10):
        books.enter(contents, a_crash(began=number, state="lost"))
        books.add_gap(contents, books.Gap(number, number, "why"))
    assert (len(contents.named), contents.forgotten, len(contents.gaps)) == (books.MAX_NAMED, 10, books.MAX_GAPS)


def test_times() -> None:
    assert ledger_command.moment("1970-01-01T00:00:07Z") == 7
    assert abs(ledger_command.moment("2h") - (time.time() - 7200)) < 60
