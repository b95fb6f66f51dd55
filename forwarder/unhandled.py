"""The record of a crash that no receiver took, kept on the host. Rare, so it may import what it needs."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from forwarder.report import report
from receiver.protocol import printable

if TYPE_CHECKING:
    from collections.abc import Mapping

    from forwarder.crash import Crash


def record(
    settings: Mapping[str, object], crash: Crash | None, arguments: list[str], reason: str, tried: list[str]
) -> None:
    """Say it in the journal (or the kernel's log), and leave a record in the host's store.

    crash: None when not even the arguments could be understood. Never raises.
    """
    who = "an unknown process"
    if crash is not None:
        who = f"pid {crash.pid} ({printable(crash.comm, 16)}), signal {crash.signal}"
    else:
        reason = f"{reason}; arguments: {printable(' '.join(arguments).encode('utf-8', 'surrogateescape'))}"
    reason = printable(reason.encode("utf-8", "backslashreplace"), 1000)
    report(f"{who}: {reason}")
    if crash is None:
        return
    try:
        from receiver.record import Core, Record  # noqa: PLC0415 - the line above must be out whatever happens here
        from receiver.store import DEFAULT, Store  # noqa: PLC0415

        path = settings.get("store")
        store = Store(os.fsdecode(path) if isinstance(path, bytes | str) else DEFAULT)
        found = Record.of_numbers(
            pid=crash.pid,
            tid=crash.tid,
            uid=crash.uid,
            gid=crash.gid,
            signal=crash.signal,
            time=crash.time,
            comm=crash.comm,
            core_limit=crash.core_limit,
            dumpable=crash.dumpable,
        )
        found.tried = list(tried)
        found.core = Core(state="none", reason=reason)
        store.add_record(found)
    except Exception as error:
        report(f"{who}: its record could not be written: {printable(str(error).encode('utf-8', 'replace'), 300)}")
