"""What became of a crash, noted by whoever handled it: a line or two for the ledger, see `forwarder/ledger/`.

One line when a receiver is asked: from then on it may leave a record of its own, though it never gets the core. One
when it has accepted: it answers for a record, whatever becomes of the one who asked it. And one at the very end. What
has no line here was not brought to an end by its handler, and the ledger tells what is known of it instead.

The file is one that many stubs append to at the same time, each with one write(2), which O_APPEND makes whole among the
others. A line that was cut by a full /run does no harm, because each brings a newline in front as well.

Import budget: on the stub's start-up path, see `forwarder/stub.py`.
"""

from __future__ import annotations

import posix
import time

from forwarder.handoff import Handoff
from forwarder.namespaces import status_value
from receiver.protocol import printable

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping

    from forwarder.crash import Crash
    from receiver.protocol import Channel

DIRECTORY = "/run/core_pipe_forwarder"
NOTES = f"{DIRECTORY}/handled"
# The watcher turns the file over long before; without one nobody reads it, and it stops growing here.
MAX_NOTES = 4 << 20
MAX_REASON = 500

# A receiver was asked. It accepted, and answers for a record. It was watched to its end there. There is a record of the
# host's own. There is none, and why.
ASKED, ACCEPTED, TAKEN, RECORDED, UNRECORDED = "asked", "accepted", "taken", "recorded", "unrecorded"
STATES = (ASKED, ACCEPTED, TAKEN, RECORDED, UNRECORDED)
# Not the last word.
ON_THE_WAY = (ASKED, ACCEPTED)


class NotedHandoff(Handoff):
    """A hand-over that notes when a receiver is asked, and when it has accepted: before the core is passed."""

    def _before_offer(self, channel: Channel) -> None:
        on_the_way(self.crash, ASKED, channel)

    def _offer(self, channel: Channel, deadline: float, facts: dict[str, bytes]) -> bool:
        wants_core = super()._offer(channel, deadline, facts)
        on_the_way(self.crash, ACCEPTED, channel)
        return wants_core


def on_the_way(crash: Crash, state: str, channel: Channel, path: str = NOTES) -> None:
    """Note how far a crash has come, and with whom. Never raises and never waits."""
    try:
        # Whose root has the store, and which pids its record may be under: `forwarder/ledger/stores.py` looks there
        # when nobody lived to note the end.
        _write(path, _line(crash, state, str(channel.peer().pid), _pids(crash) if state == ASKED else ""))
    except (OSError, ValueError):
        pass


def _pids(crash: Crash) -> str:
    try:
        return b" ".join(status_value(crash.read("status", 1 << 20), b"NStgid") or []).decode("ascii")
    except OSError:
        return ""


def note(settings: Mapping[str, object], crash: Crash | None, reason: str | None, path: str = NOTES) -> None:
    """Note how a crash was handled. reason: None when a receiver had it, else why none had.

    Never raises and never waits: a note that cannot be written costs a line in the ledger, and no core.
    """
    if crash is None:
        # Not even the pid is known: the ledger will have it from the kernel.
        return
    try:
        if reason is None:
            _write(path, _line(crash, TAKEN, "", ""))
        else:
            record = _record_of(settings, crash)
            _write(path, _line(crash, RECORDED if record else UNRECORDED, record, reason))
    except (OSError, ValueError):
        pass


def _line(crash: Crash, state: str, record: str, reason: str) -> bytes:
    """Return `TIME PID INODE STATE KEY ID REASON`: CLOCK_MONOTONIC in ns, and "-" for what is not known.

    ID: the record's; on the way, the pid of the receiver's listener. REASON: why there is no core on its way; of one
    that was asked, the numbers of the process, from the host's to its own.
    """
    words = (
        str(time.monotonic_ns()),
        str(crash.pid),
        str(inode_of(crash.pidfd)),
        state,
        # A file name without blanks, see forwarder/share.py.
        crash.key or "-",
        record or "-",
        printable((reason or "-").encode("utf-8", "backslashreplace"), MAX_REASON),
    )
    return ("\n" + " ".join(words) + "\n").encode("ascii", "backslashreplace")


def inode_of(pidfd: int) -> int:
    """Return a number that a process has for itself until the next boot, 0 where the kernel has none.

    Since 6.9 (cb12fd8e0dab) each process has an inode in pidfs, never used again. Before, all pidfds share one.
    """
    if pidfd < 0:
        return 0
    found = posix.fstat(pidfd).st_ino
    own = posix.pidfd_open(posix.getpid())
    try:
        return found if posix.fstat(own).st_ino != found else 0
    finally:
        posix.close(own)


def _record_of(settings: Mapping[str, object], crash: Crash) -> str:
    """Return the id of the record that was just made in the host's store, "" when there is none.

    An allowance that is used up and a full disk look the same from here: the crash has no record.
    """
    store = settings.get("store")
    # What time.strftime gives for the kernel's own moment; the record was made after it (receiver/record.py: new_id).
    earliest = time.strftime("%Y%m%dT%H%M%S", time.gmtime(crash.time))
    try:
        names = posix.listdir(store if isinstance(store, bytes | str) else "/var/lib/core_pipe")
    except OSError:
        return ""
    found = ""
    for listed in names:
        name = listed if isinstance(listed, str) else listed.decode("utf-8", "surrogateescape")
        words = name.split("-")
        if name.endswith(".json") and len(words) == 4 and words[2] == str(crash.pid) and words[0] >= earliest:
            found = max(found, name.removesuffix(".json"))
    return found


def _write(path: str, line: bytes) -> None:
    flags = posix.O_WRONLY | posix.O_CREAT | posix.O_APPEND | posix.O_CLOEXEC | posix.O_NOFOLLOW
    try:
        fd = posix.open(path, flags, 0o600)
    except FileNotFoundError:
        # The first crash since the boot.
        from os import makedirs  # noqa: PLC0415 - rare

        makedirs(path.rpartition("/")[0], mode=0o700, exist_ok=True)
        fd = posix.open(path, flags, 0o600)
    try:
        if posix.fstat(fd).st_size < MAX_NOTES:
            posix.write(fd, line)
    finally:
        posix.close(fd)
