"""The journal: entries that the real coredumpctl shows and opens, that nobody can forge, and that hold nobody up."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import filecmp
import functools
import os
import re
import signal
import socket
import struct
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from receiver import afterwards, journal_entry, service
from receiver.config import Config
from receiver.record import Core, Record, microseconds, rfc3339
from receiver.store import Store, describe_core
from tests.support import journals, processes
from tests.support.containers import PlainContainer, SystemdContainer
from tests.support.crash import compile_crasher, crash
from tests.support.receivers import (
    Forwarder,
    dump,
    forwarder_installed,
    gdb,
    prepare_units,
    resident,
    wait_for_records,
)
from tests.support.waiting import wait_until
from tests.test_store import in_child, keep, new_record

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.support.journals import Journal


def parsed(data: bytes) -> list[tuple[str, bytes]]:
    """An entry, as journald reads one: NAME, newline, length, value, newline."""
    found = []
    while data:
        name, _, data = data.partition(b"\n")
        assert b"=" not in name
        (length,) = struct.unpack_from("<Q", data)
        found.append((name.decode("ascii"), data[8 : 8 + length]))
        assert data[8 + length : 9 + length] == b"\n"
        data = data[9 + length :]
    return found


def hostile(text: str, **more: object) -> Record:
    record = new_record()
    for name in ("comm", "exe", "cwd", "root", "host_name", "cgroup", "container", "unit", "signature"):
        setattr(record, name, text)
    record.command_line = record.open_files = record.mappings = record.frames = [text, text]
    record.environment = {text: text}
    record.package = {"name": text, "version": text}
    record.core = Core(reason=text)
    for name, value in more.items():
        setattr(record, name, value)
    return record


FORGED = "a\nMESSAGE_ID=00000000000000000000000000000000\n_UID=0\n\nPRIORITY=7\n\0\x1b[2J\udcff"


@given(st.text(st.characters()))
def test_no_value_begins_another_field(text: str) -> None:
    for chosen in (text, FORGED + text):
        entry = journal_entry.fields(hostile(chosen))
        found = parsed(journal_entry.encode(entry))
        assert [name for name, _ in found] == list(entry)
        assert all(re.fullmatch("[A-Z][A-Z0-9_]{0,63}", name) for name, _ in found)
        assert dict(found)["MESSAGE_ID"].decode() == journal_entry.MESSAGE_ID
        # What is shown on terminals: no control characters, and no lines but ours.
        assert re.fullmatch(r"[ -~\n]+", entry["MESSAGE"])
        assert entry["MESSAGE"].count("\n") == 4


def test_what_is_not_known_has_no_field() -> None:
    entry = journal_entry.fields(new_record())
    assert set(entry) == {
        *("MESSAGE", "MESSAGE_ID", "PRIORITY", "SYSLOG_IDENTIFIER", "CORE_PIPE_ID", "CORE_PIPE_STATE"),
        *(f"COREDUMP_{name}" for name in ("PID", "TID", "UID", "GID", "SIGNAL", "SIGNAL_NAME", "TIMESTAMP")),
        *("COREDUMP_RLIMIT", "COREDUMP_COMM"),
    }
    assert entry["COREDUMP_TIMESTAMP"] == "1700000000000000"


@given(st.integers(0, 1 << 34), st.integers(0, 999_999))
def test_times(second: int, microsecond: int) -> None:
    assert microseconds(rfc3339(second)) == second * 1_000_000
    assert microseconds(rfc3339(second).replace("Z", f".{microsecond:06d}Z")) == second * 1_000_000 + microsecond


@pytest.mark.parametrize("text", ["", "yesterday", "2026-11-23", "2026-11-23T10:20Z", "1-2-3T4:5:6:7Z"])
def test_what_is_no_time(text: str) -> None:
    assert microseconds(text) is None


def test_slices_and_sessions() -> None:
    user = "/user.slice/user-1000.slice/user@1000.service/app.slice/a.service"
    assert journal_entry.slice_of("/system.slice/a.service", "a.service") == "system.slice"
    assert journal_entry.slice_of(user, "user@1000.service") == "user-1000.slice"
    assert journal_entry.slice_of("/a.service", "a.service") is None
    assert journal_entry.slice_of("/docker/1234", None) is None
    assert journal_entry.slice_of(None, None) is None
    assert journal_entry.session_owner(user) == "1000"
    assert journal_entry.session_owner("/user-x.slice/user-.slice") is None


def test_command_lines_can_be_pasted() -> None:
    assert journal_entry.command_line(["/bin/a", "-b", "c d", "it's", ""]) == r"/bin/a -b 'c d' 'it'\''s' ''"


@pytest.fixture
def listener(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[socket.socket]:
    """A journald of which nothing is read but by the test."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as found:
        found.bind(str(tmp_path / "journal"))
        found.settimeout(20)
        monkeypatch.setattr(journal_entry, "JOURNAL", str(tmp_path / "journal"))
        yield found


def test_no_journal_is_nothing_to_say(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    with contextlib.closing(Store(str(tmp_path / "store"))) as store:
        for name in ("absent", "gone", "file"):
            path = tmp_path / name
            monkeypatch.setattr(journal_entry, "JOURNAL", str(path))
            if name == "gone":
                with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
                    sock.bind(str(path))
            elif name == "file":
                path.write_bytes(b"")
            assert afterwards.afterwards(new_record(), Config(store=store.path), store) is False
    assert capfd.readouterr().err == ""


def test_switched_off(tmp_path: Path, listener: socket.socket) -> None:
    with contextlib.closing(Store(str(tmp_path / "store"))) as store:
        assert afterwards.afterwards(new_record(), Config(store=store.path, journal=False), store) is False
        assert afterwards.afterwards(new_record(), Config(store=store.path), store) is True
    listener.recv(1 << 20)
    listener.setblocking(False)
    with pytest.raises(BlockingIOError):
        listener.recv(1)


def test_an_entry_larger_than_a_datagram_is_a_sealed_file(listener: socket.socket) -> None:
    entry = {"MESSAGE": "huge", "COREDUMP_ENVIRON": "x" * (8 << 20)}
    before = os.listdir("/proc/self/fd")
    assert journal_entry.send(entry, listener.getsockname())
    data, fds, _, _ = socket.recv_fds(listener, 100, 2)
    (fd,) = fds
    try:
        assert data == b""
        # What journald asks for before it reads (journald-native.c).
        seals = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SEAL
        assert fcntl.fcntl(fd, fcntl.F_GET_SEALS) & seals == seals
        with open(f"/proc/self/fd/{fd}", "rb") as file:
            assert dict(parsed(file.read())) == {name: value.encode() for name, value in entry.items()}
    finally:
        os.close(fd)
    assert os.listdir("/proc/self/fd") == before


def test_a_journal_that_does_not_read_holds_nobody(
    listener: socket.socket, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(journal_entry, "PATIENCE_SECONDS", 0.05)
    path = listener.getsockname()
    sent = 0
    while journal_entry.send({"MESSAGE": "one more"}, path):
        sent += 1
        assert sent < 100_000
    assert journal_entry.tell(new_record()) is False
    # And the file that is passed waits no longer.
    assert journal_entry.send({"MESSAGE": "x" * (8 << 20)}, path) is False
    assert capfd.readouterr().err == ""
    for _ in range(sent):
        listener.recv(100)
    assert journal_entry.send({"MESSAGE": "it reads again"}, path)


def test_what_follows_a_crash_never_raises_and_always_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    done = []
    before = signal.getsignal(signal.SIGALRM), signal.getitimer(signal.ITIMER_REAL)[0]
    monkeypatch.setattr(afterwards, "STEP_SECONDS", 0.05)
    monkeypatch.setattr(afterwards, "_count", lambda *_: time.sleep(60))
    monkeypatch.setattr(afterwards, "_wake", lambda *_: done.append(1))

    def fails(*_: object) -> bool:
        try:
            raise OSError(errno.EIO, "broken")
        finally:
            done.append(0)

    monkeypatch.setattr(afterwards, "_tell", fails)
    with contextlib.closing(Store(str(tmp_path / "store"))) as store:
        assert afterwards.afterwards(new_record(), Config(store=store.path), store) is False
    assert done == [0, 1]
    said = capfd.readouterr().err.splitlines()
    assert len(said) == 2
    assert "broken" in said[0]
    assert "the counters: not done within 0.05 s" in said[1]
    # Whose alarm it was has it again (pytest-timeout's, here).
    assert signal.getsignal(signal.SIGALRM) == before[0]
    assert bool(before[1]) == bool(signal.getitimer(signal.ITIMER_REAL)[0])
    assert signal.getitimer(signal.ITIMER_REAL)[0] <= before[1]


def telling(path: str) -> Store:
    store = Store(path)
    store.tells = True
    return store


def test_a_crash_whose_worker_was_killed_is_told_of_once_more(tmp_path: Path) -> None:
    path = str(tmp_path / "store")
    store = telling(path)
    record = new_record()

    def shown_and_killed() -> None:
        entry = telling(path).begin(record)
        entry.record.core = Core(reason="none")
        entry.finish()
        os.kill(os.getpid(), signal.SIGKILL)

    def sealed_and_killed() -> None:
        entry = telling(path).begin(record)
        entry.record.core = Core(reason="none")
        entry.seal()
        os.kill(os.getpid(), signal.SIGKILL)

    for work, recovered in ((shown_and_killed, 0), (sealed_and_killed, 1)):
        record = new_record()
        assert in_child(work) == signal.SIGKILL
        assert len(store.recover()) == recovered
        assert store.has_untold()
        assert [found.id for found in store.untold()] == [record.id]
        assert not store.has_untold()
        assert [found.id for found in store.untold()] == []
    # A worker that lives tells of it himself; and so it ends.
    entry = store.begin(new_record())
    entry.record.core = Core(reason="none")
    entry.finish()
    assert list(store.untold()) == []
    assert store.has_untold()
    entry.told()
    entry.close()
    assert not store.has_untold()
    # A mark without a record.
    Path(path, ".20261123T045928-218323-15-48e953ce.untold").write_bytes(b"")
    Path(path, ".strange.untold").write_bytes(b"")
    assert list(store.untold()) == []
    store.close()


def test_the_telling_ends_but_one_more_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Should it be the telling itself that ends whoever does it."""
    path = str(tmp_path / "store")
    config = Config(store=path)
    monkeypatch.setattr(service, "afterwards", lambda *_: os.kill(os.getpid(), signal.SIGKILL))

    def begins() -> None:
        entry = telling(path).begin(new_record())
        entry.record.core = Core(reason="none")
        entry.finish()
        os._exit(3)

    in_child(begins)
    in_child(begins)
    assert service.recover(config)
    assert in_child(lambda: service.tell(config)) == signal.SIGKILL
    assert service.recover(config)
    assert in_child(lambda: service.tell(config)) == signal.SIGKILL
    assert not service.recover(config)


def attributes(path: Path | int) -> dict[str, str]:
    return {name: os.getxattr(path, name).decode() for name in os.listxattr(path) if name.startswith("user.coredump.")}


def test_a_core_says_whose_it_is(tmp_path: Path) -> None:
    """And not at the cost of the store's limit, nor of whoever has it open when it goes."""
    found = {
        "user.coredump.pid": "7",
        "user.coredump.uid": "1000",
        "user.coredump.gid": "1000",
        "user.coredump.signal": "11",
        "user.coredump.timestamp": "1700000000000000",
        "user.coredump.rlimit": str(1 << 40),
        "user.coredump.comm": "test",
    }
    probe = tmp_path / "probe"
    probe.write_bytes(b"")
    with probe.open("wb") as file:
        describe_core(file.fileno(), new_record())
    if not attributes(probe):
        pytest.skip(f"{tmp_path}: its file system has no user xattrs")
    takes_a_block = probe.stat().st_blocks > 0
    store = Store(str(tmp_path / "store"))
    store.describes = True
    record = keep(store, bytes(range(256)) * 16)
    fd = store.open_core(record)
    assert attributes(fd) == found
    store.prune()
    assert os.fstat(fd).st_blocks == 0
    os.close(fd)
    store.close()
    # Where there is room for the core and for nothing more.
    store = Store(str(tmp_path / "full"), limit=lambda _: 4096)
    store.describes = True
    record = keep(store, bytes(range(256)) * 16)
    fd = store.open_core(record)
    assert record.core.state == "stored"
    assert attributes(fd) == ({} if takes_a_block else found)
    assert os.fstat(fd).st_blocks * 512 == 4096
    os.close(fd)
    store.close()


@pytest.fixture(scope="module")
def forwarder() -> Iterator[Forwarder]:
    with forwarder_installed() as found:
        yield found


@pytest.fixture(scope="module")
def container() -> Iterator[PlainContainer]:
    if why := PlainContainer.why_unavailable() or journals.why_unavailable():
        pytest.skip(why)
    if journals.coredumpctl() is None:
        pytest.skip("Debian's systemd-coredump cannot be downloaded: apt-get update")
    with PlainContainer(prepare=journals.prepare_coredumpctl) as found:
        yield found


@pytest.fixture(scope="module")
def journal(container: PlainContainer) -> Iterator[Journal]:
    with journals.journald(container) as found:
        yield found


def newest(journal: Journal, record: dict[str, object]) -> dict[str, object]:
    found: list[dict[str, object]] = wait_until(
        lambda: journal.entries(f"CORE_PIPE_ID={record['id']}"), 20, "the crash is an entry"
    )
    assert len(found) == 1
    return found[0]


@pytest.mark.kernel
@pytest.mark.usefixtures("forwarder")
@pytest.mark.parametrize(
    ("settings", "state"),
    [
        pytest.param({"CORE_PIPE_COMPRESSION": "zstd"}, "present", id="zstd"),
        pytest.param({"CORE_PIPE_COMPRESSION": "none"}, "present", id="plain"),
        pytest.param({"CORE_PIPE_KEEP": "stacks"}, "truncated", id="reduced"),
    ],
)
def test_coredumpctl_opens_it(
    container: PlainContainer, journal: Journal, tmp_path: Path, settings: dict[str, str], state: str
) -> None:
    program = compile_crasher("crash")
    store = f"/var/lib/{state}-{settings.get('CORE_PIPE_COMPRESSION')}"
    with resident(container, store=store, env=settings):
        # Several frames, and a seek table.
        found = crash(container, "SEGV", "--fill", str(24 << 20), "random")
        record = wait_for_records(container, store=store)[-1]
        entry = newest(journal, record)
    assert (entry["COREDUMP_PID"], entry["COREDUMP_COMM"], entry["PRIORITY"]) == (str(found.pid), "crash", "2")
    assert entry["COREDUMP_FILENAME"] == record["core"]["path"]
    assert entry["COREDUMP_EXE"] == program
    assert f"Process {found.pid} (crash) of user 0 dumped core." in str(entry["MESSAGE"])

    def coredumpctl(*arguments: str) -> str:
        done = container.run(["coredumpctl", "--no-pager", *arguments], check=True, timeout=60)
        return done.stdout + done.stderr

    # Matches: by process, by name, by executable; the last line is the newest crash.
    for match in (str(found.pid), "crash", program, f"CORE_PIPE_ID={record['id']}"):
        line = coredumpctl("list", match).strip().splitlines()[-1].split()
        assert line[4:10] == [str(found.pid), "0", "0", "SIGSEGV", state, program], line
    assert coredumpctl("list", "--since=-1h", "--reverse", "-n1", "--no-legend").split()[4] == str(found.pid)
    said = coredumpctl("info", str(found.pid))
    assert "Signal: 11 (SEGV)" in said
    assert f"Executable: {program}" in said
    assert f"Command Line: {program} SEGV --fill 25165824 random" in said
    assert f"({state})" in said
    assert f"Stack trace of thread {found.pid}" in said
    # The same bytes as by our own program, which the kernel's are (tests/test_main_job.py).
    ours = dump(container, record["id"], tmp_path / "core", store)
    done = container.run(["coredumpctl", "dump", str(found.pid), "-o", "/root/core"])
    if done.returncode and record["core"]["compression"] == "none":
        # Of systemd's own plain cores as well: 252 decompresses whatever it is to dump (save_core() of coredumpctl.c).
        assert "Protocol not supported" in done.stderr
    else:
        theirs = Path(f"{container.root}/root/core")
        assert theirs.stat().st_size == ours.stat().st_size == record["core"]["size_bytes"]
        assert filecmp.cmp(theirs, ours, shallow=False)
        theirs.unlink()
    assert "main (" in gdb(program, ours, "bt")
    said = coredumpctl("debug", str(found.pid), "--debugger-arguments=-nx -batch -ex bt")
    assert "SIGSEGV" in said
    assert "main (" in said
    with contextlib.suppress(OSError):
        named = attributes(Path(f"{container.root}{record['core']['path']}"))
        assert named["user.coredump.pid"] == str(found.pid)
        assert named["user.coredump.exe"] == program


@pytest.mark.kernel
@pytest.mark.usefixtures("forwarder")
def test_coredumpctl_says_when_there_is_no_core(container: PlainContainer, journal: Journal) -> None:
    with resident(container, env={"CORE_PIPE_LOOP_MAX": "1"}, store="/var/lib/loop"):
        for _ in range(2):
            found = crash(container, "ABRT")
        record = wait_for_records(container, 2, store="/var/lib/loop")[-1]
        entry = newest(journal, record)
    assert entry["CORE_PIPE_STATE"] == "none"
    assert "crashes in a loop" in str(entry["MESSAGE"])
    assert "crashes in a loop" in str(entry["CORE_PIPE_REASON"])
    done = container.run(["coredumpctl", "--no-pager", "list", str(found.pid)], check=True)
    assert done.stdout.splitlines()[-1].split()[7:9] == ["SIGABRT", "none"]


@pytest.mark.kernel
def test_nothing_is_forged_in_a_real_journal(container: PlainContainer, journal: Journal) -> None:
    path = f"{container.root}{journals.SOCKET}"
    record = hostile(FORGED, id="forged", environment={"A": FORGED, "HUGE": "x" * (1 << 20)})
    assert journal_entry.send(journal_entry.fields(record), path)
    (entry,) = wait_until(lambda: journal.entries("CORE_PIPE_ID=forged"), 20, "the entry")
    assert entry["MESSAGE_ID"] == journal_entry.MESSAGE_ID
    assert entry["PRIORITY"] == "2"
    # Bytes that are no text come as numbers.
    assert bytes(entry["COREDUMP_COMM"]) == FORGED.encode("utf-8", "backslashreplace")
    assert len(entry["COREDUMP_ENVIRON"]) > 1 << 20
    # What is shown of it is ours alone.
    shown = container.run(["coredumpctl", "--no-pager", "info", "CORE_PIPE_ID=forged"], check=True).stdout
    assert "\x1b" not in shown


@pytest.mark.kernel
@pytest.mark.usefixtures("forwarder")
def test_a_journal_that_is_stopped_holds_no_worker(container: PlainContainer, journal: Journal) -> None:
    path = f"{container.root}{journals.SOCKET}"
    with resident(container, store="/var/lib/stopped") as receiver:
        assert journal.process is not None
        pid = journal.process.host_pid
        os.kill(pid, signal.SIGSTOP)
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
                sock.setblocking(False)
                sock.connect(path)
                with contextlib.suppress(BlockingIOError):
                    while True:
                        sock.send(b"MESSAGE=full\n")
            assert crash(container, "SEGV").core_dumped
            record = wait_for_records(container, store="/var/lib/stopped")[-1]
            assert record["core"]["state"] == "stored"
            wait_until(lambda: not processes.serving(receiver.process.host_pid), 20, "the worker has ended")
            names = os.listdir(f"{container.root}/var/lib/stopped")
            assert not [name for name in names if name.endswith(".untold")]
        finally:
            os.kill(pid, signal.SIGCONT)
    wait_until(journal.answers, 20, "journald goes on")


@pytest.mark.kernel
def test_the_next_start_tells_of_those_that_were_killed(container: PlainContainer, journal: Journal) -> None:
    """As when the crash of a container's main program ends the container: the receiver is killed with it."""
    store = telling(f"{container.root}/var/lib/late")
    records = [new_record(), new_record()]

    def killed(record: Record, *, shown: bool) -> None:
        entry = store.begin(record)
        entry.record.core = Core(reason="it was killed")
        entry.seal()
        if shown:
            entry.finish()
        os.kill(os.getpid(), signal.SIGKILL)

    for shown, record in enumerate(records):
        assert in_child(functools.partial(killed, record, shown=bool(shown))) == signal.SIGKILL
    with resident(container, store="/var/lib/late"):
        for record in records:
            assert newest(journal, {"id": record.id})["CORE_PIPE_REASON"] == "it was killed"
        wait_until(lambda: not store.has_untold(), 20, "no mark is left")
    store.close()


@pytest.mark.system
@pytest.mark.skipif(SystemdContainer.why_unavailable() is not None, reason=str(SystemdContainer.why_unavailable()))
@pytest.mark.usefixtures("forwarder")
def test_the_sandboxed_service_tells_the_containers_own_journal() -> None:
    settings = 'store_max = "off"\nkeep_free = "off"\n'
    with SystemdContainer(prepare=prepare_units(accept=True, settings=settings)) as container:
        program = compile_crasher("crash")
        container.run(["systemd-run", "--wait", "--unit=broken.service", "--", program, "SEGV"])
        record = wait_for_records(container)[-1]
        journal = journals.Journal(container)
        entry = newest(journal, record)
        assert entry["COREDUMP_UNIT"] == "broken.service"
        assert entry["COREDUMP_FILENAME"] == record["core"]["path"]
        assert entry["COREDUMP_SLICE"] == "system.slice"
        assert str(entry["COREDUMP_CGROUP"]).endswith("/system.slice/broken.service")
        # journalctl(1) shows what a unit's processes crashed of with the unit's own lines.
        of_unit = container.run(["journalctl", "--unit=broken.service", "--output=cat"], check=True).stdout
        assert "dumped core" in of_unit
        # Once, and not by a line of the receiver's as well.
        everything = container.run(["journalctl", "--output=cat", "--all"], check=True).stdout
        assert everything.count("ended by SIGSEGV") == 1


@pytest.mark.kernel
def test_a_crash_that_no_receiver_took_is_an_entry_of_the_host(forwarder: Forwarder, container: PlainContainer) -> None:
    """By the stub, which the kernel started and which has the standard library alone."""
    if os.path.exists(os.path.dirname(journal_entry.JOURNAL)):
        pytest.skip("this machine has a journal: its entries are not ours")
    os.makedirs(os.path.dirname(journal_entry.JOURNAL))
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
            listener.bind(journal_entry.JOURNAL)
            listener.settimeout(20)
            found = crash(container, "SEGV")
            entries: list[bytes] = []
            while not entries or b"MESSAGE_ID\n" not in entries[-1]:
                entries.append(listener.recv(1 << 20))
            os.unlink(journal_entry.JOURNAL)
    finally:
        os.rmdir(os.path.dirname(journal_entry.JOURNAL))
    entry = dict(parsed(entries[-1]))
    record = forwarder.records()[-1]
    assert entry["COREDUMP_PID"] == str(found.host_pid).encode()
    assert entry["CORE_PIPE_ID"].decode() == record["id"]
    assert b"no receiver took the core" in entry["CORE_PIPE_REASON"]
    assert "COREDUMP_FILENAME" not in entry
