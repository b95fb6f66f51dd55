"""One crash, many at once, and the memory that each part takes."""

from __future__ import annotations

import hashlib
import os
import subprocess
import tempfile
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from forwarder import staging
from forwarder.install import FLAGS
from tests.bench.ways import PIPE
from tests.support import crashers, mounts, processes, receivers
from tests.support.containers import PlainContainer
from tests.support.crash import start_crash
from tests.support.waiting import read_line, wait_until

if TYPE_CHECKING:
    from tests.bench.ways import Field, Way
    from tests.support.containers import Container

MIB, GIB = 1 << 20, 1 << 30
PATIENCE_SECONDS = 120.0
# A crash that is not over so long after the last one was is lost.
QUIET_SECONDS = 15.0

SPAWN = """
import os, sys, time
begun = time.monotonic_ns()
children = [os.spawnv(os.P_NOWAIT, sys.argv[2], [sys.argv[2], "SEGV"]) for _ in range(int(sys.argv[1]))]
for child in children:
    os.waitpid(child, 0)
print(begun, time.monotonic_ns())
"""


@dataclass(frozen=True)
class Kind:
    """What crashes. program: None for tests/crashers/crash.c."""

    key: str
    title: str
    arguments: tuple[str, ...]
    program: str | None = None


def kinds(*, quick: bool) -> list[Kind]:
    size = 32 * MIB if quick else 256 * MIB
    name = f"{size // MIB} MiB"
    sparse = 256 * MIB if quick else 2 * GIB
    return [
        Kind("small", "1 MiB", ("SEGV", "--wait", "--fill", str(MIB), "random")),
        Kind("random", f"{name} incompressible", ("SEGV", "--wait", "--fill", str(size), "random")),
        Kind("mixed", f"{name}, 3/4 zero pages", ("--wait", str(size)), compile_mixed()),
        Kind("zero", f"{name} zero", ("SEGV", "--wait", "--fill", str(size), "zero")),
        Kind(
            "sparse",
            f"{sparse // GIB or sparse // MIB} {'GiB' if sparse >= GIB else 'MiB'}, a page in 512 touched",
            ("SEGV", "--wait", "--sparse", str(sparse)),
        ),
    ]


def compile_mixed() -> str:
    """Compile mixed.c to where containers see it, and return its path."""
    source = Path(__file__).with_name("mixed.c")
    directory = Path(crashers.TOOLS, f"bench-{hashlib.sha256(source.read_bytes()).hexdigest()[:12]}")
    program = directory / "mixed"
    if not program.exists():
        directory.mkdir(parents=True, exist_ok=True)
        subprocess.run(["gcc", "-O1", "-g", "-Wall", "-o", f"{program}.new", str(source)], check=True, timeout=60)
        os.rename(f"{program}.new", program)
    return str(program)


@dataclass(frozen=True)
class Sample:
    """One crash. Milliseconds from just before the fault; complete_ms is None where nothing is kept."""

    reap_ms: float
    complete_ms: float | None
    stored_bytes: int


def once(way: Way, kind: Kind) -> Sample:
    """Crash one process. Raises RuntimeError when its core is not there."""
    way.empty()
    way.arm()
    with start_crash(way.container, *kind.arguments, crasher=kind.program) as crashing:
        crashing.go()
        end = crashing._process.reaped(PATIENCE_SECONDS)
        complete = None
        if way.keeps:
            wait_briefly(way, f"{way.title}: {kind.title}")
            complete = (time.monotonic_ns() - end["crash_ns"]) / 1e6
    stored = way.stored()
    if not os.WCOREDUMP(end["status"]) or (way.keeps and len(way.cores()) != 1):
        raise RuntimeError(f"{way.title}, {kind.title}: no core was kept: {os.listdir(way.directory)}")
    way.empty()
    return Sample((end["reaped_ns"] - end["crash_ns"]) / 1e6, complete, stored)


def wait_briefly(way: Way, what: str) -> None:
    """wait_until() with a shorter step."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not way.complete():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{what}: nothing complete: {os.listdir(way.directory)}")
        time.sleep(0.0005)


@dataclass(frozen=True)
class Storm:
    """Many at once. reap_s: until the last process was reaped. complete_s: until the last core was there."""

    count: int
    kept: int
    reap_s: float
    complete_s: float


def at_once(way: Way, count: int) -> Storm:
    way.empty()
    way.arm()
    command = ["python3", "-IS", "-c", SPAWN, str(count), crashers.compile_crasher("crash")]
    said = way.container.run(command, timeout=300, check=True).stdout
    begun, reaped = (int(word) for word in said.split())
    last, seen = time.monotonic_ns(), -1
    while way.keeps and seen < count and time.monotonic_ns() - last < QUIET_SECONDS * 1e9:
        if (now := way.complete()) != seen:
            last, seen = time.monotonic_ns(), now
        time.sleep(0.002)
    found = Storm(count, len(way.cores()), (reaped - begun) / 1e9, (max(last, reaped) - begun) / 1e9)
    way.empty()
    return found


# The stages of one crash by the pipe, as far as each of them goes: what `steps` measures, in the order of time.
STAGES = ("helper", "python", "modules", "connected", "offered", "passed", "read", "kept")


def steps(field: Field, kind: Kind, rounds: int) -> dict[str, list[float]]:
    """Return the milliseconds from just before the fault to each stage of a crash by the pipe, by STAGES.

    Three are helpers that end early, so their ends are looked at from outside: one that does nothing, an interpreter
    that does nothing, and the stub's launcher that goes no further than its imports. Three are told by a receiver that
    only reads; and two are the ends of crashes whose core was read, and kept.
    """
    forwarder = field.forwarders[PIPE]
    machine = forwarder.machine
    python = staging.interpreter()
    found: dict[str, list[float]] = {stage: [] for stage in STAGES}
    with PlainContainer() as container, tempfile.TemporaryDirectory(prefix="cp-", dir="/tmp") as directory:
        nothing, imports = os.path.join(directory, "nothing.py"), os.path.join(directory, "imports.py")
        Path(nothing).write_text("import posix\n\nposix._exit(0)\n", encoding="ascii")
        launcher = Path(forwarder.paths.runtime.launcher).read_text(encoding="utf-8")
        Path(imports).write_text(launcher.replace("status = main(SETTINGS)", "status = 0"), encoding="utf-8")
        helpers = {
            "helper": "|/bin/true",
            "python": f"|{python} {FLAGS} {nothing}",
            "modules": f"|{python} {FLAGS} {imports}",
        }
        command = [os.path.join(receivers.BIN, "python"), "-m", "tests.bench.reader", receivers.SOCKET, "--times"]
        reader = container.popen(command, env={"PYTHONPATH": mounts.CHECKOUT}, stdout=subprocess.PIPE)
        try:
            assert reader.stdout is not None
            says = reader.stdout.fileno()
            assert read_line(says, 20, "the reader listens") == b"ready\n"
            for number in range(rounds + 1):
                row = {}
                for stage, pattern in helpers.items():
                    field.ways[PIPE].arm()
                    machine.core_pattern = pattern
                    row[stage] = _reaped(container, kind)[1]
                field.ways[PIPE].arm()
                crashed, row["read"] = _reaped(container, kind)
                told = read_line(says, 20, "the reader has read").split()
                for stage, at in zip(("connected", "offered", "passed"), told, strict=True):
                    row[stage] = (int(at) - crashed) / 1e6
                row["kept"] = once(field.ways[PIPE], kind).reap_ms
                # The first round is for what comes from the disk.
                for stage, milliseconds in row.items():
                    if number:
                        found[stage].append(milliseconds)
        finally:
            reader.end()
    return found


def _reaped(container: Container, kind: Kind) -> tuple[int, float]:
    """Crash one process. Returns when it did (CLOCK_MONOTONIC, ns), and the milliseconds until it was reaped."""
    with start_crash(container, *kind.arguments, crasher=kind.program) as crashing:
        crashing.go()
        end = crashing._process.reaped(PATIENCE_SECONDS)
    return end["crash_ns"], (end["reaped_ns"] - end["crash_ns"]) / 1e6


def memory(field: Field, kind: Kind) -> dict[str, int]:
    """Return the most bytes that each part of ours had resident, shared libraries included (VmHWM)."""
    found: dict[str, int] = {}
    for name, pid in field.residents.items():
        # With what the worker that stands ready has of its own; one that still syncs a core is not idle.
        wait_until(partial(_is_idle, pid), PATIENCE_SECONDS, "the workers have ended")
        found[f"{name}, idle"] = _status(pid, "VmRSS") + sum(map(_private, processes.children(pid)))
    for ingress, forwarder in field.forwarders.items():
        if forwarder.service is not None:
            found["socket service, idle"] = _status(forwarder.service.pid, "VmRSS")
        for suffix in ("", "-none"):
            if (way := field.ways.get(ingress + suffix)) is not None:
                _watch(way, kind, field, found)
    return found


def _is_idle(receiver: int) -> bool:
    return not processes.serving(receiver)


def _watch(way: Way, kind: Kind, field: Field, found: dict[str, int]) -> None:
    """Look again and again while a core is taken."""
    suffix = "-none" if way.key.endswith("-none") else ""
    ingress = way.key.removesuffix("-none")
    service = field.forwarders[ingress].service
    parents = {field.residents[f"resident{suffix}"]: f"worker{suffix}"}
    if service is not None:
        parents[service.pid] = "socket service's process"
    launchers = [place.launcher.encode() for place in field.forwarders[ingress].paths.places]
    way.empty()
    way.arm()
    with start_crash(way.container, *kind.arguments, crasher=kind.program) as crashing:
        crashing.go()
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not way.complete() and time.monotonic() < deadline:
            for parent, name in parents.items():
                for child in processes.children(parent):
                    found[name] = max(found.get(name, 0), _status(child, "VmHWM"))
            for pid in processes.children(2):
                if any(launcher in _command_line(pid) for launcher in launchers):
                    found["stub"] = max(found.get("stub", 0), _status(pid, "VmHWM"))
            time.sleep(0.005)
    way.empty()


def _status(pid: int, name: str) -> int:
    try:
        text = Path(f"/proc/{pid}/status").read_text(encoding="utf-8", errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return 0
    lines = [line for line in text.split("\n") if line.startswith(f"{name}:")]
    return int(lines[0].split()[1]) * 1024 if lines else 0


def _private(pid: int) -> int:
    """Return the bytes that a process does not share with the one that it was forked from."""
    text = Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="ascii")
    return sum(int(line.split()[1]) * 1024 for line in text.split("\n") if line.startswith("Private_"))


def _command_line(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return b""
