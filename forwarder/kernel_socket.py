"""The kernel's coredump socket, the second way in: a service that has its imports warm, and a process for each crash.

With a core_pattern of `@@/path` (since 6.17) the crashing kernel connects to a socket itself, in the place of starting
a helper: no Python has to start while a process waits. Everything behind the way in is the stub's road
(`forwarder/stub.py`: `deal`), with the accepted socket in the place of the pipe.

What the kernel's arguments say on the other way in, is asked of the connection here: its peer is the crashing process
(SO_PEERPIDFD), so there is no number that could have become another process's.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import gc
import os
import resource
import select
import signal
import socket
import struct
import time
from typing import TYPE_CHECKING

import prctl

# What the stub imports late, here in the parent and not in each child.
from forwarder import handled, namespaces, ready, stub, unhandled
from forwarder.crash import UNLIMITED, Crash, Unidentified
from forwarder.report import report
from receiver.activation import tell_systemd
from receiver.protocol import SO_PEERPIDFD, printable

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

__all__ = ["Service", "handled", "protect", "unhandled"]

# <linux/coredump.h>: struct coredump_req {u32 size, size_ack; u64 mask}, coredump_ack {u32 size, spare; u64 mask}.
_REQUEST = struct.Struct("=IIQ")
_ACK = struct.Struct("=IIQ")
_MARK = struct.Struct("=I")
# The kernel writes the core to the socket, and waits until every holder of it has closed it.
COREDUMP_KERNEL = 1
COREDUMP_WAIT = 8
MARK_REQACK = 0
# A request that grows has what we know at its start; one of this size is no request any more.
MAX_REQUEST = 4096
# The kernel's own side of it takes microseconds. Whoever else connects does not get more of our time.
HANDSHAKE_SECONDS = 5.0

# <linux/pidfd.h>: struct pidfd_info up to coredump_mask, since 6.16 (1d8db6fd698d); what it says is in mask.
_INFO = struct.Struct("=QQ12II")
PIDFD_GET_INFO = 0xC0000000 | _INFO.size << 16 | 0xFF << 8 | 11
INFO_COREDUMP = 1 << 4
DUMPED, AS_USER, AS_ROOT = 1, 4, 8

# <linux/sched.h>: the thread that dumps has it, and no other of its process (seen).
PF_DUMPCORE = 0x200
# proc_pid_stat(5), counted from after the name: flags is field 9, exit_code field 52.
_FLAGS, _EXIT_CODE = 6, 49

# To the guard: no need for it. From the one that stood ready: it has a connection.
LEAVE = b"."
TAKEN = b"!"
# The end of a terminal is one as well: who only dies of it cannot give the way in back.
STOPS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
# Children at once. One more waits in the queue, and with it those behind it.
MAX_CHILDREN = 1024
# When accept(2) or fork(2) fails for want of memory or descriptors, look again a little later.
SHORTAGE_SECONDS = 0.2
# For the one that stands ready to say whether it leaves.
LEAVE_SECONDS = 5.0
# So long after a crash, unless another one comes, the next child is made: the one under way is most often over by then.
QUIET_SECONDS = 0.03


def protect() -> None:
    """Make sure that a crash of the service is never a crash for the service: the kernel does not dump it at all."""
    prctl.set_dumpable(0)
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))


def shake_hands(connection: socket.socket) -> None:
    """Have the kernel write the core to the connection, and wait for its end. Raises ValueError, OSError."""
    deadline = time.monotonic() + HANDSHAKE_SECONDS
    head = _receive(connection, _REQUEST.size, deadline)
    size, size_ack, mask = _REQUEST.unpack(head)
    wanted = COREDUMP_KERNEL | COREDUMP_WAIT
    if not _REQUEST.size <= size <= MAX_REQUEST or size_ack < _ACK.size or mask & wanted != wanted:
        raise ValueError(f"its coredump request is of a kind not known (size {size}, {size_ack}, mask {mask:#x})")
    _receive(connection, size - len(head), deadline)
    connection.sendall(_ACK.pack(_ACK.size, 0, wanted))
    (mark,) = _MARK.unpack(_receive(connection, _MARK.size, deadline))
    # The receiver gets the same open file, and shall be able to read it as it reads a pipe.
    connection.setblocking(True)
    if mark != MARK_REQACK:
        raise ValueError(f"the kernel refused our answer to its coredump request (mark {mark})")


def _receive(connection: socket.socket, length: int, deadline: float) -> bytes:
    data = b""
    while len(data) < length:
        connection.settimeout(max(deadline - time.monotonic(), 0.001))
        part = connection.recv(length - len(data))
        if not part:
            raise ValueError("the connection ended within the coredump handshake")
        data += part
    return data


def who_crashed(connection: socket.socket) -> Crash:
    """Return the process at the other end, not identified yet. Raises Unidentified, and ValueError when it is no dump.

    The crash owns a new descriptor: the kernel's pidfd.
    """
    pidfd = -1
    pid = 0
    try:
        pidfd = connection.getsockopt(socket.SOL_SOCKET, SO_PEERPIDFD)
        os.set_inheritable(pidfd, False)
        pid = namespaces.pid_of_pidfd(pidfd)
        if pid <= 0:
            raise Unidentified("the process that connected has ended")
        crash = _crash_of(pid, *_dump_of(pidfd, pid))
        crash.pidfd, pidfd = pidfd, -1
        crash.pidfd_is_kernels = True
    except OSError as error:
        raise Unidentified(f"the process that connected ({pid or 'unknown'}) is gone ({error.strerror})") from None
    finally:
        if pidfd >= 0:
            os.close(pidfd)
    return crash


def _crash_of(pid: int, dumpable: int, uid: int, gid: int) -> Crash:
    """Return what the kernel's arguments say on the other way in. Raises OSError, ValueError."""
    process = os.open(f"/proc/{pid}", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        tid = _dumping_thread(process, pid)
        status = namespaces.read_at(process, f"task/{tid}/status", 1 << 20)
        arguments = {
            "P": pid,
            "I": tid,
            # The last ones: of the innermost namespace, which is its own.
            "p": int((namespaces.status_value(status, b"NStgid") or [b"0"])[-1]),
            "i": int((namespaces.status_value(status, b"NSpid") or [b"0"])[-1]),
            "s": _signal(process),
            "t": int(time.time()),
            "c": core_limit(namespaces.read_at(process, f"task/{tid}/limits", 8192)),
            "d": dumpable,
            "u": uid,
            "g": gid,
        }
    finally:
        os.close(process)
    return Crash({name: str(value) for name, value in arguments.items()})


def _info(pidfd: int) -> tuple[int, int, int, int]:
    """Return mask, coredump_mask, real uid and gid of a process. Raises OSError."""
    found = bytearray(_INFO.size)
    _INFO.pack_into(found, 0, INFO_COREDUMP, *[0] * 14)
    fcntl.ioctl(pidfd, PIDFD_GET_INFO, found)
    mask, _cgroup, _pid, _tgid, _ppid, uid, gid, *_rest, coredump = _INFO.unpack(found)
    return mask, coredump, uid, gid


def _dump_of(pidfd: int, pid: int) -> tuple[int, int, int]:
    """Return dumpable (as %d has it), real uid and gid of a process that dumps core. Raises ValueError, OSError."""
    mask, coredump, uid, gid = _info(pidfd)
    if not (mask & INFO_COREDUMP and coredump & DUMPED):
        raise ValueError(f"process {pid} connected and does not dump core")
    dumpable = {AS_USER: 1, AS_ROOT: 2}.get(coredump & (AS_USER | AS_ROOT), 2)
    return dumpable, uid, gid


def _dumping_thread(process: int, pid: int) -> int:
    """Return the thread that dumps, the leader when no one can be told. Raises OSError."""
    # The leader first: where most programs crash.
    for name in (str(pid), *_threads(process)):
        try:
            if int(_stat(process, f"task/{name}/stat")[_FLAGS]) & PF_DUMPCORE:
                return int(name)
        except OSError:
            # A thread that had left before the crash.
            continue
    return pid


def _threads(process: int) -> list[str]:
    fd = os.open("task", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=process)
    try:
        return [name for name in os.listdir(fd) if name.isdigit()]
    finally:
        os.close(fd)


def _signal(process: int) -> int:
    """Return the signal that ends a process, 0 when that is not told: then it stands in the core's notes.

    While a process dumps, its exit code is that of its group: the signal, as it is going to be in wait(2)'s status.
    """
    return int(_stat(process, "stat")[_EXIT_CODE]) & 0x7F


def _stat(process: int, name: str) -> list[bytes]:
    return namespaces.read_at(process, name, 4096).rpartition(b")")[2].split()


def core_limit(limits: bytes) -> int:
    """Return the soft RLIMIT_CORE from a proc limits file."""
    for line in limits.split(b"\n"):
        if line.startswith(b"Max core file size"):
            words = line.split()
            return int(words[4]) if words[4].isdigit() else UNLIMITED
    return UNLIMITED


class Service:
    """Has a process of its own for each of the kernel's connections. Owns the listening socket.

    One child always stands ready: it takes the connection itself, so nobody who crashes waits for fork(2), and the next
    one stands ready while it works. Another one, the guard, gives the way in back when the service is killed.
    """

    def __init__(self, listener: socket.socket, settings: Mapping[str, object], *, idle_seconds: float = 0.0) -> None:
        """settings: the stub's. idle_seconds: leave after so long without a crash; 0: never."""
        self.listener = listener
        self.settings = settings
        self.idle_seconds = idle_seconds
        # Those that have a connection.
        self.children: set[int] = set()
        # The one that stands ready, 0 without; and our end of what ties it to us: its end closes when it has a
        # connection, and ours when it is to leave, or when we are killed.
        self.ready = 0
        self._tie: socket.socket | None = None
        self.stopping = False
        # The same of the guard. We say LEAVE; an end without a word is that we were killed.
        self.guard = 0
        self._guard_tie: socket.socket | None = None
        # The signal handler's way into poll(2).
        self._awake, self._waker = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)

    def run(self, take_over: Callable[[], None] | None = None, give_back: Callable[[], None] | None = None) -> None:
        """Serve until SIGTERM, or idle.

        take_over: is called when connections are taken. give_back: before the last of them are; from then on the kernel
        has to go another way. Without it they wait, at systemd's socket, for the next to serve them.
        """
        self.listener.setblocking(False)
        signal.set_wakeup_fd(self._waker, warn_on_full_buffer=False)
        for number in STOPS:
            signal.signal(number, self._stop)
        signal.signal(signal.SIGCHLD, lambda _number, _frame: None)
        # A child shares what is never written to; a collection would write to all of it.
        gc.collect()
        gc.freeze()
        try:
            if give_back is not None:
                self._post_guard(give_back)
            if take_over is not None:
                take_over()
            tell_systemd("READY=1")
            self._loop(give_back)
        finally:
            tell_systemd("STOPPING=1")
            self._untie()
            if give_back is not None:
                self._leave(give_back)
            self._dismiss_guard()
            self.listener.close()
            self._wait()

    def _leave(self, give_back: Callable[[], None]) -> None:
        give_back()
        # Whoever connected before the kernel knew.
        while self._accept():
            pass

    def _stop(self, _number: int, _frame: object) -> None:
        self.stopping = True

    def _loop(self, give_back: Callable[[], None] | None) -> None:
        every = _watchdog_seconds()
        idle_since = time.monotonic()
        busy_until = 0.0
        waiting = False
        while not self.stopping:
            self._reap()
            if not self.guard and give_back is not None:
                self._post_guard(give_back)
            waits = [every] if every else []
            # To make the next one takes time that the crash under way would lack.
            quiet = busy_until - time.monotonic() if self.children and not waiting and not self.ready else 0.0
            if not self.ready:
                if quiet > 0:
                    waits.append(quiet)
                elif len(self.children) < MAX_CHILDREN and self._fork(None):
                    idle_since = time.monotonic()
                else:
                    # No memory, or as many as there may be.
                    waits.append(SHORTAGE_SECONDS)
            if self.children:
                idle_since = time.monotonic()
            elif self.idle_seconds:
                left = idle_since + self.idle_seconds - time.monotonic()
                if left <= 0 and self._dismiss_ready():
                    return
                # Or it has just got a connection: the next one has to come at once.
                waits.append(max(left, 0))
            poll = select.poll()
            poll.register(self._awake, select.POLLIN)
            if self._tie is not None:
                poll.register(self._tie, select.POLLIN)
            elif quiet > 0:
                poll.register(self.listener, select.POLLIN)
            events = dict(poll.poll(min(waits) * 1000 if waits else None))
            if every:
                tell_systemd("WATCHDOG=1")
            self._drain(events)
            if self._tie is not None and self._tie.fileno() in events:
                self._untie()
                busy_until = time.monotonic() + QUIET_SECONDS
            waiting = self.listener.fileno() in events

    def _drain(self, events: dict[int, int]) -> None:
        if self._awake in events:
            with contextlib.suppress(BlockingIOError):
                while os.read(self._awake, 4096):
                    pass

    def _untie(self) -> None:
        """Count the one that stood ready among those that are waited for: it has a connection, or leaves, or died."""
        if self._tie is not None:
            self._tie.close()
            self._tie = None
        if self.ready:
            self.children.add(self.ready)
            self.ready = 0

    def _dismiss_ready(self) -> bool:
        """Have the one that stands ready leave. Returns whether it did, and did not take a connection just now.

        Who leaves with a crash under way would wait for its end, and systemd starts nobody else meanwhile.
        """
        if self._tie is None:
            return False
        try:
            self._tie.shutdown(socket.SHUT_WR)
            self._tie.settimeout(LEAVE_SECONDS)
            left = not self._tie.recv(1)
        except OSError:
            left = False
        self._untie()
        return left

    def _accept(self) -> bool:
        """Take one connection and start its child. Returns whether there was one."""
        connection = self._take()
        if connection is None:
            return False
        with connection:
            self._fork(connection)
        return True

    def _take(self) -> socket.socket | None:
        try:
            return self.listener.accept()[0]
        except (BlockingIOError, ConnectionAbortedError):
            # The child that stood ready before was faster.
            return None
        except OSError as error:
            report(f"a connection of the kernel's cannot be accepted now: {error.strerror}")
            time.sleep(SHORTAGE_SECONDS)
            return None

    def _fork(self, connection: socket.socket | None) -> bool:
        """Start a child for a connection, or one that stands ready. Returns whether there is one."""
        ours, theirs = socket.socketpair()
        try:
            pid = os.fork()
        except OSError as error:
            ours.close()
            theirs.close()
            report(f"no process can be started for a crash: {error.strerror}")
            return False
        if pid == 0:
            ours.close()
            self._be_a_child(lambda: self._serve_one(connection, theirs))
        theirs.close()
        if connection is None:
            self.ready, self._tie = pid, ours
        else:
            ours.close()
            self.children.add(pid)
        return True

    def _be_a_child(self, work: Callable[[], int]) -> None:
        """Do some work, and never return. Returns what is its status."""
        status = 1
        try:
            gc.disable()
            signal.set_wakeup_fd(-1)
            # What it began it finishes: SIGTERM goes to the whole service.
            for number in STOPS:
                signal.signal(number, signal.SIG_IGN)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            # Held here, they would tell nobody that the service was killed.
            for tie in (self._tie, self._guard_tie):
                if tie is not None:
                    tie.close()
            status = work()
        except BaseException as error:
            report(f"a crash could not be served: {type(error).__name__}: {printable(str(error).encode())}")
        finally:
            # Nothing of the parent's may run twice.
            os._exit(status)

    def _serve_one(self, connection: socket.socket | None, tie: socket.socket) -> int:
        """Bring the crash of one connection home; without it, of the next one."""
        os.close(self._awake)
        os.close(self._waker)
        helper = None
        if connection is None:
            if not _is_readable(self.listener):
                # Nobody waits for it.
                helper = ready.prepare(_play)
            connection = self._stand_ready(tie)
            if connection is not None:
                with contextlib.suppress(OSError):
                    tie.send(TAKEN)
        tie.close()
        self.listener.close()
        return 0 if connection is None else serve(connection, self.settings, helper)

    def _stand_ready(self, tie: socket.socket) -> socket.socket | None:
        """Wait for a connection and return it; None when it is time to leave."""
        poll = select.poll()
        poll.register(self.listener, select.POLLIN)
        poll.register(tie, select.POLLIN)
        while True:
            events = dict(poll.poll())
            # Also when the service has just been killed: then nobody else would take it until the next one starts.
            if self.listener.fileno() in events and (connection := self._take()) is not None:
                return connection
            if tie.fileno() in events:
                return None

    def _post_guard(self, give_back: Callable[[], None]) -> None:
        ours, theirs = socket.socketpair()
        try:
            pid = os.fork()
        except OSError as error:
            ours.close()
            theirs.close()
            report(f"no guard can be started for the kernel's socket: {error.strerror}")
            return
        if pid == 0:
            ours.close()
            self._be_a_child(lambda: self._stand_guard(theirs, give_back))
        theirs.close()
        self.guard, self._guard_tie = pid, ours

    def _dismiss_guard(self) -> None:
        if self._guard_tie is not None:
            with contextlib.suppress(OSError):
                self._guard_tie.send(LEAVE)
            self._guard_tie.close()
            self._guard_tie = None
        if self.guard:
            self.children.add(self.guard)
            self.guard = 0

    def _stand_guard(self, tie: socket.socket, give_back: Callable[[], None]) -> int:
        """Wait for the service's end, and do what it does at its end when it was killed."""
        with contextlib.suppress(OSError):
            if tie.recv(1) == LEAVE:
                return 0
        self._tie = self._guard_tie = None
        self.children.clear()
        report("the service of the kernel's coredump socket was killed: the pipe is the way in")
        self._leave(give_back)
        return 0

    def _reap(self) -> None:
        while self.children or self.ready or self.guard:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                self.children.clear()
                return
            if not pid:
                return
            if pid == self.ready:
                self._untie()
            if pid == self.guard:
                self._dismiss_guard()
            self.children.discard(pid)
            if os.WIFSIGNALED(status):
                report(f"the process that served a crash was ended by signal {os.WTERMSIG(status)}")

    def _wait(self) -> None:
        """Wait for the children, each of which has deadlines of its own."""
        while self.children:
            self._reap()
            poll = select.poll()
            poll.register(self._awake, select.POLLIN)
            self._drain(dict(poll.poll(1000 if self.children else 0)))


def serve(connection: socket.socket, settings: Mapping[str, object], helper: ready.Helper | None = None) -> int:
    """Bring the crash of one connection home. Returns as `forwarder.stub.main`."""
    stub.prefer_to_be_killed()
    nothing = os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC)
    os.dup2(nothing, 1, inheritable=False)
    os.close(nothing)

    # While anybody holds it the process waits, and CORE is what the road knows to let go of.
    os.dup2(connection.fileno(), stub.CORE, inheritable=False)
    connection.close()
    core = socket.socket(fileno=stub.CORE)
    route = functools.partial(ready.PreparedRoute, helper)
    try:
        # The kernel may fill the connection while we look for a receiver.
        return stub.deal(settings, lambda: who_crashed(core), [], lambda: shake_hands(core), route)
    finally:
        core.detach()


def _is_readable(sock: socket.socket) -> bool:
    poll = select.poll()
    poll.register(sock, select.POLLIN)
    return bool(poll.poll(0))


def _play(crash: Crash) -> None:
    """Run through what is done here for a connection of the kernel's, without one. Raises OSError, ValueError."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.sendall(
            _REQUEST.pack(_REQUEST.size, _ACK.size, COREDUMP_KERNEL | COREDUMP_WAIT) + _MARK.pack(MARK_REQACK)
        )
        shake_hands(ours)
    os.close(os.pidfd_open(namespaces.pid_of_pidfd(crash.pidfd)))
    _, _, uid, gid = _info(crash.pidfd)
    _crash_of(crash.pid, 2, uid, gid)


def _watchdog_seconds() -> float:
    """Return how often systemd wants to hear that we are alive, 0 when it does not (sd_watchdog_enabled(3))."""
    text = os.environ.get("WATCHDOG_USEC", "")
    pid = os.environ.get("WATCHDOG_PID", str(os.getpid()))
    return int(text) / 2e6 if text.isdigit() and pid == str(os.getpid()) else 0.0
