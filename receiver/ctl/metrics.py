"""`corepipectl metrics`: the store's numbers for Prometheus, on standard output or in a file."""

from __future__ import annotations

import argparse
import os
import sys
import time
from typing import TYPE_CHECKING, Any

from receiver.ctl.output import EXIT_OK

if TYPE_CHECKING:
    from receiver.ctl.context import Context

EPILOG = """\
With the setting 'metrics' (receiver.toml) the file is written anew after each crash. Write it once by hand, and it is
there before the first one.

examples:
  corepipectl metrics                                                          what there is, as Prometheus reads it
  corepipectl metrics -o /var/lib/prometheus/node-exporter/core_pipe.prom      for node_exporter, in one step
"""


def add(commands: Any) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        "metrics",
        help="the store's numbers, for Prometheus",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("-o", "--output", metavar="FILE", help="replace this file (default: standard output)")
    parser.set_defaults(run=run)
    return parser


def run(context: Context) -> int:
    # Only this command needs them.
    from receiver import counters, metrics  # noqa: PLC0415

    if os.path.lexists(context.path):
        store = context.store()
        if context.options.output is not None:
            metrics.write(context.options.output, store)
            return EXIT_OK
        text = metrics.of_store(store)
    else:
        # The first crash makes the store: until then there is nothing but zeros.
        text = metrics.render(metrics.counted(counters.Counters(time.time())))
        if context.options.output is not None:
            metrics.put(context.options.output, text)
            return EXIT_OK
    sys.stdout.write(text)
    return EXIT_OK
