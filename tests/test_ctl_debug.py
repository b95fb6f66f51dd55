"""corepipectl debug: a real debugger on a stored core, in whatever form it is stored."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from receiver.ctl import copying
from receiver.ctl.debugging import open_plain
from receiver.ctl.matching import Crash, UsageProblem
from receiver.ctl.sources import Local
from receiver.dump import open_nameless
from receiver.frames import FRAME
from receiver.record import Record
from receiver.store import Store
from tests.support.crashers import compile_crasher
from tests.support.kept import HOSTILE, keep, new_record, run, start
from tests.support.terminals import on_terminal
from tests.support.waiting import wait_until

Captured = pytest.CaptureFixture[str]
needs_gdb = pytest.mark.skipif(shutil.which("gdb") is None, reason="needs gdb: apt-get install gdb")
BATCH = "-nx -batch -iex 'set debuginfod enabled off' -ex bt -ex 'info files'"


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return tmp_path / "store"


@pytest.fixture(autouse=True)
def _own_debugger(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("COREPIPECTL_DEBUGGER", "SYSTEMD_DEBUGGER", "TMPDIR"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def tool(tmp_path: Path) -> Path:
    """A debugger that tells what it is called with, and what core it gets."""
    path = tmp_path / "tool"
    path.write_text(
        "#!/bin/sh\n"
        'for word; do echo "word $word"; core=$word; done\n'
        'stat -L -c "%s bytes, %b blocks, mode %a, %h names" "$core"; readlink "$core"; md5sum <"$core"\n'
        "exit 7\n"
    )
    path.chmod(0o755)
    return path


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, bytes]:
    """A program, and a real core of it: made by gdb of a process that lives, so that no core_pattern is needed."""
    program = compile_crasher("crash")
    with subprocess.Popen([program, "SEGV", "--wait"], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        path = tmp_path_factory.mktemp("core") / "core"
        try:
            assert process.stdout is not None
            process.stdout.readline()
            command = ["gdb", "-nx", "-batch", "-iex", "set debuginfod enabled off"]
            command += ["-p", str(process.pid), "-ex", f"generate-core-file {path}"]
            subprocess.run(command, check=True, capture_output=True, timeout=60)
        finally:
            process.kill()
    return program, path.read_bytes()


def debug(store: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    with start(store, "debug", *arguments, stdout=subprocess.PIPE, env={**os.environ, **environment}) as program:
        out, err = program.communicate(timeout=60)
    return subprocess.CompletedProcess(arguments, program.returncode, out.decode(), err.decode())


@needs_gdb
@pytest.mark.parametrize("compression", ["zstd", "none"])
def test_gdb_opens_it(store: Path, real: tuple[str, bytes], compression: str) -> None:
    program, core = real
    record = keep(store, new_record(comm="crash", exe=program), core, compression=compression)
    done = debug(store, "crash", "-A", BATCH)
    assert done.returncode == 0, done.stderr
    assert " in main (" in done.stdout
    assert f"`{program}', file type elf64" in done.stdout
    assert re.search(r"Local core dump file:\n\s*`/proc/\d+/fd/\d+'", done.stdout)
    assert f"Process 7 (crash) of user 1000, SIGSEGV, 2023-11-14T22:13:20Z: {record.id}" in done.stderr
    # A program that was replaced since it started.
    record = keep(store, new_record(8, exe=f"{program} (deleted)", build_id="ab" * 20), core, compression=compression)
    done = debug(store, "8", "-A", BATCH)
    assert " in main (" in done.stdout
    assert f"{program} (deleted): it is not the program that crashed (build id " in done.stderr
    assert "and the core's is abababababab)" in done.stderr
    assert "Install the version that crashed" in done.stderr


@needs_gdb
@pytest.mark.skipif(
    shutil.which("lldb") is None, reason="lldb is large, and not installed by make. Run: apt install lldb"
)
@pytest.mark.parametrize("compression", ["zstd", "none"])
def test_lldb_opens_it(store: Path, real: tuple[str, bytes], compression: str) -> None:
    program, core = real
    keep(store, new_record(comm="crash", exe=program), core, compression=compression)
    done = debug(store, "crash", "--debugger=lldb", "-A", "--batch -o bt")
    assert done.returncode == 0, done.stderr
    assert re.search(r"crash`main", done.stdout), done.stdout


@needs_gdb
def test_gdbs_exit_status_is_ours(store: Path, real: tuple[str, bytes]) -> None:
    program, core = real
    keep(store, new_record(exe=program), core)
    assert debug(store, "-A", "-nx -batch -ex 'quit 42'").returncode == 42
    # The older name, and all that there is.
    with start(store, "gdb", "-A", "-nx -batch -ex 'quit 43'", stdout=subprocess.PIPE) as program_:
        program_.communicate(timeout=60)
    assert program_.returncode == 43


@needs_gdb
def test_info_has_the_backtrace_and_keeps_it(store: Path, real: tuple[str, bytes], capsys: Captured) -> None:
    program, core = real
    kept = keep(store, new_record(exe=program), core)

    def recorded() -> Record:
        return Record.from_json(json.loads((store / f"{kept.id}.json").read_text()))

    assert run(store, "info", "--no-backtrace") == 0
    assert "main (" not in capsys.readouterr().out
    assert recorded().backtrace is None
    keep(store, new_record(8, exe=program), core)
    assert run(store, "info", "7", "8") == 0
    assert "main (" not in capsys.readouterr().out
    assert run(store, "info", "7") == 0
    said = capsys.readouterr()
    assert re.search(r"^ {16}Backtrace \((gdb|eu-stack) [0-9.]+\):$", said.out, re.MULTILINE)
    assert re.search(r"^ {16}#\d+ .* main ", said.out, re.MULTILINE)
    assert said.err == ""
    if os.geteuid() == 0:
        assert any(" main " in line for line in recorded().backtrace or ())
    # What is kept needs no core any more.
    record = recorded()
    record.backtrace, record.backtrace_by = ["#0 as it was kept"], None
    (store / f"{kept.id}.json").write_bytes(record.dumps())
    assert run(store, "info", "7") == 0
    assert "                Backtrace:\n                #0 as it was kept\n" in capsys.readouterr().out


def test_why_there_is_no_backtrace(store: Path, capsys: Captured) -> None:
    keep(store, new_record(1, frames=["libc.so.6+0x1"]), b"garbage")
    keep(store, new_record(2), None)
    assert run(store, "info", "1") == 0
    said = capsys.readouterr().out
    assert "                No backtrace: " in said
    assert "                #0  libc.so.6+0x1\n" in said
    assert run(store, "info", "2") == 0
    assert "backtrace" not in capsys.readouterr().out


def test_what_a_debugger_gets(store: Path, tool: Path, tmp_path: Path) -> None:
    data = os.urandom(100_000) + bytes(64 << 20) + os.urandom(5000)
    keep(store, new_record(exe="/bin/sh"), data)
    done = debug(store, "--debugger", f"{tool} first", "-A", "-x 'a b'", TMPDIR=str(tmp_path))
    assert done.returncode == 7
    words = [line.removeprefix("word ") for line in done.stdout.splitlines() if line.startswith("word ")]
    assert words[:-1] == ["first", "-x", "a b", "/bin/sh", "-c"]
    size, blocks = re.search(r"(\d+) bytes, (\d+) blocks, mode 600, 0 names", done.stdout).groups()  # type: ignore[union-attr]
    assert int(size) == len(data)
    # Zeros take no room.
    assert int(blocks) * 512 < 1 << 20
    assert f"{tmp_path}/" in done.stdout
    assert sorted(path.name for path in tmp_path.iterdir()) == ["store", "tool"]


def test_a_plain_core_is_opened_where_it_is(store: Path, tool: Path) -> None:
    record = keep(store, new_record(), b"x" * 10_000, compression="none")
    done = debug(store, "--debugger", str(tool))
    assert str(record.core.path) in done.stdout.splitlines()
    assert "10000 bytes" in done.stdout


def test_a_reduced_and_a_damaged_core(store: Path, tool: Path) -> None:
    keep(store, new_record(1), b"x" * 5000, whole_bytes=1 << 20)
    done = debug(store, "1", "--debugger", str(tool))
    assert "Left out: " in done.stderr
    assert debug(store, "1", "-q", "--debugger", str(tool)).stderr == ""
    record = keep(store, new_record(2), os.urandom(3 * FRAME))
    core = Path(str(record.core.path))
    core.write_bytes(core.read_bytes()[: 2 * FRAME])
    done = debug(store, "2", "--debugger", str(tool))
    assert done.returncode == 7
    assert "the stored core is damaged" in done.stderr
    assert "The debugger gets what can be read" in done.stderr
    core.write_bytes(b"")
    assert debug(store, "2", "--debugger", str(tool)).returncode == 7
    core.unlink()
    core.symlink_to("/etc/passwd")
    done = debug(store, "2", "--debugger", str(tool))
    assert done.returncode == 1
    assert "word" not in done.stdout
    assert len(done.stderr.splitlines()) == 2


def test_a_program_that_is_not_here(store: Path, tool: Path, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    for pid, exe in enumerate((None, "/nonexistent", "relative", str(tmp_path / "fifo"), f"/{HOSTILE}", "-ex", ""), 1):
        keep(store, new_record(pid, exe=exe))
        done = debug(store, f"pid={pid}", "--debugger", str(tool))
        assert done.returncode == 7
        words = [line.removeprefix("word ") for line in done.stdout.splitlines() if line.startswith("word ")]
        assert words[:-1] == ["-c"]
        assert "the program is not here" in done.stderr
        assert all(line.isprintable() for line in done.stderr.splitlines())


def test_which_debugger(store: Path, tool: Path, tmp_path: Path) -> None:
    keep(store, new_record())
    ours, theirs = {"COREPIPECTL_DEBUGGER": str(tool)}, {"SYSTEMD_DEBUGGER": f"{tool} theirs"}
    assert debug(store, **ours).returncode == 7
    assert "word theirs" in debug(store, **theirs).stdout
    assert "word theirs" not in debug(store, **theirs, **ours).stdout
    assert "word mine" in debug(store, "--debugger", f"{tool} mine", **theirs, **ours).stdout
    for words in ("/nonexistent x", "'", " "):
        done = debug(store, "--debugger", words)
        assert done.returncode == 1
        assert done.stderr.startswith("corepipectl: --debugger: there is no program '")
    assert "COREPIPECTL_DEBUGGER: there is no program" in debug(store, COREPIPECTL_DEBUGGER="nowhere").stderr
    done = debug(store, "-A", "'")
    assert done.returncode == 1
    assert "Quote them as for a shell" in done.stderr
    # lldb where there is no gdb; a hint where there is neither.
    done = debug(store, PATH=str(tmp_path))
    assert done.returncode == 1
    assert "there is no gdb and no lldb here. Install one" in done.stderr
    tool.rename(tmp_path / "lldb")
    assert "word -c" in debug(store, PATH=str(tmp_path)).stdout


def test_of_several_the_newest(store: Path, tool: Path) -> None:
    keep(store, new_record(comm="one"), b"a" * 100)
    second = keep(store, new_record(comm="one"), b"b" * 200)
    keep(store, new_record(comm="one"), None)
    done = debug(store, "one", "--debugger", str(tool))
    assert "200 bytes" in done.stdout
    assert "More than one entry matches, ignoring rest." in done.stderr
    assert second.id in done.stderr


@pytest.fixture
def waiting(tmp_path: Path) -> Path:
    """A debugger that writes its pid, and ends with 9 at ^C."""
    path = tmp_path / "waiting"
    path.write_text(
        f"#!{sys.executable}\n"
        "import os, signal, sys, time\n"
        "def end(*_): os._exit(9)\n"
        "default = signal.getsignal(signal.SIGINT) in (signal.SIG_DFL, signal.default_int_handler)\n"
        "signal.signal(signal.SIGINT, end)\n"
        f"open({str(tmp_path / 'pid.new')!r}, 'w').write(f'{{os.getpid()}} {{default}} {{sys.argv[-1]}}')\n"
        f"os.rename({str(tmp_path / 'pid.new')!r}, {str(tmp_path / 'pid')!r})\n"
        "time.sleep(60)\n"
    )
    path.chmod(0o755)
    return path


def test_interrupts_are_the_debuggers(store: Path, waiting: Path, tmp_path: Path) -> None:
    keep(store, new_record(), b"x" * 5000)
    with start(store, "debug", "--debugger", str(waiting), stdout=subprocess.PIPE, start_new_session=True) as program:
        try:
            wait_until((tmp_path / "pid").exists, 20, "the debugger runs")
            pid, default, core = (tmp_path / "pid").read_text().split()
            assert default == "True"
            os.kill(program.pid, signal.SIGINT)
            # It is still there, and so is the core.
            assert len(Path(core).read_bytes()) == 5000
            os.kill(int(pid), signal.SIGINT)
            assert program.wait(20) == 9
        finally:
            if program.poll() is None:
                os.killpg(program.pid, signal.SIGKILL)


@needs_gdb
def test_gdb_on_a_terminal(store: Path, real: tuple[str, bytes]) -> None:
    """^C is typed while gdb waits for commands: it goes on, and its core is still there."""
    program, core = real
    keep(store, new_record(exe=program), core)
    code = "import sys; from receiver.ctl import main; sys.exit(main())"
    command = [sys.executable, "-c", code, "--store", str(store), "debug", "-q", "-A"]
    command.append("-nx -q -iex 'set debuginfod enabled off' -iex 'set style enabled off' -iex 'set width 0'")
    # Each is typed at a prompt, of which there is one more then.
    typed = [b"\x03", b"bt\n", b"quit 5\n"]

    def keys(said: bytes) -> bytes:
        return typed.pop(0) if typed and said.count(b"(gdb) ") > 3 - len(typed) else b""

    status, said = on_terminal(command, {**os.environ, "TERM": "dumb"}, keys, rows=100)
    assert status == 5, said
    assert b" in main (" in said
    assert b"Quit" in said


def test_a_killed_debugger_is_told_as_a_shell_does(store: Path, tmp_path: Path) -> None:
    keep(store, new_record())
    path = tmp_path / "dying"
    path.write_text("#!/bin/sh\nkill -TERM $$\n")
    path.chmod(0o755)
    assert debug(store, "--debugger", str(path)).returncode == 128 + signal.SIGTERM


def test_a_file_without_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def check() -> None:
        fd = open_nameless(["/nonexistent", str(tmp_path)])
        try:
            assert os.fstat(fd).st_nlink == 0
            assert os.fstat(fd).st_mode & 0o777 == 0o600
            assert not os.get_inheritable(fd)
            assert os.readlink(f"/proc/self/fd/{fd}").startswith(str(tmp_path))
        finally:
            os.close(fd)

    check()
    # Where the file system knows no such files (EISDIR: a kernel that does not know the flag at all).
    monkeypatch.setattr(os, "O_TMPFILE", os.O_DIRECTORY)
    check()
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(FileNotFoundError):
        open_nameless(["/nonexistent"])
    with pytest.raises(FileNotFoundError):
        open_nameless([])


def test_a_strangers_core_leaves_room_for_others(store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A few bytes of a container's may be gigabytes, unpacked: not the last ones of the host's."""
    record = keep(store, new_record(), b"x" * (3 * FRAME))
    source = Local(Store(str(store)))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(copying, "KEEP_FREE", 1 << 60)
    os.close(open_plain(Crash(record, source)))
    source.name = "of a container"
    with pytest.raises(UsageProblem, match="no room for the plain core"):
        open_plain(Crash(record, source))


def test_a_disk_without_room_for_it(store: Path, tool: Path, capsys: Captured) -> None:
    keep(store, new_record(), os.urandom(3 << 20))
    code = (
        "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20)); "
        "from receiver.ctl import main; sys.exit(main())"
    )
    command = [sys.executable, "-c", code, "--store", str(store), "debug", "-q", "--debugger", str(tool)]
    environment = {**os.environ, "TMPDIR": str(tool.parent)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, env=environment)
    assert done.returncode == 1
    assert done.stderr == (
        f"corepipectl: {tool.parent}: no room for the plain core (3.0M, less its zeros). "
        "Set TMPDIR to a directory that has some\n"
    )
    assert "word" not in done.stdout
    assert run(store, "debug", "nobody") == 1
    assert "no match found" in capsys.readouterr().err
