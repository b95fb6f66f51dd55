"""`corepipectl dump`: a core, as a plain ELF file."""

from __future__ import annotations

import argparse
import os
import sys
from typing import TYPE_CHECKING, Any

from receiver.ctl.arguments import add_matches, add_options, limits_of
from receiver.ctl.matching import UsageProblem, newest_with_core
from receiver.ctl.output import EXIT_OK, left_out
from receiver.ctl.progress import Progress
from receiver.tables import shown

if TYPE_CHECKING:
    from receiver.ctl.context import Context
    from receiver.dump import Copied
    from receiver.record import Record

EPILOG = """\
Of several crashes it is the newest that has a core. Zeros become holes, and only you may read the file.

examples:
  corepipectl dump webshop -o core       for: gdb PROGRAM core
  corepipectl dump 4711 | zstd >core.zst
"""


def add(commands: Any) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        "dump",
        help="write a core out, as a plain ELF core",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_matches(parser)
    add_options(parser, "output range quiet")
    parser.set_defaults(run=run)
    return parser


def run(context: Context) -> int:
    # Only dump needs them.
    from receiver import dump  # noqa: PLC0415
    from receiver.stored import Damaged, StoredCore  # noqa: PLC0415

    options = context.options
    record, place = newest_with_core(context.sources, options.match, **limits_of(options))
    if options.output is None and sys.stdout.isatty():
        raise UsageProblem("refusing to dump core to tty (use shell redirection or specify --output)")
    source = place.open_core(record)
    try:
        core = StoredCore(source, record.core.compression)
        target = os.dup(sys.stdout.fileno()) if options.output is None else dump.open_output(options.output)
        try:
            with Progress("dump", record.core.size_bytes) as progress:
                copied = dump.copy(core, target, record.core.size_bytes, progress)
        finally:
            os.close(target)
    except (Damaged, dump.ForeignFile) as error:
        raise UsageProblem(str(error)) from None
    finally:
        os.close(source)
    damage = damage_of(record, copied)
    if damage is not None:
        raise UsageProblem(f"{damage}. What can be read was written, with zeros for what is damaged before its end")
    if options.output is not None and not options.quiet:
        print(f"{options.output}: {copied.size} bytes, {shown(record.core.state)}", file=sys.stderr)
        missing = left_out(record)
        if missing is not None:
            print(f"Left out: {missing}", file=sys.stderr)
        if record.exe:
            print(f"Open it with: gdb {shown(record.exe)} {options.output}", file=sys.stderr)
    return EXIT_OK


def damage_of(record: Record, copied: Copied) -> str | None:
    """Return all that was wrong with a core that was written out as far as it could be, None when nothing was."""
    size = record.core.size_bytes
    problems = [str(damage) for damage in copied.damage]
    if copied.damages > len(problems):
        problems.append(f"... and {copied.damages - len(problems)} more")
    if copied.too_much:
        problems.append(f"the stored core is damaged: it has more than the {size} bytes that its record says")
    elif copied.size != size:
        problems.append(f"the stored core is damaged: {copied.size} of {size} bytes")
    return "\n".join(problems) or None
