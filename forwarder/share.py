"""Each container's share of the kernel's slots: one may have many crashes at once, but never all of them.

The kernel bounds the dumps in flight for the whole machine (core_pipe_limit) and drops what is over it with a line in
its log. So the stubs keep their own count below that, by container, and no container gets more than its share of it.

The count is a folder of files, `KEY@PID`, each locked (flock) by its stub: the kernel unlocks when a stub is killed.

Import budget: on the stub's start-up path, see `forwarder/stub.py`.
"""

from __future__ import annotations

import fcntl
import posix
import time

from forwarder import namespaces
from receiver.cgroup import cgroup_path

DIRECTORY = "/run/core_pipe_forwarder/flight"
LIMIT_FILE = "/proc/sys/kernel/core_pipe_limit"
# One slot in so many is kept back for containers that have no crash under way.
RESERVE = 8
# What to count with where the kernel has no bound of its own (0); as many as `install` sets.
UNBOUNDED = 1024
LOCK_SECONDS = 1.0
# KEY@pPID.START: START is the process's start time, in ticks.
HANGING = "@p"
MAX_KEY = 200  # NAME_MAX is 255

# Components of a cgroup path that engines put all of their containers below, without a cgroup of the container's own.
_PARENTS = (b"docker", b"lxc", b"libpod_parent", b"kubepods", b"burstable", b"besteffort", b"machine", b"garden")


def container_of(cgroup: bytes) -> bytes:
    """Return the part of a cgroup path that its processes cannot multiply: up to the container's own cgroup.

    cgroup: as the host sees it. Whatever a container makes below its cgroup (with systemd inside, a cgroup for each
    service) is one container's still. Namespaces would be no key: anyone can make new ones.

    Slices are systemd's way to sort what is in them (systemd.slice(5)): the first thing that is not one is the
    container or the service; but a user is one thing, however many sessions he opens.
    """
    kept: list[bytes] = []
    for part in cgroup.split(b"/"):
        if not part:
            continue
        kept.append(part)
        if part.startswith(b"user-") or not (part.endswith(b".slice") or part in _PARENTS):
            break
    return b"/" + b"/".join(kept)


def key_of(task: int) -> str:
    """Return a container's key, a file name; `task` is the crashed thread's proc directory."""
    try:
        path = container_of(cgroup_path(namespaces.read_at(task, "cgroup", 65536)))
    except OSError:
        path = b"/"
    # "@" ends the key. Docker's and systemd's names are short; of a longer one the end tells more.
    shown = "".join(chr(b) if (b < 128 and chr(b).isalnum()) or b in b"-_.:" else "!" for b in path)
    return shown[-MAX_KEY:]


class Share:
    """One crash's place in the count. Owns its file, and removes it with `close`."""

    __slots__ = ("_directory", "_entry", "_fd", "key")

    def __init__(self, key: str, directory: str = DIRECTORY) -> None:
        self.key = key
        self._directory = directory
        self._entry = f"{key}@{posix.getpid()}"
        self._fd = -1

    def take(self) -> str | None:
        """Return None when the container has a share left, and count this crash; else why not.

        Where no count can be kept (/run is full, or read-only) nobody is over his share: a core that is lost is worse.
        """
        try:
            return self._take()
        except (OSError, ValueError):
            return None

    def _take(self) -> str | None:
        try:
            lock = self._open(".lock")
        except FileNotFoundError:
            # The first crash since the boot.
            from os import makedirs  # noqa: PLC0415 - rare

            makedirs(self._directory, mode=0o700, exist_ok=True)
            lock = self._open(".lock")
        try:
            deadline = time.monotonic() + LOCK_SECONDS
            while not _locked(lock) and time.monotonic() < deadline:
                time.sleep(0.001)
            reason = self._refusal()
            if reason is None:
                self._fd = self._open(self._entry)
                _locked(self._fd)
            return reason
        finally:
            posix.close(lock)

    def _open(self, name: str) -> int:
        flags = posix.O_RDWR | posix.O_CREAT | posix.O_CLOEXEC | posix.O_NOFOLLOW
        return posix.open(f"{self._directory}/{name}", flags, 0o600)

    def _refusal(self) -> str | None:
        limit = _limit()
        mine, others = self._count()
        if not _is_free(limit, mine, others):
            # Those who were killed may stand there still.
            self._clear()
            mine, others = self._count()
        if _is_free(limit, mine, others):
            return None
        return (
            f"its container has {mine} dumps under way, which is all of its share ({mine + others} of {limit} in all)"
        )

    def _count(self) -> tuple[int, int]:
        mine = others = 0
        for name in posix.listdir(self._directory):
            if name.rpartition("@")[0] == self.key:
                mine += 1
            elif name != ".lock":
                others += 1
        return mine, others

    def _clear(self) -> None:
        for name in posix.listdir(self._directory):
            if name == ".lock" or _is_hanging(name):
                continue
            try:
                fd = posix.open(f"{self._directory}/{name}", posix.O_RDWR | posix.O_CLOEXEC | posix.O_NOFOLLOW)
            except OSError:
                continue
            if _locked(fd):
                try:
                    posix.unlink(f"{self._directory}/{name}")
                except OSError:
                    pass
            posix.close(fd)

    def held(self) -> tuple[int, ...]:
        """Return the descriptor that counts this crash for as long as anybody has it; none without a count."""
        return (self._fd,) if self._fd >= 0 else ()

    def close(self, *, keep: bool = False) -> None:
        """Give the share back. keep: a child that is stuck has inherited its lock, and counts until it ends."""
        if self._fd < 0:
            return
        if not keep:
            try:
                posix.unlink(f"{self._directory}/{self._entry}")
            except OSError:
                pass
        posix.close(self._fd)
        self._fd = -1

    def remember(self, pid: int) -> None:
        """Go on counting a crash whose process stays in the kernel's dump, though nobody reads it; where that can be.

        The kernel may wait there for a page of the process's memory, from a file system that never answers, and no
        SIGKILL ends that: the slot stays taken for as long.
        """
        try:
            path = f"{self._directory}/{self.key}{HANGING}{pid}.{namespaces.started(pid)}"
            posix.close(posix.open(path, posix.O_WRONLY | posix.O_CREAT | posix.O_CLOEXEC | posix.O_NOFOLLOW, 0o600))
        except (OSError, ValueError):
            # It has ended after all, or /run is full.
            pass


def _is_hanging(name: str) -> bool:
    """Whether a name in the count is that of a process which still dumps."""
    _, mark, rest = name.rpartition(HANGING)
    pid, _, started = rest.partition(".")
    if not (mark and pid.isdigit()):
        return False
    try:
        status = namespaces.read_at(-1, f"/proc/{pid}/status", 1 << 20)
        return namespaces.started(int(pid)) == int(started) and namespaces.status_value(status, b"CoreDumping") == [
            b"1"
        ]
    except (OSError, ValueError):
        return False


def _is_free(limit: int, mine: int, others: int) -> bool:
    """Whether one more may come.

    A container has at most a quarter of all, and at most half of what the others leave, so that the first few do not
    take it all. And one crash at a time may always come, from the reserve: it takes as many hostile containers as the
    reserve has slots to shut the next one out.
    """
    shared = limit - limit // RESERVE
    if mine + others < shared and mine < min(shared // 4 or 1, (shared - others + 1) // 2):
        return True
    return mine == 0 and mine + others < limit


def _locked(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _limit() -> int:
    return int(namespaces.read_at(-1, LIMIT_FILE, 64)) or UNBOUNDED
