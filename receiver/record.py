"""The record of a crash: what is known of it, and what became of its core. A JSON file that outlives the core."""

from __future__ import annotations

import json
import secrets
import signal as signals
import time
from dataclasses import asdict, dataclass, field
from typing import Any

UNLIMITED = (1 << 64) - 1


def text(raw: bytes) -> str:
    r"""Bytes of a stranger's choice as text for JSON: UTF-8 where it is, `\xNN` where it is not."""
    return raw.decode("utf-8", "backslashreplace")


def rfc3339(seconds: float) -> str:
    """Seconds since the epoch as UTC, to the microsecond when there is a fraction."""
    whole = int(seconds)
    fraction = f".{int((seconds - whole) * 1e6):06d}" if seconds != whole else ""
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(whole)) + fraction + "Z"


def signal_name(number: int) -> str:
    """`SIGSEGV` for 11; `SIG<n>` for a number that has no name here."""
    try:
        return signals.Signals(number).name
    except ValueError:
        return f"SIG{number}"


def new_id(now: float, pid: int) -> str:
    """Return an id that sorts by when the crash came here: the kernel's own time has whole seconds.

    Not to be guessed and not to be met twice: names in the store are nobody's to prepare (H12).
    """
    stamp = time.strftime("%Y%m%dT%H%M%S", time.gmtime(now))
    return f"{stamp}-{int(now % 1 * 1e6):06d}-{pid}-{secrets.token_hex(4)}"


@dataclass(slots=True)
class Core:
    """What became of a core.

    state: "stored" (whole), "reduced" (a part, see reason), "none" (see reason).
    path: of the file, absolute in the receiver's root. size_bytes: of the plain core. stored_bytes: on disk.
    """

    state: str = "none"
    reason: str | None = None
    path: str | None = None
    size_bytes: int = 0
    stored_bytes: int = 0
    compression: str | None = None


@dataclass(slots=True)
class Record:
    """One crash. Pids, tids, uids and gids are in the numbering of the receiver's own namespaces.

    pid, tid: 0 when the process is not visible there. timestamp: of the crash, as the kernel tells it (whole seconds).
    received: when the offer came. core_limit: soft RLIMIT_CORE in bytes, None for unlimited. dumpable: %d of core(5).
    tried: receivers that were asked before this one and did not take it. Facts that could not be read are None.
    """

    id: str
    timestamp: str
    received: str
    pid: int
    tid: int
    uid: int
    gid: int
    signal: int
    signal_name: str
    comm: str
    exe: str | None = None
    core: Core = field(default_factory=Core)
    dumpable: int = 1
    core_limit: int | None = None
    euid: int | None = None
    egid: int | None = None
    uids: dict[str, int] | None = None
    gids: dict[str, int] | None = None
    groups: list[int] | None = None
    command_line: list[str] | None = None
    cwd: str | None = None
    root: str | None = None
    environment: dict[str, str] | None = None
    cgroup: str | None = None
    limits: dict[str, dict[str, int | None]] | None = None
    own_pid: int | None = None
    own_tid: int | None = None
    host_name: str | None = None
    tried: list[str] = field(default_factory=list)
    seconds: float | None = None
    version: int = 1

    @classmethod
    def of_numbers(
        cls,
        *,
        pid: int,
        tid: int,
        uid: int,
        gid: int,
        signal: int,
        time: int,
        comm: bytes,
        core_limit: int,
        dumpable: int,
    ) -> Record:
        """Make a record of what the kernel says. time: since the epoch. core_limit: bytes, UNLIMITED for none."""
        now = _now()
        # A forged time far away must not break the calendar.
        when = time if 0 < time < 1 << 34 else int(now)
        return cls(
            id=new_id(now, pid),
            timestamp=rfc3339(when),
            received=rfc3339(now),
            pid=pid,
            tid=tid,
            uid=uid,
            gid=gid,
            signal=signal,
            signal_name=signal_name(signal),
            comm=text(comm),
            core_limit=None if core_limit >= UNLIMITED else core_limit,
            dumpable=dumpable,
        )

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def dumps(self) -> bytes:
        return json.dumps(self.to_json(), indent=1, ensure_ascii=True).encode() + b"\n"

    @classmethod
    def from_json(cls, found: object) -> Record:
        """Read a record back. Raises ValueError when it is none; unknown keys are ignored (a newer version's)."""
        if not isinstance(found, dict):
            raise ValueError("a record is a JSON object")
        known = {name: value for name, value in found.items() if name in cls.__slots__}
        core = known.pop("core", None)
        try:
            record = cls(**known)
            if isinstance(core, dict):
                record.core = Core(**{name: value for name, value in core.items() if name in Core.__slots__})
        except TypeError as error:
            raise ValueError(f"not a record: {error}") from None
        for name in ("id", "timestamp", "comm", "signal_name"):
            if not isinstance(getattr(record, name), str):
                raise ValueError(f"not a record: '{name}' is not text")
        for name in ("pid", "tid", "uid", "gid", "signal"):
            if not isinstance(getattr(record, name), int):
                raise ValueError(f"not a record: '{name}' is not a number")
        return record


def _now() -> float:
    return time.time()
