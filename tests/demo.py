"""`make demo`: one crash in a real container with systemd, from the fault to the backtrace, a step at a time.

Everything is real: systemd as pid 1 of the container, the kernel's core_pattern, the installed units. Everything is
taken away again at the end, also after Ctrl-C; a run that was killed is cleaned up after by the next one.
"""

from __future__ import annotations

import contextlib
import functools
import os
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tests.support import machine, processes
from tests.support.containers import SystemdContainer
from tests.support.crash import CrashResult, compile_crasher, start_crash
from tests.support.receivers import BIN, SOCKET, STORE, Forwarder, forwarder_installed, list_records, wait_for_records
from tests.support.waiting import wait_until

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from types import FrameType

RECEIVER = os.path.join(BIN, "core-pipe-receiver")
# What an application's image has; here it is tests/crashers/crash.c.
PROGRAM = "/usr/local/bin/webshop"
COMM = "webshop"
USER = 1000
MEMORY = 64 << 20
CRASH = (PROGRAM, "SEGV", "--uid", str(USER), "--gid", str(USER), "--fill", str(MEMORY), "random")

# A whole run of the tests may be before us.
LOCK_SECONDS = 1800

WIDTH = 96
COLOUR = sys.stdout.isatty() and "NO_COLOR" not in os.environ
BOLD, DIM, GREEN, RED, CYAN = "1", "2", "32", "31", "36"


class DemoError(Exception):
    """Something is not as it should be. The text is for the one who ran the demo."""


def paint(text: str, code: str) -> str:
    return f"\x1b[{code}m{text}\x1b[0m" if COLOUR else text


def say(text: str = "") -> None:
    print(text, flush=True)


def explain(text: str) -> None:
    """Print a paragraph, wrapped."""
    line = ""
    for word in text.split():
        if line and len(line) + 1 + len(word) > WIDTH - 4:
            say(f"    {line}")
            line = word
        else:
            line = f"{line} {word}".strip()
    say(f"    {line}")


_steps = iter(range(1, 100))


def step(title: str) -> None:
    say()
    say(paint(f"{next(_steps):>2}. {title}", BOLD))


def command(where: str, text: str) -> None:
    say(f"    {paint(f'{where} #', CYAN)} {paint(text, BOLD)}")


def output(text: str) -> None:
    """Print what a program said, set off from what the demo says."""
    for line in text.rstrip("\n").splitlines():
        shown = "".join(c if c.isprintable() else "?" for c in line.expandtabs(4))
        say(f"    {paint('|', DIM)} {shown}".rstrip())


_seen: list[str] = []


def check(good: bool, fact: str, otherwise: str = "", *, sum_up: bool = False) -> None:
    """Say that something was seen; sum_up: again at the end. Raises DemoError when it was not."""
    if not good:
        raise DemoError(f"expected: {fact}" + (f"\n  seen:     {otherwise}" if otherwise else ""))
    if sum_up:
        _seen.append(fact)
    say(f"    {paint('ok', GREEN)}  {fact}")


@dataclass(frozen=True)
class Seen:
    """A receiver's process, as the host saw it while it ran. pid: in the container's numbering."""

    pid: int
    cgroup: str


def receivers_in(container: SystemdContainer) -> list[Seen]:
    """Return the receiver's processes in a container, found in the host's /proc."""
    found = []
    for pid in processes.in_namespace(str(processes.namespace(container.init_pid, "pid")), "pid"):
        try:
            with open(f"/proc/{pid}/cmdline", "rb") as file:
                if os.fsencode(RECEIVER) not in file.read().split(b"\0"):
                    continue
            with open(f"/proc/{pid}/status", encoding="utf-8", errors="replace") as file:
                numbers = next(line.split() for line in file if line.startswith("NSpid:"))
            with open(f"/proc/{pid}/cgroup", encoding="utf-8", errors="replace") as file:
                paths = [
                    line.rstrip("\n").split(":", 2)[2] for line in file if ":name=systemd:" in line or "::" in line
                ]
        except (OSError, StopIteration):
            # It has just ended.
            continue
        # systemd's own hierarchy where the machine has several.
        found.append(Seen(int(numbers[-1]), next((path for path in paths if ".service" in path), "")))
    return found


@contextlib.contextmanager
def watched(container: SystemdContainer) -> Iterator[list[Seen]]:
    """Look for receivers all the time until the block ends; the list gets each one once."""
    seen: dict[int, Seen] = {}
    found: list[Seen] = []
    stop = threading.Event()

    def look() -> None:
        while not stop.wait(0.005):
            seen.update((one.pid, one) for one in receivers_in(container))

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    try:
        yield found
    finally:
        stop.set()
        thread.join()
        found += seen.values()


def run_inside(container: SystemdContainer, argv: Sequence[str], *, shown: str = "", quiet: bool = False) -> str:
    """Run and show a command in the container. Raises DemoError when it fails."""
    command("container", shown or shlex.join(argv))
    # Our own programs are shown as users have them, in PATH.
    path = f"{BIN}:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
    done = container.run(argv, env={"PATH": path})
    if done.returncode != 0:
        raise DemoError(
            f"'{shlex.join(argv)}' in the container ended with {done.returncode}\n{done.stdout}{done.stderr}"
        )
    if not quiet:
        output(done.stdout + done.stderr)
    return done.stdout + done.stderr


def units(container: SystemdContainer) -> str:
    argv = ["systemctl", "list-units", "--all", "--no-legend", "--plain", "--full", "core_pipe*"]
    return run_inside(container, argv, shown="systemctl list-units --all 'core_pipe*'")


def install_into(directory: str, said: list[str]) -> None:
    """Do what an image maintainer does, in an image's root directory."""
    done = subprocess.run(
        [RECEIVER, "install", "--root", directory, "--program", RECEIVER], capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        raise DemoError(f"core-pipe-receiver install: {done.stderr.strip()}")
    said += [line.replace(directory, "IMAGE") for line in done.stdout.splitlines()]
    shutil.copy2(compile_crasher("crash"), f"{directory}{PROGRAM}")


def boot(stack: contextlib.ExitStack) -> SystemdContainer:
    step("An image gets a receiver, and a container of it boots")
    said: list[str] = []
    container = SystemdContainer(prepare=functools.partial(install_into, said=said))
    stack.enter_context(container)
    command("host", "core-pipe-receiver install --root IMAGE")
    output("\n".join(said))
    command("host", "systemd-nspawn -D IMAGE --boot")
    version = container.run(["systemctl", "--version"], check=True).stdout.splitlines()[0]
    check(container.boot_seconds > 0, f"{version} is pid 1 of a container, booted in {container.boot_seconds:.1f} s")
    return container


def show_nothing_runs(container: SystemdContainer) -> None:
    step("In the container, nothing of core_pipe runs: systemd holds a socket, and that is all")
    units(container)
    found = receivers_in(container)
    check(not found, "receiver processes in the container before the crash: 0", f"{len(found)}", sum_up=True)


def register(stack: contextlib.ExitStack) -> Forwarder:
    step("The forwarder is registered with the host's kernel (here for a minute, and in a folder of its own)")
    before = machine.read_setting(machine.CORE_PATTERN).decode(errors="replace")
    command("host", "core-pipe-forwarder install --runtime")
    forwarder = stack.enter_context(forwarder_installed())
    command("host", "sysctl kernel.core_pattern")
    now = forwarder.machine.core_pattern.decode(errors="replace")
    output(f"before: {before}\nnow:    {now}")
    check("forwarder" in now or f"{forwarder.base}/run/core_pipe/" in now, "the kernel starts the forwarder at a crash")
    return forwarder


def crash_it(container: SystemdContainer) -> CrashResult:
    step(f"A program of user {USER} in the container, {MEMORY >> 20} MiB large, follows a bad pointer")
    command("container", shlex.join(CRASH))
    with watched(container) as seen:
        with start_crash(container, *CRASH[1:], crasher=PROGRAM) as crashing:
            result = crashing.result()
        wait_for_records(container)
    output("Segmentation fault (core dumped)" if result.core_dumped else f"ended with status {result.status:#x}")
    check(result.core_dumped, f"process {result.pid} died of SIGSEGV, and the kernel says: core dumped")
    if result.seconds is not None:
        check(
            result.seconds < 30,
            f"from the fault to the end of the process: {result.seconds * 1000:.0f} ms, {MEMORY >> 20} MiB stored",
            sum_up=True,
        )
    explain("While it waited in the kernel, the container's systemd started a receiver, by its socket:")
    for one in seen:
        _, slash, rest = one.cgroup.partition("/system.slice/")
        output(f"core-pipe-receiver, pid {one.pid} in the container, cgroup {slash + rest or one.cgroup}")
    check(
        len(seen) == 1,
        "socket activation: one receiver was seen running, for this one crash",
        f"{len(seen)}",
        sum_up=True,
    )
    check(
        one.cgroup.startswith(f"/{container.cgroup.name}/"),
        "it ran in the container's own pid namespace and cgroup, so the container's limits held for it",
        one.cgroup,
        sum_up=True,
    )
    return result


def show_activation(container: SystemdContainer) -> None:
    step("The container's own journal tells the same")
    argv = ["journalctl", "--no-pager", "--output=cat", "--unit=core_pipe-forward@*"]
    # The receiver writes its line last, and journald takes it when it likes.
    wait_until(
        lambda: "core stored" in container.run(argv).stdout, 20, "the receiver's line in the container's journal"
    )
    said = run_inside(container, argv, shown="journalctl --output=cat --unit='core_pipe-forward@*'")
    check("core stored" in said, "the receiver said what it stored, in the container's journal", said)


def show_crash(container: SystemdContainer, result: CrashResult) -> str:
    step("Inside the container, a developer looks what crashed")
    listed = run_inside(container, ["corepipectl", "list"])
    check(f" {result.pid} " in listed and "SIGSEGV" in listed, f"the crash of pid {result.pid} is listed", listed)
    said = run_inside(container, ["corepipectl", "info", COMM])
    check(PROGRAM in said, "the executable's name is the container's", said)
    records = list_records(container)
    check(len(records) == 1, "there is one record, as there was one crash", str(len(records)))
    core = records[0]["core"]
    check(core["state"] == "stored" and core["size_bytes"] > MEMORY, "the core is whole", str(core))
    return str(core["path"])


def show_places(container: SystemdContainer, forwarder: Forwarder, path: str, before: set[str]) -> None:
    step("Where the core is, and where it is not")
    run_inside(container, ["ls", "-l", STORE])
    explain(f"(+ is an access control list: besides root, user {USER} may read the core of his own process.)")
    check(os.path.exists(f"{container.root}{path}"), f"the core is in the container: {path}", sum_up=True)
    command("host", f"ls {forwarder.store} {STORE}")
    found = [os.path.join(forwarder.store, name) for name in names_in(forwarder.store)]
    found += [os.path.join(STORE, name) for name in names_in(STORE) - before]
    output("\n".join(found) or "(no file of this crash)")
    check(not found, "nothing of it is on the host", ", ".join(found), sum_up=True)


def names_in(directory: str) -> set[str]:
    try:
        return set(os.listdir(directory))
    except FileNotFoundError:
        return set()


def show_backtrace(container: SystemdContainer) -> None:
    step("The developer opens the core, in the container")
    run_inside(container, ["corepipectl", "dump", COMM, "-o", "/tmp/core"])
    argv = ["gdb", "-nx", "-batch", "-ex", "set debuginfod enabled off", "-ex", "bt", "-ex", "print/x *known_buffer@8"]
    argv += [PROGRAM, "/tmp/core"]
    said = run_inside(
        container, argv, shown=f"gdb -batch -ex bt -ex 'print/x *known_buffer@8' {PROGRAM} /tmp/core", quiet=True
    )
    noise = ("warning: ", "[Thread debugging", "Using host libthread")
    output("\n".join(line for line in said.splitlines() if line and not line.startswith(noise)))
    check(
        "SIGSEGV" in said and "do_crash" in said and "main (" in said,
        "gdb shows the signal and the frame",
        said,
        sum_up=True,
    )


def show_gone(container: SystemdContainer) -> None:
    step("And again nothing runs there")
    wait_until(lambda: not receivers_in(container), 20, "the receiver has left")
    units(container)
    check(not receivers_in(container), "receiver processes in the container after it: 0", sum_up=True)


def show_refusal(container: SystemdContainer, forwarder: Forwarder) -> None:
    step("A second crash, after somebody has stopped the socket: no core, but not in silence")
    run_inside(container, ["systemctl", "stop", "core_pipe-forward.socket"])
    command("container", shlex.join([PROGRAM, "ABRT"]))
    with start_crash(container, "ABRT", crasher=PROGRAM) as crashing:
        crashing.result()
    records = wait_until(forwarder.records, 20, "a record on the host")
    argv = ["corepipectl", "--store", forwarder.store, "info", COMM]
    command("host", shlex.join(argv))
    done = subprocess.run([os.path.join(BIN, argv[0]), *argv[1:]], capture_output=True, text=True, check=False)
    output(done.stdout + done.stderr)
    check(
        records[-1]["core"]["state"] == "none" and SOCKET in records[-1]["core"]["reason"],
        "without a receiver, the host has a record that says why there is no core",
        str(records[-1]["core"]),
        sum_up=True,
    )


def why_not() -> str | None:
    if (reason := SystemdContainer.why_unavailable() or machine.why_unavailable()) is not None:
        return reason
    missing = [name for name in ("gdb",) if not shutil.which(name)]
    missing += [RECEIVER] if not os.path.exists(RECEIVER) else []
    return f"needs {' and '.join(missing)}: make setup" if missing else None


def hold_machine(stack: contextlib.ExitStack) -> bytes:
    """Take the lock on the machine's crash settings, and say so when somebody else has it. Returns the core_pattern."""
    try:
        stack.enter_context(machine.exclusive(timeout=0))
    except TimeoutError:
        say()
        explain("Another run of the tests has this machine's core_pattern; waiting until it is done.")
        stack.enter_context(machine.exclusive(timeout=LOCK_SECONDS))
    return machine.read_setting(machine.CORE_PATTERN)


def demo(stack: contextlib.ExitStack) -> None:
    before = names_in(STORE)
    container = boot(stack)
    show_nothing_runs(container)
    forwarder = register(stack)
    result = crash_it(container)
    show_activation(container)
    path = show_crash(container, result)
    show_places(container, forwarder, path, before)
    show_backtrace(container)
    show_gone(container)
    show_refusal(container, forwarder)
    step("Everything is taken away again")
    explain("The forwarder is uninstalled and the container shuts down.")


def stop(_number: int, _frame: object) -> None:
    on_signals(signal.SIG_IGN)
    raise KeyboardInterrupt


def on_signals(handler: Callable[[int, FrameType | None], None] | signal.Handlers) -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, handler)


def main() -> int:
    if (reason := why_not()) is not None:
        print(f"demo: {reason}", file=sys.stderr)
        return 1

    on_signals(stop)
    say(paint("core_pipe: a crash in a container, and its core brought home", BOLD))
    try:
        with contextlib.ExitStack() as machines:
            pattern = hold_machine(machines)
            begun = time.monotonic()
            with contextlib.ExitStack() as stack:
                try:
                    demo(stack)
                finally:
                    # What comes now is the cleaning up, and it must not be stopped half-way.
                    on_signals(signal.SIG_IGN)
            now = machine.read_setting(machine.CORE_PATTERN)
            was = pattern.decode(errors="replace")
            check(now == pattern, f"kernel.core_pattern is what it was: {was}", str(now), sum_up=True)
    except KeyboardInterrupt:
        print("\ndemo: stopped; everything is taken away again", file=sys.stderr)
        return 130
    except (DemoError, TimeoutError, RuntimeError, OSError) as error:
        print(f"\n{paint('demo: this is not as it should be', RED)}\n  {error}", file=sys.stderr)
        return 1
    say()
    say(paint(f"Seen in {time.monotonic() - begun:.0f} s:", BOLD))
    for fact in _seen:
        say(f"  {paint('ok', GREEN)}  {fact}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
