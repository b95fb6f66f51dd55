"""A receiver that is missing, refuses, or does not answer: in bounded time the next is asked; the record says why."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.support.cgroups import hierarchies
from tests.support.containers import Host, PlainContainer
from tests.support.crash import crash
from tests.support.receivers import (
    INGRESSES,
    STORE,
    Forwarder,
    fake_receiver,
    forwarder_installed,
    host_receiver,
    list_records,
    resident,
    wait_for_records,
)
from tests.support.waiting import wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.kernel


@pytest.fixture(scope="module", params=INGRESSES)
def forwarder(request: pytest.FixtureRequest) -> Iterator[Forwarder]:
    with forwarder_installed(request.param) as found:
        yield found


@pytest.fixture(scope="module")
def container() -> Iterator[PlainContainer]:
    with PlainContainer() as found:
        yield found


def next_record(forwarder: Forwarder, before: int) -> dict[str, object]:
    with Host() as host:
        return wait_for_records(host, before + 1, forwarder.store)[-1]


def test_no_receiver_in_the_container(forwarder: Forwarder, container: PlainContainer) -> None:
    before = len(forwarder.records())
    with host_receiver(forwarder):
        assert crash(container, "SEGV").core_dumped
        record = next_record(forwarder, before)
    assert record["core"]["state"] == "stored"  # type: ignore[index]
    assert record["tried"] == ["own root: there is no /run/core_pipe.socket"]


@pytest.mark.parametrize(
    ("mode", "reason"),
    [
        ("refuse", r"own root: its receiver refused: no\x0aroom\x1b[31m \xff"),
        ("silent", "own root: its receiver did not answer the offer before the deadline"),
        ("backlog", "own root: its queue of connections stayed full until the deadline"),
        ("garbage", "own root: its receiver does not speak the protocol: the header does not begin with 'CP'"),
        ("hangup", "own root: its receiver hung up on the offer"),
    ],
)
def test_a_receiver_that_does_not_take_it(
    forwarder: Forwarder, container: PlainContainer, mode: str, reason: str
) -> None:
    """H1: a full backlog held Apport's stub for ever, and the whole machine's dumps with it."""
    before = len(forwarder.records())
    with host_receiver(forwarder), fake_receiver(container, mode):
        found = crash(container, "SEGV", timeout=30)
        assert found.core_dumped
        record = next_record(forwarder, before)
    assert record["core"]["state"] == "stored"  # type: ignore[index]
    assert record["tried"] == [reason]


@pytest.mark.skipif(
    "" not in hierarchies(), reason="needs a mounted cgroup2: mount -t cgroup2 none /sys/fs/cgroup/unified"
)
def test_a_container_that_is_frozen(forwarder: Forwarder) -> None:
    """Nobody in there answers, and no signal reaches them. The process that crashes is outside of the freezer."""
    before = len(forwarder.records())
    with host_receiver(forwarder), PlainContainer() as container, resident(container):
        directories = (Path(directory, "cgroup.freeze") for directory in container.cgroup.directories)
        freeze = next(path for path in directories if path.exists())
        container.joins_cgroup = False
        freeze.write_text("1", encoding="ascii")
        try:
            assert crash(container, "SEGV", timeout=30).core_dumped
        finally:
            freeze.write_text("0", encoding="ascii")
            container.joins_cgroup = True
        record = next_record(forwarder, before)
        assert record["tried"] == ["own root: its receiver did not answer the offer before the deadline"]
        # The receiver finds the connection hung up, and serves the next.
        assert crash(container, "SEGV").core_dumped
        wait_for_records(container)


def test_a_listener_that_is_gone(forwarder: Forwarder, container: PlainContainer) -> None:
    before = len(forwarder.records())
    script = "import socket; socket.socket(socket.AF_UNIX).bind('/run/core_pipe.socket')"
    container.run(["python3", "-c", script], check=True)
    try:
        with host_receiver(forwarder):
            assert crash(container, "SEGV").core_dumped
            record = next_record(forwarder, before)
    finally:
        container.run(["rm", "/run/core_pipe.socket"], check=True)
    assert record["tried"] == ["own root: nobody listens at its socket"]


def test_no_receiver_at_all_leaves_a_record_that_says_why(forwarder: Forwarder, container: PlainContainer) -> None:
    before = len(forwarder.records())
    found = crash(container, "ABRT", "--comm", b"odd \n)\xff(")
    assert found.signal is not None
    record = next_record(forwarder, before)
    assert record["core"]["state"] == "none"  # type: ignore[index]
    for part in ("no receiver took the core", "own root: there is no /run/core_pipe.socket", "host: there is no"):
        assert part in record["core"]["reason"]  # type: ignore[index]
    assert (record["pid"], record["signal_name"]) == (found.host_pid, "SIGABRT")
    assert record["comm"] == "odd \n)\\xff("


@pytest.mark.usefixtures("forwarder")
def test_what_goes_wrong_is_one_line_in_the_journal_or_the_kernels_log(container: PlainContainer) -> None:
    found = crash(container, "ABRT", "--comm", b"line\nbreak")
    wanted = rf"pid {found.host_pid} (line\x0abreak), signal 6: no receiver took the core"
    wait_until(lambda: wanted in host_log(), 20, "a line in the log")


def host_log() -> str:
    """What the stub has said on this machine."""
    if os.path.exists("/run/systemd/journal/socket"):
        command = ["journalctl", "--quiet", "--output=cat", "--identifier=core_pipe", "--since=-5min"]
    else:
        command = ["dmesg"]
    # The kernel's log escapes a backslash.
    said = subprocess.run(command, capture_output=True, text=True, errors="replace", check=True)
    return said.stdout.replace(r"\x5c", "\\")


@pytest.mark.parametrize("mode", ["keep", "fork-keep", "stop", "drip", "vanish", "lie"])
def test_a_receiver_that_takes_the_core_and_does_not_finish(
    forwarder: Forwarder, container: PlainContainer, mode: str
) -> None:
    """H7: who holds the descriptor holds the crashed process and a slot of the kernel's. H23: nobody else is asked."""
    before = len(forwarder.records())
    with host_receiver(forwarder), fake_receiver(container, mode):
        found = crash(container, "SEGV", "--fill", str(8 << 20), "random", timeout=60)
        assert found.signal is not None
        record = next_record(forwarder, before)
    assert record["core"]["state"] == "none"  # type: ignore[index]
    # The last one that was asked.
    assert str(record["core"]["reason"]).startswith("own root: its receiver")  # type: ignore[index]
    assert record["tried"] == []
    assert list_records(container, STORE) == []


@pytest.mark.parametrize("mode", ["slow", "chatter", "halting"])
def test_an_honest_slow_receiver_is_not_cut(forwarder: Forwarder, container: PlainContainer, mode: str) -> None:
    """Progress counts: 8 MiB at 64 KiB each 50 ms take longer than the deadline for no progress."""
    before = len(forwarder.records())
    with fake_receiver(container, mode):
        found = crash(container, "SEGV", "--fill", str(8 << 20), "random", timeout=60)
    assert found.core_dumped
    assert len(forwarder.records()) == before


def test_a_descriptor_that_comes_back_is_not_taken(forwarder: Forwarder, container: PlainContainer) -> None:
    """Its close could last for ever (SO_LINGER), in the stub, with the core."""
    before = len(forwarder.records())
    with fake_receiver(container, "descriptor"):
        assert crash(container, "SEGV", timeout=30).signal is not None
    # Before Linux 6.16 it comes through, and is closed.
    for record in forwarder.records()[before:]:
        assert "own root: its receiver refused: it takes no descriptor" in record["tried"]
