"""The store: nothing visible is partial, its limits hold while it is written, and a killed worker leaves it whole."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import random
import select
import signal
import stat
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import pytest
import zstandard

from receiver import protocol, worker
from receiver.config import Config
from receiver.record import UNLIMITED, Core, Record
from receiver.store import ACL, MAX_RECORD, Entry, Limits, NoRoom, Store, StoreError, write_all
from tests.support.landing import BOOKS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from receiver.protocol import Channel

MIB = 1 << 20
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root: sudo .venv/bin/python -m pytest")


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    found = Store(str(tmp_path / "store"))
    yield found
    found.close()


@pytest.fixture
def public() -> Iterator[Path]:
    """A directory that every user reaches."""
    with tempfile.TemporaryDirectory(prefix="core_pipe-tests.", dir="/tmp") as name:
        Path(name).chmod(0o755)
        yield Path(name)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 16 MiB."""
    where = tmp_path / "disk"
    where.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "core_pipe-tests", str(where)], check=True)
    yield where
    # Lazily: a test that failed has its store open.
    subprocess.run(["umount", "-l", str(where)], check=True)


def new_record(seconds: int = 0, pid: int = 7) -> Record:
    return Record.of_numbers(
        pid=pid,
        tid=pid,
        uid=1000,
        gid=1000,
        signal=11,
        time=1_700_000_000 + seconds,
        comm=b"test",
        core_limit=1 << 40,
        dumpable=1,
    )


class PlainSink:
    """Writes a core as it is, but for pages of zeros. used: bytes that are no hole."""

    def __init__(self, entry: Entry) -> None:
        self.entry = entry
        self.fd = entry.open_core()
        self.position = self.used = 0

    def write(self, block: memoryview) -> None:
        pages = [(at, block[at : at + 4096]) for at in range(0, len(block), 4096)]
        pages = [(at, page) for at, page in pages if page != bytes(len(page))]
        self.used += sum(len(page) for _, page in pages)
        self.entry.grow(self.used)
        for at, page in pages:
            os.pwrite(self.fd, page, self.position + at)
        self.position += len(block)

    def finish(self) -> None:
        os.ftruncate(self.fd, self.position)


class ZstdSink:
    """Writes a core as one frame."""

    def __init__(self, entry: Entry, level: int) -> None:
        self.entry = entry
        self.fd = entry.open_core()
        self.used = 0
        self._compressor = zstandard.ZstdCompressor(level=level, write_checksum=True).compressobj()

    def write(self, block: memoryview) -> None:
        self._store(self._compressor.compress(block))

    def finish(self) -> None:
        self._store(self._compressor.flush())

    def _store(self, data: bytes) -> None:
        self.used += len(data)
        self.entry.grow(self.used)
        write_all(self.fd, data)


def keep(
    store: Store,
    data: bytes,
    *,
    seconds: int = 0,
    compression: str = "none",
    readers: int | None = None,
    record: Record | None = None,
    block: int = 256 << 10,
) -> Record:
    """Keep a crash, as a worker does."""
    record = record or new_record(seconds)
    entry = store.begin(record)
    try:
        sink = PlainSink(entry) if compression == "none" else ZstdSink(entry, 1)
        for at in range(0, len(data), block):
            sink.write(memoryview(data)[at : at + block])
        sink.finish()
        record.core = Core(state="stored", size_bytes=len(data), compression=compression)
    except NoRoom as error:
        record.core = Core(reason=str(error))
    try:
        entry.finish(readers=readers)
    finally:
        entry.close()
    return record


def in_child(run: Callable[[], object], timeout: float = 20) -> int:
    """Run something in a process of its own and return its wait status. Raises TimeoutError, and kills it then."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            run()
            status = 0
        except (OSError, StoreError, ValueError) as error:
            os.write(2, f"{type(error).__name__}: {error}\n".encode("utf-8", "backslashreplace"))
        finally:
            os._exit(status)
    pidfd = os.pidfd_open(pid)
    try:
        if not select.select([pidfd], [], [], timeout)[0]:
            signal.pidfd_send_signal(pidfd, signal.SIGKILL)
            os.waitpid(pid, 0)
            raise TimeoutError(f"still running after {timeout:g} s")
    finally:
        os.close(pidfd)
    return os.waitpid(pid, 0)[1]


def names(store: Store) -> set[str]:
    return set(store.names()) - {".lock"}


def check_whole(store: Store, begun: set[str]) -> dict[str, Record]:
    """After recover(): no leftovers, every visible core is whole, every crash that was begun has a record."""
    records: dict[str, Record] = {}
    for owner, record in store.records():
        assert record is not None, f"{owner}: {(Path(store.path) / f'{owner}.json').read_bytes()!r}"
        records[owner] = record
    assert begun <= records.keys(), f"no records of {begun - records.keys()} in {names(store)}"
    expected = set()
    for owner, record in records.items():
        expected.add(f"{owner}.json")
        if record.core.path is not None:
            expected.add(os.path.basename(record.core.path))
            with os.fdopen(store.open_core(record), "rb") as file:
                raw = file.read()
            plain = unpacked(raw) if record.core.compression == "zstd" else raw
            assert len(plain) == record.core.size_bytes
            assert plain == content(record.pid, len(plain))
        else:
            assert record.core.reason
    assert names(store) == expected
    return records


def unpacked(raw: bytes) -> bytes:
    """Decompress a frame, which must be there to its end and have the right checksum."""
    frame = zstandard.ZstdDecompressor().decompressobj()
    plain = frame.decompress(raw)
    assert frame.eof
    assert frame.unused_data == b""
    return plain


def content(seed: int, size: int) -> bytes:
    return random.Random(seed).randbytes(size)


# Names, modes, owners.


def test_names_and_modes(tmp_path: Path) -> None:
    before = os.umask(0o077)  # as the receiver has it
    try:
        store = Store(str(tmp_path / "store"))
        plain = keep(store, b"x" * 5000)
        packed = keep(store, b"x" * 5000, compression="zstd")
        entry = store.begin(new_record())
        entry.core = entry.open_core()
        entry.grow(1)
        for name in names(store):
            if name.startswith("."):
                assert os.stat(tmp_path / "store" / name).st_mode & 0o077 == 0 or name.endswith(".json"), name
        entry.record.core = Core(reason="because")
        entry.finish()
    finally:
        os.umask(before)
    assert stat.S_IMODE(os.stat(tmp_path / "store").st_mode) == 0o755
    assert names(store) == {
        f"{plain.id}.json",
        f"{plain.id}.core",
        f"{packed.id}.json",
        f"{packed.id}.core.zst",
        f"{entry.record.id}.json",
    }
    assert plain.core.path == f"{store.path}/{plain.id}.core"
    assert packed.core.path == f"{store.path}/{packed.id}.core.zst"
    for name in names(store):
        found = os.stat(tmp_path / "store" / name)
        assert (stat.S_IMODE(found.st_mode), found.st_uid) == (0o640, os.geteuid()), name
    assert (tmp_path / "store" / f"{plain.id}.core").read_bytes() == b"x" * 5000
    store.close()


def test_a_crash_in_progress_can_be_read_by_root_only_and_then_by_its_group(store: Store, tmp_path: Path) -> None:
    """What recover() makes visible of an interrupted crash has the mode of every record."""
    store.begin(new_record()).close()
    (owner,) = store.recover()
    assert stat.S_IMODE((tmp_path / "store" / f"{owner}.json").stat().st_mode) == 0o640


def wrong_stores(base: Path) -> Iterator[tuple[Path, str]]:
    file = base / "file"
    file.write_text("")
    yield file, "cannot be opened as a directory"
    directory = base / "directory"
    directory.mkdir()
    link = base / "link"
    link.symlink_to(directory)
    yield link, "not a link"
    dangling = base / "dangling"
    dangling.symlink_to(base / "nowhere")
    yield dangling, "not a link"
    writable = base / "writable"
    writable.mkdir()
    writable.chmod(0o775)
    yield writable, "mode 0775, so others could put files there. Run: chown"
    if os.geteuid() == 0:
        foreign = base / "foreign"
        foreign.mkdir()
        os.chown(foreign, 1000, 0)
        yield foreign, "belongs to uid 1000"
    yield file / "below", "cannot be opened as a directory"


def test_a_store_that_others_could_write_is_a_clear_error(tmp_path: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    for path, text in wrong_stores(tmp_path):
        with pytest.raises(StoreError) as caught:
            Store(str(path))
        assert str(path) in str(caught.value)
        assert text in str(caught.value)
    assert len(os.listdir("/proc/self/fd")) == before
    assert not (tmp_path / "nowhere").exists()


@needs_root
def test_the_user_reads_his_own_and_nobody_elses(public: Path) -> None:
    store = Store(str(public / "store"))
    his = keep(store, b"his", readers=1000)
    roots = keep(store, b"root's", readers=None)
    script = "import sys; sys.stdout.write(open(sys.argv[1]).read())"
    for uid, record, allowed in ((1000, his, True), (1001, his, False), (1000, roots, False)):
        for suffix in ("core", "json"):
            done = subprocess.run(
                ["/usr/bin/python3", "-c", script, f"{store.path}/{record.id}.{suffix}"],
                capture_output=True,
                check=False,
                user=uid,
                group=uid,
                extra_groups=[],
            )
            assert (done.returncode == 0) == allowed, (uid, suffix, done.stderr)
    # Neither an owner nor a group: the files stay root's.
    assert (public / "store" / f"{his.id}.core").stat().st_uid == 0
    store.close()


@needs_root
def test_where_there_are_no_acls_only_root_reads(tmp_path: Path) -> None:
    where = tmp_path / "ramfs"
    where.mkdir()
    subprocess.run(["mount", "-t", "ramfs", "core_pipe-tests", str(where)], check=True)
    try:
        store = Store(str(where / "store"))
        record = keep(store, b"core", readers=1000)
        with pytest.raises(OSError, match=r"not supported|No data"):
            os.getxattr(f"{store.path}/{record.id}.core", ACL)
        assert stat.S_IMODE(os.stat(f"{store.path}/{record.id}.core").st_mode) == 0o640
        store.close()
    finally:
        subprocess.run(["umount", "-l", str(where)], check=True)


# Limits.


def test_a_record_without_a_core(store: Store) -> None:
    record = new_record()
    entry = store.begin(record)
    os.write(entry.open_core(), b"what came so far")
    record.core = Core(reason="because", size_bytes=4711)
    entry.finish()
    assert names(store) == {f"{record.id}.json"}
    assert store.load(record.id).core == Core(reason="because", size_bytes=4711)


def test_the_oldest_goes_first_and_its_record_says_so(tmp_path: Path) -> None:
    store = Store(str(tmp_path / "store"), limit=lambda _: 4 * MIB)
    records = [keep(store, content(n, MIB), seconds=n, readers=1000) for n in range(6)]
    assert store.used() <= 4 * MIB
    found = {owner: record for owner, record in store.records() if record is not None}
    states = [found[record.id].core.state for record in records]
    assert states == sorted(states)  # "none" before "stored"
    assert states[-1] == "stored"
    assert states[0] == "none"
    evicted = found[records[0].id]
    assert evicted.core.reason == "evicted: newer cores needed its room (store_max)"
    assert evicted.core.size_bytes == MIB
    assert evicted.core.path is None
    assert evicted.comm == "test"
    # Who could read the record still can.
    assert os.getxattr(f"{store.path}/{evicted.id}.json", ACL)
    store.close()


def test_no_more_is_evicted_than_the_new_core_needs(tmp_path: Path) -> None:
    """Room is given in steps of 8 MiB for speed; old cores do not pay for that."""
    store = Store(str(tmp_path / "store"), limit=lambda _: 10 * MIB)
    for n in range(10):
        keep(store, content(n, MIB - 8192), seconds=n)
    assert len([name for name in names(store) if name.endswith(".core")]) == 10
    keep(store, content(11, 300 << 10), seconds=11)
    assert len([name for name in names(store) if name.endswith(".core")]) == 10
    store.close()


def test_nothing_is_evicted_in_vain(tmp_path: Path) -> None:
    store = Store(str(tmp_path / "store"), limit=lambda _: 10 * MIB)
    old = keep(store, content(1, MIB))
    for size in (10 * MIB + 1, 1 << 50):
        entry = store.begin(new_record(1))
        with pytest.raises(NoRoom, match="more than the store may hold in all"):
            entry.grow(size)
        entry.record.core = Core(reason="no room")
        entry.finish()
    # Another worker has nine, so two cannot be had by any eviction.
    other = store.begin(new_record(2))
    other.grow(9 * MIB)
    entry = store.begin(new_record(3))
    with pytest.raises(NoRoom, match="cores being written"):
        entry.grow(2 * MIB)
    assert store.load(old.id).core.state == "stored"
    other.close()
    entry.close()
    store.close()


WRITER = """
import random, sys
from tests.test_store import keep, new_record, content, Store
seed, path, limit, count = int(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
store = Store(path, limit=lambda _: limit)
chance = random.Random(seed)
for n in range(count):
    keep(store, content(seed, chance.randrange(1, 3 << 20)), record=new_record(n, pid=seed))
"""


def on_disk(store: Store) -> int:
    total = 0
    for name in store.names():
        if ".core" in name:
            total += os.stat(name, dir_fd=store.directory).st_blocks * 512
    return total


def test_the_total_holds_at_every_moment(tmp_path: Path) -> None:
    """Several writers, one limit: neither what is on disk nor what is promised is ever more."""
    limit = 6 * MIB + 12345
    store = Store(str(tmp_path / "store"), limit=lambda _: limit)
    writers = [
        subprocess.Popen([sys.executable, "-c", WRITER, str(seed), store.path, str(limit), "12"]) for seed in range(4)
    ]
    most = samples = 0
    try:
        while any(writer.poll() is None for writer in writers):
            with store.locked():
                promised, stored = store.used(), on_disk(store)
            assert promised <= limit
            assert stored <= limit
            most = max(most, stored)
            samples += 1
    finally:
        for writer in writers:
            writer.kill()
            writer.wait()
    assert [writer.returncode for writer in writers] == [0] * 4
    assert most > limit // 2, f"{samples} samples saw little"
    store.recover()
    records = check_whole(store, set())
    assert len(records) == 48
    assert {record.core.state for record in records.values()} == {"none", "stored"}
    store.close()


@needs_root
def test_free_space_is_left_at_every_moment(small_disk: Path) -> None:
    keep_free = 4 * MIB
    path = str(small_disk / "store")
    stores = [Store(path, keep_free=lambda _: keep_free) for _ in range(3)]

    def free() -> int:
        found = os.statvfs(path)
        return found.f_bavail * found.f_frsize

    for n in range(6):
        # Three workers at once, taking turns, for 18 MiB in all.
        entries = [store.begin(new_record(n, pid=index)) for index, store in enumerate(stores)]
        sinks: list[PlainSink] = [PlainSink(entry) for entry in entries]
        refused = set()
        for _ in range(24):
            for index, sink in enumerate(sinks):
                if index not in refused:
                    try:
                        sink.write(memoryview(content(index, 256 << 10)))
                    except NoRoom as error:
                        assert "keep_free" in str(error)
                        refused.add(index)
                assert free() >= keep_free
        for index, entry in enumerate(entries):
            sinks[index].finish()
            entry.record.core = Core(state="stored", size_bytes=sinks[index].position, compression="none")
            if index in refused:
                entry.record.core = Core(reason="refused")
            entry.finish()
            # Records have their own few blocks.
            assert free() >= keep_free - MIB
    found = [record for _, record in stores[0].records() if record is not None]
    assert len(found) == 18
    assert "evicted: newer cores needed its room (keep_free)" in {record.core.reason for record in found}
    for store in stores:
        store.close()


@needs_root
def test_others_filled_the_disk(small_disk: Path) -> None:
    """Then no core goes for a new one that cannot be kept anyway."""
    store = Store(str(small_disk / "store"), keep_free=lambda _: 8 * MIB)
    old = keep(store, content(1, MIB))
    (small_disk / "others").write_bytes(bytes(8 * MIB))
    entry = store.begin(new_record(1))
    with pytest.raises(NoRoom, match=r"has to keep 8388608 bytes free \(keep_free\)"):
        entry.grow(1)
    entry.record.core = Core(reason="no room")
    entry.finish()
    assert store.load(old.id).core.state == "stored"
    store.close()


# A worker that is killed.


def work(store: Store, said: int, chance: random.Random) -> None:
    """Keep crashes one after the other, and say each one's id as soon as it has been begun."""
    for n in range(1000):
        record = new_record(n, pid=chance.randrange(1, 1 << 20))
        data = content(record.pid, chance.choice((0, 1, 4096, 100_000, 700_000)))
        entry = store.begin(record)
        os.write(said, f"{record.id}\n".encode())
        sink = ZstdSink(entry, 1) if chance.random() < 0.7 else PlainSink(entry)
        for at in range(0, len(data), 65536):
            sink.write(memoryview(data)[at : at + 65536])
        sink.finish()
        compression = "zstd" if isinstance(sink, ZstdSink) else "none"
        record.core = Core(state="stored", size_bytes=len(data), compression=compression)
        if chance.random() < 0.2:
            record.core = Core(reason="it was not to be")
        entry.finish(readers=1000)


def test_killed_at_any_time(tmp_path: Path) -> None:
    """60 workers, killed after a random time: whatever they had begun has a record, and every core is whole."""
    begun: set[str] = set()
    for seed in range(60):
        store = Store(str(tmp_path / "store"), limit=lambda _: 3 * MIB)
        read, write = os.pipe()
        pid = os.fork()
        if pid == 0:
            try:
                work(Store(str(tmp_path / "store"), limit=lambda _: 3 * MIB), write, random.Random(seed))
            finally:
                os._exit(1)
        os.close(write)
        # Not a wait for something: a random moment of its life. It is alive: it has begun its first.
        first = os.read(read, 30)
        select.select([], [], [], random.Random(seed).random() * 0.03)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        with os.fdopen(read, "rb") as file:
            begun.update((first + file.read()).decode().split())
        store.recover()
        check_whole(store, begun)
        assert store.used() <= 3 * MIB
        store.close()
    assert len(begun) > 60


class Mortal:
    """Kills its own process just before the Nth audited call (open, rename, link, unlink, flock, ... ) on the store."""

    def __init__(self, deaths: int) -> None:
        self.left = deaths
        sys.addaudithook(self.hook)

    def hook(self, event: str, _arguments: tuple[Any, ...]) -> None:
        if event.startswith(("os.", "open", "fcntl.")):
            self.left -= 1
            if self.left == 0:
                os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("compression", ["zstd", "none"])
def test_killed_before_each_of_its_calls(tmp_path: Path, compression: str) -> None:
    """Every state that the store can be left in, one after the other, an eviction included."""
    deaths = 0
    states = []
    while True:
        deaths += 1
        path = tmp_path / str(deaths)
        store = Store(str(path), limit=lambda _: MIB)
        old = keep(store, content(7, 700_000), seconds=0, readers=1000)
        record = new_record(1, pid=8)
        read, write = os.pipe()

        def run(path: Path = path, record: Record = record, write: int = write, deaths: int = deaths) -> None:
            store = Store(str(path), limit=lambda _: MIB)
            Mortal(deaths)
            entry = store.begin(record)
            os.write(write, b"begun")
            sink = PlainSink(entry) if compression == "none" else ZstdSink(entry, 1)
            sink.write(memoryview(content(8, 600_000)))
            sink.finish()
            record.core = Core(state="stored", size_bytes=600_000, compression=compression)
            entry.finish(readers=1000)

        status = in_child(run)
        os.close(write)
        with os.fdopen(read, "rb") as file:
            begun = {record.id} if file.read() else set()
        store.recover()
        found = check_whole(store, begun | {old.id})
        # Who could read the record still can.
        assert os.getxattr(f"{store.path}/{old.id}.json", ACL)
        assert store.recover() == []
        store.close()
        if record.id in found:
            states.append(found[record.id].core.state)
        if status == 0:
            break
        assert os.WTERMSIG(status) == signal.SIGKILL
    assert deaths > 25, "the worker makes more calls than that"
    # From one call on, which lets the crashed process go, the core is kept whatever happens to the worker.
    assert states == sorted(states)
    assert states[0] == "none"
    assert states.count("stored") > 5
    assert found[old.id].core.state == "none"


def test_a_core_that_cannot_be_shown_leaves_a_record(store: Store) -> None:
    entry = store.begin(new_record())
    os.write(entry.open_core(), b"core")
    entry.record.core = Core(state="stored", size_bytes=4, compression="none")
    entry.seal()
    taken = Path(store.path, f"{entry.record.id}.core")
    taken.write_text("prepared")
    with pytest.raises(FileExistsError):
        entry.finish()
    entry.record.core = Core(reason="it cannot be shown")
    entry.finish()
    assert store.load(entry.record.id).core.reason == "it cannot be shown"
    assert names(store) == {f"{entry.record.id}.json", taken.name}
    assert taken.read_text() == "prepared"


def test_a_sealed_core_that_the_disk_has_lost(store: Store) -> None:
    """Sealed without a sync: after a power cut the record may be there and the core's bytes not."""
    entry = store.begin(new_record())
    os.write(entry.open_core(), b"core")
    entry.record.core = Core(state="stored", size_bytes=4, compression="none")
    entry.seal()
    entry.close()
    os.truncate(f"{store.path}/.{entry.record.id}.core", 3)
    assert store.recover() == [entry.record.id]
    assert check_whole(store, {entry.record.id})[entry.record.id].core.state == "none"


def test_two_recover_at_once(store: Store) -> None:
    left = set()
    for n in range(20):
        entry = store.begin(new_record(n))
        os.write(entry.open_core(), b"half")
        left.add(entry.record.id)
        entry.close()
    results = []
    for _ in range(2):
        read, write = os.pipe()
        pid = os.fork()
        if pid == 0:
            own = Store(store.path)
            os.write(write, json.dumps(own.recover()).encode())
            os._exit(0)
        os.close(write)
        results.append((pid, read))
    found: list[str] = []
    for pid, read in results:
        with os.fdopen(read, "rb") as file:
            found += json.loads(file.read())
        assert os.waitpid(pid, 0)[1] == 0
    assert sorted(found) == sorted(left)
    records = check_whole(store, left)
    assert {str(record.core.reason) for record in records.values()} == {
        "interrupted: the receiver ended before the core was complete"
    }


def test_who_still_writes_is_left_alone(store: Store) -> None:
    entry = store.begin(new_record())
    os.write(entry.open_core(), b"half")
    before = names(store)
    assert in_child(lambda: Store(store.path).recover()) == 0
    assert names(store) == before
    entry.record.core = Core(state="stored", size_bytes=4, compression="none")
    entry.finish()
    assert store.load(entry.record.id).core.state == "stored"


def test_the_lock_is_not_waited_for_for_ever(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("receiver.store.LOCK_SECONDS", 0.05)
    other = Store(store.path)
    with other.locked(), pytest.raises(StoreError, match="lslocks"):
        store.begin(new_record())
    store.begin(new_record()).close()
    other.close()


@contextmanager
def busy(store: Store, seconds: float) -> Iterator[None]:
    """Hold the store's lock from now on, for so long at the most."""
    fd = os.open(f"{store.path}/.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    fcntl.flock(fd, fcntl.LOCK_EX)
    timer = threading.Timer(seconds, os.close, (fd,))
    timer.start()
    try:
        yield
    finally:
        timer.join()


def test_who_has_a_core_waits_longer_for_the_lock(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """No other receiver will take it any more."""
    monkeypatch.setattr("receiver.store.LOCK_SECONDS", 0.05)
    entry = store.begin(new_record())
    with busy(store, 0.4):
        with pytest.raises(StoreError, match=r"for 0\.05 s"):
            store.begin(new_record(1))
        entry.grow(4)
    write_all(entry.open_core(), b"core")
    entry.record.core = Core(state="stored", size_bytes=4, compression="none")
    for wait in (entry.seal, entry.finish, lambda: entry.relieve(1 << 50)):
        with busy(store, 0.3):
            wait()
    assert store.load(entry.record.id).core.state == "stored"
    # And so do those who write the history.
    store.patient = True
    with busy(store, 0.3), store.locked():
        pass


def test_nobody_waits_for_the_disk_under_the_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes as long as there is to write, and the others have seconds."""
    store = Store(str(tmp_path / "store"), limit=lambda _: 3 * MIB)
    synced: list[str] = []
    fsync = os.fsync

    def watched(fd: int) -> None:
        name = os.path.basename(os.readlink(f"/proc/self/fd/{fd}"))
        lock = os.open(f"{store.path}/.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            pytest.fail(f"{name} is synced under the lock")
        finally:
            os.close(lock)
        synced.append(name)
        fsync(fd)

    monkeypatch.setattr(os, "fsync", watched)
    old = [keep(store, content(n, MIB), seconds=n) for n in range(3)]
    assert synced[:3] == [f".{old[0].id}.core", f".{old[0].id}.final", "store"]
    synced.clear()
    new = keep(store, content(9, 2 * MIB), seconds=9)
    # Those that say that their cores have gone come last of all.
    assert synced[:2] == [f".{new.id}.core", f".{new.id}.final"]
    assert sorted(synced[2:]) == sorted([f"{old[0].id}.json", f"{old[1].id}.json", "store"])
    entry = store.begin(new_record(10))
    write_all(entry.open_core(), b"core")
    entry.record.core = Core(state="stored", size_bytes=4, compression="none")
    entry.seal()
    entry.close()
    synced.clear()
    assert store.recover() == [entry.record.id]
    assert synced == [f".{entry.record.id}.core", f".{entry.record.id}.final", "store"]
    synced.clear()
    added = new_record(11)
    store.add_record(added)
    assert synced == [f"{added.id}.json", "store"]
    assert len(store.prune()) == 3
    store.close()


def test_a_disk_that_is_full_when_a_core_is_synced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(str(tmp_path / "store"))
    old = keep(store, b"old")
    fsync, failures = os.fsync, [errno.EDQUOT]

    def fails(fd: int) -> None:
        if failures:
            raise OSError(failures.pop(), "no room")
        fsync(fd)

    monkeypatch.setattr(os, "fsync", fails)
    assert store.load(keep(store, b"new", seconds=1).id).core.state == "stored"
    assert store.load(old.id).core.reason == "evicted: the file system or its quota was full"
    store.close()


def test_what_a_killed_worker_had_sealed_gives_its_room_back(tmp_path: Path) -> None:
    """It is not shown to whom it stands in the way: that would have to wait for the disk."""
    store = Store(str(tmp_path / "store"), limit=lambda _: 4 * MIB)
    entry = store.begin(new_record())
    entry.grow(3 * MIB)
    write_all(entry.open_core(), content(7, 4096))
    entry.record.core = Core(state="stored", size_bytes=4096, compression="none")
    entry.seal()
    entry.close()
    assert keep(store, content(8, 2 * MIB), seconds=1).core.state == "stored"
    assert names(store) >= {f".{entry.record.id}.core", f".{entry.record.id}.final"}
    assert store.recover() == [entry.record.id]
    assert store.load(entry.record.id).core.state == "stored"
    store.close()


class FakeChannel:
    """A forwarder that hands over a core."""

    def __init__(self, core: bytes, *, refuses: bool = False) -> None:
        self.core = core
        self.refuses = refuses
        self.sent: list[bytes] = []

    def send(self, kind: bytes, _fields: dict[str, bytes], _deadline: float) -> None:
        if self.refuses:
            raise BrokenPipeError(errno.EPIPE, "gone")
        self.sent.append(kind)

    def receive(self, _deadline: float) -> FakeChannel:
        return self

    kind = protocol.CORE
    fields = {"descriptors": b"core"}  # noqa: RUF012

    def take(self) -> list[int]:
        read, write = os.pipe()
        write_all(write, self.core)
        os.close(write)
        return [read]


def serve(store: Store, channel: FakeChannel, *, core_limit: int = UNLIMITED) -> Record:
    """Keep a crash with the worker's own code."""
    offered = worker.Offered(new_record(), core_limit, time.monotonic())
    found = worker._keep(cast("Channel", channel), Config(store=store.path), store, offered, time.monotonic())
    assert found is not None
    return found


def elf_core() -> bytes:
    from tests.support import elf

    return elf.core(elf.prstatus(1, pc=1, sp=0x7000_0000_0000), [elf.Load(0x7000_0000_0000, content(1, 8192))])


def test_a_sealed_core_outlives_a_lock_that_stays_busy(
    store: Store, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("receiver.store.LOCK_SECONDS", 0.05)
    monkeypatch.setattr("receiver.store.PATIENT_SECONDS", 0.05)
    tell = worker._tell

    def told(*arguments: Any) -> None:
        tell(*arguments)
        stack.__enter__()

    stack = busy(store, 1.0)
    monkeypatch.setattr(worker, "_tell", told)
    record = serve(store, FakeChannel(elf_core()))
    stack.__exit__(None, None, None)
    assert names(store) >= {f".{record.id}.core", f".{record.id}.final"}
    assert "could not be finished" in capfd.readouterr().err
    assert store.recover() == [record.id]
    assert store.load(record.id).core.state == "stored"
    os.close(store.open_core(record))


def test_a_sealed_core_whose_name_is_taken_leaves_a_record(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody could ever show it."""
    tell = worker._tell

    def told(channel: Channel, record: Record, config: Config) -> None:
        tell(channel, record, config)
        Path(str(record.core.path)).write_text("prepared")

    monkeypatch.setattr(worker, "_tell", told)
    record = serve(store, FakeChannel(elf_core()))
    assert "could not be kept" in str(store.load(record.id).core.reason)
    assert names(store) - BOOKS == {f"{record.id}.json", f"{record.id}.core.zst"}


def test_a_sealed_record_says_why_though_nobody_hears_it(store: Store) -> None:
    record = serve(store, FakeChannel(b"", refuses=True), core_limit=0)
    assert store.load(record.id).core.reason == "the soft core limit (ulimit -c) of the process is 0"


def test_a_core_that_is_given_up_after_it_was_sealed(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever happens then, no record says that it is stored."""
    for failing in ("lock", "write"):
        entry = store.begin(new_record())
        write_all(entry.open_core(), b"core")
        entry.record.core = Core(state="stored", size_bytes=4, compression="none")
        entry.seal()
        entry.record.core = Core(reason="given up")
        with monkeypatch.context() as patch:
            if failing == "write":
                patch.setattr(store, "_write", lambda *_, **__: os.stat("/nonexistent"))
            else:
                patch.setattr("receiver.store.PATIENT_SECONDS", 0.05)
                patch.setattr("receiver.store.LOCK_SECONDS", 0.05)
            with busy(store, 0.3 if failing == "lock" else 0), pytest.raises((OSError, StoreError)):
                entry.finish()
        entry.close()
        assert store.recover() == [entry.record.id]
        found = json.loads(Path(store.path, f"{entry.record.id}.json").read_bytes())
        # Without the lock it was not given up.
        assert found["core"]["state"] == ("stored" if failing == "lock" else "none")
        assert (f"{entry.record.id}.core" in names(store)) == (failing == "lock")


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EFBIG])
def test_a_promise_that_cannot_be_written_can_be_asked_for_again(
    store: Store, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    old = keep(store, b"old")
    entry = store.begin(new_record(1))
    ftruncate, failures = os.ftruncate, [number]

    def fails(fd: int, size: int) -> None:
        if failures and os.readlink(f"/proc/self/fd/{fd}").endswith(".room"):
            raise OSError(failures.pop(), os.strerror(number))
        ftruncate(fd, size)

    monkeypatch.setattr(os, "ftruncate", fails)
    if number == errno.ENOSPC:
        # An old core goes for it.
        entry.grow(4096)
        assert store.load(old.id).core.reason == "evicted: the file system or its quota was full"
    else:
        with pytest.raises(NoRoom):
            entry.grow(4096)
        assert store.load(old.id).core.state == "stored"
        store.prune()
        entry.grow(4096)
    failures.append(number)
    with pytest.raises(NoRoom):
        entry.grow(100 * MIB)
    # What was promised before still is.
    assert f".{entry.record.id}.room" in names(store)
    entry.grow(100 * MIB)
    entry.record.core = Core(reason="no core")
    entry.finish()


# What stands in the way, and what others wrote (H12).


@pytest.mark.parametrize("kind", ["link", "dangling", "hardlink", "fifo", "directory", "file"])
@pytest.mark.parametrize(
    "name",
    [
        ".{}.json",
        ".{}.core",
        ".{}.room",
        ".{}.hold",
        ".{}.final",
        ".{}.final.new",
        ".{}.json.new",
        "{}.json",
        "{}.core",
        "{}.json.new",
        ".lock",
    ],
)
def test_names_that_are_taken(tmp_path: Path, name: str, kind: str) -> None:
    """Neither followed, nor waited for, nor believed; and the other crashes in the store do not suffer."""
    precious = tmp_path / "precious"
    precious.write_text("precious")
    store = Store(str(tmp_path / "store"))
    record = new_record()
    before = store.begin(new_record(-1, pid=1))
    after = store.begin(new_record(+1, pid=1))
    before.close()
    after.close()
    if name == ".lock":
        os.unlink(f"{store.path}/.lock")
    path = Path(store.path, name.format(record.id))
    if kind == "link":
        path.symlink_to(precious)
    elif kind == "dangling":
        path.symlink_to(tmp_path / "new")
    elif kind == "hardlink":
        os.link(precious, path)
    elif kind == "fifo":
        os.mkfifo(path)
    elif kind == "directory":
        path.mkdir()
    else:
        path.write_text("prepared")
    status = in_child(lambda: keep(Store(store.path), b"secret", record=record), timeout=10)
    assert not os.WIFSIGNALED(status)
    if name != ".lock" or kind in ("fifo", "file", "hardlink"):
        in_child(lambda: Store(store.path).recover(), timeout=10)
        for owner in (before.record.id, after.record.id):
            assert store.load(owner).core.reason is not None
    assert precious.read_text() == "precious"
    assert not (tmp_path / "new").exists()
    if status == 0:
        assert store.load(record.id).core.state == "stored"
        with os.fdopen(store.open_core(record), "rb") as file:
            assert file.read() == b"secret"
    store.close()


def test_a_store_of_a_newer_version(store: Store) -> None:
    record = keep(store, content(7, 5000))
    path = Path(store.path, f"{record.id}.json")
    found = json.loads(path.read_text())
    found |= {"version": 99, "stack": ["main"], "core": found["core"] | {"sealed": True}}
    path.write_text(json.dumps(found))
    check_whole(store, {record.id})
    assert store.load(record.id).version == 99


GARBAGE = [
    b"",
    b"{",
    b"[]",
    b"null",
    b"{}",
    b"\xff\xfe",
    b"[" * 100_000,
    b'{"id": 1}',
    b"1" * 5000,
    bytes(2 << 20),
]
WRONG_TYPES: list[tuple[str, Any]] = [
    ("id", "../../etc/passwd"),
    ("id", "20231114T221320-000000-7-00000000"),
    ("timestamp", 3),
    ("pid", "7"),
    ("comm", None),
    ("exe", ["x"]),
    ("command_line", "x"),
    ("command_line", [1]),
    ("environment", ["x"]),
    ("environment", {"x": 1}),
    ("tried", "abc"),
    ("tried", None),
    ("groups", ["x"]),
    ("seconds", "x"),
    ("core", {"path": 1}),
    ("core", {"size_bytes": "1"}),
    ("core", []),
]


@pytest.mark.parametrize("data", GARBAGE, ids=lambda data: repr(data[:10]))
def test_garbage_is_no_record_and_stops_nothing(store: Store, data: bytes) -> None:
    good = keep(store, content(7, 5000))
    bad = new_record(1)
    Path(store.path, f"{bad.id}.json").write_bytes(data)
    Path(store.path, "notes.json").write_bytes(data)
    assert {owner: found is not None for owner, found in store.records()} == {
        good.id: True,
        bad.id: False,
        "notes": False,
    }
    with pytest.raises(ValueError, match=r"."):
        store.load(bad.id)


def test_a_record_that_is_too_long_is_garbage(store: Store) -> None:
    record = keep(store, b"x")
    path = Path(store.path, f"{record.id}.json")
    path.write_bytes(path.read_bytes().ljust(MAX_RECORD))
    assert dict(store.records())[record.id] is not None
    path.write_bytes(path.read_bytes() + b" ")
    assert dict(store.records()) == {record.id: None}


@pytest.mark.parametrize(("key", "value"), WRONG_TYPES)
def test_a_record_with_a_wrong_type_is_garbage(store: Store, key: str, value: object) -> None:
    record = keep(store, b"x")
    path = Path(store.path, f"{record.id}.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    assert dict(store.records()) == {record.id: None}


def test_a_directory_with_the_name_of_a_record_leaks_no_descriptor(store: Store) -> None:
    Path(store.path, "a.json").mkdir()
    before = len(os.listdir("/proc/self/fd"))
    assert dict(store.records()) == {"a": None}
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize("data", [*GARBAGE, b"unknown compression"], ids=lambda data: repr(data[:10]))
@pytest.mark.parametrize("which", ["final", "json"])
def test_garbage_that_was_left_over_does_not_stop_the_recovery(store: Store, data: bytes, which: str) -> None:
    entries = [store.begin(new_record(n)) for n in range(3)]
    for entry in entries:
        os.write(entry.open_core(), b"half")
        entry.close()
    owners = [entry.record.id for entry in entries]
    if data == b"unknown compression":
        found = entries[1].record
        found.core = Core(state="stored", path=f"{store.path}/{found.id}.core.xz", compression="xz", file_bytes=4)
        data = found.dumps()
    Path(store.path, f".{owners[1]}.{which}").write_bytes(data)
    store.recover()
    whole = {owners[0], owners[2]} | ({owners[1]} if which == "final" else set())
    records = check_whole(store, whole)
    assert {record.core.state for record in records.values()} == {"none"}


def test_a_core_that_was_removed_by_hand(store: Store) -> None:
    record = keep(store, content(7, 5000))
    os.unlink(str(record.core.path))
    found = store.load(record.id)
    assert (found.core.state, found.core.path, found.core.size_bytes) == ("none", None, 5000)
    assert found.core.reason == "its file is not in the store any more"


def test_eviction_of_a_core_whose_record_is_gone(tmp_path: Path) -> None:
    store = Store(str(tmp_path / "store"), limit=lambda _: MIB)
    old = keep(store, content(1, 700_000))
    os.unlink(f"{store.path}/{old.id}.json")
    new = keep(store, content(2, 700_000), seconds=1)
    assert names(store) == {f"{new.id}.json", f"{new.id}.core"}
    store.close()


def test_a_core_that_goes_is_free_though_somebody_reads_it(tmp_path: Path) -> None:
    """Its user may read it, and whoever has it open would keep its blocks where nobody counts them."""
    store = Store(str(tmp_path / "store"), limits=Limits(store_max=lambda _: MIB, records_max=2))
    goes: list[Callable[[], object]] = [
        lambda: keep(store, content(8, 700_000), seconds=1),
        store.prune,
        # The number of records.
        lambda: [keep(store, b"x", seconds=n) for n in range(5, 8)],
    ]
    for go in goes:
        old = keep(store, content(7, 700_000))
        with os.fdopen(store.open_core(old), "rb") as file:
            assert os.fstat(file.fileno()).st_blocks
            go()
            assert f"{old.id}.core" not in names(store)
            assert os.fstat(file.fileno()).st_blocks == 0
            assert file.read() == b""
    # Sealed, so that its user may read it, and then not to be shown.
    entry = store.begin(new_record(9))
    write_all(entry.open_core(), b"core")
    entry.record.core = Core(state="stored", size_bytes=4, compression="none")
    entry.seal()
    with open(f"{store.path}/.{entry.record.id}.core", "rb") as file:
        entry.record.core = Core(reason="given up")
        entry.finish()
        assert file.read() == b""
    store.close()


def test_a_core_that_root_has_linked_elsewhere_stays_there(tmp_path: Path) -> None:
    store = Store(str(tmp_path / "store"), limit=lambda _: MIB)
    old = keep(store, content(7, 700_000))
    os.link(str(old.core.path), tmp_path / "mine")
    keep(store, content(8, 700_000), seconds=1)
    assert store.load(old.id).core.state == "none"
    assert (tmp_path / "mine").read_bytes() == content(7, 700_000)
    store.close()
