"""Facts of a crash that are looked up when its process has been let go: they cost nobody's restart.

Its mappings come from the core's own headers and notes, and not from /proc/PID/maps: that waits for the memory's lock,
which a process that shares the memory may hold for ever (its page fault lies on a file system that never answers); and
without CAP_SYS_PTRACE nobody may read it.

Imported late, with Accept=yes for each crash.
"""

from __future__ import annotations

import os
import re
import time
from typing import TYPE_CHECKING

from receiver import masking
from receiver.elfcore import PF_W, PF_X, PT_LOAD
from receiver.log import log
from receiver.process import json_size
from receiver.record import text
from receiver.store import StoreError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from receiver.config import Config
    from receiver.record import Record
    from receiver.store import Store
    from receiver.witness import Witness

PACKAGE_SECONDS = 2.0
JOURNAL_SECONDS = 2.0
# Bytes as JSON, in the record.
MAX_MAPPINGS_SIZE = 32 << 10
MAX_JOURNAL_SIZE = 8 << 10
MAX_JOURNAL_LINES = 10
# What of a line of a log is looked at.
MAX_JOURNAL_LINE = 2048
# A process may have tens of thousands of mappings: so many are looked at.
MAX_SEGMENTS = 10_000
PF_R = 4
# <linux/auxvec.h>: both are addresses of something, the first on the first thread's stack.
AT_RANDOM, AT_SYSINFO_EHDR = 25, 33
# What there is where a journal is: the running one's socket, or the files of one.
_JOURNALS = ("/run/systemd/journal/socket", "/var/log/journal", "/run/log/journal")


def complete(record: Record, config: Config, store: Store, witness: Witness | None, reader: int | None) -> None:
    """Look them up, and write them into the record in the store, and into this one. Never raises.

    reader: the uid that may read the record besides root: he is not told what others wrote into the unit's log.
    """
    found: dict[str, list[str] | dict[str, str]] = {}
    for name, look in (
        ("mappings", lambda: None if witness is None else mappings(witness)),
        ("package", lambda: _package(record, witness)),
        ("journal", lambda: _journal(record, config, reader)),
    ):
        if name not in config.facts:
            continue
        try:
            value = look()
        except Exception as error:
            log(f"crash {record.id}: its record goes without its {name}: {type(error).__name__}: {error}", error=True)
            continue
        if value:
            found[name] = value
    try:
        if found and store.amend(record.id, found) is not None:
            for name, value in found.items():
                setattr(record, name, value)
    except (OSError, StoreError, ValueError) as error:
        # A full disk, above all: the crash is kept without them.
        log(f"crash {record.id}: its record goes without {', '.join(found)}: {error}", error=True)


def _package(record: Record, witness: Witness | None) -> dict[str, str] | None:
    from receiver import packages  # noqa: PLC0415  (only where somebody wants it)

    page = b"" if witness is None else witness.program_page
    return packages.package_of(record.exe, page, seconds=PACKAGE_SECONDS)


def _journal(record: Record, config: Config, reader: int | None) -> list[str] | None:
    return journal(record, re.compile(config.secret_pattern, re.IGNORECASE), reader)


class _Mapping:
    """One line. name: the file's, or what stands in its place; "" for memory that has none."""

    def __init__(self, start: int, end: int, flags: str, offset: int, name: str) -> None:
        self.start = start
        self.end = end
        self.flags = flags
        self.offset = offset
        self.name = name

    def __str__(self) -> str:
        return f"{self.start:x}-{self.end:x} {self.flags} {self.offset:08x} {self.name}".rstrip()


def mappings(witness: Witness) -> list[str]:
    """Return its mappings as lines like those of proc_pid_maps(5): start-end, flags, offset in the file, name.

    When there are too many for a record, those of one file become one line; then memory without a name is left out,
    and then the last ones. The last line says what was left out.
    """
    found = list(_mappings(witness))
    segments = sum(segment.kind == PT_LOAD for segment in witness.head.segments)
    if len(found) == segments and _size(found) <= MAX_MAPPINGS_SIZE:
        return [str(mapping) for mapping in found]
    found = [mapping for mapping in _together(found) if mapping.name]
    lines: list[str] = []
    size = 128
    for mapping in found:
        line = str(mapping)
        size += json_size(line)
        if size > MAX_MAPPINGS_SIZE:
            break
        lines.append(line)
    return [*lines, f"... shortened, of {segments} mappings"]


def _size(found: Iterable[_Mapping]) -> int:
    return sum(json_size(str(mapping)) for mapping in found)


def _mappings(witness: Witness) -> Iterator[_Mapping]:
    notes = witness.notes
    count = 0
    for segment in witness.head.segments:
        if segment.kind != PT_LOAD:
            continue
        if count >= MAX_SEGMENTS:
            return
        count += 1
        start, end = segment.address, segment.address + segment.memory_size
        flags = "".join(
            letter if segment.flags & bit else "-" for letter, bit in (("r", PF_R), ("w", PF_W), ("x", PF_X))
        )
        file = notes.files.find(start)
        name, offset = "", 0
        if file is not None:
            name, offset = text(file.name), file.offset + start - file.start
        elif start <= notes.auxv.get(AT_SYSINFO_EHDR, 0) < end:
            name = "[vdso]"
        elif start <= notes.auxv.get(AT_RANDOM, 0) < end:
            name = "[stack]"
        yield _Mapping(start, end, flags, offset, name)


def _together(found: Iterable[_Mapping]) -> Iterator[_Mapping]:
    """Put neighbours of one file together."""
    last: _Mapping | None = None
    for mapping in found:
        if last is not None and mapping.name and mapping.name == last.name:
            flags = last.flags if last.flags.endswith(mapping.flags) else f"{last.flags}+{mapping.flags}"
            last = _Mapping(last.start, mapping.end, flags[:64], last.offset, last.name)
            continue
        if last is not None:
            yield last
        last = mapping
    if last is not None:
        yield last


def journal(record: Record, secret: re.Pattern[str], reader: int | None) -> list[str] | None:
    """Return the last lines of the unit's log, None without any. Secrets are masked. Raises OSError.

    reader: as for `complete`.
    """
    if record.unit is None or not any(os.path.exists(path) for path in _JOURNALS):
        return None
    from receiver.children import ask  # noqa: PLC0415  (only where there is a journal)

    command = ["journalctl", "--quiet", "--no-pager", "--output=short-iso", f"--lines={MAX_JOURNAL_LINES}"]
    # Not what the unit wrote since then: it may have been started again.
    command += [f"--until=@{int(time.time()) + 1}", f"--unit={record.unit}"]
    if reader is not None and reader != 0:
        command.append(f"_UID={reader}")
    try:
        answer = ask(command, seconds=JOURNAL_SECONDS, most=64 << 10)
    except FileNotFoundError:
        return None
    kept: list[str] = []
    size = 0
    # The last ones count.
    for raw in reversed(answer.output.split(b"\n")):
        line = masking.text(text(raw[:MAX_JOURNAL_LINE]), secret)
        size += json_size(line)
        if size > MAX_JOURNAL_SIZE or len(kept) >= MAX_JOURNAL_LINES:
            break
        if line:
            kept.append(line)
    return kept[::-1] or None
