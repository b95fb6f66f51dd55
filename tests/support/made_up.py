"""A store with three weeks of crashes that never were, for pictures: plausible, and the same each time."""

from __future__ import annotations

import os
import random
import time
from typing import TYPE_CHECKING

from receiver.record import Core, Record, rfc3339
from receiver.store import INTERRUPTED, Store

if TYPE_CHECKING:
    from collections.abc import Iterator

_DAY = 86400
_MIB = 1 << 20
# Program, user, signal, functions from the innermost, how often in three weeks, since when (days ago), MiB of a core.
_BUGS = (
    (
        "/usr/lib/webshop/checkout",
        33,
        11,
        ("cart_total", "apply_discount", "render_checkout", "handle_request", "worker_loop", "main"),
        86,
        6.2,
        214,
    ),
    (
        "/usr/bin/node",
        1000,
        6,
        ("raise", "abort", "node::OnFatalError", "v8::internal::Heap::FatalProcessOutOfMemory", "node::Start", "main"),
        41,
        21,
        780,
    ),
    (
        "/opt/search/bin/indexer",
        998,
        7,
        ("segment_read", "merge_segments", "compact", "indexer_thread", "start_thread", "clone3"),
        23,
        15,
        412,
    ),
    (
        "/usr/sbin/nginx",
        33,
        11,
        ("ngx_http_lua_run_thread", "ngx_http_core_content_phase", "ngx_worker", "main"),
        9,
        19,
        38,
    ),
    (
        "/usr/bin/python3.11",
        1000,
        11,
        ("PyObject_GetAttr", "_PyEval_EvalFrameDefault", "Py_RunMain", "main"),
        8,
        12,
        96,
    ),
    ("/usr/local/bin/thumbnailer", 998, 8, ("scale_row", "scale_image", "convert", "main"), 6, 9, 22),
    (
        "/usr/lib/postgresql/15/bin/postgres",
        114,
        6,
        ("raise", "abort", "ExceptionalCondition", "XLogFlush"),
        2,
        17,
        161,
    ),
    ("/usr/bin/redis-server", 112, 4, ("zipmapNext", "rdbLoadObject", "main"), 1, 3, 54),
)
_REASONS = (
    "the same crash (signature %s) left 8 cores within 3600 s (same_max, same_seconds)",
    "it crashes in a loop: 20 cores of this program were taken within 600 s (loop_max, loop_seconds)",
    "evicted: newer cores needed its room (store_max)",
    "evicted: newer cores needed its room (store_max)",
    "the soft core limit (ulimit -c) of the process is 0",
    "no receiver took the core: webshop-7: there is no /run/core_pipe.socket",
    INTERRUPTED,
)


def records(now: float) -> Iterator[tuple[Record, int]]:
    """Yield records, the oldest first, and the bytes that the core of each takes on the disk. now: their end."""
    dice = random.Random(20261123)
    found = []
    for number, (exe, uid, signal, functions, count, days, size) in enumerate(_BUGS):
        for _ in range(count):
            # By day rather than by night; and what came with a release came in a burst.
            ago = (
                days * (dice.random() ** (2.5 if number == 0 else 1)) if number else days * (1 - dice.betavariate(1, 3))
            )
            at = now - ago * _DAY
            if time.gmtime(at).tm_hour < 6 and dice.random() < 0.7:
                at += 8 * 3600
            if at < now:
                found.append((at, exe, uid, signal, functions, size, number))
    found.sort()
    for at, exe, uid, signal, functions, size, number in found:
        record = Record.of_numbers(
            pid=dice.randrange(300, 60000), tid=1, uid=uid, gid=uid, signal=signal, time=int(at),
            comm=os.path.basename(exe)[:15].encode(), core_limit=1 << 64, dumpable=1,
        )  # fmt: skip
        stamp = time.strftime("%Y%m%dT%H%M%S", time.gmtime(at))
        record.id = f"{stamp}-{dice.randrange(10**6):06d}-{record.pid}-{dice.randrange(1 << 32):08x}"
        record.tid, record.received, record.exe = record.pid, rfc3339(at), exe
        record.signature = f"{random.Random(number + 7).getrandbits(64):016x}"
        record.seconds = round(size / 600 * dice.uniform(0.7, 1.6), 6)
        record.frames = [f"{os.path.basename(exe)}+{0x1139 + 64 * n:#x}" for n, _ in enumerate(functions)]
        record.backtrace = [
            f"#{n}  0x{0x55D0C0A01139 + 4096 * n:016x} in {name} ()" for n, name in enumerate(functions)
        ]
        record.backtrace_by = "gdb 13.1"
        age = (now - at) / _DAY
        on_disk = int(size * _MIB * dice.uniform(0.06, 0.1))
        if dice.random() < 0.25 + 0.02 * age + (0.35 if number == 0 else 0):
            reason = _REASONS[0 if number == 0 and dice.random() < 0.6 else dice.randrange(len(_REASONS))]
            record.core = Core(reason=reason.replace("%s", record.signature))
            on_disk = 0
        else:
            state = "reduced" if size > 400 and dice.random() < 0.5 else "stored"
            record.core = Core(state=state, size_bytes=size * _MIB, whole_bytes=size * _MIB, compression="zstd")
            if state == "reduced":
                record.core.reason = (
                    f"{size * _MIB // 2} of {size * _MIB} bytes are left out: core_max allows 400M bytes"
                )
                record.core.absent_bytes = size * _MIB // 2
                on_disk //= 2
        yield record, on_disk


def fill(path: str, now: float) -> None:
    """Make a store at `path` with them. Its cores have blocks, and nothing in them. Raises OSError, StoreError."""
    store = Store(path)
    try:
        for record, on_disk in records(now):
            if on_disk:
                name = f"{record.id}.core.zst"
                record.core.path, record.core.stored_bytes = os.path.join(store.path, name), on_disk
                record.core.file_bytes = on_disk
                fd = os.open(record.core.path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o640)
                try:
                    os.posix_fallocate(fd, 0, on_disk)
                finally:
                    os.close(fd)
            fd = os.open(f"{store.path}/{record.id}.json", os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o640)
            with open(fd, "wb") as file:
                file.write(record.dumps())
    finally:
        store.close()
