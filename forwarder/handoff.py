"""Offer a core to a receiver, pass it, and watch that it comes to an end.

Import budget: on the stub's start-up path, see `forwarder/stub.py`.
"""

from __future__ import annotations

import _signal  # type: ignore[import-not-found]  # signal itself brings enum: 3 ms
import errno
import posix
import select
import time

from forwarder.rendezvous import Refused
from receiver.protocol import (
    ACCEPT,
    CORE,
    DONE,
    FIRST_OPTIONAL_KIND,
    OFFER,
    REFUSE,
    VERSION,
    WANT_CORE,
    WANT_RECORD,
    Credentials,
    PeerGone,
    ProtocolError,
    printable,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from forwarder.crash import Crash
    from forwarder.rendezvous import Place
    from forwarder.route import Route
    from receiver.protocol import Channel

SIGKILL = 9
# How often the watch looks at the kernel's account of the core's progress.
WATCH_SECONDS = 1.0
# Bytes a second that have to move, over stall_seconds: who takes a page a minute is no reader, and the slowest disk and
# the most thorough compression are faster.
LEAST_RATE = 256 << 10
# Where progress cannot be seen, the whole core has so many times the deadline for no progress.
UNACCOUNTED = 10
# After a message that is skipped.
SKIP_SECONDS = 0.01
# From "done" to the end of the process: it only has to give its memory back.
END_SECONDS = 2.0
# systemd closes a connection above MaxConnections= at once, and logs it: between two tries others come to their end.
RETRY_SECONDS = 0.05
LONGEST_RETRY_SECONDS = 0.5


class Lost(Exception):
    """The core was passed and did not come to a good end. It must not be offered again: somebody may still read it."""


class Handoff:
    """Brings one core to one receiver.

    core: the read end of the kernel's pipe. Owned; closed as soon as it is passed, or with `close`: while anyone holds
    it the kernel keeps the crashing process and its slot.
    """

    def __init__(
        self, crash: Crash, core: int, *, connect_seconds: float, busy_seconds: float, stall_seconds: float
    ) -> None:
        self.crash = crash
        self.core = core
        self.connect_seconds = connect_seconds
        self.busy_seconds = busy_seconds
        self.stall_seconds = stall_seconds
        # For all the containers around a process together: they may be nested 32 deep. The host is always asked.
        self.give_up = time.monotonic() + busy_seconds + 2 * connect_seconds
        # Who was asked and did not take it, and why: one line each.
        self.tried: list[str] = []

    def close(self) -> None:
        """Let go of the core. When it was not passed, the kernel's next write fails and the dump ends."""
        if self.core >= 0:
            posix.close(self.core)
            self.core = -1

    def bring(self, route: Route, place: Place) -> None:
        """Bring the core to the receiver of a place and watch it to its end.

        Raises Refused: nothing was passed, another may be asked. Raises Lost: it was passed and went wrong.
        """
        if not place.is_host and time.monotonic() > self.give_up:
            raise Refused("there was no time left to ask it")
        # Who hangs up at once is alive, over its MaxConnections=: worth waiting for longer than silence.
        busy = time.monotonic() + self.busy_seconds
        pause = RETRY_SECONDS
        while True:
            deadline = time.monotonic() + self.connect_seconds
            channel = route.open(place, deadline)
            try:
                try:
                    self._before_offer(channel)
                    wants_core = self._offer(channel, deadline, route.facts())
                except (PeerGone, ConnectionError):
                    # Nothing was passed yet.
                    if time.monotonic() + pause >= busy:
                        raise Refused("its receiver hung up on the offer") from None
                    time.sleep(pause)
                    pause = min(pause * 1.5, LONGEST_RETRY_SECONDS)
                    continue
                if wants_core:
                    self._pass(channel, deadline)
                    self._watch(channel)
                else:
                    self.close()
                return
            finally:
                channel.close()

    def _before_offer(self, channel: Channel) -> None:
        """A receiver is about to be asked."""

    def _offer(self, channel: Channel, deadline: float, facts: dict[str, bytes]) -> bool:
        """Return whether the receiver wants the core. Raises Refused, and ConnectionError when it hangs up."""
        crash = self.crash
        # The last look before a stranger learns anything: the facts are of the process that crashed.
        crash.verify()
        fields = {
            "version": b"%d" % VERSION,
            "signal": b"%d" % crash.signal,
            "time": b"%d" % crash.time,
            "dumpable": b"%d" % crash.dumpable,
            "core_limit": b"%d" % crash.core_limit,
            "own_pid": b"%d" % crash.own_pid,
            "own_tid": b"%d" % crash.own_tid,
            "comm": crash.comm,
            "container": crash.key.encode(),
            **facts,
        }
        if self.tried:
            fields["tried"] = "\n".join(self.tried).encode("ascii", "backslashreplace")[:4096]
        process = Credentials(crash.pid, crash.uid, crash.gid)
        thread = Credentials(crash.tid, crash.uid, crash.gid)
        try:
            channel.send(OFFER, fields, deadline, credentials=(process, thread))
            answer = channel.receive(deadline)
        except TimeoutError:
            raise Refused("its receiver did not answer the offer before the deadline") from None
        except ProtocolError as error:
            raise Refused(f"its receiver does not speak the protocol: {error}") from None
        except OSError as error:
            if isinstance(error, ConnectionError):
                raise
            raise Refused(f"the offer failed ({error.strerror})") from None
        answer.close()
        if answer.kind == REFUSE:
            raise Refused(f"its receiver refused: {printable(answer.fields.get('reason', b'no reason given'))}")
        want = answer.fields.get("want")
        if answer.kind != ACCEPT or want not in (WANT_CORE, WANT_RECORD):
            raise Refused("its receiver does not speak the protocol: neither accepted nor refused")
        return want == WANT_CORE

    def _pass(self, channel: Channel, deadline: float) -> None:
        """Pass the core and close it here. From its first byte on nobody else is asked: two would read it (H23)."""
        self.crash.verify()
        names = [b"core"]
        descriptors = [self.core]
        if self.crash.pidfd >= 0:
            names.append(b"pidfd")
            descriptors.append(self.crash.pidfd)
        try:
            channel.send(CORE, {"descriptors": b" ".join(names)}, deadline, descriptors=tuple(descriptors))
        except OSError as error:
            # sendmsg(2) passes descriptors with the first byte or not at all, and this message goes in one piece.
            # A receiver that is gone took nothing with it; still the rule is to ask nobody else.
            self._end()
            raise Lost(f"its receiver was gone before the core was passed ({error.strerror or 'time out'})") from None
        finally:
            self.close()

    def _watch(self, channel: Channel) -> None:
        """Wait until the core is read. Raises Lost; the crashed process has been killed then.

        The measure of progress is the kernel's account of what the dumping thread wrote, not the receiver's word. An
        honest slow write of a huge core lasts as long as it needs; a reader that stops, or keeps the descriptor, is
        ended with the process: that is what frees the kernel's slot.
        """
        poll = select.poll()
        poll.register(channel.fileno(), select.POLLIN)
        written = self.crash.written()
        patience = time.monotonic() + self.stall_seconds
        if written < 0:
            # A kernel without the account (CONFIG_TASK_XACCT): one deadline for all of the core.
            patience += (UNACCOUNTED - 1) * self.stall_seconds
        while True:
            if poll.poll(WATCH_SECONDS * 1000) and (result := self._result(channel)) is not None:
                break
            now = self.crash.written()
            if now >= written + LEAST_RATE * self.stall_seconds:
                written = now
                patience = time.monotonic() + self.stall_seconds
            elif time.monotonic() >= patience:
                self._end()
                raise Lost(f"its receiver took next to nothing of the core for {self.stall_seconds:g} s")
        if result != DONE:
            self._end()
            raise Lost("its receiver does not speak the protocol: no result after the core")
        if self.crash.still_dumps(END_SECONDS):
            self._end()
            raise Lost("its receiver said that it was done and kept the core's descriptor")

    def _result(self, channel: Channel) -> int | None:
        """Return the kind of the message that comes, None when it was one of those to skip. Raises Lost.

        What has begun is read to its end, or the next look would take the rest of it for a header: an honest receiver
        that was held up in the middle of a message would lose its core.
        """
        try:
            answer = channel.receive_any(time.monotonic() + self.connect_seconds)
        except (ProtocolError, OSError) as error:
            # TimeoutError is one.
            self._end()
            raise Lost(f"its receiver ended without a result after it had the core ({error})") from None
        answer.close()
        if answer.kind < FIRST_OPTIONAL_KIND:
            return answer.kind
        # Who talks without end must not keep a processor of the host busy.
        time.sleep(SKIP_SECONDS)
        return None

    def _end(self) -> None:
        """Kill the crashed process, which is what frees its slot whoever still holds the descriptor."""
        try:
            _signal.pidfd_send_signal(self.crash.pidfd, SIGKILL)
        except OSError as error:
            if error.errno != errno.ESRCH:
                raise
