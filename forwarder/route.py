"""Which receivers may have a core, nearest first.

"The nearest enclosing receiver wins": the root that the crashed process sees, then the containers around it from the
inside out, then the host. "A core only flows to those who own the process": to a mount namespace whose owning user
namespace is the process's own or one around it.

Import budget: on the stub's start-up path, see `forwarder/stub.py`.
"""

from __future__ import annotations

import os

from forwarder import namespaces
from forwarder.rendezvous import Absent, Place, Refused, check_listener, connect, find_socket

TYPE_CHECKING = False  # typing's own would cost the stub four milliseconds
if TYPE_CHECKING:
    from collections.abc import Iterator

    from forwarder.crash import Crash
    from receiver.protocol import Channel

DUMPABLE_BY_USER = 1


class Route:
    """The places for one crash. Owns their descriptors.

    Raises OSError when the process is gone.
    """

    def __init__(self, crash: Crash) -> None:
        self.crash = crash
        self.host = Place("host", "/proc/self", is_host=True)
        pid_ns = namespaces.open_namespace(crash.task, "pid")
        user_ns = namespaces.open_namespace(crash.task, "user")
        self._pid_ns = pid_ns
        self._pid_chain = namespaces.ancestry(pid_ns)
        self.owners = namespaces.ancestry(user_ns)
        os.close(user_ns)
        self.enclosing = [ns for ns in self._pid_chain if ns != self.host.pid_ns]
        if crash.own_pid == 1 and self.enclosing:
            # A dying init takes its whole pid namespace with it: nobody in there will finish a core.
            del self.enclosing[0]

    def close(self) -> None:
        self.host.close()
        os.close(self._pid_ns)

    @property
    def is_container(self) -> bool:
        """Whether the process lives in a pid namespace other than the host's."""
        return self._pid_chain[0] != self.host.pid_ns

    def places(self) -> Iterator[Place]:
        """Yield where to ask, nearest first, the host last. Each is closed when the next is asked for."""
        if self.host_only_because() is None:
            seen: list[Place] = [self.host]
            try:
                for place in self._containers():
                    if any(place.same_as(other) for other in seen):
                        place.close()
                    else:
                        seen.append(place)
                        yield place
            finally:
                for place in seen[1:]:
                    place.close()
        yield self.host

    def _containers(self) -> Iterator[Place]:
        dying = self._pid_chain[0] if self.crash.own_pid == 1 else None
        if dying is None:
            try:
                yield Place("own root", self.crash.task)
            except OSError:
                # Its root went away under it (a lazy unmount): the next place is as good.
                pass
        namespace: int | None = os.dup(self._pid_ns)
        while namespace is not None:
            try:
                if namespaces.identity(namespace) == self.host.pid_ns:
                    return
                if namespaces.identity(namespace) != dying:
                    init = namespaces.init_of(namespace)
                    if init is not None:
                        try:
                            yield Place("container", init)
                        except OSError:
                            pass
                        finally:
                            os.close(init)
                outer = namespaces.parent_of(namespace)
            finally:
                os.close(namespace)
            namespace = outer

    def host_only_because(self) -> str | None:
        """Return why only the host may have the core, None when a container may.

        A process that its own user may not look into (set-uid, file capabilities, unreadable executable, prctl(2))
        holds what its user may not see. A container may have it when it certainly is the process that crashed, and
        when the program is the container's: its owner is somebody in the process's user namespace. (A user may run an
        unreadable program of the host's in a sandbox where he is root: that program's memory is not his.)
        """
        if self.crash.dumpable == DUMPABLE_BY_USER:
            return None
        if not self.crash.pidfd_is_kernels:
            return "it is not dumpable by its user, and this kernel gives no pidfd to be sure of it"
        try:
            owner = os.stat("exe", dir_fd=self.crash.task).st_uid
            if not namespaces.is_mapped(self.crash.task, owner):
                return "it is not dumpable by its user, and its program belongs to somebody outside its user namespace"
        except OSError as error:
            return f"it is not dumpable by its user, and its program cannot be examined ({error.strerror})"
        return None

    def open(self, place: Place, deadline: float) -> Channel:
        """Return a connection to the receiver of a place. Raises Absent, Refused.

        deadline: on time.monotonic().
        """
        if place.owner not in self.owners:
            raise Refused("its mount namespace's owner does not own the process")
        if not place.is_host and self._is_hosts(place):
            raise Absent("its socket is the host's own")
        channel, found = connect(place, deadline)
        try:
            check_listener(channel, found, place, self.host, self.enclosing, self.owners)
        except BaseException:
            channel.close()
            raise
        return channel

    def _is_hosts(self, place: Place) -> bool:
        """Whether the socket is the host's, as in services with a private mount namespace.

        It saves the host's receiver a call that would be hung up on; nothing rests on it.
        """
        try:
            ours = find_socket(self.host.root)
        except Refused:
            return False
        try:
            theirs = find_socket(place.root)
            try:
                return os.path.samestat(os.fstat(ours), os.fstat(theirs))
            finally:
                os.close(theirs)
        finally:
            os.close(ours)
