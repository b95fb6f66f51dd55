"""`corepipectl dump`: a core, as a plain ELF file."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Any

from receiver.ctl.matching import UsageProblem, newest_with_core
from receiver.ctl.output import EXIT_OK, left_out
from receiver.tables import shown

if TYPE_CHECKING:
    import argparse

    from receiver.ctl.context import Context
    from receiver.dump import Copied
    from receiver.record import Record


def add(commands: Any) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser("dump", help="write a core out, as a plain ELF core")
    parser.add_argument("match", metavar="MATCH", help="an id, a pid, a comm or a path; of several the newest")
    parser.add_argument("-o", "--output", metavar="FILE", help="write it there (default: standard output)")
    parser.set_defaults(run=run)
    return parser


def run(context: Context) -> int:
    # Only dump needs them.
    from receiver import dump  # noqa: PLC0415
    from receiver.stored import Damaged, StoredCore  # noqa: PLC0415

    options = context.options
    record, place = newest_with_core(context.sources, options.match)
    if options.output is None and sys.stdout.isatty():
        raise UsageProblem("a core is not for a terminal. Write it to a file with -o FILE, or into a pipe")
    source = place.open_core(record)
    try:
        core = StoredCore(source, record.core.compression)
        target = os.dup(sys.stdout.fileno()) if options.output is None else dump.open_output(options.output)
        try:
            copied = dump.copy(core, target, record.core.size_bytes)
        finally:
            os.close(target)
    except (Damaged, dump.ForeignFile) as error:
        raise UsageProblem(str(error)) from None
    finally:
        os.close(source)
    _say_damage(record, copied)
    if options.output is not None:
        print(f"{options.output}: {copied.size} bytes, {shown(record.core.state)}", file=sys.stderr)
        missing = left_out(record)
        if missing is not None:
            print(f"Left out: {missing}", file=sys.stderr)
        if record.exe:
            print(f"Open it with: gdb {shown(record.exe)} {options.output}", file=sys.stderr)
    return EXIT_OK


def _say_damage(record: Record, copied: Copied) -> None:
    """Raise UsageProblem with all that was wrong with a core that was written out as far as it could be."""
    size = record.core.size_bytes
    problems = [str(damage) for damage in copied.damage]
    if copied.damages > len(problems):
        problems.append(f"... and {copied.damages - len(problems)} more")
    if copied.too_much:
        problems.append(f"the stored core is damaged: it has more than the {size} bytes that its record says")
    elif copied.size != size:
        problems.append(f"the stored core is damaged: {copied.size} of {size} bytes")
    if problems:
        raise UsageProblem(
            "\n".join(problems) + ". What can be read was written, with zeros for what is damaged before its end"
        )
