"""The metrics: what Prometheus reads of them, with node_exporter's own reader, and what writing them must not cost."""

from __future__ import annotations

import contextlib
import glob
import json
import os
import re
import shutil
import socket
import subprocess
import threading
import time
import urllib.request
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import forwarder.metrics
from forwarder.ledger.book import Book, Crash, enter
from receiver import counters, metrics
from receiver.config import Config, ConfigError, Limit, load
from receiver.counters import Counters
from receiver.metrics import Family, Sample
from receiver.notify import queue
from receiver.record import Core
from receiver.retention import limits_of
from receiver.store import Store
from tests.support import machine
from tests.support.containers import PlainContainer
from tests.support.crashers import TOOLS
from tests.support.mounts import CHECKOUT
from tests.support.receivers import BIN
from tests.support.waiting import wait_until
from tests.test_counters import new_record
from tests.test_receiver import CORE, running

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

EXPORTER = "prometheus-node-exporter"
# https://prometheus.io/docs/instrumenting/exposition_formats/
LABEL = r'[a-zA-Z_][a-zA-Z0-9_]*="(?:[^"\\\n]|\\\\|\\"|\\n)*"'
LINE = re.compile(rf"([a-zA-Z_:][a-zA-Z0-9_:]*)(?:\{{({LABEL}(?:,{LABEL})*)\}})? (-?[0-9.e+-]+)")


def parse(text: str) -> dict[str, float]:
    """Read the text format as strictly as it is written down: each line by its name and labels."""
    found: dict[str, float] = {}
    kinds: dict[str, str] = {}
    assert text.endswith("\n")
    for line in text.splitlines():
        if line.startswith("# HELP "):
            assert len(line.split(" ", 3)) == 4
            continue
        if line.startswith("# TYPE "):
            _, _, name, kind = line.split(" ")
            assert name not in kinds, "a family comes once"
            kinds[name] = kind
            continue
        match = LINE.fullmatch(line)
        assert match is not None, line
        name = match[1]
        family = re.sub(r"_(bucket|sum|count)$", "", name) if name not in kinds else name
        assert family == list(kinds)[-1], f"{name} stands with its family"
        assert (kinds[family] == "counter") == name.endswith("_total"), name
        key = line.rpartition(" ")[0]
        assert key not in found
        found[key] = float(match[3])
    return found


@pytest.fixture
def store(tmp_path: Path) -> Store:
    config = Config(store_max=Limit(size=1 << 30), cores_max=100, records_max=50)
    return Store(str(tmp_path / "store"), limits=limits_of(config))


def fill(store: Store) -> None:
    for signal, core in (
        (11, None),
        (11, Core(state="reduced", path="/x", reason="1 of 2 bytes are left out: the file system is full")),
        (6, Core(reason="the soft core limit (ulimit -c) of the process is 0")),
    ):
        counters.count(new_record(signal=signal, core=core, seconds=0.2), store, Config())


def test_what_prometheus_reads(store: Store) -> None:
    fill(store)
    Path(store.path, "20260101T000000-000000-7-00000000.core.zst").write_bytes(bytes(8192))
    found = parse(metrics.of_store(store))
    assert found['core_pipe_crashes_total{signal="SIGSEGV"}'] == 2
    assert found['core_pipe_crashes_total{signal="SIGBUS"}'] == 0, "a rate needs a zero to rise from"
    assert found['core_pipe_cores_total{state="stored"}'] == 1
    assert found['core_pipe_cores_total{state="reduced",reason="full"}'] == 1
    assert found['core_pipe_cores_total{state="none",reason="ulimit"}'] == 1
    assert found['core_pipe_dump_duration_seconds_bucket{le="0.1"}'] == 0
    assert found['core_pipe_dump_duration_seconds_bucket{le="0.25"}'] == 3
    assert found['core_pipe_dump_duration_seconds_bucket{le="+Inf"}'] == 3
    assert found["core_pipe_dump_duration_seconds_sum"] == pytest.approx(0.6)
    assert found["core_pipe_store_bytes"] == 8192
    assert found["core_pipe_store_cores"] == 1
    assert found["core_pipe_store_limit_bytes"] == 1 << 30
    assert found["core_pipe_store_limit_cores"] == 100
    assert found["core_pipe_last_crash_timestamp_seconds"] == pytest.approx(time.time(), abs=60)


def test_how_callbacks_fare(store: Store) -> None:
    waiting = queue.Queue()
    line = waiting.lines['we"b'] = queue.Line(0.0)
    line.add("20260101T000000-000000-7-00000000", 1.0, 10)
    line.counters |= {"delivered": 3, "failed": 2, "given_up": 1}
    queue.write(store.directory, waiting)
    found = parse(metrics.of_store(store))
    told = {name: value for name, value in found.items() if name.startswith("core_pipe_notify_")}
    assert told == {
        'core_pipe_notify_delivered_total{callback="we\\"b"}': 3,
        'core_pipe_notify_failed_attempts_total{callback="we\\"b"}': 2,
        'core_pipe_notify_given_up_total{callback="we\\"b"}': 1,
        'core_pipe_notify_dropped_total{callback="we\\"b"}': 0,
        'core_pipe_notify_waiting{callback="we\\"b"}': 1,
    }
    Path(store.path, queue.STATE).write_bytes(b"damaged")
    assert not [name for name in parse(metrics.of_store(store)) if "notify" in name], "and all others are there"


def test_a_limit_that_is_off_is_not_there(tmp_path: Path) -> None:
    found = parse(metrics.of_store(Store(str(tmp_path / "store"))))
    assert not any("limit_bytes" in name for name in found)
    assert "core_pipe_last_crash_timestamp_seconds" not in found, "never is not 1970"


@given(st.lists(st.tuples(st.text(), st.floats(allow_nan=False, allow_infinity=False)), unique_by=lambda pair: pair[0]))
def test_any_label_is_written_so_that_it_can_be_read(pairs: list[tuple[str, float]]) -> None:
    family = Family("x_total", "counter", "a\n\\b", tuple(Sample(value, (("name", text),)) for text, value in pairs))
    text = metrics.render([family])
    # Only \n ends a line there; Python knows more of them.
    lines = [line for line in text.split("\n") if line and not line.startswith("#")]
    values = [re.fullmatch(rf"x_total\{{{LABEL}\}} (\S+)", line) for line in lines]
    assert [float(found[1]) for found in values if found] == [value for _, value in pairs]


def test_who_crashes_cannot_make_time_series(store: Store) -> None:
    for number in range(-300, 300):
        core = Core(state=f"state{number}", reason=f"reason {number}")
        counters.count(new_record(signal=number, core=core), store, Config())
    found = parse(metrics.of_store(store))
    assert len(found) < 130
    assert sum(value for name, value in found.items() if name.startswith("core_pipe_crashes_total")) == 600
    assert sum(value for name, value in found.items() if name.startswith("core_pipe_cores_total")) == 600


# The file


def test_a_reader_finds_it_whole_and_workers_leave_the_last_word(store: Store, tmp_path: Path) -> None:
    at = tmp_path / "metrics" / "core_pipe.prom"
    at.parent.mkdir()
    config = Config(metrics=str(at), store_max=Limit(size=1 << 30))
    counters.count(new_record(), store, config)
    ended = threading.Event()
    seen: list[dict[str, float]] = []

    def read() -> None:
        while not ended.is_set():
            seen.append(parse(at.read_text()))

    def work() -> None:
        own = Store(store.path)
        for _ in range(20):
            counters.count(new_record(), own, config)
        own.close()

    threads = [threading.Thread(target=work) for _ in range(4)]
    reader = threading.Thread(target=read)
    for thread in (reader, *threads):
        thread.start()
    for thread in threads:
        thread.join(60)
    ended.set()
    reader.join(60)
    assert {len(found) for found in seen} == {len(parse(at.read_text()))}, "a scrape has all lines"
    assert seen[0]["core_pipe_store_limit_bytes"] == 1 << 30, "the settings', whoever opened the store how"
    assert parse(at.read_text())['core_pipe_crashes_total{signal="SIGSEGV"}'] == 81
    assert os.listdir(at.parent) == ["core_pipe.prom"]
    assert at.stat().st_mode & 0o777 == 0o644


def test_it_replaces_a_link_and_does_not_follow_it(store: Store, tmp_path: Path) -> None:
    (tmp_path / "victim").write_text("precious")
    at = tmp_path / "x.prom"
    at.symlink_to(tmp_path / "victim")
    metrics.write(str(at), store)
    assert (tmp_path / "victim").read_text() == "precious"
    assert not at.is_symlink()
    parse(at.read_text())


def test_a_directory_that_is_not_there_costs_no_count(store: Store, tmp_path: Path) -> None:
    config = Config(metrics=str(tmp_path / "missing" / "x.prom"))
    with pytest.raises(FileNotFoundError):
        counters.count(new_record(), store, config)
    assert counters.load(store.directory).crashes["SIGSEGV"] == 1
    at = tmp_path / "y.prom"
    at.mkdir()
    with pytest.raises(IsADirectoryError):
        metrics.write(str(at), store)
    assert not [name for name in os.listdir(tmp_path) if name.endswith(".new")]


@pytest.mark.parametrize("text", ["", "x.prom", "/x.txt", "/.prom/..", "/a/../x.prom", "/a\n.prom", "on"])
def test_a_wrong_setting_is_told(text: str, tmp_path: Path) -> None:
    (tmp_path / "x.toml").touch(mode=0o600)
    with pytest.raises(ConfigError, match="METRICS"):
        load(str(tmp_path / "x.toml"), {"CORE_PIPE_METRICS": text})


def test_the_setting(tmp_path: Path) -> None:
    at = tmp_path / "x.toml"
    at.touch(mode=0o600)
    assert load(str(at), {}).metrics is None
    assert load(str(at), {"CORE_PIPE_METRICS": "off"}).metrics is None
    at.write_text('metrics = "/a//b.prom"')
    assert load(str(at), {}).metrics == "/a/b.prom"


# The commands


def ctl(*arguments: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    environment = {"PATH": "/usr/bin:/bin", "LC_ALL": "C.UTF-8", **(env or {})}
    return subprocess.run(
        [f"{BIN}/corepipectl", *arguments], capture_output=True, text=True, check=False, timeout=60, env=environment
    )


def test_the_command_writes_what_there_is(store: Store, tmp_path: Path) -> None:
    fill(store)
    done = ctl("--store", store.path, "metrics")
    assert done.returncode == 0, done.stderr
    assert parse(done.stdout)['core_pipe_crashes_total{signal="SIGSEGV"}'] == 2
    at = tmp_path / "x.prom"
    assert ctl("--store", store.path, "metrics", "-o", str(at)).returncode == 0
    assert parse(at.read_text()).keys() == parse(done.stdout).keys()


def test_before_the_first_crash_there_are_zeros(tmp_path: Path) -> None:
    at = tmp_path / "x.prom"
    for arguments in ((), ("-o", str(at))):
        done = ctl("--store", str(tmp_path / "none"), "metrics", *arguments)
        assert done.returncode == 0, done.stderr
        assert set(parse(done.stdout or at.read_text()).values()) == {0}


def test_a_file_that_cannot_be_written_is_an_error(store: Store) -> None:
    done = ctl("--store", store.path, "metrics", "-o", "/proc/nowhere/x.prom")
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert "/proc/nowhere" in done.stderr


# From a receiver, in a container


@pytest.fixture(scope="module")
def container() -> Iterator[PlainContainer]:
    why = machine.why_unavailable() or PlainContainer.why_unavailable()
    if why is not None:
        pytest.skip(why)
    with PlainContainer() as found:
        yield found


@pytest.mark.kernel
def test_a_crash_is_in_the_file_that_the_settings_name(container: PlainContainer) -> None:
    """By a worker that has given up all its capabilities, in root's directory."""
    container.run(["mkdir", "-p", "/var/lib/metrics"])
    at = Path(f"{container.root}/var/lib/metrics/core_pipe.prom")

    def counted(number: int) -> dict[str, float] | None:
        found = parse(at.read_text()) if at.exists() else {}
        return found if sum(v for k, v in found.items() if k.startswith("core_pipe_crashes_total")) == number else None

    with running(container, metrics="/var/lib/metrics/core_pipe.prom") as receiver:
        with receiver.connect() as forwarder:
            forwarder.offered().send_core(CORE)
        found: dict[str, float] = wait_until(lambda: counted(1), 20, "the crash is counted")
        assert found['core_pipe_cores_total{state="stored"}'] == 1
        assert found["core_pipe_core_bytes_total"] == len(CORE)
        assert found["core_pipe_dump_duration_seconds_count"] == 1
        assert found["core_pipe_store_cores"] == 1
        assert found["core_pipe_store_bytes"] > 0
        with receiver.connect() as forwarder:
            forwarder.offered(core_limit=b"0").done()
        found = wait_until(lambda: counted(2), 20, "the second one is counted")
        assert found['core_pipe_cores_total{state="none",reason="ulimit"}'] == 1


@pytest.mark.kernel
def test_metrics_that_cannot_be_written_cost_no_crash(container: PlainContainer) -> None:
    with running(container, metrics="/nowhere/core_pipe.prom") as receiver:
        with receiver.connect() as forwarder:
            assert forwarder.offered().send_core(CORE)["state"] == b"stored"
        (record,) = receiver.wait_for_records(1)
        assert record["core"]["state"] == "stored"
        wait_until(lambda: "the counters" in receiver.said(), 20, "it is said")


# The host's


def test_what_the_ledger_knows(tmp_path: Path) -> None:
    path = str(tmp_path / "ledger")
    book = Book(path)
    contents, _ = book.open()
    for number, state in enumerate(("lost", "lost", "unclear", "handled", "")):
        enter(contents, Crash(boot="b", began=number, at=1.0, pid=number, tid=number, state=state))
    book.rewrite(contents)
    found = parse(metrics.render(forwarder.metrics.families(path)))
    assert found["core_pipe_ledger_watching"] == 1
    assert found['core_pipe_ledger_crashes{state="lost"}'] == 2
    assert found['core_pipe_ledger_crashes{state="unclear"}'] == 1
    assert found['core_pipe_ledger_settled_total{state="handled"}'] == 1
    assert found["core_pipe_ledger_pending"] == 1
    assert found["core_pipe_quota_warnings_lost_total"] == 0
    book.close()
    assert parse(metrics.render(forwarder.metrics.families(path)))["core_pipe_ledger_watching"] == 0


def test_a_ledger_that_never_watched_says_so(tmp_path: Path) -> None:
    found = parse(metrics.render(forwarder.metrics.families(str(tmp_path / "none"))))
    assert found["core_pipe_ledger_watching"] == 0


# node_exporter's own reader


def exporter() -> str:
    """Return Debian's node_exporter, unpacked and not installed: its service would start. Skips without it."""
    found = glob.glob(f"{TOOLS}/{EXPORTER}/usr/bin/{EXPORTER}")
    if not found:
        base = f"{TOOLS}/{EXPORTER}.{os.getpid()}"
        os.makedirs(base, exist_ok=True)
        try:
            command = ["apt-get", "-q", "-o", "APT::Sandbox::User=root", "download", EXPORTER]
            subprocess.run(command, cwd=base, capture_output=True, check=True, timeout=120)
            (package,) = glob.glob(f"{base}/*.deb")
            subprocess.run(["dpkg-deb", "-x", package, f"{base}/x"], check=True, timeout=60)
            with contextlib.suppress(OSError):
                os.rename(f"{base}/x", f"{TOOLS}/{EXPORTER}")
        except (OSError, subprocess.SubprocessError, ValueError) as error:
            pytest.skip(f"needs {EXPORTER}: apt-get update, then apt-get download {EXPORTER} ({error})")
        finally:
            shutil.rmtree(base, ignore_errors=True)
        found = glob.glob(f"{TOOLS}/{EXPORTER}/usr/bin/{EXPORTER}")
    return found[0]


@contextlib.contextmanager
def scraped(directory: Path) -> Iterator[Callable[[], str]]:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    command = [
        exporter(),
        f"--web.listen-address=127.0.0.1:{port}",
        "--collector.disable-defaults",
        "--collector.textfile",
        f"--collector.textfile.directory={directory}",
    ]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as process:
        try:

            def scrape() -> str:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
                    return str(answer.read().decode())

            def answers() -> bool:
                assert process.poll() is None, process.stderr.read() if process.stderr else ""
                with contextlib.suppress(OSError):
                    return bool(scrape())
                return False

            wait_until(answers, 20, "node_exporter answers")
            yield scrape
        finally:
            process.terminate()


def test_node_exporter_reads_it(store: Store, tmp_path: Path) -> None:
    fill(store)
    directory = tmp_path / "textfile"
    directory.mkdir()
    metrics.write(str(directory / "core_pipe.prom"), store)
    metrics.put(
        str(directory / "core_pipe_host.prom"), metrics.render(forwarder.metrics.families(str(tmp_path / "no")))
    )
    written = parse((directory / "core_pipe.prom").read_text())
    with scraped(directory) as scrape:
        text = scrape()
        assert re.search(r"^node_textfile_scrape_error 0$", text, re.MULTILINE), text
        # It sorts the labels, fills in those that other lines have, and writes numbers its own way.
        for name, value in written.items():
            family, _, labels = name.rstrip("}").partition("{")
            words = labels.split(",") if labels else []
            lines = [line for line in text.splitlines() if re.match(rf"{family}[{{ ]", line)]
            lines = [line for line in lines if all(word in line for word in words)]
            if family == "core_pipe_cores_total" and "reason" not in labels:
                lines = [line for line in lines if 'reason="' not in line.replace('reason=""', "")]
            assert len(lines) == 1, (name, lines)
            assert float(lines[0].rpartition(" ")[2]) == pytest.approx(value)
        assert "# HELP core_pipe_crashes_total Crashes that have a record, by signal." in text
        assert "core_pipe_ledger_watching 0" in text
        # And the next crash shows with the next scrape.
        counters.count(new_record(), store, Config(metrics=str(directory / "core_pipe.prom")))
        assert 'core_pipe_crashes_total{signal="SIGSEGV"} 3' in scrape()


# docs/grafana.json


def exported() -> set[str]:
    """Every name that can be in a file of ours."""
    everything = [
        *metrics.counted(Counters(1.0)),
        *forwarder.metrics.families("/nonexistent"),
    ]
    names = {family.name for family in everything}
    names |= {f"core_pipe_dump_duration_seconds_{part}" for part in ("bucket", "sum", "count")}
    names.add("core_pipe_last_crash_timestamp_seconds")
    for module in (metrics,):
        source = Path(module.__file__ or "").read_text(encoding="utf-8")
        names |= set(re.findall(r'"(core_pipe_store_[a-z_]+)"', source))
        names |= {f"core_pipe_notify_{name}" for name in re.findall(r'family\("([a-z_]+)"', source)}
    return names


def expressions(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        for key, inner in value.items():
            if key in ("expr", "query", "definition") and isinstance(inner, str):
                yield inner
            else:
                yield from expressions(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from expressions(inner)


def dashboard() -> Any:
    return json.loads(Path(CHECKOUT, "docs/grafana.json").read_text(encoding="utf-8"))


def test_the_dashboard_asks_for_what_there_is() -> None:
    asked = {name for text in expressions(dashboard()) for name in re.findall(r"\bcore_pipe_[a-z_]+", text)}
    assert asked - exported() == set()
    # And it shows what matters.
    assert {"core_pipe_crashes_total", "core_pipe_cores_total", "core_pipe_store_limit_bytes"} <= asked
    assert "core_pipe_ledger_crashes" in asked


def test_the_dashboard_can_be_imported() -> None:
    found = dashboard()
    assert found["id"] is None, "Grafana gives it one"
    assert 0 < len(found["uid"]) <= 40
    assert found["title"]
    assert found["schemaVersion"] >= 36
    variables = {variable["name"]: variable for variable in found["templating"]["list"]}
    assert variables["datasource"]["type"] == "datasource"
    assert variables["datasource"]["query"] == "prometheus"
    ids = [panel["id"] for panel in found["panels"]]
    assert len(ids) == len(set(ids))
    places: set[tuple[int, int]] = set()
    for panel in found["panels"]:
        at = panel["gridPos"]
        own = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert not own & places, f"{panel['title']} lies on another one"
        assert max(x for x, _ in own) < 24
        places |= own
        if panel["type"] == "row":
            continue
        assert panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
        assert panel["title"]
        assert panel["description"]
        refs = [target["refId"] for target in panel["targets"]]
        assert len(refs) == len(set(refs)) > 0
        assert all(target["datasource"] == panel["datasource"] for target in panel["targets"])


def test_the_document_names_every_metric() -> None:
    text = Path(CHECKOUT, "docs/metrics.md").read_text(encoding="utf-8")
    bare = {re.sub(r"(?<=duration_seconds)_(bucket|sum|count)$", "", name) for name in exported()}
    assert {name for name in bare if f"`{name}" not in text} == set()
    named = {name for name in re.findall(r"`(core_pipe_[a-z_]+)", text) if not name.endswith("_")}
    assert {
        name for name in named if name.startswith(("core_pipe_c", "core_pipe_s", "core_pipe_n", "core_pipe_l"))
    } <= exported()
