"""`make measure`: what cores take in the store, whole and reduced, and what debuggers still answer, as a table.

Each program crashes once; the process is held, and receivers with different settings get the same core.
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from tests.support import debuggers, machine
from tests.support.patients import BALLAST, PYTHON, held_crash, patient, plugins

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.support.patients import Held, Landed

MIB, GIB = 1 << 20, 1 << 30
SETTINGS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("whole, `compression = 'none'`", {"compression": "none"}),
    ("whole", {}),
    ("`keep = 'stacks'`", {"keep": "stacks"}),
    *((f"`keep = '{size}M'`", {"keep": f"{size}M"}) for size in (4, 16, 64)),
)
YES, NO = "yes", "no"


class Program(NamedTuple):
    """What crashes. questions: what its cores are asked, by (program, core); one answers as the whole core, or not."""

    title: str
    argv: list[str]
    questions: dict[str, Callable[[str, Path], str]]


def _value(expression: str) -> Callable[[str, Path], str]:
    return lambda program, core: debuggers.gdb_value(program, core, expression)


def _crashed_thread(program: str, core: Path) -> str:
    return debuggers.gdb(program, core, "bt").partition("#1")[2]


COMMON: dict[str, Callable[[str, Path], str]] = {"all frames": debuggers.gdb_backtraces}
IN_C = COMMON | {
    "what frames point to": _value("*story->earlier"),
    "globals": _value("initialised"),
    "the rest": _value("ballast[ballast_size / 2]"),
}


def programs() -> list[Program]:
    c = [patient("-O2"), "--threads", "16", "--ballast", str(256 * MIB)]
    libraries = plugins(100)
    jvm = [patient("-O2"), "--threads", "40", "--sparse", str(4 * GIB), "--ballast", str(64 * MIB)]
    return [
        Program(
            "C: 16 threads, 5 libraries by `dlopen()`, 256 MiB that do not compress",
            [*c, *(word for path in libraries[:5] for word in ("--plugin", path))],
            IN_C,
        ),
        Program(
            "Python: 8 threads, 200 MiB of objects",
            [PYTHON, BALLAST, "8", str(200 * MIB)],
            COMMON | {"Python frames": debuggers.python_backtraces},
        ),
        Program(
            "like a JVM: 40 threads, 100 libraries, 4 GiB with one page in 512 touched, 64 MiB that do not compress",
            [*jvm, *(word for path in libraries for word in ("--library", path))],
            IN_C,
        ),
    ]


def _size(number: int) -> str:
    for unit, name in ((GIB, "GiB"), (MIB, "MiB"), (1 << 10, "KiB")):
        if number >= unit:
            return f"{number / unit:.1f} {name}"
    return f"{number} B"


def _row(program: Program, held: Held, answers: dict[str, str], setting: str, landed: Landed) -> list[str]:
    core = landed.record["core"]
    answered = [
        question for question, ask in program.questions.items() if ask(held.program, landed.core) == answers[question]
    ]
    return [
        setting,
        _size(core["size_bytes"]),
        _size(core["stored_bytes"]),
        f"{landed.record['seconds']:.1f} s",
        ", ".join(answered) or "nothing",
    ]


def measure(program: Program) -> list[list[str]]:
    rows = []
    with tempfile.TemporaryDirectory(dir="/tmp") as directory, held_crash(program.argv) as held:
        answers = {question: ask(held.program, held.whole) for question, ask in program.questions.items()}
        for number, (setting, settings) in enumerate(SETTINGS):
            landed = held.reduce(Path(directory, str(number)), **settings)
            rows.append(_row(program, held, answers, setting, landed))
            landed.core.unlink()
            print(f"{program.title}: {setting}: {landed.record['core']}", file=sys.stderr)
    return rows


def main() -> int:
    why = machine.why_unavailable() or debuggers.why_unavailable() or debuggers.why_no_pystack()
    if why:
        print(why, file=sys.stderr)
        return 1
    print(f"| What crashed | Setting | Core | On disk | Seconds | Answered as from the whole core |\n|{'---|' * 6}")
    for program in programs():
        for number, row in enumerate(measure(program)):
            print("|", " | ".join(["" if number else program.title, *row]), "|", flush=True)
    system = os.uname()
    print(f"\nMeasured with {os.cpu_count()} processors, Linux {system.release}, {system.machine}.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
