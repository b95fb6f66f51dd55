"""systemd-coredump as a peer: Debian's package, unpacked and not installed, in a mount namespace of its own.

The kernel starts its helper in the initial namespaces, where it finds a socket; what listens there, and journald with
it, lives in a mount namespace with its own configuration, user and store. So nothing of the machine's is touched but
/run/systemd/coredump, and an empty directory for journald's mount.
"""

from __future__ import annotations

import contextlib
import glob
import os
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

from tests.support.journals import JOURNALD, unpack_coredump
from tests.support.waiting import read_line, wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator

SOCKET = "/run/systemd/coredump"
JOURNAL = "/run/systemd/journal"
# Its own sysctl.d file: as many dumps at once, and what the kernel tells.
PIPE_LIMIT = 16
ARGUMENTS = "%P %u %g %s %t 9223372036854775808 %h %d"

_SETUP = """\
mount --make-rprivate /
mount -t tmpfs -o mode=755 peer {base}/etc
mkdir {base}/etc/upper {base}/etc/work
mount -t overlay -o lowerdir=/etc,upperdir={base}/etc/upper,workdir={base}/etc/work peer /etc
grep -q ^systemd-coredump: /etc/passwd || echo systemd-coredump:x:977:977::/:/usr/sbin/nologin >> /etc/passwd
grep -q ^systemd-coredump: /etc/group || echo systemd-coredump:x:977: >> /etc/group
touch /etc/systemd/coredump.conf
mount --bind {base}/coredump.conf /etc/systemd/coredump.conf
mount -t tmpfs -o mode=755 peer /var/lib/systemd
mkdir /var/lib/systemd/coredump
mount --bind {store} /var/lib/systemd/coredump
mount -t tmpfs -o mode=755 peer {journal}
mount -t tmpfs -o mode=755 peer /var/log
echo ready
exec sleep infinity
"""


def why_unavailable() -> str | None:
    for program in ("apt-get", "dpkg-deb", "systemd-socket-activate", JOURNALD):
        if not shutil.which(program):
            return f"needs {program}"
    if os.path.isdir("/run/systemd/system"):
        # Its own journald and socket are there already; an administrator's systemd-coredump is not ours to move.
        return "this machine runs systemd itself: its own systemd-coredump is not for us to replace"
    return None


class Peer:
    """systemd-coredump, ready to take cores. pattern: for core_pattern."""

    def __init__(self, base: str, pattern: str) -> None:
        self._base = base
        self.pattern = pattern

    def configure(self, *, compress: bool) -> None:
        """Each core reads it anew."""
        text = f"[Coredump]\nStorage=external\nCompress={'yes' if compress else 'no'}\nMaxUse=1T\nKeepFree=1\n"
        # In place: another process has the file mounted.
        Path(self._base, "coredump.conf").write_text(text, encoding="ascii")


@contextlib.contextmanager
def running(base: str, store: str) -> Iterator[Peer]:
    """Download, unpack and start it. base: a folder for its things. store: where cores are to go."""
    os.makedirs(f"{base}/etc")
    unpacked = unpack_coredump(base)
    (program,) = glob.glob(f"{unpacked}/**/lib/systemd/systemd-coredump", recursive=True)
    peer = Peer(base, f"|{program} {ARGUMENTS}")
    peer.configure(compress=True)
    with contextlib.ExitStack() as stack:
        made = not os.path.isdir(JOURNAL)
        os.makedirs(JOURNAL, exist_ok=True)
        if made:
            stack.callback(_remove_directory, JOURNAL)
        script = _SETUP.format(base=shlex.quote(base), store=shlex.quote(store), journal=JOURNAL)
        holder = stack.enter_context(_process(["unshare", "--mount", "sh", "-euc", script], output=True))
        assert holder.stdout is not None
        if read_line(holder.stdout.fileno(), 30, "a mount namespace for systemd-coredump") != b"ready\n":
            raise RuntimeError("no mount namespace could be made for systemd-coredump")
        inside = ["nsenter", "--target", str(holder.pid), "--mount"]
        stack.enter_context(_process([*inside, JOURNALD]))
        journal = Path(f"/proc/{holder.pid}/root{JOURNAL}/socket")
        wait_until(journal.is_socket, 20, "journald listens")
        stack.callback(_remove_file, SOCKET)
        listener = ["systemd-socket-activate", "--seqpacket", "--accept", "--listen", SOCKET, program]
        stack.enter_context(_process([*inside, *listener]))
        wait_until(Path(SOCKET).is_socket, 20, "systemd-socket-activate listens")
        yield peer


@contextlib.contextmanager
def _process(command: list[str], *, output: bool = False) -> Iterator[subprocess.Popen[bytes]]:
    # Killed, the benchmark could not end it.
    process = subprocess.Popen(
        ["setpriv", "--pdeathsig", "KILL", *command],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE if output else subprocess.DEVNULL,
        stderr=None if output else subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        if process.stdout is not None:
            process.stdout.close()


def _remove_file(path: str) -> None:
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)


def _remove_directory(path: str) -> None:
    with contextlib.suppress(OSError):
        os.rmdir(path)
