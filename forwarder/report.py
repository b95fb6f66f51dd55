"""Say that something went wrong: one line in the journal, or in the kernel's log where there is no journal.

The stub's own writing of the journal's datagram, and not systemd-python's: the staged stub runs on the standard
library alone, so that neither a virtual environment nor an upgrade can take it down.
"""

from __future__ import annotations

import _socket
import os

JOURNAL = "/run/systemd/journal/socket"
KERNEL_LOG = "/dev/kmsg"
LOG_ERR = 3
LOG_DAEMON = 3 << 3
# A line of the kernel's log holds 1024 - 32 bytes (printk.c: PRINTKRB_RECORD_MAX); a journal's line may as well.
MAX_LINE = 900


def report(text: str, **fields: str) -> None:
    """Write one line. `text` and fields are ASCII without control characters (`receiver.protocol.printable`).

    Never raises: the last resort has no further one.
    """
    line = text[:MAX_LINE]
    entry = {"MESSAGE": line, "PRIORITY": str(LOG_ERR), "SYSLOG_IDENTIFIER": "core_pipe", **fields}
    try:
        with _closing(_socket.socket(_socket.AF_UNIX, _socket.SOCK_DGRAM | _socket.SOCK_CLOEXEC)) as sock:
            # A journal that is stopped or stuck must not hold the crash.
            sock.setblocking(False)
            sock.sendto(
                "".join(f"{name}={value}\n" for name, value in entry.items()).encode("ascii", "replace"), JOURNAL
            )
            return
    except OSError:
        pass
    try:
        fd = os.open(KERNEL_LOG, os.O_WRONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            os.write(fd, f"<{LOG_DAEMON | LOG_ERR}>core_pipe: {line}\n".encode("ascii", "replace"))
        finally:
            os.close(fd)
    except OSError:
        pass


class _closing:  # noqa: N801 - contextlib's, without its import
    def __init__(self, sock: _socket.socket) -> None:
        self.sock = sock

    def __enter__(self) -> _socket.socket:
        return self.sock

    def __exit__(self, *_: object) -> None:
        self.sock.close()
