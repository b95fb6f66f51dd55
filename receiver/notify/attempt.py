"""One delivery: a process of its own, without privileges, killed with all that it has started when its time is over.

The process that runs the program or sends the request is another user's from its first step on, and has none of our
descriptors. What it says is text of a stranger.
"""

from __future__ import annotations

import json
import os
import pwd
import resource
import signal
import time
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

import prctl

from receiver import privileges
from receiver.notify import events
from receiver.protocol import printable

if TYPE_CHECKING:
    from receiver.notify.settings import Callback, Header

MAX_REPORT = 8192
# Of what a program says on its standard error; when there is more of it, it talks to nobody.
MAX_ERRORS = 1 << 20
SHOWN = 300
_NOBODY = 65534
_MAX_SECRET = 4096
_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGCHLD, signal.SIGHUP, signal.SIGALRM)


class Outcome(NamedTuple):
    """What became of a delivery. retry_after: seconds that the server asked for. text: printable."""

    ok: bool
    text: str
    retry_after: float = 0.0


class Unsendable(Exception):
    """There is nothing that could be sent. The text says why."""


class Attempt:
    """A delivery that is on its way. Owns the process, its group, and two descriptors.

    deadline: time.monotonic(). owner: the record's id.
    """

    def __init__(self, callback: Callback, owner: str, body: bytes) -> None:
        """Begin. Raises OSError when there is no process to be had, Unsendable when a header cannot be read."""
        self.callback = callback
        self.owner = owner
        self.begun = time.monotonic()
        self.deadline = self.begun + callback.timeout
        self._late = False
        headers = {header.name: _value_of(header) for header in callback.headers}
        # One that can be read again and again, and needs nobody who feeds it.
        stdin = os.memfd_create("record", os.MFD_CLOEXEC)
        pipes: list[int] = []
        try:
            with open(os.dup(stdin), "wb") as file:
                file.write(body)
            os.lseek(stdin, 0, os.SEEK_SET)
            pipes += os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
            pipes += os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
            parent = os.getpid()
            self._pid = os.fork()
            if self._pid == 0:
                _be_child(callback, owner, body, headers, stdin, pipes[1], pipes[3], parent)
        except BaseException:
            for fd in pipes:
                os.close(fd)
            raise
        finally:
            os.close(stdin)
        os.close(pipes[1])
        os.close(pipes[3])
        self._report, self._errors = _Pipe(pipes[0], MAX_REPORT), _Pipe(pipes[2], MAX_ERRORS)

    def descriptors(self) -> list[int]:
        """Return what is to be waited for besides SIGCHLD: there is something to read then (`turn`)."""
        return [pipe.fd for pipe in (self._report, self._errors) if pipe.fd >= 0]

    def turn(self) -> Outcome | None:
        """Read what is there, and look after the time. Returns the outcome at the end, None before. Never waits."""
        self._report.read()
        self._errors.read()
        # Not reaped yet: until then nobody else can have its number, nor its group's.
        if os.waitid(os.P_PID, self._pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
            if not self._late and time.monotonic() >= self.deadline:
                self._late = True
                self.kill()
            return None
        # What it has left behind, too.
        self.kill()
        _, status = os.waitpid(self._pid, 0)
        self._report.read()
        self._errors.read()
        self._report.close()
        self._errors.close()
        return self._outcome(status)

    def kill(self) -> None:
        """Kill it, and those that it has started, unless they have left its group."""
        for kill in (os.killpg, os.kill):
            try:
                kill(self._pid, signal.SIGKILL)
            except (ProcessLookupError, PermissionError):
                # Not ours to kill: another user's, and we are without CAP_KILL. It is waited for then.
                pass

    def _outcome(self, status: int) -> Outcome:
        if self._late:
            return Outcome(False, f"not done within {self.callback.timeout:g} s")
        try:
            report = json.loads(bytes(self._report.data)) if self._report.data else {}
            said = _printed(str(report.get("text", "")))
            ok, retry_after = report.get("ok") is True, float(report.get("retry_after", 0.0))
        except (ValueError, AttributeError, TypeError, RecursionError):
            said, ok, retry_after = "it sent nonsense", False, 0.0
        ended = f"signal {os.WTERMSIG(status)}" if os.WIFSIGNALED(status) else f"status {os.WEXITSTATUS(status)}"
        if said:
            return Outcome(ok and status == 0, said, retry_after)
        if self.callback.run and status == 0:
            return Outcome(True, "it ended with status 0")
        errors = bytes(self._errors.data).decode("utf-8", "backslashreplace").strip().partition("\n")[0]
        return Outcome(False, f"it ended with {ended}" + (f": {_printed(errors)}" if errors else ""))


class _Pipe:
    """The reading end of a pipe. Keeps the beginning of what comes, and closes it when that is too much."""

    def __init__(self, fd: int, most: int) -> None:
        self.fd = fd
        self.data = bytearray()
        self._left = most

    def read(self) -> None:
        while self.fd >= 0:
            try:
                data = os.read(self.fd, 65536)
            except BlockingIOError:
                return
            self._left -= len(data)
            self.data += data[: max(0, MAX_REPORT - len(self.data))]
            if not data or self._left <= 0:
                self.close()

    def close(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


def _printed(text: str) -> str:
    return printable(text.encode("utf-8", "backslashreplace"), SHOWN)


def _value_of(header: Header) -> str:
    """Return a header's value, now. Raises Unsendable, in which no part of the secret stands."""
    if header.file is None:
        return header.value
    try:
        fd = os.open(header.file, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
        with open(fd, "rb") as file:
            data = file.read(_MAX_SECRET + 1)
    except OSError as error:
        raise Unsendable(f"{header.file} of the header {header.name} cannot be read: {error.strerror}") from None
    text = data.decode("ascii", "replace").strip()
    if not text or len(data) > _MAX_SECRET or not all(" " <= c <= "~" for c in text):
        raise Unsendable(f"{header.file} has no line that the header {header.name} could have")
    return header.value + text


def _be_child(
    callback: Callback,
    owner: str,
    body: bytes,
    headers: dict[str, str],
    stdin: int,
    report: int,
    errors: int,
    parent: int,
) -> NoReturn:
    """Be the process: never return, and never leave anything of ours to others."""
    said: dict[str, Any] = {"ok": False, "text": "it failed"}
    try:
        os.setsid()
        signal.set_wakeup_fd(-1)
        for number in _SIGNALS:
            signal.signal(number, signal.SIG_DFL)
        null = os.open(os.devnull, os.O_RDWR)
        os.dup2(stdin, 0)
        os.dup2(null, 1)
        os.dup2(errors if callback.run else null, 2)
        # Beyond these nothing: not the store, and not the lock, which would outlive us in a program that stays.
        if report != 3:
            report = os.dup2(report, 3, inheritable=False)
        os.closerange(4, resource.getrlimit(resource.RLIMIT_NOFILE)[1] & 0x7FFFFFFF)
        os.set_blocking(2, True)
        os.umask(0o077)
        os.chdir("/")
        problem = _become(callback.user)
        if problem is None and os.getppid() != parent:
            problem = "the deliverer has gone"
        if problem is not None:
            said = {"ok": False, "text": problem}
        elif callback.run:
            said = _execute(callback, owner)
        elif callback.post is not None:
            from receiver.notify import post  # noqa: PLC0415 - TLS takes its time; who warms up pays once

            said = post.send(callback.post, body, headers, callback.ca, callback.timeout)
    except BaseException as error:
        said = {"ok": False, "text": f"{type(error).__name__}: {error}"}
    finally:
        try:
            said["text"] = said["text"][:SHOWN]
            os.write(report, json.dumps(said).encode("ascii"))
        finally:
            # Not sys.exit(): nothing of the parent's may run twice.
            os._exit(0 if said["ok"] else 1)


def _become(name: str) -> str | None:
    """Be another user, and nothing more than that, for good. Returns why that is not possible."""
    try:
        found = pwd.getpwnam(name) if not name.isdigit() else pwd.getpwuid(int(name))
        uid, gid = found.pw_uid, found.pw_gid
    except (KeyError, OverflowError):
        if not (name.isdigit() and len(name) < 10) and name != "nobody":
            return f"there is no user {printable(name.encode())} here"
        uid = gid = int(name) if name.isdigit() else _NOBODY
    # A callback that crashes is not to be told to itself, again and again: see events.is_mute.
    resource.setrlimit(resource.RLIMIT_CORE, (1, 1) if resource.getrlimit(resource.RLIMIT_CORE)[1] else (0, 0))
    try:
        if uid != os.geteuid():
            if os.geteuid() == 0:
                os.setgroups([])
            os.setresgid(gid, gid, gid)
            os.setresuid(uid, uid, uid)
        if uid:
            privileges.drop()
        else:
            prctl.set_no_new_privs(1)
    except OSError as error:
        return f"it cannot be run as user {printable(name.encode())} here: {error.strerror}"
    # After the change of user, which undoes both.
    prctl.set_dumpable(0)
    prctl.set_pdeathsig(signal.SIGKILL)
    return None


def _execute(callback: Callback, owner: str) -> dict[str, Any]:
    """Be the program. Returns only when that is not possible."""
    environment = {
        "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
        "LANG": "C.UTF-8",
        "CORE_PIPE_ID": owner,
        events.MARK: callback.name,
    }
    # Python ignores it, and a program that it starts would, too.
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    try:
        os.execve(callback.run[0], list(callback.run), environment)  # noqa: S606 - the administrator's own words
    except OSError as error:
        return {"ok": False, "text": f"{callback.run[0]} cannot be run: {error.strerror}"}


def body_of(callback: Callback, record: Any) -> bytes:
    """Return what is sent of a record. Raises Unsendable."""
    try:
        return events.body(record, callback)
    except (ValueError, RecursionError) as error:
        raise Unsendable(f"its record cannot be sent: {error}") from None
