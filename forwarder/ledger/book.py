"""The book: what is known of each crash and quota, on the disk, so that it outlives a restart and a reboot.

One writes, whoever holds the lock; anybody who may can read. It is bounded: what is settled and not named is a count.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import time
from collections import Counter
from dataclasses import asdict, dataclass, field, fields
from typing import TYPE_CHECKING, Any, TypeVar

from forwarder.quota.tally import QuotaWarning, Tally
from forwarder.quota.tally import enter as enter_warning

if TYPE_CHECKING:
    from collections.abc import Iterable

_Row = TypeVar("_Row")

BOOK = "/var/lib/core_pipe_forwarder/ledger"
LOCK_SECONDS = 1.0

# The book is written anew, without what is settled, when it has grown to this; and never holds more named crashes.
MAX_BOOK = 8 << 20
MAX_NAMED = 2000
MAX_GAPS = 200
MAX_PENDING = 10000

SIGNAL_BITS = 0x7F

# What a crash turns out to be (`forwarder/ledger/judge.py`). Only the first three are named, each with what is known.
LOST, UNCLEAR, PASSED, HANDLED, UNWANTED, ELSEWHERE = "lost", "unclear", "passed", "handled", "unwanted", "elsewhere"
NAMED = (LOST, UNCLEAR, PASSED)
COUNTED = (HANDLED, UNWANTED, ELSEWHERE)


class LedgerError(Exception):
    """Why there is no ledger. `fact`: what is wrong; `mend`: what to do about it."""

    def __init__(self, fact: str, mend: str) -> None:
        super().__init__(f"{fact}: {mend}")
        self.fact = fact
        self.mend = mend


@dataclass(slots=True)
class Crash:
    """A dump that the kernel began, as the book has it. Numbers are the host's unless it says otherwise.

    boot: the boot's id. began: CLOCK_MONOTONIC, ns. at: seconds since the epoch, for people. inode: its pidfd's, 0 when
    not known. seen: whether there was still something to look at; else what comes next is empty. key: its container
    (`forwarder/share.py`). comm: as it named itself, escaped. own_pid: in its own pid namespace. pids: its numbers from
    the host's to its own, with blanks. core_limit: bytes, -1 when not known. skipped: the kernel says that it is not
    dumpable. ours: whether core_pattern was ours. by_socket: whether it was the kernel's socket, and not its pipe.

    ended: CLOCK_MONOTONIC, ns, 0 while it lasts. status: as wait(2) has it, -1 when its end was not seen.
    state, why: when it is settled.
    """

    boot: str
    began: int
    at: float
    pid: int
    tid: int
    inode: int = 0
    seen: bool = False
    key: str = ""
    comm: str = ""
    uid: int = -1
    own_pid: int = 0
    pids: str = ""
    core_limit: int = -1
    skipped: bool = False
    ours: bool = True
    by_socket: bool = False
    ended: int = 0
    status: int = -1
    state: str = ""
    why: str = ""

    @property
    def name(self) -> tuple[str, int, int]:
        """What tells it from every other."""
        return self.boot, self.pid, self.began

    @property
    def signal(self) -> int:
        """What it died of; 0 when that was not seen."""
        return self.status & SIGNAL_BITS if self.status >= 0 else 0


@dataclass(slots=True)
class Gap:
    """Nobody watched. begun, ended: seconds since the epoch."""

    begun: float
    ended: float
    why: str


@dataclass(slots=True)
class Contents:
    """What a book says. open: those that are not settled. counts: by state, of those that are not named.

    quota: what the kernel warned of (`forwarder/quota/`), which has its place in the same book.
    """

    since: float | None = None
    open: dict[tuple[str, int, int], Crash] = field(default_factory=dict)
    named: dict[tuple[str, int, int], Crash] = field(default_factory=dict)
    gaps: list[Gap] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)
    forgotten: int = 0
    quota: Tally = field(default_factory=Tally)


class Book:
    """The book on the disk: a line of JSON for each thing that happens, written by one watcher at a time.

    Nothing is lost but the last line when the machine stops: each event is appended at once. What cannot be written
    (a full disk) waits, and is written later.
    """

    def __init__(self, path: str = BOOK) -> None:
        self.path = path
        self._fd = -1
        self._lock = -1
        self._pending: list[bytes] = []
        self._torn = False

    def open(self) -> tuple[Contents, float | None]:
        """Become the one who writes. Returns what is in it, and when it was last written to (None: it is new).

        Raises LedgerError when another one writes, OSError.
        """
        os.makedirs(os.path.dirname(self.path), mode=0o755, exist_ok=True)
        self._lock = os.open(self.path + ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        deadline = time.monotonic() + LOCK_SECONDS
        while not _try_lock(self._lock, exclusive=True):
            # Whoever only asks whether there is a watcher holds it for a moment.
            if time.monotonic() < deadline:
                time.sleep(0.01)
                continue
            self.close()
            raise LedgerError("another ledger watches already", "stop that one first, or leave it to it")
        contents, last = Contents(), None
        with contextlib.suppress(FileNotFoundError):
            contents, last = read_book(self.path), os.stat(self.path).st_mtime
        self._fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        # What a killed one, or a full disk, left at the end is no line of ours.
        self._torn = os.fstat(self._fd).st_size > 0
        return contents, last

    def close(self) -> None:
        for fd in (self._fd, self._lock):
            if fd >= 0:
                os.close(fd)
        self._fd = self._lock = -1

    def write(self, what: str, **values: object) -> None:
        """Append a line. Never raises: what cannot be written now waits."""
        self._pending.append(_line(what, **values))
        if len(self._pending) > MAX_PENDING:
            del self._pending[: MAX_PENDING // 2]
        self.flush()

    def flush(self) -> None:
        """Write what waits, as far as the disk has room."""
        while self._pending:
            line = (b"\n" if self._torn else b"") + self._pending[0]
            try:
                self._torn = os.write(self._fd, line) != len(line)
            except OSError:
                return
            if self._torn:
                # Half a line: again, on a line of its own.
                return
            self._pending.pop(0)

    def alive(self) -> None:
        """Leave the time, so that whoever comes later knows until when this one watched."""
        with contextlib.suppress(OSError):
            os.utime(self._fd)

    def is_long(self) -> bool:
        """Whether it should be written anew."""
        return os.fstat(self._fd).st_size > MAX_BOOK

    def rewrite(self, contents: Contents) -> None:
        """Write it anew with these contents, in one step. Raises OSError; then it is as it was."""
        new = self.path + ".new"
        with contextlib.suppress(FileNotFoundError):
            os.unlink(new)
        fd = os.open(new, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            with open(fd, "wb", closefd=False) as file:
                file.writelines(_lines_of(contents))
                file.flush()
                os.fsync(fd)
            os.rename(new, self.path)
        except BaseException:
            os.close(fd)
            raise
        os.close(self._fd)
        self._fd, self._torn = fd, False
        # It is all in the contents.
        self._pending.clear()


def _try_lock(fd: int, *, exclusive: bool) -> bool:
    try:
        fcntl.flock(fd, (fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def is_watched(path: str = BOOK) -> bool:
    """Whether a watcher has this book. Raises OSError."""
    try:
        fd = os.open(path + ".lock", os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except FileNotFoundError:
        return False
    try:
        return not _try_lock(fd, exclusive=False)
    finally:
        os.close(fd)


def _line(what: str, **values: object) -> bytes:
    return json.dumps({"what": what, **values}, separators=(",", ":")).encode("ascii") + b"\n"


def _lines_of(contents: Contents) -> Iterable[bytes]:
    if contents.since is not None:
        yield _line("since", at=contents.since)
    yield _line("counts", counts=dict(contents.counts), forgotten=contents.forgotten)
    for gap in contents.gaps:
        yield _line("gap", **asdict(gap))
    for crash in [*contents.named.values(), *contents.open.values()]:
        yield _line("crash", **asdict(crash))
    quota = contents.quota
    yield _line("quotas", counts=dict(quota.counts), lost=quota.lost, forgotten=quota.forgotten)
    for warning in quota.records.values():
        yield _line("quota", **asdict(warning))


def read_book(path: str = BOOK) -> Contents:
    """Return what a book says. Raises OSError. Lines that are none of ours are passed over."""
    contents = Contents()
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    with open(fd, "rb") as file:
        # Whatever it says of itself, not more than a book may have.
        for line in file.read(4 * MAX_BOOK).split(b"\n"):
            # A cut line, and one that another wrote.
            with contextlib.suppress(ValueError, TypeError, KeyError, ArithmeticError, RecursionError):
                said = json.loads(line)
                if isinstance(said, dict):
                    _take_in(contents, said)
    return contents


def _take_in(contents: Contents, said: dict[str, Any]) -> None:
    """Add one line of a book. Raises ValueError, TypeError, KeyError, ArithmeticError."""
    what = said.pop("what")
    if what == "since" and contents.since is None:
        contents.since = float(said["at"])
    elif what == "gap":
        add_gap(contents, Gap(float(said["begun"]), float(said["ended"]), str(said["why"])))
    elif what == "counts":
        contents.counts.update({str(name): int(number) for name, number in dict(said["counts"]).items()})
        contents.forgotten += int(said["forgotten"])
    elif what == "crash":
        enter(contents, _row(Crash, said))
    elif what == "quota":
        enter_warning(contents.quota, _row(QuotaWarning, said))
    elif what == "quotas":
        # All ever, and not those since the last such line.
        contents.quota.counts.clear()
        contents.quota.counts.update({str(name): int(number) for name, number in dict(said["counts"]).items()})
        contents.quota.lost = int(said["lost"])
        contents.quota.forgotten = int(said["forgotten"])


def _row(kind: type[_Row], said: dict[str, Any]) -> _Row:
    """Return one line's row. Raises TypeError, of a row with other names or values of other types."""
    row = kind(**said)
    for one in fields(kind):  # type: ignore[arg-type]
        value = getattr(row, one.name)
        wanted = {"str": str, "int": int, "bool": bool, "float": (int, float), "list[str]": list}[str(one.type)]
        if not isinstance(value, wanted):  # type: ignore[arg-type]
            raise TypeError
        if isinstance(value, list) and not all(isinstance(item, str) for item in value):
            raise TypeError
    return row


def add_gap(contents: Contents, gap: Gap) -> None:
    """Enter a gap; the oldest goes when there are too many."""
    contents.gaps.append(gap)
    del contents.gaps[:-MAX_GAPS]


def enter(contents: Contents, crash: Crash) -> None:
    """Enter a crash as it is now, in the place of what was said of it before."""
    contents.open.pop(crash.name, None)
    contents.named.pop(crash.name, None)
    if not crash.state:
        contents.open[crash.name] = crash
    elif crash.state in NAMED:
        contents.named[crash.name] = crash
        while len(contents.named) > MAX_NAMED:
            del contents.named[next(iter(contents.named))]
            contents.forgotten += 1
    else:
        contents.counts[crash.state] += 1
