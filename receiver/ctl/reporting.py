"""`corepipectl report`: what crashed, as one page to look at, to send and to keep."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import stat
import subprocess
import sys
import time
from typing import TYPE_CHECKING, Any

from receiver.ctl.arguments import add_matches, add_options
from receiver.ctl.matching import UsageProblem
from receiver.ctl.output import EXIT_OK
from receiver.ctl.stats import events_of

if TYPE_CHECKING:
    from receiver.ctl.context import Context
    from receiver.report import Lost
    from receiver.retention import Report

EPILOG = """\
The page has everything in it: it loads nothing, runs nothing, and can be sent and kept. It shows names and backtraces
of crashed programs, and no environment, command line or memory.

examples:
  corepipectl report -o report.html              all that the store has records of
  corepipectl report -o week.html --since -7d    the last week
  corepipectl report -o shop.html webshop        one program
  corepipectl report -o all.html --all           the host and all its containers
"""
LEDGER = "core-pipe-forwarder"
LEDGER_SECONDS = 20
_MOST_LEDGER = 16 << 20


def add(commands: Any) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        "report",
        help="a page (HTML) of what crashed, when, and why cores are missing",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_matches(parser)
    parser.add_argument("-o", "--output", metavar="FILE", help="write the page there (default: standard output)")
    add_options(parser, "range quiet")
    parser.set_defaults(run=run)
    return parser


def run(context: Context) -> int:
    # Only this command needs it.
    from receiver.report import page  # noqa: PLC0415

    options = context.options
    if options.output is None and sys.stdout.isatty():
        raise UsageProblem("a page is not for a terminal. Write it to a file with -o FILE, or into a pipe")
    elsewhere = options.machine or options.all
    text = page(
        events_of(context),
        now=time.time(),
        since=options.since,
        until=options.until,
        host=options.machine or os.uname().nodename,
        only=" ".join(options.match),
        # (Of containers only the crashes are known; and what the host has lost is not one container's.)
        storage=None if elsewhere else _storage(context),
        lost=None if options.machine else _lost(),
    )
    data = text.encode("utf-8", "backslashreplace")
    if options.output is None:
        sys.stdout.flush()
        sys.stdout.buffer.write(data)
        return EXIT_OK
    # Like every file that one makes, but not for all to read: other users' programs are in it.
    fd = os.open(options.output, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | os.O_NOCTTY, 0o640)
    with open(fd, "wb") as file:
        found = os.fstat(fd)
        if stat.S_ISREG(found.st_mode):
            if found.st_uid != os.geteuid():
                # It was waiting here for somebody who may see more than he.
                raise UsageProblem(f"{options.output}: belongs to uid {found.st_uid}. Remove it, or name another file")
            os.ftruncate(fd, 0)
        file.write(data)
    if not options.quiet:
        print(f"{options.output}: {len(data)} bytes. Open it in a browser", file=sys.stderr)
    return EXIT_OK


def _storage(context: Context) -> Report | None:
    return context.store().usage() if os.path.lexists(context.path) else None


def _lost() -> Lost | None:
    """Return what the host's ledger says, None where there is none: in a container, or for who may not ask."""
    from receiver.report import Lost  # noqa: PLC0415 - as above

    program = shutil.which(LEDGER)
    if program is None or os.geteuid() != 0:
        return None
    try:
        # The one that root's own PATH has.
        done = subprocess.run(  # noqa: S603
            [program, "ledger", "--json"],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            check=False,
            timeout=LEDGER_SECONDS,
        )
        return Lost.from_json(json.loads(done.stdout[:_MOST_LEDGER]))
    except (OSError, subprocess.SubprocessError, ValueError, RecursionError):
        # It has never watched here, or says so in its own words.
        return None
