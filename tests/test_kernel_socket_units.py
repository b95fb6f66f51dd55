"""core_pipe-forwarder.socket and .service as they are installed, kept by a real systemd, and served to the kernel.

The units are what `install` writes. Drop-ins move the socket to where this run has its files, and shorten what would
take a test too long.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from pathlib import Path
from typing import TYPE_CHECKING
from unittest import mock

import pytest

from forwarder import ingress
from forwarder.install import PATTERN, Paths, read_sysctl
from forwarder.staging import InstallError
from tests.support import manager as managers
from tests.support import processes
from tests.support.containers import Host, PlainContainer
from tests.support.crash import crash, start_crash
from tests.support.machine import why_unavailable
from tests.support.manager import Manager
from tests.support.mounts import CHECKOUT
from tests.support.receivers import (
    BIN,
    CONNECT_SECONDS,
    INGRESSES,
    SOCKET_INGRESS,
    Forwarder,
    forwarder_installed,
    resident,
    wait_for_records,
)
from tests.support.waiting import wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = [
    pytest.mark.kernel,
    pytest.mark.skipif(why_unavailable() is not None, reason=why_unavailable() or ""),
    pytest.mark.skipif(managers.why_unavailable() is not None, reason=managers.why_unavailable() or ""),
    pytest.mark.skipif(SOCKET_INGRESS not in INGRESSES, reason="this kernel has no coredump socket (Linux 6.17 has)"),
]

SOCKET_UNIT, SERVICE_UNIT = ingress.UNITS
ROOMY = {"CORE_PIPE_SAME_MAX": "off", "CORE_PIPE_LOOP_MAX": "off"}
# A machine for tests may look like a container to systemd (a file /.dockerenv is enough).
ANYWHERE = ("[Unit]", "ConditionVirtualization=")
# The installed program, with its files below a folder.
PROGRAM = """\
#!{python}
import sys
sys.path.insert(0, {checkout!r})
from forwarder import cli, install
install.HOST = install.Paths(prefix={base!r})
sys.exit(cli.main())
"""


class Units:
    """The units, installed for a manager. A context manager; `uninstall` is its end."""

    def __init__(self, manager: Manager, forwarder: Forwarder) -> None:
        self.manager = manager
        self.forwarder = forwarder
        self.said = Path(forwarder.base, "said")
        self.program = Path(forwarder.base, "core-pipe-forwarder")
        self.program.write_text(
            PROGRAM.format(python=os.path.join(BIN, "python"), checkout=CHECKOUT, base=forwarder.base), encoding="ascii"
        )
        self.program.chmod(0o755)
        self.socket_drop_in(*ANYWHERE)
        self.service_drop_in()

    @property
    def path(self) -> str:
        return self.forwarder.paths.kernel_socket

    def socket_drop_in(self, *lines: str) -> None:
        self.manager.drop_in(SOCKET_UNIT, ["[Socket]", "ListenStream=", f"ListenStream={self.path}", *lines])

    def service_drop_in(self, *lines: str, arguments: str = "") -> None:
        """What every test needs, with lines of its own, and with arguments for `serve`."""
        own = [
            "[Service]",
            f"Environment=CORE_PIPE_STORE={self.forwarder.store}",
            f"Environment=CORE_PIPE_FORWARDER_CONNECT_SECONDS={CONNECT_SECONDS}",
            f"StandardError=append:{self.said}",
        ]
        if arguments:
            own += ["ExecStart=", f"ExecStart={self.program} serve {arguments}"]
        self.manager.drop_in(SERVICE_UNIT, [*own, *lines, *ANYWHERE])

    @contextlib.contextmanager
    def known(self) -> Iterator[None]:
        """Have `install` take the manager for the machine's systemd, and this program for the installed one."""
        here = str(self.manager.units)
        with (
            mock.patch.object(ingress, "systemd_keeps", return_value=True),
            mock.patch.object(ingress, "_unit_directories", return_value=(here, here)),
            mock.patch.object(ingress, "_program", return_value=str(self.program)),
            mock.patch.dict(os.environ, {"PATH": f"{self.manager.bin}:{os.environ['PATH']}"}),
        ):
            yield

    def install(self) -> list[str]:
        with self.known():
            return ingress.set_up(self.forwarder.paths, ingress.SOCKET, runtime=True)

    def uninstall(self) -> list[str]:
        with self.known():
            return ingress.take_down(self.forwarder.paths)

    def restart(self) -> None:
        """Have systemd read drop-ins anew."""
        self.manager.systemctl("daemon-reload")
        self.manager.systemctl("restart", SERVICE_UNIT)

    def is_active(self, unit: str) -> bool:
        return self.manager.show(unit, "ActiveState") == "active"

    def main_pid(self) -> int:
        return self.manager.main_pid(SERVICE_UNIT)

    def way_in(self) -> str | None:
        return ingress.way_in(read_sysctl(PATTERN), self.forwarder.paths)

    def kill(self) -> None:
        """SIGKILL to the service's first process, and to no other."""
        self.manager.systemctl("kill", "--kill-who=main", "--signal=KILL", SERVICE_UNIT)


@pytest.fixture
def units() -> Iterator[Units]:
    with forwarder_installed() as forwarder, Manager() as manager:
        found = Units(manager, forwarder)
        found.install()
        try:
            yield found
        finally:
            found.uninstall()


@pytest.fixture
def container(units: Units) -> Iterator[PlainContainer]:  # noqa: ARG001 - the machine must be ours
    with PlainContainer() as found, resident(found, env=ROOMY):
        yield found


def states(container: PlainContainer, count: int) -> list[str]:
    return [record["core"]["state"] for record in wait_for_records(container, count)]


def test_the_installed_units_serve_the_kernel(units: Units, container: PlainContainer) -> None:
    """READY has come (Type=notify), the kernel connects to systemd's socket, and the sandbox is on and in no way."""
    assert units.way_in() == "socket"
    assert units.is_active(SOCKET_UNIT)
    assert units.is_active(SERVICE_UNIT)
    pid = units.main_pid()
    assert crash(container, "SEGV").core_dumped
    assert crash(container, "ABRT", "--uid", "1234", "--dumpable", "2").core_dumped
    records = wait_for_records(container, 2)
    assert [record["core"]["state"] for record in records] == ["stored"] * 2
    # What the host's user is told needs each of the capabilities that the unit leaves.
    assert records[0]["exe"].endswith("/crash")
    assert units.main_pid() == pid
    status = processes_status(pid)
    assert (status["Seccomp"], status["NoNewPrivs"]) == ("2", "1")
    # None of those that the unit does not name: CAP_SYS_RESOURCE, CAP_NET_ADMIN, CAP_SYS_MODULE.
    assert not int(status["CapEff"], 16) & (1 << 24 | 1 << 12 | 1 << 16)
    assert processes.namespace(pid, "mnt") == processes.namespace("self", "mnt")
    assert not units.said.exists() or units.said.read_text() == ""


def processes_status(pid: int) -> dict[str, str]:
    lines = Path(f"/proc/{pid}/status").read_text(encoding="utf-8").split("\n")
    return {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}


def test_a_host_process_is_recorded(units: Units) -> None:
    """Its record is written by the service itself, in the host's store, from inside the sandbox."""
    with Host() as host:
        found = crash(host, "ABRT")
        (record,) = wait_for_records(host, 1, units.forwarder.store)
    assert (record["pid"], record["core"]["state"]) == (found.host_pid, "none")


def test_the_first_crash_starts_it(units: Units, container: PlainContainer) -> None:
    units.manager.systemctl("stop", SERVICE_UNIT)
    assert not units.is_active(SERVICE_UNIT)
    assert units.is_active(SOCKET_UNIT)
    assert units.way_in() == "socket"
    assert crash(container, "SEGV").core_dumped
    assert states(container, 1) == ["stored"]
    assert units.is_active(SERVICE_UNIT)


def test_it_leaves_when_idle_and_comes_back(units: Units, container: PlainContainer) -> None:
    units.service_drop_in(arguments="--idle-seconds 0.2")
    units.restart()
    for number in range(3):
        wait_until(lambda: units.manager.show(SERVICE_UNIT, "ActiveState") == "inactive", 20, "it is idle")
        assert units.manager.show(SERVICE_UNIT, "Result") == "success"
        assert units.is_active(SOCKET_UNIT)
        assert units.way_in() == "socket"
        assert crash(container, "SEGV").core_dumped
        assert states(container, number + 1) == ["stored"] * (number + 1)


def test_crashes_meet_a_service_that_comes_and_goes(units: Units, container: PlainContainer) -> None:
    """At whichever moment of its leaving: each is taken by this one or the next."""
    units.service_drop_in("[Unit]", "StartLimitIntervalSec=0", arguments="--idle-seconds 0.01")
    units.restart()
    pids = set()
    for number in range(20):
        assert crash(container, "SEGV").core_dumped
        pids.add(units.main_pid())
        if number % 4 == 3:
            wait_until(lambda: not units.is_active(SERVICE_UNIT), 20, "it is idle")
    assert states(container, 20) == ["stored"] * 20
    assert len(pids) > 1


def test_killed_with_crashes_under_way(units: Units, container: PlainContainer) -> None:
    with contextlib.ExitStack() as stack:
        crashes = [stack.enter_context(start_crash(container, "SEGV", "--wait")) for _ in range(16)]
        for number, crashing in enumerate(crashes):
            crashing.go()
            if number % 6 == 3:
                wait_until(units.main_pid, 20, "it runs")
                units.kill()
        assert all(crashing.result(60).core_dumped for crashing in crashes)
    assert states(container, 16) == ["stored"] * 16
    assert units.way_in() == "socket"
    wait_until(lambda: units.is_active(SERVICE_UNIT), 20, "it is started again")
    assert int(units.manager.show(SERVICE_UNIT, "NRestarts")) >= 1


def test_what_is_stuck_is_restarted_and_the_queue_is_served(units: Units, container: PlainContainer) -> None:
    """A stopped service says nothing, which the watchdog ends; whoever came meanwhile waited in the kernel."""
    units.service_drop_in("WatchdogSec=2s")
    units.restart()
    pid = units.main_pid()
    # Alive, it outlives the watchdog many times over: it says so in time.
    said = time.monotonic()
    wait_until(lambda: time.monotonic() > said + 5, 10, "more than two watchdogs' time")
    assert units.main_pid() == pid
    assert crash(container, "SEGV").core_dumped
    os.kill(pid, signal.SIGSTOP)
    with contextlib.ExitStack() as stack:
        crashes = [stack.enter_context(start_crash(container, "ABRT", "--wait")) for _ in range(4)]
        for crashing in crashes:
            crashing.go()
        # One stood ready and takes the first; nobody takes the others before the watchdog strikes.
        assert all(crashing.result(60).core_dumped for crashing in crashes)
    assert states(container, 5) == ["stored"] * 5
    wait_until(lambda: units.main_pid() not in (0, pid), 20, "another one runs")
    assert units.manager.show(SERVICE_UNIT, "NRestarts") == "1"
    assert units.way_in() == "socket"


def test_what_was_begun_goes_on_in_its_own_process(units: Units, container: PlainContainer) -> None:
    with start_crash(container, "SEGV", "--wait", "--fill", str(200 << 20), "random") as crashing:
        pid = units.main_pid()
        before = set(processes.children(pid))
        crashing.go()
        wait_until(lambda: set(processes.children(pid)) - before, 20, "a child has the crash")
        units.kill()
        assert crashing.result(60).core_dumped
    assert states(container, 1) == ["stored"]


def test_stopped_for_good_the_pipe_is_the_way_in(units: Units, container: PlainContainer) -> None:
    assert crash(container, "SEGV").core_dumped
    units.manager.systemctl("stop", SOCKET_UNIT)
    assert units.way_in() == "pipe"
    assert not os.path.exists(units.path)
    assert crash(container, "SEGV").core_dumped
    units.manager.systemctl("stop", SERVICE_UNIT)
    units.manager.systemctl("start", SOCKET_UNIT)
    assert units.way_in() == "socket"
    assert crash(container, "SEGV").core_dumped
    assert states(container, 3) == ["stored"] * 3


def test_a_service_that_cannot_start_gives_the_way_in_back(units: Units, container: PlainContainer) -> None:
    """It fails its socket, and that stops, with all that its stopping does."""
    settings = Path(units.forwarder.paths.at("/etc/core_pipe/forwarder.toml"))
    settings.parent.mkdir(parents=True)
    settings.write_text("connect_seconds = 'soon'\n", encoding="ascii")
    units.kill()
    wait_until(lambda: units.way_in() == "pipe", 60, "the pipe is the way in")
    wait_until(lambda: not units.is_active(SOCKET_UNIT), 20, "the socket is given up")
    assert "connect_seconds" in units.said.read_text()
    assert "Traceback" not in units.said.read_text()
    assert crash(container, "SEGV").core_dumped
    assert states(container, 1) == ["stored"]


def test_an_upgrade_and_an_uninstall(units: Units, container: PlainContainer) -> None:
    pid = units.main_pid()
    units.install()
    assert units.way_in() == "socket"
    assert units.main_pid() not in (0, pid)
    assert crash(container, "SEGV").core_dumped
    said = units.uninstall()
    assert [line for line in said if line.startswith("removed ")]
    assert not ingress.unit_files(Paths(prefix=str(units.manager.base)))
    assert units.way_in() == "pipe"
    assert units.manager.show(SERVICE_UNIT, "LoadState") == "not-found"
    assert crash(container, "SEGV").core_dumped
    assert states(container, 2) == ["stored"] * 2


def test_a_socket_that_systemd_skips_is_an_error(units: Units) -> None:
    """A condition that is not met is no failure of `systemctl start`; the service alone would be kept by nobody."""
    units.uninstall()
    units.socket_drop_in("[Unit]", "ConditionPathExists=/nonexistent")
    with pytest.raises(InstallError, match=f"{SOCKET_UNIT} was started, and core_pattern does not lead to it"):
        units.install()
    assert units.way_in() == "pipe"
    assert units.main_pid() == 0


def test_units_that_do_not_start_are_taken_away_again(units: Units) -> None:
    units.uninstall()
    units.service_drop_in("ExecStart=", "ExecStart=/bin/false")
    with pytest.raises(InstallError, match=SERVICE_UNIT):
        units.install()
    assert units.way_in() == "pipe"
    assert not list(units.manager.units.glob("*.service"))
