"""Ask the stores about crashes whose handlers did not say how they ended, all of one receiver's at once."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from forwarder.handled import ASKED, ON_THE_WAY, UNRECORDED
from forwarder.ledger import stores
from forwarder.ledger.stores import FOUND, NOTHING, UNSEEN, Look

if TYPE_CHECKING:
    from collections.abc import Sequence

    from forwarder.ledger.book import Crash
    from forwarder.ledger.notes import Note

    Name = tuple[str, int, int]

# Receivers that are looked at at once.
MAX_LOOKS = 4
# Between two looks for the same crash.
AGAIN_SECONDS = 2.0
# A clock that was set by more in the meantime: times in names say nothing then.
CLOCK_SECONDS = 1.0


def is_last_word(notes: Sequence[Note]) -> bool:
    """Whether a handler has said that there is a record."""
    return bool(notes) and notes[-1].state not in (*ON_THE_WAY, UNRECORDED)


def listeners_of(notes: Sequence[Note]) -> dict[int, int]:
    """Return whom the handler of a crash asked: the listeners' pids, and when that was noted first."""
    found: dict[int, int] = {}
    for note in notes:
        if note.state in ON_THE_WAY and note.record.isascii() and note.record.isdigit():
            found.setdefault(int(note.record), note.at)
    return found


def pids_of(crash: Crash, notes: Sequence[Note]) -> str:
    """Return all numbers of its process, empty when they are not known: it was over too soon, and no receiver asked."""
    said = (note.reason for note in notes if note.state == ASKED and note.reason.replace(" ", "").isdigit())
    return crash.pids or next(said, "")


def in_host(store: str, crashes: Sequence[Crash]) -> list[str]:
    """Return for each crash whether the host's store has a record of it."""
    said = stores.in_host(store, [stores.wanted(str(crash.pid), crash.at) for crash in crashes])
    return [state if _same_clock(crash) else UNSEEN for crash, state in zip(crashes, said, strict=True)]


class Receivers:
    """What the stores of receivers say, asked without waiting."""

    def __init__(self) -> None:
        self._running: dict[int, tuple[Look, list[Name]]] = {}
        # Of each crash and listener: the answer, and when it came (time.monotonic()).
        self._answers: dict[tuple[Name, int], tuple[str, float]] = {}

    def close(self) -> None:
        for look, _ in self._running.values():
            look.close()
        self._running.clear()

    def take(self) -> None:
        """Take in what was answered."""
        for listener, (look, names) in list(self._running.items()):
            said = look.answers()
            if said is not None:
                del self._running[listener]
                for name, answer in zip(names, said, strict=True):
                    self._answers[name, listener] = (answer, time.monotonic())

    def ask(self, crashes: Sequence[tuple[Crash, list[Note]]]) -> None:
        """Look for those crashes for which that was not done lately. Each comes with its notes."""
        wanted: dict[int, list[tuple[Name, stores.Wanted]]] = {}
        noted: dict[int, int] = {}
        before = time.monotonic() - AGAIN_SECONDS
        for crash, notes in crashes:
            for listener, at in listeners_of(notes).items():
                if self._answers.get((crash.name, listener), ("", float("-inf")))[1] <= before:
                    what = stores.wanted(pids_of(crash, notes) or str(crash.pid), crash.at)
                    wanted.setdefault(listener, []).append((crash.name, what))
                    noted[listener] = min(at, noted.get(listener, at))
        for listener, whose in wanted.items():
            if listener in self._running or len(self._running) >= MAX_LOOKS:
                continue
            some = whose[: stores.MAX_CRASHES]
            try:
                look = Look(listener, noted[listener], [what for _, what in some])
            except OSError:
                # No memory for a process: at another time.
                continue
            self._running[listener] = (look, [name for name, _ in some])

    def answer(self, crash: Crash, notes: list[Note]) -> str | None:
        """Return whether a receiver has a record of a crash; None when not all have been asked."""
        if not _same_clock(crash):
            return UNSEEN
        found = [self._answers.get((crash.name, listener), (None, 0.0))[0] for listener in listeners_of(notes)]
        if FOUND in found:
            return FOUND
        if None in found:
            return None
        return NOTHING if set(found) == {NOTHING} and pids_of(crash, notes) else UNSEEN

    def forget(self, crash: Crash) -> None:
        """Drop what was answered about a crash."""
        for key in [key for key in self._answers if key[0] == crash.name]:
            del self._answers[key]

    def wait(self, crashes: Sequence[tuple[Crash, list[Note]]]) -> None:
        """Ask for all of these, and wait until it is known; each receiver has a deadline."""
        begun = time.monotonic()
        while time.monotonic() < begun + AGAIN_SECONDS * (1 + len(crashes)):
            self.take()
            open_ones = [found for found in crashes if self.answer(*found) is None]
            if not open_ones:
                return
            self.ask(open_ones)
            time.sleep(0.01)


def _same_clock(crash: Crash) -> bool:
    then = crash.at - crash.began / 1e9
    return abs(time.time() - time.monotonic() - then) < CLOCK_SECONDS
