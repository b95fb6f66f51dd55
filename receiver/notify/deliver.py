"""The deliverer: looks what is new in the store, tells who is to be told, and leaves when nobody waits any more.

At most one process for each callback at a time: one that hangs holds up nobody else's, and a server is not asked for
more by a storm of crashes than by a crash.
"""

from __future__ import annotations

import os
import select
import signal
import time
from typing import TYPE_CHECKING

from receiver import notify
from receiver.log import log
from receiver.notify import events, queue, quota
from receiver.notify.attempt import Attempt, Outcome, Unsendable, body_of
from receiver.notify.settings import CRASH, QUOTA
from receiver.store import ID, Store, StoreError

if TYPE_CHECKING:
    from collections.abc import Iterable

    from receiver.config import Config
    from receiver.notify.queue import Line, Queue
    from receiver.notify.settings import Callback

EXIT_OK, EXIT_FAILURE = 0, 1
# It stays a little when all is told: crashes seldom come alone, and so systemd starts it twelve times a minute at most.
LINGER_SECONDS = 5.0
# How often to look for the flag, meanwhile, and while it waits for somebody who fails.
LINGER_LOOK_SECONDS, LOOK_SECONDS = 0.2, 1.0
# When it is told to stop it tries all that is due, for so long: the crash that ends a container is the one to be told.
# Who is on his way then is told again at the next start.
STOP_SECONDS = 5.0
# For who is about to leave.
PATIENCE_SECONDS = 2.0
# Of its time it writes the queue for a twentieth at most: who is told twice after a SIGKILL can tell.
SAVE_SHARE = 20
# Crashes from before it was configured are not told, nor those of so long ago.
DAY = 86400.0


class Deliverer:
    """Tells what is in a store. Owns a descriptor for being woken; the store is the caller's."""

    def __init__(self, store: Store, callbacks: Iterable[Callback], since: float) -> None:
        self.store = store
        self.callbacks = {callback.name: callback for callback in callbacks}
        self.since = since
        self.queue: Queue = queue.Queue()
        self.attempts: dict[str, Attempt] = {}
        # Ids of quota events whose file is there.
        self.quotas: set[str] = set()
        self.linger_seconds = LINGER_SECONDS
        self._stopping = self._too_late = False
        self._unsaved = False
        self._cannot_save = self._cannot_remove = False
        self._next_save = 0.0
        self._awake, self._waker = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)

    def run(self) -> int:
        """Tell until nobody waits, or until SIGTERM. Returns the exit status: another deliverer is no failure."""
        lock = None
        numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGCHLD)
        previous = {number: signal.signal(number, self._heard) for number in numbers}
        fd = signal.set_wakeup_fd(self._waker, warn_on_full_buffer=False)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, numbers)
        try:
            lock = self._lock()
            if lock is not None:
                self._read()
                self._loop()
                self._end()
        finally:
            signal.set_wakeup_fd(fd)
            for number, handler in previous.items():
                signal.signal(number, handler)
            if lock is not None:
                os.close(lock)
            os.close(self._awake)
            os.close(self._waker)
        return EXIT_OK

    def _lock(self) -> int | None:
        """Return the lock; None when another deliverer has it and knows all there is, or when it is time to stop.

        Leaving with the flag there would have systemd start the next one at once, and so on. And who has the lock may
        be a process of one that was killed, just before it closes what it has from him.
        """
        patient_until = time.monotonic() + PATIENCE_SECONDS
        while (found := queue.lock(self.store.directory)) is None:
            if self._stopping:
                return None
            if time.monotonic() >= patient_until and not notify.is_awaited(self.store.directory):
                return None
            self._wait(LINGER_LOOK_SECONDS)
        return found

    def _heard(self, number: int, _frame: object) -> None:
        if number != signal.SIGCHLD:
            self._stopping = True

    def _read(self) -> None:
        try:
            found = queue.read(self.store.directory)
        except (OSError, ValueError) as error:
            log(f"callbacks: {queue.STATE} is not usable ({error}); what is new is looked for anew", error=True)
            found = None
        self.queue = found or queue.Queue()
        self.queue.attend(self.callbacks.values(), self.since)

    def _loop(self) -> None:
        self._look()
        idle_since = time.monotonic()
        while not self._stopping:
            if notify.is_awaited(self.store.directory):
                self._look()
            self._turn()
            self._begin()
            self._save()
            busy = bool(self.attempts) or any(line.waiting for line in self.queue.lines.values())
            if busy:
                idle_since = time.monotonic()
            elif time.monotonic() - idle_since >= self.linger_seconds:
                self._save(now=True)
                # Who came just now starts the next one: the flag stands.
                return
            self._wait(LOOK_SECONDS if busy else LINGER_LOOK_SECONDS)

    def _end(self) -> None:
        """Try what is due, and see those off that are on their way."""
        deadline = time.monotonic() + STOP_SECONDS
        if self._stopping:
            self._look()
            self._begin()
        while self.attempts:
            if time.monotonic() >= deadline:
                self._too_late = True
                for attempt in self.attempts.values():
                    attempt.deadline = 0.0
            self._turn()
            if not self._too_late:
                self._begin()
            if self.attempts:
                self._wait(LINGER_LOOK_SECONDS)
        self._save(now=True)

    def _wait(self, seconds: float) -> None:
        now = time.time()
        for name, line in self.queue.lines.items():
            at = line.next()
            if at is not None and name not in self.attempts:
                seconds = min(seconds, max(at - now, 0.0))
        poll = select.poll()
        poll.register(self._awake, select.POLLIN)
        for attempt in self.attempts.values():
            seconds = min(seconds, max(attempt.deadline - time.monotonic(), 0.05))
            for fd in attempt.descriptors():
                poll.register(fd, select.POLLIN)
        poll.poll(seconds * 1000 + 1)
        try:
            while os.read(self._awake, 4096):
                pass
        except BlockingIOError:
            pass

    # What is new

    def _look(self) -> None:
        """Queue what is new in the store."""
        try:
            # First this: whoever comes while we look sets it again.
            os.unlink(notify.FLAG, dir_fd=self.store.directory)
        except FileNotFoundError:
            pass
        except OSError as error:
            # Once: it is tried again at each look.
            if not self._cannot_remove:
                log(f"callbacks: {self.store.path}/{notify.FLAG} cannot be removed: {error.strerror}", error=True)
            self._cannot_remove = True
        found = {
            owner
            for name in self.store.names()
            if name.endswith(".json") and ID.fullmatch(owner := name.removesuffix(".json"))
        }
        self.quotas = quota.owners_in(self.store.directory) - found
        self._unsaved |= bool(self.queue.seen - found - self.quotas)
        self.queue.seen &= found | self.quotas
        for owner in sorted((found | self.quotas) - self.queue.seen):
            if owner in self.quotas:
                self._look_at_quota(owner)
            else:
                self._look_at(owner)
        self._unsaved |= bool(self.quotas)

    def _look_at(self, owner: str) -> None:
        try:
            came = os.stat(f"{owner}.json", dir_fd=self.store.directory, follow_symlinks=False).st_mtime
            record = self.store.load(owner)
        except FileNotFoundError:
            return
        except ValueError:
            # No record: it will be none the next time either.
            record = None
        except OSError:
            # Want of memory or descriptors: the next look has it still before it.
            return
        self.queue.seen.add(owner)
        self._unsaved = True
        if record is None or events.is_mute(record):
            return
        now = time.time()
        for name, callback in self.callbacks.items():
            line, when = self.queue.lines[name], callback.when
            if CRASH not in callback.events or came < line.since or not events.is_meant(record, when):
                continue
            counted = when.first or when.every
            if not counted or events.is_due(when, line.count_bug(events.bug_of(record))):
                line.add(owner, now, callback.queue_max)

    def _look_at_quota(self, owner: str) -> None:
        try:
            came = quota.came(self.store.directory, owner)
        except OSError:
            # There were too many; or the next look has it still before it.
            self.quotas.discard(owner)
            return
        self.queue.seen.add(owner)
        now = time.time()
        for name, callback in self.callbacks.items():
            line = self.queue.lines[name]
            if QUOTA in callback.events and came >= line.since:
                line.add(owner, now, callback.queue_max)

    def _remove_told(self) -> None:
        """Remove the quota events that nobody is to be told of any more."""
        waiting = {owner for line in self.queue.lines.values() for owner in line.waiting}
        for owner in self.quotas - waiting:
            try:
                quota.remove(self.store.directory, owner)
            except OSError:
                # It stays, and is known: the next look tries again.
                continue
            self.quotas.discard(owner)

    # Who is told

    def _begin(self) -> None:
        for name, line in self.queue.lines.items():
            while name not in self.attempts and (owner := line.due(time.time())) is not None:
                self._try(self.callbacks[name], line, owner)

    def _try(self, callback: Callback, line: Line, owner: str) -> None:
        try:
            if owner in self.quotas:
                body = quota.body(owner, quota.read(self.store.directory, owner), callback)
            else:
                body = body_of(callback, self.store.load(owner))
        except (FileNotFoundError, ValueError, Unsendable):
            # Gone, with the oldest records; or it is none that could be told.
            line.drop(owner)
            self._unsaved = True
            return
        except OSError as error:
            self._failed(callback, line, owner, Outcome(False, f"its record cannot be read: {error.strerror}"))
            return
        try:
            self.attempts[callback.name] = Attempt(callback, owner, body)
        except (OSError, Unsendable) as error:
            text = error.strerror or "" if isinstance(error, OSError) else str(error)
            self._failed(callback, line, owner, Outcome(False, text))

    def _turn(self) -> None:
        for name, attempt in list(self.attempts.items()):
            outcome = attempt.turn()
            if outcome is None:
                continue
            del self.attempts[name]
            line = self.queue.lines[name]
            if outcome.ok:
                self._unsaved = True
                failures = line.failures
                if line.succeeded(attempt.owner):
                    log(f"callback {name}: it works again, after {failures} failures")
            elif not self._too_late:
                self._failed(attempt.callback, line, attempt.owner, outcome)

    def _failed(self, callback: Callback, line: Line, owner: str, outcome: Outcome) -> None:
        self._unsaved = True
        if line.failed(owner, outcome.text, time.time(), outcome.retry_after):
            log(
                f"callback {callback.name}: {outcome.text}. It is tried again, and no more said until it works; see "
                "core-pipe-receiver notify --status",
                error=True,
            )

    def _save(self, *, now: bool = False) -> None:
        """Write the queue if there is anything new, and if that does not take up our time."""
        begun = time.monotonic()
        if not self._unsaved or (begun < self._next_save and not now):
            return
        try:
            queue.write(self.store.directory, self.queue)
            # Not before: who is killed in between would count what he has told as dropped.
            self._remove_told()
        except OSError as error:
            if not self._cannot_save:
                log(f"callbacks: the queue cannot be written: {error.strerror}. A restart tells some again", error=True)
            self._cannot_save = True
            self._next_save = time.monotonic() + LOOK_SECONDS
            return
        self._unsaved = self._cannot_save = False
        self._next_save = time.monotonic() + SAVE_SHARE * (time.monotonic() - begun)


def deliver(config: Config, callbacks: tuple[Callback, ...], source: str) -> int:
    """Be the deliverer of the configured store. source: the settings' file. Returns the exit status."""
    if any(callback.post for callback in callbacks):
        # For all that are forked.
        from receiver.notify import post  # noqa: F401, PLC0415
    try:
        written = os.stat(source).st_mtime
    except OSError:
        written = 0.0
    try:
        store = Store.configured(config)
    except StoreError as error:
        log(f"callbacks: {error}", error=True)
        return EXIT_FAILURE
    try:
        return Deliverer(store, callbacks, max(written, time.time() - DAY)).run()
    except OSError as error:
        log(f"callbacks: {store.path}: {error.strerror}", error=True)
        return EXIT_FAILURE
    finally:
        store.close()
