"""What the kernel dumped against what was handled, so that no core is lost in silence.

Two witnesses that know nothing of each other:

    the kernel        says when it begins a dump, and how each process ended (`forwarder/proc_events.py`)
    the handlers      note what became of a crash, when they are done with it (`forwarder/handled.py`)

The watcher listens to both and keeps a book, below /var/lib so that it outlives a restart and a reboot. A crash that
has ended and that no handler speaks of some seconds later is lost, and the book says so, and what was seen of it. A
handler that was killed after it had asked a receiver is not the last word: the receiver's store is looked into. When
nobody watched, the book says that, too: what it does not know it does not call fine.

A process is known by its pidfd's inode, or by its number and the time: numbers come again, and clocks are set. Only the
records in a store have no better name than number and wall clock.

    watch.py      the watcher                       book.py       the book on the disk
    sight.py      what is seen of a process         notes.py      what the handlers noted
    judge.py      one crash's verdict               compare.py    what the stores say of many
    stores.py     records in stores

What the kernel says of disk quotas has a place in the same watcher and the same book: `forwarder/quota/`.
"""

from __future__ import annotations

import json
import os
import time
from dataclasses import asdict, dataclass

from forwarder.handled import NOTES
from forwarder.ledger.book import (
    BOOK,
    COUNTED,
    LOST,
    PASSED,
    UNCLEAR,
    Contents,
    Crash,
    Gap,
    add_gap,
    enter,
    is_watched,
    read_book,
)
from forwarder.ledger.book import LedgerError as LedgerError
from forwarder.ledger.compare import Receivers, in_host
from forwarder.ledger.judge import judge
from forwarder.ledger.notes import Notes
from forwarder.ledger.sight import boot_id, is_there, stubs_at_work
from forwarder.ledger.stores import DEFAULT, UNSEEN


@dataclass(frozen=True)
class Ledger:
    """What `ledger` shows; `as_json` is part of the interface.

    watched: whether a watcher runs now. since: the first moment that was watched. pending: dumps that are under way, or
    too young to tell.
    """

    watched: bool
    since: float | None
    gaps: list[Gap]
    named: list[Crash]
    pending: int
    counts: dict[str, int]
    forgotten: int

    @property
    def lost(self) -> list[Crash]:
        return [crash for crash in self.named if crash.state == LOST]

    def as_json(self) -> str:
        """Return the JSON form."""
        return json.dumps(
            {
                "watched": self.watched,
                "since": self.since,
                "gaps": [asdict(gap) for gap in self.gaps],
                "crashes": [{**asdict(crash), "signal": crash.signal} for crash in self.named],
                "pending": self.pending,
                "counts": self.counts,
                "forgotten": self.forgotten,
            },
            indent=2,
        )


@dataclass(frozen=True)
class Summary:
    """The ledger in `status`, whose keys are part of the interface.

    watched: whether a watcher runs, None when only root can tell. since: seconds since the epoch, the first moment that
    was watched; None when there was none. lost, passed, unclear: crashes since then, as the book has them now.
    quota_warnings: how many the kernel gave since then (`core-pipe-forwarder quota`).
    """

    watched: bool | None = None
    since: float | None = None
    lost: int = 0
    passed: int = 0
    unclear: int = 0
    quota_warnings: int = 0


def summary(path: str = BOOK) -> Summary:
    """Return what a book says, without looking any further."""
    try:
        watched = is_watched(path)
        contents = read_book(path)
    except FileNotFoundError:
        return Summary(watched=False)
    except OSError:
        return Summary()
    states = [crash.state for crash in contents.named.values()]
    return Summary(
        watched=watched,
        since=contents.since,
        lost=states.count(LOST),
        passed=states.count(PASSED),
        unclear=states.count(UNCLEAR),
        quota_warnings=contents.quota.counts.total(),
    )


def ledger(path: str = BOOK, notes_path: str = NOTES, *, store: str = DEFAULT, since: float = 0.0) -> Ledger:
    """Look, and change nothing. store: the host's. since: seconds since the epoch. Raises LedgerError.

    Where no watcher runs any more, what it left open is compared here.
    """
    start = "start it: systemctl enable --now core_pipe-ledger.service, or core-pipe-forwarder ledger --watch"
    try:
        contents = read_book(path)
        watched = is_watched(path)
        last = os.stat(path).st_mtime
    except FileNotFoundError:
        raise LedgerError("the ledger has never watched on this machine", start) from None
    except PermissionError:
        raise LedgerError(f"{path} is root's", "run it again with sudo") from None
    if not watched:
        add_gap(contents, Gap(last, time.time(), "the ledger does not watch"))
        _compare(contents, notes_path, store)
    return Ledger(
        watched=watched,
        since=contents.since,
        gaps=[gap for gap in contents.gaps if gap.ended >= since],
        named=sorted((crash for crash in contents.named.values() if crash.at >= since), key=lambda crash: crash.at),
        pending=len(contents.open),
        counts={state: contents.counts[state] for state in COUNTED},
        forgotten=contents.forgotten,
    )


def _compare(contents: Contents, notes_path: str, store: str) -> None:
    boot, notes = boot_id(), Notes(notes_path)
    try:
        at_work = stubs_at_work() if contents.open else set()
        notes.read(turn=False)
        ended = []
        for crash in [*contents.open.values(), *contents.named.values()]:
            said = notes.of(crash) if crash.boot == boot else []
            if said or not (crash.state or (crash.boot == boot and (is_there(crash) or crash.pid in at_work))):
                ended.append((crash, said))
        receivers = Receivers()
        receivers.wait(ended)
        for (crash, said), hosts in zip(ended, in_host(store, [crash for crash, _ in ended]), strict=True):
            answer = receivers.answer(crash, said) or UNSEEN
            crash.state, crash.why = judge(crash, said, boot, receivers=answer, hosts=hosts)
            enter(contents, crash)
        receivers.close()
    finally:
        notes.close()
