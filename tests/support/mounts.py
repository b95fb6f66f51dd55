"""Mounts that are undone: overlays of the machine's own root, with shifted owners where a user namespace wants them."""

from __future__ import annotations

import contextlib
import ctypes
import os
import subprocess
import tempfile
import time

from tests.support import processes
from tests.support.cgroups import Cgroup

# Each container has a directory here, named by the process that made it: the next run cleans up after a killed one.
STATE = "/run/core_pipe-tests"

CHECKOUT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

# What a container made of this machine's root must not see or inherit: the host's sockets, its enabled services, its
# journal, its containers. Empty in the overlay.
_HIDDEN = ("run", "tmp", "etc/systemd/system", "var/log/journal", "var/lib/containers", "var/lib/machines", "var/tmp")
_STICKY = ("tmp", "var/tmp")


def mounts_below(directory: str) -> list[str]:
    """Mount points at and below a directory in this mount namespace, the last mounted first."""
    found = []
    with open("/proc/self/mountinfo", "rb") as file:
        for line in file:
            raw = line.split(b" ")[4]
            where = os.fsdecode(raw.replace(b"\\040", b" ").replace(b"\\011", b"\t").replace(b"\\134", b"\\"))
            if where == directory or where.startswith(directory + "/"):
                found.append(where)
    return found[::-1]


def mount(*arguments: str) -> None:
    done = subprocess.run(["mount", "-n", *arguments], capture_output=True, text=True, check=False, timeout=30)
    if done.returncode != 0:
        raise OSError(f"mount {' '.join(arguments)}: {done.stderr.strip()}")


def unmount_below(directory: str, timeout: float = 10) -> None:
    """Unmount everything at and below a directory.

    What stays busy past the deadline is detached, and reported by an OSError: somebody still runs there.
    """
    deadline = time.monotonic() + timeout
    while left := mounts_below(directory):
        late = time.monotonic() >= deadline
        failures = []
        for where in left:
            command = ["umount", "-n", *(["-l"] if late else []), where]
            done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=30)
            if done.returncode != 0:
                failures.append(done.stderr.strip())
        if late:
            raise OSError(f"busy after {timeout:g} s, detached: {left} {failures}")
        if failures:
            time.sleep(0.02)


_LIBC = ctypes.CDLL(None, use_errno=True)
_SYS_OPEN_TREE, _SYS_MOVE_MOUNT, _SYS_MOUNT_SETATTR = 428, 429, 442
_AT_FDCWD, _AT_EMPTY_PATH = -100, 0x1000
_OPEN_TREE_CLONE, _OPEN_TREE_CLOEXEC = 1, os.O_CLOEXEC
_MOVE_MOUNT_F_EMPTY_PATH = 4
_MOUNT_ATTR_RDONLY, _MOUNT_ATTR_IDMAP = 1, 0x00100000


class _MountAttr(ctypes.Structure):
    _fields_ = (
        ("attr_set", ctypes.c_uint64),
        ("attr_clr", ctypes.c_uint64),
        ("propagation", ctypes.c_uint64),
        ("userns_fd", ctypes.c_uint64),
    )


def _syscall(name: str, number: int, *arguments: object) -> int:
    result = int(_LIBC.syscall(ctypes.c_long(number), *arguments))
    if result < 0:
        error = ctypes.get_errno()
        raise OSError(error, f"{name}: {os.strerror(error)}")
    return result


def mount_shifted(source: str, target: str, first: int, count: int) -> None:
    """Bind-mount read-only, without what is mounted below, with owner 0 shown as `first` and so on.

    mount(8) can do that from util-linux 2.39 (X-mount.idmap); Debian 12 has 2.38. Raises OSError where the file system
    cannot (EINVAL).
    """
    with contextlib.ExitStack() as stack:
        holder = subprocess.Popen(["unshare", "--user", "sh", "-c", "echo; exec cat"], stdin=subprocess.PIPE, stdout=-1)
        stack.enter_context(holder)
        stack.callback(holder.kill)
        assert holder.stdout is not None
        holder.stdout.readline()
        for name in ("uid_map", "gid_map"):
            with open(f"/proc/{holder.pid}/{name}", "w", encoding="ascii") as file:
                file.write(f"0 {first} {count}\n")
        user = os.open(f"/proc/{holder.pid}/ns/user", os.O_RDONLY | os.O_CLOEXEC)
        stack.callback(os.close, user)
        flags = _OPEN_TREE_CLONE | _OPEN_TREE_CLOEXEC
        tree = _syscall("open_tree", _SYS_OPEN_TREE, _AT_FDCWD, os.fsencode(source), ctypes.c_uint(flags))
        stack.callback(os.close, tree)
        attributes = _MountAttr(_MOUNT_ATTR_IDMAP | _MOUNT_ATTR_RDONLY, 0, 0, user)
        size = ctypes.c_size_t(ctypes.sizeof(attributes))
        _syscall("mount_setattr", _SYS_MOUNT_SETATTR, tree, b"", _AT_EMPTY_PATH, ctypes.byref(attributes), size)
        to = os.fsencode(target)
        _syscall("move_mount", _SYS_MOVE_MOUNT, tree, b"", _AT_FDCWD, to, _MOVE_MOUNT_F_EMPTY_PATH)


class RootCopy:
    """A copy of this machine's root that costs nothing: an overlay, its changes in a tmpfs of at most `size` bytes.

    With `shift`, files of uid 0 belong to uid `shift` (for a user namespace with that range). `directory` is the root,
    to be prepared before the container starts.
    """

    def __init__(self, *, size: int = 4 << 30, shift: int = 0, count: int = 65536) -> None:
        clean_up_killed_runs()
        os.makedirs(STATE, mode=0o711, exist_ok=True)
        self.base = tempfile.mkdtemp(prefix=f"{os.getpid():x}.{processes.start_time(os.getpid()) or 0:x}.", dir=STATE)
        self.name = "core_pipe-tests-" + os.path.basename(self.base)
        self.directory = os.path.join(self.base, "fs", "root")
        try:
            self._build(size, shift, count)
        except BaseException:
            self.remove()
            raise

    def _build(self, size: int, shift: int, count: int) -> None:
        # A container's root with another uid must be able to reach its own root directory.
        os.chmod(self.base, 0o711)
        fs = os.path.join(self.base, "fs")
        os.mkdir(fs)
        mount("-t", "tmpfs", "-o", f"size={size},mode=711", "core_pipe-tests", fs)
        for name in ("upper", "work", "root", "lower"):
            os.mkdir(os.path.join(fs, name), 0o755)
        upper, lower = os.path.join(fs, "upper"), "/"
        if shift:
            lower = os.path.join(fs, "lower")
            mount_shifted("/", lower, shift, count)
        for hidden in _HIDDEN:
            self._hide(upper, hidden, shift)
        os.chown(upper, shift, shift)
        options = f"lowerdir={lower},upperdir={upper},workdir={os.path.join(fs, 'work')}"
        mount("-t", "overlay", "-o", options, "core_pipe-tests", self.directory)

    @staticmethod
    def _hide(upper: str, path: str, shift: int) -> None:
        at = upper
        for part in path.split("/"):
            at = os.path.join(at, part)
            if not os.path.isdir(at):
                os.mkdir(at, 0o755)
                os.chown(at, shift, shift)
        os.setxattr(at, "trusted.overlay.opaque", b"y")
        if path in _STICKY:
            os.chmod(at, 0o1777)

    def remember_init(self, pid: int) -> None:
        """Write down the container's init, for whoever cleans up after a killed run."""
        with open(os.path.join(self.base, "init"), "w", encoding="ascii") as file:
            file.write(f"{pid} {processes.start_time(pid)}")

    def remove(self) -> None:
        unmount_below(self.base)
        _remove_base(self.base)


def _remove_base(base: str) -> None:
    """Never recursive: what might still be mounted below is this machine's root."""
    with contextlib.suppress(FileNotFoundError):
        os.unlink(os.path.join(base, "init"))
    with contextlib.suppress(FileNotFoundError):
        os.rmdir(os.path.join(base, "fs"))
    os.rmdir(base)


def clean_up_killed_runs() -> None:
    """End the containers, mounts and cgroups of test runs that are no more."""
    try:
        names = os.listdir(STATE)
    except FileNotFoundError:
        return
    for name in names:
        pid, started, _ = name.split(".", 2)
        if processes.start_time(int(pid, 16)) == int(started, 16):
            continue
        base = os.path.join(STATE, name)
        with (
            contextlib.suppress(FileNotFoundError, ValueError),
            open(os.path.join(base, "init"), encoding="ascii") as file,
        ):
            init, init_started = file.read().split()
            processes.kill_exactly(int(init), int(init_started))
        cgroup = Cgroup(f"core_pipe-tests-{name}")
        cgroup.kill()
        with contextlib.suppress(TimeoutError):
            cgroup.remove()
        with contextlib.suppress(OSError):
            unmount_below(base)
        with contextlib.suppress(OSError):
            _remove_base(base)


def why_no_shift() -> str | None:
    """Why this machine's root cannot be shown with shifted owners, or None."""
    probe = tempfile.mkdtemp(prefix="core_pipe-tests-probe.")
    try:
        mount_shifted("/", probe, 100000, 65536)
    except OSError as error:
        return f"needs a root file system with id-mapped mounts (ext4, xfs, btrfs since Linux 5.12 to 5.19): {error}"
    finally:
        unmount_below(probe)
        os.rmdir(probe)
    return None
