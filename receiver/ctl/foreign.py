"""A container's store, read from outside: every byte, name and number in it is a stranger's.

A child does it (`forwarder/apart.py`), because a file system of the container's may never answer, and nothing else in
the system would end that. It enters no namespace of the container and runs nothing of it: it walks from the container's
root by openat2(2), which follows no link, and opens regular files of the container's own users only. What it has read
comes back as memory of ours, bounded; what is parsed here is checked before a command sees it.

A core is copied for who asks for it: a debugger must not hang in a container's file system, nor meet a file that
changes under its eyes.
"""

from __future__ import annotations

import heapq
import json
import math
import os
import struct
import time
from typing import TYPE_CHECKING, Any

from forwarder import apart, namespaces
from receiver import config
from receiver.ctl.copying import Unreachable, all_but, may_be_read, open_root, take, why
from receiver.ctl.output import hint
from receiver.ctl.sources import Source
from receiver.ctl.sysroot import Sysroot, mapped_files
from receiver.openat2 import RESOLVE_NO_XDEV, STRICT, open_regular, openat2
from receiver.record import Record
from receiver.store import CORE_SUFFIXES, DEFAULT, ID, MAX_RECORD, StoreError, write_all
from receiver.tables import shown

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from forwarder.apart import Answer
    from receiver.ctl.containers import Place

# For all of a container's records. A child of a busy machine reads some 20,000 a second.
SECONDS = 10.0
# Names that are looked at: each record has at most two, and the default is 4000 records.
MAX_NAMES = 200_000
MAX_RECORDS = 10_000
# Of all records of a container.
MAX_BYTES = 32 << 20
# Of all containers that are read in one call.
MAX_ALL_BYTES = 256 << 20
MAX_NUMBER = 1 << 64
_SUFFIXES = tuple(CORE_SUFFIXES.items())
# A record in the memory that the child passes: length of its id, which core it has (0: none), length of its text.
_ENTRY = struct.Struct("<BBI")


class Foreign(Source):
    """A container's store. place: the container, whose descriptor this owns.

    store: the store's directory in the container; None for what its settings say, or the default.
    """

    def __init__(self, place: Place, *, store: str | None = None) -> None:
        self.place = place
        self.name = place.name
        self.path = store
        # The store's directory: the same one may be seen in several containers.
        self.identity: namespaces.Identity | None = None
        self._look: apart.Look | None = None
        self._deadline = 0.0
        self._found: tuple[list[Record], int] | None = None
        # The crash whose core was opened last, and its copy; whose libraries are there.
        self._core: tuple[Record, int] | None = None
        self._complete: str | None = None
        self._sysroot: Sysroot | None = None

    def begin(self, most: int = MAX_BYTES) -> None:
        """Start to read, without waiting for it. most: bytes of records. Raises Unreachable."""
        process, wanted = self.place.process, self.path
        try:
            self._deadline = time.monotonic() + SECONDS
            self._look = apart.Look(lambda: _answers(process, wanted, most), self._deadline, all_but((process,)))
        except apart.Stuck as error:
            raise Unreachable(f"{self.name}: {error}") from None

    def collect(self) -> None:
        """Wait for what `begin` began. Raises Unreachable."""
        look, self._look = self._look, None
        if look is None:
            # It could not begin, which was said.
            return
        try:
            # Of several, those before this one may have used up the time, but not its answer.
            message = look.answer(max(self._deadline, time.monotonic()))
        except apart.Stuck:
            raise Unreachable(
                f"{self.name}: its store did not answer within {SECONDS:g} s. A file system of it may hang, or it has "
                "ended; look from within"
            ) from None
        finally:
            look.close()
        try:
            self._take(message.fields, message.descriptors)
        finally:
            message.close()

    def _take(self, fields: dict[str, bytes], descriptors: list[int]) -> None:
        where = shown(fields.get("path", b"").decode(errors="backslashreplace"))
        if "problem" in fields:
            raise Unreachable(f"{self.name}: {where}: {shown(fields['problem'].decode(errors='backslashreplace'))}")
        if "identity" not in fields or len(descriptors) != 1:
            self._found = ([], 0)
            self.path = os.fsdecode(fields.get("path", b"")) or self.path
            return
        device, _, inode = fields["identity"].partition(b":")
        self.path, self.identity = os.fsdecode(fields["path"]), (int(device), int(inode))
        unreadable = int(fields["unreadable"])
        found: list[Record] = []
        for owner, suffix, data in _entries(descriptors[0]):
            record = checked(owner, data)
            if record is None:
                unreadable += 1
                continue
            _with_core(record, self.path, suffix)
            found.append(record)
        found.sort(key=lambda record: record.id)
        self._found = (found, unreadable)

    def close(self) -> None:
        if self._look is not None:
            self._look.close()
            self._look = None
        if self._core is not None:
            os.close(self._core[1])
            self._core = None
        if self._sysroot is not None:
            self._sysroot.close()
            self._sysroot = None
        self.place.close()

    @property
    def where(self) -> str:
        """The store's directory in the container, as far as it is known."""
        return shown(self.path or DEFAULT)

    @property
    def has_store(self) -> bool:
        """Whether there is one, once it was read."""
        return self.identity is not None

    def records(self) -> tuple[list[Record], int]:
        if self._found is None:
            self.begin()
            self.collect()
        if self._found is None:
            raise AssertionError
        return self._found

    def open_core(self, record: Record) -> int:
        """Return a descriptor of a copy of the core, which has no name and is the caller's.

        Raises StoreError, OSError.
        """
        return os.dup(self._copied(record))

    def _copied(self, record: Record) -> int:
        """Return the copy of a crash's core. The last one is kept: a debugger's preparations need it, too."""
        from receiver import dump  # noqa: PLC0415 - only for cores
        from receiver.ctl.progress import Progress  # noqa: PLC0415

        if self._core is not None and self._core[0].id == record.id:
            return self._core[1]
        if record.core.path is None or self.path is None:
            raise StoreError(f"crash {record.id} has no core")
        store, name = self.path, os.path.basename(record.core.path)

        def opened(root: int) -> int:
            return open_regular(openat2(root, store, os.O_PATH | os.O_DIRECTORY), name, STRICT | RESOLVE_NO_XDEV)

        places = [place for place in (os.environ.get("TMPDIR"), "/var/tmp", "/tmp") if place]  # noqa: S108
        target = dump.open_nameless(places)
        try:
            with Progress("copy", record.core.stored_bytes) as progress:
                take(f"{self.name}: {shown(store)}/{name}", self.place.process, opened, target, progress=progress)
        except BaseException:
            os.close(target)
            raise
        if self._core is not None:
            os.close(self._core[1])
        self._core = record, target
        return target

    def program(self, record: Record) -> str | None:
        """Return the path of a copy of the crash's program, None when it cannot be had."""
        if not record.exe or not record.exe.startswith("/"):
            return None
        try:
            return self._prepared().bring(record.exe)
        except OSError:
            # No room, and no directory, for copies.
            return None

    def sysroot(self, record: Record) -> str | None:
        try:
            self._with_libraries(record)
            return self._prepared().path
        except (OSError, StoreError):
            # An empty one: anything but the libraries of this place.
            return "/nonexistent"

    def _with_libraries(self, record: Record) -> None:
        if self._complete != record.id:
            self._complete = record.id
            self._prepared().bring_all(mapped_files(self._copied(record), record.core.compression))

    def debugger_arguments(self, debugger: str) -> list[str]:
        """Return what makes a debugger look nowhere else for libraries, and run nothing that comes with them."""
        root = self._prepared().path
        if self._core is not None:
            self._with_libraries(self._core[0])
        if os.path.basename(debugger).startswith("lldb"):
            settings = "settings set target.load-script-from-symbol-file false"
            return ["--no-lldbinit", "-O", settings, "-O", f"platform select --sysroot {root} remote-linux"]
        return ["-nx", "-iex", "set auto-load off", "-iex", f"set sysroot {root}"]

    def debugger_user(self) -> int | None:
        return self._prepared().user

    def _prepared(self) -> Sysroot:
        if self._sysroot is None:
            self._sysroot = Sysroot(self.place)
        return self._sysroot


def read_all(sources: Iterable[Foreign], at_once: int = 8) -> Iterator[Foreign]:
    """Read several stores, some at a time, and yield them all. What cannot be read is said on standard error."""
    waiting = list(sources)
    most = min(MAX_BYTES, max(MAX_RECORD, MAX_ALL_BYTES // max(1, len(waiting))))
    for first in range(0, len(waiting), at_once):
        batch = waiting[first : first + at_once]
        for source in batch:
            try:
                source.begin(most)
            except Unreachable as error:
                hint(f"corepipectl: {error}")
        for source in batch:
            try:
                source.collect()
            except Unreachable as error:
                hint(f"corepipectl: {error}")
        yield from batch


# What the child does. It may hang anywhere below, and nobody waits for it then.


def _answers(process: int, wanted: str | None, most: int) -> Iterator[Answer]:
    path = wanted or DEFAULT
    try:
        root = open_root(process)
        path = wanted or _setting(root) or DEFAULT
        try:
            directory = openat2(root, path, os.O_RDONLY | os.O_DIRECTORY)
        except FileNotFoundError:
            yield {"path": os.fsencode(path)}, None
            return
        yield _read_store(process, directory, path, most)
    except OSError as error:
        yield {"path": os.fsencode(path)[:4096], "problem": why(error).encode()}, None


def _setting(root: int) -> str | None:
    """Return the store that the container's settings name, None when they name none that can be used."""
    import tomllib  # noqa: PLC0415 - in the child alone

    try:
        fd = open_regular(root, config.DEFAULT_PATH)
        try:
            text = os.read(fd, config._MAX_FILE + 1)  # noqa: SLF001
        finally:
            os.close(fd)
        if len(text) > config._MAX_FILE:  # noqa: SLF001
            return None
        store = tomllib.loads(text.decode()).get("store")
        return config._path(store) if isinstance(store, str) else None  # noqa: SLF001
    except (OSError, ValueError, RecursionError):
        return None


def _read_store(process: int, directory: int, path: str, most: int) -> Answer:
    found = os.fstat(directory)
    if not may_be_read(process, found):
        return {"path": os.fsencode(path), "problem": b"belongs to a user who is none of the container's"}, None
    owners: list[str] = []
    cores: dict[str, int] = {}
    names = left = 0
    with os.scandir(directory) as entries:
        for entry in entries:
            names += 1
            if names > MAX_NAMES:
                break
            owner, _, rest = entry.name.partition(".")
            if not ID.fullmatch(owner):
                continue
            if rest == "json":
                owners.append(owner)
            for number, (_, suffix) in enumerate(_SUFFIXES, start=1):
                if f".{rest}" == suffix:
                    cores[owner] = number
    # The newest are the ones that are looked for.
    newest = heapq.nlargest(MAX_RECORDS, owners)
    left = len(owners) - len(newest)
    memory = os.memfd_create("records", os.MFD_CLOEXEC)
    unreadable = size = 0
    for number, owner in enumerate(newest):
        try:
            data = _read_record(process, directory, f"{owner}.json")
        except (OSError, ValueError):
            unreadable += 1
            continue
        size += len(data)
        if size > most:
            left += len(newest) - number
            break
        raw = owner.encode()
        write_all(memory, _ENTRY.pack(len(raw), cores.get(owner, 0), len(data)) + raw + data)
    fields = {
        "path": os.fsencode(path),
        "identity": b"%d:%d" % (found.st_dev, found.st_ino),
        "unreadable": b"%d" % (unreadable + left),
    }
    return fields, memory


def _read_record(process: int, directory: int, name: str) -> bytes:
    # Not on another mount: one file of a store may be a file system that hangs.
    fd = open_regular(directory, name, STRICT | RESOLVE_NO_XDEV)
    try:
        found = os.fstat(fd)
        if found.st_size > MAX_RECORD or not may_be_read(process, found):
            raise ValueError("no record of ours")
        parts = []
        size = 0
        while part := os.read(fd, MAX_RECORD + 1 - size):
            parts.append(part)
            size += len(part)
            if size > MAX_RECORD:
                raise ValueError("it grows")
        return b"".join(parts)
    finally:
        os.close(fd)


# What we do with what came back.


def _entries(memory: int) -> Iterator[tuple[str, int, bytes]]:
    """Yield (id, which core it has, text) of the records in the child's memory."""
    size = os.fstat(memory).st_size
    at = 0
    while at < size:
        id_length, suffix, length = _ENTRY.unpack(os.pread(memory, _ENTRY.size, at))
        at += _ENTRY.size
        yield os.pread(memory, id_length, at).decode(), suffix, os.pread(memory, length, at + id_length)
        at += id_length + length


def _with_core(record: Record, store: str, number: int) -> None:
    """Let a record name the file in the store that its id says, whatever it says itself."""
    core = record.core
    if core.path is None or core.state == "none":
        core.path, core.state = None, "none"
    elif number == 0:
        core.path, core.state, core.reason = None, "none", "its file is not in the store any more"
    else:
        compression, suffix = _SUFFIXES[number - 1]
        core.path, core.compression = os.path.join(store, record.id + suffix), compression
        core.state = core.state if core.state in ("stored", "reduced") else "reduced"


def checked(owner: str, data: bytes) -> Record | None:
    """Return a stranger's record when it is one that every command can show, None otherwise.

    owner: the id by its file's name, which is the one that counts.
    """
    try:
        found = json.loads(data, parse_constant=_no_number)
        record = Record.from_json(found)
        values = record.to_json()
        if record.id != owner or not _plain(values, 4):
            return None
    except (ValueError, RecursionError, TypeError):
        return None
    return record


def _no_number(text: str) -> float:
    raise ValueError(text)


def _plain(value: Any, depth: int) -> bool:
    """Whether a value has only texts and numbers that every program can hold, and no deep nesting.

    Raises ValueError for a text that is none: half of a surrogate pair cannot be written to any file.
    """
    if isinstance(value, dict):
        return depth > 0 and all(_plain(key, 0) and _plain(item, depth - 1) for key, item in value.items())
    if isinstance(value, list):
        return depth > 0 and all(_plain(item, depth - 1) for item in value)
    if isinstance(value, str):
        return value.isascii() or bool(value.encode())
    if isinstance(value, int):
        return -MAX_NUMBER < value < MAX_NUMBER
    return math.isfinite(value) if isinstance(value, float) else value is None
