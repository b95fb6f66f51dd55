"""corepipectl: list, show and take out the crashes in a store."""

from __future__ import annotations

import argparse
import io
import json
import os
import stat
import sys
from typing import TYPE_CHECKING, Any

from receiver import __version__
from receiver.config import ConfigError, load
from receiver.log import quiet_pipe
from receiver.store import Store, StoreError, write_all

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from receiver.record import Record

EXIT_OK = 0
# coredumpctl(1): "0 is returned; otherwise a non-zero failure code. Not finding any matching core dumps is failure."
EXIT_FAILURE = 1
CHUNK = 1 << 20

EPILOG = """\
MATCH is an id (or its beginning), a pid, a comm, or the path of an executable (any word with a '/').

examples:
  corepipectl list                     all crashes, the newest last
  corepipectl info 4711                everything about the newest crash of pid 4711
  corepipectl info myprogram --json    the same as JSON
  corepipectl dump myprogram -o core   its newest core, plain ELF, for: gdb PROGRAM core
"""


class UsageProblem(Exception):
    """Something the user can mend; the text says how."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program. Returns its exit status."""
    found = _parser().parse_args(arguments)
    # A terminal that cannot show a character is no reason to show nothing.
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        with quiet_pipe():
            path = found.store or load().store
            if found.run is _list and not os.path.lexists(path):
                # Nothing has crashed here yet: the first crash makes the store.
                return _show_list([], found)
            store = Store(path, create=False)
            _recover(store)
            return int(found.run(store, found))
    except (UsageProblem, StoreError, ConfigError) as error:
        print(f"corepipectl: {error}", file=sys.stderr)
    except OSError as error:
        print(f"corepipectl: {error.filename or ''}: {error.strerror}", file=sys.stderr)
    return EXIT_FAILURE


def _recover(store: Store) -> None:
    """Finish what a receiver left that ended with its container; for who may not, it waits for the next receiver."""
    if os.geteuid() == 0:
        try:
            store.recover()
        except (OSError, StoreError):
            # A read-only store, or one of another root's: what is visible is shown all the same.
            pass


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="corepipectl",
        description="Shows the crashes that core_pipe has kept, and takes their cores out.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"core_pipe {__version__}")
    parser.add_argument("--store", metavar="DIR", help="the store (default: the receiver's setting, see receiver.toml)")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    parser.set_defaults(run=_list, json=False, match=None)
    listing = commands.add_parser("list", help="a line for each crash (the default)")
    info = commands.add_parser("info", help="everything about one crash")
    dump = commands.add_parser("dump", help="write a core out, as a plain ELF core")
    for command in (listing, info):
        command.add_argument("--json", action="store_true", help="as JSON, for programs")
    listing.add_argument("match", nargs="?", metavar="MATCH", help="only these")
    for command in (info, dump):
        command.add_argument("match", metavar="MATCH", help="an id, a pid, a comm or a path; of several the newest")
    dump.add_argument("-o", "--output", metavar="FILE", help="write it there (default: standard output)")
    listing.set_defaults(run=_list)
    info.set_defaults(run=_info)
    dump.set_defaults(run=_dump)
    return parser


def matches(record: Record, match: str) -> bool:
    """Whether a record is meant by a MATCH."""
    if "/" in match:
        return record.exe in (match, f"{match} (deleted)")
    return match in (str(record.pid), record.comm) or (len(match) >= 8 and record.id.startswith(match))


def _records(store: Store, match: str | None) -> list[Record]:
    found = []
    unreadable = 0
    for _, record in store.records():
        if record is None:
            unreadable += 1
        elif match is None or matches(record, match):
            found.append(record)
    if unreadable:
        # For an ordinary user every other user's, so one line for all of them.
        print(f"corepipectl: {unreadable} more cannot be read as records, or not by you", file=sys.stderr)
    return found


def _newest(store: Store, match: str) -> Record:
    found = _records(store, match)
    if not found:
        raise UsageProblem(f"no crash matches '{match}'. 'corepipectl list' shows what there is")
    return found[-1]


def _shown(value: object) -> str:
    """A value for a terminal: what a crashed program named itself must not move the cursor."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in str(value))


def _size(number: int) -> str:
    size = float(number)
    for unit in ("B", "K", "M", "G", "T"):
        if size < 1024 or unit == "T":
            return f"{size:.0f}{unit}" if unit == "B" or size >= 100 else f"{size:.1f}{unit}"
        size /= 1024
    raise AssertionError


def _print_json(value: Any) -> None:
    print(json.dumps(value, indent=2))


def _list(store: Store, found: argparse.Namespace) -> int:
    return _show_list(_records(store, found.match), found)


def _show_list(records: list[Record], found: argparse.Namespace) -> int:
    if found.json:
        _print_json([record.to_json() for record in records])
        return EXIT_OK if records or found.match is None else EXIT_FAILURE
    if not records:
        print("No crashes found.", file=sys.stderr)
        return EXIT_FAILURE
    rows: list[tuple[str, ...]] = [("TIME", "PID", "UID", "GID", "SIG", "CORE", "EXE", "SIZE", "ID")]
    for record in records:
        row = (
            record.timestamp.replace("T", " ").replace("Z", " UTC"),
            record.pid,
            record.uid,
            record.gid,
            record.signal_name,
            record.core.state,
            record.exe or record.comm,
            _size(record.core.stored_bytes) if record.core.path else "-",
            record.id,
        )
        rows.append(tuple(_shown(cell) for cell in row))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    right = {1, 2, 3, 7}
    for line in rows:
        cells = (
            cell.rjust(width) if column in right else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        print(" ".join(cells).rstrip())
    return EXIT_OK


def _info(store: Store, found: argparse.Namespace) -> int:
    record = _newest(store, found.match)
    if found.json:
        _print_json(record.to_json())
        return EXIT_OK
    core = record.core
    rows: list[tuple[str, object]] = [
        ("ID", record.id),
        ("PID", f"{record.pid} ({record.comm})" if record.pid == record.tid else f"{record.pid}, thread {record.tid}"),
        ("UID", record.uid if record.euid in (None, record.uid) else f"{record.uid}, effective {record.euid}"),
        ("GID", record.gid if record.egid in (None, record.gid) else f"{record.gid}, effective {record.egid}"),
        ("Signal", f"{record.signal} ({record.signal_name})"),
        ("Timestamp", record.timestamp),
        ("Command Line", " ".join(record.command_line) if record.command_line else None),
        ("Executable", record.exe),
        ("Comm", record.comm),
        ("Directory", record.cwd),
        ("Root", record.root),
        ("Control Group", record.cgroup),
        ("Host Name", record.host_name),
        ("Core", core.state + (f": {core.reason}" if core.reason else "")),
        ("Storage", core.path),
        ("Size", f"{_size(core.size_bytes)}, {_size(core.stored_bytes)} on disk" if core.path else None),
    ]
    for label, value in rows:
        if value is not None:
            print(f"{label:>14}: {_shown(value)}")
    for tried in record.tried:
        print(f"{'Not taken by':>14}: {_shown(tried)}")
    for name, value in (record.environment or {}).items():
        print(f"{'Environment':>14}: {_shown(name)}={_shown(value)}")
    return EXIT_OK


def _dump(store: Store, found: argparse.Namespace) -> int:
    record = _newest_with_core(store, found.match)
    if found.output is None and sys.stdout.isatty():
        raise UsageProblem("a core is not for a terminal. Write it to a file with -o FILE, or into a pipe")
    source = store.open_core(record)
    try:
        target = os.dup(sys.stdout.fileno()) if found.output is None else _open_output(found.output)
        try:
            size = _copy_plain(source, target, compressed=record.core.compression != "none")
        finally:
            os.close(target)
    finally:
        os.close(source)
    if size != record.core.size_bytes:
        # A frame that is cut is no error to zstandard.
        raise UsageProblem(
            f"the stored core is damaged: {size} of {record.core.size_bytes} bytes. What was written is all there is"
        )
    if found.output is not None:
        print(f"{found.output}: {size} bytes, {record.core.state}", file=sys.stderr)
        if record.exe:
            print(f"Open it with: gdb {_shown(record.exe)} {found.output}", file=sys.stderr)
    return EXIT_OK


def _open_output(path: str) -> int:
    """Open a file for a core, which holds secrets: not through somebody's link, and for nobody else to read."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        found = os.fstat(fd)
        if stat.S_ISREG(found.st_mode):
            if found.st_uid != os.geteuid():
                raise UsageProblem(
                    f"{path}: belongs to uid {found.st_uid}, who could read the core. Remove it, or name another file"
                )
            os.fchmod(fd, 0o600)
            os.ftruncate(fd, 0)
    except BaseException:
        os.close(fd)
        raise
    return fd


def _newest_with_core(store: Store, match: str) -> Record:
    """Return the newest match that has a core. Raises UsageProblem with the newest one's reason when none has."""
    found = _records(store, match)
    for record in reversed(found):
        if record.core.path is not None:
            return record
    newest = _newest(store, match)
    raise UsageProblem(
        f"crash {_shown(newest.id)} has no core: {_shown(newest.core.reason or 'no reason is recorded')}"
    )


def _copy_plain(source: int, target: int, *, compressed: bool) -> int:
    """Write the plain core; blocks of zeros become holes where the target can have them. Returns its size in bytes."""
    from receiver.capture import write_sparse  # noqa: PLC0415 - only dump needs it

    seekable = _is_empty_file(target)
    size = 0
    for block in _plain_blocks(source, compressed=compressed):
        if seekable:
            write_sparse(target, memoryview(block), size)
        else:
            write_all(target, block)
        size += len(block)
    if seekable:
        os.ftruncate(target, size)
    return size


def _is_empty_file(fd: int) -> bool:
    return stat.S_ISREG(os.fstat(fd).st_mode) and os.lseek(fd, 0, os.SEEK_CUR) == 0


def _plain_blocks(source: int, *, compressed: bool) -> Iterator[bytes]:
    with os.fdopen(os.dup(source), "rb", buffering=0) as file:
        if not compressed:
            while block := file.read(CHUNK):
                yield block
            return
        import zstandard  # noqa: PLC0415

        try:
            yield from zstandard.ZstdDecompressor().read_to_iter(file, write_size=CHUNK)
        except zstandard.ZstdError as error:
            raise UsageProblem(
                f"the stored core is damaged ({error}). What was written so far is all there is"
            ) from None
