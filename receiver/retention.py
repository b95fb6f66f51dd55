"""What a store may hold, and which core goes when it would hold more.

A core makes room among its own user's first, when that user has a share (user_max). What all have together (store_max,
keep_free, cores_max, keep_free_inodes, memory) is taken from the user who holds most of it, the oldest first: the crash
loop of one does not drive out another's only core. No core goes in vain: first it is known that enough can go.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import time
from typing import TYPE_CHECKING, NamedTuple, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from receiver.config import Config
    from receiver.record import Record
    from receiver.store import Store

CORE_SUFFIXES = {"zstd": ".core.zst", "none": ".core"}
# Records outlive their cores, but not for ever: a crash loop writes nothing else (gardenlinux#1226).
RECORDS = 4000
# What the file system, the quota or the memory has no room for.
FULL = (errno.ENOSPC, errno.EDQUOT)
# Each rewrites a record and waits for the disk, while others wait for the lock: the next crash goes on with the rest.
AT_ONCE = 32
# Some file systems give the blocks of an unlinked file back a little later (XFS, btrfs).
SETTLE_SECONDS = 0.5
# Left to everybody in the memory cgroup: a core that arrives is not all that it pays for.
MEMORY_MARGIN = 8 << 20
_IN_MEMORY = (b"tmpfs", b"ramfs")
CGROUPS = "/sys/fs/cgroup"
OWN_CGROUPS = "/proc/self/cgroup"
MEMINFO = "/proc/meminfo"
# The kernel counts what a cgroup uses in batches: less than this may not show.
_SHOWS = 4 << 20
# So much may go of a file system's free space while a core is removed that shows none: others write, too.
_VAIN = 1 << 20
_BTRFS_IOC_SYNC = 0x9408
# <linux/btrfs.h>: _IOR(0x94, 25, __u64). EINVAL for a directory that is not a subvolume's own.
_BTRFS_IOC_SUBVOL_GETFLAGS = 0x80089419

# Near the beginning of every record that we write, before any text of a stranger's.
_UID = re.compile(rb'^ "uid": ([0-9]{1,10}),?$', re.MULTILINE)
_BEGINNING = 1024


_Key = TypeVar("_Key")


class NoRoom(Exception):
    """A limit of the store does not allow more. The text names the limit."""


def no_limit(_whole: int) -> None:
    """Stand for a limit that is off."""


class Limits(NamedTuple):
    """What a store may hold. None, or a function that returns it, is no limit.

    store_max: bytes on disk of all cores, asked with the bytes of the file system. keep_free: likewise, bytes to leave
    free. keep_free_inodes: likewise, with the inodes of the file system. user_max: bytes of one user's cores, asked
    with what store_max comes to, or the bytes of the file system when that is off. cores_max: a count. age_max:
    seconds. records_max: a count.
    """

    store_max: Callable[[int], int | None] = no_limit
    keep_free: Callable[[int], int | None] = no_limit
    keep_free_inodes: Callable[[int], int | None] = no_limit
    user_max: Callable[[int], int | None] = no_limit
    cores_max: int | None = None
    age_max: float | None = None
    records_max: int = RECORDS


def limits_of(config: Config) -> Limits:
    """Return the limits that the settings set."""
    return Limits(
        store_max=config.store_max.bytes_of if config.store_max else no_limit,
        keep_free=config.keep_free.bytes_of if config.keep_free else no_limit,
        keep_free_inodes=config.keep_free_inodes.bytes_of if config.keep_free_inodes else no_limit,
        user_max=config.user_max.bytes_of if config.user_max else no_limit,
        cores_max=config.cores_max,
        age_max=config.age_max,
        records_max=config.records_max,
    )


# What a quota event ends with, of which callbacks are told: receiver/notify/quota.py.
QUOTA = ".quota.json"


def names_in(directory: int) -> list[str]:
    """Return the names of a store's records and cores, and of what belongs to them: all but those of quota events."""
    return [name for name in listed(directory) if not name.endswith(QUOTA)]


def listed(directory: int) -> list[str]:
    """Return all names in a directory now.

    Not by listing its own descriptor: on btrfs that may know only what was there when it was opened, or rewound at the
    end of its last listing (9b378f6ad48c and 357950361cbc, Linux 6.6).
    """
    fd = os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=directory)
    try:
        return os.listdir(fd)
    finally:
        os.close(fd)


class Held(NamedTuple):
    """A core that is there. owner: its record's id. size: bytes on disk."""

    owner: str
    name: str
    size: int


class Survey:
    """What a store's directory holds: counted once, true while the lock is held.

    cores: visible, the oldest first. writing: bytes of each core that is being written, by its record's id: what it may
    take, or has taken if that should be more. taken: what it has taken. records: visible ones.
    """

    def __init__(self, directory: int, known: dict[str, int] | None = None) -> None:
        """Count. known: sizes of visible cores, by name, which are not asked for: such a core does not change."""
        self.cores: list[Held] = []
        self.writing: dict[str, int] = {}
        self.taken: dict[str, int] = {}
        self.records = 0
        suffixes = tuple(CORE_SUFFIXES.values())
        for name in names_in(directory):
            is_core = name.endswith(suffixes)
            if not is_core and not name.endswith(".room"):
                self.records += name.endswith(".json") and not name.startswith(".")
                continue
            owner = name.removeprefix(".").split(".")[0]
            size = known.get(name) if known is not None else None
            if size is None:
                try:
                    found = os.stat(name, dir_fd=directory, follow_symlinks=False)
                except FileNotFoundError:
                    continue
                size = found.st_blocks * 512 if is_core else found.st_size
            if not name.startswith("."):
                self.cores.append(Held(owner, name, size))
                continue
            if is_core:
                self.taken[owner] = size
            self.writing[owner] = max(self.writing.get(owner, 0), size)
        self.cores.sort()
        # Between the two steps by which a core is shown it has both names: count its bytes once.
        for core in self.cores:
            if self.taken.pop(core.owner, None) is not None:
                self.writing.pop(core.owner, None)

    @property
    def stored(self) -> int:
        """Bytes of the cores that are there."""
        return sum(core.size for core in self.cores)

    @property
    def promised(self) -> int:
        """Bytes of the cores that are being written."""
        return sum(self.writing.values())


class Holding(NamedTuple):
    """A part of what a store holds. size: bytes on disk."""

    cores: int = 0
    size: int = 0
    records: int = 0


class Use(NamedTuple):
    """A limit that is on, and how far it is used up. name: the setting. unit: bytes, cores, records, inodes, seconds.

    used: for keep_free, keep_free_inodes and memory, what is free; for user_max, what the user has who has most; for
    age_max the age of the oldest core. headroom: what may come before something has to go, never negative.
    """

    name: str
    unit: str
    limit: int
    used: int
    headroom: int


class Report(NamedTuple):
    """What a store holds, and what its limits still allow.

    total, users (by uid; None: of records that one may not read, or that are gone), programs (by the executable's path,
    its name where that is unknown): what is there. writing: what is being written (its bytes are what it may take).
    uses: a row for each limit that is on. limiting: the setting that a next core meets first, None when all are off.
    headroom: bytes that it may take before an old one goes; None for no limit.
    """

    total: Holding
    users: dict[int | None, Holding]
    programs: dict[str, Holding]
    writing: Holding
    uses: list[Use]
    limiting: str | None
    headroom: int | None


class Retention:
    """Gives room to cores and takes it from old ones. Call everything with the store's lock held, but for `report`."""

    def __init__(self, store: Store, limits: Limits) -> None:
        self._store = store
        self.limits = limits
        # A record's uid does not change, and its id is met once.
        self._uids: dict[str, int | None] = {}
        self._in_memory: bool | None = None
        self._settle_until = 0.0
        # Of visible cores, by name.
        self._sizes: dict[str, int] = {}
        # What make_room() has counted, while the lock is held: each question would count again. None with each lock.
        self.counted: Survey | None = None
        # Bytes of cores that were removed and did not become free, and of those that did.
        self._vain = self._seen = 0

    def survey(self) -> Survey:
        """Count what there is: each core that is shown is looked at once, however often its number is asked for."""
        survey = Survey(self._store.directory, self._sizes)
        self._sizes = {core.name: core.size for core in survey.cores}
        return survey

    # Room.

    def make_room(self, owner: str, wanted: int, *, evict: bool = True) -> bool:
        """See to it that the core of one crash may take `wanted` bytes on disk. Raises NoRoom.

        evict: remove old cores where that helps. Returns False when there is more to remove than others should wait
        for: let them have the lock, and call it again.
        """
        recovered = False
        self._settle_until = 0.0
        freed = 0
        headroom: int | None = None
        survey = self.counted = self.counted or self.survey()
        evicted = 0
        while True:
            try:
                need = self._need(survey, owner, wanted)
            except NoRoom:
                # What a killed worker was promised is nobody's: count again without it.
                if recovered or not evict or not self._store.recover_stale(survey.writing.keys() - {owner}):
                    raise
                recovered = True
                survey = self.counted = self.survey()
                continue
            if need is None:
                return True
            if not (evict and survey.cores):
                raise NoRoom(f"older cores take up the room ({need.setting})")
            if evicted == AT_ONCE:
                return False
            if need.setting == "keep_free" and self._vain > max(_VAIN, self._seen):
                # Somebody has them mapped, or by another name, or shares their blocks: those after them went in vain.
                raise NoRoom("removing older cores gives no room back on the file system (keep_free)")
            if need.setting == "memory" and headroom is None:
                headroom, freed = memory_headroom(), 0
            freed += self._evict_for(survey, owner, wanted, need)
            evicted += 1
            if headroom is not None and freed >= _SHOWS and (memory_headroom() or 0) < headroom + freed // 2:
                # It was charged to another cgroup, or somebody still reads it: those after it would go in vain.
                raise NoRoom("the store is in memory, and removing older cores gives none back (memory)")

    def _need(self, survey: Survey, owner: str, wanted: int) -> _Need | None:
        """Return what keeps a core from taking `wanted` bytes, None for nothing. Raises NoRoom when all is in vain."""
        system = os.fstatvfs(self._store.directory)
        whole = system.f_blocks * system.f_frsize
        stored = survey.stored
        promised = survey.promised - survey.writing.get(owner, 0)
        outstanding = promised - (sum(survey.taken.values()) - survey.taken.get(owner, 0))
        own = survey.taken.get(owner, 0)
        wanted = max(wanted, own)
        coming = outstanding + wanted - own
        needs: list[_Need] = []

        total = self.limits.store_max(whole)
        # (A share of a file system that does not tell its size is no limit.)
        if total is not None and (total or whole):
            if wanted > total:
                raise NoRoom(f"it takes more than the store may hold in all (store_max, {total} bytes)")
            if promised + wanted > total:
                raise NoRoom(f"cores being written take up the store's total (store_max, {total} bytes)")
            if stored + promised + wanted > total:
                needs.append(_Need("store_max"))

        share = self.limits.user_max(whole if total is None else total)
        if share is not None and (share or whole):
            uid = self.uid_of(owner)
            others = sum(size for whose, size in survey.writing.items() if whose != owner and self.uid_of(whose) == uid)
            if wanted > share:
                raise NoRoom(f"it takes more than one user's cores may (user_max, {share} bytes)")
            if others + wanted > share:
                raise NoRoom(f"the user's cores being written take up the user's share (user_max, {share} bytes)")
            if sum(core.size for core in survey.cores if self.uid_of(core.owner) == uid) + others + wanted > share:
                # First: what goes for it makes room within all other limits, too.
                needs.insert(0, _Need("user_max", own=True))

        # A file system that does not tell its size (ramfs, some of FUSE's) does not tell what is free either.
        if whole:
            keep_free = self.limits.keep_free(whole) or 0
            missing = keep_free + coming - system.f_bavail * system.f_frsize
            if missing > stored and keep_free:
                raise NoRoom(f"the file system has to keep {keep_free} bytes free (keep_free)")
            if missing > stored:
                raise NoRoom("the file system is full")
            if missing > 0:
                needs.append(_Need("keep_free", settle=True))

        if self.in_memory and (headroom := memory_headroom()) is not None:
            missing = coming - headroom
            if missing > stored:
                raise NoRoom(
                    "the store is in memory, and its memory cgroup or the machine has no more to give (memory)"
                )
            if missing > 0:
                needs.append(_Need("memory", settle=True))

        # Likewise, of those without a fixed number of inodes (btrfs).
        if system.f_files:
            keep_inodes = self.limits.keep_free_inodes(system.f_files) or 0
            # For .core and .room, unless they are there.
            missing = keep_inodes + 2 * (owner not in survey.writing) - system.f_favail
            if missing > len(survey.cores):
                raise NoRoom(f"the file system has to keep {keep_inodes} inodes free (keep_free_inodes)")
            if missing > 0:
                needs.append(_Need("keep_free_inodes", by_number=True))

        most = self.limits.cores_max
        if most is not None:
            writing = len(survey.writing.keys() - {owner})
            if writing + 1 > most:
                raise NoRoom(f"as many cores are being written as the store may hold (cores_max, {most})")
            if len(survey.cores) + writing + 1 > most:
                needs.append(_Need("cores_max", by_number=True))
        return needs[0] if needs else None

    def _evict_for(self, survey: Survey, owner: str, wanted: int, need: _Need) -> int:
        """Remove the one core whose turn it is. Returns the bytes that it took."""
        if need.own:
            uid = self.uid_of(owner)
            core = next(core for core in survey.cores if self.uid_of(core.owner) == uid)
        else:
            core = self.next_to_go(survey, {owner: wanted}, by_number=need.by_number)
        system = os.fstatvfs(self._store.directory)
        self.evict(core, f"newer cores needed its room ({need.setting})")
        survey.cores.remove(core)
        if need.settle:
            self._note(core.size, shown=self._settle(system, core.size))
        return core.size

    def _note(self, size: int, *, shown: bool) -> None:
        """Note whether a core's removal gave anything back."""
        if shown:
            self._seen += size
        else:
            self._vain += size

    def next_to_go(self, survey: Survey, wanted: dict[str, int] | None = None, *, by_number: bool = False) -> Held:
        """Return the oldest core of the user who holds most; there must be a core.

        wanted: bytes that cores being written are to have, by the id of their record. by_number: most cores, not bytes.
        """
        held: dict[int | None, int] = {}
        sizes = survey.writing | (wanted or {})
        for owner, size in (*((core.owner, core.size) for core in survey.cores), *sizes.items()):
            uid = self.uid_of(owner)
            held[uid] = held.get(uid, 0) + (1 if by_number else size)
        # Nobody finds a core that has no record: it goes first. max() takes the first of those that are equal, and
        # that is the oldest.
        return max(survey.cores, key=lambda core: ((uid := self.uid_of(core.owner)) is None, held[uid]))

    def relieve(self, size: int) -> bool:
        """Free at least `size` bytes, when old cores have so many. Returns whether any went.

        Not more than AT_ONCE: a write that fails again asks again.
        """
        survey = self.survey()
        if not survey.cores or survey.stored < size:
            return False
        system = os.fstatvfs(self._store.directory)
        freed = 0
        evicted = 0
        self._settle_until = 0.0
        # At least one, whatever it has: it may be an inode that is missing.
        while survey.cores and evicted < AT_ONCE and (freed < size or not evicted):
            core = self.next_to_go(survey)
            self.evict(core, "the file system or its quota was full")
            evicted += 1
            survey.cores.remove(core)
            freed += core.size
        self._settle(system, freed)
        return True

    def relieve_record(self) -> bool:
        """Remove one core for a record that the file system has no room for. Returns whether there was one."""
        survey = self.survey()
        if not survey.cores:
            return False
        self.evict(self.next_to_go(survey), "a record needed its room, the file system or its quota was full")
        return True

    def on_btrfs(self) -> bool:
        """Whether the store is on btrfs: another file system does not know what is asked."""
        try:
            fcntl.ioctl(self._store.directory, _BTRFS_IOC_SUBVOL_GETFLAGS, bytes(8))
        except OSError as error:
            return error.errno == errno.EINVAL
        return True

    def settle_btrfs(self) -> None:
        """Have btrfs count what was removed: a quota group shows it with the next transaction."""
        try:
            fcntl.ioctl(self._store.directory, _BTRFS_IOC_SYNC)
        except OSError:
            # No btrfs.
            pass

    def _settle(self, before: os.statvfs_result, freed: int) -> bool:
        """Wait, not for long, until the file system shows the space that was given back. Returns whether it does.

        before: what it said then. Others may take some meanwhile, so that half of it is proof enough.
        """
        # Not f_bavail: what goes into root's reserve is free as well.
        wanted = before.f_bfree * before.f_frsize + freed // 2 - (64 << 10)
        if not before.f_blocks:
            return True
        self.settle_btrfs()
        if not self._settle_until:
            self._settle_until = time.monotonic() + SETTLE_SECONDS
        while True:
            system = os.fstatvfs(self._store.directory)
            # What is less than this, a record and a directory may have taken.
            if system.f_bfree * system.f_frsize >= wanted:
                return True
            if time.monotonic() >= self._settle_until:
                return False
            time.sleep(0.005)

    # What goes by itself.

    def tidy(self, now: float | None = None, *, cores: int) -> None:
        """Remove what has become too old, and what is more than a limit allows that was lowered.

        cores: how many there may be: to count them anew is to ask for the size of each.
        """
        survey = None
        if self.limits.age_max is not None:
            survey = self.survey()
            oldest = stamp((time.time() if now is None else now) - self.limits.age_max)
            for core in [core for core in survey.cores if core.owner < oldest][:AT_ONCE]:
                self.evict(core, "it was older than it may become (age_max)")
                survey.cores.remove(core)
        if self.limits.cores_max is not None and cores > self.limits.cores_max:
            survey = survey or self.survey()
            for _ in range(min(len(survey.cores) - self.limits.cores_max, AT_ONCE)):
                core = self.next_to_go(survey, by_number=True)
                self.evict(core, "there were more than may be kept (cores_max)")
                survey.cores.remove(core)

    def spare_inodes(self, wanted: int) -> None:
        """See to it that records have inodes, as far as old cores have some to give."""
        system = os.fstatvfs(self._store.directory)
        if not system.f_files:
            return
        missing = (self.limits.keep_free_inodes(system.f_files) or 0) + wanted - system.f_favail
        if missing <= 0:
            return
        survey = self.survey()
        if missing > len(survey.cores):
            return
        for _ in range(min(missing, AT_ONCE)):
            core = self.next_to_go(survey, by_number=True)
            self.evict(core, "newer crashes needed its inode (keep_free_inodes)")
            survey.cores.remove(core)

    def evict(self, core: Held, why: str, *, word: str = "evicted") -> Record | None:
        """Remove a core, and say so in its record, which is returned when there is one."""
        # Known while its record says it: who is asked afterwards counts the same.
        self.uid_of(core.owner)
        return self._store.drop_core(core.owner, core.name, f"{word}: {why}")

    # Whose core it is.

    def uid_of(self, owner: str) -> int | None:
        """Return the uid in a record, None when there is no record that tells."""
        if owner not in self._uids:
            self._uids[owner] = self._read_uid(owner)
        return self._uids[owner]

    def _read_uid(self, owner: str) -> int | None:
        for name in (f"{owner}.json", f".{owner}.json"):
            try:
                fd = os.open(
                    name,
                    os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOFOLLOW,
                    dir_fd=self._store.directory,
                )
            except OSError:
                continue
            try:
                found = _UID.search(os.read(fd, _BEGINNING))
            except OSError:
                continue
            finally:
                os.close(fd)
            if found is not None:
                return int(found[1])
        try:
            # Another version's, whose facts stand in another order.
            return self._store.load(owner).uid
        except (OSError, ValueError):
            return None

    @property
    def in_memory(self) -> bool:
        """Whether the store's file system keeps its files in memory."""
        if self._in_memory is None:
            self._in_memory = _kind_of(self._store.directory) in _IN_MEMORY
        return self._in_memory

    # What there is to say.

    def report(self, records: Iterable[tuple[str, Record | None]]) -> Report:
        """Say what the store holds. records: all of them, as Store.records() gives them."""
        survey = self.survey()
        users: dict[int | None, Holding] = {}
        programs: dict[str, Holding] = {}
        by_owner = {core.owner: core for core in survey.cores}
        count = 0
        for owner, record in records:
            count += 1
            core = by_owner.pop(owner, None)
            uid = record.uid if record is not None else None
            program = (record.exe or record.comm) if record is not None else "?"
            _add(users, uid, core, records=1)
            _add(programs, program, core, records=1)
        for core in by_owner.values():
            _add(users, None, core)
            _add(programs, "?", core)
        uses = self._uses(survey, users, count)
        sizes = [use for use in uses if use.unit == "bytes" and use.name != "user_max"]
        # A limit on the number that is reached: each core that comes drives one out.
        reached = [use for use in uses if use.unit in ("cores", "inodes") and not use.headroom]
        first = reached[0] if reached else min(sizes, key=lambda use: use.headroom, default=None)
        return Report(
            total=Holding(len(survey.cores), survey.stored, count),
            users=users,
            programs=programs,
            writing=Holding(len(survey.writing), survey.promised, 0),
            uses=uses,
            limiting=first.name if first is not None else None,
            headroom=None if first is None else (0 if reached else first.headroom),
        )

    def _uses(self, survey: Survey, users: dict[int | None, Holding], records: int) -> list[Use]:
        system = os.fstatvfs(self._store.directory)
        whole, free = system.f_blocks * system.f_frsize, system.f_bavail * system.f_frsize
        outstanding = survey.promised - sum(survey.taken.values())
        used = survey.stored + survey.promised
        limits = self.limits
        found = []
        total = limits.store_max(whole)
        if total is not None:
            found.append(Use("store_max", "bytes", total, used, max(0, total - used)))
        share = limits.user_max(whole if total is None else total)
        if share is not None:
            most = max((held.size for held in users.values()), default=0)
            found.append(Use("user_max", "bytes", share, most, max(0, share - most)))
        keep_free = limits.keep_free(whole)
        # Without a setting of its own, the end of the file system is the limit.
        if whole:
            keep = keep_free or 0
            found.append(Use("keep_free", "bytes", keep, free, max(0, free - keep - outstanding)))
        if self.in_memory and (headroom := memory_headroom()) is not None:
            found.append(Use("memory", "bytes", MEMORY_MARGIN, max(0, headroom), max(0, headroom - outstanding)))
        keep_inodes = limits.keep_free_inodes(system.f_files) if system.f_files else None
        if keep_inodes is not None:
            headroom = max(0, system.f_favail - keep_inodes)
            found.append(Use("keep_free_inodes", "inodes", keep_inodes, system.f_favail, headroom))
        if limits.cores_max is not None:
            cores = len(survey.cores) + len(survey.writing)
            found.append(Use("cores_max", "cores", limits.cores_max, cores, max(0, limits.cores_max - cores)))
        if limits.age_max is not None:
            age = _age_of(survey.cores[0].owner) if survey.cores else 0
            found.append(Use("age_max", "seconds", int(limits.age_max), age, max(0, int(limits.age_max) - age)))
        found.append(Use("records_max", "records", limits.records_max, records, max(0, limits.records_max - records)))
        return found


class _Need(NamedTuple):
    """What a core is to be removed for.

    own: it has to be one of the same user. by_number: cores count, not their bytes. settle: it is space on disk.
    """

    setting: str
    own: bool = False
    by_number: bool = False
    settle: bool = False


def _add(table: dict[_Key, Holding], key: _Key, core: Held | None, *, records: int = 0) -> None:
    was = table.get(key, Holding())
    table[key] = Holding(
        was.cores + (core is not None), was.size + (core.size if core is not None else 0), was.records + records
    )


def stamp(seconds: float) -> str:
    """Return what ids begin with that came at this time (since the epoch): smaller ones are older."""
    # Before the epoch there were no crashes, and a strange clock must not break the calendar.
    return time.strftime("%Y%m%dT%H%M%S", time.gmtime(max(0.0, min(seconds, 1 << 34))))


def _age_of(owner: str) -> int:
    import calendar  # noqa: PLC0415 - not on the way of a crash

    try:
        return max(0, int(time.time() - calendar.timegm(time.strptime(owner[:15], "%Y%m%dT%H%M%S"))))
    except ValueError:
        return 0


def _kind_of(fd: int) -> bytes:
    """Return the type of the file system that a descriptor's file is on, empty when that is unknown."""
    device = os.fstat(fd).st_dev
    wanted = b"%d:%d" % (os.major(device), os.minor(device))
    try:
        with open("/proc/self/mountinfo", "rb") as file:
            for line in file:
                before, _, after = line.partition(b" - ")
                if before.split(b" ", 3)[2] == wanted:
                    return after.split(b" ", 1)[0]
    except (OSError, IndexError):
        pass
    return b""


def memory_headroom() -> int | None:
    """Return how many bytes more this process's memory cgroups and the machine can hold, None when neither tells.

    What a file in memory takes is charged to who writes it, and who else is in the cgroup is killed for it
    (cgroup-v2.rst, memory.max). Pages of files on disk can be given up for it.
    """
    found = [room for room in (*_cgroup_rooms(), _machine_room()) if room is not None]
    return min(found) - MEMORY_MARGIN if found else None


def _machine_room() -> int | None:
    table: dict[bytes, int | None] = {}
    for line in _read(MEMINFO).splitlines():
        name, _, value = line.partition(b":")
        if name in (b"MemAvailable", b"SwapFree"):
            table[name] = _number(value.removesuffix(b" kB").strip())
    available = table.get(b"MemAvailable")
    return None if available is None else (available + (table.get(b"SwapFree") or 0)) * 1024


def _cgroup_rooms() -> list[int]:
    """Return what is left in each memory cgroup from the own one up, as far as they can be seen from here."""
    found: list[int] = []
    for line in _read(OWN_CGROUPS).split(b"\n"):
        hierarchy, _, rest = line.partition(b":")
        controllers, _, path = rest.partition(b":")
        if hierarchy == b"0" and not controllers:
            top, names = CGROUPS, _V2
        elif b"memory" in controllers.split(b","):
            top, names = CGROUPS + "/memory", _V1
        else:
            continue
        parts = [part for part in path.split(b"/") if part]
        # A path that leads out of the own cgroup namespace, or one that is not in sight as the container's mount begins
        # further down: what is there of it counts.
        if b".." in parts:
            parts = []
        for length in range(len(parts), -1, -1):
            room = _room_of(os.path.join(os.fsencode(top), *parts[:length]), names)
            if room is not None:
                found.append(room)
    return found


# The files of a limit (the least counts), of what is used, and the lines of memory.stat that can be given up.
_Files = tuple[tuple[bytes, ...], bytes, tuple[bytes, ...]]
_V2: _Files = ((b"memory.max", b"memory.high"), b"memory.current", (b"inactive_file", b"active_file"))
_V1: _Files = ((b"memory.limit_in_bytes",), b"memory.usage_in_bytes", (b"total_inactive_file", b"total_active_file"))


def _room_of(directory: bytes, names: _Files) -> int | None:
    limits, usage, lines = names
    # "max" is no number: no limit.
    most = [number for name in limits if (number := _number(_read(os.path.join(directory, name)))) is not None]
    used = _number(_read(os.path.join(directory, usage)))
    if not most or used is None:
        return None
    spare = 0
    for line in _read(os.path.join(directory, b"memory.stat")).splitlines():
        kind, _, value = line.partition(b" ")
        if kind in lines:
            spare += _number(value) or 0
    return min(most) - used + spare


def _number(text: bytes) -> int | None:
    text = text.strip()
    return int(text) if text.isdigit() and len(text) <= 20 else None


def _read(path: bytes | str) -> bytes:
    """Return the beginning of a file of the kernel's, nothing when there is none."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return b""
    try:
        return os.read(fd, 65536)
    except OSError:
        return b""
    finally:
        os.close(fd)
