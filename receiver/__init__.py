"""The container's side: takes a core over a socket and keeps it under the container's own limits."""

from __future__ import annotations

__version__ = "0.1.0"
