"""What became of a crash that has ended: the kernel's word on it against the handlers' and the stores'.

The kernel's core bit (WCOREDUMP) only says that a dump began, not that anybody read it (fs/binfmt_elf.c: has_dumped):
it tells a crash whose handler vanished from one that never had a handler.
"""

from __future__ import annotations

import signal
from typing import TYPE_CHECKING

from forwarder.handled import ACCEPTED, ASKED, ON_THE_WAY, UNRECORDED
from forwarder.ledger.book import ELSEWHERE, HANDLED, LOST, PASSED, UNCLEAR, UNWANTED
from forwarder.ledger.stores import FOUND, NOTHING, UNSEEN

if TYPE_CHECKING:
    from forwarder.ledger.book import Crash
    from forwarder.ledger.notes import Note

CORE_BIT = 0x80


def judge(
    crash: Crash, notes: list[Note], boot: str, *, receivers: str = UNSEEN, hosts: str = NOTHING
) -> tuple[str, str]:
    """Return the state of a crash that has ended, and why.

    notes: its handler's. receivers, hosts: whether there is a record of it in the store of a receiver that was asked,
    and in the host's (`forwarder/ledger/stores.py`).
    """
    note = notes[-1] if notes else None
    accepted = any(other.state == ACCEPTED for other in notes)
    if note is not None and note.state not in (*ON_THE_WAY, UNRECORDED):
        return HANDLED, ""
    if FOUND in (receivers, hosts):
        # Its handler was killed before it could say so, or could not know.
        return HANDLED, ""
    if note is not None and note.state == UNRECORDED:
        if accepted and receivers == UNSEEN:
            return PASSED, (
                "the receiver that had accepted it, whose store cannot be seen from here, answers for a record: the "
                f"host could make none ({note.reason})"
            )
        return LOST, f"no receiver took it, and no record could be made: {note.reason}"
    if note is not None and note.state == ACCEPTED:
        return PASSED, (
            "a receiver had accepted it when its handler was killed, or failed: that one answers for a record, which "
            f"{'is not where it is looked for' if receivers == NOTHING else 'cannot be seen from here'}"
        )
    if note is not None and note.state == ASKED:
        if receivers == NOTHING and hosts == NOTHING:
            return LOST, "its handler was killed, or failed, while it asked a receiver, which has no record of it"
        return PASSED, (
            "a receiver had been asked when its handler was killed, or failed: there is a record in that one's store, "
            "which cannot be seen from here, or none at all"
        )
    return _without_a_note(crash, boot, hosts)


def _without_a_note(crash: Crash, boot: str, hosts: str) -> tuple[str, str]:
    if not crash.ours:
        return ELSEWHERE, "core_pattern was another's"
    if (crash.core_limit == 1 and not crash.by_socket) or crash.skipped:
        # core(5): a limit of exactly 1 aborts a dump to a pipe. The event comes before the kernel looks.
        return UNWANTED, ""
    if crash.boot != boot:
        return UNCLEAR, "the machine was restarted before it was known what became of it"
    if hosts == UNSEEN:
        return UNCLEAR, "its handler left no note, and what the host's store has of it cannot be told"
    if crash.status < 0:
        return LOST, "no handler left a note, and its end was not seen"
    if crash.status & CORE_BIT:
        return LOST, "its handler was killed, or failed, before it had a receiver or left a record"
    if crash.signal == signal.SIGKILL:
        return LOST, "it was killed while it dumped, and no handler left a note"
    if crash.by_socket:
        if not crash.seen:
            return UNCLEAR, (
                "it was over before it could be looked at: it was not dumpable, or nobody took its connection "
                "(journalctl -k -g coredump)"
            )
        return LOST, (
            "nobody took the core from the kernel's socket: its handler was killed at once, or failed, or the "
            "connection did (journalctl -k -g coredump)"
        )
    if not crash.seen:
        return UNCLEAR, (
            "it was over before it could be looked at: it was not dumpable, or had a core limit of 1, or there were "
            "more dumps than kernel.core_pipe_limit (journalctl -k -g core_pipe_limit)"
        )
    return LOST, (
        "the kernel found no handler for it: more dumps than kernel.core_pipe_limit, or one that cannot be started, "
        "or was killed at once (journalctl -k -g 'core dump')"
    )
