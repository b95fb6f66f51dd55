"""What is picked out of a core while it streams by: the first page of each mapped file, the top of the crashed stack.

With the notes these make the crash's signature, and no byte of it needs a second look.
"""

from __future__ import annotations

import os
from bisect import bisect_right

from receiver import signature
from receiver.elfcore import PF_X, PT_LOAD
from receiver.plan import PAGE, Memory

TYPE_CHECKING = False
if TYPE_CHECKING:
    from receiver.elfcore import Head
    from receiver.notes import Notes

# Build ids of so many modules are taken; more are named without.
MAX_PAGES = 1024
AT_PHDR = 3


class Witness:
    """Picks out pieces of memory. Feed it the segments' bytes in the order of the file."""

    def __init__(self, head: Head, notes: Notes) -> None:
        self.head = head
        self.notes = notes
        # The program's own first page, once it has come by.
        self.program_page = b""
        self._builds: dict[int, str] = {}
        self._stack = bytearray()
        self._stack_start = 0
        # (segment, start in it, end, address) by position, the next one last.
        wanted: list[tuple[int, int, int, int]] = []
        memory = Memory(head)
        for file in notes.files:
            index = memory.find(file.start) if file.offset == 0 and len(wanted) < MAX_PAGES else None
            if index is not None:
                start = file.start - head.segments[index].address
                wanted.append((index, start, min(start + PAGE, head.segments[index].file_size), file.start))
        stack = self._find_stack(memory)
        if stack is not None:
            wanted.append(stack)
        wanted.sort(reverse=True)
        self._wanted = wanted
        self._partial = bytearray()

    def _find_stack(self, memory: Memory) -> tuple[int, int, int, int] | None:
        if not len(self.notes.threads):
            return None
        pointer = self.notes.threads[0].sp
        index = memory.find_stack(pointer)
        if index is None:
            return None
        segment = memory.segments[index]
        self._stack_start = max(pointer, segment.address)
        start = self._stack_start - segment.address
        return index, start, min(start + signature.STACK, segment.file_size), -1

    def take(self, segment: int, at: int, data: memoryview) -> None:
        """Look at bytes of a segment, from `at` in it on. Whatever goes by is given here, in order."""
        while self._wanted:
            index, start, end, address = self._wanted[-1]
            if index > segment or (index == segment and start >= at + len(data)):
                return
            if index == segment and end > at:
                self._partial += data[max(start - at, 0) : end - at]
            if index == segment and end > at + len(data):
                # The rest comes with the next bytes, as the rest of those that overlap with it.
                self._wanted[-1] = (index, at + len(data), end, address)
                return
            self._wanted.pop()
            self._done(address, bytes(self._partial))
            self._partial.clear()

    def _done(self, address: int, data: bytes) -> None:
        if address < 0:
            self._stack[:] = data
        else:
            if address == self._program():
                self.program_page = data
            build = signature.build_id(data)
            if build:
                self._builds[address] = build

    @property
    def complete(self) -> bool:
        """Whether all that is wanted was seen."""
        return not self._wanted

    def wanted(self) -> list[tuple[int, int]]:
        """Return (address, bytes) of what is still wanted, in the order in which it is going to come by."""
        segments = self.head.segments
        return [(segments[index].address + start, end - start) for index, start, end, _ in reversed(self._wanted)]

    def take_all(self, found: list[bytes]) -> None:
        """Take what is `wanted`, in this order, as it was read elsewhere. What is missing is not waited for."""
        for data in found:
            self._done(self._wanted.pop()[3], data)
        self._wanted.clear()

    def build_of_program(self) -> str | None:
        """Return the build id of the program, in hex."""
        return self._builds.get(self._program())

    def _program(self) -> int:
        """Return the address of the program's first page."""
        return self.notes.auxv.get(AT_PHDR, 0) // PAGE * PAGE

    def frames(self) -> list[signature.Frame]:
        """Return the frames that name the bug, see `signature.frames`."""
        starts = []
        ends = []
        for segment in self.head.segments:
            if segment.kind == PT_LOAD and segment.flags & PF_X:
                starts.append(segment.address)
                ends.append(segment.address + segment.memory_size)

        def is_code(address: int) -> bool:
            at = bisect_right(starts, address) - 1
            return at >= 0 and address < ends[at]

        return signature.frames(self.notes, is_code, bytes(self._stack), self._stack_start, self._builds)

    def signature(self, program: str, number: int) -> str:
        """Return the name of the bug. program: the executable's path or name. number: the signal."""
        name = os.path.basename(program.removesuffix(" (deleted)"))
        return signature.signature(self.build_of_program(), name, number, self.frames())
