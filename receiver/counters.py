"""What a store has seen, in numbers that outlive its records: `.counters`, a small file of JSON.

Written under the store's lock, whole or not at all, and not synced: with the power the last few crashes may go from the
numbers, and stay in the store. What is damaged counts from zero again, which those who read such numbers expect
(Prometheus: a counter's reset).
"""

from __future__ import annotations

import json
import os
import stat
import time
from typing import TYPE_CHECKING, Any

from receiver.reasons import OF_NONE, OF_REDUCED, word_for
from receiver.record import signal_name
from receiver.retention import FULL, limits_of
from receiver.store import write_all

if TYPE_CHECKING:
    from receiver.config import Config
    from receiver.record import Record
    from receiver.store import Store

NAME = ".counters"
# The file has blanks up to this, so that it can be written over in place where a full disk has no room for another.
SIZE = 4096
# Upper bounds in seconds, of the time for which a crashed process is held. Beyond the last: its receiver gives up.
BUCKETS = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)
# core(7): all that dump core by themselves. Others are counted when somebody sends them with a handler of his own.
SIGNALS = (
    "SIGABRT",
    "SIGBUS",
    "SIGFPE",
    "SIGILL",
    "SIGQUIT",
    "SIGSEGV",
    "SIGSYS",
    "SIGTRAP",
    "SIGXCPU",
    "SIGXFSZ",
)
# "state/reason" of a core, each of which is there from the beginning: a rate needs a zero to rise from.
CORES = ("stored/", *(f"reduced/{word}" for word in OF_REDUCED), *(f"none/{word}" for word in OF_NONE))
_MOST_SIGNALS = 64
_MOST = 1 << 62
# The random part of an id (receiver/record.py: new_id); as many as there may be workers.
_ID = 8
_RECENT = 64


class Counters:
    """The numbers.

    since: when it began, last: when a crash was counted last, 0 for never; seconds since the epoch. crashes: by the
    name of the signal. cores: by `state/reason`. core_bytes: of cores that were stored, before compression; disk_bytes:
    as they lie on the disk. recent: the ends of the ids that were counted last. seconds: how many took up to BUCKETS[i]
    and more than BUCKETS[i - 1], the last one more than all; seconds_sum: all of them together.
    """

    __slots__ = ("core_bytes", "cores", "crashes", "disk_bytes", "last", "recent", "seconds", "seconds_sum", "since")

    def __init__(self, since: float) -> None:
        self.since = since
        self.last = 0.0
        self.crashes = dict.fromkeys(SIGNALS, 0)
        self.cores = dict.fromkeys(CORES, 0)
        self.core_bytes = self.disk_bytes = 0
        self.recent: list[str] = []
        self.seconds = [0] * (len(BUCKETS) + 1)
        self.seconds_sum = 0.0

    def add(self, record: Record, now: float) -> None:
        """Count one crash that has come to its end, unless it was counted already.

        A worker that is killed when it has counted, and before it has said so, has its crash counted again.
        """
        if record.id[-_ID:] in self.recent:
            return
        self.recent = [*self.recent[1 - _RECENT :], record.id[-_ID:]]
        core = record.core
        self.last = now
        name = signal_name(record.signal) if 0 <= record.signal <= _MOST_SIGNALS else "other"
        self.crashes[name] = self.crashes.get(name, 0) + 1
        key = f"{core.state}/{word_for(core)}"
        if key not in self.cores:
            # One that was evicted before it was counted: it had been stored.
            key = "stored/" if core.state in ("stored", "none") else "reduced/error"
        self.cores[key] += 1
        if core.path is not None:
            self.core_bytes += max(0, core.size_bytes)
            self.disk_bytes += max(0, core.stored_bytes)
        if record.seconds is not None and 0 <= record.seconds < _MOST:
            self.seconds[sum(record.seconds > most for most in BUCKETS)] += 1
            self.seconds_sum = round(self.seconds_sum + record.seconds, 6)

    def to_json(self) -> dict[str, Any]:
        return {"version": 1, **{name: getattr(self, name) for name in self.__slots__}}

    @classmethod
    def from_json(cls, found: Any) -> Counters:
        """Read them back. Raises ValueError for what is none."""
        try:
            counters = cls(_number(found["since"]))
            counters.last = _number(found["last"])
            counters.seconds_sum = _number(found["seconds_sum"])
            counters.core_bytes, counters.disk_bytes = _whole(found["core_bytes"]), _whole(found["disk_bytes"])
            for name in ("crashes", "cores"):
                known: dict[str, int] = getattr(counters, name)
                for key, value in dict(found[name]).items():
                    # A newer version's words, and a stranger's: no more than there can be.
                    if key in known or (name == "crashes" and len(known) < _MOST_SIGNALS + 2 and _is_signal(key)):
                        known[key] = _whole(value)
            seconds = [_whole(value) for value in found["seconds"]]
            counters.recent = [str(value)[:_ID] for value in list(found["recent"])[-_RECENT:]]
        except (TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"not counters: {error}") from None
        if len(seconds) == len(counters.seconds):
            counters.seconds = seconds
        return counters


def _is_signal(key: object) -> bool:
    return isinstance(key, str) and (
        key in ("other", "unknown") or (key[:3] == "SIG" and key.isalnum() and len(key) < 12)
    )


def _whole(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= _MOST:
        raise ValueError("not counters: a number is none")
    return value


def _number(value: Any) -> float:
    # (No range contains "nan".)
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value <= _MOST:
        raise ValueError("not counters: a number is none")
    return float(value)


def count(record: Record, store: Store, config: Config) -> None:
    """Count a crash that is in the store, and write the metrics anew where they are wanted. Raises OSError, StoreError.

    To be called once for each crash.
    """
    with store.locked():
        now = time.time()
        counters = load(store.directory, now)
        counters.add(record, now)
        _save(store.directory, counters)
    if config.metrics is not None:
        from receiver import metrics  # noqa: PLC0415 - who wants none pays for none

        # Not the store's: who only leaves a record there opens it without.
        metrics.write(config.metrics, store, limits_of(config))


def load(directory: int, now: float | None = None) -> Counters:
    """Return what a store has counted. directory: its descriptor. Raises OSError; a damaged file is one of zeros."""
    try:
        # Not blocking, should it be a FIFO.
        fd = os.open(NAME, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=directory)
    except FileNotFoundError:
        return Counters(time.time() if now is None else now)
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise OSError(f"{NAME} is not a file")
        data = os.read(fd, 4 * SIZE)
    finally:
        os.close(fd)
    try:
        return Counters.from_json(json.loads(data))
    except (ValueError, RecursionError):
        return Counters(time.time() if now is None else now)


def _save(directory: int, counters: Counters) -> None:
    data = json.dumps(counters.to_json(), separators=(",", ":")).encode("ascii")
    data = data.ljust(SIZE - 1) + b"\n"
    new = NAME + ".new"
    try:
        # Left by somebody who was killed here.
        os.unlink(new, dir_fd=directory)
    except FileNotFoundError:
        pass
    try:
        fd = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600, dir_fd=directory)
        try:
            write_all(fd, data)
            # Numbers alone: they name nobody.
            os.fchmod(fd, 0o644)
        except BaseException:
            os.unlink(new, dir_fd=directory)
            raise
        finally:
            os.close(fd)
        os.rename(new, NAME, src_dir_fd=directory, dst_dir_fd=directory)
    except OSError as error:
        if error.errno not in FULL or not _write_over(directory, data):
            raise


def _write_over(directory: int, data: bytes) -> bool:
    """Write in place, on a disk that is full. Returns whether the file was there, and as long."""
    try:
        fd = os.open(NAME, os.O_WRONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=directory)
    except FileNotFoundError:
        return False
    try:
        found = os.fstat(fd)
        return stat.S_ISREG(found.st_mode) and found.st_size == len(data) == os.pwrite(fd, data, 0)
    finally:
        os.close(fd)
