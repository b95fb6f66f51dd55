"""The core, read once as it comes, and kept within what is allowed: whole, or reduced to what matters most.

What is left out is decided twice. Before the first byte of memory: a limit in bytes of core (core_max, `ulimit -c`, the
setting `keep`) says what is not even written. And while it is written: when the store, the disk or a quota has no more
room, a frame of what matters least gives its room to what matters more, or is not written.
"""

from __future__ import annotations

import errno
import heapq
import os

from receiver import peek, plan
from receiver.elfcore import HEADER_SIZE, PT_LOAD, NotACore, first_size, head_size, read_head, table
from receiver.frames import FRAME, PlainFile, ZstdFile
from receiver.notes import Parser
from receiver.press import Press, Throttle
from receiver.record import Core
from receiver.store import NoRoom
from receiver.stream import Stalled, Stream
from receiver.witness import Witness

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from receiver.elfcore import Head
    from receiver.frames import Bytes, CoreFile
    from receiver.notes import Notes
    from receiver.plan import Range
    from receiver.store import Entry

PAGE = 4096
# A program header of the largest kind, a row of the frames' table, and what else the end of a reduced core takes.
_ROW, _FRAME_ROW, _TAIL = 56, 8, 3 * PAGE
# What no file system or quota says but for want of room: write(2).
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# A range that is given up by itself, and not together with its neighbours.
_OF_ITS_OWN = 256 << 10
# A second of reading.
_READ_IN_VAIN = 1 << 30
# A frame of less may not free a whole block.
_WORTH_A_HOLE = 4 * PAGE


class TooLarge(Exception):
    """Not even the part that makes it a core is allowed. The text names the limit."""


class Unneeded(Exception):
    """Nobody needs this core. The text says why. Raised by who is asked when the signature is known."""


class Wish:
    """How much of a core to keep.

    limit: bytes of the core before compression, None for no limit; why: the limit's name. up_to: the last kind of
    memory that is kept (see `receiver.plan`); named: how the settings call that.
    """

    __slots__ = ("limit", "named", "up_to", "why")

    def __init__(
        self, limit: int | None = None, why: str = "", *, up_to: int = plan.UNUSED, named: str = "keep = 'stacks'"
    ) -> None:
        self.limit = limit
        self.why = why
        self.up_to = up_to
        self.named = named


class _Frame:
    """A piece of the file. size: of the core; taken: on disk. pieces: (segment, start in it, length, start here)."""

    __slots__ = ("dropped", "pieces", "position", "rank", "size", "taken")

    def __init__(self) -> None:
        self.pieces: list[tuple[int, int, int, int]] = []
        self.dropped = False
        self.rank = plan.rank(plan.UNUSED + 1)
        self.position = 0
        self.size = 0
        self.taken = 0


class Capture:
    """One core's way from the kernel into the store. Owns `memory`; `fd` stays the caller's.

    memory: of /proc/PID/mem, -1 for none. noted: is asked when the notes are known, whether the crash's signature is
    wanted before the core is read. witnessed: is called when it can be known, and may raise Unneeded.
    """

    def __init__(
        self,
        fd: int,
        entry: Entry,
        *,
        compression: str,
        level: int = 1,
        threads: int = 1,
        stall_seconds: float,
        wish: Wish | None = None,
        memory: int = -1,
        cpu_stat: str | None = None,
        frame_size: int = FRAME,
        noted: Callable[[Witness], bool] = lambda _witness: False,
        witnessed: Callable[[Witness], None] = lambda _witness: None,
    ) -> None:
        self._stream = Stream(fd, stall_seconds, reserved=True)
        self._entry = entry
        self._compression = compression
        self._wish = wish or Wish()
        self._memory = memory
        self._noted = noted
        self._witnessed = witnessed
        file = entry.open_core()
        self._target: CoreFile = PlainFile(file) if compression == "none" else ZstdFile(file, level)
        self._press = Press(self._target, threads if compression != "none" else 0, Throttle(cpu_stat), frame=frame_size)
        self._frame_size = frame_size
        self._buffer: bytearray | None = None
        self._frame = _Frame()
        self._frames: list[_Frame] = []
        # (-rank, -number) of the frames that can be given up: the least important and latest first.
        self._expendable: list[tuple[int, int]] = []
        self._used = 0
        self._closing = _TAIL
        # From this rank on there is no room.
        self._floor = plan.rank(plan.UNUSED + 1)
        self._shortage: str | None = None
        # What the disk has had room for, once it has said that it is full.
        self._cap: int | None = None
        self._settled = False
        self._limited = False
        # What came ends within the head.
        self._is_cut = False
        # Behind this byte of the core nothing is wanted.
        self._last_wanted = 0
        self._has_enough = False
        self._head: Head | None = None
        self._header = b""
        self._size = 0
        self._scratch: bytearray | None = None
        self._told = False
        self.witness: Witness | None = None

    @property
    def whole_bytes(self) -> int:
        """The size of the whole core by its own head, 0 when it has none."""
        return self._head.size if self._head is not None else 0

    def run(self) -> Core:
        """Read the core to its end; returns what became of it. Raises TooLarge, Unneeded, NoRoom, OSError.

        After an exception nothing of the file is of use.
        """
        stopped = None
        try:
            try:
                self._read()
            except Stalled as error:
                stopped = str(error)
            self._flush()
            while self._place_next(wait=True):
                pass
            if self.witness is not None:
                self._tell_witnessed()
            return self._finish(stopped)
        finally:
            self._press.close()
            self._stream.close()
            self._close_memory()

    def _close_memory(self) -> None:
        if self._memory >= 0:
            os.close(self._memory)
            self._memory = -1

    def _read(self) -> None:
        start = self._stream.take(HEADER_SIZE)
        try:
            start += self._stream.take(first_size(start) - len(start))
            start += self._stream.take(head_size(start) - len(start))
            head = read_head(start)
        except NotACore:
            self._close_memory()
            self._is_cut = self._stream.ended and b"\x7fELF".startswith(start[:4]) and bool(start)
            self._read_unknown(start)
            return
        self._head = head
        self._header = start[:HEADER_SIZE]
        self._closing += _ROW * len(head.segments)
        # By itself in a frame: it is replaced when parts of the core are absent.
        self._add(start[:HEADER_SIZE])
        self._flush(plain=True)
        self._add(start[HEADER_SIZE:])
        notes = Parser(head.machine, is_64=head.is_64)
        parts: list[list[Range]] | None = None
        for index, segment in enumerate(head.segments):
            if not segment.file_size or self._has_enough:
                continue
            if segment.kind == PT_LOAD and parts is None:
                parts = self._decide(head, notes.notes, len(start))
                # It has served: what follows reads the bytes of a stranger.
                self._close_memory()
            self._copy_gap(segment.offset)
            if segment.kind != PT_LOAD:
                self._copy(index, 0, segment.file_size, 0, look=notes.feed)
            elif parts is not None:
                self._copy_parts(index, segment.file_size, parts[index])
        self._copy_gap(head.size)

    def _read_unknown(self, start: bytes) -> None:
        """Keep what is no core that we know, whole or not at all. Raises TooLarge."""
        # It is kept whole or not at all, and how large it becomes is not known: others' cores would go in vain.
        self._entry.evicts = False
        self._add(start)
        limit = self._wish.limit
        while not self._stream.ended:
            self._add_from_stream(FRAME, 0)
            if limit is not None and self._stream.size > limit:
                raise TooLarge(f"it has more than {limit} bytes ({self._wish.why})")

    def _decide(self, head: Head, notes: Notes, head_bytes: int) -> list[list[Range]]:
        """Return the parts to keep of each segment, now that the notes are known. Raises TooLarge, Unneeded."""
        witness = self.witness = Witness(head, notes)
        if self._noted(witness) and self._memory >= 0:
            witness.take_all(peek.fetch(self._memory, head, notes, witness.wanted()))
            self._tell_witnessed()
        parts = plan.ranges(head, notes)
        limit = self._wish.limit
        if limit is not None and limit < head.size:
            self._limited = True
        else:
            limit = None
        chosen = self._choose(parts, limit, head, head_bytes)
        if (chosen is not parts or not self._entry.seems_to_fit(head.size)) and self._memory >= 0:
            marks = peek.look(self._memory, head, notes)
            if marks:
                chosen = self._choose(plan.ranges(head, notes, marks), limit, head, head_bytes)
        by_segment: list[list[Range]] = [[] for _ in head.segments]
        for part in chosen:
            by_segment[part.segment].append(part)
            self._last_wanted = head.segments[part.segment].offset + part.end
        return by_segment

    def _choose(self, parts: list[Range], limit: int | None, head: Head, head_bytes: int) -> list[Range]:
        budget = limit
        if limit is not None:
            # What comes before the memory, and the table that describes what is absent.
            first = min(s.offset for s in head.segments if s.kind == PT_LOAD and s.file_size)
            notes = sum(s.file_size for s in head.segments if s.kind != PT_LOAD)
            empty = sum(not s.file_size for s in head.segments)
            budget = limit - max(first, head_bytes) - _ROW * (empty + 2)
            if budget < 0:
                raise TooLarge(
                    f"its headers and registers alone, {first} bytes, leave nothing of {limit} ({self._wish.why})"
                )
            # They are among the parts, and have been counted.
            budget += notes
        return plan.choose(parts, budget, up_to=self._wish.up_to, extra=_ROW)

    def _tell_witnessed(self) -> None:
        if self.witness is not None and not self._told:
            self._told = True
            self._witnessed(self.witness)

    def _copy_parts(self, index: int, size: int, parts: list[Range]) -> None:
        at = 0
        for part in parts:
            self._skip(index, at, part.start)
            self._copy(index, part.start, part.end, part.rank)
            at = part.end
        self._skip(index, at, size)

    def _copy_gap(self, offset: int) -> None:
        """Copy what is between two segments: padding."""
        while self._stream.size < offset and not self._stream.ended and not self._has_enough:
            self._add_from_stream(offset - self._stream.size, 0)

    def _copy(
        self, index: int, at: int, end: int, rank: int, *, look: Callable[[memoryview], None] | None = None
    ) -> None:
        frame = self._frame
        if frame.rank != rank and (end - at >= _OF_ITS_OWN or (frame.size >= _OF_ITS_OWN and frame.rank > rank)):
            self._flush()
        while at < end and not self._stream.ended:
            if rank >= self._floor:
                self._skip(index, at, end)
                return
            data = self._add_from_stream(end - at, rank)
            if not data:
                break
            pieces = self._frame.pieces
            inside = self._frame.size - len(data)
            if pieces and pieces[-1][0] == index and pieces[-1][1] + pieces[-1][2] == at:
                _, start, length, where = pieces.pop()
                pieces.append((index, start, length + len(data), where))
            else:
                pieces.append((index, at, len(data), inside))
                self._closing += _ROW
            self._see(index, at, data)
            if look is not None:
                look(data)
            at += len(data)

    def _skip(self, index: int, at: int, end: int) -> None:
        if self._scratch is None and at < end:
            self._scratch = bytearray(FRAME)
        while at < end and not self._stream.ended and not self._has_enough:
            self._has_enough = self._nothing_is_wanted()
            view = memoryview(self._scratch or b"")[: end - at]
            data = view[: self._stream.fill(view)]
            self._see(index, at, data)
            at += len(data)

    def _nothing_is_wanted(self) -> bool:
        """Whether there is no need to read on: nothing that comes is kept, and it is too much to be polite about.

        When the reader goes the kernel calls the dump a failure (no WCOREDUMP, wait(2)), so a little is read in vain.
        """
        rest = self.whole_bytes - self._stream.size
        complete = self.witness is None or self.witness.complete
        return complete and self._stream.size >= self._last_wanted and rest > _READ_IN_VAIN

    def _see(self, index: int, at: int, data: memoryview) -> None:
        witness = self.witness
        if witness is not None and not witness.complete:
            witness.take(index, at, data)
            if witness.complete:
                self._tell_witnessed()

    def _room(self) -> memoryview:
        """Return the rest of the frame that is being filled."""
        if self._frame.size == self._frame_size:
            self._flush()
        while self._buffer is None:
            self._buffer = self._press.buffer()
            if self._buffer is None:
                self._place_next(wait=True)
        return memoryview(self._buffer)[self._frame.size :]

    def _add(self, data: bytes) -> None:
        while data:
            room = self._room()
            size = min(len(room), len(data))
            room[:size] = data[:size]
            self._frame.size += size
            self._frame.rank = 0
            data = data[size:]

    def _add_from_stream(self, most: int, rank: int) -> memoryview:
        """Read up to `most` bytes into the frame; returns them."""
        room = self._room()[:most]
        got = self._stream.fill(room)
        self._frame.size += got
        self._frame.rank = min(self._frame.rank, rank)
        return room[:got]

    def _flush(self, *, plain: bool = False) -> None:
        """Send the frame that is being filled on its way, and write those that are ready."""
        if self._frame.size and self._buffer is not None:
            self._closing += _FRAME_ROW
            self._press.put(self._buffer, self._frame.size, self._frame, plain=plain)
            self._buffer = None
            self._frame = _Frame()
        while self._place_next(wait=False):
            pass

    def _place_next(self, *, wait: bool) -> bool:
        task = self._press.take(wait=wait)
        if task is None:
            return False
        try:
            self._place(task.parts, task.label)
        finally:
            self._press.give_back(task)
        return True

    def _place(self, parts: list[Bytes], frame: _Frame) -> None:
        """Write a frame, or leave it out when there is no room for it. Raises NoRoom when it must not be left out."""
        taken = self._target.cost(parts)
        while True:
            try:
                self._grow(taken)
                frame.position = self._target.append(parts, frame.size)
                break
            except NoRoom as error:
                shortage = str(error)
            except OSError as error:
                if error.errno not in _NO_ROOM:
                    raise
                # A file that may not grow (RLIMIT_FSIZE) is not helped by the end of others.
                if error.errno != errno.EFBIG and (self._settle() or self._entry.relieve(taken + self._closing)):
                    continue
                shortage = error.strerror or ""
                # Not to the brim again: a file system without a free block may not even make holes (btrfs).
                self._cap = min(self._cap or self._used, self._used)
            self._shortage = self._shortage or shortage
            if not self._displace(frame.rank):
                if frame.rank == 0:
                    raise NoRoom(shortage)
                self._floor = min(self._floor, frame.rank)
                return
        self._used += taken
        frame.taken = taken
        if frame.rank and taken >= _WORTH_A_HOLE:
            heapq.heappush(self._expendable, (-frame.rank, -len(self._frames)))
        self._frames.append(frame)

    def _settle(self) -> bool:
        """Have the disk count what was removed lately, once. Returns whether that may have helped."""
        settled, self._settled = self._settled, True
        return not settled and self._entry.settle()

    def _grow(self, taken: int) -> None:
        """See to it that so much more may be written. Raises NoRoom, OSError."""
        size = self._used + taken + self._closing
        if self._cap is not None and size > self._cap:
            raise NoRoom(self._shortage or "")
        self._entry.grow(size)

    def _displace(self, rank: int) -> bool:
        """Give up the frame that matters least, if it matters less than `rank`. Returns whether room was made."""
        while self._expendable and -self._expendable[0][0] > rank:
            frame = self._frames[-heapq.heappop(self._expendable)[1]]
            freed = self._target.drop(frame.position, frame.size, frame.taken)
            if not freed and self._entry.spend_hold():
                freed = self._target.drop(frame.position, frame.size, frame.taken)
            if freed:
                frame.dropped = True
                self._used -= freed
                return True
        return False

    def _finish(self, stopped: str | None) -> Core:
        size = self._stream.size
        if size == 0:
            return Core(reason=stopped or "the kernel ended the dump before its first byte")
        head = self._head
        if head is None:
            if self._is_cut:
                return Core(
                    reason=f"the kernel ended the dump after {size} bytes, within the core's head", size_bytes=size
                )
            if stopped is not None:
                return Core(reason=f"the core was not kept: {stopped}", size_bytes=size)
            self._target.finish()
            return Core(state="stored", size_bytes=size, compression=self._compression)
        reasons = []
        if stopped is not None or (size < head.size and not self._has_enough):
            reasons.append(stopped or f"the kernel ended the dump after {size} of {head.size} bytes")
        absent = self._close(head)
        if not absent and not reasons:
            return Core(state="stored", size_bytes=size, whole_bytes=head.size, compression=self._compression)
        if self._limited:
            reasons.append(f"{self._wish.why} allows {self._wish.limit} bytes")
        elif self._wish.up_to < plan.UNUSED:
            reasons.append(self._wish.named)
        if self._shortage is not None:
            reasons.append(self._shortage)
        return Core(
            state="reduced",
            reason=f"{absent} of {head.size} bytes are left out: {'; '.join(reasons)}",
            size_bytes=self._size,
            whole_bytes=head.size,
            absent_bytes=absent,
            compression=self._compression,
        )

    def _close(self, head: Head) -> int:
        """Complete the file. Returns how many bytes of memory are absent. Raises NoRoom, OSError.

        Whoever writes the table may find no room for it: then a frame gives its own, and it is another table.
        """
        everything = sum(segment.file_size for segment in head.segments)
        while True:
            end = self._target.end
            frames = [frame for frame in self._frames if not frame.dropped]
            kept = list(self._kept(frames))
            absent = everything - sum(length for _, _, length, _ in kept)
            try:
                self._size = self._target.end if self._target.is_plain else sum(frame.size for frame in frames)
                if absent:
                    header, rows = table(head, kept, self._size, self._header)
                    self._append_table(rows)
                    self._size += len(rows)
                self._target.finish()
                if absent:
                    self._target.replace_header(header)
            except (NoRoom, OSError) as error:
                if isinstance(error, OSError) and error.errno not in _NO_ROOM:
                    raise
                self._target.cut(end)
                self._shortage = self._shortage or (error.strerror if isinstance(error, OSError) else str(error))
                if not self._displace(0):
                    raise NoRoom(self._shortage) from None
            else:
                return absent

    def _append_table(self, rows: bytes) -> None:
        for at in range(0, len(rows), FRAME):
            part = bytearray(rows[at : at + FRAME])
            prepared = self._target.prepare(part, len(part), plain=False)
            self._grow(len(rows))
            self._target.append(prepared, len(part))

    def _kept(self, frames: Iterable[_Frame]) -> Iterable[tuple[int, int, int, int]]:
        """Yield (segment, start in it, length, offset in the core) of all memory that is kept."""
        offset = 0
        for frame in frames:
            if self._target.is_plain:
                offset = frame.position
            for segment, start, length, where in frame.pieces:
                yield segment, start, length, offset + where
            offset += frame.size
