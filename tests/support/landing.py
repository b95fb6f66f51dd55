"""Where a crash ended: its record and its core in one place, and nothing of it anywhere else."""

from __future__ import annotations

import contextlib
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.support.containers import Container, Host
from tests.support.receivers import STORE
from tests.support.waiting import wait_until

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.support.crash import Crashing
    from tests.support.receivers import Forwarder


# What a store has beside crashes.
BOOKS = {".lock", ".history", ".counters"}


@dataclass(frozen=True)
class Landed:
    """A record, and the two files as the host sees them."""

    record: dict[str, Any]
    record_path: Path
    core_path: Path


def store_of(place: Container, forwarder: Forwarder) -> Path:
    return Path(forwarder.store) if isinstance(place, Host) else Path(f"{place.root}{STORE}")


def names(store: Path) -> set[str]:
    """All that a store holds, what is hidden in it too."""
    with contextlib.suppress(FileNotFoundError):
        return set(os.listdir(store)) - BOOKS
    return set()


def numbers(host_pid: int) -> list[int]:
    """A process's pids, from the host's to the one in its own pid namespace."""
    status = Path(f"/proc/{host_pid}/status").read_bytes()
    found = re.search(rb"^NSpid:\t([0-9\t]+)$", status, re.MULTILINE)
    assert found is not None
    return [int(number) for number in found[1].split()]


def number_in(place: Container, host_pid: int) -> int:
    """A process's pid in the pid namespace of a place that it is in, or that is further in: 0 then."""
    return dict(enumerate(numbers(host_pid))).get(len(numbers(place.init_pid)) - 1, 0)


def lands(forwarder: Forwarder, at: Container, elsewhere: list[Container], happen: Callable[[], object]) -> Landed:
    """Let a crash happen whose whole core must come to one place, and no file to the others."""
    store = store_of(at, forwarder)
    before = names(store)
    others = {place: names(store_of(place, forwarder)) for place in elsewhere}
    happen()

    def visible() -> set[str] | None:
        new = names(store) - before
        return new if any(name[0] != "." for name in new) and not any(name[0] == "." for name in new) else None

    try:
        found = wait_until(visible, 15, "the record")
    except TimeoutError:
        raise AssertionError(f"nothing for the {at.kind}; {_new(others, forwarder)}") from None
    assert len(found) == 2, found
    (record_name,) = (name for name in found if name.endswith(".json"))
    (core_name,) = found - {record_name}
    record = json.loads((store / record_name).read_bytes())
    assert record["core"]["state"] == "stored", record
    assert os.path.basename(record["core"]["path"]) == core_name
    for place, known in others.items():
        assert names(store_of(place, forwarder)) == known, f"not only for the {at.kind}; {_new(others, forwarder)}"
    return Landed(record, store / record_name, store / core_name)


def _new(known: dict[Container, set[str]], forwarder: Forwarder) -> str:
    found = []
    for place, before in known.items():
        for name in names(store := store_of(place, forwarder)) - before:
            found.append(f"for the {place.kind}: {name}")
            if name.endswith(".json"):
                record = json.loads((store / name).read_bytes())
                found[-1] += (
                    f" {record['comm']!r} {record['core']['state']} {record['core']['reason']} {record['tried']}"
                )
    return "; ".join(found) or "nothing elsewhere"


def crash_lands(forwarder: Forwarder, crashing: Crashing, at: Container, *elsewhere: Container) -> Landed:
    """The same for a program that waits (`--wait`); its pid must be the one that the place knows it by."""
    with crashing:
        wanted = number_in(at, crashing.host_pid)
        own = numbers(crashing.host_pid)[-1]

        def happen() -> None:
            crashing.go()
            end = crashing.result()
            assert end.core_dumped, end

        landed = lands(forwarder, at, list(elsewhere), happen)
    assert (landed.record["pid"], landed.record["own_pid"]) == (wanted, own)
    return landed
