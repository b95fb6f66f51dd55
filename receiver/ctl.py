"""corepipectl: list, show, take out and clear away the crashes in a store."""

from __future__ import annotations

import argparse
import io
import json
import os
import sys
from typing import TYPE_CHECKING, Any, TypeVar

from receiver import __version__, tables
from receiver.config import ConfigError, duration, load
from receiver.config import _size as parse_size
from receiver.log import quiet_pipe
from receiver.store import Store, StoreError
from receiver.tables import shown

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from receiver.dump import Copied
    from receiver.record import Record
    from receiver.retention import Holding, Report, Use

K = TypeVar("K")

EXIT_OK = 0
# coredumpctl(1): "0 is returned; otherwise a non-zero failure code. Not finding any matching core dumps is failure."
EXIT_FAILURE = 1
# Programs that `usage` shows; there may be one for each record.
PROGRAMS = 20

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


class UsageProblem(Exception):
    """Something the user can mend; the text says how."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program. Returns its exit status."""
    found = _parser().parse_args(arguments)
    # A terminal that cannot show a character is no reason to show nothing.
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        with quiet_pipe():
            path = found.store or load().store
            if found.run is _list and not os.path.lexists(path):
                # Nothing has crashed here yet: the first crash makes the store.
                return _show_list([], found)
            if found.run is _usage:
                store = Store.configured(load(), path=path, create=False)
            else:
                store = Store(path, create=False)
            _recover(store)
            return int(found.run(store, found))
    except (UsageProblem, StoreError, ConfigError) as error:
        print(f"corepipectl: {error}", file=sys.stderr)
    except OSError as error:
        print(f"corepipectl: {error.filename or ''}: {error.strerror}", file=sys.stderr)
    return EXIT_FAILURE


def _recover(store: Store) -> None:
    """Finish what a receiver left that ended with its container; for who may not, it waits for the next receiver."""
    if os.geteuid() == 0:
        try:
            store.recover()
        except (OSError, StoreError):
            # A read-only store, or one of another root's: what is visible is shown all the same.
            pass


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="corepipectl",
        description="Shows the crashes that core_pipe has kept, and takes their cores out.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"core_pipe {__version__}")
    parser.add_argument("--store", metavar="DIR", help="the store (default: the receiver's setting, see receiver.toml)")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    parser.set_defaults(run=_list, json=False, match=None)
    listing = commands.add_parser("list", help="a line for each crash (the default)")
    info = commands.add_parser("info", help="everything about one crash")
    dump = commands.add_parser("dump", help="write a core out, as a plain ELF core")
    usage = commands.add_parser("usage", help="what holds the space, and what the limits still allow")
    prune = commands.add_parser("prune", help="remove cores, the oldest first; their records stay")
    for command in (listing, info, usage):
        command.add_argument("--json", action="store_true", help="as JSON, for programs")
    listing.add_argument("match", nargs="?", metavar="MATCH", help="only these")
    for command in (info, dump):
        command.add_argument("match", metavar="MATCH", help="an id, a pid, a comm or a path; of several the newest")
    dump.add_argument("-o", "--output", metavar="FILE", help="write it there (default: standard output)")
    prune.add_argument("match", nargs="?", metavar="MATCH", help="only cores of these crashes")
    prune.add_argument(
        "--to", type=_argument(parse_size), metavar="SIZE", help="only until the store's cores take so much (as 2G)"
    )
    prune.add_argument(
        "--older-than", type=_argument(duration), metavar="AGE", help="only cores of crashes so long ago (as 30d, 12h)"
    )
    prune.add_argument("--dry-run", action="store_true", help="remove nothing, only say what would go")
    listing.set_defaults(run=_list)
    usage.set_defaults(run=_usage)
    prune.set_defaults(run=_prune)
    info.set_defaults(run=_info)
    dump.set_defaults(run=_dump)
    return parser


def _argument(parse: Callable[[str], Any]) -> Callable[[str], Any]:
    """Make a setting's parser one for arguments."""

    def parse_argument(text: str) -> Any:
        try:
            return parse(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(f"{shown(text)!r} {error}") from None

    return parse_argument


def matches(record: Record, match: str) -> bool:
    """Whether a record is meant by a MATCH."""
    if "/" in match:
        return record.exe in (match, f"{match} (deleted)")
    return match in (str(record.pid), record.comm) or (len(match) >= 8 and record.id.startswith(match))


def _records(store: Store, match: str | None) -> list[Record]:
    found = []
    unreadable = 0
    for _, record in store.records():
        if record is None:
            unreadable += 1
        elif match is None or matches(record, match):
            found.append(record)
    if unreadable:
        # For an ordinary user every other user's, so one line for all of them.
        print(f"corepipectl: {unreadable} more cannot be read as records, or not by you", file=sys.stderr)
    return found


def _newest(store: Store, match: str) -> Record:
    found = _records(store, match)
    if not found:
        raise UsageProblem(f"no crash matches '{match}'. 'corepipectl list' shows what there is")
    return found[-1]


def _print_json(value: Any) -> None:
    print(json.dumps(value, indent=2))


def _print_lines(lines: list[str]) -> None:
    print("\n".join(lines))


def _list(store: Store, found: argparse.Namespace) -> int:
    return _show_list(_records(store, found.match), found)


def _show_list(records: list[Record], found: argparse.Namespace) -> int:
    if found.json:
        _print_json([record.to_json() for record in records])
        return EXIT_OK if records or found.match is None else EXIT_FAILURE
    if not records:
        print("No crashes found.", file=sys.stderr)
        return EXIT_FAILURE
    rows: list[tuple[object, ...]] = [("TIME", "PID", "UID", "GID", "SIG", "CORE", "EXE", "SIZE", "ID")]
    rows += [_row(record) for record in records]
    _print_lines(tables.lines(rows, right=frozenset((1, 2, 3, 7))))
    return EXIT_OK


def _row(record: Record) -> tuple[object, ...]:
    return (
        record.timestamp.replace("T", " ").replace("Z", " UTC"),
        record.pid,
        record.uid,
        record.gid,
        record.signal_name,
        record.core.state,
        record.exe or record.comm,
        tables.size(record.core.stored_bytes) if record.core.path else "-",
        record.id,
    )


def _info(store: Store, found: argparse.Namespace) -> int:
    record = _newest(store, found.match)
    if found.json:
        _print_json(record.to_json())
        return EXIT_OK
    core = record.core
    rows: list[tuple[str, object]] = [
        ("ID", record.id),
        ("PID", f"{record.pid} ({record.comm})" if record.pid == record.tid else f"{record.pid}, thread {record.tid}"),
        ("UID", record.uid if record.euid in (None, record.uid) else f"{record.uid}, effective {record.euid}"),
        ("GID", record.gid if record.egid in (None, record.gid) else f"{record.gid}, effective {record.egid}"),
        ("Signal", f"{record.signal} ({record.signal_name})"),
        ("Timestamp", record.timestamp),
        ("Command Line", " ".join(record.command_line) if record.command_line else None),
        ("Executable", record.exe),
        ("Comm", record.comm),
        ("Directory", record.cwd),
        ("Root", record.root),
        ("Control Group", record.cgroup),
        ("Host Name", record.host_name),
        ("Core", core.state + (f": {core.reason}" if core.reason else "")),
        ("Storage", core.path),
        ("Size", f"{tables.size(core.size_bytes)}, {tables.size(core.stored_bytes)} on disk" if core.path else None),
        ("Left Out", _left_out(record)),
        ("Signature", record.signature),
        ("Seen", f"{record.seen} times lately, this one included" if (record.seen or 0) > 1 else None),
        ("Threads", record.threads),
        ("Build Id", record.build_id),
    ]
    for label, value in rows:
        if value is not None:
            print(f"{label:>14}: {shown(value)}")
    for frame in record.frames or ():
        print(f"{'Frame':>14}: {shown(frame)}")
    for tried in record.tried:
        print(f"{'Not taken by':>14}: {shown(tried)}")
    for name, value in (record.environment or {}).items():
        print(f"{'Environment':>14}: {shown(name)}={shown(value)}")
    return EXIT_OK


def _left_out(record: Record) -> str | None:
    """Say what a reduced core is without, and how a debugger shows that."""
    core = record.core
    if core.state != "reduced" or core.path is None:
        return None
    less, whole = core.absent_bytes, core.whole_bytes
    how_much = f"{tables.size(less)} of {tables.size(whole)} of" if less > 0 else "some"
    return f"{how_much} memory; gdb shows it as unavailable (Cannot access memory)"


def _dump(store: Store, found: argparse.Namespace) -> int:
    # Only dump needs them.
    from receiver import dump  # noqa: PLC0415
    from receiver.stored import Damaged, StoredCore  # noqa: PLC0415

    record = _newest_with_core(store, found.match)
    if found.output is None and sys.stdout.isatty():
        raise UsageProblem("a core is not for a terminal. Write it to a file with -o FILE, or into a pipe")
    source = store.open_core(record)
    try:
        core = StoredCore(source, record.core.compression)
        target = os.dup(sys.stdout.fileno()) if found.output is None else dump.open_output(found.output)
        try:
            copied = dump.copy(core, target, record.core.size_bytes)
        finally:
            os.close(target)
    except (Damaged, dump.ForeignFile) as error:
        raise UsageProblem(str(error)) from None
    finally:
        os.close(source)
    _say_damage(record, copied)
    if found.output is not None:
        print(f"{found.output}: {copied.size} bytes, {shown(record.core.state)}", file=sys.stderr)
        left_out = _left_out(record)
        if left_out is not None:
            print(f"Left out: {left_out}", file=sys.stderr)
        if record.exe:
            print(f"Open it with: gdb {shown(record.exe)} {found.output}", file=sys.stderr)
    return EXIT_OK


def _say_damage(record: Record, copied: Copied) -> None:
    """Raise UsageProblem with all that was wrong with a core that was written out as far as it could be."""
    size = record.core.size_bytes
    problems = [str(damage) for damage in copied.damage]
    if copied.damages > len(problems):
        problems.append(f"... and {copied.damages - len(problems)} more")
    if copied.too_much:
        problems.append(f"the stored core is damaged: it has more than the {size} bytes that its record says")
    elif copied.size != size:
        problems.append(f"the stored core is damaged: {copied.size} of {size} bytes")
    if problems:
        raise UsageProblem(
            "\n".join(problems) + ". What can be read was written, with zeros for what is damaged before its end"
        )


def _newest_with_core(store: Store, match: str) -> Record:
    """Return the newest match that has a core. Raises UsageProblem with the newest one's reason when none has."""
    found = _records(store, match)
    for record in reversed(found):
        if record.core.path is not None:
            return record
    newest = _newest(store, match)
    raise UsageProblem(f"crash {shown(newest.id)} has no core: {shown(newest.core.reason or 'no reason is recorded')}")


def _prune(store: Store, found: argparse.Namespace) -> int:
    match = found.match
    if match is None and found.to is None and found.older_than is None:
        raise UsageProblem("say which cores: --to SIZE, --older-than AGE, or a MATCH ('--to 0' removes all)")
    if match is not None:
        # A name that was mistyped is a failure; that nothing is old enough is none.
        _newest(store, match)
    try:
        pruned = store.prune(
            to=found.to,
            older_than=found.older_than,
            match=None if match is None else lambda record: matches(record, match),
            dry_run=found.dry_run,
        )
    except PermissionError:
        raise UsageProblem(
            f"{store.path}: not yours to remove cores from. Run it as the store's owner (root)"
        ) from None
    for record in pruned:
        print(" ".join(shown(cell) for cell in _row(record)))
    freed = tables.size(sum(record.core.stored_bytes for record in pruned))
    cores = f"{len(pruned)} {'core' if len(pruned) == 1 else 'cores'}"
    print(f"{cores} would go, {freed}" if found.dry_run else f"{cores} removed, {freed} freed", file=sys.stderr)
    return EXIT_OK


def _usage(store: Store, found: argparse.Namespace) -> int:
    report = store.usage()
    if found.json:
        _print_json(_usage_json(report))
        return EXIT_OK
    heading = ("CORES", "SIZE", "RECORDS")
    users: list[tuple[object, ...]] = [("USER", *heading)]
    users += [("?" if uid is None else uid, *_cells(held)) for uid, held in _largest(report.users)]
    users.append(("all", *_cells(report.total)))
    _print_lines(tables.lines(users, right=frozenset((1, 2, 3))))
    if report.programs:
        print()
        programs: list[tuple[object, ...]] = [("PROGRAM", *heading)]
        programs += [(name, *_cells(held)) for name, held in _largest(report.programs)[:PROGRAMS]]
        _print_lines(tables.lines(programs, right=frozenset((1, 2, 3))))
        if len(report.programs) > PROGRAMS:
            print(f"... and {len(report.programs) - PROGRAMS} more (--json has them all)")
    print()
    limits: list[tuple[object, ...]] = [("LIMIT", "VALUE", "NOW", "LEFT")]
    limits += [_limit_row(use) for use in report.uses]
    _print_lines(tables.lines(limits, right=frozenset((1, 2, 3))))
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
