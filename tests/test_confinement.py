"""What a worker can still do while it writes, what it holds, and what a container can make the host write."""

from __future__ import annotations

import contextlib
import json
import os
import re
from typing import TYPE_CHECKING

import pytest

from forwarder import allowance
from forwarder.allowance import Allowance
from receiver.process import user_may_read
from receiver.record import Core, Record
from receiver.store import Store
from tests.support import processes
from tests.support.containers import PlainContainer
from tests.support.crash import compile_crasher, crash, start_crash
from tests.support.receivers import INGRESSES, STORE, Forwarder, forwarder_installed, resident, wait_for_records
from tests.support.waiting import wait_until
from tests.test_fallback import host_log

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

ROOMY = {"CORE_PIPE_STORE_MAX": "off", "CORE_PIPE_KEEP_FREE": "off"}
BIG = str(400 << 20)


@pytest.fixture(scope="module", params=INGRESSES)
def forwarder(request: pytest.FixtureRequest) -> Iterator[Forwarder]:
    with forwarder_installed(request.param) as found:
        yield found


def status(pid: int) -> dict[str, str]:
    with open(f"/proc/{pid}/status", encoding="utf-8", errors="replace") as file:
        return {name: value.strip() for name, _, value in (line.partition(":") for line in file)}


def descriptors(pid: int) -> dict[int, str]:
    found = {}
    for name in os.listdir(f"/proc/{pid}/fd"):
        # One may be closed while this looks.
        with contextlib.suppress(FileNotFoundError):
            found[int(name)] = os.readlink(f"/proc/{pid}/fd/{name}")
    return found


def writing(service: int) -> dict[int, dict[int, str]]:
    """The workers that are writing a core now, with their descriptors."""
    found = {}
    for pid in processes.children(service):
        try:
            held = descriptors(pid)
        except (FileNotFoundError, ProcessLookupError):
            continue
        if any(target.endswith(".core") for target in held.values()):
            found[pid] = held
    return found


@pytest.mark.kernel
@pytest.mark.parametrize("user_namespace", [False, True], ids=["root", "user-namespace"])
def test_a_worker_that_writes_can_do_nothing_else(forwarder: Forwarder, user_namespace: bool) -> None:
    if user_namespace and (reason := PlainContainer.why_no_user_namespace()):
        pytest.skip(reason)
    with PlainContainer(user_namespace=user_namespace) as container, resident(container, env=ROOMY) as receiver:
        service = receiver.process.host_pid
        service_holds = descriptors(service)
        with (
            start_crash(container, "SEGV", "--wait", "--fill", BIG, "random") as first,
            start_crash(container, "SEGV", "--wait", "--fill", BIG, "random") as second,
        ):
            first.go()
            second.go()
            wait_until(lambda: len(writing(service)) == 2, 60, "two workers that write")
            # Until it has read the notes a worker may look into the crashed process's memory.
            wait_until(
                lambda: not any("/mem" in name for held in writing(service).values() for name in held.values()),
                20,
                "they have closed it",
            )
            workers = writing(service)
            assert len(workers) == 2
            for pid in workers:
                facts = status(pid)
                assert {facts[name] for name in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")} == {"0" * 16}
                assert facts["NoNewPrivs"] == "1"
                with open(f"/proc/{pid}/limits", encoding="ascii") as file:
                    assert re.search(r"Max core file size +1 ", file.read()), "its own crash would be dumped"
            held = [set(targets.values()) for targets in workers.values()]
            common = held[0] & held[1]
            # Its own: the core's pipe or socket, the connection, the core's file, the lock on its record.
            for targets in workers.values():
                own = {number: target for number, target in targets.items() if target not in common}
                # And a pipe into which a large core comes: both its ends, where its user has pipe memory left.
                for target in set(own.values()):
                    ends = [number for number in own if own[number] == target]
                    if len(ends) == 2 and target.startswith("pipe:"):
                        own = {number: held for number, held in own.items() if number not in ends}
                assert sorted(re.sub(r"[:.0-9].*", "", os.path.basename(target)) for target in own.values()) == sorted(
                    [forwarder.ingress, "socket", "", ""]
                ), own
            # In common: the standard streams and the store, and nothing of the service's.
            assert common - {target for number, target in service_holds.items() if number <= 2} == {STORE}
            assert first.result(120).core_dumped
            assert second.result(120).core_dumped
        assert [record["core"]["state"] for record in wait_for_records(container, 2)] == ["stored"] * 2


@pytest.mark.kernel
def test_nothing_of_the_hosts_is_in_the_containers_record(forwarder: Forwarder) -> None:
    """H21: the host's thread ids leaked into the container."""
    with PlainContainer() as container, resident(container):
        with start_crash(container, "SEGV", "--wait", "--from-thread", "--threads", "2") as crashing:
            threads = [int(name) for name in os.listdir(f"/proc/{crashing.host_pid}/task")]
            crashing.go()
            found = crashing.result()
        record = wait_for_records(container)[0]
        assert (record["pid"], record["own_pid"]) == (found.pid, found.pid)
        assert record["tid"] == record["own_tid"]
        # The environment is the process's own business.
        shown = json.dumps({name: value for name, value in record.items() if name not in ("environment", "id")})
        numbers = {int(number) for number in re.findall(r"\d+", shown)}
        small = {n for n in [*threads, found.host_pid] if n < 1000}
        assert not numbers & ({*threads, found.host_pid} - small), shown
        assert forwarder.base not in shown
        assert "core_pipe-tests" not in (record["cgroup"] or "")


@pytest.mark.kernel
def test_a_container_cannot_fill_the_hosts_log(forwarder: Forwarder) -> None:
    """H16. Every crash has its record; the lines are bounded."""
    with PlainContainer() as container:
        count = allowance.LINES + 20
        script = f"import os,sys\nfor n in range({count}): os.spawnv(os.P_WAIT, sys.argv[1], [sys.argv[1], 'SEGV'])"
        before, said = len(forwarder.records()), set(host_log().splitlines())
        container.run(["python3", "-c", script, compile_crasher("crash")], timeout=120, check=True)
        wait_until(lambda: len(forwarder.records()) >= before + count, 60, "a record for each")
        lines = [line for line in host_log().splitlines() if line not in said and "signal 11: no receiver" in line]
        assert 0 < len(lines) <= allowance.LINES


def test_allowance_counts_by_container_and_window(tmp_path: Path) -> None:
    directory = str(tmp_path)
    # Within a second, too: a begin that is rounded up lies in the future, and each use would open a new window.
    seen = [Allowance("a", directory).use(now=1000.6 + n / 1000) for n in range(allowance.RECORDS + 50)]
    assert [line for line, _, _ in seen].count(True) == allowance.LINES
    assert [record for _, record, _ in seen].count(True) == allowance.RECORDS
    assert Allowance("b", directory).use(now=1000.0) == (True, True, 0)
    # The next window says how many were kept back in the last.
    later = 1001.0 + allowance.WINDOW_SECONDS
    assert Allowance("a", directory).use(now=later) == (True, True, 50)
    assert Allowance("a", directory).use(now=later) == (True, True, 0)
    # A clock that was set back does not silence it for years.
    assert Allowance("a", directory).use(now=5.0) == (True, True, 0)


@pytest.mark.parametrize("rubbish", [b"", b"\xff\xfe", b"1 2 3", b"nan 1", b"-1 -1", b"1e400 5", b"x" * 500])
def test_allowance_survives_a_damaged_count(tmp_path: Path, rubbish: bytes) -> None:
    (tmp_path / "a").write_bytes(rubbish)
    assert Allowance("a", str(tmp_path)).use(now=1000.0)[:2] == (True, True)


def test_a_link_in_the_place_of_the_count_is_not_followed(tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.write_bytes(b"precious")
    (tmp_path / "a").symlink_to(target)
    with pytest.raises(OSError, match="symbolic links"):
        Allowance("a", str(tmp_path)).use()
    assert target.read_bytes() == b"precious"


@pytest.mark.kernel
@pytest.mark.usefixtures("forwarder")
def test_a_crash_of_the_receiver_itself_goes_nowhere() -> None:
    with PlainContainer() as container, resident(container) as receiver:
        assert crash(container, "SEGV").core_dumped
        wait_for_records(container)
        os.kill(receiver.process.host_pid, 6)
        ended = receiver.process.reaped(20)
        assert os.WIFSIGNALED(ended["status"])
        assert not os.WCOREDUMP(ended["status"]), "the kernel dumped the receiver"
        # Its end is what this test wants, so resident() must not complain.
        receiver.stop = lambda timeout=0: 0  # type: ignore[method-assign] # noqa: ARG005


def test_nobody_is_no_user() -> None:
    """A process whose ids have no number in the container shows as 65534, and so does everybody else's who has none."""
    kinds = ("real", "effective", "saved", "filesystem")
    numbers = {"pid": 1, "tid": 1, "uid": 0, "gid": 0, "signal": 11, "time": 0, "core_limit": 0, "dumpable": 1}
    record = Record.of_numbers(comm=b"x", **numbers)
    for uid, gid, may in ((1000, 1000, True), (65534, 1000, False), (1000, 65534, False), (65534, 65534, False)):
        record.uids, record.gids = dict.fromkeys(kinds, uid), dict.fromkeys(kinds, gid)
        assert user_may_read(record, secure=False) is may


def test_records_do_not_pile_up_for_ever(tmp_path: Path) -> None:
    """A crash loop with `ulimit -c 0` writes nothing but records (H16)."""
    store = Store(str(tmp_path / "store"), records=5)
    with_core = store.begin(new_record(0))
    os.write(with_core.open_core(), b"core")
    with_core.record.core = Core(state="stored", size_bytes=4, compression="none")
    with_core.finish()
    for number in range(1, 20):
        store.begin(new_record(number)).finish() if number % 2 else store.add_record(new_record(number))
        assert len([name for name in store.names() if name.endswith(".json")]) <= 5
    kept = [record.pid for _, record in store.records() if record is not None]
    # The one that has a core stays longest.
    assert kept == [0, 16, 17, 18, 19]
    for number in range(20, 26):
        entry = store.begin(new_record(number))
        os.write(entry.open_core(), b"core")
        entry.record.core = Core(state="stored", size_bytes=4, compression="none")
        entry.finish()
    assert [record.pid for _, record in store.records() if record is not None] == [21, 22, 23, 24, 25]
    assert len([name for name in store.names() if name.endswith(".core")]) == 5
    store.close()


def new_record(pid: int) -> Record:
    numbers = {"pid": pid, "tid": pid, "uid": 0, "gid": 0, "signal": 11, "time": 0, "core_limit": 0, "dumpable": 1}
    return Record.of_numbers(comm=b"x", **numbers)
