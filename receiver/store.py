"""The store: a directory of cores and records, its names, its total, and what a killed worker leaves behind.

Names in it, ID being the record's::

    ID.json                 the record            ID.core.zst, ID.core    the core, whole
    .ID.json                a crash being written: the record if it ends now. Locked by its worker while he lives
    .ID.core                its core so far
    .ID.room                how much of the store it may use: a sparse file whose size is the number
    .ID.hold                blocks for its final record, taken beforehand: a full disk must not cost the record
    .ID.final               its final record: from here on it is complete, and whoever finds it finishes the renames
    .ID.untold              a mark: it is shown, and what follows (receiver/afterwards.py) is still to be done. It is
                            the pending record by another name, so its worker's lock is on it
    .*.new                  a file of one of these names that is being written, under the lock
    .lock                   held (flock) while names come and go and while room is given
    .history                what crashed lately, see receiver/history.py
    .notify, .notify.state  somebody may have to be told; and what was told whom, see receiver/notify/
    .notify.lock            held (flock) by who tells
    ID.quota.json           not of a crash: somebody is to be told of a quota, see receiver/notify/quota.py. `names`
                            has none of these, so they count for nothing, and nobody shows them
    .counters               what was counted, see receiver/counters.py

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
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from receiver.record import UNLIMITED, Core, Record, microseconds
from receiver.retention import (
    CORE_SUFFIXES,
    FULL,
    RECORDS,
    Limits,
    NoRoom,
    Report,
    Retention,
    limits_of,
    names_in,
    no_limit,
    stamp,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from receiver.config import Config

__all__ = ["CORE_SUFFIXES", "RECORDS", "Entry", "Limits", "NoRoom", "Report", "Store", "StoreError", "no_limit"]

DEFAULT = "/var/lib/core_pipe"
_SUFFIXES = tuple(CORE_SUFFIXES.values())
T = TypeVar("T")

INTERRUPTED = "interrupted: the receiver ended before the core was complete"
PRUNED = "pruned: it was removed on request (corepipectl prune)"
MAX_RECORD = 1 << 20
# What a record gains between the pending one and the final one: the reason, the signature and its frames.
HOLD = 16 << 10
# btrfs over its quota refuses all but the removal of files; with so much given back it does the rest again.
BTRFS_SLACK = 2 << 20
BLOCK = 4096
# Cores that go for one record that the disk has no room for. One is enough, unless others take what it leaves.
FOR_A_RECORD = 3
# Names come and go in microseconds; who holds the lock longer is stuck.
LOCK_SECONDS = 10.0
# Likewise, of who has a core already, which no other receiver will take: it is lost with the lock.
PATIENT_SECONDS = 60.0
LOCK_POLL_SECONDS = 0.002
ID = re.compile(r"[0-9]{8}T[0-9]{6}-[0-9]{6}-[0-9]{1,20}-[0-9a-f]{8}")


class StoreError(Exception):
    """The store cannot be used. The text is a fact and what to do."""


class Store:
    """A store's directory. Owns its descriptor.

    limits: what it may hold. limit, keep_free, records: in their place, store_max, keep_free and records_max of them.
    """

    def __init__(
        self,
        path: str,
        *,
        limit: Callable[[int], int | None] = no_limit,
        keep_free: Callable[[int], int | None] = no_limit,
        records: int = RECORDS,
        limits: Limits | None = None,
        create: bool = True,
    ) -> None:
        """Open the directory, and make it when it is not there. Raises StoreError."""
        self.path = path
        self.limits = limits or Limits(store_max=limit, keep_free=keep_free, records_max=records)
        self._retention = Retention(self, self.limits)
        # Whoever waits for the lock has a core to lose.
        self.patient = False
        # Whoever shows a crash tells of it then: until that is done it has a mark.
        self.tells = False
        # Cores say whose they are, for who finds the file alone.
        self.describes = False
        # Records that were written anew, and are not known to be on the disk.
        self._rewritten: set[str] = set()
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

    def _take_hold(self, hold: str, name: str) -> int:
        """Give a file that holds blocks another name, and open it: -1 when there is none."""
        try:
            os.rename(hold, name, src_dir_fd=self.directory, dst_dir_fd=self.directory)
            return self._open(name, os.O_WRONLY | os.O_NONBLOCK)
        except FileNotFoundError:
            return -1

    @classmethod
    def configured(cls, config: Config, *, path: str | None = None, create: bool = True) -> Store:
        """Open the store that the settings name (or another at `path`), with their limits. Raises StoreError."""
        return cls(path or config.store, limits=limits_of(config), create=create)

    def close(self) -> None:
        os.close(self.directory)

    @contextmanager
    def locked(self, *, patient: bool = False) -> Iterator[None]:
        """Hold the store's lock. Raises StoreError after LOCK_SECONDS, or after PATIENT_SECONDS.

        Nobody is to wait for the disk (fsync(2)) while he holds it: that takes as long as there is to write.
        """
        seconds = PATIENT_SECONDS if patient or self.patient else LOCK_SECONDS
        fd = self._open(".lock", os.O_RDWR | os.O_CREAT)
        try:
            deadline = time.monotonic() + seconds
            while True:
                try:
                    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if time.monotonic() > deadline:
                        raise StoreError(
                            f"{self.path}/.lock has been held for {seconds:g} s. Find its holder with 'lslocks'"
                        ) from None
                    time.sleep(LOCK_POLL_SECONDS)
            self._retention.counted = None
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

    def _remove_core(self, name: str) -> None:
        """Remove a core, and free its blocks even while somebody has it open: its user may read it. Raises OSError.

        Whoever reads it just now finds its end. A file with another name besides (a hard link of root's) stays whole.
        """
        try:
            # Not waiting, should it be a FIFO, or leased.
            fd = self._open(name, os.O_WRONLY | os.O_NONBLOCK)
        except FileNotFoundError:
            return
        except OSError:
            self._unlink(name)
            return
        try:
            # First the name: who is killed here must not leave an empty core of which a record says that it is stored.
            self._unlink(name)
            found = os.fstat(fd)
            if stat.S_ISREG(found.st_mode) and not found.st_nlink:
                try:
                    os.ftruncate(fd, 0)
                    undescribe_core(fd)
                except OSError:
                    # btrfs over its quota: it goes with its last reader.
                    pass
        finally:
            os.close(fd)

    def _write(
        self, name: str, data: bytes, *, readers: int | None = None, acl: bytes | None = None, hold: str | None = None
    ) -> None:
        """Write a file whole, or not at all under its name. It need not be on the disk then.

        acl: its access list, in place of `readers`.
        hold: a file whose blocks are used for it, and its name with them, when it is there.
        Call it with the lock held: what it leaves when it is killed, `recover` clears away under the lock.
        """
        temporary = f".{name.removeprefix('.')}.new"
        self._unlink(temporary)
        fd = self._take_hold(hold, temporary) if hold is not None else -1
        if fd < 0:
            fd = self._open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
        try:
            write_all(fd, data)
            # What a hold has too much goes before anything else could want a block: an access list may.
            os.ftruncate(fd, len(data))
            publish_mode(fd, readers)
            if acl is not None:
                os.setxattr(fd, ACL, acl)
        except BaseException:
            self._unlink(temporary)
            raise
        finally:
            os.close(fd)
        os.rename(temporary, name, src_dir_fd=self.directory, dst_dir_fd=self.directory)

    def begin(self, record: Record) -> Entry:
        """Begin to keep a crash: from now on it leaves a record whatever happens. Raises OSError, StoreError.

        When the disk is full old cores go for it.
        """
        with self.locked():
            self._make_way(files=2)
            return Entry(self, record, self._insist(lambda: self._begin(record)))

    def _begin(self, record: Record) -> int:
        """Write a pending record and take the blocks for the final one. Returns the record's descriptor, locked."""
        fd = self._open(f".{record.id}.json", os.O_RDWR | os.O_CREAT | os.O_EXCL)
        try:
            # Before anybody else may look for those whose worker is gone.
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            was, record.core = record.core, Core(reason=INTERRUPTED)
            try:
                data = record.dumps()
            finally:
                record.core = was
            write_all(fd, data)
            # What `recover` makes visible of it looks like every record.
            publish_mode(fd, None)
            self._hold(f".{record.id}.hold", len(data) + HOLD + (BTRFS_SLACK if self._retention.on_btrfs() else 0))
        except BaseException:
            os.close(fd)
            self._unlink(f".{record.id}.json")
            raise
        return fd

    def _hold(self, name: str, size: int) -> None:
        """Make a file whose blocks are there before there is anything to write. Raises OSError."""
        size = -(-size // BLOCK) * BLOCK
        fd = self._open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
        try:
            try:
                os.posix_fallocate(fd, 0, size)
            except OSError as error:
                if error.errno in FULL:
                    raise
                # Not every file system can promise (and not every C library does it by hand then): zeros hold the place
                # as well, where blocks are written over.
                write_all(fd, bytes(size))
        except BaseException:
            self._unlink(name)
            raise
        finally:
            os.close(fd)

    def _trim(self, name: str, size: int) -> None:
        """Give back what a hold has beyond this size, when it is there. Call it with the lock held. Raises OSError."""
        try:
            fd = self._open(name, os.O_WRONLY | os.O_NONBLOCK)
        except FileNotFoundError:
            return
        try:
            if os.fstat(fd).st_size > size:
                os.ftruncate(fd, size)
        finally:
            os.close(fd)

    def on_btrfs(self) -> bool:
        """Whether the store is on btrfs, which needs free blocks for whatever it does but to remove a file."""
        return self._retention.on_btrfs()

    def settle(self) -> bool:
        """See what was removed lately become free. Returns whether this is a file system that is slow to count it."""
        if not self._retention.on_btrfs():
            return False
        self._retention.settle_btrfs()
        return True

    def spend_hold(self, owner: str) -> bool:
        """Remove a crash's hold, and see its blocks free. Returns whether there was one. Call it with the lock held."""
        name = f".{owner}.hold"
        if name not in self.names():
            return False
        self._unlink(name)
        self._retention.settle_btrfs()
        return True

    def _make_way(self, *, files: int) -> None:
        """Before one more crash: let go of what is too much. Call it with the lock held."""
        names = self.names()
        self._forget_oldest(names)
        try:
            self._retention.tidy(cores=sum(name.endswith(_SUFFIXES) for name in names))
            self._retention.spare_inodes(files)
        except OSError:
            # What cannot be removed now stays, and the limits hold at the first byte of a core.
            pass

    def _insist(self, write: Callable[[], T]) -> T:
        """Write what belongs to a record, and let old cores go when the disk is full. Call it with the lock held.

        Raises what `write` raises when that is something else, or when there is no core left.
        """
        for _ in range(FOR_A_RECORD):
            try:
                return write()
            except OSError as error:
                if error.errno not in FULL or not self._retention.relieve_record():
                    raise
        return write()

    def add_record(self, record: Record) -> None:
        """Keep a record that has no core. Raises OSError, StoreError."""
        with self.locked():
            self._make_way(files=1)
            self._insist(lambda: self._write(f"{record.id}.json", record.dumps()))
        self._sync(f"{record.id}.json")
        self.sync()

    def _forget_oldest(self, names: Iterable[str]) -> None:
        """Make room for one more record: the oldest go, first those that have no core. Call it with the lock held.

        names: all that there are.
        """
        names = [name for name in names if not name.startswith(".")]
        records = [name for name in names if name.endswith(".json")]
        excess = len(records) + 1 - self.limits.records_max
        if excess <= 0:
            return
        cores = {name.split(".")[0]: name for name in names if name.endswith(_SUFFIXES)}
        for name in sorted(records, key=lambda name: (name.split(".")[0] in cores, name))[:excess]:
            core = cores.get(name.split(".")[0])
            if core is not None:
                self._remove_core(core)
            self._unlink(name)

    def forget(self, owner: str) -> bool:
        """Remove a crash: its core, and then its record. Returns whether there was one. Raises OSError, StoreError."""
        with self.locked():
            names = [name for name in (owner + suffix for suffix in _SUFFIXES) if self._has(name)]
            for name in names:
                self._remove_core(name)
            recorded = self._has(f"{owner}.json")
            self._unlink(f"{owner}.json")
        return recorded or bool(names)

    def names(self) -> list[str]:
        return names_in(self.directory)

    def _has(self, name: str) -> bool:
        try:
            os.stat(name, dir_fd=self.directory, follow_symlinks=False)
        except FileNotFoundError:
            return False
        return True

    def used(self) -> int:
        """Return the bytes that cores take, on disk or promised to their workers."""
        found = self._retention.survey()
        return found.stored + found.promised

    def usage(self) -> Report:
        """Say what the store holds, by user and by program, and what its limits still allow. Raises OSError."""
        return self._retention.report(self.records())

    def prune(
        self,
        *,
        to: int | None = None,
        older_than: float | None = None,
        match: Callable[[Record], bool] | None = None,
        now: float | None = None,
        dry_run: bool = False,
    ) -> list[Record]:
        """Remove cores, the oldest first; their records stay. Returns those as they were. Raises OSError, StoreError.

        to: only until all cores that are there take no more than so many bytes on disk. older_than: only those that
        came more than so many seconds before `now` (since the epoch). match: only those of whose record this is true.
        Without any of them, all go. dry_run: remove none.
        """
        survey = self._retention.survey()
        cores = survey.cores
        if older_than is not None:
            before = stamp((time.time() if now is None else now) - older_than)
            cores = [core for core in cores if core.owner < before]
        total = survey.stored
        pruned = []
        for core in cores:
            if to is not None and total <= to:
                break
            try:
                record = self._read(f"{core.owner}.json")
            except (OSError, ValueError):
                record = None
            if match is not None and (record is None or not match(record)):
                continue
            if not dry_run:
                # Each on its own, so that crashes come in between.
                with self.locked():
                    self.drop_core(core.owner, core.name, PRUNED)
            total -= core.size
            if record is not None:
                pruned.append(record)
        if pruned and not dry_run:
            self.sync()
        return pruned

    def make_room(self, owner: str, wanted: int, *, evict: bool = True) -> bool:
        """See to it that the core of one crash may take `wanted` bytes. Raises NoRoom.

        evict: remove old cores where that helps; none goes in vain. Call it with the lock held, and again when it
        returns False: there is more to remove than others should wait for.
        """
        return self._retention.make_room(owner, wanted, evict=evict)

    def relieve(self, size: int, *, patient: bool = False) -> bool:
        """Free at least `size` bytes when old cores have so many. Returns whether any went. Raises StoreError."""
        with self.locked(patient=patient):
            return self._retention.relieve(size)

    def drop_core(self, owner: str, name: str, reason: str) -> Record | None:
        """Remove a core's file, and say why in its record, which is returned. Call it with the lock held."""
        self._remove_core(name)
        try:
            # Not load(): the file is gone, and that is no news.
            record = self._read(f"{owner}.json")
            _without_core(record, reason)
            self._rewrite(record)
        except (OSError, ValueError):
            # It had no readable record, or there is no room to rewrite it; its core is gone all the same.
            return None
        return record

    def amend(self, owner: str, fields: dict[str, Any]) -> Record | None:
        """Write more into a record that is visible. Returns it, None when it has gone meanwhile.

        fields: of a Record, by name. No core goes for them. Raises OSError, StoreError, ValueError (what is there is no
        record, or would be none any more).
        """
        with self.locked():
            try:
                record = self._read(f"{owner}.json")
            except FileNotFoundError:
                return None
            found = Record.from_json(record.to_json() | fields)
            if found.id != owner or len(found.dumps()) > MAX_RECORD:
                raise ValueError("it would be no record of this crash any more")
            self._rewrite(found)
        self.sync()
        return found

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
        self._write(f"{record.id}.json", record.dumps(), acl=acl)
        self._rewritten.add(f"{record.id}.json")

    def sync(self) -> None:
        """See the store's names and its rewritten records on the disk. Call it without the lock. Raises OSError."""
        while self._rewritten:
            try:
                self._sync(self._rewritten.pop())
            except OSError:
                # It has gone since then, or it is lost whatever is done.
                pass
        os.fsync(self.directory)

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
                _without_core(record, "its file is not in the store any more")
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
        for name in self.names():
            owner = name.removeprefix(".").split(".")[0]
            if not ID.fullmatch(owner):
                continue
            try:
                if name == f".{owner}.json":
                    if self._take_over(owner):
                        found.append(owner)
                elif name.startswith(".") and name.endswith(".new"):
                    with self.locked():
                        self._unlink(name)
            except OSError as error:
                failure = failure or StoreError(f"{self.path}/{name}: cannot be finished ({error.strerror})")
        if found:
            self.sync()
        if failure is not None:
            raise failure
        return found

    def recover_stale(self, owners: Iterable[str]) -> bool:
        """Give back what those were promised whose worker is gone. Returns whether there was one.

        Call it with the lock held. One that is complete takes what it has; for `recover` to show it waits for the disk.
        """
        found = False
        for owner in owners:
            if not ID.fullmatch(owner):
                continue
            try:
                fd = self._claim(owner)
                if fd < 0:
                    continue
                try:
                    if self._read_final(owner) is not None:
                        room = f".{owner}.room"
                        found = found or room in self.names()
                        self._unlink(room)
                    else:
                        self._roll(owner)
                        found = found or f".{owner}.json" not in self.names()
                finally:
                    os.close(fd)
            except OSError:
                # Another one's turn, and `recover` says what is wrong with this one.
                pass
        return found

    def _claim(self, owner: str) -> int:
        """Return the pending record of a worker who is gone, locked; -1 when there is none. Raises OSError.

        Call it with the store's lock held: a worker locks his own in his own time, but under that.
        """
        try:
            fd = self._open(f".{owner}.json", os.O_RDWR)
        except FileNotFoundError:
            return -1
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(fd)
            if isinstance(error, BlockingIOError):
                return -1
            raise
        return fd

    def _take_over(self, owner: str) -> bool:
        """Bring a crash to its end whose worker is gone. Returns whether it has a record now. Raises OSError."""
        with self.locked():
            fd = self._claim(owner)
        if fd < 0:
            return False
        try:
            # Nobody else touches it from here on.
            if self._read_final(owner) is not None:
                self._sync_sealed(owner)
            with self.locked():
                return self._roll(owner)
        finally:
            os.close(fd)

    def _sync_sealed(self, owner: str) -> None:
        """See a crash on the disk that is complete, before it is shown. Call it without the lock. Raises OSError."""
        for suffix in ("core", "final"):
            try:
                self._sync(f".{owner}.{suffix}")
            except FileNotFoundError:
                # It has no core; or it has been shown already, all but the last name.
                pass

    def _roll(self, owner: str) -> bool:
        """Bring one crash to its end: forward when its final record stands, else back to a record without a core.

        Returns False when it had no record yet: its worker was killed before it could accept the crash. Raises OSError.
        What is shown is on the disk already (`_sync_sealed`); that it is shown, `sync` sees to.
        """
        recorded = True
        final = self._read_final(owner)
        if final is not None:
            if self._has(f".{owner}.core") and final.core.path is not None:
                self._publish(f".{owner}.core", owner + CORE_SUFFIXES[final.core.compression or "none"])
            os.rename(f".{owner}.final", f"{owner}.json", src_dir_fd=self.directory, dst_dir_fd=self.directory)
        elif not self._has(f"{owner}.json"):
            try:
                self._read(f".{owner}.json")
            except ValueError:
                recorded = False
            else:
                self._publish(f".{owner}.json", f"{owner}.json")
        for suffix in ("core", "room", "hold", "final", "final.new"):
            self._unlink(f".{owner}.{suffix}")
        if not (self.tells and recorded and self._mark(owner)):
            self._unlink(f".{owner}.json")
        return recorded

    def _mark(self, owner: str) -> bool:
        """Mark a crash as one that is to be told of, where that can be done. Returns whether it is."""
        try:
            os.rename(f".{owner}.json", f".{owner}.untold", src_dir_fd=self.directory, dst_dir_fd=self.directory)
        except OSError:
            return False
        return True

    def told(self, owner: str) -> None:
        """Take the mark off a crash that was told of. Raises OSError."""
        self._unlink(f".{owner}.untold")

    def has_untold(self) -> bool:
        """Whether a crash has the mark, be it that its worker is just about to tell of it."""
        return any(name.endswith(".untold") for name in self.names())

    def untold(self) -> Iterator[Record]:
        """Yield the records of crashes that nobody has told of, since their workers were killed. Raises OSError.

        Each once: its mark has gone by then. Should it be the telling that ends processes, it shall end but one more.
        """
        for name in sorted(self.names()):
            owner = name.removeprefix(".").removesuffix(".untold")
            if name != f".{owner}.untold" or not ID.fullmatch(owner):
                continue
            try:
                # Not waiting, should it be a FIFO.
                fd = self._open(name, os.O_RDONLY | os.O_NONBLOCK)
            except OSError:
                continue
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if not os.fstat(fd).st_nlink:
                    # Another one's, who has just done it.
                    continue
                self.told(owner)
                record = self.load(owner)
            except (OSError, ValueError):
                # Its worker lives; or its record has gone since then.
                continue
            finally:
                os.close(fd)
            yield record

    def _sync(self, name: str) -> None:
        # Not blocking, should it be a FIFO.
        fd = self._open(name, os.O_RDONLY | os.O_NONBLOCK)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)

    def _read_final(self, owner: str) -> Record | None:
        """Return a final record that this version can act on, None when there is none. Raises OSError."""
        try:
            final = self._read(f".{owner}.final")
        except (FileNotFoundError, ValueError):
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


def _without_core(record: Record, reason: str) -> None:
    """Say that a core is gone. What it was stays: its size, and how much of the whole that had been."""
    record.core.state = "none"
    record.core.reason = reason
    record.core.path = record.core.compression = None
    record.core.stored_bytes = record.core.file_bytes = 0


def blocks_of(size: int) -> int:
    """Return bytes as whole blocks, in bytes: no file takes less."""
    return -(-size // BLOCK) * BLOCK


def map_of(size: int) -> int:
    """Return the most bytes that a file system's map of a file takes which has so many bytes in it.

    A page that lies alone among holes wants an entry of its own; a block has 340 on ext4.
    """
    return blocks_of(size // 256)


class Entry:
    """A crash that is being written. Owns the lock on its pending record, and its core's file."""

    # Room is asked for in steps, so that the store is not counted at each write. What was given and is no more wanted
    # goes back when it is much.
    STEP = 8 << 20
    SPARE = 4 * STEP

    def __init__(self, store: Store, record: Record, lock: int) -> None:
        self.store = store
        self.record = record
        self._lock = lock
        # Whether old cores go for it.
        self.evicts = True
        # What grow() was asked for last, and up to where it need not look.
        self._size = 0
        self._granted = 0
        self._promised = 0
        # The end that was sealed: another one may be given to the record afterwards.
        self._sealed: Core | None = None
        self.core = -1

    def open_core(self) -> int:
        """Return the file for the core, write-only. The entry owns it. Raises OSError, StoreError."""
        name, flags = f".{self.record.id}.core", os.O_WRONLY | os.O_CREAT | os.O_EXCL
        try:
            self.core = self.store._open(name, flags)  # noqa: SLF001
        except OSError as error:
            if error.errno not in FULL or not self.relieve(0):
                raise
            self.core = self.store._open(name, flags)  # noqa: SLF001
        return self.core

    def grow(self, size: int) -> None:
        """Make sure that the core's file may have `size` bytes on disk from now on. Raises NoRoom, OSError, StoreError.

        To be called before they are written. A smaller size than before (what was written was taken back: the holes
        must be in the file already) never fails.
        """
        written, self._size = self._size, size
        if size <= self._granted <= size + self.SPARE:
            return
        while not self._grow(size, written):
            # Many old cores have to go: others come in between, who look for the lock every few milliseconds.
            time.sleep(2 * LOCK_POLL_SECONDS)

    def _grow(self, size: int, written: int) -> bool:
        """Take one more step to having room. Returns whether it is done. Raises as grow() does."""
        with self.store.locked(patient=True):
            extra, taken = self._extra(size, written)
            if size <= self._granted:
                try:
                    self._write_room(max(blocks_of(size + self.STEP) + extra, taken))
                    self._granted = size + self.STEP
                except OSError as error:
                    # A full btrfs: then the larger promise stands, and no core goes for a smaller one.
                    if error.errno not in FULL:
                        raise
                return True
            # Old cores go for what is needed, not for the convenience of a whole step, nor for what a map may want.
            for step, most, evict in (
                (self.STEP, True, False),
                (self.STEP // 8, True, False),
                (0, True, False),
                (0, False, False),
                (min(size // 4, self.STEP), False, True),
                (0, False, True),
            ):
                wanted = blocks_of(size + step) + max(extra, map_of(size + step) if most else 0)
                try:
                    if not self.store.make_room(self.record.id, wanted, evict=evict):
                        return False
                    break
                except NoRoom:
                    if not step and not most and (evict or not self.evicts):
                        raise
            self._set_room(wanted, size + step)
            return True

    def _extra(self, size: int, written: int) -> tuple[int, int]:
        """Return the bytes that the file takes beside what is in it, for its file system's map, and what it has in all.

        written: what it has at the most, so that the rest is known to be the map, or blocks taken beforehand (XFS).
        """
        if self.core < 0:
            return 0, 0
        found = os.fstat(self.core)
        taken = found.st_blocks * 512
        extra = max(0, taken - blocks_of(written))
        if found.st_size > taken:
            extra = max(extra, map_of(size + self.STEP))
        return extra, taken

    def _set_room(self, room: int, granted: int) -> None:
        """Say how much the core may take, and how much of it may be written. Raises NoRoom, OSError.

        When the disk has no room for that an old core goes for it. Call it with the lock held.
        """
        for left in range(FOR_A_RECORD, -1, -1):
            try:
                self._write_room(room)
                break
            except OSError as error:
                if error.errno == errno.EFBIG:
                    raise NoRoom("a file may not be so large here") from None
                if error.errno not in FULL:
                    raise
                if not left or not self.store._retention.relieve(0):  # noqa: SLF001
                    raise NoRoom("the file system or its quota is full") from None
        self._granted = granted

    def _write_room(self, room: int) -> None:
        name, new = f".{self.record.id}.room", not self._granted
        fd = self.store._open(name, os.O_WRONLY | (os.O_CREAT | os.O_EXCL if new else 0))  # noqa: SLF001
        try:
            os.ftruncate(fd, room)
            self._promised = room
        except BaseException:
            if new:
                # Whoever asks again makes it again.
                self.store._unlink(name)  # noqa: SLF001
            raise
        finally:
            os.close(fd)

    def relieve(self, size: int) -> bool:
        """Let older cores go which free at least `size` bytes: the file system has said that it is full.

        Returns whether anything was freed: then a write may be tried again. None goes in vain. Raises StoreError.
        """
        return self.evicts and self.store.relieve(size, patient=True)

    def seems_to_fit(self, size: int) -> bool:
        """Whether the store could hold so many bytes if this were its only core: a hint, nothing is promised."""
        system = os.fstatvfs(self.store.directory)
        whole = system.f_blocks * system.f_frsize
        limits = (self.store.limits.store_max(whole), self.store.limits.user_max(whole))
        free = system.f_bavail * system.f_frsize
        return size <= min([free, *(limit for limit in limits if limit is not None)])

    def settle(self) -> bool:
        """See what was removed lately become free. Returns whether that may have helped: on btrfs."""
        return self.store.settle()

    def spend_hold(self) -> bool:
        """Give the blocks that are held for the record back to a file system that cannot make a hole without some.

        Returns whether that may have helped: on btrfs, once. Raises StoreError, OSError.
        """
        if not self.store.on_btrfs():
            return False
        with self.store.locked(patient=True):
            return self.store.spend_hold(self.record.id)

    def seal(self, *, readers: int | None = None) -> None:
        """Complete the crash, short of syncing and of showing it: who finds it now finishes it. Raises OSError.

        To be called before the crashed process is let go. It may be its container's main program, and then the
        container ends with it, and the kernel kills everybody here.

        readers: a uid who may read core and record, besides root.
        """
        record = self.record
        if record.core.state == "none":
            record.core.path = None
        else:
            self._publish_core(readers)
            if self.store.describes:
                describe_core(self.core, record)
                if os.fstat(self.core).st_blocks * 512 > self._promised:
                    # It wanted a block (ext4), and none was promised to us.
                    undescribe_core(self.core)
            found = os.fstat(self.core)
            record.core.stored_bytes = found.st_blocks * 512
            record.core.file_bytes = found.st_size
            suffix = CORE_SUFFIXES[record.core.compression or "none"]
            record.core.path = os.path.join(self.store.path, record.id + suffix)
        final, hold = f".{record.id}.final", f".{record.id}.hold"
        with self.store.locked(patient=True):
            if record.core.state == "none":
                # One that was sealed before must not speak of a core that has gone.
                self.store._unlink(final)  # noqa: SLF001
                self._close_core()
                self.store._remove_core(f".{record.id}.core")  # noqa: SLF001
            write = partial(self.store._write, final, readers=readers, hold=hold)  # noqa: SLF001
            self.store._insist(lambda: write(record.dumps()))  # noqa: SLF001
        self._sealed = record.core

    @property
    def sealed(self) -> bool:
        """Whether the crash is complete, with the end that its record has: nothing more can be lost, but time."""
        return self._sealed is self.record.core

    def _publish_core(self, readers: int | None) -> None:
        """Let the core be read by those who may. Raises OSError.

        An access list may want a block of its own (ext4 with small inodes), on a disk that this core has just filled:
        what the record will not need of its hold is for that. A core that only root reads is better than none.
        """
        try:
            publish_mode(self.core, readers)
        except OSError as error:
            if error.errno not in FULL:
                raise
            with self.store.locked(patient=True):
                self.store._trim(f".{self.record.id}.hold", len(self.record.dumps()) + BLOCK)  # noqa: SLF001
            try:
                publish_mode(self.core, readers)
            except OSError as again:
                if again.errno not in FULL:
                    raise
                publish_mode(self.core, None)

    def finish(self, *, readers: int | None = None) -> None:
        """Make the core (when record.core.state says that there is one) and the record visible. Raises OSError.

        readers: as for `seal`, which is done here when it has not been. When it fails after that, the crash may be left
        to `Store.recover`, be finished again, or be given another end (record.core) and then be finished.
        """
        if not self.sealed:
            self.seal(readers=readers)
        self._close_core()
        owner = self.record.id
        self._sync_sealed()
        with self.store.locked(patient=True):
            self.store._insist(lambda: self.store._roll(owner))  # noqa: SLF001
        if not self.store.tells:
            self._close_lock()
        self.store.sync()

    def told(self) -> None:
        """Say that what follows a crash is done (receiver/afterwards.py). Raises OSError."""
        self.store.told(self.record.id)
        self._close_lock()

    def _sync_sealed(self) -> None:
        """See what was sealed on the disk, at the cost of old cores where that is full. Raises OSError."""
        for _ in range(FOR_A_RECORD):
            try:
                return self.store._sync_sealed(self.record.id)  # noqa: SLF001
            except OSError as error:
                if error.errno not in FULL or not self.relieve(0):
                    raise
        return self.store._sync_sealed(self.record.id)  # noqa: SLF001

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


_ATTRIBUTE = "user.coredump."


def describe_core(fd: int, record: Record) -> None:
    """Write on a core's file whose it is, as systemd-coredump does, for who finds the file alone. Never raises.

    Not every file system has room for it, or a place at all.
    """
    found = {
        "pid": record.pid,
        "uid": record.uid,
        "gid": record.gid,
        "signal": record.signal,
        "timestamp": microseconds(record.timestamp),
        "rlimit": UNLIMITED if record.core_limit is None else record.core_limit,
        "hostname": record.host_name,
        "comm": record.comm,
        "exe": record.exe,
    }
    for name, value in found.items():
        if value is None:
            continue
        try:
            os.setxattr(fd, _ATTRIBUTE + name, str(value).encode("utf-8", "backslashreplace"))
        except OSError as error:
            if error.errno in (*FULL, errno.EOPNOTSUPP):
                return


def undescribe_core(fd: int) -> None:
    """Take it off again, and the block that it may have. Raises OSError."""
    try:
        names = os.listxattr(fd)
    except OSError as error:
        if error.errno == errno.EOPNOTSUPP:
            return
        raise
    for name in names:
        if name.startswith(_ATTRIBUTE):
            os.removexattr(fd, name)


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
