"""What was measured, as a table, a verdict on each target, and a picture."""

from __future__ import annotations

import importlib
import os
import statistics
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from tests.bench.ways import KERNEL, PEER, PIPE, PIPE_DISCARD, SOCKET, SOCKET_DISCARD, TITLES

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.bench.measure import Kind, Sample, Storm

MIB = 1 << 20
ORDER = tuple(TITLES)
COLOURS = {"kernel": "#7f7f7f", "systemd": "#d08770", "socket": "#2a6f97", "pipe": "#61a5c2"}
# `measure.STAGES`: what the step before each is, and why it takes what it takes.
STAGES = {
    "helper": """the kernel's own: stopping the process's threads and starting a helper, here `/bin/true`, which does
  nothing.""",
    "python": """an interpreter: `python3 -IBS` that ends at once. Its libraries, its built-in types, the search for its
  own files, its codecs: nothing of it is ours, and no option makes it shorter. The kernel's socket is the way around
  it.""",
    "modules": """the stub's modules: one file of compiled code, and those C modules that are built into Python.""",
    "connected": """the way to the receiver: who crashed, by descriptors that cannot become another's; its container's
  share of the kernel's slots; which receivers may have the core; and a process apart that walks to the socket, so that
  a file system which never answers holds nobody. To start that process is half of this step.""",
    "offered": """the offer: who listens there, the crashed process's environment (which the process apart reads
  meanwhile), and the last look at its identity.""",
    "passed": """the answer: the receiver's acceptance, a note of it, and the descriptor on its way.""",
    "read": """reading: the kernel's dump through the pipe, by a receiver that does nothing else, until the reap.""",
    "kept": """keeping: what our own receiver does more, a process of its own without capabilities, its checks, what
  it makes of the core, and the file.""",
}
# Those of which a reader has to know that nothing is kept.
DISCARDS = (SOCKET_DISCARD, PIPE_DISCARD)


@dataclass
class Results:
    """Everything of one run. samples: by kind and way. storms: by count and way. memory: bytes, by part."""

    kinds: list[Kind]
    quick: bool
    samples: dict[tuple[str, str], list[Sample]] = field(default_factory=dict)
    storms: dict[tuple[int, str], list[Storm]] = field(default_factory=dict)
    # Milliseconds from the crash to each of STAGES, a number for each round.
    steps: dict[str, list[float]] = field(default_factory=dict)
    memory: dict[str, int] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)
    failed: list[str] = field(default_factory=list)
    where: str = ""

    def reap(self, kind: str, way: str) -> float | None:
        """Median milliseconds from crash to reap."""
        found = self.samples.get((kind, way))
        return statistics.median(sample.reap_ms for sample in found) if found else None

    def storm_seconds(self, count: int, way: str) -> float | None:
        found = self.storms.get((count, way))
        return statistics.median(storm.complete_s for storm in found) if found else None


@dataclass(frozen=True)
class Target:
    """What was promised. value: what came out, None when it was not measured."""

    text: str
    value: float | None
    limit: float
    unit: str = ""

    @property
    def verdict(self) -> str:
        if self.value is None:
            return "not measured"
        return "reached" if self.value <= self.limit else "**not reached**"


def ratio(one: float | None, other: float | None) -> float | None:
    return None if one is None or not other else one / other


def targets(results: Results) -> list[Target]:
    reap = results.reap
    small = {way: reap("small", way) for way in (SOCKET, PIPE, PEER, KERNEL)}
    found = [
        Target("1 MiB by the socket, against the kernel's file", ratio(small[SOCKET], small[KERNEL]), 2, "x"),
        Target("1 MiB by the socket, against systemd-coredump", ratio(small[SOCKET], small[PEER]), 1 / 20, "x"),
        Target("1 MiB by the pipe, against systemd-coredump", ratio(small[PIPE], small[PEER]), 1 / 4, "x"),
    ]
    for way, name, discard in ((PIPE, "pipe", PIPE_DISCARD), (SOCKET, "socket", SOCKET_DISCARD)):
        random, zero = reap("random", way), reap("zero", way)
        stored = results.samples.get(("zero", way))
        largest = max(sample.stored_bytes for sample in stored) / MIB if stored else None
        storms = [storm for (_, key), many in results.storms.items() for storm in many if key == way]
        lost = float(sum(storm.count - storm.kept for storm in storms)) if storms else None
        most = max((count for count, key in results.storms if key == way), default=0)
        seconds = ratio(results.storm_seconds(most, way), results.storm_seconds(most, KERNEL))
        kernel = f"by the {name}, against the kernel's file"
        found += [
            Target(f"incompressible {kernel}", ratio(random, reap("random", KERNEL)), 0.75, "x"),
            Target(
                f"incompressible by the {name}, against reading alone", ratio(random, reap("random", discard)), 1.3, "x"
            ),
            Target(f"zeros {kernel}", ratio(zero, reap("zero", KERNEL)), 0.6, "x"),
            Target(f"zeros by the {name}, on disk", largest, 1, " MiB"),
            Target(f"cores lost of those at once, by the {name}", lost, 0),
            Target(f"{most or 'many'} at once {kernel}s", seconds, 2, "x"),
        ]
    for part, limit in {"stub": 12, "worker": 32, "resident, idle": 16}.items():
        size = results.memory.get(part)
        found.append(Target(f"memory: {part}", size / MIB if size else None, limit, " MiB"))
    return found


def quartiles(values: list[float]) -> tuple[float, float, float]:
    if len(values) < 2:
        return values[0], values[0], values[0]
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


def spread(values: list[float]) -> str:
    low, middle, high = quartiles(values)
    return f"{shown(middle)} ({shown(low)} to {shown(high)})"


def _place(item: tuple[tuple[int, str], list[Storm]]) -> tuple[int, int]:
    (count, way), _ = item
    return count, ORDER.index(way)


def shown(number: float) -> str:
    """Two or three digits that mean something."""
    return f"{number:.0f}" if number >= 100 else f"{number:.1f}" if number >= 1 else f"{number:.2f}"


def size_of(number: float) -> str:
    return f"{shown(number / MIB)} MiB" if number >= MIB / 10 else f"{number / 1024:.0f} KiB"


def table(head: list[str], rows: list[list[str]]) -> Iterator[str]:
    yield "| " + " | ".join(head) + " |"
    yield "|---|" + "---:|" * (len(head) - 1)
    for row in rows:
        yield "| " + " | ".join(row) + " |"
    yield ""


def machine() -> str:
    system = os.uname()
    model, memory = system.machine, 0.0
    with open("/proc/cpuinfo", encoding="utf-8") as file:
        for line in file:
            if line.startswith("model name"):
                model = line.partition(":")[2].strip()
                break
    with open("/proc/meminfo", encoding="ascii") as file:
        memory = int(file.readline().split()[1]) / (1 << 20)
    name = ""
    with open("/etc/os-release", encoding="utf-8") as file:
        for line in file:
            if line.startswith("PRETTY_NAME="):
                name = line.partition("=")[2].strip().strip('"')
    release = system.release.split("-")[0]
    return f"{os.cpu_count()} processors ({model}), {memory:.0f} GiB of memory, Linux {release}, {name}"


def document(results: Results) -> str:
    lines = [
        "# Performance",
        "",
        "<!-- Written by `make bench`: change tests/bench/report.py instead. -->",
        "",
        "How long a process waits in the kernel when it crashes, and what keeping its core costs. Absolute times are",
        "this machine's; what counts is how the rows of a table compare: each round measured all of them in turn.",
        "",
        "![Time from crash to reap, by way and size](performance.svg)",
        "",
        f"Measured on {machine()}; every way writes to the same file system, {results.where}.",
        "Crashes are in a container without systemd and with a resident receiver, unless a row says otherwise.",
        "",
    ]
    if results.quick:
        lines += ["**A trial run (`--quick`): small sizes, few rounds. No figure here means anything.**", ""]
    lines += ["## What was promised", ""]
    rows = [
        [
            target.text,
            "" if target.value is None else f"{shown(target.value)}{target.unit}",
            f"{shown(target.limit)}{target.unit}",
            target.verdict,
        ]
        for target in targets(results)
    ]
    lines += [*table(["Target", "Measured", "At most", "Verdict"], rows)]
    lines += [
        "## One crash",
        "",
        "Milliseconds from just before the fault: until the process was reaped, which is when a supervisor can restart",
        "it; and until its core was complete (this project: its record visible, both on the disk; systemd-coredump:",
        "its file, synced; the kernel does not sync). Medians, and the middle half in brackets.",
        "",
    ]
    for kind in results.kinds:
        rows = []
        for way in ORDER:
            samples = results.samples.get((kind.key, way))
            if not samples:
                continue
            done = [sample.complete_ms for sample in samples if sample.complete_ms is not None]
            stored = statistics.median(sample.stored_bytes for sample in samples)
            against = ratio(results.reap(kind.key, way), results.reap(kind.key, KERNEL))
            rows.append(
                [
                    TITLES[way],
                    spread([sample.reap_ms for sample in samples]),
                    "" if against is None else f"{shown(against)}x",
                    spread(done) if done else "",
                    "" if way in DISCARDS else size_of(stored),
                ]
            )
        lines += [f"### {kind.title}", ""]
        lines += [*table(["Way", "Crash to reap, ms", "Kernel's file = 1", "Crash to complete, ms", "On disk"], rows)]
    lines += steps(results)
    lines += [
        "## Many at once",
        "",
        "Small programs of one container that crash together: until the last was reaped, and the last core complete.",
        "",
    ]
    rows = []
    for (count, way), storms in sorted(results.storms.items(), key=_place):
        kept = min(storm.kept for storm in storms)
        rows.append(
            [
                f"{count}: {TITLES[way]}",
                "" if way in DISCARDS else f"{kept}",
                spread([storm.reap_s for storm in storms]),
                spread([storm.complete_s for storm in storms]),
            ]
        )
    lines += [*table(["Way", "Cores kept (worst round)", "Reaped, s", "Complete, s"], rows)]
    lines += [
        "## Memory",
        "",
        "The most that was resident, with what is shared between processes (VmHWM, idle: VmRSS).",
        "",
    ]
    lines += [*table(["Part", "Resident"], [[name, size_of(size)] for name, size in sorted(results.memory.items())])]
    if results.missing or results.failed:
        lines += ["## What is missing here", ""]
        lines += [f"- {TITLES.get(way, way)}: {why}" for way, why in results.missing.items()]
        lines += [f"- {line}" for line in results.failed]
        lines += [""]
    lines += ["## Again", "", "```sh", "make bench                        # as root or with sudo; a quarter of an hour"]
    lines += ["make bench BENCH_ARGS='--quick'   # a trial, which leaves these files as they are", "```"]
    return "\n".join(lines) + "\n"


def steps(results: Results) -> list[str]:
    """Return the section that takes one crash by the pipe apart."""
    if not all(results.steps.get(stage) for stage in STAGES):
        return []
    rows = []
    before = 0.0
    for stage, text in STAGES.items():
        until = statistics.median(results.steps[stage])
        rows.append([text.partition(":")[0], f"{until - before:.1f}", spread(results.steps[stage])])
        before = until
    return [
        "## What each millisecond is",
        "",
        "One crash of a small program by the pipe, from just before the fault, in the order of time. A step is the",
        "difference of two medians; the first three are of helpers that end there, and have that end in their figure,",
        "some tenths. With the kernel's socket there is no step for the interpreter and its modules.",
        "",
        *table(["Step", "ms", "Until its end, ms"], rows),
        *(f"- {text}" for text in STAGES.values()),
        "",
    ]


def picture(results: Results, path: Path) -> None:
    """Draw bars for each kind of crash. Raises ImportError without matplotlib."""
    matplotlib: Any = importlib.import_module("matplotlib")
    matplotlib.use("svg")
    # The same figures give the same file.
    matplotlib.rcParams.update({"svg.hashsalt": "core_pipe", "svg.fonttype": "none", "font.size": 9})
    plots: Any = importlib.import_module("matplotlib.pyplot")
    shown_ways = [way for way in ORDER if any((kind.key, way) in results.samples for kind in results.kinds)]
    figure, grid = plots.subplots(
        1,
        len(results.kinds),
        figsize=(3 + 2.6 * len(results.kinds), 0.8 + 0.32 * len(shown_ways)),
        sharey=True,
        squeeze=False,
    )
    for axes, kind in zip(grid[0], results.kinds, strict=True):
        for row, way in enumerate(shown_ways):
            samples = results.samples.get((kind.key, way))
            if not samples:
                continue
            low, middle, high = quartiles([sample.reap_ms for sample in samples])
            colour = COLOURS[way.partition("-")[0]]
            faint = 0.45 if way in DISCARDS else 1
            axes.barh(row, middle, color=colour, alpha=faint, height=0.7)
            axes.plot([low, high], [row, row], color="black", linewidth=1)
            axes.annotate(
                shown(middle), (high, row), xytext=(3, 0), textcoords="offset points", va="center", fontsize=8
            )
        axes.set_title(kind.title.replace(", ", ",\n"), fontsize=9)
        axes.set_yticks(range(len(shown_ways)), [TITLES[way].replace(" (", "\n(") for way in shown_ways])
        axes.margins(x=0.25)
        axes.set_xlim(left=0)
        axes.spines[["top", "right"]].set_visible(False)
    # One axis for all: they share it.
    grid[0][0].invert_yaxis()
    figure.supxlabel("ms from crash to reap: median, and the middle half (line)", fontsize=9)
    figure.tight_layout()
    figure.savefig(path, format="svg", metadata={"Date": None})
