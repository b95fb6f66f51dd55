"""`corepipectl list`: a line for each crash."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from receiver import tables
from receiver.ctl.matching import crashes
from receiver.ctl.output import EXIT_FAILURE, EXIT_OK, print_json, print_lines, row

if TYPE_CHECKING:
    import argparse

    from receiver.ctl.context import Context


def add(commands: Any) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser("list", help="a line for each crash (the default)")
    parser.add_argument("--json", action="store_true", help="as JSON, for programs")
    parser.add_argument("match", nargs="?", metavar="MATCH", help="only these")
    parser.set_defaults(run=run)
    return parser


def run(context: Context) -> int:
    options = context.options
    records = [crash.record for crash in crashes(context.sources, options.match)]
    if options.json:
        print_json([record.to_json() for record in records])
        return EXIT_OK if records or options.match is None else EXIT_FAILURE
    if not records:
        print("No crashes found.", file=sys.stderr)
        return EXIT_FAILURE
    rows: list[tuple[object, ...]] = [("TIME", "PID", "UID", "GID", "SIG", "CORE", "EXE", "SIZE", "ID")]
    rows += [row(record) for record in records]
    print_lines(tables.lines(rows, right=frozenset((1, 2, 3, 7))))
    return EXIT_OK
