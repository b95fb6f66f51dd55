"""The wire: any bytes give a message or a clear error, and no descriptor is ever left open."""

from __future__ import annotations

import array
import os
import socket
import struct
import threading
import time
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from receiver import protocol
from receiver.protocol import Channel, Credentials, PeerGone, ProtocolError

if TYPE_CHECKING:
    from collections.abc import Iterator

NAMES = st.text("abcdefghijklmnopqrstuvwxyz0123456789_", min_size=1, max_size=protocol.MAX_NAME)
FIELDS = st.dictionaries(NAMES, st.binary(max_size=300), max_size=protocol.MAX_FIELDS)
KNOWN_KINDS = st.integers(0, protocol.FIRST_OPTIONAL_KIND - 1)


def soon() -> float:
    return time.monotonic() + 5


def open_descriptors() -> set[str]:
    # The listing's own descriptor is among them each time, and may differ.
    return {f"{n}:{os.readlink(f'/proc/self/fd/{n}')}" for n in os.listdir("/proc/self/fd") if _is_open(int(n))}


def _is_open(fd: int) -> bool:
    try:
        os.fstat(fd)
    except OSError:
        return False
    return True


@pytest.fixture
def pair() -> Iterator[tuple[Channel, socket.socket]]:
    ours, theirs = socket.socketpair()
    channel = Channel(ours)
    with theirs:
        yield channel, theirs
    channel.close()


def raw(kind: int, fields: dict[str, bytes]) -> bytes:
    body = protocol.encode_fields(fields)
    return protocol.encode_header(kind, fields, body) + body


@given(kind=KNOWN_KINDS, fields=FIELDS)
def test_what_is_sent_arrives(kind: int, fields: dict[str, bytes]) -> None:
    ours, theirs = (Channel(sock) for sock in socket.socketpair())
    ours.send(kind, fields, soon())
    message = theirs.receive(soon())
    assert (message.kind, message.fields, message.descriptors) == (kind, fields, [])
    ours.close()
    theirs.close()


@given(data=st.binary(max_size=400))
def test_any_body_gives_fields_or_a_clear_error(data: bytes) -> None:
    for count in (0, 1, 2, 64, 255):
        try:
            fields = protocol.decode_fields(count, data)
        except ProtocolError as error:
            assert str(error).isascii()
        else:
            assert len(fields) == count
            assert protocol.encode_fields(fields) == data


@given(data=st.binary(max_size=300))
def test_any_stream_gives_a_message_or_a_clear_error(data: bytes) -> None:
    ours, theirs = socket.socketpair()
    with theirs:
        theirs.sendall(data)
        theirs.shutdown(socket.SHUT_WR)
        channel = Channel(ours)
        try:
            channel.receive(soon()).close()
        except (ProtocolError, PeerGone):
            pass
        channel.close()


@given(start=st.binary(min_size=8, max_size=8).map(lambda b: b"CP" + b[2:]))
def test_any_header_gives_bounded_work(start: bytes) -> None:
    try:
        _, count, length = protocol.decode_header(start)
    except ProtocolError:
        return
    assert count <= protocol.MAX_FIELDS
    assert length <= protocol.MAX_BODY


@given(value=st.binary(max_size=40))
def test_any_value_gives_a_number_or_a_clear_error(value: bytes) -> None:
    message = protocol.Message(1, {"n": value}, [], None, None)
    try:
        assert 0 <= message.number("n") < 1 << 64
    except ProtocolError as error:
        assert "'n'" in str(error)


@given(value=st.binary(max_size=500))
def test_printable_is_one_line_of_ascii(value: bytes) -> None:
    shown = protocol.printable(value, 200)
    assert shown.isascii()
    assert shown.isprintable()
    assert len(shown) <= 4 * 200 + 3


def test_fields_beyond_the_limits_are_not_sent() -> None:
    for fields in ({f"f{n}": b"" for n in range(65)}, {"big": bytes(65536)}, {"Name": b""}, {"n" * 33: b""}, {"": b""}):
        with pytest.raises(ProtocolError):
            protocol.encode_fields(fields)


def test_messages_of_unknown_optional_kinds_are_skipped_but_not_for_ever(pair: tuple[Channel, socket.socket]) -> None:
    channel, theirs = pair
    theirs.sendall(raw(200, {"x": b"y"}) + raw(protocol.DONE, {"state": b"stored", "unknown": b"ignored"}))
    assert channel.receive(soon()).fields["state"] == b"stored"
    theirs.sendall(raw(255, {}) * protocol.MAX_SKIPPED)
    with pytest.raises(ProtocolError, match="unknown kinds"):
        channel.receive(soon())


def test_descriptors_arrive_owned_and_close_on_exec(pair: tuple[Channel, socket.socket]) -> None:
    channel, theirs = pair
    read, write = os.pipe()
    sender = Channel(theirs.dup())
    sender.send(protocol.CORE, {"descriptors": b"core pidfd"}, soon(), descriptors=(read, write))
    sender.close()
    before = open_descriptors()
    message = channel.receive(soon())
    assert len(message.descriptors) == 2
    assert not any(os.get_inheritable(fd) for fd in message.descriptors)
    message.close()
    os.close(read)
    os.close(write)
    assert len(open_descriptors()) <= len(before)


@pytest.mark.parametrize("count", [protocol.MAX_DESCRIPTORS + 1, 200])
def test_too_many_descriptors_are_an_error_and_all_closed(pair: tuple[Channel, socket.socket], count: int) -> None:
    """H5: Apport accepted surplus descriptors in silence and did not look at MSG_CTRUNC."""
    channel, theirs = pair
    before = open_descriptors()
    fds = [os.open("/dev/null", os.O_RDONLY) for _ in range(count)]
    theirs.sendmsg([raw(protocol.CORE, {})], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))])
    for fd in fds:
        os.close(fd)
    with pytest.raises(ProtocolError, match="more"):
        channel.receive(soon())
    assert open_descriptors() == before


def test_descriptors_of_a_broken_message_are_closed(pair: tuple[Channel, socket.socket]) -> None:
    channel, theirs = pair
    before = open_descriptors()
    fd = os.open("/dev/null", os.O_RDONLY)
    theirs.sendmsg([b"CPxxxxxxyyyy"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [fd]))])
    os.close(fd)
    theirs.shutdown(socket.SHUT_WR)
    with pytest.raises((ProtocolError, PeerGone)):
        channel.receive(soon())
    assert open_descriptors() == before


def test_a_peer_that_sends_a_byte_at_a_time_meets_the_deadline(pair: tuple[Channel, socket.socket]) -> None:
    """The deadline is for the message, not for each byte of it."""
    channel, theirs = pair
    stop = threading.Event()

    def drip() -> None:
        for byte in raw(protocol.DONE, {"reason": bytes(1000)}):
            if stop.wait(0.05):
                return
            theirs.send(bytes([byte]))

    dripping = threading.Thread(target=drip)
    dripping.start()
    begun = time.monotonic()
    with pytest.raises(TimeoutError):
        channel.receive(begun + 0.5)
    assert time.monotonic() - begun < 10  # the whole message takes 50 s
    stop.set()
    dripping.join()


def test_a_peer_that_does_not_read_meets_the_deadline(pair: tuple[Channel, socket.socket]) -> None:
    channel, _ = pair
    with pytest.raises(TimeoutError):
        for _ in range(1000):
            channel.send(protocol.OFFER, {"x": bytes(60000)}, time.monotonic() + 0.2)


def test_a_peer_that_hangs_up_within_a_message(pair: tuple[Channel, socket.socket]) -> None:
    channel, theirs = pair
    theirs.sendall(raw(protocol.ACCEPT, {"want": b"core"})[:-1])
    theirs.close()
    with pytest.raises(PeerGone):
        channel.receive(soon())


@pytest.mark.kernel
def test_header_and_body_carry_their_own_credentials(pair: tuple[Channel, socket.socket]) -> None:
    """The kernel keeps bytes with different credentials apart, so an offer can name a process and a thread."""
    channel, theirs = pair
    channel.ask_for_credentials()
    thread_id: list[int] = []
    go, done = threading.Event(), threading.Event()

    def thread() -> None:
        thread_id.append(threading.get_native_id())
        go.set()
        done.wait(10)

    other = threading.Thread(target=thread)
    other.start()
    go.wait(10)
    sender = Channel(theirs.dup())
    sender.send(
        protocol.OFFER,
        {"signal": b"11"},
        soon(),
        credentials=(Credentials(os.getpid(), 1, 2), Credentials(thread_id[0], 3, 4)),
    )
    sender.close()
    message = channel.receive(soon())
    done.set()
    other.join()
    assert message.head_credentials is not None
    assert message.body_credentials is not None
    assert (message.head_credentials.pid, message.head_credentials.uid, message.head_credentials.gid) == (
        os.getpid(),
        1,
        2,
    )
    assert (message.body_credentials.pid, message.body_credentials.uid) == (thread_id[0], 3)


def test_header_layout_is_the_specification() -> None:
    """docs/protocol.md shows these bytes; another implementation has nothing else to go by."""
    assert raw(protocol.REFUSE, {"reason": b"full"}) == (
        b"CP" + bytes([3, 1]) + struct.pack("!I", 15) + bytes([6]) + struct.pack("!I", 4) + b"reasonfull"
    )
