"""`corepipectl list`: a line for each crash."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING, Any

from receiver.ctl.arguments import add_matches, add_options, limits_of
from receiver.ctl.matching import crashes, field_of
from receiver.ctl.output import EXIT_FAILURE, EXIT_OK, NOTHING, Colours, print_json, print_lines, table
from receiver.ctl.pager import paged
from receiver.tables import shown

if TYPE_CHECKING:
    from receiver.ctl.context import Context
    from receiver.ctl.matching import Crash

EPILOG = """\
COREFILE is present; reduced (it had no room as a whole, and a debugger still opens it); missing (it was there, and is
gone); or none (it was not stored: 'corepipectl info' says why). COUNT is how often the same SIGNATURE came lately.

examples:
  corepipectl list webshop --since yesterday    of one program, lately
  corepipectl list uid=33 signal=SEGV -n 5      the five newest segmentation faults of user 33
  corepipectl list 3f1c9a                       all crashes of one bug, by its signature's beginning
  corepipectl list --json=short | jq '.[].exe'  for programs
"""


def add(commands: Any) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        "list",
        help="a line for each crash (the default)",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_matches(parser)
    add_options(parser, "range rows field json table quiet")
    parser.set_defaults(run=run)
    return parser


def run(context: Context) -> int:
    options = context.options
    found = selected(crashes(context.sources, options.match, **limits_of(options)), options)
    if options.field is not None:
        return print_field(found, options.field)
    if options.json:
        print_json([crash.record.to_json() for crash in found], options.json)
        # That nothing crashed is an answer; that nothing is what was asked for is none.
        return EXIT_OK if found or not options.match else EXIT_FAILURE
    if not found:
        return nothing(quiet=options.quiet)
    colours = Colours.wanted(terminal=sys.stdout.isatty())
    with paged(wanted=not options.no_pager):
        print_lines(table(found, legend=not options.no_legend, colours=colours))
    return EXIT_OK


def selected(found: list[Crash], options: argparse.Namespace) -> list[Crash]:
    """Return what -n, -1 and -r leave, in their order."""
    if options.rows is not None:
        found = found[-options.rows :]
    return found[::-1] if options.reverse else found


def print_field(found: list[Crash], field: str) -> int:
    """Print the values of a field, as they stand in the records, a line for each. Raises UsageProblem."""
    _, values = field_of(field)
    lines = [shown(value) for crash in found for value in values(crash.record)]
    if not found:
        return nothing(quiet=False)
    if lines:
        print_lines(lines)
    return EXIT_OK


def nothing(*, quiet: bool) -> int:
    """Say that there is nothing, which is failure."""
    if not quiet:
        print(NOTHING, file=sys.stderr)
    return EXIT_FAILURE
