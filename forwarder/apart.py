"""Touch a container's file systems and memory in a process of its own, which may hang without holding anything.

A path below a container's root may lie on FUSE, a page of memory too, and a server that has taken a request and never
answers cannot be interrupted: fs/fuse/dev.c waits it out, SIGKILL or not. Anyone who may make a user namespace may
mount one. So a child does these things. It holds neither the core nor a pidfd, and when it does not come back in time
it is left behind, and stays in its container's count (`forwarder/share.py`): the crash goes on without it.

Import budget: on the stub's start-up path, see `forwarder/stub.py`.
"""

from __future__ import annotations

import _socket
import posix
import time

from receiver.protocol import DONE, Channel, PeerGone, ProtocolError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from receiver.protocol import Message

    # Fields, and a descriptor to pass on.
    Answer = tuple[dict[str, bytes], int | None]

# Beyond the deadline that the child has for itself: its own word on what went wrong comes first.
GRACE_SECONDS = 0.5


class Stuck(Exception):
    """The child did not come back."""


class Look:
    """A child at work, and what it has to say. Owns our end of what ties it to us, until `close`."""

    __slots__ = ("_channel", "_deadline")

    def __init__(self, work: Callable[[], Iterator[Answer]], deadline: float, let_go: Iterable[int]) -> None:
        """Start a child that gives one answer after the other.

        deadline: for all of them, on time.monotonic(). let_go: descriptors that the child must not hold.

        Raises Stuck. What `work` raises is the child's end, and Stuck to who waits for an answer.
        """
        ours, theirs = _socket.socketpair(_socket.AF_UNIX, _socket.SOCK_STREAM | _socket.SOCK_CLOEXEC)
        try:
            # It is never waited for, since its end may hang as well: init reaps it, after the stub.
            pid = posix.fork()
        except OSError as error:
            ours.close()
            theirs.close()
            raise Stuck(f"no process can be started to look ({error.strerror})") from None
        if pid == 0:
            _be_the_child(work, theirs, ours, deadline, let_go)
        theirs.close()
        self._channel = Channel(ours)
        self._deadline = deadline

    def answer(self, deadline: float | None = None) -> Message:
        """Wait for the next answer; the caller owns the descriptor in it. Raises Stuck.

        deadline: a later one, for who had to wait for another child first.
        """
        try:
            return self._channel.receive((deadline or self._deadline) + GRACE_SECONDS)
        except (ProtocolError, PeerGone, TimeoutError, OSError):
            raise Stuck("what stands there does not answer") from None

    def close(self) -> None:
        self._channel.close()


def ask(work: Callable[[], Answer], deadline: float, let_go: Iterable[int]) -> Message:
    """Have a child do some work, and return its one answer. Arguments, owner and errors as of `Look`."""
    look = Look(lambda: iter((work(),)), deadline, let_go)
    try:
        return look.answer()
    finally:
        look.close()


def _be_the_child(
    work: Callable[[], Iterator[Answer]],
    theirs: _socket.socket,
    ours: _socket.socket,
    deadline: float,
    let_go: Iterable[int],
) -> None:
    """Work, answer and end; never return."""
    try:
        ours.close()
        for fd in let_go:
            if fd >= 0:
                posix.close(fd)
        channel = Channel(theirs)
        for fields, descriptor in work():
            passed = () if descriptor is None else (descriptor,)
            channel.send(DONE, fields, max(deadline, time.monotonic()) + GRACE_SECONDS, descriptors=passed)
    finally:
        # Nothing of the stub's may run twice.
        posix._exit(0)  # noqa: SLF001 - a public one, by its name in os
