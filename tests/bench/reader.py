"""A receiver that reads each core to its end and keeps nothing: `reader.py PATH`, run inside a container.

The limit that no receiver can be faster than, with the forwarder as it is.
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
        try:
            read(protocol.Channel(connection), buffer)
        except (OSError, protocol.ProtocolError):
            continue


def read(channel: protocol.Channel, buffer: memoryview) -> None:
    try:
        deadline = time.monotonic() + DEADLINE_SECONDS
        channel.receive(deadline).close()
        channel.send(protocol.ACCEPT, {"version": b"1", "want": protocol.WANT_CORE}, deadline)
        message = channel.receive(deadline)
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
