"""What the kernel dumped against what was handled, so that no core is lost in silence.

Two witnesses that know nothing of each other:

    the kernel        says when it begins a dump, and how each process ended (`forwarder/proc_events.py`)
    the handlers      note what became of a crash, when they are done with it (`forwarder/handled.py`)

The watcher (`Watcher`) listens to both and keeps a book (`Book`), below /var/lib so that it outlives a restart and a
reboot. A crash that has ended and that no handler speaks of some seconds later is lost, and the book says so, and what
was seen of it. When nobody watched, the book says that, too: what it does not know it does not call fine.

A process is known by its pidfd's inode, or by its number and the time: numbers come again, and clocks are set, so no
decision here asks the wall clock. The kernel's core bit (WCOREDUMP) only says that a dump began, not that anybody read
it (fs/binfmt_elf.c: has_dumped): it tells a crash whose handler vanished from one that never had a handler.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import select
import signal
import struct
import time
from collections import Counter
from dataclasses import asdict, dataclass, field, fields
from typing import TYPE_CHECKING, Any, NamedTuple

from forwarder import handled, namespaces
from forwarder.handled import ASKED, NOTES, ON_THE_WAY, UNRECORDED, inode_of
from forwarder.proc_events import Dump, Exit, Overrun, ProcEvents
from forwarder.share import key_of

if TYPE_CHECKING:
    from collections.abc import Callable, Container, Iterable

BOOK = "/var/lib/core_pipe_forwarder/ledger"
# Two reports of one crash may come in any order; and a stub that nobody took a core of writes a record after the end.
SETTLE_SECONDS = 5.0
# A line in the book and in the journal more seldom than that is enough for a storm.
REPORT_SECONDS = 60.0
# How often the book's time says "still watching": the most by which a gap may be told too long.
ALIVE_SECONDS = 5.0
TICK_SECONDS = 0.5
LOCK_SECONDS = 1.0

# The book is written anew, without what is settled, when it has grown to this; and never holds more lost crashes.
MAX_BOOK = 8 << 20
MAX_LOST = 2000
MAX_GAPS = 200
MAX_OPEN = 2000
MAX_PENDING = 10000
MAX_LINE = 8192
TURN_NOTES = 1 << 19
# A note for a crash that nobody saw begin: the watcher came later, or events were lost.
STRAY_SECONDS = 120

KTHREADD = 2
CORE_BIT = 0x80
SIGNAL_BITS = 0x7F

# <linux/pidfd.h>: _IOWR(0xFF, 11, struct pidfd_info), and its size with the coredump mask in it (6.16, a2cd2d8c8d2f).
PIDFD_INFO_SIZE = 72
PIDFD_GET_INFO = 3 << 30 | PIDFD_INFO_SIZE << 16 | 0xFF << 8 | 11
PIDFD_INFO_COREDUMP = 1 << 4
COREDUMP_MASK_AT = 64
PIDFD_COREDUMP_SKIP = 2

# What a crash turns out to be. Only the first two are named.
LOST, UNCLEAR, HANDLED, UNWANTED, ELSEWHERE = "lost", "unclear", "handled", "unwanted", "elsewhere"
STATES = (LOST, UNCLEAR, HANDLED, UNWANTED, ELSEWHERE)


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
    (`forwarder/share.py`). comm: as it named itself, escaped. own_pid: in its own pid namespace. core_limit: bytes, -1
    when not known. skipped: the kernel says that it is not dumpable. ours: whether core_pattern was ours.

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
    core_limit: int = -1
    skipped: bool = False
    ours: bool = True
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


class Note(NamedTuple):
    """A line of `forwarder/handled.py`. at: CLOCK_MONOTONIC, ns. inode: 0 when not known."""

    at: int
    pid: int
    inode: int
    state: str
    key: str
    record: str
    reason: str


@dataclass(slots=True)
class Contents:
    """What a book says. open: those that are not settled. counts: by state, of those that are not named."""

    since: float | None = None
    open: dict[tuple[str, int, int], Crash] = field(default_factory=dict)
    named: dict[tuple[str, int, int], Crash] = field(default_factory=dict)
    gaps: list[Gap] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)
    forgotten: int = 0


def boot_id() -> str:
    """Return what tells this boot from every other."""
    return namespaces.read_at(-1, "/proc/sys/kernel/random/boot_id", 64).decode("ascii").strip()


def parse_notes(data: bytes) -> list[Note]:
    """Return the notes in some bytes; whatever is no whole note is passed over."""
    found = []
    for line in data.split(b"\n"):
        words = line.decode("ascii", "replace").split(" ", 6)
        if len(words) != 7 or words[3] not in handled.STATES:
            continue
        numbers = words[:3]
        if all(word.isascii() and word.isdigit() and len(word) < 21 for word in numbers):
            at, pid, inode = map(int, numbers)
            found.append(Note(at, pid, inode, *words[3:]))
    return found


class Notes:
    """What the handlers noted and nobody has claimed yet. The file is read on, and turned over when it is long.

    Several files may be open: whoever opened one before it was turned over may still write to it.
    """

    def __init__(self, path: str = NOTES) -> None:
        self.path = path
        self._files: list[tuple[int, int]] = []
        self._rest: dict[int, bytes] = {}
        self._waiting: dict[int, list[Note]] = {}

    def close(self) -> None:
        for fd, _ in self._files:
            os.close(fd)
        self._files.clear()

    def read(self, *, turn: bool) -> None:
        """Take in what is new. turn: keep the file short; only the watcher does."""
        self._open()
        for index, (fd, begun) in enumerate(self._files):
            at = begun
            with contextlib.suppress(OSError):
                while data := os.pread(fd, 1 << 16, at):
                    at += len(data)
                    data = self._rest.pop(fd, b"") + data
                    whole, _, rest = data.rpartition(b"\n")
                    # No line is that long: what is, is none.
                    self._rest[fd] = rest[:MAX_LINE]
                    for note in parse_notes(whole):
                        self._waiting.setdefault(note.pid, []).append(note)
            self._files[index] = (fd, at)
        if turn and self._files and self._files[-1][1] > TURN_NOTES:
            with contextlib.suppress(OSError):
                os.rename(self.path, self.path + ".1")

    def _open(self) -> None:
        """Open the files that are not open yet, older first, and close those that have been turned over twice."""
        opened = {(found.st_dev, found.st_ino) for found in (os.fstat(fd) for fd, _ in self._files)}
        for path in (self.path + ".1", self.path):
            with contextlib.suppress(OSError):
                fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
                found = os.fstat(fd)
                if (found.st_dev, found.st_ino) in opened:
                    os.close(fd)
                else:
                    self._files.append((fd, 0))
        while len(self._files) > 2:
            fd, _ = self._files.pop(0)
            self._rest.pop(fd, None)
            os.close(fd)

    def claim(self, crash: Crash, *, final: bool = False) -> Note | None:
        """Return the last note of a crash, and take it out. It is of this boot, and so must the crash be.

        final: only one with which its handler was done.
        """
        waiting = self._waiting.get(crash.pid, [])
        for note in reversed(waiting) if crash.inode else waiting:
            if final and note.state in ON_THE_WAY:
                continue
            if crash.inode and note.inode:
                # Numbers come again, inodes do not.
                if crash.inode != note.inode:
                    continue
            elif note.at < crash.began:
                continue
            waiting[:] = [other for other in waiting if other is not note and not _is_before(other, note)]
            return note
        return None

    def forget(self, before: int, *, but: Container[int]) -> None:
        """Drop those from before a moment (CLOCK_MONOTONIC, ns). but: pids of crashes that are not over."""
        for pid, waiting in list(self._waiting.items()):
            kept = [note for note in waiting if note.at >= before or pid in but]
            if kept:
                self._waiting[pid] = kept
            else:
                del self._waiting[pid]


def _is_before(other: Note, note: Note) -> bool:
    """Whether another note is an earlier one of the same crash."""
    return other.state in ON_THE_WAY and other.inode == note.inode and other.at <= note.at


def judge(crash: Crash, note: Note | None, boot: str) -> tuple[str, str]:
    """Return the state of a crash that has ended, and why."""
    if note is not None:
        if note.state == UNRECORDED:
            return LOST, f"no receiver took it, and no record could be made: {note.reason}"
        if note.state == ASKED:
            return LOST, (
                "its handler was killed, or failed, before the receiver that it had asked answered: there is no core, "
                "and at most a record of the container's that says so"
            )
        return HANDLED, ""
    if not crash.ours:
        return ELSEWHERE, "core_pattern was another's"
    if crash.core_limit == 1 or crash.skipped:
        # core(5): a limit of exactly 1 aborts a dump to a pipe. The event comes before the kernel looks.
        return UNWANTED, ""
    if crash.boot != boot:
        return UNCLEAR, "the machine was restarted before it was known what became of it"
    if crash.status < 0:
        return LOST, "no handler left a note, and its end was not seen"
    if crash.status & CORE_BIT:
        return LOST, "its handler was killed, or failed, before it had a receiver or left a record"
    if crash.signal == signal.SIGKILL:
        return LOST, "it was killed while it dumped, and no handler left a note"
    if not crash.seen:
        return UNCLEAR, (
            "it was over before it could be looked at: it was not dumpable, or had a core limit of 1, or there were "
            "more dumps than kernel.core_pipe_limit (journalctl -k -g core_pipe_limit)"
        )
    return LOST, (
        "the kernel found no handler for it: more dumps than kernel.core_pipe_limit, or one that cannot be started "
        "(journalctl -k -g 'core dump')"
    )


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
        crash = Crash(**said)
        for one in fields(Crash):
            value = getattr(crash, one.name)
            wanted = {"str": str, "int": int, "bool": bool, "float": (int, float)}[str(one.type)]
            if not isinstance(value, wanted):  # type: ignore[arg-type]
                raise TypeError
        enter(contents, crash)


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
    elif crash.state in (LOST, UNCLEAR):
        contents.named[crash.name] = crash
        while len(contents.named) > MAX_LOST:
            del contents.named[next(iter(contents.named))]
            contents.forgotten += 1
    else:
        contents.counts[crash.state] += 1


def look(dump: Dump, boot: str) -> Crash:
    """Return what can be seen of a process whose dump has just begun; little, when it is over already.

    Nothing is read that the process's memory or a file system of its container would have to answer for: those may
    hang (`forwarder/apart.py`).
    """
    now = time.monotonic_ns()
    crash = Crash(boot=boot, began=dump.at, at=time.time() - (now - dump.at) / 1e9, pid=dump.pid, tid=dump.tid)
    with contextlib.suppress(OSError):
        pattern = namespaces.read_at(-1, "/proc/sys/kernel/core_pattern", 256)
        crash.ours = is_ours(pattern)
    task = pidfd = -1
    try:
        pidfd = os.pidfd_open(dump.pid)
        task = os.open(f"/proc/{dump.pid}/task/{dump.tid}", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC | os.O_NOFOLLOW)
        started = namespaces.start_ticks(namespaces.read_at(task, "stat", 4096))
        # Its number may be another's by now. Start times count from the boot with the time asleep, events without.
        asleep = time.clock_gettime_ns(time.CLOCK_BOOTTIME) - time.monotonic_ns()
        if started > (dump.at + asleep) * os.sysconf("SC_CLK_TCK") // 10**9 + 1:
            return crash
        status = namespaces.read_at(task, "status", 1 << 20)
        crash.inode = inode_of(pidfd)
        crash.key = key_of(task)
        crash.comm = namespaces.read_at(task, "comm", 64).removesuffix(b"\n").decode("utf-8", "backslashreplace")
        crash.uid = int((namespaces.status_value(status, b"Uid") or [b"-1"])[0])
        crash.own_pid = int((namespaces.status_value(status, b"NSpid") or [b"0"])[-1])
        crash.core_limit = _core_limit(namespaces.read_at(task, "limits", 8192))
        # A zombie still has its numbers, but whether it was dumpable went with its memory.
        crash.skipped, known = _skipped(pidfd)
        crash.seen = known or namespaces.status_value(status, b"CoreDumping") == [b"1"]
        if not crash.seen:
            # Nor is it in any cgroup of version 1 any more.
            crash.key = ""
    except (OSError, ValueError):
        pass
    finally:
        for fd in (task, pidfd):
            if fd >= 0:
                os.close(fd)
    return crash


def is_ours(pattern: bytes) -> bool:
    """Whether a core_pattern brings crashes to us, by pipe or by socket (`forwarder/install.py`)."""
    if pattern.startswith(b"@"):
        return b"/core_pipe" in pattern
    return pattern.startswith(b"|") and b"/stub.py v=" in pattern


def _core_limit(limits: bytes) -> int:
    for line in limits.splitlines():
        if line.startswith(b"Max core file size"):
            soft = line[len("Max core file size") :].split()[0]
            return (1 << 64) - 1 if soft == b"unlimited" else int(soft)
    return -1


def _skipped(pidfd: int) -> tuple[bool, bool]:
    """Return whether the kernel makes no core of it, and whether it tells."""
    info = bytearray(PIDFD_INFO_SIZE)
    struct.pack_into("=Q", info, 0, PIDFD_INFO_COREDUMP)
    try:
        fcntl.ioctl(pidfd, PIDFD_GET_INFO, info)
    except OSError:
        # Before 6.13, or 6.16 for the mask.
        return False, False
    (mask,) = struct.unpack_from("=Q", info, 0)
    (coredump,) = struct.unpack_from("=I", info, COREDUMP_MASK_AT)
    # Nothing at all is said of one whose memory is gone already.
    return bool(coredump & PIDFD_COREDUMP_SKIP), bool(mask & PIDFD_INFO_COREDUMP and coredump)


def is_there(crash: Crash) -> bool:
    """Whether the process of a crash is still one: dumping, or not yet reaped."""
    try:
        pidfd = os.pidfd_open(crash.pid)
    except OSError:
        return False
    try:
        if crash.inode:
            return inode_of(pidfd) == crash.inode
        status = namespaces.read_at(-1, f"/proc/{crash.pid}/status", 1 << 20)
        return namespaces.status_value(status, b"CoreDumping") == [b"1"]
    except OSError:
        return False
    finally:
        os.close(pidfd)


def stubs_at_work() -> set[int]:
    """Return the pids whose crashes a stub is working on: one that is slow to end is no lost crash."""
    found: set[int] = set()
    for name in os.listdir("/proc"):
        if not name.isdigit():
            continue
        with contextlib.suppress(OSError, ValueError):
            # Only the kernel starts what kthreadd is the parent of: no process in a container can look like that.
            status = namespaces.read_at(-1, f"/proc/{name}/status", 1 << 20)
            if namespaces.status_value(status, b"PPid") != [b"%d" % KTHREADD]:
                continue
            words = namespaces.read_at(-1, f"/proc/{name}/cmdline", 4096).split(b"\0")
            found.update(int(word[2:]) for word in words if word.startswith(b"P="))
    return found


class Watcher:
    """Listens, and keeps the book."""

    def __init__(
        self,
        events: ProcEvents,
        book: Book,
        notes: Notes,
        *,
        settle_seconds: float = SETTLE_SECONDS,
        say: Callable[[str], None] = lambda _: None,
        tick: Callable[[], None] = lambda: None,
    ) -> None:
        """Take over the book. Raises LedgerError, OSError.

        say: gets a line for people now and then. tick: is called every few seconds while all is well.
        """
        self.events = events
        self.book = book
        self.notes = notes
        self.settle_ns = int(settle_seconds * 1e9)
        self.say = say
        self.tick = tick
        self.boot = boot_id()
        self.contents, last = book.open()
        self._by_pid = {crash.pid: crash for crash in self.contents.open.values() if crash.boot == self.boot}
        self._fresh: list[Crash] = []
        self._said = float("-inf")
        self._watched_until = time.time()
        now = time.time()
        if self.contents.since is None:
            self.contents.since = now
            book.write("since", at=now)
        elif last is not None:
            self._gap(last, "the ledger did not watch")

    def _gap(self, begun: float, why: str) -> None:
        # A clock that was set back makes it look as if it ended before it began.
        now = time.time()
        gap = Gap(min(begun, now), now, why)
        add_gap(self.contents, gap)
        self.book.write("gap", **asdict(gap))

    def run(self, wake: int) -> None:
        """Watch until `wake` can be read, and then once more take in what has come."""
        poll = select.poll()
        poll.register(self.events.fileno(), select.POLLIN)
        poll.register(wake, select.POLLIN)
        alive = settle = 0.0
        while True:
            ready = {fd for fd, _ in poll.poll(TICK_SECONDS * 1000)}
            self.take()
            now = time.monotonic()
            if now >= settle or wake in ready:
                self.settle()
                settle = now + TICK_SECONDS
            if now >= alive or wake in ready:
                self.book.alive()
                self.tick()
                alive = now + ALIVE_SECONDS
            if wake in ready:
                return

    def take(self) -> None:
        """Take in all events that wait."""
        while True:
            try:
                event = self.events.read()
            except Overrun:
                self._gap(self._watched_until, "more happened than could be taken in")
                continue
            if event is None:
                self._watched_until = time.time()
                return
            if isinstance(event, Dump):
                crash = look(event, self.boot)
                self._by_pid[crash.pid] = crash
                self._enter(crash)
                if len(self.contents.open) > MAX_OPEN:
                    self._close(next(iter(self.contents.open.values())), UNCLEAR, "too many at once to follow each")
            else:
                self._end(event)

    def _end(self, event: Exit) -> None:
        crash = self._by_pid.get(event.pid)
        # The thread that dumped: others may have ended long before it crashed.
        # It may have been missed in /proc already: the event comes after it has been reaped.
        if crash is not None and event.tid == crash.tid and crash.status < 0:
            crash.ended, crash.status = event.at, event.status
            self._enter(crash)

    def _enter(self, crash: Crash) -> None:
        enter(self.contents, crash)
        self.book.write("crash", **asdict(crash))

    def _close(self, crash: Crash, state: str, why: str) -> None:
        crash.state, crash.why = state, why
        if self._by_pid.get(crash.pid) is crash:
            del self._by_pid[crash.pid]
        if state == LOST:
            self._fresh.append(crash)
        self._enter(crash)

    def settle(self) -> None:
        """Compare: close those that a handler speaks of, and those that are over for some time."""
        self.notes.read(turn=True)
        now = time.monotonic_ns()
        overdue = []
        for crash in list(self.contents.open.values()):
            if crash.boot != self.boot:
                self._close(crash, *judge(crash, None, self.boot))
            elif (note := self.notes.claim(crash, final=True)) is not None:
                self._close(crash, *judge(crash, note, self.boot))
            elif not crash.ended:
                if not is_there(crash):
                    crash.ended = now
            elif now - crash.ended >= self.settle_ns:
                overdue.append(crash)
        if overdue:
            at_work = stubs_at_work()
            # One may have ended between the two looks, and what it noted is there now.
            self.notes.read(turn=False)
            for crash in overdue:
                if crash.pid not in at_work:
                    self._close(crash, *judge(crash, self.notes.claim(crash), self.boot))
        # A handler that came back from the dead: what it notes counts, whenever it comes.
        for crash in list(self.contents.named.values()):
            if crash.boot == self.boot and (note := self.notes.claim(crash, final=True)) is not None:
                self._close(crash, *judge(crash, note, self.boot))
        self.notes.forget(now - STRAY_SECONDS * 10**9, but=self._by_pid)
        self.book.flush()
        if self.book.is_long():
            with contextlib.suppress(OSError):
                self.book.rewrite(self.contents)
        self._report()

    def _report(self) -> None:
        if not self._fresh or time.monotonic() < self._said + REPORT_SECONDS:
            return
        first = self._fresh[0]
        more = f", and {len(self._fresh) - 1} more" if len(self._fresh) > 1 else ""
        self._said = time.monotonic()
        self._fresh = []
        self.say(f"a crash has no record: {describe(first)}{more}. See: core-pipe-forwarder ledger")


def describe(crash: Crash) -> str:
    """Return one crash in a line of ASCII without control characters."""
    name = f" ({ascii(crash.comm)[1:-1][:64]})" if crash.comm else ""
    died = f", signal {crash.signal}" if crash.signal else ""
    return f"pid {crash.pid}{name} of {ascii(crash.key)[1:-1] or 'an unknown container'}{died}: {crash.why}"


@dataclass(frozen=True)
class Ledger:
    """What `ledger` shows; `as_json` is part of the interface.

    watched: whether a watcher runs now. since: the first moment that was watched. pending: dumps that are under way, or
    too young to tell.
    """

    watched: bool
    since: float | None
    gaps: list[Gap]
    named: list[Crash]
    pending: int
    counts: dict[str, int]
    forgotten: int

    @property
    def lost(self) -> list[Crash]:
        return [crash for crash in self.named if crash.state == LOST]

    def as_json(self) -> str:
        """Return the JSON form."""
        return json.dumps(
            {
                "watched": self.watched,
                "since": self.since,
                "gaps": [asdict(gap) for gap in self.gaps],
                "crashes": [{**asdict(crash), "signal": crash.signal} for crash in self.named],
                "pending": self.pending,
                "counts": self.counts,
                "forgotten": self.forgotten,
            },
            indent=2,
        )


def ledger(path: str = BOOK, notes_path: str = NOTES, *, since: float = 0.0) -> Ledger:
    """Look, and change nothing. since: seconds since the epoch. Raises LedgerError.

    Where no watcher runs any more, what it left open is compared here.
    """
    start = "start it: systemctl enable --now core_pipe-ledger.service, or core-pipe-forwarder ledger --watch"
    try:
        contents = read_book(path)
        watched = is_watched(path)
        last = os.stat(path).st_mtime
    except FileNotFoundError:
        raise LedgerError("the ledger has never watched on this machine", start) from None
    except PermissionError:
        raise LedgerError(f"{path} is root's", "run it again with sudo") from None
    if not watched:
        add_gap(contents, Gap(last, time.time(), "the ledger does not watch"))
        _compare(contents, notes_path)
    return Ledger(
        watched=watched,
        since=contents.since,
        gaps=[gap for gap in contents.gaps if gap.ended >= since],
        named=sorted((crash for crash in contents.named.values() if crash.at >= since), key=lambda crash: crash.at),
        pending=len(contents.open),
        counts={state: contents.counts[state] for state in STATES[2:]},
        forgotten=contents.forgotten,
    )


def _compare(contents: Contents, notes_path: str) -> None:
    boot, notes = boot_id(), Notes(notes_path)
    try:
        at_work = stubs_at_work() if contents.open else set()
        notes.read(turn=False)
        for crash in [*contents.open.values(), *contents.named.values()]:
            note = notes.claim(crash) if crash.boot == boot else None
            if note is None and (crash.state or (crash.boot == boot and (is_there(crash) or crash.pid in at_work))):
                continue
            crash.state, crash.why = judge(crash, note, boot)
            enter(contents, crash)
    finally:
        notes.close()
