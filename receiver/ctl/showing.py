"""`corepipectl info`: everything about one crash."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from receiver import tables
from receiver.ctl.matching import newest
from receiver.ctl.output import EXIT_OK, left_out, print_json
from receiver.tables import shown

if TYPE_CHECKING:
    import argparse

    from receiver.ctl.context import Context


def add(commands: Any) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser("info", help="everything about one crash")
    parser.add_argument("--json", action="store_true", help="as JSON, for programs")
    parser.add_argument("match", metavar="MATCH", help="an id, a pid, a comm or a path; of several the newest")
    parser.set_defaults(run=run)
    return parser


def run(context: Context) -> int:
    record = newest(context.sources, context.options.match).record
    if context.options.json:
        print_json(record.to_json())
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
        ("Left Out", left_out(record)),
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
