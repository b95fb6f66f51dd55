"""`corepipectl stats`: that it counts right, and shows it on every terminal."""

from __future__ import annotations

import json
import re
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from receiver import statistics
from receiver.ctl.stats import bar
from receiver.record import Core
from receiver.statistics import BY, IN_TIME, STATES, Event
from receiver.store import Store
from tests.support.receivers import BIN
from tests.test_counters import new_record

NOON = 1_763_985_600  # 2025-11-24 12:00 UTC


def keep(
    store: Store, at: int, *, exe: str | None = "/usr/bin/shop", signal: int = 11, uid: int = 7, **facts: Any
) -> None:
    record = new_record(signal=signal, core=Core(reason="the soft core limit (ulimit -c) of the process is 0"))
    stamp = time.strftime("%Y%m%dT%H%M%S", time.gmtime(at))
    record.id = f"{stamp}-000000-7-{len(store.names()):08x}"
    record.timestamp = record.received = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(at))
    record.exe, record.uid = exe, uid
    for name, value in facts.items():
        setattr(record, name, value)
    if facts.get("with_core"):
        name = f"{record.id}.core.zst"
        Path(store.path, name).write_bytes(bytes(4096))
        record.core = Core(state="stored", path=f"{store.path}/{name}", size_bytes=9999, stored_bytes=4096)
    store.add_record(record)


@pytest.fixture
def crashed(tmp_path: Path) -> str:
    store = Store(str(tmp_path / "store"))
    for hours in range(3):
        keep(store, NOON + 3600 * hours, signature="aaaaaaaaaaaaaaaa", with_core=True)
    keep(store, NOON + 2 * 86400, exe="/usr/bin/shop (deleted)", signature="aaaaaaaaaaaaaaaa", signal=6)
    keep(store, NOON + 2 * 86400 + 60, exe=None, comm="tool", uid=1000, container="podman:web")
    store.close()
    return str(tmp_path / "store")


def stats(store: str, *arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    environment = {"PATH": "/usr/bin:/bin", "LC_ALL": "C.UTF-8", "TZ": "UTC", **env}
    return subprocess.run(
        [f"{BIN}/corepipectl", "--store", store, "stats", *arguments],
        capture_output=True, text=True, check=False, timeout=60, env=environment,
    )  # fmt: skip


def rows(store: str, *arguments: str) -> list[dict[str, Any]]:
    done = stats(store, "--json", *arguments)
    assert done.returncode == 0, done.stderr
    found: list[dict[str, Any]] = json.loads(done.stdout)
    return found


def test_by_program(crashed: str) -> None:
    first, second = rows(crashed)
    assert first == {
        "exe": "/usr/bin/shop",
        "crashes": 4,
        "stored": 3,
        "reduced": 0,
        "none": 1,
        "reasons": {"ulimit": 1},
        "bytes": 3 * 4096,
        "first": "2025-11-24T12:00:00Z",
        "last": "2025-11-26T12:00:00Z",
    }
    assert (second["exe"], second["crashes"]) == ("tool", 1)


@pytest.mark.parametrize(
    ("by", "expected"),
    [
        ("signature", {"aaaaaaaaaaaaaaaa": 4, "unknown": 1}),
        ("signal", {"SIGSEGV": 4, "SIGABRT": 1}),
        ("user", {"7": 4, "1000": 1}),
        ("container", {"-": 4, "podman:web": 1}),
        ("day", {"2025-11-24": 3, "2025-11-25": 0, "2025-11-26": 2}),
    ],
)
def test_by_the_others(crashed: str, by: str, expected: dict[str, int]) -> None:
    found = rows(crashed, "--by", by)
    assert [(row[by], row["crashes"]) for row in found] == list(expected.items()), "in this order"


def test_by_hour_in_the_local_zone(crashed: str) -> None:
    found = rows(crashed, "--by", "hour", "--until", "2025-11-24 23:00:00 UTC")
    assert [row["hour"] for row in found] == ["2025-11-24 12:00", "2025-11-24 13:00", "2025-11-24 14:00"]
    done = stats(crashed, "--by", "day", "--no-legend", TZ="Pacific/Kiritimati")
    assert done.stdout.splitlines()[0].startswith("2025-11-25 "), "it is tomorrow there"


def test_only_some(crashed: str) -> None:
    assert [row["crashes"] for row in rows(crashed, "--since", "2025-11-25")] == [1, 1]
    assert [row["exe"] for row in rows(crashed, "tool")] == ["tool"]
    assert [row["exe"] for row in rows(crashed, "-n", "1")] == ["/usr/bin/shop"]
    assert [row["day"] for row in rows(crashed, "--by", "day", "-n", "1")] == ["2025-11-26"], "the newest"


def test_nothing_is_said_as_coredumpctl_says_it(tmp_path: Path) -> None:
    done = stats(str(tmp_path / "none"))
    assert (done.returncode, done.stdout, done.stderr) == (1, "", "No coredumps found.\n")
    done = stats(str(tmp_path / "none"), "--json")
    assert (done.returncode, json.loads(done.stdout)) == (0, [])


@pytest.mark.parametrize("columns", ["40", "80", "200"])
@pytest.mark.parametrize("by", BY)
def test_the_table(crashed: str, by: str, columns: str) -> None:
    done = stats(crashed, "--by", by, COLUMNS=columns)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].startswith(by.upper())
    assert lines[-1] == "5 crashes, 3 with a core, 12.0K; 2 without: 2 ulimit."
    drawn = [re.search(r"[█▏▎▍▌▋▊▉]+$", line) for line in lines[1:-2]]
    lengths = [len(found[0]) if found else 0 for found in drawn]
    assert 8 <= max(lengths) <= 40
    if columns == "200":
        assert max(lengths) == 40
    starts = {found.start() for found in drawn if found}
    assert len(starts) == 1, "they stand in line"


def test_ascii_where_there_is_no_more(crashed: str) -> None:
    done = stats(crashed, LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0")
    assert done.stdout.isascii()
    assert "####" in done.stdout


def test_a_hostile_name_moves_no_cursor(tmp_path: Path) -> None:
    store = Store(str(tmp_path / "store"))
    keep(
        store,
        NOON,
        exe="/tmp/\x1b[2J\n\u202e" + "x" * 4000,
        comm="\x1b]0;t\x07",
        signature="\x1b" * 20,
        signal_name="\r\x1b",
    )
    for by in BY:
        done = stats(store.path, "--by", by)
        assert done.returncode == 0, done.stderr
        assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e]", done.stdout)
        assert max(len(line) for line in done.stdout.splitlines()) < 300
    store.close()


@pytest.mark.parametrize("arguments", [("--by", "colour"), ("-n", "0"), ("-n", "x"), ("--since", "whenever")])
def test_what_it_does_not_know_is_told(crashed: str, arguments: tuple[str, ...]) -> None:
    done = stats(crashed, *arguments)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr


@given(st.integers(0, 10**9), st.integers(1, 10**9), st.integers(1, 200), st.booleans())
def test_a_bar_is_as_long_as_its_share(number: int, most: int, room: int, fine: bool) -> None:
    number = min(number, most)
    found = bar(number, most, room, fine=fine)
    assert len(found) <= room
    assert (found == "") == (number == 0)
    assert abs(len(found) - number * room / most) <= 1 or len(found) == 1
    if number == most:
        assert len(found) == room


EVENTS = st.builds(
    lambda at, exe, signal: Event(at, _record(exe, signal)),
    st.floats(0, 4e9),
    st.none() | st.text(max_size=5),
    st.integers(1, 3),
)


def _record(exe: str | None, signal: int) -> Any:
    record = new_record(signal=signal)
    record.exe = exe
    return record


@given(st.lists(EVENTS, max_size=20), st.sampled_from(list(BY)))
def test_every_crash_is_in_one_row(events: list[Event], by: str) -> None:
    groups = statistics.grouped(events, by)
    assert sum(group.crashes for group in groups) == len(events)
    assert len({group.key for group in groups}) == len(groups)
    assert all(sum(group.states[state] for state in STATES) == group.crashes for group in groups)
    if by in IN_TIME:
        assert [group.key for group in groups] == sorted(group.key for group in groups)
    else:
        assert [group.crashes for group in groups] == sorted((group.crashes for group in groups), reverse=True)
