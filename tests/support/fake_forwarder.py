"""The forwarder's side of the wire, step by step, so that each step can be late, wrong, or left out."""

from __future__ import annotations

import array
import contextlib
import os
import select
import socket
import time
from typing import TYPE_CHECKING, Self

from receiver import protocol
from receiver.protocol import Channel, Credentials

if TYPE_CHECKING:
    from types import TracebackType

# What an offer says of a crash, if a test says nothing else.
FIELDS = {"version": b"1", "signal": b"11", "time": b"1700000000", "dumpable": b"1", "comm": b"fake"}


class FakeForwarder:
    """One connection to a receiver. `pid` is the process that its offers name: one that the receiver cannot see.

    A process that it sees has to be dumping core, and that takes the kernel; one outside its pid namespace is 0 to it.
    """

    def __init__(
        self, path: str | bytes | None = None, *, sock: socket.socket | None = None, seconds: float = 20
    ) -> None:
        self.sock = sock or socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.seconds = seconds
        self.pid = os.getpid()
        if path is not None:
            self.sock.settimeout(seconds)
            try:
                self.sock.connect(path)
            except BaseException:
                self.sock.close()
                raise
        self.channel = Channel(self.sock)

    def _deadline(self) -> float:
        return time.monotonic() + self.seconds

    def offer(self, **fields: bytes) -> None:
        named = Credentials(self.pid, 0, 0)
        self.channel.send(protocol.OFFER, FIELDS | fields, self._deadline(), credentials=(named, named))

    def answer(self) -> protocol.Message:
        """The next message. Raises PeerGone, ConnectionError, TimeoutError."""
        message = self.channel.receive(self._deadline())
        message.close()
        return message

    def offered(self, **fields: bytes) -> Self:
        """Offer, and be accepted."""
        self.offer(**fields)
        answer = self.answer()
        assert answer.kind == protocol.ACCEPT, answer.fields
        return self

    def refused(self, **fields: bytes) -> str:
        """Offer, be refused, and return the reason."""
        # It may have been refused for who it is, before it could say anything.
        with contextlib.suppress(BrokenPipeError):
            self.offer(**fields)
        answer = self.answer()
        assert answer.kind == protocol.REFUSE, answer.fields
        return answer.fields["reason"].decode("ascii")

    def pass_core(self, *descriptors: int, names: bytes | None = None) -> None:
        """Pass descriptors, which stay the caller's."""
        names = b" ".join([b"core", b"pidfd", *[b"more"] * 9][: len(descriptors)]) if names is None else names
        self.channel.send(protocol.CORE, {"descriptors": names}, self._deadline(), descriptors=descriptors)

    def pass_pipe(self) -> int:
        """Pass the read end of a pipe as the core, and return the write end."""
        read, write = os.pipe()
        self.pass_core(read)
        os.close(read)
        return write

    def send_core(self, data: bytes) -> dict[str, bytes]:
        """Pass a core with these bytes, and return what the receiver says of it in the end."""
        write = self.pass_pipe()
        feed(write, data)
        os.close(write)
        return self.done()

    def done(self) -> dict[str, bytes]:
        message = self.answer()
        assert message.kind == protocol.DONE, message.kind
        return message.fields

    def is_gone(self) -> bool:
        """Whether the receiver has hung up, waiting for it."""
        self.sock.settimeout(self.seconds)
        try:
            return self.sock.recv(1) == b""
        except ConnectionError:
            return True

    def raw(self, data: bytes, *descriptors: int) -> None:
        """Send bytes as they are."""
        self.sock.settimeout(self.seconds)
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))] if descriptors else []
        self.sock.sendmsg([data], rights)

    def has_answer(self) -> bool:
        """Whether something has come already."""
        return bool(select.select([self.sock], [], [], 0)[0])

    def close(self) -> None:
        self.sock.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def feed(write: int, data: bytes | memoryview, seconds: float = 20) -> None:
    """Write into a pipe whose reader may be slow. Raises TimeoutError, BrokenPipeError."""
    os.set_blocking(write, False)
    rest = memoryview(data)
    deadline = time.monotonic() + seconds
    while rest:
        left = deadline - time.monotonic()
        if left <= 0 or not select.select([], [write], [], left)[1]:
            raise TimeoutError(f"the core's reader took nothing for {seconds:g} s")
        rest = rest[os.write(write, rest) :]
