"""Crashes of a known kind in a container, and what the kernel said about them."""

from __future__ import annotations

import os
import signal
import subprocess
import tempfile
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

from tests.support import processes
from tests.support.crashers import compile_crasher
from tests.support.waiting import read_line, wait_until

if TYPE_CHECKING:
    from types import TracebackType

    from tests.support.containers import Container

__all__ = ["CrashResult", "Crashing", "compile_crasher", "crash", "start_crash", "wait_until"]


@dataclass(frozen=True)
class CrashResult:
    """What was seen of a process that ended, by its parent."""

    pid: int
    """In the container's numbering."""
    host_pid: int
    status: int
    """As waitpid() gives it."""
    seconds: float | None
    """From just before the fault to the reap, so mostly the time of the dump; None when it is no program of ours."""
    stdout: bytes
    stderr: bytes

    @property
    def signal(self) -> signal.Signals | None:
        return signal.Signals(os.WTERMSIG(self.status)) if os.WIFSIGNALED(self.status) else None

    @property
    def returncode(self) -> int:
        """As subprocess has it: an exit status, or minus a signal."""
        return os.waitstatus_to_exitcode(self.status)

    @property
    def core_dumped(self) -> bool:
        """The kernel's own bit: it wrote a core to the end (to a pipe: nobody refused to read)."""
        return os.WIFSIGNALED(self.status) and os.WCOREDUMP(self.status)


class Crashing:
    """A crash program that has been started; with `--wait` it crashes at go(). A context manager that ends it."""

    def __init__(
        self, container: Container, crasher: str, arguments: tuple[str | bytes, ...], start_timeout: float
    ) -> None:
        # Files, so that nobody has to read while the dump goes on; not in the container's own file systems.
        with tempfile.TemporaryFile() as stderr:
            self._stderr = os.dup(stderr.fileno())
            self._process = container.popen(
                [crasher, *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stderr, crash_clock=True
            )
        self.pid = self._process.inside_pid
        self.host_pid = self._process.host_pid
        self._started = processes.start_time(self.host_pid)
        self._said = b""
        try:
            if "--wait" in arguments:
                self._said = read_line(self._stdout(), start_timeout, f"{crasher} ready")
                if self._said != b"ready\n":
                    raise RuntimeError(f"{crasher} {arguments}: {self._said!r} {self._stderr_text()!r}")
        except BaseException:
            self.end()
            raise

    def _stdout(self) -> int:
        assert self._process.stdout is not None
        return self._process.stdout.fileno()

    def _stderr_text(self) -> bytes:
        return os.pread(self._stderr, 1 << 16, 0)

    def go(self) -> None:
        """Let it crash now."""
        assert self._process.stdin is not None
        self._process.stdin.close()

    def kill(self) -> None:
        """SIGKILL to the crashing process itself (which also ends a dump that hangs)."""
        processes.kill_exactly(self.host_pid, self._started)

    def ended(self) -> bool:
        """Whether it has been reaped."""
        return self._process.poll() is not None

    def result(self, timeout: float = 60) -> CrashResult:
        """Wait for its end. Raises TimeoutError, and kills it then. To be called once."""
        try:
            end = self._process.reaped(timeout)
            seconds = (end["reaped_ns"] - end["crash_ns"]) / 1e9 if end["crash_ns"] >= 0 else None
            assert self._process.stdout is not None
            out = self._said + self._process.stdout.read()
            return CrashResult(self.pid, self.host_pid, end["status"], seconds, out, self._stderr_text())
        finally:
            self.end()

    def end(self) -> None:
        """End it if it still runs. May be called again."""
        if self._process.poll() is None:
            self.kill()
        self._process.end()
        if self._stderr >= 0:
            os.close(self._stderr)
        self._stderr = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.end()


def start_crash(
    container: Container, *arguments: str | bytes, crasher: str | None = None, start_timeout: float = 60
) -> Crashing:
    """Start tests/crashers/crash.c (or another program) in a container; the arguments are crash.c's."""
    return Crashing(container, crasher or compile_crasher("crash"), arguments, start_timeout)


def crash(
    container: Container, *arguments: str | bytes, crasher: str | None = None, timeout: float = 60
) -> CrashResult:
    """Crash a process in a container and wait for its end; the arguments are crash.c's, the signal first.

    Raises TimeoutError when the dump is not over in time (and ends it).
    """
    with start_crash(container, *arguments, crasher=crasher) as crashing:
        crashing.go()
        return crashing.result(timeout)
