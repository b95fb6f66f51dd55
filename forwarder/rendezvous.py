"""The way to a receiver's socket, and who listens there.

Everything below a container's root belongs to the container: it may be a link, a FIFO, a socket of somebody else, and
may be swapped at any moment. So the path is walked by descriptors, the socket is connected through its descriptor, and
what counts in the end is the kernel's word on who listens at the other end of the very connection that gets the core.

Import budget: on the stub's start-up path, see `forwarder/stub.py`.
"""

from __future__ import annotations

import _socket
import _struct
import posix
import time

from forwarder import namespaces
from receiver.protocol import Channel

DIRECTORY = "run"
NAME = "core_pipe.socket"
# <asm-generic/socket.h>
SO_PASSRIGHTS = 83
S_IFMT, S_IFSOCK = 0o170000, 0o140000


class Refused(Exception):
    """This place may not or will not take the core. The text is one line for people; no byte of a stranger's in it."""


class Absent(Refused):
    """There is no receiver here, which is nobody's fault."""


class Known(Refused):
    """This root was asked already, by another name."""


class Place:
    """A root directory in which a receiver's socket may stand. Owns its descriptor.

    process: proc directory of a process that has this root. root_path: that root as /proc names it, for comparing.
    pid_ns, mnt_ns: the process's namespaces. owner: the user namespace that owns the mount namespace. is_host: the
    host's own. Making one touches no file system of the container's: whatever is mounted there, it cannot hang.
    """

    __slots__ = ("is_host", "mnt_ns", "name", "owner", "pid_ns", "process", "root_path")

    def __init__(self, name: str, directory: str | int, *, is_host: bool = False) -> None:
        """Take the root and namespaces of a process. directory: its proc directory. Raises OSError."""
        self.name = name
        self.is_host = is_host
        if isinstance(directory, str):
            self.process = posix.open(directory, posix.O_PATH | posix.O_DIRECTORY | posix.O_CLOEXEC)
        else:
            self.process = posix.dup(directory)
        try:
            self.root_path = posix.readlink(b"root", dir_fd=self.process)
            self.pid_ns = namespaces.identity_of(self.process, "pid")
            mnt_ns = namespaces.open_namespace(self.process, "mnt")
            try:
                self.mnt_ns = namespaces.identity(mnt_ns)
                self.owner = namespaces.owner_of(mnt_ns)
            finally:
                posix.close(mnt_ns)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        if self.process >= 0:
            posix.close(self.process)
            self.process = -1

    def open_root(self) -> int:
        """Return an O_PATH descriptor of the root. May hang (NFS). Raises Absent."""
        try:
            return posix.open("root", posix.O_PATH | posix.O_DIRECTORY | posix.O_CLOEXEC, dir_fd=self.process)
        except OSError as error:
            raise Absent(f"its root is gone ({error.strerror})") from None


def find_socket(root: int) -> int:
    """Return an O_PATH descriptor of the socket below a root. Raises Absent, Refused.

    O_NOFOLLOW with O_PATH gives the link itself: an absolute one would be resolved against *our* root and name a
    socket of the host (H2 in the field's list: Apport handed cores to the host's sockets that way).
    """
    try:
        directory = posix.open(
            DIRECTORY, posix.O_PATH | posix.O_NOFOLLOW | posix.O_DIRECTORY | posix.O_CLOEXEC, dir_fd=root
        )
    except (FileNotFoundError, ProcessLookupError):
        # ESRCH: the root is the proc directory of a process that is no more, as Chrome's sandbox has it (H20).
        raise Absent(f"there is no /{DIRECTORY}") from None
    except OSError as error:
        # ENOTDIR is what a symlink gives here.
        raise Refused(f"/{DIRECTORY} is not a directory that can be entered ({error.strerror})") from None
    try:
        sock = posix.open(NAME, posix.O_PATH | posix.O_NOFOLLOW | posix.O_CLOEXEC, dir_fd=directory)
    except FileNotFoundError:
        raise Absent(f"there is no /{DIRECTORY}/{NAME}") from None
    except OSError as error:
        raise Refused(f"/{DIRECTORY}/{NAME} cannot be opened ({error.strerror})") from None
    finally:
        posix.close(directory)
    if posix.fstat(sock).st_mode & S_IFMT != S_IFSOCK:
        posix.close(sock)
        raise Refused(f"/{DIRECTORY}/{NAME} is not a socket")
    return sock


class Found:
    """A connection to the socket of a place, and what fstat says of the socket's file: uid (ours) and mode."""

    __slots__ = ("channel", "mode", "uid")

    def __init__(self, channel: Channel, uid: int, mode: int) -> None:
        self.channel = channel
        self.uid = uid
        self.mode = mode


def connect(root: int, deadline: float, other_than: posix.stat_result | None = None) -> Found:
    """Return a connection to the socket below a root. Raises Absent, Refused.

    deadline: on time.monotonic(). A listener whose backlog is full makes connect(2) wait (H1: for ever, in Apport).
    other_than: a socket that is absent here, whatever name it has.
    """
    path = find_socket(root)
    try:
        found = posix.fstat(path)
        if other_than is not None and (found.st_dev, found.st_ino) == (other_than.st_dev, other_than.st_ino):
            raise Absent("its socket is the host's own")
        sock = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM | _socket.SOCK_CLOEXEC)
        try:
            left = deadline - time.monotonic()
            if left <= 0:
                raise Refused("there was no time left to connect")
            try:
                # A descriptor that the receiver sends would be closed here, and its close may last as long as he likes
                # (SO_LINGER on a full connection): the stub would hang, with the core.
                sock.setsockopt(_socket.SOL_SOCKET, SO_PASSRIGHTS, 0)
            except OSError:
                # Before 6.16 there is nothing to be done about it.
                pass
            # Not settimeout(): it makes the socket non-blocking, and then a full backlog is EAGAIN at once.
            sock.setsockopt(_socket.SOL_SOCKET, _socket.SO_SNDTIMEO, _struct.pack("ll", int(left), int(left % 1 * 1e6)))
            sock.connect(f"/proc/self/fd/{path}")
        except BlockingIOError:
            sock.close()
            raise Refused("its queue of connections stayed full until the deadline") from None
        except ConnectionRefusedError:
            sock.close()
            raise Absent("nobody listens at its socket") from None
        except OSError as error:
            sock.close()
            raise Refused(f"its socket cannot be connected ({error.strerror})") from None
        except BaseException:
            sock.close()
            raise
        return Found(Channel(sock), found.st_uid, found.st_mode)
    finally:
        posix.close(path)


def check_listener(
    found: Found,
    place: Place,
    host: Place,
    enclosing: list[namespaces.Identity],
    owners: list[namespaces.Identity],
) -> None:
    """Make sure that a connection ends inside the place, at a receiver of a root who owns the crashed process.

    It is the listener that is judged, not the path: who called listen(2), for a systemd socket the container's systemd.

    enclosing: the crashed process's pid namespace and those around it, without the
    host's. owners: its user namespace and those around it.

    Raises Refused.
    """
    channel = found.channel
    peer = channel.peer()
    if peer.pid <= 0:
        raise Refused("its listener is not visible from the host")
    listener = -1
    pidfd = None
    try:
        pidfd = channel.peer_pidfd()
        listener = posix.open(f"/proc/{peer.pid}", posix.O_PATH | posix.O_DIRECTORY | posix.O_CLOEXEC)
        if pidfd is not None and namespaces.pid_of_pidfd(pidfd) != peer.pid:
            raise Refused("its listener has ended")
        pid_ns = namespaces.identity_of(listener, "pid")
        mnt_ns = namespaces.identity_of(listener, "mnt")
        user_ns = namespaces.identity_of(listener, "user")
        root = namespaces.mapped_root(listener)
    except OSError as error:
        raise Refused(f"its listener cannot be identified ({error.strerror})") from None
    finally:
        for fd in (listener, pidfd):
            if fd is not None and fd >= 0:
                posix.close(fd)
    if place.is_host:
        inside = pid_ns == host.pid_ns
    else:
        # The host's own listener stands in the host's mount namespace, by whatever path a container got at it.
        inside = mnt_ns != host.mnt_ns and (pid_ns in enclosing or mnt_ns == place.mnt_ns)
    if not inside:
        raise Refused("its listener is not inside it")
    if user_ns not in owners:
        raise Refused("its listener's user namespace does not own the process")
    if root is None or found.uid != root or peer.uid != root:
        raise Refused("its socket and listener are not both its root's")
    if found.mode & 0o022:
        raise Refused(f"its socket may be connected by others than its root (mode {found.mode & 0o7777:04o})")
