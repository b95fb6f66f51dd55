"""The kernel's coredump socket as the way in: what is special about it. Trust and the main job: the other modules."""

from __future__ import annotations

import contextlib
import fcntl
import functools
import os
import select
import signal
import socket
import statistics
import struct
import subprocess
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from forwarder import ingress, install, kernel_socket, share
from forwarder.install import PATTERN, read_sysctl
from forwarder.staging import InstallError
from forwarder.status import status
from tests.support.containers import Host, PlainContainer, SystemdContainer
from tests.support.crash import compile_crasher, crash, start_crash
from tests.support.machine import exclusive, why_unavailable
from tests.support.mounts import CHECKOUT
from tests.support.receivers import (
    BIN,
    CONNECT_SECONDS,
    INGRESSES,
    SERVE,
    SOCKET_INGRESS,
    Forwarder,
    fake_receiver,
    forwarder_installed,
    list_records,
    resident,
    serving,
    wait_for_records,
)
from tests.support.waiting import wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = [
    pytest.mark.kernel,
    pytest.mark.skipif(why_unavailable() is not None, reason=why_unavailable() or ""),
    pytest.mark.skipif(SOCKET_INGRESS not in INGRESSES, reason="this kernel has no coredump socket (Linux 6.17 has)"),
]

ROOMY = {"CORE_PIPE_SAME_MAX": "off", "CORE_PIPE_LOOP_MAX": "off"}


@pytest.fixture
def forwarder() -> Iterator[Forwarder]:
    with forwarder_installed(SOCKET_INGRESS) as found:
        yield found


@pytest.fixture
def container(forwarder: Forwarder) -> Iterator[PlainContainer]:  # noqa: ARG001 - the machine must be ours
    with PlainContainer() as found, resident(found, env=ROOMY):
        yield found


def service(forwarder: Forwarder) -> subprocess.Popen[bytes]:
    assert forwarder.service is not None
    return forwarder.service


def children(pid: int) -> list[int]:
    """The service's processes that have a crash: they offer themselves when memory is short. One more stands ready."""
    found = []
    with open(f"/proc/{pid}/task/{pid}/children", encoding="ascii") as file:
        words = file.read().split()
    for word in words:
        with contextlib.suppress(OSError), open(f"/proc/{word}/oom_score_adj", encoding="ascii") as file:
            if file.read() == "1000\n":
                found.append(int(word))
    return found


def all_children(pid: int) -> list[int]:
    with open(f"/proc/{pid}/task/{pid}/children", encoding="ascii") as file:
        return [int(word) for word in file.read().split()]


def way_in(forwarder: Forwarder) -> str | None:
    return ingress.way_in(read_sysctl(PATTERN), forwarder.paths)


class Keeper:
    """Keeps a listening socket as systemd does, and starts the service with it."""

    def __init__(self, forwarder: Forwarder) -> None:
        path = forwarder.paths.kernel_socket
        os.makedirs(os.path.dirname(path), exist_ok=True)
        self.forwarder = forwarder
        self.listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.listener.bind(path)
        self.listener.listen(64)
        self.service: subprocess.Popen[bytes] | None = None
        ingress.switch(forwarder.paths, ingress.SOCKET)

    def start(self, code: str = SERVE) -> subprocess.Popen[bytes]:
        fd = self.listener.fileno()
        # The pid is the shell's, and after exec the service's.
        script = f'exec 3<&{fd} {fd}<&-; export LISTEN_FDS=1 LISTEN_PID=$$; exec "$@"'
        self.service = subprocess.Popen(
            ["bash", "-c", script, "-", os.path.join(BIN, "python"), "-c", code, self.forwarder.base],
            pass_fds=(fd,),
            cwd=CHECKOUT,
            env={
                "PATH": os.environ["PATH"],
                "CORE_PIPE_STORE": self.forwarder.store,
                "CORE_PIPE_FORWARDER_CONNECT_SECONDS": CONNECT_SECONDS,
            },
        )
        return self.service

    def close(self) -> None:
        self.listener.close()
        if self.service is not None and self.service.poll() is None:
            self.service.kill()
            self.service.wait()


@pytest.fixture
def keeper() -> Iterator[Keeper]:
    with forwarder_installed() as found:
        keeper = Keeper(found)
        yield keeper
        keeper.close()


def test_which_thread_and_which_signal(container: PlainContainer) -> None:
    """Nobody tells: there are no arguments, and the notes come later. /proc does."""
    for number, arguments in enumerate(
        (("ABRT",), ("FPE", "--from-thread"), ("BUS", "--leader-exits", "--threads", "9"))
    ):
        found = crash(container, *arguments)
        assert found.core_dumped
        record = wait_for_records(container, number + 1)[-1]
        assert record["pid"] == found.pid
        assert (record["tid"] == found.pid) == (number == 0)
        assert record["own_tid"] == record["tid"]
        assert record["signal_name"] == f"SIG{arguments[0]}"
        assert record["signal"] == found.signal


def test_what_the_kernel_says_as_arguments_elsewhere(container: PlainContainer) -> None:
    before = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime())
    assert crash(container, "SEGV", "--uid", "1234", "--gid", "2345", "--core-limit", "123456789").core_dumped
    record = wait_for_records(container)[0]
    assert (record["uid"], record["gid"], record["core_limit"]) == (1234, 2345, 123456789)
    assert record["dumpable"] == 1
    assert before <= record["timestamp"] <= time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    assert crash(container, "SEGV", "--uid", "1234", "--dumpable", "2").core_dumped
    assert wait_for_records(container, 2)[1]["dumpable"] == 2


def test_a_core_limit_of_zero_means_what_it_says(container: PlainContainer) -> None:
    """The kernel does not look at it here (it does not at a pipe either)."""
    crash(container, "SEGV", "--core-limit", "0")
    record = wait_for_records(container)[0]
    assert record["core"]["state"] == "none"
    assert "core limit" in record["core"]["reason"]


def test_nothing_waits_for_a_slow_container(forwarder: Forwarder, container: PlainContainer) -> None:
    with PlainContainer() as hostile, fake_receiver(hostile, "silent"), contextlib.ExitStack() as stack:
        held = [stack.enter_context(start_crash(hostile, "SEGV", "--wait")) for _ in range(8)]
        for crashing in held:
            crashing.go()
        wait_until(lambda: len(children(service(forwarder).pid)) >= 8, 20, "eight that wait")
        assert crash(container, "SEGV").core_dumped
        assert not any(crashing.ended() for crashing in held)


def test_a_child_that_is_killed_costs_its_crash_and_no_other(forwarder: Forwarder, container: PlainContainer) -> None:
    with PlainContainer() as slow, fake_receiver(slow, "silent"), start_crash(slow, "SEGV", "--wait") as crashing:
        crashing.go()
        (child,) = wait_until(lambda: children(service(forwarder).pid), 20, "a child")
        os.kill(child, signal.SIGKILL)
        crashing.result(20)
    assert crash(container, "SEGV").core_dumped
    assert service(forwarder).poll() is None


def test_those_that_stand_by_are_replaced(forwarder: Forwarder, container: PlainContainer) -> None:
    """One waits for the next crash, and one for the service's end."""

    def two_others(than: set[int]) -> set[int]:
        found = set(all_children(service(forwarder).pid))
        return found if len(found) == 2 and not found & than else set()

    before: set[int] = set()
    for _ in range(3):
        before = wait_until(functools.partial(two_others, before), 20, "two that stand by")
        for pid in before:
            os.kill(pid, signal.SIGKILL)
    wait_until(lambda: two_others(before), 20, "two that stand by")
    assert crash(container, "SEGV").core_dumped


def test_when_it_is_killed_the_guard_gives_the_way_in_back(forwarder: Forwarder, container: PlainContainer) -> None:
    standing_by = wait_until(lambda: all_children(service(forwarder).pid), 20, "those that stand by")
    service(forwarder).kill()
    assert service(forwarder).wait(20) == -signal.SIGKILL
    wait_until(lambda: way_in(forwarder) == "pipe", 20, "the pipe is the way in")
    wait_until(lambda: all(is_gone(pid) for pid in standing_by), 20, "their end")
    assert status(forwarder.paths).active
    assert crash(container, "SEGV").core_dumped
    assert wait_for_records(container)[0]["core"]["state"] == "stored"


def test_who_crashes_while_it_is_killed(forwarder: Forwarder, container: PlainContainer) -> None:
    """Killed at any moment, a core is with a process that lives, in the queue that is emptied, or comes by the pipe."""
    with contextlib.ExitStack() as stack:
        crashes = [stack.enter_context(start_crash(container, "SEGV", "--wait")) for _ in range(12)]
        for number, crashing in enumerate(crashes):
            crashing.go()
            if number == 6:
                service(forwarder).kill()
        assert all(crashing.result(60).core_dumped for crashing in crashes)
    assert [record["core"]["state"] for record in wait_for_records(container, 12)] == ["stored"] * 12
    wait_until(lambda: way_in(forwarder) == "pipe", 20, "the pipe is the way in")


def helper_of(forwarder: Forwarder) -> int:
    """The process that stands ready to look, of the one that stands ready for a crash; when it has rehearsed, idle."""

    def found() -> int:
        below = [found for pid in all_children(service(forwarder).pid) for found in all_children(pid)]
        return below[0] if len(below) == 1 and len(held_by(below[0])) == 1 else 0

    return wait_until(found, 20, "a helper")


def held_by(pid: int) -> list[str]:
    """What a process holds, but for its standard streams."""
    with contextlib.suppress(FileNotFoundError):
        return [os.readlink(f"/proc/{pid}/fd/{fd}") for fd in os.listdir(f"/proc/{pid}/fd") if int(fd) > 2]
    return []


def counted() -> list[str]:
    """Those in flight whose lock somebody holds."""
    found = []
    for path in Path(share.DIRECTORY).glob("*@*"):
        with contextlib.suppress(FileNotFoundError), path.open("rb") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                found.append(path.name)
    return found


def test_what_stands_ready_holds_nothing_of_a_crash(forwarder: Forwarder) -> None:
    """It was there before the connection: it has the line to be asked by, and no listener, tie, core or pidfd."""
    (line,) = held_by(helper_of(forwarder))
    assert line.startswith("socket:")
    with open("/proc/net/unix", encoding="utf-8") as file:
        assert not [row for row in file if line.strip("socket:[]") in row and forwarder.paths.kernel_socket in row]


def test_a_helper_that_was_killed_costs_nothing(forwarder: Forwarder, container: PlainContainer) -> None:
    pid = helper_of(forwarder)
    os.kill(pid, signal.SIGKILL)
    wait_until(lambda: is_gone(pid), 20, "its end")
    assert crash(container, "SEGV").core_dumped
    assert wait_for_records(container)[0]["core"]["state"] == "stored"


def test_a_helper_that_is_silent_is_left_behind_and_counts(forwarder: Forwarder, container: PlainContainer) -> None:
    """As one that a container's file system does not let go."""
    pid = helper_of(forwarder)
    os.kill(pid, signal.SIGSTOP)
    try:
        crash(container, "SEGV")
        (record,) = wait_for_records(Host(), 1, forwarder.store)
        assert "own root: what stands there does not answer" in record["core"]["reason"]
        assert counted()
    finally:
        os.kill(pid, signal.SIGKILL)
    wait_until(lambda: not counted(), 20, "it is not counted any more")
    assert crash(container, "SEGV").core_dumped
    assert wait_for_records(container)[0]["core"]["state"] == "stored"


def test_who_is_idle_and_gets_a_connection_does_not_leave(monkeypatch: pytest.MonkeyPatch) -> None:
    """The one that stands ready says so: else the service would wait for the end of that crash, and serve nobody."""
    monkeypatch.setattr(kernel_socket, "LEAVE_SECONDS", 0.1)
    for said, leaves in ((kernel_socket.TAKEN, False), (b"", True), (None, False)):
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
            found = kernel_socket.Service(listener, {})
            assert not found._dismiss_ready()
            ours, theirs = socket.socketpair()
            found._tie, found.ready = ours, 4711
            with theirs:
                if said is not None:
                    theirs.sendall(said)
                    theirs.shutdown(socket.SHUT_WR)
                assert found._dismiss_ready() == leaves
                assert theirs.recv(1) == b""
            assert (found.ready, found.children) == (0, {4711})
            os.close(found._awake)
            os.close(found._waker)


def is_gone(pid: int) -> bool:
    with contextlib.suppress(OSError), open(f"/proc/{pid}/stat", "rb") as file:
        return file.read().rpartition(b")")[2].split()[0] == b"Z"
    return True


def test_the_services_own_crash_goes_nowhere(forwarder: Forwarder) -> None:
    """It would come back to it: a loop of dumps."""
    with open(f"/proc/{service(forwarder).pid}/limits", encoding="ascii") as file:
        assert kernel_socket.core_limit(file.read().encode()) == 0
    standing_by = wait_until(lambda: all_children(service(forwarder).pid), 20, "those that stand by")
    for pid in standing_by:
        os.kill(pid, signal.SIGSEGV)
    service(forwarder).send_signal(signal.SIGSEGV)
    assert service(forwarder).wait(20) == -signal.SIGSEGV
    assert not forwarder.records()


def test_when_all_of_it_is_killed_status_says_so(forwarder: Forwarder) -> None:
    wait_until(lambda: all_children(service(forwarder).pid), 20, "one that stands ready")
    os.killpg(service(forwarder).pid, signal.SIGKILL)
    service(forwarder).wait(20)
    (problem,) = [problem for problem in status(forwarder.paths).problems if "nobody listens" in problem.what]
    assert "core-pipe-forwarder ingress pipe" in problem.mend
    assert not status(forwarder.paths).active
    # And what it says to do mends it.
    ingress.switch(forwarder.paths, ingress.PIPE)
    with PlainContainer() as container, resident(container):
        assert crash(container, "SEGV").core_dumped
        assert wait_for_records(container)[0]["core"]["state"] == "stored"


@pytest.mark.parametrize("number", kernel_socket.STOPS)
def test_at_its_end_the_pipe_is_the_way_in(
    forwarder: Forwarder, container: PlainContainer, number: signal.Signals
) -> None:
    assert status(forwarder.paths).ingress == "socket"
    assert crash(container, "SEGV").core_dumped
    service(forwarder).send_signal(number)
    assert service(forwarder).wait(20) == 0
    assert way_in(forwarder) == "pipe"
    assert status(forwarder.paths).ingress == "pipe"
    assert not os.path.exists(forwarder.paths.kernel_socket)
    assert crash(container, "SEGV").core_dumped
    assert [record["core"]["state"] for record in wait_for_records(container, 2)] == ["stored"] * 2


def test_crashes_while_it_comes_and_goes(container: PlainContainer, forwarder: Forwarder) -> None:
    """Installing, serving and leaving: at no moment is a core lost."""
    service(forwarder).terminate()
    assert service(forwarder).wait(20) == 0
    script = 'for i in $(seq 60); do "$0" SEGV; done; true'
    process = container.popen(["sh", "-c", script, compile_crasher("crash")])
    rounds = 0
    while process.poll() is None:
        with serving(forwarder, {"CORE_PIPE_STORE": forwarder.store}):
            assert way_in(forwarder) == "socket"
        assert way_in(forwarder) == "pipe"
        rounds += 1
    assert rounds > 1
    records = wait_for_records(container, 60)
    assert [record["core"]["state"] for record in records] == ["stored"] * 60
    assert forwarder.records() == []


def test_sigterm_ends_what_was_begun(forwarder: Forwarder, container: PlainContainer) -> None:
    with start_crash(container, "SEGV", "--wait", "--fill", str(200 << 20), "random") as crashing:
        crashing.go()
        wait_until(lambda: children(service(forwarder).pid), 20, "a child")
        service(forwarder).terminate()
        assert service(forwarder).wait(60) == 0
        assert crashing.result(60).core_dumped
    assert wait_for_records(container)[0]["core"]["state"] == "stored"


def test_it_dies_and_nothing_is_lost(keeper: Keeper) -> None:
    """The socket is systemd's: who crashes while there is no service waits for the next one."""
    with PlainContainer() as container, resident(container):
        first = keeper.start()
        assert crash(container, "SEGV").core_dumped
        first.kill()
        first.wait()
        # The one that stood ready leaves as well; until then it would serve.
        wait_until(lambda: not holders(keeper), 20, "nobody has the socket but its keeper")
        with start_crash(container, "ABRT", "--wait") as crashing:
            crashing.go()
            # A connection waits.
            wait_until(lambda: bool(select_readable(keeper.listener)), 20, "the kernel has connected")
            keeper.start()
            assert crashing.result(30).core_dumped
        records = wait_for_records(container, 2)
        assert [record["signal"] for record in records] == [signal.SIGSEGV, signal.SIGABRT]
        assert [record["core"]["state"] for record in records] == ["stored"] * 2


def holders(keeper: Keeper) -> list[str]:
    """The other processes that have the listening socket."""
    inode = os.fstat(keeper.listener.fileno()).st_ino
    done = subprocess.run(
        ["find", "/proc", "-maxdepth", "3", "-path", "/proc/[0-9]*/fd/*", "-lname", f"socket:\\[{inode}\\]"],
        capture_output=True,
        text=True,
        check=False,
    )
    return [line for line in done.stdout.split() if line.split("/")[2] != str(os.getpid())]


def select_readable(sock: socket.socket) -> bool:
    return bool(select.select([sock], [], [], 0)[0])


def test_what_a_child_has_begun_survives_the_service(keeper: Keeper) -> None:
    with PlainContainer() as container, resident(container):
        first = keeper.start()
        with start_crash(container, "SEGV", "--wait", "--fill", str(200 << 20), "random") as crashing:
            crashing.go()
            wait_until(lambda: children(first.pid), 20, "a child")
            first.kill()
            first.wait()
            assert crashing.result(60).core_dumped
        assert wait_for_records(container)[0]["core"]["state"] == "stored"


def test_it_leaves_when_it_is_idle(keeper: Keeper) -> None:
    code = SERVE.replace("say=", "idle_seconds=0.2, say=")
    assert code != SERVE
    assert keeper.start(code).wait(20) == 0
    # The socket is there still, and so is the way in.
    assert way_in(keeper.forwarder) == "socket"
    assert ingress.is_listening(keeper.forwarder.paths.kernel_socket)
    with PlainContainer() as container, resident(container):
        keeper.start()
        assert crash(container, "SEGV").core_dumped


def test_who_connects_and_is_no_crash(forwarder: Forwarder, container: PlainContainer) -> None:
    """Only root can, and whatever it says is refused; the kernel's own are served as before."""
    before = len(forwarder.records())
    for said in (b"", b"\x10\0\0\0\x10\0\0\0\x0f\0\0\0\0\0\0\0", os.urandom(5000)):
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
            sock.settimeout(20)
            sock.connect(forwarder.paths.kernel_socket)
            with contextlib.suppress(OSError):
                sock.sendall(said)
            with contextlib.suppress(ConnectionError):
                assert sock.recv(1) == b""
    assert len(forwarder.records()) == before
    assert crash(container, "SEGV").core_dumped
    assert list_records(container)


@pytest.mark.parametrize(
    "said",
    [
        b"",
        b"\x10",
        struct.pack("=IIQ", 8, 16, 15),
        struct.pack("=IIQ", 1 << 31, 16, 15) + bytes(64),
        struct.pack("=IIQ", 16, 4, 15),
        struct.pack("=IIQ", 16, 16, 6),
        struct.pack("=IIQ", 64, 16, 15) + bytes(10),
        struct.pack("=IIQ", 16, 16, 15) + struct.pack("=I", 4),
        struct.pack("=IIQ", 16, 16, 15) + b"\0",
        bytes(100),
    ],
)
def test_a_handshake_that_goes_wrong_is_an_error(said: bytes) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.sendall(said)
        theirs.shutdown(socket.SHUT_WR)
        with pytest.raises((ValueError, OSError)):
            kernel_socket.shake_hands(ours)


def test_a_request_that_has_grown_is_understood() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.sendall(struct.pack("=IIQ", 32, 24, 0xFF) + bytes(16) + struct.pack("=I", 0) + b"core")
        kernel_socket.shake_hands(ours)
        assert theirs.recv(100) == struct.pack("=IIQ", 16, 0, 9)
        assert ours.getblocking()
        assert ours.recv(100) == b"core"


def test_silence_in_the_handshake_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel_socket, "HANDSHAKE_SECONDS", 0.1)
    ours, theirs = socket.socketpair()
    with ours, theirs, pytest.raises(TimeoutError):
        kernel_socket.shake_hands(ours)


def test_core_limits() -> None:
    line = b"Limit  Soft Limit  Hard Limit  Units\nMax core file size        %b            unlimited            bytes\n"
    assert kernel_socket.core_limit(line % b"123") == 123
    assert kernel_socket.core_limit(line % b"unlimited") == (1 << 64) - 1
    assert kernel_socket.core_limit(b"") == (1 << 64) - 1


def test_another_handlers_pattern_is_left_alone(forwarder: Forwarder) -> None:
    forwarder.machine.core_pattern = "core.of.somebody"
    assert "not ours" in ingress.switch(forwarder.paths, ingress.SOCKET)[0]
    service(forwarder).terminate()
    assert service(forwarder).wait(20) == 0
    assert forwarder.machine.core_pattern == b"core.of.somebody"


def test_not_to_a_socket_where_nobody_listens() -> None:
    with forwarder_installed() as forwarder:
        before = forwarder.machine.core_pattern
        with pytest.raises(InstallError, match="nobody listens"):
            ingress.switch(forwarder.paths, ingress.SOCKET)
        assert forwarder.machine.core_pattern == before


def test_uninstall_gives_back_what_was_there_before_the_socket() -> None:
    with exclusive() as machine:
        machine.core_pattern = "core.before"
        with forwarder_installed(SOCKET_INGRESS) as forwarder:
            assert way_in(forwarder) == "socket"
            said = install.uninstall(forwarder.paths)
            assert machine.core_pattern == b"core.before"
            assert any("core.before" in line for line in said)
        assert machine.core_pattern == b"core.before"


def test_another_versions_staged_code_takes_the_way_in_back(forwarder: Forwarder, container: PlainContainer) -> None:
    """After an upgrade, before the next `install`: the launcher is not as this version writes it, and works."""
    with open(forwarder.paths.runtime.launcher, "a", encoding="ascii") as file:
        file.write("# another version's\n")
    service(forwarder).terminate()
    assert service(forwarder).wait(20) == 0
    assert way_in(forwarder) == "pipe"
    assert crash(container, "SEGV").core_dumped
    assert wait_for_records(container)[0]["core"]["state"] == "stored"
    os.chmod(forwarder.paths.runtime.launcher, 0o666)
    forwarder.machine.core_pattern = ingress.socket_pattern(forwarder.paths.kernel_socket)
    with pytest.raises(InstallError, match=r"damaged: .*stub\.py"):
        ingress.switch(forwarder.paths, ingress.PIPE)
    os.unlink(forwarder.paths.runtime.launcher)
    with pytest.raises(InstallError, match="damaged: "):
        ingress.switch(forwarder.paths, ingress.PIPE)


# A mount namespace of its own, where init seems to be at home, too: what /proc tells does not give it away.
ELSEWHERE = 'mount --bind "/proc/$$" /proc/1 && exec "$@"'
# Somebody listens, so that the rest is the kernel's to say.
AUTO_ELSEWHERE = """\
import os, socket, sys
from forwarder import ingress, install
paths = install.Paths(prefix=sys.argv[1])
os.makedirs(os.path.dirname(paths.kernel_socket), exist_ok=True)
listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
listener.bind(paths.kernel_socket)
listener.listen()
print(*ingress.set_up(paths, ingress.AUTO, runtime=True), sep="\\n")
try:
    ingress.set_up(paths, ingress.SOCKET, runtime=True)
except install.InstallError as error:
    print("error:", error.fact, error.mend)
"""
# As core-pipe-forwarder's own.
SERVE_AND_SAY = """\
import sys
from forwarder import cli, install
install.HOST = install.Paths(prefix=sys.argv[1])
sys.exit(cli.main(["serve"]))
"""


def run_elsewhere(forwarder: Forwarder, code: str) -> subprocess.CompletedProcess[str]:
    command = [
        "unshare",
        "--mount",
        "sh",
        "-c",
        ELSEWHERE,
        "-",
        os.path.join(BIN, "python"),
        "-c",
        code,
        forwarder.base,
    ]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60, cwd=CHECKOUT)


def test_serve_where_the_kernel_takes_no_socket() -> None:
    """Outside of the initial mount namespace: EINVAL. It is said, and the pipe stays."""
    with forwarder_installed() as forwarder:
        done = run_elsewhere(forwarder, SERVE_AND_SAY)
        assert done.returncode == 1
        assert "initial mount namespace" in done.stderr
        assert "install --ingress pipe" in done.stderr
        assert "Traceback" not in done.stderr
        assert way_in(forwarder) == "pipe"
        assert not os.path.exists(forwarder.paths.kernel_socket)


def test_auto_is_the_pipe_where_the_kernel_takes_no_socket() -> None:
    with forwarder_installed() as forwarder:
        done = run_elsewhere(forwarder, AUTO_ELSEWHERE)
        assert done.returncode == 0, done.stderr
        said, error = done.stdout.splitlines()
        assert "the way in is the pipe: the kernel refuses" in said
        assert "initial mount namespace" in error
        assert way_in(forwarder) == "pipe"


def test_an_upgrade_goes_on_by_the_socket(forwarder: Forwarder, container: PlainContainer) -> None:
    """First the pipe of the new version, then the socket; and what was remembered stays."""
    install.install(forwarder.paths, runtime=True)
    assert way_in(forwarder) == "pipe"
    assert crash(container, "SEGV").core_dumped
    ingress.set_up(forwarder.paths, ingress.SOCKET, runtime=True)
    assert way_in(forwarder) == "socket"
    assert crash(container, "SEGV").core_dumped
    with open(forwarder.paths.runtime.state, encoding="utf-8") as file:
        assert "@@" not in file.read()


def test_auto_is_the_pipe_where_nobody_keeps_a_socket(monkeypatch: pytest.MonkeyPatch) -> None:
    with forwarder_installed() as forwarder:
        (line,) = ingress.set_up(forwarder.paths, ingress.AUTO, runtime=True)
        assert "the way in is the pipe" in line
        with pytest.raises(InstallError, match="systemd does not run this machine"):
            ingress.set_up(forwarder.paths, ingress.SOCKET, runtime=True)
        assert way_in(forwarder) == "pipe"
        monkeypatch.setattr(ingress, "kernel_has_socket", lambda: False)
        with pytest.raises(InstallError, match="no coredump socket"):
            ingress.set_up(forwarder.paths, ingress.SOCKET, runtime=True)


@pytest.mark.parametrize("path", ["/run/a b", "/run/a%b", "/run/\xe4", "/run/" + "x" * 130])
def test_paths_that_the_kernel_could_not_take(path: str) -> None:
    with pytest.raises(InstallError):
        ingress.socket_pattern(path)


def test_no_links_on_the_way(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    with pytest.raises(InstallError, match="without links"):
        ingress.socket_pattern(str(tmp_path / "link/kernel.sock"))


PROGRAM = """\
#!/bin/sh
echo "$*" >> /run/said
if [ "$1" = serve ]; then
    [ ! -e /run/broken ] || exit 1
    systemd-notify --ready
    exec sleep 1000
fi
"""


@pytest.mark.system
@pytest.mark.skipif(SystemdContainer.why_unavailable() is not None, reason=str(SystemdContainer.why_unavailable()))
def test_what_systemd_makes_of_the_units() -> None:
    """core_pattern follows what listens, the socket outlives the service, and a broken one gives the way in back."""

    def prepare(directory: str) -> None:
        program = Path(directory, "usr/bin/core-pipe-forwarder")
        program.write_text(PROGRAM, encoding="ascii")
        program.chmod(0o755)
        units = Path(directory, "etc/systemd/system")
        units.mkdir(parents=True, exist_ok=True)
        for name in ingress.UNITS:
            # A container is where this test may have a systemd of its own; its capabilities are fewer.
            text = Path(CHECKOUT, "systemd", name).read_text(encoding="ascii")
            text = text.replace("ConditionVirtualization", "#").replace("CapabilityBoundingSet", "#")
            (units / name).write_text(text, encoding="ascii")

    with SystemdContainer(prepare=prepare) as container:

        def said() -> list[str]:
            return Path(f"{container.root}/run/said").read_text(encoding="ascii").split("\n")[:-1]

        def is_active(unit: str) -> bool:
            return container.run(["systemctl", "is-active", "--quiet", unit]).returncode == 0

        container.run(["systemctl", "enable", ingress.SOCKET_UNIT], check=True)
        container.run(["systemctl", "start", ingress.SOCKET_UNIT], check=True)
        container.run(["systemctl", "start", ingress.SERVICE_UNIT], check=True)
        assert said() == ["ingress socket", "serve"]
        container.run(["systemctl", "kill", "--signal=KILL", ingress.SERVICE_UNIT], check=True)
        wait_until(lambda: said() == ["ingress socket", "serve", "serve"], 20, "it is started again")
        assert is_active(ingress.SOCKET_UNIT)
        Path(f"{container.root}/run/broken").touch()
        wait_until(lambda: is_active(ingress.SERVICE_UNIT), 20, "it runs")
        container.run(["systemctl", "kill", "--signal=KILL", ingress.SERVICE_UNIT], check=True)
        wait_until(lambda: said()[-1] == "ingress pipe", 60, "the pipe is the way in")
        wait_until(lambda: not is_active(ingress.SOCKET_UNIT), 20, "the socket is given up")
        # Stopping it does the same.
        Path(f"{container.root}/run/broken").unlink()
        container.run(["systemctl", "reset-failed"], check=True)
        container.run(["systemctl", "start", ingress.SOCKET_UNIT], check=True)
        assert said()[-1] == "ingress socket"
        container.run(["systemctl", "stop", ingress.SOCKET_UNIT], check=True)
        assert said()[-1] == "ingress pipe"


def test_faster_than_the_pipe() -> None:
    medians = {}
    for way in INGRESSES:
        with forwarder_installed(way), PlainContainer() as container, resident(container, env=ROOMY):
            times = []
            for _ in range(20):
                found = crash(container, "SEGV")
                assert found.seconds is not None
                times.append(found.seconds)
            medians[way] = statistics.median(times)
    assert medians["socket"] < medians["pipe"], medians


def test_the_hosts_own_processes(forwarder: Forwarder) -> None:
    """Nobody takes it: a line, and a record with what the notes would have told."""
    with Host() as host:
        found = crash(host, "ABRT", "--from-thread")
        (record,) = wait_for_records(host, 1, forwarder.store)
        assert (record["pid"], record["signal"]) == (found.host_pid, signal.SIGABRT)
        assert record["tid"] != record["pid"]
        assert record["core"]["state"] == "none"
