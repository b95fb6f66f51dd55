"""Which crashes corepipectl lists, in which form, and how it comes to a terminal."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from receiver import ctl
from receiver.ctl import matching, output, pager
from receiver.record import Record, rfc3339
from tests.support.kept import HOSTILE, keep, new_record, run, start
from tests.support.terminals import on_terminal

Captured = pytest.CaptureFixture[str]
NOTHING = "No coredumps found.\n"


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return tmp_path / "store"


@pytest.fixture(autouse=True)
def _plain(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SYSTEMD_COLORS", "NO_COLOR", "SYSTEMD_PAGER", "PAGER", "SYSTEMD_PAGERSECURE", "SYSTEMD_LESS", "LESS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm")


def pids(store: Path, capsys: Captured, *arguments: str) -> list[int]:
    """Return the pids of what `list` gives, in its order."""
    run(store, "list", "--json=short", *arguments)
    return [record["pid"] for record in json.loads(capsys.readouterr().out)]


# Matches.


@pytest.fixture
def various(store: Path) -> Path:
    keep(store, new_record(1, "web", "/usr/bin/web", uid=33, signature="aaaaaa1111111111", unit="web.service"))
    keep(store, new_record(2, "web", "/usr/bin/web", uid=33, signature="bbbbbb1111111111", signal=6), None)
    keep(store, new_record(3, "db", "/usr/bin/db (deleted)", uid=44, signature="aaaaaa2222222222"), whole_bytes=100)
    keep(store, new_record(4, "facade", None, environment={"LANG": "C", "A": "x=y"}, command_line=["a", "b c"]), None)
    return store


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("", [1, 2, 3, 4]),
        # Of one kind: alternatives. Of different kinds: together.
        ("1 3", [1, 3]),
        ("web db", [1, 2, 3]),
        ("web 1", [1]),
        ("web 3", []),
        ("web 1 3", [1]),
        ("/usr/bin/web /usr/bin/db", [1, 2, 3]),
        ("/usr/bin/web aaaaaa", [1]),
        ("aaaaaa", [1, 3]),
        ("aaaaaa1111111111", [1]),
        ("aaaaa", []),
        ("aaaaaa bbbbbb", [1, 2, 3]),
        ("facade", [4]),
        # Fields.
        ("uid=33", [1, 2]),
        ("uid=33 uid=44", [1, 2, 3]),
        ("uid=33 signal=6", [2]),
        ("uid=33 signal=6 signal=11", [1, 2]),
        ("UID=44", [3]),
        ("signal_name=SIGSEGV", [1, 2, 3, 4]),
        ("signal=SEGV", [1, 2, 3, 4]),
        ("signal=SIGSEGV web", [1, 2]),
        ("exe=/usr/bin/db", [3]),
        ("signature=aaaaaa", [1, 3]),
        ("signature=aaaaa", []),
        ("unit=web.service", [1]),
        ("core.state=reduced", [3]),
        ("state=stored", [1]),
        ("environment.LANG=C", [4]),
        ("environment.A=x=y", [4]),
        ("environment=LANG=C", [4]),
        ("environment.B=", []),
        ("command_line=a", [4]),
        ("COREDUMP_PID=2", [2]),
        ("COREDUMP_PID=2 COREDUMP_PID=3 COREDUMP_UID=44", [3]),
        ("COREDUMP_EXE=/usr/bin/web COREDUMP_SIGNAL=6", [2]),
        ("COREDUMP_COMM=db", [3]),
        ("COREDUMP_UNIT=web.service", [1]),
        ("COREDUMP_TIMESTAMP=1700000000000000 1", [1]),
        ("COREDUMP_TRUNCATED=1", [3]),
        ("pid=", []),
    ],
)
def test_matches(various: Path, capsys: Captured, words: str, expected: list[int]) -> None:
    assert pids(various, capsys, *words.split()) == expected
    for command in (("list",), ("info",), ("delete", "--dry-run")):
        if words:
            assert run(various, *command, *words.split()) == (0 if expected else 1)
            said = capsys.readouterr()
            assert (NOTHING in said.err) is not bool(expected)


def test_a_match_with_spaces_and_a_relative_path(
    various: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert pids(various, capsys, "COREDUMP_CMDLINE=a b c") == [4]
    monkeypatch.chdir("/usr")
    assert pids(various, capsys, "bin/web") == [1, 2]
    assert pids(various, capsys, "./bin/db") == [3]


def test_a_field_that_there_is_not(various: Path, capsys: Captured) -> None:
    for word in (
        "nonsense=1",
        "=1",
        "pid.x=1",
        "core=1",
        "COREDUMP_NONSENSE=1",
        f"{HOSTILE}=1",
        "version.1=",
        "core.=1",
    ):
        for command in (("list",), ("dump",), ("delete", "--yes")):
            assert run(various, *command, word) == 1
            said = capsys.readouterr()
            assert said.out == ""
            assert said.err.startswith("corepipectl: a record has no field '"), word
            assert len(said.err.splitlines()) == 1
            assert said.err[:-1].isprintable()


@settings(max_examples=100)
@given(st.text(max_size=12), st.text(max_size=12))
def test_any_word_is_a_match_or_an_error(word: str, other: str) -> None:
    record = new_record(comm=word)
    try:
        test = matching.matcher([word, other])
    except matching.UsageProblem as error:
        assert "=" in word + other
        assert str(error).isprintable()
        return
    assert test(record) in (True, False)


# Times, numbers, order.


@pytest.fixture
def timed(store: Path) -> Path:
    now = time.time()
    for pid, ago in ((1, 3 * 86400), (2, 7200), (3, 60)):
        keep(store, new_record(pid, timestamp=rfc3339(int(now - ago))), None)
    return store


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--since", "1h ago"], [3]),
        (["--since", "-1d"], [2, 3]),
        (["--since=-1d"], [2, 3]),
        (["-S", "-1d", "-U", "-30min"], [2]),
        (["-U", "-1d"], [1]),
        (["--until", "now"], [1, 2, 3]),
        (["--since", "@0"], [1, 2, 3]),
        (["-n", "2"], [2, 3]),
        (["-n2", "-r"], [3, 2]),
        (["-n", "9"], [1, 2, 3]),
        (["-1"], [3]),
        (["-1", "--until", "-1h"], [2]),
        (["--reverse"], [3, 2, 1]),
    ],
)
def test_which_crashes(timed: Path, capsys: Captured, arguments: list[str], expected: list[int]) -> None:
    assert pids(timed, capsys, *arguments) == expected
    # Before the command as well, and without it: as coredumpctl takes them.
    for command in ([], ["list"]):
        run(timed, *arguments, "--json", *command)
        assert [record["pid"] for record in json.loads(capsys.readouterr().out)] == expected


def test_the_store_may_be_named_behind_the_command(timed: Path, capsys: Captured) -> None:
    for arguments in (["list", "--store", str(timed)], ["--store", "/nonexistent", "list", f"--store={timed}", "3"]):
        assert ctl.main([*arguments, "--json=short"]) == 0
        assert [record["pid"] for record in json.loads(capsys.readouterr().out)][-1] == 3


def test_the_very_second_belongs_to_both_sides(store: Path, capsys: Captured) -> None:
    keep(store, new_record(), None)
    assert pids(store, capsys, "--since", "@1700000000", "--until", "@1700000000") == [7]
    assert pids(store, capsys, "--since", "@1700000001") == []
    assert pids(store, capsys, "--until", "@1699999999") == []


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--since", "nonsense"], "'nonsense' is no time; write one as"),
        (["--until", ""], "'' is no time"),
        (["-S", "today", "-U", "yesterday"], "--since= must be before --until="),
        (["-n", "0"], "'0' is no number of at least 1"),
        (["-n", "\u0663"], "is no number of at least 1"),
        (["--json=long"], "--json=long: there are short, pretty, off"),
        (["--since"], "expected one argument"),
    ],
)
def test_what_is_no_argument(store: Path, capsys: Captured, arguments: list[str], said: str) -> None:
    keep(store, new_record(), None)
    with pytest.raises(SystemExit) as ended:
        run(store, "usage" if "long" in arguments[0] else "list", *arguments)
    assert ended.value.code == 2
    assert said in capsys.readouterr().err


def test_options_before_a_command_that_does_not_take_them(store: Path, capsys: Captured) -> None:
    for arguments in (["-n", "1", "dump"], ["--since", "today", "usage"], ["--debugger", "x", "list"], ["-1", "prune"]):
        with pytest.raises(SystemExit) as ended:
            run(store, *arguments, "x")
        assert ended.value.code == 2
        assert f"'{arguments[-1]}' does not take -" in capsys.readouterr().err or arguments[-1] == "usage"


WORDS = [
    "list",
    "info",
    "usage",
    "prune",
    "delete",
    "watchh",
    "-1",
    "-n",
    "2",
    "-n0",
    "-r",
    "-S",
    "-1h",
    "--since=today",
]
WORDS += [
    "-U",
    "yesterday",
    "--json",
    "--json=short",
    "--json=off",
    "short",
    "-F",
    "comm",
    "-q",
    "--no-pager",
    "--",
    "-x",
]
WORDS += [
    "7",
    "test",
    "uid=1000",
    "nonsense=1",
    "=",
    "",
    "/",
    "--to",
    "0",
    "--dry-run",
    "--yes",
    "--no-legend",
    "-A",
    "-o",
]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.one_of(st.sampled_from(WORDS), st.text(max_size=5)), max_size=6))
def test_any_command_line_ends_with_a_status(tmp_path_factory: pytest.TempPathFactory, words: list[str]) -> None:
    store = tmp_path_factory.mktemp("any") / "store"
    keep(store, new_record())
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        try:
            status = run(store, *words)
        except SystemExit as ended:
            status = int(str(ended.code or 0))
    assert status in (0, 1, 2)
    assert "Traceback" not in said.getvalue()


# Forms.


def test_json(various: Path, capsys: Captured) -> None:
    for mode in ("short", "pretty"):
        for command in ("list", "info"):
            assert run(various, command, f"--json={mode}", "web") == 0
            said = capsys.readouterr().out
            assert len(said.splitlines()) == 1 if mode == "short" else said.startswith("[\n  {\n")
            assert [Record.from_json(found).pid for found in json.loads(said)] == [1, 2]
    run(various, "list", "--json", "web")
    assert len(json.loads(capsys.readouterr().out)) == 2
    for arguments in (["list", "--json=off"], ["--json", "off"], ["--json=off", "list"]):
        assert run(various, *arguments) == 0
        assert capsys.readouterr().out.startswith("TIME ")
    assert run(various, "usage", "--json=short") == 0
    assert len(capsys.readouterr().out.splitlines()) == 1
    # Nothing at all is an answer; nothing of what was asked for is a failure.
    assert run(various, "list", "--json", "nobody") == 1
    assert json.loads(capsys.readouterr().out) == []


def test_the_columns(various: Path, capsys: Captured) -> None:
    keep(various, new_record(5, seen=3, signature=None, container="docker:shop"))
    assert run(various, "list") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == [*output.HEADING[:-1], "CONTAINER", "ID"]
    cells = [line.split()[4:] for line in lines[1:]]
    assert [line[4] for line in cells] == ["present", "none", "reduced", "none", "present"]
    assert cells[0][7:10] == ["aaaaaa111111", "-", "-"]
    assert cells[4][7:10] == ["-", "3", "docker:shop"]
    assert run(various, "list", "--no-legend") == 0
    assert [line.split()[4:] for line in capsys.readouterr().out.splitlines()] == cells


def test_values_of_a_field(various: Path, capsys: Captured) -> None:
    for field, expected in (
        ("comm", ["web", "web", "db", "facade"]),
        ("COREDUMP_EXE", ["/usr/bin/web", "/usr/bin/web", "/usr/bin/db (deleted)"]),
        ("environment", ["LANG=C", "A=x=y"]),
        ("environment.LANG", ["C"]),
        ("state", ["stored", "none", "reduced", "none"]),
        ("journal", []),
    ):
        for command in ("list", "info"):
            assert run(various, command, "-F", field, *(["pid=1", "pid=2", "pid=3", "pid=4"])) == 0
            assert capsys.readouterr().out.splitlines() == expected
    assert run(various, "-F", "comm", "list", "uid=44") == 0
    assert capsys.readouterr().out == "db\n"
    assert run(various, "-F", "nonsense") == 1
    assert "a record has no field 'nonsense'" in capsys.readouterr().err
    assert run(various, "-F", "comm", "list", "nobody") == 1
    assert capsys.readouterr().err == NOTHING


def test_quiet(various: Path, capsys: Captured) -> None:
    Path(various, "bad.json").write_text("garbage")
    assert run(various, "list") == 0
    assert "1 more cannot be read" in capsys.readouterr().err
    assert run(various, "-q", "list") == 0
    assert capsys.readouterr().err == ""
    assert run(various, "list", "--quiet", "nobody") == 1
    assert capsys.readouterr() == ("", "")


def test_records_of_wrong_and_huge_content(store: Path, capsys: Captured) -> None:
    kept = keep(store, new_record(), None)
    told = json.loads((store / f"{kept.id}.json").read_text())
    for number, (field, value) in enumerate(
        [
            ("limits", {"nofile": {"soft": "\x1b[2J", "hard": [1]}}),
            ("timestamp", "9999999999999"),
            ("uid", 1 << 80),
            ("signal", -5),
            ("command_line", ["x" * 500_000]),
            ("environment", {"\x1b[2J": "\x1b[2J"}),
            ("open_files", ["\x1b[2J"] * 1000),
            ("mappings", []),
            ("package", {"name": "\x1b[2J"}),
            ("backtrace", ["#0 \x1b[2J\n#1"]),
            ("seen", -(1 << 70)),
        ]
    ):
        owner = f"20230101T000000-000000-{number}-00000000"
        (store / f"{owner}.json").write_text(json.dumps({**told, "id": owner, field: value}))
    for arguments in (["list"], ["info", "test"], ["info", "test", "--full"], ["list", "--since", "@1"], ["-F", "uid"]):
        assert run(store, *arguments) == 0
        said = capsys.readouterr()
        assert said.err == ""
        assert all(line.isprintable() for line in said.out.splitlines())
        assert (max(map(len, said.out.splitlines())) > 400_000) is ("--full" in arguments)


def test_one_long_name_does_not_make_all_lines_long(store: Path, capsys: Captured) -> None:
    for pid in range(3):
        keep(store, new_record(pid, exe="/" + "x" * 500_000 if pid == 1 else "/bin/sh"), None)
    assert run(store, "list") == 0
    said = capsys.readouterr().out
    assert "xxx... " in said
    assert len(said) < 10_000


def test_info_of_all_and_in_the_order_of_coredumpctl(various: Path, capsys: Captured) -> None:
    assert run(various, "info", "web") == 0
    assert re.findall(r"^ *PID: (\d)|^$", capsys.readouterr().out, re.MULTILINE)[:3] == ["1", "", "2"]
    assert run(various, "info") == 0
    said = capsys.readouterr().out
    assert "PID: 4 (facade)" in said
    labels = re.findall(r"^ *([A-Z][\w ]*): ", said, re.MULTILINE)
    wanted = ["PID", "UID", "GID", "Signal", "Timestamp", "Command Line", "Storage", "Message"]
    assert [label for label in labels if label in wanted] == wanted
    assert run(various, "info", "-r") == 0
    assert re.findall(r" PID: (\d)", capsys.readouterr().out) == ["4"]
    assert run(various, "info", "-n", "3", "-r") == 0
    assert re.findall(r" PID: (\d)", capsys.readouterr().out) == ["4", "3", "2"]


def test_info_tells_all_facts(store: Path, capsys: Captured) -> None:
    facts: dict[str, Any] = {
        "container": "docker:shop",
        "unit": "shop.service",
        "package": {"manager": "dpkg", "name": "shop", "version": "1.2-3", "architecture": "amd64"},
        "open_files": [f"{n}: /tmp/{n}" for n in range(100)],
        "mappings": ["7f00-7f01 r-xp libc.so.6"],
        "journal": ["first line", "second line"],
        "backtrace": ["#0  0x1 in crash ()", "#1  main ()"],
        "backtrace_by": "gdb 13.1",
        "limits": {"nofile": {"soft": 1024, "hard": None}},
        "frames": ["not+0x1"],
    }
    keep(store, new_record(**facts), None)
    assert run(store, "info") == 0
    said = capsys.readouterr().out
    for line in (
        "       Package: shop 1.2-3 amd64 (dpkg)",
        "          Unit: shop.service",
        "     Container: docker:shop",
        "    Open Files: 0: /tmp/0",
        "                1: /tmp/1",
        "                ... and 80 more (--full)",
        "      Mappings: 7f00-7f01 r-xp libc.so.6",
        "       Journal: first line",
        "                second line",
        "        Limits: nofile: 1024, at most unlimited",
        "                Backtrace (gdb 13.1):",
        "                #1  main ()",
    ):
        assert line in said.splitlines()
    assert "99: " not in said
    assert "not+0x1" not in said
    assert run(store, "info", "--full") == 0
    assert "                99: /tmp/99" in capsys.readouterr().out.splitlines()


# Terminals.


def listed(
    store: Path, *arguments: str, keys: bytes = b"", before: str = "", environment: dict[str, str] | None = None
) -> tuple[int, str]:
    """Run corepipectl on a terminal. Returns its exit status, and all that came to the terminal.

    keys: typed when it has shown something. before: Python that runs before it.
    """
    code = f"import sys; {before}\nfrom receiver.ctl import main; sys.exit(main())"
    command = [sys.executable, "-c", code, "--store", str(store), *arguments]
    left = [keys]
    status, said = on_terminal(
        command, {**os.environ, **(environment or {})}, lambda said: left.pop() if left and len(said) > 20 else b""
    )
    return status, said.decode()


GREY, YELLOW, UNDERLINED = "\x1b[0;38;5;245m", "\x1b[0;1;38;5;185m", "\x1b[0;4m"


def test_colours_on_a_terminal(various: Path) -> None:
    status, said = listed(various, "--no-pager")
    assert status == 0
    assert f"{UNDERLINED}TIME" in said
    assert f"{GREY}none " in said
    assert f"{YELLOW}reduced" in said
    assert "\x1b[0;90mnone" in listed(various, "--no-pager", environment={"SYSTEMD_COLORS": "16"})[1]
    for environment in ({"NO_COLOR": "1"}, {"TERM": "dumb"}, {"SYSTEMD_COLORS": "0"}):
        status, said = listed(various, "--no-pager", environment=environment)
        assert status == 0
        assert "\x1b" not in said
        assert "reduced" in said


def test_colours_where_they_are_asked_for(various: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run(various) == 0
    plain = capsys.readouterr().out
    assert "\x1b" not in plain
    monkeypatch.setenv("SYSTEMD_COLORS", "1")
    assert run(various) == 0
    painted = capsys.readouterr().out
    assert GREY in painted
    # The columns stand where they stood.
    assert re.sub(r"\x1b\[[0-9;]*m", "", painted) == plain
    assert run(various, "info", "web") == 0
    assert "PID: \x1b[0;1;39m1 (web)\x1b[0m" in capsys.readouterr().out


@pytest.fixture
def many(store: Path) -> Path:
    for pid in range(100, 130):
        keep(store, new_record(pid), None)
    return store


def shows_all(said: str) -> bool:
    return "101" in said and " 129 " in said


@pytest.fixture
def tattling(tmp_path: Path) -> Path:
    """A directory with a `less`, a `pager` and one of the user's, which tell that they ran, and with what."""
    directory = tmp_path / "bin"
    directory.mkdir()
    for name in ("less", "pager", "mine"):
        path = directory / name
        path.write_text(f'#!/bin/sh\necho "this is {name} $*, secure=$LESSSECURE, less=$LESS"; cat >/dev/null\n')
        path.chmod(0o755)
    return directory


def test_a_real_pager(many: Path) -> None:
    status, said = listed(many, "list", keys=b"q")
    assert status == 0
    assert " 100 " in said
    # Five lines are all that less shows before it is asked for more.
    assert " 129 " not in said
    status, said = listed(many, "list", "-n", "2")
    assert status == 0
    assert " 129 " in said


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        # Nobody knows whose session this is: only less, and no programs from it.
        ({"PAGER": "mine", "session": ""}, "this is less , secure=1, less=FRSXMK"),
        ({"PAGER": "mine", "session": "/user.slice/user-4711.slice/session-1.scope"}, "this is less , secure=1"),
        # His own.
        ({"PAGER": "mine -x 'a b'", "session": "own"}, "this is mine -x a b, secure=, less=FRSXMK"),
        ({"SYSTEMD_PAGER": "mine", "PAGER": "less", "session": "own"}, "this is mine , secure=,"),
        ({"session": "own"}, "this is pager , secure=,"),
        ({"session": "own", "LESSSECURE": "1"}, "this is pager , secure=,"),
        ({"PAGER": "nowhere", "session": "own"}, "this is pager"),
        ({"SYSTEMD_LESS": "FRX", "session": "own"}, "less=FRX\r"),
        # He says so himself.
        ({"PAGER": "mine", "SYSTEMD_PAGERSECURE": "1", "session": "own"}, "this is mine , secure=1"),
        ({"PAGER": "mine", "SYSTEMD_PAGERSECURE": "0", "session": ""}, "this is mine , secure=,"),
        ({"PAGER": "mine", "SYSTEMD_PAGERSECURE": "maybe", "session": "own"}, "this is less , secure=1"),
        # None.
        ({"SYSTEMD_PAGER": "", "PAGER": "mine", "session": "own"}, None),
        ({"PAGER": "cat", "session": "own"}, None),
        ({"TERM": "dumb", "PAGER": "mine", "session": "own"}, None),
    ],
)
def test_which_pager(
    many: Path, tattling: Path, tmp_path: Path, environment: dict[str, str], expected: str | None
) -> None:
    session = environment.pop("session")
    if session == "own":
        session = f"/user.slice/user-{os.geteuid()}.slice/session-1.scope"
    cgroups = tmp_path / "cgroup"
    cgroups.write_text(f"0::{session}\n")
    before = f"import receiver.ctl.pager as pager; pager.OWN_CGROUPS = {str(cgroups)!r}"
    path = f"{tattling}:{os.environ['PATH']}"
    status, said = listed(many, "list", before=before, environment={"PATH": path, **environment})
    assert status == 0
    if expected is None:
        assert "this is" not in said
        assert shows_all(said)
    else:
        assert expected in said
        assert not shows_all(said)


def test_no_pager(many: Path, tattling: Path) -> None:
    path = f"{tattling}:{os.environ['PATH']}"
    for arguments in (["list", "--no-pager"], ["--no-pager"], ["list", "--json"], ["info", "100", "--no-pager"]):
        status, said = listed(many, *arguments, environment={"PATH": path})
        assert status == 0
        assert "this is" not in said
    # There is none, and nothing is lost.
    status, said = listed(many, "list", environment={"PATH": "/nonexistent"})
    assert status == 0
    assert shows_all(said)


def test_a_pager_is_for_terminals(many: Path, tattling: Path) -> None:
    environment = {**os.environ, "PATH": f"{tattling}:{os.environ['PATH']}"}
    with start(many, "list", stdout=subprocess.PIPE, env=environment) as program:
        out, _ = program.communicate(timeout=20)
    assert b"this is" not in out
    assert shows_all(out.decode())


def test_the_session_is_read_as_systemd_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "cgroup"
    monkeypatch.setattr(pager, "OWN_CGROUPS", str(path))
    assert pager._session_owner() is None
    for text, owner in (
        ("0::/user.slice/user-1000.slice/session-2.scope\n", 1000),
        ("3:cpu:/\n0::/user.slice/user-0.slice/user@0.service/x\n", 0),
        ("0::/user.slice/user-1000.slice\n", 1000),
        ("0::/system.slice/ssh.service\n", None),
        ("0::/user-x.slice\n", None),
        ("0::/", None),
    ):
        path.write_text(text)
        assert pager._session_owner() == owner
