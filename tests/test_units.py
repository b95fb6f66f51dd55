"""The units as they are installed: what systemd itself says about them, and the promises that their comments make."""

from __future__ import annotations

import json
import shutil
import subprocess
from configparser import RawConfigParser
from pathlib import Path
from typing import Any

import pytest

from forwarder import ingress
from forwarder.install import Paths
from receiver import images

SYSTEMD = Path(__file__).parent.parent / "systemd"
FORMS: dict[str, dict[str, bool]] = {
    "core_pipe-forward@.service": {"accept": True},
    "core_pipe-forward.service": {"accept": False},
    "core_pipe-host.service": {"host": True},
}
SOCKETS = ["core_pipe-forward.socket", "core_pipe-host.socket"]
# systemd-analyze's own scale: 0 is closed, 10 is open.
MOST_EXPOSURE = 2.5
# What systemd 252 looks at.
KNOWN_DOORS = set(
    """
    AmbientCapabilities CapabilityBoundingSet Delegate DeviceAllow IPAddressDeny KeyringMode LockPersonality
    MemoryDenyWriteExecute NoNewPrivileges NotifyAccess PrivateDevices PrivateMounts PrivateNetwork PrivateTmp
    PrivateUsers ProcSubset ProtectClock ProtectControlGroups ProtectHome ProtectHostname ProtectKernelLogs
    ProtectKernelModules ProtectKernelTunables ProtectProc ProtectSystem RemoveIPC RestrictAddressFamilies
    RestrictNamespaces RestrictRealtime RestrictSUIDSGID RootDirectory SupplementaryGroups SystemCallArchitectures
    SystemCallFilter UMask User
    """.split()  # noqa: SIM905 - a list of so many is read best like this
)

needs_analyze = pytest.mark.skipif(
    shutil.which("systemd-analyze") is None, reason="needs systemd-analyze. Run: apt install systemd"
)


class Unit:
    """A unit file with its drop-ins, as text: what stands there, in order."""

    def __init__(self, *paths: Path) -> None:
        self.lines: list[tuple[str, str, str]] = []
        for path in paths:
            section = ""
            for line in path.read_text().splitlines():
                if line.startswith("["):
                    section = line.strip("[]")
                elif line and not line.startswith("#"):
                    name, equals, value = line.partition("=")
                    assert equals, f"{path}: {line}"
                    self.lines.append((section, name, value))

    def all(self, name: str) -> list[str]:
        return [value for _, key, value in self.lines if key == name]

    def last(self, name: str) -> str | None:
        return next(reversed(self.all(name)), None)


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tree for each form, with a program in it: what an image gets."""
    trees = {}
    for service, form in FORMS.items():
        root = tmp_path_factory.mktemp("image")
        program = root / "usr/bin/core-pipe-receiver"
        program.parent.mkdir(parents=True)
        program.write_text("#!/bin/sh\n")
        program.chmod(0o755)
        images.install(str(root), accept=form.get("accept", True), host=form.get("host", False))
        trees[service] = root
    return trees


def unit_of(root: Path, name: str) -> Unit:
    directory = root / "etc/systemd/system"
    return Unit(directory / name, *sorted((directory / f"{name}.d").glob("*.conf")))


def analyze(*arguments: str) -> str:
    done = subprocess.run(["systemd-analyze", *arguments], capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@needs_analyze
@pytest.mark.parametrize("service", FORMS)
def test_systemd_finds_nothing_to_complain_about(service: str, installed: dict[str, Path]) -> None:
    socket = SOCKETS[service == "core_pipe-host.service"]
    said = analyze(
        "verify", f"--root={installed[service]}", "--man=no", socket, service.replace("@.service", "@1.service")
    )
    ours = [line for line in said.splitlines() if "core_pipe" in line]
    assert ours == []


@needs_analyze
@pytest.mark.parametrize("service", FORMS)
def test_the_sandbox_goes_as_far_as_it_can(service: str, installed: dict[str, Path]) -> None:
    root = f"--root={installed[service]}"
    analyze("security", "--offline=true", f"--threshold={round(MOST_EXPOSURE * 10)}", "--no-pager", root, service)
    table: list[dict[str, Any]] = json.loads(analyze("security", "--offline=true", "--json=short", root, service))
    open_doors = {row["name"].split("=")[0] for row in table if row["exposure"] and float(row["exposure"]) > 0}
    explained = (SYSTEMD / "core_pipe-.service.d/10-sandbox.conf").read_text()
    # What later versions of systemd look at besides is theirs to score.
    for name in open_doors & KNOWN_DOORS:
        assert name in explained, f"{name}= is open, and 10-sandbox.conf does not say why"


@pytest.mark.parametrize("service", FORMS)
def test_the_source_tree_is_as_closed_as_what_is_installed(service: str) -> None:
    """Who looks at a unit file in systemd/ sees the sandbox, too: its folder's name is a prefix of all of them."""
    path = str(SYSTEMD / service)
    analyze("security", "--offline=true", f"--threshold={round(MOST_EXPOSURE * 10)}", "--no-pager", path)


@pytest.mark.parametrize("service", FORMS)
def test_every_service_has_the_sandbox(service: str, installed: dict[str, Path]) -> None:
    unit = unit_of(installed[service], service)
    # The analysis leaves these out for units that run outside of the normal boot.
    assert unit.last("ProtectSystem") == "strict"
    assert unit.last("ProtectHome") == "yes"
    assert unit.last("InaccessiblePaths") == "-/tmp -/var/tmp"
    # A loop of dumps ends here.
    assert unit.last("LimitCORE") == "1"
    assert unit.last("UMask") == "0077"
    # Quotas hold for root without it.
    assert "CAP_SYS_RESOURCE" not in " ".join(unit.all("CapabilityBoundingSet"))
    assert "CAP_SYS_PTRACE" in " ".join(unit.all("CapabilityBoundingSet"))


@pytest.mark.parametrize("service", FORMS)
def test_no_option_that_a_container_without_privileges_cannot_start(service: str, installed: dict[str, Path]) -> None:
    """Where it may not make a mount namespace, systemd leaves the other options out; these it insists on."""
    unit = unit_of(installed[service], service)
    for name in ("RootDirectory", "RootImage", "TemporaryFileSystem", "DynamicUser", "LogNamespace", "BindPaths"):
        assert unit.all(name) == [], name


@pytest.mark.parametrize("service", FORMS)
def test_crashes_during_a_shutdown_are_served(service: str, installed: dict[str, Path]) -> None:
    """Seen: with any of these, no service starts once a shutdown has begun."""
    unit = unit_of(installed[service], service)
    assert unit.last("DefaultDependencies") == "no"
    assert unit.all("Conflicts") == []
    # Both come with dependencies of their own: on /tmp's mount, on systemd-remount-fs.service.
    assert unit.all("PrivateTmp") == []
    assert unit.all("StateDirectory") == []
    assert unit.all("After") == ["systemd-journald.socket"]
    # A template's default slice is stopped first.
    assert unit.last("Slice") == ("system.slice" if "@" in service else None)


@pytest.mark.parametrize("service", FORMS)
def test_stopping_lets_a_write_finish(service: str, installed: dict[str, Path]) -> None:
    unit = unit_of(installed[service], service)
    assert unit.last("KillMode") == "mixed"
    assert unit.last("TimeoutStopSec") == "15min"
    assert unit.all("RuntimeMaxSec") == unit.all("MemoryMax") == []
    assert unit.all("StandardInput") == []


def test_one_process_a_crash(installed: dict[str, Path]) -> None:
    root = installed["core_pipe-forward@.service"]
    socket, service = unit_of(root, SOCKETS[0]), unit_of(root, "core_pipe-forward@.service")
    assert socket.last("Accept") == "yes"
    assert socket.last("MaxConnections") == "10"
    assert socket.last("Backlog") == "5"
    # A storm of crashes never fails the socket.
    assert socket.last("TriggerLimitIntervalSec") == "0"
    assert service.last("Type") == "exec"
    assert service.last("Restart") == "no"
    assert service.last("CollectMode") == "inactive-or-failed"


@pytest.mark.parametrize("service", ["core_pipe-forward.service", "core_pipe-host.service"])
def test_one_service_for_all(service: str, installed: dict[str, Path]) -> None:
    socket = unit_of(installed[service], service.replace(".service", ".socket"))
    unit = unit_of(installed[service], service)
    assert socket.last("Accept") == "no"
    assert unit.last("Type") == "notify"
    # A receiver that cannot start is tried again, but not in a busy loop, and does not fail the socket.
    assert (unit.last("Restart"), unit.last("RestartSec"), unit.last("StartLimitIntervalSec")) == (
        "on-failure",
        "1s",
        "0",
    )
    assert socket.last("TriggerLimitIntervalSec") != "0"
    assert unit.last("OOMPolicy") == "continue"
    assert unit.last("PartOf") == service.replace(".service", ".socket")


@pytest.mark.parametrize("name", SOCKETS)
def test_the_sockets(name: str) -> None:
    unit = Unit(SYSTEMD / name)
    assert unit.last("ListenStream") == "/run/core_pipe.socket"
    assert unit.last("SocketMode") == "0600"
    assert unit.last("PassCredentials") == "true"
    assert unit.last("RemoveOnStop") == "yes"
    assert unit.last("WantedBy") == "sockets.target"
    assert unit.last("Before") == "sockets.target"
    assert unit.last("DefaultDependencies") == "no"
    assert unit.last("ConditionVirtualization") == ("!container" if "host" in name else "container")


@needs_analyze
def test_systemd_finds_nothing_to_complain_about_the_forwarders(tmp_path: Path) -> None:
    program = tmp_path / "usr/bin/core-pipe-forwarder"
    program.parent.mkdir(parents=True)
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    units = tmp_path / "etc/systemd/system"
    units.mkdir(parents=True)
    for name in ("core_pipe-forwarder.socket", "core_pipe-forwarder.service"):
        shutil.copy(SYSTEMD / name, units)
    said = analyze("verify", f"--root={tmp_path}", "--man=no", "core_pipe-forwarder.socket")
    assert [line for line in said.splitlines() if "core_pipe" in line] == []


def test_the_forwarders_units() -> None:
    socket, service = Unit(SYSTEMD / "core_pipe-forwarder.socket"), Unit(SYSTEMD / "core_pipe-forwarder.service")
    assert socket.last("ListenStream") == Paths().kernel_socket
    assert socket.last("SocketMode") == "0600"
    assert socket.last("Accept") == "no"
    # The kernel does not wait at a full queue.
    assert socket.last("Backlog") == str(ingress.BACKLOG)
    # First the listener, then the way in; and back.
    assert socket.last("ExecStartPost") == "/usr/bin/core-pipe-forwarder ingress socket"
    assert socket.last("ExecStopPre") == "/usr/bin/core-pipe-forwarder ingress pipe"
    assert socket.last("RemoveOnStop") == "yes"
    assert service.last("Type") == "notify"
    assert service.last("WatchdogSec") is not None
    assert service.last("LimitCORE") == "0"
    assert service.last("KillMode") == "process"
    assert service.all("PartOf") == []
    for unit in (socket, service):
        assert unit.last("DefaultDependencies") == "no"
        assert unit.all("Conflicts") == []


def test_the_forwarder_stays_in_the_hosts_mount_namespace() -> None:
    """It stands for the host: each of these would make it another place."""
    service = Unit(SYSTEMD / "core_pipe-forwarder.service")
    names = {name for _, name, _ in service.lines}
    assert not [name for name in names if name.startswith(("Protect", "Private", "Root", "Bind", "Temporary", "Mount"))]
    assert not names & {"ReadOnlyPaths", "ReadWritePaths", "InaccessiblePaths", "StateDirectory", "DynamicUser", "User"}


def test_the_hosts_service_is_the_containers() -> None:
    """Two names for one thing: systemd has no include, so this holds them together."""

    def meat(name: str) -> list[tuple[str, str, str]]:
        differs = ("Description", "PartOf", "RequiresMountsFor")
        return [line for line in Unit(SYSTEMD / name).lines if line[1] not in differs]

    assert meat("core_pipe-host.service") == meat("core_pipe-forward.service")


def test_sections_are_ones_that_systemd_knows() -> None:
    for path in [*SYSTEMD.glob("*.service"), *SYSTEMD.glob("*.socket"), *SYSTEMD.glob("*.conf")]:
        parser = RawConfigParser(strict=False, allow_no_value=True)
        parser.read(path)
        assert set(parser.sections()) <= {"Unit", "Service", "Socket", "Install"}, path


def test_the_store_has_no_age() -> None:
    lines = (SYSTEMD / "tmpfiles.d/core_pipe.conf").read_text().splitlines()
    assert [line.split() for line in lines if not line.startswith("#")] == [
        ["d", "/var/lib/core_pipe", "0755", "root", "root", "-"]
    ]


@pytest.mark.skipif(shutil.which("systemd-tmpfiles") is None, reason="needs systemd-tmpfiles. Run: apt install systemd")
def test_tmpfiles_makes_the_store(tmp_path: Path) -> None:
    images.install(str(tmp_path))
    store = tmp_path / "var/lib/core_pipe"
    store.rmdir()
    subprocess.run(["systemd-tmpfiles", "--create", f"--root={tmp_path}", "core_pipe.conf"], check=True, timeout=30)
    assert store.is_dir()
    assert store.stat().st_mode & 0o7777 == 0o755
