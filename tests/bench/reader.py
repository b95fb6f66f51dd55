"""A receiver that reads each core to its end and keeps nothing: `reader.py PATH [--times]`, run inside a container.

The limit that no receiver can be faster than, with the forwarder as it is. With `--times` it says, a line for each
core, when it had the connection, the offer and the core's descriptor: CLOCK_MONOTONIC, ns.
"""

from __future__ import annotations

import os
import socket
import sys
import time

from receiver import protocol
from receiver.stream import Stream

DEADLINE_SECONDS = 120.0


def main() -> None:
    os.umask(0o177)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(sys.argv[1])
    listener.listen(1024)
    buffer = memoryview(bytearray(1 << 20))
    print("ready", flush=True)
    while True:
        connection, _ = listener.accept()
        times = [time.monotonic_ns()]
        try:
            read(protocol.Channel(connection), buffer, times)
        except (OSError, protocol.ProtocolError):
            continue
        if "--times" in sys.argv[2:]:
            print(*times, flush=True)


def read(channel: protocol.Channel, buffer: memoryview, times: list[int]) -> None:
    try:
        deadline = time.monotonic() + DEADLINE_SECONDS
        channel.receive(deadline).close()
        times.append(time.monotonic_ns())
        channel.send(protocol.ACCEPT, {"version": b"1", "want": protocol.WANT_CORE}, deadline)
        message = channel.receive(deadline)
        times.append(time.monotonic_ns())
        try:
            core = Stream(message.descriptors[0], DEADLINE_SECONDS)
            while not core.ended:
                core.fill(buffer)
        finally:
            message.close()
        channel.send(protocol.DONE, {"state": b"stored", "size": b"%d" % core.size, "id": b"none"}, deadline)
    finally:
        channel.close()


if __name__ == "__main__":
    main()
