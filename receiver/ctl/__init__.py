"""corepipectl: look at the crashes in a store, take their cores out, and clear them away.

A module for each command or two: its `add` puts them into the parser, and its functions run them.
"""

from __future__ import annotations

from receiver.ctl.command import main

__all__ = ["main"]
