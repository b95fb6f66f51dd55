"""Whether a store has a record of a crash whose handler was killed: it noted that it asked a receiver, and no more.

The host's store is read here. A container's is behind its own file systems, which may lie and may hang: a program of
its own looks there (this file, as a script), holds nothing of ours, and is left behind when it does not come back.
What it says decides about that container's own crashes, and nothing else.

A receiver names a record by the time at which the crash came to it and by the pid that the process has in the
receiver's own pid namespace (`receiver/record.py`: new_id). Only that one counts: as likely as not, what is a process's
number on the host is another's in the container. A record that is being written counts: who has
begun one leaves one, whatever happens (`receiver/store.py`: Store.begin).
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import stat
import sys
import time

TYPE_CHECKING = False
if TYPE_CHECKING:
    import subprocess
    from collections.abc import Iterable, Sequence

    # Its pids, the host's first and its own last, and the stamps of ids before and after which a record is another's.
    Wanted = tuple[tuple[str, ...], str, str]

DEFAULT = "/var/lib/core_pipe"
SETTINGS = "/etc/core_pipe/receiver.toml"
LOOK_SECONDS = 2.0
# A store has thousands of records (records_max); who shows more than this wants to keep us busy.
MAX_NAMES = 200_000
MAX_READ = 1 << 17
# What is looked for at once: it has to fit into a pipe.
MAX_CRASHES = 500
# Between the kernel's event and the receiver's look at the clock it may be set by so much.
CLOCK_SECONDS = 2.0
# An id has the time at which the offer came: after the receivers that were asked before.
ASKING_SECONDS = 3600.0

# There is one. There is none. It cannot be told.
FOUND, NOTHING, UNSEEN = "found", "nothing", "unseen"
STATES = (FOUND, NOTHING, UNSEEN)

# Those who did not come back, until they have ended and are reaped.
_left_behind: list[subprocess.Popen[bytes]] = []

_ID = re.compile(r"\.?([0-9]{8}T[0-9]{6})-[0-9]{6}-([0-9]+)-[0-9a-f]{8}\.json")
_STORE_SETTING = re.compile(rb"^\s*store\s*=\s*[\"']([^\"'\\\n]+)[\"']", re.MULTILINE)


def wanted(pids: str, at: float) -> Wanted:
    """Return what to look for. pids: from the host's on inwards. at: seconds since the epoch, of the crash."""
    first, last = (
        time.strftime("%Y%m%dT%H%M%S", time.gmtime(seconds)) for seconds in (at - CLOCK_SECONDS, at + ASKING_SECONDS)
    )
    return tuple(pids.split()), first, last


def search(names: Iterable[str], crashes: Sequence[Wanted], depth: int) -> list[str]:
    """Return for each crash whether one of these names is that of its record.

    depth: of the pid namespace of whoever named them, 0 for the host's.
    """
    found = [NOTHING] * len(crashes)
    for name in names:
        match = _ID.fullmatch(name)
        if match is None:
            continue
        stamp, pid = match.groups()
        for index, (pids, first, last) in enumerate(crashes):
            if not first <= stamp <= last:
                continue
            if pid in pids[depth : depth + 1]:
                found[index] = FOUND
            elif pid == "0" and found[index] == NOTHING:
                # Of a process that the receiver did not see: it may be this one's.
                found[index] = UNSEEN
    return found


def in_host(store: str, crashes: Sequence[Wanted]) -> list[str]:
    """Return for each crash whether the host's store has a record of it."""
    try:
        return search(os.listdir(store), crashes, 0)
    except FileNotFoundError:
        # The first record makes it.
        return [NOTHING] * len(crashes)
    except OSError:
        return [UNSEEN] * len(crashes)


class Look:
    """A look into the store of the receiver whose socket a process listens at, by a program apart.

    listener: host's pid. noted: CLOCK_MONOTONIC, ns, a moment at which it was that process; one that has started later
    is another. crashes: what is looked for. To be asked for its `answers` until they are there: nobody has to wait.
    """

    def __init__(self, listener: int, noted: int, crashes: Sequence[Wanted], seconds: float = LOOK_SECONDS) -> None:
        """Begin. seconds: then it is given up. Raises OSError."""
        import subprocess  # noqa: PLC0415 - most watchers never need it

        _left_behind[:] = [process for process in _left_behind if process.poll() is None]
        self._count = len(crashes)
        self._deadline = time.monotonic() + seconds
        self._said = b""
        # In a pipe there is room for it at once, up to some thousand crashes.
        asked = json.dumps(crashes).encode("ascii")
        command = [sys.executable, "-IS", __file__, str(listener), str(noted)]
        ask, asking = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self._answer, answering = os.pipe2(os.O_CLOEXEC)
        try:
            os.set_blocking(self._answer, False)
            with contextlib.suppress(OSError):
                os.write(asking, asked)
            os.set_blocking(ask, True)
            self._process = subprocess.Popen(  # noqa: S603
                command, stdin=ask, stdout=answering, stderr=subprocess.DEVNULL, cwd="/", env={}
            )
        except BaseException:
            os.close(self._answer)
            raise
        finally:
            for fd in (ask, asking, answering):
                os.close(fd)

    def answers(self) -> list[str] | None:
        """Return for each crash whether there is a record of it; None as long as that is not known."""
        try:
            while part := os.read(self._answer, 1 << 16):
                self._said += part
        except BlockingIOError:
            if time.monotonic() < self._deadline:
                return None
        except OSError:
            pass
        self.close()
        try:
            found = json.loads(self._said)
        except ValueError:
            found = None
        if not isinstance(found, list) or len(found) != self._count:
            return [UNSEEN] * self._count
        return [state if state in STATES else UNSEEN for state in found]

    def close(self) -> None:
        """End it. It may be one that no signal ends."""
        if self._answer >= 0:
            os.close(self._answer)
            self._answer = -1
            self._process.kill()
            _left_behind.append(self._process)


def _look(listener: int, noted: int, crashes: Sequence[Wanted]) -> list[str]:
    """Look into a container's store. Raises OSError, ValueError."""
    process = os.open(f"/proc/{listener}", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    # proc_pid_stat(5): starttime is field 22. It counts from the boot with the time asleep, noted without.
    started = int(_read(process, "stat").rpartition(b")")[2].split()[19])
    asleep = time.clock_gettime_ns(time.CLOCK_BOOTTIME) - time.monotonic_ns()
    if started > (noted + asleep) * os.sysconf("SC_CLK_TCK") // 10**9 + 1:
        raise ValueError("it is another process")
    # proc_pid_status(5): its pids from the reader's namespace on inwards.
    depth = len(_read(process, "status").partition(b"\nNStgid:")[2].partition(b"\n")[0].split()) - 1
    root = os.open("root", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=process)
    store = _walk(root, _store(process, root), os.O_RDONLY)
    names = []
    with os.scandir(store) as entries:
        for entry in entries:
            names.append(entry.name)
            if len(names) > MAX_NAMES:
                raise ValueError("there are too many names")
    return search(names, crashes, depth)


def _store(process: int, root: int) -> str:
    """Return where its store is, as `receiver/config.py` finds it: environment, settings, default."""
    for line in _read(process, "environ").split(b"\0"):
        name, _, value = line.partition(b"=")
        if name == b"CORE_PIPE_STORE":
            return os.fsdecode(value)
        if name == b"CORE_PIPE_CONFIG":
            raise ValueError("its settings are elsewhere")
    try:
        settings = _walk(root, os.path.dirname(SETTINGS), os.O_PATH)
        said = _STORE_SETTING.search(_read(settings, os.path.basename(SETTINGS)))
    except FileNotFoundError:
        said = None
    return DEFAULT if said is None else os.fsdecode(said[1])


def _walk(root: int, path: str, flags: int) -> int:
    """Return a descriptor of a directory below a root. No link is followed: it could lead out. Raises OSError."""
    parts = [part for part in path.split("/") if part not in ("", ".")]
    if not path.startswith("/") or ".." in parts or not parts:
        raise ValueError("it is no plain path")
    at = root
    for part in parts[:-1]:
        at = os.open(part, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=at)
    return os.open(parts[-1], flags | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=at)


def _read(directory: int, name: str) -> bytes:
    # A path first: to open a device or a FIFO may do something, or wait.
    path = os.open(name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=directory)
    if not stat.S_ISREG(os.fstat(path).st_mode):
        raise ValueError("it is not a file")
    fd = os.open(f"/proc/self/fd/{path}", os.O_RDONLY | os.O_CLOEXEC)
    os.close(path)
    parts = []
    left = MAX_READ
    while left and (part := os.read(fd, left)):
        parts.append(part)
        left -= len(part)
    os.close(fd)
    return b"".join(parts)


def main() -> None:
    """Be the program that looks. Whatever goes wrong there is that nothing was seen."""
    asked = [(tuple(pids), first, last) for pids, first, last in json.load(sys.stdin)]
    try:
        found = _look(int(sys.argv[1]), int(sys.argv[2]), asked)
    except (OSError, ValueError):
        found = [UNSEEN] * len(asked)
    sys.stdout.write(json.dumps(found))


if __name__ == "__main__":
    main()
