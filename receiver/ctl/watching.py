"""`corepipectl watch`: a line for each crash when it ends."""

from __future__ import annotations

import argparse
import errno
import os
import select
import sys
from typing import TYPE_CHECKING, Any

from receiver.ctl.arguments import add_matches
from receiver.ctl.matching import Crash, matcher
from receiver.ctl.output import EXIT_OK, Colours, print_json, print_lines, table
from receiver.ctl.sources import Local
from receiver.inotify import GOES, Inotify
from receiver.store import Store, StoreError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from receiver.ctl.context import Context

EPILOG = """\
It goes on until ^C, and sees a store that comes later. A crash is told once, when its core is stored, or known to be
lost; those that are there already are not.

examples:
  corepipectl watch                       everything
  corepipectl watch webshop signal=SEGV
  corepipectl watch --json | while read -r crash; do ...; done
"""
# Of the columns to begin with: what comes later is not known.
WIDTHS = (28, 7, 5, 5, 7, 8, 30, 5, 12, 5, 0)


def add(commands: Any) -> None:
    parser: argparse.ArgumentParser = commands.add_parser(
        "watch",
        help="a line for each crash when it ends, live",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_matches(parser)
    parser.add_argument("--json", action="store_true", help="the whole record instead, an object on each line")
    parser.add_argument("--no-legend", action="store_true", help="without the heading")
    parser.set_defaults(run=run, taken=frozenset({"no_legend"}))


def run(context: Context) -> int:
    options = context.options
    wanted = matcher(options.match)
    colours = Colours.wanted(terminal=sys.stdout.isatty())
    heading = not options.no_legend
    widths = list(WIDTHS)
    try:
        for crash in _coming(context.path):
            if not wanted(crash.record):
                continue
            if options.json:
                print_json(crash.record.to_json(), "short")
            else:
                lines = table([crash], legend=True, colours=colours, widths=widths)
                print_lines(lines if heading else lines[1:])
                heading = False
            sys.stdout.flush()
    except KeyboardInterrupt:
        pass
    return EXIT_OK


def _coming(path: str) -> Iterator[Crash]:
    """Yield the crashes that end from now on, for ever. Raises StoreError, OSError."""
    known: set[str] | None = None
    while True:
        notice = Inotify()
        try:
            store = _open(path, notice)
            if store is None:
                # All that comes into a store that is not there yet is new.
                known = set() if known is None else known
                _wait(notice)
                continue
            try:
                source = Local(store)
                # The watch stands before the first look, so nothing can come between them unseen.
                if known is None:
                    known = _ids(store)
                while _is_still(path, store):
                    here = _ids(store)
                    for owner in sorted(here - known):
                        try:
                            yield Crash(store.load(owner), source)
                        except (OSError, ValueError):
                            # It is gone already, or not ours to read.
                            pass
                    # What is gone from the store need not be remembered: no id comes twice.
                    known = here
                    _wait(notice)
            finally:
                store.close()
        finally:
            notice.close()


def _open(path: str, notice: Inotify) -> Store | None:
    """Open the store and watch it; when it is not there, watch the nearest directory above it. Raises StoreError."""
    while True:
        place = path
        while place not in ("/", "") and not os.path.isdir(place):
            place = os.path.dirname(place.rstrip("/"))
        try:
            notice.add(place or ".")
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.ENOTDIR):
                continue
            raise StoreError(f"{place}: cannot be watched ({error.strerror}). See fs.inotify in sysctl(8)") from None
        if place == path:
            try:
                # We have it open, so its end is told above it alone.
                notice.add(os.path.dirname(os.path.abspath(path)), GOES)
            except OSError:
                pass
            return Store(path, create=False)
        # What has come below it since then is not told.
        following = os.path.join(place, os.path.relpath(path, place or ".").split("/")[0])
        if not os.path.lexists(following):
            return None
        if not os.path.isdir(following):
            raise StoreError(f"{following}: is no directory. Name another one with --store")


def _is_still(path: str, store: Store) -> bool:
    try:
        return os.path.samestat(os.stat(path), os.fstat(store.directory))
    except OSError:
        return False


def _ids(store: Store) -> set[str]:
    return {name.removesuffix(".json") for name in store.names() if name.endswith(".json") and name[0] != "."}


def _wait(notice: Inotify) -> None:
    """Wait for something to come, without end. Raises BrokenPipeError when nobody reads what we would write."""
    poll = select.poll()
    poll.register(notice.fd, select.POLLIN)
    # Errors alone: a reader that has gone, as in `watch | head -1`.
    poll.register(sys.stdout.fileno(), 0)
    for fd, _ in poll.poll():
        if fd != notice.fd:
            raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))
    notice.drain()
