"""`python -m tests.bench`: measure everything in one interleaved run, and write docs/performance.md and .svg.

Each round measures every way once, in another order each time: what else the machine does meets all of them.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

from tests.bench import measure, report
from tests.bench.report import ORDER, Results
from tests.bench.ways import PIPE, SOCKET, TITLES, Field
from tests.support import machine
from tests.support.containers import PlainContainer
from tests.support.mounts import CHECKOUT

# By kind of crash: rounds, and rounds of a quick run.
ROUNDS = {"small": (31, 6), "random": (9, 3), "mixed": (9, 3), "zero": (9, 3), "sparse": (5, 3)}
AT_ONCE = ((32, 200), (8, 32))
STORM_ROUNDS = (3, 1)
# Ways whose storms say something of their own.
NO_STORM = frozenset({"pipe-host", "pipe-systemd", "pipe-discard", "socket-discard"})


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="small and few, to try it; writes into a folder in /tmp")
    parser.add_argument("--out", type=Path, metavar="DIR", help="where to write (default: docs)")
    parser.add_argument("--only", nargs="+", default=[], choices=ORDER, metavar="WAY", help=f"of {', '.join(ORDER)}")
    parser.add_argument("--kinds", nargs="+", default=list(ROUNDS), choices=list(ROUNDS), metavar="KIND")
    parser.add_argument(
        "--rounds", type=int, default=999, metavar="N", help="at most so many (and one that is not counted)"
    )
    parser.add_argument("--no-storms", action="store_true", help="none of the many at once")
    parser.add_argument("--store", default="/var/tmp", metavar="DIR", help="where all cores go meanwhile (%(default)s)")
    found = parser.parse_args()
    if why := machine.why_unavailable() or PlainContainer.why_unavailable():
        print(why, file=sys.stderr)
        return 1
    # The machine's settings and the peers must be given back then, too.
    signal.signal(signal.SIGTERM, lambda number, _frame: sys.exit(128 + number))
    out = found.out or (Path(tempfile.mkdtemp(prefix="core_pipe-bench-")) if found.quick else Path(CHECKOUT, "docs"))
    kinds = [kind for kind in measure.kinds(quick=found.quick) if kind.key in found.kinds]
    results = Results(kinds, found.quick)
    base = Path(tempfile.mkdtemp(prefix="core_pipe-bench-", dir=found.store))
    base.chmod(0o755)
    results.where = f"{_file_system(base)} in {found.store}"
    try:
        with Field(base, only=frozenset(found.only)) as field:
            results.missing.update(field.missing)
            run(field, results, rounds=found.rounds, storms=not found.no_storms)
    finally:
        shutil.rmtree(base, ignore_errors=True)
    out.mkdir(parents=True, exist_ok=True)
    (out / "performance.md").write_text(report.document(results), encoding="utf-8")
    try:
        report.picture(results, out / "performance.svg")
    except ImportError as error:
        print(f"no picture: {error}. Install it: .venv/bin/python -m pip install -e '.[bench]'", file=sys.stderr)
    for target in report.targets(results):
        value = "" if target.value is None else f"{report.shown(target.value)}{target.unit}"
        limit = f"{report.shown(target.limit)}{target.unit}"
        print(f"{target.verdict.strip('*'):13} {value:>10} (at most {limit})  {target.text}")
    print(f"written: {out}/performance.md")
    return 0


def run(field: Field, results: Results, *, rounds: int, storms: bool) -> None:
    for kind in results.kinds:
        for number in range(min(rounds + 1, ROUNDS[kind.key][results.quick])):
            for key in _turned(list(field.ways), number):
                # A broken way costs its own rows, not the others'.
                try:
                    sample = measure.once(field.ways[key], kind)
                except (RuntimeError, TimeoutError, OSError) as error:
                    _failed(results, f"{TITLES[key]}, {kind.title}: {error}")
                    continue
                # The first round is for what comes from the disk, and for what each way does but once.
                if number:
                    results.samples.setdefault((kind.key, key), []).append(sample)
        _tell(results, kind.title)
    if PIPE in field.ways and (small := [kind for kind in results.kinds if kind.key == "small"]):
        try:
            results.steps = measure.steps(field, small[0], min(rounds, ROUNDS["small"][results.quick]))
        except (RuntimeError, TimeoutError, OSError) as error:
            _failed(results, f"what each millisecond is: {error}")
        _tell(results, "what each millisecond is")
    if any(kind.key == "random" for kind in results.kinds) and {PIPE, SOCKET} & field.ways.keys():
        results.memory = measure.memory(field, next(kind for kind in results.kinds if kind.key == "random"))
    if not storms:
        return
    for count in AT_ONCE[results.quick]:
        for number in range(min(rounds, STORM_ROUNDS[results.quick])):
            for key in _turned([key for key in field.ways if key not in NO_STORM], number):
                try:
                    storm = measure.at_once(field.ways[key], count)
                except (RuntimeError, TimeoutError, OSError) as error:
                    _failed(results, f"{TITLES[key]}, {count} at once: {error}")
                    continue
                results.storms.setdefault((count, key), []).append(storm)
        _tell(results, f"{count} at once")


def _turned(keys: list[str], number: int) -> list[str]:
    at = number % len(keys)
    return keys[at:] + keys[:at]


def _failed(results: Results, line: str) -> None:
    print(line, file=sys.stderr)
    if len(results.failed) < 50:
        results.failed.append(line)


def _tell(results: Results, what: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {what}: done, {len(results.failed)} failed so far", file=sys.stderr)


def _file_system(path: Path) -> str:
    device = os.stat(path).st_dev
    name = f"{os.major(device)}:{os.minor(device)}"
    with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as file:
        for line in file:
            if line.split(" ")[2] == name:
                return line.partition(" - ")[2].split(" ")[0]
    return "a file system"


if __name__ == "__main__":
    sys.exit(main())
