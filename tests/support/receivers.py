"""Receivers in containers and on the host, the forwarder on the machine, and what they keep."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

from forwarder import ingress as ways_in
from forwarder import install
from receiver import images
from tests.support.containers import Container, Host, Inside
from tests.support.machine import Machine, exclusive
from tests.support.mounts import CHECKOUT
from tests.support.waiting import read_line, wait_until

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

BIN = os.path.join(CHECKOUT, ".venv/bin")
SOCKET = "/run/core_pipe.socket"
STORE = "/var/lib/core_pipe"
# Short, so that tests of receivers that do not answer are; long enough for a busy machine.
CONNECT_SECONDS = "3"
STALL_SECONDS = "4"

PIPE, SOCKET_INGRESS = "pipe", "socket"
# For `@pytest.fixture(scope="module", params=INGRESSES)`: each way in that this kernel has.
INGRESSES = (PIPE, SOCKET_INGRESS) if ways_in.kernel_has_socket() else (PIPE,)


class Forwarder:
    """The forwarder, installed on this machine for a while, and the host's own store beside it."""

    def __init__(self, machine: Machine, base: str, ingress: str = PIPE) -> None:
        self.machine = machine
        self.base = base
        self.ingress = ingress
        self.service: subprocess.Popen[bytes] | None = None
        self.store = os.path.join(base, "store")
        self.paths = install.Paths(prefix=base)

    def records(self) -> list[dict[str, Any]]:
        """What the host's store has, oldest first."""
        return list_records(Host(), self.store)


@contextlib.contextmanager
def forwarder_installed(ingress: str = PIPE, **settings: str) -> Iterator[Forwarder]:
    """Hold the machine, install the forwarder below a folder of its own, and take everything away again.

    ingress: one of INGRESSES; for the socket, a resident service runs as long (`Forwarder.service`).
    """
    with exclusive() as machine:
        base = tempfile.mkdtemp(prefix="cp-", dir="/tmp")
        # Users of the host look into their own cores.
        os.chmod(base, 0o755)
        try:
            forwarder = Forwarder(machine, base, ingress)
            environment = {
                "CORE_PIPE_STORE": forwarder.store,
                "CORE_PIPE_FORWARDER_CONNECT_SECONDS": CONNECT_SECONDS,
                "CORE_PIPE_FORWARDER_BUSY_SECONDS": CONNECT_SECONDS,
                "CORE_PIPE_FORWARDER_STALL_SECONDS": STALL_SECONDS,
                **settings,
            }
            with mock.patch.dict(os.environ, environment):
                install.install(forwarder.paths, runtime=True)
            try:
                if ingress == SOCKET_INGRESS:
                    with serving(forwarder, environment):
                        yield forwarder
                else:
                    yield forwarder
            finally:
                install.uninstall(forwarder.paths)
        finally:
            shutil.rmtree(base)


SERVE = """\
import sys
from forwarder import ingress, install
ingress.serve(install.Paths(prefix=sys.argv[1]), say=lambda line: print(line, flush=True))
"""


@contextlib.contextmanager
def serving(forwarder: Forwarder, environment: dict[str, str]) -> Iterator[None]:
    """Run the resident service of the kernel's socket, which is the way in then; it must leave cleanly."""
    service = subprocess.Popen(
        [os.path.join(BIN, "python"), "-c", SERVE, forwarder.base],
        env={"PATH": os.environ["PATH"], "LANG": "C.UTF-8", **environment},
        cwd=CHECKOUT,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        # A Ctrl-C is for the tests, which then end what they started.
        start_new_session=True,
    )
    forwarder.service = service
    try:
        assert service.stdout is not None
        assert read_line(service.stdout.fileno(), 20, "the service takes over").startswith(b"kernel.core_pattern = @@")
        yield
        if service.poll() is None:
            service.send_signal(signal.SIGTERM)
            # Those that it began have deadlines of their own.
            assert service.wait(60) == 0
    finally:
        if service.poll() is None:
            service.kill()
            service.wait()
        assert service.stdout is not None
        service.stdout.close()


def prepare_units(*, accept: bool, settings: str = "") -> Callable[[str], None]:
    """Return a `prepare` for systemd containers: the units, enabled offline, as an image maintainer has them."""

    def prepare(directory: str) -> None:
        images.install(directory, accept=accept, program=os.path.join(BIN, "core-pipe-receiver"))
        if settings:
            path = Path(directory, "etc/core_pipe/receiver.toml")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(settings, encoding="utf-8")

    return prepare


class Resident:
    """A resident receiver (`--listen`)."""

    def __init__(self, process: Inside) -> None:
        self.process = process

    def stop(self, timeout: float = 30) -> int:
        """SIGTERM, and return its exit status."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        return self.process.wait(timeout)


@contextlib.contextmanager
def resident(
    container: Container, *, store: str = STORE, path: str = SOCKET, env: dict[str, str] | None = None
) -> Iterator[Resident]:
    """Run a resident receiver in a container until the block ends; then it must leave cleanly."""
    environment = {"CORE_PIPE_STORE": store, **(env or {})}
    process = container.popen(
        [os.path.join(BIN, "core-pipe-receiver"), "--listen", path], env=environment, stderr=subprocess.PIPE
    )
    receiver = Resident(process)
    try:
        socket_path = Path(f"{container.root}{path}")
        wait_until(lambda: socket_path.is_socket() or process.poll() is not None, 20, "the receiver listens")
        if process.poll() is not None:
            assert process.stderr is not None
            raise RuntimeError(f"the receiver ended with {process.returncode}: {process.stderr.read()!r}")
        yield receiver
        assert receiver.stop() == 0
    finally:
        process.end()
        with contextlib.suppress(FileNotFoundError):
            os.unlink(f"{container.root}{path}")


@contextlib.contextmanager
def host_receiver(forwarder: Forwarder, **env: str) -> Iterator[Resident]:
    """Run the host's own receiver."""
    with Host() as host, resident(host, store=forwarder.store, env=env) as receiver:
        yield receiver


def list_records(container: Container, store: str = STORE) -> list[dict[str, Any]]:
    """What a store has, oldest first, by the project's own program inside the container."""
    found = container.run([os.path.join(BIN, "corepipectl"), "--store", store, "list", "--json"], check=True)
    return list(json.loads(found.stdout))


def wait_for_records(
    container: Container, count: int = 1, store: str = STORE, timeout: float = 30
) -> list[dict[str, Any]]:
    """Wait until a store has `count` records; the crashed process is let go before its record is there."""

    def enough() -> list[dict[str, Any]] | None:
        found = list_records(container, store)
        return found if len(found) >= count else None

    found: list[dict[str, Any]] = wait_until(enough, timeout, f"{count} records in {store}")
    return found


def dump(container: Container, match: str, target: Path, store: str = STORE) -> Path:
    """Take a core out of a store, through the container's own corepipectl, into a file of the host's."""
    with target.open("wb") as file:
        process = container.popen(
            [os.path.join(BIN, "corepipectl"), "--store", store, "dump", match], stdout=file, stderr=subprocess.PIPE
        )
        _, err = process.communicate(timeout=120)
    status = process.returncode
    process.end()
    assert status == 0, err
    return target


def gdb(program: str, core: Path, *commands: str) -> str:
    """What gdb says of a core."""
    arguments = [part for command in commands for part in ("-ex", command)]
    done = subprocess.run(
        ["gdb", "-nx", "-batch", "-ex", "set debuginfod enabled off", *arguments, program, str(core)],
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
        timeout=120,
        env={"PATH": os.environ["PATH"], "HOME": "/nonexistent", "LANG": "C.UTF-8"},
    )
    return done.stdout + done.stderr


@contextlib.contextmanager
def fake_receiver(container: Container, mode: str, path: str = SOCKET) -> Iterator[Inside]:
    """Run a receiver that misbehaves (tests/support/fake_receiver.py) in a container."""
    script = os.path.join(CHECKOUT, "tests/support/fake_receiver.py")
    process = container.popen([os.path.join(BIN, "python"), script, mode, path], stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None
        assert read_line(process.stdout.fileno(), 20, "the fake receiver listens") == b"ready\n"
        yield process
    finally:
        process.end()
        container.run(["rm", "-f", path])
