"""What a command gets: its options, and where to look."""

from __future__ import annotations

import os
from functools import cached_property
from typing import TYPE_CHECKING

from receiver.config import load
from receiver.ctl.sources import Local, Nothing, Source
from receiver.store import Store

if TYPE_CHECKING:
    import argparse


class Context:
    """A call of corepipectl. options: the parsed arguments."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options

    @cached_property
    def path(self) -> str:
        """The directory of the store. Raises ConfigError."""
        path: str = self.options.store or load().store
        return path

    @cached_property
    def sources(self) -> list[Source]:
        """Where to look for crashes. Raises StoreError, ConfigError."""
        if not os.path.lexists(self.path):
            return [Nothing()]
        return [Local(Store(self.path, create=False))]

    def store(self) -> Store:
        """Return the store of this place with its limits, for what changes it. Raises StoreError, ConfigError."""
        return Local(Store.configured(load(), path=self.path, create=False)).store
