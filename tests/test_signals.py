"""Every signal whose default action is to dump core (signal(7)), by its real cause where it has one."""

from __future__ import annotations

import os
import signal
from typing import TYPE_CHECKING

import pytest

from tests.support.containers import PlainContainer
from tests.support.crash import compile_crasher, crash
from tests.support.receivers import INGRESSES, dump, forwarder_installed, gdb, list_records, resident, wait_for_records

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = pytest.mark.kernel

SIGNALS = ["QUIT", "ILL", "TRAP", "ABRT", "BUS", "FPE", "SEGV", "XCPU", "XFSZ", "SYS"]


@pytest.fixture(scope="module", params=INGRESSES)
def container(request: pytest.FixtureRequest) -> Iterator[PlainContainer]:
    with forwarder_installed(request.param), PlainContainer() as found, resident(found):
        yield found


@pytest.mark.parametrize("name", SIGNALS)
def test_signal(container: PlainContainer, tmp_path: Path, name: str) -> None:
    before = len(list_records(container))
    found = crash(container, name)
    assert found.signal == signal.Signals[f"SIG{name}"]
    assert found.core_dumped
    record = wait_for_records(container, before + 1)[-1]
    assert (record["signal_name"], record["signal"]) == (f"SIG{name}", int(signal.Signals[f"SIG{name}"]))
    assert record["core"]["state"] == "stored"
    core = dump(container, record["id"], tmp_path / "core")
    said = gdb(compile_crasher("crash"), core, "bt")
    assert f"Program terminated with signal SIG{name}" in said
    assert "do_crash" in said
    assert "main (" in said


@pytest.mark.parametrize("option", ["--from-thread", "--leader-exits"])
def test_a_thread_that_is_not_the_leader(container: PlainContainer, tmp_path: Path, option: str) -> None:
    """/proc/<pid>/root, ns and exe do not resolve any more when the leader has exited: identify by thread."""
    before = len(list_records(container))
    found = crash(container, "SEGV", option, "--threads", "3")
    assert found.core_dumped
    record = wait_for_records(container, before + 1)[-1]
    assert record["pid"] == found.pid
    assert record["tid"] != found.pid
    assert record["tid"] == record["own_tid"]
    assert record["core"]["state"] == "stored"
    core = dump(container, str(found.pid), tmp_path / "core")
    assert "thread_main (" in gdb(compile_crasher("crash"), core, "bt")


def test_core_limit_zero_leaves_a_record(container: PlainContainer) -> None:
    before = len(list_records(container))
    crash(container, "SEGV", "--core-limit", "0")
    record = wait_for_records(container, before + 1)[-1]
    assert record["core"]["state"] == "none"
    assert record["core"]["reason"] == "the soft core limit (ulimit -c) of the process is 0"
    assert record["core_limit"] == 0


def test_a_core_limit_is_a_budget(container: PlainContainer, tmp_path: Path) -> None:
    before = len(list_records(container))
    found = crash(container, "SEGV", "--core-limit", "300000", "--fill", str(8 << 20), "random")
    assert found.core_dumped
    record = wait_for_records(container, before + 1)[-1]
    assert record["core"]["state"] == "reduced"
    assert record["core"]["reason"].endswith("the soft core limit (ulimit -c) allows 300000 bytes")
    assert record["core"]["size_bytes"] <= 300000
    assert record["core"]["whole_bytes"] > 8 << 20
    core = dump(container, str(found.pid), tmp_path / "core")
    said = gdb(compile_crasher("crash"), core, "bt", "p known_buffer[4194304]")
    assert "in main (" in said
    assert "Cannot access memory" in said


def test_a_core_limit_that_leaves_nothing(container: PlainContainer) -> None:
    before = len(list_records(container))
    crash(container, "SEGV", "--core-limit", "4096")
    record = wait_for_records(container, before + 1)[-1]
    assert record["core"]["state"] == "none"
    assert "leave nothing of 4096 (the soft core limit" in record["core"]["reason"]


def test_a_huge_environment_and_thousands_of_open_files(container: PlainContainer) -> None:
    """H22: a message that grew with the process was too large to send, and the crash was lost."""
    before = len(list_records(container))
    hoarder = "import os,sys; [os.dup(0) for _ in range(1000)]; os.execv(sys.argv[1], [sys.argv[1], 'SEGV'])"
    large = {f"VARIABLE_{number}": "x" * 100_000 for number in range(15)}
    process = container.popen(["python3", "-c", hoarder, compile_crasher("crash")], env=large)
    assert os.WCOREDUMP(process.reaped(60)["status"])
    record = wait_for_records(container, before + 1)[-1]
    assert record["core"]["state"] == "stored"
    assert len(str(record["environment"])) < 100_000
