"""What every command prints in the same way, and its exit statuses."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from receiver import tables

if TYPE_CHECKING:
    from receiver.record import Record

EXIT_OK = 0
# coredumpctl(1): "0 is returned; otherwise a non-zero failure code. Not finding any matching core dumps is failure."
EXIT_FAILURE = 1


def print_json(value: Any) -> None:
    print(json.dumps(value, indent=2))


def print_lines(lines: list[str]) -> None:
    print("\n".join(lines))


def row(record: Record) -> tuple[object, ...]:
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


def left_out(record: Record) -> str | None:
    """Say what a reduced core is without, and how a debugger shows that."""
    core = record.core
    if core.state != "reduced" or core.path is None:
        return None
    less, whole = core.absent_bytes, core.whole_bytes
    how_much = f"{tables.size(less)} of {tables.size(whole)} of" if less > 0 else "some"
    return f"{how_much} memory; gdb shows it as unavailable (Cannot access memory)"
