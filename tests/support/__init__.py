"""What the tests are built with: the machine's crash settings, crash programs, containers, and waits with deadlines."""

from __future__ import annotations
