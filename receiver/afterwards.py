"""What follows a crash that is in the store: the journal's entry, the counters, and a word to who is called back.

Called once for each crash, by whoever brought it to its end: its worker, who has let the crashed process go; the next
start, for one whose worker was killed (`Store.untold`); the host, for one that no receiver took. Nobody waits for it,
and nothing of it may cost a crash that is stored: each step has a deadline, and what goes wrong is one line.

Import budget: with Accept=yes this is imported for each crash. A step's module is imported when there is work for it.
"""

from __future__ import annotations

import signal
import time
from typing import TYPE_CHECKING

from receiver.log import log

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import FrameType

    from receiver.config import Config
    from receiver.record import Record
    from receiver.store import Store

# Each step has its own, shorter deadlines where it can name what it waits for. This one is for what nobody thought of.
STEP_SECONDS = 5.0


class _Late(BaseException):
    """A step took too long. No Exception: no step is to take it for one of its own."""


def afterwards(record: Record, config: Config, store: Store) -> bool:
    """Tell of a crash that is visible in the store. Returns whether the journal has an entry of it. Never raises."""
    told = _guarded("its entry in the journal", lambda: _tell(record, config))
    _guarded("the counters", lambda: _count(record, config, store))
    _guarded("the callbacks", lambda: _wake(config, store))
    return told


def _tell(record: Record, config: Config) -> bool:
    if not config.journal:
        return False
    from receiver import journal_entry  # noqa: PLC0415

    return journal_entry.tell(record)


def _count(record: Record, config: Config, store: Store) -> bool:
    from receiver import counters  # noqa: PLC0415

    counters.count(record, store, config)
    return True


def _wake(config: Config, store: Store) -> bool:
    if not config.notify:
        return False
    from receiver import notify  # noqa: PLC0415

    notify.wake(store)
    return True


def _guarded(what: str, step: Callable[[], bool]) -> bool:
    """Do a step within its time. Returns its result, False when it came to none. Never raises."""
    try:
        return _within(STEP_SECONDS, step)
    except _Late:
        log(f"after a crash: {what}: not done within {STEP_SECONDS:g} s", error=True)
    except Exception as error:
        log(f"after a crash: {what}: {type(error).__name__}: {error}", error=True)
    return False


def _within(seconds: float, step: Callable[[], bool]) -> bool:
    """Return what `step` returns. Raises _Late when it takes longer, wherever it is then.

    Only a process's first thread hears signals; in another one a step has its own deadlines and no more.
    """
    running = True

    def late(_number: int, _frame: FrameType | None) -> None:
        if running:
            raise _Late

    try:
        previous = signal.signal(signal.SIGALRM, late)
    except ValueError:
        return step()
    begun = time.monotonic()
    left, interval = signal.getitimer(signal.ITIMER_REAL)
    try:
        try:
            # Again and again: the first may come where Python cannot raise (in a destructor).
            signal.setitimer(signal.ITIMER_REAL, seconds, 1.0)
            return step()
        finally:
            running = False
            signal.setitimer(signal.ITIMER_REAL, 0)
    finally:
        # Once more: the alarm may have come just there.
        running = False
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
        if left:
            # Somebody else's, who is not to wait for it in vain.
            signal.setitimer(signal.ITIMER_REAL, max(left - (time.monotonic() - begun), 0.001), interval)
