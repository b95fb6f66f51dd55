"""The report: one page that says what crashed, when, and why cores are missing.

It is to be sent around and opened anywhere, and what stands in it was chosen by crashed programs: there is no script in
it, it loads nothing, and its policy (CSP) forbids both, should ever a name get past `receiver.report.markup`.

    __init__.py    what stands where              markup.py      elements, and nothing unescaped
    charts.py      pictures                       style.css      how it looks: light, dark, small, printed
"""

from __future__ import annotations

import base64
import hashlib
import importlib.resources
import time
from typing import TYPE_CHECKING, Any, NamedTuple

from receiver import __version__, statistics, tables
from receiver.reasons import REASONS
from receiver.report import charts
from receiver.report.markup import Markup, joined, tag
from receiver.statistics import NONE, REDUCED, STORED

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from receiver.record import Record
    from receiver.retention import Report, Use
    from receiver.statistics import Event, Group, Slot

_SLOTS = 60
_SPARK_SLOTS = 30
_BUGS = 12
_OPEN_BUGS = 3
_ROWS = 12
_FRAMES = 24
_LINES = 60
_LONGEST = 160
_LOST = 20
# Used up so far, a limit is worth a look.
_NEARLY = 0.9
_STATES = {STORED: "whole core", REDUCED: "reduced core", NONE: "no core"}
_ZONE_FORMAT = "%Y-%m-%d %H:%M %Z"


class Lost(NamedTuple):
    """What the host's ledger says. crashes: (seconds since the epoch, container, comm, why) of each that is lost.

    others: how many are not known to be lost, and not known to be recorded. watched: whether somebody watches.
    """

    crashes: list[tuple[float, str, str, str]]
    others: int
    watched: bool

    @classmethod
    def from_json(cls, found: Any) -> Lost:
        """Take it from `core-pipe-forwarder ledger --json`. Raises ValueError."""
        try:
            named = [crash for crash in found["crashes"] if crash["state"] == "lost"]
            rows = [(float(c["at"]), str(c["key"]), str(c["comm"]), str(c["why"])) for c in named]
            return cls(rows, len(found["crashes"]) - len(named), bool(found["watched"]))
        except (TypeError, KeyError, AttributeError, OverflowError) as error:
            raise ValueError(f"not a ledger: {error}") from None


def page(
    events: Sequence[Event],
    *,
    now: float,
    host: str,
    since: float | None = None,
    until: float | None = None,
    only: str = "",
    storage: Report | None = None,
    lost: Lost | None = None,
) -> str:
    """Return the page.

    now, since, until: seconds since the epoch. only: which crashes were asked for, to tell its reader.
    """
    style = importlib.resources.files(__name__).joinpath("style.css").read_text(encoding="utf-8")
    hashed = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'sha256-{hashed}'; base-uri 'none'; form-action 'none'"
    ended = now if until is None else min(until, now)
    told = [event.at for event in events if event.at]
    # A record may be from the future, by a clock that was set or by a stranger.
    begun = min(min(told, default=ended) if since is None else since, ended)
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=policy),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="color-scheme", content="light dark"),
        tag("meta", name="referrer", content="no-referrer"),
        tag("title", f"Crashes on {host}"),
        # Ours, and no markup of anybody's.
        tag("style", Markup(style)),
    )
    body = tag(
        "main",
        _header(host, begun, ended, only),
        _tiles(events),
        _time(events, begun, ended) if events else None,
        _rankings(events) if events else None,
        _bugs(events, begun, ended) if events else None,
        _storage(storage) if storage is not None else None,
        _losses(events, lost),
        tag(
            "footer",
            f"Made {_moment(now)} by corepipectl report (core_pipe {__version__}). "
            "This page loads nothing and runs nothing.",
        ),
    )
    return f"<!DOCTYPE html>\n{tag('html', head, tag('body', body), lang='en')}\n"


def _moment(seconds: float) -> str:
    try:
        return time.strftime(_ZONE_FORMAT, time.localtime(seconds)) if seconds else "at an unknown time"
    except (OverflowError, ValueError, OSError):
        return "at an unknown time"


def _cut(value: str, longest: int = _LONGEST) -> str:
    """Return a text no longer than people read: of a path the end tells more."""
    return value if len(value) <= longest else "…" + value[1 - longest :]


def _counted(number: int, one: str, more: str) -> str:
    return f"{number} {one if number == 1 else more}"


def _header(host: str, begun: float, ended: float, only: str) -> Markup:
    what = f"{_moment(begun)} to {_moment(ended)}"
    return tag(
        "header",
        tag("h1", f"Crashes on {_cut(host)}"),
        tag("p", what + (f", only {_cut(only)}" if only else ""), class_="sub"),
    )


def _tiles(events: Sequence[Event]) -> Markup:
    group = statistics.total(events)
    bugs = len({event.record.signature for event in events if event.record.signature})
    programs = len({statistics.program(event.record) for event in events})
    cores = group.crashes - group.states[NONE]
    rows = (
        (group.crashes, "crash" if group.crashes == 1 else "crashes"),
        (bugs, "different bug" if bugs == 1 else "different bugs"),
        (programs, "program" if programs == 1 else "programs"),
        (cores, f"cores kept, {tables.size(group.size)}"),
        (group.states[NONE], "without a core"),
    )
    return tag(
        "div",
        *(tag("div", tag("b", number), tag("span", what), class_="tile") for number, what in rows),
        class_="tiles",
    )


def _time(events: Sequence[Event], begun: float, ended: float) -> Markup:
    first, length, number = statistics.slots_of(begun, ended, _SLOTS)
    slots = statistics.timeline(events, first, length, number)
    top = charts.nice(max(slot.states.total() for slot in slots))
    form = "%H:%M" if length * number <= 2 * 86400 else "%-d %b" if length * number < 300 * 86400 else "%b %Y"
    marks = [slots[index * (number - 1) // 4].begun for index in range(5)] if number > 4 else [slots[0].begun]

    def title(slot: Slot) -> str:
        said = ", ".join(f"{slot.states[state]} {what}" for state, what in _STATES.items() if slot.states[state])
        return f"{time.strftime('%Y-%m-%d %H:%M', time.localtime(slot.begun))}: {said}"

    legend = [tag("span", what, class_=state) for state, what in _STATES.items()]
    rows = [
        tag(
            "tr",
            tag("td", time.strftime("%Y-%m-%d %H:%M", time.localtime(slot.begun))),
            *(tag("td", slot.states[state], class_="number") for state in _STATES),
        )
        for slot in slots
        if slot.states.total()
    ]
    heading = [tag("th", "From"), *(tag("th", what, class_="number") for what in _STATES.values())]
    return tag(
        "section",
        tag("h2", f"When, per {_length(length)}"),
        tag("div", *legend, class_="legend"),
        tag(
            "div",
            tag("div", tag("span", top), tag("span", top // 2), tag("span", 0), class_="y"),
            charts.stacked(slots, top, title),
            tag("div", *(tag("span", time.strftime(form, time.localtime(at))) for at in marks), class_="x"),
            class_="plot",
        ),
        tag("details", tag("summary", "The same as a table"), _table(heading, rows)),
    )


def _length(seconds: int) -> str:
    for unit, length in (("week", 7 * 86400), ("day", 86400), ("hour", 3600), ("minute", 60)):
        if seconds % length == 0:
            return unit if seconds == length else f"{seconds // length} {unit}s"
    raise AssertionError


def _table(heading: Sequence[Markup], rows: Sequence[Markup]) -> Markup:
    return tag("div", tag("table", tag("thead", tag("tr", *heading)), tag("tbody", *rows)), class_="scroll")


def _bugs(events: Sequence[Event], begun: float, ended: float) -> Markup:
    known = [group for group in statistics.grouped(events, "signature") if group.key != statistics.UNKNOWN]
    first, length, number = statistics.slots_of(begun, ended, _SPARK_SLOTS)
    shown = []
    for rank, group in enumerate(known[:_BUGS]):
        record = group.newest
        slots = statistics.timeline(group.events, first, length, number)
        shown.append(
            tag(
                "article",
                tag(
                    "div",
                    tag("b", f"{group.crashes}\N{MULTIPLICATION SIGN}"),
                    tag(
                        "div",
                        tag(
                            "p",
                            _cut(statistics.program(record)),
                            " ",
                            tag("span", record.signal_name, class_="signal"),
                            class_="what",
                        ),
                        tag("p", _about(group), class_="sub"),
                    ),
                    charts.spark(slots),
                    class_="head",
                ),
                _frames(group, opened=rank < _OPEN_BUGS),
                class_="bug",
            )
        )
    left = len(known) - len(shown)
    unknown = sum(not event.record.signature for event in events)
    notes = [f"{_counted(left, 'more bug', 'more bugs')}: corepipectl stats --by signature"] if left > 0 else []
    if unknown:
        notes.append(f"{_counted(unknown, 'crash has', 'crashes have')} no signature: no core was read")
    return tag(
        "section",
        tag("h2", "Bugs: the same signal in the same functions"),
        *shown,
        *(tag("p", note, class_="note") for note in notes),
    )


def _about(group: Group) -> str:
    first, last = _moment(group.first), _moment(group.last)
    when = last if group.crashes == 1 else f"{first} to {last}"
    cores = group.crashes - group.states[NONE]
    return f"{group.key[:12]} · {when} · {_counted(cores, 'core', 'cores')}"


def _frames(group: Group, *, opened: bool) -> Markup | None:
    """Return where it crashed: a debugger's backtrace where one of its records has it, else modules and offsets."""
    newest = sorted(group.events, key=lambda event: -event.at)
    for event in newest:
        if event.record.backtrace:
            return _backtrace(event.record, opened=opened)
    frames = next((event.record.frames for event in newest if event.record.frames), None)
    if not frames:
        return None
    items = [tag("li", _cut(frame)) for frame in frames[:_FRAMES]]
    return tag(
        "details",
        tag("summary", "Where, the innermost first"),
        tag("ol", *items, start=0, class_="frames"),
        open=True if opened else None,
    )


def _backtrace(record: Record, *, opened: bool) -> Markup:
    lines = [_cut(line, 300) for line in (record.backtrace or [])[:_LINES]]
    left = len(record.backtrace or []) - len(lines)
    if left > 0:
        lines.append(f"... and {left} more lines: corepipectl info {record.id}")
    by = f", by {_cut(record.backtrace_by, 40)}" if record.backtrace_by else ""
    return tag("details", tag("summary", f"Backtrace{by}"), tag("pre", "\n".join(lines)), open=True if opened else None)


def _rankings(events: Sequence[Event]) -> Markup:
    def ranking(title: str, by: str, name: Callable[[Group], str]) -> Markup:
        groups = statistics.grouped(events, by)
        most = groups[0].crashes
        rows = [
            tag(
                "tr",
                tag("td", _cut(name(group), 80), class_="name"),
                tag(
                    "td",
                    charts.line([(group.states[state] / most, state) for state in statistics.STATES]),
                    class_="wide",
                ),
                tag("td", group.crashes, class_="number"),
            )
            for group in groups[:_ROWS]
        ]
        left = len(groups) - len(rows)
        note = tag("p", f"{left} more: corepipectl stats --by {by}", class_="note") if left > 0 else None
        return tag("section", tag("h2", title), tag("table", tag("tbody", *rows)), note)

    # Where they are of one place, the user says more.
    places = {event.place or event.record.container for event in events}
    last = ("Users", "user", lambda group: f"uid {group.key}")
    if len(places) > 1:
        last = ("Containers", "container", lambda group: group.key if group.key != statistics.HERE else "in none")
    return tag(
        "div",
        ranking("Programs", "exe", lambda group: group.key),
        ranking("Signals", "signal", lambda group: group.key),
        ranking(*last),
        class_="columns",
    )


# Of these limits, what is there is what is free.
_FREE = ("keep_free", "keep_free_inodes", "memory")


def _storage(found: Report) -> Markup:
    shows: dict[str, Callable[[int], str]] = {"bytes": tables.size, "seconds": tables.duration}
    rows = []
    for use in found.uses:
        show = shows.get(use.unit, str)
        used = f"{show(use.used)} free, at least {show(use.limit)}" if use.name in _FREE else None
        used = used or f"{show(use.used)} of {show(use.limit)}"
        share = _share(use)
        kind = "full" if share >= _NEARLY else "bar"
        words = f"{used}{' (used up)' if share >= 1 else ' (nearly used up)' if share >= _NEARLY else ''}"
        rows.append(
            tag(
                "tr",
                tag("td", tag("code", use.name), class_="name"),
                tag("td", charts.line([(share, kind)], track=True), class_="wide"),
                tag("td", words, class_="number"),
            )
        )
    total = found.total
    text = f"{_counted(total.cores, 'core', 'cores')} take {tables.size(total.size)}; "
    text += _counted(total.records, "record", "records") + ". "
    if found.headroom is None:
        text += "No limit is set."
    elif found.headroom == 0:
        text += f"The next core takes an old one's room ({found.limiting})."
    else:
        text += f"The next core may take {tables.size(found.headroom)} before an old one goes ({found.limiting})."
    return tag(
        "section",
        tag("h2", "Storage against its limits"),
        tag("table", tag("tbody", *rows)),
        tag("p", text, class_="note"),
    )


def _share(use: Use) -> float:
    """Return how far a limit is used up, as a part of 1."""
    if use.name in _FREE:
        return min(1.0, use.limit / use.used) if use.used > 0 else float(use.limit > 0)
    return use.used / use.limit if use.limit > 0 else 1.0


def _losses(events: Sequence[Event], lost: Lost | None) -> Markup:
    reasons = statistics.total(events).reasons
    rows = [
        tag(
            "tr",
            tag("td", number, class_="number"),
            tag("td", tag("code", word), class_="name"),
            tag("td", REASONS.get(word, "")),
        )
        for word, number in reasons.most_common()
    ]
    heading = [tag("th", "Crashes", class_="number"), tag("th", "Reason"), tag("th", "What it means, and what to do")]
    every = "Every crash here has its core." if events else "No crash."
    return tag(
        "section",
        tag("h2", "Why cores are missing"),
        _table(heading, rows) if rows else tag("p", every),
        _ledger(lost) if lost is not None else None,
    )


def _ledger(lost: Lost) -> Markup:
    """Return what the host knows of crashes that left no record at all."""
    rows = [
        tag(
            "tr",
            tag("td", _moment(at)),
            tag("td", _cut(comm or "?", 40)),
            tag("td", _cut(key.replace("!", "/") or "?", 80)),
            tag("td", _cut(why)),
        )
        for at, key, comm, why in sorted(lost.crashes)[-_LOST:]
    ]
    said = "The host's ledger knows of no crash without a record."
    if lost.crashes:
        said = f"{_counted(len(lost.crashes), 'crash', 'crashes')} left no record at all, says the host's ledger:"
    if lost.others:
        said += f" Of {lost.others} more it cannot tell."
    if not lost.watched:
        said += " It does not watch now."
    heading = [tag("th", word) for word in ("Time", "Name", "Container", "Why")]
    return joined(tag("p", said, class_="note"), _table(heading, rows) if rows else None)
