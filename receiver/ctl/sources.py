"""Where crashes are read from: the store of this place, and whatever else holds one."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from receiver.store import Store, StoreError

if TYPE_CHECKING:
    from receiver.record import Record


class Source:
    """A store to look into. name: the container's that it belongs to, None for this place."""

    name: str | None = None

    def records(self) -> tuple[list[Record], int]:
        """Return the records, the newest last, and how many more there are that cannot be read. Raises OSError."""
        raise NotImplementedError

    def open_core(self, record: Record) -> int:
        """Return a descriptor of the core as it is stored, which is the caller's. Raises StoreError, OSError."""
        raise NotImplementedError

    def program(self, record: Record) -> str | None:
        """Return the path by which a debugger here opens a crash's program, None when there is none."""
        del record
        return None

    def sysroot(self, record: Record) -> str | None:
        """Return the directory in which a debugger finds a crash's libraries, None when that is this place's root."""
        del record
        return None

    def debugger_arguments(self, debugger: str) -> list[str]:
        """Return what a debugger has to be told of the place that the crash was in. debugger: its command."""
        del debugger
        return []

    def debugger_user(self) -> int | None:
        """Return the uid that a debugger is to be run by, None for ours: a stranger's files are not for root."""
        return None

    def close(self) -> None:
        """Let go of what is open, and of what was made."""


class Local(Source):
    """The store of this place. store: for those commands that change it."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self._recover()

    def _recover(self) -> None:
        """Finish what a receiver left that ended with its container; for who may not, it waits for the next one."""
        if os.geteuid() == 0:
            # What follows them is the receiver's, at its next start.
            self.store.tells = True
            try:
                self.store.recover()
            except (OSError, StoreError):
                # A read-only store, or one of another root's: what is visible is shown all the same.
                pass

    def records(self) -> tuple[list[Record], int]:
        found = []
        unreadable = 0
        for _, record in self.store.records():
            if record is None:
                unreadable += 1
            else:
                found.append(record)
        return found, unreadable

    def open_core(self, record: Record) -> int:
        return self.store.open_core(record)

    def program(self, record: Record) -> str | None:
        if not record.exe or not record.exe.startswith("/"):
            return None
        path = record.exe.removesuffix(" (deleted)")
        return path if os.path.isfile(path) else None

    def close(self) -> None:
        self.store.close()


class Nothing(Source):
    """A store that is not there yet: the first crash makes it."""

    def records(self) -> tuple[list[Record], int]:
        return [], 0

    def open_core(self, record: Record) -> int:
        raise StoreError(f"crash {record.id} has no store")
