"""A FUSE file system that takes every request and never answers: `hanging_fs.py DIRECTORY`, run inside a container.

Says "ready" when it is mounted. Whoever looks a name up in it cannot be interrupted, not by SIGKILL either, until this
process ends.
"""

from __future__ import annotations

import ctypes
import os
import struct
import sys

FUSE_INIT = 26
IN_HEADER = struct.Struct("IIQQIIII")
OUT_HEADER = struct.Struct("IiQ")


def main() -> None:
    directory = sys.argv[1]
    libc = ctypes.CDLL(None, use_errno=True)
    fuse = os.open("/dev/fuse", os.O_RDWR)
    options = f"fd={fuse},rootmode=40000,user_id=0,group_id=0"
    if libc.mount(b"hanging", directory.encode(), b"fuse", 0, options.encode()) != 0:
        raise OSError(ctypes.get_errno(), "mount")
    said = False
    while True:
        request = os.read(fuse, 1 << 17)
        _, opcode, unique, *_ = IN_HEADER.unpack_from(request)
        if opcode == FUSE_INIT:
            # fuse(4): struct fuse_init_out of 64 bytes, protocol 7.31.
            out = struct.pack("IIIIHHIIHHI7I", 7, 31, 0, 0, 16, 12, 4096, 1, 0, 0, 0, *[0] * 7)
            os.write(fuse, OUT_HEADER.pack(OUT_HEADER.size + len(out), 0, unique) + out)
        if not said:
            print("ready", flush=True)
            said = True


if __name__ == "__main__":
    main()
