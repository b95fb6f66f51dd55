"""Prometheus' text format: what a store has counted and what it holds, for node_exporter's textfile collector.

Names, units and types by https://prometheus.io/docs/practices/naming/ and the exposition format, version 0.0.4. Labels
have few values: signals, states and reasons. A program's name is none, since anybody can run programs by any number of
names, and each would be a time series for ever; `corepipectl stats` tells of those.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, NamedTuple

from receiver import counters
from receiver.retention import Survey

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from receiver.counters import Counters
    from receiver.notify.queue import Line
    from receiver.retention import Limits
    from receiver.store import Store

# Two workers at a time are not unusual; when there are always more, one of them has the last word.
_ROUNDS = 8


class Sample(NamedTuple):
    """One line. suffix: behind the family's name, of a histogram's parts."""

    value: float
    labels: tuple[tuple[str, str], ...] = ()
    suffix: str = ""


class Family(NamedTuple):
    """A metric with all its lines. kind: counter, gauge or histogram."""

    name: str
    kind: str
    help: str
    samples: tuple[Sample, ...]


def render(families: Iterable[Family]) -> str:
    """Return the text format. A family without lines is left out."""
    lines = []
    for family in families:
        if not family.samples:
            continue
        lines.append(f"# HELP {family.name} {_escaped(family.help)}")
        lines.append(f"# TYPE {family.name} {family.kind}")
        for sample in family.samples:
            labels = ",".join(f'{name}="{_escaped(value, quote=True)}"' for name, value in sample.labels)
            braces = f"{{{labels}}}" if labels else ""
            lines.append(f"{family.name}{sample.suffix}{braces} {_number(sample.value)}")
    return "".join(f"{line}\n" for line in lines)


def _escaped(text: str, *, quote: bool = False) -> str:
    text = text.replace("\\", r"\\").replace("\n", r"\n")
    return text.replace('"', r"\"") if quote else text


def _number(value: float) -> str:
    return str(value) if isinstance(value, int) else repr(float(value)).removesuffix(".0")


def counted(found: Counters) -> list[Family]:
    """Return what only grows, and when it grew last."""
    cores = [(*key.partition("/"), number) for key, number in found.cores.items()]
    families = [
        Family(
            "core_pipe_crashes_total",
            "counter",
            "Crashes that have a record, by signal.",
            tuple(Sample(number, (("signal", name),)) for name, number in found.crashes.items()),
        ),
        Family(
            "core_pipe_cores_total",
            "counter",
            "What became of the core of each crash (state: stored, reduced, none), and why if it is not whole.",
            tuple(
                Sample(number, (("state", state), *((("reason", reason),) if reason else ())))
                for state, _, reason, number in cores
            ),
        ),
        Family(
            "core_pipe_core_bytes_total",
            "counter",
            "Size of the stored cores before compression.",
            (Sample(found.core_bytes),),
        ),
        Family(
            "core_pipe_core_disk_bytes_total",
            "counter",
            "Disk space that the stored cores took when they came.",
            (Sample(found.disk_bytes),),
        ),
        Family(
            "core_pipe_dump_duration_seconds",
            "histogram",
            "Time from the offer of a core until it was read and its process let go.",
            _histogram(found),
        ),
    ]
    if found.last:
        families.append(
            Family(
                "core_pipe_last_crash_timestamp_seconds",
                "gauge",
                "When the last crash was counted, in seconds since the epoch.",
                (Sample(found.last),),
            )
        )
    return families


def _histogram(found: Counters) -> tuple[Sample, ...]:
    samples = []
    total = 0
    for most, number in zip((*counters.BUCKETS, None), found.seconds, strict=True):
        total += number
        samples.append(Sample(total, (("le", "+Inf" if most is None else _number(most)),), "_bucket"))
    return (*samples, Sample(found.seconds_sum, suffix="_sum"), Sample(total, suffix="_count"))


def held(store: Store, limits: Limits) -> list[Family]:
    """Return what a store holds now, and what it may hold. Raises OSError."""
    survey = Survey(store.directory)
    system = os.fstatvfs(store.directory)
    rows = (
        ("core_pipe_store_bytes", "Disk space that the cores in the store take.", survey.stored),
        ("core_pipe_store_writing_bytes", "Disk space that cores may take which are being written.", survey.promised),
        (
            "core_pipe_store_limit_bytes",
            "The most that all cores may take (store_max).",
            limits.store_max(system.f_blocks * system.f_frsize),
        ),
        ("core_pipe_store_cores", "Cores in the store.", len(survey.cores)),
        ("core_pipe_store_limit_cores", "The most cores that are kept (cores_max).", limits.cores_max),
        ("core_pipe_store_records", "Records in the store.", survey.records),
        ("core_pipe_store_limit_records", "The most records that are kept (records_max).", limits.records_max),
    )
    return [Family(name, "gauge", text, (Sample(value),)) for name, text, value in rows if value is not None]


def notified(store: Store) -> list[Family]:
    """Return how the callbacks fare, nothing where there are none. Raises OSError."""
    from receiver.notify import queue  # noqa: PLC0415 - who has no callbacks pays for none

    if queue.STATE not in store.names():
        return []
    try:
        found = queue.read(store.directory)
    except ValueError:
        # It is damaged, and its deliverer begins anew.
        found = None
    lines = found.lines if found is not None else {}

    def family(name: str, kind: str, text: str, value: Callable[[Line], int]) -> Family:
        samples = tuple(Sample(value(line), (("callback", callback),)) for callback, line in sorted(lines.items()))
        return Family(f"core_pipe_notify_{name}", kind, text, samples)

    return [
        family("delivered_total", "counter", "Crashes that a callback was told.", _counter("delivered")),
        family("failed_attempts_total", "counter", "Attempts to call back that failed.", _counter("failed")),
        family("given_up_total", "counter", "Crashes given up after a day of attempts.", _counter("given_up")),
        family("dropped_total", "counter", "Crashes that left the queue untold.", _counter("dropped")),
        family("waiting", "gauge", "Crashes that a callback is still to be told.", lambda line: len(line.waiting)),
    ]


def _counter(name: str) -> Callable[[Line], int]:
    return lambda line: line.counters[name]


def of_store(store: Store, found: Counters | None = None, limits: Limits | None = None) -> str:
    """Return all metrics of a store. found: what it has counted, when that is known. Raises OSError.

    limits: what it may hold, if not what it was opened with.
    """
    found = counters.load(store.directory) if found is None else found
    return render([*counted(found), *held(store, limits or store.limits), *notified(store)])


def write(path: str, store: Store, limits: Limits | None = None) -> None:
    """Write the metrics of a store to a file. limits: as for `of_store`. Raises OSError.

    Not under the store's lock, since the file may be on another, slower disk. So it is written again when somebody has
    counted meanwhile: whoever is the last finds nothing newer than what he wrote.
    """
    for _ in range(_ROUNDS):
        found = counters.load(store.directory)
        put(path, of_store(store, found, limits))
        if counters.load(store.directory).to_json() == found.to_json():
            return


def put(path: str, text: str) -> None:
    """Replace a file in one step: whoever reads it (node_exporter) finds the old one or the new one. Raises OSError."""
    directory, _, name = path.rpartition("/")
    at = os.open(directory or ".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    # Not *.prom: node_exporter reads those. Not to be guessed: the directory may be another user's.
    new = f".{name}.{os.urandom(8).hex()}.new"
    try:
        fd = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600, dir_fd=at)
        try:
            rest = memoryview(text.encode())
            while rest:
                rest = rest[os.write(fd, rest) :]
            # Whatever the umask: node_exporter is nobody, and there is nothing in it but numbers.
            os.fchmod(fd, 0o644)
            os.rename(new, name, src_dir_fd=at, dst_dir_fd=at)
        except BaseException:
            os.unlink(new, dir_fd=at)
            raise
        finally:
            os.close(fd)
    finally:
        os.close(at)
