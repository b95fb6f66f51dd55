"""Hands each new record to the host's callbacks (`[[notify]]` with `events = ["quota"]`), by a file in its store.

The watcher must not wait, nor end, for whoever is told: what cannot be handed on costs a count and a line.
"""

from __future__ import annotations

import os
import time
from collections import deque
from dataclasses import asdict
from typing import TYPE_CHECKING

from receiver.protocol import printable

if TYPE_CHECKING:
    from collections.abc import Callable

    from forwarder.quota.tally import QuotaWarning

# The first at once, and then all that came together.
TURN_SECONDS = 0.5
# A line for people more seldom than that is enough.
REPORT_SECONDS = 60.0


class Tell:
    """Is called with each new record. store: the host's, a path. say: gets a line for people now and then.

    untold: how many callbacks do not hear of.
    """

    def __init__(self, store: str, say: Callable[[str], None] = lambda _: None) -> None:
        self.store = store
        self.say = say
        self.untold = 0
        self._waiting: deque[QuotaWarning] = deque()
        self._said_untold = 0
        self._why = ""
        self._resume_at = self._say_at = float("-inf")

    def __call__(self, one: QuotaWarning) -> None:
        """Take a record, and hand it on as soon as that is no flood. Never raises."""
        from receiver.notify import quota  # noqa: PLC0415 - most watchers never need it

        self._waiting.append(one)
        if len(self._waiting) > quota.MOST:
            self._waiting.popleft()
            self.untold, self._why = self.untold + 1, "more came than could be handed on"
        if time.monotonic() >= self._resume_at:
            self.settle()

    def settle(self) -> None:
        """Hand on what waits, and say what could not be. Never raises."""
        if self._waiting:
            events = list(self._waiting)
            self._waiting.clear()
            try:
                self._leave(events)
            except Exception as error:
                # Whatever it is, the ledger goes on.
                self.untold, self._why = self.untold + len(events), f"{type(error).__name__}: {error}"
            self._resume_at = time.monotonic() + TURN_SECONDS
        if self.untold > self._said_untold and time.monotonic() >= self._say_at:
            self._say_at = time.monotonic() + REPORT_SECONDS
            text = f"quota: callbacks are not told of {self.untold - self._said_untold} warnings: {self._why}"
            self._said_untold = self.untold
            self.say(printable(text.encode("utf-8", "backslashreplace"), 500))

    def _leave(self, records: list[QuotaWarning]) -> None:
        from receiver.config import ConfigError, load  # noqa: PLC0415
        from receiver.notify import quota  # noqa: PLC0415

        try:
            if not quota.is_wanted(load().notify):
                return
        except ConfigError:
            # The deliverer says what is wrong with the settings; they wait until it is mended.
            pass
        host = os.uname().nodename
        untold, why = quota.leave(
            self.store, [{"event": quota.TYPE, "host_name": host, **asdict(one)} for one in records]
        )
        if untold:
            self.untold, self._why = self.untold + untold, why
