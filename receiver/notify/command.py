"""`core-pipe-receiver notify`: the deliverer, what it has done, and a test of a callback."""

from __future__ import annotations

import json
import os
import select
import sys
import time
from typing import TYPE_CHECKING

from receiver.config import Config, ConfigError, load, source
from receiver.log import log, quiet_pipe
from receiver.notify import FLAG
from receiver.notify.settings import callbacks_of
from receiver.record import rfc3339
from receiver.store import Store, StoreError
from receiver.tables import lines, shown

if TYPE_CHECKING:
    import argparse

    from receiver.notify.settings import Callback

LOOK_MS = 20

EXIT_OK, EXIT_FAILURE, EXIT_USAGE, EX_CONFIG = 0, 1, 2, 78

DESCRIPTION = """\
Tells who is to be told of crashes ([[notify]] in the settings). Without an option it is the deliverer: it tells what is
new in the store, tries again what fails, and ends when nobody waits. systemd or the resident receiver start it.
"""


def add(command: argparse.ArgumentParser) -> None:
    """Give a parser the options of this command."""
    command.description = DESCRIPTION
    options = command.add_mutually_exclusive_group()
    options.add_argument("--test", metavar="NAME", help="tell one callback of a crash that never was, and what it says")
    options.add_argument("--status", action="store_true", help="show what was told whom, and what waits")
    command.add_argument("--json", action="store_true", help="with --status, for programs")
    command.set_defaults(run=run)


def run(found: argparse.Namespace) -> int:
    """Run the command. Returns its exit status."""
    if found.json and not found.status:
        print("core-pipe-receiver: --json goes with --status", file=sys.stderr)
        return EXIT_USAGE
    if not found.status and found.test is None:
        return deliver_configured()
    try:
        config = load()
        callbacks = callbacks_of(config, source())
    except ConfigError as error:
        for line in str(error).splitlines():
            log(line, error=True)
        return EX_CONFIG
    if found.status:
        with quiet_pipe():
            return _status(config, callbacks, as_json=found.json)
    return _test(callbacks, found.test)


def deliver_configured() -> int:
    """Be the deliverer, by the settings as they are now. Returns the exit status."""
    from receiver.notify.deliver import deliver  # noqa: PLC0415

    config = Config()
    try:
        config = load()
        callbacks = callbacks_of(config, source())
    except ConfigError as error:
        _rest(config)
        for line in str(error).splitlines():
            log(line, error=True)
        return EX_CONFIG
    return deliver(config, callbacks, source())


def _rest(config: Config) -> None:
    """Take away what would have systemd start the deliverer again and again while its settings are wrong."""
    try:
        store = Store.configured(config, create=False)
    except StoreError:
        return
    try:
        os.unlink(FLAG, dir_fd=store.directory)
    except OSError:
        pass
    finally:
        store.close()


def _test(callbacks: tuple[Callback, ...], name: str) -> int:
    from receiver.notify import events, quota  # noqa: PLC0415
    from receiver.notify.attempt import Attempt, Unsendable, body_of  # noqa: PLC0415
    from receiver.notify.settings import CRASH  # noqa: PLC0415

    callback = next((callback for callback in callbacks if callback.name == name), None)
    if callback is None:
        known = ", ".join(callback.name for callback in callbacks) or "none"
        print(f"core-pipe-receiver: there is no callback {shown(name)}. There are: {known}", file=sys.stderr)
        return EXIT_USAGE
    record = events.made_up()
    try:
        body = (
            body_of(callback, record) if CRASH in callback.events else quota.body(record.id, quota.made_up(), callback)
        )
        attempt = Attempt(callback, record.id, body)
    except (OSError, Unsendable) as error:
        print(f"not told: {error}")
        return EXIT_FAILURE
    outcome = None
    try:
        while outcome is None:
            poll = select.poll()
            for fd in attempt.descriptors():
                poll.register(fd, select.POLLIN)
            # Its end is heard by a look, its output by the descriptors.
            poll.poll(LOOK_MS)
            outcome = attempt.turn()
    finally:
        if outcome is None:
            # Ctrl-C.
            attempt.kill()
    seconds = time.monotonic() - attempt.begun
    print(f"{'told' if outcome.ok else 'not told'}: {outcome.text} ({seconds:.2f} s)")
    return EXIT_OK if outcome.ok else EXIT_FAILURE


def _status(config: Config, callbacks: tuple[Callback, ...], *, as_json: bool) -> int:
    from receiver.notify import queue  # noqa: PLC0415

    try:
        store = Store.configured(config, create=False)
        try:
            found = queue.read(store.directory) or queue.Queue()
        finally:
            store.close()
    except (StoreError, OSError, ValueError) as error:
        print(f"core-pipe-receiver: {shown(error)}", file=sys.stderr)
        return EXIT_FAILURE
    rows = []
    for callback in callbacks:
        line = found.lines.get(callback.name) or queue.Line(0.0)
        rows.append(
            {
                "name": callback.name,
                "target": callback.target,
                "waiting": len(line.waiting),
                **line.counters,
                "failures": line.failures,
                "error": line.error or None,
                "next": rfc3339(int(line.next() or 0)) if line.waiting else None,
            }
        )
    if as_json:
        print(json.dumps({"callbacks": rows}, indent=2))
        return EXIT_OK
    if not rows:
        print(f"there are no callbacks: {shown(source())} has no [[notify]].")
        return EXIT_OK
    names = ("name", "waiting", *queue.COUNTERS, "target")
    heading = tuple(name.upper().replace("_", " ") for name in names)
    print_rows = [heading, *(tuple(row[name] for name in names) for row in rows)]
    print("\n".join(lines(print_rows, frozenset(range(1, len(names) - 1)))))
    for row in rows:
        if row["error"]:
            print(f"{row['name']}: {row['failures']} failures in a row: {shown(row['error'])}. Next: {row['next']}")
    return EXIT_OK
