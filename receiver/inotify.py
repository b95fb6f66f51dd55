"""The kernel's word that a directory has changed (inotify(7)), which the standard library does not pass on."""

from __future__ import annotations

import ctypes
import os

IN_CLOEXEC, IN_NONBLOCK = os.O_CLOEXEC, os.O_NONBLOCK
# <linux/inotify.h>
IN_MOVED_FROM, IN_MOVED_TO, IN_CREATE, IN_DELETE = 0x40, 0x80, 0x100, 0x200
IN_DELETE_SELF, IN_MOVE_SELF = 0x400, 0x800
IN_ONLYDIR = 0x01000000
# Names that come, and the directory's own end: which is told when nobody has it open any more.
COMES = IN_CREATE | IN_MOVED_TO | IN_DELETE_SELF | IN_MOVE_SELF | IN_ONLYDIR
GOES = IN_DELETE | IN_MOVED_FROM | IN_ONLYDIR


class Inotify:
    """An inotify instance. Owns its descriptor."""

    def __init__(self) -> None:
        """Raises OSError: there may be too many already (fs.inotify.max_user_instances)."""
        self._libc = ctypes.CDLL(None, use_errno=True)
        self.fd = self._checked(self._libc.inotify_init1(IN_CLOEXEC | IN_NONBLOCK))

    def _checked(self, result: int) -> int:
        if result < 0:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number))
        return result

    def add(self, path: str, mask: int = COMES) -> None:
        """Watch a directory. Raises OSError."""
        self._checked(self._libc.inotify_add_watch(self.fd, os.fsencode(path), ctypes.c_uint32(mask)))

    def drain(self) -> None:
        """Take what has been said. What it was is for those who look: it may be old, or too much was said."""
        try:
            while os.read(self.fd, 1 << 16):
                pass
        except BlockingIOError:
            pass

    def close(self) -> None:
        os.close(self.fd)
