"""corepipectl watch, delete, and the bar: what goes on while it goes on."""

from __future__ import annotations

import io
import json
import os
import pty
import re
import select
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING

import pytest

from receiver.ctl import output, progress
from receiver.record import Record
from receiver.store import Store
from tests.support.kept import HOSTILE, keep, new_record, run, start
from tests.support.waiting import read_line, wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator

Captured = pytest.CaptureFixture[str]
DEADLINE = 20


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return tmp_path / "store"


# Watching.


@contextmanager
def watching(store: Path, *arguments: str) -> Iterator[subprocess.Popen[bytes]]:
    with start(store, "watch", *arguments, stdout=subprocess.PIPE) as program:
        try:
            wait_until(lambda: sleeps_in_poll(program.pid), DEADLINE, "the program watches")
            yield program
        finally:
            program.kill()


def sleeps_in_poll(pid: int) -> bool:
    """Whether it has an inotify instance with a watch, and waits."""
    for number in os.listdir(f"/proc/{pid}/fdinfo"):
        try:
            text = Path(f"/proc/{pid}/fdinfo/{number}").read_text()
        except OSError:
            continue
        if "inotify wd:" in text:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
            # "0" is what those are told who may not know.
            waits_for = Path(f"/proc/{pid}/wchan").read_text()
            return state == "S" and ("poll" in waits_for or waits_for == "0")
    return False


def line_of(program: subprocess.Popen[bytes]) -> str:
    assert program.stdout is not None
    return read_line(program.stdout.fileno(), DEADLINE, "a line").decode()


def test_each_crash_is_told_once(store: Path) -> None:
    keep(store, new_record(1))
    with watching(store) as program:
        second = keep(store, new_record(2, comm=HOSTILE, exe=None))
        heading = line_of(program)
        assert heading.split() == list(output.HEADING)
        told = line_of(program)
        assert told.split()[-1] == second.id
        assert heading.index("COREFILE") == told.index("present ")
        # Its record is written anew: its core is taken away.
        assert run(store, "prune", second.id) == 0
        third = keep(store, new_record(3), None)
        told = line_of(program)
        assert told.split()[-1] == third.id
        assert heading.index("COREFILE") == told.index("none ")
        assert told[:-1].isprintable()
        program.send_signal(signal.SIGINT)
        assert program.wait(DEADLINE) == 0
        assert program.stderr is not None
        assert program.stderr.read() == b""
        assert program.stdout is not None
        assert program.stdout.read() == b""


def test_a_crash_that_is_still_written_is_not_told(store: Path) -> None:
    keep(store, new_record(1))
    with watching(store, "--json") as program:
        writer = Store(str(store))
        entry = writer.begin(new_record(2))
        record = keep(store, new_record(3), None)
        assert json.loads(line_of(program))["id"] == record.id
        entry.finish()
        writer.close()
        assert json.loads(line_of(program))["pid"] == 2


def test_json_is_an_object_a_line(store: Path) -> None:
    keep(store, new_record(1))
    with watching(store, "--json", "web", "db") as program:
        kept = [keep(store, new_record(pid, comm=comm)) for pid, comm in ((2, "web"), (3, "no"), (4, "db"))]
        assert [Record.from_json(json.loads(line_of(program))) for _ in range(2)] == [kept[0], kept[2]]


def test_a_store_that_comes_later_and_goes(tmp_path: Path) -> None:
    store = tmp_path / "a" / "b" / "store"
    with watching(store, "--no-legend") as program:
        for pid in (1, 2):
            keep(store, new_record(pid))
            assert line_of(program).split()[4] == str(pid)
            shutil.rmtree(tmp_path / "a")
            wait_until(lambda: sleeps_in_poll(program.pid), DEADLINE, "it waits again")


def test_garbage_that_comes(store: Path) -> None:
    keep(store, new_record(1))
    with watching(store, "--no-legend") as program:
        (store / "bad.json").write_text("garbage")
        os.mkfifo(store / "fifo.json")
        (store / "link.json").symlink_to("/etc/passwd")
        keep(store, new_record(2))
        assert line_of(program).split()[4] == "2"


def test_a_reader_that_goes(store: Path) -> None:
    keep(store, new_record(1))
    with watching(store) as program:
        assert program.stdout is not None
        program.stdout.close()
        # At once: not when the next crash comes.
        assert program.wait(DEADLINE) == 1
        assert program.stderr is not None
        assert program.stderr.read() == b""


def test_what_cannot_be_watched(tmp_path: Path, capsys: Captured) -> None:
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "store"):
        assert run(path, "watch") == 1
        assert (
            capsys.readouterr().err
            == f"corepipectl: {tmp_path / 'file'}: is no directory. Name another one with --store\n"
        )
    (tmp_path / "link").symlink_to(tmp_path)
    assert run(tmp_path / "link", "watch") == 1
    assert "cannot be opened as a directory" in capsys.readouterr().err


def test_an_interrupt_is_no_traceback(store: Path) -> None:
    keep(store, new_record(), os.urandom(1 << 20))
    with start(store, "dump", stdout=subprocess.PIPE) as program:
        assert program.stdout is not None
        program.stdout.read(1)
        program.send_signal(signal.SIGINT)
        assert program.wait(DEADLINE) == 130
        assert program.stderr is not None
        assert program.stderr.read() == b""


# Deleting.


def left(store: Path) -> list[str]:
    return sorted(path.name for path in store.iterdir() if not path.name.startswith("."))


def test_delete(store: Path, capsys: Captured) -> None:
    kept = [keep(store, new_record(pid, comm=comm)) for pid, comm in ((1, "web"), (2, "web"), (3, "db"))]
    keep(store, new_record(4, comm="web"), None)
    before = left(store)
    assert run(store, "delete", "web", "--dry-run") == 0
    said = capsys.readouterr()
    assert [line.split()[4] for line in said.out.splitlines()[1:]] == ["1", "2", "4"]
    assert said.err.startswith("3 crashes would go, ")
    assert left(store) == before
    assert run(store, "delete", "web", "--yes", "-1") == 0
    assert "1 removed, 0B freed" in capsys.readouterr().err
    assert run(store, "delete", "web", "-y", "-q") == 0
    assert capsys.readouterr() == ("", "")
    assert left(store) == [f"{kept[2].id}.core.zst", f"{kept[2].id}.json"]
    assert run(store, "delete", "web", "-y") == 1
    assert capsys.readouterr().err == "No coredumps found.\n"
    assert run(store, "delete", "db", "nobody", "--until", "now", "-y") == 0
    assert left(store) == []


def test_delete_asks(store: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
    keep(store, new_record())
    before = left(store)
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n"))
    assert run(store, "delete", "7") == 1
    assert "there is no terminal to ask on. Say --yes" in capsys.readouterr().err
    assert left(store) == before


@pytest.mark.parametrize(("answer", "goes"), [("n", False), ("", False), ("yess", False), ("y", True), ("YES", True)])
def test_delete_takes_yes_for_yes(store: Path, answer: str, goes: bool) -> None:
    keep(store, new_record())
    ours, theirs = pty.openpty()
    try:
        os.write(ours, f"{answer}\n".encode())
        with start(store, "delete", "7", stdin=theirs, stdout=subprocess.PIPE) as program:
            _, err = program.communicate(timeout=DEADLINE)
    finally:
        os.close(ours)
        os.close(theirs)
    assert b"Remove 1 crash, " in err
    assert program.returncode == (0 if goes else 1)
    assert (left(store) == []) is goes
    assert (b"Nothing removed." in err) is not goes


def test_a_deleted_core_is_gone_for_its_readers(store: Path) -> None:
    record = keep(store, new_record(), b"secret" * 1000, compression="none")
    with Path(str(record.core.path)).open("rb") as reader:
        assert run(store, "delete", "7", "--yes") == 0
        assert reader.read() == b""


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root: sudo .venv/bin/python -m pytest")
def test_delete_is_for_the_owner_of_the_store(tmp_path: Path) -> None:
    for path in (tmp_path, *tmp_path.parents[:2]):
        path.chmod(0o755)
    store = tmp_path / "store"
    record = keep(store, new_record())
    (store / f"{record.id}.json").chmod(0o644)
    code = (
        "import os, sys, pwd; from receiver import ctl; os.setresuid(1000, 1000, 1000); "
        f"sys.exit(ctl.main(['--store', {str(store)!r}, 'delete', '7', '--yes']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == 1
    assert "not yours to remove crashes from. Run it as the store's owner (root)" in done.stderr
    assert len(left(store)) == 2


# The bar.


def dumped(store: Path, *arguments: str, after: float, **environment: str) -> str:
    """Return what `dump` says on a terminal, whose bar shows itself after so many seconds."""
    ours, theirs = pty.openpty()
    code = (
        f"import sys; from receiver.ctl import output, progress; progress.AFTER = {after}; progress.STEP = 0; "
        "from receiver.ctl import main; sys.exit(main())"
    )
    command = [sys.executable, "-c", code, "--store", str(store), *arguments]
    said = b""
    try:
        subprocess.run(["stty", "columns", "79"], stdin=theirs, check=True, timeout=DEADLINE)
        environment = {**os.environ, "TERM": "xterm", **environment}
        with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=theirs, env=environment) as program:
            deadline = time.monotonic() + DEADLINE
            while program.poll() is None or select.select([ours], [], [], 0)[0]:
                assert time.monotonic() < deadline
                if select.select([ours], [], [], 0.05)[0]:
                    said += os.read(ours, 65536)
        assert program.returncode == 0
    finally:
        os.close(ours)
        os.close(theirs)
    return said.decode()


@pytest.mark.parametrize("compression", ["zstd", "none"])
def test_a_bar_for_what_takes_long(store: Path, tmp_path: Path, compression: str) -> None:
    keep(store, new_record(), os.urandom(5 << 20), compression=compression)
    said = dumped(store, "dump", "-o", str(tmp_path / "core"), after=0)
    looks = re.findall(r"\r\x1b\[Kdump \[(#*-*)\] +(\d+)% \S+ of 5\.0M, \S+/s, \S+ left", said)
    assert len(looks) >= 5
    assert [int(part) for _, part in looks] == sorted(int(part) for _, part in looks)
    assert looks[-1][1] == "100"
    assert "-" not in looks[-1][0]
    assert all(len(line) <= 79 for line in re.split(r"\r\x1b\[K|\r\n", said) if line.startswith("dump ["))
    # It wipes itself away before what is to stay.
    assert said.rpartition("\r\x1b[K")[2].startswith(f"{tmp_path / 'core'}: {5 << 20} bytes")
    # Before a debugger it is the same.
    environment = {"COREPIPECTL_DEBUGGER": "true"}
    assert ("unpack [" in dumped(store, "debug", after=0, **environment)) is (compression == "zstd")


def test_no_bar_where_none_is_wanted(store: Path, tmp_path: Path) -> None:
    keep(store, new_record(), os.urandom(5 << 20))
    core = str(tmp_path / "core")
    # It is done before the bar would show itself; and a terminal that knows no escape sequences.
    for said in (dumped(store, "dump", "-o", core, after=60), dumped(store, "dump", "-o", core, after=0, TERM="dumb")):
        assert said.startswith(core)
        assert "\x1b" not in said


def test_what_a_bar_says(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

        def fileno(self) -> int:
            raise OSError

    terminal: IO[str] = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(progress, "AFTER", 0)
    for done, whole, part in ((0, 0, "  0%"), (5, 0, "100%"), (1 << 70, 1, "100%"), (1, 1 << 70, "  0%")):
        with progress.Progress("x", whole) as bar:
            bar(done)
        assert part in terminal.getvalue()  # type: ignore[attr-defined]
