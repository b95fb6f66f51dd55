"""What every command prints in the same way, and its exit statuses."""

from __future__ import annotations

import json
import os
import sys
from typing import TYPE_CHECKING, Any

from receiver import tables
from receiver.ctl import times

if TYPE_CHECKING:
    from collections.abc import Sequence

    from receiver.ctl.matching import Crash
    from receiver.record import Record

EXIT_OK = 0
# coredumpctl(1): "0 is returned; otherwise a non-zero failure code. Not finding any matching core dumps is failure."
EXIT_FAILURE = 1
# As a shell names the end by SIGINT.
EXIT_INTERRUPTED = 130
NOTHING = "No coredumps found."

HEADING = ("TIME", "PID", "UID", "GID", "SIG", "COREFILE", "EXE", "SIZE", "SIGNATURE", "COUNT", "ID")
RIGHT = frozenset((1, 2, 3, 7, 9))
_COREFILE, _EXE = 5, 6
# How much of a signature tells it from all others in a store; as a MATCH it is enough.
SIGNATURE = 12
# How the reasons begin of cores that were there: see retention.py and store.py.
_GONE = ("evicted:", "pruned:", "its file is not in the store")


class Colours:
    """systemd's colours, and none where they are not wanted. Each is an escape sequence, "" for none."""

    OFF = "\x1b[0m"

    def __init__(self, mode: str | None) -> None:
        """mode: "256", "16", or None for no colours."""
        self.bold = "\x1b[0;1;39m" if mode else ""
        self.heading = "\x1b[0;4m" if mode else ""
        self.grey = {"256": "\x1b[0;38;5;245m", "16": "\x1b[0;90m"}.get(mode or "", "")
        self.yellow = {"256": "\x1b[0;1;38;5;185m", "16": "\x1b[0;1;33m"}.get(mode or "", "")

    @classmethod
    def wanted(cls, *, terminal: bool) -> Colours:
        """Ask as systemd does: $SYSTEMD_COLORS first, then $NO_COLOR and $TERM, on a terminal."""
        asked = os.environ.get("SYSTEMD_COLORS", "").lower()
        if asked in ("16", "256"):
            return cls(asked)
        if asked in ("1", "yes", "y", "true", "t", "on"):
            return cls("256")
        if asked in ("0", "no", "n", "false", "f", "off") or os.environ.get("NO_COLOR"):
            return cls(None)
        if not terminal or os.environ.get("TERM", "dumb") == "dumb":
            return cls(None)
        return cls("16" if asked == "auto-16" else "256")

    def paint(self, text: str, colour: str) -> str:
        return f"{colour}{text}{self.OFF}" if colour else text


def print_json(value: Any, mode: str | bool = "pretty") -> None:
    """Print a value for programs. mode: "short" is one line."""
    if mode == "short":
        print(json.dumps(value, separators=(",", ":")))
    else:
        print(json.dumps(value, indent=2))


def print_lines(lines: list[str]) -> None:
    print("\n".join(lines))


def corefile(record: Record) -> str:
    """Return coredumpctl's word for what became of a core: it is the same, but that ours are reduced, not truncated."""
    core = record.core
    if core.path is not None:
        return {"stored": "present"}.get(core.state, core.state)
    return "missing" if (core.reason or "").startswith(_GONE) else "none"


def row(record: Record) -> tuple[object, ...]:
    """Return the cells of HEADING."""
    return (
        time_of(record),
        record.pid,
        record.uid,
        record.gid,
        record.signal_name,
        corefile(record),
        record.exe or record.comm,
        tables.size(record.core.stored_bytes) if record.core.path else "-",
        (record.signature or "-")[:SIGNATURE],
        record.seen or "-",
        record.id,
    )


def time_of(record: Record) -> str:
    """Return a crash's time in the local zone."""
    seconds = times.of(record)
    return times.absolute(seconds) if seconds else record.timestamp


def table(crashes: Sequence[Crash], *, legend: bool, colours: Colours, widths: list[int] | None = None) -> list[str]:
    """Return the lines of a list. Where there are crashes of several places, each has its container before its id.

    widths: of the columns of HEADING, when it is one of several pieces.
    """
    rows = [row(crash.record) for crash in crashes]
    places = [crash.source.name or crash.record.container for crash in crashes]
    heading: tuple[object, ...] = HEADING
    # In a container all are its own.
    if widths is None and (len(set(places)) > 1 or any(crash.source.name for crash in crashes)):
        heading = (*HEADING[:-1], "CONTAINER", HEADING[-1])
        rows = [(*cells[:-1], place or "-", cells[-1]) for cells, place in zip(rows, places, strict=True)]

    def paint(number: int, column: int) -> str:
        if number == 0:
            return colours.heading
        if column == _COREFILE:
            word = rows[number - 1][_COREFILE]
            return colours.yellow if word == "reduced" else "" if word == "present" else colours.grey
        return ""

    lines = tables.lines([heading, *rows], right=RIGHT, paint=paint, widths=widths)
    return lines if legend else lines[1:]


def left_out(record: Record) -> str | None:
    """Say what a reduced core is without, and how a debugger shows that."""
    core = record.core
    if core.state != "reduced" or core.path is None:
        return None
    less, whole = core.absent_bytes, core.whole_bytes
    how_much = f"{tables.size(less)} of {tables.size(whole)} of" if less > 0 else "some"
    return f"{how_much} memory; gdb shows it as unavailable (Cannot access memory)"


def hint(text: str) -> None:
    print(text, file=sys.stderr)
