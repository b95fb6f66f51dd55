"""Crashes that are kept in a store without having happened, and corepipectl on it."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import zstandard

from receiver import ctl
from receiver.frames import FRAME, PlainFile, ZstdFile
from receiver.record import Core, Record
from receiver.store import Store

if TYPE_CHECKING:
    from pathlib import Path

# What a program may call itself: nothing of it may reach a terminal as it is.
HOSTILE = "\x1b[2J\x07a\nb\r\u202e\x9b\udcff\t"


def new_record(pid: int = 7, comm: str = "test", exe: str | None = "/usr/bin/test", **facts: Any) -> Record:
    record = Record.of_numbers(
        pid=pid,
        tid=pid,
        uid=1000,
        gid=1000,
        signal=11,
        time=1_700_000_000,
        comm=b"",
        core_limit=1 << 40,
        dumpable=1,
    )
    record.comm = comm
    record.exe = exe
    for name, value in facts.items():
        setattr(record, name, value)
    return record


def keep(
    path: Path,
    record: Record,
    core: bytes | None = b"core",
    *,
    compression: str = "zstd",
    old: bool = False,
    whole_bytes: int = 0,
) -> Record:
    """Keep a crash. old: its core in one zstd frame, as stores had it once. whole_bytes: it is reduced."""
    store = Store(str(path))
    entry = store.begin(record)
    if core is None:
        record.core = Core(reason="because", size_bytes=4711)
    else:
        fd = entry.open_core()
        if old:
            compressor = zstandard.ZstdCompressor(level=1, write_checksum=True).compressobj()
            os.write(fd, compressor.compress(core) + compressor.flush())
        else:
            file: ZstdFile | PlainFile = PlainFile(fd) if compression == "none" else ZstdFile(fd, 1)
            for start, end in [(0, 64), *((at, at + FRAME) for at in range(64, len(core), FRAME))]:
                piece = bytearray(core[start:end])
                if piece:
                    file.append(file.prepare(piece, len(piece), plain=start == 0), len(piece))
            file.finish()
        record.core = Core(state="stored", size_bytes=len(core), compression=compression)
        if whole_bytes:
            record.core.state = "reduced"
            record.core.reason = "some bytes are left out: keep=stacks"
            record.core.whole_bytes = whole_bytes
            record.core.absent_bytes = whole_bytes - len(core)
    entry.finish()
    store.close()
    return record


def run(path: Path, *arguments: str) -> int:
    return ctl.main(["--store", str(path), *arguments])


def start(path: Path, *arguments: str, **options: Any) -> subprocess.Popen[bytes]:
    code = "import sys; from receiver.ctl import main; sys.exit(main())"
    command = [sys.executable, "-c", code, "--store", str(path), *arguments]
    return subprocess.Popen(command, stderr=subprocess.PIPE, **options)
