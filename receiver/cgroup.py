"""Where a process stands among the cgroups, from its proc file (cgroups(7)).

Import budget: on the stub's start-up path, see `forwarder/stub.py`.
"""

from __future__ import annotations


def cgroup_path(text: bytes) -> bytes:
    """Return the path from a proc cgroup file: the unified hierarchy's, or on version 1 systemd's or the memory's."""
    paths: dict[bytes, bytes] = {}
    # Not splitlines(): a container may name a cgroup of its own with a carriage return.
    for line in text.split(b"\n"):
        parts = line.split(b":", 2)
        if len(parts) == 3:
            paths[parts[1]] = parts[2]
    for wanted in (b"", b"name=systemd", b"memory"):
        if paths.get(wanted, b"/") != b"/":
            return paths[wanted]
    return b"/"
