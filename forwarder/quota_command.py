"""`core-pipe-forwarder quota`: who reached a disk quota, as the kernel said it to the ledger's watcher."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import argparse

    from forwarder.ledger import Summary
    from forwarder.quota.tally import QuotaWarning, Tally

OK, FAILED, NOT_WATCHING = 0, 1, 3

_EPILOG = """\
Exit status:
  0  shown, also when there is nothing to show
  1  failed
  2  wrong usage
  3  nobody watches (any more), or this kernel does not tell
"""


def register(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command to those of core-pipe-forwarder."""
    import argparse  # noqa: PLC0415 - whoever calls this has it

    from forwarder.ledger_command import add_options  # noqa: PLC0415 - as above

    command = commands.add_parser(
        "quota",
        help="show who reached a disk quota",
        description="Shows what the kernel warned of while the ledger's service watched: one line for each quota, kind "
        "of limit and hour, with how often and whose it may be. Where several containers share their ids, each of them "
        "is named.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_options(command)


def run(options: argparse.Namespace) -> int:
    """Run the command; return the exit status. Raises OSError."""
    from forwarder.ledger.book import BOOK, is_watched, read_book  # noqa: PLC0415 - only this command needs it
    from forwarder.quota.events import kernel_tells  # noqa: PLC0415
    from forwarder.quota.tally import Tally  # noqa: PLC0415

    watched, tally = False, Tally()
    try:
        tally = read_book(BOOK).quota
        watched = is_watched(BOOK)
    except FileNotFoundError:
        # It has never watched.
        pass
    except PermissionError:
        sys.stderr.write(f"core-pipe-forwarder: {BOOK} is root's\n  run it again with sudo\n")
        return FAILED
    told = kernel_tells()
    text = (
        as_json(tally, options.since, watched=watched, told=told)
        if options.json
        else "\n".join(lines(tally, options.since, watched=watched, told=told))
    )
    sys.stdout.write(text + "\n")
    return OK if watched and told else NOT_WATCHING


def _chosen(tally: Tally, since: float) -> list[QuotaWarning]:
    return sorted((one for one in tally.records.values() if one.last >= since), key=lambda one: one.at)


def as_json(tally: Tally, since: float, *, watched: bool, told: bool) -> str:
    """Return the JSON form, whose keys are part of the interface."""
    return json.dumps(
        {
            "watched": watched,
            "kernel_tells": told,
            "warnings": [asdict(one) for one in _chosen(tally, since)],
            "counts": dict(tally.counts),
            "lost": tally.lost,
            "forgotten": tally.forgotten,
        },
        indent=2,
    )


def lines(tally: Tally, since: float, *, watched: bool, told: bool) -> list[str]:
    """Return what people are shown."""
    from forwarder.ledger_command import time_text  # noqa: PLC0415
    from forwarder.quota.tally import OTHERS  # noqa: PLC0415
    from receiver import tables  # noqa: PLC0415

    said: list[str] = []
    rows: list[tuple[object, ...]] = [
        ("FIRST", "LAST", "COUNT", "BELOW", "KIND", "QUOTA", "NAME", "CONTAINER", "WHERE")
    ]
    rows += [
        (
            time_text(one.at),
            time_text(one.last),
            one.count,
            "-" if one.id == OTHERS else "yes" if one.below else "no",
            one.kind,
            f"{one.type} {'...' if one.id == OTHERS else one.id}",
            one.name or "-",
            " or ".join(one.containers) or "unknown",
            one.mount or one.device,
        )
        for one in _chosen(tally, since)
    ]
    said += tables.lines(rows, right=frozenset((2,))) if len(rows) > 1 else ["The kernel warned of no quota."]
    if tally.forgotten:
        said.append(f"{tally.forgotten} more, which were older, are not listed any more.")
    if tally.lost:
        said.append(f"{tally.lost} warnings came faster than they could be taken in.")
    if not told:
        said.append(NO_NETLINK)
    elif not watched:
        said.append(
            "Nobody watches now. Start it: systemctl enable --now core_pipe-ledger.service, or "
            "core-pipe-forwarder ledger --watch"
        )
    return said


NO_NETLINK = "This kernel does not tell: it has no disk quota netlink (CONFIG_QUOTA_NETLINK_INTERFACE)."


def in_short(found: Summary, *, told: bool) -> str:
    """Return the line in `status`."""
    if not told:
        return "this kernel has no disk quota netlink"
    if found.watched is None:
        return "not known: ask as root"
    since = f"{found.quota_warnings or 'none'} so far"
    return f"watching; {since}" if found.watched else f"not watching; {since}"
