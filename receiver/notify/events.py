"""Which crash is told, and what is said of it."""

from __future__ import annotations

import json
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from receiver.record import Core, Record
from receiver.signature import digest

if TYPE_CHECKING:
    from receiver.notify.settings import Callback, Filter

TYPE = "org.core_pipe.crash.v1"
CONTENT_TYPE = "application/cloudevents+json; charset=utf-8"
# In the environment of a callback's program.
MARK = "CORE_PIPE_CALLBACK"
# Where programs have passwords and people's names, masked or not. Only told when it is asked for.
PRIVATE = ("environment", "command_line", "journal")


def is_meant(record: Record, when: Filter) -> bool:
    """Whether a crash fulfils the conditions that need no memory: all but `first` and `every`."""
    if when.signal and record.signal not in when.signal:
        return False
    if when.state and record.core.state not in when.state:
        return False
    if not when.exe:
        return True
    exe = record.exe
    names = {record.comm, *((exe, exe.rpartition("/")[2]) if exe else ())}
    return any(fnmatchcase(name, pattern) for name in names for pattern in when.exe)


def is_mute(record: Record) -> bool:
    """Whether a crash is told to nobody: one of a callback's own program would be told to it, and so on.

    It has a core limit of 1, at which the kernel starts no helper at all (core(5)); by the kernel's socket it comes
    here all the same, and where the hard limit is 0 already, it is known by its environment.
    """
    return record.core_limit == 1 or MARK in (record.environment or {})


def is_due(when: Filter, count: int) -> bool:
    """Whether a crash is told that is the bug's first, second, and so on. count: from 1."""
    if not when.first and not when.every:
        return True
    return (when.first and count == 1) or (when.every > 0 and count % when.every == 0)


def bug_of(record: Record) -> str:
    """Return what counts as the same crash, 16 hex digits: one user's must not hide another's.

    A crash of which no core was read has no signature: then it is the program and the signal.
    """
    what = record.signature or f"{record.exe or record.comm} {record.signal}"
    return digest(f"{record.uid} {what}")


def body(record: Record, callback: Callback) -> bytes:
    """Return what a program reads, or a server gets. Raises ValueError for what JSON has no words for (NaN)."""
    data = record.to_json()
    if not callback.full:
        for name in PRIVATE:
            data.pop(name, None)
    event = cloud_event(record, data) if callback.post is not None else data
    return json.dumps(event, allow_nan=False).encode("ascii") + b"\n"


def cloud_event(record: Record, data: dict[str, Any]) -> dict[str, Any]:
    """Return a CloudEvent 1.0 in structured mode. Its id is the record's: who gets it twice can tell."""
    places = [place for place in (record.host_name, record.container) if place]
    return {
        "specversion": "1.0",
        "id": record.id,
        # A reference without a host, by which nothing can be fetched.
        "source": "/" + "/".join(quote(place, safe=":") for place in places or ["unknown"]),
        "type": TYPE,
        "subject": record.exe or record.comm or "unknown",
        "time": record.timestamp,
        "datacontenttype": "application/json",
        "data": data,
    }


def made_up() -> Record:
    """Return the record of a crash that never was, for a test."""
    record = Record.of_numbers(
        pid=1234, tid=1234, uid=1000, gid=1000, signal=11, time=0, comm=b"core_pipe-test", core_limit=0, dumpable=1
    )
    record.exe = "/usr/bin/core_pipe-test"
    record.core = Core(reason="this is a test; nothing has crashed")
    record.signature = digest("core_pipe-test")
    record.seen = 1
    record.command_line = ["core_pipe-test", "--secret", "of no importance"]
    record.environment = {"PATH": "/usr/bin"}
    return record
