"""Lines for the journal, by way of standard error.

systemd takes a service's standard error into the journal, and everywhere else it is what an administrator looks at. The
prefix is the level (sd-daemon(3)), and only there when systemd reads it.
"""

from __future__ import annotations

import os
import sys

LOG_ERR = 3
LOG_INFO = 6


def log(text: str, *, error: bool = False) -> None:
    """Write one line. Never raises: a full or closed standard error must not cost a core."""
    prefix = f"<{LOG_ERR if error else LOG_INFO}>" if "JOURNAL_STREAM" in os.environ else "core-pipe-receiver: "
    try:
        sys.stderr.write(prefix + text.replace("\n", " ") + "\n")
        sys.stderr.flush()
    except (OSError, ValueError, AttributeError):
        pass
