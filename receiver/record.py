"""The record of a crash: what is known of it, and what became of its core. A JSON file that outlives the core."""

from __future__ import annotations

import json
import os
import signal as signals
import time
from functools import partial
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

UNLIMITED = (1 << 64) - 1


def text(raw: bytes) -> str:
    r"""Bytes of a stranger's choice as text for JSON: UTF-8 where it is, `\xNN` where it is not."""
    return raw.decode("utf-8", "backslashreplace")


def rfc3339(seconds: float) -> str:
    """Seconds since the epoch as UTC, to the microsecond when there is a fraction."""
    whole = int(seconds)
    fraction = f".{int((seconds - whole) * 1e6):06d}" if seconds != whole else ""
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(whole)) + fraction + "Z"


def microseconds(rfc3339: str) -> int | None:
    """Return a record's time as microseconds since the epoch, None when it is none."""
    try:
        whole, _, fraction = rfc3339.removesuffix("Z").partition(".")
        # Not strptime(): the import behind it is 10 ms of a worker's life. The form is rfc3339()'s.
        date, _, clock = whole.partition("T")
        year, month, day = (int(part) for part in date.split("-"))
        hour, minute, second = (int(part) for part in clock.split(":"))
        return (_days(year, month, day) * 86400 + hour * 3600 + minute * 60 + second) * 1_000_000 + (
            int(fraction.ljust(6, "0")[:6]) if fraction else 0
        )
    except ValueError:
        return None


def _days(year: int, month: int, day: int) -> int:
    """Days since the epoch of a date (the civil calendar's, counted from March: leap days come last)."""
    year -= month <= 2
    of_year = (153 * (month + (-3 if month > 2 else 9)) + 2) // 5 + day - 1
    return year * 365 + year // 4 - year // 100 + year // 400 + of_year - 719468


def signal_name(number: int) -> str:
    """`SIGSEGV` for 11; `SIG<n>` for a number that has no name here; 0 is what nobody told."""
    if number == 0:
        return "unknown"
    try:
        return signals.Signals(number).name
    except ValueError:
        return f"SIG{number}"


def new_id(now: float, pid: int) -> str:
    """Return an id that sorts by when the crash came here: the kernel's own time has whole seconds.

    Not to be guessed and not to be met twice: names in the store are nobody's to prepare (H12).
    """
    stamp = time.strftime("%Y%m%dT%H%M%S", time.gmtime(now))
    return f"{stamp}-{int(now % 1 * 1e6):06d}-{pid}-{os.urandom(4).hex()}"


class _Fields:
    """Annotated attributes with defaults, equal by value. A dataclass costs each start 10 ms and 1.5 MiB (inspect)."""

    def __init__(self, **values: Any) -> None:
        """Take values by name. Raises TypeError for a name that is none, and for one that is missing."""
        names = type(self).__annotations__
        unknown = values.keys() - names.keys()
        missing = [name for name in names if name not in values and not hasattr(type(self), name)]
        if unknown or missing:
            raise TypeError(f"unknown: {sorted(unknown)}, missing: {missing}")
        for name in names:
            setattr(self, name, values[name] if name in values else getattr(type(self), name))

    def to_json(self) -> dict[str, Any]:
        found = {name: getattr(self, name) for name in type(self).__annotations__}
        return {name: value.to_json() if isinstance(value, _Fields) else value for name, value in found.items()}

    def __eq__(self, other: object) -> bool:
        return self.to_json() == other.to_json() if isinstance(other, type(self)) else NotImplemented

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in self.to_json().items())})"


class Core(_Fields):
    """What became of a core.

    state: "stored" (whole), "reduced" (a part, see reason), "none" (see reason).
    path: of the file, absolute in the receiver's root. size_bytes: of the plain core as it is stored. whole_bytes: of
    the core that the kernel offered, 0 when that is not known. absent_bytes: of its memory, what is left out.
    stored_bytes: on disk. file_bytes: length of the file, which has holes when it is not compressed.
    """

    state: str = "none"
    reason: str | None = None
    path: str | None = None
    size_bytes: int = 0
    whole_bytes: int = 0
    absent_bytes: int = 0
    stored_bytes: int = 0
    file_bytes: int = 0
    compression: str | None = None


class Record(_Fields):
    """One crash. Pids, tids, uids and gids are in the numbering of the receiver's own namespaces.

    pid, tid: 0 when the process is not visible there. timestamp: of the crash, as the kernel tells it (whole seconds).
    received: when the offer came. core_limit: soft RLIMIT_CORE in bytes, None for unlimited. dumpable: %d of core(5).
    tried: receivers that were asked before this one and did not take it. signature: the same for the same bug; frames:
    what it was made from, `module+offset`, the innermost first; seen: so many times within same_seconds, this one
    included. build_id: the program's, in hex. threads: how many it had. container: "engine:name", as the host sees it.
    unit: of systemd's, that it belonged to. package: that its program came in. open_files: "fd: target". mappings: as
    lines of proc_pid_maps(5). journal: the unit's last lines. backtrace: a debugger's lines, backtrace_by: which one's.
    Facts that could not be read, or that the settings leave out, are None.
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
    core: Core
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
    tried: list[str]
    seconds: float | None = None
    signature: str | None = None
    seen: int | None = None
    frames: list[str] | None = None
    build_id: str | None = None
    threads: int | None = None
    container: str | None = None
    unit: str | None = None
    package: dict[str, str] | None = None
    open_files: list[str] | None = None
    mappings: list[str] | None = None
    journal: list[str] | None = None
    backtrace: list[str] | None = None
    backtrace_by: str | None = None
    version: int = 1

    def __init__(self, **values: Any) -> None:
        super().__init__(**{"core": Core(), "tried": []} | values)

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

    def dumps(self) -> bytes:
        return json.dumps(self.to_json(), indent=1, ensure_ascii=True).encode() + b"\n"

    @classmethod
    def from_json(cls, found: object) -> Record:
        """Read a record back. Raises ValueError when it is none; unknown keys are ignored (a newer version's)."""
        if not isinstance(found, dict):
            raise ValueError("a record is a JSON object")
        known = _fitting(cls, found)
        known["core"] = Core(**_fitting(Core, known.get("core", {})))
        try:
            record = cls(**known)
        except TypeError as error:
            raise ValueError(f"not a record: {error}") from None
        return record


def _texts(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def _numbers(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(item, int) for item in value)


def _table_of(kind: type, value: object) -> bool:
    return isinstance(value, dict) and all(isinstance(item, kind) for item in value.values())


# By the annotations above. A record may come from a stranger's store: who reads one can rely on its types.
_FITS: dict[str, Callable[[object], bool]] = {
    "str": lambda value: isinstance(value, str),
    "int": lambda value: isinstance(value, int),
    "float": lambda value: isinstance(value, int | float),
    "list[str]": _texts,
    "list[int]": _numbers,
    "dict[str, int]": partial(_table_of, int),
    "dict[str, str]": partial(_table_of, str),
    "dict[str, dict[str, int | None]]": partial(_table_of, dict),
    "Core": lambda value: isinstance(value, dict),
}


def _fitting(cls: type, found: dict[str, Any]) -> dict[str, Any]:
    """Return the known fields of what JSON gave. Raises ValueError for one of a wrong type."""
    known = {}
    for name, annotation in cls.__annotations__.items():
        if name not in found:
            continue
        value = found[name]
        kind = annotation.removesuffix(" | None")
        if not (_FITS[kind](value) or (value is None and kind != annotation)):
            raise ValueError(f"not a record: '{name}' is not {annotation}")
        known[name] = value
    return known


def _now() -> float:
    return time.time()
