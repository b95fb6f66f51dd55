"""`corepipectl info`: everything about crashes."""

from __future__ import annotations

import argparse
import sys
import time
from typing import TYPE_CHECKING, Any

from receiver import tables
from receiver.ctl import times
from receiver.ctl.arguments import add_matches, add_options, limits_of
from receiver.ctl.listing import nothing, print_field, selected
from receiver.ctl.matching import crashes
from receiver.ctl.output import EXIT_OK, Colours, corefile, left_out, print_json, print_lines, time_of
from receiver.ctl.pager import paged
from receiver.tables import shown

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from receiver.ctl.context import Context
    from receiver.ctl.matching import Crash
    from receiver.record import Record

EPILOG = """\
Without a MATCH it is the newest crash; otherwise all that match, the newest last. With --json it is a list.
Of a single crash that has a core, the backtrace is made by gdb or eu-stack (as nobody, within backtrace_seconds) when
it is first asked for, and kept in its record.

examples:
  corepipectl info                        the newest crash
  corepipectl info webshop -1             the newest one of that program
  corepipectl info /usr/bin/webshop 3f1c9a --since -2d
                                          all crashes of one bug of it within two days
  corepipectl info 4711 --full            nothing shortened: environment, open files, mappings
"""
LABEL = 14
# Lines of one fact that are shown, and characters of each; an environment may have thousands.
MOST = 20
LONGEST = 2000


def add(commands: Any) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        "info", help="everything about crashes", epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_matches(parser)
    parser.add_argument("--full", action="store_true", help="shorten nothing")
    parser.add_argument("--no-backtrace", action="store_true", help="make none where there is none yet")
    add_options(parser, "range rows field json quiet")
    parser.add_argument("--no-pager", action="store_true", help="not through a pager")
    parser.set_defaults(run=run, taken=parser.get_default("taken") | {"no_pager"})
    return parser


def run(context: Context) -> int:
    options = context.options
    found = crashes(context.sources, options.match, **limits_of(options))
    if not options.match and options.rows is None:
        # As coredumpctl does: of everything, the last.
        found = found[-1:]
    found = selected(found, options)
    if options.field is not None:
        return print_field(found, options.field)
    if not found:
        return nothing(quiet=options.quiet)
    why = None if options.no_backtrace or len(found) > 1 else _made_backtrace(found[0])
    if options.json:
        print_json([crash.record.to_json() for crash in found], options.json)
        return EXIT_OK
    colours = Colours.wanted(terminal=sys.stdout.isatty())
    most = None if options.full else MOST
    with paged(wanted=not options.no_pager):
        for number, crash in enumerate(found):
            if number:
                print()
            print_lines(lines(crash, colours, most, why))
    return EXIT_OK


def _made_backtrace(crash: Crash) -> str | None:
    """Have a debugger make a crash's backtrace, when it has a core and none yet. Returns why there is still none."""
    if crash.record.backtrace or crash.record.core.path is None:
        return None
    # A debugger and what is around it, for the first look at a crash only.
    from receiver.backtrace import NoBacktrace, backtrace_of  # noqa: PLC0415
    from receiver.config import load  # noqa: PLC0415

    config = load()
    if "backtrace" not in config.facts:
        return None
    terminal = sys.stderr.isatty()
    if terminal:
        print("Making a backtrace...", end="", file=sys.stderr, flush=True)
    try:
        backtrace_of(crash.record, crash.source, seconds=config.backtrace_seconds)
    except NoBacktrace as problem:
        return str(problem)
    finally:
        if terminal:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)
    return None


def lines(crash: Crash, colours: Colours, most: int | None = MOST, why: str | None = None) -> list[str]:
    """Return what is told of a crash, in the order and with the labels of coredumpctl.

    most: lines of each fact. why: there is no backtrace.
    """
    record, core = crash.record, crash.record.core
    word = corefile(record)
    storage = f"{core.path} ({word})" if core.path else word
    # Names are the place's where the record was written.
    names = (_user, _group) if crash.source.name is None else (_nobody, _nobody)
    facts: list[tuple[str, object, str]] = [
        ("ID", record.id, ""),
        ("PID", f"{record.pid} ({record.comm})", colours.bold),
        ("TID", record.tid if record.tid != record.pid else None, ""),
        ("UID", _id(record.uid, record.euid, names[0]), ""),
        ("GID", _id(record.gid, record.egid, names[1]), ""),
        ("Signal", f"{record.signal} ({record.signal_name.removeprefix('SIG')})", ""),
        ("Timestamp", _when(record), ""),
        ("Command Line", " ".join(record.command_line) if record.command_line else None, ""),
        ("Executable", record.exe, colours.bold),
        ("Package", _package(record), ""),
        ("Directory", record.cwd, ""),
        ("Root", record.root, ""),
        ("Control Group", record.cgroup, ""),
        ("Unit", record.unit, ""),
        ("Container", crash.source.name or record.container, ""),
        ("Hostname", record.host_name, ""),
        ("Core", core.state + (f": {core.reason}" if core.reason else ""), ""),
        ("Storage", storage, {"present": "", "reduced": colours.yellow}.get(word, colours.grey)),
        ("Size on Disk", tables.size(core.stored_bytes) if core.path else None, ""),
        ("Core Size", tables.size(core.size_bytes) if core.path else None, ""),
        ("Left Out", left_out(record), ""),
        ("Signature", record.signature, ""),
        ("Seen", f"{record.seen} times lately, this one included" if (record.seen or 0) > 1 else None, ""),
        ("Threads", record.threads, ""),
        ("Build Id", record.build_id, ""),
        ("Not taken by", record.tried, ""),
        ("Limits", _limits(record), ""),
        ("Open Files", record.open_files, ""),
        ("Mappings", record.mappings, ""),
        ("Environment", [f"{name}={value}" for name, value in (record.environment or {}).items()], ""),
        ("Journal", record.journal, ""),
        ("Message", _message(crash, why), ""),
    ]
    found: list[str] = []
    for label, value, colour in facts:
        whole = label in ("Message", "Not taken by")
        found += _labelled(label, value, colour, colours, None if whole else most, None if most is None else LONGEST)
    return found


def _labelled(
    label: str, value: object, colour: str, colours: Colours, most: int | None, longest: int | None
) -> list[str]:
    """Return the lines of one fact: those of a list stand below each other. longest: characters of each."""
    if value is None or value == []:
        return []
    values = value if isinstance(value, list) else [value]
    rest = len(values) - most if most is not None and len(values) > most + 1 else 0
    if rest:
        values = [*values[:most], f"... and {rest} more (--full)"]
    labels = [label, *[""] * (len(values) - 1)]
    texts = [shown(item) if longest is None else tables.cut(shown(item), longest) for item in values]
    return [
        f"{text:>{LABEL}}{':' if text else ' '} {colours.paint(item, colour)}".rstrip()
        for text, item in zip(labels, texts, strict=True)
    ]


def _id(real: int, effective: int | None, name: Callable[[int], str]) -> str:
    text = f"{real}{name(real)}"
    return text if effective in (None, real) else f"{text}, effective {effective}{name(effective or 0)}"


def _user(uid: int) -> str:
    import pwd  # noqa: PLC0415 - only info has names

    try:
        return f" ({pwd.getpwuid(uid).pw_name})"
    except (KeyError, OverflowError):
        return ""


def _group(gid: int) -> str:
    import grp  # noqa: PLC0415

    try:
        return f" ({grp.getgrgid(gid).gr_name})"
    except (KeyError, OverflowError):
        return ""


def _nobody(_number: int) -> str:
    return ""


def _when(record: Record) -> str:
    seconds = times.of(record)
    return f"{time_of(record)} ({times.relative(time.time() - seconds)})" if seconds else record.timestamp


def _package(record: Record) -> str | None:
    package = record.package
    if not package:
        return None
    text = " ".join(package[key] for key in ("name", "version", "architecture") if package.get(key))
    return f"{text} ({package['manager']})" if package.get("manager") else text


def _limits(record: Record) -> list[str]:
    """Return the resource limits, a line each."""

    def value(limit: int | None) -> str:
        return "unlimited" if limit is None else str(limit)

    return [
        f"{name}: {value(limits.get('soft'))}, at most {value(limits.get('hard'))}"
        for name, limits in (record.limits or {}).items()
    ]


def _message(crash: Crash, why: str | None) -> list[str]:
    """Return what coredumpctl shows last: what happened, and the stack."""
    record = crash.record
    found = [f"Process {record.pid} ({record.comm}) of user {record.uid} crashed."]
    if record.backtrace:
        found += ["", f"Backtrace ({record.backtrace_by}):" if record.backtrace_by else "Backtrace:", *record.backtrace]
        return found
    if why is not None:
        found += ["", f"No backtrace: {why}."]
    if record.frames:
        found += ["", "Frames that the signature was made from:", *_numbered(record.frames)]
    return found


def _numbered(frames: Sequence[str]) -> list[str]:
    return [f"#{number:<2} {frame}" for number, frame in enumerate(frames)]
