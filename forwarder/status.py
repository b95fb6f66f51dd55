"""How the installation is: everything that a crash depends on, looked at and not changed.

The dataclasses are the JSON form of `core-pipe-forwarder status`, whose keys are part of the interface.
"""

from __future__ import annotations

import contextlib
import glob
import hashlib
import json
import os
import stat
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from forwarder import __version__, ingress, ledger_unit, staging
from forwarder.install import (
    ARGUMENTS,
    CORE_PIPE_LIMIT,
    FLAGS,
    HOST,
    LIMIT,
    PATTERN,
    SUID,
    SUID_DUMPABLE,
    Paths,
    Place,
    configuration,
    current_values,
    is_present,
    our_values,
    place_of,
    refuse_containers,
)
from forwarder.ledger import Summary, summary
from forwarder.ledger.book import BOOK
from forwarder.quota.events import kernel_tells
from forwarder.staging import DamagedError, InstallError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

# sysctl.d(5): a file in an earlier directory replaces those of the same name in the later ones.
_SYSCTL_DIRECTORIES = (
    "/etc/sysctl.d",
    "/run/sysctl.d",
    "/usr/local/lib/sysctl.d",
    "/usr/lib/sysctl.d",
    "/lib/sysctl.d",
)


@dataclass(frozen=True)
class Problem:
    """Something that is not as it should be, and what mends it."""

    what: str
    mend: str


@dataclass(frozen=True)
class Status:
    """What `status` shows; `dataclasses.asdict` of it is the JSON form, whose keys are part of the interface.

    active: the kernel starts our launcher for a crash, or connects to our service, and the staged code is whole.
    ingress: the way in, "pipe" or "socket"; None when not active. installed: "persistent", "runtime" (the one that
    core_pattern leads to, if both are there) or None. version: the staged code's and this package's. features: what
    this kernel has, as far as it can be told without a crash. host_receiver: whether there is a socket for the host's
    own crashes. ledger: whether somebody watches for crashes that leave no record, and how many there were.
    """

    active: bool
    ingress: str | None
    core_pattern: str
    core_pipe_limit: int
    suid_dumpable: int
    installed: str | None
    version: dict[str, str | None]
    features: dict[str, object]
    host_receiver: bool
    ledger: Summary
    problems: list[Problem]

    def as_json(self) -> str:
        """Return the JSON form."""
        return json.dumps(asdict(self), indent=2)


def status(paths: Paths = HOST) -> Status:
    """Look at everything that a crash depends on, and change nothing. Root is not needed.

    Raises InstallError in a container, where the answer would be about another machine's files.
    """
    refuse_containers()
    current = current_values()
    active = place_of(current[PATTERN], paths)
    present = [place for place in paths.places if is_present(place)]
    place = active or (present[0] if present else None)
    problems: list[Problem] = []
    staged = None
    if place:
        again = f"core-pipe-forwarder install{' --runtime' if place.kind == 'runtime' else ''}"
        try:
            staged = staging.read_staged(place.code)
        except DamagedError as error:
            problems.append(Problem(f"the staged code is damaged: {error}", again))
        problems += _sysctl_problems(current, active, again)
        way_in = ingress.way_in(current[PATTERN], paths)
        problems += _ingress_problems(way_in, paths, again)
        pattern = current[PATTERN] if way_in == ingress.PIPE else None
        if staged:
            problems += _staged_problems(staged, place, pattern, paths, again)
        if place.sysctl_file:
            problems += _boot_problems(place.sysctl_file, pattern, paths, again)
    host_receiver = _is_socket(paths.at("/run/core_pipe.socket"))
    if place and not host_receiver:
        problems.append(
            Problem(
                f"{paths.at('/run/core_pipe.socket')} is not there: crashes of the host's own processes get a record, "
                "and no core",
                # Where nothing reads units, installing them starts nobody.
                "core-pipe-receiver install --host"
                if ingress.systemd_keeps(paths)
                else "let your supervisor keep running: core-pipe-receiver --listen /run/core_pipe.socket",
            )
        )
    watcher = summary(paths.at(BOOK))
    if watcher.watched is False and ledger_unit.unit_files(paths):
        problems.append(
            Problem(
                f"{ledger_unit.UNIT} is installed, and does not watch: a crash that leaves no record stays unknown",
                f"systemctl status {ledger_unit.UNIT}",
            )
        )
    way_in = ingress.way_in(current[PATTERN], paths)
    is_active = way_in is not None and staged is not None
    if way_in == ingress.SOCKET:
        is_active = is_active and ingress.is_listening(paths.kernel_socket)
    return Status(
        active=is_active,
        ingress=way_in if is_active else None,
        core_pattern=current[PATTERN],
        core_pipe_limit=int(current[LIMIT]),
        suid_dumpable=int(current[SUID]),
        installed=place.kind if place else None,
        version={"staged": staged.version if staged else None, "current": __version__},
        features=_features(),
        host_receiver=host_receiver,
        ledger=watcher,
        problems=problems,
    )


def _ingress_problems(way_in: str | None, paths: Paths, again: str) -> Iterator[Problem]:
    units = ingress.unit_files(paths)
    serve = "core-pipe-forwarder serve"
    if way_in == ingress.SOCKET and not ingress.is_listening(paths.kernel_socket):
        # A resident service that was killed together with its guard could not give the way in back.
        yield Problem(
            f"nobody listens at {paths.kernel_socket}, where the kernel brings the cores: each is lost",
            f"core-pipe-forwarder ingress pipe; then {f'systemctl start {ingress.SOCKET_UNIT}' if units else serve}",
        )
    if way_in == ingress.PIPE and units:
        yield Problem(
            f"{ingress.SOCKET_UNIT} is installed, and the way in is the pipe",
            f"systemctl start {ingress.SOCKET_UNIT}; if that does not help: {again}",
        )
    for unit in units:
        for line in _lines(unit):
            if line.startswith("ExecStart="):
                program = line.removeprefix("ExecStart=").split(" ")[0]
                if not os.access(program, os.X_OK):
                    yield Problem(f"the service's program {program} cannot be started", again)
                elif reason := staging.insecure(program):
                    yield Problem(f"root runs {program} as a service, and {reason}", "give what is named to root")


def _lines(path: str) -> list[str]:
    with contextlib.suppress(OSError), open(path, encoding="utf-8", errors="replace") as file:
        return file.read().splitlines()
    return []


def _sysctl_problems(current: Mapping[str, str], active: Place | None, again: str) -> Iterator[Problem]:
    if active is None:
        name, mend = _handler(current[PATTERN])
        yield Problem(f"{name} is in our place: {PATTERN} is {current[PATTERN]}", mend.format(again=again))
    for name, value, why in (
        (
            LIMIT,
            CORE_PIPE_LIMIT,
            "0 lets processes vanish while they are looked at, and a low limit loses crashes unseen",
        ),
        (SUID, SUID_DUMPABLE, "0 dumps no set-user-ID programs, and 1 gives their secrets to whoever started them"),
    ):
        if current[name] != value:
            yield Problem(f"{name} is {current[name]}, not {value}: {why}", again)


def _handler(pattern: str) -> tuple[str, str]:
    """Return a name for another handler, and how we get our place back."""
    if "systemd-coredump" in pattern:
        return "systemd-coredump", "{again} (its own sysctl.d file sorts before ours, so boot is on our side)"
    if "apport" in pattern:
        # Its service writes core_pattern when it starts, after sysctl.d.
        return "apport", "systemctl disable --now apport.service, then {again}"
    if pattern.startswith("|"):
        return os.path.basename(pattern[1:].partition(" ")[0]), "stop it from setting core_pattern, then {again}"
    return ("a socket handler" if pattern.startswith("@") else "a file pattern"), "{again}"


def _staged_problems(
    staged: staging.Staged, place: Place, pattern: str | None, paths: Paths, again: str
) -> Iterator[Problem]:
    """Yield what is wrong with code that is whole. `pattern` is the kernel's, None when it is another handler's."""
    package = {name: hashlib.sha256(source).hexdigest() for name, source in staging.sources(paths.packages).items()}
    if package != {name: digest for name, digest in staged.hashes.items() if name.endswith(".py")}:
        yield Problem(
            f"the staged code (version {staged.version}) is not this package's (version {__version__})", again
        )
    try:
        if configuration(paths) != staged.configuration:
            yield Problem("the configuration was changed since it was installed", again)
    except InstallError as error:
        yield Problem(error.fact, f"{error.mend}; then {again}")
    if not os.access(staged.python, os.X_OK):
        yield Problem(f"the stub's interpreter {staged.python} cannot be started", f"install that Python; then {again}")
    elif os.path.realpath(staged.python) != staged.python_file:
        yield Problem(
            f"{staged.python} is another Python now: without compiled code for it, the stub starts more slowly", again
        )
    if pattern and pattern != f"|{staged.python} {FLAGS} {place.launcher} {ARGUMENTS}":
        yield Problem(f"{PATTERN} starts our launcher in another way than this version does", again)
    for path in (staged.python, place.launcher, staged.library):
        if reason := staging.insecure(path):
            yield Problem(
                f"root runs {path} at every crash, and {reason}",
                "give what is named to root, writable by root only"
                + (", or install this package with the system's Python" if path == staged.python else ""),
            )


def _boot_problems(file: str, pattern: str | None, paths: Paths, again: str) -> Iterator[Problem]:
    """Yield what keeps the next boot from setting our values. `pattern` is the kernel's, if it is ours."""
    ours = _sysctl_assignments(file)
    if ours is None:
        yield Problem(f"{file} is not there: the installation ends at the next boot", again)
        return
    expected = our_values(pattern or ours.get(PATTERN, ""))
    if any(ours.get(name) != value for name, value in expected.items()):
        yield Problem(f"{file} does not say what is installed", again)
    for later in _later_files(file, paths):
        for name, value in (_sysctl_assignments(later) or {}).items():
            if expected.get(name, value) != value:
                yield Problem(
                    f"{later} comes after {os.path.basename(file)} and sets {name} = {value}",
                    f"remove that line from {later}",
                )


def _later_files(file: str, paths: Paths) -> list[str]:
    """Return the files that have a say after ours, in the order in which they are read."""
    found: dict[str, str] = {}
    for directory in _SYSCTL_DIRECTORIES:
        for path in glob.glob(glob.escape(paths.at(directory)) + "/*.conf"):
            found.setdefault(os.path.basename(path), path)
    later = [found[name] for name in sorted(found) if name > os.path.basename(file)]
    # sysctl(8) --system reads it last. systemd-sysctl does not, and Debian links it from sysctl.d: name it once.
    last = paths.at("/etc/sysctl.conf")
    if os.path.realpath(last) not in map(os.path.realpath, later):
        later.append(last)
    return later


def _sysctl_assignments(path: str) -> dict[str, str] | None:
    """Return what a file in sysctl.d sets, names with dots; None when it cannot be read.

    Globs are left out: a name that is written out, as ours, wins over them wherever they stand (sysctl.d(5)).
    """
    try:
        with open(path, encoding="utf-8", errors="surrogateescape") as file:
            lines = file.read().splitlines()
    except OSError:
        return None
    found = {}
    for line in lines:
        name, equals, value = line.strip().partition("=")
        if equals and not name.startswith(("#", ";")):
            # "-": errors are ignored. The first separator says which of the two kinds the name has.
            name = name.strip().removeprefix("-")
            found[name.replace("/", ".")] = value.strip()
    return found


def _features() -> dict[str, object]:
    features: dict[str, object] = {}
    # Since 6.17. What it lists is what core_pattern may be.
    with contextlib.suppress(OSError), open("/proc/sys/kernel/core_modes", encoding="ascii") as file:
        features["core_modes"] = file.read().split()
        # It came after %F. Without the file nothing is known: %F went into stable kernels too, so the version says
        # nothing, and core_pattern takes any letter. Then the first crash tells, by its argument F.
        features["pidfd"] = True
    features["quota_netlink"] = kernel_tells()
    return features


def _is_socket(path: str) -> bool:
    try:
        return stat.S_ISSOCK(os.lstat(path).st_mode)
    except OSError:
        return False
