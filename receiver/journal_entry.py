"""A crash as an entry of the journal, as systemd-coredump writes it: `coredumpctl` shows it and opens its core.

The names are those of systemd-coredump (systemd.journal-fields(7), coredump.c); what it has no name for is CORE_PIPE_*.

Written to journald's socket by ourselves and not by systemd-python, for two reasons. sd_journal_sendv(3) waits for ever
for a journald that is stopped with a full queue, and what calls this is a worker that others need. And the host's stub
runs on the standard library alone (`forwarder/report.py`). Every field has the protocol's binary form, a length before
the value, so nothing that a crashed process has chosen can end a field and begin another one
(https://systemd.io/JOURNAL_NATIVE_PROTOCOL).
"""

from __future__ import annotations

import array
import errno
import fcntl
import os
import select
import socket
import struct
import time
from typing import TYPE_CHECKING

from receiver.process import user_unit_of
from receiver.protocol import printable
from receiver.record import UNLIMITED, microseconds

if TYPE_CHECKING:
    from receiver.record import Record

JOURNAL = "/run/systemd/journal/socket"
# <systemd/sd-messages.h>: SD_MESSAGE_COREDUMP
MESSAGE_ID = "fc2e22bc6ee647b6b90729ab34a250b1"
# LOG_CRIT, as systemd-coredump.
PRIORITY = "2"
# For a journald that does not read. It loses an entry then, and not the crash.
PATIENCE_SECONDS = 0.5
# Frames in the message.
MAX_FRAMES = 32
_LENGTH = struct.Struct("<Q")
_SEALS = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE


def tell(record: Record) -> bool:
    """Write the entry. Returns whether a journal took it: where there is none, or it does not read, nothing is said.

    Raises OSError when there is one and it could not be told for another reason.
    """
    if not os.path.exists(JOURNAL):
        return False
    return send(fields(record), JOURNAL)


def fields(record: Record) -> dict[str, str]:
    """Return the entry's fields. What is not known has none."""
    core = record.core
    found: dict[str, object] = {
        "MESSAGE_ID": MESSAGE_ID,
        "PRIORITY": PRIORITY,
        "SYSLOG_IDENTIFIER": "core-pipe-receiver",
        "MESSAGE": message(record),
        "COREDUMP_PID": record.pid,
        "COREDUMP_TID": record.tid,
        "COREDUMP_UID": record.uid,
        "COREDUMP_GID": record.gid,
        "COREDUMP_SIGNAL": record.signal,
        "COREDUMP_SIGNAL_NAME": record.signal_name,
        "COREDUMP_TIMESTAMP": microseconds(record.timestamp),
        "COREDUMP_RLIMIT": UNLIMITED if record.core_limit is None else record.core_limit,
        "COREDUMP_HOSTNAME": record.host_name,
        "COREDUMP_COMM": record.comm,
        "COREDUMP_EXE": record.exe,
        "COREDUMP_CMDLINE": None if record.command_line is None else command_line(record.command_line),
        "COREDUMP_CGROUP": record.cgroup,
        "COREDUMP_UNIT": record.unit,
        "COREDUMP_USER_UNIT": _user_unit(record.cgroup),
        "COREDUMP_SLICE": slice_of(record.cgroup, record.unit),
        "COREDUMP_OWNER_UID": session_owner(record.cgroup),
        "COREDUMP_CWD": record.cwd,
        "COREDUMP_ROOT": record.root,
        "COREDUMP_ENVIRON": _lines(f"{name}={value}" for name, value in (record.environment or {}).items()),
        "COREDUMP_OPEN_FDS": _lines(line.replace(": ", ":", 1) for line in record.open_files or ()),
        "COREDUMP_PROC_MAPS": _lines(record.mappings or ()),
        "COREDUMP_PROC_LIMITS": _limits(record),
        "COREDUMP_PROC_CGROUP": f"0::{record.cgroup}\n" if record.cgroup else None,
        "COREDUMP_FILENAME": core.path,
        "COREDUMP_TRUNCATED": 1 if core.state == "reduced" else None,
        "CORE_PIPE_ID": record.id,
        "CORE_PIPE_STATE": core.state,
        "CORE_PIPE_REASON": core.reason,
        "CORE_PIPE_SIGNATURE": record.signature,
        "CORE_PIPE_CONTAINER": record.container,
    }
    for name in ("name", "version"):
        found[f"COREDUMP_PACKAGE_{name.upper()}"] = (record.package or {}).get(name)
    return {name: str(value) for name, value in found.items() if value not in (None, "")}


def message(record: Record) -> str:
    """Return what journalctl shows: systemd-coredump's sentence, what became of the core, and the frames."""
    core = record.core
    who = f"Process {record.pid} ({_shown(record.comm)}) of user {record.uid}"
    if core.state == "none":
        lines = [f"{who} ended by {record.signal_name} without a core: {_shown(core.reason or 'no reason is known')}"]
    else:
        lines = [f"{who} dumped core.", "", f"It ended by {record.signal_name}: core {core.state}, "]
        lines[-1] += f"{core.size_bytes} bytes, {core.stored_bytes} on disk: {core.path}"
        if core.reason:
            lines.append(_shown(core.reason))
    if record.frames:
        lines += ["", f"Stack trace of thread {record.own_tid or record.tid}:"]
        lines += [f"#{number:<2} {_shown(frame)}" for number, frame in enumerate(record.frames[:MAX_FRAMES])]
    return "\n".join(lines)


_PLAIN = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789@%+=:,./-_")


def command_line(words: list[str]) -> str:
    """Return words as one would type them in a shell."""
    quoted = (word if word and _PLAIN.issuperset(word) else "'" + word.replace("'", "'\\''") + "'" for word in words)
    return " ".join(quoted)


def _user_unit(cgroup: str | None) -> str | None:
    return user_unit_of(_bytes(cgroup)) if cgroup else None


def slice_of(cgroup: str | None, unit: str | None) -> str | None:
    """Return the slice that a unit is in, from the path of its cgroup; None without."""
    before, found, _ = f"{cgroup}/".partition(f"/{unit}/")
    name = before.rpartition("/")[2]
    return name if found and name.endswith(".slice") else None


def session_owner(cgroup: str | None) -> str | None:
    """Return the uid whose session a process belongs to, None without."""
    for name in (cgroup or "").split("/"):
        number = name.removeprefix("user-").removesuffix(".slice")
        if name == f"user-{number}.slice" and number.isascii() and number.isdigit():
            return number
    return None


def _lines(lines: object) -> str:
    return "".join(f"{line}\n" for line in lines)  # type: ignore[attr-defined]


def _limits(record: Record) -> str | None:
    """Return proc_pid_limits(5)'s table again, without the units."""
    if not record.limits:
        return None
    rows = [f"{'Limit':<26}{'Soft Limit':<21}Hard Limit"]
    for name, values in record.limits.items():
        soft, hard = ("unlimited" if values.get(kind) is None else values[kind] for kind in ("soft", "hard"))
        rows.append(f"{'Max ' + name.replace('_', ' '):<26}{soft!s:<21}{hard}")
    return _lines(rows)


def _shown(text: str) -> str:
    return printable(_bytes(text), 1000)


def _bytes(text: str) -> bytes:
    """A record's text, which may have what JSON has and UTF-8 has not (half of a surrogate pair)."""
    return text.encode("utf-8", "backslashreplace")


def encode(entry: dict[str, str]) -> bytes:
    """Return the datagram of an entry. The names are ours: capitals, digits and _, not with a _ first."""
    parts = []
    for name, value in entry.items():
        data = _bytes(value)
        parts += [name.encode("ascii"), b"\n", _LENGTH.pack(len(data)), data, b"\n"]
    return b"".join(parts)


def send(entry: dict[str, str], path: str) -> bool:
    """Send an entry to journald. Returns False when nobody listens, or nobody reads. Raises OSError."""
    data = encode(entry)
    deadline = time.monotonic() + PATIENCE_SECONDS
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
        sock.setblocking(False)
        try:
            # Connected, so that poll(2) knows whose queue is full.
            sock.connect(path)
            try:
                return _send(sock, data, None, deadline)
            except OSError as error:
                if error.errno not in (errno.EMSGSIZE, errno.ENOBUFS):
                    raise
            memory = os.memfd_create("journal-entry", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
            try:
                rest = memoryview(data)
                while rest:
                    rest = rest[os.write(memory, rest) :]
                # journald reads no file that could still change.
                fcntl.fcntl(memory, fcntl.F_ADD_SEALS, _SEALS)
                return _send(sock, b"", memory, deadline)
            finally:
                os.close(memory)
        except (FileNotFoundError, ConnectionRefusedError):
            return False


def _send(sock: socket.socket, data: bytes, memory: int | None, deadline: float) -> bool:
    ancillary = []
    if memory is not None:
        ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [memory]))]
    while True:
        try:
            sock.sendmsg([data], ancillary)
        except BlockingIOError:
            left = deadline - time.monotonic()
            poll = select.poll()
            poll.register(sock, select.POLLOUT)
            if left <= 0 or not poll.poll(left * 1000):
                return False
        else:
            return True
