"""Files of a container are copied out of it, by children that may hang in its file systems (`forwarder/apart.py`)."""

from __future__ import annotations

import errno
import math
import os
import time
from typing import TYPE_CHECKING

from forwarder import apart, namespaces
from receiver.frames import FRAME, runs
from receiver.store import StoreError

if TYPE_CHECKING:
    from collections.abc import Callable

    from forwarder.apart import Answer

# How long a child copies before it says how far it is, and how long that may take.
SECONDS = 0.5
PATIENCE = 20.0
# Left free where it is copied to.
KEEP_FREE = 256 << 20
_CHANGED = b"it was changed while it was copied. Try again"
_NO_ROOM = b"there is no room for a copy of it. Name a directory that has, with TMPDIR"


class Unreachable(StoreError):
    """Something in a container cannot be read. The text is a fact and what to do."""


def all_but(kept: tuple[int, ...]) -> list[int]:
    """Return our descriptors but these, so that a child which hangs holds nothing: not the pipe of a pager, either."""
    found = []
    for name in os.listdir("/proc/self/fd"):
        fd = int(name)
        try:
            os.fstat(fd)
        except OSError:
            # The listing's own, which may be another one's number by now.
            continue
        if fd not in kept:
            found.append(fd)
    return found


def why(error: OSError) -> str:
    """Return what an error means for a file of a container's."""
    return {
        errno.ELOOP: "there is a link in its path, which is not followed. Name the directory itself with --store",
        errno.ENOSYS: "this kernel has no openat2(2), without which no container's file is read. Look from within",
        errno.EXDEV: "it is another mount's, or leads out of the container",
        errno.ESRCH: "the container has ended",
    }.get(error.errno or 0, error.strerror or "it cannot be read")


def may_be_read(process: int, found: os.stat_result) -> bool:
    """Whether a file belongs to a user of the container: not to one of the host's, whatever was mounted there.

    process: the proc directory of one of its processes.
    """
    return namespaces.is_mapped(process, found.st_uid)


def open_root(process: int) -> int:
    """Return an O_PATH descriptor of a process's root. May hang (NFS). Raises OSError."""
    return os.open("root", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=process)


def take(
    name: str,
    process: int,
    opened: Callable[[int], int],
    target: int,
    *,
    allowed: Callable[[int, os.stat_result], bool] = may_be_read,
    most: int | None = None,
    progress: Callable[[int], object] | None = None,
    until: float = math.inf,
) -> tuple[int, int]:
    """Copy a file of a container to `target`, an empty one of ours, with holes for its zeros.

    name: for messages. process: the proc directory of a process of the container. opened: is called in a child, with
    the container's root, and returns the file's descriptor. allowed: whether it may be read, by fstat(2). most: bytes,
    and never more than there is room for. until: time.monotonic(), when it is given up.

    Returns how many bytes were written, and the file's mode. Raises Unreachable.
    """
    offset = written = 0
    seen = b""
    while True:
        room = os.fstatvfs(target)
        left = max(0, room.f_bavail * room.f_frsize - KEEP_FREE)
        if most is not None:
            left = min(left, most - written)

        def work(offset: int = offset, left: int = left, seen: bytes = seen) -> Answer:
            return _some(process, opened, target, offset, left, seen, allowed)

        try:
            # One child after the other: each says how far it came, and is missed when it does not.
            message = apart.ask(work, min(until, time.monotonic() + PATIENCE), all_but((process, target)))
        except apart.Stuck:
            raise Unreachable(
                f"{name} did not answer within {PATIENCE:g} s. A file system of the container may hang, or it has "
                "ended; look from within"
            ) from None
        message.close()
        if "problem" in message.fields:
            raise Unreachable(f"{name}: {message.fields['problem'].decode()}")
        seen = message.fields["file"]
        offset = message.number("offset")
        written += message.number("written")
        if progress is not None:
            progress(written)
        if offset >= message.number("size"):
            os.ftruncate(target, message.number("size"))
            return written, message.number("mode")
        if time.monotonic() >= until:
            raise Unreachable(f"{name} took too long to copy")


def _some(
    process: int,
    opened: Callable[[int], int],
    target: int,
    offset: int,
    most: int,
    seen: bytes,
    allowed: Callable[[int, os.stat_result], bool],
) -> Answer:
    """Copy a part from an offset on. seen: what an earlier call said of the file. In the child."""
    try:
        fd = opened(open_root(process))
        found = os.fstat(fd)
        file = b"%d:%d:%d:%d" % (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns)
        if not allowed(process, found):
            return {"problem": b"belongs to a user who is none of the container's"}, None
        if seen and file != seen:
            return {"problem": _CHANGED}, None
        if not seen and found.st_blocks * 512 > most:
            return {"problem": _NO_ROOM}, None
        size, written, until = found.st_size, 0, time.monotonic() + SECONDS
        while offset < size:
            try:
                offset = os.lseek(fd, offset, os.SEEK_DATA)
            except OSError as error:
                if error.errno == errno.ENXIO:
                    # Nothing but a hole up to its end.
                    offset = size
                    break
                raise
            part = os.pread(fd, min(FRAME, size - offset), offset)
            if not part:
                return {"problem": _CHANGED}, None
            written += _write_sparse(target, part, offset)
            offset += len(part)
            if written > most:
                return {"problem": _NO_ROOM}, None
            if time.monotonic() >= until:
                break
    except OSError as error:
        return {"problem": why(error).encode()}, None
    fields = {"offset": min(offset, size), "size": size, "written": written, "mode": found.st_mode}
    return {"file": file, **{name: b"%d" % value for name, value in fields.items()}}, None


def _write_sparse(target: int, part: bytes, offset: int) -> int:
    """Write what is no zero. Returns how many bytes that are."""
    block = bytearray(part)
    written = 0
    for zeros, start, end in runs(block, len(block)):
        if not zeros:
            rest = memoryview(part)[start:end]
            while rest:
                rest = rest[os.pwrite(target, rest, offset + end - len(rest)) :]
            written += end - start
    return written
