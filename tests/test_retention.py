"""What a store holds: its limits at every moment, whose core goes, and that a full disk costs no record."""

from __future__ import annotations

import errno
import os
import random
import shutil
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from receiver import retention
from receiver.config import Config, Limit
from receiver.record import Core, Record
from receiver.retention import Limits, NoRoom, memory_headroom
from receiver.store import Entry, Store
from tests.support.cgroups import Cgroup
from tests.test_store import PlainSink, content, in_child, names

if TYPE_CHECKING:
    from collections.abc import Iterator

KIB, MIB = 1 << 10, 1 << 20
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root: sudo .venv/bin/python -m pytest")


@contextmanager
def mounted(*arguments: str, at: Path) -> Iterator[Path]:
    at.mkdir(parents=True, exist_ok=True)
    subprocess.run(["mount", *arguments, str(at)], check=True, timeout=30)
    try:
        yield at
    finally:
        # Lazily: a test that failed has its store open.
        subprocess.run(["umount", "-l", str(at)], check=True, timeout=30)


@contextmanager
def tmpfs(at: Path, options: str) -> Iterator[Path]:
    with mounted("-t", "tmpfs", "-o", options, "core_pipe-tests", at=at) as where:
        yield where


@contextmanager
def ext4(at: Path, mib: int, *options: str) -> Iterator[Path]:
    image = at.with_suffix(".img")
    with open(image, "wb") as file:
        file.truncate(mib * MIB)
    subprocess.run(["mkfs.ext4", "-q", "-m", "0", *options, str(image)], check=True, timeout=30)
    with mounted("-o", "loop", str(image), at=at) as where:
        yield where


@contextmanager
def btrfs(at: Path) -> Iterator[Path]:
    image = at.with_suffix(".img")
    with open(image, "wb") as file:
        file.truncate(128 * MIB)
    subprocess.run(["mkfs.btrfs", "-q", str(image)], check=True, timeout=30, capture_output=True)
    with mounted("-o", "loop", str(image), at=at) as where:
        yield where


needs_btrfs = pytest.mark.skipif(
    os.geteuid() != 0 or shutil.which("mkfs.btrfs") is None or "btrfs" not in Path("/proc/filesystems").read_text(),
    reason="needs root, a kernel with btrfs, and mkfs.btrfs: sudo apt-get install btrfs-progs",
)


def disks(base: Path) -> Iterator[Path]:
    with tmpfs(base / "tmpfs", "size=16m") as where:
        yield where
    with ext4(base / "ext4", 24) as where:
        yield where
    if not needs_btrfs.args[0]:
        with btrfs(base / "btrfs") as where:
            yield where
    with ext4(base / "ext4-plain", 16, "-O", "^has_journal,^extent,^64bit", "-I", "128") as where:
        yield where


def new_record(uid: int = 1000, seconds: int = 0, *, exe: str | None = None, age: float = 0) -> Record:
    record = Record.of_numbers(
        pid=7, tid=7, uid=uid, gid=uid, signal=11, time=1_700_000_000, comm=b"test", core_limit=1 << 40, dumpable=1
    )
    record.exe = exe
    # Ids sort by time, and within one second they may come here in any.
    record.id = (
        f"{time.strftime('%Y%m%dT%H%M%S', time.gmtime(time.time() - age))}-{seconds:06d}-7-{random.randbytes(4).hex()}"
    )
    return record


def keep(store: Store, size: int, record: Record, *, block: int = 64 * KIB) -> Record:
    """Keep a core, as a worker does."""
    entry = store.begin(record)
    try:
        sink = PlainSink(entry)
        data = memoryview(content(record.uid, block))
        for at in range(0, size, block):
            sink.write(data[: size - at])
        sink.finish()
        record.core = Core(state="stored", size_bytes=size, whole_bytes=size, compression="none")
    except NoRoom as error:
        record.core = Core(reason=str(error), size_bytes=size)
    try:
        entry.finish()
    finally:
        entry.close()
    return record


def end(entry: Entry, reason: str = "no room") -> None:
    entry.record.core = Core(reason=reason)
    entry.finish()


def kept(store: Store, *records: Record) -> list[bool]:
    return [store.load(record.id).core.state == "stored" for record in records]


def fill(directory: Path, name: str = "others") -> None:
    """Take every block that is left."""
    fd = os.open(directory / name, os.O_WRONLY | os.O_CREAT, 0o600)
    try:
        for size in (MIB, 64 * KIB, 4 * KIB, 512):
            while True:
                try:
                    if os.write(fd, bytes(size)) < size:
                        break
                    os.fsync(fd)
                except OSError as error:
                    assert error.errno == errno.ENOSPC
                    break
    finally:
        os.close(fd)


# Whose core goes.


def test_the_user_who_holds_most_pays(tmp_path: Path) -> None:
    """One user's crash loop leaves the others' cores alone, however old they are."""
    store = Store(str(tmp_path / "store"), limits=Limits(store_max=lambda _: 8 * MIB))
    lone = keep(store, MIB, new_record(1, 0))
    pair = [keep(store, MIB, new_record(2, n)) for n in (1, 2)]
    loop = [keep(store, MIB, new_record(3, n)) for n in range(3, 20)]
    assert kept(store, lone, *pair) == [True] * 3
    assert kept(store, *loop) == [False] * 12 + [True] * 5
    # A newcomer takes from him as well.
    assert kept(store, keep(store, MIB, new_record(4, 30)), lone, *pair, *loop[-5:]) == [
        *[True] * 4,
        False,
        *[True] * 4,
    ]
    assert store.load(loop[0].id).core == Core(
        reason="evicted: newer cores needed its room (store_max)", size_bytes=MIB, whole_bytes=MIB
    )
    store.close()


def test_a_core_without_a_record_goes_first(tmp_path: Path) -> None:
    store = Store(str(tmp_path / "store"), limits=Limits(store_max=lambda _: 3 * MIB))
    old = keep(store, MIB, new_record(1, 0))
    orphan = keep(store, MIB, new_record(2, 1))
    os.unlink(f"{store.path}/{orphan.id}.json")
    new = keep(store, 2 * MIB - 64 * KIB, new_record(3, 2))
    assert kept(store, old, new) == [True, True]
    assert f"{orphan.id}.core" not in names(store)
    store.close()


def test_a_user_makes_room_within_the_own_share(tmp_path: Path) -> None:
    limits = Limits(store_max=lambda _: 20 * MIB, user_max=Limit(percent=15).bytes_of)
    store = Store(str(tmp_path / "store"), limits=limits)
    other = keep(store, MIB, new_record(2, 0))
    own = [keep(store, MIB - 64 * KIB, new_record(1, n)) for n in range(1, 6)]
    assert kept(store, other, *own) == [True, False, False, True, True, True]
    assert store.load(own[0].id).core.reason == "evicted: newer cores needed its room (user_max)"
    # In vain: nothing goes.
    entry = store.begin(new_record(1, 7))
    with pytest.raises(NoRoom, match=r"more than one user's cores may \(user_max, 3145728 bytes\)"):
        entry.grow(3 * MIB + 1)
    end(entry)
    writing = store.begin(new_record(1, 8))
    writing.grow(2 * MIB)
    entry = store.begin(new_record(1, 9))
    with pytest.raises(NoRoom, match=r"the user's cores being written take up the user's share \(user_max"):
        entry.grow(2 * MIB)
    end(entry)
    end(writing)
    assert kept(store, other) == [True]
    store.close()


def test_a_share_that_was_lowered_is_nobody_elses_to_pay(tmp_path: Path) -> None:
    store = Store(str(tmp_path / "store"))
    other = keep(store, 3 * MIB, new_record(2, 0))
    own = keep(store, MIB, new_record(1, 1))
    store.close()
    store = Store(str(tmp_path / "store"), limits=Limits(user_max=lambda _: 3 * MIB // 2))
    assert kept(store, keep(store, MIB, new_record(1, 2)), other, own) == [True, True, False]
    store.close()


def test_as_many_cores_as_may_be(tmp_path: Path) -> None:
    """Their number is what is short: who has most of them pays, not who has the largest."""
    store = Store(str(tmp_path / "store"), limits=Limits(cores_max=4))
    large = keep(store, 4 * MIB, new_record(1, 0))
    many = [keep(store, 4 * KIB, new_record(2, n)) for n in range(1, 9)]
    assert kept(store, large, *many) == [True, *[False] * 5, *[True] * 3]
    writing = [store.begin(new_record(1, 20 + n)) for n in range(4)]
    for entry in writing:
        entry.grow(1)
    assert kept(store, large, *many) == [False] * 9
    entry = store.begin(new_record(1, 30))
    with pytest.raises(NoRoom, match=r"as many cores are being written as the store may hold \(cores_max, 4\)"):
        entry.grow(1)
    end(entry)
    for other in writing:
        end(other)
    assert len(list(store.records())) == 14
    store.close()


def test_what_is_there_is_counted_once_for_a_core(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Many crashes at once wait for the lock meanwhile: counting asks for the size of each core that is there."""
    store = Store(str(tmp_path / "store"), limits=Limits(cores_max=3))
    records = [keep(store, 4 * KIB, new_record(1, n)) for n in range(2)]
    counted = []
    real = retention.Survey

    def survey(*arguments: Any) -> retention.Survey:
        counted.append(1)
        return real(*arguments)

    monkeypatch.setattr(retention, "Survey", survey)
    # Once there is room for it, once one has to go for it.
    for n in range(2, 4):
        entry = store.begin(new_record(1, n))
        assert len(counted) == n - 2
        entry.open_core()
        entry.grow(4 * KIB)
        assert len(counted) == n - 1
        entry.record.core = Core(state="stored", size_bytes=4 * KIB, compression="none")
        entry.finish()
        entry.close()
        assert len(counted) == n - 1
        records.append(entry.record)
    assert kept(store, *records) == [False, True, True, True]
    store.close()


def test_a_number_that_was_lowered_holds_from_the_next_crash_on(tmp_path: Path) -> None:
    store = Store(str(tmp_path / "store"))
    records = [keep(store, KIB, new_record(1, n)) for n in range(6)]
    store.close()
    store = Store(str(tmp_path / "store"), limits=Limits(cores_max=2))
    end(store.begin(new_record(1, 9)))
    assert kept(store, *records) == [False] * 4 + [True] * 2
    assert store.load(records[0].id).core.reason == "evicted: there were more than may be kept (cores_max)"
    store.close()


def test_what_is_too_old_goes_at_the_next_crash(tmp_path: Path) -> None:
    store = Store(str(tmp_path / "store"), limits=Limits(age_max=3600))
    old = [keep(store, KIB, new_record(1, age=age)) for age in (90 * 86400, 3700)]
    young = [keep(store, KIB, new_record(1, age=age)) for age in (3500, 0)]
    assert kept(store, *old, *young) == [False, False, True, True]
    store.add_record(new_record(1))
    # A clock that was wrong for a while: from the future on, nothing ever ages.
    assert kept(store, *old, *young) == [False, False, True, True]
    assert store.load(old[0].id).core.reason == "evicted: it was older than it may become (age_max)"
    store.close()


def test_a_thousand_old_ones_do_not_hold_up_a_crash(tmp_path: Path) -> None:
    store = Store(str(tmp_path / "store"))
    for n in range(retention.AT_ONCE + 8):
        keep(store, 1, new_record(1, n, age=9000))
    store.close()
    store = Store(str(tmp_path / "store"), limits=Limits(age_max=3600))
    end(store.begin(new_record(1)))
    assert len([name for name in names(store) if name.endswith(".core")]) == 8
    end(store.begin(new_record(1)))
    assert [name for name in names(store) if name.endswith(".core")] == []
    store.close()


def test_what_a_killed_worker_was_promised_is_given_to_the_next(tmp_path: Path) -> None:
    store = Store(str(tmp_path / "store"), limits=Limits(store_max=lambda _: 4 * MIB))
    killed = new_record(1, 0)

    def work() -> None:
        entry = Store(store.path, limits=store.limits).begin(killed)
        sink = PlainSink(entry)
        sink.write(memoryview(content(1, 3 * MIB)))
        os.kill(os.getpid(), 9)

    in_child(work)
    alive = store.begin(new_record(2, 1))
    alive.grow(MIB)
    assert kept(store, keep(store, 2 * MIB, new_record(3, 2))) == [True]
    assert store.load(killed.id).core.reason == "interrupted: the receiver ended before the core was complete"
    end(alive)
    store.close()


# Room.


def test_room_that_is_no_more_wanted_goes_back(tmp_path: Path) -> None:
    """A core that was cut down while it was written: the holes are there, and the others may have the room."""
    store = Store(str(tmp_path / "store"), limits=Limits(store_max=lambda _: 64 * MIB))
    entry = store.begin(new_record(1, 0))
    fd = entry.open_core()
    entry.grow(60 * MIB)
    other = store.begin(new_record(2, 1))
    with pytest.raises(NoRoom):
        other.grow(20 * MIB)
    os.pwrite(fd, content(1, MIB), 0)
    entry.grow(2 * MIB)
    assert store.used() < 20 * MIB
    other.grow(20 * MIB)
    # And again up to the limit; never refused what it may have.
    end(other)
    entry.grow(60 * MIB)
    entry.grow(64 * MIB - 512 * KIB)
    entry.grow(60 * MIB)
    end(entry)
    store.close()


@needs_root
def test_the_first_step_has_room_for_the_map_of_a_file(tmp_path: Path) -> None:
    """A step up to the very limit: every other page is a hole, which nobody knew when it was granted."""
    with ext4(tmp_path / "disk", 48) as where:
        limit = Entry.STEP + 512 * KIB
        store = Store(str(where / "store"), limits=Limits(store_max=lambda _: limit))
        entry = store.begin(new_record())
        sink = PlainSink(entry)
        block = memoryview((content(1, 4096) + bytes(4096)) * 128)
        with pytest.raises(NoRoom):
            while True:
                sink.write(block)
                os.fsync(sink.fd)
                assert os.fstat(sink.fd).st_blocks * 512 <= limit
        assert os.fstat(sink.fd).st_blocks * 512 > limit - MIB
        end(entry)
        store.close()


def test_others_come_in_while_many_cores_go(tmp_path: Path) -> None:
    count = 3 * retention.AT_ONCE
    store = Store(str(tmp_path / "store"), limits=Limits(store_max=lambda _: count * 4096))
    for n in range(count):
        keep(store, 4096, new_record(1, n))
    assert len([name for name in names(store) if name.endswith(".core")]) == count
    entry = store.begin(new_record(2, 9000))
    with store.locked():
        assert store.make_room(entry.record.id, count * 4096) is False
    assert len([name for name in names(store) if name.endswith(".core")]) == count - retention.AT_ONCE
    entry.grow(count * 4096)
    assert [name for name in names(store) if name.endswith(".core")] == []
    end(entry)
    store.close()


def sparse(size: int, chance: random.Random) -> bytes:
    """Pages of which each may be a hole: the worst for a file's map."""
    pages = (chance.randbytes(4096) if chance.random() < 0.5 else bytes(4096) for _ in range(size // 4096))
    return b"".join(pages)


@needs_root
def test_the_map_of_a_file_with_many_holes_counts(tmp_path: Path) -> None:
    """On disk, a file is more than its pages; the limit is for what is on disk."""
    chance = random.Random(1)
    with ext4(tmp_path / "disk", 96) as where:
        limit = 12 * MIB + 4096
        store = Store(str(where / "store"), limits=Limits(store_max=lambda _: limit))
        for n in range(4):
            entry = store.begin(new_record(1, n))
            sink = PlainSink(entry)
            with pytest.raises(NoRoom):
                while True:
                    sink.write(memoryview(sparse(MIB, chance)))
                    total = sum(
                        os.stat(name, dir_fd=store.directory).st_blocks * 512
                        for name in store.names()
                        if ".core" in name
                    )
                    assert total <= limit
                    assert store.used() <= limit
            sink.finish()
            entry.record.core = Core(state="reduced", size_bytes=sink.position, compression="none")
            entry.finish()
        assert store.used() > limit * 0.9
        store.close()


@needs_root
def test_cores_that_give_nothing_back_do_not_cost_all_others(tmp_path: Path) -> None:
    """Root has linked one user's cores elsewhere: what makes no room does not go on to take the rest."""
    with ext4(tmp_path / "disk", 64) as where:
        store = Store(str(where / "store"), limits=Limits(keep_free=lambda _: 8 * MIB))
        others = [keep(store, MIB, new_record(uid, uid)) for uid in range(1, 6)]
        linked = [keep(store, 8 * MIB, new_record(9, 20 + n)) for n in range(4)]
        for n, record in enumerate(linked):
            os.link(str(record.core.path), where / f"mine-{n}")
        for n in range(3):
            # As each crash opens it.
            again = Store(store.path, limits=store.limits)
            new = keep(again, 30 * MIB, new_record(8, 40 + n))
            assert "removing older cores gives no room back on the file system (keep_free)" in str(new.core.reason)
            again.close()
        assert kept(store, *others) == [True] * 5
        assert kept(store, *linked) == [False] * 3 + [True]
        store.close()


@needs_root
def test_a_user_who_keeps_his_cores_open_keeps_no_room(tmp_path: Path) -> None:
    with ext4(tmp_path / "disk", 64) as where:
        store = Store(str(where / "store"), limits=Limits(keep_free=lambda _: 8 * MIB))
        others = [keep(store, MIB, new_record(uid, uid)) for uid in range(1, 6)]
        held = []
        for n in range(9):
            record = keep(store, 20 * MIB, new_record(9, 20 + n))
            assert record.core.state == "stored", record.core.reason
            held.append(store.open_core(record))
        assert kept(store, *others) == [True] * 5
        assert sum(os.fstat(fd).st_blocks * 512 for fd in held) == store.used() - 5 * MIB
        for fd in held:
            os.close(fd)
        store.close()


def test_a_core_that_is_there_is_looked_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many there are: a crash counts them when it begins, and at each step of its core."""
    path = str(tmp_path / "store")
    store = Store(path, limits=Limits(store_max=lambda _: 200 * MIB, cores_max=50))
    for n in range(20):
        keep(store, KIB, new_record(1, n))
    store.close()
    looked: list[str] = []
    stat = os.stat

    def watched(name: str, **keywords: object) -> os.stat_result:
        looked.append(name)
        return stat(name, **keywords)  # type: ignore[arg-type]

    store = Store(path, limits=Limits(store_max=lambda _: 200 * MIB, cores_max=50))
    monkeypatch.setattr(os, "stat", watched)
    entry = store.begin(new_record(2, 30))
    for size in range(1, 100 * MIB, 10 * MIB):
        entry.grow(size)
    assert len([name for name in looked if name.endswith(".core") and not name.startswith(".")]) == 20
    monkeypatch.undo()
    # Those that come and go meanwhile count.
    used = store.used()
    other = Store(path)
    more = keep(other, MIB, new_record(3, 40))
    assert store.used() == used + MIB
    other.prune(match=lambda record: record.id == more.id)
    assert store.used() == used
    other.close()
    end(entry)
    store.close()


# A disk that is full.


@needs_root
def test_a_full_disk_costs_no_record_that_was_begun(tmp_path: Path) -> None:
    for where in disks(tmp_path):
        store = Store(str(where / "store"))
        entries = [store.begin(new_record(1, n)) for n in range(3)]
        fill(where)
        for entry in entries:
            # A record grows: what its core told, and why there is none.
            entry.record.environment = {f"VARIABLE_{n}": "x" * 64 for n in range(100)}
            end(entry, "the file system is full " + "x" * 2000)
        for entry in entries:
            found = store.load(entry.record.id)
            assert found.core.reason is not None
            assert found.core.reason.startswith("the file system is full"), where
            assert found.environment == entry.record.environment
            entry.close()
        assert len(names(store)) == 3
        store.close()


@needs_root
def test_a_core_that_filled_the_disk_itself_is_sealed(tmp_path: Path) -> None:
    """As much of it as there is: nobody else has to go for that."""
    for where in disks(tmp_path):
        store = Store(str(where / "store"))
        entry = store.begin(new_record(1))
        sink = PlainSink(entry)
        # btrfs has less than it says.
        with pytest.raises((NoRoom, OSError), match=r"the file system is full|No space left"):
            while True:
                sink.write(memoryview(content(1, 64 * KIB)))
        fill(where)
        assert entry.relieve(4096) is False
        os.ftruncate(entry.core, size := sink.position)
        entry.record.core = Core(state="reduced", reason="full", size_bytes=size, compression="none")
        entry.finish(readers=1000)
        assert store.load(entry.record.id).core.state == "reduced"
        store.close()


@needs_root
def test_on_a_full_disk_an_old_core_goes_for_a_record(tmp_path: Path) -> None:
    for where in disks(tmp_path):
        store = Store(str(where / "store"))
        old = [keep(store, 64 * KIB, new_record(1, n)) for n in range(3)]
        fill(where)
        entry = store.begin(new_record(2, 5))
        assert kept(store, *old) == [False, True, True]
        assert "a record needed its room" in str(store.load(old[0].id).core.reason)
        fill(where, "more")
        store.add_record(added := new_record(3, 6))
        assert kept(store, *old) == [False, False, True]
        assert store.load(added.id).uid == 3
        end(entry)
        store.close()


@needs_root
def test_a_disk_that_others_filled_refuses(tmp_path: Path) -> None:
    """Without a core that could go there is nothing to be done, and nothing is left behind."""
    with tmpfs(tmp_path / "disk", "size=4m") as where:
        store = Store(str(where / "store"))
        with store.locked():
            pass
        fill(where)
        for write in (store.begin, store.add_record):
            with pytest.raises(OSError, match="No space left"):
                write(new_record())
        assert names(store) == set()
        store.close()


@needs_root
def test_relieved_of_old_cores_a_write_goes_on(tmp_path: Path) -> None:
    for where in disks(tmp_path):
        store = Store(str(where / "store"))
        old = [keep(store, MIB, new_record(1, n)) for n in range(4)]
        other = keep(store, MIB, new_record(2, 9))
        entry = store.begin(new_record(3, 10))
        fd = entry.open_core()
        fill(where)
        with pytest.raises(OSError, match="No space left"):
            os.write(fd, content(3, 4096))
        # More than there is: in vain, nothing goes.
        assert entry.relieve(6 * MIB) is False
        assert kept(store, *old, other) == [True] * 5
        assert entry.relieve(MIB + MIB // 2) is True
        assert kept(store, *old, other) == [False, False, True, True, True]
        assert store.load(old[0].id).core.reason == "evicted: the file system or its quota was full"
        for at in range(0, 3 * MIB // 2, 64 * KIB):
            os.pwrite(fd, content(3, 64 * KIB), at)
        end(entry)
        store.close()


@needs_root
def test_a_core_that_cannot_be_made_takes_an_inode_of_an_old_one(tmp_path: Path) -> None:
    with tmpfs(tmp_path / "disk", "nr_inodes=24,size=8m") as where:
        store = Store(str(where / "store"))
        old = [keep(store, KIB, new_record(1, n)) for n in range(5)]
        entry = store.begin(new_record(2, 9))
        with pytest.raises(OSError, match="No space left"):
            for n in range(30):
                (where / f"other-{n}").touch()
        entry.open_core()
        assert kept(store, *old) == [False, True, True, True, True]
        entry.grow(1)
        assert kept(store, *old) == [False, False, True, True, True]
        end(entry)
        store.close()


@needs_root
def test_inodes_are_left_to_others(tmp_path: Path) -> None:
    with tmpfs(tmp_path / "disk", "nr_inodes=100,size=8m") as where:
        limits = Limits(keep_free_inodes=Limit(percent=20).bytes_of)
        store = Store(str(where / "store"), limits=limits)
        most = keep(store, 2 * MIB, new_record(1, 0))
        for n in range(1, 50):
            keep(store, KIB, new_record(2, n))
            # A crash without a core leaves a record all the same; here each has one.
            assert os.statvfs(where).f_favail >= 20 or n > 30, n
        reasons = {record.core.reason for _, record in store.records() if record is not None}
        assert {reason for reason in reasons if reason and "inode" in reason}
        assert kept(store, most) == [True]
        (where / "more").mkdir()
        with pytest.raises(OSError, match="No space left"):
            for n in range(100):
                (where / "more" / str(n)).touch()
        assert os.statvfs(where).f_favail == 0
        end(store.begin(new_record(3, 60)))
        assert os.statvfs(where).f_favail >= 20
        assert kept(store, most) == [True]
        (where / "enough").mkdir()
        with pytest.raises(OSError, match="No space left"):
            for n in range(100):
                (where / "enough" / str(n)).touch()
        # Now there are fewer cores than it would take: what is there stays, and the record is made at the cost of one.
        before = len([name for name in names(store) if name.endswith(".core")])
        entry = store.begin(new_record(3, 61))
        with pytest.raises(NoRoom, match=r"has to keep 20 inodes free \(keep_free_inodes\)"):
            entry.grow(1)
        end(entry)
        assert before - 2 <= len([name for name in names(store) if name.endswith(".core")]) < before
        store.close()


@needs_btrfs
def test_what_came_after_the_store_was_opened_is_seen_on_btrfs(tmp_path: Path) -> None:
    """A descriptor of a directory need not list what came after it was opened, and there it does not."""
    with btrfs(tmp_path / "btrfs") as where:
        store = Store(str(where / "store"))
        assert names(store) == set()
        record = keep(store, MIB, new_record())
        assert kept(store, record) == [True]
        assert names(store) == {f"{record.id}.core", f"{record.id}.json"}
        store.close()


@needs_btrfs
def test_a_quota_of_btrfs(tmp_path: Path) -> None:
    try:
        with btrfs(tmp_path / "btrfs") as where:
            for command in (
                ["subvolume", "create", f"{where}/store"],
                ["quota", "enable", str(where)],
                ["quota", "rescan", "-w", str(where)],
                ["qgroup", "limit", "30M", f"{where}/store"],
            ):
                subprocess.run(["btrfs", *command], check=True, timeout=60, capture_output=True)
            store = Store(str(where / "store"))
            old = [keep(store, 6 * MIB, new_record(1, n)) for n in range(3)]
            os.sync()
            assert kept(store, *old) == [True] * 3
            entry = store.begin(new_record(2, 9))
            fd = entry.open_core()
            relieved = 0
            for at in range(0, 12 * MIB, MIB):
                for _ in range(4):
                    try:
                        os.pwrite(fd, content(at, MIB), at)
                        os.fsync(fd)
                        break
                    except OSError as error:
                        assert error.errno in (errno.EDQUOT, errno.ENOSPC)
                        relieved += entry.relieve(MIB)
            assert relieved
            end(entry)
            assert kept(store, *old) == sorted(kept(store, *old))
            store.close()
    except subprocess.CalledProcessError as error:
        pytest.skip(f"this kernel has no quotas on btrfs: {error}")


# Memory.


def write_tree(top: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        path = top / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


@pytest.mark.parametrize(
    ("own", "files", "room"),
    [
        # The least of all up to the root that is in sight.
        (
            "0::/a/b\n",
            {
                "a/b/memory.max": "max\n",
                "a/b/memory.high": "max\n",
                "a/b/memory.current": "1048576\n",
                "a/memory.max": f"{100 * MIB}\n",
                "a/memory.current": f"{90 * MIB}\n",
                "a/memory.stat": f"anon 1\ninactive_file {3 * MIB}\nactive_file {2 * MIB}\nfile {50 * MIB}\n",
            },
            15 * MIB,
        ),
        (
            "0::/\n",
            {"memory.max": f"{64 * MIB}", "memory.high": f"{32 * MIB}", "memory.current": f"{8 * MIB}"},
            24 * MIB,
        ),
        # A container's own mount begins further down than the path says.
        ("0::/docker/x\n", {"memory.max": f"{64 * MIB}", "memory.current": "0"}, 64 * MIB),
        ("0::/../../y\n", {"memory.max": f"{64 * MIB}", "memory.current": "0"}, 64 * MIB),
        (
            "3:cpu:/x\n4:memory,hugetlb:/x\n0::/\n",
            {
                "memory/x/memory.limit_in_bytes": f"{64 * MIB}\n",
                "memory/x/memory.usage_in_bytes": f"{60 * MIB}\n",
                "memory/x/memory.stat": f"inactive_file 1\ntotal_inactive_file {MIB}\ntotal_active_file {MIB}\n",
                "memory/memory.limit_in_bytes": "9223372036854771712\n",
                "memory/memory.usage_in_bytes": "0\n",
            },
            6 * MIB,
        ),
        ("rubbish\n\n::\n0::/x\n", {"x/memory.max": "", "x/memory.current": "-1"}, None),
        ("", {}, None),
    ],
)
def test_what_a_memory_cgroup_has_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, own: str, files: dict[str, str], room: int | None
) -> None:
    write_tree(tmp_path / "cgroup", files)
    (tmp_path / "own").write_text(own)
    monkeypatch.setattr(retention, "CGROUPS", str(tmp_path / "cgroup"))
    monkeypatch.setattr(retention, "OWN_CGROUPS", str(tmp_path / "own"))
    monkeypatch.setattr(retention, "MEMINFO", str(tmp_path / "none"))
    expected = None if room is None else room - retention.MEMORY_MARGIN
    assert memory_headroom() == expected
    (tmp_path / "meminfo").write_text("MemTotal: 9 kB\nMemAvailable:    9216 kB\nSwapFree:  1024 kB\n")
    monkeypatch.setattr(retention, "MEMINFO", str(tmp_path / "meminfo"))
    assert memory_headroom() == min(2 * MIB, 2 * MIB if expected is None else expected)


def test_this_machines_memory_is_read() -> None:
    found = memory_headroom()
    assert found is not None
    assert found > 0


IN_A_SMALL_CGROUP = """
import os, sys
directories, path = sys.argv[1].split(":"), sys.argv[2]
for directory in directories:
    with open(directory + "/cgroup.procs", "w") as file:
        file.write("0")
from tests.test_retention import *
store = Store(path)
reasons = []
for n in range(12):
    record = keep(store, 8 * MIB, new_record(1, n))
    reasons.append(record.core.reason or "stored")
big = keep(store, 256 * MIB, new_record(1, 50))
print(*reasons, big.core.reason or "stored", sep="\\n")
"""


@needs_root
@pytest.mark.parametrize("kind", ["tmpfs", "ramfs"])
def test_a_store_in_memory_gets_nobody_killed(tmp_path: Path, kind: str) -> None:
    """What is written to it counts for its writer's cgroup: old cores go before it is full, and then it is refused."""
    try:
        cgroup = Cgroup(f"core_pipe-retention-{os.getpid()}", 96 * MIB)
    except OSError as error:
        pytest.skip(f"no memory cgroup can be made here: {error}")
    try:
        with mounted("-t", kind, "core_pipe-tests", at=tmp_path / "disk") as where:
            done = subprocess.run(
                [sys.executable, "-c", IN_A_SMALL_CGROUP, ":".join(cgroup.directories), str(where / "store")],
                capture_output=True,
                text=True,
                check=False,
                timeout=120,
            )
            assert done.returncode == 0, done.stderr
            *first, big = done.stdout.splitlines()
            assert set(first) == {"stored"}
            assert "memory" in big
            store = Store(str(where / "store"))
            reasons = [record.core.reason for _, record in store.records() if record is not None]
            assert "evicted: newer cores needed its room (memory)" in reasons
            store.close()
        assert cgroup.out_of_memory_kills() == 0
    finally:
        cgroup.kill()
        cgroup.remove()


# Random operations.

STORE_MAX, USER_MAX, CORES_MAX = 3 * MIB, 2 * MIB, 6

operations = st.lists(
    st.one_of(
        st.tuples(st.just("begin"), st.integers(1, 4), st.just(0)),
        st.tuples(st.just("write"), st.integers(0, 9), st.sampled_from([1, 4096, 70_000, 500_000, 1_100_000])),
        st.tuples(st.just("punch"), st.integers(0, 9), st.just(0)),
        st.tuples(st.just("finish"), st.integers(0, 9), st.just(0)),
        st.tuples(st.just("drop"), st.integers(0, 9), st.just(0)),
        st.tuples(st.just("relieve"), st.integers(0, 9), st.sampled_from([1, 300_000, 5_000_000])),
        st.tuples(st.just("prune"), st.integers(1, 4), st.sampled_from([MIB, 0])),
    ),
    max_size=40,
)


class Machine:
    """A store, its crashes that are being written, and what must hold after each step."""

    def __init__(self, path: Path) -> None:
        limits = Limits(store_max=lambda _: STORE_MAX, user_max=lambda _: USER_MAX, cores_max=CORES_MAX)
        self.store = Store(str(path), limits=limits)
        self.open: list[PlainSink] = []
        self.begun: list[str] = []

    def step(self, what: str, which: int, size: int) -> None:
        if what == "begin":
            record = new_record(which, len(self.begun))
            self.begun.append(record.id)
            self.open.append(PlainSink(self.store.begin(record)))
        elif what == "prune":
            self.store.prune(to=size, match=lambda record: record.uid == which)
        elif self.open:
            sink = self.open[which % len(self.open)]
            if what == "write":
                # Not aligned: each write is a piece of its own, and its pages may be shared.
                sink.position = -(-sink.position // 4096) * 4096
                try:
                    sink.write(memoryview(content(which, size)))
                except NoRoom:
                    self.end(sink, Core(reason="no room"))
            elif what == "punch":
                os.ftruncate(sink.fd, 0)
                sink.used = sink.position = 0
                sink.entry.grow(0)
            elif what == "finish":
                sink.finish()
                self.end(sink, Core(state="stored", size_bytes=sink.position, compression="none"))
            elif what == "drop":
                # As a worker that is killed does.
                self.open.remove(sink)
                sink.entry.close()
            else:
                sink.entry.relieve(size)

    def end(self, sink: PlainSink, core: Core) -> None:
        self.open.remove(sink)
        sink.entry.record.core = core
        sink.entry.finish()

    def check(self) -> None:
        users: dict[int | None, int] = {}
        total = cores = 0
        for name in self.store.names():
            if ".core" in name:
                size = os.stat(name, dir_fd=self.store.directory).st_blocks * 512
                total += size
                cores += size > 0 or not name.startswith(".")
                uid = self.store._retention.uid_of(name.removeprefix(".").split(".")[0])
                users[uid] = users.get(uid, 0) + size
        assert total <= STORE_MAX
        assert self.store.used() <= STORE_MAX
        assert all(size <= USER_MAX for size in users.values()), users
        assert cores <= CORES_MAX

    def close(self) -> None:
        for sink in self.open:
            sink.entry.close()
        self.store.recover()
        records = dict(self.store.records())
        assert set(self.begun) == records.keys()
        assert None not in records.values()
        visible = {name for name in names(self.store) if not name.endswith(".json")}
        with_core = {record.core.path for record in records.values() if record is not None and record.core.path}
        assert {f"{self.store.path}/{name}" for name in visible} == with_core
        report = self.store.usage()
        assert report.total.cores == len(with_core)
        assert sum(held.size for held in report.users.values()) == report.total.size == self.store.used()
        assert report.headroom is not None
        self.store.close()


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.too_slow])
@given(operations)
def test_the_limits_hold_at_every_moment(
    tmp_path_factory: pytest.TempPathFactory, steps: list[tuple[str, int, int]]
) -> None:
    machine = Machine(tmp_path_factory.mktemp("machine") / "store")
    try:
        for step in steps:
            machine.step(*step)
            machine.check()
    finally:
        machine.close()


# Removing and reporting.


def test_prune_removes_the_oldest_and_keeps_their_records(tmp_path: Path) -> None:
    store = Store(str(tmp_path / "store"))
    records = [keep(store, MIB, new_record(n % 2, n)) for n in range(6)]
    assert [found.id for found in store.prune(to=4 * MIB, dry_run=True)] == [record.id for record in records[:2]]
    assert kept(store, *records) == [True] * 6
    gone = store.prune(to=4 * MIB)
    assert [found.id for found in gone] == [record.id for record in records[:2]]
    # As they were: who asked wants to know what went.
    assert [found.core.stored_bytes for found in gone] == [MIB, MIB]
    assert kept(store, *records) == [False] * 2 + [True] * 4
    assert store.load(records[0].id).core == Core(
        reason="pruned: it was removed on request (corepipectl prune)", size_bytes=MIB, whole_bytes=MIB
    )
    assert store.prune(to=4 * MIB) == []
    assert len(store.prune(match=lambda record: record.uid == 0)) == 2
    assert kept(store, *records) == [False, False, False, True, False, True]
    assert store.prune(older_than=3600) == []
    assert len(store.prune(older_than=3600, now=time.time() + 7200)) == 2
    assert names(store) == {f"{record.id}.json" for record in records}
    assert store.prune() == []
    store.close()


def test_prune_removes_what_has_no_record(tmp_path: Path) -> None:
    store = Store(str(tmp_path / "store"))
    orphan = keep(store, KIB, new_record())
    os.unlink(f"{store.path}/{orphan.id}.json")
    assert store.prune(match=lambda _: True) == []
    assert names(store) == {f"{orphan.id}.core"}
    assert store.prune() == []
    assert names(store) == set()
    store.close()


def test_usage_says_who_holds_what_and_what_limits(tmp_path: Path) -> None:
    limits = Limits(
        store_max=lambda _: 10 * MIB, user_max=lambda _: 5 * MIB, keep_free=lambda _: MIB, cores_max=9, age_max=86400
    )
    store = Store(str(tmp_path / "store"), limits=limits)
    keep(store, MIB, new_record(1, 0, exe="/bin/a"))
    keep(store, 2 * MIB, new_record(2, 1, exe="/bin/a"))
    end(store.begin(new_record(2, 2)))
    entry = store.begin(new_record(3, 3))
    entry.grow(1)
    report = store.usage()
    assert report.total == (2, 3 * MIB, 3)
    assert report.users == {1: (1, MIB, 1), 2: (1, 2 * MIB, 2)}
    assert report.programs == {"/bin/a": (2, 3 * MIB, 2), "test": (0, 0, 1)}
    assert report.writing.cores == 1
    uses = {use.name: use for use in report.uses}
    assert uses["store_max"].used == store.used()
    assert uses["store_max"].headroom == 10 * MIB - store.used()
    assert uses["user_max"][1:] == ("bytes", 5 * MIB, 2 * MIB, 3 * MIB)
    assert uses["cores_max"][1:] == ("cores", 9, 3, 6)
    assert uses["records_max"].used == 3
    assert uses["age_max"].unit == "seconds"
    assert "keep_free_inodes" not in uses
    assert (report.limiting, report.headroom) == ("store_max", uses["store_max"].headroom)
    end(entry)
    store.close()


def test_usage_of_a_store_that_is_full_by_number(tmp_path: Path) -> None:
    store = Store(str(tmp_path / "store"), limits=Limits(cores_max=2))
    for n in range(3):
        keep(store, KIB, new_record(1, n))
    report = store.usage()
    assert (report.limiting, report.headroom, report.total.cores) == ("cores_max", 0, 2)
    store.close()


def test_the_settings_make_the_limits(tmp_path: Path) -> None:
    config = Config(
        store=str(tmp_path / "store"),
        store_max=Limit(percent=10),
        user_max=Limit(percent=50),
        keep_free=None,
        keep_free_inodes=Limit(percent=5),
        cores_max=None,
        age_max=60.0,
        records_max=3,
    )
    store = Store.configured(config)
    limits = store.limits
    assert [
        limits.store_max(1000),
        limits.user_max(100),
        limits.keep_free(1000),
        limits.keep_free_inodes(1000),
        *limits[4:],
    ] == [100, 50, None, 50, None, 60.0, 3]
    store.close()
    other = Store.configured(config, path=str(tmp_path / "other"))
    assert other.path == str(tmp_path / "other")
    other.close()


def test_whose_core_it_is_is_read_from_any_record(tmp_path: Path) -> None:
    """Also of one that another version wrote, with its facts in another order."""
    store = Store(str(tmp_path / "store"))
    record = keep(store, KIB, new_record(1234, 0))
    path = Path(store.path, f"{record.id}.json")
    assert store._retention._read_uid(record.id) == 1234
    lines = path.read_text().splitlines()
    uid = lines.index(' "uid": 1234,')
    moved = [lines[0], f' "note": "{"x" * 3000}",', *lines[1:uid], *lines[uid + 1 : -2], ' "uid": 1234,', *lines[-2:]]
    path.write_text("\n".join(moved))
    assert store._retention._read_uid(record.id) == 1234
    path.write_text("rubbish")
    assert store._retention._read_uid(record.id) is None
    store.close()
