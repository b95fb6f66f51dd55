"""The record of a crash that no receiver took, kept on the host. Rare, so it may import what it needs."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from forwarder.allowance import RECORDS, WINDOW_SECONDS, Allowance
from forwarder.report import report
from receiver.protocol import printable

if TYPE_CHECKING:
    from collections.abc import Mapping

    from forwarder.crash import Crash


def record(
    settings: Mapping[str, object], crash: Crash | None, arguments: list[str], reason: str, tried: list[str]
) -> None:
    """Say it in the journal (or the kernel's log), and leave a record in the host's store.

    Both within the allowance of the crash's container. crash: None when not even the arguments could be understood.
    Never raises.
    """
    who = "an unknown process"
    if crash is not None:
        who = f"pid {crash.pid} ({printable(crash.comm, 16)}), signal {crash.signal}"
    else:
        reason = f"{reason}; arguments: {printable(' '.join(arguments).encode('utf-8', 'surrogateescape'))}"
    reason = printable(reason.encode("utf-8", "backslashreplace"), 1000)
    # Of a process that was gone before we could look, only the user is known.
    key = "unidentified"
    if crash is not None:
        key = crash.key or f"unidentified.uid.{crash.uid}"
    try:
        may_say, may_record, kept_back = Allowance(key).use()
    except OSError as error:
        # /run is full or not there. Rather a line too many than silence.
        report(f"what {key} may make us write cannot be counted ({error.strerror})")
        may_say, may_record, kept_back = True, True, 0
    if kept_back:
        report(f"{key}: {kept_back} crashes before this one left no record: more than {RECORDS} in {WINDOW_SECONDS} s")
    if may_say:
        report(f"{who}: {reason}")
    if crash is None or not may_record:
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
        found.cgroup = key.replace("!", "/")
        found.core = Core(state="none", reason=reason)
        store.add_record(found)
        from receiver.afterwards import afterwards  # noqa: PLC0415
        from receiver.config import Config, ConfigError, load  # noqa: PLC0415

        try:
            config = load()
        except ConfigError:
            # Whoever uses them says what is wrong with them.
            config = Config()
        afterwards(found, config, store)
    except Exception as error:
        if may_say:
            report(f"{who}: its record could not be written: {printable(str(error).encode('utf-8', 'replace'), 300)}")
