"""A terminal for a program: its own, with it as the session's leader, so that ^C and pagers work."""

from __future__ import annotations

import fcntl
import os
import pty
import select
import shutil
import struct
import subprocess
import termios
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence


def on_terminal(
    command: Sequence[str],
    environment: Mapping[str, str],
    typed: Callable[[bytes], bytes] = lambda _: b"",
    *,
    rows: int = 5,
    columns: int = 200,
    timeout: float = 60,
) -> tuple[int, bytes]:
    """Run a command. Returns its exit status, and all that came to the terminal.

    typed: what is typed next, given all that was shown so far; asked whenever that is more. Raises TimeoutError.
    """
    ours, theirs = pty.openpty()
    try:
        try:
            fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
            # Not pty.fork(): who forks while there are threads is warned of.
            program = subprocess.Popen(
                [shutil.which("setsid") or "setsid", "--ctty", *command],
                stdin=theirs,
                stdout=theirs,
                stderr=theirs,
                env=environment,
            )
        finally:
            os.close(theirs)
        with program:
            try:
                return _watched(program, ours, typed, time.monotonic() + timeout)
            finally:
                program.kill()
    finally:
        os.close(ours)


def _watched(
    program: subprocess.Popen[bytes], terminal: int, typed: Callable[[bytes], bytes], deadline: float
) -> tuple[int, bytes]:
    said = b""
    while select.select([terminal], [], [], max(0.0, deadline - time.monotonic()))[0]:
        try:
            said += os.read(terminal, 65536)
        except OSError:
            # EIO: nobody has it open any more.
            return program.wait(max(0.0, deadline - time.monotonic())), said
        keys = typed(said)
        if keys:
            os.write(terminal, keys)
    raise TimeoutError(f"it does not end; it said {said!r}")
