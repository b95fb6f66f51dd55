"""The host's side: who crashed, which receiver may have the core, and the hand-over. It never writes a core."""

from __future__ import annotations

__version__ = "0.1.0"
