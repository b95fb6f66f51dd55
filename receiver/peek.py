"""A look into the crashed process's memory while it still stands: what a core in one pass would show too late.

The linker's list of libraries is scattered over memory that goes by before it is known what of it matters, and so is
what the stacks point to. The process is held until its core is read, so its memory can be asked (proc_pid_mem(5)). It
is only asked for what the kernel is about to dump anyway, and in a process apart with a deadline: memory may lie on a
file system that never answers.

The answers are hints. Memory that lies costs the process its own core's worth, within bounds, and nobody else anything.
"""

from __future__ import annotations

import os
import select
import signal
import struct
import time
from array import array

from receiver.elfcore import PF_W
from receiver.plan import AT_PHDR, LINKAGE, NEAR_STACK, PAGE, POINTED, Memory, rank, stack_of

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from receiver.elfcore import Head
    from receiver.notes import Notes

    Mark = tuple[int, int, int]

SECONDS = 2.0
REAP_SECONDS = 0.1
# For following pointers; what names the libraries comes first and is not bounded by it.
POINTER_SECONDS = 0.5
MAX_LIBRARIES = 4096
MAX_NAMESPACES = 16
MAX_NAME = 4096
MAX_DYNAMIC = 512
# Around a pointer: an object's first words. A string or an array goes on; its page is kept whole anyway.
OBJECT = 256
DEPTH = 3
MAX_OBJECTS = 20_000
STACKS = 64
STACK_WORDS = 16 << 10
# Three numbers a mark, or the pages that a witness wants.
MAX_ANSWER = 8 << 20

AT_PHENT, AT_PHNUM = 4, 5
PT_DYNAMIC, PT_PHDR = 2, 6
DT_DEBUG = 21


class Unreadable(Exception):
    """Memory that is not in the core, or cannot be read."""


class Mem:
    """The memory of a process, as far as its core will have it."""

    def __init__(self, fd: int, head: Head, notes: Notes) -> None:
        self._fd = fd
        self.memory = Memory(head)
        self.notes = notes
        self._word = struct.Struct("<Q" if head.is_64 else "<I")
        self.word_size = self._word.size
        self.is_64 = head.is_64

    def read(self, address: int, size: int) -> bytes:
        """Return up to `size` bytes, less where the segment ends. Raises Unreadable."""
        index = self.memory.find(address)
        if index is None:
            # The kernel is not going to read it: whoever lets this read hang is not stopped by the dump either.
            raise Unreadable(f"{address:#x} is not in the core")
        segment = self.memory.segments[index]
        try:
            return os.pread(self._fd, min(size, segment.address + segment.file_size - address), address)
        except (OSError, OverflowError):
            raise Unreadable(f"{address:#x} cannot be read") from None

    def words(self, address: int, count: int) -> tuple[int, ...]:
        """Return up to `count` words. Raises Unreadable."""
        data = self.read(address, count * self.word_size)
        data = data[: len(data) // self.word_size * self.word_size]
        return tuple(value for (value,) in self._word.iter_unpack(data))

    def exactly(self, address: int, count: int) -> tuple[int, ...]:
        """Return `count` words. Raises Unreadable."""
        found = self.words(address, count)
        if len(found) < count:
            raise Unreadable(f"{address:#x} is cut")
        return found


def libraries(mem: Mem) -> list[Mark]:
    """Return where the linker's list of libraries is: what leads to it, its nodes, and their names."""
    marks: list[Mark] = []
    number = rank(LINKAGE)

    def mark(address: int, size: int) -> None:
        marks.append((address, address + size, number))

    try:
        where = _dynamic_section(mem)
        if where is None:
            return marks
        section = mem.words(where, 2 * MAX_DYNAMIC)
        mark(where, len(section) * mem.word_size)
        debug = dict(zip(section[::2], section[1::2], strict=False)).get(DT_DEBUG, 0)
        seen: set[int] = set()
        for _ in range(MAX_NAMESPACES):
            # struct r_debug (glibc's <link.h>): version, map, brk, state, ldbase, and from version 2 on the next one.
            version, first = mem.exactly(debug, 2)
            mark(debug, 6 * mem.word_size)
            _list(mem, first, mark, seen)
            if version & 0xFFFFFFFF < 2:
                break
            debug = mem.exactly(debug, 6)[5]
    except Unreadable:
        # The end of a list is a null pointer; a static program has none.
        pass
    return marks


def _dynamic_section(mem: Mem) -> int | None:
    """Return the address of the program's dynamic section. Raises Unreadable."""
    auxv = mem.notes.auxv
    headers, size = auxv.get(AT_PHDR, 0), auxv.get(AT_PHENT, 0)
    if size != (56 if mem.is_64 else 32):
        return None
    bias = 0
    dynamic = None
    for at in range(min(auxv.get(AT_PHNUM, 0), 64)):
        row = mem.read(headers + at * size, size)
        if len(row) < size:
            break
        kind = row[0]
        (address,) = struct.unpack_from("<Q", row, 16) if mem.is_64 else struct.unpack_from("<I", row, 8)
        if kind == PT_PHDR:
            bias = headers - address
        elif kind == PT_DYNAMIC:
            dynamic = address
    return None if dynamic is None else dynamic + bias


def _list(mem: Mem, node: int, mark: Callable[[int, int], None], seen: set[int]) -> None:
    """Follow a list of struct link_map: address, name, dynamic section, next, previous. Raises Unreadable."""
    while node and node not in seen and len(seen) < MAX_LIBRARIES:
        seen.add(node)
        _, name, dynamic, following, _ = mem.exactly(node, 5)
        mark(node, 5 * mem.word_size)
        try:
            text = mem.read(name, MAX_NAME)
            mark(name, text.find(b"\0") + 1 or len(text))
        except Unreadable:
            pass
        if mem.memory.find(dynamic) is not None:
            # By its entries a debugger knows that the file on the disk is the one that was loaded.
            mark(dynamic, 64 * 2 * mem.word_size)
        node = following


def pointed(mem: Mem, deadline: float) -> list[Mark]:
    """Return what the stacks point to, and what that points to, a few steps on: the nearest first.

    deadline: on time.monotonic(); what is found by then is returned.
    """
    marks: list[Mark] = []
    seen: set[int] = set()
    nearest: list[int] = list(mem.notes.registers)
    for thread in mem.notes.threads[:STACKS]:
        stack = stack_of(mem.memory, thread.sp)
        if stack is not None:
            try:
                nearest += mem.words(stack[0], min(stack[1] - stack[0], NEAR_STACK, STACK_WORDS) // mem.word_size)
            except Unreadable:
                pass
    for depth in range(DEPTH):
        further: list[int] = []
        for value in nearest:
            # Objects are aligned; what differs in less is the same one.
            address = value & ~15
            if address in seen or value < PAGE:
                continue
            if len(seen) >= MAX_OBJECTS or time.monotonic() > deadline:
                return marks
            index = mem.memory.find(value)
            if index is None or not mem.memory.segments[index].flags & PF_W:
                continue
            seen.add(address)
            marks.append((address, address + OBJECT, rank(POINTED, depth)))
            try:
                further += mem.words(address, OBJECT // mem.word_size)
            except Unreadable:
                pass
        nearest = further
    return marks


def look(fd: int, head: Head, notes: Notes) -> list[Mark]:
    """Return (start address, end address, rank) of what matters. fd: of /proc/PID/mem.

    Returns what was found within SECONDS, which may be nothing. Never raises.
    """

    def work(answer: Callable[[bytes], None]) -> None:
        mem = Mem(fd, head, notes)
        answer(_packed(libraries(mem)))
        answer(_packed(pointed(mem, time.monotonic() + POINTER_SECONDS)))

    numbers = array("Q")
    data = _apart(work, fd)
    numbers.frombytes(data[: len(data) // 24 * 24])
    return list(zip(numbers[::3], numbers[1::3], numbers[2::3], strict=True))


def fetch(fd: int, head: Head, notes: Notes, wanted: list[tuple[int, int]]) -> list[bytes]:
    """Return pieces of memory, each (address, bytes): zeros for what cannot be read, less at the deadline."""

    def work(answer: Callable[[bytes], None]) -> None:
        mem = Mem(fd, head, notes)
        for address, size in wanted:
            try:
                data = mem.read(address, size)
            except Unreadable:
                # A file that was cut under its mapping: the dump has zeros there, too.
                data = b""
            answer(data.ljust(size, b"\0"))

    data = _apart(work, fd)
    found = []
    for _, size in wanted:
        if len(data) < size:
            break
        found.append(data[:size])
        data = data[size:]
    return found


def _packed(marks: list[Mark]) -> bytes:
    numbers = array("Q")
    for start, end, number in marks:
        if end < 1 << 64:
            numbers.extend((start, end, number))
    return numbers.tobytes()


def _apart(work: Callable[[Callable[[bytes], None]], None], fd: int) -> bytes:
    """Return what a child said within SECONDS. fd: the one descriptor that it keeps."""
    read, write = os.pipe2(os.O_CLOEXEC)
    try:
        child = os.fork()
    except OSError:
        os.close(read)
        os.close(write)
        return b""
    if child == 0:
        try:
            # Above all not the core: while it hangs the crashed process is to be let go.
            low, high = sorted((fd, write))
            os.closerange(0, low)
            os.closerange(low + 1, high)
            os.closerange(high + 1, 1 << 20)
            work(lambda data: _say(write, data))
        except Unreadable:
            pass
        finally:
            # Nothing of the worker's may run twice, and nobody hears of what went wrong: these are hints.
            os._exit(0)
    os.close(write)
    parts = []
    deadline = time.monotonic() + SECONDS
    left = MAX_ANSWER
    poll = select.poll()
    poll.register(read, select.POLLIN)
    try:
        while left > 0 and poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
            part = os.read(read, min(left, 1 << 16))
            if not part:
                break
            parts.append(part)
            left -= len(part)
    finally:
        os.close(read)
        os.kill(child, signal.SIGKILL)
        _reap(child)
    return b"".join(parts)


def _reap(child: int) -> None:
    """Wait for a child that was killed, but not for long: its end may hang as well, and then pid 1 has to reap it."""
    deadline = time.monotonic() + REAP_SECONDS
    while os.waitpid(child, os.WNOHANG) == (0, 0) and time.monotonic() < deadline:
        time.sleep(0.0005)


def _say(fd: int, data: bytes) -> None:
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(fd, rest) :]
