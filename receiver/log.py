"""Lines for the journal, by way of standard error.

systemd takes a service's standard error into the journal, and everywhere else it is what an administrator looks at. The
prefix is the level (sd-daemon(3)), and only there when systemd reads it.
"""

from __future__ import annotations

import os
import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

LOG_ERR = 3
LOG_INFO = 6


def log(text: str, *, error: bool = False) -> None:
    """Write one line. Never raises: a full or closed standard error must not cost a core."""
    prefix = f"<{LOG_ERR if error else LOG_INFO}>" if "JOURNAL_STREAM" in os.environ else "core-pipe-receiver: "
    try:
        sys.stderr.write(prefix + text.replace("\n", " ") + "\n")
        sys.stderr.flush()
    except (OSError, ValueError, AttributeError):
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
