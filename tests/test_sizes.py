"""Cores larger than a write(2), than the container's memory, and many of them: whole, and nothing left over."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.support import processes
from tests.support.containers import Host, PlainContainer, SystemdContainer
from tests.support.crash import compile_crasher, crash
from tests.support.landing import BOOKS
from tests.support.receivers import (
    BIN,
    SOCKET,
    Forwarder,
    dump,
    forwarder_installed,
    gdb,
    list_records,
    prepare_units,
    resident,
    wait_for_records,
)
from tests.support.waiting import wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.kernel

GIB = 1 << 30
ROOMY = {"CORE_PIPE_STORE_MAX": "off", "CORE_PIPE_KEEP_FREE": "off"}


@pytest.fixture(scope="module")
def forwarder() -> Iterator[Forwarder]:
    with forwarder_installed() as found:
        yield found


@pytest.mark.usefixtures("forwarder")
@pytest.mark.parametrize("compression", ["zstd", "none"])
def test_more_than_two_gib(tmp_path: Path, compression: str) -> None:
    """H19: one write(2) moves at most 0x7ffff000 bytes. Sparse memory arrives as zeros, and stays cheap."""
    size = 5 * GIB // 2
    with PlainContainer() as container, resident(container, env={"CORE_PIPE_COMPRESSION": compression}):
        found = crash(container, "SEGV", "--sparse", str(size), timeout=120)
        assert found.core_dumped
        record = wait_for_records(container)[-1]
        assert record["core"]["state"] == "stored"
        assert record["core"]["size_bytes"] > size
        assert record["core"]["stored_bytes"] < size // 100
        core = dump(container, record["id"], tmp_path / "core")
        assert core.stat().st_size == record["core"]["size_bytes"]
        # The last touched byte lies behind 2 GiB of the file.
        said = gdb(compile_crasher("crash"), core, "bt 1", "p sparse_size", "p/x sparse_buffer[sparse_size - 2097152]")
        core.unlink()
    assert "SIGSEGV" in said
    assert f"$1 = {size}" in said
    assert "$2 = 0xa5" in said


@pytest.mark.usefixtures("forwarder")
def test_a_small_memory_cgroup_takes_a_large_core(tmp_path: Path) -> None:
    """The receiver's memory and file pages are the container's: 64 MiB around it, and a 200 MiB core arrives.

    The process that crashes could not have 200 MiB in there, so it joins the container's namespaces only. The store is
    on ext4: the pages of a tmpfs cannot be written back, and the memory's limit would be the store's.
    """
    image = tmp_path / "disk"
    with image.open("wb") as file:
        file.truncate(512 << 20)
    subprocess.run(["mkfs.ext4", "-q", "-F", str(image)], check=True)

    def prepare(directory: str) -> None:
        os.makedirs(f"{directory}/disk")
        subprocess.run(["mount", "-o", "loop", str(image), f"{directory}/disk"], check=True)

    store = "/disk/store"
    with (
        PlainContainer(prepare=prepare, cgroup_memory_bytes=64 << 20) as container,
        resident(container, store=store, env={**ROOMY, "CORE_PIPE_COMPRESSION": "none"}) as receiver,
    ):
        assert receiver.process.host_pid in container.cgroup.processes()
        container.joins_cgroup = False
        found = crash(container, "SEGV", "--fill", str(200 << 20), "random")
        container.joins_cgroup = True
        assert found.core_dumped
        record = wait_for_records(container, store=store)[-1]
        assert record["core"]["state"] == "stored", record["core"]
        assert record["core"]["stored_bytes"] > 200 << 20
        # The limit held, nobody was killed for it, and the file's pages were what pressed against it.
        assert container.cgroup.memory_peak() <= 64 << 20
        assert container.cgroup.memory_limit_hits() > 0
        assert container.cgroup.out_of_memory_kills() == 0


def receivers_in(container: SystemdContainer) -> list[str]:
    """Command lines of the container's processes that belong to a receiver."""
    found = []
    identity = processes.namespace(container.init_pid, "pid")
    assert identity is not None
    for pid in processes.in_namespace(identity, "pid"):
        try:
            line = Path(f"/proc/{pid}/cmdline").read_bytes()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if b"core-pipe-receiver" in line:
            found.append(line.decode())
    return found


@pytest.mark.system
@pytest.mark.usefixtures("forwarder")
@pytest.mark.skipif(SystemdContainer.why_unavailable() is not None, reason=str(SystemdContainer.why_unavailable()))
@pytest.mark.parametrize("accept", [True, False], ids=["accept-yes", "accept-no"])
def test_nothing_runs_before_the_first_crash_and_after_the_last(accept: bool) -> None:
    with SystemdContainer(prepare=prepare_units(accept=accept, settings="idle_seconds = 2\n")) as container:
        assert receivers_in(container) == []
        assert crash(container, "SEGV").core_dumped
        wait_for_records(container)
        if not accept:
            assert receivers_in(container), "the service waits for idle_seconds"
        wait_until(lambda: not receivers_in(container), 30, "the receiver leaves")
        # And it comes again.
        assert crash(container, "SEGV").core_dumped
        assert len(wait_for_records(container, 2)) == 2
        wait_until(lambda: not receivers_in(container), 30, "the receiver leaves again")
        assert container.run(["systemctl", "is-failed", "core_pipe-forward.socket"]).stdout.strip() == "active"


def test_nothing_is_left_over_after_200_crashes(forwarder: Forwarder) -> None:
    def stubs() -> list[int]:
        launcher = forwarder.paths.runtime.launcher.encode()
        return [pid for pid in map(int, filter(str.isdigit, os.listdir("/proc"))) if launcher in command_line(pid)]

    with PlainContainer() as container, resident(container, env=ROOMY) as receiver:
        crash(container, "SEGV")
        wait_for_records(container)
        pid = receiver.process.host_pid
        # One worker stands ready, and has a descriptor of the service's.
        wait_until(lambda: resting(pid), 20, "a worker stands ready, and no other is there")
        descriptors = len(os.listdir(f"/proc/{pid}/fd"))
        identity = processes.namespace(container.init_pid, "pid")
        assert identity is not None
        inside = len(processes.in_namespace(identity, "pid"))
        script = "import os,sys\nfor n in range(200): os.spawnv(os.P_WAIT, sys.argv[1], [sys.argv[1], 'SEGV'])"
        container.run(["python3", "-c", script, compile_crasher("crash")], timeout=120, check=True)
        records = wait_for_records(container, 201, timeout=60)
        assert [record["core"]["state"] for record in records] == ["stored"] * 201
        wait_until(lambda: not stubs(), 20, "no stub is left")
        wait_until(lambda: resting(pid), 20, "no worker is left but the one that stands ready")
        assert len(os.listdir(f"/proc/{pid}/fd")) == descriptors
        wait_until(lambda: len(processes.in_namespace(identity, "pid")) == inside, 20, "no process is left inside")
        left = {name for name in os.listdir(f"{container.root}/var/lib/core_pipe") if name[0] == "."}
        assert left == BOOKS


def resting(receiver: int) -> bool:
    return [processes.listens(pid) for pid in processes.children(receiver)] == [True]


def command_line(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return b""


@pytest.mark.usefixtures("forwarder")
@pytest.mark.parametrize("size", [1, 64])
def test_a_container_that_ends_with_its_main_program(tmp_path: Path, size: int) -> None:
    """The crash ends pid 1, and with it the receiver, as soon as the process is let go: its core is there."""
    disk = tmp_path / "disk"
    disk.mkdir()

    def prepare(directory: str) -> None:
        os.makedirs(f"{directory}/disk")
        subprocess.run(["mount", "--bind", str(disk), f"{directory}/disk"], check=True)

    receiver = f"{BIN}/core-pipe-receiver --listen {SOCKET}"
    script = (
        f"CORE_PIPE_STORE=/disk/store CORE_PIPE_STORE_MAX=off CORE_PIPE_KEEP_FREE=off {receiver} & "
        f"while [ ! -S {SOCKET} ]; do sleep 0.05; done; "
        f"{compile_crasher('crash')} SEGV --fill {size << 20} random; exit 1"
    )
    with PlainContainer(prepare=prepare, init=["sh", "-c", script]) as container:
        wait_until(lambda: not os.path.exists(f"/proc/{container.init_pid}/root/bin"), 60, "the container ended")
    with Host() as host:
        records = list_records(host, str(disk / "store"))
        assert [record["core"]["state"] for record in records] == ["stored"]
        core = dump(host, records[0]["id"], tmp_path / "core", str(disk / "store"))
        assert core.stat().st_size == records[0]["core"]["size_bytes"] > size << 20
    # Its container ended with its init, so nobody was there to tell of the crash: the next start does.
    assert {name for name in os.listdir(disk / "store") if name[0] == "."} - BOOKS <= {f".{records[0]['id']}.untold"}
