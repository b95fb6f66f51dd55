"""Which crashes a user means, and what is said when there is none."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, NamedTuple

from receiver.tables import shown

if TYPE_CHECKING:
    from collections.abc import Iterable

    from receiver.ctl.sources import Source
    from receiver.record import Record


class UsageProblem(Exception):
    """Something the user can mend; the text says how."""


class Crash(NamedTuple):
    """A record, and where it was found."""

    record: Record
    source: Source


def matches(record: Record, match: str) -> bool:
    """Whether a record is meant by a MATCH."""
    if "/" in match:
        return record.exe in (match, f"{match} (deleted)")
    return match in (str(record.pid), record.comm) or (len(match) >= 8 and record.id.startswith(match))


def crashes(sources: Iterable[Source], match: str | None) -> list[Crash]:
    """Return what is meant, the newest last. Raises OSError."""
    found = []
    unreadable = 0
    for source in sources:
        records, more = source.records()
        unreadable += more
        found += [Crash(record, source) for record in records if match is None or matches(record, match)]
    if unreadable:
        # For an ordinary user every other user's, so one line for all of them.
        print(f"corepipectl: {unreadable} more cannot be read as records, or not by you", file=sys.stderr)
    # An id begins with the time at which the crash came, in each store alike.
    return sorted(found, key=lambda crash: crash.record.id)


def newest(sources: Iterable[Source], match: str) -> Crash:
    """Return the newest match. Raises UsageProblem, OSError."""
    found = crashes(sources, match)
    if not found:
        raise UsageProblem(f"no crash matches '{match}'. 'corepipectl list' shows what there is")
    return found[-1]


def newest_with_core(sources: Iterable[Source], match: str) -> Crash:
    """Return the newest match that has a core. Raises UsageProblem with the newest one's reason when none has."""
    found = crashes(sources, match)
    for crash in reversed(found):
        if crash.record.core.path is not None:
            return crash
    record = (found[-1] if found else newest(sources, match)).record
    raise UsageProblem(f"crash {shown(record.id)} has no core: {shown(record.core.reason or 'no reason is recorded')}")
