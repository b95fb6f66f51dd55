"""A real journal in a container that has no systemd, and Debian's coredumpctl to read it."""

from __future__ import annotations

import contextlib
import functools
import glob
import json
import os
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.support.waiting import wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.support.containers import Container, Inside

JOURNALD = "/lib/systemd/systemd-journald"
SOCKET = "/run/systemd/journal/socket"
CGROUPS = "/sys/fs/cgroup"
MESSAGE_ID = "fc2e22bc6ee647b6b90729ab34a250b1"


def unpack_coredump(base: str) -> str:
    """Download Debian's systemd-coredump and unpack it. Returns where: an installation would take core_pattern.

    Raises RuntimeError when it cannot be had.
    """
    done = subprocess.run(
        ["apt-get", "-q", "-o", "APT::Sandbox::User=root", "download", "systemd-coredump"],
        cwd=base, capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    packages = glob.glob(f"{base}/systemd-coredump_*.deb")
    if done.returncode != 0 or not packages:
        raise RuntimeError(f"apt-get download systemd-coredump: {done.stderr}. Run apt-get update")
    subprocess.run(["dpkg-deb", "-x", packages[0], f"{base}/x"], check=True, timeout=60)
    return f"{base}/x"


@functools.cache
def coredumpctl() -> bytes | None:
    """Return the program, None when it cannot be had (no network)."""
    with tempfile.TemporaryDirectory(prefix="coredumpctl-", dir="/tmp") as base:
        try:
            return Path(unpack_coredump(base), "usr/bin/coredumpctl").read_bytes()
        except (RuntimeError, subprocess.SubprocessError, OSError):
            return None


def why_unavailable() -> str | None:
    for program in ("apt-get", "dpkg-deb", JOURNALD, "journalctl"):
        if not shutil.which(program):
            return f"needs {program}"
    return None


def prepare_coredumpctl(directory: str) -> None:
    """For a container's `prepare`: the program in its /usr/bin. Raises RuntimeError when it cannot be had."""
    program = coredumpctl()
    if program is None:
        raise RuntimeError("systemd-coredump cannot be downloaded: run apt-get update")
    path = Path(directory, "usr/bin/coredumpctl")
    path.write_bytes(program)
    path.chmod(0o755)


class Journal:
    """The journal of a container. process: its journald, where the tests have started it."""

    def __init__(self, container: Container, process: Inside | None = None) -> None:
        self.container = container
        self.process = process

    def answers(self) -> bool:
        return self.container.run(["journalctl", "--sync"]).returncode == 0

    def entries(self, *matches: str) -> list[dict[str, Any]]:
        """Return entries as journalctl exports them; fields that are no text as lists of numbers."""
        found = self.container.run(
            ["journalctl", "--quiet", "--all", "--no-pager", "--output=json", *matches], check=True
        )
        return [json.loads(line) for line in found.stdout.splitlines()]

    def crashes(self) -> list[dict[str, Any]]:
        return self.entries(f"MESSAGE_ID={MESSAGE_ID}")

    def wait_for_crashes(self, count: int, timeout: float = 20) -> list[dict[str, Any]]:
        """Wait for entries of crashes, oldest first: they come when the record is there already."""

        def enough() -> list[dict[str, Any]] | None:
            found = self.crashes()
            return found if len(found) >= count else None

        found: list[dict[str, Any]] = wait_until(enough, timeout, f"{count} entries")
        return found


@contextlib.contextmanager
def journald(container: Container) -> Iterator[Journal]:
    """Run the real systemd-journald in a container without systemd; its files are in /run/log/journal."""
    container.run(["mkdir", "-p", "/run/systemd/journal", "/run/log/journal", CGROUPS], check=True)
    # It wants to look up who sends.
    container.run(["sh", "-c", f"mountpoint -q {CGROUPS} || mount -t cgroup2 cgroup2 {CGROUPS}"], check=True)
    process = container.popen([JOURNALD], env={"SYSTEMD_LOG_TARGET": "null"})
    try:
        found = Journal(container, process)
        wait_until(found.answers, 20, "journald listens")
        yield found
    finally:
        process.end()
        with contextlib.suppress(OSError):
            os.unlink(f"{container.root}{SOCKET}")
