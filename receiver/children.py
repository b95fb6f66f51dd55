"""Programs that are asked something: with a deadline, and a bound on what they say."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import time
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

# Not the caller's: it may be an ordinary user's.
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
ENVIRONMENT = {"PATH": PATH, "LANG": "C.UTF-8", "HOME": "/nonexistent", "TZ": "UTC"}
# After SIGKILL; one that hangs in the kernel all the same is left to init.
REAP_SECONDS = 1.0


class Answer(NamedTuple):
    """What a program said. status: as of waitstatus_to_exitcode(), None when it was ended. late, cut: why it was."""

    output: bytes
    status: int | None
    late: bool = False
    cut: bool = False


def ask(
    command: Sequence[str],
    *,
    seconds: float,
    most: int,
    before: Callable[[], None] | None = None,
    pass_fds: Sequence[int] = (),
) -> Answer:
    """Run a program to its end and return its standard output; its standard error goes nowhere.

    seconds: until it is killed, with all that it started. most: bytes, and then likewise. before: is called in the
    child. Raises OSError when it cannot be started, and subprocess.SubprocessError when `before` fails.
    """
    deadline = time.monotonic() + seconds
    # In a session of its own: a Ctrl-C is for us, and killing it is for all of them.
    child = subprocess.Popen(  # noqa: S603 - no shell, and the words are checked where they are made
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        cwd="/",
        env=ENVIRONMENT,
        start_new_session=True,
        pass_fds=pass_fds,
        preexec_fn=before,  # noqa: PLW1509 - no threads here
    )
    output = bytearray()
    late = cut = False
    status: int | None = None
    assert child.stdout is not None  # noqa: S101 - for the type checker
    try:
        poll = select.poll()
        poll.register(child.stdout, select.POLLIN)
        while True:
            left = deadline - time.monotonic()
            if left <= 0 or not poll.poll(left * 1000):
                late = True
                break
            part = os.read(child.stdout.fileno(), 65536)
            output += part
            if len(output) > most:
                cut = True
                del output[most:]
                break
            if not part:
                break
        if not late and not cut:
            try:
                status = child.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                late = True
    finally:
        if status is None:
            _end(child)
        child.stdout.close()
    return Answer(bytes(output), status, late, cut)


def _end(child: subprocess.Popen[bytes]) -> None:
    """Kill it and its children; it is not reaped yet, so the number is still its own."""
    try:
        os.killpg(child.pid, signal.SIGKILL)
    except OSError:
        # It has become another user's, with more rights than we have.
        pass
    try:
        child.wait(REAP_SECONDS)
    except subprocess.TimeoutExpired:
        # In the kernel, where SIGKILL does not reach it. Not waited for, and no warning about it either.
        child.returncode = -signal.SIGKILL
