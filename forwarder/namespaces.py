"""What /proc and nsfs say of processes and namespaces, read through descriptors.

Import budget: on the stub's start-up path, see `forwarder/stub.py`.
"""

from __future__ import annotations

import fcntl
import posix

# <linux/nsfs.h>
NS_GET_USERNS = 0xB701
NS_GET_PARENT = 0xB702
# _IOR(NSIO, 6, int), since 6.11 (ca567df74a28): a pid of that namespace, in ours.
NS_GET_PID_FROM_PIDNS = 0x8004B706

# A namespace's identity: st_dev and st_ino of its nsfs file (namespaces(7)).
Identity = tuple[int, int]

# user_namespaces(7): at most 32 levels; pid_namespaces(7) likewise.
MAX_DEPTH = 33


def read_at(directory: int, name: str, limit: int) -> bytes:
    """Return at most `limit` bytes of a file below a directory's descriptor. Raises OSError."""
    if directory < 0:
        fd = posix.open(name, posix.O_RDONLY | posix.O_CLOEXEC)
    else:
        fd = posix.open(name, posix.O_RDONLY | posix.O_CLOEXEC | posix.O_NOFOLLOW, dir_fd=directory)
    try:
        parts = []
        while limit > 0:
            # Not all at once: as much memory would be mapped, touched and given back.
            part = posix.read(fd, min(limit, 16384))
            if not part:
                break
            parts.append(part)
            limit -= len(part)
        return b"".join(parts)
    finally:
        posix.close(fd)


def status_value(status: bytes, name: bytes) -> list[bytes] | None:
    """Return the words after `name:` in a proc status file, None when there is no such line."""
    # Not splitlines(): the kernel escapes newlines in "Name:", and lets a carriage return through (H13).
    for line in status.split(b"\n"):
        if line.startswith(name + b":"):
            return line[len(name) + 1 :].split()
    return None


def start_ticks(stat: bytes) -> int:
    """Return when a process started, in clock ticks since the boot, from its proc stat file."""
    # proc_pid_stat(5): comm, field 2, may hold anything, ")" too; field 22 counts from the last ")".
    return int(stat.rpartition(b")")[2].split()[19])


def started(pid: int) -> int:
    """Return when a process of our pid namespace started, in clock ticks. Raises OSError, ValueError."""
    return start_ticks(read_at(-1, f"/proc/{pid}/stat", 4096))


def pid_of_pidfd(pidfd: int) -> int:
    """Return the pid (our namespace) of the process, 0 when it is not in ours, -1 when it has been reaped."""
    words = status_value(read_at(-1, f"/proc/self/fdinfo/{pidfd}", 4096), b"Pid")
    return int(words[0]) if words else -1


def mount_of(fd: int) -> bytes:
    """Return the id of the mount that a descriptor is on (proc_pid_fdinfo(5)), without asking its file system."""
    words = status_value(read_at(-1, f"/proc/self/fdinfo/{fd}", 4096), b"mnt_id")
    return words[0] if words else b""


def identity(fd: int) -> Identity:
    """Return which file it is, for a namespace or a directory."""
    found = posix.fstat(fd)
    return found.st_dev, found.st_ino


def open_namespace(directory: int, kind: str) -> int:
    """Return a descriptor of a process's namespace; `directory` is its proc directory. Raises OSError."""
    return posix.open(f"ns/{kind}", posix.O_RDONLY | posix.O_CLOEXEC, dir_fd=directory)


def identity_of(directory: int, kind: str) -> Identity:
    """Return the identity of a process's namespace; `directory` is its proc directory. Raises OSError."""
    found = posix.stat(f"ns/{kind}", dir_fd=directory)
    return found.st_dev, found.st_ino


def owner_of(namespace: int) -> Identity:
    """Return the user namespace that owns a namespace. Raises OSError."""
    fd = fcntl.ioctl(namespace, NS_GET_USERNS)
    try:
        return identity(fd)
    finally:
        posix.close(fd)


def ancestry(namespace: int) -> list[Identity]:
    """Return a pid or user namespace and those around it, innermost first, as far as we may see."""
    found = [identity(namespace)]
    fd = posix.dup(namespace)
    try:
        while len(found) < MAX_DEPTH:
            try:
                parent = fcntl.ioctl(fd, NS_GET_PARENT)
            except OSError:
                # EPERM: the next one is outside of ours, or there is none.
                break
            posix.close(fd)
            fd = parent
            found.append(identity(fd))
    finally:
        posix.close(fd)
    return found


def parent_of(namespace: int) -> int | None:
    """Return a descriptor of the namespace around a pid namespace, None at the outermost that we may see."""
    try:
        return fcntl.ioctl(namespace, NS_GET_PARENT)
    except OSError:
        return None


def init_of(pid_namespace: int) -> int | None:
    """Return a descriptor of the proc directory of a pid namespace's init, None when there is none."""
    wanted = identity(pid_namespace)
    try:
        candidates = [str(fcntl.ioctl(pid_namespace, NS_GET_PID_FROM_PIDNS, 1))]
    except OSError:
        # Before 6.11 nobody tells: look at every process.
        candidates = [name for name in posix.listdir("/proc") if name.isdigit()]
    for name in candidates:
        directory = -1
        try:
            directory = posix.open(f"/proc/{name}", posix.O_PATH | posix.O_DIRECTORY | posix.O_CLOEXEC)
            words = status_value(read_at(directory, "status", 1 << 20), b"NSpid")
            if words and words[-1] == b"1" and identity_of(directory, "pid") == wanted:
                return directory
        except OSError:
            pass
        if directory >= 0:
            posix.close(directory)
    return None


def mapped_root(directory: int, kind: str = "uid_map") -> int | None:
    """Return the id, in ours, of root of a process's user namespace; None when it has none."""
    for inside, outside, _count in map_of(directory, kind):
        if inside == 0:
            return outside
    return None


def is_mapped(directory: int, number: int, kind: str = "uid_map") -> bool:
    """Whether an id of ours has a number in a process's user namespace; `directory` is its proc directory."""
    # A half-open range: the first id past it is somebody else's.
    return any(outside <= number < outside + count for _, outside, count in map_of(directory, kind))


def map_of(directory: int, kind: str) -> list[tuple[int, int, int]]:
    """Return (inside, outside, count) for each range of ids of a user namespace. Raises OSError, ValueError."""
    rows = []
    for line in read_at(directory, kind, 65536).splitlines():
        words = line.split()
        if len(words) == 3:
            rows.append((int(words[0]), int(words[1]), int(words[2])))
    return rows
