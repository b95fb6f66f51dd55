"""core_pattern and its two companions: set, remember what was there, give it back, and tell how they are.

Three sysctls of the whole machine (none is namespaced; core(5), proc_sys_fs(5)):

    kernel.core_pattern      starts the staged launcher, see `forwarder/staging.py`
    kernel.core_pipe_limit   dumps at once; also what makes the kernel wait for the stub
    fs.suid_dumpable         set-user-ID programs dump too, for root only

Two kinds of installation, which may be there at the same time: persistent, which sysctl.d brings back at boot, and
runtime, which a reboot forgets. `Paths` has all their places. The values from before are on the disk before the first
sysctl is changed, so that a killed `install` can be taken back as well.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import math
import os
import tomllib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import receiver
from forwarder import __version__, staging
from forwarder.staging import InstallError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

# <linux/binfmts.h>, CORENAME_MAX_SIZE: with the NUL.
CORENAME_MAX_SIZE = 128

# <linux/proc_ns.h>, PROC_PID_INIT_INO and PROC_USER_INIT_INO: the initial namespaces have fixed inodes.
PROC_PID_INIT_INO = 0xEFFFFFFC
PROC_USER_INIT_INO = 0xEFFFFFFD

PATTERN = "kernel.core_pattern"
LIMIT = "kernel.core_pipe_limit"
SUID = "fs.suid_dumpable"

# core(5): the kernel connects to the socket at the path behind this, and asks before it writes a core.
SOCKET_MARK = "@@"

# Why these numbers: systemd/sysctl.d/60-core_pipe.conf.in, which is also what administrators get to read.
CORE_PIPE_LIMIT = "1024"
SUID_DUMPABLE = "2"

# In the order of setting; taking back goes the other way.
# The limit is first: from the first crash on, the kernel waits for the stub. suid_dumpable is last: while core_pattern
# is still a file, the kernel calls 2 unsafe and logs so ("Set kernel.core_pattern before fs.suid_dumpable", since 3.7,
# 54b501992dd2), and with an absolute file pattern set-uid programs would begin to dump to wherever that points.
SYSCTLS = (LIMIT, PATTERN, SUID)

# What the kernel has at boot: the way back when nobody remembers another.
KERNEL_DEFAULTS = {PATTERN: "core", LIMIT: "0", SUID: "0"}

# core(5). Names, so that order and number may change between versions of the stub; v is the version of this line.
# F=%F: a pidfd as fd 3, from 6.16 and some stable kernels on (b5325b2a270f); a specifier that the kernel does not know
# expands to nothing, and the stub gets an empty F. What the crashing program chooses (%e, %f, %E, %h) is not here.
ARGUMENTS = "v=1 P=%P I=%I p=%p i=%i s=%s t=%t c=%c d=%d u=%u g=%g F=%F"

# -I: neither environment nor current directory name code. -B: compiled files are never written. -S: no site-packages.
FLAGS = "-IBS"

# Where records of crashes go that no receiver took.
STORE = "/var/lib/core_pipe"

# Name: default, least, most (all seconds), what it is.
_NUMBERS = {
    "connect_seconds": (10.0, 0.1, 60.0, "to get a connection and an answer to the offer from one receiver"),
    "busy_seconds": (30.0, 0.1, 600.0, "to try again at a receiver that hangs up because it is busy"),
    "stall_seconds": (60.0, 1.0, 86400.0, "without progress of the core before the crashing process is killed"),
}
_ENVIRONMENT = "CORE_PIPE_FORWARDER_"

# Stubs that run at uninstall get this long to end, in seconds.
STUB_SECONDS = 10.0


@dataclass(frozen=True)
class Place:
    """Where one kind of installation keeps things. `sysctl_file` is None where a reboot is to forget it."""

    kind: str
    code: str
    state: str
    sysctl_file: str | None

    @property
    def launcher(self) -> str:
        """The file that core_pattern starts."""
        return os.path.join(self.code, staging.LAUNCHER)


@dataclass(frozen=True)
class Paths:
    """Every path that is read or written, apart from /proc.

    prefix: put in front of each of them; tests have their own. packages: what is staged, name to directory.
    """

    prefix: str = ""
    packages: Mapping[str, str] = field(default_factory=staging.packages_in_use)

    def at(self, path: str) -> str:
        """Return an absolute path below the prefix."""
        return self.prefix + path

    @property
    def persistent(self) -> Place:
        """Until `uninstall`."""
        return Place(
            kind="persistent",
            code=self.at("/usr/local/lib/core_pipe"),
            state=self.at("/var/lib/core_pipe_forwarder/previous.json"),
            sysctl_file=self.at("/etc/sysctl.d/60-core_pipe.conf"),
        )

    @property
    def runtime(self) -> Place:
        """Until `uninstall` or the next boot."""
        return Place(
            kind="runtime",
            code=self.at("/run/core_pipe"),
            state=self.at("/run/core_pipe/previous.json"),
            sysctl_file=None,
        )

    @property
    def kernel_socket(self) -> str:
        """Where the kernel connects to, where the socket is the way in (`forwarder/ingress.py`)."""
        return self.at("/run/core_pipe_forwarder/kernel.sock")

    @property
    def places(self) -> tuple[Place, Place]:
        """Both."""
        return self.persistent, self.runtime


HOST = Paths()


def stub_settings(paths: Paths = HOST, environment: Mapping[str, str] = os.environ) -> dict[str, object]:
    """Return what the launcher hands to the stub's `main`.

    store: bytes, the directory for records of crashes that nobody took: CORE_PIPE_STORE in the environment, else
    `store` in the host's receiver.toml, else STORE. connect_seconds, stall_seconds: float, see _NUMBERS:
    CORE_PIPE_FORWARDER_<NAME> in the environment, else forwarder.toml, else the default.

    Raises InstallError naming the file or variable, the key, and what is allowed.
    """
    receiver_toml = paths.at("/etc/core_pipe/receiver.toml")
    store: object = _toml(receiver_toml).get("store", STORE)
    origin = f"{receiver_toml}: store"
    if "CORE_PIPE_STORE" in environment:
        store, origin = environment["CORE_PIPE_STORE"], "CORE_PIPE_STORE in the environment"
    if not isinstance(store, str) or not store.startswith("/") or "\0" in store:
        raise InstallError(f"{origin} is {store!r}", f'give the absolute path of a directory, as "{STORE}"')
    settings: dict[str, object] = {"store": os.fsencode(store)}

    forwarder_toml = paths.at("/etc/core_pipe/forwarder.toml")
    given = {f"{forwarder_toml}: {key}": (key, value) for key, value in _toml(forwarder_toml).items()}
    for name, text in environment.items():
        if name.startswith(_ENVIRONMENT):
            given[f"{name} in the environment"] = (name.removeprefix(_ENVIRONMENT).lower(), _number(text))
    for key, (default, _, _, _) in _NUMBERS.items():
        settings[key] = default
    for origin, (key, value) in given.items():
        if key not in _NUMBERS:
            raise InstallError(f"{origin} is not known", f"the settings are {', '.join(_NUMBERS)}")
        _, least, most, meaning = _NUMBERS[key]
        if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value <= most:
            raise InstallError(f"{origin} is {value!r}", f"give seconds from {least:g} to {most:g} ({meaning})")
        settings[key] = float(value)
    return settings


def core_pattern(python: str, launcher: str) -> str:
    """Return the line for the kernel. Raises InstallError when the kernel could not take it as it is meant."""
    for path in (python, launcher):
        if set(path) & set(" %\t\n") or not path.isascii():
            # The kernel splits at blanks before it expands %, and knows no quoting.
            raise InstallError(
                f"core_pattern cannot have {path!r} in it", "use a path without blanks, % and letters outside of ASCII"
            )
    # No blank after |: the kernel would look for a program with an empty name.
    pattern = f"|{python} {FLAGS} {launcher} {ARGUMENTS}"
    surplus = len(pattern) - (CORENAME_MAX_SIZE - 1)
    if surplus > 0:
        raise InstallError(
            f"core_pattern would have {len(pattern)} bytes, and the kernel takes {CORENAME_MAX_SIZE - 1}: "
            f"{python} is {surplus} bytes too long",
            f"give that interpreter a short name (ln -s {python} /usr/local/bin/{staging.PYTHON}), "
            "or install this package with the system's /usr/bin/python3",
        )
    return pattern


def refuse_elsewhere() -> None:
    """Raise InstallError unless this is root in the namespaces where the kernel starts the stub."""
    refuse_containers()
    if os.geteuid() != 0:
        raise InstallError("only root can change what the kernel does with cores", "run it again with sudo")


def install(paths: Paths = HOST, *, runtime: bool = False) -> list[str]:
    """Stage the code and point the kernel at it; return what was done, a line each.

    Installing over an installation of either kind is an upgrade: what was there before the first one stays remembered.
    Raises InstallError or OSError; then everything is as it was.
    """
    place = paths.runtime if runtime else paths.persistent
    refuse_elsewhere()
    settings = stub_settings(paths)
    python = staging.interpreter()
    pattern = core_pattern(python, place.launcher)
    done = []
    with locked(paths), contextlib.ExitStack() as undo:
        undo.callback(
            staging.stage(
                place.code,
                paths.packages,
                settings,
                python=python,
                version=__version__,
                configuration=configuration(paths),
            )
        )
        done.append(f"staged version {__version__} of the stub in {place.code}")

        before = current_values()
        remembered, notes = _what_to_remember(paths, before)
        done += notes
        _replace(undo, place.state, json.dumps(remembered, indent=1).encode() + b"\n")
        if place.sysctl_file:
            _replace(undo, place.sysctl_file, sysctl_file(pattern))
            done.append(f"wrote {place.sysctl_file}")
        for name, value in our_values(pattern).items():
            undo.callback(write_sysctl, name, before[name])
            write_sysctl(name, value)
            done.append(f"{name} = {value}" + (f" (was: {before[name]})" if before[name] != value else ""))
        undo.pop_all()
        # Only now: an error on the way needs the old version back.
        if not staging.remove_stale(place.code):
            done.append("kept the version before: stubs of it are running. The next install removes it")
    return done


def uninstall(paths: Paths = HOST) -> list[str]:
    """Give back what was there before, for both kinds; return what was done, a line each, empty if there was nothing.

    Another handler's core_pattern is left alone, and so is a limit that somebody else has set since. Raises
    InstallError or OSError; running it again then goes on where it stopped, since what is remembered goes last.
    """
    refuse_elsewhere()
    done: list[str] = []
    with locked(paths):
        current = current_values()
        active = place_of(current[PATTERN], paths)
        present = [place for place in paths.places if is_present(place)]
        if not present and not active:
            return []
        remembered, notes = _remembered(paths)
        done += notes
        if remembered is None:
            done.append("what was there before is not remembered: going back to what the kernel has at boot")
            remembered = KERNEL_DEFAULTS
        for name in reversed(SYSCTLS):
            is_ours = active is not None if name == PATTERN else current[name] == our_values("")[name]
            if is_ours and current[name] != remembered[name]:
                write_sysctl(name, remembered[name])
            if is_ours or current[name] == remembered[name]:
                done.append(f"{name} = {remembered[name]}")
            else:
                done.append(f"left {name} alone, somebody set it after us: {current[name]}")
        for place in present:
            if place.sysctl_file and os.path.lexists(place.sysctl_file):
                staging.replace_or_remove(place.sysctl_file, None)
                done.append(f"removed {place.sysctl_file}")
            if os.path.isdir(place.code):
                # No new stub starts any more. One that is still at it after the deadline (the receiver may take minutes
                # for a big core) has long imported what its main road needs; an import that fails on a side road is
                # an exception like any other to it.
                if not staging.wait_for_stubs(place.code, STUB_SECONDS):
                    done.append("a stub is still running; it can end without its code")
                staging.remove_all(place.code)
                done.append(f"removed the stub's code from {place.code}")
        for place in present:
            staging.replace_or_remove(place.state, None)
            staging.remove_empty(os.path.dirname(place.state))
    return done


def sysctl_file(pattern: str) -> bytes:
    """Return the contents of the file in sysctl.d, from the template beside the packages. Raises InstallError."""
    home = os.path.dirname(receiver.__path__[0])
    # A source tree has it beside the packages, a wheel inside of `receiver` (pyproject.toml, force-include).
    for directory in (os.path.join(receiver.__path__[0], "units"), os.path.join(home, "systemd")):
        try:
            with open(os.path.join(directory, "sysctl.d/60-core_pipe.conf.in"), encoding="ascii") as file:
                text = file.read()
        except FileNotFoundError:
            continue
        for name, value in our_values(pattern).items():
            text = text.replace(f"@{name.partition('.')[2].upper()}@", value)
        return text.encode()
    raise InstallError(f"sysctl.d/60-core_pipe.conf.in is not in {home}", "install this package anew")


def read_sysctl(name: str) -> str:
    """Return a sysctl's value. Bytes that are no UTF-8 survive as surrogates, as in os.fsdecode."""
    with open(_proc(name), "rb") as file:
        return os.fsdecode(file.read().removesuffix(b"\n"))


def write_sysctl(name: str, value: str) -> None:
    """Set a sysctl and read it back: the kernel silently cuts what is too long. Raises InstallError or OSError."""
    fd = os.open(_proc(name), os.O_WRONLY | os.O_CLOEXEC)
    try:
        # With the newline, as an empty write changes nothing; in one write, as each one stands for itself.
        os.write(fd, os.fsencode(value) + b"\n")
    finally:
        os.close(fd)
    if (found := read_sysctl(name)) != value:
        raise InstallError(
            f"the kernel made {found!r} of {name} = {value!r}", "look whether somebody else is setting it"
        )


def _proc(name: str) -> str:
    return "/proc/sys/" + name.replace(".", "/")


def current_values() -> dict[str, str]:
    return {name: read_sysctl(name) for name in SYSCTLS}


def our_values(pattern: str) -> dict[str, str]:
    """Return our values in the order of setting."""
    values = {PATTERN: pattern, LIMIT: CORE_PIPE_LIMIT, SUID: SUID_DUMPABLE}
    return {name: values[name] for name in SYSCTLS}


def refuse_containers() -> None:
    mend = "run it on the host; inside a container install the receiver: core-pipe-receiver install"
    for kind, initial in (("pid", PROC_PID_INIT_INO), ("user", PROC_USER_INIT_INO)):
        if os.stat(f"/proc/self/ns/{kind}").st_ino != initial:
            raise InstallError(
                f"this is a container ({kind} namespace of its own), and core_pattern belongs to the host", mend
            )
    try:
        inits = os.stat("/proc/1/ns/mnt")
    except OSError:
        # Without CAP_SYS_PTRACE over init it cannot be told; the other two have spoken.
        return
    if not os.path.samestat(inits, os.stat("/proc/self/ns/mnt")):
        raise InstallError(
            "this is a container or a sandbox (mount namespace of its own), and the kernel starts the stub "
            "outside of it, where files may be others",
            mend,
        )


@contextlib.contextmanager
def locked(paths: Paths) -> Iterator[None]:
    """One `install` or `uninstall` at a time. The file stays: who removes a lock file lets two have the lock."""
    path = paths.at("/run/core_pipe_forwarder.lock")
    staging.make_directories(os.path.dirname(path))
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


def _replace(undo: contextlib.ExitStack, path: str, contents: bytes) -> None:
    for made in staging.make_directories(os.path.dirname(path)):
        undo.callback(staging.remove_empty, made)
    before = staging.read_trusted(path)
    staging.write_atomically(path, contents)
    undo.callback(staging.replace_or_remove, path, before)


def _toml(path: str) -> dict[str, Any]:
    contents = staging.read_trusted(path)
    if contents is None:
        return {}
    if reason := staging.insecure(os.path.dirname(path)):
        raise InstallError(
            f"{path} could be replaced by others than root: {reason}", "give it to root, writable by root only"
        )
    try:
        return tomllib.loads(contents.decode())
    except ValueError as error:
        raise InstallError(f"{path} is not TOML ({error})", "correct it") from error


def configuration(paths: Paths) -> str:
    """Return what changes with the files. Without the environment: `status` has not the one that `install` had."""
    return hashlib.sha256(repr(stub_settings(paths, {})).encode()).hexdigest()


def _number(text: str) -> float | str:
    try:
        number = float(text)
    except ValueError:
        return text
    # No range contains "nan"; it is told as what was written.
    return text if math.isnan(number) else number


def place_of(pattern: str, paths: Paths) -> Place | None:
    """Return which installation a core_pattern leads to, of whatever version, None for another handler's."""
    if pattern == SOCKET_MARK + paths.kernel_socket:
        # One service for both. The persistent one's, if nothing else is known: it is what a boot brings.
        return next((place for place in paths.places if os.path.lexists(place.launcher)), paths.persistent)
    if not pattern.startswith("|"):
        return None
    words = pattern[1:].split(" ")
    return next((place for place in paths.places if place.launcher in words[1:]), None)


def is_present(place: Place) -> bool:
    return any(path and os.path.lexists(path) for path in (place.launcher, place.state, place.sysctl_file))


def _remembered(paths: Paths) -> tuple[dict[str, str] | None, list[str]]:
    """Return the values from before the first installation, None if nobody knows; and what is to be said about it."""
    notes = []
    # Both say the same, unless another handler came between them: then the one that was written last is right.
    for place in sorted(paths.places, key=_written, reverse=True):
        try:
            contents = staging.read_trusted(place.state)
            if contents is None:
                continue
            values = json.loads(contents)
        except (InstallError, ValueError) as error:
            notes.append(f"{place.state} is not used: {error}")
            continue
        if isinstance(values, dict) and all(isinstance(values.get(name), str) for name in SYSCTLS):
            return {name: values[name] for name in SYSCTLS}, notes
        notes.append(f"{place.state} is not used: it is not what this program wrote")
    return None, notes


def _written(place: Place) -> int:
    try:
        return os.stat(place.state).st_mtime_ns
    except OSError:
        return 0


def _what_to_remember(paths: Paths, current: Mapping[str, str]) -> tuple[dict[str, str], list[str]]:
    """Return the values that `uninstall` is to give back, if we install over `current`.

    Ours are never remembered as somebody else's: where our own value is in force, what was remembered before stays.
    """
    remembered, notes = _remembered(paths)
    active = place_of(current[PATTERN], paths)
    if remembered is None and active is None:
        return dict(current), notes
    if remembered is None:
        notes.append("what was there before is not remembered: uninstall will go back to what the kernel has at boot")
        remembered = KERNEL_DEFAULTS
    ours = our_values(current[PATTERN] if active else "")
    return {name: remembered[name] if current[name] == ours[name] else current[name] for name in SYSCTLS}, notes
