"""ballast.py THREADS BYTES: a Python process with threads, each with frames of its own, and much else in its memory.

When all is in place: "ready" on standard output; at the end of standard input it dies of SIGSEGV, some frames deep.
"""

from __future__ import annotations

import ctypes
import os
import queue
import random
import resource
import sys
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


@dataclass
class Order:
    number: int
    articles: list[str]
    note: str = "nothing to say"


def wait_for_lock(order: Order, placed: threading.Semaphore) -> None:
    lock = threading.Lock()
    lock.acquire()
    placed.release()
    with lock:
        print(order)


def wait_for_queue(order: Order, placed: threading.Semaphore) -> None:
    orders: queue.Queue[Order] = queue.Queue()
    placed.release()
    print(order, orders.get())


def wait_in_read(order: Order, placed: threading.Semaphore) -> None:
    read, _write = os.pipe()
    placed.release()
    print(order, os.read(read, 1))


WAYS = (wait_for_lock, wait_for_queue, wait_in_read)


class Clerk:
    def __init__(self, number: int, placed: threading.Semaphore) -> None:
        self.number = number
        self.placed = placed

    def recurse(self, depth: int, way: Callable[[Order, threading.Semaphore], None]) -> None:
        if depth > 0:
            self.recurse(depth - 1, way)
        else:
            way(Order(self.number, ["bread", "butter"]), self.placed)

    def work(self) -> None:
        for way in (WAYS[self.number % len(WAYS)] for _ in range(1)):
            self.recurse(self.number % 5, way)


def endless(depth: int) -> Iterator[int]:
    yield depth
    if depth < 10:
        yield from endless(depth + 1)
    else:
        crash("by a null pointer")


def crash(how: str) -> None:
    sys.stdin.buffer.read()
    print(how, ctypes.string_at(0), flush=True)


def main() -> None:
    threads, size = int(sys.argv[1]), int(sys.argv[2])
    hard = resource.getrlimit(resource.RLIMIT_CORE)[1]
    resource.setrlimit(resource.RLIMIT_CORE, (hard, hard))
    placed = threading.Semaphore(0)
    # Half as one piece, half as the small objects that a program's heap is full of.
    ballast = random.Random(1).randbytes(size // 2)
    orders = {
        number: Order(number, [f"article {number}-{at}" for at in range(8)]) for number in range(size // 2 // 1100)
    }
    for number in range(threads):
        threading.Thread(target=Clerk(number, placed).work, daemon=True, name=f"clerk-{number}").start()
    for _ in range(threads):
        placed.acquire()
    print("ready", flush=True)
    for step in endless(0):
        assert step < len(ballast) + len(orders)


if __name__ == "__main__":
    main()
