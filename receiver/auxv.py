"""The auxiliary vector of a process: what the kernel told it at its start (getauxval(3)).

Import budget: on the stub's start-up path, see `forwarder/stub.py`.
"""

from __future__ import annotations

AT_PAGESZ = 6
AT_SECURE = 23
_PAGE_SIZES = (4096, 16384, 65536)


def is_secure(auxv: bytes) -> bool:
    """Whether the process was started with more rights than its user has (AT_SECURE); True when it does not tell."""
    # Pairs of the process's own word size: 64 bits, or 32 for a 32-bit program. AT_PAGESZ tells which of the two it is.
    for size in (8, 4):
        words = [int.from_bytes(auxv[at : at + size], "little") for at in range(0, len(auxv), size)]
        found = dict(zip(words[::2], words[1::2], strict=False))
        if found.get(AT_PAGESZ, 0) in _PAGE_SIZES:
            return found.get(AT_SECURE, 1) != 0
    return True
