"""What of a core matters most to a debugger: decided from its head and notes, before the first byte of memory is read.

Ranks, the most important first. Within a rank the smaller pieces come first: a linker's table or an interpreter's state
has kilobytes, and the cache that fills the machine has gigabytes.
"""

from __future__ import annotations

import heapq
from bisect import bisect_right

from receiver.elfcore import PF_W, PT_LOAD

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from receiver.elfcore import Head, Segment
    from receiver.notes import Notes, Thread

PAGE = 4096
KIB, MIB = 1 << 10, 1 << 20

# The header, the notes: registers, thread ids, mapped files. Without them there is no core.
FRAME_OF_ALL = 0
# The frames of the thread that crashed.
CRASHED = 1
# What names the shared libraries: the dynamic linker's link map and what leads to it, the first page of each mapped ELF
# file (its build id), the vdso (the code that a signal handler returns through).
LINKAGE = 2
# The innermost frames of all other threads.
STACKS = 3
# The outer frames of deep stacks.
DEEP = 4
# Variables of the program and its libraries: written memory of mapped files. Where it is absent a debugger reads the
# file instead, and shows what a variable was in the beginning.
GLOBALS = 5
# Memory that the stacks point to.
POINTED = 6
# Memory that was written to.
DATA = 7
# The rest: code and constants, which a debugger finds in the files as well.
REST = 8
# Below the pointers of stacks: what nobody uses.
UNUSED = 9
_WEIGHT = 1 << 48

# Of GLOBALS there is so much: a table of hundreds of MiB is data.
GLOBALS_TOTAL = 16 * MIB

# A function may use so much below the stack pointer without moving it (x86-64 psABI 128, arm64 none; rounded up).
RED_ZONE = 256
NEAR_STACK = 64 * KIB
# ulimit -s is 8 MiB nearly everywhere. More may be no stack at all: coroutines live in the heap.
DEEP_STACK = 16 * MIB
# A stack that overflowed: its pointer is below the mapping, by as much as one frame has.
OVERFLOW = MIB
# The linker's tables without a look at them: how much is likely to have them.
EXE_DATA = 64 * KIB
LOADER_DATA = 256 * KIB
SMALL = 64 * KIB
SMALL_TOTAL = 4 * MIB
# Of libraries that were opened later (dlopen(3)) the linker's nodes are in the heap.
HEAP = 8 * MIB
FIRST_OF_HEAP = 64 * KIB
# The heap begins a random distance behind the program: arch_randomize_brk(), at most 1 GiB.
HEAP_DISTANCE = 4 << 30

AT_PHDR, AT_BASE, AT_ENTRY, AT_RANDOM, AT_SYSINFO_EHDR = 3, 7, 9, 25, 33


def rank(kind: int, weight: int = 0) -> int:
    """Return the number by which pieces are ordered. weight: within the kind, the least first."""
    return kind * _WEIGHT + min(weight, _WEIGHT - 1)


def kind_of(number: int) -> int:
    """Return the kind of a rank."""
    return number // _WEIGHT


class Range:
    """A part of a segment that matters equally. start, end: bytes from the segment's beginning; segment: its index."""

    __slots__ = ("end", "rank", "segment", "start")

    def __init__(self, segment: int, start: int, end: int, rank: int) -> None:
        self.segment = segment
        self.start = start
        self.end = end
        self.rank = rank

    def __repr__(self) -> str:
        return f"Range({self.segment}, {self.start:#x}, {self.end:#x}, {kind_of(self.rank)})"


class Memory:
    """The segments of a core that have bytes in it, by address."""

    def __init__(self, head: Head) -> None:
        loads = [
            (segment.address, index)
            for index, segment in enumerate(head.segments)
            if segment.kind == PT_LOAD and segment.file_size
        ]
        loads.sort()
        self.segments = head.segments
        self._starts = [address for address, _ in loads]
        self._indexes = [index for _, index in loads]

    def find(self, address: int) -> int | None:
        """Return the index of the segment whose bytes have this address."""
        at = bisect_right(self._starts, address) - 1
        if at < 0:
            return None
        segment = self.segments[self._indexes[at]]
        return self._indexes[at] if address < segment.address + segment.file_size else None

    def after(self, address: int) -> int | None:
        """Return the index of the first segment that begins at or after an address."""
        at = bisect_right(self._starts, address - 1)
        return self._indexes[at] if at < len(self._indexes) else None

    def find_stack(self, pointer: int) -> int | None:
        """Return the index of the segment that a stack pointer means: it is below it when the stack overflowed."""
        index = self.find(pointer)
        if index is None:
            index = self.after(pointer)
            if index is not None and self.segments[index].address - pointer > OVERFLOW:
                return None
        return index

    def between(self, start: int, end: int) -> Iterator[int]:
        """Yield the indexes of the segments that begin in [start, end)."""
        at = bisect_right(self._starts, start - 1)
        while at < len(self._starts) and self._starts[at] < end:
            yield self._indexes[at]
            at += 1


def stack_of(memory: Memory, pointer: int) -> tuple[int, int] | None:
    """Return (start, end) of the addresses of a stack from its pointer to its base, None when it is not in the core."""
    index = memory.find_stack(pointer)
    if index is None:
        return None
    segment = memory.segments[index]
    start = max(segment.address, (pointer - RED_ZONE) // PAGE * PAGE)
    return start, min(segment.address + segment.file_size, start + DEEP_STACK)


def ranges(head: Head, notes: Notes, marks: Iterable[tuple[int, int, int]] | None = None) -> list[Range]:
    """Return the parts of all segments in the order of the file.

    marks: (start address, end address, rank) of what is known to matter besides; None when nobody could look.
    """
    memory = Memory(head)
    painted: dict[int, list[tuple[int, int, int]]] = {}
    unused = _unused(memory, notes)
    known = _heap(memory, notes) if marks is None else marks
    for start, end, number in [*_stacks(memory, notes), *_linkage(memory, notes), *_globals(memory, notes), *known]:
        index = memory.find(start)
        if index is None:
            continue
        segment = head.segments[index]
        first = (start - segment.address) // PAGE * PAGE
        last = min(-(-(end - segment.address) // PAGE) * PAGE, segment.file_size)
        if first < last:
            painted.setdefault(index, []).append((first, last, number))
    found = []
    for index, segment in enumerate(head.segments):
        if not segment.file_size:
            continue
        if segment.kind != PT_LOAD:
            found.append(Range(index, 0, segment.file_size, FRAME_OF_ALL))
            continue
        base = rank(DATA if segment.flags & PF_W else REST, segment.file_size)
        found += _cut(index, segment.file_size, base, painted.get(index, []), unused.get(index, 0))
    return found


def _cut(index: int, size: int, base: int, marks: list[tuple[int, int, int]], unused: int) -> list[Range]:
    """Cut a segment so that each part has the rank of the most important mark on it.

    base: of what has no mark; but the first `unused` bytes are UNUSED then.
    """
    marks.sort()
    found: list[Range] = []
    open_marks: list[tuple[int, int]] = []
    at = 0
    following = 0
    while at < size:
        while following < len(marks) and marks[following][0] <= at:
            heapq.heappush(open_marks, (marks[following][2], marks[following][1]))
            following += 1
        while open_marks and open_marks[0][1] <= at:
            heapq.heappop(open_marks)
        number, end = (base, size) if at >= unused else (rank(UNUSED), min(unused, size))
        if open_marks and open_marks[0][0] < number:
            number, end = open_marks[0]
        if following < len(marks):
            end = min(end, marks[following][0])
        if found and found[-1].rank == number:
            found[-1].end = end
        else:
            found.append(Range(index, at, end, number))
        at = end
    return found


def _stacks(memory: Memory, notes: Notes) -> Iterator[tuple[int, int, int]]:
    for number, thread in enumerate(notes.threads):
        stack = stack_of(memory, thread.sp)
        if stack is None:
            continue
        start, end = stack
        near = min(end, start + NEAR_STACK)
        yield start, near, rank(STACKS, number) if number else rank(CRASHED)
        if near < end:
            yield near, end, rank(DEEP, number)
        yield from _own_stack(memory, thread, rank(STACKS, number) if number else rank(CRASHED), number)
    yield from _main_stack(memory, notes)


def _own_stack(memory: Memory, thread: Thread, near: int, number: int) -> Iterator[tuple[int, int, int]]:
    """Yield the stack that a thread was made with, when it stands on another: in a signal handler (sigaltstack(2)).

    No register points to it but the thread pointer: the control block is at its base (pthreads).
    """
    index = memory.find(thread.tls)
    if index is None or index == memory.find(thread.sp):
        return
    segment = memory.segments[index]
    start, end = segment.address, segment.address + segment.file_size
    top = max(start, thread.tls - NEAR_STACK)
    yield top, min(end, thread.tls + NEAR_STACK), near
    if start < top:
        # How far it was used is not known. The crashed thread's is worth the guess, others' after all that is certain.
        yield max(start, thread.tls - DEEP_STACK), top, rank(GLOBALS, _WEIGHT - 1) if number else rank(DEEP)


def _main_stack(memory: Memory, notes: Notes) -> Iterator[tuple[int, int, int]]:
    """Yield the main thread's stack, when that thread stands on another one. It has grown to what was used."""
    index = memory.find(notes.auxv.get(AT_RANDOM, 0))
    if index is None:
        return
    segment = memory.segments[index]
    start, end = segment.address, segment.address + segment.file_size
    if any(start - OVERFLOW <= thread.sp < end for thread in notes.threads):
        return
    # After an overflow the innermost frames are at its very end, below.
    yield start, min(end, start + NEAR_STACK), rank(CRASHED, 1)
    yield max(start, end - NEAR_STACK), end, rank(CRASHED, 1)
    yield start, min(end, start + DEEP_STACK), rank(DEEP)


def _unused(memory: Memory, notes: Notes) -> dict[int, int]:
    """Return how many bytes of a segment lie below its stack's pointer, by the segment's index.

    Only of what is a stack for certain: it has a thread's control block, or is the main thread's.
    """
    found: dict[int, int] = {}
    main = memory.find(notes.auxv.get(AT_RANDOM, 0))
    for thread in notes.threads:
        index = memory.find(thread.sp)
        if index is not None and index in (memory.find(thread.tls), main):
            below = (thread.sp - RED_ZONE - memory.segments[index].address) // PAGE * PAGE
            found[index] = min(found.get(index, below), max(below, 0))
    return found


def _linkage(memory: Memory, notes: Notes) -> Iterator[tuple[int, int, int]]:
    """Yield what names the shared libraries, as far as that can be told without looking at memory."""
    number = rank(LINKAGE)
    program = _name_of(notes, AT_PHDR) or _name_of(notes, AT_ENTRY)
    loader = _name_of(notes, AT_BASE)
    loader_end = 0
    for file in notes.files:
        if file.offset == 0:
            yield file.start, file.start + PAGE, rank(LINKAGE, 1)
        for index in memory.between(file.start, file.end):
            segment = memory.segments[index]
            end = segment.address + segment.file_size
            if file.name == program:
                # Its dynamic section: behind the constants, in the part that is read-only after relocation.
                yield segment.address, min(end, segment.address + EXE_DATA), number
                if not segment.flags & PF_W:
                    yield max(segment.address, end - EXE_DATA), end, number
            elif file.name == loader:
                yield segment.address, min(end, segment.address + LOADER_DATA), number
        if file.name == loader:
            loader_end = max(loader_end, file.end)
    for index in memory.between(loader_end, loader_end + 1):
        # The last of its variables (.bss) have no file behind them.
        segment = memory.segments[index]
        yield segment.address, segment.address + min(segment.file_size, LOADER_DATA), number
    vdso = memory.find(notes.auxv.get(AT_SYSINFO_EHDR, 0))
    if vdso is not None:
        segment = memory.segments[vdso]
        yield segment.address, segment.address + min(segment.file_size, SMALL), rank(LINKAGE, 1)
    yield from _small(memory, notes, rank(LINKAGE, 2))


def _small(memory: Memory, notes: Notes, number: int) -> Iterator[tuple[int, int, int]]:
    """Yield what is small, has no file behind it and was written to: the linker's first allocations are there."""
    total = 0
    for segment in memory.segments:
        if _is_written(segment) and segment.file_size <= SMALL and notes.files.index(segment.address) is None:
            total += segment.file_size
            if total > SMALL_TOTAL:
                return
            yield segment.address, segment.address + segment.file_size, number


def _heap(memory: Memory, notes: Notes) -> Iterator[tuple[int, int, int]]:
    """Yield the heap, the first of it: the memory without a file behind the program's own, brk(2)'s."""
    program = _name_of(notes, AT_PHDR) or _name_of(notes, AT_ENTRY)
    end = max((file.end for file in notes.files if file.name == program), default=0)
    left = HEAP
    for index in memory.between(end, end + HEAP_DISTANCE) if end else ():
        segment = memory.segments[index]
        if left and _is_written(segment) and notes.files.find(segment.address) is None:
            size = min(segment.file_size, left)
            left -= size
            # It may be all for nothing, so whatever is known to be of use comes before most of it.
            yield segment.address, segment.address + size, rank(GLOBALS, _WEIGHT - 2)
            if left == HEAP - size:
                yield segment.address, segment.address + min(size, FIRST_OF_HEAP), rank(LINKAGE, 3)


def _globals(memory: Memory, notes: Notes) -> Iterator[tuple[int, int, int]]:
    found = []
    for file in notes.files:
        for index in memory.between(file.start, file.end):
            segment = memory.segments[index]
            # The kernel dumps one page of each mapped ELF file, and else what was written to.
            if segment.flags & PF_W or segment.file_size > PAGE:
                found.append((segment.file_size, segment.address))
    total = 0
    for size, address in sorted(found):
        total += size
        if total > GLOBALS_TOTAL:
            return
        yield address, address + size, rank(GLOBALS, size)


def _name_of(notes: Notes, kind: int) -> bytes | None:
    """Return the name of the mapped file that a value of the auxiliary vector points into."""
    address = notes.auxv.get(kind, 0)
    for file in notes.files:
        if file.start <= address < file.end:
            return file.name
    return None


def _is_written(segment: Segment) -> bool:
    return segment.kind == PT_LOAD and bool(segment.flags & PF_W) and segment.file_size > 0


def choose(found: list[Range], budget: int | None, *, up_to: int = UNUSED, extra: int = 0) -> list[Range]:
    """Return the ranges to keep, in the order given: the same list when that is all of them.

    budget: bytes for all of them, None for no limit. up_to: the last kind that is kept. extra: bytes that each one
    costs beside its own.
    """
    keep: dict[int, int] = {}
    for at in sorted(range(len(found)), key=lambda at: (found[at].rank, at)):
        part = found[at]
        size = part.end - part.start
        if kind_of(part.rank) > up_to:
            break
        if budget is not None:
            # Of the first one that does not fit, the beginning: what lies nearest to a stack's pointer.
            size = size if size + extra <= budget else max(0, budget - extra) // PAGE * PAGE
            budget -= size + extra if size else 0
        keep[at] = size
    if sum(keep.values()) == sum(part.end - part.start for part in found):
        return found
    chosen = []
    for at, part in enumerate(found):
        if keep.get(at):
            chosen.append(Range(part.segment, part.start, part.start + keep[at], part.rank))
    return chosen
