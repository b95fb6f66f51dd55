"""Many crashes at once: every one leaves a record, and a neighbour does not notice."""

from __future__ import annotations

import contextlib
import os
import statistics
import subprocess
import sys
import time
from typing import TYPE_CHECKING

import pytest

from forwarder.share import DIRECTORY, Share, container_of
from receiver.cgroup import cgroup_path
from tests.support.containers import Container, PlainContainer, SystemdContainer
from tests.support.crash import compile_crasher, crash, start_crash
from tests.support.receivers import (
    INGRESSES,
    fake_receiver,
    forwarder_installed,
    list_records,
    prepare_units,
    resident,
    wait_for_records,
)
from tests.support.waiting import wait_until

if TYPE_CHECKING:
    from pathlib import Path

both_ways_in = pytest.mark.parametrize("ingress", INGRESSES)

ROOMY = {"CORE_PIPE_STORE_MAX": "off", "CORE_PIPE_KEEP_FREE": "off", "CORE_PIPE_SAME_MAX": "off"}
PATIENT = {"CORE_PIPE_FORWARDER_CONNECT_SECONDS": "60", "CORE_PIPE_FORWARDER_BUSY_SECONDS": "90"}

SPAWN = """
import os, sys
children = [os.spawnv(os.P_NOWAIT, sys.argv[2], [sys.argv[2], "SEGV"]) for _ in range(int(sys.argv[1]))]
for child in children:
    os.waitpid(child, 0)
"""


def crash_at_once(container: Container, count: int) -> None:
    container.run(["python3", "-c", SPAWN, str(count), compile_crasher("crash")], timeout=170, check=True)


@pytest.mark.system
@pytest.mark.skipif(SystemdContainer.why_unavailable() is not None, reason=str(SystemdContainer.why_unavailable()))
@both_ways_in
def test_64_at_once_with_ten_connections(ingress: str) -> None:
    """systemd-coredump kept 16 of 32. MaxConnections=10 and Backlog=5 are the units' own."""
    settings = 'store_max = "off"\nkeep_free = "off"\n'
    with (
        forwarder_installed(ingress, **PATIENT) as forwarder,
        SystemdContainer(prepare=prepare_units(accept=True, settings=settings)) as container,
    ):
        crash_at_once(container, 64)
        # What does not come here is on the host, with the reason.
        wait_until(lambda: len(list_records(container)) + len(forwarder.records()) >= 64, 60, "64 records")
        assert {record["core"]["reason"] for record in forwarder.records()} == set()
        records = list_records(container)
        assert [record["core"]["state"] for record in records] == ["stored"] * 64
        assert forwarder.records() == []


@pytest.mark.kernel
@pytest.mark.timeout(300)
@both_ways_in
def test_500_at_once_and_one_next_door(ingress: str) -> None:
    with (
        forwarder_installed(ingress, **PATIENT) as forwarder,
        PlainContainer() as container,
        PlainContainer() as neighbour,
        resident(container, env={**ROOMY, "CORE_PIPE_WORKERS": "4"}),
        resident(neighbour),
        start_crash(neighbour, "SEGV", "--wait", "--fill", str(8 << 20), "random") as next_door,
    ):
        process = container.popen([sys.executable, "-c", SPAWN, "500", compile_crasher("crash")])
        wait_until(lambda: list_records(container), 60, "the storm has begun")
        next_door.go()
        assert next_door.result(120).core_dumped
        assert wait_for_records(neighbour)[0]["core"]["state"] == "stored"
        assert process.wait(170) == 0
        process.end()

        def all_of_them() -> bool:
            return len(list_records(container)) + len(forwarder.records()) >= 500

        wait_until(all_of_them, 60, "500 records")
        assert len(list_records(container)) + len(forwarder.records()) == 500
        # Those on the host are over the share, or waited too long in the queue; their records say so.
        other = {record["core"]["reason"] for record in forwarder.records()}
        assert all("all of its share" in reason or "did not answer the offer" in reason for reason in other), other
        assert all(record["core"]["state"] == "stored" for record in list_records(container))


@pytest.mark.kernel
@both_ways_in
def test_a_container_that_holds_all_it_can_get(ingress: str) -> None:
    """H7: its own crashes end within the deadline, and a neighbour's core is stored as if nothing was."""
    with (
        forwarder_installed(ingress, CORE_PIPE_FORWARDER_STALL_SECONDS="15") as forwarder,
        PlainContainer() as hostile,
        PlainContainer() as neighbour,
        resident(neighbour),
        contextlib.ExitStack() as stack,
    ):
        forwarder.machine.core_pipe_limit = 64
        quiet = [neighbours_latency(neighbour) for _ in range(9)]
        stack.enter_context(fake_receiver(hostile, "stop"))
        # 56 shares are given, so one container has 14 at the most; the others are recorded without a core.
        held = [stack.enter_context(start_crash(hostile, "SEGV", "--wait")) for _ in range(19)]
        for crashing in held:
            crashing.go()
        wait_until(lambda: len(forwarder.records()) == 5, 20, "five crashes over the share")
        assert not any("all of its share" not in record["core"]["reason"] for record in forwarder.records())
        assert sum(not crashing.ended() for crashing in held) == 14
        busy = [neighbours_latency(neighbour) for _ in range(9)]
        assert sum(not crashing.ended() for crashing in held) == 14, "they were held while the neighbour crashed"
        assert statistics.median(busy) <= 2 * statistics.median(quiet), (quiet, busy)
        assert [record["core"]["state"] for record in wait_for_records(neighbour, 18)] == ["stored"] * 18
        begun = time.monotonic()
        for crashing in held:
            crashing.result(60)
        assert time.monotonic() - begun < 50
        assert len(wait_until(lambda: forwarder.records()[18:], 20, "a record for each")) == 1
        # And its slots are free again.
        stack.close()
        with resident(hostile):
            assert crash(hostile, "SEGV").core_dumped


def neighbours_latency(neighbour: PlainContainer) -> float:
    found = crash(neighbour, "SEGV")
    assert found.core_dumped
    assert found.seconds is not None
    return found.seconds


@pytest.mark.kernel
@both_ways_in
def test_a_count_that_cannot_be_kept_costs_no_core(ingress: str) -> None:
    """The host's /run is full: then crashes are not counted, but they are stored."""
    directory = os.path.dirname(DIRECTORY)
    os.makedirs(directory, mode=0o700, exist_ok=True)
    with forwarder_installed(ingress) as forwarder, PlainContainer() as container, resident(container):
        # One inode, which is the root: nothing can be made in there.
        subprocess.run(["mount", "-t", "tmpfs", "-o", "nr_inodes=1", "full", directory], check=True)
        try:
            assert crash(container, "SEGV").core_dumped
            assert wait_for_records(container)[0]["core"]["state"] == "stored"
            assert forwarder.records() == []
        finally:
            subprocess.run(["umount", directory], check=True)


@pytest.mark.parametrize(
    ("cgroup", "container"),
    [
        (b"/system.slice/docker-0123.scope", b"/system.slice/docker-0123.scope"),
        (b"/system.slice/docker-0123.scope/system.slice/evil.service", b"/system.slice/docker-0123.scope"),
        (b"/docker/0123/init.scope", b"/docker/0123"),
        (b"/machine.slice/libpod-0123.scope/container/a/b", b"/machine.slice/libpod-0123.scope"),
        (b"/machine.slice/machine-web.scope/payload/user.slice", b"/machine.slice/machine-web.scope"),
        (
            b"/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-podab.slice/cri-containerd-01.scope/x",
            b"/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-podab.slice/cri-containerd-01.scope",
        ),
        (b"/kubepods/burstable/pod01-02/0123/x", b"/kubepods/burstable/pod01-02"),
        (b"/lxc.payload.web/system.slice/x", b"/lxc.payload.web"),
        (b"/lxc/web/a", b"/lxc/web"),
        (b"/user.slice/user-1000.slice/session-3.scope", b"/user.slice/user-1000.slice"),
        (b"/user.slice/user-1000.slice/user@1000.service/app.slice/x", b"/user.slice/user-1000.slice"),
        (b"/system.slice/nginx.service", b"/system.slice/nginx.service"),
        (b"/", b"/"),
    ],
)
def test_a_container_is_one_however_many_cgroups_it_makes(cgroup: bytes, container: bytes) -> None:
    assert container_of(cgroup) == container


def test_cgroup_of_both_versions() -> None:
    assert cgroup_path(b"0::/a/b:c\n") == b"/a/b:c"
    assert cgroup_path(b"9:name=systemd:/x\n4:memory:/y\n0::/\n") == b"/x"
    assert cgroup_path(b"4:memory:/y\n0::/\n") == b"/y"
    assert cgroup_path(b"") == b"/"
    assert cgroup_path(b"rubbish") == b"/"
    # A name with a carriage return is no second line.
    assert container_of(cgroup_path(b"0::/docker/0123/a\r0::/other\n")) == b"/docker/0123"


@pytest.fixture
def counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    limit = tmp_path / "limit"
    limit.write_text("64\n")
    monkeypatch.setattr("forwarder.share.LIMIT_FILE", str(limit))
    return str(tmp_path / "flight")


def take(directory: str, key: str, number: int) -> Share | None:
    """A share as the stub with that pid takes it."""
    share = Share(key, directory)
    share._entry = f"{key}@{number}"
    return share if share.take() is None else None


def take_all(directory: str, key: str) -> list[Share]:
    held: list[Share] = []
    while share := take(directory, key, len(held)):
        held.append(share)
    return held


def test_there_is_a_share_for_the_next(counted: str) -> None:
    """One after the other takes all it can get. 64 slots: 56 are shared, and 8 are kept for those who have none."""
    shares = [take_all(counted, f"container-{number}") for number in range(12)]
    assert [len(held) for held in shares] == [14, 14, 14, 7, 4, 2, 1, 1, 1, 1, 1, 1]
    # What one gives back is there for the next.
    for share in shares[0]:
        share.close()
    assert len(take_all(counted, "neighbour")) >= 5


def test_those_who_were_killed_do_not_count(counted: str) -> None:
    held = take_all(counted, "c")
    assert len(held) == 14
    for share in held:
        # As the kernel does when a stub is killed: the lock goes, the file stays.
        os.close(share._fd)
    assert take(counted, "c", 1000) is not None
