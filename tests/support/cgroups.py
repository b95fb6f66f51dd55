"""A cgroup of a container's own, whichever of v1, hybrid and v2 this machine has."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import TYPE_CHECKING

from tests.support import processes
from tests.support.waiting import wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator


def hierarchies() -> dict[str, str]:
    """Mount points by controller; "" is v2's, "name=systemd" systemd's own v1 one."""
    found: dict[str, str] = {}
    with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as file:
        for line in file:
            before, _, after = line.rstrip("\n").partition(" - ")
            kind, _, options = after.split(" ", 2)
            where = before.split(" ")[4]
            # A container's tests see the mounts of the tests' own containers too: only the machine's own are meant.
            if not where.startswith("/sys/fs/cgroup"):
                continue
            if kind == "cgroup2":
                found.setdefault("", where)
            elif kind == "cgroup":
                with open("/proc/self/cgroup", encoding="utf-8") as own:
                    known = {name for entry in own for name in entry.split(":")[1].split(",")}
                for name in known.intersection(options.split(",")):
                    found.setdefault(name, where)
    return found


def directories_of(pid: int) -> list[str]:
    """The cgroup directories that a process (by its host pid) is in, one a hierarchy."""
    mounts = hierarchies()
    found = []
    with open(f"/proc/{pid}/cgroup", encoding="utf-8", errors="surrogateescape") as file:
        for line in file:
            _, controllers, path = line.rstrip("\n").split(":", 2)
            mount = next((mounts[name] for name in controllers.split(",") if name in mounts), None)
            if mount is not None:
                found.append(mount + path.rstrip("/"))
    return found


class Cgroup:
    """A cgroup at the top of every hierarchy that matters (memory, cpu, pids, systemd's, v2's).

    `directories` are what a process joins; `memory_directory` has the memory controller's files.
    """

    # cpuset wants to be set up before a process can join; the others limit nothing here.
    _V1 = ("memory", "cpu", "pids", "name=systemd")

    def __init__(self, name: str, memory_bytes: int | None = None) -> None:
        mounts = hierarchies()
        self.name = name
        wanted = {mounts[key] for key in ("", *self._V1) if key in mounts}
        self.directories = sorted(os.path.join(mount, name) for mount in wanted)
        self.version = 1 if "memory" in mounts else 2
        self.memory_directory = os.path.join(mounts.get("memory", mounts.get("", "/sys/fs/cgroup")), name)
        self.cpu_directory = os.path.join(mounts.get("cpu", mounts.get("", "/sys/fs/cgroup")), name)
        try:
            if self.version == 2:
                self._delegate(os.path.dirname(self.memory_directory))
            for directory in self.directories:
                os.makedirs(directory, exist_ok=True)
            if memory_bytes is not None:
                self._limit_memory(memory_bytes)
        except BaseException:
            self.remove()
            raise

    @staticmethod
    def _delegate(parent: str) -> None:
        """Give the cgroups below a v2 one these controllers; systemd has done that already on most machines."""
        for controller in ("memory", "cpu", "pids"):
            with contextlib.suppress(OSError), open(os.path.join(parent, "cgroup.subtree_control"), "w") as file:
                file.write(f"+{controller}")

    def _limit_memory(self, limit: int) -> None:
        with open(
            os.path.join(self.memory_directory, self._name("limit_in_bytes", "max")), "w", encoding="ascii"
        ) as file:
            file.write(str(limit))

    def limit_cpu(self, percent: int) -> None:
        """Give its processes so much of one processor, in periods of 100 ms."""
        quota = f"{percent * 1000}"
        if self.version == 1:
            Path(self.cpu_directory, "cpu.cfs_quota_us").write_text(quota, encoding="ascii")
        else:
            Path(self.cpu_directory, "cpu.max").write_text(f"{quota} 100000", encoding="ascii")

    def throttled(self) -> int:
        """How often the processor was withheld."""
        text = Path(self.cpu_directory, "cpu.stat").read_text(encoding="ascii")
        return dict(_counters(text))["nr_throttled"]

    def _name(self, v1: str, v2: str) -> str:
        return f"memory.{v1 if self.version == 1 else v2}"

    def _read(self, name: str) -> str:
        with open(os.path.join(self.memory_directory, name), encoding="ascii") as file:
            return file.read()

    def memory_usage(self) -> int:
        """Bytes now, page cache included."""
        return int(self._read(self._name("usage_in_bytes", "current")))

    def memory_peak(self) -> int:
        """The most bytes ever, page cache included (v2: since Linux 5.19)."""
        return int(self._read(self._name("max_usage_in_bytes", "peak")))

    def memory_limit_hits(self) -> int:
        """How often the limit was hit (and memory was reclaimed, or a process killed)."""
        if self.version == 1:
            return int(self._read("memory.failcnt"))
        return dict(_counters(self._read("memory.events")))["max"]

    def out_of_memory_kills(self) -> int:
        text = self._read("memory.oom_control" if self.version == 1 else "memory.events")
        return dict(_counters(text)).get("oom_kill", 0)

    def processes(self) -> list[int]:
        """Host pids of everything in this cgroup and below it."""
        found: set[int] = set()
        for directory in self.directories:
            for below, _, _ in os.walk(directory):
                try:
                    with open(os.path.join(below, "cgroup.procs"), encoding="ascii") as file:
                        found.update(int(pid) for pid in file.read().split())
                except (FileNotFoundError, OSError):
                    continue
        return sorted(found - {0})

    def kill(self) -> None:
        """SIGKILL to everything in it. Only for a cgroup that nothing else than the test's processes can be in."""
        for pid in self.processes():
            processes.kill_exactly(pid, processes.start_time(pid))

    def remove(self, timeout: float = 10) -> None:
        """Remove it, and what a container runtime made of the same name in other hierarchies.

        Raises TimeoutError when processes stay in it.
        """
        wait_until(lambda: _removed(self.name), timeout, f"the cgroup {self.name} empty and removed")


def _counters(text: str) -> Iterator[tuple[str, int]]:
    for line in text.splitlines():
        name, _, value = line.partition(" ")
        yield name, int(value)


def _removed(name: str) -> bool:
    gone = True
    for mount in set(hierarchies().values()):
        top = os.path.join(mount, name)
        for below, _, _ in os.walk(top, topdown=False):
            try:
                os.rmdir(below)
            except FileNotFoundError:
                continue
            except OSError:
                gone = False
    return gone
