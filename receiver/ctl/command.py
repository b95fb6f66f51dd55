"""The command line of corepipectl."""

from __future__ import annotations

import argparse
import io
import sys
from typing import TYPE_CHECKING

from receiver import __version__
from receiver.config import ConfigError
from receiver.ctl import listing, showing, space, taking
from receiver.ctl.context import Context
from receiver.ctl.matching import UsageProblem
from receiver.ctl.output import EXIT_FAILURE
from receiver.log import quiet_pipe
from receiver.store import StoreError

if TYPE_CHECKING:
    from collections.abc import Sequence

EPILOG = """\
MATCH is an id (or its beginning), a pid, a comm, or the path of an executable (any word with a '/').

examples:
  corepipectl list                     all crashes, the newest last
  corepipectl info 4711                everything about the newest crash of pid 4711
  corepipectl info myprogram --json    the same as JSON
  corepipectl dump myprogram -o core   its newest core, plain ELF, for: gdb PROGRAM core
  corepipectl usage                    what holds the space, and what the limits still allow
  corepipectl prune --to 2G            remove the oldest cores until the others take no more than 2 GiB
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program. Returns its exit status."""
    options = parser().parse_args(arguments)
    # A terminal that cannot show a character is no reason to show nothing.
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        with quiet_pipe():
            return int(options.run(Context(options)))
    except (UsageProblem, StoreError, ConfigError) as error:
        print(f"corepipectl: {error}", file=sys.stderr)
    except OSError as error:
        print(f"corepipectl: {error.filename or ''}: {error.strerror}", file=sys.stderr)
    return EXIT_FAILURE


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line: what the program knows."""
    parser = argparse.ArgumentParser(
        prog="corepipectl",
        description="Shows the crashes that core_pipe has kept, and takes their cores out.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"core_pipe {__version__}")
    parser.add_argument("--store", metavar="DIR", help="the store (default: the receiver's setting, see receiver.toml)")
    parser.set_defaults(run=listing.run, json=False, match=None)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    for module in (listing, showing, taking, space):
        module.add(commands)
    return parser
