"""Times as systemd.time(7) has them: what people type (`yesterday`, `2 hours ago`), and what they read."""

from __future__ import annotations

import calendar
import re
import time
from datetime import datetime, tzinfo
from typing import TYPE_CHECKING

from receiver.record import microseconds

if TYPE_CHECKING:
    from receiver.record import Record

MINUTE, HOUR, DAY, WEEK = 60, 3600, 86400, 7 * 86400
# systemd's: 30.44 and 365.25 days.
MONTH, YEAR = 2629800, 31557600
# Seconds of each unit, in systemd's own words; `M` is a month and `m` a minute.
_UNITS: dict[str, float] = {
    word: seconds
    for words, seconds in (
        ("seconds second sec s", 1),
        ("minutes minute min m", MINUTE),
        ("months month M", MONTH),
        ("msec ms", 1e-3),
        ("usec us µs μs", 1e-6),
        ("hours hour hr h", HOUR),
        ("days day d", DAY),
        ("weeks week w", WEEK),
        ("years year y", YEAR),
        ("", 1),
    )
    for word in words.split(" ")
}
# Not \d, which knows the digits of every script; int() would read them.
_PART = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?|\.[0-9]+)\s*([A-Za-zµμ]*)\s*")
_DATE = re.compile(r"([0-9]{4}|[0-9]{2})-([0-9]{1,2})-([0-9]{1,2})")
_TIME = re.compile(r"([0-9]{1,2}):([0-9]{1,2})(?::([0-9]{1,2})(\.[0-9]{1,6})?)?")
_RFC3339 = re.compile(r"([0-9]{4}-[0-9]{2}-[0-9]{2})T([0-9:.]+)Z")
_DAYS = ("Mon", "Tue", "Wed", "Thu", "Fri", "Sat", "Sun")
_LONG_DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
_ZONE = re.compile(r"[A-Za-z][A-Za-z0-9_+-]*(?:/[A-Za-z0-9_+-]+){1,2}")
# How an id of store.ID begins.
_STAMP = re.compile(r"([0-9]{4})([0-9]{2})([0-9]{2})T([0-9]{2})([0-9]{2})([0-9]{2})-.*", re.DOTALL)
# int() takes its time for digits without end.
_LONGEST = 40
# The last second of the year 9999: what comes after it is nobody's, and breaks calendars.
_LAST = 253402300799


def parse(text: str, now: float | None = None) -> float:
    """Return the seconds since the epoch that a text of systemd.time(7) means. now: in its place, for who knows better.

    Raises ValueError; its text follows the word in question.
    """
    now = time.time() if now is None else now
    try:
        found = _parse(text.strip(), now)
    except (ValueError, OverflowError):
        found = None
    if found is None or not found <= _LAST:
        raise ValueError("is no time; write one as '2026-01-31 13:45', 'yesterday', '-2h' or '3 days ago'")
    return max(0.0, found)


def _parse(text: str, now: float) -> float | None:
    if text == "now":
        return now
    if text.startswith("@"):
        return span(text[1:])
    if text.startswith("+"):
        return now + span(text[1:])
    if text.startswith("-"):
        return now - span(text[1:])
    if text.endswith(" ago"):
        return now - span(text.removesuffix(" ago"))
    if text.endswith(" left"):
        return now + span(text.removesuffix(" left"))
    if (exact := _RFC3339.fullmatch(text)) is not None:
        # As our own records have it.
        text = f"{exact[1]} {exact[2]} UTC"
    return _absolute(text, now)


def span(text: str) -> float:
    """Return the seconds of a time span, as `1h 30min`; a bare number has seconds. Raises ValueError."""
    seconds = 0.0
    at = 0
    while True:
        part = _PART.match(text, at)
        if part is None or part[2] not in _UNITS:
            raise ValueError("no time span")
        seconds += float(part[1]) * _UNITS[part[2]]
        at = part.end()
        if at == len(text):
            return seconds


def _absolute(text: str, now: float) -> float | None:
    words = text.split()
    zone: str | None = None
    if len(words) > 1 and (words[-1] == "UTC" or words[-1] in time.tzname or _ZONE.fullmatch(words[-1])):
        zone = words.pop()
    names = [name.lower() for name in (*_DAYS, *_LONG_DAYS)]
    weekday = None
    if len(words) > 1 and words[0].lower() in names:
        weekday = names.index(words.pop(0).lower()) % 7
    today = _date_of(now, zone)
    shift = {"yesterday": -1, "today": 0, "tomorrow": 1}.get(words[0] if words else "")
    if shift is not None:
        if len(words) > 1:
            return None
        return _seconds((today[0], today[1], today[2] + shift), (0, 0, 0.0), zone)
    if not 1 <= len(words) <= 2:
        return None
    day, clock = today, (0, 0, 0.0)
    is_date = _DATE.fullmatch(words[0])
    if is_date is not None:
        day = _year(is_date[1]), _within(is_date[2], 1, 12), _within(is_date[3], 1, 31)
        words.pop(0)
    elif len(words) > 1:
        return None
    if words:
        is_time = _TIME.fullmatch(words[0])
        if is_time is None:
            return None
        seconds = _within(is_time[3] or "0", 0, 60) + float(is_time[4] or 0)
        clock = _within(is_time[1], 0, 23), _within(is_time[2], 0, 59), seconds
    if weekday is not None and calendar.weekday(*day) != weekday:
        return None
    return _seconds(day, clock, zone)


def _year(text: str) -> int:
    number = int(text)
    if len(text) == 4:
        return number
    # strptime(3)'s %y
    return number + (1900 if number >= 69 else 2000)


def _within(text: str, low: int, high: int) -> int:
    number = int(text)
    if not low <= number <= high:
        raise ValueError(text)
    return number


def _date_of(now: float, zone: str | None) -> tuple[int, int, int]:
    if zone is None or zone in time.tzname:
        return time.localtime(now)[:3]
    if zone == "UTC":
        return time.gmtime(now)[:3]
    found = datetime.fromtimestamp(now, _zone(zone))
    return found.year, found.month, found.day


def _zone(name: str) -> tzinfo:
    # Rarely asked for.
    from zoneinfo import ZoneInfo, ZoneInfoNotFoundError  # noqa: PLC0415

    try:
        return ZoneInfo(name)
    except (ZoneInfoNotFoundError, OSError):
        raise ValueError(name) from None


def _seconds(day: tuple[int, int, int], clock: tuple[int, int, float], zone: str | None) -> float | None:
    """Return the seconds of a date and a time; a day too many goes to the next month, as in mktime(3)."""
    hour, minute, second = clock
    fraction = second % 1
    if zone is not None and zone != "UTC" and zone not in time.tzname:
        # The day too many is carried in UTC, where every day has 24 hours.
        plain = time.gmtime(calendar.timegm((*day, hour, minute, int(second))))
        found = datetime(*plain[:6], tzinfo=_zone(zone)).timestamp()
    elif zone == "UTC":
        found = calendar.timegm((*day, hour, minute, int(second)))
    else:
        summer = -1 if zone is None else time.tzname.index(zone)
        found = time.mktime((*day, hour, minute, int(second), 0, 0, summer))
    return found + fraction if found >= 0 else None


def of(record: Record) -> float:
    """Return when a crash happened: seconds since the epoch, 0 when its record (a stranger's, maybe) tells nothing."""
    for text in (record.timestamp, _STAMP.sub(r"\1-\2-\3T\4:\5:\6Z", record.id)):
        found = microseconds(text) if len(text) <= _LONGEST else None
        if found is not None and 0 < found <= _LAST * 1_000_000:
            return found / 1e6
    return 0.0


def absolute(seconds: float) -> str:
    """Return a time as systemd shows it: in the local zone, `Fri 2012-11-23 23:02:15 CET`, whatever the locale."""
    there = time.localtime(seconds)
    return f"{_DAYS[there.tm_wday]} {time.strftime('%Y-%m-%d %H:%M:%S', there)} {there.tm_zone}"


def relative(seconds: float) -> str:
    """Return a time that has passed, or is to come, as systemd shows it: `2 months 5 days ago`."""
    word = "ago" if seconds >= 0 else "left"
    seconds = abs(seconds)

    def counted(*parts: tuple[float, str]) -> str:
        return " ".join(
            f"{int(number)} {unit}{'' if int(number) == 1 else 's'}" for number, unit in parts if number >= 1
        )

    if seconds >= YEAR:
        text = counted((seconds / YEAR, "year"), (seconds % YEAR / MONTH, "month"))
    elif seconds >= MONTH:
        text = counted((seconds / MONTH, "month"), (seconds % MONTH / DAY, "day"))
    elif seconds >= WEEK:
        text = counted((seconds / WEEK, "week"), (seconds % WEEK / DAY, "day"))
    elif seconds >= 2 * DAY:
        text = counted((seconds / DAY, "day"))
    elif seconds >= 25 * HOUR:
        text = f"1 day {int((seconds - DAY) / HOUR)}h"
    elif seconds >= 6 * HOUR:
        text = f"{int(seconds / HOUR)}h"
    elif seconds >= HOUR:
        text = f"{int(seconds / HOUR)}h {int(seconds % HOUR / MINUTE)}min"
    elif seconds >= 5 * MINUTE:
        text = f"{int(seconds / MINUTE)}min"
    elif seconds >= MINUTE:
        text = f"{int(seconds / MINUTE)}min {int(seconds % MINUTE)}s"
    else:
        text = f"{int(seconds)}s"
    return f"{text} {word}"
