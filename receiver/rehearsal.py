"""A made-up crash, gone through before the first real one: what is forked from a warm process is warm.

Python specialises code that has run a few times, fills caches, and imports what is imported late; in a worker, which
lives for one crash, none of that ever pays. It is done while nothing waits.
"""

from __future__ import annotations

import os
import re
import struct

from receiver.capture import Capture, Wish
from receiver.process import arguments, mask
from receiver.protocol import decode_fields, encode_fields
from receiver.record import Record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from receiver.config import Config


ROUNDS = 10
PAGE = 4096


class _Nowhere:
    """Stands for an entry of the store: a file that has no name."""

    def __init__(self) -> None:
        self.core = -1

    def open_core(self) -> int:
        self.core = os.memfd_create("rehearsal", os.MFD_CLOEXEC)
        return self.core

    def grow(self, _size: int) -> None:
        """There is always room."""

    def seems_to_fit(self, _size: int) -> bool:
        return True


def rehearse(config: Config) -> None:
    """Go through it a few times: some 20 ms. Raises OSError when there is no memory for it."""
    core = _core()
    for _ in range(ROUNDS):
        _capture(core, config)
        touch(config)


def touch(config: Config) -> None:
    """Go once through what comes before the core: for a process that was forked from one that has rehearsed.

    Python counts references in the objects themselves, so the first use of each copies its page. Not the core, too: it
    would gain less, and what a process that waits has for itself is to be little (0.6 MiB more).
    """
    secret = re.compile(config.secret_pattern, re.IGNORECASE)
    fields = {"signal": b"11", "comm": b"program", "environ": b"A=b\0SECRET=c\0" * 8}
    decode_fields(len(fields), encode_fields(fields))
    record = Record.of_numbers(pid=1, tid=1, uid=0, gid=0, signal=11, time=1, comm=b"program", core_limit=0, dumpable=1)
    record.command_line = arguments(b"program\0argument\0", secret)
    record.environment = mask(fields["environ"], secret)
    record.dumps()


def _capture(core: bytes, config: Config) -> None:
    read, write = os.pipe2(os.O_CLOEXEC)
    entry = _Nowhere()
    try:
        # It fits into the pipe.
        os.write(write, core)
        os.close(write)
        write = -1
        Capture(
            read,
            # Not a store's, but as good.
            entry,  # type: ignore[arg-type]
            compression=config.compression,
            level=config.compression_level,
            threads=0,
            stall_seconds=1.0,
            # Less than malloc(3) would keep.
            frame_size=1 << 16,
            wish=Wish(),
            witnessed=lambda witness: _name(witness.frames()),
        ).run()
    finally:
        for fd in (read, write, entry.core):
            if fd >= 0:
                os.close(fd)


def _name(_frames: object) -> None:
    pass


def _core() -> bytes:
    """Return a core of one thread, with a stack, some libraries, and pages of zeros: less than a pipe holds."""
    pages = 6
    base = 0x10000000
    status = bytearray(336)
    struct.pack_into("<Q", status, 112 + 16 * 8, base)
    struct.pack_into("<Q", status, 112 + 19 * 8, base + 5 * PAGE)
    files = struct.pack("<QQ", 3, PAGE) + b"".join(
        struct.pack("<QQQ", base + n * PAGE, base + n * PAGE + PAGE, 0) for n in range(3)
    )
    notes = b"".join(
        struct.pack("<III", 5, len(content), kind) + b"CORE\0\0\0\0" + content.ljust(-(-len(content) // 4) * 4, b"\0")
        for kind, content in (
            (1, bytes(status)),
            (6, struct.pack("<QQQQ", 3, base + 64, 0, 0)),
            (0x46494C45, files + b"/bin/program\0/lib/libc.so.6\0/lib/ld.so\0"),
        )
    )
    rows = [struct.pack("<IIQQQQQQ", 4, 0, 64 + 56 * (pages + 1), 0, 0, len(notes), 0, 4)]
    rows += [
        struct.pack("<IIQQQQQQ", 1, 5 if n < 3 else 6, PAGE * (n + 1), base + n * PAGE, 0, PAGE, PAGE, PAGE)
        for n in range(pages)
    ]
    head = b"\x7fELF\2\1\1".ljust(16, b"\0")
    head += struct.pack("<HHIQQQIHHHHHH", 4, 62, 1, 0, 64, 0, 0, 64, 56, len(rows), 0, 0, 0)
    memory = b"".join(b"\x7fELF\2\1\1".ljust(PAGE, b"\1") if n % 2 else bytes(PAGE) for n in range(pages))
    return (head + b"".join(rows) + notes).ljust(PAGE, b"\0") + memory
