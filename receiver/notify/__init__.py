"""Callbacks: who is told of a crash, by a program that is run or a request that is posted (`[[notify]]`).

The store is the queue. Whoever brought a crash to its end says so with a file beside the record (`wake`), and that is
all that a crash pays. A process of its own, the deliverer, then looks what is new in the store; it is started by
systemd (core_pipe-notify.path), or by the resident receiver. What it has told whom is in the store, too (queue.py), so
that neither a killed worker nor a killed deliverer nor a restart loses a crash: at worst, one is told twice.

    settings.py  the tables of the settings, and callbacks made of them
    events.py    which crash is told, and what is said
    quota.py     the other kind of event: a disk quota is used up (`events = ["quota"]`)
    queue.py     what waits for whom, on the disk
    attempt.py   one delivery: a process without privileges, with a deadline
    post.py      what that process does for a request
    deliver.py   the loop
    command.py   `core-pipe-receiver notify`

Import budget: this file is imported at each crash where there is a callback. Nothing at the top but `os`.
"""

from __future__ import annotations

import os

TYPE_CHECKING = False
if TYPE_CHECKING:
    from receiver.store import Store

# There while something may be new. A level and not an edge: systemd does not look at changes (PathModified=) while the
# service runs, and a crash that comes when it is about to leave would wait for the next one.
FLAG = ".notify"


def wake(store: Store) -> None:
    """Have the deliverer look. Raises OSError."""
    wake_in(store.directory)


def wake_in(directory: int) -> None:
    """Have the deliverer of the store look of which this is the descriptor. Raises OSError."""
    # Never through a link, should somebody be able to make one.
    flags = os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    os.close(os.open(FLAG, flags, 0o600, dir_fd=directory))


def is_awaited(directory: int) -> bool:
    """Whether there may be something new in the store of which this is the descriptor."""
    try:
        os.stat(FLAG, dir_fd=directory, follow_symlinks=False)
    except OSError:
        return False
    return True
