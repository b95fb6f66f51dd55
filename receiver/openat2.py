"""Open a file below a directory of a stranger's, whatever stands there (openat2(2), Linux 5.6).

A path within a container is the container's: a link at any place of it may name a file of the host's, and may be
swapped at any moment. The kernel itself stays within the directory here, which no walk by hand does as well.
"""

from __future__ import annotations

import ctypes
import errno
import os
import stat
import struct

# <linux/openat2.h>
RESOLVE_NO_XDEV = 0x01
RESOLVE_NO_MAGICLINKS = 0x02
RESOLVE_NO_SYMLINKS = 0x04
RESOLVE_IN_ROOT = 0x10
# Nothing that is followed: neither a link, nor one of /proc's to a process's files, nor "..", nor "/" out of it.
STRICT = RESOLVE_IN_ROOT | RESOLVE_NO_MAGICLINKS | RESOLVE_NO_SYMLINKS
# Links are followed, as from within.
WITHIN = RESOLVE_IN_ROOT | RESOLVE_NO_MAGICLINKS
# Since 5.0 all architectures number new calls alike; alpha adds 110.
_SYS_OPENAT2 = 547 if os.uname().machine == "alpha" else 437
_OPEN_HOW = struct.Struct("QQQ")
# openat2(2): a name changed meanwhile, and whether the path left the root cannot be told. Try again, but not for ever.
_AGAIN = 16


class NotAFile(OSError):
    """Something else stands there than a regular file."""


def openat2(directory: int, path: str, flags: int, resolve: int = STRICT) -> int:
    """Return a descriptor of a path below a directory, close-on-exec. Raises OSError.

    ELOOP is what a link gives, EXDEV what leads out of the directory (or, with RESOLVE_NO_XDEV, to another mount).
    """
    how = _OPEN_HOW.pack(flags | os.O_CLOEXEC, 0, resolve)
    raw = os.fsencode(path)
    for attempt in range(_AGAIN):
        libc = ctypes.CDLL(None, use_errno=True)
        fd: int = libc.syscall(
            ctypes.c_long(_SYS_OPENAT2),
            ctypes.c_int(directory),
            ctypes.c_char_p(raw),
            ctypes.c_char_p(how),
            ctypes.c_size_t(len(how)),
        )
        if fd >= 0:
            return fd
        number = ctypes.get_errno()
        if number not in (errno.EAGAIN, errno.EINTR) or attempt == _AGAIN - 1:
            break
    raise OSError(number, os.strerror(number), path)


def open_regular(directory: int, path: str, resolve: int = STRICT) -> int:
    """Return a descriptor, read-only, of a regular file below a directory. Raises NotAFile, OSError.

    It is looked at before it is opened: a FIFO makes its reader wait, and to open a device may be enough to set it off.
    """
    name = openat2(directory, path, os.O_PATH | (os.O_NOFOLLOW if resolve & RESOLVE_NO_SYMLINKS else 0), resolve)
    try:
        mode = os.fstat(name).st_mode
        if stat.S_ISLNK(mode):
            raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), path)
        if not stat.S_ISREG(mode):
            raise NotAFile(errno.EINVAL, "not a regular file", path)
        # The same file again, by our own descriptor.
        return os.open(f"/proc/self/fd/{name}", os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    finally:
        os.close(name)
