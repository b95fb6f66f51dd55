"""A listener that must never hear a word: `trap.py PATH` prints what any connection tells it."""

from __future__ import annotations

import os
import signal
import socket
import sys


def main() -> None:
    os.umask(0o177)
    signal.signal(signal.SIGTERM, lambda _number, _frame: sys.exit(0))
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(sys.argv[1])
    listener.listen(64)
    print("ready", flush=True)
    while True:
        connection, _ = listener.accept()
        while data := connection.recv(4096):
            print(repr(data), flush=True)


if __name__ == "__main__":
    main()
