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


def cpu_stat() -> str | None:
    """Return the path of the cpu.stat file of the nearest cgroup around this process that has a cpu quota."""
    try:
        with open("/proc/self/cgroup", "rb") as file:
            text = file.read(65536)
    except OSError:
        return None
    for line in text.split(b"\n"):
        _, _, rest = line.partition(b":")
        controllers, _, path = rest.partition(b":")
        if controllers == b"":
            root, quota, none = b"/sys/fs/cgroup", b"cpu.max", b"max"
        elif b"cpu" in controllers.split(b","):
            root, quota, none = b"/sys/fs/cgroup/cpu", b"cpu.cfs_quota_us", b"-1"
        else:
            continue
        # With a cgroup namespace the path is "/"; without one it may be the host's, and the mount the container's own.
        while True:
            found = root + path.rstrip(b"/")
            try:
                with open(found + b"/" + quota, "rb") as file:
                    if not file.read(64).startswith(none):
                        return (found + b"/cpu.stat").decode(errors="surrogateescape")
            except OSError:
                pass
            if path in (b"", b"/"):
                break
            path = path.rpartition(b"/")[0]
    return None
