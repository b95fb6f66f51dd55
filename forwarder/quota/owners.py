"""Whose an id is, as far as the host can know: which containers it may be of, and what the host calls it.

The kernel's warning has a number and no name. Here are the kernel's own files (uid_map, gid_map, cgroup, mountinfo) and
those of the host's root (passwd, group, subuid, subgid, projid, projects), which are read as they are: a name service
on the network may hang, and would know nothing of subordinate ids.

Several containers may share a range of ids, and without a user namespace they share the host's: then each that it may
be is named, and none is picked.
"""

from __future__ import annotations

import contextlib
import os
import re
import time
from collections import defaultdict
from dataclasses import dataclass, field
from typing import NamedTuple

from forwarder import namespaces
from forwarder.install import PROC_USER_INIT_INO
from forwarder.quota.events import GROUPS, PROJECT, USER
from forwarder.share import container_of
from receiver.cgroup import cgroup_path

# A look at all processes is good for so long, and for so many times as long as it took: a twentieth of a processor.
FRESH_SECONDS = 1.0
FRESH_TIMES = 20.0
# A look at all processes ends then; what was not reached is not known.
LOOK_SECONDS = 2.0
MAX_FILE = 4 << 20
MAX_NAMED = 8
MAX_CGROUPS = 1000
MAX_KNOWN = 10000
MAX_TEXT = 200

_OCTAL = re.compile(rb"\\([0-7]{3})")


class Owner(NamedTuple):
    """name: as the host calls it. containers: each that it may be. key: whose allowance it counts on."""

    name: str
    containers: tuple[str, ...]
    key: str


Ranges = list[tuple[int, int]]


@dataclass(slots=True)
class _Space:
    """A user namespace. uids, gids: (first, count) of the host's ids that it has made its own. cgroups: whose it is."""

    uids: Ranges
    gids: Ranges
    cgroups: set[bytes] = field(default_factory=set)

    def ids(self, kind: str) -> Ranges:
        return self.gids if kind == GROUPS else self.uids


@dataclass(slots=True)
class _Look:
    """What one look at all processes found.

    spaces: all user namespaces but the initial. users: who runs with the host's own ids, by type and id.
    """

    spaces: dict[namespaces.Identity, _Space] = field(default_factory=dict)
    users: dict[tuple[str, int], set[bytes]] = field(default_factory=lambda: defaultdict(set))


class Owners:
    """Knows whose an id is. `root` is where /etc and /proc are."""

    def __init__(self, root: str = "") -> None:
        self._root = root
        self._look = _Look()
        self._files: dict[str, list[list[str]]] = {}
        self._known: dict[tuple[str, int, int], Owner] = {}
        self._stale = float("-inf")

    def of(self, kind: str, number: int, caused_by: int) -> Owner:
        """Return whose a quota is. kind: a type. Never raises: what cannot be read is not known."""
        self._refresh()
        wanted = (kind, number, caused_by)
        found = self._known.get(wanted)
        if found is None:
            if len(self._known) >= MAX_KNOWN:
                self._known.clear()
            found = self._known[wanted] = self._of(kind, number, caused_by)
        return found

    def _of(self, kind: str, number: int, caused_by: int) -> Owner:
        if kind == PROJECT:
            name = next((row[0] for row in self._rows("projid") if _is(row, 1, number)), "")
            path = next((row[1] for row in self._rows("projects") if _is(row, 0, number) and len(row) > 1), "")
            # A project is a directory. Only who wrote to it says whose that is, where he is somebody in a container.
            cgroups = self._mapped(USER, caused_by)
            return Owner(_text(f"{name} {path}".strip()), _inside(cgroups), _key(cgroups, f"project {number}"))
        if kind not in (USER, GROUPS):
            return Owner("", (), "")
        name = next((row[0] for row in self._rows("passwd" if kind == USER else "group") if _is(row, 2, number)), "")
        if not name and (whose := self._subordinate("subuid" if kind == USER else "subgid", number)):
            name = f"a subordinate id of {whose}"
        inside, outside = self._mapped(kind, number), self._look.users.get((kind, number), set())
        named = {*_inside(inside), *_outside(outside)}
        if inside and outside:
            # Root of a rootless container is its user, who may have been it himself.
            named.add("host")
        return Owner(_text(name), tuple(sorted(named)[:MAX_NAMED]), _key(inside or outside, name or "unknown"))

    def _mapped(self, kind: str, number: int) -> set[bytes]:
        """Return the cgroups in the largest user namespaces that have this id: what is inside of those is theirs."""
        most, found = 0, set[bytes]()
        for space in self._look.spaces.values():
            ids = space.ids(kind)
            if not any(first <= number < first + count for first, count in ids):
                continue
            size = sum(count for _, count in ids)
            if size > most:
                most, found = size, set()
            if size == most:
                found |= space.cgroups
        return found

    def _subordinate(self, file: str, number: int) -> str:
        for row in self._rows(file):
            if len(row) == 3 and row[1].isdecimal() and row[2].isdecimal() and 0 <= number - int(row[1]) < int(row[2]):
                return row[0]
        return ""

    def mount_of(self, device: str) -> str:
        """Return where a device is mounted on the host; "" when it is not, or only in a container."""
        with contextlib.suppress(OSError):
            # proc_pid_mountinfo(5): ID PARENT MAJOR:MINOR ROOT TARGET ..., and blanks in octal.
            for line in namespaces.read_at(-1, f"{self._root}/proc/1/mountinfo", MAX_FILE).split(b"\n"):
                words = line.split(b" ")
                if len(words) > 4 and words[2] == device.encode("ascii"):
                    return _text(_OCTAL.sub(lambda found: bytes([int(found[1], 8) & 255]), words[4]))
        return ""

    def _rows(self, file: str) -> list[list[str]]:
        if file not in self._files:
            rows = []
            with contextlib.suppress(OSError):
                rows = [line.split(":") for line in _read(f"{self._root}/etc/{file}").split("\n") if line[:1] != "#"]
            self._files[file] = rows
        return self._files[file]

    def _refresh(self) -> None:
        begun = time.monotonic()
        if begun < self._stale:
            return
        self._look = _look(f"{self._root}/proc", begun + LOOK_SECONDS)
        self._files.clear()
        self._known.clear()
        ended = time.monotonic()
        self._stale = ended + max(FRESH_SECONDS, FRESH_TIMES * (ended - begun))


def _look(proc: str, deadline: float) -> _Look:
    look = _Look()
    with contextlib.suppress(OSError):
        for name in os.listdir(proc):
            if name.isdecimal() and time.monotonic() < deadline:
                with contextlib.suppress(OSError, ValueError):
                    _look_at(look, f"{proc}/{name}")
    return look


def _look_at(look: _Look, path: str) -> None:
    """Add one process. Raises OSError, ValueError."""
    directory = os.open(path, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        space = namespaces.identity_of(directory, "user")
        cgroup = cgroup_path(namespaces.read_at(directory, "cgroup", 65536))
        if space not in look.spaces and space[1] != PROC_USER_INIT_INO:
            look.spaces[space] = _Space(_own(directory, "uid_map"), _own(directory, "gid_map"))
        if space not in look.spaces or not look.spaces[space].uids:
            # Who is not dumpable looks like root: his next process will not.
            ids = os.fstat(directory)
            for kind, number in ((USER, ids.st_uid), (GROUPS, ids.st_gid)):
                if len(look.users[kind, number]) < MAX_CGROUPS:
                    look.users[kind, number].add(cgroup)
            return
        if len(look.spaces[space].cgroups) < MAX_CGROUPS:
            look.spaces[space].cgroups.add(cgroup)
    finally:
        os.close(directory)


def _own(directory: int, kind: str) -> Ranges:
    """Return the ids of the host's that have another number there. Raises OSError, ValueError.

    Those that have the same are the host's own (PrivateUsers=full maps all of them, and is no container).
    """
    return [(outside, count) for inside, outside, count in namespaces.map_of(directory, kind) if inside != outside]


def _inside(cgroups: set[bytes]) -> tuple[str, ...]:
    """Return names for what is in a user namespace of its own, whoever made that."""
    return tuple(sorted({_engine(cgroup) or _text(container_of(cgroup)) for cgroup in cgroups})[:MAX_NAMED])


def _outside(cgroups: set[bytes]) -> tuple[str, ...]:
    """Return names for what shares the host's ids; none when all of it is the host's own."""
    named = {_engine(cgroup) for cgroup in cgroups}
    if not any(named):
        return ()
    return tuple(sorted(name or "host" for name in named)[:MAX_NAMED])


def _engine(cgroup: bytes) -> str:
    from receiver.engine import describe  # noqa: PLC0415 - the first warning needs it, and most hosts have none

    return _text((describe(cgroup.decode("utf-8", "backslashreplace")) or "").encode("utf-8", "backslashreplace"))


def _key(cgroups: set[bytes], otherwise: str) -> str:
    """Return what a container cannot multiply (`forwarder/share.py`)."""
    return _text(min(map(container_of, cgroups))) if cgroups else _text(otherwise)


def _is(row: list[str], column: int, number: int) -> bool:
    return len(row) > column and row[column].isdecimal() and int(row[column]) == number


def _text(name: str | bytes) -> str:
    """Return a name that can be written as JSON and as UTF-8, whatever bytes it has."""
    data = name if isinstance(name, bytes) else name.encode("utf-8", "backslashreplace")
    return data.decode("utf-8", "backslashreplace")[:MAX_TEXT]


def _read(path: str) -> str:
    return namespaces.read_at(-1, path, MAX_FILE).decode("utf-8", "backslashreplace")
