"""Accept, fork, reap, leave when idle: one process that listens, and a worker for each crash.

A worker of its own for each crash, forked from a process that has imported everything: one crash cannot harm another's
core, and every processor is used. The listening process touches no byte that a crashed process has chosen.
"""

from __future__ import annotations

import os
import select
import signal
import time
from typing import TYPE_CHECKING

from receiver import privileges
from receiver.activation import tell_systemd
from receiver.log import log
from receiver.protocol import Channel
from receiver.rehearsal import rehearse
from receiver.store import StoreError
from receiver.worker import open_store, serve

if TYPE_CHECKING:
    import socket

    from receiver.config import Config

# A worker that was told to finish has its own deadlines (stall_seconds); this is the last word at the end.
EXIT_FAILURE = 1
# When accept(2) fails for want of descriptors or memory, the connection stays in the queue: look again a little later.
SHORTAGE_SECONDS = 0.2
# poll(2) takes an int of milliseconds: 24 days, and idle_seconds may be a year.
MAX_WAIT = (1 << 31) - 1


class Service:
    """Serves a listening socket until SIGTERM, or until it was idle for long enough. Owns the socket."""

    def __init__(self, listener: socket.socket, config: Config, *, may_leave: bool) -> None:
        self.listener = listener
        self.config = config
        self.idle_seconds = config.idle_seconds if may_leave else 0.0
        self.workers: set[int] = set()
        self.stopping = False
        self._is_warm = False
        # The signal handler's way into poll(2).
        self._awake, self._waker = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)

    def run(self) -> int:
        """Serve. Returns the exit status."""
        self.listener.setblocking(False)
        previous = signal.set_wakeup_fd(self._waker, warn_on_full_buffer=False)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._stop)
        signal.signal(signal.SIGCHLD, lambda _number, _frame: None)
        try:
            tell_systemd("READY=1")
            recover(self.config)
            self._loop()
        finally:
            tell_systemd("STOPPING=1")
            signal.set_wakeup_fd(previous)
            self.listener.close()
        return 0

    def _stop(self, _number: int, _frame: object) -> None:
        self.stopping = True

    def _loop(self) -> None:
        idle_since = time.monotonic()
        while True:
            self._reap()
            if self.stopping:
                # Whoever comes now goes elsewhere at once. A socket of systemd's keeps him for the next start.
                self.listener.close()
                if not self.workers:
                    return
            poll = select.poll()
            poll.register(self._awake, select.POLLIN)
            accepting = not self.stopping and len(self.workers) < self.config.workers
            if accepting:
                poll.register(self.listener, select.POLLIN)
            if self.workers:
                idle_since = time.monotonic()
            wait = None
            if self.idle_seconds and not self.workers:
                wait = min(max(0.0, idle_since + self.idle_seconds - time.monotonic()) * 1000, MAX_WAIT)
            if not self._is_warm and not poll.poll(0):
                self._warm_up()
            events = dict(poll.poll(wait))
            if self._awake in events:
                self._drain()
            if accepting and not self.stopping and self.listener.fileno() in events:
                idle_since = time.monotonic()
                self._accept()
            elif wait is not None and not events and wait < MAX_WAIT:
                log(f"idle for {self.idle_seconds:g} s: leaving until the next crash")
                return

    def _warm_up(self) -> None:
        """Do once, while nothing waits, what each worker would have to do while a process waits for it."""
        self._is_warm = True
        try:
            rehearse(self.config)
        except (OSError, MemoryError) as error:
            # No memory: then it goes on cold.
            log(f"the rehearsal was not finished: {error}", error=True)

    def _drain(self) -> None:
        try:
            while os.read(self._awake, 4096):
                pass
        except BlockingIOError:
            pass

    def _accept(self) -> None:
        try:
            connection, _ = self.listener.accept()
        except (BlockingIOError, ConnectionAbortedError):
            return
        except OSError as error:
            log(f"a connection cannot be accepted now: {error.strerror}", error=True)
            time.sleep(SHORTAGE_SECONDS)
            return
        try:
            pid = os.fork()
        except OSError as error:
            # The hang-up tells the forwarder to try again or elsewhere.
            log(f"no worker can be started: {error.strerror}", error=True)
            connection.close()
            time.sleep(SHORTAGE_SECONDS)
            return
        if pid == 0:
            self._work(connection)
        connection.close()
        self.workers.add(pid)

    def _work(self, connection: socket.socket) -> None:
        """Be a worker: serve one connection, and never return."""
        status = EXIT_FAILURE
        try:
            # What it began it finishes: SIGTERM goes to the whole service.
            signal.set_wakeup_fd(-1)
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, signal.SIG_IGN)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            self.listener.close()
            os.close(self._awake)
            os.close(self._waker)
            connection.setblocking(True)
            with connection:
                serve(Channel(connection), self.config, confine=privileges.drop)
            status = 0
        except BaseException as error:
            log(f"a worker failed: {type(error).__name__}: {error}", error=True)
        finally:
            # Not sys.exit(): nothing of the parent's may run twice.
            os._exit(status)

    def _reap(self) -> None:
        failed = False
        for pid in tuple(self.workers):
            found, status = os.waitpid(pid, os.WNOHANG)
            if found:
                self.workers.discard(pid)
                if status:
                    log(f"worker {pid} ended with {_ending(status)}", error=True)
                    failed = True
        if failed:
            recover(self.config)


def _ending(status: int) -> str:
    if os.WIFSIGNALED(status):
        return f"signal {os.WTERMSIG(status)}"
    return f"status {os.waitstatus_to_exitcode(status)}"


def serve_one(connection: socket.socket, config: Config) -> int:
    """Serve the one connection that systemd accepted (Accept=yes). Returns the exit status."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    with connection:
        connection.setblocking(True)
        serve(Channel(connection), config, confine=privileges.drop)
    # After the crashed process was let go.
    recover(config)
    return 0


def recover(config: Config) -> None:
    """Finish what workers left that were killed. A store that is not usable is said, and refuses each offer."""
    try:
        store = open_store(config)
        try:
            for found in store.recover():
                log(f"crash {found} was not finished by its worker; its record says so", error=True)
        finally:
            store.close()
    except (StoreError, OSError, ValueError) as error:
        log(str(error), error=True)
