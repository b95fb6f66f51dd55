"""Crashes counted: by what they have in common, and along time."""

from __future__ import annotations

import time
from collections import Counter
from typing import TYPE_CHECKING, NamedTuple

from receiver.reasons import word_for

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from receiver.record import Record

# What is present: the whole core, or a part of it; and what has none, or none any more.
STORED, REDUCED, NONE = "stored", "reduced", "none"
STATES = (STORED, REDUCED, NONE)
UNKNOWN = "unknown"
# Of a crash that was in no container as far as this place knows.
HERE = "-"
# Days or hours without a crash are rows, too, so that a row is as long as the next; but not for years of them.
_MOST_FILLED = 400


class Event(NamedTuple):
    """A crash. at: seconds since the epoch, 0 when its record does not tell. place: its container, "" for here."""

    at: float
    record: Record
    place: str = ""


class Group:
    """Crashes that have something in common. size: bytes on disk that their cores take now."""

    __slots__ = ("events", "key", "reasons", "size", "states")

    def __init__(self, key: str) -> None:
        self.key = key
        self.events: list[Event] = []
        self.states: Counter[str] = Counter()
        self.reasons: Counter[str] = Counter()
        self.size = 0

    def add(self, event: Event) -> None:
        core = event.record.core
        self.events.append(event)
        state = state_of(event.record)
        self.states[state] += 1
        if state == NONE:
            self.reasons[word_for(core)] += 1
        else:
            self.size += max(0, core.stored_bytes)

    @property
    def crashes(self) -> int:
        return len(self.events)

    @property
    def first(self) -> float:
        return min((event.at for event in self.events), default=0.0)

    @property
    def last(self) -> float:
        return max((event.at for event in self.events), default=0.0)

    @property
    def newest(self) -> Record:
        return max(self.events, key=lambda event: event.at).record


def state_of(record: Record) -> str:
    """Return which of STATES a crash's core is in now."""
    if record.core.path is None:
        return NONE
    return REDUCED if record.core.state == REDUCED else STORED


def program(record: Record) -> str:
    """Return what crashed: its path, or its name where that is all that is known."""
    return (record.exe or record.comm or UNKNOWN).removesuffix(" (deleted)")


def _day(event: Event) -> str:
    return time.strftime("%Y-%m-%d", time.localtime(event.at))


def _hour(event: Event) -> str:
    return time.strftime("%Y-%m-%d %H:00", time.localtime(event.at))


# Days and hours are the local zone's.
BY: dict[str, Callable[[Event], str]] = {
    "exe": lambda event: program(event.record),
    "signature": lambda event: event.record.signature or UNKNOWN,
    "signal": lambda event: event.record.signal_name,
    "user": lambda event: str(event.record.uid),
    "container": lambda event: event.place or event.record.container or HERE,
    "day": _day,
    "hour": _hour,
}
# Whose rows are in the order of time; those of the others begin with the most frequent.
IN_TIME = {"day": 86400, "hour": 3600}


def grouped(events: Iterable[Event], by: str) -> list[Group]:
    """Return the crashes by one of BY."""
    key_of = BY[by]
    groups: dict[str, Group] = {}
    for event in events:
        key = key_of(event)
        if key not in groups:
            groups[key] = Group(key)
        groups[key].add(event)
    if by not in IN_TIME:
        return sorted(groups.values(), key=lambda group: (-group.crashes, -group.last, group.key))
    _fill(groups, key_of, IN_TIME[by])
    return [groups[key] for key in sorted(groups)]


def _fill(groups: dict[str, Group], key_of: Callable[[Event], str], seconds: int) -> None:
    """Add the days or hours in between, in which nothing crashed."""
    if not groups:
        return
    # (One that does not tell its time stands alone, in 1970.)
    first = min((group.first for group in groups.values() if group.first), default=0.0)
    last = max(group.last for group in groups.values())
    record = next(iter(groups.values())).newest
    if (last - first) / seconds > _MOST_FILLED:
        return
    at = first
    while at < last:
        key = key_of(Event(at, record))
        groups.setdefault(key, Group(key))
        # Not more than an hour: a day has 23, 24 or 25 of them.
        at += min(seconds, 3600)


def total(events: Iterable[Event]) -> Group:
    """Return all of them as one."""
    group = Group("")
    for event in events:
        group.add(event)
    return group


class Slot(NamedTuple):
    """A part of a time line. begun: seconds since the epoch. states: how many crashes, by state."""

    begun: float
    states: Counter[str]


# The lengths that a slot of a time line may have: what people can read off it.
_LENGTHS = (60, 300, 900, 1800, 3600, 7200, 14400, 28800, 43200, 86400, 2 * 86400, 7 * 86400, 28 * 86400)


def slots_of(begun: float, ended: float, most: int) -> tuple[float, int, int]:
    """Return when the first slot of a time line begins, how long each is, and how many there are: at the most `most`.

    They begin at round times of the local zone, as it is in the beginning.
    """
    span = max(ended - begun, 60.0)
    # Of a longer time: as many weeks as it takes.
    length = next((length for length in _LENGTHS if span / length <= most - 1), 0)
    if not length:
        length = int(span // (most - 1) // (7 * 86400) + 1) * 7 * 86400
    offset = time.localtime(begun).tm_gmtoff
    first = (begun + offset) // length * length - offset
    return first, length, int((ended - first) // length) + 1


def timeline(events: Sequence[Event], first: float, length: int, number: int) -> list[Slot]:
    """Return the slots of a time line (see `slots_of`). Crashes before and after it are left out."""
    slots = [Slot(first + length * index, Counter()) for index in range(number)]
    for event in events:
        index = int((event.at - first) // length)
        if 0 <= index < number:
            slots[index].states[state_of(event.record)] += 1
    return slots
