"""Long output through a pager, as systemd's programs do it, and with their caution.

A pager starts programs (`!sh` in less). Who may run corepipectl as another user, by sudo or by a set-uid program, must
not get that user's shell with it: then only less is taken, with LESSSECURE=1, unless $SYSTEMD_PAGERSECURE tells that
all is well.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

LESS = "FRSXMK"
OWN_CGROUPS = "/proc/self/cgroup"
_SESSION = re.compile(r"/user-([0-9]{1,10})\.slice(?:/|$)")
_YES = ("1", "yes", "y", "true", "t", "on")
_NO = ("0", "no", "n", "false", "f", "off")


@contextmanager
def paged(*, wanted: bool) -> Iterator[None]:
    """Let standard output go through a pager, when it is a terminal, one is wanted, and one is there."""
    found = _pager() if wanted and _on_terminal() else None
    if found is None:
        yield
        return
    command, environment = found
    sys.stdout.flush()
    reading, writing = os.pipe()
    try:
        pager = subprocess.Popen(command, stdin=reading, env=environment)  # noqa: S603 - see _pager()
    except OSError:
        os.close(writing)
        yield
        return
    finally:
        os.close(reading)
    terminal = os.dup(sys.stdout.fileno())
    os.dup2(writing, sys.stdout.fileno())
    os.close(writing)
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        # It was left before the end was read: that is what it is for. What is still to be written goes nowhere.
        nowhere = os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)
        sys.stdout.flush()
    finally:
        # The pipe's last writer goes, so that the pager sees the end.
        os.dup2(terminal, sys.stdout.fileno())
        os.close(terminal)
        while True:
            try:
                pager.wait()
                break
            except KeyboardInterrupt:
                # The pager's own: it decides what ^C is.
                continue


def _on_terminal() -> bool:
    try:
        return sys.stdout.isatty() and os.environ.get("TERM", "dumb") != "dumb"
    except ValueError:
        return False


def _pager() -> tuple[list[str], dict[str, str]] | None:
    """Return the command of a pager and its environment, None for none."""
    asked = os.environ.get("SYSTEMD_PAGER", os.environ.get("PAGER"))
    if asked is not None and asked.strip() in ("", "cat"):
        return None
    secure, trusted = _caution()
    environment = dict(os.environ)
    environment["LESS"] = os.environ.get("SYSTEMD_LESS", LESS)
    environment["LESSCHARSET"] = os.environ.get("SYSTEMD_LESSCHARSET", "utf-8")
    environment.pop("LESSSECURE", None)
    if secure:
        environment["LESSSECURE"] = "1"
    if asked is not None and trusted:
        try:
            command = shlex.split(asked)
        except ValueError:
            command = []
        if command and shutil.which(command[0]) is not None:
            return command, environment
    # Only less has a secure mode. (`pager` is Debian's alternative, `more` is busybox's.)
    for name in ("less",) if secure else ("pager", "less", "more"):
        path = shutil.which(name)
        if path is not None:
            return [path], environment
    return None


def _caution() -> tuple[bool, bool]:
    """Return whether the pager must start no programs, and whether the user's choice of a pager is trusted."""
    asked = os.environ.get("SYSTEMD_PAGERSECURE")
    if asked is not None:
        return asked.lower() not in _NO, asked.lower() in (*_YES, *_NO)
    secure = os.getuid() != os.geteuid() or _session_owner() != os.geteuid()
    return secure, not secure


def _session_owner() -> int | None:
    """Return whose login session this is, None when it is no session (sd_pid_get_owner_uid(3)).

    sudo changes the uid, and not the session.
    """
    try:
        with open(OWN_CGROUPS, encoding="utf-8", errors="replace") as file:
            found = _SESSION.search(file.read(1 << 16))
    except OSError:
        return None
    return int(found[1]) if found is not None else None
