"""Which crashes a user means, and what is said when there is none.

As coredumpctl(1) has it: several MATCHes of one kind are alternatives, those of different kinds hold together.
"""

from __future__ import annotations

import os
import re
import sys
from typing import TYPE_CHECKING, Any, NamedTuple

from receiver.ctl import times
from receiver.record import Core, Record, microseconds
from receiver.tables import shown

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from receiver.ctl.sources import Source

    Test = Callable[[Record], bool]

NO_MATCH = "no match found"
# So much of an id or a signature means it: fewer characters are too often a pid, or a name.
LEAST_ID = 8
LEAST_SIGNATURE = 6
_NUMBER = re.compile(r"[0-9]+")
_SIGNATURE = re.compile(rf"[0-9a-f]{{{LEAST_SIGNATURE},}}")
_ID = re.compile(r"[0-9]{8}T[0-9a-f-]*")


class UsageProblem(Exception):
    """Something the user can mend; the text says how."""


class Crash(NamedTuple):
    """A record, and where it was found."""

    record: Record
    source: Source


def matches(record: Record, match: str) -> bool:
    """Whether a record is meant by one MATCH. Raises UsageProblem."""
    return _parsed(match)[1](record)


def matcher(wanted: Sequence[str]) -> Test:
    """Return the test for a record of all these MATCHes together. Raises UsageProblem."""
    kinds: dict[str, list[Test]] = {}
    for match in wanted:
        kind, test = _parsed(match)
        kinds.setdefault(kind, []).append(test)
    return lambda record: all(any(test(record) for test in tests) for tests in kinds.values())


def _parsed(match: str) -> tuple[str, Test]:
    """Return what kind of MATCH a word is, and its test.

    The kind is told by the word alone, so that it is the same whatever there is; a comm may look like anything.
    """
    field, equals, value = match.partition("=")
    if equals and "/" not in field:
        name, values = field_of(field)
        return f"={name}", lambda record: any(_same(name, found, value) for found in values(record))
    if "/" in match:
        paths = {match, os.path.abspath(match)}
        return "exe", lambda record: record.exe is not None and record.exe.removesuffix(" (deleted)") in paths
    if _NUMBER.fullmatch(match):
        kind = "pid"
    elif _ID.fullmatch(match):
        kind = "id"
    elif _SIGNATURE.fullmatch(match):
        kind = "signature"
    else:
        kind = "comm"
    return (
        kind,
        lambda record: (
            match in (str(record.pid), record.comm)
            or (len(match) >= LEAST_ID and record.id.startswith(match))
            or (len(match) >= LEAST_SIGNATURE and (record.signature or "").startswith(match))
        ),
    )


def _same(name: str, found: str, value: str) -> bool:
    if name == "signature" and len(value) >= LEAST_SIGNATURE:
        return found.startswith(value)
    return found == value or (name == "exe" and found.removesuffix(" (deleted)") == value)


# Fields.


def _signal(record: Record) -> list[object]:
    return [record.signal, record.signal_name, record.signal_name.removeprefix("SIG")]


# coredumpctl's names, for those who have them in their fingers and scripts: systemd.journal-fields(7).
_COREDUMP: dict[str, Callable[[Record], object]] = {
    "COREDUMP_PID": lambda record: record.pid,
    "COREDUMP_TID": lambda record: record.tid,
    "COREDUMP_UID": lambda record: record.uid,
    "COREDUMP_GID": lambda record: record.gid,
    "COREDUMP_SIGNAL": lambda record: record.signal,
    "COREDUMP_SIGNAL_NAME": lambda record: record.signal_name,
    "COREDUMP_TIMESTAMP": lambda record: microseconds(record.timestamp),
    "COREDUMP_EXE": lambda record: record.exe,
    "COREDUMP_COMM": lambda record: record.comm,
    "COREDUMP_CMDLINE": lambda record: " ".join(record.command_line) if record.command_line else None,
    "COREDUMP_CWD": lambda record: record.cwd,
    "COREDUMP_ROOT": lambda record: record.root,
    "COREDUMP_CGROUP": lambda record: record.cgroup,
    "COREDUMP_UNIT": lambda record: record.unit,
    "COREDUMP_HOSTNAME": lambda record: record.host_name,
    "COREDUMP_FILENAME": lambda record: record.core.path,
    "COREDUMP_TRUNCATED": lambda record: 1 if record.core.state == "reduced" else None,
    "COREDUMP_PACKAGE_NAME": lambda record: (record.package or {}).get("name"),
    "COREDUMP_PACKAGE_VERSION": lambda record: (record.package or {}).get("version"),
}


def field_of(field: str) -> tuple[str, Callable[[Record], list[str]]]:
    """Return a field's name, and what gives its values in a record. Raises UsageProblem.

    field: a record's (`uid`), one of its core's (`core.state`, `state`), one of a table's (`environment.HOME`, all of
    them as `NAME=value`), or coredumpctl's (`COREDUMP_UID`).
    """
    if field in _COREDUMP:
        get = _COREDUMP[field]
        return field, lambda record: _texts(get(record))
    name, _, key = field.partition(".")
    name = name.lower()
    if name == "core" and key:
        name, key = key, ""
    if name == "signal" and not key:
        return name, lambda record: [str(value) for value in _signal(record)]
    if name != "core" and name in Record.__annotations__ and not (key and "dict" not in Record.__annotations__[name]):
        if key:
            return field, lambda record: _texts((getattr(record, name) or {}).get(key))
        return name, lambda record: _texts(getattr(record, name))
    if name in Core.__annotations__ and not key:
        return name, lambda record: _texts(getattr(record.core, name))
    known = sorted(({*Record.__annotations__} - {"core"}) | {*Core.__annotations__})
    raise UsageProblem(
        f"a record has no field '{shown(field)}'. There are: {', '.join(known)}, and coredumpctl's names"
    )


def _texts(value: Any) -> list[str]:
    """Return a field's value as texts, one for each that it has."""
    if value is None:
        return []
    if isinstance(value, list):
        return [str(item) for item in value]
    if isinstance(value, dict):
        return [f"{name}={item}" for name, item in value.items()]
    return [str(value)]


# What there is.


def crashes(
    sources: Iterable[Source],
    match: str | Sequence[str] | None,
    *,
    since: float | None = None,
    until: float | None = None,
    quiet: bool = False,
) -> list[Crash]:
    """Return what is meant, the newest last. Raises UsageProblem, OSError.

    match: one or several; None or none for all. since, until: seconds since the epoch, both included.
    """
    test = matcher([match] if isinstance(match, str) else match or ())
    found = []
    unreadable = 0
    for source in sources:
        records, more = source.records()
        unreadable += more
        for record in records:
            if (since is not None and times.of(record) < since) or (until is not None and times.of(record) > until):
                continue
            if test(record):
                found.append(Crash(record, source))
    if unreadable and not quiet:
        # For an ordinary user every other user's, so one line for all of them.
        print(f"corepipectl: {unreadable} more cannot be read as records, or not by you", file=sys.stderr)
    # An id begins with the time at which the crash came, in each store alike.
    return sorted(found, key=lambda crash: crash.record.id)


def newest(sources: Iterable[Source], match: str | Sequence[str] | None, **limits: Any) -> Crash:
    """Return the newest match. limits: as for `crashes`. Raises UsageProblem, OSError."""
    found = crashes(sources, match, **limits)
    if not found:
        raise UsageProblem(f"{NO_MATCH}. 'corepipectl list' shows what there is")
    return found[-1]


def newest_with_core(sources: Iterable[Source], match: str | Sequence[str] | None, **limits: Any) -> Crash:
    """Return the newest match that has a core. Raises UsageProblem with the newest one's reason when none has."""
    found = crashes(sources, match, **limits)
    with_core = [crash for crash in found if crash.record.core.path is not None]
    if not with_core:
        record = (found[-1] if found else newest((), None)).record
        raise UsageProblem(
            f"crash {shown(record.id)} has no core: {shown(record.core.reason or 'no reason is recorded')}"
        )
    if len(with_core) > 1 and not limits.get("quiet"):
        print("More than one entry matches, ignoring rest.", file=sys.stderr)
    return with_core[-1]
