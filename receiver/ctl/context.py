"""What a command gets: its options, and where to look."""

from __future__ import annotations

import os
from functools import cached_property
from typing import TYPE_CHECKING

from receiver.config import load
from receiver.ctl.matching import UsageProblem
from receiver.ctl.sources import Local, Nothing, Source
from receiver.store import Store

if TYPE_CHECKING:
    import argparse


class Context:
    """A call of corepipectl. options: the parsed arguments. Owns where it looks, until `close`."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self._looked: list[Source] = []

    def close(self) -> None:
        while self._looked:
            self._looked.pop().close()

    @cached_property
    def path(self) -> str:
        """The directory of this place's store, for what works there alone. Raises UsageProblem, ConfigError."""
        for name in ("machine", "all"):
            if getattr(self.options, name, None):
                raise UsageProblem(
                    f"'{self.options.command}' works where it runs, and takes no --{name}. Run it in the container, "
                    "with 'podman exec', 'kubectl exec', 'machinectl shell' or the like"
                )
        return self._own_path

    @cached_property
    def _own_path(self) -> str:
        path: str = self.options.store or load().store
        return path

    @cached_property
    def sources(self) -> list[Source]:
        """Where to look for crashes. Raises UsageProblem, StoreError, ConfigError."""
        machine, every = (getattr(self.options, name, None) for name in ("machine", "all"))
        if machine and every:
            raise UsageProblem("--machine is one container, and --all is all of them. Give one of the two")
        if machine:
            from receiver.ctl import containers  # noqa: PLC0415 - what looks into containers is large

            return self._kept(containers.sources(machine, store=self.options.store))
        own = self._own_path
        found = self._kept([Local(Store(own, create=False)) if os.path.lexists(own) else Nothing()])
        if every:
            from receiver.ctl import containers  # noqa: PLC0415

            found += self._kept(containers.sources(None, store=self.options.store, own_store=own))
        return found

    def _kept(self, sources: list[Source]) -> list[Source]:
        self._looked += sources
        return sources

    def store(self) -> Store:
        """Return the store of this place with its limits, for what changes it. Raises StoreError, ConfigError."""
        local = Local(Store.configured(load(), path=self.path, create=False))
        self._kept([local])
        return local.store
