"""One crash, on one connection: the offer, the decision, the core, the record."""

from __future__ import annotations

import os
import re
import socket
import time
from typing import TYPE_CHECKING

from receiver import plan, protocol
from receiver.afterwards import afterwards
from receiver.capture import Capture, TooLarge, Unneeded, Wish
from receiver.cgroup import cpu_stat
from receiver.history import KEPT, PROGRAM, REFUSED, History
from receiver.log import goes_to_journal, log
from receiver.process import MAX_ARGUMENTS, MAX_ENVIRONMENT, OVERFLOW_ID, Process, arguments, mask, user_may_read
from receiver.protocol import Channel, Message, PeerGone, ProtocolError, printable
from receiver.record import UNLIMITED, Core, Record, signal_name, text
from receiver.store import NoRoom, Store, StoreError

if TYPE_CHECKING:
    from collections.abc import Callable, Collection

    from receiver.config import Config
    from receiver.store import Entry
    from receiver.witness import Witness

# <linux/proc_ns.h>: PROC_PID_INIT_INO, the initial pid namespace.
INITIAL_PID_NAMESPACE = 0xEFFFFFFC


class Unwanted(Exception):
    """The offer is refused. The text is the reason, for the forwarder's records."""


class Offered:
    """An offer that was looked at: its record so far, and what else it says.

    core_limit: bytes, UNLIMITED for none. begun: time.monotonic(). reader: the uid that may read the core besides root.
    memory: a descriptor of the process's memory, -1 without; to be closed with `close`. witness: what was seen of its
    core, once that is known.
    """

    __slots__ = ("begun", "core_limit", "memory", "reader", "record", "witness")

    def __init__(self, record: Record, core_limit: int, begun: float) -> None:
        self.record = record
        self.core_limit = core_limit
        self.begun = begun
        self.reader: int | None = None
        self.memory = -1
        self.witness: Witness | None = None

    def take_memory(self) -> int:
        """Return the descriptor, which is the caller's from now on."""
        memory, self.memory = self.memory, -1
        return memory

    def close(self) -> None:
        if self.memory >= 0:
            os.close(self.take_memory())


def open_store(config: Config) -> Store:
    """Open the configured store, to keep crashes and to tell of them. Raises StoreError."""
    store = Store.configured(config)
    store.tells = store.describes = True
    return store


def serve(channel: Channel, config: Config, *, confine: Callable[[], None] = lambda: None) -> Record | None:
    """Serve one connection to its end; returns the record, None when there was no crash to keep.

    confine: is called when all that needs a privilege is done, before the first byte of a core is read. The channel
    stays the caller's. Never raises for what a peer or a full disk does.
    """
    begun = time.monotonic()
    deadline = begun + config.offer_seconds
    try:
        check_sender(channel)
        channel.ask_for_credentials()
        offer = channel.receive(deadline)
        offer.close()
        offered = look_at(offer, config)
        try:
            store = open_store(config)
            confine()
        except BaseException:
            offered.close()
            raise
    except PeerGone:
        # A forwarder that looked who listens and went elsewhere, or somebody's probe.
        return None
    except (Unwanted, ProtocolError, StoreError) as error:
        log(f"an offer was refused: {error}", error=True)
        refuse(channel, str(error), deadline)
        return None
    except (OSError, TimeoutError) as error:
        log(f"a connection ended without an offer: {error}", error=True)
        return None
    try:
        return _keep(channel, config, store, offered, begun)
    finally:
        offered.close()
        store.close()


def check_sender(channel: Channel) -> None:
    """Make sure that who connected is the host. Raises Unwanted.

    Seen from a container's pid namespace the host's processes have pid 0, which nobody inside can have. uid 0 says
    nothing: the container's root has it, and the host's shows as 65534 in a user namespace.
    """
    peer = channel.peer()
    if peer.pid == 0:
        return
    if not _sees_every_process():
        raise Unwanted("it comes from a process of this container; cores come from the host")
    if peer.uid not in (0, OVERFLOW_ID):
        raise Unwanted("it comes from a process that is not root")


def _sees_every_process() -> bool:
    return os.stat("/proc/self/ns/pid").st_ino == INITIAL_PID_NAMESPACE


def refuse(channel: Channel, reason: str, deadline: float) -> None:
    try:
        channel.send(protocol.REFUSE, {"reason": reason.encode("ascii", "backslashreplace")[:200]}, deadline)
    except (OSError, ProtocolError):
        # The forwarder is gone, and knows already that we did not take it.
        pass


def look_at(offer: Message, config: Config) -> Offered:
    """Make a record of an offer and of what /proc tells. Raises ProtocolError, Unwanted."""
    if offer.kind != protocol.OFFER:
        raise ProtocolError("the first message is not an offer")
    process, thread = offer.head_credentials, offer.body_credentials
    if process is None or thread is None:
        raise ProtocolError("the offer has no credentials")
    if process.pid == 0 and _sees_every_process():
        # What the kernel says of bytes that came without any (seen): pid 0, uid 65534.
        raise ProtocolError("the offer names no process")
    record = Record.of_numbers(
        pid=process.pid,
        tid=thread.pid,
        uid=process.uid,
        gid=process.gid,
        signal=offer.number("signal"),
        time=offer.number("time", 0),
        comm=offer.fields.get("comm", b"")[:64],
        core_limit=offer.number("core_limit", UNLIMITED),
        dumpable=offer.number("dumpable", 2),
    )
    record.own_pid = offer.number("own_pid", 0) or None
    record.own_tid = offer.number("own_tid", 0) or None
    record.tried = [printable(line) for line in offer.fields.get("tried", b"").splitlines()[:16]]
    record.host_name = os.uname().nodename
    offered = Offered(record, offer.number("core_limit", UNLIMITED), time.monotonic())
    secure = _look_at_process(offered, config.facts) if process.pid and thread.pid else None
    _fill_in(record, offer, config)
    if secure is None:
        secure = offer.fields.get("secure") != b"0"
    if user_may_read(record, secure=secure):
        offered.reader = record.uid
    return offered


def _look_at_process(offered: Offered, facts: Collection[str]) -> bool | None:
    """Fill in what /proc tells here. Returns whether the process is secure (AT_SECURE), None when that is hidden."""
    record = offered.record
    try:
        process = Process(record.pid, record.tid)
    except OSError:
        # No /proc here, or hidden from us: the offer's own facts have to do.
        return None
    try:
        if process.is_dumping() is False:
            raise Unwanted("the process it names is not dumping core")
        process.describe(record, facts)
        offered.memory = process.open_memory()
        return process.is_secure()
    finally:
        process.close()


def _fill_in(record: Record, offer: Message, config: Config) -> None:
    """Take from the offer what the host knows alone, or what cannot be read here: not safely, or without privileges."""
    for name in ("exe", "cwd"):
        if getattr(record, name) is None and name in offer.fields:
            setattr(record, name, text(offer.fields[name]))
    secret = re.compile(config.secret_pattern, re.IGNORECASE)
    if "cmdline" in offer.fields and "command_line" in config.facts:
        record.command_line = arguments(offer.fields["cmdline"][:MAX_ARGUMENTS], secret)
    if "environ" in offer.fields and "environment" in config.facts:
        record.environment = mask(offer.fields["environ"][:MAX_ENVIRONMENT], secret)
    if offer.fields.get("container") and "container" in config.facts:
        from receiver import engine  # noqa: PLC0415  (import budget)

        record.container = engine.describe(_path_of(offer.fields["container"]))


def _path_of(key: bytes) -> str:
    r"""Return the cgroup's path that a container's key stands for: `!` is in the place of `/`, and of `\` in `\x2d`."""
    return re.sub(r"!x([0-9a-f]{2})", r"\\x\1", printable(key)).replace("!", "/")


def _keep(channel: Channel, config: Config, store: Store, offered: Offered, begun: float) -> Record | None:
    record = offered.record
    deadline = begun + config.offer_seconds
    try:
        entry = store.begin(record)
    except (OSError, StoreError) as error:
        log(f"an offer was refused: {error}", error=True)
        refuse(channel, f"its store cannot be written: {error}", deadline)
        return None
    try:
        unwanted = _without_core(config, store, offered)
        if unwanted is not None:
            record.core = Core(reason=unwanted)
            entry.seal(readers=offered.reader)
            _accept(channel, protocol.WANT_RECORD, deadline)
        else:
            _accept(channel, protocol.WANT_CORE, deadline)
            # No other receiver will take it now.
            store.patient = True
            _receive(channel, config, entry, offered, deadline)
        _tell(channel, record, config)
        entry.finish(readers=offered.reader)
    except Exception as error:
        # Whatever it was: no core, and a record that says why; unless it is complete.
        if not _finish_without_core(entry, error, offered):
            entry.close()
            _log_end(record)
            return record
    except BaseException:
        entry.close()
        raise
    try:
        _follow(config, entry, offered)
    finally:
        # Until here nobody else tells of it.
        entry.close()
    return record


def _follow(config: Config, entry: Entry, offered: Offered) -> None:
    """Do what comes after a crash that is shown: nobody waits for it. What goes wrong is said."""
    store, record = entry.store, entry.record
    if record.core.state != "none" or offered.core_limit == 0:
        # Not for those that crash again and again, of which nobody wants to know more.
        from receiver import facts  # noqa: PLC0415  (the process has been let go)

        facts.complete(record, config, store, offered.witness, offered.reader)
    if not (afterwards(record, config, store) and goes_to_journal()):
        _log_end(record)
    try:
        entry.told()
    except OSError as error:
        log(f"crash {record.id}: its mark cannot be taken off ({error.strerror})", error=True)


def _finish_without_core(entry: Entry, error: Exception, offered: Offered) -> bool:
    """Bring a crash to its end that something went wrong with. Returns whether it is shown.

    What is sealed stays as it is: nothing is lost then.
    """
    owner, core = entry.record.id, entry.record.core
    reason = f"the core could not be kept: {str(error) or type(error).__name__}"
    # (Another file has its name: nobody could ever show it.)
    if not entry.sealed or isinstance(error, FileExistsError):
        entry.record.core = Core(reason=reason, size_bytes=core.size_bytes)
    elif core.state != "none":
        reason = f"its core is complete, but could not be shown: {error}"
    try:
        entry.finish(readers=offered.reader)
    except (OSError, StoreError) as again:
        # What was sealed or begun stands: the next start makes it visible.
        log(f"crash {owner}: {reason}; and it could not be finished: {again}", error=True)
        return False
    return True


def _accept(channel: Channel, want: bytes, deadline: float) -> None:
    channel.send(protocol.ACCEPT, {"version": b"%d" % protocol.VERSION, "want": want}, deadline)


def _receive(channel: Channel, config: Config, entry: Entry, offered: Offered, deadline: float) -> None:
    """Take the core's descriptor and read it to its end; record.core tells the result. Raises what went wrong."""
    message = channel.receive(deadline)
    descriptors = message.take()
    try:
        names = message.fields.get("descriptors", b"").split()
        if message.kind != protocol.CORE or len(names) != len(descriptors) or names[:1] != [b"core"]:
            raise ProtocolError(
                f"after the acceptance came kind {message.kind} with {len(descriptors)} descriptors, "
                f"of which {len(names)} are named"
            )
        # Only the core is needed from here on.
        protocol.close_all(descriptors[1:])
        del descriptors[1:]
        _capture(descriptors[0], config, entry, offered)
        entry.record.seconds = round(time.monotonic() - offered.begun, 6)
        entry.seal(readers=offered.reader)
    finally:
        # The crashed process waits for this.
        protocol.close_all(descriptors)


def _without_core(config: Config, store: Store, offered: Offered) -> str | None:
    """Return why the core of an offer is not wanted at all, None when it is."""
    if offered.core_limit == 0:
        return "the soft core limit (ulimit -c) of the process is 0"
    # Counted where it is asked, or as many as come at once would all be the first.
    with store.locked():
        history, now, whose = History(store.directory), time.time(), _whose(offered.record)
        cores = history.count(PROGRAM, whose, config.loop_seconds, now)
        wanted = config.loop_max is None or cores < config.loop_max
        if wanted:
            history.add(PROGRAM, whose, config.loop_seconds, now)
    if wanted:
        return None
    return (
        f"it crashes in a loop: {cores} cores of this program were taken within {config.loop_seconds:g} s "
        "(loop_max, loop_seconds)"
    )


def _program(record: Record) -> str:
    return record.exe or record.comm


def _whose(record: Record) -> str:
    """Return the program of a user: one user's crashes must not cost another the cores of his."""
    return f"{record.uid} {_program(record)}"


def _bug_of_user(record: Record) -> str:
    """Return what counts as the same crash, likewise."""
    return f"{record.uid} {record.signature}"


def _complete(record: Record, witness: Witness) -> None:
    """Take from the notes what the kernel has not told the forwarder (by its coredump socket): signal and thread."""
    notes = witness.notes
    if record.signal == 0 and notes.signal:
        record.signal, record.signal_name = notes.signal, signal_name(notes.signal)
        if len(notes.threads):
            record.own_tid = notes.threads[0].tid
            if record.own_pid in (None, record.pid):
                # The process's own numbering is ours.
                record.tid = record.own_tid


def _wish(config: Config, offered: Offered) -> Wish:
    """Return how much of the core is wanted."""
    record = offered.record
    limits = []
    if offered.core_limit != UNLIMITED:
        limits.append((offered.core_limit, "the soft core limit (ulimit -c)"))
    if config.core_max is not None:
        limits.append((config.core_max, "core_max"))
    keep = config.keep_of(record.exe, record.comm)
    if isinstance(keep, int):
        limits.append((keep, "keep" if keep == config.keep else "keep_for"))
    limit, why = min(limits, default=(None, ""))
    return Wish(limit, why, up_to=plan.POINTED if keep == "stacks" else plan.UNUSED)


def _capture(fd: int, config: Config, entry: Entry, offered: Offered) -> None:
    record = entry.record
    store = entry.store

    def may_be_known(_witness: Witness) -> bool:
        """Whether to look who crashed before the core is read: when it may be one that is not needed."""
        if config.same_max is None:
            return False
        with store.locked():
            found = History(store.directory).count(PROGRAM, _whose(record), config.same_seconds, time.time())
        return found > config.same_max

    def witnessed(witness: Witness) -> None:
        offered.witness = witness
        _complete(record, witness)
        record.threads = len(witness.notes.threads)
        record.build_id = witness.build_of_program()
        record.frames = [f"{frame.module}+{frame.offset:#x}" for frame in witness.frames()]
        record.signature = witness.signature(_program(record), record.signal)
        if not record.frames:
            # An unknown machine's registers: all crashes of a program would be the same.
            return
        bug = _bug_of_user(record)
        with store.locked():
            history, now = History(store.directory), time.time()
            before = history.count(KEPT, bug, config.same_seconds, now)
            record.seen = before + history.count(REFUSED, bug, config.same_seconds, now) + 1
            needed = config.same_max is None or before < config.same_max
            history.add(KEPT if needed else REFUSED, bug, config.same_seconds, now)
        if not needed:
            raise Unneeded(
                f"the same crash (signature {record.signature}) left {before} cores within {config.same_seconds:g} s "
                "(same_max, same_seconds)"
            )

    capture = Capture(
        fd,
        entry,
        compression=config.compression,
        level=config.compression_level,
        threads=config.compression_threads,
        stall_seconds=config.stall_seconds,
        wish=_wish(config, offered),
        memory=offered.take_memory(),
        # What is not compressed has nothing to turn off.
        cpu_stat=None if config.compression == "none" else cpu_stat(),
        noted=may_be_known,
        witnessed=witnessed,
    )
    try:
        record.core = capture.run()
    except (TooLarge, NoRoom, Unneeded, OSError) as error:
        if isinstance(error, OSError):
            reason = f"the core could not be written ({error.strerror})"
        else:
            reason = str(error) if isinstance(error, Unneeded) else f"the core was not kept: {error}"
        record.core = Core(reason=reason, size_bytes=capture.whole_bytes, whole_bytes=capture.whole_bytes)


def _tell(channel: Channel, record: Record, config: Config) -> None:
    fields = {
        "state": record.core.state.encode(),
        "reason": (record.core.reason or "").encode("ascii", "backslashreplace")[:200],
        "size": b"%d" % record.core.size_bytes,
        "id": record.id.encode(),
    }
    try:
        channel.send(protocol.DONE, fields, time.monotonic() + config.offer_seconds)
    except OSError:
        # The forwarder did not wait; the core is here all the same.
        pass


def _log_end(record: Record) -> None:
    core = record.core
    what = f"process {record.pid} ({printable(record.comm.encode())}) of uid {record.uid} ended by {record.signal_name}"
    if core.state == "none":
        log(f"{what}: no core: {printable((core.reason or '').encode())}", error=True)
    else:
        log(f"{what}: core {core.state}, {core.size_bytes} bytes, {core.stored_bytes} on disk: {core.path}")


def refuse_all(sock: socket.socket, reason: str, config: Config) -> int:
    """Refuse the offer of a connection, or of each that waits at a listening socket. Returns EX_CONFIG.

    A receiver that cannot serve still takes the connections, or systemd would start it again and again for the same.
    """
    connections = [sock]
    if sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
        connections = []
        sock.setblocking(False)
        try:
            while True:
                connections.append(sock.accept()[0])
        except OSError:
            pass
    for connection in connections:
        connection.setblocking(True)
        channel = Channel(connection)
        deadline = time.monotonic() + config.offer_seconds
        try:
            channel.receive(deadline).close()
            refuse(channel, reason, deadline)
        except (OSError, ProtocolError):
            pass
        channel.close()
    return 78
