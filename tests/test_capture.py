"""The core as a stream: what is stored is what came, within its budget and bounded memory, whatever its headers say."""

from __future__ import annotations

import errno
import os
import random
import resource
import select
import signal
import socket
import struct
import tempfile
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import zstandard
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from receiver import elfcore, plan
from receiver.capture import Capture, TooLarge, Wish
from receiver.elfcore import PAGE
from receiver.frames import FRAME, Samples, ZstdFile, raw_frame, runs
from receiver.press import Press, Throttle
from receiver.record import Core, Record
from receiver.store import NoRoom, Store, write_all
from receiver.stored import StoredCore
from receiver.stream import SMALL, Stalled, Stream
from tests.support import elf, machine, processes
from tests.support.containers import PlainContainer
from tests.support.crash import crash
from tests.support.fake_forwarder import FakeForwarder, feed
from tests.support.receivers import SOCKET, dump, resident, wait_for_records
from tests.support.waiting import wait_until

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

MIB = 1 << 20
NO_FIXTURE_RESET = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=60)

# Streams as cores are: runs of zeros and of other bytes, of sizes around those that matter.
_sizes = st.one_of(
    st.sampled_from([0, 1, PAGE - 1, PAGE, PAGE + 1, 3 * PAGE, FRAME - 1, FRAME, FRAME + 1]), st.integers(0, 20_000)
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


def pipe_of(data: bytes, *, step: int | None = None) -> tuple[int, threading.Thread]:
    """A pipe into which a thread writes the data: its read end, and the thread."""
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
    return read, thread


def captured(
    store: Store,
    data: bytes,
    compression: str = "zstd",
    *,
    step: int | None = None,
    wish: Wish | None = None,
    threads: int = 1,
    stall_seconds: float = 20,
    disk: Callable[[int], None] | None = None,
    **asked: Any,
) -> tuple[bytes, Core]:
    """Send a stream through a capture; returns what is in the store, plain, and what is said of it.

    disk: is called with the bytes that the file may have before each time that it grows; may raise.
    """
    read, thread = pipe_of(data, step=step)
    entry = store.begin(new_record())
    if disk is not None:
        real = entry.grow

        def grow(size: int) -> None:
            disk(size)
            real(size)

        entry.grow = grow  # type: ignore[method-assign]
    try:
        capture = Capture(
            read, entry, compression=compression, threads=threads, stall_seconds=stall_seconds, wish=wish, **asked
        )
        entry.record.core = capture.run()
        entry.finish()
    finally:
        os.close(read)
        thread.join()
        entry.close()
    core = entry.record.core
    if core.path is None:
        return b"", core
    with os.fdopen(store.open_core(entry.record), "rb") as file:
        raw = file.read()
        assert os.fstat(file.fileno()).st_blocks * 512 == core.stored_bytes
        plain = b"".join(StoredCore(file.fileno(), compression).blocks())
    if compression == "zstd":
        with zstandard.ZstdDecompressor().stream_reader(raw, read_across_frames=True) as reader:
            assert reader.read() == plain, "any other reader of zstd sees the same"
    else:
        assert raw == plain
    assert core.size_bytes == len(plain)
    assert core.file_bytes == len(raw)
    return plain, core


# What is stored is what came.


@pytest.mark.parametrize("threads", [0, 1, 3])
@pytest.mark.parametrize("compression", ["zstd", "none"])
@NO_FIXTURE_RESET
@given(data=STREAMS)
def test_the_same_bytes_come_back(store: Store, compression: str, threads: int, data: bytes) -> None:
    plain, core = captured(store, data, compression, threads=threads)
    assert plain == data
    assert core.state == ("stored" if data else "none")


@pytest.mark.parametrize("compression", ["zstd", "none"])
def test_a_stream_in_small_pieces(store: Store, compression: str) -> None:
    data = _bytes_of([("random", 50_000, 1), ("zero", 200_000, 0), ("random", 70_001, 2)])
    plain, _ = captured(store, data, compression, step=1009)
    assert plain == data


@pytest.mark.parametrize("compression", ["zstd", "none"])
def test_zeros_take_no_room(store: Store, compression: str) -> None:
    data = random.Random(1).randbytes(PAGE) + bytes(64 * MIB) + random.Random(2).randbytes(PAGE)
    plain, core = captured(store, data, compression)
    assert plain == data
    assert core.stored_bytes < 100_000


@settings(deadline=None)
@given(pieces=st.lists(_pieces, max_size=4))
def test_runs_and_raw_frames(pieces: list[tuple[str, int, int]]) -> None:
    data = bytearray(_bytes_of(pieces)[:FRAME])
    size = len(data)
    data += b"not of it" * 1000
    found = runs(data, size)
    assert [start for _, start, _ in found] == [0, *(end for _, _, end in found[:-1])][: len(found)]
    assert (found[-1][2] if found else 0) == size
    for zeros, start, end in found:
        pages = [data[at : min(at + PAGE, end)] for at in range(start, end, PAGE)]
        assert all(any(page) != zeros for page in pages)
    assume(size)
    frame = b"".join(raw_frame(data, size))
    assert zstandard.ZstdDecompressor().decompress(frame) == data[:size]
    stored = sum(end - start for zeros, start, end in found if not zeros)
    assert len(frame) <= stored + 4 * (len(found) + size // (128 << 10) + 1) + 16


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


@pytest.mark.parametrize("made", [elf64, elf32])
def test_heads_by_construction(made: Any) -> None:
    head = made([(0x1000, 100), (0x2000, 0x500), (0x3000, 0)])
    padded = head.ljust(64, b"\0")
    assert elfcore.head_size(padded[: elfcore.first_size(padded[:64])]) == len(head)
    assert elfcore.read_head(head).size == 0x2500
    for wrong in (head[:-1], head + b"x"):
        with pytest.raises(elfcore.NotACore, match="cut"):
            elfcore.read_head(wrong)
    with pytest.raises(elfcore.NotACore, match="order"):
        elfcore.read_head(made([(0x2000, 0x500), (0x1000, 100)]))


def test_more_mappings_than_the_header_can_count() -> None:
    """PN_XNUM: their number stands behind all of them; but the notes follow the program headers."""
    count = 70000
    head = bytearray(elf64([(0, 0)] * count, count=elfcore.PN_XNUM, sections=0x12345000))
    where = len(head)
    struct.pack_into("<IIQ", head, 64, 4, 0, where)
    with pytest.raises(elfcore.NotACore, match="more than 65536 mappings"):
        elfcore.head_size(bytes(head[:120]))
    head = head[: 64 + 56 * 65536]
    struct.pack_into("<IIQ", head, 64, 4, 0, len(head))
    assert elfcore.head_size(bytes(head[:120])) == len(head)
    found = elfcore.read_head(bytes(head))
    assert len(found.segments) == 65536
    assert found.size == 0x12345000 + 64
    # Without notes there is no telling.
    with pytest.raises(elfcore.NotACore, match="cannot be known"):
        elfcore.head_size(elf64([(1, 1)], count=elfcore.PN_XNUM))


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
def test_any_bytes_give_a_head_or_no_core(data: bytes) -> None:
    try:
        first = elfcore.first_size(data[:64])
        size = elfcore.head_size(data[: max(64, first)].ljust(first, b"\0"))
        # The head is read into memory before the core is.
        assert 0 < size <= 64 + 65536 * 56
        found = elfcore.read_head(data[:size])
    except elfcore.NotACore:
        return
    assert found.size >= size


def _is_whole_or_marked(data: bytes, plain: bytes, core: Core) -> None:
    if core.state == "stored":
        assert plain == data
    elif core.state == "none":
        assert core.reason == f"the kernel ended the dump after {len(data)} bytes, within the core's head"
    else:
        elf.read(plain)
        assert core.reason


@NO_FIXTURE_RESET
@given(data=_hostile)
def test_any_bytes_are_captured(store: Store, data: bytes) -> None:
    plain, core = captured(store, data)
    if data:
        _is_whole_or_marked(data, plain, core)


def test_a_head_that_promises_the_most(store: Store) -> None:
    """The largest head there can be is read and kept; a head that is cut is only a short stream."""
    head = elf64([(4 << 20, 1 << 63)] + [((1 << 63) + (4 << 20), 0)] * 65533)
    for data in (head, head[: len(head) // 2], head + b"x" * FRAME):
        plain, core = captured(store, data)
        _is_whole_or_marked(data, plain, core)
    with pytest.raises(TooLarge, match=r"headers and registers alone, 4194304 bytes, leave nothing of 1000 \(test\)"):
        captured(store, head, wish=Wish(1000, "test"))


def test_limits_of_a_stream_that_is_no_core(store: Store) -> None:
    plain, _ = captured(store, b"x" * 10_000, wish=Wish(10_000, "test"))
    assert plain == b"x" * 10_000
    with pytest.raises(TooLarge, match=r"more than 10000 bytes \(test\)"):
        captured(store, b"x" * 10_001, wish=Wish(10_000, "test"))


def test_what_is_no_core_evicts_none(tmp_path: Path) -> None:
    store = Store(str(tmp_path / "store"), limit=lambda _whole: 3 * MIB)
    old = [captured(store, random.Random(n).randbytes(MIB), "none")[1] for n in range(2)]
    with pytest.raises(NoRoom):
        captured(store, random.Random(9).randbytes(2 * MIB), "none")
    store.recover()
    assert all(core.path is not None and os.path.exists(core.path) for core in old)
    store.close()


# Reduced.

STACK, HEAP, CODE = 0x7FFF00000000, 0x7F0000000000, 0x400000


def a_core(*, is_64: bool = True, heap: int = 40, threads: int = 2, more: list[elf.Load] | None = None) -> bytes:
    """A core with `heap` pages of heap, and a stack of 20 pages for each thread with the pointer in its third page."""
    notes = b""
    loads = [
        elf.Load(CODE, _page(1), more=3 * PAGE, flags=5),
        elf.Load(HEAP, b"".join(_page(n + 10) for n in range(heap))),
        *(more or []),
    ]
    for number in range(threads):
        at = STACK + number * 0x1000000
        loads.append(elf.Load(at, b"".join(_page(1000 + 100 * number + n) for n in range(20))))
        notes += elf.prstatus(number + 1, pc=CODE + 0x1100, sp=at + 2 * PAGE + 300)
    notes += elf.auxv({3: CODE + 64, 9: CODE + 0x1000})
    notes += elf.files((CODE, CODE + 4 * PAGE, 0, b"/bin/program"))
    return elf.core(notes, loads, is_64=is_64)


def _page(seed: int) -> bytes:
    return random.Random(seed).randbytes(PAGE)


def memory_of(data: bytes) -> tuple[dict[int, bytes], set[int]]:
    """The pages of a core by address, and the addresses of those that are zeros because nobody touched them."""
    there: dict[int, bytes] = {}
    zeros: set[int] = set()
    for load in elf.read(data)[1]:
        there |= {load.address + at: load.data[at : at + PAGE] for at in range(0, len(load.data), PAGE)}
        zeros |= set(range(load.address + len(load.data), load.address + load.memory_size, PAGE))
    return there, zeros


def check_reduced(data: bytes, plain: bytes) -> set[int]:
    """What is kept is what was there, and what is left out is not zeros. Returns the addresses that are kept."""
    notes, _ = elf.read(data)
    assert elf.read(plain)[0] == notes
    there, zeros = memory_of(data)
    kept, still_zeros = memory_of(plain)
    assert kept.items() <= there.items()
    assert still_zeros <= zeros
    return set(kept)


@pytest.mark.parametrize("compression", ["zstd", "none"])
@NO_FIXTURE_RESET
@given(
    limit=st.integers(6000, 800_000),
    heap=st.integers(0, 120),
    threads=st.integers(0, 4),
    up_to=st.sampled_from([plan.GLOBALS, plan.UNUSED]),
)
def test_within_any_budget(store: Store, compression: str, limit: int, heap: int, threads: int, up_to: int) -> None:
    data = a_core(heap=heap, threads=threads)
    try:
        plain, core = captured(store, data, compression, wish=Wish(limit, "test", up_to=up_to))
    except TooLarge:
        assert limit < 2 * PAGE + 200 * (threads + 6)
        return
    assert core.whole_bytes == len(data)
    if core.state == "stored":
        assert plain == data
        return
    assert len(plain) <= limit
    kept = check_reduced(data, plain)
    assert core.reason is not None
    assert core.reason.startswith(f"{(len(memory_of(data)[0]) - len(kept)) * PAGE} of {len(data)} bytes are left out: ")
    # The more important is there before the less important: the innermost frames before all else.
    innermost = [STACK + number * 0x1000000 + 2 * PAGE for number in range(threads)]
    assert [address in kept for address in innermost] == sorted((a in kept for a in innermost), reverse=True)
    if any(HEAP <= address < STACK for address in kept) and up_to == plan.UNUSED and heap > 16:
        assert all(address in kept for address in innermost)


def test_thirty_two_bits(store: Store) -> None:
    loads = [
        elf.Load(0x8000000, b"".join(_page(n) for n in range(100))),
        elf.Load(0xFFF00000, _page(7) * 3, more=PAGE),
    ]
    data = elf.core(elf.note(1, bytes(144)), loads, is_64=False)
    assert captured(store, data)[0] == data
    plain, core = captured(store, data, wish=Wish(60_000, "test"))
    assert core.state == "reduced"
    assert len(plain) <= 60_000
    assert check_reduced(data, plain)


def test_what_stacks_means(store: Store) -> None:
    """From each thread's pointer to its stack's base, and nothing below it."""
    data = a_core(heap=5000, threads=3)
    plain, core = captured(store, data, wish=Wish(up_to=plan.GLOBALS))
    assert core.reason is not None
    assert core.reason.endswith("left out: keep = 'stacks'")
    kept = check_reduced(data, plain)
    for number in range(3):
        at = STACK + number * 0x1000000
        assert at not in kept
        assert {at + n * PAGE for n in range(2, 20)} <= kept
    assert CODE in kept


def test_a_stack_that_overflowed(store: Store) -> None:
    """Its pointer lies below its mapping."""
    loads = [elf.Load(HEAP, _page(1) * 30), elf.Load(STACK, b"".join(_page(n) for n in range(2048)))]
    data = elf.core(elf.prstatus(1, pc=CODE, sp=STACK - 2000), loads)
    plain, _ = captured(store, data, wish=Wish(up_to=plan.GLOBALS))
    assert {STACK + n * PAGE for n in range(2048)} <= check_reduced(data, plain)


def test_the_small_comes_before_the_large(store: Store) -> None:
    """Within what was written to: tables of kilobytes are worth more than a part of a cache."""
    small = elf.Load(HEAP + (1 << 30), b"".join(_page(n) for n in range(30)))
    data = a_core(heap=500, more=[small])
    plain, _ = captured(store, data, wish=Wish(400_000, "test"))
    kept = check_reduced(data, plain)
    assert {small.address + n * PAGE for n in range(30)} <= kept
    assert HEAP in kept
    assert HEAP + 499 * PAGE not in kept


@pytest.mark.parametrize("compression", ["zstd", "none"])
def test_room_that_ends_while_it_is_written(store: Store, compression: str) -> None:
    """The heap comes first in the file and the stacks last; when the room ends, heap that is written gives its own."""
    data = a_core(heap=3000, threads=30)
    most = 4 * MIB

    def disk(size: int) -> None:
        if size > most:
            raise NoRoom("the disk of this test is full")

    plain, core = captured(store, data, compression, disk=disk)
    assert core.state == "reduced"
    assert core.reason is not None
    assert "the disk of this test is full" in core.reason
    assert core.stored_bytes <= most
    kept = check_reduced(data, plain)
    for number in range(30):
        assert STACK + number * 0x1000000 + 2 * PAGE in kept
    assert HEAP in kept
    # What room there is was used.
    assert core.stored_bytes > most - MIB - 200_000


def test_no_room_for_anything(store: Store) -> None:
    def disk(_size: int) -> None:
        raise NoRoom("the disk of this test is full")

    with pytest.raises(NoRoom, match="the disk of this test is full"):
        captured(store, a_core(), disk=disk)


def test_a_file_that_may_not_grow(store: Store) -> None:
    """RLIMIT_FSIZE (EFBIG): other cores would go in vain."""
    old = []
    for _ in range(3):
        entry = store.begin(new_record())
        os.write(entry.open_core(), b"x" * 2 * MIB)
        entry.record.core = Core(state="stored", size_bytes=2 * MIB, compression="none")
        entry.finish()
        old.append(entry.record)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (24 * MIB, before[1]))  # Python ignores SIGXFSZ
    data = a_core(heap=8000)
    try:
        plain, core = captured(store, data, "none")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert core.state == "reduced"
    assert core.reason is not None
    assert "large" in core.reason
    check_reduced(data, plain)
    assert [store.load(record.id).core.state for record in old] == ["stored"] * 3


def test_no_thread_to_be_had(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """A fork bomb beside it: the reading thread compresses as well."""
    asked = []

    def start(_thread: threading.Thread) -> None:
        asked.append(1)
        raise RuntimeError("can't start new thread")

    data = a_core(heap=1500)
    read, thread = pipe_of(data)
    monkeypatch.setattr(threading.Thread, "start", start)
    entry = store.begin(new_record())
    core = Capture(read, entry, compression="zstd", threads=2, stall_seconds=20).run()
    assert (core.state, core.size_bytes) == ("stored", len(data))
    assert 1 <= len(asked) <= 2
    entry.close()
    os.close(read)
    thread.join()


def test_what_nobody_wants_is_not_waited_for(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """A mapping of terabytes behind the last byte that is kept: the process is let go."""
    monkeypatch.setattr("receiver.capture._READ_IN_VAIN", 4 * MIB)
    tail = elf.Load(STACK + (1 << 32), bytes(40 * MIB), flags=4)
    data = a_core(heap=10, more=[tail])
    # In the order of addresses, as the kernel has it.
    assert data.endswith(_page(1119)), "the stacks come last"
    notes, loads = elf.read(data)
    data = elf.core(notes, sorted(loads, key=lambda load: load.address))
    plain, core = captured(store, data, wish=Wish(400_000, "test"))
    assert core.reason is not None
    assert core.reason.endswith("left out: test allows 400000 bytes")
    assert STACK + 2 * PAGE in check_reduced(data, plain)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=25)
@given(full=st.lists(st.integers(0, 60), max_size=4), compression=st.sampled_from(["zstd", "none"]))
def test_room_that_comes_and_goes(store: Store, full: list[int], compression: str) -> None:
    """Others write to the same disk: whatever is refused, what is kept is right."""
    data = a_core(heap=2000, threads=3)
    asked = iter(range(1_000_000))

    def disk(_size: int) -> None:
        if next(asked) in full:
            raise NoRoom("full for a moment")

    try:
        plain, core = captured(store, data, compression, disk=disk)
    except NoRoom:
        return
    if core.state == "stored":
        assert plain == data
    else:
        check_reduced(data, plain)


@pytest.mark.parametrize("compression", ["zstd", "none"])
@NO_FIXTURE_RESET
@given(cut=st.integers(1, 280_000))
def test_a_dump_that_ends_anywhere(store: Store, compression: str, cut: int) -> None:
    data = a_core()
    plain, core = captured(store, data[:cut], compression)
    if cut >= len(data):
        assert plain == data
        return
    assert core.reason is not None
    if core.state == "none":
        assert cut < 64 + 56 * 5
        assert core.reason == f"the kernel ended the dump after {cut} bytes, within the core's head"
        return
    assert f"the kernel ended the dump after {cut} of {len(data)} bytes" in core.reason
    there = {load.address: load for load in elf.read(data)[1]}
    for load in elf.read(plain)[1]:
        assert there[load.address].data.startswith(load.data)
        whole = len(load.data) == len(there[load.address].data)
        assert load.more == (there[load.address].more if whole else 0)


@pytest.mark.parametrize("sent", [b"", b"\x7fELF", elf64([(0x1000, 100)]), b"x" * 60_000, a_core()[:60_000]])
def test_a_stream_that_stalls(store: Store, sent: bytes) -> None:
    read, write = os.pipe()
    feed(write, sent)
    entry = store.begin(new_record())
    core = Capture(read, entry, compression="none", stall_seconds=0.05).run()
    assert core.reason is not None
    assert "no byte of the core came for 0.05 s" in core.reason
    assert core.state == ("reduced" if len(sent) > 64 and sent[:4] == b"\x7fELF" else "none")
    os.close(write)
    os.close(read)
    entry.close()


def test_the_longest_patience_that_the_settings_allow() -> None:
    """poll(2) counts milliseconds in an int: a year has more of them."""
    read, write = os.pipe()
    stream = Stream(read, 366 * 86400.0)
    main = Path(f"/proc/self/task/{threading.get_native_id()}/stat")

    def end() -> None:
        # As soon as it waits.
        wait_until(lambda: b") S " in main.read_bytes(), 20, "the reader waits")
        os.close(write)

    ending = threading.Thread(target=end)
    ending.start()
    try:
        assert stream.take(1) == b""
    finally:
        ending.join()
    assert stream.size == 0
    assert stream.ended
    os.close(read)


def test_another_reader_of_the_same_pipe_does_not_block_us() -> None:
    """Who else holds the descriptor may take the bytes that poll(2) has promised."""
    read, write = os.pipe()
    feed(write, b"x")
    stream = Stream(read, 0.05)
    assert os.read(read, 1) == b"x"
    with pytest.raises(Stalled):
        stream.take(1)
    os.close(write)
    os.close(read)


def test_a_socket_is_as_good_as_a_pipe(store: Store) -> None:
    ours, theirs = socket.socketpair()
    data = random.Random(1).randbytes(2 * FRAME + 77)

    def send() -> None:
        with theirs:
            theirs.sendall(data)

    thread = threading.Thread(target=send)
    thread.start()
    entry = store.begin(new_record())
    Capture(ours.fileno(), entry, compression="none", stall_seconds=20).run()
    thread.join()
    ours.close()
    assert Path(store.path, f".{entry.record.id}.core").read_bytes() == data
    entry.close()


@pytest.mark.parametrize("way", ["pipe", "socket"])
@pytest.mark.parametrize("trouble", ["none", "no descriptors", "no splice"])
def test_a_core_that_gets_a_reserve(store: Store, monkeypatch: pytest.MonkeyPatch, way: str, trouble: str) -> None:
    """Larger than SMALL: it goes through a second pipe, or without when there is none; none of it stays open."""
    moved: list[int] = []
    refused: list[int] = []
    real_pipe, real_splice = os.pipe2, os.splice

    def pipe2(flags: int) -> tuple[int, int]:
        if trouble == "no descriptors":
            raise OSError(errno.EMFILE, "too many")
        return real_pipe(flags)

    def splice(*arguments: int) -> int:
        if trouble == "no splice":
            # As a sandbox has it. In the middle of a core, for it is asked there first; and not again.
            refused.append(1)
            raise PermissionError(errno.EPERM, "not here")
        moved.append(real_splice(*arguments))
        return moved[-1]

    data = random.Random(5).randbytes(9 * MIB + 4711)
    if way == "pipe":
        read, thread = pipe_of(data, step=100_003)
    else:
        ours, theirs = socket.socketpair()
        read = ours.detach()

        def send() -> None:
            with theirs:
                theirs.sendall(data)

        thread = threading.Thread(target=send)
        thread.start()
    monkeypatch.setattr(os, "pipe2", pipe2)
    monkeypatch.setattr(os, "splice", splice)
    entry = store.begin(new_record())
    before = len(os.listdir("/proc/self/fd"))
    core = Capture(read, entry, compression="none", stall_seconds=20).run()
    # The core's own file came, and the other end of its stream went.
    assert len(os.listdir("/proc/self/fd")) == before
    monkeypatch.undo()
    thread.join()
    os.close(read)
    assert (core.state, core.size_bytes) == ("stored", len(data))
    assert Path(store.path, f".{entry.record.id}.core").read_bytes() == data
    entry.close()
    assert len(refused) == (trouble == "no splice")
    # All that comes after the frame in which it is large.
    assert sum(moved) <= len(data) - SMALL
    assert (sum(moved) > len(data) - SMALL - 2 * FRAME) == (trouble == "none")


def test_silence_is_noticed_with_a_reserve_and_what_it_held_is_kept(store: Store) -> None:
    data = random.Random(6).randbytes(6 * MIB)
    read, write = os.pipe()
    thread = threading.Thread(target=feed, args=(write, data))
    thread.start()
    entry = store.begin(new_record())
    core = Capture(read, entry, compression="none", stall_seconds=0.3).run()
    thread.join()
    assert core.size_bytes == len(data)
    os.close(write)
    os.close(read)
    entry.close()


# What does not shrink.


def _frames_of(fd: int) -> list[tuple[int, bool]]:
    """Return (size in the file, whether it is raw: without a checksum) of each frame, by the file's table."""
    size = os.fstat(fd).st_size
    count = struct.unpack("<I", os.pread(fd, 4, size - 9))[0]
    rows = struct.iter_unpack("<II", os.pread(fd, 8 * count, size - 9 - 8 * count))
    found, at = [], 0
    for length, _ in rows:
        found.append((length, not os.pread(fd, 5, at)[4] & 4))
        at += length
    return found


def _framed(pieces: list[bytes], *, threads: int = 0) -> list[tuple[int, bool]]:
    """Send frames through a press as a capture does; returns what became of each. They must come back as they were."""
    with tempfile.TemporaryFile() as file:
        target = ZstdFile(file.fileno(), 1)
        press = Press(target, threads, Throttle(None), frame=FRAME)

        def place(*, wait: bool) -> bool:
            task = press.take(wait=wait)
            if task is None:
                return False
            target.append(task.parts, task.size)
            press.give_back(task)
            return True

        for piece in pieces:
            while (buffer := press.buffer()) is None:
                place(wait=True)
            buffer[: len(piece)] = piece
            press.put(buffer, len(piece), None)
            while place(wait=False):
                pass
        while place(wait=True):
            pass
        press.close()
        target.finish()
        assert list(StoredCore(file.fileno(), "zstd").blocks()) == pieces
        return _frames_of(file.fileno())


@pytest.mark.parametrize("threads", [0, 1, 2])
def test_what_does_not_shrink_is_not_compressed(threads: int) -> None:
    chance = random.Random(threads)
    text = b"".join(b"%d bottles " % n for n in range(100_000))[:FRAME]
    noise = [chance.randbytes(FRAME) for _ in range(40)]
    frames = _framed([*noise, *[text] * 10, *noise[:20], bytes(FRAME)], threads=threads)
    assert not frames[0][1], "nothing is believed before one was compressed in vain"
    # All but the first ones, and each CHECKth.
    assert sum(raw for _, raw in frames[:40]) >= 40 - 40 // Samples.CHECK - 5
    assert not any(raw for _, raw in frames[40:50])
    assert sum(raw for _, raw in frames[50:70]) >= 17
    assert all(size < FRAME // 4 for size, _ in frames[40:50])
    assert sum(size for size, _ in frames[:40]) < 40 * FRAME * 1.001
    assert frames[-1][0] < 100


@pytest.mark.parametrize("share", [17, 9, 4])
def test_what_samples_cost_where_a_part_shrinks(share: int) -> None:
    """A piece in `share` is text: 5 % of the core is the most that may be lost, checks or not."""
    chance = random.Random(share)
    piece = 4096
    pieces = [
        b"".join(
            b"text" * (piece // 4) if chance.randrange(share) == 0 else chance.randbytes(piece) for _ in range(256)
        )
        for _ in range(60)
    ]
    noise = [chance.randbytes(FRAME) for _ in range(3)]
    frames = _framed([*noise, *pieces])[3:]
    least = sum(len(zstandard.ZstdCompressor(level=1).compress(piece)) for piece in pieces)
    assert sum(size for size, _ in frames) - least < 0.05 * len(pieces) * FRAME


def test_samples_that_deceive_are_not_believed_for_long() -> None:
    """What repeats at a distance looks like noise to most samples, and shrinks to a fifth."""
    chance = random.Random(3)
    noise = [chance.randbytes(FRAME) for _ in range(3)]
    frames = _framed([*noise, *[(chance.randbytes(200 << 10) * 6)[:FRAME] for _ in range(60)], *noise], threads=1)
    raw = [raw for _, raw in frames[3:63]]
    # Those between two checks, and those that came while the second was under way.
    assert 1 <= sum(raw) <= Samples.CHECK + 3
    assert not any(raw[50:])
    # And never again.
    assert not any(raw for _, raw in frames[63:])


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
def test_real_cores(container: PlainContainer, store: Store, arguments: tuple[str, ...]) -> None:
    with machine.exclusive() as held:
        held.core_pattern = b"core.%p"
        found = crash(container, "SEGV", *arguments)
    path = container.root / f"core.{found.pid}"
    data = path.read_bytes()
    path.unlink()
    start = data[: elfcore.HEADER_SIZE]
    head = data[: elfcore.head_size(data[: elfcore.first_size(start)])]
    assert elfcore.read_head(head).size == len(data)
    plain, core = captured(store, data)
    assert core.state == "stored"
    assert plain == data
    plain, core = captured(store, data, wish=Wish(300_000, "test"))
    assert core.state == "reduced"
    assert len(plain) <= 300_000
    check_reduced(data, plain)


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
@pytest.mark.parametrize("size", [1, 1000, pytest.param(4096, marks=pytest.mark.long)])
@pytest.mark.parametrize("limit", ["off", "64M"])
@pytest.mark.parametrize("compression", ["zstd", "none"])
def test_the_memory_of_a_worker_is_bounded(container: PlainContainer, compression: str, limit: str, size: int) -> None:
    """1 MiB to 4 GiB go through a worker: headers of many mappings, bytes, pages of zeros; whole and reduced."""
    environment = {
        "CORE_PIPE_COMPRESSION": compression,
        "CORE_PIPE_STORE_MAX": "off",
        "CORE_PIPE_KEEP_FREE": "off",
        "CORE_PIPE_CORE_MAX": limit,
    }
    block = random.Random(1).randbytes(MIB)
    piece = memoryview(block[: 64 << 10] + bytes(MIB - (64 << 10)))
    with resident(container, env=environment) as receiver:
        with FakeForwarder(f"{container.root}{SOCKET}", seconds=60) as forwarder:
            write = forwarder.offered().pass_pipe()
            (worker,) = wait_until(lambda: processes.serving(receiver.process.host_pid), 20, "a worker")
            feed(write, elf64([(MIB * (n + 1), MIB) for n in range(size)]).ljust(MIB, b"\0"))
            for _ in range(size):
                feed(write, piece, seconds=60)
            mark = high_water_mark(worker)
            os.close(write)
            said = forwarder.done()
        record = wait_for_records(container)[-1]
    container.run(["rm", "-r", "/var/lib/core_pipe"], check=True)
    whole = (size + 1) * MIB
    assert said["state"] == (b"stored" if limit == "off" or whole < 64 * MIB else b"reduced")
    assert record["core"]["whole_bytes"] == whole
    assert (record["core"]["size_bytes"] == whole) == (said["state"] == b"stored")
    print(f"{size} MiB, {compression}, core_max {limit}: {mark / MIB:.1f} MiB resident at the most")
    assert mark <= 32 * MIB


@pytest.mark.parametrize("times", [25, pytest.param(500, marks=pytest.mark.long)])
def test_a_worker_that_is_killed_at_any_point(tmp_path: Path, times: int) -> None:
    """In a store that is too small for two: whole cores, reduced cores and records, and nothing else, each time."""
    chance = random.Random(times)
    data = [a_core(heap=size, threads=3) for size in (100, 900, 2500)]
    limit = 6 * MIB

    def opened() -> Store:
        return Store(str(tmp_path / "store"), limit=lambda _whole: limit, records=20)

    begun = 0
    for _ in range(times):
        core = chance.choice(data)
        compression = chance.choice(["zstd", "none"])
        wish = Wish(chance.choice([None, 1 * MIB]), "test")
        read, write = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                os.close(write)
                store = opened()
                entry = store.begin(new_record())
                entry.record.core = Capture(read, entry, compression=compression, stall_seconds=20, wish=wish).run()
                entry.finish()
            finally:
                os._exit(0)
        os.close(read)
        # At the end it has the time to finish, or not quite.
        fed = chance.randint(0, len(core) + len(core) // 4)
        try:
            feed(write, core[:fed])
        except BrokenPipeError:
            pass
        if fed >= len(core) and chance.random() < 0.5:
            os.close(write)
            write = -1
            os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        if write >= 0:
            os.close(write)
        begun += 1
        store = opened()
        store.recover()
        assert not [name for name in store.names() if name.startswith(".") and name != ".lock"]
        assert store.used() <= limit
        for owner, record in store.records():
            assert record is not None, owner
            if record.core.path is None:
                continue
            fd = store.open_core(record)
            plain = b"".join(StoredCore(fd, record.core.compression).blocks())
            os.close(fd)
            assert len(plain) == record.core.size_bytes
            if record.core.state == "stored":
                assert plain in data
            else:
                check_reduced(next(whole for whole in data if len(whole) == record.core.whole_bytes), plain)
        store.close()


@pytest.mark.kernel
def test_a_dump_that_the_kernel_ends_early_is_a_part(
    container: PlainContainer, forwarder: FakeForwarder, tmp_path: Path
) -> None:
    data = a_core()
    said = forwarder.offered().send_core(data[:100_000])
    reason = f"the kernel ended the dump after 100000 of {len(data)} bytes"
    assert said["state"] == b"reduced"
    assert said["reason"].decode().endswith(reason)
    record = next(found for found in wait_for_records(container) if found["id"].encode() == said["id"])
    assert record["core"]["state"] == "reduced"
    assert record["core"]["reason"].endswith(reason)
    _, loads = elf.read(dump(container, record["id"], tmp_path / "core").read_bytes())
    assert sum(len(load.data) for load in loads) == 100_000 - PAGE


@pytest.mark.kernel
def test_a_dump_that_ends_before_its_first_byte(forwarder: FakeForwarder) -> None:
    said = forwarder.offered().send_core(b"")
    assert said["state"] == b"none"
    assert said["reason"] == b"the kernel ended the dump before its first byte"
