"""`core-pipe-forwarder metrics`: what the host alone knows, for Prometheus: lost crashes, and used up quotas.

From the ledger's book, which its watcher keeps; run from a timer, as docs/metrics.md has it. Not written by the watcher
itself: that one's sandbox need not be opened to node_exporter's directory.
"""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import argparse

    from receiver.metrics import Family

OK, FAILED = 0, 1


def register(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command to those of core-pipe-forwarder."""
    command = commands.add_parser(
        "metrics",
        help="the ledger's numbers, for Prometheus",
        description="Shows what the ledger has found, and the quota warnings, in Prometheus' text format. What a store "
        "has counted is shown by 'corepipectl metrics'.",
    )
    command.add_argument(
        "-o", "--output", metavar="FILE", help="replace this file in one step (default: standard output)"
    )


def run(options: argparse.Namespace) -> int:
    """Run the command; return the exit status. Raises OSError."""
    from receiver.metrics import put, render  # noqa: PLC0415 - only this command needs it

    if os.geteuid() != 0:
        # A file with zeros would say that nothing is lost.
        sys.stderr.write("core-pipe-forwarder: the ledger's book is root's\n  run it again with sudo\n")
        return FAILED
    text = render(families())
    if options.output is None:
        sys.stdout.write(text)
    else:
        put(options.output, text)
    return OK


def families(path: str | None = None) -> list[Family]:
    """Return what a book says. path: of the book, or the host's own; one that is not there yet says nothing.

    Raises OSError.
    """
    from forwarder.ledger.book import BOOK, COUNTED, NAMED, Contents, is_watched, read_book  # noqa: PLC0415 - as above
    from forwarder.quota.events import KINDS, OTHER  # noqa: PLC0415
    from receiver.metrics import Family, Sample  # noqa: PLC0415

    path = path or BOOK
    try:
        contents, watched = read_book(path), is_watched(path)
    except FileNotFoundError:
        contents, watched = Contents(), False
    states = [crash.state for crash in contents.named.values()]
    quota = contents.quota
    return [
        Family(
            "core_pipe_ledger_watching",
            "gauge",
            "Whether the ledger watches now (1) or not (0).",
            (Sample(int(watched)),),
        ),
        # No counter: a handler may speak of a crash that was thought lost.
        Family(
            "core_pipe_ledger_crashes",
            "gauge",
            "Crashes that the ledger names (lost: no record at all; unclear, passed: it cannot tell).",
            tuple(Sample(states.count(state), (("state", state),)) for state in NAMED),
        ),
        Family(
            "core_pipe_ledger_settled_total",
            "counter",
            "Crashes that are accounted for (handled), or were not the forwarder's (unwanted, elsewhere).",
            tuple(Sample(contents.counts[state], (("state", state),)) for state in COUNTED),
        ),
        Family(
            "core_pipe_ledger_pending",
            "gauge",
            "Dumps that are under way, or too young to tell.",
            (Sample(len(contents.open)),),
        ),
        Family(
            "core_pipe_quota_warnings_total",
            "counter",
            "Warnings of the kernel that a disk quota was reached, by kind.",
            tuple(Sample(quota.counts[kind], (("kind", kind),)) for kind in (*KINDS.values(), OTHER)),
        ),
        Family(
            "core_pipe_quota_warnings_lost_total",
            "counter",
            "Quota warnings that came faster than they could be taken in.",
            (Sample(quota.lost),),
        ),
    ]
