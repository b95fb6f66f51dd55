"""The store: a directory of cores and records, its names, its total, and what a killed worker leaves behind.

Names in it, ID being the record's::

    ID.json                 the record            ID.core.zst, ID.core    the core, whole
    .ID.json                a crash being written: the record if it ends now. Locked by its worker while he lives
    .ID.core                its core so far
    .ID.room                how much of the store it may use: a sparse file whose size is the number
    .ID.final               its final record: from here on it is complete, and whoever finds it finishes the renames
    .*.new                  a file of one of these names that is being written, under the lock
    .lock                   held (flock) while names come and go and while room is given

A name is opened relative to the directory's descriptor, made with O_EXCL and never followed; the directory must be
writable by its owner only, so nobody can prepare, swap or guess one (H12).
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import stat
import struct
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple

from receiver.record import Core, Record

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

DEFAULT = "/var/lib/core_pipe"
CORE_SUFFIXES = {"zstd": ".core.zst", "none": ".core"}
INTERRUPTED = "interrupted: the receiver ended before the core was complete"
MAX_RECORD = 1 << 20
# Records outlive their cores, but not for ever: a crash loop writes nothing else (gardenlinux#1226).
RECORDS = 4000
# Names come and go in microseconds; who holds the lock longer is stuck.
LOCK_SECONDS = 10.0
ID = re.compile(r"[0-9]{8}T[0-9]{6}-[0-9]{6}-[0-9]{1,20}-[0-9a-f]{8}")


class StoreError(Exception):
    """The store cannot be used. The text is a fact and what to do."""


class NoRoom(Exception):
    """A limit of the store does not allow more. The text names the limit."""


def no_limit(_filesystem_total: int) -> None:
    """Stand for a limit that is off."""


class Usage(NamedTuple):
    """What a store holds, in bytes on disk, from the point of view of one crash.

    stored: cores that are there. promised: what the others that are being written may take. outstanding: what they have
    not taken of that yet. own: what this one has taken.
    """

    stored: int
    promised: int
    outstanding: int
    own: int


class Store:
    """A store's directory. Owns its descriptor, whose position listings move: each process opens its own.

    limit: asked for the largest total of stored bytes, given the bytes of the file system; None for no limit.
    keep_free: likewise, how many bytes to leave free in the file system.
    records: how many records to keep.
    """

    def __init__(
        self,
        path: str,
        *,
        limit: Callable[[int], int | None] = no_limit,
        keep_free: Callable[[int], int | None] = no_limit,
        records: int = RECORDS,
        create: bool = True,
    ) -> None:
        """Open the directory, and make it when it is not there. Raises StoreError."""
        self.path = path
        self._limit = limit
        self._keep_free = keep_free
        self._records = records
        try:
            if create and not os.path.isdir(path):
                os.makedirs(path, exist_ok=True)
                # Whatever the umask: users read their own cores in here, by each file's own mode.
                os.chmod(path, 0o755)  # noqa: S103
            self.directory = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except OSError as error:
            raise StoreError(
                f"{path}: cannot be opened as a directory ({error.strerror}). "
                "Make it a directory of root's, not a link, or name another with the setting 'store'"
            ) from None
        found = os.fstat(self.directory)
        if create and (found.st_uid != os.geteuid() or found.st_mode & 0o022):
            os.close(self.directory)
            raise StoreError(
                f"{path}: belongs to uid {found.st_uid} with mode {stat.S_IMODE(found.st_mode):04o}, so others could "
                f"put files there. Run: chown {os.geteuid()} {path} && chmod 0755 {path}"
            )

    def close(self) -> None:
        os.close(self.directory)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the store's lock. Raises StoreError after LOCK_SECONDS."""
        fd = self._open(".lock", os.O_RDWR | os.O_CREAT)
        try:
            deadline = time.monotonic() + LOCK_SECONDS
            while True:
                try:
                    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if time.monotonic() > deadline:
                        raise StoreError(
                            f"{self.path}/.lock has been held for {LOCK_SECONDS:g} s. Find its holder with 'lslocks'"
                        ) from None
                    time.sleep(0.002)
            yield
        finally:
            os.close(fd)

    def _open(self, name: str, flags: int, mode: int = 0o600) -> int:
        return os.open(name, flags | os.O_CLOEXEC | os.O_NOFOLLOW, mode, dir_fd=self.directory)

    def _unlink(self, name: str) -> None:
        try:
            os.unlink(name, dir_fd=self.directory)
        except FileNotFoundError:
            pass

    def _write(self, name: str, data: bytes, *, readers: int | None = None, sync: bool = True) -> None:
        """Write a file whole, or not at all under its name.

        Call it with the lock held: what it leaves when it is killed, `recover` clears away under the lock.
        """
        temporary = f".{name.removeprefix('.')}.new"
        self._unlink(temporary)
        fd = self._open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
        try:
            write_all(fd, data)
            publish_mode(fd, readers)
            if sync:
                os.fsync(fd)
        except BaseException:
            self._unlink(temporary)
            raise
        finally:
            os.close(fd)
        os.rename(temporary, name, src_dir_fd=self.directory, dst_dir_fd=self.directory)

    def begin(self, record: Record) -> Entry:
        """Begin to keep a crash: from now on it leaves a record whatever happens. Raises OSError, StoreError."""
        with self.locked():
            self._forget_oldest()
            fd = self._open(f".{record.id}.json", os.O_RDWR | os.O_CREAT | os.O_EXCL)
            try:
                # Before anybody else may look for those whose worker is gone.
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                was, record.core = record.core, Core(reason=INTERRUPTED)
                write_all(fd, record.dumps())
                record.core = was
                # What `recover` makes visible of it looks like every record.
                publish_mode(fd, None)
            except BaseException:
                os.close(fd)
                self._unlink(f".{record.id}.json")
                raise
        return Entry(self, record, fd)

    def add_record(self, record: Record) -> None:
        """Keep a record that has no core. Raises OSError, StoreError."""
        with self.locked():
            self._forget_oldest()
            self._write(f"{record.id}.json", record.dumps())

    def _forget_oldest(self) -> None:
        """Make room for one more record: the oldest go, first those that have no core. Call it with the lock held."""
        names = [name for name in self.names() if not name.startswith(".")]
        records = [name for name in names if name.endswith(".json")]
        excess = len(records) + 1 - self._records
        if excess <= 0:
            return
        cores = {name.split(".")[0]: name for name in names if name.endswith(tuple(CORE_SUFFIXES.values()))}
        for name in sorted(records, key=lambda name: (name.split(".")[0] in cores, name))[:excess]:
            core = cores.get(name.split(".")[0])
            if core is not None:
                self._unlink(core)
            self._unlink(name)

    def names(self) -> list[str]:
        return os.listdir(self.directory)

    def _usage(self, owner: str | None) -> Usage:
        """Count what the store holds, from the point of view of one crash (its id)."""
        stored = promised = outstanding = 0
        rooms: dict[str, int] = {}
        written: dict[str, int] = {}
        for name in self.names():
            core = name.endswith(tuple(CORE_SUFFIXES.values()))
            if not core and not name.endswith(".room"):
                continue
            try:
                found = os.stat(name, dir_fd=self.directory, follow_symlinks=False)
            except FileNotFoundError:
                continue
            whose = name.removeprefix(".").split(".")[0]
            if not core:
                rooms[whose] = found.st_size
            elif name.startswith("."):
                written[whose] = found.st_blocks * 512
            else:
                stored += found.st_blocks * 512
        for whose, room in rooms.items():
            if whose != owner:
                promised += room
                outstanding += max(0, room - written.get(whose, 0))
        return Usage(stored, promised, outstanding, own=written.get(owner or "", 0))

    def used(self) -> int:
        """Return the bytes that cores take, on disk or promised to their workers."""
        found = self._usage(None)
        return found.stored + found.promised

    def make_room(self, owner: str, wanted: int, *, evict: bool = True) -> None:
        """See to it that the core of one crash may take `wanted` bytes. Raises NoRoom.

        evict: remove the oldest cores where that helps; none goes in vain. Call it with the lock held.
        """
        while True:
            system = os.fstatvfs(self.directory)
            whole = system.f_blocks * system.f_frsize
            limit, keep_free = self._limit(whole), self._keep_free(whole) or 0
            usage = self._usage(owner)
            if limit is not None and wanted > limit:
                raise NoRoom(f"it takes more than the store may hold in all (store_max, {limit} bytes)")
            if limit is not None and usage.promised + wanted > limit:
                raise NoRoom(f"cores being written take up the store's total (store_max, {limit} bytes)")
            # A file system that does not tell its size (ramfs, some of FUSE's) does not tell what is free either.
            missing = keep_free + usage.outstanding + max(0, wanted - usage.own) - system.f_bavail * system.f_frsize
            if whole and missing > usage.stored:
                raise NoRoom(f"the file system has to keep {keep_free} bytes free (keep_free)")
            if limit is not None and usage.stored + usage.promised + wanted > limit:
                setting = "store_max"
            elif whole and missing > 0:
                setting = "keep_free"
            else:
                return
            if not (evict and self._evict_oldest(setting)):
                raise NoRoom(f"older cores take up the room ({setting})")

    def _evict_oldest(self, why: str) -> bool:
        """Remove the oldest core, and say so in its record. Returns whether there was one."""
        suffixes = tuple(CORE_SUFFIXES.values())
        cores = sorted(name for name in self.names() if not name.startswith(".") and name.endswith(suffixes))
        if not cores:
            return False
        self._unlink(cores[0])
        owner = cores[0].split(".")[0]
        try:
            record = self.load(owner)
            record.core = Core(
                reason=f"evicted: newer cores needed its room ({why})", size_bytes=record.core.size_bytes
            )
            self._rewrite(record)
        except (OSError, ValueError):
            # It had no readable record; its core is gone all the same.
            pass
        return True

    def _rewrite(self, record: Record) -> None:
        """Replace a record, and leave its readers as they are."""
        acl = None
        fd = self._open(f"{record.id}.json", os.O_RDONLY)
        try:
            acl = os.getxattr(fd, ACL)
        except OSError:
            pass
        finally:
            os.close(fd)
        self._write(f"{record.id}.json", record.dumps())
        if acl is not None:
            fd = self._open(f"{record.id}.json", os.O_RDONLY)
            try:
                os.setxattr(fd, ACL, acl)
            finally:
                os.close(fd)

    def _read(self, name: str) -> Record:
        """Return the record in a file, which must be its own (its name has its id). Raises OSError, ValueError."""
        # Not blocking, should it be a FIFO.
        fd = self._open(name, os.O_RDONLY | os.O_NONBLOCK)
        try:
            if not stat.S_ISREG(os.fstat(fd).st_mode):
                raise ValueError("it is not a file")
            parts = []
            left = MAX_RECORD + 1
            while left and (part := os.read(fd, left)):
                parts.append(part)
                left -= len(part)
        finally:
            os.close(fd)
        if not left:
            raise ValueError("it is larger than a record may be")
        try:
            record = Record.from_json(json.loads(b"".join(parts)))
        except RecursionError:
            raise ValueError("it is nested too deeply") from None
        if record.id != name.removeprefix(".").split(".")[0]:
            raise ValueError("its id is not its name")
        return record

    def load(self, owner: str) -> Record:
        """Return the record with this id. Raises OSError, ValueError."""
        record = self._read(f"{owner}.json")
        if record.core.path is not None:
            try:
                os.close(self.open_core(record))
            except FileNotFoundError:
                # By hand, or by an eviction whose worker was killed before it had said so.
                record.core = Core(reason="its file is not in the store any more", size_bytes=record.core.size_bytes)
            except OSError:
                pass
        return record

    def records(self) -> Iterator[tuple[str, Record | None]]:
        """Yield (id, record) in the order of time; None for one that is no record or may not be read."""
        for name in sorted(self.names()):
            if not name.startswith(".") and name.endswith(".json"):
                owner = name.removesuffix(".json")
                try:
                    yield owner, self.load(owner)
                except (OSError, ValueError):
                    yield owner, None

    def open_core(self, record: Record) -> int:
        """Return a descriptor of a record's core. Raises OSError."""
        for suffix in CORE_SUFFIXES.values():
            try:
                return self._open(record.id + suffix, os.O_RDONLY | os.O_NONBLOCK)
            except FileNotFoundError:
                continue
        raise FileNotFoundError(errno.ENOENT, "there is no core", os.path.join(self.path, record.id))

    def recover(self) -> list[str]:
        """Finish or clear away what workers left that are gone. Returns the ids that have a record now.

        Raises OSError, and StoreError for the first of those that cannot be finished, when all others are.
        """
        found = []
        failure = None
        with self.locked():
            for name in self.names():
                owner = name.removeprefix(".").split(".")[0]
                if not ID.fullmatch(owner):
                    continue
                try:
                    if name == f".{owner}.json":
                        if self._take_over(owner):
                            found.append(owner)
                    elif name.startswith(".") and name.endswith(".new"):
                        self._unlink(name)
                except OSError as error:
                    failure = failure or StoreError(f"{self.path}/{name}: cannot be finished ({error.strerror})")
        if failure is not None:
            raise failure
        return found

    def _take_over(self, owner: str) -> bool:
        """Bring a crash to its end whose worker is gone. Returns whether it has a record now. Raises OSError."""
        try:
            fd = self._open(f".{owner}.json", os.O_RDWR)
        except FileNotFoundError:
            return False
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        else:
            return self._roll(owner)
        finally:
            os.close(fd)

    def _roll(self, owner: str) -> bool:
        """Bring one crash to its end: forward when its final record stands, else back to a record without a core.

        Returns False when it had no record yet: its worker was killed before it could accept the crash. Raises OSError.
        """
        names = set(self.names())
        recorded = True
        final = self._read_final(owner) if f".{owner}.final" in names else None
        if final is not None:
            self._sync(f".{owner}.final")
            if f".{owner}.core" in names and final.core.path is not None:
                self._sync(f".{owner}.core")
                self._publish(f".{owner}.core", owner + CORE_SUFFIXES[final.core.compression or "none"])
            os.rename(f".{owner}.final", f"{owner}.json", src_dir_fd=self.directory, dst_dir_fd=self.directory)
        elif f"{owner}.json" not in names:
            try:
                self._read(f".{owner}.json")
            except ValueError:
                recorded = False
            else:
                self._publish(f".{owner}.json", f"{owner}.json")
        for suffix in ("core", "room", "final", "final.new", "json"):
            self._unlink(f".{owner}.{suffix}")
        os.fsync(self.directory)
        return recorded

    def _sync(self, name: str) -> None:
        fd = self._open(name, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)

    def _read_final(self, owner: str) -> Record | None:
        """Return a final record that this version can act on. Raises OSError."""
        try:
            final = self._read(f".{owner}.final")
        except ValueError:
            return None
        if (final.core.compression or "none") not in CORE_SUFFIXES:
            return None
        if final.core.path is not None:
            try:
                found = os.stat(f".{owner}.core", dir_fd=self.directory, follow_symlinks=False)
                # The power went before the file was on the disk: it was sealed without a sync.
                if found.st_size != final.core.file_bytes:
                    return None
            except FileNotFoundError:
                # It has its visible name already.
                pass
        return final

    def _publish(self, name: str, target: str) -> None:
        """Give a file its visible name, again if need be. Raises OSError when that is another file's."""
        try:
            # link(2) and not rename(2): it never replaces what stands there.
            os.link(name, target, src_dir_fd=self.directory, dst_dir_fd=self.directory, follow_symlinks=False)
        except FileExistsError:
            ours, theirs = (os.stat(n, dir_fd=self.directory, follow_symlinks=False) for n in (name, target))
            if not os.path.samestat(ours, theirs):
                raise


class Entry:
    """A crash that is being written. Owns the lock on its pending record, and its core's file."""

    # Room is asked for in steps, so that the store is not counted at each write. No file takes less than whole blocks.
    STEP = 8 << 20
    BLOCK = 4096

    def __init__(self, store: Store, record: Record, lock: int) -> None:
        self.store = store
        self.record = record
        self._lock = lock
        self._room = 0
        self._sealed = False
        self.core = -1

    def open_core(self) -> int:
        """Return the file for the core, write-only. The entry owns it. Raises OSError."""
        self.core = self.store._open(f".{self.record.id}.core", os.O_WRONLY | os.O_CREAT | os.O_EXCL)  # noqa: SLF001
        return self.core

    def grow(self, size: int) -> None:
        """Make sure that the core's file may have `size` bytes. Raises NoRoom, OSError, StoreError."""
        if size <= self._room:
            return
        name = f".{self.record.id}.room"
        with self.store.locked():
            # Old cores go for what is needed, not for the convenience of a whole step.
            for step, evict in ((self.STEP, False), (0, False), (min(size // 4, self.STEP), True), (0, True)):
                wanted = -(-(size + step) // self.BLOCK) * self.BLOCK
                try:
                    self.store.make_room(self.record.id, wanted, evict=evict)
                    break
                except NoRoom:
                    if evict and not step:
                        raise
            fd = self.store._open(name, os.O_WRONLY | os.O_CREAT | (0 if self._room else os.O_EXCL))  # noqa: SLF001
            try:
                os.ftruncate(fd, wanted)
            finally:
                os.close(fd)
            self._room = wanted

    def seal(self, *, readers: int | None = None) -> None:
        """Complete the crash, short of syncing and of showing it: who finds it now finishes it. Raises OSError.

        To be called before the crashed process is let go. It may be its container's main program, and then the
        container ends with it, and the kernel kills everybody here.

        readers: a uid who may read core and record, besides root.
        """
        record = self.record
        if record.core.state == "none":
            self._close_core()
            self.store._unlink(f".{record.id}.core")  # noqa: SLF001
            record.core.path = None
        else:
            publish_mode(self.core, readers)
            found = os.fstat(self.core)
            record.core.stored_bytes = found.st_blocks * 512
            record.core.file_bytes = found.st_size
            suffix = CORE_SUFFIXES[record.core.compression or "none"]
            record.core.path = os.path.join(self.store.path, record.id + suffix)
        with self.store.locked():
            name = f".{record.id}.final"
            self.store._write(name, record.dumps(), readers=readers, sync=False)  # noqa: SLF001
        self._sealed = True

    def finish(self, *, readers: int | None = None) -> None:
        """Make the core (when record.core.state says that there is one) and the record visible. Raises OSError.

        readers: as for `seal`, which is done here when it has not been.
        """
        if not self._sealed:
            self.seal(readers=readers)
        self._close_core()
        # When it fails, what was sealed does not hold: the caller seals another end.
        self._sealed = False
        with self.store.locked():
            self.store._roll(self.record.id)  # noqa: SLF001
        self._close_lock()

    def _close_core(self) -> None:
        if self.core >= 0:
            os.close(self.core)
            self.core = -1

    def _close_lock(self) -> None:
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def close(self) -> None:
        """Let go, as a worker that is killed does: `Store.recover` does the rest."""
        self._close_core()
        self._close_lock()


def write_all(fd: int, data: bytes | memoryview) -> None:
    """Write everything: one write(2) moves at most 0x7ffff000 bytes, and less when it likes (H19)."""
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(fd, rest) :]


ACL = "system.posix_acl_access"
_ACL_VERSION = struct.pack("<I", 2)
_ACL_ENTRY = struct.Struct("<HHI")
# <linux/posix_acl.h>, <linux/posix_acl_xattr.h>
_USER_OBJ, _USER, _GROUP_OBJ, _MASK, _OTHER = 0x01, 0x02, 0x04, 0x10, 0x20
_NO_ID = 0xFFFFFFFF


def publish_mode(fd: int, reader: int | None) -> None:
    """Set mode 0640, and let one more user read.

    An access control list and not an owner or a group: the file stays root's, and counts for nobody's group. Where the
    file system knows no ACL only root reads it.
    """
    os.fchmod(fd, 0o640)
    if reader is None or reader == 0:
        return
    entries = (
        (_USER_OBJ, 6, _NO_ID),
        (_USER, 4, reader),
        (_GROUP_OBJ, 4, _NO_ID),
        (_MASK, 4, _NO_ID),
        (_OTHER, 0, _NO_ID),
    )
    try:
        os.setxattr(fd, ACL, _ACL_VERSION + b"".join(_ACL_ENTRY.pack(*entry) for entry in entries))
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.EPERM):
            raise
