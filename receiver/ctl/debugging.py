"""`corepipectl debug`: a debugger on the newest core."""

from __future__ import annotations

import argparse
import errno
import os
import shlex
import shutil
import signal
import subprocess
import sys
from typing import TYPE_CHECKING, Any

from receiver import tables
from receiver.ctl.arguments import add_matches, add_options, limits_of
from receiver.ctl.matching import UsageProblem, newest_with_core
from receiver.ctl.output import hint, left_out
from receiver.ctl.progress import Progress
from receiver.ctl.taking import damage_of
from receiver.retention import FULL
from receiver.tables import shown

if TYPE_CHECKING:
    from collections.abc import Callable

    from receiver.ctl.context import Context
    from receiver.ctl.matching import Crash

EPILOG = """\
Of several crashes it is the newest that has a core. A core that is stored as it is ('compression = "none"') is opened
where it is. A compressed one is unpacked for as long as the debugger runs: into a file without a name in $TMPDIR, or
/var/tmp, in which zeros take no room; it goes with the debugger, even when that is killed. The exit status is the
debugger's.

examples:
  corepipectl debug                               the newest core, in gdb (or lldb, when that is all there is)
  corepipectl debug webshop -A '-batch -ex bt'    only the backtrace
  corepipectl debug webshop --debugger lldb
"""
DEBUGGERS = ("gdb", "lldb")
# coredumpctl's place: /tmp may be memory, and small.
LARGE_TEMPORARY = "/var/tmp"  # noqa: S108 - nothing has a name there
# Where an ELF file has its program headers and its build id.
_PAGE = 4096
# Of a build id, that people may compare.
_SHOWN = 12


def add(commands: Any) -> None:
    for name, about in (("debug", "open a core in a debugger"), ("gdb", "the same as debug")):
        parser: argparse.ArgumentParser = commands.add_parser(
            name, help=about, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        add_matches(parser)
        add_options(parser, "debugger range quiet")
        parser.set_defaults(run=run)


def run(context: Context) -> int:
    options = context.options
    debugger = _debugger(options.debugger)
    try:
        arguments = shlex.split(options.debugger_arguments or "")
    except ValueError as error:
        raise UsageProblem(f"--debugger-arguments: {error}. Quote them as for a shell") from None
    crash = newest_with_core(context.sources, options.match, **limits_of(options))
    if not options.quiet:
        _tell(crash)
    core = open_plain(crash)
    try:
        # By way of our own descriptor, which stays: the file may have no name, and the debugger keeps what it opens.
        path = f"/proc/{os.getpid()}/fd/{core}"
        user = crash.source.debugger_user()
        if user is not None:
            # It inherits the descriptor, and may look at none of ours.
            path = f"/proc/self/fd/{core}"
            os.fchown(core, user, user)
        exe = crash.source.program(crash.record)
        command = [*debugger, *crash.source.debugger_arguments(debugger[0]), *arguments]
        command += [exe] if exe is not None else []
        return _run([*command, "-c", path], user, core)
    finally:
        os.close(core)


def _debugger(asked: str | None) -> list[str]:
    """Return the command of the debugger. Raises UsageProblem."""
    for source, words in (
        ("--debugger", asked),
        ("$COREPIPECTL_DEBUGGER", os.environ.get("COREPIPECTL_DEBUGGER")),
        ("$SYSTEMD_DEBUGGER", os.environ.get("SYSTEMD_DEBUGGER")),
    ):
        if not words:
            continue
        try:
            command = shlex.split(words)
        except ValueError:
            command = []
        if not command or shutil.which(command[0]) is None:
            raise UsageProblem(f"{source}: there is no program '{shown(words)}'")
        return command
    for name in DEBUGGERS:
        if shutil.which(name) is not None:
            return [name]
    raise UsageProblem("there is no gdb and no lldb here. Install one, or take the core elsewhere: 'corepipectl dump'")


def _tell(crash: Crash) -> None:
    """Say what one should know of a core before one believes what a debugger shows."""
    record = crash.record
    hint(
        f"Process {record.pid} ({shown(record.comm)}) of user {record.uid}, {shown(record.signal_name)}, "
        f"{shown(record.timestamp)}: {shown(record.id)}"
    )
    missing = left_out(record)
    if missing is not None:
        hint(f"Left out: {missing}")
    exe = crash.source.program(record)
    if exe is None:
        hint(
            f"{shown(record.exe or record.comm)}: the program is not here, so there are no names of functions. "
            f"Give it to the debugger: (gdb) file PROGRAM"
        )
        return
    here = build_id_of(exe)
    if record.build_id and here and here != record.build_id:
        hint(
            f"{shown(record.exe)}: it is not the program that crashed (build id {here[:_SHOWN]}, and the core's is "
            f"{shown(record.build_id[:_SHOWN])}), so names and lines will be wrong. Install the version that crashed, "
            f"or debug with its build: (gdb) file PROGRAM"
        )


def build_id_of(path: str) -> str | None:
    """Return a program's build id in hex, None when it has none or cannot be read."""
    from receiver.signature import build_id  # noqa: PLC0415 - only debug asks

    try:
        # Not waiting, should it be a FIFO by now.
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        return build_id(os.pread(fd, _PAGE, 0))
    except OSError:
        return None
    finally:
        os.close(fd)


def open_plain(crash: Crash) -> int:
    """Return a descriptor of the plain core, which is the caller's. Raises UsageProblem, StoreError, OSError."""
    from receiver import dump  # noqa: PLC0415
    from receiver.stored import Damaged, StoredCore  # noqa: PLC0415

    record = crash.record
    source = crash.source.open_core(record)
    target = -1
    try:
        core = StoredCore(source, record.core.compression)
        if (record.core.compression or "none") == "none":
            found, source = source, -1
            return found
        places = [place for place in (os.environ.get("TMPDIR"), LARGE_TEMPORARY, "/tmp") if place]  # noqa: S108
        target = dump.open_nameless(places)
        try:
            with Progress("unpack", record.core.size_bytes) as progress:
                told = progress if crash.source.name is None else _with_room_left(target, progress)
                copied = dump.copy(core, target, record.core.size_bytes, told)
        except OSError as error:
            if error.errno not in (*FULL, errno.EFBIG):
                raise
            raise UsageProblem(
                f"{os.path.dirname(os.readlink(f'/proc/self/fd/{target}'))}: no room for the plain core "
                f"({tables.size(record.core.size_bytes)}, less its zeros). Set TMPDIR to a directory that has some"
            ) from None
        damage = damage_of(record, copied)
        if damage is not None:
            hint(f"corepipectl: {damage}. The debugger gets what can be read")
        found, target = target, -1
        return found  # noqa: TRY300 - `finally` closes what is not given away
    except Damaged as error:
        raise UsageProblem(str(error)) from None
    finally:
        for fd in (source, target):
            if fd >= 0:
                os.close(fd)


def _with_room_left(target: int, progress: Callable[[int], object]) -> Callable[[int], None]:
    """Return what is to be told of a container's core that is unpacked: a small one may be of any size then.

    It raises OSError when there would be no room for others.
    """
    from receiver.ctl.copying import KEEP_FREE  # noqa: PLC0415 - for strangers' cores alone

    def told(size: int) -> None:
        room = os.fstatvfs(target)
        if room.f_bavail * room.f_frsize < KEEP_FREE:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        progress(size)

    return told


def _run(command: list[str], user: int | None, core: int) -> int:
    """Run a debugger to its end, by another user if need be. Returns its exit status, as a shell does."""
    other: dict[str, Any] = {}
    if user is not None:
        other = {"user": user, "group": user, "extra_groups": [], "pass_fds": (core,), "preexec_fn": _no_new_privileges}
    sys.stdout.flush()
    # ^C is the debugger's: it interrupts what that does, and must not take the core from under it.
    # A handler and not SIG_IGN, which the debugger would inherit.
    before = signal.signal(signal.SIGINT, lambda _signal, _frame: None)
    try:
        process = subprocess.Popen(command, **other)  # noqa: S603 - the user's own choice
    except OSError as error:
        raise UsageProblem(f"{shown(command[0])}: {error.strerror}") from None
    else:
        status = process.wait()
    finally:
        signal.signal(signal.SIGINT, before)
    return 128 - status if status < 0 else status


def _no_new_privileges() -> None:
    import prctl  # noqa: PLC0415 - for strangers' cores alone

    prctl.set_no_new_privs(1)
