"""`corepipectl delete`: crashes that nobody wants to hear of any more."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING, Any

from receiver import tables
from receiver.ctl.arguments import add_matches, add_options, limits_of
from receiver.ctl.listing import nothing, selected
from receiver.ctl.matching import UsageProblem, crashes
from receiver.ctl.output import EXIT_FAILURE, EXIT_OK, Colours, hint, print_lines, table

if TYPE_CHECKING:
    from receiver.ctl.context import Context

EPILOG = """\
Record and core go, for good. 'corepipectl prune' takes cores alone, and by size or age.

examples:
  corepipectl delete 3f1c9a --dry-run          what would go: all crashes of one bug
  corepipectl delete webshop --until -30d --yes
"""


def add(commands: Any) -> None:
    parser: argparse.ArgumentParser = commands.add_parser(
        "delete",
        help="remove crashes: records and cores",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_matches(parser, least="+")
    parser.add_argument("-y", "--yes", action="store_true", help="do not ask")
    parser.add_argument("--dry-run", action="store_true", help="remove nothing, only say what would go")
    add_options(parser, "range rows quiet")
    parser.set_defaults(run=run)


def run(context: Context) -> int:
    options = context.options
    store = context.store()
    found = selected(crashes(context.sources, options.match, **limits_of(options)), options)
    if not found:
        return nothing(quiet=options.quiet)
    if not options.quiet or options.dry_run:
        print_lines(table(found, legend=True, colours=Colours.wanted(terminal=sys.stdout.isatty())))
        sys.stdout.flush()
    size = tables.size(sum(crash.record.core.stored_bytes for crash in found))
    count = f"{len(found)} {'crash' if len(found) == 1 else 'crashes'}"
    if options.dry_run:
        hint(f"{count} would go, {size}")
        return EXIT_OK
    if not options.yes and not _agreed(count, size):
        hint("Nothing removed.")
        return EXIT_FAILURE
    removed = 0
    try:
        for crash in found:
            # Each on its own, so that crashes come in between.
            removed += store.forget(crash.record.id)
    except PermissionError:
        raise UsageProblem(
            f"{store.path}: not yours to remove crashes from. Run it as the store's owner (root)"
        ) from None
    store.sync()
    if not options.quiet:
        hint(f"{removed} removed, {size} freed")
    return EXIT_OK


def _agreed(count: str, size: str) -> bool:
    """Ask. Raises UsageProblem when nobody is there to answer."""
    if not sys.stdin.isatty():
        raise UsageProblem("there is no terminal to ask on. Say --yes, or look first with --dry-run")
    print(f"Remove {count}, {size}, for good? [y/N] ", end="", file=sys.stderr, flush=True)
    return sys.stdin.readline().strip().lower() in ("y", "yes")
