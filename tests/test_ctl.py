"""corepipectl: what it finds, what it shows, and what it writes, whatever a crashed program called itself."""

from __future__ import annotations

import json
import os
import random
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from receiver import ctl
from receiver.capture import PlainSink, Sink, ZstdSink
from receiver.record import Core, Record
from receiver.store import Store

HOSTILE = "\x1b[2J\x07a\nb\r\u202e\x9b\udcff\t"


def new_record(pid: int = 7, comm: str = "test", exe: str | None = "/usr/bin/test", **facts: Any) -> Record:
    record = Record.of_numbers(
        pid=pid,
        tid=pid,
        uid=1000,
        gid=1000,
        signal=11,
        time=1_700_000_000,
        comm=b"",
        core_limit=1 << 40,
        dumpable=1,
    )
    record.comm = comm
    record.exe = exe
    for name, value in facts.items():
        setattr(record, name, value)
    return record


def keep(path: Path, record: Record, core: bytes | None = b"core", *, compression: str = "zstd") -> Record:
    store = Store(str(path))
    entry = store.begin(record)
    if core is None:
        record.core = Core(reason="because", size_bytes=4711)
    else:
        sink: Sink = PlainSink(entry) if compression == "none" else ZstdSink(entry, 1)
        for at in range(0, len(core), 256 << 10):
            sink.write(memoryview(core)[at : at + (256 << 10)])
        sink.finish()
        record.core = Core(state="stored", size_bytes=len(core), compression=compression)
    entry.finish()
    store.close()
    return record


def run(path: Path, *arguments: str) -> int:
    return ctl.main(["--store", str(path), *arguments])


def start(path: Path, *arguments: str, **options: Any) -> subprocess.Popen[bytes]:
    code = "import sys; from receiver.ctl import main; sys.exit(main())"
    command = [sys.executable, "-c", code, "--store", str(path), *arguments]
    return subprocess.Popen(command, stderr=subprocess.PIPE, **options)


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return tmp_path / "store"


Captured = pytest.CaptureFixture[str]


# What there is.


def test_no_store_is_no_crash(store: Path, capsys: Captured) -> None:
    assert run(store) == 1
    assert capsys.readouterr() == ("", "No crashes found.\n")
    assert run(store, "list", "--json") == 0
    assert json.loads(capsys.readouterr().out) == []
    for command in ("info", "dump"):
        assert run(store, command, "x") == 1
        said = capsys.readouterr()
        assert said.out == ""
        assert said.err.startswith(f"corepipectl: {store}: cannot be opened")
    assert not store.exists()


def test_list(store: Path, capsys: Captured) -> None:
    first = keep(store, new_record(pid=100))
    second = keep(store, new_record(pid=99, comm="other", exe=None), None)
    assert run(store) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["TIME", "PID", "UID", "GID", "SIG", "CORE", "EXE", "SIZE", "ID"]
    assert [line.split()[-1] for line in lines[1:]] == [first.id, second.id]
    assert lines[1].split()[:9] == [
        "2023-11-14",
        "22:13:20",
        "UTC",
        "100",
        "1000",
        "1000",
        "SIGSEGV",
        "stored",
        "/usr/bin/test",
    ]
    assert lines[2].split()[7:10] == ["none", "other", "-"]
    assert run(store, "list", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert [Record.from_json(record) for record in found] == [first, second]


def test_the_newest_is_last_within_a_second(store: Path, capsys: Captured) -> None:
    kept = [keep(store, new_record(pid=pid)).pid for pid in (1000, 999, 20, 3)]
    run(store, "list", "--json")
    assert [record["pid"] for record in json.loads(capsys.readouterr().out)] == kept
    run(store, "info", "test", "--json")
    assert json.loads(capsys.readouterr().out)["pid"] == 3


def test_matches(store: Path, capsys: Captured) -> None:
    one = keep(store, new_record(pid=11, comm="one", exe="/opt/one"))
    two = keep(store, new_record(pid=22, comm="two", exe="/opt/two (deleted)"))
    three = keep(store, new_record(pid=33, comm="one", exe=None))
    for match, expected in (
        ("11", [one]),
        ("one", [one, three]),
        ("/opt/one", [one]),
        ("/opt/two", [two]),
        (two.id, [two]),
        (three.id[:-1], [three]),
        (one.id[:8], [one, two, three]),
    ):
        assert run(store, "list", match, "--json") == 0, match
        found = json.loads(capsys.readouterr().out)
        assert [record["id"] for record in found] == [record.id for record in expected], match
        assert run(store, "info", match, "--json") == 0
        assert json.loads(capsys.readouterr().out)["id"] == expected[-1].id
    for match in ("1", "on", "/opt", "/opt/on", one.id[:7], "", one.id + "x", "opt/one"):
        assert run(store, "list", match, "--json") == 1, match
        assert json.loads(capsys.readouterr().out) == []
        for command in ("info", "dump"):
            assert run(store, command, match) == 1
            assert f"no crash matches '{match}'. 'corepipectl list' shows" in capsys.readouterr().err


def test_info(store: Path, capsys: Captured) -> None:
    facts: dict[str, Any] = {
        "command_line": ["test", "-x"],
        "environment": {"A": "1"},
        "cwd": "/home",
        "euid": 0,
        "tried": ["own root: no room"],
        "cgroup": "/c",
        "host_name": "box",
    }
    record = keep(store, new_record(**facts), bytes(10 << 20))
    assert run(store, "info", "7") == 0
    shown = {}
    for line in capsys.readouterr().out.splitlines():
        label, _, value = line.strip().partition(": ")
        shown[label] = value
    assert shown["ID"] == record.id
    assert shown["PID"] == "7 (test)"
    assert shown["UID"] == "1000, effective 0"
    assert shown["Signal"] == "11 (SIGSEGV)"
    assert shown["Command Line"] == "test -x"
    assert shown["Environment"] == "A=1"
    assert shown["Not taken by"] == "own root: no room"
    assert shown["Storage"] == f"{store}/{record.id}.core.zst"
    assert shown["Size"].startswith("10.0M, ")
    assert shown["Core"] == "stored"
    assert run(store, "info", "7", "--json") == 0
    assert Record.from_json(json.loads(capsys.readouterr().out)) == record


def test_info_of_the_least_and_of_what_has_no_core(store: Path, capsys: Captured) -> None:
    record = new_record(exe=None)
    record.tid = 8
    keep(store, record, None)
    assert run(store, "info", "test") == 0
    said = capsys.readouterr().out
    assert "7, thread 8" in said
    assert "Core: none: because" in said
    assert "Storage" not in said
    assert "None" not in said


@pytest.mark.parametrize("arguments", [["list"], ["info", "7"], ["list", "--json"], ["info", "7", "--json"]])
def test_what_a_program_calls_itself_does_not_move_the_cursor(
    store: Path, capsys: Captured, arguments: list[str]
) -> None:
    facts: dict[str, Any] = {
        "cwd": HOSTILE,
        "root": HOSTILE,
        "cgroup": HOSTILE,
        "host_name": HOSTILE,
        "command_line": [HOSTILE],
        "environment": {HOSTILE: HOSTILE},
        "tried": [HOSTILE],
        # From a store whose records somebody else has written.
        "signal_name": HOSTILE,
        "timestamp": HOSTILE,
    }
    record = new_record(comm=HOSTILE, exe=HOSTILE, **facts)
    keep(store, record, None)
    Path(store, f"{HOSTILE.replace('/', '')}.json").write_text("garbage")
    assert run(store, *arguments) == 0
    said = capsys.readouterr()
    for text in (said.out, said.err):
        for line in text.splitlines():
            assert line.isprintable(), line
            assert "\u202e" not in line
    if "--json" not in arguments:
        assert "\\x1b[2J" in said.out
        assert len(said.out.splitlines()) < 30


def test_a_terminal_without_the_characters(store: Path) -> None:
    keep(store, new_record(comm="ü→", exe=None), None)
    for arguments in (["list"], ["info", "7"]):
        environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
        with start(store, *arguments, stdout=subprocess.PIPE, env=environment) as program:
            out, err = program.communicate(timeout=20)
        assert (program.returncode, err) == (0, b"")
        assert rb"\xfc\u2192" in out


def test_garbage_beside_the_records(store: Path, capsys: Captured) -> None:
    good = keep(store, new_record())
    Path(store, "bad.json").write_text('{"id": "bad"')
    Path(store, "dir.json").mkdir()
    os.mkfifo(store / "fifo.json")
    Path(store, "link.json").symlink_to("/etc/passwd")
    assert run(store, "list", "--json") == 0
    said = capsys.readouterr()
    assert [record["id"] for record in json.loads(said.out)] == [good.id]
    assert said.err == "corepipectl: 4 more cannot be read as records, or not by you\n"
    assert run(store, "info", "7") == 0


# The core.

BLOCK = random.Random(7).randbytes(100_001)
CORES = {
    "empty": b"",
    "tiny": b"\x7fELF",
    "zeros": bytes(3 << 20),
    "holes": BLOCK + bytes(5 << 20) + BLOCK + bytes(1 << 20) + b"x" + bytes(12345),
    "large": BLOCK * 60,
}


@pytest.mark.parametrize("compression", ["zstd", "none"])
@pytest.mark.parametrize("name", CORES)
def test_dump_gives_the_core_back(store: Path, tmp_path: Path, name: str, compression: str) -> None:
    keep(store, new_record(), CORES[name], compression=compression)
    target = tmp_path / "core"
    assert run(store, "dump", "7", "-o", str(target)) == 0
    assert target.read_bytes() == CORES[name]


@pytest.mark.parametrize("compression", ["zstd", "none"])
def test_dump_to_standard_output_is_the_same(store: Path, tmp_path: Path, compression: str) -> None:
    core = CORES["holes"]
    keep(store, new_record(), core, compression=compression)
    with start(store, "dump", "7", stdout=subprocess.PIPE) as program:
        out, err = program.communicate(timeout=20)
    assert (program.returncode, err) == (0, b"")
    assert out == core
    target = tmp_path / "core"
    # Standard output that is a file: as `-o`, where it begins; and not over what stands there already.
    with target.open("wb") as file, start(store, "dump", "7", stdout=file) as program:
        assert program.wait(20) == 0
    assert target.read_bytes() == core
    with target.open("wb") as file:
        file.write(b"before")
        file.flush()
        with start(store, "dump", "7", stdout=file) as program:
            assert program.wait(20) == 0
    assert target.read_bytes() == b"before" + core


@pytest.mark.parametrize("compression", ["zstd", "none"])
def test_dump_leaves_holes(store: Path, tmp_path: Path, compression: str) -> None:
    data = BLOCK + bytes(64 << 20) + BLOCK
    record = keep(store, new_record(), data, compression=compression)
    assert record.core.stored_bytes < 1 << 20
    target = tmp_path / "core"
    assert run(store, "dump", "7", "-o", str(target)) == 0
    assert target.stat().st_size == len(data)
    assert target.stat().st_blocks * 512 < 1 << 20


def test_a_dumped_core_is_for_nobody_else(store: Path, tmp_path: Path, capsys: Captured) -> None:
    keep(store, new_record(), b"secret")
    target = tmp_path / "core"
    before = os.umask(0)
    try:
        assert run(store, "dump", "7", "-o", str(target)) == 0
    finally:
        os.umask(before)
    assert target.stat().st_mode & 0o7777 == 0o600
    assert capsys.readouterr().err == (f"{target}: 6 bytes, stored\nOpen it with: gdb /usr/bin/test {target}\n")
    # A file that was there already, longer, and open to all; where the core has holes, nothing of it stays.
    keep(store, new_record(), CORES["holes"])
    target.write_bytes(b"x" * (20 << 20))
    target.chmod(0o666)
    assert run(store, "dump", "7", "-o", str(target)) == 0
    assert target.stat().st_mode & 0o7777 == 0o600
    assert target.read_bytes() == CORES["holes"]


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root: sudo .venv/bin/python -m pytest")
def test_a_file_that_somebody_else_has_prepared(store: Path, tmp_path: Path, capsys: Captured) -> None:
    keep(store, new_record(), b"secret")
    target = tmp_path / "core"
    target.write_bytes(b"mine")
    os.chown(target, 1000, 1000)
    assert run(store, "dump", "7", "-o", str(target)) == 1
    assert "belongs to uid 1000" in capsys.readouterr().err
    assert target.read_bytes() == b"mine"


@pytest.mark.parametrize("kind", ["link", "dangling", "directory", "socket", "nowhere"])
def test_dump_follows_nothing(store: Path, tmp_path: Path, capsys: Captured, kind: str) -> None:
    keep(store, new_record(), b"secret")
    precious = tmp_path / "precious"
    precious.write_text("precious")
    target = tmp_path / "core"
    with socket.socket(socket.AF_UNIX) as sock:
        if kind == "link":
            target.symlink_to(precious)
        elif kind == "dangling":
            target.symlink_to(tmp_path / "new")
        elif kind == "directory":
            target.mkdir()
        elif kind == "socket":
            sock.bind(str(target))
        else:
            target = tmp_path / "no" / "core"
        assert run(store, "dump", "7", "-o", str(target)) == 1
    said = capsys.readouterr().err
    assert said.startswith(f"corepipectl: {target}: ")
    assert len(said.splitlines()) == 1
    assert precious.read_text() == "precious"
    assert not (tmp_path / "new").exists()


def test_dump_into_a_fifo(store: Path, tmp_path: Path) -> None:
    keep(store, new_record(), CORES["holes"])
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    found: list[bytes] = []
    reader = threading.Thread(target=lambda: found.append(fifo.read_bytes()), daemon=True)
    reader.start()
    assert run(store, "dump", "7", "-o", str(fifo)) == 0
    reader.join(20)
    assert found == [CORES["holes"]]


def test_dump_takes_the_newest_that_has_a_core(store: Path, tmp_path: Path, capsys: Captured) -> None:
    keep(store, new_record(), b"old")
    keep(store, new_record(), b"new", compression="none")
    last = keep(store, new_record(), None)
    assert run(store, "dump", "7", "-o", str(tmp_path / "core")) == 0
    assert (tmp_path / "core").read_bytes() == b"new"
    capsys.readouterr()
    assert run(store, "dump", last.id, "-o", str(tmp_path / "none")) == 1
    assert f"crash {last.id} has no core: because" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    ("damage", "compression"),
    # A plain core has no checksum, only its size.
    [(damage, "none") for damage in ("cut", "a little", "empty")]
    + [(damage, "zstd") for damage in ("cut", "a little", "empty", "flipped", "garbage")],
)
def test_a_damaged_core_is_said(store: Path, tmp_path: Path, capsys: Captured, damage: str, compression: str) -> None:
    record = keep(store, new_record(), BLOCK * 30, compression=compression)
    core = Path(str(record.core.path))
    data = bytearray(core.read_bytes())
    if damage == "cut":
        del data[len(data) // 2 :]
    elif damage == "a little":
        # The last four bytes of a frame are its checksum.
        del data[-5:]
    elif damage == "empty":
        data.clear()
    elif damage == "flipped":
        data[len(data) // 2] ^= 1
    else:
        data[:] = BLOCK
    core.write_bytes(data)
    assert run(store, "dump", "7", "-o", str(tmp_path / "core")) == 1
    said = capsys.readouterr().err
    assert "the stored core is damaged" in said
    assert "Open it with" not in said


def test_a_core_that_is_gone(store: Path, tmp_path: Path, capsys: Captured) -> None:
    record = keep(store, new_record())
    os.unlink(str(record.core.path))
    assert run(store, "dump", "7", "-o", str(tmp_path / "core")) == 1
    assert "has no core: its file is not in the store any more" in capsys.readouterr().err
    assert run(store) == 0
    assert " none " in capsys.readouterr().out


# The other end of standard output.


def test_a_reader_that_goes_away(store: Path) -> None:
    for n in range(30):
        keep(store, new_record(pid=100 + n, environment={f"A{m}": "x" * 100 for m in range(50)}), None)
    with start(store, "list", "--json", stdout=subprocess.PIPE) as program:
        assert program.stdout is not None
        assert program.stdout.readline() == b"[\n"
        program.stdout.close()
        assert program.stderr is not None
        assert program.stderr.read() == b""
        assert program.wait(20) == 1


def test_a_reader_of_a_core_that_goes_away(store: Path) -> None:
    keep(store, new_record(), CORES["large"])
    with start(store, "dump", "7", stdout=subprocess.PIPE) as program:
        assert program.stdout is not None
        assert len(program.stdout.read(4096)) == 4096
        program.stdout.close()
        assert program.stderr is not None
        assert program.stderr.read() == b""
        assert program.wait(20) == 1


def test_a_core_is_not_for_a_terminal(store: Path) -> None:
    keep(store, new_record(), b"\x1b[2J")
    master, slave = os.openpty()
    try:
        with start(store, "dump", "7", stdout=slave) as program:
            assert program.stderr is not None
            assert b"a core is not for a terminal. Write it to a file with -o FILE" in program.stderr.read()
            assert program.wait(20) == 1
    finally:
        os.close(slave)
        os.close(master)


def test_a_full_disk_is_said(store: Path) -> None:
    keep(store, new_record(), CORES["large"])
    with Path("/dev/full").open("wb") as full, start(store, "dump", "7", stdout=full) as program:
        assert program.stderr is not None
        assert b"No space left on device" in program.stderr.read()
        assert program.wait(20) == 1


def test_usage(capsys: Captured) -> None:
    for arguments in (["info"], ["dump"], ["nonsense"], ["list", "--nonsense"]):
        with pytest.raises(SystemExit) as ended:
            ctl.main(arguments)
        assert ended.value.code == 2
    for arguments in (["--help"], ["--version"]):
        with pytest.raises(SystemExit) as ended:
            ctl.main(arguments)
        assert ended.value.code == 0
    assert "corepipectl dump myprogram -o core" in capsys.readouterr().out


def test_wrong_settings_are_said(tmp_path: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CORE_PIPE_CONFIG", str(tmp_path / "nowhere.toml"))
    assert ctl.main(["list"]) == 1
    assert "there is no such file" in capsys.readouterr().err
    monkeypatch.delenv("CORE_PIPE_CONFIG")
    monkeypatch.setenv("CORE_PIPE_STORE", str(tmp_path / "store"))
    keep(tmp_path / "store", new_record())
    assert ctl.main(["list", "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)) == 1
