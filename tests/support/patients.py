"""Programs that a debugger finds much in, and crashes of them that stand while their whole core is at hand.

The kernel holds a crashed process until its core's reader ends (core_pipe_limit). A reader of the tests' own writes
the whole core to a file and stays. So one crash, its process still there, can be given to receivers again and again.
"""

from __future__ import annotations

import contextlib
import hashlib
import mmap
import os
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from receiver import protocol
from receiver.protocol import Credentials
from tests.support import processes
from tests.support.containers import Container, Host
from tests.support.crashers import SOURCES, TOOLS
from tests.support.fake_forwarder import FIELDS, FakeForwarder, feed
from tests.support.machine import exclusive
from tests.support.receivers import dump, resident, wait_for_records
from tests.support.waiting import read_line, wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

BALLAST = os.path.join(SOURCES, "ballast.py")
# Not the virtual environment's: a debugger wants the program itself, and that is only a link.
PYTHON = os.path.realpath("/usr/bin/python3")


def build(source: str, name: str, *options: str) -> str:
    """Compile a source in tests/crashers with these options, unless that was done already, and return the path."""
    digest = hashlib.sha256(repr((name, options)).encode())
    for file in ("common.h", source):
        digest.update(Path(SOURCES, file).read_bytes())
    directory = os.path.join(TOOLS, digest.hexdigest()[:12])
    program = os.path.join(directory, name)
    if os.path.exists(program):
        return program
    os.makedirs(directory, mode=0o755, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory) as temporary:
        made = os.path.join(temporary, name)
        command = ["gcc", "-g", "-Wall", "-Wextra", *options, "-o", made, os.path.join(SOURCES, source)]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
        if done.returncode != 0:
            raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")
        # Complete or not there: another run may look for it at the same time.
        os.rename(made, program)
    return program


def patient(*options: str) -> str:
    """The program of patient.c."""
    return build("patient.c", "patient", "-pthread", *(options or ("-O0",)))


def plugins(count: int) -> list[str]:
    """So many shared libraries for it, each with a function `work_of_<number>`."""
    return [
        build("plugin.c", f"plugin{number}.so", "-O1", "-shared", "-fPIC", f"-DPLUGIN_NAME={number}")
        for number in range(count)
    ]


class Landed(NamedTuple):
    """What a receiver kept of a core."""

    record: dict[str, Any]
    core: Path


class Held:
    """A process that has crashed and is still there, until release().

    pid: the host's. whole: its whole core, as the kernel wrote it.
    """

    def __init__(self, program: str, whole: Path, process: subprocess.Popen[bytes], lifeline: int) -> None:
        self.program = program
        self.whole = whole
        self.pid, self.tid = map(int, whole.with_name("facts").read_text(encoding="ascii").split())
        self._process = process
        self._lifeline = lifeline

    def release(self) -> None:
        """Let the process end. May be called again."""
        if self._lifeline >= 0:
            os.close(self._lifeline)
        self._lifeline = -1
        self._process.wait(30)

    def reduce(
        self,
        target: Path,
        *,
        container: Container | None = None,
        below: str = "/tmp",
        core_limit: int | None = None,
        **settings: str,
    ) -> Landed:
        """Give the crash to a receiver with these settings, and return what it keeps, the core as a plain file.

        container: where the receiver runs; None: on the host, where it sees the process. below: the directory there
        that its store is in. core_limit: `ulimit -c`.
        """
        place = container or Host()
        with contextlib.ExitStack() as stack:
            if container is None:
                stack.enter_context(place)
            base = tempfile.mkdtemp(prefix="cp-reduced-", dir=f"{place.root}{below}")
            stack.callback(shutil.rmtree, base)
            inside = "/" + os.path.relpath(base, place.root)
            store = f"{inside}/store"
            env = {"CORE_PIPE_STORE_MAX": "off", "CORE_PIPE_KEEP_FREE": "off"}
            env |= {f"CORE_PIPE_{name.upper()}": value for name, value in settings.items()}
            stack.enter_context(resident(place, store=store, path=f"{inside}/socket", env=env))
            self._give(f"{base}/socket", core_limit)
            record = wait_for_records(place, store=store)[0]
            if record["core"]["state"] != "none":
                dump(place, record["id"], target, store=store)
            return Landed(record, target)

    def _give(self, socket_path: str, core_limit: int | None) -> None:
        with FakeForwarder(socket_path, seconds=60) as forwarder:
            fields = FIELDS | {"comm": os.path.basename(self.program).encode()[:15], "exe": self.program.encode()}
            if core_limit is not None:
                fields["core_limit"] = b"%d" % core_limit
            named = Credentials(self.pid, 0, 0), Credentials(self.tid, 0, 0)
            deadline = forwarder._deadline()
            forwarder.channel.send(protocol.OFFER, fields, deadline, credentials=named)
            answer = forwarder.answer()
            assert answer.kind == protocol.ACCEPT, answer.fields
            write = forwarder.pass_pipe()
            try:
                with (
                    self.whole.open("rb") as file,
                    mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as data,
                    memoryview(data) as view,
                    # A receiver that has what it wants may leave before the end.
                    contextlib.suppress(BrokenPipeError),
                ):
                    feed(write, view, seconds=60)
            finally:
                os.close(write)
            forwarder.done()


_HOLDER = """#!/bin/sh
cd {directory} || exit 1
dd of=part bs=1M iflag=fullblock conv=sparse status=none || exit 1
echo "$1 $2" >facts
exec 3<release
mv part core
# The core's pipe stays open: the kernel waits for its end.
exec timeout 900 cat 4<&0 <&3 >/dev/null 2>&1
"""


@contextlib.contextmanager
def held_crash(argv: Sequence[str]) -> Iterator[Held]:
    """Hold a crash while the block lasts: of a program that says "ready" and dies at the end of its standard input."""
    directory = tempfile.mkdtemp(prefix="cp-held-", dir="/tmp")
    with contextlib.ExitStack() as stack:
        stack.callback(shutil.rmtree, directory)
        holder = Path(directory, "hold")
        holder.write_text(_HOLDER.format(directory=directory), encoding="ascii")
        holder.chmod(0o755)
        release = os.path.join(directory, "release")
        os.mkfifo(release, 0o600)
        # The reader waits for the end of this, which comes also when these tests are killed.
        lifeline = os.open(release, os.O_RDWR | os.O_CLOEXEC)
        undo_lifeline = stack.enter_context(contextlib.ExitStack())
        undo_lifeline.callback(os.close, lifeline)
        process = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        started = processes.start_time(process.pid)
        assert process.stdin is not None
        assert process.stdout is not None
        stack.enter_context(process)
        stack.callback(lambda: processes.kill_exactly(process.pid, started) if process.poll() is None else None)
        assert read_line(process.stdout.fileno(), 60, f"{argv} is ready") == b"ready\n"
        whole = Path(directory, "core")
        with exclusive() as machine:
            # Only with a limit does the kernel wait for the reader's end (Documentation/admin-guide/sysctl/kernel.rst).
            machine.core_pipe_limit = 64
            machine.core_pattern = f"|{holder} %P %I"
            process.stdin.close()
            wait_until(whole.exists, 120, f"the whole core of {argv}")
        held = Held(argv[0], whole, process, lifeline)
        undo_lifeline.pop_all()
        stack.callback(held.release)
        yield held
