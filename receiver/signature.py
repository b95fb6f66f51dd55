"""Which crashes are the same: a name for a bug, made from where in the code it struck.

Addresses are taken relative to the module that they are in, so a name outlives address randomisation and a restart.
There is no unwinding here: that needs the files of the process, and time that the process waits for. The frame pointers
are followed where there are any. Where there are none, the stack is searched for what looks like a return address; such
words may be left from earlier calls, so only the first of them counts, and only where the crash is in the C library. In
a static program that is not to be seen: built without frame pointers, all its calls of abort() are one bug.

Import budget: this is imported for each crash, so neither `typing` nor `dataclasses`.
"""

from __future__ import annotations

import struct

# Not from hashlib: that loads all of OpenSSL, which is 4 MiB in each process.
from _blake2 import blake2b

from receiver.notes import AARCH64
from receiver.protocol import printable

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from typing import NamedTuple

    from receiver.notes import Notes

    class Frame(NamedTuple):
        """A place in the code.

        module: the file's base name, printable; "?" for what is no file's. offset: from where the module is loaded.
        build: its build id in hex, or "".
        """

        module: str
        offset: int
        build: str

else:
    from collections import namedtuple

    Frame = namedtuple("Frame", "module offset build")  # noqa: PYI024  (import budget)

# How much of a stack is worth passing.
STACK = 16 << 10
# Frames that name a bug: from the innermost one to the first that is not the C library's, and some of its callers.
CALLERS = 3
MAX_FRAMES = 16
# A mapping's file is loaded where its beginning is mapped; that is at most so many mappings before.
_NEAR = 64
# A fault so near to the stack pointer is the stack's end: a large frame begins below it, and is touched from any side.
_STACK_END = 1 << 20
_UNKNOWN = "?"
# abort(), raise(), memcpy() and the like are where a bug strikes, and not where it is: C's and C++'s run times.
_RUNTIMES = (
    *("libc.so", "libc.musl", "libc-2.", "libpthread.", "libpthread-2.", "libm.so", "libm-2.", "libdl.", "librt."),
    *(
        "ld.so",
        "ld-linux",
        "ld-musl",
        "ld-2.",
        "libstdc++.",
        "libc++.",
        "libc++abi.",
        "libgcc_s.",
        "libasan.",
        "[vdso]",
    ),
)

# getauxval(3)
_AT_PHDR = 3
_AT_SYSINFO_EHDR = 33


class _Modules:
    """Turns addresses into frames, and remembers the answers: a stack has the same ones again and again."""

    def __init__(self, notes: Notes, is_code: Callable[[int], bool], builds: Mapping[int, str]) -> None:
        self._files = notes.files
        self._is_code = is_code
        self._builds = builds
        self._vdso = notes.auxv.get(_AT_SYSINFO_EHDR, 0)
        # The program headers follow the ELF header.
        self._exe = notes.auxv.get(_AT_PHDR, 0) & ~0xFFF
        self._known: dict[int, Frame | None] = {}

    def code(self, address: int) -> Frame | None:
        """Return the frame of an address in a module's code, None for every other address."""
        if address < 4096:
            return None
        if address not in self._known:
            self._known[address] = self._look_up(address) if self._is_code(address) else None
        return self._known[address]

    def place(self, address: int) -> Frame:
        """Return the frame of a program counter, which may be anywhere."""
        return self.code(address) or Frame(_UNKNOWN, 0, "")

    def _look_up(self, address: int) -> Frame | None:
        index = self._files.index(address)
        if index is not None:
            return self._in_file(index, address)
        if self._vdso and 0 <= address - self._vdso < 0x4000:
            return Frame("[vdso]", address - self._vdso, "")
        if not len(self._files):
            # The kernel wrote no list of files. The program is where its headers are; of anything else only the place
            # in its page is the same the next time.
            if self._exe and 0 <= address - self._exe < 1 << 30:
                return Frame("exe", address - self._exe, self._builds.get(self._exe, ""))
            return Frame(_UNKNOWN, address & 0xFFF, "")
        # Code that was made while the program ran: it is elsewhere each time.
        return None

    def _in_file(self, index: int, address: int) -> Frame:
        found = self._files[index]
        # Without a beginning before it (mapped by hand): the place in the file, which is as good a name.
        load = found.start - found.offset
        for before in range(index, max(-1, index - _NEAR), -1):
            other = self._files[before]
            # The nearest: a file that is mapped twice is loaded twice.
            if other.name == found.name and other.offset == 0 and other.start <= found.start:
                load = other.start
                break
        name = found.name.removesuffix(b" (deleted)").rpartition(b"/")[2]
        return Frame(printable(name, 100) or _UNKNOWN, address - load, self._builds.get(load, ""))


def _is_runtime(frame: Frame) -> bool:
    return frame.module.startswith(_RUNTIMES)


class _Stack:
    """The words of a stack."""

    def __init__(self, notes: Notes, data: bytes, start: int) -> None:
        self.width = 8 if notes.is_64 else 4
        # Return addresses are aligned; a stack pointer of a stranger's may be not.
        skip = -start % self.width
        self._first = start + skip
        count = max(0, len(data) - skip) // self.width
        self._words: Sequence[int] = (
            struct.unpack_from(f"<{count}{'Q' if notes.is_64 else 'I'}", data, skip) if count else ()
        )
        # Signed pointers have their signature above the address.
        self._mask = (1 << 48) - 1 if notes.machine == AARCH64 else (1 << 64) - 1

    def word(self, address: int) -> int | None:
        """Return the word at an address, None when it is not ours."""
        index, odd = divmod(address - self._first, self.width)
        return self._words[index] & self._mask if not odd and 0 <= index < len(self._words) else None

    def words(self, until: int | None = None) -> Iterator[int]:
        """Return the words from the stack pointer to before an address."""
        last = len(self._words) if until is None else max(0, (until - self._first) // self.width)
        return (word & self._mask for word in self._words[:last])


def frames(
    notes: Notes,
    is_code: Callable[[int], bool],
    stack: bytes,
    stack_start: int,
    builds: Mapping[int, str] | None = None,
) -> list[Frame]:
    """Return the frames that name the bug, the innermost one first. Whatever it is given, it returns soon.

    is_code: whether an address is in an executable mapping. stack: the bytes from the crashing thread's stack pointer
    up (or from the first address above it that is mapped), which stack_start is the address of. builds: build ids by
    the address where a module's beginning is mapped.
    """
    if not len(notes.threads):
        return []
    thread = notes.threads[0]
    if not (thread.pc or thread.sp or thread.fp):
        # Registers of an unknown machine.
        return []
    modules = _Modules(notes, is_code, builds or {})
    words = _Stack(notes, stack[:STACK], stack_start)
    chain = list(_chain(modules, words, thread.fp, thread.sp))
    cycle = _cycle(notes, modules, words, chain)
    if cycle:
        return cycle
    here = modules.place(thread.pc)
    callers = [frame for frame in chain if not _is_runtime(frame)][:CALLERS]
    if here.module == _UNKNOWN or _is_runtime(here):
        # The C library is mostly built without frame pointers: who called it left a return address below his frame.
        # When the chain leads through it to the program, it is built with them, and nothing is to be searched.
        link = modules.code(notes.link)
        below = [link] if link is not None else []
        if not (callers and _is_runtime(chain[0])):
            below += _search(modules, words, thread.fp if chain else None)
        blamed = [frame for frame in below if not _is_runtime(frame)][:1]
        return [here, *blamed, *callers]
    return [here, *callers]


def _chain(modules: _Modules, words: _Stack, frame: int, lowest: int) -> Iterator[Frame]:
    """Follow the frame pointers for as long as they lead up the stack and to code."""
    while frame >= lowest and (up := words.word(frame)) is not None:
        address = words.word(frame + words.width)
        found = modules.code(address) if address is not None else None
        if found is None:
            return
        yield found
        lowest, frame = frame + 2 * words.width, up


def _search(modules: _Modules, words: _Stack, until: int | None) -> Iterator[Frame]:
    for word in words.words(until):
        found = modules.code(word)
        if found is not None:
            yield found


def _cycle(notes: Notes, modules: _Modules, words: _Stack, chain: list[Frame]) -> list[Frame]:
    """Return the frames of a recursion that took up the whole stack, in the order of their names, or none.

    Which of its functions is the one that hits the end is chance.
    """
    sp = notes.threads[0].sp
    if notes.signal != 11 or notes.fault is None or abs(notes.fault - sp) > _STACK_END:
        return []
    counts: dict[Frame, int] = {}
    for frame in chain or _search(modules, words, None):
        counts[frame] = counts.get(frame, 0) + 1
    most = max(counts.values(), default=0)
    if most < 4:
        return []
    return sorted(frame for frame, count in counts.items() if count * 2 >= most)[:MAX_FRAMES]


def digest(text: str) -> str:
    """Return 16 hex digits that stand for a text."""
    return blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).hexdigest()


def signature(exe_build: str | None, exe: str, signal: int | None, frames: Sequence[Frame]) -> str:
    """Return the name of a bug: 16 hex digits. exe: the program's base name, which counts when it has no build id."""
    parts = [exe_build or "/" + exe, str(signal or 0)]
    # Where memcpy() faults depends on the length and the processor; who called it is enough.
    bug = [frame for frame in frames if not _is_runtime(frame)] or frames
    parts += [f"{frame.build or '/' + frame.module}+{frame.offset:x}" for frame in bug]
    return digest("\n".join(parts))


def build_id(page: bytes) -> str | None:
    """Return the build id in hex of the ELF file whose first page this is (any bytes will do), None without one."""
    if len(page) < 64 or page[:4] != b"\x7fELF" or page[4] not in (1, 2) or page[5] != 1:
        return None
    is_64 = page[4] == 2
    (at,) = struct.unpack_from("<Q" if is_64 else "<I", page, 32 if is_64 else 28)
    size, count = struct.unpack_from("<HH", page, 54 if is_64 else 42)
    header = struct.Struct("<I4xQ16xQ8xQ" if is_64 else "<II8xI8xI")
    if size < header.size:
        return None
    while count and at + header.size <= len(page):
        kind, offset, length, align = header.unpack_from(page, at)
        if kind == 4:
            found = _build_note(page[offset : offset + length], 8 if align == 8 else 4)
            if found:
                return found
        at += size
        count -= 1
    return None


def _build_note(notes: bytes, align: int) -> str | None:
    at = 0
    while at + 12 <= len(notes):
        name, size, kind = struct.unpack_from("<III", notes, at)
        content = -(-(at + 12 + name) // align) * align
        if kind == 3 and notes[at + 12 : at + 12 + name] == b"GNU\0" and 0 < size <= 64:
            found = notes[content : content + size]
            return found.hex() if len(found) == size else None
        at = -(-(content + size) // align) * align
    return None
