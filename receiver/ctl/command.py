"""The command line of corepipectl."""

from __future__ import annotations

import argparse
import io
import sys
from contextlib import closing
from typing import TYPE_CHECKING

from receiver import __version__, completion
from receiver.config import ConfigError
from receiver.ctl import (
    completing,
    debugging,
    listing,
    metrics,
    removing,
    reporting,
    showing,
    space,
    stats,
    taking,
    watching,
)
from receiver.ctl.arguments import add_early, add_options, settle, spelled_out
from receiver.ctl.context import Context
from receiver.ctl.matching import UsageProblem
from receiver.ctl.output import EXIT_FAILURE, EXIT_INTERRUPTED
from receiver.log import quiet_pipe
from receiver.store import StoreError

if TYPE_CHECKING:
    from collections.abc import Sequence

# What coredumpctl(1) does when it is not told what to do.
DEFAULT = "list"
EPILOG = """\
MATCH is an id or its beginning, a pid, a comm, the path of an executable (any word with a '/'), a signature's beginning
(6 characters), or FIELD=VALUE: a field of the record (uid=33, unit=web.service, environment.LANG=C), also by the name
that coredumpctl has for it (COREDUMP_UID=33). Of several, those of one kind are alternatives; those of different kinds
hold together.
DATE is a time as in systemd.time(7): '2026-01-31 13:45', yesterday, -2h, '3 days ago', @1700000000.
Options may stand before the command, too. '--json' is '--json=pretty'; '--json=short' is one line.

examples:
  corepipectl                          all crashes, the newest last
  corepipectl info                     everything about the newest one
  corepipectl debug myprogram          gdb on its newest core
  corepipectl dump myprogram -o core   its newest core, plain ELF, for: gdb PROGRAM core
  corepipectl list --all               on a host: those in its containers, too ('info -M NAME': in one of them)
  corepipectl watch                    a line for each crash, when it comes
  corepipectl usage                    what holds the space, and what the limits still allow
  corepipectl prune --to 2G            remove the oldest cores until the others take no more than 2 GiB
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program. Returns its exit status."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments[:1] == [completion.COMMAND]:
        return completing.run(parser(), arguments[1:])
    options = _options(arguments)
    # A terminal that cannot show a character is no reason to show nothing.
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        with quiet_pipe(), closing(Context(options)) as context:
            return int(options.run(context))
    except (UsageProblem, StoreError, ConfigError) as error:
        print(f"corepipectl: {error}", file=sys.stderr)
    except OSError as error:
        place = f"{error.filename}: " if error.filename else ""
        print(f"corepipectl: {place}{error.strerror}", file=sys.stderr)
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    return EXIT_FAILURE


def _options(arguments: Sequence[str]) -> argparse.Namespace:
    """Return what the command line says. Ends the program, as argparse does, when that is nothing it knows."""
    parser, names = _built()
    options = parser.parse_args(spelled_out(arguments, names))
    if options.command is None:
        options = parser.parse_args(spelled_out([*arguments, DEFAULT], names))
    settle(parser, options)
    return options


# These change or follow a store, which is done under its container's own rights and quotas.
WITHIN = frozenset({"delete", "metrics", "prune", "usage", "watch"})


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line: what the program knows."""
    return _built()[0]


def _built() -> tuple[argparse.ArgumentParser, list[str]]:
    """Return the parser, and the names of the commands."""
    parser = argparse.ArgumentParser(
        prog="corepipectl",
        description="Shows the crashes that core_pipe has kept, and takes their cores out.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"core_pipe {__version__}")
    about = "the store (default: the receiver's setting, see receiver.toml)"
    parser.add_argument("--store", metavar="DIR", help=about)
    add_early(parser)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    for module in (listing, showing, taking, debugging, watching, removing, space, stats, reporting, metrics):
        module.add(commands)
    for name, command in commands.choices.items():
        # To all: a command that cannot look elsewhere says what to do instead (Context.path), and does not offer it.
        add_options(command, "containers", hidden=name in WITHIN)
        # Without a default: what stands before the command stays.
        command.add_argument("--store", metavar="DIR", default=argparse.SUPPRESS, help=about)
    return parser, list(commands.choices)
