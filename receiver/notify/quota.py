"""Quota events: somebody has used up his disk quota, of which the ledger's watcher hears on the host.

Each is a file beside the records, `ID.quota.json`, until all who are to be told have been, or it was given up. It is no
record of a crash: nobody else sees it in the store (receiver/retention.py: names_in).
"""

from __future__ import annotations

import contextlib
import json
import os
import stat
import time
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from receiver import notify
from receiver.notify.queue import put
from receiver.record import new_id, rfc3339
from receiver.retention import QUOTA, listed
from receiver.store import ID

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from receiver.notify.settings import Callback

TYPE = "org.core_pipe.quota.v1"
# One that is being written. Not of an id: `Store.recover` would clear it away.
NEW = ".quota.new"
# When nobody takes them the oldest go.
MOST = 200
MAX_EVENT = 65536
# What is needed to say whose it is; whatever else there is is told, too.
_TEXTS = ("host_name", "type", "name")


def is_wanted(tables: Iterable[dict[str, Any]]) -> bool:
    """Whether one of the tables `[[notify]]`, as they stand in the settings, may want quota events."""
    return any(isinstance(events := table.get("events"), str | list) and "quota" in events for table in tables)


def owners_in(directory: int) -> set[str]:
    """Return the ids of the events in a store. Raises OSError."""
    return {
        owner for name in listed(directory) if name.endswith(QUOTA) and ID.fullmatch(owner := name.removesuffix(QUOTA))
    }


def leave(path: str, events: Sequence[dict[str, Any]]) -> tuple[int, str]:
    """Put events into a store, and have the deliverer look. Returns how many go untold for it, and why. Never waits."""
    flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        directory = os.open(path, flags)
    except OSError as error:
        return len(events), f"{path}: {error.strerror}"
    untold, why = 0, ""
    try:
        found = os.fstat(directory)
        if found.st_uid != os.geteuid() or found.st_mode & 0o022:
            return len(events), f"{path}: others could put files there"
        for event in events:
            try:
                # 0: of no process. A crash's id has its pid there.
                name = new_id(time.time(), 0) + QUOTA
                put(directory, NEW, name, json.dumps(event, allow_nan=False).encode("ascii"))
            except (OSError, ValueError) as error:
                untold, why = untold + 1, f"{path}: {(isinstance(error, OSError) and error.strerror) or error}"
        for owner in sorted(owners_in(directory))[:-MOST]:
            remove(directory, owner)
            untold, why = untold + 1, f"more than {MOST} wait in {path}"
        notify.wake_in(directory)
    except OSError as error:
        why = f"{path}: {error.strerror}"
    finally:
        os.close(directory)
    return untold, why


def remove(directory: int, owner: str) -> None:
    """Remove an event, if it is there. Raises OSError."""
    with contextlib.suppress(FileNotFoundError):
        os.unlink(owner + QUOTA, dir_fd=directory)


def came(directory: int, owner: str) -> float:
    """Return when an event came, seconds since the epoch. Raises OSError."""
    return os.stat(owner + QUOTA, dir_fd=directory, follow_symlinks=False).st_mtime


def read(directory: int, owner: str) -> dict[str, Any]:
    """Return an event. Raises OSError, and ValueError when it is none."""
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    with open(os.open(owner + QUOTA, flags, dir_fd=directory), "rb") as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise ValueError("it is not a file")
        data = file.read(MAX_EVENT + 1)
    if len(data) > MAX_EVENT:
        raise ValueError("it is larger than an event may be")
    try:
        event = json.loads(data)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if not (
        isinstance(event, dict)
        and all(isinstance(event.get(key), str) for key in _TEXTS)
        and isinstance(event.get("at"), int | float)
        and isinstance(event.get("containers"), list)
        and all(isinstance(container, str) for container in event["containers"])
    ):
        raise ValueError("it is no quota event")
    return event


def body(owner: str, event: dict[str, Any], callback: Callback) -> bytes:
    """Return what a program reads, or a server gets. Raises ValueError for what cannot be said."""
    try:
        said = cloud_event(owner, event) if callback.post is not None else event
        return json.dumps(said, allow_nan=False).encode("ascii") + b"\n"
    except (OverflowError, OSError) as error:
        raise ValueError(f"its time is none: {error}") from None


def cloud_event(owner: str, event: dict[str, Any]) -> dict[str, Any]:
    """Return a CloudEvent 1.0 in structured mode. Its subject is whose the quota is, as well as that is known."""
    containers: list[str] = event["containers"]
    places = [event["host_name"] or "unknown", *(containers if len(containers) == 1 else ())]
    return {
        "specversion": "1.0",
        "id": owner,
        "source": "/" + "/".join(quote(place, safe=":") for place in places),
        "type": TYPE,
        "subject": " or ".join(containers) or event["name"] or f"{event['type']} {event.get('id')}",
        "time": rfc3339(event["at"]),
        "datacontenttype": "application/json",
        "data": event,
    }


def made_up() -> dict[str, Any]:
    """Return a warning that never was, for a test."""
    now = time.time()
    return {
        "event": TYPE,
        "host_name": os.uname().nodename,
        "at": now,
        "last": now,
        "count": 1,
        "kind": "space_hard",
        "type": "user",
        "id": 65534,
        "device": "0:0",
        "caused_by": 65534,
        "below": 0.0,
        "mount": "/",
        "name": "this is a test; no quota is used up",
        "containers": ["docker:core_pipe-test"],
        "key": "",
    }
