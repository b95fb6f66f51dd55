"""The receiver against everything that peers, signals, disks and settings do to it: what it began has an end."""

from __future__ import annotations

import contextlib
import json
import os
import random
import resource
import signal
import socket
import stat
import subprocess
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from receiver import protocol, worker
from receiver.config import Config
from receiver.protocol import Channel
from receiver.store import ACL
from tests.support import machine, processes
from tests.support.containers import Inside, PlainContainer
from tests.support.crash import compile_crasher, crash, start_crash
from tests.support.fake_forwarder import FIELDS, FakeForwarder, feed
from tests.support.landing import BOOKS
from tests.support.receivers import BIN, Forwarder, dump, forwarder_installed, resident, wait_for_records
from tests.support.waiting import wait_until
from tests.test_capture import elf64

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

pytestmark = [
    pytest.mark.kernel,
    pytest.mark.skipif(PlainContainer.why_unavailable() is not None, reason=str(PlainContainer.why_unavailable())),
]
needs_machine = pytest.mark.skipif(machine.why_unavailable() is not None, reason=str(machine.why_unavailable()))

MIB = 1 << 20
PROGRAM = f"{BIN}/core-pipe-receiver"
CORE = elf64([(0x1000, 0x100000)]).ljust(0x101000, b"\xa5")


@pytest.fixture(scope="module")
def container() -> Iterator[PlainContainer]:
    with PlainContainer(tmpfs={"/small": "size=2m"}) as found:
        yield found


OFFER = protocol.encode_header(protocol.OFFER, FIELDS, protocol.encode_fields(FIELDS)) + protocol.encode_fields(FIELDS)


class Running:
    """A receiver in a container, with a store and a socket of its own."""

    def __init__(self, container: PlainContainer, process: Inside, socket_path: str, store: str, said: Any) -> None:
        self.container = container
        self.process = process
        self.socket_path = socket_path
        self.store = store
        self._said = said

    @property
    def pid(self) -> int:
        return self.process.host_pid

    def said(self) -> str:
        """What it wrote to standard error so far."""
        return os.pread(self._said.fileno(), 1 << 20, 0).decode("utf-8", "replace")

    def connect(self, seconds: float = 20) -> FakeForwarder:
        return FakeForwarder(self.socket_path, seconds=seconds)

    def workers(self) -> list[int]:
        """Those that have a connection."""
        return processes.serving(self.pid)

    def spare(self) -> int:
        """Wait for the worker that stands ready, and return its pid."""

        def waits() -> int | None:
            found = [pid for pid in processes.children(self.pid) if processes.listens(pid)]
            assert len(found) <= 1
            return found[0] if found else None

        found: int = wait_until(waits, 20, "a worker stands ready")
        return found

    def records(self) -> list[dict[str, Any]]:
        """Oldest first; none that is still being written."""
        directory = Path(f"{self.container.root}{self.store}")
        names = sorted(directory.glob("[!.]*.json")) if directory.is_dir() else []
        return [json.loads(path.read_bytes()) for path in names]

    def wait_for_records(self, count: int) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = wait_until(
            lambda: self.records() if len(self.records()) >= count else None, 20, f"{count} records: {self.said()}"
        )
        assert len(found) == count
        return found

    def stop(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(20)

    def descriptors(self) -> list[str]:
        directory = f"/proc/{self.pid}/fd"
        found = []
        for number in os.listdir(directory):
            # One that is closed meanwhile is not there.
            with contextlib.suppress(FileNotFoundError):
                found.append(os.readlink(f"{directory}/{number}"))
        return sorted(found)

    def count_descriptors(self) -> int:
        """How many it has when nothing happens: one of them is to the spare worker, and not always the same."""
        self.spare()
        return len(self.descriptors())


# systemd's part (sd_listen_fds(3)): a descriptor as number 3, and two variables of which one is our own pid.
ACTIVATE = """
import os, sys
fd = int(sys.argv[1])
os.dup2(fd, 3)
os.set_inheritable(fd, fd == 3)
os.environ["LISTEN_FDS"], os.environ["LISTEN_PID"] = "1", str(os.getpid())
os.execv(sys.argv[2], sys.argv[2:])
"""


@contextlib.contextmanager
def running(
    container: PlainContainer, *, activated: socket.socket | None = None, store: str | None = None, **env: str
) -> Iterator[Running]:
    """Run a receiver: a resident one, or with a socket that was passed as systemd does. Ends it in any case."""
    name = f"{random.getrandbits(32):08x}"
    store = store or f"/var/lib/{name}"
    inside = f"/run/{name}.socket"
    environment = {"CORE_PIPE_STORE": store, "CORE_PIPE_OFFER_SECONDS": "5"}
    environment |= {f"CORE_PIPE_{key.upper()}": value for key, value in env.items()}
    with tempfile.TemporaryFile() as said:
        if activated is None:
            command = [PROGRAM, "--listen", inside]
        else:
            command = [f"{BIN}/python", "-c", ACTIVATE, str(activated.fileno()), PROGRAM]
        passed = [] if activated is None else [activated.fileno()]
        process = container.popen(command, env=environment, stderr=said, pass_fds=passed)
        path = f"{container.root}{inside}"
        if activated is not None and not worker_is_for_one(activated):
            path = activated.getsockname()
        found = Running(container, process, path, store, said)
        try:
            if activated is None:
                wait_until(lambda: os.path.exists(path) or process.poll() is not None, 20, "the receiver listens")
            yield found
            assert "Traceback" not in found.said()
            assert "a worker failed" not in found.said()
        finally:
            process.end()
            container.run(["rm", "-rf", inside, *([store] if store.startswith("/var/lib/") else [])])


def worker_is_for_one(sock: socket.socket) -> bool:
    return not sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)


@contextlib.contextmanager
def systemds_socket() -> Iterator[socket.socket]:
    """The listening socket that systemd has and passes; the test has it too, as systemd does."""
    with (
        tempfile.TemporaryDirectory(prefix="core_pipe-tests.", dir="/tmp") as name,
        socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener,
    ):
        listener.bind(f"{name}/socket")
        listener.listen(16)
        yield listener


@contextlib.contextmanager
def connection(listener: socket.socket) -> Iterator[tuple[socket.socket, FakeForwarder]]:
    """An accepted connection (Accept=yes), and who has connected."""
    with FakeForwarder(listener.getsockname()) as forwarder:
        accepted, _ = listener.accept()
        with accepted:
            yield accepted, forwarder


def whole(found: Running, tmp_path: Path) -> None:
    """The last core is there, as it was sent."""
    record = found.records()[-1]
    assert record["core"]["state"] == "stored", record["core"]
    core = dump(found.container, record["id"], tmp_path / "core", found.store)
    assert core.read_bytes() == CORE


# The end of the service.


def test_what_was_begun_is_finished_when_it_is_told_to_stop(container: PlainContainer, tmp_path: Path) -> None:
    with running(container) as found, found.connect() as forwarder:
        write = forwarder.offered().pass_pipe()
        feed(write, CORE[:100_000])
        found.process.send_signal(signal.SIGTERM)
        # Whoever comes now goes elsewhere, and at once.
        wait_until(lambda: refuses(found), 20, "nobody is let in any more")
        # systemd sends it to every process of the service, and an impatient administrator again.
        (worker_pid,) = found.workers()
        os.kill(worker_pid, signal.SIGTERM)
        os.kill(found.pid, signal.SIGTERM)
        feed(write, CORE[100_000:])
        os.close(write)
        assert forwarder.done()["state"] == b"stored"
        assert found.process.wait(20) == 0
        whole(found, tmp_path)


def refuses(found: Running) -> bool:
    try:
        found.connect().close()
    except ConnectionRefusedError:
        return True
    return False


def test_an_activated_service_finishes_too_and_leaves_the_rest_to_the_next(
    container: PlainContainer,
) -> None:
    with systemds_socket() as listener, running(container, activated=listener) as found:  # noqa: SIM117 - as deep
        with found.connect() as forwarder, found.connect() as late:
            write = forwarder.offered().pass_pipe()
            late.offered()
            os.kill(found.pid, signal.SIGTERM)
            wait_until(
                lambda: f"socket:[{os.fstat(listener.fileno()).st_ino}]" not in found.descriptors(),
                20,
                "it listens no more",
            )
            with found.connect() as next_one:
                next_one.offer()
                feed(write, CORE)
                os.close(write)
                assert forwarder.done()["state"] == b"stored"
                late.close()
                assert found.process.wait(20) == 0
                assert not next_one.has_answer()
                # systemd still has it, and starts the next receiver for it.
                listener.settimeout(20)
                accepted, _ = listener.accept()
                with running(container, activated=accepted, store=found.store) as second:
                    accepted.close()
                    assert next_one.answer().kind == protocol.ACCEPT
                    assert next_one.send_core(CORE)["state"] == b"stored"
                    assert second.process.wait(20) == 0
                    assert [record["core"]["state"] for record in second.records()] == ["stored", "none", "stored"]


def test_a_process_for_one_connection_finishes_too(container: PlainContainer, tmp_path: Path) -> None:
    with (
        systemds_socket() as listener,
        connection(listener) as (accepted, forwarder),
        running(container, activated=accepted) as found,
    ):
        accepted.close()
        write = forwarder.offered().pass_pipe()
        feed(write, CORE[:100_000])
        os.kill(found.pid, signal.SIGTERM)
        feed(write, CORE[100_000:])
        os.close(write)
        assert forwarder.done()["state"] == b"stored"
        assert found.process.wait(20) == 0
        whole(found, tmp_path)


def test_a_worker_that_is_killed_harms_nobody_else(container: PlainContainer, tmp_path: Path) -> None:
    with running(container) as found, found.connect() as first:
        write = first.offered().pass_pipe()
        (worker_pid,) = found.workers()
        with found.connect() as second:
            other = second.offered().pass_pipe()
            feed(write, CORE[:100_000])
            feed(other, CORE[:100_000])
            os.kill(worker_pid, signal.SIGKILL)
            assert first.is_gone()
            (record,) = found.wait_for_records(1)
            assert record["core"]["state"] == "none"
            assert record["core"]["reason"] == "interrupted: the receiver ended before the core was complete"
            assert record["comm"] == "fake"
            # The pipe's reader is gone, so the dump ends, and with it the crashed process.
            with pytest.raises(BrokenPipeError):
                feed(write, CORE)
            os.close(write)
            feed(other, CORE[100_000:])
            os.close(other)
            assert second.done()["state"] == b"stored"
        with found.connect() as third:
            assert third.offered().send_core(CORE)["state"] == b"stored"
        found.wait_for_records(3)
        whole(found, tmp_path)
        assert f"worker {worker_pid}" not in found.said()  # in the container's numbering, not ours
        assert "ended with signal 9" in found.said()
        assert found.stop() == 0


def test_a_service_that_is_killed_leaves_what_the_next_one_finishes(container: PlainContainer) -> None:
    with running(container) as found, found.connect() as forwarder:
        write = forwarder.offered().pass_pipe()
        (worker_pid,) = found.workers()
        os.kill(worker_pid, signal.SIGSTOP)
        os.kill(found.pid, signal.SIGKILL)
        found.process.wait(20)
        os.kill(worker_pid, signal.SIGKILL)
        assert forwarder.is_gone()
        os.close(write)
        assert found.records() == []
        # It is there, in the same place: the socket's file that the killed one has left is no obstacle.
        with running(container, store=found.store) as second:
            (record,) = second.wait_for_records(1)
            assert record["core"]["reason"].startswith("interrupted")
            assert second.stop() == 0


def test_leaving_when_idle(container: PlainContainer) -> None:
    """Only an activated service leaves, and only when it may; the next connection is the next one's."""
    with (
        running(container, idle_seconds="0.1") as resident_one,
        systemds_socket() as other,
        running(container, activated=other, idle_seconds="0") as patient,
        systemds_socket() as busy_socket,
        running(container, activated=busy_socket, idle_seconds="0.1") as busy,
        busy.connect() as working,
        systemds_socket() as listener,
    ):
        write = working.offered().pass_pipe()
        for one in (resident_one, patient):
            with one.connect() as forwarder:
                assert forwarder.offered().send_core(CORE)["state"] == b"stored"
        for _ in range(2):
            # Began later than the others, and leaves before them.
            with running(container, activated=listener, idle_seconds="0.3") as found:
                with found.connect() as forwarder:
                    assert forwarder.offered().send_core(CORE)["state"] == b"stored"
                assert found.process.wait(20) == 0
                assert "idle for 0.3 s: leaving until the next crash" in found.said()
        for one in (resident_one, patient, busy):
            assert one.process.poll() is None
        os.close(write)
        # It is idle from the end of its last work on.
        assert busy.process.wait(20) == 0
        assert resident_one.stop() == 0
        assert patient.stop() == 0


def test_an_idle_time_of_a_year(container: PlainContainer) -> None:
    with (
        systemds_socket() as listener,
        running(container, activated=listener, idle_seconds=str(366 * 86400), stall_seconds=str(366 * 86400)) as found,
    ):
        for _ in range(2):
            with found.connect() as forwarder:
                assert forwarder.offered().send_core(CORE)["state"] == b"stored"
        assert found.stop() == 0


def test_no_more_workers_than_allowed(container: PlainContainer) -> None:
    with running(container, workers="2") as found, contextlib.ExitStack() as stack:
        waiting = [stack.enter_context(found.connect()) for _ in range(6)]
        for forwarder in waiting:
            forwarder.offer()
        most = 0
        while waiting:
            accepted = wait_until(lambda: [one for one in waiting if one.has_answer()], 20, "an answer")
            most = max(most, len(accepted), len(found.workers()))
            first = accepted[0]
            waiting.remove(first)
            assert first.answer().kind == protocol.ACCEPT
            wait_until(lambda: len(found.workers()) == min(2, len(waiting) + 1), 20, "the next ones have begun")
            assert first.send_core(CORE)["state"] == b"stored"
        assert most == 2
        found.wait_for_records(6)
        assert found.stop() == 0


# The worker that stands ready.


def test_the_spare_worker_takes_the_next_connection(container: PlainContainer, tmp_path: Path) -> None:
    with running(container) as found:
        for n in range(3):
            spare = found.spare()
            assert found.workers() == []
            with found.connect() as forwarder:
                forwarder.offered()
                assert found.workers() == [spare]
                assert forwarder.send_core(CORE)["state"] == b"stored"
            found.wait_for_records(n + 1)
            whole(found, tmp_path)
        spare = found.spare()
        assert found.stop() == 0
        assert not os.path.exists(f"/proc/{spare}")


def test_who_says_nothing_takes_no_place_of_the_next(container: PlainContainer) -> None:
    with running(container, offer_seconds="20") as found:
        spare = found.spare()
        with found.connect(), found.connect() as forwarder:
            assert forwarder.offered().send_core(CORE)["state"] == b"stored"
            assert spare in found.workers()
            # And there is another one, though the silent one is still there.
            assert found.spare() != spare
            assert spare in found.workers()
        assert found.stop() == 0


def test_there_is_no_spare_worker_beyond_those_that_are_allowed(container: PlainContainer) -> None:
    with running(container, workers="1") as found, contextlib.ExitStack() as stack:
        spare = found.spare()
        forwarder = stack.enter_context(found.connect())
        forwarder.offered()
        waiting = stack.enter_context(found.connect())
        waiting.offer()
        assert processes.children(found.pid) == [spare]
        assert not waiting.has_answer()
        assert forwarder.send_core(CORE)["state"] == b"stored"
        assert waiting.answer().kind == protocol.ACCEPT
        assert waiting.send_core(CORE)["state"] == b"stored"
        found.spare()
        assert found.stop() == 0


def test_a_spare_worker_that_is_killed_costs_no_core(container: PlainContainer) -> None:
    with running(container) as found:
        os.kill(found.spare(), signal.SIGKILL)
        wait_until(lambda: "ended with signal 9" in found.said(), 20, "its end is said")
        # No other one at once: what ended this one would end the next.
        assert processes.children(found.pid) == []
        with found.connect() as forwarder:
            assert forwarder.offered().send_core(CORE)["state"] == b"stored"
        assert [record["core"]["state"] for record in found.wait_for_records(1)] == ["stored"]
        assert found.stop() == 0


def test_a_spare_worker_leaves_with_a_service_that_is_killed(container: PlainContainer) -> None:
    with running(container) as found:
        spare = found.spare()
        os.kill(spare, signal.SIGTERM)
        # That is for the service to say.
        assert found.spare() == spare
        os.kill(found.pid, signal.SIGKILL)
        wait_until(lambda: processes.start_time(spare) is None, 20, "it leaves")
        assert refuses(found)


def test_a_spare_worker_with_a_connection_of_which_the_service_does_not_know(
    container: PlainContainer, tmp_path: Path
) -> None:
    """It is told to stop in the very moment: what was begun is finished, and waited for."""
    with running(container) as found:
        spare = found.spare()
        os.kill(found.pid, signal.SIGSTOP)
        with found.connect() as forwarder:
            write = forwarder.offered().pass_pipe()
            assert found.workers() == [spare]
            os.kill(found.pid, signal.SIGTERM)
            os.kill(found.pid, signal.SIGCONT)
            wait_until(lambda: refuses(found), 20, "nobody is let in any more")
            feed(write, CORE)
            assert found.process.poll() is None
            os.close(write)
            assert forwarder.done()["state"] == b"stored"
        assert found.process.wait(20) == 0
        whole(found, tmp_path)


NO_PROCESS = """
import errno, os, sys
def fork(): raise OSError(errno.EAGAIN, os.strerror(errno.EAGAIN))
os.fork = fork
from receiver.cli import main
main(sys.argv[1:])
"""


def test_no_process_can_be_had(container: PlainContainer) -> None:
    """Said when it matters, and the forwarder hears of it at once."""
    path = "/run/lonely.socket"
    with tempfile.TemporaryFile() as said:
        process = container.popen([f"{BIN}/python", "-c", NO_PROCESS, "--listen", path], stderr=said)
        try:
            wait_until(lambda: os.path.exists(f"{container.root}{path}"), 20, "the receiver listens")
            with FakeForwarder(f"{container.root}{path}") as forwarder:
                assert forwarder.is_gone()
            process.send_signal(signal.SIGTERM)
            assert process.wait(20) == 0
            text = os.pread(said.fileno(), 1 << 20, 0).decode()
            assert text.count("no worker can be started: Resource temporarily unavailable") == 1
        finally:
            process.end()


def test_a_standard_error_that_nobody_reads_costs_no_core(container: PlainContainer) -> None:
    """A log collector that has stopped must not stop the workers, and with them every crash."""
    path, store = "/run/mute.socket", "/var/lib/mute"
    read, write = os.pipe()
    os.set_blocking(write, False)
    with contextlib.suppress(BlockingIOError):
        while os.write(write, bytes(4096)):
            pass
    os.set_blocking(write, True)
    process = container.popen([PROGRAM, "--listen", path], env={"CORE_PIPE_STORE": store}, stderr=write)
    try:
        socket_path = f"{container.root}{path}"
        wait_until(lambda: os.path.exists(socket_path), 20, "the receiver listens")
        for n in range(3):
            with FakeForwarder(socket_path) as forwarder:
                assert forwarder.offered().send_core(CORE)["state"] == b"stored"
            wait_for_records(container, n + 1, store, timeout=20)
        wait_until(lambda: not processes.serving(process.host_pid), 20, "the workers have ended")
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0
    finally:
        process.end()
        os.close(read)
        os.close(write)
        container.run(["rm", "-rf", path, store])


# Who may bring a core.

INSIDER = """
import sys, time
from receiver import protocol
from tests.support.fake_forwarder import FakeForwarder
with FakeForwarder(sys.argv[1]) as forwarder:
    print(forwarder.refused())
"""


def test_a_process_inside_the_container_is_refused(container: PlainContainer) -> None:
    with running(container) as found:
        inside = "/run/" + os.path.basename(found.socket_path)
        checkout = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
        done = container.run(
            [f"{BIN}/python", "-c", INSIDER, inside], env={"PYTHONPATH": checkout}, check=True, timeout=30
        )
        assert done.stdout == "it comes from a process of this container; cores come from the host\n"
        assert found.records() == []
        assert stat.S_IMODE(os.stat(found.socket_path).st_mode) == 0o600
        assert found.stop() == 0


CONNECT = "import socket, sys; s = socket.socket(socket.AF_UNIX); s.connect('\\0' + sys.argv[1]); sys.stdin.read()"


@pytest.mark.parametrize(("uid", "said"), [(1000, "it comes from a process that is not root"), (0, "without an offer")])
def test_an_unprivileged_process_of_the_hosts_namespace_is_refused(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], uid: int, said: str
) -> None:
    """Where a container shares the host's pid namespace everybody has a pid, so the user is what counts."""
    name = f"core_pipe-tests-{random.getrandbits(32):x}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        # Abstract: the mode of a file would keep the stranger out already.
        listener.bind(b"\0" + name.encode())
        listener.listen()
        listener.settimeout(20)
        with subprocess.Popen(["/usr/bin/python3", "-c", CONNECT, name], stdin=subprocess.PIPE, user=uid) as client:
            accepted, _ = listener.accept()
            with accepted:
                config = Config(store=str(tmp_path / "store"), offer_seconds=0.2)
                assert worker.serve(Channel(accepted), config) is None
            client.kill()
    assert said in capfd.readouterr().err
    assert not (tmp_path / "store").exists()


def test_a_process_that_can_be_seen_must_be_dumping(tmp_path: Path) -> None:
    """H6: without credentials the kernel fills in the sender's own, and he is not dumping core."""
    config = Config(store=str(tmp_path / "store"), offer_seconds=5.0)

    def named(forwarder: FakeForwarder) -> None:
        forwarder.offer()

    def unnamed(forwarder: FakeForwarder) -> None:
        forwarder.raw(OFFER)

    for speak in (named, unnamed):
        ours, theirs = socket.socketpair()
        ours.setsockopt(socket.SOL_SOCKET, protocol.SO_PASSCRED, 1)
        with ours, FakeForwarder(sock=theirs) as forwarder:
            speak(forwarder)
            assert worker.serve(Channel(ours), config) is None
            answer = forwarder.answer()
            assert answer.fields["reason"] == b"the process it names is not dumping core"
    assert not (tmp_path / "store").exists()


def test_an_offer_whose_credentials_got_lost_is_refused(tmp_path: Path) -> None:
    """The kernel adds none to what was sent before anybody had asked for them."""
    ours, theirs = socket.socketpair()
    with ours, FakeForwarder(sock=theirs) as forwarder:
        forwarder.raw(OFFER)
        assert worker.serve(Channel(ours), Config(store=str(tmp_path / "store"))) is None
        assert forwarder.answer().fields["reason"] == b"the offer names no process"


def test_an_offer_without_credentials_names_nobody(container: PlainContainer) -> None:
    """From outside, the sender's own pid is none: the record says that it is not known, not a wrong one."""
    with running(container) as found, found.connect() as forwarder:
        forwarder.raw(OFFER)
        assert forwarder.answer().kind == protocol.ACCEPT
        assert forwarder.send_core(CORE)["state"] == b"stored"
        (record,) = found.wait_for_records(1)
        assert (record["pid"], record["tid"]) == (0, 0)
        assert found.stop() == 0


def test_what_the_offer_says_of_a_process_that_cannot_be_seen(container: PlainContainer) -> None:
    facts = {
        "exe": b"/opt/\xff",
        "cwd": b"/\n",
        "cmdline": b"a\0\0-x\0",
        "environ": b"MY_TOKEN=hush\0A=1\0",
        "own_pid": b"7",
        "own_tid": b"8",
        "tried": b"one: no\x1b\ntwo: no",
        "comm": b"c" * 5000,
        "core_limit": b"5000000",
        "unknown": b"\xff",
    }
    with running(container) as found:
        with found.connect() as forwarder:
            assert forwarder.offered(**facts).send_core(CORE)["state"] == b"stored"
        (record,) = found.wait_for_records(1)
        assert found.stop() == 0
    assert (record["pid"], record["own_pid"], record["own_tid"]) == (0, 7, 8)
    assert (record["exe"], record["cwd"]) == ("/opt/\\xff", "/\n")
    assert record["command_line"] == ["a", "", "-x"]
    assert record["environment"] == {"MY_TOKEN": "(masked)", "A": "1"}
    assert record["tried"] == ["one: no\\x1b", "two: no"]
    assert record["comm"] == "c" * 64
    assert record["core_limit"] == 5_000_000
    assert record["host_name"] == "plain"


# What peers do wrong. Each gets a receiver that has served and will serve.


def hang_up(_forwarder: FakeForwarder) -> None:
    pass


def garbage(forwarder: FakeForwarder) -> None:
    forwarder.raw(random.Random(1).randbytes(5000))
    assert forwarder.is_gone() or True


def half_a_header(forwarder: FakeForwarder) -> None:
    forwarder.raw(OFFER[:5])


def half_a_body(forwarder: FakeForwarder) -> None:
    forwarder.raw(OFFER[:-3])


def silence(forwarder: FakeForwarder) -> None:
    assert forwarder.is_gone()


def silence_in_a_header(forwarder: FakeForwarder) -> None:
    forwarder.raw(OFFER[:5])
    assert forwarder.is_gone()


def silence_in_a_body(forwarder: FakeForwarder) -> None:
    forwarder.raw(OFFER[:-3])
    assert forwarder.is_gone()


def another_kind(forwarder: FakeForwarder) -> None:
    forwarder.channel.send(protocol.DONE, {}, forwarder._deadline())
    assert b"not an offer" in forwarder.answer().fields["reason"]


def only_optional_kinds(forwarder: FakeForwarder) -> None:
    for _ in range(protocol.MAX_SKIPPED):
        forwarder.channel.send(200, {}, forwarder._deadline())
    assert b"unknown kinds" in forwarder.answer().fields["reason"]


def no_signal(forwarder: FakeForwarder) -> None:
    assert "'signal' is not a number" in forwarder.refused(signal=b"eleven")


def a_huge_number(forwarder: FakeForwarder) -> None:
    assert "'time' is not a number" in forwarder.refused(time=b"9" * 30)


def descriptors_in_the_offer(forwarder: FakeForwarder) -> None:
    body = protocol.encode_fields({"time": b"1"})
    with open("/dev/null", "rb") as null:
        forwarder.raw(protocol.encode_header(protocol.OFFER, {"time": b"1"}, body) + body, *[null.fileno()] * 5)
    assert b"'signal' is missing" in forwarder.answer().fields["reason"]


def too_many_descriptors_in_the_offer(forwarder: FakeForwarder) -> None:
    with open("/dev/null", "rb") as null:
        forwarder.raw(OFFER, *[null.fileno()] * 50)
    assert b"more" in forwarder.answer().fields["reason"]


BEFORE = [
    hang_up,
    garbage,
    half_a_header,
    half_a_body,
    silence,
    silence_in_a_header,
    silence_in_a_body,
    another_kind,
    only_optional_kinds,
    no_signal,
    a_huge_number,
    descriptors_in_the_offer,
    too_many_descriptors_in_the_offer,
]


def gone_after_the_answer(forwarder: FakeForwarder) -> None:
    forwarder.offered()


def silent_after_the_answer(forwarder: FakeForwarder) -> None:
    assert forwarder.offered().is_gone()


def garbage_for_a_core(forwarder: FakeForwarder) -> None:
    forwarder.offered().raw(b"\0" * 100)


def half_a_core_message(forwarder: FakeForwarder) -> None:
    forwarder.offered().raw(b"CP\4\1")


def an_offer_for_a_core(forwarder: FakeForwarder) -> None:
    forwarder.offered().offer()
    assert forwarder.is_gone()


def no_descriptor(forwarder: FakeForwarder) -> None:
    forwarder.offered().pass_core(names=b"core")
    assert forwarder.is_gone()


def wrong_names(forwarder: FakeForwarder) -> None:
    with open("/dev/null", "rb") as null:
        forwarder.offered().pass_core(null.fileno(), names=b"pidfd")
    assert forwarder.is_gone()


def fewer_names_than_descriptors(forwarder: FakeForwarder) -> None:
    with open("/dev/null", "rb") as null:
        forwarder.offered().pass_core(null.fileno(), null.fileno(), names=b"core")
    assert forwarder.is_gone()


def too_many_descriptors(forwarder: FakeForwarder) -> None:
    with open("/dev/null", "rb") as null:
        forwarder.offered().pass_core(*[null.fileno()] * 9)
    assert forwarder.is_gone()


def a_directory(forwarder: FakeForwarder) -> None:
    fd = os.open("/", os.O_RDONLY)
    forwarder.offered().pass_core(fd)
    os.close(fd)
    assert forwarder.done()["state"] == b"none"


def a_path_only(forwarder: FakeForwarder) -> None:
    fd = os.open("/etc/passwd", os.O_PATH)
    forwarder.offered().pass_core(fd)
    os.close(fd)
    assert forwarder.is_gone()


def the_wrong_end_of_a_pipe(forwarder: FakeForwarder) -> None:
    read, write = os.pipe()
    forwarder.offered().pass_core(write)
    os.close(write)
    os.close(read)
    assert forwarder.done()["state"] == b"none"


def a_listening_socket(forwarder: FakeForwarder) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind("")  # the kernel finds a name
        listener.listen()
        forwarder.offered().pass_core(listener.fileno())
    assert forwarder.done()["state"] == b"none"


def a_silent_pipe(forwarder: FakeForwarder) -> None:
    write = forwarder.offered().pass_pipe()
    assert forwarder.done()["reason"] == b"no byte of the core came for 0.3 s"
    os.close(write)


def a_pipe_that_falls_silent(forwarder: FakeForwarder) -> None:
    write = forwarder.offered().pass_pipe()
    feed(write, b"no core" * 1000)
    assert forwarder.done()["reason"] == b"the core was not kept: no byte of the core came for 0.3 s"
    os.close(write)


def the_connection_itself(forwarder: FakeForwarder) -> None:
    forwarder.offered().pass_core(forwarder.sock.fileno())
    forwarder.sock.shutdown(socket.SHUT_WR)


def gone_with_the_core(forwarder: FakeForwarder) -> None:
    os.close(forwarder.offered().pass_pipe())


# What a peer does, and what the record says then.
AFTER: list[tuple[Callable[[FakeForwarder], None], str]] = [
    (gone_after_the_answer, "the core could not be kept: the peer hung up"),
    (silent_after_the_answer, "the core could not be kept: timed out"),
    (garbage_for_a_core, "the core could not be kept: the header does not begin with 'CP'"),
    (half_a_core_message, "the core could not be kept: the peer hung up"),
    (an_offer_for_a_core, "after the acceptance came kind 1 with 0 descriptors"),
    (no_descriptor, "after the acceptance came kind 4 with 0 descriptors, of which 1 are named"),
    (wrong_names, "with 1 descriptors, of which 1 are named"),
    (fewer_names_than_descriptors, "with 2 descriptors, of which 1 are named"),
    (too_many_descriptors, "than the protocol allows"),
    (a_directory, "(Is a directory)"),
    (a_path_only, "Bad file descriptor"),
    (the_wrong_end_of_a_pipe, "(Bad file descriptor)"),
    (a_listening_socket, "(Invalid argument)"),
    (a_silent_pipe, "no byte of the core came for 0.3 s"),
    (a_pipe_that_falls_silent, "no byte of the core came for 0.3 s"),
    (the_connection_itself, ""),
    (gone_with_the_core, "the kernel ended the dump before its first byte"),
]


@pytest.fixture(scope="module")
def target(container: PlainContainer) -> Iterator[Running]:
    """A receiver with short deadlines, which has served once."""
    with running(container, offer_seconds="0.3", stall_seconds="0.3") as found:
        with found.connect() as forwarder:
            assert forwarder.offered().send_core(CORE)["state"] == b"stored"
        yield found
        assert found.stop() == 0


@contextlib.contextmanager
def unharmed(found: Running, more: int) -> Iterator[None]:
    """Whatever happens in the block leaves `more` records, no process, no descriptor; and the next core is stored."""
    wait_until(lambda: not found.workers(), 20, "no worker is left from before")
    before, descriptors, mark = len(found.records()), found.count_descriptors(), len(found.said())
    yield
    found.wait_for_records(before + more)
    with found.connect() as forwarder:
        assert forwarder.offered().send_core(CORE)["state"] == b"stored"
    found.wait_for_records(before + more + 1)
    wait_until(lambda: not found.workers(), 20, "no worker is left")
    # Who has just made the worker that stands ready may still have that one's end of the tie.
    wait_until(lambda: found.count_descriptors() <= descriptors, 20, "no descriptor is left")
    said = found.said()[mark:]
    assert "Traceback" not in said
    assert "worker" not in said, said
    directory = f"{found.container.root}{found.store}"
    assert [name for name in os.listdir(directory) if name.startswith(".") and name not in BOOKS] == []


@pytest.mark.parametrize("misbehave", BEFORE)
def test_a_peer_that_makes_no_offer(target: Running, misbehave: Callable[[FakeForwarder], None]) -> None:
    with unharmed(target, more=0), target.connect() as forwarder:
        misbehave(forwarder)


@pytest.mark.parametrize(("misbehave", "reason"), AFTER)
def test_a_peer_that_brings_no_core(target: Running, misbehave: Callable[[FakeForwarder], None], reason: str) -> None:
    """What was accepted has a record, whatever comes then."""
    with unharmed(target, more=1):
        with target.connect() as forwarder:
            misbehave(forwarder)
        before = len(target.records())
        wait_until(lambda: not target.workers() or len(target.records()) > before, 20, "the record")
    record = target.records()[-2]
    assert record["core"]["state"] == "none", record["core"]
    assert reason in record["core"]["reason"]


def test_many_that_hang_up_at_any_byte(target: Running) -> None:
    with unharmed(target, more=0):
        for length in range(0, len(OFFER), 7):
            with target.connect() as forwarder:
                forwarder.raw(OFFER[:length] or b"C")


def test_a_forwarder_that_does_not_wait_for_the_result(target: Running) -> None:
    with unharmed(target, more=1), target.connect() as forwarder:
        write = forwarder.offered().pass_pipe()
        forwarder.close()
        feed(write, CORE)
        os.close(write)
    assert target.records()[-2]["core"]["state"] == "stored"


# Limits.


def test_a_soft_limit_of_zero_wants_the_record_only(target: Running) -> None:
    with unharmed(target, more=1), target.connect() as forwarder:
        forwarder.offer(core_limit=b"0")
        answer = forwarder.answer()
        assert (answer.kind, answer.fields["want"]) == (protocol.ACCEPT, b"record")
        assert forwarder.done()["state"] == b"none"
    core = target.records()[-2]["core"]
    assert (core["state"], core["reason"]) == ("none", "the soft core limit (ulimit -c) of the process is 0")


@pytest.mark.parametrize(("limit", "state"), [(len(CORE), "stored"), (len(CORE) - 1, "reduced"), (1, "none")])
def test_a_soft_limit_smaller_than_the_core(target: Running, limit: int, state: str) -> None:
    with unharmed(target, more=1), target.connect() as forwarder:
        write = forwarder.offered(core_limit=b"%d" % limit).pass_pipe()
        with contextlib.suppress(BrokenPipeError):
            feed(write, CORE)
        os.close(write)
        assert forwarder.done()["state"] == state.encode()
    record = target.records()[-2]
    assert record["core_limit"] == limit
    assert record["core"]["state"] == state
    assert record["core"]["whole_bytes"] == len(CORE)
    if state == "reduced":
        assert 0 < record["core"]["size_bytes"] <= limit
        assert record["core"]["reason"].endswith(f"the soft core limit (ulimit -c) allows {limit} bytes")
    elif state == "none":
        expected = f"its headers and registers alone, 4096 bytes, leave nothing of {limit} (the soft core limit"
        assert expected in record["core"]["reason"]


def test_core_max(container: PlainContainer) -> None:
    with running(container, core_max="1M") as found:
        for data, state in (
            (CORE, "reduced"),
            (CORE[: MIB // 2], "reduced"),
            (b"x" * MIB, "stored"),
            (b"x" * 2 * MIB, "none"),
        ):
            with found.connect() as forwarder:
                write = forwarder.offered().pass_pipe()
                with contextlib.suppress(BrokenPipeError):
                    feed(write, data)
                os.close(write)
                assert forwarder.done()["state"] == state.encode()
        for record in found.wait_for_records(4):
            assert record["core"]["size_bytes"] <= MIB
            if record["core"]["state"] == "reduced":
                assert record["core"]["reason"].endswith(f"core_max allows {MIB} bytes")
            elif record["core"]["state"] == "none":
                assert record["core"]["reason"].endswith(f"more than {MIB} bytes (core_max)")
        assert found.stop() == 0


def fill_up(path: str) -> None:
    with open(path, "ab", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(b"x" * 4096)


def test_a_store_that_is_full(container: PlainContainer) -> None:
    """The disk is the container's, 2 MiB small: what fits of the core, the reason, and nothing left over."""
    data = elf64([(0x1000, 8 * MIB)]) + random.Random(1).randbytes(8 * MIB)
    with running(container, store="/small/store", store_max="off", keep_free="off") as found:
        directory = Path(f"{container.root}/small/store")
        for n in range(3):
            with found.connect() as forwarder:
                write = forwarder.offered().pass_pipe()
                with contextlib.suppress(BrokenPipeError):
                    feed(write, data)
                os.close(write)
                assert forwarder.done()["state"] == b"reduced"
            record = found.wait_for_records(n + 1)[-1]
            assert "the file system is full" in record["core"]["reason"]
            assert record["core"]["size_bytes"] > MIB // 2
            # What follows the crash is done.
            wait_until(lambda: not found.workers(), 20, "the worker has ended")
            names = {name for name in os.listdir(directory) if not name.endswith(".json")}
            assert names - BOOKS == {os.path.basename(record["core"]["path"])}
        # Somebody else takes the rest while a core is written: the kernel itself says no.
        with found.connect() as forwarder:
            write = forwarder.offered().pass_pipe()
            feed(write, data[:MIB])
            wait_until(lambda: list(directory.glob(".*.room")), 20, "room is promised")
            fill_up(f"{container.root}/small/others")
            with contextlib.suppress(BrokenPipeError):
                feed(write, data[MIB:])
            os.close(write)
            assert forwarder.done()["state"] in (b"reduced", b"none")
        wait_until(lambda: not found.workers(), 20, "the worker has ended")
        # Not a byte for a record either, and no core that could go: it is refused, and the next receiver is asked.
        for core in directory.glob("*.core*"):
            core.unlink()
        fill_up(f"{container.root}/small/others")
        with found.connect() as forwarder:
            reason = forwarder.refused()
            assert "its store cannot be written" in reason
            assert "No space left on device" in reason
        os.unlink(f"{container.root}/small/others")
        with found.connect() as forwarder:
            assert forwarder.offered().send_core(CORE)["state"] == b"stored"
        wait_until(lambda: not found.workers(), 20, "the worker has ended")
        assert found.stop() == 0
        # The crash whose record had no room has one as soon as somebody looks after the store.
        with running(container, store="/small/store"):
            wait_until(lambda: len(found.records()) == 5, 20, "all five")
            wait_until(
                lambda: {name for name in os.listdir(directory) if name.startswith(".")} <= BOOKS, 20, "all is told"
            )
    container.run(["rm", "-r", "/small/store"], check=True)


@pytest.mark.parametrize("kind", ["link", "file", "writable"])
def test_a_store_that_cannot_be_used_refuses_with_the_reason(container: PlainContainer, kind: str) -> None:
    path = f"/var/lib/wrong-{kind}"
    make = {"link": f"ln -s /tmp {path}", "file": f"touch {path}", "writable": f"mkdir -m 0777 {path}"}
    container.run(["sh", "-c", make[kind]], check=True)
    with running(container, store=path) as found:
        with found.connect() as forwarder:
            assert forwarder.refused().startswith(f"{path}: ")
        assert path in found.said()
        assert found.stop() == 0


# Settings.


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ("workers = 0\n", "{}: workers: '0' is out of range. Allowed: a whole number from 1 to 64."),
        ("worker = 3\n", "{}: worker: there is no such setting. Did you mean 'workers'?"),
        ("workers = [\n", "{}: is not TOML"),
    ],
)
def test_wrong_settings(container: PlainContainer, settings: str, said: str) -> None:
    path = "/run/wrong.toml"
    Path(f"{container.root}{path}").write_text(settings, encoding="ascii")
    expected = said.format(path)
    # CORE_PIPE_CONFIG
    with running(container, config=path) as found:
        assert found.process.wait(20) == 78
        assert expected in found.said()
        assert not os.path.exists(found.socket_path)
    with systemds_socket() as listener:
        with contextlib.ExitStack() as stack:
            waiting = [stack.enter_context(FakeForwarder(listener.getsockname())) for _ in range(3)]
            for forwarder in waiting:
                forwarder.offer()
            with running(container, activated=listener, config=path) as found:
                for forwarder in waiting:
                    reason = forwarder.answer()
                    assert reason.kind == protocol.REFUSE
                    assert expected in reason.fields["reason"].decode()
                assert found.process.wait(20) == 78
                assert found.records() == []
        with (
            connection(listener) as (accepted, forwarder),
            running(container, activated=accepted, config=path) as found,
        ):
            accepted.close()
            assert expected in forwarder.refused()
            assert found.process.wait(20) == 78


def test_no_socket_is_said(container: PlainContainer) -> None:
    for arguments, status, said in (
        ([], 2, "systemd passed no socket. Start core_pipe-forward.socket, or listen with --listen PATH"),
        (["--listen", "/run/no/where"], 1, "/run/no/where: cannot listen there (No such file or directory)"),
        (["--listen", "/etc/passwd"], 1, "/etc/passwd: is not a socket"),
        (["--listen", "/etc/passwd/x"], 1, "/etc/passwd/x: cannot listen there (Not a directory)"),
        (["--listen", "/run/" + "x" * 120], 1, "cannot listen there (AF_UNIX path too long)"),
    ):
        done = container.run([PROGRAM, *arguments])
        assert done.returncode == status, done
        assert said in done.stderr
        assert "Traceback" not in done.stderr


def test_two_at_the_same_socket(container: PlainContainer) -> None:
    with running(container) as found:
        path = "/run/" + os.path.basename(found.socket_path)
        done = container.run([PROGRAM, "--listen", path])
        assert (done.returncode, done.stdout) == (1, "")
        assert f"{path}: another receiver listens there. Stop it first" in done.stderr
        with found.connect() as forwarder:
            assert forwarder.offered().send_core(CORE)["state"] == b"stored"
        assert found.stop() == 0


def test_a_socket_that_is_no_stream(container: PlainContainer) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as wrong, running(container, activated=wrong) as found:
        assert found.process.wait(20) == 1
        assert "descriptor 3 from systemd is not a unix stream socket" in found.said()


# The real thing: its own crashes, its users, its workers' death.


@pytest.fixture(scope="module")
def forwarder() -> Iterator[Forwarder]:
    with forwarder_installed() as found:
        yield found


UNLIMITED = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
# The receiver without its first defence: PR_SET_DUMPABLE stays as it was.
DUMPABLE = "import sys, prctl; prctl.set_dumpable = lambda _: 0; from receiver.cli import main; main(sys.argv[1:])"


@needs_machine
@pytest.mark.parametrize("victim", ["service", "worker"])
@pytest.mark.parametrize(("not_dumpable", "limited"), [(True, True), (True, False), (False, True), (False, False)])
@pytest.mark.parametrize("number", [signal.SIGSEGV, signal.SIGABRT])
def test_the_receiver_causes_no_loop_of_crashes(
    container: PlainContainer, forwarder: Forwarder, victim: str, not_dumpable: bool, limited: bool, number: int
) -> None:
    """Two defences, each enough; without both, the kernel does dump it (so this test can see it)."""
    before = len(forwarder.records())
    path, store = "/run/core_pipe.socket", f"/var/lib/own-{random.getrandbits(32):x}"
    command = [PROGRAM] if not_dumpable else [f"{BIN}/python", "-c", DUMPABLE]
    with tempfile.TemporaryFile() as said:
        process = container.popen([*command, "--listen", path], env={"CORE_PIPE_STORE": store}, stderr=said)
        try:
            socket_path = f"{container.root}{path}"
            wait_until(lambda: os.path.exists(socket_path), 20, "the receiver listens")
            with FakeForwarder(socket_path) as fake:
                fake.offered()
                (worker_pid,) = processes.serving(process.host_pid)
                pid = process.host_pid if victim == "service" else worker_pid
                if not limited:
                    resource.prlimit(pid, resource.RLIMIT_CORE, UNLIMITED)
                os.kill(pid, number)
                if victim == "service":
                    dumped = os.WCOREDUMP(process.reaped(20)["status"])
                else:
                    assert fake.is_gone()
            if victim == "worker":
                # The crash that it served has its record. One that is stored afterwards comes after all that its own
                # crash could have caused.
                expected = ["crash", "fake"] if not_dumpable or limited else ["crash", "fake", "python"]
                assert crash(container, "SEGV").core_dumped
                found = wait_for_records(container, len(expected), store)
                assert sorted(record["comm"] for record in found) == expected
                dumped = "python" in expected
        finally:
            process.end()
            container.run(["rm", "-rf", path, store])
    if victim == "service" and not dumped:
        crash(container, "SEGV")
        wait_until(lambda: len(forwarder.records()) > before, 20, "the record of a crash that nobody took")
        assert [record["comm"] for record in forwarder.records()[before:]] == ["crash"]
    assert dumped == (not not_dumpable and not limited)


@needs_machine
@pytest.mark.usefixtures("forwarder")
def test_a_worker_that_is_killed_during_a_real_dump() -> None:
    # A slow level, so that there is a middle.
    environment = {"CORE_PIPE_COMPRESSION_LEVEL": "19"}
    with PlainContainer() as container, resident(container, env=environment) as receiver:
        with start_crash(container, "SEGV", "--wait", "--fill", str(64 * MIB), "random") as crashing:
            crashing.go()
            store = Path(f"{container.root}/var/lib/core_pipe")
            wait_until(lambda: list(store.glob(".*.room")), 20, "a core that is being written")
            (worker_pid,) = processes.serving(receiver.process.host_pid)
            os.kill(worker_pid, signal.SIGKILL)
            # The process is let go at once. (Its "core dumped" says only that the kernel had begun.)
            crashing.result(20)
        first = wait_for_records(container, 1)[0]
        assert first["core"]["state"] == "none"
        assert first["core"]["reason"].startswith("interrupted")
        assert (first["comm"], first["pid"]) == ("crash", crashing.pid)
        assert crash(container, "SEGV").core_dumped
        assert wait_for_records(container, 2)[1]["core"]["state"] == "stored"


@needs_machine
def test_a_user_has_his_own_cores(forwarder: Forwarder) -> None:
    forwarder.machine.suid_dumpable = 2
    with PlainContainer() as container, resident(container):
        crash(container, "SEGV", "--uid", "1000", "--gid", "1000")
        crash(container, "SEGV")
        # A program that he may not read (suid_dumpable is 2): its core would show it.
        container.run(["install", "-m", "0711", compile_crasher("crash"), "/tmp/unreadable"], check=True)
        # Not setpriv(1), which keeps the capabilities until the program runs: it would be readable.
        become = "import os, sys; os.setgroups([]); os.setresgid(*[1000] * 3); os.setresuid(*[1000] * 3); "
        user = ["/usr/bin/python3", "-c", become + "os.execv(sys.argv[1], sys.argv[1:])"]
        container.run([*user, "/tmp/unreadable", "SEGV"])
        records = wait_for_records(container, 3)
        assert [record["uid"] for record in records] == [1000, 0, 1000]
        assert [record["dumpable"] for record in records] == [1, 1, 2]
        assert [record["core"]["state"] for record in records] == ["stored"] * 3
        readers = []
        for record in records:
            path = f"{container.root}{record['core']['path']}"
            with contextlib.suppress(OSError):
                os.getxattr(path, ACL)
                readers.append(record["id"])
        assert readers == [records[0]["id"]]
        as_user = [*user, f"{BIN}/corepipectl"]
        said = container.run([*as_user, "list", "--json"], check=True)
        assert [record["id"] for record in json.loads(said.stdout)] == readers
        said = container.run([*as_user, "dump", readers[0], "-o", "/tmp/core"], check=True)
        done = container.run(["stat", "-c", "%a %u", "/tmp/core"])
        assert done.stdout == "600 1000\n"


@needs_machine
@pytest.mark.usefixtures("forwarder")
def test_a_name_that_forges_a_line_of_its_status() -> None:
    """H13: the crash of a process that calls itself so was lost to a ValueError."""
    with PlainContainer() as container, resident(container):
        for name in (b"\rUid:\tx", b"\rGroups:\tx", b"\n)\xff 0 0"):
            assert crash(container, "SEGV", "--comm", name).core_dumped
        records = wait_for_records(container, 3)
        assert [record["core"]["state"] for record in records] == ["stored"] * 3
        assert [record["uid"] for record in records] == [0] * 3
        assert records[0]["comm"] == "\rUid:\tx"
        assert records[2]["comm"] == "\n)\\xff 0 0"
