"""The core as a stream: what is stored is what came, with bounded memory, whatever its headers say."""

from __future__ import annotations

import os
import random
import resource
import select
import signal
import socket
import struct
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from receiver import elfcore
from receiver.capture import BLOCK, PAGE, PlainSink, Reader, Sink, Stalled, TooLarge, ZstdSink, write_sparse
from receiver.record import Core, Record
from receiver.store import Store, write_all
from tests.support import machine, processes
from tests.support.containers import PlainContainer
from tests.support.crash import crash
from tests.support.fake_forwarder import FakeForwarder, feed
from tests.support.receivers import SOCKET, dump, resident, wait_for_records
from tests.support.waiting import wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator

MIB = 1 << 20
NO_FIXTURE_RESET = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=60)

# Streams as cores are: runs of zeros and of other bytes, of sizes around those that matter.
_sizes = st.one_of(
    st.sampled_from([0, 1, PAGE - 1, PAGE, PAGE + 1, 3 * PAGE, BLOCK - 1, BLOCK, BLOCK + 1]), st.integers(0, 20_000)
)
_pieces = st.tuples(st.sampled_from(["zero", "random", "one"]), _sizes, st.integers(0, 1000))


def _bytes_of(pieces: list[tuple[str, int, int]]) -> bytes:
    made = {"zero": bytes, "one": lambda size: b"\1" * size}
    return b"".join(
        made[kind](size) if kind in made else random.Random(seed).randbytes(size) for kind, size, seed in pieces
    )


STREAMS = st.lists(_pieces, max_size=6).map(_bytes_of)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    found = Store(str(tmp_path / "store"))
    yield found
    found.close()


def new_record() -> Record:
    return Record.of_numbers(
        pid=1, tid=1, uid=1, gid=1, signal=11, time=0, comm=b"test", core_limit=1 << 40, dumpable=1
    )


def reader_of(data: bytes, *, step: int | None = None) -> tuple[Reader, threading.Thread, int]:
    """A reader of a pipe into which a thread writes the data; also the thread and the read end."""
    read, write = os.pipe()

    def fill() -> None:
        try:
            for at in range(0, len(data), step or max(1, len(data))):
                feed(write, data[at : at + (step or len(data))])
        except (BrokenPipeError, TimeoutError):
            pass
        finally:
            os.close(write)

    thread = threading.Thread(target=fill)
    thread.start()
    return Reader(read, 20), thread, read


def captured(store: Store, data: bytes, compression: str, *, step: int | None = None) -> tuple[bytes, int]:
    """Send a stream through reader and sink; returns what is in the store, plain, and its bytes on disk."""
    entry = store.begin(new_record())
    sink: Sink = PlainSink(entry) if compression == "none" else ZstdSink(entry, 1)
    reader, thread, read = reader_of(data, step=step)
    reader.begin(None)
    reader.copy(sink, None)
    thread.join()
    os.close(read)
    assert reader.size == len(data)
    entry.record.core = Core(state="stored", size_bytes=reader.size, compression=compression)
    entry.finish()
    with os.fdopen(store.open_core(entry.record), "rb") as file:
        raw = file.read()
        disk = os.fstat(file.fileno()).st_blocks * 512
    return (zstandard.ZstdDecompressor().decompressobj().decompress(raw) if compression == "zstd" else raw), disk


# What is stored is what came.


@pytest.mark.parametrize("compression", ["zstd", "none"])
@NO_FIXTURE_RESET
@given(data=STREAMS)
def test_the_same_bytes_come_back(store: Store, compression: str, data: bytes) -> None:
    plain, _ = captured(store, data, compression)
    assert plain == data


@pytest.mark.parametrize("compression", ["zstd", "none"])
def test_a_stream_in_small_pieces(store: Store, compression: str) -> None:
    data = _bytes_of([("random", 50_000, 1), ("zero", 200_000, 0), ("random", 70_001, 2)])
    plain, _ = captured(store, data, compression, step=1009)
    assert plain == data


@pytest.mark.parametrize("compression", ["zstd", "none"])
def test_zeros_take_no_room(store: Store, compression: str) -> None:
    data = random.Random(1).randbytes(PAGE) + bytes(64 * MIB) + random.Random(2).randbytes(PAGE)
    plain, disk = captured(store, data, compression)
    assert plain == data
    assert disk < 100_000


@settings(deadline=None, max_examples=60)
@given(data=STREAMS, start=st.sampled_from([0, PAGE, 3 * PAGE, 100]))
def test_holes_are_where_the_zeros_are(data: bytes, start: int) -> None:
    data = data[: 1 << 20]  # at most, as its callers do
    fd = os.memfd_create("core")
    asked: list[int] = []
    written = write_sparse(fd, memoryview(data), start, before=asked.append)
    os.ftruncate(fd, start + len(data))
    assert os.pread(fd, start + len(data), 0) == bytes(start) + data
    pages = [data[at : at + PAGE] for at in range(0, len(data), PAGE)]
    assert written == sum(len(page) for page in pages if any(page))
    # Room was asked for before each write, for as much as then was written.
    assert asked == sorted(asked)
    assert (asked or [0])[-1] == written
    os.close(fd)


def test_room_is_asked_for_before_it_is_used() -> None:
    fd = os.memfd_create("core")

    def refuse(size: int) -> None:
        if size > 2 * PAGE:
            raise TooLarge("no")

    data = b"".join([b"x" * PAGE, bytes(PAGE)] * 5)
    with pytest.raises(TooLarge):
        write_sparse(fd, memoryview(data), 0, before=refuse)
    assert os.fstat(fd).st_size == 3 * PAGE
    os.close(fd)


def test_short_writes() -> None:
    """H19: a signal cuts a write(2) that waits; write_all must not stop there, nor begin again."""
    data = random.Random(1).randbytes(300_001)
    ours, theirs = socket.socketpair()
    ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    main = threading.get_ident()
    got: list[bytes] = []
    sizes: list[int] = []
    real = os.write

    def counted(fd: int, block: memoryview) -> int:
        """Each write is the kernel's own, short or not."""
        sizes.append(real(fd, block))
        return sizes[-1]

    def knock_and_read() -> None:
        # Nobody reads until the first write has ended, so it can only end short.
        while not sizes:
            signal.pthread_kill(main, signal.SIGUSR1)
            select.select([], [], [], 0.001)
        while block := theirs.recv(65536):
            got.append(block)

    before = signal.signal(signal.SIGUSR1, lambda _number, _frame: None)
    thread = threading.Thread(target=knock_and_read)
    try:
        thread.start()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(os, "write", counted)
            write_all(ours.fileno(), data)
    finally:
        ours.close()
        thread.join(20)
        signal.signal(signal.SIGUSR1, before)
        theirs.close()
    assert 0 < sizes[0] < len(data)
    assert b"".join(got) == data


def test_a_file_that_takes_less_than_all(tmp_path: Path) -> None:
    """The first write(2) over a file-size limit is short, and only the next one fails."""
    fd = os.open(tmp_path / "core", os.O_WRONLY | os.O_CREAT)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, before[1]))  # Python ignores SIGXFSZ
    try:
        with pytest.raises(OSError, match="File too large"):
            write_all(fd, b"x" * 20_000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert os.fstat(fd).st_size == 10_000
    os.close(fd)


# The head.


def elf64(segments: list[tuple[int, int]], *, count: int | None = None, sections: int = 0, kind: int = 4) -> bytes:
    number = len(segments) if count is None else count
    head = b"\x7fELF\2\1\1".ljust(16, b"\0")
    head += struct.pack("<HHIQQQIHHHHHH", kind, 62, 1, 0, 64, sections, 0, 64, 56, number, 64, 0, 0)
    return head + b"".join(struct.pack("<IIQQQQQQ", 1, 4, at, 0, 0, size, size, 0x1000) for at, size in segments)


def elf32(segments: list[tuple[int, int]], *, count: int | None = None, sections: int = 0) -> bytes:
    number = len(segments) if count is None else count
    head = b"\x7fELF\1\1\1".ljust(16, b"\0")
    head += struct.pack("<HHIIIIIHHHHHH", 4, 3, 1, 0, 52, sections, 0, 52, 32, number, 40, 0, 0)
    return head + b"".join(struct.pack("<IIIIIIII", 1, at, 0, 0, size, size, 4, 0x1000) for at, size in segments)


@pytest.mark.parametrize("elf", [elf64, elf32])
def test_heads_by_construction(elf: Any) -> None:
    head = elf([(0x1000, 100), (0x2000, 0x500), (0x3000, 0)])
    padded = head.ljust(64, b"\0")
    assert elfcore.head_size(padded[:64]) == len(head)
    assert elfcore.whole_size(head) == 0x3000
    assert elfcore.whole_size(head + b"more") == 0x3000
    with pytest.raises(elfcore.NotACore, match="cut"):
        elfcore.whole_size(head[:-1])
    # No segments, and segments that say nothing: the head itself.
    assert elfcore.whole_size(elf([]).ljust(64, b"\0")) in (52, 64)
    # More than the header's 16 bits can count: one section header stands at the file's end.
    many = elf([], count=elfcore.PN_XNUM, sections=0x12345000).ljust(64, b"\0")
    assert elfcore.head_size(many[:64]) <= 64
    assert elfcore.whole_size(many) == 0x12345000 + (64 if elf is elf64 else 40)


def test_what_is_no_core() -> None:
    for start in (b"", b"\x7fELF", bytes(64), elf64([])[:63], elf64([], kind=2), b"#!/bin/sh\n".ljust(64)):
        with pytest.raises(elfcore.NotACore):
            elfcore.head_size(start)
    big_endian = bytearray(elf64([]))
    big_endian[5] = 2
    other_entries = bytearray(elf64([]))
    other_entries[54] = 57
    other_offset = bytearray(elf64([]))
    other_offset[32] = 65
    for changed in (big_endian, other_entries, other_offset):
        with pytest.raises(elfcore.NotACore):
            elfcore.head_size(bytes(changed))


_hostile = st.one_of(
    st.binary(max_size=200),
    st.binary(min_size=58, max_size=400).map(lambda rest: b"\x7fELF\2\1" + rest),
    st.binary(min_size=58, max_size=400).map(lambda rest: elf64([])[:56] + rest),
    st.binary(min_size=58, max_size=400).map(lambda rest: elf32([])[:44] + rest),
)


@given(data=_hostile)
def test_any_bytes_give_a_size_or_no_core(data: bytes) -> None:
    try:
        size = elfcore.head_size(data[:64])
    except elfcore.NotACore:
        return
    # The head is read into memory before the core is: 65534 headers of 56 bytes at the most.
    assert 0 < size <= 64 + 65534 * 56
    try:
        assert elfcore.whole_size(data) >= 40
    except elfcore.NotACore:
        assert len(data) < size


@NO_FIXTURE_RESET
@given(data=_hostile)
def test_any_bytes_are_captured(store: Store, data: bytes) -> None:
    plain, _ = captured(store, data, "zstd")
    assert plain == data


def test_a_head_that_promises_the_most(store: Store) -> None:
    """The largest head there can be is read, kept and passed on; a head that is cut is only a short stream."""
    head = elf64([(1 << 63, 1 << 63)] * 65534)
    for data in (head, head[: len(head) // 2], head + b"x" * BLOCK):
        plain, _ = captured(store, data, "zstd")
        assert plain == data
    reader, thread, read = reader_of(head + b"x")
    with pytest.raises(TooLarge, match=r"its 18446744073709551616 bytes are more than 1000"):
        reader.begin(1000)
    assert reader.size == len(head), "no more is read than the head"
    os.close(read)
    thread.join()


def test_limits_of_a_stream_that_is_no_core(store: Store) -> None:
    for size, fits in ((10_000, True), (10_001, False)):
        entry = store.begin(new_record())
        reader, thread, read = reader_of(b"x" * size)
        reader.begin(10_000)
        if fits:
            reader.copy(PlainSink(entry), 10_000)
        else:
            with pytest.raises(TooLarge, match="more than 10000"):
                reader.copy(PlainSink(entry), 10_000)
        os.close(read)
        thread.join()
        entry.close()


@pytest.mark.parametrize("sent", [b"", b"\x7fELF", elf64([(0x1000, 100)]), b"x" * 60_000])
def test_a_stream_that_stalls(store: Store, sent: bytes) -> None:
    read, write = os.pipe()
    feed(write, sent)
    reader = Reader(read, 0.05)
    entry = store.begin(new_record())

    def whole() -> None:
        reader.begin(None)
        reader.copy(PlainSink(entry), None)

    with pytest.raises(Stalled, match=r"no byte of the core came for 0\.05 s"):
        whole()
    assert reader.size <= len(sent)
    os.close(write)
    os.close(read)
    entry.close()


def test_the_longest_patience_that_the_settings_allow() -> None:
    """poll(2) counts milliseconds in an int: a year has more of them."""
    read, write = os.pipe()
    reader = Reader(read, 366 * 86400.0)
    main = Path(f"/proc/self/task/{threading.get_native_id()}/stat")

    def end() -> None:
        # As soon as it waits.
        wait_until(lambda: b") S " in main.read_bytes(), 20, "the reader waits")
        os.close(write)

    ending = threading.Thread(target=end)
    ending.start()
    try:
        reader.begin(None)
    finally:
        ending.join()
    assert reader.size == 0
    os.close(read)


def test_another_reader_of_the_same_pipe_does_not_block_us() -> None:
    """Who else holds the descriptor may take the bytes that poll(2) has promised."""
    read, write = os.pipe()
    feed(write, b"x")
    reader = Reader(read, 0.05)
    assert os.read(read, 1) == b"x"
    with pytest.raises(Stalled):
        reader.begin(None)
    os.close(write)
    os.close(read)


def test_a_socket_is_as_good_as_a_pipe(store: Store) -> None:
    ours, theirs = socket.socketpair()
    data = random.Random(1).randbytes(5 * BLOCK + 77)

    def send() -> None:
        with theirs:
            theirs.sendall(data)

    thread = threading.Thread(target=send)
    thread.start()
    entry = store.begin(new_record())
    reader = Reader(ours.fileno(), 20)
    reader.begin(None)
    reader.copy(PlainSink(entry), None)
    thread.join()
    ours.close()
    assert Path(store.path, f".{entry.record.id}.core").read_bytes() == data
    entry.close()


# The kernel's own cores.


@pytest.fixture(scope="module")
def container() -> Iterator[PlainContainer]:
    if why := PlainContainer.why_unavailable():
        pytest.skip(why)
    with PlainContainer() as found:
        yield found


@pytest.mark.kernel
@pytest.mark.skipif(machine.why_unavailable() is not None, reason=str(machine.why_unavailable()))
@pytest.mark.parametrize(
    "arguments", [(), ("--fill", "3000001", "random"), ("--threads", "20"), ("--sparse", "100000000")]
)
def test_sizes_of_real_cores(container: PlainContainer, arguments: tuple[str, ...]) -> None:
    with machine.exclusive() as held:
        held.core_pattern = b"core.%p"
        found = crash(container, "SEGV", *arguments)
    path = container.root / f"core.{found.pid}"
    with path.open("rb") as file:
        start = file.read(elfcore.HEADER_SIZE)
        head = start + file.read(elfcore.head_size(start) - len(start))
    assert elfcore.whole_size(head) == path.stat().st_size
    path.unlink()


# A worker's memory, and what the end of the dump means.


@pytest.fixture
def forwarder(container: PlainContainer) -> Iterator[FakeForwarder]:
    with resident(container), FakeForwarder(f"{container.root}{SOCKET}") as found:
        yield found


def high_water_mark(pid: int) -> int:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) << 10
    raise LookupError(pid)


@pytest.mark.kernel
@pytest.mark.parametrize("compression", ["zstd", "none"])
def test_the_memory_of_a_worker_is_bounded(container: PlainContainer, compression: str) -> None:
    """1 GiB goes through a worker: headers, bytes, pages of zeros."""
    environment = {"CORE_PIPE_COMPRESSION": compression, "CORE_PIPE_STORE_MAX": "off", "CORE_PIPE_KEEP_FREE": "off"}
    block = random.Random(1).randbytes(MIB)
    piece = memoryview(block[: 64 << 10] + bytes(MIB - (64 << 10)))
    with resident(container, env=environment) as receiver:
        with FakeForwarder(f"{container.root}{SOCKET}", seconds=60) as forwarder:
            write = forwarder.offered().pass_pipe()
            (worker,) = wait_until(lambda: processes.children(receiver.process.host_pid), 20, "a worker")
            feed(write, elf64([(1 << 22, 1 << 30)] * 60000))
            for _ in range(1024):
                feed(write, piece, seconds=60)
            mark = high_water_mark(worker)
            os.close(write)
            said = forwarder.done()
        record = wait_for_records(container)[-1]
    container.run(["rm", "-r", "/var/lib/core_pipe"], check=True)
    assert said["state"] == b"reduced"  # its headers promise more
    assert record["core"]["size_bytes"] > 1 << 30
    assert mark < 64 * MIB


@pytest.mark.kernel
def test_a_dump_that_the_kernel_ends_early_is_a_part(
    container: PlainContainer, forwarder: FakeForwarder, tmp_path: Path
) -> None:
    head = elf64([(0x1000, 0x1000), (0x2000, 0x100000)])
    said = forwarder.offered().send_core(head + b"x" * 10_000)
    reason = f"the kernel ended the dump after {len(head) + 10_000} of {0x102000} bytes"
    assert (said["state"], said["reason"].decode()) == (b"reduced", reason)
    record = next(found for found in wait_for_records(container) if found["id"].encode() == said["id"])
    assert record["core"]["state"] == "reduced"
    assert record["core"]["reason"] == reason
    assert record["core"]["size_bytes"] == len(head) + 10_000
    assert dump(container, record["id"], tmp_path / "core").read_bytes() == head + b"x" * 10_000


@pytest.mark.kernel
def test_a_dump_that_ends_before_its_first_byte(forwarder: FakeForwarder) -> None:
    said = forwarder.offered().send_core(b"")
    assert said["state"] == b"none"
    assert said["reason"] == b"the kernel ended the dump before its first byte"
