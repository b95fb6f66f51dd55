"""A systemd that keeps units on the machine itself, wherever its pid 1 comes from.

The kernel looks for its coredump socket in the initial mount namespace, and takes such a core_pattern from there only.
A container's systemd is outside of it. Root's own manager (`systemd --user`) is not: the same program with the same
sockets, watchdog, restarts and sandboxes, in the machine's namespaces.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import subprocess
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Self

from tests.support import crashers
from tests.support.cgroups import Cgroup
from tests.support.containers import Inside, _why_not
from tests.support.waiting import wait_until

if TYPE_CHECKING:
    from collections.abc import Sequence

_SYSTEMD = ("/usr/lib/systemd/systemd", "/lib/systemd/systemd")
# sd_booted(3): without it, systemd refuses to be anybody's manager.
_BOOTED = "/run/systemd/system"


def why_unavailable() -> str | None:
    """Why this machine cannot have one, with the command that mends it; None when it can."""
    if _program() is None:
        return "needs systemd: apt-get install systemd"
    return _why_not("systemctl", "systemd")


def _program() -> str | None:
    return next((path for path in _SYSTEMD if os.access(path, os.X_OK)), None)


class Manager:
    """systemd as root's own manager. A context manager; its services end with it.

    units: the folder for unit files. bin: a folder for PATH, where `systemctl` means this manager.
    """

    def __init__(self) -> None:
        self._stack = contextlib.ExitStack()
        self.base = ""

    @property
    def units(self) -> Path:
        return Path(self.base, "config/systemd/user")

    @property
    def bin(self) -> Path:
        return Path(self.base, "bin")

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as stack:
            self._stack = stack
            self._start()
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _start(self) -> None:
        self.base = tempfile.mkdtemp(prefix="core_pipe-manager-", dir="/tmp")
        self._stack.callback(shutil.rmtree, self.base, ignore_errors=True)
        for directory in (self.units, self.bin, Path(self.base, "run")):
            directory.mkdir(parents=True)
        environment = {
            "PATH": os.environ["PATH"],
            "HOME": self.base,
            "XDG_RUNTIME_DIR": f"{self.base}/run",
            "XDG_CONFIG_HOME": f"{self.base}/config",
            "XDG_DATA_HOME": f"{self.base}/data",
        }
        systemctl = self.bin / "systemctl"
        systemctl.write_text(
            f'#!/bin/sh\nXDG_RUNTIME_DIR={self.base}/run exec {shutil.which("systemctl")} --user "$@"\n',
            encoding="ascii",
        )
        systemctl.chmod(0o755)

        if not os.path.isdir(_BOOTED):
            os.makedirs(_BOOTED)
            self._stack.callback(shutil.rmtree, _BOOTED)
        cgroup = Cgroup(f"core_pipe-tests-manager-{secrets.token_hex(4)}")
        self._stack.callback(cgroup.remove)
        self._stack.callback(cgroup.kill)
        # SIGTERM has it stop its services and leave.
        enter = [crashers.compile_crasher("enter"), "--orphaned", str(int(signal.SIGTERM))]
        enter += [part for directory in cgroup.directories for part in ("--cgroup", directory)]
        command = [str(_program()), "--user", "--unit=basic.target", "--log-target=console", "--log-level=info"]
        log = Path(self.base, "log")
        with log.open("wb") as file:
            systemd = Inside(enter, command, env=environment, stdout=file, stderr=file)
        self._stack.callback(self._stop, systemd)

        def runs() -> bool:
            if systemd.poll() is not None:
                raise RuntimeError(f"systemd --user ended with {systemd.returncode}:\n{log.read_text()[-4000:]}")
            return self.systemctl("is-system-running", check=False).stdout == "running\n"

        wait_until(runs, 30, "systemd --user runs")

    @staticmethod
    def _stop(systemd: Inside) -> None:
        if systemd.poll() is None:
            systemd.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                systemd.wait(15)
        systemd.end()

    def systemctl(self, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Say something to this manager. With check, raises RuntimeError with what it answered."""
        command = [str(self.bin / "systemctl"), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
        if check and done.returncode:
            raise RuntimeError(f"systemctl {' '.join(arguments)}: {done.stdout}{done.stderr}{self.log()[-4000:]}")
        return done

    def show(self, unit: str, name: str) -> str:
        """Return a property of a unit."""
        return self.systemctl("show", "--value", f"--property={name}", unit).stdout.strip()

    def main_pid(self, unit: str) -> int:
        return int(self.show(unit, "MainPID"))

    def drop_in(self, unit: str, lines: Sequence[str]) -> None:
        """Set or replace the tests' drop-in of a unit."""
        directory = self.units / f"{unit}.d"
        directory.mkdir(exist_ok=True)
        (directory / "tests.conf").write_text("\n".join(lines) + "\n", encoding="ascii")

    def log(self) -> str:
        """What the manager said; and its services, as far as they do not say it elsewhere."""
        return Path(self.base, "log").read_text(encoding="utf-8", errors="replace")
