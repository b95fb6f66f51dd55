"""What is to be seen of a process whose dump has just begun, and of those that work on it."""

from __future__ import annotations

import contextlib
import fcntl
import os
import struct
import time
from typing import TYPE_CHECKING

from forwarder import namespaces
from forwarder.handled import inode_of
from forwarder.ledger.book import Crash
from forwarder.share import key_of

if TYPE_CHECKING:
    from forwarder.proc_events import Dump

KTHREADD = 2

# <linux/pidfd.h>: _IOWR(0xFF, 11, struct pidfd_info), and its size with the coredump mask in it (6.16, a2cd2d8c8d2f).
PIDFD_INFO_SIZE = 72
PIDFD_GET_INFO = 3 << 30 | PIDFD_INFO_SIZE << 16 | 0xFF << 8 | 11
PIDFD_INFO_COREDUMP = 1 << 4
COREDUMP_MASK_AT = 64
PIDFD_COREDUMP_SKIP = 2


def boot_id() -> str:
    """Return what tells this boot from every other."""
    return namespaces.read_at(-1, "/proc/sys/kernel/random/boot_id", 64).decode("ascii").strip()


def look(dump: Dump, boot: str) -> Crash:
    """Return what can be seen of a process whose dump has just begun; little, when it is over already.

    Nothing is read that the process's memory or a file system of its container would have to answer for: those may
    hang (`forwarder/apart.py`).
    """
    now = time.monotonic_ns()
    crash = Crash(boot=boot, began=dump.at, at=time.time() - (now - dump.at) / 1e9, pid=dump.pid, tid=dump.tid)
    with contextlib.suppress(OSError):
        pattern = namespaces.read_at(-1, "/proc/sys/kernel/core_pattern", 256)
        crash.ours = is_ours(pattern)
        crash.by_socket = pattern.startswith(b"@")
    task = pidfd = -1
    try:
        pidfd = os.pidfd_open(dump.pid)
        task = os.open(f"/proc/{dump.pid}/task/{dump.tid}", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC | os.O_NOFOLLOW)
        started = namespaces.start_ticks(namespaces.read_at(task, "stat", 4096))
        # Its number may be another's by now. Start times count from the boot with the time asleep, events without.
        asleep = time.clock_gettime_ns(time.CLOCK_BOOTTIME) - time.monotonic_ns()
        if started > (dump.at + asleep) * os.sysconf("SC_CLK_TCK") // 10**9 + 1:
            return crash
        status = namespaces.read_at(task, "status", 1 << 20)
        crash.inode = inode_of(pidfd)
        crash.key = key_of(task)
        crash.comm = namespaces.read_at(task, "comm", 64).removesuffix(b"\n").decode("utf-8", "backslashreplace")
        crash.uid = int((namespaces.status_value(status, b"Uid") or [b"-1"])[0])
        numbers = list(map(int, namespaces.status_value(status, b"NStgid") or [b"0"]))
        crash.own_pid, crash.pids = numbers[-1], " ".join(map(str, numbers))
        crash.core_limit = _core_limit(namespaces.read_at(task, "limits", 8192))
        # A zombie still has its numbers, but whether it was dumpable went with its memory.
        crash.skipped, known = _skipped(pidfd)
        crash.seen = known or namespaces.status_value(status, b"CoreDumping") == [b"1"]
        if not crash.seen:
            # Nor is it in any cgroup of version 1 any more.
            crash.key = ""
    except (OSError, ValueError):
        pass
    finally:
        for fd in (task, pidfd):
            if fd >= 0:
                os.close(fd)
    return crash


def is_ours(pattern: bytes) -> bool:
    """Whether a core_pattern brings crashes to us, by pipe or by socket (`forwarder/install.py`)."""
    if pattern.startswith(b"@"):
        return b"/core_pipe" in pattern
    return pattern.startswith(b"|") and b"/stub.py v=" in pattern


def _core_limit(limits: bytes) -> int:
    for line in limits.splitlines():
        if line.startswith(b"Max core file size"):
            soft = line[len("Max core file size") :].split()[0]
            return (1 << 64) - 1 if soft == b"unlimited" else int(soft)
    return -1


def _skipped(pidfd: int) -> tuple[bool, bool]:
    """Return whether the kernel makes no core of it, and whether it tells."""
    info = bytearray(PIDFD_INFO_SIZE)
    struct.pack_into("=Q", info, 0, PIDFD_INFO_COREDUMP)
    try:
        fcntl.ioctl(pidfd, PIDFD_GET_INFO, info)
    except OSError:
        # Before 6.13, or 6.16 for the mask.
        return False, False
    (mask,) = struct.unpack_from("=Q", info, 0)
    (coredump,) = struct.unpack_from("=I", info, COREDUMP_MASK_AT)
    # Nothing at all is said of one whose memory is gone already.
    return bool(coredump & PIDFD_COREDUMP_SKIP), bool(mask & PIDFD_INFO_COREDUMP and coredump)


def is_there(crash: Crash) -> bool:
    """Whether the process of a crash is still one: dumping, or not yet reaped."""
    try:
        pidfd = os.pidfd_open(crash.pid)
    except OSError:
        return False
    try:
        if crash.inode:
            return inode_of(pidfd) == crash.inode
        status = namespaces.read_at(-1, f"/proc/{crash.pid}/status", 1 << 20)
        return namespaces.status_value(status, b"CoreDumping") == [b"1"]
    except OSError:
        return False
    finally:
        os.close(pidfd)


def stubs_at_work() -> set[int]:
    """Return the pids whose crashes a stub is working on: one that is slow to end is no lost crash."""
    found: set[int] = set()
    try:
        names = namespaces.read_at(-1, f"/proc/{KTHREADD}/task/{KTHREADD}/children", 1 << 20).decode("ascii").split()
    except OSError:
        # Without CONFIG_PROC_CHILDREN.
        names = [name for name in os.listdir("/proc") if name.isdigit()]
    for name in names:
        with contextlib.suppress(OSError, ValueError):
            # Only the kernel starts what kthreadd is the parent of: no process in a container can look like that.
            words = namespaces.read_at(-1, f"/proc/{name}/cmdline", 4096).split(b"\0")
            status = namespaces.read_at(-1, f"/proc/{name}/status", 1 << 20) if len(words) > 1 else b""
            if namespaces.status_value(status, b"PPid") == [b"%d" % KTHREADD]:
                found.update(int(word[2:]) for word in words if word.startswith(b"P="))
    return found
