"""The kernel's own word on disk quotas (fs/quota/netlink.c, <linux/quota.h>), by way of pyroute2.

pyroute2 opens the socket and finds the family; it takes a fifth of a second to import, so it is imported here and by
nobody on a crash's path. Reading is done here: pyroute2's own runs in an event loop that ends for good at the first
overrun, and a container can have the kernel warn as fast as it makes and removes a file.

The kernel warns in the initial network namespace only, with ids of the initial user namespace, and not every file
system has quotas that it warns of: ext4, xfs and tmpfs do, btrfs does not.
"""

from __future__ import annotations

import contextlib
import errno
import socket
import struct
from typing import TYPE_CHECKING, NamedTuple, Self

from forwarder.proc_events import SO_RCVBUFFORCE, Unavailable

if TYPE_CHECKING:
    from types import TracebackType

FAMILY, GROUP = "VFS_DQUOT", "events"

# <linux/netlink.h>, <linux/genetlink.h>
NETLINK_GENERIC = 16
NLMSG_ERROR = 2
NLM_F_REQUEST = 1
SOL_NETLINK = 270
NETLINK_ADD_MEMBERSHIP = 1
GENL_ID_CTRL = 16
CTRL_CMD_GETFAMILY = 3
CTRL_ATTR_FAMILY_NAME = 2

# <linux/quota.h>
QUOTA_NL_C_WARNING = 1
QUOTA_NL_A_QTYPE, QUOTA_NL_A_EXCESS_ID, QUOTA_NL_A_WARNING = 1, 2, 3
QUOTA_NL_A_DEV_MAJOR, QUOTA_NL_A_DEV_MINOR, QUOTA_NL_A_CAUSED_ID = 4, 5, 6
USER, GROUPS, PROJECT = "user", "group", "project"
TYPES = {0: USER, 1: GROUPS, 2: PROJECT}
OTHER = "other"
KINDS = {
    1: "inodes_hard",
    2: "inodes_grace",
    3: "inodes_soft",
    4: "space_hard",
    5: "space_grace",
    6: "space_soft",
    7: "inodes_below_hard",
    8: "inodes_below_soft",
    9: "space_below_hard",
    10: "space_below_soft",
}

# struct nlmsghdr, struct genlmsghdr, struct nlattr.
_NLMSGHDR = struct.Struct("=IHHII")
_GENLMSGHDR = struct.Struct("=BBH")
_NLATTR = struct.Struct("=HH")
_HEAD = _NLMSGHDR.size + _GENLMSGHDR.size
_SIZES = {4: struct.Struct("=I"), 8: struct.Struct("=Q")}

# One warning has 76 bytes, and some 800 as the kernel counts them: some ten thousand may wait.
RECEIVE_BUFFER = 8 << 20
PROBE_SECONDS = 2.0
# Others' messages have no end; the watcher's other work does not wait for it.
MAX_PASSED_OVER = 1000


class Warned(NamedTuple):
    """The kernel warned. Numbers are the initial user namespace's.

    sequence: counts all the kernel's warnings, modulo 2^32. kind, type: the words above. number: whose quota it is.
    device: "MAJOR:MINOR". caused_by: the uid of the process that got there.
    """

    sequence: int
    kind: str
    type: str
    number: int
    device: str
    caused_by: int


class QuotaEvents:
    """Listens for warnings. Owns its sockets; a context manager.

    lost: how many the kernel sent that could not wait: told by its own count of them.
    """

    def __init__(self) -> None:
        """Subscribe. Raises Unavailable."""
        try:
            # The import that this module is for; see above.
            from pyroute2.netlink.event import dquot  # type: ignore[import-untyped]  # noqa: PLC0415
        except ImportError as error:
            raise Unavailable(f"pyroute2 is not there ({error}): install this package with its dependencies") from None
        if not kernel_tells():
            # Asked before, because pyroute2 writes a line of its own about a family that is not there.
            raise Unavailable(
                "this kernel has no disk quota netlink: use one with CONFIG_QUOTA_NETLINK_INTERFACE, and run this in "
                "the host's own network namespace"
            )
        self._first = self._last = -1
        self._received = 0
        try:
            self._netlink = dquot.DQuotSocket()
        except OSError as error:
            raise Unavailable(f"there is no generic netlink ({error.strerror}): use a kernel with CONFIG_NET") from None
        try:
            self._netlink.bind()
            group = self._netlink.mcast_groups[GROUP]
            # A socket of our own: what happens to it is not for pyroute2's event loop to know.
            self._socket = socket.socket(
                socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK, NETLINK_GENERIC
            )
        except (OSError, KeyError) as error:
            raise _refused(error) from None
        finally:
            self._netlink.close()
        try:
            self._enlarge()
            self._socket.bind((0, 0))
            self._socket.setsockopt(SOL_NETLINK, NETLINK_ADD_MEMBERSHIP, group)
        except OSError as error:
            self._socket.close()
            raise _refused(error) from None

    def _enlarge(self) -> None:
        try:
            self._socket.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, RECEIVE_BUFFER)
        except OSError:
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, RECEIVE_BUFFER)

    @property
    def lost(self) -> int:
        return (self._last - self._first & 0xFFFFFFFF) + 1 - self._received if self._received else 0

    def fileno(self) -> int:
        """Return the descriptor to poll."""
        return self._socket.fileno()

    def read(self) -> Warned | None:
        """Return one warning, or None when there is none at the moment. Raises OSError."""
        for _ in range(MAX_PASSED_OVER):
            try:
                data, sender = self._socket.recvfrom(4096)
            except BlockingIOError:
                return None
            except OSError as error:
                # What did not fit is seen in the kernel's count.
                if error.errno in (errno.ENOBUFS, errno.EINTR):
                    continue
                raise
            # Port 0 is the kernel's: whoever has CAP_NET_ADMIN on the host may send to the group, too.
            if sender[0] == 0 and (found := parse(data)) is not None:
                self._count(found.sequence)
                return found
        return None

    def _count(self, sequence: int) -> None:
        if not self._received:
            self._first = self._last = sequence
        # Two processors may bring theirs in another order than they were counted.
        elif sequence - self._last & 0xFFFFFFFF < 1 << 31:
            self._last = sequence
        elif sequence - self._first & 0xFFFFFFFF >= 1 << 31:
            self._first = sequence
        self._received += 1

    def close(self) -> None:
        self._socket.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _refused(error: Exception) -> Unavailable:
    return Unavailable(f"the kernel does not let us listen ({error}): run it on the host itself, as root")


def parse(data: bytes) -> Warned | None:
    """Return what one datagram says, None when it is no warning."""
    if len(data) < _HEAD:
        return None
    length, message, _flags, sequence, _port = _NLMSGHDR.unpack_from(data)
    command, _version, _reserved = _GENLMSGHDR.unpack_from(data, _NLMSGHDR.size)
    if length > len(data) or message <= GENL_ID_CTRL or command != QUOTA_NL_C_WARNING:
        return None
    said: dict[int, int] = {}
    at = _HEAD
    while at + _NLATTR.size <= length:
        size, attribute = _NLATTR.unpack_from(data, at)
        if size < _NLATTR.size or at + size > length:
            return None
        value = _SIZES.get(size - _NLATTR.size)
        if value is not None:
            (said[attribute],) = value.unpack_from(data, at + _NLATTR.size)
        at += size + 3 & ~3
    try:
        return Warned(
            sequence,
            KINDS.get(said[QUOTA_NL_A_WARNING], OTHER),
            TYPES.get(said[QUOTA_NL_A_QTYPE], OTHER),
            said[QUOTA_NL_A_EXCESS_ID],
            f"{said[QUOTA_NL_A_DEV_MAJOR]}:{said[QUOTA_NL_A_DEV_MINOR]}",
            said[QUOTA_NL_A_CAUSED_ID],
        )
    except KeyError:
        return None


def kernel_tells() -> bool:
    """Whether this kernel, in this network namespace, has the family. Asks it, and needs no privilege."""
    name = FAMILY.encode("ascii") + b"\0"
    attribute = _NLATTR.pack(_NLATTR.size + len(name), CTRL_ATTR_FAMILY_NAME) + name
    attribute += bytes(-len(attribute) % 4)
    body = _GENLMSGHDR.pack(CTRL_CMD_GETFAMILY, 1, 0) + attribute
    with (
        contextlib.suppress(OSError),
        socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, NETLINK_GENERIC) as asking,
    ):
        asking.settimeout(PROBE_SECONDS)
        asking.bind((0, 0))
        asking.sendto(_NLMSGHDR.pack(_NLMSGHDR.size + len(body), GENL_ID_CTRL, NLM_F_REQUEST, 1, 0) + body, (0, 0))
        answer, sender = asking.recvfrom(8192)
        if sender[0] == 0 and len(answer) >= _NLMSGHDR.size:
            return int(_NLMSGHDR.unpack_from(answer)[1]) == GENL_ID_CTRL
    return False
