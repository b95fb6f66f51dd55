"""The deliverer of a resident receiver: where there is no systemd to start it when somebody is to be told.

A process of its own there, too: the one that listens tells nobody anything, and waits for nobody.
"""

from __future__ import annotations

import os
import signal
import time
from typing import TYPE_CHECKING

from receiver import notify
from receiver.log import log

if TYPE_CHECKING:
    from collections.abc import Callable

# When it cannot be had, or fails, which it has said itself.
SHORTAGE_SECONDS = 30.0


class Keeper:
    """Starts the deliverer, and sees it off. `turn` is to be called whenever a process ends.

    store: path. close: closes what is the listening process's own, in the child.
    """

    def __init__(self, store: str, close: Callable[[], None]) -> None:
        self._store = store
        self._close = close
        self._pid = 0
        # What waits since before, too.
        self._wanted = True
        self._not_before = 0.0

    @property
    def runs(self) -> bool:
        return self._pid != 0

    def turn(self, *, stopping: bool, alone: bool) -> None:
        """Look after it. stopping: the receiver is to leave. alone: nobody else is left. Never waits."""
        self._reap()
        if stopping and not alone:
            # Somebody still writes what may have to be told.
            return
        if not self._pid and time.monotonic() >= self._not_before and (self._wanted or self._is_awaited()):
            self._start()
        if stopping and self._pid:
            # Last of all: the crash that ends the container is the one to be told. What is not told now waits in the
            # store.
            os.kill(self._pid, signal.SIGTERM)

    def seconds(self) -> float | None:
        """Return when to call `turn` if nothing happens meanwhile; None for never."""
        if self._pid or not self._not_before:
            return None
        left = self._not_before - time.monotonic()
        return left if left > 0 else None

    def _reap(self) -> None:
        if self._pid:
            found, status = os.waitpid(self._pid, os.WNOHANG)
            if found:
                self._pid = 0
                self._not_before = time.monotonic() + SHORTAGE_SECONDS if status else 0.0

    def _is_awaited(self) -> bool:
        try:
            directory = os.open(self._store, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except OSError:
            return False
        try:
            return notify.is_awaited(directory)
        finally:
            os.close(directory)

    def _start(self) -> None:
        parent = os.getpid()
        # Not to be heard before it knows what to do then (Deliverer.run).
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGTERM,))
        try:
            pid = os.fork()
        except OSError:
            self._not_before = time.monotonic() + SHORTAGE_SECONDS
            return
        finally:
            if os.getpid() == parent:
                signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        if pid:
            self._pid, self._wanted = pid, False
            return
        status = 1
        try:
            signal.set_wakeup_fd(-1)
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGCHLD):
                signal.signal(number, signal.SIG_DFL)
            self._close()
            # Imported by who needs it, not by a process that stays.
            from receiver.notify.command import deliver_configured  # noqa: PLC0415

            status = deliver_configured()
        except BaseException as error:
            log(f"the callbacks' deliverer failed: {type(error).__name__}: {error}", error=True)
        finally:
            # Not sys.exit(): nothing of the parent's may run twice.
            os._exit(status)
