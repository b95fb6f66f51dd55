"""A receiver that misbehaves: `fake_receiver.py MODE [PATH]`, run inside a container. Says "ready" when it listens.

Modes::

    refuse        refuses each offer, with a reason full of control characters
    silent        accepts connections and never answers
    backlog       never accepts, and its queue is full
    garbage       answers with bytes that are no message
    hangup        hangs up on each offer
    keep          takes the core, reads it to its end, says done, and keeps the descriptor
    fork-keep     the same with the descriptor in a child, and ends
    stop          takes the core and reads nothing
    drip          takes the core and reads a byte a second
    vanish        takes the core and exits
    lie           takes the core, reads nothing, and says done
    slow          reads 64 KiB each 50 ms: slow, but honest
    chatter       the same, and says things in between that are to be skipped
    halting       the same, and is held up in the middle of one, for longer than the forwarder looks at a time
    descriptor    accepts with a descriptor that nobody asked for, and takes the core
"""

from __future__ import annotations

import os
import socket
import sys
import time

from receiver import protocol

LONG = 1e9
kept: list[int] = []


def main() -> None:
    mode = sys.argv[1]
    path = sys.argv[2] if len(sys.argv) > 2 else "/run/core_pipe.socket"
    os.umask(0o177)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(path)
    listener.listen(0 if mode == "backlog" else 64)
    fillers = []
    if mode == "backlog":
        while True:
            filler = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            filler.setblocking(False)
            fillers.append(filler)
            try:
                filler.connect(path)
            except BlockingIOError:
                break
    print("ready", flush=True)
    while mode == "backlog":
        time.sleep(LONG)
    while True:
        connection, _ = listener.accept()
        serve(connection, mode)


def serve(connection: socket.socket, mode: str) -> None:
    channel = protocol.Channel(connection)
    if mode == "silent":
        kept.append(connection.detach())
        return
    try:
        channel.receive(time.monotonic() + 10).close()
    except (ConnectionError, protocol.ProtocolError):
        return
    deadline = time.monotonic() + LONG
    if mode == "hangup":
        channel.close()
        return
    if mode == "garbage":
        connection.sendall(b"\x00\xff" * 100)
        kept.append(connection.detach())
        return
    if mode == "refuse":
        channel.send(protocol.REFUSE, {"reason": b"no\nroom\x1b[31m \xff"}, deadline)
        return
    if mode == "descriptor":
        try:
            channel.send(protocol.ACCEPT, {"want": b"core"}, deadline, descriptors=(2,))
        except PermissionError:
            # The stub has told the kernel to let none through (SO_PASSRIGHTS).
            channel.send(protocol.REFUSE, {"reason": b"it takes no descriptor"}, deadline)
            return
    else:
        channel.send(protocol.ACCEPT, {"want": b"core"}, deadline)
    core = channel.receive(deadline).take()[0]
    take(channel, core, mode, deadline)
    kept.append(connection.detach())


def take(channel: protocol.Channel, core: int, mode: str, deadline: float) -> None:
    if mode == "vanish":
        os._exit(0)
    if mode in ("stop", "lie"):
        kept.append(core)
    while mode == "drip" and os.read(core, 1):
        time.sleep(1)
    blocks = 0
    while mode in ("keep", "fork-keep", "slow", "chatter", "halting", "descriptor") and os.read(core, 65536):
        blocks += 1
        if mode == "chatter" and blocks % 10 == 0:
            channel.send(200, {"so_far": b"so good"}, deadline)
        if mode == "halting" and blocks == 10:
            fields = {"so_far": b"so good"}
            body = protocol.encode_fields(fields)
            channel._sock.sendall(protocol.encode_header(200, fields, body))
            time.sleep(1.5)
            channel._sock.sendall(body)
        if mode in ("slow", "chatter", "halting"):
            time.sleep(0.05)
    if mode in ("slow", "chatter", "halting", "descriptor"):
        os.close(core)
    if mode == "fork-keep" and os.fork() == 0:
        time.sleep(LONG)
    if mode in ("keep", "lie", "slow", "chatter", "halting", "descriptor", "fork-keep"):
        channel.send(protocol.DONE, {"state": b"stored", "size": b"1"}, deadline)
    if mode == "fork-keep":
        os._exit(0)


if __name__ == "__main__":
    main()
