"""The counters of a store: what they count, and that nothing of a full disk, a kill or a stranger makes them lie."""

from __future__ import annotations

import ast
import contextlib
import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from receiver import counters, reasons
from receiver.config import Config
from receiver.counters import BUCKETS, CORES, Counters
from receiver.reasons import REASONS, word_for
from receiver.record import Core, Record
from receiver.retention import NoRoom
from receiver.store import Store
from tests.support.mounts import CHECKOUT, mount, unmount_below

CONFIG = Config()


def new_record(*, signal: int = 11, core: Core | None = None, seconds: float | None = None) -> Record:
    record = Record.of_numbers(
        pid=7,
        tid=7,
        uid=1000,
        gid=1000,
        signal=signal,
        time=1_700_000_000,
        comm=b"test",
        core_limit=1 << 40,
        dumpable=1,
    )
    record.core = core or Core(state="stored", path="/s/x.core", size_bytes=1000, stored_bytes=512)
    record.seconds = seconds
    return record


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(str(tmp_path / "store"))


def test_a_crash_is_counted_by_signal_state_reason_size_and_time(store: Store) -> None:
    for signal, core, seconds in (
        (11, None, 0.02),
        (11, Core(state="reduced", path="/x", reason="9 of 10 bytes are left out: core_max allows 5 bytes"), 0.1),
        (6, Core(reason="it crashes in a loop: 20 cores of this program were taken within 600 s"), None),
        (6, None, 1000.0),
    ):
        counters.count(new_record(signal=signal, core=core, seconds=seconds), store, CONFIG)
    found = counters.load(store.directory)
    assert {name: number for name, number in found.crashes.items() if number} == {"SIGSEGV": 2, "SIGABRT": 2}
    assert {name: number for name, number in found.cores.items() if number} == {
        "stored/": 2,
        "reduced/limit": 1,
        "none/loop": 1,
    }
    assert (found.core_bytes, found.disk_bytes) == (2000, 1024)
    assert found.seconds[0] == 1
    assert found.seconds[BUCKETS.index(0.1)] == 1, "a bucket's bound belongs to it"
    assert found.seconds[-1] == 1
    assert found.seconds_sum == pytest.approx(1000.12)


def test_a_crash_is_counted_once(store: Store) -> None:
    """Who finishes for a worker that was killed cannot know how far that one had come."""
    records = [new_record() for _ in range(70)]
    for record in records:
        counters.count(record, store, CONFIG)
    for record in records[-60:]:
        counters.count(record, store, CONFIG)
    assert counters.load(store.directory).crashes["SIGSEGV"] == 70
    assert os.stat(f"{store.path}/{counters.NAME}").st_size == counters.SIZE


def test_they_survive_their_records(store: Store) -> None:
    record = new_record(core=Core(reason="because"))
    store.add_record(record)
    counters.count(record, store, CONFIG)
    os.unlink(f"{store.path}/{record.id}.json")
    assert counters.load(store.directory).crashes["SIGSEGV"] == 1


def test_nobody_takes_the_file_for_a_record_or_clears_it_away(store: Store) -> None:
    counters.count(new_record(), store, CONFIG)
    assert list(store.records()) == []
    assert store.recover() == []
    assert store.used() == 0
    assert counters.NAME in store.names()


def test_workers_at_the_same_time_lose_no_count(store: Store) -> None:
    def work() -> None:
        own = Store(store.path)
        for _ in range(25):
            counters.count(new_record(), own, CONFIG)
        own.close()

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert counters.load(store.directory).crashes["SIGSEGV"] == 100


def test_a_full_disk_goes_on_counting_in_place(tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("needs root: a small tmpfs")
    mount("-t", "tmpfs", "-o", "size=64k", "test", str(tmp_path))
    try:
        store = Store(f"{tmp_path}/store")
        counters.count(new_record(), store, CONFIG)
        fill(f"{tmp_path}/filler")
        counters.count(new_record(), store, CONFIG)
        assert counters.load(store.directory).crashes["SIGSEGV"] == 2
        assert f"{counters.NAME}.new" not in store.names()
        # The first count of all has no place: that is said, and it costs nothing else.
        os.unlink(f"{store.path}/{counters.NAME}")
        fill(f"{tmp_path}/filler")
        with pytest.raises(OSError, match="No space left"):
            counters.count(new_record(), store, CONFIG)
        store.close()
    finally:
        unmount_below(str(tmp_path))


def fill(path: str) -> None:
    """Take what the disk has left."""
    with open(path, "ab", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(4096))


@pytest.mark.parametrize(
    "damaged", [b"", b"{", b"[]", b"null", b'{"since": 1}', b"\0" * 4096, b"[" * 100_000, b'{"since": NaN, "last": 0}']
)
def test_a_damaged_file_counts_from_zero(store: Store, damaged: bytes) -> None:
    Path(store.path, counters.NAME).write_bytes(damaged)
    counters.count(new_record(), store, CONFIG)
    assert counters.load(store.directory).crashes["SIGSEGV"] == 1


def test_what_is_no_file_is_not_waited_for_and_not_followed(store: Store, tmp_path: Path) -> None:
    os.mkfifo(f"{store.path}/{counters.NAME}")
    with pytest.raises(OSError, match="not a file"):
        counters.load(store.directory)
    os.unlink(f"{store.path}/{counters.NAME}")
    (tmp_path / "elsewhere").write_text("{}")
    os.symlink(tmp_path / "elsewhere", f"{store.path}/{counters.NAME}")
    with pytest.raises(OSError, match="symbolic links"):
        counters.load(store.directory)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=10),
    lambda inner: st.lists(inner, max_size=13) | st.dictionaries(st.sampled_from([*CORES, "SIGSEGV", "x"]), inner),
    max_leaves=20,
)


@given(st.dictionaries(st.sampled_from(list(Counters.__slots__)), JSON))
def test_rubbish_is_refused_or_read_within_bounds(rubbish: dict[str, Any]) -> None:
    try:
        found = Counters.from_json(Counters(1.0).to_json() | rubbish)
    except ValueError:
        return
    assert found.cores.keys() == set(CORES)
    assert len(found.crashes) <= 66
    assert all(number >= 0 for number in (*found.crashes.values(), *found.cores.values(), *found.seconds))


@given(
    st.builds(Core, state=st.text(max_size=9), reason=st.none() | st.text(), size_bytes=st.integers()),
    st.integers(),
    st.none() | st.floats(),
)
def test_any_record_can_be_counted_and_read_back(core: Core, signal: int, seconds: float | None) -> None:
    found = Counters(0.0)
    found.add(new_record(signal=signal, core=core, seconds=seconds), 1.0)
    assert sum(found.crashes.values()) == sum(found.cores.values()) == 1
    assert Counters.from_json(json.loads(json.dumps(found.to_json()))).to_json() == found.to_json()


# Reasons


@pytest.mark.parametrize(
    ("reason", "word"),
    [
        ("no receiver took the core: web: its receiver refused: it crashes in a loop", "no_receiver"),
        ("web: its receiver took next to nothing of the core for 60 s", "receiver"),
        ("process 7, thread 7 is gone (No such process)", "identity"),
        ("its container has 4 dumps under way, which is all of its share (8 of 16 in all)", "share"),
        ("the core was not kept: older cores take up the room (store_max)", "limit"),
        ("the core could not be written (No space left on device)", "full"),
        ("the core could not be written (Disk quota exceeded)", "full"),
        ("the core could not be kept: RuntimeError", "error"),
        (None, "error"),
    ],
)
def test_a_reason_has_its_word(reason: str | None, word: str) -> None:
    assert word_for(Core(reason=reason)) == word


@pytest.mark.parametrize(
    ("why", "word"),
    [
        ("the soft core limit (ulimit -c) allows 1 bytes", "ulimit"),
        ("core_max allows 1 bytes", "limit"),
        ("keep = 'stacks'", "keep"),
        ("keep_for allows 5 bytes", "keep"),
        ("keep = 'stacks'; the file system or its quota is full", "keep"),
        ("the kernel ended the dump after 3 of 9 bytes", "cut"),
        ("no byte of the core came for 60 s", "cut"),
        ("the file system or its quota is full", "full"),
    ],
)
def test_a_reduced_core_has_its_word(why: str, word: str) -> None:
    assert word_for(Core(state="reduced", reason=f"5 of 9 bytes are left out: {why}")) == word
    assert word in reasons.OF_REDUCED


# Whose text is why a core is missing, and the modules in which they are raised.
RAISED = {"NoRoom", "TooLarge", "Unneeded", "Stalled", "Unidentified", "Lost"}
SOURCES = ("receiver", "forwarder")


def sentences() -> list[str]:
    """Every reason that the code can write, with `1` in the place of what is put in."""
    found = []
    for source in (path for package in SOURCES for path in Path(CHECKOUT, package).glob("*.py")):
        for node in ast.walk(ast.parse(source.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call):
                continue
            name = node.func.id if isinstance(node.func, ast.Name) else getattr(node.func, "attr", "")
            values = [node.args[0]] if name in RAISED and node.args else []
            if name == "Core":
                values = [keyword.value for keyword in node.keywords if keyword.arg == "reason"]
            if name == "evict" and len(node.args) > 1:
                values = [ast.BinOp(ast.Constant("evicted: "), ast.Add(), node.args[1])]
            for value in values:
                text = written(value)
                # A place's name comes before what the receiver there did.
                found += [f"web: {text}" if name == "Lost" else text] if text.strip("1") else []
    return found


def written(node: ast.expr) -> str:
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(written(part) for part in node.values)
    if isinstance(node, ast.BinOp):
        return written(node.left) + written(node.right)
    if isinstance(node, ast.FormattedValue) and "need.setting" in ast.unparse(node):
        return "store_max"
    if isinstance(node, ast.FormattedValue) and "_wish.why" in ast.unparse(node):
        return "core_max"
    return "1"


def test_every_sentence_of_the_code_has_a_word() -> None:
    found = sentences()
    assert len(found) > 30, found
    # What went wrong in a way that nobody foresaw, and the beginnings of sentences that end with another one.
    unforeseen = ("because", "1 of 1 bytes are left out: 1", "the core could not be kept", "the core was not kept: 1")
    missing = [text for text in found if word_for(Core(reason=text)) == "error" and not text.startswith(unforeseen)]
    assert missing == []


def test_what_the_store_writes_has_words() -> None:
    from receiver import store

    assert word_for(Core(reason=store.INTERRUPTED)) == "interrupted"
    assert word_for(Core(reason=store.PRUNED)) == "pruned"
    assert issubclass(NoRoom, Exception)
    assert {key.partition("/")[2] for key in CORES} - {""} <= set(REASONS)


def test_what_counting_imports() -> None:
    """It is imported at each crash (Accept=yes): with nothing that the worker has not."""
    code = (
        "import sys, receiver.worker, receiver.afterwards; before = set(sys.modules); import receiver.counters;"
        "print(*sorted(set(sys.modules) - before))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=CHECKOUT, capture_output=True, text=True, check=True, timeout=30
    )
    assert set(done.stdout.split()) <= {"receiver.counters", "receiver.reasons"}
