"""What a core's notes tell of its threads and its mapped files, taken from the stream as it goes by.

A process of thousands of threads has tens of MiB of notes, most of it registers that nobody here asks for. What is kept
stays in the form in which it came, a few bytes each, and becomes objects when somebody looks.

Import budget: this is imported for each crash, so neither `typing` nor `dataclasses`.
"""

from __future__ import annotations

import struct
from array import array

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import NamedTuple, overload

    class Thread(NamedTuple):
        """A thread. tid: in the pid namespace of the process itself. The others: addresses, 0 when unknown.

        tls: the thread pointer, which only x86-64 has among these registers.
        """

        tid: int
        pc: int
        sp: int
        fp: int
        tls: int = 0

    class MappedFile(NamedTuple):
        """A mapping of a file: addresses from start to before end, and where in the file it begins, in bytes."""

        start: int
        end: int
        offset: int
        name: bytes

else:
    from collections import namedtuple

    Thread = namedtuple("Thread", "tid pc sp fp tls", defaults=(0,))  # noqa: PYI024  (import budget)
    MappedFile = namedtuple("MappedFile", "start end offset name")  # noqa: PYI024

X86_64 = 62
I386 = 3
AARCH64 = 183

# <linux/elf.h>, <uapi/linux/elf.h>
NT_PRSTATUS = 1
NT_AUXV = 6
NT_FILE = 0x46494C45
NT_SIGINFO = 0x53494749

MAX_THREADS = 65536
# The kernel's own bound (fs/binfmt_elf.c: MAX_FILE_NOTE_SIZE); newer ones have a sysctl for it, and of what is longer
# the beginning is used.
_MOST = {NT_PRSTATUS: 512, NT_AUXV: 8192, NT_FILE: 4 << 20, NT_SIGINFO: 128}
_HEADER = 12
_NAME = b"CORE\0\0\0\0"
_ADDRESS = (1 << 64) - 1

# Where struct elf_prstatus has pc, sp and the frame pointer, by machine and whether the core is 64-bit.
# x86_64: user_regs_struct at 112: rip is its 17th, rsp its 20th, rbp its 5th. x32 has the same at 72.
# aarch64: user_pt_regs at 112: x29 and x30, then sp and pc.
_REGISTERS = {
    (X86_64, True): ("<Q", 112 + 16 * 8, 112 + 19 * 8, 112 + 4 * 8),
    (X86_64, False): ("<Q", 72 + 16 * 8, 72 + 19 * 8, 72 + 4 * 8),
    (I386, False): ("<I", 72 + 12 * 4, 72 + 15 * 4, 72 + 5 * 4),
    (AARCH64, True): ("<Q", 112 + 32 * 8, 112 + 31 * 8, 112 + 29 * 8),
}
# Of user_regs_struct: fs_base, the thread pointer; and how many general registers come first.
_FS_BASE = 112 + 21 * 8
_GENERAL = 15
_LINK_REGISTER = {AARCH64: 112 + 30 * 8}
# Signals whose siginfo has the address that faulted (sigaction(2)), when it is the kernel who sends them.
_FAULTS = (4, 5, 7, 8, 11)


class Threads:
    """The threads in the kernel's order: the one that dumped core first. Reads like a list."""

    __slots__ = ("_values",)

    def __init__(self) -> None:
        self._values = array("Q")

    def add(self, tid: int, pc: int, sp: int, fp: int, tls: int = 0) -> None:
        self._values.extend((tid, pc, sp, fp, tls))

    def __len__(self) -> int:
        return len(self._values) // 5

    if TYPE_CHECKING:

        @overload
        def __getitem__(self, index: int) -> Thread: ...
        @overload
        def __getitem__(self, index: slice) -> list[Thread]: ...

    def __getitem__(self, index: int | slice) -> Thread | list[Thread]:
        if isinstance(index, slice):
            return [self._thread(found) for found in range(len(self))[index]]
        return self._thread(range(len(self))[index])

    def __iter__(self) -> Iterator[Thread]:
        return map(self._thread, range(len(self)))

    def _thread(self, index: int) -> Thread:
        return Thread(*self._values[index * 5 : index * 5 + 5])


class Files:
    """The mapped files in the kernel's order: by address. Reads like a list."""

    __slots__ = ("_at", "_entry", "_names", "_page", "_raw")

    def __init__(self, raw: bytes | bytearray = b"", *, is_64: bool = True) -> None:
        """Take the content of an NT_FILE note, which may be cut or lie: what is not whole is not there."""
        head = struct.Struct("<QQ" if is_64 else "<II")
        self._entry = struct.Struct("<QQQ" if is_64 else "<III")
        self._raw = raw
        self._at = head.size
        # Where each file's name begins; one more, where the last one's ends.
        self._names = array("I")
        self._page = 0
        if len(raw) < head.size:
            return
        count, self._page = head.unpack_from(raw)
        count = min(count, (len(raw) - head.size) // self._entry.size)
        at = head.size + count * self._entry.size
        self._names.append(at)
        for _ in range(count):
            at = raw.find(0, at) + 1
            if not at:
                break
            self._names.append(at)

    def __len__(self) -> int:
        return max(0, len(self._names) - 1)

    def __getitem__(self, index: int) -> MappedFile:
        index = range(len(self))[index]
        start, end, offset = self._entry.unpack_from(self._raw, self._at + index * self._entry.size)
        name = bytes(self._raw[self._names[index] : self._names[index + 1] - 1])
        return MappedFile(start, end, offset * self._page & _ADDRESS, name)

    def __iter__(self) -> Iterator[MappedFile]:
        return map(self.__getitem__, range(len(self)))

    def index(self, address: int) -> int | None:
        """Return the index of the mapping that has the address."""
        low, high = 0, len(self)
        while low < high:
            middle = (low + high) // 2
            start, end, _ = self._entry.unpack_from(self._raw, self._at + middle * self._entry.size)
            if address < start:
                high = middle
            elif address >= end:
                low = middle + 1
            else:
                return middle
        return None

    def find(self, address: int) -> MappedFile | None:
        """Return the mapping that has the address."""
        index = self.index(address)
        return None if index is None else self[index]


class Notes:
    """What is known so far.

    threads: at most MAX_THREADS. signal: the one that the process died of. files: its mapped files. auxv: values by
    type (getauxval(3)). fault: the address that was accessed, for a signal that has one. link: the return address in
    the dumping thread's link register, 0 where there is none. registers: its general ones, on x86-64. Other machines'
    threads than those of _REGISTERS have a tid, and zeros.
    """

    __slots__ = ("auxv", "fault", "files", "is_64", "link", "machine", "registers", "signal", "threads")

    def __init__(self, machine: int, *, is_64: bool) -> None:
        self.machine = machine
        self.is_64 = is_64
        self.threads = Threads()
        self.signal: int | None = None
        self.fault: int | None = None
        self.link = 0
        self.registers: tuple[int, ...] = ()
        self.files = Files()
        self.auxv: dict[int, int] = {}


class Parser:
    """Takes the notes' bytes in pieces of any size. They are a stranger's: nothing in them makes it raise.

    machine: e_machine. is_64: ELFCLASS64.
    """

    __slots__ = ("_buffer", "_is_64", "_kind", "_need", "_registers", "_seen", "_skip", "_skip_after", "notes")

    def __init__(self, machine: int, *, is_64: bool) -> None:
        self.notes = Notes(machine, is_64=is_64)
        self._is_64 = is_64
        self._registers = _REGISTERS.get((machine, is_64))
        self._buffer = bytearray()
        # The note whose name and content are being collected, None while it is the header; how many bytes that takes,
        # and how many after them are nobody's business.
        self._kind: int | None = None
        self._need = _HEADER
        self._skip = self._skip_after = 0
        self._seen: set[int] = set()

    def feed(self, data: bytes | memoryview) -> None:
        """Take the next bytes of the notes."""
        view = memoryview(data)
        at, end = 0, len(view)
        while at < end:
            if self._skip:
                step = min(self._skip, end - at)
                self._skip -= step
                at += step
                continue
            step = min(self._need - len(self._buffer), end - at)
            self._buffer += view[at : at + step]
            at += step
            if len(self._buffer) < self._need:
                return
            if self._kind is None:
                self._head()
            else:
                self._body(self._kind)

    def _head(self) -> None:
        name, size, kind = struct.unpack("<III", self._buffer)
        self._buffer.clear()
        name_end, size_end = name + 3 & ~3, size + 3 & ~3
        if name != 5 or not self._is_wanted(kind):
            self._skip = name_end + size_end
            return
        self._kind = kind
        self._need = len(_NAME) + min(size, _MOST[kind])
        self._skip_after = name_end + size_end - self._need

    def _is_wanted(self, kind: int) -> bool:
        if kind == NT_PRSTATUS:
            return len(self.notes.threads) < MAX_THREADS
        return kind in _MOST and kind not in self._seen

    def _body(self, kind: int) -> None:
        # Handed over and not copied: a list of files has MiBs.
        content, self._buffer = self._buffer, bytearray()
        name = content[: len(_NAME)]
        del content[: len(_NAME)]
        self._kind, self._need, self._skip = None, _HEADER, self._skip_after
        if name != _NAME:
            return
        self._seen.add(kind)
        if kind == NT_PRSTATUS:
            self._thread(content)
        elif kind == NT_SIGINFO:
            self._siginfo(content)
        elif kind == NT_FILE:
            self.notes.files = Files(content, is_64=self._is_64)
        elif kind == NT_AUXV:
            self._auxv(content)

    def _thread(self, content: bytearray) -> None:
        at = 32 if self._is_64 else 24
        if len(content) < at + 4:
            return
        (tid,) = struct.unpack_from("<I", content, at)
        if self.notes.signal is None:
            # pr_cursig: the signal that the process dies of, in the note of the thread that dumps.
            (signal,) = struct.unpack_from("<H", content, 12)
            self.notes.signal = signal or None
        pc = sp = fp = 0
        link = _LINK_REGISTER.get(self.notes.machine)
        if link is not None and self._is_64 and not self.notes.threads and len(content) >= link + 8:
            (self.notes.link,) = struct.unpack_from("<Q", content, link)
        if self._registers is not None:
            kind, *places = self._registers
            if len(content) >= max(places) + struct.calcsize(kind):
                pc, sp, fp = (struct.unpack_from(kind, content, place)[0] for place in places)
        tls = 0
        if self.notes.machine == X86_64 and self._is_64 and len(content) >= _FS_BASE + 8:
            (tls,) = struct.unpack_from("<Q", content, _FS_BASE)
            if not self.notes.registers:
                self.notes.registers = struct.unpack_from(f"<{_GENERAL}Q", content, 112)
        self.notes.threads.add(tid, pc, sp, fp, tls)

    def _siginfo(self, content: bytearray) -> None:
        """Take si_signo, si_code and si_addr (<asm-generic/siginfo.h>)."""
        place = struct.Struct("<I4xi4xQ" if self._is_64 else "<I4xiI")
        if len(content) < place.size:
            return
        signal, code, address = place.unpack_from(content)
        self.notes.signal = signal or self.notes.signal
        if code > 0 and signal in _FAULTS:
            self.notes.fault = address

    def _auxv(self, content: bytearray) -> None:
        pair = struct.Struct("<QQ" if self._is_64 else "<II")
        for kind, value in pair.iter_unpack(content[: len(content) // pair.size * pair.size]):
            if kind == 0:
                break
            self.notes.auxv.setdefault(kind, value)
