"""The way to a container's socket: whatever stands there, a core goes to the container's root or past it."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import time
from typing import TYPE_CHECKING

import pytest

from forwarder import rendezvous
from tests.support.containers import Host, PlainContainer
from tests.support.crash import crash
from tests.support.mounts import CHECKOUT
from tests.support.receivers import BIN, SOCKET, Forwarder, fake_receiver, forwarder_installed, list_records, resident
from tests.support.waiting import read_line, wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = pytest.mark.kernel

# By the receiver's name, so that a link in the place of /run leads there, too.
TRAP_DIRECTORY = "/tmp/core_pipe-test-trap"
HOST_TRAP = f"{TRAP_DIRECTORY}/core_pipe.socket"

NO_RUN = "umount /run; rm -rf /run"


@pytest.fixture(scope="module")
def forwarder() -> Iterator[Forwarder]:
    with forwarder_installed(CORE_PIPE_FORWARDER_CONNECT_SECONDS="1") as found:
        yield found


@pytest.fixture
def container() -> Iterator[PlainContainer]:
    with PlainContainer() as found:
        yield found


@pytest.fixture
def trap() -> Iterator[list[bytes]]:
    """A listener of the host's, at which a container may point: it must never hear a word."""
    script = os.path.join(CHECKOUT, "tests/support/trap.py")
    os.makedirs(TRAP_DIRECTORY, exist_ok=True)
    process = subprocess.Popen([os.path.join(BIN, "python"), script, HOST_TRAP], stdout=subprocess.PIPE)
    heard: list[bytes] = []
    try:
        assert process.stdout is not None
        assert read_line(process.stdout.fileno(), 20, "the trap listens") == b"ready\n"
        yield heard
        process.terminate()
        heard += process.stdout.read().splitlines()
        assert heard == [], "a socket of the host's was told something"
    finally:
        process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()
        with contextlib.suppress(FileNotFoundError):
            os.unlink(HOST_TRAP)
        os.rmdir(TRAP_DIRECTORY)


def tried(forwarder: Forwarder, container: PlainContainer) -> list[str]:
    """Crash, and return why the container's place was not used, from the record that is on the host."""
    before = len(forwarder.records())
    found = crash(container, "SEGV", timeout=30)
    assert found.signal is not None
    record = wait_until(lambda: forwarder.records()[before:], 20, "a record on the host")[-1]
    assert record["core"]["state"] == "none"
    return list(record["tried"])


def shell(container: PlainContainer, script: str) -> None:
    container.run(["sh", "-ec", script], check=True)


@pytest.mark.usefixtures("trap")
@pytest.mark.parametrize(
    ("script", "reason"),
    [
        pytest.param(f"ln -s {HOST_TRAP} {SOCKET}", "is not a socket", id="absolute-link-at-socket"),
        pytest.param("ln -s real.socket /run/core_pipe.socket", "is not a socket", id="relative-link-at-socket"),
        pytest.param("ln -s /nowhere /run/core_pipe.socket", "is not a socket", id="dangling-link"),
        pytest.param(f"{NO_RUN}; ln -s {TRAP_DIRECTORY} /run", "is not a directory", id="absolute-link-at-run"),
        pytest.param(f"{NO_RUN}; ln -s ../../..{TRAP_DIRECTORY} /run", "is not a directory", id="relative-link-at-run"),
        pytest.param(f"{NO_RUN}; ln -s /run /run", "is not a directory", id="link-loop-at-run"),
        pytest.param(f"{NO_RUN}; touch /run", "is not a directory", id="run-is-a-file"),
        pytest.param(NO_RUN, "there is no /run", id="no-run"),
        pytest.param("mkfifo /run/core_pipe.socket", "is not a socket", id="fifo"),
        pytest.param("touch /run/core_pipe.socket", "is not a socket", id="file"),
        pytest.param("mkdir /run/core_pipe.socket", "is not a socket", id="directory"),
        pytest.param("mknod /run/core_pipe.socket c 1 3", "is not a socket", id="device"),
    ],
)
def test_what_is_not_a_socket(forwarder: Forwarder, container: PlainContainer, script: str, reason: str) -> None:
    """H2: an absolute link is resolved against the root of whoever follows it, here the host's."""
    shell(container, script)
    found = tried(forwarder, container)
    assert found[0].startswith("own root: ")
    assert reason in found[0]


def test_relative_link_to_the_real_socket_is_refused_too(forwarder: Forwarder, container: PlainContainer) -> None:
    """Its target could be swapped between look and use; there is one way to be found, and no link is part of it."""
    with resident(container, path="/run/real.socket"):
        shell(container, f"ln -s real.socket {SOCKET}")
        assert "is not a socket" in tried(forwarder, container)[0]
        assert list_records(container) == []


def test_datagram_socket(forwarder: Forwarder, container: PlainContainer) -> None:
    script = (
        f"import socket,time; s=socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM); s.bind('{SOCKET}');"
        "print('ready', flush=True); time.sleep(1e6)"
    )
    process = container.popen(["python3", "-c", script], stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None
        assert read_line(process.stdout.fileno(), 20, "the socket") == b"ready\n"
        assert "its socket cannot be connected (Protocol wrong type for socket)" in tried(forwarder, container)[0]
    finally:
        process.end()


@pytest.mark.usefixtures("trap")
def test_host_socket_bind_mounted_into_the_container(forwarder: Forwarder) -> None:
    def prepare(directory: str) -> None:
        # The container's own /run, with the host's socket mounted at the receiver's name.
        os.makedirs(f"{directory}/run", exist_ok=True)
        target = f"{directory}{SOCKET}"
        with open(target, "w", encoding="ascii"):
            pass
        subprocess.run(["mount", "--bind", HOST_TRAP, target], check=True)

    with PlainContainer(prepare=prepare) as container:
        shell(container, "umount /run")
        assert container.run(["test", "-S", SOCKET]).returncode == 0
        assert "its listener is not inside it" in tried(forwarder, container)[0]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ("chmod 0777", "may be connected by others than its root (mode 0777)"),
        ("chmod 0620", "may be connected by others than its root (mode 0620)"),
        ("chown 1000", "its socket and listener are not both its root's"),
    ],
)
def test_socket_that_others_than_root_own_or_reach(
    forwarder: Forwarder, container: PlainContainer, change: str, reason: str
) -> None:
    """H10."""
    with resident(container):
        shell(container, f"{change} {SOCKET}")
        assert reason in tried(forwarder, container)[0]
        assert list_records(container) == []


def test_listener_that_is_not_root(forwarder: Forwarder, container: PlainContainer) -> None:
    """A user of the container listens at a socket that he had root's file for."""
    script = (
        "import os,socket,time; s=socket.socket(socket.AF_UNIX); os.umask(0o177); s.bind('/run/core_pipe.socket');"
        "os.setresuid(1000,1000,1000); s.listen(5); print('ready', flush=True); time.sleep(1e6)"
    )
    process = container.popen(["python3", "-c", script], stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None
        assert read_line(process.stdout.fileno(), 20, "the listener") == b"ready\n"
        assert "its socket and listener are not both its root's" in tried(forwarder, container)[0]
    finally:
        process.end()


def test_listener_that_is_root_in_a_namespace_of_his_own(forwarder: Forwarder, container: PlainContainer) -> None:
    """Where anybody may write to /run: a user of the container is root by his own map, and so is his socket's owner."""
    shell(container, "chmod 1777 /run")
    script = (
        f"import os,socket,time; s=socket.socket(socket.AF_UNIX); os.umask(0o177); s.bind('{SOCKET}');"
        "s.listen(5); print('ready', os.geteuid(), flush=True); time.sleep(1e6)"
    )
    user = ["setpriv", "--reuid=1000", "--regid=1000", "--clear-groups", "unshare", "--user", "--map-root-user"]
    process = container.popen([*user, "python3", "-c", script], stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None
        assert read_line(process.stdout.fileno(), 20, "the listener") == b"ready 0\n"
        assert "its listener's user namespace does not own the process" in tried(forwarder, container)[0]
    finally:
        process.end()


def test_fake_receiver_of_the_hosts_at_a_path_in_the_container(forwarder: Forwarder) -> None:
    """A process of the host that entered only the mount namespace listens there: it is not the container's."""
    with PlainContainer() as container, Host() as host:
        target = f"{container.root}{SOCKET}"
        with fake_receiver(host, "refuse", target):
            assert "its listener is not inside it" in tried(forwarder, container)[0]


@pytest.mark.skipif(not os.path.exists("/dev/fuse"), reason="needs FUSE: modprobe fuse")
def test_a_file_system_that_never_answers(forwarder: Forwarder, container: PlainContainer) -> None:
    """Whoever looks the socket up there hangs, past SIGKILL. The stub does not, and lets the crashed process go."""
    script = os.path.join(CHECKOUT, "tests/support/hanging_fs.py")
    container.run(["mknod", "/tmp/fuse", "c", "10", "229"], check=True)
    container.run(["sh", "-c", "test -e /dev/fuse || cp -a /tmp/fuse /dev/fuse"], check=True)
    process = container.popen([os.path.join(BIN, "python"), script, "/run"], stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None
        assert read_line(process.stdout.fileno(), 20, "the file system is mounted") == b"ready\n"
        # It ends by itself, and its slot is free: nobody else holds the core.
        assert tried(forwarder, container)[0] == "own root: what stands there does not answer"
        # The one that looked is there still, and counts for its container.
        assert stuck_stubs(forwarder)
    finally:
        # Its end ends the requests, and those who wait for them.
        process.end()
    wait_until(lambda: not stuck_stubs(forwarder), 20, "the stuck process ends")


def stuck_stubs(forwarder: Forwarder) -> list[int]:
    launcher = forwarder.paths.runtime.launcher.encode()
    return [pid for pid in map(int, filter(str.isdigit, os.listdir("/proc"))) if launcher in _command_line(pid)]


def _command_line(pid: int) -> bytes:
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as file:
            return file.read()
    except (FileNotFoundError, ProcessLookupError):
        return b""


def test_a_socket_that_is_swapped_is_not_the_one_that_was_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between look and connect(2) the name is another socket's: the connection goes to the first."""
    (tmp_path / "run").mkdir()
    path = tmp_path / "run/core_pipe.socket"
    seen, swapped = (socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) for _ in range(2))
    with seen, swapped:
        for listener in (seen, swapped):
            with contextlib.suppress(FileNotFoundError):
                os.rename(path, tmp_path / "run/old")
            listener.bind(str(path))
            listener.listen(5)
        os.rename(path, tmp_path / "run/other")
        os.rename(tmp_path / "run/old", path)
        look = rendezvous.find_socket

        def look_and_swap(root: int) -> int:
            found = look(root)
            os.rename(tmp_path / "run/other", path)
            return found

        monkeypatch.setattr(rendezvous, "find_socket", look_and_swap)
        root = os.open(tmp_path, os.O_PATH | os.O_DIRECTORY)
        try:
            rendezvous.connect(root, time.monotonic() + 5).channel.close()
        finally:
            os.close(root)
        for listener, asked in ((seen, True), (swapped, False)):
            listener.setblocking(False)
            try:
                listener.accept()[0].close()
                assert asked
            except BlockingIOError:
                assert not asked
