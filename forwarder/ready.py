"""What can be done for a crash before it happens, by a process that stands ready for it.

Two things take time between a crash and the offer, and neither depends on who crashes. A process apart has to be there
that touches the container's file systems (`forwarder/apart.py`): fork(2). And after a fork every page that is written
for the first time is copied: the first run through the code is half as fast as the second. So the one that stands ready
has its process apart beforehand, and plays the crash of somebody who does not crash: itself.

Made before the connection is accepted, the process apart cannot hold the core or the pidfd of a crash. What it is to
look at comes to it in a message: directories below /proc, which hold nobody, and the lock that counts it.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import time
from typing import TYPE_CHECKING, Any

from forwarder import apart, stub
from forwarder.crash import Crash, Unidentified
from forwarder.rendezvous import Absent, Place, Refused
from forwarder.route import Route, look
from receiver.protocol import CORE, DONE, Channel, ProtocolError, close_all

if TYPE_CHECKING:
    from collections.abc import Callable

# For the little that a rehearsal asks.
REHEARSAL_SECONDS = 1.0
# From the first byte of a request to its last.
REQUEST_SECONDS = 5.0


class Helper:
    """A process apart that waits for what it is to look at. Its end of the line closing is its end."""

    def __init__(self) -> None:
        """Raises OSError when no process can be started."""
        self._line, theirs = socket.socketpair()
        try:
            # Never waited for: `apart.Look` says why.
            pid = os.fork()
        except OSError:
            self._line.close()
            theirs.close()
            raise
        if pid == 0:
            _be_the_helper(theirs)
        theirs.close()

    def close(self) -> None:
        """Let it end, or leave it behind."""
        self._line.close()

    def look(
        self, crash: Crash, place: Place, deadline: float, hosts: os.stat_result | None, hold: tuple[int, ...]
    ) -> apart.Look | None:
        """Have it look at a place, and for the facts of a crash; return None when it has ended before.

        hold: what it is to hold for as long as it looks.
        """
        fields = {"deadline": b"%d" % (deadline * 1e9), "sure": b"%d" % crash.pidfd_is_kernels}
        if hosts is not None:
            fields["hosts"] = b"%d %d" % (hosts.st_ino, hosts.st_dev)
        try:
            channel = Channel(self._line.dup())
        except OSError:
            # Its end was seen before.
            return None
        try:
            channel.send(CORE, fields, time.monotonic() + REQUEST_SECONDS, (place.process, crash.task, *hold))
        except (OSError, ProtocolError):
            channel.close()
            return None
        return _Asked(channel, deadline)


class _Asked(apart.Look):
    """The look of a process that was there before."""

    __slots__ = ()

    def __init__(self, channel: Channel, deadline: float) -> None:
        self._channel = channel
        self._deadline = deadline


class PreparedRoute(Route):
    """A route whose first look is the helper's. Owns the helper; a spare one is for another crash."""

    def __init__(self, helper: Helper | None, *arguments: Any, spare: bool = False, **options: Any) -> None:
        self._helper = helper
        self._spare = spare
        super().__init__(*arguments, **options)

    def _start_look(self, place: Place, deadline: float, hosts: os.stat_result | None) -> apart.Look:
        found = None
        if self._helper is not None:
            found = self._helper.look(self.crash, place, deadline, hosts, self.hold)
        return super()._start_look(place, deadline, hosts) if found is None else found

    def _end_look(self, facts: dict[str, bytes]) -> None:
        super()._end_look(facts)
        if self._helper is not None and not self._spare:
            self._helper.close()


def _be_the_helper(line: socket.socket) -> None:
    """Answer requests until the line ends; never return."""
    try:
        # Among them the listening socket, and what tells the service that its child has a connection.
        os.closerange(3, line.fileno())
        os.closerange(line.fileno() + 1, os.sysconf("SC_OPEN_MAX"))
        stub.prefer_to_be_killed()
        channel = Channel(line)
        poll = select.poll()
        poll.register(channel.fileno(), select.POLLIN)
        while poll.poll():
            _answer(channel)
    finally:
        # PeerGone among others: it is not needed, or not any more.
        os._exit(0)


def _answer(channel: Channel) -> None:
    """Do one look. Raises OSError and the like at the end of the line."""
    request = channel.receive(time.monotonic() + REQUEST_SECONDS)
    deadline = request.number("deadline") / 1e9
    hosts = None
    if "hosts" in request.fields:
        inode, device = (int(word) for word in request.fields["hosts"].split())
        hosts = os.stat_result((0, inode, device, *[0] * 7))
    descriptors = request.take()
    try:
        # The same two directories that a process would have which is forked for this look.
        place = Place.__new__(Place)
        place.process = descriptors[0]
        crash = Crash.__new__(Crash)
        crash.task = descriptors[1]
        crash.pidfd_is_kernels = bool(request.number("sure"))
        for fields, descriptor in look(crash, place, deadline, hosts):
            passed = [] if descriptor is None else [descriptor]
            try:
                until = max(deadline, time.monotonic()) + apart.GRACE_SECONDS
                channel.send(DONE, fields, until, descriptors=tuple(passed))
            finally:
                close_all(passed)
    finally:
        # Until here the last of them has counted for its container.
        close_all(descriptors)


def prepare(play: Callable[[Crash], None]) -> Helper | None:
    """Return a helper, None when there can be none, and rehearse with it; play: what is the caller's own."""
    try:
        helper = Helper()
    except OSError:
        # Each look has its process forked then.
        helper = None
    rehearse(helper, play)
    return helper


def rehearse(helper: Helper | None, play: Callable[[Crash], None]) -> None:
    """Run through a crash of this very process, as far as nobody is asked or told."""
    # Dumpable by its user (d), as most are: else one more process would be forked, to look at the program's owner.
    crash = Crash({"P": str(os.getpid()), "I": str(os.getpid()), "s": "11", "d": "1"})
    route = None
    empty = -1
    try:
        crash.pidfd = os.pidfd_open(os.getpid())
        crash.pidfd_is_kernels = True
        play(crash)
        # It is not dumping core, which is the last thing to be looked at.
        with contextlib.suppress(Unidentified):
            crash.identify()
        route = PreparedRoute(helper, crash, seconds=REHEARSAL_SECONDS, spare=True)
        route.host_only_because()
        place = Place("rehearsal", crash.task)
        # No root is there: nobody's receiver is connected to.
        empty = os.open("/proc/self/fd", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        os.dup2(empty, place.process, inheritable=False)
        with contextlib.suppress(Absent, Refused):
            route.open(place, time.monotonic() + REHEARSAL_SECONDS)
        place.close()
        route.facts()
    except (OSError, ValueError, Refused):
        # The crash will show what is wrong.
        pass
    finally:
        if route is not None:
            route.close()
        for fd in (crash.pidfd, crash.task, empty):
            if fd >= 0:
                os.close(fd)
