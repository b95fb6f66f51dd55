"""`corepipectl prune` and `usage`: what holds the space, and its release."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING, Any, TypeVar

from receiver import tables
from receiver.config import _size as parse_size
from receiver.config import duration
from receiver.ctl.arguments import MATCH_HELP, add_matches, add_options, parsed
from receiver.ctl.matching import UsageProblem, matcher, newest
from receiver.ctl.output import EXIT_OK, print_json, print_lines, row
from receiver.tables import shown

if TYPE_CHECKING:
    from collections.abc import Callable

    from receiver.ctl.context import Context
    from receiver.retention import Holding, Report, Use

K = TypeVar("K")

USAGE_EPILOG = """\
examples:
  corepipectl usage
  corepipectl usage --json=short | jq .headroom_bytes
"""
PRUNE_EPILOG = """\
examples:
  corepipectl prune --to 2G                       the oldest cores go, until the others take no more than 2 GiB
  corepipectl prune --older-than 30d --dry-run    what would go
  corepipectl prune webshop                       all cores of one program
"""
# Programs that `usage` shows; there may be one for each record.
PROGRAMS = 20


def add(commands: Any) -> None:
    usage = commands.add_parser(
        "usage",
        help="what holds the space, and what the limits still allow",
        epilog=USAGE_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_options(usage, "json")
    usage.set_defaults(run=run_usage)
    prune = commands.add_parser(
        "prune",
        help="remove cores, the oldest first; their records stay",
        epilog=PRUNE_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_matches(prune, text=f"only cores of these crashes: {MATCH_HELP}")
    prune.add_argument(
        "--to", type=parsed(parse_size), metavar="SIZE", help="only until the store's cores take so much (as 2G)"
    )
    prune.add_argument(
        "--older-than", type=parsed(duration), metavar="AGE", help="only cores of crashes so long ago (as 30d, 12h)"
    )
    prune.add_argument("--dry-run", action="store_true", help="remove nothing, only say what would go")
    prune.set_defaults(run=run_prune)


def run_prune(context: Context) -> int:
    options, store = context.options, context.store()
    match = options.match
    if not match and options.to is None and options.older_than is None:
        raise UsageProblem("say which cores: --to SIZE, --older-than AGE, or a MATCH ('--to 0' removes all)")
    if match:
        # A name that was mistyped is a failure; that nothing is old enough is none.
        newest(context.sources, match)
    try:
        pruned = store.prune(
            to=options.to,
            older_than=options.older_than,
            match=matcher(match) if match else None,
            dry_run=options.dry_run,
        )
    except PermissionError:
        raise UsageProblem(
            f"{store.path}: not yours to remove cores from. Run it as the store's owner (root)"
        ) from None
    for record in pruned:
        print(" ".join(shown(cell) for cell in row(record)))
    freed = tables.size(sum(record.core.stored_bytes for record in pruned))
    cores = f"{len(pruned)} {'core' if len(pruned) == 1 else 'cores'}"
    print(f"{cores} would go, {freed}" if options.dry_run else f"{cores} removed, {freed} freed", file=sys.stderr)
    return EXIT_OK


def run_usage(context: Context) -> int:
    report = context.store().usage()
    if context.options.json:
        print_json(_usage_json(report), context.options.json)
        return EXIT_OK
    heading = ("CORES", "SIZE", "RECORDS")
    users: list[tuple[object, ...]] = [("USER", *heading)]
    users += [("?" if uid is None else uid, *_cells(held)) for uid, held in _largest(report.users)]
    users.append(("all", *_cells(report.total)))
    print_lines(tables.lines(users, right=frozenset((1, 2, 3))))
    if report.programs:
        print()
        programs: list[tuple[object, ...]] = [("PROGRAM", *heading)]
        programs += [(name, *_cells(held)) for name, held in _largest(report.programs)[:PROGRAMS]]
        print_lines(tables.lines(programs, right=frozenset((1, 2, 3))))
        if len(report.programs) > PROGRAMS:
            print(f"... and {len(report.programs) - PROGRAMS} more (--json has them all)")
    print()
    limits: list[tuple[object, ...]] = [("LIMIT", "VALUE", "NOW", "LEFT")]
    limits += [_limit_row(use) for use in report.uses]
    print_lines(tables.lines(limits, right=frozenset((1, 2, 3))))
    print()
    if report.writing.cores:
        print(f"Being written: {report.writing.cores}, which may take {tables.size(report.writing.size)}.")
    if report.headroom is None:
        print("No limit is set.")
    elif report.headroom == 0:
        print(f"A next core takes an old one's room ({report.limiting}).")
    else:
        print(f"A next core may take {tables.size(report.headroom)} before an old one goes ({report.limiting}).")
    return EXIT_OK


def _largest(held: dict[K, Holding]) -> list[tuple[K, Holding]]:
    return sorted(held.items(), key=lambda item: (-item[1].size, -item[1].records, str(item[0])))


def _cells(held: Holding) -> tuple[object, ...]:
    return held.cores, tables.size(held.size), held.records


def _limit_row(use: Use) -> tuple[object, ...]:
    show: Callable[[int], str] = {"bytes": tables.size, "seconds": tables.duration}.get(use.unit, str)
    # Of these, what is there is what is free.
    free = " free" if use.name in ("keep_free", "keep_free_inodes", "memory") else ""
    return use.name, show(use.limit), show(use.used) + free, show(use.headroom)


def _usage_json(report: Report) -> dict[str, Any]:
    def of(held: Holding) -> dict[str, int]:
        return {"cores": held.cores, "bytes": held.size, "records": held.records}

    return {
        "total": of(report.total),
        "writing": {"cores": report.writing.cores, "bytes": report.writing.size},
        "users": [{"uid": uid, **of(held)} for uid, held in _largest(report.users)],
        "programs": [{"program": name, **of(held)} for name, held in _largest(report.programs)],
        "limits": [use._asdict() for use in report.uses],
        "limiting": report.limiting,
        "headroom_bytes": report.headroom,
    }
