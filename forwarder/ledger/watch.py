"""The watcher: listens to both witnesses, and keeps the book."""

from __future__ import annotations

import contextlib
import select
import time
from dataclasses import asdict
from typing import TYPE_CHECKING

from forwarder.handled import ON_THE_WAY
from forwarder.ledger.book import LOST, UNCLEAR, Crash, Gap, add_gap, enter
from forwarder.ledger.compare import Receivers, in_host, is_last_word
from forwarder.ledger.judge import judge
from forwarder.ledger.sight import boot_id, is_there, look, stubs_at_work
from forwarder.ledger.stores import DEFAULT, FOUND, UNSEEN
from forwarder.proc_events import Dump, Exit, Overrun
from forwarder.quota.watch import QuotaWatch

if TYPE_CHECKING:
    from collections.abc import Callable

    from forwarder.ledger.book import Book
    from forwarder.ledger.notes import Notes
    from forwarder.proc_events import ProcEvents
    from forwarder.quota.events import QuotaEvents
    from forwarder.quota.tell import Tell

# Two reports of one crash may come in any order; and a stub that nobody took a core of writes a record after the end.
SETTLE_SECONDS = 5.0
# A receiver that was asked may be busy with others, find the offer late, and leave a record of it.
ASKED_SECONDS = 60.0
# A line in the book and in the journal more seldom than that is enough for a storm.
REPORT_SECONDS = 60.0
# How often the book's time says "still watching": the most by which a gap may be told too long.
ALIVE_SECONDS = 5.0
TICK_SECONDS = 0.5
# So many are followed at once.
MAX_OPEN = 2000
# A note for a crash that nobody saw begin: the watcher came later, or events were lost.
STRAY_SECONDS = 120


class Watcher:
    """Listens, and keeps the book."""

    def __init__(
        self,
        events: ProcEvents,
        book: Book,
        notes: Notes,
        *,
        quota: QuotaEvents | None = None,
        tell: Tell | None = None,
        store: str = DEFAULT,
        settle_seconds: float = SETTLE_SECONDS,
        asked_seconds: float = ASKED_SECONDS,
        say: Callable[[str], None] = lambda _: None,
        tick: Callable[[], None] = lambda: None,
    ) -> None:
        """Take over the book. Raises LedgerError, OSError.

        quota: the kernel's warnings, where it gives any. tell: hands them to callbacks. store: the host's.
        settle_seconds, asked_seconds: from the end of a crash to the verdict on it; the second where a receiver was
        asked. say: gets a line for people now and then. tick: is called every few seconds while all is well.
        """
        self.events = events
        self.book = book
        self.notes = notes
        self.store = store
        self.settle_ns = int(settle_seconds * 1e9)
        self.asked_ns = int(asked_seconds * 1e9)
        self.say = say
        self.tick = tick
        self.boot = boot_id()
        self.contents, last = book.open()
        self._by_pid = {crash.pid: crash for crash in self.contents.open.values() if crash.boot == self.boot}
        self._fresh: list[Crash] = []
        self._said = float("-inf")
        self._receivers = Receivers()
        self._watched_until = time.time()
        now = time.time()
        if self.contents.since is None:
            self.contents.since = now
            book.write("since", at=now)
        elif last is not None:
            self._gap(last, "the ledger did not watch")
        self.tell = tell
        self.quota = (
            QuotaWatch(quota, book, self.contents.quota, say=say, tell=tell or (lambda _: None)) if quota else None
        )

    def _gap(self, begun: float, why: str) -> None:
        # A clock that was set back makes it look as if it ended before it began.
        now = time.time()
        gap = Gap(min(begun, now), now, why)
        add_gap(self.contents, gap)
        self.book.write("gap", **asdict(gap))

    def run(self, wake: int) -> None:
        """Watch until `wake` can be read, and then once more take in what has come."""
        poll = select.poll()
        poll.register(self.events.fileno(), select.POLLIN)
        poll.register(wake, select.POLLIN)
        alive = settle = 0.0
        while True:
            if self.quota:
                self.quota.register(poll)
            ready = {fd for fd, _ in poll.poll(TICK_SECONDS * 1000)}
            self.take()
            if self.quota:
                self.quota.take()
            now = time.monotonic()
            if now >= settle or wake in ready:
                self.settle()
                if self.quota:
                    self.quota.settle(last=wake in ready)
                if self.tell:
                    self.tell.settle()
                settle = now + TICK_SECONDS
            if now >= alive or wake in ready:
                self.book.alive()
                self.tick()
                alive = now + ALIVE_SECONDS
            if wake in ready:
                self._receivers.close()
                return

    def take(self) -> None:
        """Take in all events that wait."""
        while True:
            try:
                event = self.events.read()
            except Overrun:
                self._gap(self._watched_until, "more happened than could be taken in")
                continue
            if event is None:
                self._watched_until = time.time()
                return
            if isinstance(event, Dump):
                crash = look(event, self.boot)
                self._by_pid[crash.pid] = crash
                self._enter(crash)
                if len(self.contents.open) > MAX_OPEN:
                    self._close(next(iter(self.contents.open.values())), UNCLEAR, "too many at once to follow each")
            else:
                self._end(event)

    def _end(self, event: Exit) -> None:
        crash = self._by_pid.get(event.pid)
        # The thread that dumped: others may have ended long before it crashed.
        # It may have been missed in /proc already: the event comes after it has been reaped.
        if crash is not None and event.tid == crash.tid and crash.status < 0:
            crash.ended, crash.status = event.at, event.status
            self._enter(crash)

    def _enter(self, crash: Crash) -> None:
        enter(self.contents, crash)
        self.book.write("crash", **asdict(crash))

    def _close(self, crash: Crash, state: str, why: str) -> None:
        crash.state, crash.why = state, why
        if self._by_pid.get(crash.pid) is crash:
            del self._by_pid[crash.pid]
        notes = self.notes.of(crash)
        if notes and not crash.key and notes[-1].key != "-":
            # It was over before we could look, but its handler had.
            crash.key = notes[-1].key
        self.notes.drop(notes)
        self._receivers.forget(crash)
        if state == LOST:
            self._fresh.append(crash)
        self._enter(crash)

    def settle(self) -> None:
        """Compare: close those that a handler speaks of, and those that are over for some time."""
        self.notes.read(turn=True)
        now = time.monotonic_ns()
        overdue = []
        for crash in list(self.contents.open.values()):
            if crash.boot != self.boot:
                self._close(crash, *judge(crash, [], self.boot))
            elif is_last_word(notes := self.notes.of(crash)):
                self._close(crash, *judge(crash, notes, self.boot))
            elif not crash.ended:
                if not is_there(crash):
                    crash.ended = now
            elif now - crash.ended >= self.settle_ns:
                overdue.append(crash)
        if overdue:
            self._compare(overdue, now)
        # A handler that came back from the dead: what it notes counts, whenever it comes.
        for crash in list(self.contents.named.values()):
            if crash.boot == self.boot and is_last_word(notes := self.notes.of(crash)):
                self._close(crash, *judge(crash, notes, self.boot))
        self.notes.forget(now - STRAY_SECONDS * 10**9, but=self._by_pid)
        self.book.flush()
        if self.book.is_long():
            with contextlib.suppress(OSError):
                self.book.rewrite(self.contents)
        self._report()

    def _compare(self, overdue: list[Crash], now: int) -> None:
        at_work = stubs_at_work()
        # One may have ended between the two looks, and what it noted is there now.
        self.notes.read(turn=False)
        idle = [crash for crash in overdue if crash.pid not in at_work]
        asked = []
        self._receivers.take()
        for crash, hosts in zip(idle, in_host(self.store, idle), strict=True):
            notes = self.notes.of(crash)
            receivers = self._receivers.answer(crash, notes)
            if receivers is None and hosts != FOUND:
                asked.append((crash, notes))
                continue
            state, why = judge(crash, notes, self.boot, receivers=receivers or UNSEEN, hosts=hosts)
            if state == LOST and notes and notes[-1].state in ON_THE_WAY and now - crash.ended < self.asked_ns:
                # A receiver that is busy may find the offer later, and leave a record of it.
                asked.append((crash, notes))
                continue
            self._close(crash, state, why)
        self._receivers.ask(asked)

    def _report(self) -> None:
        if not self._fresh or time.monotonic() < self._said + REPORT_SECONDS:
            return
        first = self._fresh[0]
        more = f", and {len(self._fresh) - 1} more" if len(self._fresh) > 1 else ""
        self._said = time.monotonic()
        self._fresh = []
        self.say(f"a crash has no record: {describe(first)}{more}. See: core-pipe-forwarder ledger")


def describe(crash: Crash) -> str:
    """Return one crash in a line of ASCII without control characters."""
    name = f" ({ascii(crash.comm)[1:-1][:64]})" if crash.comm else ""
    died = f", signal {crash.signal}" if crash.signal else ""
    return f"pid {crash.pid}{name} of {ascii(crash.key)[1:-1] or 'an unknown container'}{died}: {crash.why}"
