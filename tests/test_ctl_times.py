"""Times that people type: as systemd reads them, which is asked itself."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import time
from datetime import date
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from receiver.ctl import times
from receiver.record import Record, rfc3339

if TYPE_CHECKING:
    from collections.abc import Iterator

needs_systemd = pytest.mark.skipif(
    shutil.which("systemd-analyze") is None, reason="needs systemd-analyze: apt-get install systemd"
)


def by_systemd(texts: list[str], zone: str) -> list[float]:
    """Return what systemd reads, of texts which it can read."""
    said = subprocess.run(
        ["systemd-analyze", "timestamp", "--", *texts],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
        env={**os.environ, "TZ": zone, "LC_ALL": "C.UTF-8"},
    ).stdout
    return [float(found) for found in re.findall(r"UNIX seconds: @([0-9.]+)", said)]


@pytest.fixture(params=["UTC", "CET-1CEST,M3.5.0,M10.5.0/3", "NST3:30"])
def zone(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setenv("TZ", request.param)
    time.tzset()
    yield str(request.param)
    monkeypatch.undo()
    time.tzset()


ABSOLUTE = [
    "@0",
    "@1700000000",
    "@1700000000.25",
    "@1h",
    "2023-11-14",
    "23-11-14",
    "70-1-2",
    "2023-11-14 10:00",
    "2023-11-14 1:2:3",
    "2023-11-14 10:00:00.5",
    "2023-11-14 10:00:00.123456 UTC",
    "Tue 2023-11-14",
    "tuesday 2023-11-14 23:59:59",
    "2023-02-31",
    "2023-11-31 12:00 UTC",
    "2024-02-29",
    "2023-07-01 12:00",
    "2023-03-26 03:30",
    "2023-10-29 01:30",
]
TODAYS = ["today", "yesterday", "tomorrow", "10:00", "23:59:59", "today UTC", "yesterday UTC"]
RELATIVE = ["now", "-1h", "+3h30min", "2 hours ago", "2 hours left", "1h30min ago", "1.5h ago", "5 ago", "1y 2M ago"]
RELATIVE += ["-3 weeks 2days", "11min ago", "55s500ms ago", "-1month", "-0", "300ms20s 5day ago", "- 5", "-.5h"]
WRONG = ["", " ", "nonsense", "-", "ago", " ago", "@", "+", "1 mon ago", "10:61", "24:00", "2023-13-01", "2023-00-01"]
WRONG += ["2023-11-32", "Mon 2023-11-14", "today 10:00", "10:00 10:00", "-1x", "2023-11-14 now", "1960-01-01 UTC", "10"]
WRONG += [
    "1..5h ago",
    "2 hours",
    "-99999999999999999999y x",
    "\uff12023-11-14",
    "-1h-2h",
    "@-5",
    "a b c d",
    "2023-1-1 x",
]


@needs_systemd
def test_absolute_times_are_systemds(zone: str) -> None:
    assert [times.parse(text) for text in ABSOLUTE] == pytest.approx(by_systemd(ABSOLUTE, zone), abs=1e-5)


@needs_systemd
def test_times_of_today_are_systemds(zone: str) -> None:
    before = [times.parse(text) for text in TODAYS]
    found = by_systemd(TODAYS, zone)
    # Midnight may come in between.
    after = [times.parse(text) for text in TODAYS]
    assert all(middle in (early, late) for early, middle, late in zip(before, found, after, strict=True))


@needs_systemd
def test_relative_times_are_systemds(zone: str) -> None:
    before = time.time()
    found = by_systemd(RELATIVE, zone)
    after = time.time()
    for text, seconds in zip(RELATIVE, found, strict=True):
        assert times.parse(text, before) - 1e-3 <= seconds <= times.parse(text, after) + 1e-3, text


@needs_systemd
@pytest.mark.parametrize("text", [text for text in WRONG if text.strip()])
def test_what_systemd_cannot_read_we_do_not_guess(text: str) -> None:
    with pytest.raises(ValueError, match="is no time; write one as"):
        times.parse(text)
    said = subprocess.run(["systemd-analyze", "timestamp", "--", text], capture_output=True, timeout=60, check=False)
    assert said.returncode != 0


def test_nothing_is_no_time() -> None:
    for text in ("", " ", "infinity", "99999999999999999y left", "9999-12-31 23:59:61"):
        with pytest.raises(ValueError, match="is no time"):
            times.parse(text)


def test_what_our_records_say_is_read() -> None:
    assert times.parse("2023-11-14T22:13:20Z") == 1_700_000_000
    assert times.parse("2023-11-14T22:13:20.500000Z") == 1_700_000_000.5


UNITS = st.sampled_from(["s", "sec", " min", "m", "h", "hours ", " days", "d", "w", "M", "months", "y", "ms", "us", ""])


@needs_systemd
@settings(max_examples=5, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(
        st.one_of(
            st.builds(
                lambda parts: "@" + " ".join(f"{number}{unit}" for number, unit in parts),
                st.lists(st.tuples(st.integers(0, 300), UNITS), min_size=1, max_size=3),
            ),
            st.builds(
                lambda when, clock: f"{when.isoformat()} {clock.strftime('%H:%M:%S.%f')} UTC",
                st.dates(min_value=date(1970, 1, 1)),
                st.times(),
            ).filter(lambda text: text < "9999-12-30"),
        ),
        min_size=20,
        max_size=40,
    )
)
def test_any_time_is_systemds(texts: list[str]) -> None:
    assert [times.parse(text) for text in texts] == pytest.approx(by_systemd(texts, "UTC"), abs=1e-4)


@settings(max_examples=300)
@given(st.one_of(st.text(max_size=30), st.text("0123456789-:. @+agoUTCyM/", max_size=24)))
def test_any_text_is_a_time_or_an_error(text: str) -> None:
    try:
        found = times.parse(text)
    except ValueError:
        return
    assert 0 <= found < 1 << 38
    times.absolute(found)


def test_how_times_are_shown(zone: str) -> None:
    shown = times.absolute(1_700_000_000)
    assert (
        shown
        == {
            "UTC": "Tue 2023-11-14 22:13:20 UTC",
            "CET-1CEST,M3.5.0,M10.5.0/3": "Tue 2023-11-14 23:13:20 CET",
            "NST3:30": "Tue 2023-11-14 18:43:20 NST",
        }[zone]
    )
    assert times.parse(shown) == 1_700_000_000


def test_how_long_ago() -> None:
    for seconds, text in (
        (0, "0s ago"),
        (59, "59s ago"),
        (61, "1min 1s ago"),
        (600, "10min ago"),
        (3700, "1h 1min ago"),
        (7 * 3600, "7h ago"),
        (26 * 3600, "1 day 2h ago"),
        (3 * 86400, "3 days ago"),
        (8 * 86400, "1 week 1 day ago"),
        (65 * 86400, "2 months 4 days ago"),
        (7 * 86400, "1 week ago"),
        (366 * 86400, "1 year ago"),
        (400 * 86400, "1 year 1 month ago"),
        (-5, "5s left"),
    ):
        assert times.relative(seconds) == text


def test_when_a_crash_was() -> None:
    record = Record.of_numbers(
        pid=1, tid=1, uid=0, gid=0, signal=11, time=1_700_000_000, comm=b"", core_limit=0, dumpable=1
    )
    assert times.of(record) == 1_700_000_000
    record.timestamp = rfc3339(1_700_000_000.5)
    assert times.of(record) == 1_700_000_000.5
    record.id = "20231114T221320-123456-7-00000000"
    for text in (
        "\x1b[2J",
        "",
        "9999999-01-01T00:00:00Z",
        "2023-13-99",
        "9" * 100_000 + "-1-1T1:1:1Z",
        "-1-1-1T1:1:1Z",
    ):
        record.timestamp = text
        assert times.of(record) == 1_700_000_000
    record.id = "x"
    assert times.of(record) == 0
