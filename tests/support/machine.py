"""The machine's crash settings. They are global, so whoever changes them holds the machine's lock."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
from typing import TYPE_CHECKING

from tests.support.waiting import wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator

LOCK = "/run/lock/core_pipe-tests.lock"
SAVED = "/run/core_pipe-tests.saved.json"

CORE_PATTERN = "/proc/sys/kernel/core_pattern"
CORE_PIPE_LIMIT = "/proc/sys/kernel/core_pipe_limit"
SUID_DUMPABLE = "/proc/sys/fs/suid_dumpable"
_SETTINGS = (CORE_PATTERN, CORE_PIPE_LIMIT, SUID_DUMPABLE)


def read_setting(path: str) -> bytes:
    """The value without the newline that the kernel adds (a value may end in other white space)."""
    with open(path, "rb") as file:
        return file.read().removesuffix(b"\n")


def write_setting(path: str, value: bytes) -> None:
    """Raises ValueError when the kernel did not take the value as it is (it cuts a core_pattern at 127 bytes)."""
    with open(path, "wb", buffering=0) as file:
        # An empty write is none at all: an empty pattern is written as its newline.
        file.write(value or b"\n")
    if (got := read_setting(path)) != value:
        raise ValueError(f"{path}: wrote {value!r}, reads {got!r}")


class Machine:
    """The settings, for the one who holds the lock."""

    @property
    def core_pattern(self) -> bytes:
        return read_setting(CORE_PATTERN)

    @core_pattern.setter
    def core_pattern(self, value: bytes | str) -> None:
        write_setting(CORE_PATTERN, os.fsencode(value))

    @property
    def core_pipe_limit(self) -> int:
        return int(read_setting(CORE_PIPE_LIMIT))

    @core_pipe_limit.setter
    def core_pipe_limit(self, value: int) -> None:
        write_setting(CORE_PIPE_LIMIT, b"%d" % value)

    @property
    def suid_dumpable(self) -> int:
        return int(read_setting(SUID_DUMPABLE))

    @suid_dumpable.setter
    def suid_dumpable(self, value: int) -> None:
        write_setting(SUID_DUMPABLE, b"%d" % value)


def why_unavailable() -> str | None:
    if os.geteuid() != 0:
        return "needs root, to set the machine's core_pattern: sudo .venv/bin/python -m pytest"
    if not os.access(CORE_PATTERN, os.W_OK):
        return f"{CORE_PATTERN} is not writable (in a container?): run on a host or in a virtual machine"
    return None


def _values() -> dict[str, bytes]:
    return {path: read_setting(path) for path in _SETTINGS}


def _restore(values: dict[str, bytes]) -> None:
    for path, value in values.items():
        write_setting(path, value)


def _restore_from_killed_run() -> None:
    try:
        with open(SAVED, encoding="utf-8") as file:
            saved = json.load(file)
    except FileNotFoundError:
        return
    _restore({path: os.fsencode(saved[path]) for path in _SETTINGS if path in saved})
    os.unlink(SAVED)


def _save(values: dict[str, bytes]) -> None:
    with open(SAVED + ".new", "w", encoding="utf-8") as file:
        json.dump({path: os.fsdecode(value) for path, value in values.items()}, file)
        file.flush()
        os.fsync(file.fileno())
    os.rename(SAVED + ".new", SAVED)


_held = 0


@contextlib.contextmanager
def exclusive(timeout: float = 170) -> Iterator[Machine]:
    """Hold the machine's crash settings, restored on the way out, or by the next holder if this one is killed.

    May be nested in one process: the inner one restores what the outer one had set. Raises TimeoutError after `timeout`
    seconds when another run has the machine.
    """
    global _held  # noqa: PLW0603 -- the lock is the process's, as flock's would be
    with contextlib.ExitStack() as stack:
        if _held == 0:
            fd = os.open(LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            stack.callback(os.close, fd)
            wait_until(lambda: _locked(fd), timeout, f"the lock {LOCK}, which another run of the tests holds")
            _restore_from_killed_run()
            _save(_values())
            stack.callback(os.unlink, SAVED)
        stack.callback(_restore, _values())
        _held += 1
        try:
            yield Machine()
        finally:
            _held -= 1


def _locked(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
