"""The ledger's watcher as a service: its unit comes and goes with the installation.

It is on no crash's way, so nothing that goes wrong here keeps a core from getting home: it is said, and that is all.
"""

from __future__ import annotations

import contextlib
import os
from typing import TYPE_CHECKING

from forwarder import ingress, staging
from forwarder.install import HOST, refuse_elsewhere
from forwarder.staging import InstallError

if TYPE_CHECKING:
    from forwarder.install import Paths

UNIT = "core_pipe-ledger.service"
RESIDENT = f"{ingress.PROGRAM} ledger --watch"


def unit_files(paths: Paths) -> list[str]:
    """Return those that are there: of the persistent and of the runtime installation."""
    directories = (paths.at("/etc/systemd/system"), paths.at("/run/systemd/system"))
    return [path for directory in directories if os.path.lexists(path := os.path.join(directory, UNIT))]


def set_up(paths: Paths = HOST, *, runtime: bool = False) -> list[str]:
    """Have systemd run the watcher; return what was done, or why not, a line each. Raises InstallError elsewhere."""
    refuse_elsewhere()
    if not ingress.systemd_keeps(paths):
        return [f"the ledger watches for as long as somebody runs it (systemd does not run this machine): {RESIDENT}"]
    path = os.path.join(paths.at("/run/systemd/system" if runtime else "/etc/systemd/system"), UNIT)
    try:
        text = ingress._unit(UNIT, ingress._program())  # noqa: SLF001 - the other half of one installation
        # The one of the other kind would go on.
        done = [line for line in _remove(paths) if path not in line]
        staging.make_directories(os.path.dirname(path))
        staging.write_atomically(path, text)
        _systemctl("daemon-reload")
        if not runtime:
            _systemctl("enable", UNIT)
        _systemctl("start", UNIT)
    except (InstallError, OSError) as error:
        with contextlib.suppress(InstallError, OSError):
            _remove(paths)
        reason = error.fact if isinstance(error, InstallError) else f"{error.filename or ''}: {error.strerror}"
        return [f"the ledger does not watch: {reason}"]
    return [*done, f"wrote {path}", f"started {UNIT}"]


def take_down(paths: Paths = HOST) -> list[str]:
    """Take the watcher's service away; return what was done. The book stays. Raises InstallError, OSError."""
    refuse_elsewhere()
    return _remove(paths)


def _remove(paths: Paths) -> list[str]:
    present = unit_files(paths)
    if not present:
        return []
    if ingress.systemd_keeps(paths):
        _systemctl("disable", "--now", UNIT)
    for path in present:
        staging.replace_or_remove(path, None)
    if ingress.systemd_keeps(paths):
        _systemctl("daemon-reload")
    return [f"removed {path}" for path in present]


def _systemctl(*arguments: str) -> None:
    ingress._systemctl(*arguments)  # noqa: SLF001 - as above
