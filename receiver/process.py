"""Facts about the crashed process, read from inside: its own names for things, never the host's.

The process waits in the kernel while this is read. Everything in these files but the numbers is its own choice.
"""

from __future__ import annotations

import errno
import json
import os
import re
from typing import TYPE_CHECKING

from receiver import masking
from receiver.auxv import is_secure
from receiver.cgroup import cgroup_path
from receiver.config import FACTS
from receiver.masking import MASK
from receiver.record import text

if TYPE_CHECKING:
    from collections.abc import Collection

    from receiver.record import Record

# Bounds on what one record holds of each list; a process may have megabytes of either.
MAX_ARGUMENTS = 8192
MAX_ENVIRONMENT = 16384
MAX_GROUPS = 1024
# A process may be in 65536 groups (NGROUPS_MAX), and CoreDumping comes after them.
MAX_STATUS = 1 << 20
# Of the list of its open files: entries, and bytes as JSON. It may have a million (H22).
MAX_FILES = 256
MAX_FILES_SIZE = 32 << 10
# /proc/sys/kernel/overflowuid and overflowgid; nobody changes them.
OVERFLOW_ID = 65534


class Process:
    """The proc directory of a thread in our own pid namespace. Owns its descriptor.

    The dumping thread's and not the process's: a leader that has exited has no memory, program or environment any more.
    """

    def __init__(self, pid: int, tid: int) -> None:
        """Open it. Raises OSError when it is not there (no /proc, another pid namespace's /proc, hidden, gone)."""
        # `unshare --pid` without --mount-proc: there the same number is another process.
        if os.readlink("/proc/self") != str(os.getpid()):
            raise ProcessLookupError(errno.ESRCH, "/proc is another pid namespace's")
        self.directory = os.open(f"/proc/{pid}/task/{tid}", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC | os.O_NOFOLLOW)

    def close(self) -> None:
        os.close(self.directory)

    def read(self, name: str, limit: int) -> bytes | None:
        """Return at most `limit` bytes of a file, None when it cannot be read."""
        try:
            fd = os.open(name, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW, dir_fd=self.directory)
        except OSError:
            return None
        try:
            parts = []
            # Not all at once: as much memory would be mapped, touched and given back.
            while limit > 0 and (part := os.read(fd, min(limit, 16384))):
                parts.append(part)
                limit -= len(part)
            return b"".join(parts)
        except OSError:
            return None
        finally:
            os.close(fd)

    def link(self, name: str) -> bytes | None:
        """Return the target of a link such as exe or cwd, None when it cannot be read."""
        try:
            return os.readlink(name.encode(), dir_fd=self.directory)
        except OSError:
            return None

    def open_memory(self) -> int:
        """Return a descriptor of its memory, -1 when it may not be read (without CAP_SYS_PTRACE).

        Permission is checked here and not at each read, so it outlives the capability. See `receiver/peek.py`.
        """
        try:
            return os.open("mem", os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW, dir_fd=self.directory)
        except OSError:
            return -1

    def is_dumping(self) -> bool | None:
        """Whether it is dumping core now; None when its status cannot be read."""
        status = self.read("status", MAX_STATUS)
        return None if status is None else b"\nCoreDumping:\t1\n" in status

    def open_files(self) -> list[str] | None:
        """Return "descriptor: target" of its open files, the lowest first; None when they may not be seen.

        Nothing is opened, and readlink(2) asks no file system. The last line tells how many more there are.
        """
        found: list[str] = []
        size = 0
        try:
            flags = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC | os.O_NOFOLLOW
            directory = os.open("fd", flags, dir_fd=self.directory)
        except OSError:
            return None
        try:
            # Lazily, by 32 KiB of names: the kernel gives them in order.
            with os.scandir(directory) as entries:
                for entry in entries:
                    try:
                        line = f"{entry.name}: {text(os.readlink(entry.name.encode(), dir_fd=directory))}"
                    except OSError:
                        # Closed meanwhile, by another process that shares the table; or not for us.
                        continue
                    size += json_size(line)
                    if len(found) >= MAX_FILES - 1 or size > MAX_FILES_SIZE:
                        found.append(_more(os.fstat(directory).st_size - len(found)))
                        break
                    found.append(line)
        except OSError:
            return found or None
        finally:
            os.close(directory)
        return found

    def describe(self, record: Record, facts: Collection[str] = FACTS) -> None:
        """Fill in what the kernel knows, of those groups (FACTS of `receiver/config.py`).

        Not cmdline and environ: to read these is to read the process's memory, which may lie on a file system that
        never answers, and that would be the end of this worker. The forwarder has a way: `forwarder/apart.py`.
        """
        exe = self.link("exe")
        if exe is not None:
            record.exe = text(exe)
        for name in ("cwd", "root"):
            target = self.link(name)
            if target is not None:
                setattr(record, name, text(target))
        if record.root == "/":
            record.root = None
        self._status(record)
        cgroup = self.read("cgroup", 8192) if "cgroup" in facts else None
        if cgroup:
            path = cgroup_path(cgroup)
            record.cgroup = text(path)
            record.unit = unit_of(path, _root_of_cgroups())
        limits = self.read("limits", 8192) if "limits" in facts else None
        if limits:
            record.limits = _limits(limits)
        if "files" in facts:
            record.open_files = self.open_files()

    def _status(self, record: Record) -> None:
        status = self.read("status", MAX_STATUS) or b""
        kinds = ("real", "effective", "saved", "filesystem")
        # Not splitlines(): the kernel escapes newlines in "Name:", and lets a carriage return through (H13).
        for line in status.split(b"\n"):
            name, _, rest = line.partition(b":\t")
            if name in (b"Uid", b"Gid", b"Groups"):
                numbers = [int(word) for word in rest.split()]
                if name == b"Uid" and len(numbers) == 4:
                    record.uids = dict(zip(kinds, numbers, strict=True))
                    record.uid, record.euid = numbers[0], numbers[1]
                elif name == b"Gid" and len(numbers) == 4:
                    record.gids = dict(zip(kinds, numbers, strict=True))
                    record.gid, record.egid = numbers[0], numbers[1]
                elif name == b"Groups":
                    record.groups = numbers[:MAX_GROUPS]

    def is_secure(self) -> bool | None:
        """Whether it was started with more rights than its user has; None when that cannot be read."""
        auxv = self.read("auxv", 4096)
        return is_secure(auxv) if auxv else None


def user_may_read(record: Record, *, secure: bool) -> bool:
    """Whether the user who ran the process may read its core and record.

    Not when it had, or had had, more than his rights: a core holds what the program had read (CVE-2013-1067,
    CVE-2022-4415).
    """
    if secure or record.dumpable != 1 or record.uids is None or record.gids is None:
        return False
    ids = {*record.uids.values()}, {*record.gids.values()}
    if any(OVERFLOW_ID in one for one in ids):
        # Not a user: everybody who has no number here (user_namespaces(7)). "nobody" has that number.
        return False
    return all(len(one) == 1 for one in ids)


def arguments(command_line: bytes, secret: re.Pattern[str] | None = None) -> list[str]:
    """Return the words of a command line, which end with NULs, with the values of secret names masked."""
    words = [text(word) for word in _split(command_line)]
    return words if secret is None else masking.arguments(words, secret)


def mask(environment: bytes, secret: re.Pattern[str]) -> dict[str, str]:
    """Return the environment with the values of secret names masked, and secrets within the others."""
    found: dict[str, str] = {}
    for entry in _split(environment):
        name, equals, value = entry.partition(b"=")
        if equals:
            shown = text(name)
            found.setdefault(shown, MASK if secret.search(shown) else masking.text(text(value), secret))
    return found


def _split(raw: bytes) -> list[bytes]:
    return raw.removesuffix(b"\0").split(b"\0") if raw else []


def _limits(raw: bytes) -> dict[str, dict[str, int | None]]:
    """Return soft and hard limits by name as in proc_pid_limits(5), None for unlimited."""
    found: dict[str, dict[str, int | None]] = {}
    for line in raw.split(b"\n")[1:]:
        match = re.match(rb"Max (.+?)\s{2,}(\d{1,20}|unlimited)\s+(\d{1,20}|unlimited)", line)
        if match:
            name = match[1].decode("ascii", "replace").replace(" ", "_")
            soft, hard = (None if word == b"unlimited" else int(word) for word in match.groups()[1:])
            found[name] = {"soft": soft, "hard": hard}
    return found


def json_size(line: str) -> int:
    """Return the bytes that a line takes in a list of a record."""
    return len(json.dumps(line)) + len(",\n  ")


def _more(count: int) -> str:
    # Before 6.2 (f1f1f2569901) the directory's size did not say how many there are.
    return f"... and {count} more" if count > 0 else "... and more"


# systemd's cg_path_decode_unit() and what it calls (src/basic/cgroup-util.c, unit-name.c).
_UNIT = re.compile(r"[A-Za-z0-9:_.\\-]+(?:@[A-Za-z0-9@:_.\\-]*)?\.(?:service|scope|socket|mount|swap)")
_MAX_UNIT = 255


def unit_of(cgroup: bytes, root: bytes = b"") -> str | None:
    """Return the systemd unit that a cgroup belongs to, None without one.

    root: the cgroup of the place itself, as long as a container sees the path from the host's root on.
    """
    if root and (cgroup + b"/").startswith(root + b"/"):
        cgroup = cgroup[len(root) :]
    for part in cgroup.split(b"/"):
        name = _unescaped(part)
        if part and not name.endswith(".slice"):
            return name if len(name) <= _MAX_UNIT and _UNIT.fullmatch(name) else None
    return None


def user_unit_of(cgroup: bytes, root: bytes = b"") -> str | None:
    """Return the unit of a user's own systemd, below user@UID.service; arguments as for `unit_of`."""
    before, manager, rest = cgroup.partition(b"/user@")
    if not manager or (root and not (before + b"/").startswith(root + b"/")):
        return None
    number, _, rest = rest.partition(b".service/")
    return unit_of(b"/" + rest) if number.isdigit() else None


def _unescaped(part: bytes) -> str:
    """A name that would be a file of cgroupfs itself has an underscore in front (cg_unescape)."""
    return text(part[1:] if part[:1] == b"_" else part)


def _root_of_cgroups() -> bytes:
    """Return the cgroup of this place: systemd's own, without its init.scope; b"" for the root itself."""
    try:
        fd = os.open("/proc/1/cgroup", os.O_RDONLY | os.O_CLOEXEC)
        try:
            path = cgroup_path(os.read(fd, 8192))
        finally:
            os.close(fd)
    except OSError:
        return b""
    return path.removesuffix(b"/init.scope").rstrip(b"/")
