"""What a debugger needs of a container beside the core: copies of its program and libraries, in a directory of ours.

Not the container's own root: a debugger there would follow the container's links to files of the host's, hang in its
file systems, and read files that change under its eyes. And not as root: what it reads is a stranger's. So the copies
belong to a uid that nobody has, and the debugger is run by that one.
"""

from __future__ import annotations

import errno
import os
import random
import shutil
import stat
import struct
import tempfile
import time
import weakref
from typing import TYPE_CHECKING

from forwarder import apart
from receiver.ctl.copying import Unreachable, all_but, may_be_read, open_root, take
from receiver.elfcore import HEADER_SIZE, PT_NOTE, NotACore, first_size, head_size, read_head
from receiver.notes import Parser
from receiver.openat2 import STRICT, WITHIN, open_regular, openat2
from receiver.stored import Damaged, StoredCore
from receiver.tables import shown

if TYPE_CHECKING:
    from collections.abc import Iterator

    from forwarder.apart import Answer
    from receiver.ctl.containers import Place

# systemd's range of users that exist only while something runs (DynamicUser=, systemd.io/UIDS-GIDS).
USERS = (61184, 65519)
# Browsers map some 200 files; a program that is hostile may map 65530.
MAX_FILES = 1000
MAX_BYTES = 4 << 30
MAX_DEPTH = 40
MAX_NOTES = 64 << 20
# A stranger's notes may be of any number; those of a thousand threads take some milliseconds.
NOTES_SECONDS = 5.0
# For all libraries of a core, and for its program: each may lie on a file system that is slow, or never answers.
FILES_SECONDS = 60.0
# Of a directory with libraries, when it is looked through for their other names.
MAX_NAMES = 20_000
LINK_SECONDS = 10.0
# As distributions have them since the merge of / and /usr.
MERGED = ("bin", "sbin", "lib", "lib32", "lib64", "libx32")
_MAX_MESSAGE = 60_000
_PAGE = 4096
_PIECE = 1 << 20
_PT_INTERP = 3
# p_type, p_offset and p_filesz of an Elf64_Phdr.
_SEGMENT = struct.Struct("<I4xQ16xQ16x")
# /tmp may be memory.
_LARGE_TEMPORARY = "/var/tmp"  # noqa: S108 - what is made there has a name that nobody knows


class Sysroot:
    """A directory like the container's root, with what was asked for in it. It goes with this object, or our end.

    user: the uid that owns it, and that a debugger is to be run by.
    """

    def __init__(self, place: Place) -> None:
        self.place = place
        self.user = random.randint(*USERS)  # noqa: S311 - any will do
        self.path = tempfile.mkdtemp(prefix="core_pipe-", dir=_place())
        self._remove = weakref.finalize(self, shutil.rmtree, self.path, ignore_errors=True)
        self._left = MAX_BYTES
        self._tried: set[str] = set()
        self._brought: list[str] = []
        os.chmod(self.path, 0o755)  # noqa: S103 - for that user; what is not for everybody is not in each file's mode
        self._link_merged()

    def close(self) -> None:
        self._remove()

    def bring(self, path: str, resolve: int = STRICT, *, until: float | None = None) -> str | None:
        """Copy a program or library of the container's, and return its path here; None when it cannot be had.

        until: time.monotonic(), when nobody waits for it any more.
        """
        clean = clean_path(path)
        target = self.path + clean
        if clean in self._tried:
            return target if os.path.isfile(target) else None
        self._tried.add(clean)
        if clean.count("/") > MAX_DEPTH:
            return None
        try:
            os.makedirs(os.path.dirname(target), mode=0o755, exist_ok=True)
            fd = os.open(target, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        except (OSError, ValueError):
            # A stranger's path: too long, in a file, or no text.
            return None
        try:
            size, mode = take(
                f"{self.place.name}: {shown(clean)}",
                self.place.process,
                lambda root: _open_elf(root, clean, resolve),
                fd,
                allowed=_harmless,
                most=self._left,
                until=time.monotonic() + FILES_SECONDS if until is None else until,
            )
            self._left -= size
            os.fchown(fd, self.user, self.user)
            # As it is in the container, for the host's users.
            os.fchmod(fd, 0o644 if mode & 0o004 else 0o600)
        except Unreachable:
            os.unlink(target)
            return None
        finally:
            os.close(fd)
        self._brought.append(target)
        return target

    def bring_all(self, paths: list[str]) -> None:
        """Copy libraries, with the other names that they have in their directories."""
        folders: dict[str, list[str]] = {}
        until = time.monotonic() + FILES_SECONDS
        for path in paths[:MAX_FILES]:
            if time.monotonic() >= until:
                # What there is has to do.
                break
            if self.bring(path, until=until) is not None:
                folder, name = os.path.split(clean_path(path))
                folders.setdefault(folder, []).append(name)
        for program in [*self._brought]:
            # Known by a name that is a link in another directory.
            interpreter = interpreter_of(program)
            if interpreter is not None:
                self.bring(interpreter, WITHIN, until=until)
        for folder, names in folders.items():
            if time.monotonic() >= until:
                break
            for link, name in self._other_names(folder, names):
                try:
                    os.symlink(name, f"{self.path}{folder}/{link}")
                except OSError:
                    # There is a file of that name.
                    pass

    def _link_merged(self) -> None:
        """Make /lib a link to /usr/lib where the container has that: programs name their libraries by it."""
        process = self.place.process

        def work() -> Iterator[Answer]:
            root = open_root(process)
            found = []
            for name in MERGED:
                try:
                    if os.readlink(name, dir_fd=root).lstrip("/") == f"usr/{name}":
                        found.append(name)
                except OSError:
                    continue
            yield {"names": " ".join(found).encode()}, None

        for name in self._answer(work).split():
            os.makedirs(f"{self.path}/usr/{name}")
            os.symlink(f"usr/{name}", f"{self.path}/{name}")

    def _other_names(self, folder: str, names: list[str]) -> Iterator[tuple[str, str]]:
        """Yield the links in a folder of the container's to files there: libm.so.6 to libm-2.31.so."""
        process = self.place.process

        def work() -> Iterator[Answer]:
            fd = openat2(open_root(process), folder, os.O_RDONLY | os.O_DIRECTORY)
            found = b""
            with os.scandir(fd) as entries:
                for count, entry in enumerate(entries):
                    if count >= MAX_NAMES or len(found) > _MAX_MESSAGE:
                        break
                    if entry.is_symlink():
                        name = os.readlink(entry.name, dir_fd=fd)
                        if name in names and len(entry.name) + len(name) < _MAX_MESSAGE - len(found):
                            found += os.fsencode(entry.name) + b"\0" + os.fsencode(name) + b"\0"
            yield {"names": found}, None

        words = self._answer(work).split("\0")
        yield from zip(words[0:-1:2], words[1::2], strict=False)

    def _answer(self, work: object) -> str:
        """Return what a child says in its field `names`, nothing when it cannot."""
        try:
            look = apart.Look(work, time.monotonic() + LINK_SECONDS, all_but((self.place.process,)))  # type: ignore[arg-type]
            try:
                message = look.answer()
            finally:
                look.close()
        except apart.Stuck:
            return ""
        message.close()
        return os.fsdecode(message.fields.get("names", b""))


def _place() -> str:
    """Return a directory for large temporary files, $TMPDIR if everybody may pass through it.

    And if nobody else may put another directory in the place of ours: $TMPDIR may be that of who runs us by sudo.
    """
    wanted = os.path.realpath(os.environ.get("TMPDIR") or _LARGE_TEMPORARY)
    above = wanted
    while os.path.isdir(above) and _is_safe(os.stat(above)):
        if above == "/":
            return wanted
        above = os.path.dirname(above)
    return _LARGE_TEMPORARY


def _is_safe(found: os.stat_result) -> bool:
    """Whether everybody may pass through a directory, and what is in it stays where we have put it."""
    sticky = bool(found.st_mode & stat.S_ISVTX)
    return bool(found.st_mode & 0o001) and found.st_uid in (0, os.geteuid()) and (sticky or not found.st_mode & 0o022)


def clean_path(path: str) -> str:
    """Return an absolute path without anything that leads up, or nowhere."""
    return os.path.normpath("/" + path.removesuffix(" (deleted)").lstrip("/"))


def _open_elf(root: int, path: str, resolve: int) -> int:
    """Open a program or a library: of what else may be mapped, a debugger needs nothing. Raises OSError."""
    fd = open_regular(root, path, resolve)
    if os.pread(fd, 4, 0) != b"\x7fELF":
        raise OSError(errno.ENOEXEC, "no program and no library", path)
    return fd


def _harmless(process: int, found: os.stat_result) -> bool:
    """Whether a file is one that the container could read by itself: its own users', or everybody's."""
    return may_be_read(process, found) or bool(found.st_mode & 0o004)


def interpreter_of(program: str) -> str | None:
    """Return the dynamic linker's path that an ELF file of 64 bits names (elf(5)), None when it names none."""
    with open(program, "rb") as file:
        head = file.read(_PAGE)
        if len(head) < HEADER_SIZE or head[:6] != b"\x7fELF\x02\x01":
            return None
        (at,) = struct.unpack_from("<Q", head, 32)
        size, count = struct.unpack_from("<HH", head, 54)
        if size != _SEGMENT.size:
            return None
        for place in range(at, min(at + size * count, len(head) - size + 1), size):
            kind, offset, length = _SEGMENT.unpack_from(head, place)
            if kind == _PT_INTERP and length <= _PAGE:
                try:
                    file.seek(offset)
                except OverflowError:
                    return None
                return os.fsdecode(file.read(length).rstrip(b"\0")) or None
    return None


def mapped_files(core: int, compression: str | None) -> list[str]:
    """Return the names of the files that a stored core had mapped, as its notes have them; none when it has none."""
    until = time.monotonic() + NOTES_SECONDS
    left = MAX_NOTES
    try:
        stored = StoredCore(core, compression)
        first = stored.read(0, first_size(stored.read(0, HEADER_SIZE)))
        head = read_head(stored.read(0, head_size(first)))
        parser = Parser(head.machine, is_64=head.is_64)
        for segment in head.segments:
            if segment.kind != PT_NOTE:
                continue
            length = min(segment.file_size, left)
            left -= length
            for at in range(segment.offset, segment.offset + length, _PIECE):
                if time.monotonic() >= until:
                    return []
                parser.feed(stored.read(at, min(_PIECE, segment.offset + length - at)))
    except (NotACore, Damaged, OSError, ValueError):
        return []
    names = dict.fromkeys(os.fsdecode(file.name) for file in parser.notes.files)
    return [name for name in names if name.startswith("/") and not name.startswith(("/dev/", "/memfd:", "/SYSV"))]
