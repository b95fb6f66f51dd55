"""Which package a program came in: by the note in the program itself, or by what the package manager has on disk.

Both are hostile text to whoever shows it: anyone may write a program with a note, and a container has its own files.
The databases are read by hand where they are text (dpkg, apk): starting `dpkg-query` costs more than looking. rpm's is
not, so `rpm` is asked where there is one.
"""

from __future__ import annotations

import json
import os
import struct
import time

# What is larger is no database. A Debian desktop has 60 MiB of lists, in 3000 files; the others are one of a few MiB.
MAX_FILE = 16 << 20
MAX_LISTS = 256 << 20
# Bytes of a value that are kept.
MAX_VALUE = 256
RPM_SECONDS = 2.0
# Where no package puts programs: these are not looked up.
_NO_PACKAGES = ("/home/", "/root/", "/tmp/", "/var/tmp/", "/run/", "/dev/", "/proc/", "/memfd:")  # noqa: S108
# https://uapi-group.org/specifications/specs/package_metadata_for_executable_files/
_NOTE_KIND = 0xCAFE1A7E
_NOTE_OWNER = b"FDO\0"
RPM = "/usr/bin/rpm"
_RPM_DATABASES = ("/var/lib/rpm", "/usr/lib/sysimage/rpm")

Package = dict[str, str]


class TooLong(Exception):
    """The deadline has passed."""


def package_of(exe: str | None, page: bytes = b"", *, seconds: float = 2.0, root: str = "") -> Package | None:
    """Return manager, name, version and architecture, as far as they are known; None for a program of no package.

    exe: the path of the program. page: the first page of what ran, which may be another file by now. root: where the
    databases are looked for (for tests). Never raises.
    """
    found = note(page)
    if found is not None:
        return found
    # One that was replaced since it started came in a version that nobody has any more.
    if exe is None or not exe.startswith("/") or exe.endswith(" (deleted)") or exe.startswith(_NO_PACKAGES):
        return None
    deadline = time.monotonic() + seconds
    for ask in (_dpkg, _apk, _rpm):
        try:
            found = ask(root, _names(exe), deadline)
        except TooLong:
            return None
        except (OSError, ValueError):
            continue
        if found is not None:
            return found
    return None


def _names(exe: str) -> list[str]:
    """The names that a database may have for a file: a merged /usr has /bin/sh as /usr/bin/sh (usrmerge)."""
    names = [exe]
    if exe.startswith(("/usr/bin/", "/usr/sbin/", "/usr/lib")):
        names.append(exe.removeprefix("/usr"))
    if exe.startswith("/usr/bin/"):
        # Fedora 42 and others have merged these two as well.
        names += ["/usr/sbin/" + exe.removeprefix("/usr/bin/"), "/sbin/" + exe.removeprefix("/usr/bin/")]
    return names


def note(page: bytes) -> Package | None:
    """Return what an ELF file's package note says, by the file's first page (any bytes will do), None without one."""
    for kind, owner, content in _notes(page):
        if kind == _NOTE_KIND and owner == _NOTE_OWNER:
            try:
                found = json.loads(content.rstrip(b"\0"))
            except (ValueError, RecursionError):
                return None
            if not isinstance(found, dict):
                return None
            return _package(found.get("type"), found.get("name"), found.get("version"), found.get("architecture"))
    return None


def _notes(page: bytes) -> list[tuple[int, bytes, bytes]]:
    """Return (kind, owner, content) of the notes that are whole in a page."""
    if len(page) < 64 or page[:4] != b"\x7fELF" or page[4] not in (1, 2) or page[5] != 1:
        return []
    is_64 = page[4] == 2
    (at,) = struct.unpack_from("<Q" if is_64 else "<I", page, 32 if is_64 else 28)
    size, count = struct.unpack_from("<HH", page, 54 if is_64 else 42)
    row = struct.Struct("<I4xQ16xQ8xQ" if is_64 else "<II8xI8xI")
    found = []
    while count and size >= row.size and at + row.size <= len(page):
        kind, offset, length, align = row.unpack_from(page, at)
        at += size
        count -= 1
        if kind != 4:
            continue
        align = 8 if align == 8 else 4
        here, end = offset, min(offset + length, len(page))
        while here + 12 <= end:
            owner, content, number = struct.unpack_from("<III", page, here)
            start = -(-(here + 12 + owner) // align) * align
            if start + content > end:
                break
            found.append((number, page[here + 12 : here + 12 + owner], page[start : start + content]))
            here = -(-(start + content) // align) * align
    return found


def _package(manager: object, name: object, version: object, architecture: object = None) -> Package | None:
    if not isinstance(name, str) or not name:
        return None
    values = {"manager": manager, "name": name, "version": version, "architecture": architecture}
    return {key: value[:MAX_VALUE] for key, value in values.items() if isinstance(value, str) and value}


def _read(path: str, deadline: float, most: int = MAX_FILE) -> bytes:
    """Return a file's bytes. Raises OSError, ValueError (too large), TooLong."""
    # Not waiting, should it be a FIFO.
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
    try:
        size = os.fstat(fd).st_size
        if size > most:
            raise ValueError("it is larger than a database is")
        parts = []
        left = size
        while left and (part := os.read(fd, min(left, 1 << 20))):
            parts.append(part)
            left -= len(part)
            if time.monotonic() > deadline:
                raise TooLong
        return b"".join(parts)
    finally:
        os.close(fd)


def _dpkg(root: str, names: list[str], deadline: float) -> Package | None:
    folder = f"{root}/var/lib/dpkg/info"
    wanted = [b"\n" + os.fsencode(name) + b"\n" for name in names]
    left = MAX_LISTS
    with os.scandir(folder) as entries:
        lists = [entry.name for entry in entries if entry.name.endswith(".list")]
    # Most programs are in the package of their name; else there are megabytes to read.
    program = names[0].rpartition("/")[2]
    lists.sort(key=lambda name: not name.startswith(program))
    for name in lists:
        content = b"\n" + _read(f"{folder}/{name}", deadline, left) + b"\n"
        left -= len(content)
        if any(line in content for line in wanted):
            package, _, architecture = name.removesuffix(".list").partition(":")
            return _dpkg_version(root, package, architecture, deadline)
        if time.monotonic() > deadline:
            raise TooLong
    return None


def _dpkg_version(root: str, package: str, architecture: str, deadline: float) -> Package | None:
    status = b"\n\n" + _read(f"{root}/var/lib/dpkg/status", deadline)
    at = 0
    # Of a package of several architectures there are several.
    while (at := status.find(b"\n\nPackage: " + os.fsencode(package) + b"\n", at)) >= 0:
        end = status.find(b"\n\n", at + 2)
        fields = _fields(status[at + 2 : len(status) if end < 0 else end], b": ")
        if not architecture or fields.get("Architecture") == architecture:
            return _package("dpkg", package, fields.get("Version"), fields.get("Architecture"))
        at += 2
    return _package("dpkg", package, None, architecture)


def _fields(stanza: bytes, colon: bytes) -> dict[str, str]:
    found: dict[str, str] = {}
    for line in stanza.split(b"\n"):
        name, mark, value = line.partition(colon)
        if mark:
            found.setdefault(name.decode("utf-8", "backslashreplace"), value.decode("utf-8", "backslashreplace"))
    return found


def _apk(root: str, names: list[str], deadline: float) -> Package | None:
    """Look into apk's installed database: stanzas of P: name, V: version, A: architecture, F: folder, R: file in it."""
    content = b"\n" + _read(f"{root}/lib/apk/db/installed", deadline) + b"\n"
    for name in names:
        folder, _, file = os.fsencode(name).rpartition(b"/")
        at = 0
        while (at := content.find(b"\nF:" + folder.lstrip(b"/") + b"\n", at)) >= 0:
            at += 1
            # Its files, to the next folder or the stanza's end.
            ends = [end for end in (content.find(b"\nF:", at), content.find(b"\n\n", at)) if end >= 0]
            if b"\nR:" + file + b"\n" in content[at : min(ends, default=len(content)) + 1]:
                start = content.rfind(b"\n\n", 0, at) + 1
                fields = _fields(content[start:at], b":")
                return _package("apk", fields.get("P"), fields.get("V"), fields.get("A"))
            if time.monotonic() > deadline:
                raise TooLong
    return None


def _rpm(root: str, names: list[str], deadline: float) -> Package | None:
    if root or not any(os.path.isdir(path) for path in _RPM_DATABASES) or not os.path.exists(RPM):
        return None
    from receiver.children import ask  # noqa: PLC0415  (only where there is rpm)

    for name in names:
        seconds = min(RPM_SECONDS, deadline - time.monotonic())
        if seconds <= 0:
            raise TooLong
        form = "%{NAME}\n%{EVR}\n%{ARCH}\n"
        answer = ask([RPM, "-qf", "--queryformat", form, "--", name], seconds=seconds, most=4096)
        words = answer.output.decode("utf-8", "backslashreplace").split("\n")
        if answer.status == 0 and len(words) >= 4:
            return _package("rpm", *words[:3])
    return None
