"""What a worker may still do once it has looked at the crashed process: write its own files, and no more."""

from __future__ import annotations

import prctl


def drop() -> None:
    """Give up every capability for good, whatever this container's root has.

    The store is root's own, and an access list on a file of one's own needs no capability (acl(5)), so nothing of what
    comes after the look into /proc needs one. What follows reads the bytes that a crashed process chose.

    Where the bounding set may not be touched (no CAP_SETPCAP), no_new_privs alone keeps execve(2) from giving any back.
    """
    prctl.set_no_new_privs(1)
    try:
        prctl.capbset.limit()
    except PermissionError:
        pass
    for kind in (prctl.cap_inheritable, prctl.cap_effective, prctl.cap_permitted):
        kind.limit()
