"""Accept, fork, reap, leave when idle: one process that listens, and a worker for each crash.

A worker of its own for each crash, forked from a process that has imported everything: one crash cannot harm another's
core, and every processor is used. The listening process touches no byte that a crashed process has chosen.

While nothing waits, a spare worker stands ready: forked already, warm again after that (who writes to a page first
after fork(2) copies it), and waiting for the next connection itself. It is a convenience only: where there is none,
because others come faster or no process can be had, the connection is taken here and forked for.
"""

from __future__ import annotations

import gc
import os
import select
import signal
import socket
import time
from typing import TYPE_CHECKING

from receiver import privileges
from receiver.activation import tell_systemd
from receiver.afterwards import afterwards
from receiver.log import log
from receiver.protocol import Channel
from receiver.rehearsal import rehearse, touch
from receiver.store import StoreError
from receiver.worker import open_store, serve

if TYPE_CHECKING:
    from collections.abc import Callable

    from receiver.config import Config
    from receiver.notify.resident import Keeper

# A worker that was told to finish has its own deadlines (stall_seconds); this is the last word at the end.
EXIT_FAILURE = 1
# When accept(2) fails for want of descriptors or memory, the connection stays in the queue: look again a little later.
SHORTAGE_SECONDS = 0.2
# The next spare is not made while a crash that has just come wants the processors: when nobody works, or so much later.
SPARE_SECONDS = 0.1
# A spare cannot be had, or was killed: nothing is lost, so there is no hurry to try again.
SPARE_SHORTAGE_SECONDS = 5.0
# For those whose workers were killed, together.
TELLING_SECONDS = 30.0
# poll(2) takes an int of milliseconds: 24 days, and idle_seconds may be a year.
MAX_WAIT = (1 << 31) - 1


class Service:
    """Serves a listening socket until SIGTERM, or until it was idle for long enough. Owns the socket."""

    def __init__(self, listener: socket.socket, config: Config, *, may_leave: bool) -> None:
        self.listener = listener
        self.config = config
        self.idle_seconds = config.idle_seconds if may_leave else 0.0
        # Where systemd starts us, it starts who tells of crashes, too (core_pipe-notify.path).
        self.keeper: Keeper | None = None
        if config.notify and not may_leave:
            from receiver.notify.resident import Keeper  # noqa: PLC0415 - not for each crash

            self.keeper = Keeper(config.store, self._close_all)
        # Those that have a connection.
        self.workers: set[int] = set()
        # The one that waits for a connection, 0 without; and our end of what ties it to us: its end closes when it has
        # one, and ours when it is to leave, or when we are killed.
        self.spare = 0
        self._tie: socket.socket | None = None
        # The one that tells of crashes whose workers were killed, 0 without. It takes no crash's place.
        self.teller = 0
        # When the next one is made at the soonest: while others work, and at all.
        self._next_spare = self._no_spare_until = 0.0
        self._idle_since = 0.0
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
            self._recover()
            self._loop()
        finally:
            tell_systemd("STOPPING=1")
            signal.set_wakeup_fd(previous)
            self.listener.close()
        return 0

    def _stop(self, _number: int, _frame: object) -> None:
        self.stopping = True

    def _loop(self) -> None:
        self._idle_since = time.monotonic()
        while True:
            self._reap()
            if self.keeper is not None:
                self.keeper.turn(stopping=self.stopping, alone=not self.workers and not self.teller and not self.spare)
            if self.stopping:
                # Whoever comes now goes elsewhere at once. A socket of systemd's keeps him for the next start.
                self.listener.close()
                self._untie()
                if not self.workers and not self.teller and not (self.keeper and self.keeper.runs):
                    return
            if self.workers or self.teller:
                self._idle_since = time.monotonic()
            poll = select.poll()
            poll.register(self._awake, select.POLLIN)
            accepting = not self.stopping and self._tie is None and len(self.workers) < self.config.workers
            if accepting:
                poll.register(self.listener, select.POLLIN)
            elif self._tie is not None:
                poll.register(self._tie, select.POLLIN)
            if not self._is_warm and not poll.poll(0):
                self._warm_up()
            if accepting and self._seconds_to_spare() <= 0 and not poll.poll(0):
                self._post_spare()
                continue
            waits = [self._seconds_to_spare()] if accepting else []
            if self.keeper is not None and (seconds := self.keeper.seconds()) is not None:
                waits.append(seconds)
            if self.idle_seconds and not self.workers and not self.teller and not self.stopping:
                waits.append(self._idle_since + self.idle_seconds - time.monotonic())
            events = dict(poll.poll(min(max(0.0, min(waits)) * 1000, MAX_WAIT) if waits else None))
            if self._awake in events:
                self._drain()
            if self.stopping:
                continue
            if self._tie is not None and self._tie.fileno() in events:
                self._untie()
            elif accepting and self.listener.fileno() in events:
                self._accept()
            elif not events and self._is_idle():
                log(f"idle for {self.idle_seconds:g} s: leaving until the next crash")
                # The spare may just have got a connection: then that is waited for.
                self.stopping = True

    def _is_idle(self) -> bool:
        since = time.monotonic() - self._idle_since
        return 0 < self.idle_seconds <= since and not self.workers and not self.teller

    def _warm_up(self) -> None:
        """Do once, while nothing waits, what each worker would have to do while a process waits for it."""
        self._is_warm = True
        try:
            rehearse(self.config)
        except (OSError, MemoryError) as error:
            # No memory: then it goes on cold.
            log(f"the rehearsal was not finished: {error}", error=True)
        # A collection in a worker would write to all that it shares with us. What the rehearsal left is 0.8 MiB.
        gc.collect()
        gc.freeze()

    def _seconds_to_spare(self) -> float:
        """Return how long it is until a spare may be made, if nothing happens meanwhile."""
        since = max(self._next_spare, self._no_spare_until) if self.workers else self._no_spare_until
        return since - time.monotonic()

    def _post_spare(self) -> None:
        """Have a worker stand ready, if one can be had."""
        try:
            ours, theirs = socket.socketpair()
        except OSError:
            self._no_spare_until = time.monotonic() + SPARE_SHORTAGE_SECONDS
            return
        try:
            pid = os.fork()
        except OSError:
            ours.close()
            theirs.close()
            self._no_spare_until = time.monotonic() + SPARE_SHORTAGE_SECONDS
            return
        if pid == 0:
            ours.close()
            self._work(lambda: self._stand_ready(theirs))
        theirs.close()
        self.spare, self._tie = pid, ours

    def _untie(self) -> None:
        """Count the spare among those that are waited for: it has a connection, or is to leave, or died."""
        if self._tie is not None:
            self._tie.close()
            self._tie = None
        if self.spare:
            self.workers.add(self.spare)
            self.spare = 0
            self._begun()

    def _close_all(self) -> None:
        """Close what is the listening process's own, in a child of it that takes no connections."""
        self.listener.close()
        os.close(self._awake)
        os.close(self._waker)
        if self._tie is not None:
            self._tie.close()

    def _begun(self) -> None:
        self._idle_since = time.monotonic()
        self._next_spare = self._idle_since + SPARE_SECONDS

    def _stand_ready(self, tie: socket.socket) -> socket.socket | None:
        """Be the spare: wait for a connection and return it, None when it is time to leave."""
        with tie:
            poll = select.poll()
            poll.register(self.listener, select.POLLIN)
            poll.register(tie, select.POLLIN)
            if not poll.poll(0):
                touch(self.config)
            while True:
                # First whether to leave: then who waits is another's, or goes elsewhere.
                if tie.fileno() in dict(poll.poll()):
                    return None
                connection = self._take()
                if connection is not None:
                    return connection

    def _drain(self) -> None:
        try:
            while os.read(self._awake, 4096):
                pass
        except BlockingIOError:
            pass

    def _take(self) -> socket.socket | None:
        """Accept a connection, None when there is none after all."""
        try:
            return self.listener.accept()[0]
        except (BlockingIOError, ConnectionAbortedError):
            return None
        except OSError as error:
            log(f"a connection cannot be accepted now: {error.strerror}", error=True)
            time.sleep(SHORTAGE_SECONDS)
            return None

    def _accept(self) -> None:
        connection = self._take()
        if connection is None:
            return
        self._begun()
        try:
            pid = os.fork()
        except OSError as error:
            # The hang-up tells the forwarder to try again or elsewhere.
            log(f"no worker can be started: {error.strerror}", error=True)
            connection.close()
            time.sleep(SHORTAGE_SECONDS)
            return
        if pid == 0:
            self._work(lambda: connection)
        connection.close()
        self.workers.add(pid)

    def _work(self, take: Callable[[], socket.socket | None]) -> None:
        """Be a worker: serve the connection that `take` returns, if any, and never return."""
        status = EXIT_FAILURE
        try:
            # What it began it finishes: SIGTERM goes to the whole service.
            signal.set_wakeup_fd(-1)
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, signal.SIG_IGN)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            os.close(self._awake)
            os.close(self._waker)
            connection = take()
            self.listener.close()
            if connection is not None:
                with connection:
                    connection.setblocking(True)
                    serve(Channel(connection), self.config, confine=privileges.drop)
            status = 0
        except BaseException as error:
            log(f"a worker failed: {type(error).__name__}: {error}", error=True)
        finally:
            # Not sys.exit(): nothing of the parent's may run twice.
            os._exit(status)

    def _reap(self) -> None:
        failed = False
        for pid in (*self.workers, *(pid for pid in (self.spare, self.teller) if pid)):
            found, status = os.waitpid(pid, os.WNOHANG)
            if not found:
                continue
            if pid == self.spare:
                self._untie()
            self.workers.discard(pid)
            if pid == self.teller:
                self.teller = 0
            if status:
                log(f"worker {pid} ended with {_ending(status)}", error=True)
                # Should it have been a spare: what ends one may end the next.
                self._no_spare_until = time.monotonic() + SPARE_SHORTAGE_SECONDS
                failed = True
        if failed:
            self._recover()

    def _recover(self) -> None:
        """Finish what killed workers left, and have a worker tell of it: what crashes has chosen is not for us."""
        if not recover(self.config) or self.teller:
            return
        try:
            pid = os.fork()
        except OSError:
            # They keep their marks, for the next start.
            return
        if pid == 0:
            self._work(self._tell)
        self.teller = pid

    def _tell(self) -> None:
        if self._tie is not None:
            # Held here, it would tell the spare nothing when we are killed.
            self._tie.close()
        privileges.drop()
        tell(self.config)


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
    if recover(config):
        tell(config)
    return 0


def recover(config: Config) -> bool:
    """Finish what workers left that were killed. Returns whether there are crashes that nobody told of yet.

    A store that is not usable is said, and refuses each offer.
    """
    try:
        store = open_store(config)
        try:
            for found in store.recover():
                log(f"crash {found} was not finished by its worker; its record says so", error=True)
        finally:
            untold = store.has_untold()
            store.close()
    except (StoreError, OSError, ValueError) as error:
        log(str(error), error=True)
        return False
    return untold


def tell(config: Config) -> None:
    """Do what follows the crashes whose workers were killed before they could (receiver/afterwards.py)."""
    deadline = time.monotonic() + TELLING_SECONDS
    try:
        store = open_store(config)
        try:
            for record in store.untold():
                afterwards(record, config, store)
                if time.monotonic() > deadline:
                    # The rest have their marks still, for the next start.
                    break
        finally:
            store.close()
    except (StoreError, OSError, ValueError) as error:
        log(str(error), error=True)
