"""The wire between the forwarder (client) and a receiver (server): docs/protocol.md in code.

One connection carries one crash over a stream socket::

    forwarder                          receiver
    OFFER  facts, credentials   ---->
                                <----  ACCEPT want=core | ACCEPT want=record | REFUSE reason
    CORE   the descriptors      ---->           (only after want=core)
                                <----  DONE   state, reason, size, id

A message is a header of eight bytes (magic "CP", kind, number of fields, length of the body) and a body of fields.
A field is a name and a value of any bytes: names of programs are chosen by those who crash.

Import budget: the stub imports this module for each crash. Nothing but what `forwarder/stub.py` allows.
"""

from __future__ import annotations

import _socket
import _struct
import errno
import posix
import time

VERSION = 1

OFFER = 1
ACCEPT = 2
REFUSE = 3
CORE = 4
DONE = 5
# A kind from here on may be skipped by those who do not know it; an unknown kind below is an error.
FIRST_OPTIONAL_KIND = 128

WANT_CORE = b"core"
WANT_RECORD = b"record"

MAX_BODY = 65536
MAX_FIELDS = 64
MAX_NAME = 32
# CORE carries one or two; room for more lets us see, count and close a surplus. Beyond: MSG_CTRUNC.
MAX_DESCRIPTORS = 8
# A peer may send messages that we skip, but not for ever.
MAX_SKIPPED = 16

MAGIC = b"CP"
_HEADER = _struct.Struct("!2sBBI")
_FIELD = _struct.Struct("!BI")
_NAME_BYTES = frozenset(b"abcdefghijklmnopqrstuvwxyz0123456789_")

# <asm-generic/socket.h>; alpha, mips, parisc and sparc have others, which the _socket module knows where it was built.
SO_PASSCRED: int = getattr(_socket, "SO_PASSCRED", 16)
SCM_CREDENTIALS: int = getattr(_socket, "SCM_CREDENTIALS", 2)
# Since 6.5 (7b26952a91cf); Python has no name for it.
SO_PEERPIDFD = 77
_UCRED = _struct.Struct("iII")
_ANCILLARY_ROOM = _socket.CMSG_SPACE(4 * MAX_DESCRIPTORS) + _socket.CMSG_SPACE(_UCRED.size)


class ProtocolError(ValueError):
    """What the peer sent is not this protocol. The text is for people and holds no byte of the peer's."""


class PeerGone(ConnectionError):
    """The peer hung up before a message was complete."""


class Credentials:
    """SCM_CREDENTIALS or SO_PEERCRED, translated by the kernel into *our* pid and user namespaces.

    pid 0: not visible from our pid namespace. uid and gid 65534 (overflowuid): not mapped into our user namespace.
    """

    __slots__ = ("gid", "pid", "uid")

    def __init__(self, pid: int, uid: int, gid: int) -> None:
        self.pid = pid
        self.uid = uid
        self.gid = gid

    def pack(self) -> bytes:
        return _UCRED.pack(self.pid, self.uid, self.gid)


class Message:
    """A message and the descriptors that came with it, which it owns until `take` or `close`.

    Fields
    ------
    kind: one of OFFER ... DONE, or an unknown one.
    fields: values of any bytes by name; unknown names are to be ignored.
    head_credentials, body_credentials: of the message's header and of its body; in an OFFER the first names the
        crashed process (thread group), the second the dumping thread.

    """

    __slots__ = ("body_credentials", "descriptors", "fields", "head_credentials", "kind")

    def __init__(
        self,
        kind: int,
        fields: dict[str, bytes],
        descriptors: list[int],
        head_credentials: Credentials | None,
        body_credentials: Credentials | None,
    ) -> None:
        self.kind = kind
        self.fields = fields
        self.descriptors = descriptors
        self.head_credentials = head_credentials
        self.body_credentials = body_credentials

    def take(self) -> list[int]:
        """Make the caller the owner of the descriptors."""
        taken, self.descriptors = self.descriptors, []
        return taken

    def close(self) -> None:
        close_all(self.take())

    def number(self, name: str, default: int | None = None) -> int:
        """Return a field that is a decimal number below 2^64.

        Raises ProtocolError when it is not one, or is missing and there is no default.
        """
        value = self.fields.get(name)
        if value is None:
            if default is None:
                raise ProtocolError(f"the field '{name}' is missing")
            return default
        # isdigit() of bytes is ASCII only; the length bounds the work of int().
        if not value.isdigit() or len(value) > 20 or int(value) >= 1 << 64:
            raise ProtocolError(f"the field '{name}' is not a number below 2^64")
        return int(value)


def close_all(descriptors: list[int]) -> None:
    for fd in descriptors:
        try:
            posix.close(fd)
        except OSError:
            # close(2): the descriptor is gone whatever it says.
            pass


def printable(text: bytes, limit: int = 200) -> str:
    """Bytes from a stranger as one line of ASCII for logs and records: escaped, and cut after `limit` bytes."""
    shown = text[:limit].decode("ascii", "backslashreplace")
    shown = "".join(c if " " <= c <= "~" else f"\\x{ord(c):02x}" for c in shown)
    return shown + "..." if len(text) > limit else shown


def encode_fields(fields: dict[str, bytes]) -> bytes:
    """Return the body of a message. Raises ProtocolError when a limit of the protocol would be broken."""
    if len(fields) > MAX_FIELDS:
        raise ProtocolError(f"{len(fields)} fields; the protocol allows {MAX_FIELDS}")
    parts = []
    for name, value in fields.items():
        raw = name.encode("ascii")
        if not 0 < len(raw) <= MAX_NAME or not _NAME_BYTES.issuperset(raw):
            raise ProtocolError(f"{name!r} is no name of a field: 1 to {MAX_NAME} of a-z, 0-9 and _")
        parts.append(_FIELD.pack(len(raw), len(value)) + raw + value)
    body = b"".join(parts)
    if len(body) > MAX_BODY:
        raise ProtocolError(f"a body of {len(body)} bytes; the protocol allows {MAX_BODY}")
    return body


def encode_header(kind: int, fields: dict[str, bytes], body: bytes) -> bytes:
    return _HEADER.pack(MAGIC, kind, len(fields), len(body))


def decode_header(header: bytes) -> tuple[int, int, int]:
    """Return kind, number of fields and length of the body. Raises ProtocolError."""
    if len(header) != _HEADER.size:
        raise ProtocolError(f"a header of {len(header)} bytes; it has {_HEADER.size}")
    magic, kind, count, length = _HEADER.unpack(header)
    if magic != MAGIC:
        raise ProtocolError("the header does not begin with 'CP'")
    if count > MAX_FIELDS:
        raise ProtocolError(f"{count} fields; the protocol allows {MAX_FIELDS}")
    if length > MAX_BODY:
        raise ProtocolError(f"a body of {length} bytes; the protocol allows {MAX_BODY}")
    return kind, count, length


def decode_fields(count: int, body: bytes) -> dict[str, bytes]:
    """Return the fields of a body. Raises ProtocolError."""
    fields: dict[str, bytes] = {}
    at = 0
    for _ in range(count):
        if at + _FIELD.size > len(body):
            raise ProtocolError("the body ends within a field")
        name_length, value_length = _FIELD.unpack_from(body, at)
        at += _FIELD.size
        end = at + name_length + value_length
        if end > len(body):
            raise ProtocolError("the body ends within a field")
        raw = body[at : at + name_length]
        if not 0 < name_length <= MAX_NAME or not _NAME_BYTES.issuperset(raw):
            raise ProtocolError("the name of a field is not 1 to 32 of a-z, 0-9 and _")
        name = raw.decode("ascii")
        if name in fields:
            raise ProtocolError(f"the field '{name}' stands twice")
        fields[name] = body[at + name_length : end]
        at = end
    if at != len(body):
        raise ProtocolError("there are bytes after the last field")
    return fields


class Channel:
    """A connected stream socket that speaks messages. Owns the socket."""

    __slots__ = ("_sock",)

    def __init__(self, sock: _socket.socket) -> None:
        self._sock = sock

    def fileno(self) -> int:
        return self._sock.fileno()

    def close(self) -> None:
        self._sock.close()

    def detach(self) -> int:
        """Make the caller the owner of the socket's descriptor."""
        return self._sock.detach()

    def send(
        self,
        kind: int,
        fields: dict[str, bytes],
        deadline: float,
        descriptors: tuple[int, ...] = (),
        credentials: tuple[Credentials, Credentials] | None = None,
    ) -> None:
        """Send one message.

        deadline: on time.monotonic(). descriptors: stay the caller's. credentials: those of the header and of the body;
        both must be ones that the kernel lets us name (unix(7): CAP_SYS_ADMIN for the pid, CAP_SETUID, CAP_SETGID).

        Raises ProtocolError, TimeoutError, OSError (EPIPE and ECONNRESET: the peer hung up).
        """
        body = encode_fields(fields)
        header = encode_header(kind, fields, body)
        if credentials is None:
            ancillary = [(_socket.SOL_SOCKET, _socket.SCM_RIGHTS, _struct.pack(f"{len(descriptors)}i", *descriptors))]
            self._send_all(header + body, ancillary if descriptors else [], deadline)
        else:
            # A receiver reads header and body apart, and the kernel keeps bytes with different credentials apart.
            head, tail = credentials
            self._send_all(header, [(_socket.SOL_SOCKET, SCM_CREDENTIALS, head.pack())], deadline)
            self._send_all(body, [(_socket.SOL_SOCKET, SCM_CREDENTIALS, tail.pack())], deadline)

    def _send_all(self, data: bytes, ancillary: list[tuple[int, int, bytes]], deadline: float) -> None:
        rest = memoryview(data)
        while rest:
            self._arm(deadline)
            # Ancillary data travels with the first byte: it must not be sent again with the rest.
            sent = self._sock.sendmsg([rest], ancillary, _socket.MSG_NOSIGNAL)
            ancillary = []
            rest = rest[sent:]

    def _arm(self, deadline: float) -> None:
        left = deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError("the deadline is over")
        self._sock.settimeout(left)

    def receive(self, deadline: float) -> Message:
        """Return the next message whose kind is known; the caller owns it and its descriptors.

        deadline: on time.monotonic().

        Raises ProtocolError, PeerGone, TimeoutError, OSError; no descriptor stays open then.
        """
        for _ in range(MAX_SKIPPED):
            message = self.receive_any(deadline)
            if message.kind < FIRST_OPTIONAL_KIND:
                return message
            message.close()
        raise ProtocolError("only messages of unknown kinds")

    def receive_any(self, deadline: float) -> Message:
        """Receive one message, which may be one to skip (FIRST_OPTIONAL_KIND). Otherwise as `receive`."""
        descriptors: list[int] = []
        try:
            header, head_credentials = self._receive_exactly(_HEADER.size, descriptors, deadline)
            kind, count, length = decode_header(header)
            body, body_credentials = self._receive_exactly(length, descriptors, deadline)
            fields = decode_fields(count, body)
        except BaseException:
            close_all(descriptors)
            raise
        return Message(kind, fields, descriptors, head_credentials, body_credentials)

    def _receive_exactly(
        self, length: int, descriptors: list[int], deadline: float
    ) -> tuple[bytes, Credentials | None]:
        """Return `length` bytes and the credentials that came with the last of them; add descriptors to the list."""
        parts = []
        credentials = None
        while length:
            self._arm(deadline)
            # socket.recv_fds() ignores its flags (cpython#107898), so it cannot ask for close-on-exec.
            data, ancillary, flags, _ = self._sock.recvmsg(length, _ANCILLARY_ROOM, _socket.MSG_CMSG_CLOEXEC)
            # First every descriptor, then what may be wrong: what is not in the list would stay open.
            for level, kind, value in ancillary:
                if level != _socket.SOL_SOCKET:
                    continue
                if kind == _socket.SCM_RIGHTS:
                    descriptors.extend(_struct.unpack(f"{len(value) // 4}i", value[: len(value) // 4 * 4]))
                elif kind == SCM_CREDENTIALS and len(value) == _UCRED.size:
                    credentials = Credentials(*_UCRED.unpack(value))
            if flags & _socket.MSG_CTRUNC:
                raise ProtocolError("more ancillary data than the protocol allows")
            if len(descriptors) > MAX_DESCRIPTORS:
                raise ProtocolError("more descriptors than the protocol allows")
            if not data:
                raise PeerGone("the peer hung up")
            parts.append(data)
            length -= len(data)
        return b"".join(parts), credentials

    def peer(self) -> Credentials:
        """Return who connected (asked by a server) or who called listen() (asked by a client): SO_PEERCRED."""
        return Credentials(*_UCRED.unpack(self._sock.getsockopt(_socket.SOL_SOCKET, _socket.SO_PEERCRED, _UCRED.size)))

    def ask_for_credentials(self) -> None:
        """Turn SO_PASSCRED on, so that what arrives from now on carries credentials."""
        self._sock.setsockopt(_socket.SOL_SOCKET, SO_PASSCRED, 1)

    def peer_pidfd(self) -> int | None:
        """Return a pidfd of the process that `peer` names, None where the kernel has none to give (before 6.5).

        Raises OSError when that process has ended.
        """
        try:
            fd = self._sock.getsockopt(_socket.SOL_SOCKET, SO_PEERPIDFD)
        except OSError as error:
            if error.errno == errno.ENOPROTOOPT:
                return None
            raise
        posix.set_inheritable(fd, False)
        return fd
