"""What debuggers say of a core: the frames of each of its threads, as text that can be compared."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

PYSTACK = os.path.join(os.path.dirname(sys.executable), "pystack")
_ENVIRONMENT = {"PATH": os.environ.get("PATH", "/usr/bin:/bin"), "HOME": "/nonexistent", "LANG": "C.UTF-8"}


def why_unavailable() -> str | None:
    missing = [name for name in ("gdb", "eu-stack", "readelf") if shutil.which(name) is None]
    if missing:
        return f"needs {' '.join(missing)}: apt-get install gdb elfutils binutils, or make setup"
    return None


def why_no_pystack() -> str | None:
    return None if os.path.exists(PYSTACK) else "needs pystack: make setup"


def _run(command: Sequence[str], timeout: float) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, capture_output=True, text=True, errors="replace", check=False, timeout=timeout, env=_ENVIRONMENT
    )


def _gdb(program: str, core: Path, commands: Sequence[str], timeout: float) -> subprocess.CompletedProcess[str]:
    arguments = [part for command in commands for part in ("-ex", command)]
    before = ["-iex", "set debuginfod enabled off", "-iex", "set width 0", "-iex", "set pagination off"]
    return _run(["gdb", "-nx", "-batch", *before, *arguments, program, str(core)], timeout)


def gdb(program: str, core: Path, *commands: str, timeout: float = 120) -> str:
    """All that gdb says, warnings too; nothing is asked of the network."""
    done = _gdb(program, core, commands, timeout)
    return done.stdout + done.stderr


def gdb_value(program: str, core: Path, expression: str) -> str:
    """The value of an expression in the innermost frame, or why gdb has none."""
    done = _gdb(program, core, [f"print {expression}"], 120)
    found = re.search(r"^\$1 = (.*)$", done.stdout, re.MULTILINE)
    return found[1] if found else done.stderr.strip().splitlines()[-1]


def gdb_backtraces(program: str, core: Path) -> str:
    """The frames of all threads by gdb: addresses, functions, simple arguments, lines of the source; the libraries."""
    said = gdb(program, core, "thread apply all bt -frame-arguments scalars", "info sharedlibrary")
    # What comes before is about the process. Whether gdb knows a thread's pthread_t, too, is no part of its frames.
    _, found, traces = said.partition("\nThread ")
    kept = [line for line in (found + traces).splitlines() if not re.match("warning: ", line, re.IGNORECASE)]
    return _without_path(re.sub(r"Thread 0x[0-9a-f]+ \((LWP \d+)\)", r"\1", "\n".join(kept)), core)


def eu_backtraces(program: str, core: Path) -> str:
    """The same by elfutils: addresses, functions, modules, build ids, lines of the source."""
    done = _run(["eu-stack", "-n", "0", "-m", "-b", "-s", f"--executable={program}", f"--core={core}"], 120)
    return _without_path(done.stdout + done.stderr, core)


def python_backtraces(program: str, core: Path) -> str:
    """The frames of all Python threads by pystack."""
    done = _run([PYSTACK, "--no-color", "core", str(core), program], 120)
    return _without_path(done.stdout + done.stderr, core)


def functions(gdb_said: str) -> dict[int, list[str]]:
    """The names of the functions on each thread's stack, the innermost first, by gdb's number of the thread."""
    found: dict[int, list[str]] = {}
    for line in gdb_said.splitlines():
        if thread := re.match(r"Thread (\d+) ", line):
            names = found.setdefault(int(thread[1]), [])
        elif frame := re.match(r"#\d+ +(?:0x[0-9a-f]+ in )?(<signal handler called>|\S+)", line):
            names.append(frame[1])
    return found


def _without_path(said: str, core: Path) -> str:
    lines = (line.rstrip() for line in said.replace(str(core), "CORE").splitlines())
    return "\n".join(line for line in lines if line)


def readelf_warnings(core: Path) -> str:
    """What readelf objects to."""
    done = _run(["readelf", "-W", "-h", "-l", "-n", str(core)], 60)
    objections = [line for line in done.stdout.splitlines() if re.search("warning|error|corrupt", line, re.IGNORECASE)]
    return "\n".join([done.stderr, *objections]).strip()


DEBUGGERS: dict[str, Callable[[str, Path], str]] = {
    "gdb": gdb_backtraces,
    "eu-stack": eu_backtraces,
    "pystack": python_backtraces,
}
