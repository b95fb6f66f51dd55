"""Who crashed: the facts that the kernel gives as arguments, and the process behind them, held by descriptors.

Import budget: on the stub's start-up path, see `forwarder/stub.py`.
"""

from __future__ import annotations

import posix
import select

from forwarder import namespaces
from forwarder.share import key_of
from receiver.auxv import is_secure

# The names stand in core_pattern (`forwarder/install.py`), each with the kernel's specifier of the same letter.
ARGUMENTS = frozenset(("v", "P", "I", "p", "i", "s", "t", "c", "d", "u", "g", "F"))
UNLIMITED = (1 << 64) - 1
# The line "Groups:" alone has up to 65536 numbers of ten digits (NGROUPS_MAX), and what we look for comes after it.
MAX_STATUS = 1 << 20
# Bytes of the environment in an offer, which has at most 64 KiB in all (receiver/protocol.py).
MAX_ENVIRONMENT = 32768
MAX_ARGUMENTS = 16384


class Unidentified(Exception):
    """The process that the kernel named is not there any more, or is not certainly the same."""


class Crash:
    """One crashed process. Owns the descriptors in it; they are close-on-exec.

    Numbers (core(5)), "host" meaning the initial pid and user namespaces, where the kernel starts the stub:

    pid, tid: %P and %I, thread group and dumping thread, host's numbering.
    own_pid, own_tid: %p and %i, the same in the process's own pid namespace.
    signal: %s. time: %t, seconds since the epoch. uid, gid: %u and %g, real ids, host's numbering.
    key: the container, as the host counts them (`forwarder/share.py`); empty until it is identified.
    core_limit: %c, bytes, soft RLIMIT_CORE; UNLIMITED for none.
    dumpable: %d, 0 no, 1 by its user, 2 by root only (suid_dumpable=2).

    Descriptors:

    pidfd: the thread group. From the kernel (%F, fd 3) when `pidfd_is_kernels`; else our own pidfd_open(2).
    task: /proc/<pid>/task/<tid>. Everything about the process is read through it: it stays bound to this thread, and
    gives ESRCH when the thread is gone, whoever has its number then. The thread's and not the leader's: the leader may
    have exited long ago, and then has no root, exe or namespaces any more.
    """

    __slots__ = (
        "comm",
        "core_limit",
        "dumpable",
        "gid",
        "key",
        "own_pid",
        "own_tid",
        "pid",
        "pidfd",
        "pidfd_is_kernels",
        "signal",
        "task",
        "tid",
        "time",
        "uid",
    )

    def __init__(self, arguments: dict[str, str]) -> None:
        """Take the numbers. Raises ValueError naming the argument that is missing or no number."""

        def number(name: str, default: int | None = None) -> int:
            text = arguments.get(name, "")
            if not text and default is not None:
                return default
            if not (text.isascii() and text.isdigit()):
                raise ValueError(f"the argument '{name}' is {text!r}, not a number")
            return int(text)

        self.pid = number("P")
        self.tid = number("I", self.pid)
        self.own_pid = number("p", 0)
        self.own_tid = number("i", 0)
        self.signal = number("s")
        self.time = number("t", 0)
        self.core_limit = number("c", UNLIMITED)
        # Unknown is treated as the kernel treats a set-uid program: for root's eyes.
        self.dumpable = number("d", 2)
        self.uid = number("u", 0)
        self.gid = number("g", 0)
        self.comm = b""
        self.key = ""
        # The kernel puts the pidfd at 3 and nowhere else, and expands %F to nothing when it does not know it.
        self.pidfd = number("F", -1)
        if self.pidfd not in (-1, 3):
            raise ValueError(f"the argument 'F' is {self.pidfd}; the kernel gives 3 or nothing")
        self.pidfd_is_kernels = self.pidfd == 3
        self.task = -1

    def identify(self) -> None:
        """Open the process and make sure that it is the one that crashed. Raises Unidentified.

        The race: somebody kills the process while it dumps, and its number goes to another before we look. With the
        kernel's pidfd there is none: the pidfd still names the number *after* `task` was opened, so the number belonged
        to it when we opened. Without: the process behind `task` must itself be dumping core now, and be older than
        the crash.
        """
        try:
            if self.pidfd_is_kernels:
                posix.set_inheritable(self.pidfd, False)
            self.task = posix.open(
                f"/proc/{self.pid}/task/{self.tid}",
                posix.O_PATH | posix.O_DIRECTORY | posix.O_CLOEXEC | posix.O_NOFOLLOW,
            )
            # Before anything can go wrong: whose allowance a crash takes that cannot be identified.
            self.key = key_of(self.task)
            if not self.pidfd_is_kernels:
                self.pidfd = posix.pidfd_open(self.pid)
            self.verify()
            self.comm = self.read("comm", 64).removesuffix(b"\n")
            if not self.pidfd_is_kernels and self.time and self._started() > self.time + 1:
                raise Unidentified(f"process {self.pid} is younger than the crash")
        except OSError as error:
            raise Unidentified(f"process {self.pid}, thread {self.tid} is gone ({error.strerror})") from None

    def verify(self) -> None:
        """Make sure that pidfd and `task` still name the process, and that it still dumps. Raises Unidentified."""
        pid = namespaces.pid_of_pidfd(self.pidfd)
        if pid != self.pid:
            raise Unidentified(f"process {self.pid} has ended")
        try:
            status = self.read("status", MAX_STATUS)
        except OSError as error:
            raise Unidentified(f"process {self.pid}, thread {self.tid} is gone ({error.strerror})") from None
        if namespaces.status_value(status, b"Tgid") != [b"%d" % self.pid]:
            raise Unidentified(f"thread {self.tid} is not one of process {self.pid}")
        # Since 4.15 (c643401218be). It is the mm's, so it holds for each thread.
        if namespaces.status_value(status, b"CoreDumping") != [b"1"]:
            raise Unidentified(f"process {self.pid} is not dumping core")

    def read(self, name: str, limit: int) -> bytes:
        """Return at most `limit` bytes of a file of the thread's proc directory. Raises OSError."""
        return namespaces.read_at(self.task, name, limit)

    def facts(self) -> dict[str, bytes]:
        """Return what a receiver may not be able to see by itself, as far as it can be read.

        In a container without CAP_SYS_PTRACE (Docker's and Podman's default) not even its root may look into another
        user's process. exe, cwd: as the container names them (d_path() ends at the root of their own mount namespace).
        cmdline, environ: NUL-separated, cut. To read these two is to read the process's memory, which may lie on a file
        system that hangs: `forwarder/apart.py`. secure: "1" when it was started with more rights than its user has
        (AT_SECURE).
        """
        found: dict[str, bytes] = {}
        if not self.pidfd_is_kernels:
            # Who replaced the process within the second of its crash, and crashes himself, would pass for it: then what
            # is told is only what the kernel gave as arguments.
            return found
        for name in ("exe", "cwd"):
            try:
                found[name] = posix.readlink(name.encode(), dir_fd=self.task)[:4096]
            except OSError:
                pass
        try:
            found["cmdline"] = self.read("cmdline", MAX_ARGUMENTS)
            found["environ"] = self.read("environ", MAX_ENVIRONMENT)
            found["secure"] = b"1" if is_secure(self.read("auxv", 4096)) else b"0"
        except OSError:
            pass
        return found

    def _started(self) -> int:
        """Return when the thread started, seconds since the epoch."""
        ticks = namespaces.start_ticks(self.read("stat", 4096))
        for line in namespaces.read_at(-1, "/proc/stat", 1 << 20).splitlines():
            if line.startswith(b"btime "):
                return int(line.split()[1]) + ticks // posix.sysconf("SC_CLK_TCK")
        return 0

    def still_dumps(self, seconds: float) -> bool:
        """Whether the process is in the kernel's dump still, after so long. Nothing of the core may be held here."""
        poll = select.poll()
        poll.register(self.pidfd, select.POLLIN)
        if poll.poll(seconds * 1000):
            return False
        # Giving back a huge memory takes its time; being out of the dump is what counts.
        try:
            self.verify()
        except Unidentified:
            return False
        return True

    def written(self) -> int:
        """Return how many bytes the dumping thread has written, which grows with each byte of core that is taken.

        The kernel's own account (wchar in proc_pid_io(5)): what a receiver says of its progress may be a lie.
        -1 where the kernel keeps no account.
        """
        try:
            for line in self.read("io", 1024).splitlines():
                if line.startswith(b"wchar: "):
                    return int(line[7:])
        except OSError:
            pass
        return -1


def parse(arguments: list[str]) -> dict[str, str]:
    """Return the stub's arguments, `name=value` in any order, without those it does not know.

    Raises ValueError when the version is another one's, so that a stub never guesses at a pattern it was not made for.
    """
    found: dict[str, str] = {}
    for argument in arguments:
        name, equals, value = argument.partition("=")
        if equals and name in ARGUMENTS and name not in found:
            found[name] = value
    if found.get("v") != "1":
        raise ValueError(f"core_pattern speaks version {found.get('v', 'none')!r}, this stub version '1'")
    return found
