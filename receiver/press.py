"""Compression beside reading: frames are pressed by other threads while the next bytes come, and written in order.

A container's cpu quota can make compression the bottleneck, and then the crashed process waits for it. So while the
quota throttles this cgroup (cpu.stat, cgroups(7)) frames are stored as they are: disk is cheaper than a late restart.
"""

from __future__ import annotations

import os
from _queue import SimpleQueue
from _thread import allocate_lock
from collections import deque

TYPE_CHECKING = False
if TYPE_CHECKING:
    import threading
    from typing import Any

    from receiver.frames import Bytes, CoreFile

# How much goes uncompressed after the quota has struck, before compression is tried again.
RELIEF = 32


class Throttle:
    """Tells whether the cpu quota of this process's cgroup strikes. Owns a descriptor."""

    def __init__(self, path: str | None) -> None:
        """Open a cpu.stat file; None or one that is not there stands for no quota."""
        self._fd = -1
        self._count = 0
        if path is not None:
            try:
                self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            except OSError:
                pass
        self._count = self._read()

    def _read(self) -> int:
        if self._fd < 0:
            return 0
        try:
            for line in os.pread(self._fd, 4096, 0).split(b"\n"):
                name, _, value = line.partition(b" ")
                if name == b"nr_throttled" and value.isdigit():
                    return int(value)
        except OSError:
            pass
        return 0

    def struck(self) -> bool:
        """Whether it struck since the last question."""
        before, self._count = self._count, self._read()
        return self._count > before

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


class Task:
    """A frame on its way. buffer: is the press's own until the frame is written."""

    __slots__ = ("buffer", "error", "label", "parts", "pressed", "size")

    def __init__(self, buffer: bytearray, size: int, label: Any) -> None:
        self.buffer = buffer
        self.size = size
        self.label = label
        self.parts: list[Bytes] = []
        self.error: BaseException | None = None
        self.pressed = allocate_lock()
        self.pressed.acquire()


class Press:
    """Prepares frames with some threads, none when `threads` is 0; gives them back in the order they came.

    buffers: so many frames are in memory at the same time.
    """

    def __init__(self, target: CoreFile, threads: int, throttle: Throttle, *, frame: int) -> None:
        self._target = target
        self._throttle = throttle
        self._plain_left = 0
        self._frame = frame
        self._spare = threads + 2 if threads else 1
        self._free: list[bytearray] = []
        self._pending: deque[Task] = deque()
        self._queue: SimpleQueue[Task | None] = SimpleQueue()
        # They start with the third frame: smaller cores are pressed before a thread would run.
        self._wanted = threads
        self._threads: list[threading.Thread] = []
        self._alone = 2

    def buffer(self) -> bytearray | None:
        """Return a buffer to fill, None when a frame has to be taken first."""
        if not self._free and self._spare:
            self._spare -= 1
            return bytearray(self._frame)
        return self._free.pop() if self._free else None

    def put(self, buffer: bytearray, size: int, label: Any, *, plain: bool = False) -> None:
        """Press the first `size` bytes of a buffer that came from here."""
        task = Task(buffer, size, label)
        if self._throttle.struck():
            self._plain_left = RELIEF
        elif self._plain_left:
            self._plain_left -= 1
        plain = plain or self._plain_left > 0
        self._pending.append(task)
        if plain or not self._is_done_at_once(task):
            if not plain and self._started():
                self._queue.put(task)
            else:
                self._prepare(task, plain=plain)

    def _is_done_at_once(self, task: Task) -> bool:
        """Prepare what takes no time here. A thread that wakes up for it costs more: it takes the turn of others."""
        try:
            parts = self._target.at_once(task.buffer, task.size)
        except BaseException as error:
            # It is raised where the frame is taken.
            task.error = error
        else:
            if parts is None:
                return False
            task.parts = parts
        task.pressed.release()
        return True

    def _started(self) -> bool:
        """Whether threads do it. Starts them for the third frame, as many as can be had."""
        if self._alone:
            self._alone -= 1
            return False
        if self._wanted:
            # Not at the top: most cores have no third frame, and a service that waits holds it resident.
            import threading  # noqa: PLC0415
        while self._wanted:
            self._wanted -= 1
            thread = threading.Thread(target=self._work, daemon=True)
            try:
                thread.start()
            except RuntimeError:
                # The container's or the user's number of processes is used up: the reading thread does it all.
                break
            self._threads.append(thread)
        return bool(self._threads)

    def _prepare(self, task: Task, *, plain: bool) -> None:
        try:
            task.parts = self._target.prepare(task.buffer, task.size, plain=plain)
        except BaseException as error:
            # It is raised where the frame is taken.
            task.error = error
        task.pressed.release()

    def _work(self) -> None:
        while (task := self._queue.get()) is not None:
            self._prepare(task, plain=False)

    def take(self, *, wait: bool) -> Task | None:
        """Return the next frame, None when there is none (or not yet). Raises what pressing it raised."""
        if not self._pending or not self._pending[0].pressed.acquire(blocking=wait):
            return None
        task = self._pending.popleft()
        if task.error is not None:
            raise task.error
        return task

    def give_back(self, task: Task) -> None:
        """Let the buffer of a frame that was taken be filled again."""
        self._free.append(task.buffer)

    def close(self) -> None:
        """End the threads."""
        for _ in self._threads:
            self._queue.put(None)
        for thread in self._threads:
            thread.join()
        self._throttle.close()
