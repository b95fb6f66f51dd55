"""The report: one page that shows what there is, and stays a page whatever a crashed program called itself."""

from __future__ import annotations

import base64
import hashlib
import html.parser
import json
import os
import pty
import re
import subprocess
import time
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from receiver import report, statistics
from receiver.ctl import main as run
from receiver.record import Core, Record
from receiver.report import Lost, charts
from receiver.report.markup import Markup, tag
from receiver.retention import Holding, Report, Use
from receiver.statistics import Event
from receiver.store import Store
from receiver.tables import shown
from tests import screenshot
from tests.support import browser, made_up
from tests.support.receivers import BIN
from tests.test_counters import new_record

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

NOW = 1_764_000_000.0
ELEMENTS = {
    *("html", "head", "meta", "title", "style", "body", "main", "header", "footer", "section", "article", "div", "p"),
    *("h1", "h2", "b", "span", "code", "pre", "ol", "li", "details", "summary", "table", "thead", "tbody", "tr"),
    *("th", "td", "svg", "g", "rect", "line"),
}
ATTRIBUTES = {
    *("lang", "charset", "http-equiv", "content", "name", "class", "open", "start", "viewbox", "preserveaspectratio"),
    *("aria-hidden", "x", "y", "x1", "x2", "y1", "y2", "width", "height"),
}
INJECTIONS = (
    "<script>document.title='owned'</script>",
    "</title></style></svg><script>document.title='owned'</script>",
    '"><img src=x onerror="document.title=\'owned\'">',
    "' onmouseover='document.title=1' x='",
    "<svg/onload=document.title='owned'>",
    "<![CDATA[<b>]]><!--",
    "&lt;b&gt;&#60;script&#62;",
    "javascript:document.title='owned'",
    "\x00\x1b[2J\u202e\u2028\ud800\udcff\ufeff",
    "</pre></details>" * 100,
    "a" * 100_000,
)


class Strict(html.parser.HTMLParser):
    """Reads a page, and takes nothing that is not known to be harmless."""

    def __init__(self) -> None:
        super().__init__()
        self.stack: list[str] = []
        self.seen: list[tuple[str, Any]] = []
        self.texts: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag in ELEMENTS, tag
        names = [name for name, _ in attrs]
        assert set(names) <= ATTRIBUTES, (tag, attrs)
        assert len(names) == len(set(names))
        if tag != "meta":
            self.stack.append(tag)
        self.seen.append((tag, sorted((name, value or "") for name, value in attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.stack.pop() == tag
        self.seen.append(("/" + tag, None))

    def handle_data(self, data: str) -> None:
        self.texts.append(data)
        if data.strip():
            self.seen.append(("", data.strip()))

    def handle_comment(self, data: str) -> None:
        raise AssertionError(data)

    def unknown_decl(self, data: str) -> None:
        raise AssertionError(data)

    handle_pi = handle_comment


def read(text: str) -> Strict:
    assert text.startswith("<!DOCTYPE html>\n<html")
    strict = Strict()
    strict.feed(text)
    strict.close()
    assert strict.stack == []
    return strict


def event(at: float = NOW - 3600, **facts: Any) -> Event:
    record = new_record(core=facts.pop("core", None))
    for name, value in facts.items():
        setattr(record, name, value)
    return Event(at, record)


STORAGE = Report(
    Holding(3, 4096, 5),
    {},
    {},
    Holding(),
    [Use("store_max", "bytes", 1 << 30, (1 << 30) - 1, 1), Use("keep_free", "bytes", 100, 1000, 900)],
    "store_max",
    1,
)


def page(events: list[Event], **more: Any) -> str:
    return report.page(events, **{"now": NOW, "host": "web", "storage": STORAGE, **more})


def test_what_it_shows() -> None:
    gone = Core(reason="evicted: newer cores needed its room (store_max)")
    events = [
        event(signature="a" * 16, frames=["shop+0x12", "libc.so.6+0x7"], exe="/usr/bin/shop"),
        event(signature="a" * 16, backtrace=["#0 in cart_total ()"], backtrace_by="gdb 13.1", exe="/usr/bin/shop"),
        event(signature="b" * 16, frames=["other+0x1"], exe="/usr/bin/other", core=gone),
        event(exe=None, comm="nameless", core=Core(reason="no receiver took the core: web: there is no socket")),
    ]
    text = page(events, only="signal=SEGV", lost=Lost([(NOW, "web!7", "tool", "killed")], 2, watched=False))
    said = "\n".join(read(text).texts)
    for word in (
        "Crashes on web",
        "only signal=SEGV",
        "2\N{MULTIPLICATION SIGN}",
        "#0 in cart_total ()",
        "by gdb 13.1",
        "other+0x1",
        "nameless",
        "no_receiver",
        "It was stored, and had to make room for newer ones.",
        "1.0G of 1.0G (nearly used up)",
        "1000B free, at least 100B",
        "web/7",
        "1 crash left no record at all",
        "Of 2 more it cannot tell. It does not watch now.",
    ):
        assert word in said, word
    assert "shop+0x12" not in said, "the backtrace stands for the frames"


def test_nothing_is_a_page_too() -> None:
    said = "\n".join(read(page([], storage=None)).texts)
    assert "No crash." in said
    assert "Programs" not in said


def test_its_policy_lets_nothing_in_but_its_own_style() -> None:
    text = page([event()])
    (style,) = re.findall(r"<style>(.*?)</style>", text, re.DOTALL)
    hashed = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    policy = dict(
        next(found for name, found in read(text).seen if name == "meta" and ("charset", "utf-8") not in found)
    )
    assert policy["http-equiv"] == "Content-Security-Policy"
    assert policy["content"].startswith("default-src 'none'; ")
    assert f"style-src 'sha256-{hashed}'" in policy["content"]
    assert "unsafe" not in policy["content"]
    assert "url(" not in style
    assert "@import" not in style
    # A policy counts from where it stands.
    assert text.index("Content-Security-Policy") < text.index("<title>")


def hostile(text: str) -> list[Event]:
    facts: dict[str, Any] = {
        "exe": text,
        "comm": text,
        "signal_name": text,
        "frames": [text],
        "signature": text,
        "id": text,
    }
    return [
        event(**facts),
        event(**{**facts, "backtrace": [text] * 100, "backtrace_by": text, "exe": None}),
        event(**facts, core=Core(state=text, reason=text)),
        event(at=1e12, **facts),
        event(at=0.0, **facts),
    ]


@pytest.mark.parametrize("text", INJECTIONS, ids=range(len(INJECTIONS)))
def test_a_name_is_no_markup(text: str) -> None:
    lost = Lost([(1e300, text, text, text)], 0, watched=True)
    found = read(page(hostile(text), host=text, only=text, lost=lost))
    short = text if len(text) <= 40 else "…" + text[-39:]
    assert shown(short) in "".join(found.texts)


@settings(max_examples=60, deadline=None)
@given(st.text(), st.text(alphabet="<>&\"'/=!-[] \n\x00svgonload"), st.floats(0, 1e13))
def test_no_text_is_markup(one: str, other: str, at: float) -> None:
    events = [*hostile(one), *hostile(other), event(at=at)]
    read(page(events, host=one, only=other, lost=Lost([(at, one, other, one)], 1, watched=True)))


@given(st.text(), st.text())
def test_an_element_keeps_its_text_and_attributes(text: str, value: str) -> None:
    strict = Strict()
    strict.feed(tag("p", text, class_=value))
    strict.close()
    assert "".join(strict.texts).split("\n") == [shown(line) for line in text.split("\n")]
    assert strict.seen[0][1] == [("class", "\n".join(shown(line) for line in value.split("\n")))]


def test_only_our_own_markup_is_markup() -> None:
    assert tag("p", Markup("<b></b>"), "<b>", None, 3) == "<p><b></b>&lt;b&gt;3</p>"


# Time


@given(
    st.lists(st.floats(0, 3e9), min_size=1, max_size=50),
    st.floats(0, 3e9),
    st.floats(0, 1e9),
    st.integers(2, 80),
)
def test_a_time_line_has_every_crash_once(times: list[float], begun: float, span: float, most: int) -> None:
    first, length, number = statistics.slots_of(begun, begun + span, most)
    assert first <= begun
    assert begun + span < first + length * number
    assert 1 <= number <= most
    events = [event(at=at) for at in times]
    slots = statistics.timeline(events, first, length, number)
    inside = [at for at in times if first <= at < first + length * number]
    assert abs(sum(slot.states.total() for slot in slots) - len(inside)) <= 1, "one may stand on the edge, in floats"


@given(st.integers(0, 10**9))
def test_an_axis_ends_at_a_round_number(most: int) -> None:
    top = charts.nice(most)
    assert top >= most
    assert top % 2 == 0 or top % 5 == 0
    assert most <= 2 or top <= 2.5 * most


def test_a_full_store_is_a_page_of_some_size() -> None:
    records = [record for record, _ in made_up.records(NOW)]
    events = [Event(NOW - number * 600, records[number % len(records)]) for number in range(4000)]
    for number, one in enumerate(events):
        copy = Record.from_json(one.record.to_json())
        copy.signature, copy.exe, copy.backtrace = f"{number:016x}", f"/bin/{number}", ["x" * 60_000] * 100
        events[number] = Event(one.at, copy)
    text = page(events)
    assert len(text) < 1 << 20
    read(text)


# The command


def ctl(*arguments: str, path: str = "/usr/bin:/bin", **more: Any) -> subprocess.CompletedProcess[str]:
    environment = {"PATH": path, "LC_ALL": "C.UTF-8"}
    return subprocess.run(
        [f"{BIN}/corepipectl", *arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
        env=environment,
        **more,
    )


@pytest.fixture(scope="module")
def crashed(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A store with crashes."""
    path = str(tmp_path_factory.mktemp("report") / "store")
    made_up.fill(path, time.time())
    return path


def test_the_command(crashed: str, tmp_path: Path) -> None:
    at = tmp_path / "report.html"
    done = ctl("--store", crashed, "report", "-o", str(at))
    assert done.returncode == 0, done.stderr
    assert f"{at}: {at.stat().st_size} bytes" in done.stderr
    assert at.stat().st_mode & 0o007 == 0, "other users' programs are in it"
    said = "\n".join(read(at.read_text()).texts)
    assert "/usr/lib/webshop/checkout" in said
    assert "store_max" in said
    piped = ctl("--store", crashed, "report", "--since=-10d", "nginx")
    assert piped.returncode == 0, piped.stderr
    said = "\n".join(read(piped.stdout).texts)
    assert "only nginx" in said
    assert "/usr/lib/webshop/checkout" not in said


@pytest.mark.skipif(os.geteuid() != 0, reason="needs a file of another user's: sudo make test")
def test_a_file_that_waits_for_the_page_does_not_get_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Root writes it, and its owner may not see what is in it."""
    at = tmp_path / "report.html"
    at.write_text("mine")
    os.chown(at, 65534, 65534)
    assert run(["--store", str(tmp_path / "none"), "report", "-o", str(at)]) == 1
    assert "belongs to uid 65534" in capsys.readouterr().err
    assert at.read_text() == "mine"
    os.chown(at, 0, 0)
    assert run(["--store", str(tmp_path / "none"), "report", "-o", str(at)]) == 0
    assert "mine" not in at.read_text()


def test_a_place_without_a_store_has_a_page(tmp_path: Path) -> None:
    done = ctl("--store", str(tmp_path / "none"), "report")
    assert done.returncode == 0, done.stderr
    assert "No crash." in "".join(read(done.stdout).texts)


def test_a_terminal_gets_no_page(crashed: str) -> None:
    ours, theirs = pty.openpty()
    try:
        done = subprocess.run(
            [f"{BIN}/corepipectl", "--store", crashed, "report"],
            stdout=theirs,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
            timeout=60,
        )
    finally:
        os.close(ours)
        os.close(theirs)
    assert done.returncode == 1
    assert "-o FILE" in done.stderr


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (
            json.dumps({"crashes": [{"state": "lost", "at": 1, "key": "k", "comm": "c", "why": "w"}], "watched": True}),
            "1 crash left no record at all",
        ),
        ("{}", None),
        ("not JSON", None),
        ('{"crashes": [{"state": "lost", "at": "x"}], "watched": 1}', None),
    ],
)
def test_what_the_hosts_ledger_says_is_in_it(crashed: str, tmp_path: Path, answer: str, said: str | None) -> None:
    if os.geteuid() != 0:
        pytest.skip("needs root, as the ledger does")
    program = tmp_path / "core-pipe-forwarder"
    program.write_text(f"#!/bin/sh\n[ \"$*\" = 'ledger --json' ] && cat <<'EOF'\n{answer}\nEOF\nexit 1\n")
    program.chmod(0o755)
    done = ctl("--store", crashed, "report", path=f"{tmp_path}:/usr/bin:/bin")
    assert done.returncode == 0, done.stderr
    texts = "\n".join(read(done.stdout).texts)
    assert ("ledger" in texts) == (said is not None)
    assert said is None or said in texts


# A real browser

needs_browser = pytest.mark.skipif(browser.why_unavailable() is not None, reason=str(browser.why_unavailable()))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The page of docs/report.png."""
    base = tmp_path_factory.mktemp("made")
    at = base / "report.html"
    at.write_text(screenshot.page(str(base / "store"), NOW), encoding="utf-8")
    yield at
    for name in os.listdir(base / "store"):
        os.unlink(base / "store" / name)


@needs_browser
def test_a_browser_reads_it_as_it_was_written(made: Path) -> None:
    dom, console = browser.dom(made)
    assert console == []
    assert read(dom).seen == read(made.read_text()).seen


@needs_browser
def test_a_browser_runs_nothing_of_a_hostile_page(tmp_path: Path) -> None:
    at = tmp_path / "report.html"
    events = [found for text in INJECTIONS[:9] for found in hostile(text)]
    at.write_text(page(events, host="".join(INJECTIONS[:8])), encoding="utf-8", errors="strict")
    dom, console = browser.dom(at)
    assert console == []
    assert "<title>Crashes on " in dom
    assert read(dom).seen == read(at.read_text()).seen


@needs_browser
def test_the_policy_holds_where_a_name_got_through(made: Path, tmp_path: Path) -> None:
    """What the tests above make sure of does not happen; if it should, nothing of it runs."""
    at = tmp_path / "report.html"
    script = "<script>document.title='owned'</script><p style='color:red' onclick='1'>x</p><img src=http://x.example/>"
    at.write_text(made.read_text().replace("<main>", f"<main>{script}"), encoding="utf-8")
    dom, console = browser.dom(at)
    assert "<title>Crashes on web-01</title>" in dom
    assert len([line for line in console if "Content Security Policy" in line]) >= 3, console


@needs_browser
def test_the_picture_in_the_documents_is_one(made: Path, tmp_path: Path) -> None:
    at = tmp_path / "report.png"
    assert browser.picture(made, at, width=screenshot.WIDTH, height=screenshot.HEIGHT) == []
    for picture in (at, screenshot.PICTURE):
        head = picture.read_bytes()[:24]
        assert head[:8] == b"\x89PNG\r\n\x1a\n"
        assert (int.from_bytes(head[16:20]), int.from_bytes(head[20:24])) == (screenshot.WIDTH, screenshot.HEIGHT)


def test_the_made_up_store_is_a_store(crashed: str) -> None:
    store = Store(crashed)
    records = [record for _, record in store.records()]
    assert len(records) > 150
    assert None not in records
    assert {"stored", "reduced", "none"} == {record.core.state for record in records if record is not None}
    assert [statistics.state_of(record) for record in records if record is not None and record.core.path is None]
