"""`corepipectl stats`: how many crashes, by program, bug, signal, user, container or time."""

from __future__ import annotations

import argparse
import shutil
import sys
import time
from typing import TYPE_CHECKING, Any

from receiver import statistics, tables
from receiver.ctl import times
from receiver.ctl.arguments import add_matches, add_options, limits_of
from receiver.ctl.listing import nothing
from receiver.ctl.matching import crashes
from receiver.ctl.output import EXIT_OK, SIGNATURE, print_json, print_lines
from receiver.ctl.pager import paged
from receiver.record import rfc3339
from receiver.tables import shown

if TYPE_CHECKING:
    from receiver.ctl.context import Context
    from receiver.statistics import Event, Group

EPILOG = """\
CRASHES is the number of records, CORES how many of them have their core now (whole or reduced), NONE how many have none
(any more), SIZE what those cores take on the disk. Days and hours are those of the local time zone. Records go when
there are too many (records_max): 'corepipectl metrics' counts on.

examples:
  corepipectl stats                                  which programs crash most
  corepipectl stats --by signature --since -7d       which bugs, in the last week
  corepipectl stats --by hour --since today webshop  when one program crashed today
  corepipectl stats --by user --json                 for programs
  corepipectl stats --by container --all             on a host: which containers crash most
"""
_LONGEST_BAR = 40
_SHORTEST_BAR = 8
# Of a path the end tells more.
_LONGEST_KEY = 60
_EIGHTHS = " ▏▎▍▌▋▊▉█"


def add(commands: Any) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        "stats",
        help="how many crashes, by program, bug, signal, user, container or time",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_matches(parser)
    parser.add_argument("--by", choices=tuple(statistics.BY), default="exe", help="what to count by (default: exe)")
    parser.add_argument("-n", dest="rows", type=_count, metavar="N", help="at most so many rows")
    add_options(parser, "range json table quiet")
    parser.set_defaults(taken=parser.get_default("taken") | {"rows"})
    parser.set_defaults(run=run)
    return parser


def _count(text: str) -> int:
    if not (text.isascii() and text.isdigit()) or int(text[:10]) < 1:
        raise argparse.ArgumentTypeError(f"{shown(text)!r} is no number of at least 1")
    return int(text[:10])


def events_of(context: Context) -> list[Event]:
    """Return the crashes that a command means which has MATCHes, "range" and "quiet"."""
    options = context.options
    found = crashes(context.sources, options.match, **limits_of(options))
    return [statistics.Event(times.of(crash.record), crash.record, crash.source.name or "") for crash in found]


def run(context: Context) -> int:
    options = context.options
    events = events_of(context)
    groups = statistics.grouped(events, options.by)
    if options.json:
        chosen, _ = _chosen(groups, options.by, options.rows)
        print_json([_json(group, options.by) for group in chosen], options.json)
        return EXIT_OK
    if not groups:
        return nothing(quiet=options.quiet)
    lines = _table(groups, options.by, options.rows, legend=not options.no_legend)
    if not options.no_legend:
        lines += ["", _in_all(events)]
    with paged(wanted=not options.no_pager):
        print_lines(lines)
    return EXIT_OK


def _chosen(groups: list[Group], by: str, rows: int | None) -> tuple[list[Group], int]:
    """Return the rows that are wanted, and how many are left out: the rarest, or the oldest."""
    if rows is None or rows >= len(groups):
        return groups, 0
    return (groups[-rows:] if by in statistics.IN_TIME else groups[:rows]), len(groups) - rows


def _json(group: Group, by: str) -> dict[str, Any]:
    return {
        by: group.key,
        "crashes": group.crashes,
        **{state: group.states[state] for state in statistics.STATES},
        "reasons": dict(sorted(group.reasons.items())),
        "bytes": group.size,
        "first": rfc3339(group.first) if group.events else None,
        "last": rfc3339(group.last) if group.events else None,
    }


def _table(groups: list[Group], by: str, rows: int | None, *, legend: bool) -> list[str]:
    chosen, left_out = _chosen(groups, by, rows)
    more = ("PROGRAM",) if by == "signature" else ()
    heading: tuple[object, ...] = (by.upper(), *more, "CRASHES", "CORES", "NONE", "SIZE")
    last = () if by in statistics.IN_TIME else ("LAST",)
    table: list[tuple[object, ...]] = [(*heading, *last)]
    for group in chosen:
        key = group.key[:SIGNATURE] if by == "signature" else group.key
        cells: list[object] = [_short(key)]
        if more:
            cells.append(_short(statistics.program(group.newest)))
        cores = group.crashes - group.states[statistics.NONE]
        cells += [group.crashes, cores, group.states[statistics.NONE], tables.size(group.size) if cores else "-"]
        if last:
            cells.append(_minute(group.last))
        table.append(tuple(cells))
    numbers = frozenset(range(1 + len(more), 5 + len(more)))
    lines = tables.lines(table, right=numbers)
    width = max(len(line) for line in lines)
    room = min(_LONGEST_BAR, max(_SHORTEST_BAR, shutil.get_terminal_size().columns - width - 2))
    most = max(group.crashes for group in chosen)
    fine = "utf" in (getattr(sys.stdout, "encoding", None) or "").lower()
    for number, group in enumerate(chosen, 1):
        lines[number] = f"{lines[number].ljust(width)}  {bar(group.crashes, most, room, fine=fine)}".rstrip()
    if left_out and legend:
        lines.append(f"... and {left_out} {'older' if by in statistics.IN_TIME else 'more'}")
    return lines if legend else lines[1:]


def _minute(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(seconds)) if seconds else "-"


def _short(text: str) -> str:
    return text if len(text) <= _LONGEST_KEY else "..." + text[3 - _LONGEST_KEY :]


def bar(number: int, most: int, room: int, *, fine: bool) -> str:
    """Return a bar, as long as `number` is of `most`, which has `room` characters. What is not nothing has some length.

    fine: with blocks of an eighth; else of ASCII.
    """
    if number <= 0:
        return ""
    if not fine:
        return "#" * max(1, number * room // most)
    eighths = max(1, number * room * 8 // most)
    return "█" * (eighths // 8) + (_EIGHTHS[eighths % 8] if eighths % 8 else "")


def _in_all(events: list[Event]) -> str:
    group = statistics.total(events)
    crashes_ = f"{group.crashes} {'crash' if group.crashes == 1 else 'crashes'}"
    cores = group.crashes - group.states[statistics.NONE]
    reduced = f" ({group.states[statistics.REDUCED]} reduced)" if group.states[statistics.REDUCED] else ""
    text = f"{crashes_}, {cores} with a core{reduced}, {tables.size(group.size)}"
    if group.reasons:
        why = ", ".join(f"{number} {word}" for word, number in group.reasons.most_common())
        text += f"; {group.states[statistics.NONE]} without: {why}"
    return text + "."
