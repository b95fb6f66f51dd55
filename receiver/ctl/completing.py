"""Words for a shell's completion that are looked up: crashes, containers, fields. See receiver/completion.py."""

from __future__ import annotations

from contextlib import closing
from itertools import islice
from typing import TYPE_CHECKING

from receiver import completion
from receiver.ctl.context import Context
from receiver.record import Record

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterator, Sequence

# The newest; reading them all would make a Tab in a full store slow.
_MAX_RECORDS = 500


def run(parser: argparse.ArgumentParser, arguments: Sequence[str]) -> int:
    """Print what can come next. arguments: those behind `__complete`. Returns the exit status."""
    return completion.answer(parser, arguments, {"MATCH": crashes, "NAME": containers, "FIELD": fields})


def crashes(given: argparse.Namespace, prefix: str) -> Iterator[tuple[str, str]]:
    """Yield what names a crash, the newest first: comm and pid, or its path or id when the word begins like one.

    Raises UsageProblem, StoreError, ConfigError, OSError.
    """
    records: list[Record] = []
    with closing(Context(given)) as context:
        for source in context.sources:
            records += source.records()[0]
    records.sort(key=lambda record: record.id, reverse=True)
    for record in islice(records, _MAX_RECORDS):
        about = f"{record.signal_name} {record.timestamp} {record.exe or record.comm}"
        if prefix.startswith("/"):
            if record.exe is not None:
                yield record.exe, about
            continue
        # A '/' makes a word a path, and a '=' makes it a field's.
        if not set("/=") & set(record.comm):
            yield record.comm, about
        if record.pid:
            yield str(record.pid), about
        if prefix[:1].isdigit():
            yield record.id, about
        if prefix and record.signature:
            yield record.signature, about


def fields(given: argparse.Namespace, prefix: str) -> Iterator[tuple[str, str]]:  # noqa: ARG001 - as every source
    """Yield the names of a record's fields."""
    yield from Record.__annotations__.items()


def containers(given: argparse.Namespace, prefix: str) -> Iterator[tuple[str, str]]:  # noqa: ARG001 - as every source
    """Yield the names of the host's containers, with the engine in front when the word begins like one."""
    from receiver.ctl.containers import find  # noqa: PLC0415 - what looks into containers is large

    places = find()
    try:
        for place in places:
            engine, _, name = place.name.partition(":")
            yield name or place.name, f"{engine}, pid {place.pid}"
            if prefix:
                yield place.name, f"pid {place.pid}"
    finally:
        for place in places:
            place.close()
