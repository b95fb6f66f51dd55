"""A backtrace from a stored core, by gdb or eu-stack: with names and lines, where the machine has them.

A core is a stranger's bytes, and a debugger is a huge program that believes them: it runs what a core's files ask it to
run (H15), it can be sent round in circles, and it takes what memory it is told to take. So it is nobody (a uid of its
own when root asks), without capabilities or a network; it loads and writes nothing of its own accord; it has a deadline
and bounds on memory and output; and it gets the core as an open descriptor, not a path.

It shows no values, neither of arguments nor of variables: they are what a record must not hold. `corepipectl debug` has
them. It is made when somebody asks first, and never at the crash: the receiver has given up, by then, what it takes to
become somebody else.
"""

from __future__ import annotations

import os
import pwd
import random
import re
import resource
import shutil
import signal
import stat
import subprocess
import time
from typing import TYPE_CHECKING, NamedTuple, Protocol

from receiver import dump
from receiver.children import PATH, Answer, ask
from receiver.elfcore import HEADER_SIZE, PT_LOAD, Head, NotACore, first_size, head_size, read_head
from receiver.frames import PAGE
from receiver.notes import Parser
from receiver.plan import Memory
from receiver.process import json_size
from receiver.record import text
from receiver.signature import build_id
from receiver.store import StoreError
from receiver.stored import Damaged, StoredCore

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from receiver.record import Record

SECONDS = 10.0
# Of which the copy of the core may take so much.
COPY_SHARE = 0.5
# Frames of a thread. What goes round in circles has more.
MAX_FRAMES = 64
# As JSON, in the record; and what a debugger may say before it is ended.
MAX_SIZE = 64 << 10
MAX_OUTPUT = 1 << 20
MAX_LINE = 1000
LATE = "... and no more in time"
# Of address space: a browser with its debug information takes 3 GiB.
MEMORY = 4 << 30
# What of a core is copied for it. Of a larger one: what a backtrace is made of first.
MAX_COPY = 256 << 20
MAX_REDUCED = 4 << 30
# A file of holes; file systems allow some TiB at the least.
MAX_LENGTH = 1 << 43
NEAR_STACK = 256 << 10
MAX_NOTES = 64 << 20
MAX_STACKS = 1024
# systemd's range of users that exist only while something runs (DynamicUser=, systemd.io/UIDS-GIDS).
USERS = (61184, 65519)
# <linux/sched.h>, <linux/prctl.h>
CLONE_NEWNET = 0x40000000
PR_SET_PDEATHSIG, PR_SET_NO_NEW_PRIVS, PR_CAPBSET_DROP = 1, 38, 24
PLACES = ("/var/tmp", "/tmp")  # noqa: S108 - nothing has a name there


class Source(Protocol):
    """Where a record and its core are, see receiver/ctl/sources.py."""

    def open_core(self, record: Record) -> int: ...

    def program(self, record: Record) -> str | None: ...

    def sysroot(self, record: Record) -> str | None: ...


class Backtrace(NamedTuple):
    """lines: as the debugger has them, of any characters that a program chose. by: the debugger and its version."""

    lines: list[str]
    by: str


class NoBacktrace(Exception):
    """There is none. The text says why, and what to do where something can be done."""


def backtrace_of(record: Record, source: Source, *, seconds: float = SECONDS) -> Backtrace:
    """Return the backtrace of a crash, which is made when the record has none, and kept there when we may.

    seconds: for all of it. Raises NoBacktrace.
    """
    if record.backtrace:
        return Backtrace(record.backtrace, record.backtrace_by or "")
    if record.core.path is None:
        raise NoBacktrace("it has no core")
    if not available():
        raise NoBacktrace("there is no gdb and no eu-stack here. Install gdb, or elfutils")
    try:
        fd = source.open_core(record)
    except (OSError, StoreError) as error:
        raise NoBacktrace(f"its core cannot be opened: {error}") from None
    try:
        found = make(fd, record, source.program(record), seconds=seconds, sysroot=source.sysroot(record))
    finally:
        os.close(fd)
    record.backtrace, record.backtrace_by = found
    store = getattr(source, "store", None)
    # One that wanted time may have more of it when somebody asks again.
    if store is not None and os.geteuid() == 0 and found.lines[-1] != LATE:
        try:
            store.amend(record.id, {"backtrace": found.lines, "backtrace_by": found.by})
        except (OSError, StoreError, ValueError):
            # A full disk, or one that is read-only: it is made again the next time.
            pass
    return found


def available() -> list[str]:
    """Return the debuggers that are here, the better one first."""
    return [path for path in (shutil.which(name, path=PATH) for name in ("gdb", "eu-stack")) if path is not None]


def make(
    fd: int, record: Record, program: str | None, *, seconds: float = SECONDS, sysroot: str | None = None
) -> Backtrace:
    """Make the backtrace of a stored core. fd: its file, which stays the caller's. program: its path here, if any.

    sysroot: where its libraries are, when that is not here. Raises NoBacktrace.
    """
    deadline = time.monotonic() + seconds
    user = _nobody() if os.geteuid() == 0 else None
    try:
        plain = dump.open_nameless(PLACES)
    except OSError as error:
        raise NoBacktrace(f"there is no place for a copy of its core ({error.strerror})") from None
    try:
        _copy(fd, record, plain, time.monotonic() + seconds * COPY_SHARE)
        # Opened once more by who has no other right to it, through the descriptor.
        if user is not None:
            try:
                os.fchown(plain, user, user)
            except OSError:
                user = None
        program = program if program is not None and _is_what_crashed(program, record) else None
        problem = "no debugger could read it"
        # gdb knows more, but not without the program; eu-stack finds names by the libraries then.
        for debugger in available() if program else reversed(available()):
            left = deadline - time.monotonic()
            if left <= 0:
                break
            gdb = debugger.endswith("gdb")
            run = _gdb if gdb else _eu_stack
            answer, lines = run(debugger, plain, program, left, _become(user, seconds), sysroot)
            lines = _bounded(lines, cut=answer.cut, late=answer.late)
            if any(line.startswith("#") for line in lines):
                return Backtrace(lines, _version(debugger))
            if answer.late:
                problem = f"{os.path.basename(debugger)} was not done within {seconds:g} s (backtrace_seconds)"
        raise NoBacktrace(problem)
    except (OSError, subprocess.SubprocessError) as error:
        raise NoBacktrace(f"it could not be made: {error}") from None
    finally:
        os.close(plain)


def _nobody() -> int:
    """Return a uid that nobody has: who has the same one may look into the debugger, and so into the core."""
    user = USERS[0]
    for _ in range(10):
        user = random.randint(*USERS)  # noqa: S311 - any will do
        try:
            pwd.getpwuid(user)
        except KeyError:
            break
    return user


def _become(user: int | None, seconds: float) -> Callable[[], None]:
    """Return what the child does before it becomes a debugger. user: the uid to take, None when it stays as it is."""
    import ctypes  # noqa: PLC0415 - milliseconds, and only this needs it

    libc = ctypes.CDLL(None, use_errno=True)

    def before() -> None:
        if os.geteuid() == 0:
            # A network of its own, in which there is nothing. (Where that may not be done there is ours.)
            libc.unshare(CLONE_NEWNET)
            for capability in range(64):
                libc.prctl(PR_CAPBSET_DROP, capability, 0, 0, 0)
        if user is not None:
            os.setgroups([])
            os.setresgid(user, user, user)
            os.setresuid(user, user, user)
        elif os.geteuid() == 0:
            # Root of a user namespace that has nobody else in it: all that it has to lose is its capabilities.
            from receiver import privileges  # noqa: PLC0415

            privileges.drop()
        if libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0):
            raise OSError(ctypes.get_errno(), "no_new_privs")
        libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        os.umask(0o077)
        # It writes nothing, and dies without a core of its own: that would be a crash about a crash.
        for kind, wanted in (
            (resource.RLIMIT_AS, MEMORY),
            (resource.RLIMIT_CPU, int(seconds) + 1),
            (resource.RLIMIT_FSIZE, 0),
            (resource.RLIMIT_CORE, 0),
            (resource.RLIMIT_NOFILE, 1024),
        ):
            hard = resource.getrlimit(kind)[1]
            most = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
            resource.setrlimit(kind, (most, most))

    return before


def _gdb(
    debugger: str, core: int, program: str | None, seconds: float, before: Callable[[], None], sysroot: str | None
) -> tuple[Answer, list[str]]:
    # What it says of the core first has the command line in it, which may say anything: also what comes after it.
    mark = f"core_pipe-{os.urandom(8).hex()}"
    settings = (
        # Not a byte of the program's, its libraries' or its directory's is run (H15).
        "auto-load off",
        "debuginfod enabled off",
        "width 0",
        "height 0",
        "confirm off",
        "style enabled off",
        "print frame-arguments none",
        "print entry-values no",
        f"backtrace limit {MAX_FRAMES}",
        *([f"sysroot {sysroot}"] if sysroot is not None else []),
    )
    command = [debugger, "-nx", "-batch", "-quiet", "-iex", "maint set worker-threads 0"]
    for setting in settings:
        command += ["-iex", f"set {setting}"]
    # -c: one thread whose stack is broken is not the end of the others.
    command += ["-ex", f"echo \\n{mark}\\n", "-ex", "thread apply all -ascending -c bt"]
    command += [f"--core=/proc/self/fd/{core}", *([program] if program is not None else [])]
    answer = ask(command, seconds=seconds, most=MAX_OUTPUT, before=before, pass_fds=(core,))
    _, _, said = answer.output.partition(b"\n" + mark.encode() + b"\n")
    return answer, list(_lines(said))


def _eu_stack(
    debugger: str, core: int, program: str | None, seconds: float, before: Callable[[], None], _sysroot: str | None
) -> tuple[Answer, list[str]]:
    # It has no such option, and takes a library for the right one by its build id alone.
    command = [debugger, "-n", str(MAX_FRAMES), "-s", "-m", f"--core=/proc/self/fd/{core}"]
    if program is not None:
        command.append(f"--executable={program}")
    answer = ask(command, seconds=seconds, most=MAX_OUTPUT, before=before, pass_fds=(core,))
    return answer, [line for line in _lines(answer.output) if not line.startswith("PID ")]


def _lines(said: bytes) -> Iterator[str]:
    for raw in said.split(b"\n"):
        line = text(raw[:MAX_LINE]).rstrip()
        if line and not re.match(r"warning: |Backtrace limit of ", line):
            yield line


def _bounded(lines: Sequence[str], *, cut: bool, late: bool) -> list[str]:
    """Return what a record has room for. It says when there was more."""
    kept = []
    size = 100
    for line in lines:
        size += json_size(line)
        if size > MAX_SIZE:
            cut = True
            break
        kept.append(line)
    if late:
        kept.append(LATE)
    elif cut:
        kept.append("... and more")
    return kept


def _version(debugger: str) -> str:
    """Return "gdb 13.1"."""
    name = os.path.basename(debugger)
    try:
        answer = ask([debugger, "--version"], seconds=2.0, most=4096)
    except OSError:
        return name
    found = re.search(r"(\d+(?:\.\d+)+)[^\n]*\n", answer.output.decode("ascii", "replace"))
    return f"{name} {found[1]}" if found else name


def _is_what_crashed(program: str, record: Record) -> bool:
    """Whether a file is the program of a crash: one that was replaced meanwhile gives wrong names, and many."""
    if not program.startswith("/"):
        return False
    # First what it is: to open a device may do something.
    try:
        fd = os.open(program, os.O_PATH | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            return False
        file = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError:
        return False
    finally:
        os.close(fd)
    try:
        found = build_id(os.pread(file, PAGE, 0))
    except OSError:
        return False
    finally:
        os.close(file)
    return record.build_id is None or found is None or found == record.build_id


# The copy of the core


class _Late(Exception):
    """There is no time left for copying: what is there has to do."""


def _copy(fd: int, record: Record, target: int, deadline: float) -> None:
    """Copy a core, or what of it a backtrace is made of; holes are in the place of the rest. Raises NoBacktrace."""

    def progress(_size: int) -> None:
        if time.monotonic() > deadline:
            raise _Late

    try:
        core = StoredCore(fd, record.core.compression)
        if 0 < record.core.size_bytes <= MAX_COPY:
            dump.copy(core, target, record.core.size_bytes, progress)
            return
        try:
            start = core.read(0, HEADER_SIZE)
            head = read_head(core.read(0, head_size(core.read(0, first_size(start)))))
        except NotACore:
            # A reduced one has its headers at its end.
            dump.copy(core, target, min(record.core.size_bytes, MAX_REDUCED), progress)
            return
        for place, length in sorted(_wanted(core, head, progress)):
            for at in range(place, place + length, 1 << 20):
                progress(at)
                try:
                    os.pwrite(target, core.read(at, min(1 << 20, place + length - at)), at)
                except Damaged:
                    # A hole is there instead.
                    continue
        os.ftruncate(target, min(head.size, MAX_LENGTH))
    except _Late:
        os.ftruncate(target, max(os.fstat(target).st_size, min(record.core.size_bytes, MAX_LENGTH)))
    except (Damaged, ValueError) as error:
        raise NoBacktrace(f"its core cannot be read: {error}") from None


def _wanted(core: StoredCore, head: Head, progress: Callable[[int], object]) -> Iterator[tuple[int, int]]:
    """Yield (offset, bytes) of what to copy of a large core: MAX_COPY in all, and what matters most in any case.

    progress: is told where it is, and raises when there is no time left.
    """
    loads = [segment for segment in head.segments if segment.kind == PT_LOAD and segment.file_size]
    before = min((segment.offset for segment in loads), default=head.size)
    before = min(before, MAX_NOTES)
    yield 0, before
    left = MAX_COPY
    parser = Parser(head.machine, is_64=head.is_64)
    for segment in head.segments:
        if segment.kind != PT_LOAD and segment.offset < before:
            end = segment.offset + min(segment.file_size, before)
            for at in range(segment.offset, end, 1 << 20):
                progress(at)
                parser.feed(core.read(at, min(1 << 20, end - at)))
    memory = Memory(head)
    for thread in parser.notes.threads[:MAX_STACKS]:
        index = memory.find(thread.sp)
        if index is None:
            continue
        segment = head.segments[index]
        start = max(0, thread.sp - segment.address - PAGE) // PAGE * PAGE
        length = min(NEAR_STACK, segment.file_size - start)
        if length > 0:
            left -= length
            yield segment.offset + start, length
    for segment in sorted(loads, key=lambda segment: segment.file_size):
        if segment.file_size > left:
            break
        left -= segment.file_size
        yield segment.offset, segment.file_size
