"""The kernel's pipe helper: its start-up is the latency of every crash.

Import budget
-------------
The kernel starts a Python for each crash, so each import here is paid by a process that waits in the kernel. Allowed on
this path, and held by tests/test_stub.py: the interpreter's built-in modules (_signal, _socket, _struct, errno, fcntl,
posix, select, time), forwarder.{stub,apart,crash,share,namespaces,rendezvous,route,handoff,handled} and
receiver.{auxv,cgroup,protocol}. No os: it is posix under another name, and what it brings takes a millisecond. No
typing, no socket, no json, no logging, no dataclasses, no third-party package. What is rare (a crash that nobody takes)
is imported where it is needed.

It runs as `python -IBS` from a staged copy (`forwarder/install.py`): isolated from the environment and from site
packages, never writing byte code at a crash, in the directory `/`, as root in the initial namespaces. The staged copy
has the modules above, compiled, in one file (`forwarder/staging.py`).
"""

from __future__ import annotations

import posix
import sys

from forwarder import handled
from forwarder.crash import Crash, Unidentified, parse
from forwarder.handoff import END_SECONDS, Lost
from forwarder.rendezvous import Absent, Known, Refused
from forwarder.route import Route
from forwarder.share import Share

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

CORE = 0


def open_standard_streams() -> None:
    """Fill 1 and 2, which the kernel leaves closed: else the next descriptors to be opened become stdout and stderr."""
    while True:
        fd = posix.open("/dev/null", posix.O_RDWR | posix.O_CLOEXEC)
        if fd > 2:
            posix.close(fd)
            return


def prefer_to_be_killed() -> None:
    """Have the kernel end stubs first when memory is short: a storm of them holds gigabytes, in nobody's cgroup."""
    try:
        fd = posix.open("/proc/self/oom_score_adj", posix.O_WRONLY | posix.O_CLOEXEC)
        posix.write(fd, b"1000")
        posix.close(fd)
    except OSError:
        pass


def main(settings: Mapping[str, object], arguments: list[str] | None = None) -> int:
    """Bring one crash home. Returns the exit status, which nobody reads: 0 when a receiver had it.

    settings: as `forwarder.install.stub_settings` embeds them. arguments: those of core_pattern (default: sys.argv).
    """
    open_standard_streams()
    prefer_to_be_killed()
    words = sys.argv[1:] if arguments is None else arguments
    return deal(settings, lambda: Crash(parse(words)), words)


def deal(
    settings: Mapping[str, object],
    find: Callable[[], Crash],
    arguments: list[str],
    begin: Callable[[], None] | None = None,
    make_route: Callable[..., Route] = Route,
) -> int:
    """Bring one crash home, or leave a record of it; returns as `main`.

    The core is descriptor CORE, and descriptor 1 leads to nothing. find: says who crashed; raises ValueError or
    Unidentified. arguments: what the kernel said, for the record when that is not understood. begin: what the kernel
    waits for before it writes the core; raises ValueError or OSError. make_route: makes the Route.
    """
    crash: Crash | None = None
    tried: list[str] = []
    try:
        crash = find()
        crash.identify()
        if begin is not None:
            begin()
        reason = _bring(crash, settings, tried, make_route)
    except (ValueError, Unidentified) as error:
        reason = str(error)
    except Exception as error:
        # The last resort: whatever happens, a record.
        reason = f"{type(error).__name__}: {error}"
    if reason is not None:
        # Whatever comes now takes time, and the process shall not wait for it.
        posix.dup2(1, CORE)
        from forwarder import unhandled  # noqa: PLC0415 - rare

        unhandled.record(settings, crash, arguments, reason, tried)
    handled.note(settings, crash, reason)
    return 0 if reason is None else 1


def _bring(
    crash: Crash, settings: Mapping[str, object], tried: list[str], make_route: Callable[..., Route]
) -> str | None:
    """Return None when a receiver had it, else why none had."""
    share = Share(crash.key)
    over = share.take()
    if over is not None:
        _let_go(crash, share)
        return over
    connect_seconds = float(str(settings.get("connect_seconds", 10.0)))
    handoff = handled.NotedHandoff(
        crash,
        CORE,
        connect_seconds=connect_seconds,
        busy_seconds=float(str(settings.get("busy_seconds", 30.0))),
        stall_seconds=float(str(settings.get("stall_seconds", 60.0))),
    )
    handoff.tried = tried
    route = make_route(crash, seconds=connect_seconds, let_go=(CORE,), hold=share.held())
    try:
        kept_on_host = route.host_only_because()
        if kept_on_host is not None and (route.is_container or len(route.owners) > 1):
            tried.append(f"containers: {kept_on_host}")
        for place in route.places():
            try:
                handoff.bring(route, place)
            except Known:
                continue
            except Absent as absent:
                tried.append(f"{place.name}: {absent}")
            except Refused as refused:
                tried.append(f"{place.name}: {refused}")
            except Lost as lost:
                return f"{place.name}: {lost}"
            else:
                return None
        return "no receiver took the core: " + "; ".join(tried)
    finally:
        handoff.close()
        route.close()
        _let_go(crash, share)
        share.close(keep=route.stuck)


def _let_go(crash: Crash, share: Share) -> None:
    """Close the core, which ends the kernel's dump, and go on counting the one that does not end."""
    posix.dup2(1, CORE)
    if crash.still_dumps(END_SECONDS):
        share.remember(crash.pid)
