"""Disk quotas on a real kernel: a program that makes them, has a container use them up, and watches as the ledger does.

    python -m tests.support.quota_scene DEVICE MOUNT_POINT DIRECTORY CGROUP RESULT

It runs in a mount namespace of its own, or in a kernel of its own (tests/support/uml.py), as root. DEVICE has an ext4
made by `make_image`. DIRECTORY is for the watcher's book, CGROUP an empty one. What came of it is written to RESULT.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import json
import os
import signal
import struct
import subprocess
import sys
import threading
import time
import traceback
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from forwarder.ledger.book import Book, read_book
from forwarder.ledger.notes import Notes
from forwarder.ledger.watch import Watcher
from forwarder.quota import events as quota_events
from forwarder.quota.events import QuotaEvents
from forwarder.quota.owners import Owners
from forwarder.quota.tally import MAX_IDS
from forwarder.quota.tell import Tell

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

SIZE = 64 << 20
BLOCK = 1024
# The container's root is this user of the host's, and so on.
FIRST, COUNT = 700000, 65536
WEB, FLOOD, MANY = FIRST + 1000, FIRST + 2000, FIRST + 3000
PROJECT = 4711
CROSSINGS = 2000
OVERRUN = 300
IDS = MAX_IDS + 30

# <sys/quota.h>, <linux/dqblk_xfs.h>
Q_SETQUOTA = 0x800008
USRQUOTA, PRJQUOTA = 0, 2
QIF_LIMITS = 5
_DQBLK = struct.Struct("=8QI4x")
# <linux/fs.h>
FS_IOC_FSGETXATTR, FS_IOC_FSSETXATTR = 0x801C581F, 0x401C5820
FS_XFLAG_PROJINHERIT = 0x200
_FSXATTR = struct.Struct("=IIIII8x")
CLONE_NEWUSER = 0x10000000

_libc = ctypes.CDLL(None, use_errno=True)


def make_image(path: str) -> None:
    """Make an ext4 with all three kinds of quotas in a file."""
    with open(path, "wb") as file:
        file.truncate(SIZE)
    features = "-Oquota,project", "-Equotatype=usrquota:grpquota:prjquota"
    subprocess.run(["mkfs.ext4", "-q", "-b4096", "-I256", *features, path], check=True, timeout=30)


def mount(device: str, point: str) -> None:
    subprocess.run(["mount", "-t", "ext4", "-o", "usrquota,grpquota,prjquota", device, point], check=True, timeout=30)


def limit(
    device: str, kind: int, number: int, *, space: tuple[int, int] = (0, 0), inodes: tuple[int, int] = (0, 0)
) -> None:
    """Set the soft and the hard limit: bytes, and inodes; 0 is none."""
    values = _DQBLK.pack(space[1] // BLOCK, space[0] // BLOCK, 0, inodes[1], inodes[0], 0, 0, 0, QIF_LIMITS)
    if _libc.quotactl(Q_SETQUOTA << 8 | kind, device.encode(), number, values) != 0:
        raise OSError(ctypes.get_errno(), f"quotactl on {device}")


def make_project(path: str, number: int) -> None:
    os.mkdir(path)
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        data = bytearray(fcntl.ioctl(fd, FS_IOC_FSGETXATTR, bytes(_FSXATTR.size)))
        flags, extent, extents, _, cow = _FSXATTR.unpack(data)
        fcntl.ioctl(fd, FS_IOC_FSSETXATTR, _FSXATTR.pack(flags | FS_XFLAG_PROJINHERIT, extent, extents, number, cow))
    finally:
        os.close(fd)


def fill(path: str, size: int) -> bool:
    """Write a file; whether the quota let it have the whole size."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT, 0o600)
    try:
        written = 0
        while written < size:
            written += os.write(fd, bytes(min(65536, size - written)))
        os.fsync(fd)
    except OSError as error:
        if error.errno != errno.EDQUOT:
            raise
        return False
    finally:
        os.close(fd)
    return True


class Container:
    """Processes in a cgroup and a user namespace of their own, whose init only waits."""

    def __init__(self, cgroup: str) -> None:
        self._cgroup = cgroup
        ready, go = os.pipe(), os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            with _last_breath():
                self._join()
                if _libc.unshare(CLONE_NEWUSER) != 0:
                    raise OSError(ctypes.get_errno(), "unshare")
                os.write(ready[1], b"x")
                os.read(go[0], 1)
                signal.pause()
        os.read(ready[0], 1)
        for kind in ("uid_map", "gid_map"):
            with open(f"/proc/{self.pid}/{kind}", "w", encoding="ascii") as file:
                file.write(f"0 {FIRST} {COUNT}\n")
        os.write(go[1], b"x")
        for fd in (*ready, *go):
            os.close(fd)

    def _join(self) -> None:
        with open(f"{self._cgroup}/cgroup.procs", "w", encoding="ascii") as file:
            file.write(str(os.getpid()))

    def run(self, uid: int, work: Callable[[], object]) -> Any:
        """Do it as a user of the container's, whose uid is the host's; return what comes of it."""
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            with _last_breath():
                self._join()
                namespace = os.open(f"/proc/{self.pid}/ns/user", os.O_RDONLY)
                if _libc.setns(namespace, CLONE_NEWUSER) != 0:
                    raise OSError(ctypes.get_errno(), "setns")
                os.setgroups([])
                os.setresgid(0, 0, 0)
                os.setresuid(uid - FIRST, uid - FIRST, uid - FIRST)
                os.write(writer, json.dumps(work()).encode())
        os.close(writer)
        with open(reader, "rb") as file:
            answer = file.read()
        os.waitpid(child, 0)
        return json.loads(answer)

    def end(self) -> None:
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)


@contextlib.contextmanager
def _last_breath() -> Iterator[None]:
    """A forked child never goes on in its parent's code."""
    try:
        yield
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


class NoCrashes:
    """In the place of the proc connector, which a kernel may not have: nothing crashes here."""

    def __init__(self) -> None:
        self._fd = os.eventfd(0)

    def fileno(self) -> int:
        return self._fd

    def read(self) -> None:
        return None


class Watching:
    """The ledger's watcher, in a process of its own."""

    def __init__(self, directory: str) -> None:
        self.book = f"{directory}/ledger"
        wake, self._wake = os.pipe()
        ready, ready_end = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            with _last_breath():
                os.close(self._wake)
                with open(f"{directory}/said", "a", encoding="ascii") as said, QuotaEvents() as events:

                    def say(line: str) -> None:
                        said.write(line + "\n")
                        said.flush()

                    notes = Notes(f"{directory}/handled")
                    crashes: Any = NoCrashes()
                    tell = Tell(f"{directory}/store", say)
                    watcher = Watcher(crashes, Book(self.book), notes, quota=events, tell=tell, say=say)
                    os.write(ready_end, b"x")
                    watcher.run(wake)
                    with open(f"{directory}/seconds", "w", encoding="ascii") as file:
                        file.write(str(time.process_time()))
        os.close(wake)
        os.close(ready_end)
        assert os.read(ready, 1) == b"x"
        os.close(ready)

    def wait_for(self, what: Callable[[dict[str, int]], bool], seconds: float = 30) -> float:
        """Wait until the counts in the book are so; return how long it took."""
        begun = time.monotonic()
        while not what(dict(read_book(self.book).quota.counts)):
            if time.monotonic() > begun + seconds:
                raise TimeoutError(f"the book says {read_book(self.book).quota}")
            time.sleep(0.02)
        return time.monotonic() - begun

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)
        os.close(self._wake)

    def stop(self) -> None:
        """Have it end in good order: all that it heard is in the book then."""
        os.write(self._wake, b"x")
        os.waitpid(self.pid, 0)
        os.close(self._wake)


def want_to_be_told(directory: str) -> None:
    """Set a callback up, a program that writes down what it is told."""
    os.mkdir(f"{directory}/store", 0o755)
    with open(f"{directory}/receiver.toml", "w", encoding="ascii") as file:
        file.write(
            f'store = "{directory}/store"\n[[notify]]\nname = "book"\nevents = ["quota"]\nuser = "root"\n'
            f'run = ["/bin/sh", "-c", "cat >>{directory}/told"]\n'
        )
    os.environ["CORE_PIPE_CONFIG"] = f"{directory}/receiver.toml"


def told(directory: str) -> list[dict[str, Any]]:
    """Be the deliverer until nothing is left; return what the callback was told."""
    program = "import sys; from receiver.cli import main; sys.exit(main(['notify']))"
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)
    with open(f"{directory}/told", encoding="ascii") as file:
        return [json.loads(line) for line in file]


def play(device: str, point: str, directory: str, cgroup: str) -> dict[str, Any]:
    """Have a container use its quotas up; return what came of it."""
    result: dict[str, Any] = {}
    for made in (point, directory, cgroup):
        os.makedirs(made, exist_ok=True)
    mount(device, point)
    os.chmod(point, 0o777)
    limit(device, USRQUOTA, WEB, space=(1 << 20, 2 << 20))
    limit(device, USRQUOTA, FLOOD, inodes=(1, 0))
    for number in range(IDS):
        limit(device, USRQUOTA, MANY + number, inodes=(0, 1))
    limit(device, PRJQUOTA, PROJECT, space=(0, 1 << 20))
    make_project(f"{point}/project", PROJECT)
    os.chmod(f"{point}/project", 0o777)
    container = Container(cgroup)
    result["device"] = f"{os.major(os.stat(device).st_rdev)}:{os.minor(os.stat(device).st_rdev)}"
    want_to_be_told(directory)
    try:
        watching = Watching(directory)
        result["whole"] = container.run(WEB, lambda: fill(f"{point}/web", 4 << 20))
        result["seconds"] = watching.wait_for(lambda counts: counts.get("space_hard") == 1)
        container.run(WEB, lambda: os.unlink(f"{point}/web"))
        watching.wait_for(lambda counts: counts.get("space_hard") == 1)
        watching.kill()
        result["killed"] = [asdict(one) for one in read_book(watching.book).quota.records.values()]

        result["told"] = told(directory)

        watching = Watching(directory)
        # The same hour: it counts.
        container.run(WEB, lambda: fill(f"{point}/web", 4 << 20))
        result["ended"] = container.run(WEB, lambda: os.unlink(f"{point}/web"))
        container.run(WEB, lambda: fill(f"{point}/project/web", 4 << 20))
        watching.wait_for(lambda counts: counts.get("space_hard", 0) == 3)
        result["crossings"] = container.run(FLOOD, lambda: cross(point))
        result["overrun"] = overrun(container, point)
        result["refused"] = container.run(FIRST, lambda: use_up(point))
        watching.stop()
        result["records"] = [asdict(one) for one in read_book(watching.book).quota.records.values()]
        result["counts"] = dict(read_book(watching.book).quota.counts)
        result["lost"] = read_book(watching.book).quota.lost
        with open(f"{directory}/said", encoding="ascii") as file:
            result["said"] = file.read().splitlines()
        with open(f"{directory}/seconds", encoding="ascii") as file:
            result["watcher_cpu"] = float(file.read())
        result["elsewhere"] = Owners().of("user", 4242424, 0)
    finally:
        container.end()
        subprocess.run(["umount", point], check=False)
    return result


def cross(point: str, times: int = CROSSINGS) -> int:
    """Go over the soft limit of inodes and below it, again and again: two warnings each time."""
    os.close(os.open(f"{point}/flood", os.O_WRONLY | os.O_CREAT, 0o600))
    for _ in range(times):
        os.close(os.open(f"{point}/flood-more", os.O_WRONLY | os.O_CREAT, 0o600))
        os.unlink(f"{point}/flood-more")
    return times


def overrun(container: Container, point: str) -> tuple[int, int]:
    """Do not listen while more comes than can wait; return how many were heard, and how many are known to be lost."""
    quota_events.RECEIVE_BUFFER = 65536
    with QuotaEvents() as events:
        heard = 0
        # The kernel's count is seen with the next one that comes.
        for times in (OVERRUN, 1):
            container.run(FLOOD, lambda times=times: cross(point, times))  # type: ignore[misc]
            while events.read() is not None:
                heard += 1
        return heard, events.lost


def use_up(point: str) -> int:
    """Be one user of the container's after the other, and make one file more than each may have."""
    refused = 0
    for number in range(IDS):
        os.seteuid(MANY - FIRST + number)
        for name in ("one", "more"):
            try:
                os.close(os.open(f"{point}/{name}-{number}", os.O_WRONLY | os.O_CREAT, 0o600))
            except OSError as error:
                refused += error.errno == errno.EDQUOT
        os.seteuid(0)
    return refused


def main(device: str, point: str, directory: str, cgroup: str, result: str) -> None:
    # It ends, whatever hangs.
    threading.Timer(120, lambda: os._exit(3)).start()
    try:
        found = play(device, point, directory, cgroup)
    except BaseException:
        found = {"error": traceback.format_exc()}
    with open(result, "w", encoding="utf-8") as file:
        json.dump(found, file)
    os._exit(0)


if __name__ == "__main__":
    main(*sys.argv[1:])
