"""Quota warnings as a part of the ledger's watcher: takes them in, names whose they are, and keeps them in its book."""

from __future__ import annotations

import contextlib
import select
import time
from collections import Counter
from dataclasses import asdict
from typing import TYPE_CHECKING

from forwarder.quota.owners import Owners
from forwarder.quota.tally import MAX_IDS, OTHERS, RECORD_SECONDS, QuotaWarning, enter
from receiver.protocol import printable

if TYPE_CHECKING:
    from collections.abc import Callable

    from forwarder.ledger.book import Book
    from forwarder.quota.events import QuotaEvents, Warned
    from forwarder.quota.tally import Tally

# A record that counts on is written so often; its first warning at once.
WRITE_SECONDS = 10.0
# A line for people more seldom than that is enough.
REPORT_SECONDS = 60.0
# So many are taken in at a time, some tenth of a second's work, and then not before TURN_SECONDS have passed: whoever
# crosses his limit as fast as he can does not get all of a processor of the host's. What waits too long is counted.
MAX_A_TURN = 20000
TURN_SECONDS = 0.5

SAID = {
    "inodes_hard": "has no inodes left",
    "inodes_grace": "had too many inodes for too long, and gets no more",
    "inodes_soft": "has more inodes than its soft limit",
    "space_hard": "has no space left",
    "space_grace": "had too much space for too long, and gets no more",
    "space_soft": "has more space than its soft limit",
}
# What ends what. Who falls below both of his limits at once is said to be below the soft one.
ENDS = {
    "inodes_below_hard": ("inodes_hard",),
    "inodes_below_soft": ("inodes_hard", "inodes_soft", "inodes_grace"),
    "space_below_hard": ("space_hard",),
    "space_below_soft": ("space_hard", "space_soft", "space_grace"),
}
# With these something fails, and somebody should hear of it.
USED_UP = ("inodes_hard", "inodes_grace", "space_hard", "space_grace")


class QuotaWatch:
    """Takes warnings in, and keeps them. Owns nothing: the watcher's events and book are given."""

    def __init__(
        self,
        events: QuotaEvents,
        book: Book,
        tally: Tally,
        *,
        owners: Owners | None = None,
        say: Callable[[str], None] = lambda _: None,
        tell: Callable[[QuotaWarning], None] = lambda _: None,
    ) -> None:
        """Go on with the book's tally. say: gets a line for people now and then. tell: gets each new record, once."""
        self.events = events
        self.book = book
        self.tally = tally
        self.owners = owners or Owners()
        self.say = say
        self.tell = tell
        self._lost_before = tally.lost
        self._current = {one.quota: one for one in tally.records.values()}
        self._ids: Counter[str] = Counter()
        self._ids_since = time.time()
        self._unwritten: dict[tuple[object, ...], QuotaWarning] = {}
        self._write_at = self._say_at = self._resume_at = float("-inf")
        self._to_say: list[QuotaWarning] = []

    def register(self, poll: select.poll) -> None:
        """Have the next wait end when a warning comes, unless there were too many."""
        with contextlib.suppress(KeyError):
            poll.unregister(self.events)
        if time.monotonic() >= self._resume_at:
            poll.register(self.events, select.POLLIN)

    def take(self) -> None:
        """Take in what waits, within bounds. Raises OSError."""
        if time.monotonic() < self._resume_at:
            return
        for _ in range(MAX_A_TURN):
            warned = self.events.read()
            if warned is None:
                return
            self._enter(warned, time.time())
        self._resume_at = time.monotonic() + TURN_SECONDS

    def settle(self, *, last: bool = False) -> None:
        """Write and say what is due; when it is the last time, all of it."""
        now = time.monotonic()
        if self._unwritten and (last or now >= self._write_at):
            self._write_at = now + WRITE_SECONDS
            self._write()
        if self._to_say and now >= self._say_at:
            self._say_at = now + REPORT_SECONDS
            more = f", and {len(self._to_say) - 1} more" if len(self._to_say) > 1 else ""
            self.say(f"{describe(self._to_say[0])}{more}. See: core-pipe-forwarder quota")
            self._to_say = []

    def _write(self) -> None:
        for one in self._unwritten.values():
            self.book.write("quota", **asdict(one))
        self._unwritten.clear()
        self._write_counts()

    def _write_counts(self) -> None:
        self.tally.lost = self._lost_before + self.events.lost
        self.book.write("quotas", counts=dict(self.tally.counts), lost=self.tally.lost, forgotten=self.tally.forgotten)

    def _enter(self, warned: Warned, now: float) -> None:
        self.tally.counts[warned.kind] += 1
        if warned.kind in ENDS:
            # No record of its own: the kernel says this also of who had no such limit, and removes his last file.
            for kind in ENDS[warned.kind]:
                over = self._current.get((kind, warned.type, warned.number, warned.device, ""))
                if over is not None and not over.below:
                    over.below = now
                    self._unwritten[over.quota, over.at] = over
            return
        one = self._at_hand((warned.kind, warned.type, warned.number, warned.device, ""), now)
        if one is None:
            owner = self.owners.of(warned.type, warned.number, warned.caused_by)
            number = warned.number
            if abs(now - self._ids_since) >= RECORD_SECONDS:
                self._ids.clear()
                self._ids_since = now
            self._ids[owner.key] += 1
            if self._ids[owner.key] > MAX_IDS:
                number = OTHERS
                one = self._at_hand((warned.kind, warned.type, OTHERS, warned.device, owner.key), now)
            if one is None:
                self._begin(
                    QuotaWarning(
                        at=now,
                        last=now,
                        count=1,
                        kind=warned.kind,
                        type=warned.type,
                        id=number,
                        device=warned.device,
                        caused_by=warned.caused_by,
                        mount=self.owners.mount_of(warned.device),
                        name=owner.name if number != OTHERS else "",
                        containers=list(owner.containers),
                        key=owner.key,
                    )
                )
                return
        one.count += 1
        one.last, one.below = now, 0.0
        self._unwritten[one.quota, one.at] = one

    def _at_hand(self, quota: tuple[str, str, int, str, str], now: float) -> QuotaWarning | None:
        """Return the record of this hour. A clock that was set back by more than that begins a new one."""
        one = self._current.get(quota)
        if one is not None and abs(now - one.at) >= RECORD_SECONDS:
            del self._current[quota]
            return None
        return one

    def _begin(self, one: QuotaWarning) -> None:
        if len(self._current) > 2 * len(self.tally.records) + MAX_IDS:
            # Those whose hour is over and who never came again.
            self._current = {name: it for name, it in self._current.items() if abs(one.at - it.at) < RECORD_SECONDS}
        self._current[one.quota] = one
        enter(self.tally, one)
        self.book.write("quota", **asdict(one))
        self._write_counts()
        if one.kind in USED_UP:
            self._to_say.append(one)
        self.tell(one)


def describe(one: QuotaWarning) -> str:
    """Return one record in a line of ASCII without control characters."""
    whose = f"{one.type} {one.id}" if one.id != OTHERS else f"another {one.type}"
    name = f" ({one.name})" if one.name else ""
    containers = f" of {' or '.join(one.containers)}" if one.containers else ""
    text = f"quota: {whose}{name}{containers} {SAID.get(one.kind, one.kind)} on {one.mount or one.device}"
    return printable(text.encode("utf-8", "backslashreplace"), 500)
