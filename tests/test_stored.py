"""Stored cores are read as what they stand for, and what is wrong with their files is said within bounds."""

from __future__ import annotations

import os
import random
import struct
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from typing import TYPE_CHECKING

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from receiver import stored
from receiver.frames import FRAME, PlainFile, ZstdFile
from receiver.stored import Damaged, StoredCore

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

MIB = 1 << 20
NOISE = random.Random(11).randbytes(3 * MIB)


# A writer of the format, small enough to be right, that can also write what is wrong.


def raw_frame(plain: bytes, *, told: bool = True) -> bytes:
    """A frame of one raw or RLE block for each 100000 bytes; told: with its size in its header."""
    frame = struct.pack("<IBI", 0xFD2FB528, 0xA0, len(plain)) if told else struct.pack("<IBB", 0xFD2FB528, 0, 0x50)
    pieces = [plain[at : at + 100_000] for at in range(0, len(plain), 100_000)] or [b""]
    for n, piece in enumerate(pieces):
        rle = piece != b"" and piece == piece[:1] * len(piece)
        header = (n == len(pieces) - 1) | rle << 1 | len(piece) << 3
        frame += header.to_bytes(3, "little") + (piece[:1] if rle else piece)
    return frame


def packed(plain: bytes, *, told: bool = True, checksum: bool = True, level: int = 1) -> bytes:
    return zstandard.ZstdCompressor(level=level, write_checksum=checksum, write_content_size=told).compress(plain)


def hole(length: int, kind: int = 0) -> bytes:
    return struct.pack("<II", 0x184D2A50 + kind, length - 8) + bytes(length - 8)


def table(rows: Iterable[tuple[int, int]], count: int | None = None) -> bytes:
    rows = list(rows)
    body = b"".join(struct.pack("<II", *row) for row in rows)
    body += struct.pack("<IBI", len(rows) if count is None else count, 0, 0x8F92EAB1)
    return struct.pack("<II", 0x184D2A5E, len(body)) + body


def with_table(frames: list[tuple[bytes, int]]) -> bytes:
    return b"".join(frame for frame, _ in frames) + table((len(frame), plain) for frame, plain in frames)


def framed(core: bytes, piece: int = MIB) -> list[tuple[bytes, int]]:
    """The frames of a core as the receiver writes them: the ELF header alone, then compressed ones, some raw."""
    frames = [(raw_frame(core[:64]), len(core[:64]))]
    for n, at in enumerate(range(64, len(core), piece)):
        plain = core[at : at + piece]
        frames.append((raw_frame(plain) if n % 3 == 2 else packed(plain), len(plain)))
    return frames


@contextmanager
def opened(data: bytes, compression: str | None = "zstd") -> Iterator[StoredCore]:
    with tempfile.TemporaryFile() as file:
        file.write(data)
        file.flush()
        yield StoredCore(file.fileno(), compression)


def whole(core: StoredCore) -> bytes:
    blocks = list(core.blocks())
    assert all(0 < len(block) <= FRAME for block in blocks)
    return b"".join(blocks)


def salvaged(core: StoredCore) -> tuple[bytes, list[Damaged]]:
    damage: list[Damaged] = []
    return b"".join(core.blocks(damage.append)), damage


# What is in order.

CORE = NOISE[:64] + bytes(5 * MIB) + NOISE + b"x" * MIB + NOISE[:12345]
SHAPES = {
    "frames and table": with_table(framed(CORE)),
    "frames alone": b"".join(frame for frame, _ in framed(CORE)),
    "one frame that tells its size": packed(CORE),
    "one frame that does not": packed(CORE, told=False),
    "one frame of level 19": packed(CORE, told=False, level=19),
    "sizes that are not told": b"".join(
        packed(CORE[at : at + 100_000], told=False) for at in range(0, len(CORE), 100_000)
    ),
    "raw frames without sizes": b"".join(raw_frame(CORE[at : at + MIB], told=False) for at in range(0, len(CORE), MIB)),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_is_read(shape: str) -> None:
    with opened(SHAPES[shape]) as core:
        assert whole(core) == CORE
        assert core.size == len(CORE)
        assert whole(core) == CORE
        for offset, length in (
            (0, 64),
            (60, 10),
            (5 * MIB - 10, 2 * MIB),
            (10, 5),
            (0, len(CORE)),
            (len(CORE) - 3, 10),
            (len(CORE), 1),
            (len(CORE) + 5 * MIB, 7),
            (1 << 62, 1),
            (4711, 0),
            (1, 1),
        ):
            assert core.read(offset, length) == CORE[offset : offset + length], (offset, length)
        with pytest.raises(ValueError, match="negative"):
            core.read(-1, 1)


@pytest.mark.parametrize("size", [0, 1, 63, 64, 65, 4096, MIB, MIB + 64, MIB + 65])
@pytest.mark.parametrize("shape", ["table", "walk", "one", "none"])
def test_small_cores(size: int, shape: str) -> None:
    plain = NOISE[:size]
    data = {
        "table": with_table(framed(plain)),
        "walk": b"".join(frame for frame, _ in framed(plain)),
        "one": packed(plain, told=False),
        "none": plain,
    }[shape]
    with opened(data, "none" if shape == "none" else "zstd") as core:
        assert (core.size, whole(core), core.read(0, size + 1)) == (size, plain, plain)


def test_a_plain_core_with_holes() -> None:
    with tempfile.TemporaryFile() as file:
        os.pwrite(file.fileno(), NOISE, 3 * MIB)
        # Far more than anybody would want to read: the end of it is one seek away.
        os.ftruncate(file.fileno(), 1 << 33)
        core = StoredCore(file.fileno(), "none")
        assert core.size == 1 << 33
        at = 0
        for block in core.blocks():
            assert len(block) <= FRAME
            if at < 8 * MIB:
                assert block == (bytes(3 * MIB) + NOISE + bytes(4 * MIB))[at : at + len(block)]
            at += len(block)
        assert at == 1 << 33
        assert core.read(3 * MIB - 1, 3) == b"\0" + NOISE[:2]
        os.ftruncate(file.fileno(), 5 * MIB)
        blocks = core.blocks()
        with pytest.raises(Damaged, match=r"became shorter\); the first 5242880 bytes"):
            list(blocks)


@pytest.mark.parametrize("kind", ["zstd", "none"])
def test_what_the_receiver_writes(kind: str) -> None:
    with tempfile.TemporaryFile() as file:
        fd = file.fileno()
        writer: ZstdFile | PlainFile = ZstdFile(fd, 1) if kind == "zstd" else PlainFile(fd)
        pieces = [NOISE[:64], NOISE[: 128 << 10], bytes(FRAME), NOISE[:FRAME], NOISE[5 : FRAME + 5], NOISE[:4097]]
        places = []
        for n, piece in enumerate(pieces):
            before = writer.end
            place = writer.append(writer.prepare(bytearray(piece), len(piece), plain=n == 0), len(piece))
            places.append((place, writer.end - before))
        assert writer.drop(places[3][0], FRAME, places[3][1])
        writer.replace_header(NOISE[-64:])
        writer.finish()
        pieces[0] = NOISE[-64:]
        core = StoredCore(fd, kind)
        if kind == "zstd":
            del pieces[3]
            expected = b"".join(pieces)
        else:
            # The whole blocks within it are a hole.
            start, end = -(-places[3][0] // 4096) * 4096, (places[3][0] + FRAME) // 4096 * 4096
            plain = bytearray(b"".join(pieces))
            plain[start:end] = bytes(end - start)
            expected = bytes(plain)
        assert whole(core) == expected
        assert core.size == len(expected)
        assert core.read(FRAME, 2 * FRAME) == expected[FRAME : 3 * FRAME]
        if kind == "zstd":
            # The same without its table.
            os.ftruncate(fd, sum(size for _, size in places))
            assert whole(StoredCore(fd, kind)) == expected


def test_zstd_itself_reads_the_format() -> None:
    """The small writer here and the reader would not notice a mistake that both make."""
    data = with_table([*framed(CORE), (hole(5000), 0), (packed(b"end"), 3)])
    found = subprocess.run(["zstd", "-dc"], input=data, capture_output=True, timeout=60, check=True)
    assert found.stdout == CORE + b"end"
    with opened(data) as core:
        assert whole(core) == CORE + b"end"


@given(
    pieces=st.lists(
        st.one_of(
            st.binary(max_size=300),
            st.integers(1, 70_000).map(bytes),
            st.integers(1, 70_000).map(lambda size: NOISE[:size]),
            st.none(),
        ),
        max_size=200,
    ),
    forms=st.randoms(use_true_random=False),
    has_table=st.booleans(),
)
@settings(max_examples=150, deadline=None)
def test_any_frames_at_any_offset(pieces: list[bytes | None], forms: random.Random, *, has_table: bool) -> None:
    frames: list[tuple[bytes, int]] = []
    for piece in pieces:
        if piece is None:
            frames.append((hole(forms.randrange(8, 3000), forms.randrange(14)), 0))
        else:
            make = forms.choice((raw_frame, packed))
            frames.append((make(piece, told=forms.random() < 0.8), len(piece)))
    plain = b"".join(piece or b"" for piece in pieces)
    data = with_table(frames) if has_table else b"".join(frame for frame, _ in frames)
    if not data:
        return
    with opened(data) as core:
        assert core.size == len(plain)
        for _ in range(20):
            offset, length = forms.randrange(len(plain) + 10), forms.choice((0, 1, 100, 100_000))
            assert core.read(offset, length) == plain[offset : offset + length]
        assert whole(core) == plain


# What is not in order.


def test_damage_costs_its_own_frame() -> None:
    frames = framed(CORE)
    data = bytearray(with_table(frames))
    starts = [sum(len(frame) for frame, _ in frames[:n]) for n in range(len(frames))]
    # The second piece of noise (compressed, with a checksum), and the ELF header's frame.
    victim = next(n for n, (frame, _) in enumerate(frames) if n > 5 and len(frame) > MIB // 2 and n % 3 != 0)
    data[starts[victim] + 5000] ^= 1
    data[4] ^= 1
    begin = 64 + (victim - 1) * MIB
    with opened(bytes(data)) as core:
        assert core.size == len(CORE)
        found, damage = salvaged(core)
        assert [(one.start, one.end) for one in damage] == [(0, 64), (begin, begin + MIB)]
        assert found == bytes(64) + CORE[64:begin] + bytes(MIB) + CORE[begin + MIB :]
        assert core.read(64, begin - 64) == CORE[64:begin]
        assert core.read(begin + MIB, 100) == CORE[begin + MIB :][:100]
        with pytest.raises(Damaged, match=rf"bytes {begin} to {begin + MIB} of the core cannot be read, the others"):
            core.read(begin - 1, 2)
        with pytest.raises(Damaged, match="bytes 0 to 64 of the core"):
            next(core.blocks())


@pytest.mark.parametrize("cut", [1, 5, 9, 17, 18, 60, 1000, 100_000, 2 * MIB, 3 * MIB])
@pytest.mark.parametrize("shape", ["frames and table", "one frame that does not", "one frame that tells its size"])
def test_a_file_that_is_cut(shape: str, cut: int) -> None:
    data = SHAPES[shape]
    with opened(data[:-cut]) as core:
        found, damage = salvaged(core)
        assert len(damage) == 1
        assert "it is cut at byte" in str(damage[0])
        assert damage[0].start == len(found)
        # Within a frame of where it was cut.
        assert CORE.startswith(found)
        assert len(found) >= len(CORE) - cut - 3 * MIB
        assert core.read(0, 1000) == CORE[:1000]
        with pytest.raises(Damaged, match=f"the first {len(found)} bytes of the core can be read"):
            core.read(len(found) - 1, 2)
        assert core.read(len(found) - 1, 1) == found[-1:]
        assert core.read(10, 10) == CORE[10:20]


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        (table([(1 << 20, 64)]), "does not fit"),
        (table([], count=0xFFFFFFFF), "is not where it says"),
        (table([], count=1), "is not where it says"),
        (table([]), "does not fit"),
    ],
)
def test_a_table_that_lies_is_not_believed(bad: bytes, says: str) -> None:
    data = b"".join(frame for frame, _ in framed(CORE))
    with opened(data + bad) as core:
        found, damage = salvaged(core)
        assert found == CORE
        assert says in str(damage[0])
        assert core.read(70, 7) == CORE[70:77]


def test_a_table_with_plausible_lies() -> None:
    """Its sums are right, and its frames are not what it says: each is met when it is decoded."""
    frames = framed(NOISE)
    rows = [(len(frame), plain) for frame, plain in frames]
    for n, change in ((0, 1), (1, -1), (2, FRAME - rows[2][1] - 5)):
        told = list(rows)
        told[n] = (told[n][0], told[n][1] + change)
        with opened(b"".join(frame for frame, _ in frames) + table(told)) as core:
            _, damage = salvaged(core)
            assert len(damage) == 1
            assert damage[0].start == sum(plain for _, plain in told[:n])
    # Frames that begin within another.
    told = [(rows[0][0] + 1, 64), (rows[1][0] - 1, rows[1][1]), *rows[2:]]
    with opened(b"".join(frame for frame, _ in frames) + table(told)) as core:
        assert [one.start for one in salvaged(core)[1]] == [0, 64]
    # More than a frame may have.
    told = [(rows[0][0], FRAME + 1), *rows[1:]]
    with opened(b"".join(frame for frame, _ in frames) + table(told)) as core:
        found, damage = salvaged(core)
        assert found == NOISE
        assert "does not fit" in str(damage[0])


def test_a_table_with_checksums() -> None:
    """Zstd's own tools write them; the frames have theirs."""
    frames = framed(CORE)
    body = b"".join(struct.pack("<III", len(frame), plain, 7) for frame, plain in frames)
    body += struct.pack("<IBI", len(frames), 0x80, 0x8F92EAB1)
    data = b"".join(frame for frame, _ in frames) + struct.pack("<II", 0x184D2A5E, len(body)) + body
    with opened(data) as core:
        assert whole(core) == CORE


def test_what_is_no_core() -> None:
    for data, says in ((b"", "its file is empty"), (NOISE[:100_000], "no zstd frame at byte 0"), (b"ab", "is cut")):
        with opened(data) as core:
            assert core.size == 0
            for read in (lambda core=core: core.read(0, 1), lambda core=core: list(core.blocks())):
                with pytest.raises(Damaged, match=r"nothing of the core can be read"):
                    read()
            found, damage = salvaged(core)
            assert (found, len(damage)) == (b"", 1)
            assert says in str(damage[0]) or "Unknown frame descriptor" in str(damage[0])
    with pytest.raises(Damaged, match=r"compressed with 'x.x1b', which this version does not know"):
        opened(b"", "x\x1b").__enter__()
    read_end, write_end = os.pipe()
    with open(read_end, "rb"), open(write_end, "wb"), pytest.raises(Damaged, match="it is not a file"):
        StoredCore(read_end, "none")


def test_bytes_after_the_only_frame_are_said() -> None:
    with opened(packed(CORE, told=False) + b"more") as core:
        found, damage = salvaged(core)
        assert found == CORE
        assert "4 bytes follow its end" in str(damage[0])


@given(
    shape=st.sampled_from(sorted(SHAPES)),
    changes=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(1, 255)), min_size=1, max_size=5),
    near=st.sampled_from(["anywhere", "start", "end"]),
)
@settings(max_examples=150, deadline=None)
def test_flipped_bytes_never_pass_for_the_core(shape: str, changes: list[tuple[float, int]], near: str) -> None:
    """Raw frames have no checksum: there a byte may differ. Whatever else differs is said."""
    data = bytearray(SHAPES[shape])
    for where, bits in changes:
        span = len(data) if near == "anywhere" else 300
        at = int(where * span)
        data[len(data) - 1 - at if near == "end" else at] ^= bits
    with opened(bytes(data)) as core:
        found, damage = salvaged(core)
        if not damage and len(found) == len(CORE):
            differ = sum(1 for one, other in zip(found, CORE, strict=True) if one != other) if found != CORE else 0
            # An RLE block's byte is 100000 of the core's, or what is left of it.
            assert differ <= 100_000 * len(changes)
        assert core.size == len(found)


@given(data=st.binary(max_size=2000), end=st.sampled_from([b"", b"\xb1\xea\x92\x8f", table([(9, 1)] * 3)]))
@settings(max_examples=300, deadline=None)
def test_any_bytes(data: bytes, end: bytes) -> None:
    for start in (b"", b"\x28\xb5\x2f\xfd", raw_frame(b"x"), hole(20)):
        with opened(start + data + end) as core:
            found, _ = salvaged(core)
            assert core.size == len(found)
            for offset in (0, 1, 5000):
                try:
                    assert core.read(offset, 10) == found[offset : offset + 10]
                except Damaged as damage:
                    assert str(damage).startswith("the stored core is damaged (")


# What is hostile.

# How much memory the reader takes, in a process of its own: the peak of this one says nothing.
PROBE = """
import os, resource, sys
from receiver.stored import Damaged, StoredCore
import zstandard
fd = os.open(sys.argv[1], os.O_RDONLY)
resource.setrlimit(resource.RLIMIT_CPU, (int(sys.argv[3]), int(sys.argv[3])))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
most = int(sys.argv[2])
size = 0
damage = ""
try:
    core = StoredCore(fd, "zstd")
    for block in core.blocks():
        assert len(block) <= 1 << 20
        size += len(block)
        if size >= most:
            break
    else:
        core.read(core.size // 2, 100)
except Damaged as error:
    damage = str(error)
print(size, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before, damage)
"""


def probe(path: str, *, most: int = 1 << 62, cpu_seconds: int = 100) -> tuple[int, int, str]:
    """Return the bytes of the core, how many KiB reading it took, and the damage."""
    command = [sys.executable, "-c", PROBE, path, str(most), str(cpu_seconds)]
    found = subprocess.run(command, capture_output=True, text=True, timeout=170, check=True)
    size, memory, damage = found.stdout.rstrip("\n").split(" ", 2)
    return int(size), int(memory), damage


def write(directory: str, *parts: bytes, size: int | None = None) -> str:
    path = os.path.join(directory, "core.zst")
    with open(path, "wb") as file:
        file.writelines(parts)
        if size is not None:
            file.truncate(size)
    return path


@pytest.fixture
def directory() -> Iterator[str]:
    with tempfile.TemporaryDirectory() as path:
        yield path


def test_memory_does_not_grow_with_the_core(directory: str) -> None:
    small, large = ([(raw_frame(NOISE[:64]), 64)] + [(packed(NOISE[:FRAME]), FRAME)] * n for n in (2, 200))
    for frames in (small, large):
        size, memory, damage = probe(write(directory, with_table(frames)))
        assert (size, damage) == (64 + (len(frames) - 1) * FRAME, "")
        assert memory < 16 << 10
    # Of an old one, a window; zstd's own, at level 19.
    size, memory, damage = probe(write(directory, packed(bytes(64 * MIB) + NOISE * 40, told=False, level=19)))
    assert (size, damage) == (64 * MIB + 40 * len(NOISE), "")
    assert memory < 32 << 10


def test_a_huge_window_is_refused(directory: str) -> None:
    # A window descriptor of 0xF8 is 2 TiB; 0xB0 is 4 GiB; of a single segment the content is the window.
    for header in (
        struct.pack("<IBB", 0xFD2FB528, 0, 0xF8),
        struct.pack("<IBB", 0xFD2FB528, 0, 0xB0),
        struct.pack("<IBQ", 0xFD2FB528, 0xE0, 1 << 40),
    ):
        block = (1 | 1 << 1 | 1000 << 3).to_bytes(3, "little") + b"x"
        _, memory, damage = probe(write(directory, header + block))
        assert "damaged" in damage
        assert memory < 16 << 10
        # As one of several frames, with a table that says so and one that lies.
        frame = header + block
        for plain in (1000, FRAME):
            _, memory, damage = probe(write(directory, with_table([(raw_frame(b"x"), 1), (frame, plain)])))
            assert "damaged" in damage
            assert memory < 16 << 10


def test_a_bomb_is_read_in_pieces(directory: str) -> None:
    """A few bytes that stand for a terabyte: the reader who has seen enough of it stops."""
    rle = (1 << 1 | (128 << 10) << 3).to_bytes(3, "little") + b"x"
    last = (1 | 1 << 1 | (128 << 10) << 3).to_bytes(3, "little") + b"x"
    bomb = struct.pack("<IBB", 0xFD2FB528, 0, 0x50) + rle * (1 << 18) + last
    size, memory, _ = probe(write(directory, bomb), most=64 * MIB)
    assert size == 64 * MIB
    assert memory < 16 << 10


@pytest.mark.parametrize("kind", ["blocks", "holes", "table", "frames"])
def test_a_hostile_file_ends(directory: str, kind: str) -> None:
    """Files that take little room and have, or say, no end of pieces."""
    if kind == "blocks":
        # Zeros are raw blocks of nothing, and the last one never comes: a hole of 64 GiB of them.
        path = write(directory, struct.pack("<IBB", 0xFD2FB528, 0, 0x50), size=64 << 30)
    elif kind == "holes":
        # Each 4 GiB away from the one before; none of it is read.
        path = write(directory, raw_frame(b"x"))
        with open(path, "r+b") as file:
            for n in range(500):
                file.seek(13 + n * 0xFFFFFFF0)
                file.write(struct.pack("<II", 0x184D2A50, 0xFFFFFFE8))
            file.truncate(13 + 500 * 0xFFFFFFF0)
    elif kind == "table":
        count = 1 << 22
        path = write(directory, raw_frame(b"x"), table([(1 << 31, 0)] * count))
    else:
        path = write(directory, raw_frame(b"x"), hole(8) * (1 << 21), raw_frame(b"y"))
    size, memory, damage = probe(path)
    assert memory < 96 << 10
    if kind in ("blocks", "table"):
        assert "damaged" in damage
    else:
        assert (size, damage) == (1 if kind == "holes" else 2, "")


def test_bounds_are_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stored, "MAX_FRAMES", 3)
    with opened(raw_frame(b"x") * 5) as core:
        found, damage = salvaged(core)
        assert found == b"xxx"
        assert "more frames than a core can have" in str(damage[0])
    with opened(with_table([(raw_frame(b"x"), 1)] * 5)) as core:
        found, damage = salvaged(core)
        assert found == b"xxx"
        assert len(damage) == 1
    monkeypatch.setattr(stored, "MAX_BLOCKS", 7)
    with opened(raw_frame(NOISE[:300_000]) * 3) as core:
        found, damage = salvaged(core)
        assert found == NOISE[:300_000]
        assert "more blocks than a core can have" in str(damage[0])


def test_the_descriptor_stays_where_it_is() -> None:
    with tempfile.TemporaryFile() as file:
        file.write(SHAPES["frames and table"])
        file.seek(7)
        core = StoredCore(file.fileno(), "zstd")
        whole(core)
        core.read(1000, 1000)
        assert os.lseek(file.fileno(), 0, os.SEEK_CUR) == 7
