"""What /proc says about processes, by host pids."""

from __future__ import annotations

import os
import signal


def start_time(pid: int) -> int | None:
    """When a process started (clock ticks since boot), which with the pid names it; None when there is none."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            return int(file.read().rpartition(b")")[2].split()[19])
    except (FileNotFoundError, ProcessLookupError):
        return None


def children(pid: int) -> list[int]:
    try:
        with open(f"/proc/{pid}/task/{pid}/children", encoding="ascii") as file:
            return [int(child) for child in file.read().split()]
    except (FileNotFoundError, ProcessLookupError):
        return []


def namespace(pid: int | str, name: str) -> str | None:
    """The identity of a namespace of a process, such as "mnt:[4026531841]"; None when it cannot be seen."""
    try:
        return os.readlink(f"/proc/{pid}/ns/{name}")
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return None


def in_namespace(identity: str, name: str) -> list[int]:
    """Every process in a namespace."""
    return [int(pid) for pid in os.listdir("/proc") if pid.isdigit() and namespace(pid, name) == identity]


def kill_exactly(pid: int, started: int | None) -> None:
    """SIGKILL to the process that had this pid at this start time, and to no other."""
    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        if started is not None and start_time(pid) == started:
            signal.pidfd_send_signal(pidfd, signal.SIGKILL)
    except ProcessLookupError:
        pass
    finally:
        os.close(pidfd)
