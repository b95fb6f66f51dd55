"""The kernel's own word on every dump: the proc connector (<linux/cn_proc.h>), by way of pyroute2.

pyroute2 opens the socket and writes what is sent; it takes a fifth of a second to import, so it is imported here and by
nobody on a crash's path. Reading is done here: of a kernel that cannot filter, each fork and exec of the machine
arrives, and a look at four bytes says that it is none of ours.

It works in the initial pid, user and network namespaces, with CAP_NET_ADMIN. Elsewhere the kernel refuses, or says
nothing at all: so the answer has a deadline.
"""

from __future__ import annotations

import errno
import os
import secrets
import select
import socket
import struct
import time
from typing import TYPE_CHECKING, NamedTuple, Self

if TYPE_CHECKING:
    from types import TracebackType

# <linux/cn_proc.h>
PROC_CN_MCAST_LISTEN = 1
PROC_EVENT_NONE = 0
PROC_EVENT_NONZERO_EXIT = 0x20000000
PROC_EVENT_COREDUMP = 0x40000000
PROC_EVENT_EXIT = 0x80000000
CN_IDX_PROC = 1
CN_VAL_PROC = 1

# struct nlmsghdr, struct cn_msg; then struct proc_event: what, cpu, timestamp_ns, and its union.
_CN_MSG = struct.Struct("=IIIIHH")
_EVENT = struct.Struct("=IIQ")
_COREDUMP = struct.Struct("=II")
_EXIT = struct.Struct("=III")
_ACK = struct.Struct("=I")
_NLMSGHDR = 16
_BODY = _NLMSGHDR + _CN_MSG.size
_UNION = _BODY + _EVENT.size

ACK_SECONDS = 5.0
# One event has 76 bytes, and some 700 as the kernel counts them: some ten thousand may wait.
RECEIVE_BUFFER = 8 << 20
SO_RCVBUFFORCE = 33


class Unavailable(Exception):
    """The kernel does not tell. The text is a fact and what to do."""


class Overrun(Exception):
    """More came than could wait: some events are lost."""


class Dump(NamedTuple):
    """The kernel began to dump. pid, tid: host's. at: CLOCK_MONOTONIC, ns."""

    pid: int
    tid: int
    at: int


class Exit(NamedTuple):
    """A thread ended. status: as wait(2) has it: the signal, and 0x80 when the kernel wrote a core to its end."""

    pid: int
    tid: int
    at: int
    status: int


class ProcEvents:
    """Listens for dumps and failed exits. Owns its sockets; a context manager."""

    def __init__(self, seconds: float = ACK_SECONDS) -> None:
        """Subscribe. Raises Unavailable."""
        try:
            # The import that this module is for; see above.
            from pyroute2.netlink.connector import cn_proc  # type: ignore[import-untyped]  # noqa: PLC0415
        except ImportError as error:
            raise Unavailable(f"pyroute2 is not there ({error}): install this package with its dependencies") from None
        try:
            self._netlink = cn_proc.ProcEventSocket()
        except OSError as error:
            raise Unavailable(
                f"this kernel has no connector ({error.strerror}): load the module cn, or use a kernel with "
                "CONFIG_PROC_EVENTS"
            ) from None
        try:
            self._netlink.bind()
            # pyroute2's own reading runs in an event loop that ends for good at the first overrun.
            self._socket = socket.socket(fileno=os.dup(self._netlink.fileno()))
            self._socket.setblocking(False)
            self._enlarge()
            self._subscribe(cn_proc, time.monotonic() + seconds)
        except OSError as error:
            self._netlink.close()
            raise Unavailable(
                f"the kernel does not let us listen ({error.strerror}): run it on the host itself, as root with "
                "CAP_NET_ADMIN"
            ) from None
        except BaseException:
            self._netlink.close()
            raise

    def _enlarge(self) -> None:
        try:
            self._socket.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, RECEIVE_BUFFER)
        except OSError:
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, RECEIVE_BUFFER)

    def _subscribe(self, cn_proc: object, deadline: float) -> None:
        """Listen, wait for the kernel's word, then have it filter.

        In this order, because a filter filters its own acknowledgement too, and because a kernel before 6.6
        (2aa1f7a1f47c) drops the longer message without a word: then all is listened to, as before.
        """
        mark = secrets.randbits(31)
        plain, filtered = _messages(cn_proc, mark)
        self._socket.sendto(plain, (0, 0))
        while not self._acknowledged(mark, deadline):
            pass
        self._socket.sendto(filtered, (0, 0))

    def _acknowledged(self, mark: int, deadline: float) -> bool:
        poll = select.poll()
        poll.register(self._socket, select.POLLIN)
        if not poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
            raise Unavailable(
                "the kernel does not answer: this is not the initial pid, user and network namespace. Run it on the "
                "host itself"
            )
        try:
            data = self._datagram()
        except Overrun:
            return False
        if data is None or _EVENT.unpack_from(data, _BODY)[0] != PROC_EVENT_NONE:
            return False
        # Everybody who listens gets everybody's acknowledgements: ours has our number and one (cn_proc.c: cn_proc_ack).
        if _CN_MSG.unpack_from(data, _NLMSGHDR)[3] != mark + 1:
            return False
        (error,) = _ACK.unpack_from(data, _UNION)
        if error:
            raise Unavailable(
                f"the kernel does not let us listen ({os.strerror(error)}): run it as root of the host, with "
                "CAP_NET_ADMIN"
            )
        return True

    def fileno(self) -> int:
        """Return the descriptor to poll."""
        return self._socket.fileno()

    def read(self) -> Dump | Exit | None:
        """Return one event, or None when none waits. Raises Overrun."""
        while True:
            data = self._datagram()
            if data is None:
                return None
            event = parse(data)
            if event is not None:
                return event

    def _datagram(self) -> bytes | None:
        """Return a datagram of the kernel's, None when none waits. Raises Overrun."""
        while True:
            try:
                data, sender = self._socket.recvfrom(4096)
            except BlockingIOError:
                return None
            except OSError as error:
                if error.errno == errno.ENOBUFS:
                    raise Overrun from None
                if error.errno == errno.EINTR:
                    continue
                raise
            # Port 0 is the kernel's: others may send to the group, too.
            if sender[0] == 0 and len(data) >= _UNION + _ACK.size:
                return data

    def close(self) -> None:
        """Stop listening: the kernel counts out who closes."""
        self._socket.close()
        self._netlink.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def parse(data: bytes) -> Dump | Exit | None:
    """Return what one datagram says, None when it is none of ours."""
    if len(data) < _UNION + _EXIT.size:
        return None
    what, _cpu, at = _EVENT.unpack_from(data, _BODY)
    if what == PROC_EVENT_COREDUMP:
        tid, pid = _COREDUMP.unpack_from(data, _UNION)
        return Dump(pid, tid, at)
    if what == PROC_EVENT_EXIT:
        tid, pid, status = _EXIT.unpack_from(data, _UNION)
        return Exit(pid, tid, at, status) if status else None
    return None


def _messages(cn_proc: object, mark: int) -> tuple[bytes, bytes]:
    """Return the two that subscribe: the one that every kernel knows, and the one with a filter (struct proc_input)."""
    control = cn_proc.proc_event_control  # type: ignore[attr-defined]
    filtering = type("proc_input", (control,), {"fields": (*control.fields, ("event_type", "I"))})
    found = []
    for kind, size in ((control, 4), (filtering, 8)):
        message = kind()
        message["idx"], message["val"], message["len"] = CN_IDX_PROC, CN_VAL_PROC, size
        message["ack"] = mark
        message["action"] = PROC_CN_MCAST_LISTEN
        if size == 8:
            message["event_type"] = PROC_EVENT_COREDUMP | PROC_EVENT_NONZERO_EXIT
        message["header"]["type"] = 3  # NLMSG_DONE
        message.encode()
        found.append(bytes(message.data))
    return found[0], found[1]
