"""Whoever gets the crashed process's number while the stub looks is never taken for it.

The replacement is real: the victim is killed and reaped in the middle of its dump, and the next process gets its pid.
It is done before every single system call that the forwarder makes, one after the other.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import os
import posix
import signal
import socket
import subprocess
import tempfile
import time
from typing import TYPE_CHECKING, Any

import pytest

from forwarder import ingress, kernel_socket
from forwarder.crash import Crash, Unidentified
from forwarder.route import Route
from forwarder.share import Share
from tests.support import processes
from tests.support.containers import PlainContainer
from tests.support.crash import compile_crasher
from tests.support.machine import exclusive
from tests.support.waiting import wait_until

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

pytestmark = pytest.mark.kernel

# Holds the dump: the kernel waits until the helper closes the pipe, and it never reads.
HOLDER = "|/usr/bin/sleep 600"
# H13: who splits stat or status at the first ")" or at spaces reads numbers of the victim's choice (CVE-2021-25682).
NAME = b"v) R 1 1 1 (\nx"
# And this one would look older than it is.
IMPOSTOR = b"i) R 1 1 1 (\nx"
SECRET = "COLOUR=the-impostor-is-red"
MOST_CALLS = 400


@pytest.fixture(scope="module", autouse=True)
def held_dumps() -> Iterator[None]:
    with exclusive() as machine:
        machine.core_pattern = HOLDER
        machine.core_pipe_limit = 0
        try:
            yield
        finally:
            machine.core_pattern = "core"


@pytest.fixture(scope="module")
def container() -> Iterator[PlainContainer]:
    with PlainContainer() as found:
        yield found


@pytest.fixture
def kernel_socket_path() -> Iterator[str]:
    """Where the kernel connects to for as long, in the place of starting the holder."""
    if not ingress.kernel_has_socket():
        pytest.skip("this kernel has no coredump socket")
    with exclusive() as machine, tempfile.TemporaryDirectory(dir="/run") as directory:
        path = os.path.join(directory, "kernel.sock")
        machine.core_pattern = f"@@{path}"
        yield path


class Victim:
    """A process in a container that is in the middle of its dump, and a child of ours, so that we can reap it."""

    def __init__(self, container: PlainContainer) -> None:
        self.process = subprocess.Popen(
            ["nsenter", "-t", str(container.init_pid), "-m", compile_crasher("crash"), "SEGV", "--comm", NAME],
            env={"COLOUR": "the-victim-is-blue"},
        )
        self.pid = self.process.pid
        self.pidfd = os.pidfd_open(self.pid)
        wait_until(self._dumps, 20, "the victim dumps")
        self.crashed = int(time.time())

    def _dumps(self) -> bool:
        with open(f"/proc/{self.pid}/status", encoding="utf-8", errors="replace") as file:
            return "CoreDumping:\t1" in file.read()

    def end(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        if self.pidfd >= 0:
            os.close(self.pidfd)
            self.pidfd = -1


class Impostor:
    """A process of the host's root that has the victim's pid."""

    def __init__(self, victim: Victim, *, crashes: bool) -> None:
        victim.process.kill()
        victim.process.wait()
        argv: list[str | bytes] = ["/usr/bin/sleep", "600"]
        if crashes:
            argv = [compile_crasher("crash"), "SEGV", "--comm", IMPOSTOR]
        deadline = time.monotonic() + 30
        while True:
            with open("/proc/sys/kernel/ns_last_pid", "w", encoding="ascii") as file:
                file.write(str(victim.pid - 1))
            self.process = subprocess.Popen(argv, env=dict([SECRET.split("=")]))
            if self.process.pid == victim.pid:
                break
            # Somebody else on the machine was faster.
            self.end()
            assert time.monotonic() < deadline, "the pid did not come back"
        if crashes:
            wait_until(lambda: "CoreDumping:\t1" in _status(victim.pid), 20, "the impostor dumps")

    def end(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()


def _status(pid: int) -> str:
    with open(f"/proc/{pid}/status", encoding="utf-8", errors="replace") as file:
        return file.read()


def replace(victim: Victim, impostors: list[Impostor], *, crashes: bool) -> None:
    impostors.append(Impostor(victim, crashes=crashes))


class Calls:
    """Counts the forwarder's system calls, and does something before one of them."""

    NAMES = ("open", "read", "stat", "fstat", "readlink", "pidfd_open")

    def __init__(self, monkeypatch: pytest.MonkeyPatch, at: int, action: Callable[[], object]) -> None:
        self.count = 0
        self._at = at
        self._action = action
        for name in self.NAMES:
            counted = self._counted(getattr(os, name))
            # The stub's modules know them as posix's.
            for module in (os, posix):
                monkeypatch.setattr(module, name, counted)
        monkeypatch.setattr(fcntl, "ioctl", self._counted(fcntl.ioctl))

    def _counted(self, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            self.count += 1
            if self.count == self._at:
                # The action's own calls are not the forwarder's.
                self.count = MOST_CALLS * 10
                self._action()
            return real(*arguments, **options)

        return call


def by_pipe(victim: Victim, *, kernels_pidfd: bool, crashed: int) -> Crash:
    """The crash, as the kernel's arguments have it."""
    words = {"P": victim.pid, "I": victim.pid, "p": victim.pid, "i": victim.pid, "s": 11, "t": crashed, "d": 1}
    crash = Crash({name: str(value) for name, value in words.items()})
    if kernels_pidfd:
        crash.pidfd, crash.pidfd_is_kernels = os.dup(victim.pidfd), True
    return crash


def look(find: Callable[[], Crash]) -> tuple[Crash, dict[str, bytes], list[Any]]:
    """Everything that the forwarder learns of a process before a byte of the core is passed."""
    crash = find()
    try:
        crash.identify()
        route = Route(crash, seconds=5)
        try:
            places: list[Any] = [(place.name, place.mnt_ns, place.pid_ns, place.owner) for place in route.places()]
            places.append((route.owners, route.enclosing, route.is_container))
        finally:
            route.close()
        facts = crash.facts()
        crash.verify()
        return crash, facts, places
    finally:
        for fd in (crash.task, crash.pidfd):
            if fd >= 0:
                os.close(fd)


@pytest.mark.parametrize(
    ("kernels_pidfd", "crashes", "age"),
    [(True, False, 0), (True, True, 0), (False, False, 0), (False, True, 10)],
    ids=["pidfd", "pidfd-impostor-crashes", "no-pidfd", "no-pidfd-impostor-crashes-later"],
)
@pytest.mark.timeout(170)
def test_a_replacement_before_every_call(
    container: PlainContainer, kernels_pidfd: bool, crashes: bool, age: int
) -> None:
    """H8: CVE-2025-5054, CVE-2025-4598, CVE-2020-15702, CVE-2019-15790."""
    victim = Victim(container)
    try:
        with pytest.MonkeyPatch.context() as patch:
            calls = Calls(patch, -1, lambda: None)
            crash, facts, places = look(lambda: by_pipe(victim, kernels_pidfd=kernels_pidfd, crashed=victim.crashed))
            total = calls.count
    finally:
        victim.end()
    assert crash.comm == NAME
    if kernels_pidfd:
        assert b"the-victim-is-blue" in facts["environ"]
    assert 10 < total < MOST_CALLS
    outcomes = {"refused": 0, "the victim's": 0}
    for at in range(1, total + 1):
        victim = Victim(container)
        impostors: list[Impostor] = []
        try:
            with pytest.MonkeyPatch.context() as patch:
                Calls(patch, at, functools.partial(replace, victim, impostors, crashes=crashes))
                try:
                    crashed = victim.crashed - age
                    find = functools.partial(by_pipe, victim, kernels_pidfd=kernels_pidfd, crashed=crashed)
                    crash, facts, found = look(find)
                except (Unidentified, OSError):
                    outcomes["refused"] += 1
                    continue
            assert crash.comm == NAME, f"call {at}"
            assert SECRET.encode() not in facts.get("environ", b""), f"call {at}"
            assert found == places, f"call {at}"
            outcomes["the victim's"] += 1
        finally:
            for impostor in impostors:
                impostor.end()
            victim.end()
    assert outcomes["refused"] > total // 2, outcomes


def numbers(crash: Crash) -> tuple[int, ...]:
    return crash.pid, crash.tid, crash.own_pid, crash.own_tid, crash.signal, crash.uid, crash.gid, crash.dumpable


@pytest.mark.parametrize("crashes", [False, True], ids=["runs", "crashes"])
@pytest.mark.timeout(170)
def test_a_replacement_before_every_call_at_the_kernels_socket(
    container: PlainContainer, kernel_socket_path: str, crashes: bool
) -> None:
    """The same where the kernel tells no number, and the connection's peer is asked for all of them."""
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
        listener.bind(kernel_socket_path)
        listener.listen(64)
        listener.settimeout(20)

        def accept() -> tuple[Victim, socket.socket]:
            victim = Victim(container)
            return victim, listener.accept()[0]

        victim, connection = accept()
        with connection:
            try:
                with pytest.MonkeyPatch.context() as patch:
                    calls = Calls(patch, -1, lambda: None)
                    crash, facts, places = look(lambda: kernel_socket.who_crashed(connection))
                    total = calls.count
            finally:
                victim.end()
        assert crash.comm == NAME
        assert (crash.signal, crash.dumpable, crash.tid) == (11, 1, victim.pid)
        assert b"the-victim-is-blue" in facts["environ"]
        assert 10 < total < MOST_CALLS
        outcomes = {"refused": 0, "the victim's": 0}
        for at in range(1, total + 1):
            victim, connection = accept()
            impostors: list[Impostor] = []
            try:
                with pytest.MonkeyPatch.context() as patch:
                    Calls(patch, at, functools.partial(replace, victim, impostors, crashes=crashes))
                    try:
                        crash, facts, found = look(functools.partial(kernel_socket.who_crashed, connection))
                    except (Unidentified, OSError):
                        outcomes["refused"] += 1
                        continue
                assert crash.comm == NAME, f"call {at}"
                assert numbers(crash) == (victim.pid, victim.pid, victim.pid, victim.pid, 11, 0, 0, 1), f"call {at}"
                assert SECRET.encode() not in facts.get("environ", b""), f"call {at}"
                assert found == places, f"call {at}"
                outcomes["the victim's"] += 1
            finally:
                connection.close()
                for impostor in impostors:
                    if crashes:
                        listener.accept()[0].close()
                    impostor.end()
                victim.end()
        assert outcomes["refused"] > total // 2, outcomes


def test_who_connects_and_does_not_dump_is_nobody() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs, pytest.raises(ValueError, match="does not dump core"):
        kernel_socket.who_crashed(ours)


def test_a_process_that_does_not_dump_is_nobody(container: PlainContainer) -> None:
    process = container.popen(["sleep", "600"])
    try:
        words = {"P": process.host_pid, "I": process.host_pid, "s": 11, "t": int(time.time()), "d": 1}
        crash = Crash({name: str(value) for name, value in words.items()})
        with pytest.raises(Unidentified, match="is not dumping core"):
            crash.identify()
        os.close(crash.task)
        os.close(crash.pidfd)
    finally:
        process.end()


def test_a_thread_of_another_process_is_nobody(container: PlainContainer) -> None:
    victim = Victim(container)
    try:
        words = {"P": victim.pid, "I": os.getpid(), "s": 11, "t": int(time.time()), "d": 1}
        crash = Crash({name: str(value) for name, value in words.items()})
        with pytest.raises(Unidentified, match="is gone"):
            crash.identify()
    finally:
        victim.end()
    assert processes.start_time(victim.pid) is None


def test_a_dump_that_does_not_end_counts_for_its_container(
    container: PlainContainer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SIGKILL does not always free the kernel's slot: the dump may wait for a page that never comes."""
    limit = tmp_path / "limit"
    limit.write_text("8\n")
    monkeypatch.setattr("forwarder.share.LIMIT_FILE", str(limit))
    directory = str(tmp_path / "flight")
    first = Share("c", directory)
    assert first.take() is None
    victim = Victim(container)
    try:
        first.remember(victim.pid)
        first.close()
        reason = Share("c", directory).take()
        assert reason is not None
        assert "all of its share" in reason
    finally:
        victim.end()
    # It has ended, so it does not count any more, whoever has its number.
    assert Share("c", directory).take() is None
    assert sorted(os.listdir(directory)) == [".lock", f"c@{os.getpid()}"]
