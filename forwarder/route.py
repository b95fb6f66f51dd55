"""Which receivers may have a core, nearest first.

"The nearest enclosing receiver wins": the root that the crashed process sees, then the containers around it from the
inside out, then the host. "A core only flows to those who own the process": to a mount namespace whose owning user
namespace is the process's own or one around it.

Import budget: on the stub's start-up path, see `forwarder/stub.py`.
"""

from __future__ import annotations

import _socket
import posix
import time

from forwarder import apart, namespaces
from forwarder.rendezvous import Absent, Found, Known, Place, Refused, check_listener, connect, find_socket
from receiver.protocol import Channel

TYPE_CHECKING = False  # typing's own would cost the stub four milliseconds
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from forwarder.crash import Crash

DUMPABLE_BY_USER = 1


class Route:
    """The places for one crash. Owns their descriptors.

    Raises OSError when the process is gone.
    """

    def __init__(
        self, crash: Crash, *, seconds: float, let_go: tuple[int, ...] = (), hold: tuple[int, ...] = ()
    ) -> None:
        """Find out where the process lives. seconds: how long its file systems may take to answer.

        let_go: descriptors that a process which touches them must not hold: the core. hold: those that it must: the
        lock of its container's share, which goes on counting where it hangs.
        """
        self.hold = hold
        self.crash = crash
        self.seconds = seconds
        self.let_go = (*let_go, crash.pidfd)
        # Who looks for the facts of the crash, and what was found: None before that.
        self._look: apart.Look | None = None
        self._facts: dict[str, bytes] | None = None
        self._foreign: str | None = None
        self._asked: dict[tuple[namespaces.Identity, bytes, bytes], Place] = {}
        self._hanging: list[tuple[namespaces.Identity, bytes]] = []
        # Whether a process was left behind, see `forwarder/apart.py`.
        self.stuck = False
        self.host = Place("host", "/proc/self", is_host=True)
        pid_ns = namespaces.open_namespace(crash.task, "pid")
        user_ns = namespaces.open_namespace(crash.task, "user")
        self._pid_ns = pid_ns
        self._pid_chain = namespaces.ancestry(pid_ns)
        self.owners = namespaces.ancestry(user_ns)
        posix.close(user_ns)
        self.enclosing = [ns for ns in self._pid_chain if ns != self.host.pid_ns]
        if crash.own_pid == 1 and self.enclosing:
            # A dying init takes its whole pid namespace with it: nobody in there will finish a core.
            del self.enclosing[0]

    def close(self) -> None:
        """Let go of everything. Waits for a child that may be stuck, so nothing of the core may be held any more."""
        try:
            self.facts()
        except Refused:
            pass
        self.host.close()
        posix.close(self._pid_ns)

    @property
    def is_container(self) -> bool:
        """Whether the process lives in a pid namespace other than the host's."""
        return self._pid_chain[0] != self.host.pid_ns

    def places(self) -> Iterator[Place]:
        """Yield where to ask, nearest first, the host last. Each is closed when the next is asked for."""
        if self.host_only_because() is None:
            for place in self._containers():
                try:
                    if (place.mnt_ns, place.root_path) != (self.host.mnt_ns, self.host.root_path):
                        yield place
                finally:
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
        namespace: int | None = posix.dup(self._pid_ns)
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
                            posix.close(init)
                outer = namespaces.parent_of(namespace)
            finally:
                posix.close(namespace)
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
        if self._foreign is None:
            self._foreign = self._why_foreign()
        return self._foreign or None

    def _why_foreign(self) -> str:
        """Return why the program is not the container's, empty when it is."""

        def owner() -> apart.Answer:
            return {"uid": b"%d" % posix.stat("exe", dir_fd=self.crash.task).st_uid}, None

        try:
            answer = apart.ask(owner, time.monotonic() + self.seconds, self.let_go)
            if namespaces.is_mapped(self.crash.task, answer.number("uid")):
                return ""
        except (apart.Stuck, OSError, ValueError) as error:
            self.stuck = self.stuck or isinstance(error, apart.Stuck)
            return "it is not dumpable by its user, and its program cannot be examined"
        return "it is not dumpable by its user, and its program belongs to somebody outside its user namespace"

    def open(self, place: Place, deadline: float) -> Channel:
        """Return a connection to the receiver of a place. Raises Absent, Refused.

        deadline: on time.monotonic().
        """
        if place.owner not in self.owners:
            raise Refused("its mount namespace's owner does not own the process")
        found = self._reach(place, deadline)
        try:
            check_listener(found, place, self.host, self.enclosing, self.owners)
        except BaseException:
            found.channel.close()
            raise
        return found.channel

    def _reach(self, place: Place, deadline: float) -> Found:
        """Connect to a container's socket from a process apart. Raises Absent, Refused."""
        if (place.mnt_ns, place.root_path) in self._hanging:
            raise Known("it did not answer before")
        hosts = None if place.is_host else self._hosts_socket()

        def is_known(mount: bytes) -> bool:
            return self._asked.get((place.mnt_ns, place.root_path, mount), place) is not place

        try:
            if self._look is None and self._facts is None:
                self._look = self._start_look(place, deadline, hosts)
                answer = self._look.answer()
            else:
                answer = apart.ask(lambda: reach(place, deadline, hosts, is_known), deadline, self.let_go)
        except apart.Stuck as stuck:
            self.stuck = True
            # Whatever its mount is: those that look like it are not worth the wait.
            self._hanging.append((place.mnt_ns, place.root_path))
            # The next child shall not read what this one may be stuck at.
            self._end_look({})
            raise Refused(str(stuck)) from None
        if "known" in answer.fields:
            raise Known("it was asked already")
        # The same place may be asked again, when its receiver is busy.
        self._asked[place.mnt_ns, place.root_path, answer.fields.get("mount", b"")] = place
        if "absent" in answer.fields:
            raise Absent(answer.fields["absent"].decode())
        if "refused" in answer.fields or len(answer.descriptors) != 1:
            raise Refused(answer.fields.get("refused", b"its socket cannot be connected").decode())
        sock = _socket.socket(fileno=answer.take()[0])
        return Found(Channel(sock), answer.number("uid"), answer.number("mode"))

    def facts(self) -> dict[str, bytes]:
        """Return the facts of the crash (`Crash.facts`) when they have been found.

        Raises Refused when that does not come to an end, and not again: whoever is asked next gets none.
        """
        if self._look is not None:
            found: dict[str, bytes] = {}
            try:
                found = self._look.answer().fields
            except apart.Stuck:
                # A page of it lies on a file system that has the request and keeps it.
                self.stuck = True
                raise Refused("the memory of the process does not answer") from None
            finally:
                self._end_look(found)
        return self._facts or {}

    def _end_look(self, facts: dict[str, bytes]) -> None:
        if self._look is not None:
            self._look.close()
            self._look = None
        if self._facts is None:
            self._facts = facts

    def _start_look(self, place: Place, deadline: float, hosts: posix.stat_result | None) -> apart.Look:
        """Have a process apart look at the first place, and then for the facts of the crash. Raises apart.Stuck."""
        return apart.Look(lambda: look(self.crash, place, deadline, hosts), deadline, self.let_go)

    def _hosts_socket(self) -> posix.stat_result | None:
        """Return the host's own socket, which services with a private mount namespace see in their own root.

        Knowing it saves the host's receiver a call that would be hung up on; nothing rests on it.
        """
        try:
            root = self.host.open_root()
            try:
                path = find_socket(root)
            finally:
                posix.close(root)
        except Refused:
            return None
        try:
            return posix.fstat(path)
        finally:
            posix.close(path)


def reach(
    place: Place,
    deadline: float,
    hosts: posix.stat_result | None,
    is_known: Callable[[bytes], bool] = lambda _mount: False,
) -> apart.Answer:
    """Connect to the socket of a place; return what is told of it, and the connection. For a process apart.

    hosts: the host's own socket. is_known: whether such a root on that mount was asked already.
    """
    mount: dict[str, bytes] = {}
    try:
        root = place.open_root()
        # A detached mount has the path "/", too: what tells roots apart is the mount.
        mount["mount"] = namespaces.mount_of(root)
        if is_known(mount["mount"]):
            return {"known": b"1"}, None
        found = connect(root, deadline, other_than=hosts)
    except Absent as absent:
        return {"absent": str(absent).encode(), **mount}, None
    except Refused as refused:
        return {"refused": str(refused).encode(), **mount}, None
    return {"uid": b"%d" % found.uid, "mode": b"%d" % found.mode, **mount}, found.channel.detach()


def look(crash: Crash, place: Place, deadline: float, hosts: posix.stat_result | None) -> Iterator[apart.Answer]:
    """Yield what `reach` returns, then the facts of a crash."""
    yield reach(place, deadline, hosts)
    yield crash.facts(), None
