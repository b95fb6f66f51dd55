"""What /proc says about processes, by host pids."""

from __future__ import annotations

import contextlib
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


def listens(pid: int) -> bool:
    """Whether a process holds a listening unix socket."""
    listening = set()
    try:
        with open(f"/proc/{pid}/net/unix", encoding="ascii", errors="replace") as file:
            for line in list(file)[1:]:
                # Num RefCount Protocol Flags Type St Inode Path. <linux/net.h>: __SO_ACCEPTCON
                words = line.split()
                if int(words[3], 16) & 1 << 16:
                    listening.add(f"socket:[{words[6]}]")
        for name in os.listdir(f"/proc/{pid}/fd"):
            with contextlib.suppress(FileNotFoundError):
                if os.readlink(f"/proc/{pid}/fd/{name}") in listening:
                    return True
    except (FileNotFoundError, ProcessLookupError):
        pass
    return False


def serving(receiver: int) -> list[int]:
    """The workers of a receiver that have a connection: not the spare one, which listens."""
    return [pid for pid in children(receiver) if not listens(pid)]


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
