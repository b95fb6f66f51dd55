"""corepipectl: what it finds, what it shows, and what it writes, whatever a crashed program called itself."""

from __future__ import annotations

import json
import os
import random
import re
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from receiver import ctl, tables
from receiver.ctl import output
from receiver.frames import FRAME
from receiver.record import Record
from receiver.store import Store
from tests.support.kept import HOSTILE, keep, new_record, run, start

NO_MATCH = "corepipectl: no match found. 'corepipectl list' shows what there is\n"


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return tmp_path / "store"


@pytest.fixture(autouse=True)
def _utc(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("TZ", "UTC")
    time.tzset()
    yield
    monkeypatch.undo()
    time.tzset()


if TYPE_CHECKING:
    from collections.abc import Iterator

Captured = pytest.CaptureFixture[str]


# What there is.


def test_no_store_is_no_crash(store: Path, capsys: Captured) -> None:
    assert run(store) == 1
    assert capsys.readouterr() == ("", "No coredumps found.\n")
    assert run(store, "list", "--json") == 0
    assert json.loads(capsys.readouterr().out) == []
    assert run(store, "info", "x") == 1
    assert capsys.readouterr() == ("", "No coredumps found.\n")
    for command in ("dump", "debug"):
        assert run(store, command, "x") == 1
        assert capsys.readouterr() == ("", NO_MATCH)
    assert run(store, "prune", "--to", "0") == 1
    assert capsys.readouterr().err.startswith(f"corepipectl: {store}: cannot be opened")
    assert not store.exists()


def test_list(store: Path, capsys: Captured) -> None:
    first = keep(store, new_record(pid=100))
    second = keep(store, new_record(pid=99, comm="other", exe=None), None)
    assert run(store) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == list(output.HEADING)
    assert [line.split()[-1] for line in lines[1:]] == [first.id, second.id]
    assert lines[1].split()[:10] == [
        "Tue",
        "2023-11-14",
        "22:13:20",
        "UTC",
        "100",
        "1000",
        "1000",
        "SIGSEGV",
        "present",
        "/usr/bin/test",
    ]
    assert lines[2].split()[8:11] == ["none", "other", "-"]
    assert run(store, "list", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert [Record.from_json(record) for record in found] == [first, second]


def test_the_newest_is_last_within_a_second(store: Path, capsys: Captured) -> None:
    kept = [keep(store, new_record(pid=pid)).pid for pid in (1000, 999, 20, 3)]
    run(store, "list", "--json")
    assert [record["pid"] for record in json.loads(capsys.readouterr().out)] == kept
    run(store, "info", "--json")
    assert [record["pid"] for record in json.loads(capsys.readouterr().out)] == [3]
    run(store, "info", "test", "--json")
    assert [record["pid"] for record in json.loads(capsys.readouterr().out)] == kept


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
        assert run(store, "info", match, "--json", "-1") == 0
        assert [record["id"] for record in json.loads(capsys.readouterr().out)] == [expected[-1].id]
    for match in ("1", "on", "/opt", "/opt/on", one.id[:7], "", one.id + "x", "opt/one"):
        assert run(store, "list", match, "--json") == 1, match
        assert json.loads(capsys.readouterr().out) == []
        assert run(store, "dump", match) == 1
        assert capsys.readouterr().err == NO_MATCH


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
    assert re.fullmatch(r"1000( \(.+\))?, effective 0 \(root\)", shown["UID"])
    assert shown["Signal"] == "11 (SEGV)"
    assert shown["Command Line"] == "test -x"
    assert shown["Environment"] == "A=1"
    assert shown["Not taken by"] == "own root: no room"
    assert shown["Storage"] == f"{store}/{record.id}.core.zst (present)"
    assert shown["Core Size"] == "10.0M"
    assert shown["Size on Disk"] == tables.size(record.core.stored_bytes)
    assert shown["Core"] == "stored"
    assert shown["Message"] == "Process 7 (test) of user 1000 crashed."
    assert run(store, "info", "7", "--json") == 0
    assert [Record.from_json(found) for found in json.loads(capsys.readouterr().out)] == [record]


def test_info_of_the_least_and_of_what_has_no_core(store: Path, capsys: Captured) -> None:
    record = new_record(exe=None)
    record.tid = 8
    keep(store, record, None)
    assert run(store, "info", "test") == 0
    said = capsys.readouterr().out
    assert "TID: 8" in said
    assert "Core: none: because" in said
    assert "Storage: none" in said
    assert "Size" not in said
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
        assert len(said.out.splitlines()) < 35


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


@pytest.mark.parametrize("compression", ["zstd", "old", "none"])
@pytest.mark.parametrize("name", CORES)
def test_dump_gives_the_core_back(store: Path, tmp_path: Path, name: str, compression: str) -> None:
    old = compression == "old"
    keep(store, new_record(), CORES[name], compression="zstd" if old else compression, old=old)
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
    # A file that is only appended to has no holes, even when it is empty.
    target.unlink()
    with target.open("ab") as file, start(store, "dump", "7", stdout=file) as program:
        assert program.wait(20) == 0
    assert target.read_bytes() == core
    # Who writes after us writes behind the core.
    with target.open("wb") as file:
        with start(store, "dump", "7", stdout=file) as program:
            assert program.wait(20) == 0
        os.write(file.fileno(), b"after")
    assert target.read_bytes() == core + b"after"


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
    ("damage", "kind"),
    # A plain core has no checksum, only its size.
    [(damage, "none") for damage in ("cut", "a little", "empty", "longer")]
    + [(damage, "zstd") for damage in ("cut", "a little", "empty", "flipped", "garbage")]
    + [(damage, "old") for damage in ("cut", "a little", "empty", "flipped", "garbage")],
)
def test_a_damaged_core_is_said(store: Path, tmp_path: Path, capsys: Captured, damage: str, kind: str) -> None:
    plain = BLOCK * 30
    compression = "none" if kind == "none" else "zstd"
    record = keep(store, new_record(), plain, compression=compression, old=kind == "old")
    core = Path(str(record.core.path))
    data = bytearray(core.read_bytes())
    if damage == "cut":
        del data[len(data) // 2 :]
    elif damage == "a little":
        # The last four bytes of a frame are its checksum.
        del data[-5:]
    elif damage == "empty":
        data.clear()
    elif damage == "longer":
        data += b"more"
    elif damage == "flipped":
        data[len(data) // 2] ^= 1
    else:
        data[:] = BLOCK
    core.write_bytes(data)
    target = tmp_path / "core"
    assert run(store, "dump", "7", "-o", str(target)) == 1
    said = capsys.readouterr().err
    assert "the stored core is damaged" in said
    assert "What can be read was written" in said
    assert "Open it with" not in said
    found = target.read_bytes()
    if (damage, kind) == ("flipped", "zstd"):
        # Frames are independent: one is lost.
        assert "cannot be read, the others can" in said
        assert len(found) == len(plain)
        assert sum(one != other for one, other in zip(found, plain, strict=True)) <= FRAME
    elif damage in ("cut", "a little", "empty", "longer"):
        assert plain.startswith(found)


def test_much_damage_is_said_in_few_words(store: Path, tmp_path: Path, capsys: Captured) -> None:
    record = keep(store, new_record(), random.Random(8).randbytes(15 * FRAME))
    core = Path(str(record.core.path))
    data = bytearray(core.read_bytes())
    for at in range(FRAME // 2, len(data) - FRAME, FRAME // 2):
        data[at] ^= 1
    core.write_bytes(data)
    assert run(store, "dump", "7", "-o", str(tmp_path / "core")) == 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 11
    assert lines[-1].startswith("... and ")


def test_a_record_that_says_less_than_its_core_has(store: Path, tmp_path: Path, capsys: Captured) -> None:
    record = keep(store, new_record(), bytes(50 << 20))
    record.core.size_bytes = 4096
    Path(store, f"{record.id}.json").write_bytes(record.dumps())
    assert run(store, "dump", "7", "-o", str(tmp_path / "core")) == 1
    assert "it has more than the 4096 bytes that its record says" in capsys.readouterr().err
    assert (tmp_path / "core").stat().st_size == 4096


def test_a_compression_that_nobody_knows(store: Path, tmp_path: Path, capsys: Captured) -> None:
    record = keep(store, new_record())
    record.core.compression = HOSTILE
    Path(store, f"{record.id}.json").write_bytes(record.dumps())
    assert run(store, "dump", "7", "-o", str(tmp_path / "core")) == 1
    said = capsys.readouterr().err
    assert "which this version does not know" in said
    assert all(line.isprintable() for line in said.splitlines())
    assert not (tmp_path / "core").exists()


@pytest.mark.parametrize("compression", ["zstd", "none"])
def test_a_reduced_core(store: Path, tmp_path: Path, capsys: Captured, compression: str) -> None:
    keep(store, new_record(), BLOCK, compression=compression, whole_bytes=10 << 20)
    left_out = "9.9M of 10.0M of memory; gdb shows it as unavailable (Cannot access memory)"
    assert run(store, "info", "7") == 0
    said = capsys.readouterr().out
    assert "Core: reduced: some bytes are left out: keep=stacks" in said
    assert f"Left Out: {left_out}" in said
    target = tmp_path / "core"
    assert run(store, "dump", "7", "-o", str(target)) == 0
    assert capsys.readouterr().err == (
        f"{target}: {len(BLOCK)} bytes, reduced\nLeft out: {left_out}\nOpen it with: gdb /usr/bin/test {target}\n"
    )
    assert target.read_bytes() == BLOCK
    assert run(store, "list") == 0
    assert " reduced " in capsys.readouterr().out
    # A core that was reduced, and then went.
    record = new_record(pid=8)
    record.core.state = "reduced"
    assert output.left_out(record) is None


def test_what_is_known_of_the_bug(store: Path, capsys: Captured) -> None:
    facts: dict[str, Any] = {
        "signature": "0123456789abcdef",
        "seen": 3,
        "threads": 16,
        "build_id": "ab12",
        "frames": ["libc.so.6+0x1234", f"{HOSTILE}+0x1"],
    }
    keep(store, new_record(**facts), None)
    assert run(store, "info", "7") == 0
    said = capsys.readouterr().out
    assert all(line.isprintable() for line in said.splitlines())
    for expected in (
        "Signature: 0123456789abcdef",
        "Seen: 3 times lately, this one included",
        "Threads: 16",
        "Build Id: ab12",
        "#0  libc.so.6+0x1234",
    ):
        assert expected in said


def test_a_core_that_is_gone(store: Path, tmp_path: Path, capsys: Captured) -> None:
    record = keep(store, new_record())
    os.unlink(str(record.core.path))
    assert run(store, "dump", "7", "-o", str(tmp_path / "core")) == 1
    assert "has no core: its file is not in the store any more" in capsys.readouterr().err
    assert run(store) == 0
    assert " missing " in capsys.readouterr().out


# Space.


def states(path: Path) -> dict[int, str]:
    store = Store(str(path), create=False)
    try:
        return {record.pid: record.core.state for _, record in store.records() if record is not None}
    finally:
        store.close()


def test_prune_to_a_size(store: Path, capsys: Captured) -> None:
    kept = [keep(store, new_record(pid=pid), BLOCK * 10) for pid in (1, 2, 3)]
    each = kept[0].core.stored_bytes
    assert run(store, "prune", "--to", str(each), "--dry-run") == 0
    said = capsys.readouterr()
    assert said.err == f"2 cores would go, {tables.size(2 * each)}\n"
    assert [line.split()[-1] for line in said.out.splitlines()] == [kept[0].id, kept[1].id]
    assert states(store) == {1: "stored", 2: "stored", 3: "stored"}
    assert run(store, "prune", "--to", str(each)) == 0
    said = capsys.readouterr()
    assert said.err == f"2 cores removed, {tables.size(2 * each)} freed\n"
    assert [line.split()[-1] for line in said.out.splitlines()] == [kept[0].id, kept[1].id]
    assert states(store) == {1: "none", 2: "none", 3: "stored"}
    assert run(store, "info", "1") == 0
    assert "pruned" in capsys.readouterr().out
    # Nothing left to do is no failure: it may be a timer's.
    assert run(store, "prune", "--to", str(each)) == 0
    assert capsys.readouterr() == ("", "0 cores removed, 0B freed\n")
    assert run(store, "prune", "--to", "0") == 0
    assert capsys.readouterr().err.startswith("1 core removed, ")


def test_prune_by_match_and_by_age(store: Path, capsys: Captured) -> None:
    for pid, comm in ((1, "one"), (2, "two"), (3, "one")):
        keep(store, new_record(pid=pid, comm=comm))
    assert run(store, "prune", "one", "--older-than", "1h") == 0
    assert set(states(store).values()) == {"stored"}
    capsys.readouterr()
    assert run(store, "prune", "nobody") == 1
    assert capsys.readouterr().err == NO_MATCH
    assert run(store, "prune", "one") == 0
    assert states(store) == {1: "none", 2: "stored", 3: "none"}
    # Ids begin with the time at which a crash came.
    for path in list(store.glob("*-2-*")):
        name = "20200101T000000" + path.name[15:]
        if path.suffix == ".json":
            old = Record.from_json(json.loads(path.read_text()))
            old.id = name.split(".")[0]
            old.core.path = str(old.core.path).replace(path.name.split(".")[0], old.id)
            path.write_bytes(old.dumps())
        path.rename(store / name)
    assert run(store, "prune", "--older-than", "30d") == 0
    assert states(store)[2] == "none"


def test_prune_removes_nothing_unasked(store: Path, capsys: Captured) -> None:
    keep(store, new_record())
    for arguments in ([], ["--dry-run"]):
        assert run(store, "prune", *arguments) == 1
        assert "say which cores: --to SIZE, --older-than AGE, or a MATCH" in capsys.readouterr().err
    for arguments in (["--to", "much"], ["--to", "-1"], ["--older-than", "old"], ["--older-than", "0"]):
        with pytest.raises(SystemExit) as ended:
            run(store, "prune", *arguments)
        assert ended.value.code == 2
        assert f"'{arguments[1]}' is" in capsys.readouterr().err or arguments[1] == "-1"
    assert states(store) == {7: "stored"}


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root: sudo .venv/bin/python -m pytest")
def test_prune_is_for_the_owner_of_the_store() -> None:
    with tempfile.TemporaryDirectory() as directory:
        os.chmod(directory, 0o755)
        store = Path(directory, "store")
        keep(store, new_record())
        code = (
            "import os, sys; from receiver import ctl, dump, stored; os.setresuid(1000, 1000, 1000); "
            f"sys.exit(ctl.main(['--store', {str(store)!r}, 'prune', '--to', '0']))"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30, check=False)
        assert done.returncode == 1
        assert "not yours to remove cores from. Run it as the store's owner (root)" in done.stderr
        assert states(store) == {7: "stored"}


def test_usage_of_space(store: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CORE_PIPE_STORE_MAX", "100M")
    monkeypatch.setenv("CORE_PIPE_KEEP_FREE", "off")
    monkeypatch.setenv("CORE_PIPE_AGE_MAX", "30d")
    one = keep(store, new_record(exe="/opt/one"), BLOCK * 10)
    two = keep(store, new_record(exe=HOSTILE, uid=33), BLOCK * 20)
    keep(store, new_record(exe="/opt/one"), None)
    assert run(store, "usage") == 0
    said = capsys.readouterr().out
    assert all(line.isprintable() for line in said.splitlines())
    words = [line.split() for line in said.splitlines()]
    sizes = [tables.size(record.core.stored_bytes) for record in (one, two)]
    assert ["1000", "1", sizes[0], "2"] in words
    assert ["33", "1", sizes[1], "1"] in words
    assert ["/opt/one", "1", sizes[0], "2"] in words
    total = one.core.stored_bytes + two.core.stored_bytes
    assert ["all", "2", tables.size(total), "3"] in words
    left = tables.size((100 << 20) - total)
    assert ["store_max", "100M", tables.size(total), left] in words
    assert any(line[:2] == ["age_max", "30d"] for line in words)
    assert said.endswith("before an old one goes (store_max).\n") or "(keep_free)" in said
    assert run(store, "usage", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["total"] == {"cores": 2, "bytes": total, "records": 3}
    assert found["writing"] == {"cores": 0, "bytes": 0}
    assert found["users"] == [
        {"uid": 33, "cores": 1, "bytes": two.core.stored_bytes, "records": 1},
        {"uid": 1000, "cores": 1, "bytes": one.core.stored_bytes, "records": 2},
    ]
    assert [row["program"] for row in found["programs"]] == [HOSTILE, "/opt/one"]
    limits = {row["name"]: row for row in found["limits"]}
    assert limits["store_max"] == {
        "name": "store_max",
        "unit": "bytes",
        "limit": 100 << 20,
        "used": total,
        "headroom": (100 << 20) - total,
    }
    assert found["limiting"] in ("store_max", "keep_free", "memory")
    assert 0 < found["headroom_bytes"] <= (100 << 20) - total


def test_usage_of_a_store_that_is_full(store: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CORE_PIPE_CORES_MAX", "2")
    for pid in range(25):
        keep(store, new_record(pid=pid, exe=f"/opt/{pid}"), b"core" if pid < 2 else None)
    Path(store, "x.json").write_text("garbage")
    assert run(store, "usage") == 0
    said = capsys.readouterr().out
    assert "A next core takes an old one's room (cores_max)." in said
    assert "... and 6 more (--json has them all)" in said
    assert any(line.split()[0] == "?" for line in said.splitlines() if line)


def test_usage_of_a_new_store(store: Path, capsys: Captured) -> None:
    store.mkdir()
    assert run(store, "usage") == 0
    assert "all" in capsys.readouterr().out
    assert run(store, "usage", "--json") == 0
    assert json.loads(capsys.readouterr().out)["total"] == {"cores": 0, "bytes": 0, "records": 0}


def test_durations_and_sizes() -> None:
    for seconds, text in (
        (0, "0s"),
        (59, "59s"),
        (60, "1min"),
        (90, "90s"),
        (150, "2min"),
        (7200, "2h"),
        (86400, "1d"),
    ):
        assert tables.duration(seconds) == text
    for number, text in (
        (0, "0B"),
        (1023, "1023B"),
        (1024, "1.0K"),
        (300 << 20, "300M"),
        ((1 << 20) - 4, "1.0M"),
        (5 << 50, "5120T"),
    ):
        assert tables.size(number) == text


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
            assert b"refusing to dump core to tty (use shell redirection or specify --output)" in program.stderr.read()
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
    for arguments in (
        ["delete"],
        ["nonsense"],
        ["list", "--nonsense"],
        ["list", "-n", "0"],
        ["--debugger", "x", "list"],
    ):
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
