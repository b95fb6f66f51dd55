"""A core is taken out of a store: as a plain ELF file, with holes for its zeros, and for nobody else to read."""

from __future__ import annotations

import errno
import os
import stat
from fcntl import F_GETFL, fcntl
from typing import TYPE_CHECKING, NamedTuple

from receiver.frames import PAGE, ZEROS, runs
from receiver.store import write_all

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from receiver.stored import Damaged, StoredCore

# Damage that is told of one by one; a file in which every frame is damaged has thousands.
MOST_TOLD = 10


class ForeignFile(Exception):
    """The file to write to belongs to somebody else. The text is a fact and what to do."""


class Copied(NamedTuple):
    """What became of a copy. size: bytes written. damage: what was wrong, the first MOST_TOLD of `damages`.

    too_much: there was more than was asked for.
    """

    size: int
    damage: list[Damaged]
    damages: int
    too_much: bool


def open_output(path: str) -> int:
    """Open a file for a core, which holds secrets: not through somebody's link, and for nobody else to read.

    Returns a descriptor, which is the caller's. Raises ForeignFile, OSError.
    """
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        found = os.fstat(fd)
        if stat.S_ISREG(found.st_mode):
            if found.st_uid != os.geteuid():
                raise ForeignFile(
                    f"{path}: belongs to uid {found.st_uid}, who could read the core. Remove it, or name another file"
                )
            os.fchmod(fd, 0o600)
            os.ftruncate(fd, 0)
    except BaseException:
        os.close(fd)
        raise
    return fd


def open_nameless(directories: Sequence[str]) -> int:
    """Open a file for a core that has no name: it goes with its last descriptor, whatever becomes of us.

    directories: to try, in this order. Returns a descriptor, which is the caller's. Raises OSError.
    """
    failure: OSError | None = None
    for directory in directories:
        try:
            return os.open(directory, os.O_TMPFILE | os.O_RDWR | os.O_EXCL | os.O_CLOEXEC, 0o600)
        except OSError as error:
            failure = failure or error
            if error.errno not in (errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL):
                continue
        # A file system that has no nameless files (overlayfs before Linux 6.3, NFS): it has a name for an instant.
        name = os.path.join(directory, f".core_pipe-{os.urandom(8).hex()}")
        try:
            fd = os.open(name, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        except OSError:
            continue
        os.unlink(name)
        return fd
    raise failure or FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))


def copy(source: StoredCore, target: int, most: int, progress: Callable[[int], object] | None = None) -> Copied:
    """Write at most `most` bytes of the plain core, with zeros for what is damaged. Raises OSError.

    progress: told how many are written, after each block.

    A few bytes of a stranger's file may stand for terabytes, so who asks says how much there has to be.
    """
    damage: list[Damaged] = []
    damages = 0

    def note(found: Damaged) -> None:
        nonlocal damages
        damages += 1
        if len(damage) < MOST_TOLD:
            damage.append(found)

    sparse = _takes_holes(target)
    size = 0
    too_much = False
    for block in source.blocks(note):
        too_much = len(block) > most - size
        part = block[: most - size]
        if sparse:
            _write_sparse(target, part, size)
        else:
            write_all(target, part)
        size += len(part)
        if progress is not None:
            progress(size)
        if too_much:
            break
    if sparse:
        os.ftruncate(target, size)
        # Where it would be had all been written: standard output may have other writers after us.
        os.lseek(target, size, os.SEEK_SET)
    return Copied(size, damage, damages, too_much)


def _takes_holes(fd: int) -> bool:
    """Whether this is an empty file in which we may write where we like (`>>` appends wherever that is)."""
    return (
        stat.S_ISREG(os.fstat(fd).st_mode)
        and os.lseek(fd, 0, os.SEEK_CUR) == 0
        and not fcntl(fd, F_GETFL) & os.O_APPEND
    )


def _write_sparse(fd: int, block: bytes, position: int) -> None:
    """Write a block to an empty file without its pages of zeros."""
    if block == ZEROS[: len(block)]:
        return
    # A core's pieces need not begin where its pages do: the first one of an ELF core is its header alone.
    head = min(-position % PAGE, len(block))
    _write_at(fd, memoryview(block)[:head], position)
    rest = bytearray(block[head:])
    view = memoryview(rest)
    for zeros, start, end in runs(rest, len(rest)):
        if not zeros:
            _write_at(fd, view[start:end], position + head + start)


def _write_at(fd: int, data: memoryview, position: int) -> None:
    while data:
        written = os.pwrite(fd, data, position)
        data = data[written:]
        position += written
