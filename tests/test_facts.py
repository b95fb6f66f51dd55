"""What a record tells beside who crashed: open files, mappings, unit, package, log; and that each can be left out."""

from __future__ import annotations

import errno
import json
import os
import resource
import shutil
import signal
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from receiver import facts, process, worker
from receiver.config import FACTS, Config, ConfigError, load
from receiver.elfcore import first_size, head_size, read_head
from receiver.masking import MASK
from receiver.notes import Parser
from receiver.process import Process, unit_of, user_unit_of
from receiver.record import Record
from receiver.store import ACL, MAX_RECORD, Store
from receiver.witness import Witness
from tests.support import elf
from tests.support.containers import PlainContainer, SystemdContainer
from tests.support.crash import compile_crasher, crash, start_crash
from tests.support.fake_forwarder import FakeForwarder
from tests.support.receivers import (
    SOCKET,
    Forwarder,
    dump,
    forwarder_installed,
    gdb,
    list_records,
    prepare_units,
    resident,
    wait_for_records,
)
from tests.support.waiting import wait_until
from tests.test_docs import ROOT, blocks, text_of
from tests.test_process import changed
from tests.test_store import keep

if TYPE_CHECKING:
    from collections.abc import Iterator

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root: run with sudo")


def wanted(text: str) -> frozenset[str]:
    return load(environ={"CORE_PIPE_FACTS": text}).facts


def test_words_of_the_setting() -> None:
    assert Config().facts == frozenset(FACTS) == wanted("all")
    assert wanted("none") == frozenset()
    assert wanted("package journal") == {"package", "journal"}
    assert wanted("-environment -journal") == frozenset(FACTS) - {"environment", "journal"}
    assert wanted("all -environment package") == frozenset(FACTS) - {"environment"}
    assert wanted("files -all") == frozenset()
    for wrong in ("", " ", "everything", "package,journal", "-none", "--files", "none of it"):
        with pytest.raises(ConfigError, match="CORE_PIPE_FACTS"):
            wanted(wrong)


# Open files


def open_files(pid: int) -> list[str] | None:
    found = Process(pid, pid)
    try:
        return found.open_files()
    finally:
        found.close()


def test_open_files_by_their_names(tmp_path: Path) -> None:
    hostile = os.fsencode(tmp_path) + b"/a\n\x1b[31m\xff"
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)

    def change() -> None:
        os.dup2(os.open(hostile, os.O_RDWR | os.O_CREAT), 50)
        os.dup2(os.open(fifo, os.O_RDWR), 51)
        os.unlink(fifo)

    with changed(change) as pid:
        found = open_files(pid)
    assert found is not None
    lines = dict(line.split(": ", 1) for line in found)
    assert list(lines) == sorted(lines, key=int)
    assert lines["50"] == f"{tmp_path}/a\n\x1b[31m\\xff"
    # Not opened: that would wait, or tell somebody.
    assert lines["51"] == f"{fifo} (deleted)"


def test_of_many_open_files_the_first_and_the_count() -> None:
    """H22. As many as may be; and the time does not grow with them."""
    most = min(resource.getrlimit(resource.RLIMIT_NOFILE)[1], 200_000)

    def change() -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
        for number in range(100, most):
            os.dup2(0, number)

    with changed(change) as pid:
        found = open_files(pid)
        numbers = sorted(map(int, os.listdir(f"/proc/{pid}/fd")))
    assert found is not None
    assert len(numbers) > most - 100
    assert [line.partition(":")[0] for line in found[:-1]] == [str(n) for n in numbers[: process.MAX_FILES - 1]]
    assert found[-1] in (f"... and {len(numbers) - process.MAX_FILES + 1} more", "... and more")


def test_long_names_of_open_files_are_bounded(tmp_path: Path) -> None:
    deep = tmp_path
    for _ in range(14):
        deep = deep / ("\x01" * 250)
        deep.mkdir()

    def change() -> None:
        for number in range(100, 300):
            os.dup2(os.open(deep, os.O_RDONLY), number)

    with changed(change) as pid:
        found = open_files(pid)
    assert found is not None
    assert len(json.dumps(found)) <= process.MAX_FILES_SIZE + 100
    assert found[-1].startswith("... and ")


def test_files_of_a_process_that_is_gone() -> None:
    with changed(lambda: None) as pid:
        found = Process(pid, pid)
    assert found.open_files() is None
    found.close()


# Units

UNITS = [
    (b"/system.slice/nginx.service", b"", "nginx.service", None),
    (b"/system.slice/system-getty.slice/getty@tty1.service", b"", "getty@tty1.service", None),
    (b"/system.slice/foo.service/sub/group", b"", "foo.service", None),
    (b"/init.scope", b"", "init.scope", None),
    (b"/system.slice/dev-disk-by\\x2duuid-1.swap", b"", "dev-disk-by\\x2duuid-1.swap", None),
    (b"/system.slice/_cgroup.service", b"", "cgroup.service", None),
    (b"/user.slice/user-1000.slice/session-2.scope", b"", "session-2.scope", None),
    (
        b"/user.slice/user-1000.slice/user@1000.service/app.slice/app-foo@1.service",
        b"",
        "user@1000.service",
        "app-foo@1.service",
    ),
    (b"/user.slice/user-1000.slice/user@1000.service/init.scope", b"", "user@1000.service", "init.scope"),
    (b"/machine.slice/machine-box.scope/payload/system.slice/a.service", b"", "machine-box.scope", None),
    # As a container without a cgroup namespace sees it.
    (
        b"/machine.slice/machine-box.scope/payload/system.slice/a.service",
        b"/machine.slice/machine-box.scope/payload",
        "a.service",
        None,
    ),
    (b"/docker/0123", b"/docker/0123", None, None),
    (b"/docker/0123", b"", None, None),
    (b"/docker/01234/a.service", b"/docker/0123", None, None),
    (b"/", b"", None, None),
    (b"", b"", None, None),
    (b"/a b.service", b"", None, None),
    (b"/--help.service\n", b"", None, None),
    (b"/" + b"a" * 300 + b".service", b"", None, None),
    (b"/x.slice/y.slice", b"", None, None),
    (b"/\xff.service", b"", "\\xff.service", None),
    (b"/user@x.service/y.service", b"", "user@x.service", None),
]


@pytest.mark.parametrize(("cgroup", "root", "unit", "user_unit"), UNITS)
def test_unit_of_a_cgroup(cgroup: bytes, root: bytes, unit: str | None, user_unit: str | None) -> None:
    assert unit_of(cgroup, root) == unit
    assert user_unit_of(cgroup, root) == user_unit


def test_the_key_of_a_container_is_its_path() -> None:
    assert worker._path_of(b"!docker!0123") == "/docker/0123"
    assert worker._path_of(b"!machine.slice!machine-a!x2db.scope") == "/machine.slice/machine-a\\x2db.scope"
    assert "\x1b" not in worker._path_of(b"!\x1b[31m")


# Mappings


def witness_of(*loads: elf.Load, notes: bytes) -> Witness:
    data = elf.core(notes, list(loads))
    parser = Parser(62, is_64=True)
    parser.feed(notes)
    return Witness(read_head(data[: head_size(data[: first_size(data)])]), parser.notes)


def test_mappings_of_a_core() -> None:
    page = bytes(elf.PAGE)
    witness = witness_of(
        elf.Load(0x1000, page, flags=5),
        elf.Load(0x2000, page, more=elf.PAGE, flags=6),
        elf.Load(0x10000, b"", more=elf.PAGE, flags=0),
        elf.Load(0x7000_0000, page, flags=6),
        elf.Load(0x7000_8000, page, flags=5),
        notes=elf.files((0x1000, 0x2000, 0x3000, b"/bin/a\n\xff"))
        + elf.auxv({facts.AT_RANDOM: 0x7000_0100, facts.AT_SYSINFO_EHDR: 0x7000_8000}),
    )
    assert facts.mappings(witness) == [
        "1000-2000 r-x 00003000 /bin/a\n\\xff",
        "2000-4000 rw- 00000000",
        "10000-11000 --- 00000000",
        "70000000-70001000 rw- 00000000 [stack]",
        "70008000-70009000 r-x 00000000 [vdso]",
    ]


def test_many_mappings_are_shortened() -> None:
    loads = [elf.Load((n + 1) << 13, b"", more=elf.PAGE, flags=4 + n % 2) for n in range(3000)]
    files = [((n + 1) << 13, ((n + 1) << 13) + elf.PAGE, 0, b"/lib/%d" % (n // 1000)) for n in range(2000)]
    found = facts.mappings(witness_of(*loads, notes=elf.files(*files)))
    assert [line.split()[-1] for line in found[:-1]] == ["/lib/0", "/lib/1"]
    assert found[0].startswith("2000-7d1000 r--+r-x")
    assert found[-1] == "... shortened, of 3000 mappings"
    # And when that is not enough.
    files = [((n + 1) << 13, ((n + 1) << 13) + elf.PAGE, 0, b"/\x01" + b"%d" % n * 200) for n in range(3000)]
    found = facts.mappings(witness_of(*loads, notes=elf.files(*files)))
    assert len(json.dumps(found, indent=1)) <= facts.MAX_MAPPINGS_SIZE + 200
    assert found[-1] == "... shortened, of 3000 mappings"


# The record in the store


@needs_root
def test_a_record_gets_more_and_keeps_its_readers(tmp_path: Path) -> None:
    store = Store(str(tmp_path / "store"))
    record = keep(store, b"x" * 5000, readers=1000)
    path = tmp_path / "store" / f"{record.id}.json"
    acl = os.getxattr(path, ACL)
    amended = store.amend(record.id, {"package": {"name": "a"}, "journal": ["b"]})
    assert amended == store.load(record.id)
    assert (amended.package, amended.journal, amended.core.state) == ({"name": "a"}, ["b"], "stored")
    assert os.getxattr(path, ACL) == acl
    for wrong in ({"journal": 5}, {"id": "another"}, {"journal": ["x" * MAX_RECORD]}):
        with pytest.raises(ValueError, match="record"):
            store.amend(record.id, wrong)
    assert store.load(record.id) == amended
    os.unlink(path)
    assert store.amend(record.id, {"journal": ["c"]}) is None
    assert not path.exists()
    store.close()


def test_one_fact_that_fails_costs_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(str(tmp_path / "store"))
    record = keep(store, b"x" * 5000)
    witness = witness_of(elf.Load(0x1000, bytes(4096)), notes=elf.auxv({}))

    def fails(*_: object) -> None:
        raise RuntimeError

    monkeypatch.setattr("receiver.facts._package", fails)
    facts.complete(record, Config(), store, witness, None)
    assert store.load(record.id).mappings == record.mappings == facts.mappings(witness)
    # And a store that cannot be written costs nobody anything.

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(store, "amend", full)
    facts.complete(record, Config(facts=frozenset({"mappings"})), store, witness, None)
    store.close()


# Real crashes


@pytest.fixture(scope="module")
def forwarder() -> Iterator[Forwarder]:
    with forwarder_installed() as found:
        yield found


@pytest.fixture(scope="module")
def container(forwarder: Forwarder) -> Iterator[PlainContainer]:
    del forwarder
    with PlainContainer() as found:
        yield found


def wait_for_facts(container: PlainContainer, store: str, fact: str) -> dict[str, Any]:
    """The only record, once it has what comes after the crash."""

    def complete() -> dict[str, Any] | None:
        records = list_records(container, store)
        return records[0] if records and records[0][fact] is not None else None

    found: dict[str, Any] = wait_until(complete, 20, fact)
    return found


@pytest.mark.kernel
def test_facts_of_a_real_crash(container: PlainContainer) -> None:
    """Its mappings are those that /proc had of it."""
    with resident(container, store="/var/lib/facts"):
        with start_crash(container, "QUIT", "--wait") as crashing:
            maps = Path(f"/proc/{crashing.host_pid}/maps").read_text(encoding="utf-8")
            crashing.go()
            assert crashing.result().core_dumped
        record = wait_for_facts(container, "/var/lib/facts", "mappings")
    kernel = [line.split(None, 5) for line in maps.splitlines() if "[vvar" not in line and "[vsyscall]" not in line]
    wanted = {(words[0], words[1][:3], words[5].strip() if len(words) > 5 else "") for words in kernel}
    found = {
        (words[0], words[1], words[3].strip() if len(words) > 3 else "")
        for words in (line.split(None, 3) for line in record["mappings"])
    }
    # A heap has no name in a core.
    wanted = {(place, flags, "" if name == "[heap]" else name) for place, flags, name in wanted}
    assert wanted <= found


@pytest.mark.kernel
def test_the_package_of_what_crashed(container: PlainContainer) -> None:
    # Its /var/lib is its own.
    database = container.root / "var/lib/dpkg"
    (database / "info").mkdir(parents=True)
    for name in ("status", "info/coreutils.list"):
        shutil.copy(f"/var/lib/dpkg/{name}", database / name)
    with resident(container, store="/var/lib/package"):
        # Whatever `ulimit -c` is here: at 0, this is all that will ever be known.
        sleep = container.popen(["sleep", "100"])
        wait_until(lambda: os.readlink(f"/proc/{sleep.host_pid}/exe") == "/usr/bin/sleep", 20, "sleep runs")
        os.kill(sleep.host_pid, signal.SIGSEGV)
        assert os.WCOREDUMP(sleep.reaped(60)["status"])
        record = wait_for_facts(container, "/var/lib/package", "package")
    dpkg = ["dpkg-query", "-W", "-f", "${Package} ${Version} ${Architecture}", "coreutils"]
    name, version, architecture = subprocess.run(dpkg, capture_output=True, text=True, check=True).stdout.split()
    assert record["package"] == {"manager": "dpkg", "name": name, "version": version, "architecture": architecture}
    assert record["open_files"][0] == "0: /dev/null"


@pytest.mark.kernel
def test_no_secret_of_a_real_crash_is_recorded(container: PlainContainer) -> None:
    words = ["sh", "-c", "kill -SEGV $$", "sh", "--password", "hush", "--token=hush", "db://u:hush@h", "shown"]
    with resident(container, store="/var/lib/secrets"):
        end = container.popen(words, env={"API_KEY": "hush", "URL": "db://u:hush@h", "X": "-Dpass=hush"}).reaped(60)
        assert os.WCOREDUMP(end["status"])
        (record,) = wait_for_records(container, 1, "/var/lib/secrets")
    assert record["command_line"][-5:] == ["--password", MASK, f"--token={MASK}", f"db://u:{MASK}@h", "shown"]
    assert "hush" not in json.dumps(record)


@pytest.mark.kernel
def test_no_facts_are_recorded_that_nobody_wants(container: PlainContainer) -> None:
    with resident(container, store="/var/lib/none", env={"CORE_PIPE_FACTS": "none"}):
        assert crash(container, "SEGV").core_dumped
        (record,) = wait_for_records(container, 1, "/var/lib/none")
    for name in ("command_line", "environment", "open_files", "mappings", "limits", "cgroup", "unit", "container"):
        assert record[name] is None, name
    assert (record["package"], record["journal"], record["exe"]) == (None, None, compile_crasher("crash"))


@pytest.mark.kernel
@pytest.mark.parametrize(
    ("key", "name"),
    [
        (b"!machine.slice!machine-a!x2db.scope", "nspawn:a-b"),
        (b"!docker!" + b"0123456789abcdef" * 4, "docker:0123456789ab"),
        (b"!system.slice!x.service", None),
        (b"!\x1b[31m" * 100, None),
    ],
)
def test_the_containers_name_is_the_hosts(container: PlainContainer, key: bytes, name: str | None) -> None:
    store = f"/var/lib/named-{abs(hash(key))}"
    with resident(container, store=store), FakeForwarder(f"{container.root}{SOCKET}") as peer:
        peer.offered(container=key, core_limit=b"0")
        (record,) = wait_for_records(container, 1, store)
    assert record["container"] == name


# docs/facts.md

FACTS_DOCUMENT = ROOT / "docs/facts.md"
SECRET, ORDINARY = "correct-horse-battery", "staple-of-the-heap"


def core_bytes(container: PlainContainer, tmp_path: Path, store: str, *command: str) -> bytes:
    """The plain core of a program that crashes in the container."""
    with resident(container, store=store):
        # The tests themselves may have a core limit of 0.
        limited = ["sh", "-c", 'ulimit -S -c "$(ulimit -H -c)"; exec "$@"', "sh", *command]
        end = container.popen(limited, stderr=subprocess.DEVNULL).reaped(60)
        assert os.WCOREDUMP(end["status"])
        (record,) = wait_for_records(container, 1, store)
        assert record["core"]["state"] == "stored", record["core"]
        return dump(container, record["id"], tmp_path / "core", store).read_bytes()


@pytest.mark.kernel
def test_the_example_in_c_keeps_its_secret(container: PlainContainer, tmp_path: Path) -> None:
    (source,) = blocks(text_of(FACTS_DOCUMENT), "c")
    program = container.root / "tmp/example"
    subprocess.run(
        ["gcc", "-g", "-Wall", "-Wextra", "-Werror", "-x", "c", "-", "-o", str(program)],
        input=source,
        text=True,
        check=True,
    )
    core = core_bytes(container, tmp_path, "/var/lib/c", "/tmp/example", SECRET, ORDINARY)
    assert ORDINARY.encode() in core
    assert SECRET.encode() not in core
    said = gdb(str(program), tmp_path / "core", "frame function main", "print ordinary", "print secret[0]")
    assert ORDINARY in said
    # Zeros stand for it.
    assert "$2 = 0 " in said
    # And it is the advice that does it.
    subprocess.run(
        ["gcc", "-DMADV_DONTDUMP=MADV_NORMAL", "-w", "-x", "c", "-", "-o", str(program)],
        input=source.replace("MADV_DONTDUMP", "MADV_NORMAL"),
        text=True,
        check=True,
    )
    assert SECRET.encode() in core_bytes(container, tmp_path, "/var/lib/c2", "/tmp/example", SECRET, ORDINARY)


@pytest.mark.kernel
def test_the_example_in_python_keeps_its_secret(container: PlainContainer, tmp_path: Path) -> None:
    (source,) = blocks(text_of(FACTS_DOCUMENT), "python")
    (container.root / "tmp/example.py").write_text(source, encoding="utf-8")
    (container.root / "tmp/secret").write_text(SECRET, encoding="utf-8")
    core = core_bytes(container, tmp_path, "/var/lib/p", "/usr/bin/python3", "/tmp/example.py", "/tmp/secret")
    assert b"/tmp/secret" in core
    assert SECRET.encode() not in core


@pytest.mark.kernel
def test_the_example_with_a_filter_leaves_shared_memory_out(container: PlainContainer, tmp_path: Path) -> None:
    (script,) = blocks(text_of(FACTS_DOCUMENT), "sh")
    wrapper = container.root / "tmp/filtered"
    wrapper.write_text(f"#!/bin/sh\n{script}", encoding="utf-8")
    wrapper.chmod(0o755)
    # Written in reverse: the words themselves are nowhere else.
    shared = (
        "import mmap, os; m = mmap.mmap(-1, 4096); s = b'yromem-derahs-fo'; "
        "[m.__setitem__(i, s[-1 - i]) for i in range(len(s))]; k = 'paeh eht no'[::-1]; os.abort()"
    )
    python = ["/usr/bin/python3", "-c", shared]
    assert b"of-shared-memory" in core_bytes(container, tmp_path, "/var/lib/f1", *python)
    core = core_bytes(container, tmp_path, "/var/lib/f2", "/tmp/filtered", *python)
    assert b"of-shared-memory" not in core
    assert b"on the heap" in core


def test_the_document_has_every_group_and_field() -> None:
    text = text_of(FACTS_DOCUMENT)
    for word in FACTS:
        assert f"| `{word}` | " in text, word
    for field in ("command_line", "environment", "open_files", "mappings", "limits", "cgroup", "unit", "container"):
        assert f"`{field}`" in text
        assert field in Record.__annotations__


# A unit's log


@pytest.mark.kernel
@pytest.mark.system
@pytest.mark.skipif(SystemdContainer.why_unavailable() is not None, reason=str(SystemdContainer.why_unavailable()))
@pytest.mark.usefixtures("forwarder")
def test_the_last_lines_of_the_units_log() -> None:
    """By the real journal: the unit's own lines, and of root's no word to the user whose process it was."""
    script = f"""
        for n in 1 2 3 4; do echo "line $n"; done
        echo 'connecting with password=hush to db://u:hush@host'
        exec {compile_crasher("crash")} SEGV
    """
    settings = 'store_max = "off"\nkeep_free = "off"\n'
    with SystemdContainer(prepare=prepare_units(accept=True, settings=settings)) as container:
        for user in ("root", "daemon"):
            options = [f"--uid={user}", "-p", "ExecStartPre=+/bin/echo of root"]
            container.run(["systemd-run", "--wait", f"--unit=of-{user}.service", *options, "/bin/sh", "-c", script])

        def complete() -> list[dict[str, Any]] | None:
            records = list_records(container)
            return records if len(records) == 2 and all(record["journal"] for record in records) else None

        roots, daemons = wait_until(complete, 30, "the logs")
    assert (roots["unit"], daemons["unit"]) == ("of-root.service", "of-daemon.service")
    for record in (roots, daemons):
        said = "\n".join(record["journal"])
        assert "hush" not in said
        assert f"connecting with password={MASK}" in said
        assert "line 4" in said
        assert len(record["journal"]) <= facts.MAX_JOURNAL_LINES
    assert "of root" in "\n".join(roots["journal"])
    assert "of root" not in "\n".join(daemons["journal"])
    assert "systemd[1]" not in "\n".join(daemons["journal"])
