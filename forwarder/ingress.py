"""The way in: the kernel starts the stub (pipe), or connects to a service of ours (socket).

The pipe is always installed, and is the way in whenever nobody serves the socket: it needs no process that lives, and
the boot sets it (`forwarder/install.py`). The socket takes over when its service listens, and only then is core_pattern
changed; before the service leaves, it is changed back. So at every moment one of the two works.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import subprocess
import sys
from typing import TYPE_CHECKING

import receiver
from forwarder import staging
from forwarder.install import (
    CORENAME_MAX_SIZE,
    HOST,
    PATTERN,
    SOCKET_MARK,
    Paths,
    Place,
    core_pattern,
    is_present,
    locked,
    place_of,
    read_sysctl,
    refuse_elsewhere,
    stub_settings,
    write_sysctl,
)
from forwarder.staging import DamagedError, InstallError

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable

PIPE, SOCKET, AUTO = "pipe", "socket", "auto"
MODES = "/proc/sys/kernel/core_modes"
SOCKET_UNIT = "core_pipe-forwarder.socket"
SERVICE_UNIT = "core_pipe-forwarder.service"
UNITS = (SOCKET_UNIT, SERVICE_UNIT)
PROGRAM = "core-pipe-forwarder"
# What stands in the unit files, to be replaced by where the program is.
_UNIT_PROGRAM = f"/usr/bin/{PROGRAM}"
# Connections that wait while the service starts, or its processes are busy; the kernel waits for none (a full queue
# loses the core), and cuts this to net.core.somaxconn.
BACKLOG = 4096
SYSTEMCTL_SECONDS = 120.0


def kernel_has_socket() -> bool:
    """Whether core_pattern may be a socket, with the handshake (since 6.17)."""
    try:
        with open(MODES, encoding="ascii") as file:
            return SOCKET in file.read().split()
    except OSError:
        return False


def systemd_keeps(paths: Paths) -> bool:
    """Whether systemd runs this machine (sd_booted(3)), and reads what is written to these paths."""
    return not paths.prefix and os.path.isdir("/run/systemd/system")


def socket_pattern(path: str) -> str:
    """Return the line for the kernel. Raises InstallError when the kernel could not take it as it is meant."""
    if not path.isascii() or set(path) & set(" %\t\n") or os.path.realpath(path) != path:
        # No links: the kernel looks the path up without following any.
        raise InstallError(
            f"core_pattern cannot have {path!r} in it", "use a path without links, blanks, % and letters outside ASCII"
        )
    pattern = SOCKET_MARK + path
    if len(pattern) >= CORENAME_MAX_SIZE:
        raise InstallError(f"core_pattern would have {len(pattern)} bytes", "use a shorter path")
    return pattern


def is_listening(path: str) -> bool:
    """Whether somebody listens at a path in our network namespace; nobody is disturbed by the question."""
    # unix(7): Num RefCount Protocol Flags Type St Inode Path; __SO_ACCEPTCON is 1 << 16.
    try:
        with open("/proc/net/unix", "rb") as file:
            rows = [line.rstrip(b"\n").split(None, 7) for line in file]
    except OSError:
        return False
    wanted = os.fsencode(path)
    return any(len(row) == 8 and row[7] == wanted and int(row[3], 16) & 1 << 16 for row in rows[1:])


def way_in(pattern: str, paths: Paths) -> str | None:
    """Return which way in a core_pattern of ours is, None for another handler's."""
    if place_of(pattern, paths) is None:
        return None
    return SOCKET if pattern.startswith(SOCKET_MARK) else PIPE


def switch(paths: Paths, ingress: str) -> list[str]:
    """Change the way in of what is installed; return what was done, a line each.

    To the socket only when somebody listens there. Another handler's core_pattern is left alone. Raises InstallError or
    OSError; then everything is as it was.
    """
    refuse_elsewhere()
    with locked(paths):
        return _switch(paths, ingress)


def _switch(paths: Paths, ingress: str) -> list[str]:
    before = read_sysctl(PATTERN)
    place = place_of(before, paths)
    notes: list[str] = []
    if place is None:
        return [f"left {PATTERN} alone, it is not ours: {before}"]
    if ingress == SOCKET:
        if not is_listening(paths.kernel_socket):
            raise InstallError(
                f"nobody listens at {paths.kernel_socket}", f"start {SOCKET_UNIT}, or run: {PROGRAM} serve"
            )
        pattern = socket_pattern(paths.kernel_socket)
    else:
        pattern, notes = _pipe_pattern(place)
    if before == pattern:
        return []
    try:
        write_sysctl(PATTERN, pattern)
    except OSError as error:
        if ingress != SOCKET or error.errno != errno.EINVAL:
            raise
        # check_coredump_socket() in fs/coredump.c. What /proc tells does not show it everywhere (`refuse_elsewhere`):
        # init may have left the initial mount namespace itself, or not be ours to look at.
        raise InstallError(
            f"the kernel refuses {PATTERN} = {pattern}: it takes a socket only from the initial mount namespace "
            "(and Linux 6.17.0 to 6.17.4 take none)",
            f"run this on the host itself, outside of any sandbox; or use the pipe: {PROGRAM} install --ingress pipe",
        ) from None
    return [f"{PATTERN} = {pattern}", *notes]


def _pipe_pattern(place: Place) -> tuple[str, list[str]]:
    """Return what leads to the staged code, and what is to be said about that, a line each. Raises InstallError."""
    notes = []
    try:
        python = staging.read_staged(place.code).python
    except DamagedError as error:
        # Most often another version of this package staged it, which works; and a boot would have the kernel start it,
        # too. A core_pattern that goes on leading to a socket where nobody listens loses every core.
        reason = staging.insecure(place.launcher) if os.path.isfile(place.launcher) else str(error)
        if reason is not None:
            raise InstallError(f"the staged code is damaged: {reason}", f"{PROGRAM} install") from error
        python = staging.interpreter()
        notes.append(f"the staged code is not this version's, or damaged: {error}. Run: {PROGRAM} install")
    return core_pattern(python, place.launcher), notes


def set_up(paths: Paths = HOST, choice: str = AUTO, *, runtime: bool = False) -> list[str]:
    """Make the chosen way the way in; return what was done, a line each. The pipe is installed already.

    Raises InstallError or OSError; then the way in is the pipe.
    """
    refuse_elsewhere()
    if choice == PIPE:
        return _remove_units(paths) + switch(paths, PIPE)
    try:
        if not kernel_has_socket():
            raise InstallError(
                "this kernel has no coredump socket (there is none in /proc/sys/kernel/core_modes)",
                f"use the pipe: {PROGRAM} install --ingress pipe",
            )
        if systemd_keeps(paths):
            return _set_up_units(paths, runtime=runtime)
        if not is_listening(paths.kernel_socket):
            raise InstallError(
                f"systemd does not run this machine, and nobody listens at {paths.kernel_socket}",
                f"use the pipe; `{PROGRAM} serve` takes over for as long as it runs",
            )
        return switch(paths, SOCKET)
    except (InstallError, OSError) as error:
        with contextlib.suppress(InstallError, OSError):
            _remove_units(paths)
        switch(paths, PIPE)
        if choice == SOCKET:
            raise
        reason = error.fact if isinstance(error, InstallError) else f"{error.filename or ''}: {error.strerror}"
        return [f"the way in is the pipe: {reason}"]


def take_down(paths: Paths = HOST) -> list[str]:
    """Take the socket's service away, and have the pipe be the way in; return what was done. Raises as `switch`."""
    refuse_elsewhere()
    done = _remove_units(paths)
    if way_in(read_sysctl(PATTERN), paths) == SOCKET:
        try:
            done += switch(paths, PIPE)
        except InstallError as error:
            # What comes next gives back what was there before, without the staged code as well.
            done.append(f"the pipe is not the way in: {error.fact}")
    if is_listening(paths.kernel_socket):
        done.append(f"somebody goes on listening at {paths.kernel_socket}: end that process (`{PROGRAM} serve`)")
    return done


def _unit_directories(paths: Paths) -> tuple[str, str]:
    """Return where the persistent and the runtime installation have their units."""
    return paths.at("/etc/systemd/system"), paths.at("/run/systemd/system")


def unit_files(paths: Paths) -> list[str]:
    """Return those that are there."""
    candidates = [os.path.join(directory, name) for directory in _unit_directories(paths) for name in UNITS]
    return [path for path in candidates if os.path.lexists(path)]


def _set_up_units(paths: Paths, *, runtime: bool) -> list[str]:
    program = _program()
    directory = _unit_directories(paths)[runtime]
    texts = {os.path.join(directory, name): _unit(name, program) for name in UNITS}
    done = _remove_units(paths)
    for path, text in texts.items():
        staging.make_directories(os.path.dirname(path))
        staging.write_atomically(path, text)
        done.append(f"wrote {path}")
    _systemctl("daemon-reload")
    if not runtime:
        _systemctl("enable", SOCKET_UNIT)
    # Its ExecStartPost= is what changes core_pattern.
    _systemctl("start", SOCKET_UNIT)
    # A condition that is not met is no failure to systemd; the service would then listen by itself, kept by nobody.
    if way_in(read_sysctl(PATTERN), paths) != SOCKET:
        raise InstallError(
            f"{SOCKET_UNIT} was started, and core_pattern does not lead to it",
            f"look for a condition that is not met: systemctl status {SOCKET_UNIT}",
        )
    # It would start at the first crash; whether it can is better known now.
    _systemctl("start", SERVICE_UNIT)
    done += [f"started {SOCKET_UNIT}", f"{PATTERN} = {read_sysctl(PATTERN)}"]
    return done


def _remove_units(paths: Paths) -> list[str]:
    present = unit_files(paths)
    if not present:
        return []
    if systemd_keeps(paths):
        # The socket first: while it stops, it gives the way in back to the pipe (ExecStopPre=). The service ends what
        # it has begun.
        _systemctl("disable", "--now", SOCKET_UNIT)
        _systemctl("disable", "--now", SERVICE_UNIT)
    for path in present:
        staging.replace_or_remove(path, None)
    if systemd_keeps(paths):
        _systemctl("daemon-reload")
    return [f"removed {path}" for path in present]


def _program() -> str:
    """Return the installed program's path. Raises InstallError when it is not there, or not root's alone."""
    beside = os.path.join(os.path.dirname(sys.executable), PROGRAM)
    found = beside if os.access(beside, os.X_OK) else shutil.which(PROGRAM)
    if found is None:
        raise InstallError(f"{PROGRAM} is not in PATH, nor beside {sys.executable}", "install this package anew")
    # As root from the first crash on, so all of it must be root's.
    for path in (found, sys.executable, *staging.packages_in_use().values()):
        if reason := staging.insecure(path):
            raise InstallError(
                f"root is to run {path} as a service, and {reason}", "give what is named to root, writable by root only"
            )
    return found


def _unit(name: str, program: str) -> bytes:
    home = os.path.dirname(receiver.__path__[0])
    # A source tree has it beside the packages, a wheel inside of `receiver` (pyproject.toml, force-include).
    for directory in (os.path.join(receiver.__path__[0], "units"), os.path.join(home, "systemd")):
        try:
            with open(os.path.join(directory, name), encoding="ascii") as file:
                return file.read().replace(_UNIT_PROGRAM, program).encode()
        except FileNotFoundError:
            continue
    raise InstallError(f"{name} is not in {home}", "install this package anew")


def _systemctl(*arguments: str) -> None:
    command = shutil.which("systemctl") or "/usr/bin/systemctl"
    try:
        done = subprocess.run(  # noqa: S603
            [command, *arguments], capture_output=True, text=True, check=False, timeout=SYSTEMCTL_SECONDS
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise InstallError(f"systemctl {' '.join(arguments)} failed: {error}", "see journalctl -xe") from error
    if done.returncode:
        raise InstallError(f"systemctl {' '.join(arguments)} failed: {done.stderr.strip()}", "see journalctl -xe")


def serve(paths: Paths = HOST, *, idle_seconds: float = 0.0, say: Callable[[str], None] = lambda _line: None) -> None:
    """Be the service, until SIGTERM; at systemd's socket, or at one of our own, which is the way in for as long.

    idle_seconds: with systemd's socket, leave after so long without a crash; 0: never. say: gets what is done at a
    socket of our own, a line each. Raises InstallError, OSError, receiver.activation.ActivationError.
    """
    from forwarder.kernel_socket import Service, protect  # noqa: PLC0415 - needs more than `install` does
    from receiver import activation  # noqa: PLC0415

    protect()
    refuse_elsewhere()
    settings = stub_settings(paths)
    passed = activation.passed()
    if passed:
        if len(passed) != 1 or not activation.is_listening(passed[0]):
            raise InstallError("systemd passed something else than one listening socket", f"use {SOCKET_UNIT} as it is")
        Service(passed[0], settings, idle_seconds=idle_seconds).run()
        return
    if not any(is_present(place) for place in paths.places):
        raise InstallError("nothing is installed", f"{PROGRAM} install; then start this again")
    listener = _listen(paths.kernel_socket)

    def take_over() -> None:
        for line in switch(paths, SOCKET):
            say(line)

    def give_back() -> None:
        for line in _give_back(paths):
            say(line)

    try:
        Service(listener, settings).run(take_over, give_back)
    finally:
        with contextlib.suppress(OSError):
            os.unlink(paths.kernel_socket)


def _listen(path: str) -> socket.socket:
    from receiver import activation  # noqa: PLC0415

    directory = os.path.dirname(path)
    if reason := staging.insecure(directory):
        raise InstallError(f"the kernel's socket cannot be at {path}: {reason}", "give what is named to root")
    staging.make_directories(os.path.dirname(directory))
    with contextlib.suppress(FileExistsError):
        os.mkdir(directory, 0o700)
    return activation.listen(path, BACKLOG)


def _give_back(paths: Paths) -> list[str]:
    with locked(paths):
        if way_in(read_sysctl(PATTERN), paths) == SOCKET:
            return _switch(paths, PIPE)
    return []
