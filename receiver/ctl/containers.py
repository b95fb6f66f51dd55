"""The containers of this host, as corepipectl's -M and --all name them.

A container is what has a mount namespace of its own, and with it a pid namespace of its own or a cgroup that an engine
made (docker run --pid=host). Its first process stands for it, held by the descriptor of its proc directory, so that a
pid which is given to another one meanwhile is met with ESRCH and never with the other one's files. A container
without any process is not seen: nothing of it is mounted anywhere.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, NamedTuple

from forwarder import namespaces
from receiver import engine
from receiver.cgroup import cgroup_path
from receiver.ctl.matching import UsageProblem
from receiver.ctl.output import hint
from receiver.engine_names import Names
from receiver.tables import shown

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from receiver.ctl.sources import Source
    from receiver.engine import Container

# An id's beginning means it from here on, as engines have it; a name is meant only as a whole.
LEAST_ID = 4
# Looked at by --all: each costs a process and its share of memory. Anyone may make namespaces.
MOST = 512
# Named in an error.
SHOWN = 20
_MAX_PROC = 1 << 20
# Below it users make cgroups of any names.
_USERS = b"/user.slice/"


class Place:
    """A container by its first process. Owns the descriptor of that one's proc directory, until `close`.

    pid: the host's number of it. container: by its cgroup; None when no engine made that. name: how it is shown: the
    name that people gave it, or else the beginning of its id.
    """

    __slots__ = ("container", "key", "name", "pid", "process")

    def __init__(self, pid: int, process: int, container: Container | None, key: _Key) -> None:
        self.pid = pid
        self.process = process
        self.container = container
        self.key = key
        self.name = f"pid:{pid}" if container is None else str(container)

    def close(self) -> None:
        if self.process >= 0:
            os.close(self.process)
            self.process = -1

    def is_meant(self, wanted: str) -> bool:
        """Whether a NAME means it: as it is shown, with or without the engine; an id's beginning; its cgroup's name."""
        names = {self.name, self.name.partition(":")[2], str(self.pid)}
        if self.container is None:
            return wanted in names
        names |= {self.container.id, f"{self.container.engine}:{self.container.id}", str(self.container)}
        text = wanted.removeprefix(f"{self.container.engine}:")
        return wanted in names or (
            self.container.has_id and len(text) >= LEAST_ID and self.container.id.startswith(text)
        )


# What tells containers apart: the engine's word on it, and the pid namespace (of one in another there are several).
_Key = tuple[str, namespaces.Identity]


class _Process(NamedTuple):
    """A process.

    level: how many pid namespaces it is below ours. first: whether it is the init of its own. users: whether a user may
    have chosen the name of its cgroup, which is not to be believed.
    """

    users: bool
    first: bool
    level: int
    started: int
    pid: int
    key: _Key
    container: Container | None

    def rank(self) -> tuple[bool, int, int, int]:
        """Return what the one has least of that stands for its container."""
        return not self.first, self.level, self.started, self.pid


def sources(wanted: str | None, *, store: str | None = None, own_store: str | None = None) -> list[Source]:
    """Return the stores of the containers that are meant: of all when `wanted` is None.

    store: the directory in them; None for what their settings say. own_store: the one of this place, which is none of
    theirs though they may see it. Raises UsageProblem, StoreError.
    """
    from receiver.ctl.copying import Unreachable  # noqa: PLC0415
    from receiver.ctl.foreign import Foreign, read_all  # noqa: PLC0415 - only who looks into containers

    if os.geteuid() != 0:
        raise UsageProblem("only root may look into containers. Run it with sudo, or in the container itself")
    places = find()
    if wanted is not None:
        place = chosen(places, wanted)
        _close(other for other in places if other is not place)
        source = Foreign(place, store=store)
        source.records()
        if not source.has_store:
            raise Unreachable(
                f"{source.name}: there is no {source.where} in it. Nothing has crashed there yet, it has no receiver, "
                "or the receiver's store is elsewhere: name it with --store"
            )
        return [source]
    if len(places) > MOST:
        hint(f"corepipectl: there are {len(places)} containers; the first {MOST} are looked at, the others by -M")
    _close(places[MOST:])
    seen = {_identity(own_store)} if own_store else set()
    found: list[Source] = []
    for source in read_all(Foreign(place, store=store) for place in places[:MOST]):
        if not source.has_store or source.identity in seen:
            source.close()
            continue
        seen.add(source.identity)
        found.append(source)
    return found


def _close(places: Iterable[Place]) -> None:
    for place in places:
        place.close()


def _identity(path: str) -> namespaces.Identity | None:
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_dev, status.st_ino


def find() -> list[Place]:
    """Return the containers, those of engines first, each with its descriptor open."""
    best: dict[_Key, _Process] = {}
    for process in _processes():
        if process.key not in best or process.rank() < best[process.key].rank():
            best[process.key] = process
    given = Names()
    found = []
    for process in sorted(best.values(), key=_order):
        place = _opened(process)
        if place is not None:
            # The names that the host's root gave are for the containers of the host's root.
            if place.container is not None and not process.users:
                place.name = given.of(place.container) or place.name
            found.append(place)
    names: dict[str, int] = {}
    for place in found:
        # One in another has its name from the outer one's cgroup.
        names[place.name] = names.get(place.name, 0) + 1
        if names[place.name] > 1:
            place.name += f"@{place.pid}"
    return found


def _order(process: _Process) -> tuple[bool, bool, int, int]:
    """Return what comes first of several that have one name, and has it for itself: never a user's imitation."""
    return process.container is None, process.users, process.level, process.pid


def chosen(places: list[Place], wanted: str) -> Place:
    """Return the container that a NAME means. Raises UsageProblem."""
    meant = [place for place in places if place.name == wanted] or [place for place in places if place.is_meant(wanted)]
    if not meant and wanted.isascii() and wanted.isdigit():
        # Any other process of it.
        key = next((process.key for process in _processes(wanted)), None)
        meant = [place for place in places if place.key == key]
    if not meant:
        there = ", ".join(shown(place.name) for place in places[:SHOWN]) or "none"
        more = f", and {len(places) - SHOWN} more" if len(places) > SHOWN else ""
        raise UsageProblem(f"there is no container '{shown(wanted)}' that runs. There are: {there}{more}")
    if len(meant) > 1:
        several = ", ".join(shown(place.name) for place in meant[:SHOWN])
        raise UsageProblem(f"'{shown(wanted)}' may be any of {several}. Give more of its name, or its pid")
    return meant[0]


def _processes(only: str | None = None) -> Iterator[_Process]:
    """Yield the processes that are in containers. Those that end meanwhile are left out."""
    own = os.open("/proc/self", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        ours = namespaces.identity_of(own, "mnt"), namespaces.identity_of(own, "pid")
    finally:
        os.close(own)
    for name in [only] if only else os.listdir("/proc"):
        if not name.isdigit():
            continue
        try:
            process = os.open(f"/proc/{name}", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError:
            continue
        try:
            found = _process(int(name), process, ours)
        except (OSError, ValueError):
            found = None
        finally:
            os.close(process)
        if found is not None:
            yield found


def _process(pid: int, process: int, ours: tuple[namespaces.Identity, namespaces.Identity]) -> _Process | None:
    """Return what is to be known of a process; None for one that is in no container. Raises OSError, ValueError."""
    if namespaces.identity_of(process, "mnt") == ours[0]:
        return None
    pid_namespace = namespaces.identity_of(process, "pid")
    cgroup = cgroup_path(namespaces.read_at(process, "cgroup", _MAX_PROC))
    container = engine.find(cgroup)
    if container is None and pid_namespace == ours[1]:
        # A service with mounts of its own.
        return None
    words = namespaces.status_value(namespaces.read_at(process, "status", _MAX_PROC), b"NSpid") or [b"0"]
    return _Process(
        users=cgroup.startswith(_USERS),
        first=len(words) > 1 and words[-1] == b"1",
        level=len(words) - 1,
        started=namespaces.start_ticks(namespaces.read_at(process, "stat", 4096)),
        pid=pid,
        key=(str(container) if container else "", pid_namespace),
        container=container,
    )


def _opened(process: _Process) -> Place | None:
    """Return a process's container with its descriptor, None when the process has ended."""
    try:
        fd = os.open(f"/proc/{process.pid}", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        # Opened anew: the number may be another one's by now.
        if namespaces.start_ticks(namespaces.read_at(fd, "stat", 4096)) == process.started:
            return Place(process.pid, fd, process.container, process.key)
    except (OSError, ValueError):
        pass
    os.close(fd)
    return None
