"""Lines for the journal, by way of standard error.

systemd takes a service's standard error into the journal, and everywhere else it is what an administrator looks at. The
prefix is the level (sd-daemon(3)), and only there when systemd reads it.
"""

from __future__ import annotations

import os
import select
import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

LOG_ERR = 3
LOG_INFO = 6
STDERR = 2
# A pipe that poll(2) calls writable takes so many bytes without waiting (PIPE_BUF, pipe(7)).
MAX_LINE = select.PIPE_BUF
PATIENCE_MS = 100


def goes_to_journal() -> bool:
    """Whether systemd reads our lines."""
    return "JOURNAL_STREAM" in os.environ


def log(text: str, *, error: bool = False) -> None:
    """Write one line. Never raises and never waits: what reads our standard error may be gone, full, or stuck.

    A container's log collector that stopped reading held every worker, and with them every crash (seen with a pipe).
    """
    prefix = f"<{LOG_ERR if error else LOG_INFO}>" if goes_to_journal() else "core-pipe-receiver: "
    line = (prefix + text.replace("\n", " ") + "\n").encode("utf-8", "backslashreplace")
    if len(line) > MAX_LINE:
        line = line[: MAX_LINE - 4] + b"...\n"
    try:
        poll = select.poll()
        poll.register(STDERR, select.POLLOUT)
        if any(events & select.POLLOUT for _, events in poll.poll(PATIENCE_MS)):
            os.write(STDERR, line)
    except OSError:
        pass


@contextmanager
def quiet_pipe() -> Iterator[None]:
    """End without a traceback when the reader of standard output has gone, as in `... | head`."""
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC), sys.stdout.fileno())
        raise SystemExit(1) from None
