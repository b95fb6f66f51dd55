"""`core-pipe-forwarder ledger`: which crashes left no record, and the watcher that finds out."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterator

    from forwarder.ledger import Ledger, Summary
    from forwarder.ledger.book import Crash

OK, FAILED, NOT_WATCHING = 0, 1, 3
# <sysexits.h>, which systemd shows as UNAVAILABLE (systemd.exec(5)): to try again would not help.
EX_UNAVAILABLE = 69
WATCHDOG = "WATCHDOG=1"
SHOWN_GAPS = 10

_EPILOG = """\
Exit status:
  0  every crash since is accounted for; --watch: ended by SIGTERM
  1  at least one is lost; or it failed
  2  wrong usage
  3  none is lost as far as is known, but nobody watches (any more)
 69  --watch: the kernel does not tell: not the host itself, not root, or no pyroute2
"""


def register(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command to those of core-pipe-forwarder."""
    import argparse  # noqa: PLC0415 - whoever calls this has it

    command = commands.add_parser(
        "ledger",
        help="name the crashes that left no record",
        description="Compares what the kernel dumped with what was handled, and names the difference. A crash is named "
        "when it is over and no handler has accounted for it.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_options(command)
    command.add_argument("--watch", action="store_true", help="be the watcher, until SIGTERM")


def add_options(command: argparse.ArgumentParser) -> None:
    """Add what all commands have that show something of the book."""
    command.add_argument("--json", action="store_true", help="for programs")
    command.add_argument(
        "--since",
        type=moment,
        default=0.0,
        metavar="TIME",
        help="only from then on: 12h, 30d, or a time as 2026-11-22T21:00 (local, or with Z or +01:00)",
    )


def moment(text: str) -> float:
    """Return seconds since the epoch. Raises argparse's error."""
    import argparse  # noqa: PLC0415 - as above
    import datetime as dt  # noqa: PLC0415

    from receiver.config import duration  # noqa: PLC0415

    try:
        return dt.datetime.fromisoformat(text).timestamp()
    except (ValueError, OverflowError, OSError):
        pass
    try:
        return time.time() - duration(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!a} is not a time. Give one as 12h, 30d or 2026-11-22T21:00") from None


def run(options: argparse.Namespace) -> int:
    """Run the command; return the exit status. Raises OSError."""
    from forwarder.ledger import LedgerError, ledger  # noqa: PLC0415 - only this command needs it

    try:
        if options.watch:
            return watch()
        found = ledger(store=host_store(), since=options.since)
    except LedgerError as error:
        sys.stderr.write(f"core-pipe-forwarder: {error.fact}\n  {error.mend}\n")
        return FAILED if os.geteuid() != 0 or options.watch else NOT_WATCHING
    text = found.as_json() if options.json else "\n".join(lines(found))
    sys.stdout.write(text + "\n")
    if found.lost:
        return FAILED
    return OK if found.watched else NOT_WATCHING


def host_store() -> str:
    """Return where records go of crashes that no receiver took."""
    from forwarder.install import STORE, stub_settings  # noqa: PLC0415
    from forwarder.staging import InstallError  # noqa: PLC0415

    try:
        found = stub_settings()["store"]
    except (InstallError, OSError):
        # `status` says what is wrong with the settings, and not only root may ask.
        return STORE
    return os.fsdecode(found) if isinstance(found, bytes) else STORE


def watch() -> int:
    """Be the watcher until SIGTERM or SIGINT; return the exit status. Raises LedgerError, OSError."""
    from forwarder.ledger.book import Book  # noqa: PLC0415
    from forwarder.ledger.notes import Notes  # noqa: PLC0415
    from forwarder.ledger.watch import Watcher  # noqa: PLC0415
    from forwarder.proc_events import ProcEvents, Unavailable  # noqa: PLC0415
    from forwarder.quota.events import QuotaEvents  # noqa: PLC0415
    from forwarder.quota.tell import Tell  # noqa: PLC0415
    from forwarder.report import report  # noqa: PLC0415
    from receiver.activation import tell_systemd  # noqa: PLC0415

    book, notes = Book(), Notes()
    with contextlib.ExitStack() as stack:
        # Before anything else: a SIGTERM at any moment ends it in good order.
        wake = stack.enter_context(_woken_by_signals())
        try:
            refuse_elsewhere()
            events = stack.enter_context(ProcEvents())
        except Unavailable as error:
            sys.stderr.write(f"core-pipe-forwarder: {error}\n")
            return EX_UNAVAILABLE
        quota = None
        try:
            quota = stack.enter_context(QuotaEvents())
        except Unavailable as error:
            # The ledger does without, and `status` says so.
            sys.stderr.write(f"core-pipe-forwarder: no quota warnings: {error}\n")
        stack.callback(book.close)
        stack.callback(notes.close)
        store = host_store()
        watcher = Watcher(
            events,
            book,
            notes,
            quota=quota,
            tell=Tell(store, report),
            store=store,
            say=report,
            tick=lambda: tell_systemd(WATCHDOG),
        )
        tell_systemd("READY=1")
        sys.stdout.write("watching\n")
        sys.stdout.flush()
        watcher.run(wake)
        tell_systemd("STOPPING=1")
    return OK


def refuse_elsewhere() -> None:
    """Raise Unavailable in a pid or user namespace of its own, where numbers are others than the kernel's.

    A mount namespace of its own is welcome: that is the service's sandbox. Of the network namespace the kernel speaks.
    """
    from forwarder.install import PROC_PID_INIT_INO, PROC_USER_INIT_INO  # noqa: PLC0415
    from forwarder.proc_events import Unavailable  # noqa: PLC0415

    for kind, initial in (("pid", PROC_PID_INIT_INO), ("user", PROC_USER_INIT_INO)):
        if os.stat(f"/proc/self/ns/{kind}").st_ino != initial:
            raise Unavailable(f"this is a container ({kind} namespace of its own): run it on the host itself")
    if os.geteuid() != 0:
        raise Unavailable("only root hears from the kernel: run it again with sudo")


@contextlib.contextmanager
def _woken_by_signals() -> Iterator[int]:
    """Give a descriptor that can be read when it is time to leave."""
    reader, writer = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    before = {number: signal.signal(number, lambda *_: None) for number in (signal.SIGTERM, signal.SIGINT)}
    old = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    try:
        yield reader
    finally:
        signal.set_wakeup_fd(old)
        for number, handler in before.items():
            signal.signal(number, handler)
        os.close(reader)
        os.close(writer)


def lines(found: Ledger) -> list[str]:
    """Return what people are shown."""
    from receiver import tables  # noqa: PLC0415

    said: list[str] = []
    containers: dict[str, list[Crash]] = {}
    for crash in found.named:
        containers.setdefault(crash.key, []).append(crash)
    for key, crashes in containers.items():
        said.append(f"{tables.shown(key.replace('!', '/') or 'not known whose')}: {len(crashes)}")
        rows: list[tuple[object, ...]] = [("", "TIME", "STATE", "PID", "UID", "SIG", "COMM", "WHY")]
        rows += [("", time_text(crash.at), crash.state, crash.pid, *_seen(crash), crash.why) for crash in crashes]
        said += tables.lines(rows, right=frozenset((3, 4)))
    if not found.named:
        said.append("No crash is missing.")
    if found.forgotten:
        said.append(f"{found.forgotten} more, which were older, are not listed any more.")
    counts = ", ".join(f"{number} {state}" for state, number in found.counts.items())
    since = "an unknown time" if found.since is None else time_text(found.since)
    said.append(f"Since {since}: {counts}; {found.pending} under way.")
    if len(found.gaps) > SHOWN_GAPS:
        said.append(f"{len(found.gaps) - SHOWN_GAPS} older gaps: see --json")
    said += [
        f"Not watched from {time_text(gap.begun)} to {time_text(gap.ended)}: {tables.shown(gap.why)}"
        for gap in found.gaps[-SHOWN_GAPS:]
    ]
    if not found.watched:
        said.append(
            "Nobody watches now. Start it: systemctl enable --now core_pipe-ledger.service, or "
            "core-pipe-forwarder ledger --watch"
        )
    return said


def in_short(found: Summary) -> str:
    """Return the line in `status`."""
    if found.watched is None:
        return "not known: ask as root"
    lost = "" if found.since is None else f"; {found.lost or 'none'} lost since {time_text(found.since)}"
    if not found.watched:
        return f"not watching{lost}"
    return f"watching{lost}"


def _seen(crash: Crash) -> tuple[object, object, object]:
    from receiver.record import signal_name  # noqa: PLC0415

    return (
        crash.uid if crash.uid >= 0 else "-",
        signal_name(crash.signal) if crash.signal else "-",
        crash.comm or "-",
    )


def time_text(seconds: float) -> str:
    try:
        return time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(seconds))
    except (ValueError, OverflowError, OSError):
        # The book is root's, but a clock may have been anywhere.
        return f"@{seconds:.0f}"
