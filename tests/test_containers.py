"""corepipectl on a host: -M and --all look into the containers' stores, and believe nothing that they find there."""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import struct
import subprocess
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from forwarder import namespaces
from receiver import ctl, engine
from receiver.ctl import containers, copying, foreign, output, showing, sysroot
from receiver.ctl.matching import Crash, UsageProblem
from receiver.engine_names import Names
from receiver.record import Core, Record
from tests.support.cgroups import Cgroup
from tests.support.containers import PLAIN_USERS, PlainContainer, Sandbox
from tests.support.crash import compile_crasher
from tests.support.kept import keep, new_record
from tests.support.mounts import CHECKOUT
from tests.support.processes import children
from tests.support.receivers import BIN, STORE, forwarder_installed, resident, wait_for_records
from tests.support.waiting import read_line

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

pytestmark = pytest.mark.skipif(PlainContainer.why_unavailable() is not None, reason="needs root, and a container")

ELF = b"\x7fELF" + bytes(60)
SECRET = b"of the host's"


@pytest.fixture(scope="module")
def container() -> Iterator[PlainContainer]:
    with PlainContainer() as found:
        yield found


@pytest.fixture
def store(container: PlainContainer) -> Iterator[Path]:
    """The container's store, with one good crash in it, empty again at the end."""
    path = Path(f"{container.root}{STORE}")
    container.run(["rm", "-rf", STORE], check=True)
    keep(path, new_record(4711, "good"), ELF + b"good" * 1000)
    yield path
    container.run(["rm", "-rf", STORE], check=True)


def run(capfd: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    status = ctl.main(arguments)
    out, err = capfd.readouterr()
    return status, out, err


def listed(capfd: pytest.CaptureFixture[str], container: PlainContainer) -> tuple[list[dict[str, Any]], str]:
    """What `list -M` says: the records, and standard error."""
    status, out, err = run(capfd, "list", "-M", str(container.init_pid), "--json")
    assert status == 0, err
    return list(json.loads(out)), err


def test_list_of_one(container: PlainContainer, store: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert store.is_dir()
    found, err = listed(capfd, container)
    assert [record["comm"] for record in found] == ["good"]
    assert found[0]["core"]["path"] == f"{STORE}/{found[0]['id']}.core.zst"
    assert not err


def test_list_of_all_says_whose(
    container: PlainContainer, store: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert store.is_dir()
    keep(tmp_path / "host", new_record(99, "host"))
    own = containers.sources(None, own_store=str(tmp_path / "host"))
    assert f"pid:{container.init_pid}" in [source.name for source in own]
    status, out, err = run(capfd, "list", "--all", "--no-pager", "comm=good")
    assert status == 0, err
    heading, *lines = out.splitlines()
    assert heading.split()[-2:] == ["CONTAINER", "ID"]
    assert f"pid:{container.init_pid}" in [line.split()[-2] for line in lines]


def test_info(container: PlainContainer, store: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert store.is_dir()
    status, out, err = run(capfd, "info", "-M", f"pid:{container.init_pid}", "--no-pager")
    assert status == 0, err
    assert f"Container: pid:{container.init_pid}\n" in out
    assert "4711 (good)" in out


@pytest.mark.parametrize("compression", ["zstd", "none"])
def test_dump(
    container: PlainContainer, store: Path, compression: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    core = ELF + os.urandom(100_000) + bytes(1 << 20) + b"end"
    keep(store, new_record(12, "mixed"), core, compression=compression)
    status, _, err = run(capfd, "dump", "-M", str(container.init_pid), "12", "-o", str(tmp_path / "core"))
    assert status == 0, err
    assert (tmp_path / "core").read_bytes() == core
    assert (tmp_path / "core").stat().st_blocks * 512 < len(core)


def test_a_large_core_comes_in_several_steps(
    container: PlainContainer,
    store: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each step opens the file anew, and knows that it is the same."""
    monkeypatch.setattr(copying, "SECONDS", 0.0)
    core = ELF + os.urandom(3 << 20) + bytes(2 << 20) + b"end"
    keep(store, new_record(13, "large"), core, compression="none")
    status, _, err = run(capfd, "dump", "-M", str(container.init_pid), "13", "-o", str(tmp_path / "core"))
    assert status == 0, err
    assert (tmp_path / "core").read_bytes() == core


def test_no_such_container(container: PlainContainer, capfd: pytest.CaptureFixture[str]) -> None:
    status, out, err = run(capfd, "list", "-M", "no\x1b[2Jsuch")
    assert (status, out) == (1, "")
    assert "there is no container 'no\\x1b[2Jsuch' that runs. There are: " in err
    assert f"pid:{container.init_pid}" in err


def test_a_container_without_a_store(container: PlainContainer, capfd: pytest.CaptureFixture[str]) -> None:
    container.run(["rm", "-rf", STORE], check=True)
    status, out, err = run(capfd, "list", "-M", str(container.init_pid))
    assert (status, out) == (1, "")
    assert f"there is no {STORE} in it" in err


@pytest.mark.parametrize("command", [["delete", "4711"], ["prune", "--to", "0"], ["usage"], ["watch"], ["metrics"]])
@pytest.mark.parametrize("where", [["-M", "web"], ["--all"]])
def test_what_only_works_within(command: list[str], where: list[str], capfd: pytest.CaptureFixture[str]) -> None:
    status, out, err = run(capfd, *command, *where)
    assert (status, out) == (1, "")
    assert "Run it in the container" in err
    with pytest.raises(SystemExit):
        ctl.main([command[0], "--help"])
    assert "--machine" not in capfd.readouterr().out


def test_one_or_all(capfd: pytest.CaptureFixture[str]) -> None:
    status, out, err = run(capfd, "list", "-M", "web", "--all")
    assert (status, out) == (1, "")
    assert "Give one of the two" in err


def test_only_root_looks_into_containers() -> None:
    done = subprocess.run(
        [os.path.join(BIN, "corepipectl"), "list", "--all"],
        user=1000,
        group=1000,
        extra_groups=[],
        capture_output=True,
        text=True,
        check=False,
        cwd="/",
    )
    assert done.returncode == 1
    assert "only root may look into containers" in done.stderr


def test_a_second_view_of_a_store_is_not_another_store(
    container: PlainContainer, store: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """A sandbox in the container sees the container's store: the crash is there once."""
    assert store.is_dir()
    with Sandbox(container, "--mount", "--pid", "--fork", "--mount-proc") as sandbox:
        assert str(sandbox.init_pid) in {str(place.pid) for place in containers.find()}
        status, out, err = run(capfd, "list", "--all", "--json=short", "comm=good")
        assert status == 0, err
        assert len(json.loads(out)) == 1


def test_the_hosts_own_store_is_none_of_a_containers(
    container: PlainContainer, store: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """As with a store that is a volume of several containers, or the host's that is mounted in one."""
    status, out, err = run(capfd, "--store", str(store), "list", "--all", "--json=short", "comm=good")
    assert status == 0, err
    assert len(json.loads(out)) == 1
    assert container.init_pid


# What a hostile container puts into its store, which is no record.


def _json(record: Record, **changed: Any) -> str:
    return json.dumps({**record.to_json(), **changed})


def _put(store: Path, record: Record, text: str) -> None:
    (store / f"{record.id}.json").write_text(text)


def a_link_to_a_record(store: Path, outside: Path) -> None:
    record = new_record(1, "stolen")
    outside.write_text(_json(record))
    (store / f"{record.id}.json").symlink_to(outside)


def a_link_by_proc(store: Path, outside: Path) -> None:
    record = new_record(1, "stolen")
    outside.write_text(_json(record))
    (store / f"{record.id}.json").symlink_to(f"/proc/1/root{outside}")


def a_fifo(store: Path, _outside: Path) -> None:
    os.mkfifo(store / f"{new_record().id}.json")


def a_device(store: Path, _outside: Path) -> None:
    os.mknod(store / f"{new_record().id}.json", 0o20600, os.makedev(1, 5))  # /dev/zero


def a_directory(store: Path, _outside: Path) -> None:
    (store / f"{new_record().id}.json").mkdir()


def a_socket(store: Path, _outside: Path) -> None:
    os.mknod(store / f"{new_record().id}.json", 0o140600)


def nested_json(store: Path, _outside: Path) -> None:
    _put(store, new_record(), "[" * 500_000)


def deep_limits(store: Path, _outside: Path) -> None:
    record = new_record(2, "deep")
    text = _json(record, limits={"a": {"soft": "DEEP"}})
    _put(store, record, text.replace('"DEEP"', "[" * 400 + "]" * 400))


def many_values(store: Path, _outside: Path) -> None:
    _put(store, new_record(), "[" + "0," * 500_000 + "0]")


def terabytes_of_nothing(store: Path, _outside: Path) -> None:
    record = new_record()
    _put(store, record, _json(record))
    os.truncate(store / f"{record.id}.json", 1 << 34)


def a_huge_number(store: Path, _outside: Path) -> None:
    record = new_record(3, "huge")
    _put(store, record, _json(record, pid="PID").replace('"PID"', "1" + "0" * 400))


def an_infinite_number(store: Path, _outside: Path) -> None:
    record = new_record(3, "infinite")
    _put(store, record, _json(record, seconds="S").replace('"S"', "1e999"))


def not_a_number(store: Path, _outside: Path) -> None:
    record = new_record(3, "nan")
    _put(store, record, _json(record, seconds="S").replace('"S"', "NaN"))


def half_a_character(store: Path, _outside: Path) -> None:
    record = new_record(3, "half")
    _put(store, record, _json(record, cwd="/tmp/\ud800"))


def half_a_name(store: Path, _outside: Path) -> None:
    record = new_record(3, "half")
    _put(store, record, _json(record, environment={"\udfff": ""}))


def another_id(store: Path, _outside: Path) -> None:
    record = new_record(4, "other")
    _put(store, record, _json(record, id=new_record(5).id))


def a_name_that_is_a_path(store: Path, _outside: Path) -> None:
    record = new_record(4, "path")
    (store / f"{record.id}.json").write_text(_json(record, id=f"../../{record.id}"))


def wrong_types(store: Path, _outside: Path) -> None:
    record = new_record(4, "types")
    _put(store, record, _json(record, command_line={"a": 1}))


@pytest.mark.parametrize(
    "prepare",
    [
        a_link_to_a_record,
        a_link_by_proc,
        a_fifo,
        a_device,
        a_directory,
        a_socket,
        nested_json,
        deep_limits,
        many_values,
        terabytes_of_nothing,
        a_huge_number,
        an_infinite_number,
        not_a_number,
        half_a_character,
        half_a_name,
        another_id,
        a_name_that_is_a_path,
        wrong_types,
    ],
)
def test_no_record(
    prepare: Callable[[Path, Path], None],
    container: PlainContainer,
    store: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """It is counted, and the others are shown."""
    prepare(store, tmp_path / "outside")
    found, err = listed(capfd, container)
    assert [record["comm"] for record in found] == ["good"]
    assert "1 more cannot be read as records" in err


def test_a_record_does_not_say_where_its_core_is(
    container: PlainContainer, store: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Nor whether there is one: its id does, and what is in the store."""
    secret = tmp_path / "secret"
    secret.write_bytes(SECRET)
    record = new_record(5, "liar")
    core = Core(state="stored", path=str(secret), size_bytes=len(SECRET), compression="none")
    _put(store, record, _json(record, core=core.to_json()))
    found, _ = listed(capfd, container)
    assert found[-1]["core"]["path"] is None
    status, out, err = run(capfd, "dump", "-M", str(container.init_pid), "5", "-o", str(tmp_path / "core"))
    assert (status, out) == (1, "")
    assert "has no core" in err


@pytest.mark.parametrize("kind", ["link", "fifo", "device", "proc"])
def test_no_core(
    kind: str, container: PlainContainer, store: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    secret = tmp_path / "secret"
    secret.write_bytes(SECRET)
    record = new_record(6, "thief")
    core = Core(state="stored", path="x", size_bytes=len(SECRET), compression="none")
    _put(store, record, _json(record, core=core.to_json()))
    path = store / f"{record.id}.core"
    if kind == "link":
        path.symlink_to(secret)
    elif kind == "proc":
        path.symlink_to(f"/proc/{os.getpid()}/root{secret}")
    elif kind == "fifo":
        os.mkfifo(path)
    else:
        os.mknod(path, 0o20600, os.makedev(1, 5))
    target = tmp_path / "core"
    status, out, err = run(capfd, "dump", "-M", str(container.init_pid), "6", "-o", str(target))
    assert (status, out) == (1, "")
    assert ("link in its path" if kind in ("link", "proc") else "not a regular file") in err
    assert not target.exists() or SECRET not in target.read_bytes()


def test_a_sparse_terabyte(
    container: PlainContainer, store: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Nothing but a hole: it takes no time and no room."""
    record = keep(store, new_record(7, "sparse"), ELF, compression="none")
    os.truncate(store / f"{record.id}.core", 1 << 40)
    begun = time.monotonic()
    status, _, err = run(capfd, "dump", "-M", str(container.init_pid), "7", "-o", str(tmp_path / "core"))
    assert status == 1
    assert "it has more than the" in err
    assert (tmp_path / "core").stat().st_size == len(ELF)
    # Reading it would take an hour.
    assert time.monotonic() - begun < 60


def test_more_than_there_is_room_for(
    container: PlainContainer,
    store: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(copying, "KEEP_FREE", 1 << 60)
    assert store.is_dir()
    status, _, err = run(capfd, "dump", "-M", str(container.init_pid), "4711", "-o", str(tmp_path / "core"))
    assert status == 1
    assert "no room for a copy of it" in err


def test_more_names_than_are_looked_at(
    container: PlainContainer, store: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(foreign, "MAX_NAMES", 5)
    for number in range(20):
        (store / f"junk{number}").touch()
    found, _ = listed(capfd, container)
    assert len(found) <= 1


def test_more_records_than_are_read(
    container: PlainContainer, store: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The newest are."""
    monkeypatch.setattr(foreign, "MAX_RECORDS", 2)
    for number in range(3):
        keep(store, new_record(20 + number, f"new{number}"))
    found, err = listed(capfd, container)
    assert [record["comm"] for record in found] == ["new1", "new2"]
    assert "2 more cannot be read as records" in err


def test_more_bytes_than_are_read(
    container: PlainContainer, store: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    newest = keep(store, new_record(20, "new"))
    monkeypatch.setattr(foreign.Foreign.begin, "__defaults__", ((store / f"{newest.id}.json").stat().st_size,))
    found, err = listed(capfd, container)
    assert [record["comm"] for record in found] == ["new"]
    assert "1 more cannot be read as records" in err


# Where the store is.


@contextlib.contextmanager
def settings_of(container: PlainContainer, text: str) -> Iterator[None]:
    path = Path(f"{container.root}/etc/core_pipe/receiver.toml")
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    try:
        yield
    finally:
        path.unlink()


def test_the_containers_settings_name_its_store(
    container: PlainContainer, store: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert store.is_dir()
    keep(Path(f"{container.root}/tmp/other"), new_record(8, "elsewhere"))
    with settings_of(container, 'store = "/tmp/other"\nfrom_a_newer_version = 1\n'):
        found, _ = listed(capfd, container)
    assert [(record["comm"], record["core"]["path"].rpartition("/")[0]) for record in found] == [
        ("elsewhere", "/tmp/other")
    ]


def test_a_store_with_a_name_for_terminals(
    container: PlainContainer, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The container's settings name it: no word of an error may move the cursor."""
    monkeypatch.setattr(copying, "KEEP_FREE", 1 << 60)
    keep(Path(f"{container.root}/tmp/\x1b[2J"), new_record(8, "escape"))
    with settings_of(container, 'store = "/tmp/\\u001b[2J"\n'):
        status, out, err = run(capfd, "dump", "-M", str(container.init_pid), "8", "-o", "/nonexistent/core")
        assert (status, out) == (1, "")
        assert "/tmp/\\x1b[2J/" in err
        container.run(["rm", "-rf", "/tmp/\x1b[2J"], check=True)
        status, out, err = run(capfd, "list", "-M", str(container.init_pid))
        assert (status, out) == (1, "")
        assert "/tmp/\\x1b[2J" in err
    assert "\x1b" not in err


@pytest.mark.parametrize(
    "text",
    ['store = "/../../../etc"', "store = 4711", "store = [[", "a = " + "[" * 30_000, "x" * 100_000, 'store = "etc"'],
    ids=["outside", "type", "syntax", "nested", "long", "relative"],
)
def test_settings_that_are_none(
    text: str, container: PlainContainer, store: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert store.is_dir()
    with settings_of(container, text):
        found, _ = listed(capfd, container)
    assert [record["comm"] for record in found] == ["good"]


def test_another_store_by_option(container: PlainContainer, store: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert store.is_dir()
    keep(Path(f"{container.root}/tmp/third"), new_record(8, "third"))
    status, out, err = run(capfd, "--store", "/tmp/third", "list", "-M", str(container.init_pid), "--json=short")
    assert status == 0, err
    assert [record["comm"] for record in json.loads(out)] == ["third"]


@pytest.mark.parametrize("kind", ["link", "link above", "file", "fifo"])
def test_no_store(kind: str, container: PlainContainer, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    keep(tmp_path / "core_pipe", new_record(9, "host"))
    container.run(["rm", "-rf", STORE], check=True)
    path, where = Path(f"{container.root}{STORE}"), STORE
    if kind == "link":
        path.symlink_to(tmp_path / "core_pipe")
    elif kind == "link above":
        Path(f"{container.root}/tmp/above").symlink_to(tmp_path)
        where = "/tmp/above/core_pipe"
    elif kind == "fifo":
        os.mkfifo(path)
    else:
        path.touch()
    try:
        status, out, err = run(capfd, "--store", where, "list", "-M", str(container.init_pid))
    finally:
        container.run(["rm", "-rf", STORE, "/tmp/above"], check=True)
    assert (status, out) == (1, "")
    assert ("link in its path" if kind.startswith("link") else "Not a directory") in err


@pytest.mark.skipif(PlainContainer.why_no_user_namespace() is not None, reason="needs shifted ids")
def test_files_of_the_hosts_users_are_not_read(capfd: pytest.CaptureFixture[str]) -> None:
    """Who can mount in his own user namespace may lead us to a directory of the host's root: it is none of his."""
    with PlainContainer(user_namespace=True) as container:
        store = Path(f"{container.root}/opt/kept")
        keep(store, new_record(10, "root"))
        assert store.stat().st_uid == 0
        arguments = ("--store", "/opt/kept", "list", "-M", str(container.init_pid), "--json=short")
        status, out, err = run(capfd, *arguments)
        assert (status, out) == (1, "")
        assert "belongs to a user who is none of the container's" in err
        for path in (store, *store.iterdir()):
            os.chown(path, PLAIN_USERS[0], PLAIN_USERS[0])
        status, out, err = run(capfd, *arguments)
        assert [record["comm"] for record in json.loads(out)] == ["root"]


@pytest.mark.skipif(not os.path.exists("/dev/fuse"), reason="needs FUSE: modprobe fuse")
def test_a_store_that_never_answers(
    container: PlainContainer, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who opens it cannot be killed. The command goes on with the others, and holds nothing that others wait for."""
    monkeypatch.setattr(foreign, "SECONDS", 1.0)
    script = os.path.join(CHECKOUT, "tests/support/hanging_fs.py")
    with PlainContainer() as other:
        keep(Path(f"{other.root}{STORE}"), new_record(11, "answers"))
        container.run(["sh", "-c", f"mkdir -p {STORE}; test -e /dev/fuse || mknod /dev/fuse c 10 229"], check=True)
        process = container.popen([os.path.join(BIN, "python"), script, STORE], stdout=subprocess.PIPE)
        try:
            assert process.stdout is not None
            assert read_line(process.stdout.fileno(), 20, "the file system is mounted") == b"ready\n"
            status, out, err = run(capfd, "list", "--all", "--json=short")
            assert status == 0, err
            assert "answers" in {record["comm"] for record in json.loads(out)}
            assert f"pid:{container.init_pid}: its store did not answer within 1 s" in err
            # Its output is at its end for who reads it, though the child that hangs is there still.
            done = subprocess.run(
                [os.path.join(BIN, "python"), "-c", HANGS, str(container.init_pid)],
                capture_output=True,
                text=True,
                check=False,
                cwd=CHECKOUT,
                timeout=60,
            )
            assert done.returncode == 1
            assert "did not answer" in done.stderr
        finally:
            # Its end ends the requests, and those who wait for them.
            process.end()
            container.run(["sh", "-c", f"umount {STORE} || umount -l {STORE}; rm -rf {STORE}"])


HANGS = """\
import sys
from receiver import ctl
from receiver.ctl import foreign
foreign.SECONDS = 1.0
sys.exit(ctl.main(["list", "-M", sys.argv[1]]))
"""


def test_a_process_that_ended_is_not_another_one(container: PlainContainer) -> None:
    """The descriptor stands for the process that was found, whoever has its number later."""
    process = container.popen(["sleep", "60"])
    place = next(place for place in containers.find() if place.pid == container.init_pid)
    mine = containers.chosen(containers.find(), str(process.host_pid))
    assert mine.pid == place.pid
    fd = os.open(f"/proc/{process.host_pid}", os.O_PATH | os.O_DIRECTORY)
    process.end()
    with pytest.raises(OSError, match="No such"):
        namespaces.read_at(fd, "status", 100)
    os.close(fd)


def test_services_of_the_host_are_no_containers() -> None:
    """A mount namespace alone makes none (PrivateTmp=yes)."""
    with subprocess.Popen(["unshare", "--mount", "sh", "-c", "echo; exec sleep 60"], stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None
            process.stdout.readline()
            with pytest.raises(UsageProblem, match="there is no container"):
                containers.chosen(containers.find(), str(process.pid))
        finally:
            process.kill()


# A crash of the real kind, from its beginning to a debugger.


@pytest.fixture
def temporary() -> Iterator[str]:
    """A directory for $TMPDIR: pytest's own are for root alone, and a debugger is not root."""
    with tempfile.TemporaryDirectory(prefix="core_pipe-tests-", dir="/var/tmp") as found:
        os.chmod(found, 0o755)
        yield found


@pytest.mark.kernel
def test_a_real_crash(temporary: str) -> None:
    """Gdb finds the program and its libraries in the container alone, and has no rights there or here."""
    crasher = compile_crasher("crash")
    with forwarder_installed() as forwarder, PlainContainer() as container, resident(container):
        # Not a path that there is on the host: what gdb finds, it has from the container.
        container.run(["sh", "-c", f"mkdir -p /opt/app && cp {crasher} /opt/app/web && rm -rf {STORE}"], check=True)
        container.run(["/opt/app/web", "SEGV"])
        wait_for_records(container)
        assert forwarder.records() == []
        asked = "-batch -ex 'info sharedlibrary' -ex bt -ex 'shell id -u' -ex 'shell cat /etc/shadow'"
        done, info = (
            subprocess.run(
                [os.path.join(BIN, "corepipectl"), *arguments, "-M", str(container.init_pid), "web"],
                capture_output=True,
                text=True,
                check=False,
                timeout=120,
                env={"PATH": os.environ["PATH"], "TMPDIR": temporary},
                cwd="/",
            )
            for arguments in (("debug", "-A", asked), ("info", "--no-pager"))
        )
    assert re.search(r"^#0 +do_crash ", done.stdout, re.MULTILINE), done.stdout + done.stderr
    for library in (r"libc\.so\.6", r"ld-linux-.*\.so\.[12]"):
        assert re.search(rf"Yes.* {temporary}/core_pipe-\w+/.*{library}$", done.stdout, re.MULTILINE), done.stdout
    uid = next(int(line) for line in done.stdout.splitlines() if line.isdigit())
    assert sysroot.USERS[0] <= uid <= sysroot.USERS[1]
    assert "/etc/shadow: Permission denied" in done.stderr
    # The backtrace of `info` is made likewise.
    assert re.search(r"^ *#0 +do_crash ", info.stdout, re.MULTILINE), info.stdout + info.stderr
    # Nothing is left.
    assert os.listdir(temporary) == []


@pytest.fixture
def engines() -> Iterator[str]:
    """Return the id of a container whose cgroup an engine seems to have made."""
    number = secrets.token_hex(32)
    cgroup = Cgroup(f"docker-{number}.scope")
    try:
        yield number
    finally:
        cgroup.kill()
        cgroup.remove()


@contextlib.contextmanager
def process_of(number: str, *options: str) -> Iterator[int]:
    """Run a process in an engine's cgroup with namespaces of its own, and return its pid."""
    joins = "".join(f"echo $$ > {path}/cgroup.procs; " for path in Cgroup(f"docker-{number}.scope").directories)
    script = f"{joins} exec unshare --mount {' '.join(options)} sh -c 'echo; exec sleep 60'"
    with subprocess.Popen(["sh", "-ec", script], stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == b"\n"
            yield process.pid
        finally:
            # Of unshare --fork it is the parent, and takes its child along.
            process.kill()


def test_an_engines_container_with_the_hosts_pids(engines: str) -> None:
    """As docker run --pid=host makes one: its mount namespace and its cgroup tell."""
    with process_of(engines) as pid:
        for wanted in (engines, engines[:20], f"docker:{engines[:12]}", f"docker:{engines}", str(pid)):
            found = containers.chosen(containers.find(), wanted)
            assert (found.pid, found.name) == (pid, f"docker:{engines[:12]}"), wanted


def test_a_container_in_a_container_has_a_name_of_its_own(engines: str) -> None:
    """Both are in the outer one's cgroup."""
    with process_of(engines) as outer, process_of(engines, "--pid", "--fork", "--kill-child") as maker:
        inner = children(maker)[0]
        places = {place.pid: place.name for place in containers.find()}
        assert places[outer] == f"docker:{engines[:12]}"
        assert places[inner] == f"docker:{engines[:12]}@{inner}"
        assert containers.chosen(containers.find(), places[inner]).pid == inner


# What a debugger gets of a container.


@pytest.fixture
def root(container: PlainContainer) -> Iterator[sysroot.Sysroot]:
    found = sysroot.Sysroot(containers.chosen(containers.find(), str(container.init_pid)))
    yield found
    found.close()
    assert not os.path.exists(found.path)


def test_programs_are_brought(container: PlainContainer, root: sysroot.Sysroot) -> None:
    container.run(["sh", "-c", f"cp {os.path.realpath('/bin/sh')} /tmp/mine; chmod 700 /tmp/mine"], check=True)
    here = root.bring("/tmp/mine (deleted)")
    assert here == f"{root.path}/tmp/mine"
    assert Path(here).read_bytes() == Path(os.path.realpath("/bin/sh")).read_bytes()
    # It is for who debugs, and for nobody else whom the container would not let read it.
    status = os.stat(here)
    assert (status.st_mode & 0o777, status.st_uid) == (0o600, root.user)


@pytest.mark.parametrize(
    ("path", "script"),
    [
        ("/etc/shadow", ""),
        ("/../../../../etc/shadow", ""),
        ("/tmp/link", "ln -s /bin/sh /tmp/link"),
        ("/tmp/up/sh", "ln -s ../../../../../../bin /tmp/up"),
        ("/proc/self/exe", ""),
        ("/tmp/fifo", "mkfifo /tmp/fifo"),
        ("/tmp/zero", "mknod /tmp/zero c 1 5"),
        ("/tmp", ""),
        ("/", ""),
        ("", ""),
        ("/no\0thing", ""),
        ("/no\ud800thing", ""),
        ("/" + "x" * 5000, ""),
        ("/x" * 1000, ""),
    ],
)
def test_nothing_else_is_brought(path: str, script: str, container: PlainContainer, root: sysroot.Sysroot) -> None:
    """Neither what is no program, nor by a link, nor by a name that is none."""
    container.run(["sh", "-c", script], check=True)
    try:
        assert root.bring(path) is None
        for below, directories, files in os.walk(root.path):
            assert not files, below
            assert len(directories) < 20
    finally:
        container.run(["sh", "-c", "rm -rf /tmp/link /tmp/up /tmp/fifo /tmp/zero"], check=True)


def test_libraries_have_their_other_names(container: PlainContainer, root: sysroot.Sysroot) -> None:
    script = "mkdir -p /opt/lib; cd /opt/lib; cp -L /bin/sh libx.so.1.2; ln -s libx.so.1.2 libx.so.1; "
    script += "ln -s /etc/passwd libx.so; ln -s libx.so.1.2 'we ird'; ln -s ../lib/libx.so.1.2 other"
    container.run(["sh", "-ec", script], check=True)
    root.bring_all(["/opt/lib/libx.so.1.2", "/nowhere/liby.so"])
    names = {
        name: os.readlink(f"{root.path}/opt/lib/{name}")
        for name in os.listdir(f"{root.path}/opt/lib")
        if os.path.islink(f"{root.path}/opt/lib/{name}")
    }
    assert names == {"libx.so.1": "libx.so.1.2", "we ird": "libx.so.1.2"}


@given(st.binary(max_size=200))
def test_interpreter_of_anything(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "program"
    for text in (
        data,
        b"\x7fELF\x02\x01" + data,
        b"\x7fELF\x02\x01"
        + bytes(26)
        + struct.pack("<Q", 64)
        + bytes(14)
        + struct.pack("<HH", 56, 3)
        + bytes(6)
        + struct.pack("<I", 3)
        + data,
    ):
        path.write_bytes(text)
        found = sysroot.interpreter_of(str(path))
        assert found is None or found


def test_notes_without_end_come_to_an_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """A file of holes takes no room, and stands for terabytes of notes that say nothing."""
    monkeypatch.setattr(sysroot, "NOTES_SECONDS", 1.0)
    count, size = 1000, 64 << 20
    first = 1 << 16
    header = struct.pack("<4sBBB9xHHIQQQIHHHHHH", b"\x7fELF", 2, 1, 1, 4, 62, 1, 0, 64, 0, 0, 64, 56, count, 0, 0, 0)
    rows = (struct.pack("<IIQQQQQQ", 4, 0, first + size * number, 0, 0, size, 0, 4) for number in range(count))
    with tempfile.TemporaryFile(dir="/var/tmp") as file:
        file.write(header + b"".join(rows))
        file.truncate(first + size * count)
        begun = time.monotonic()
        assert sysroot.mapped_files(file.fileno(), None) == []
        assert time.monotonic() - begun < 10


@pytest.mark.skipif(not os.path.exists("/dev/fuse"), reason="needs FUSE: modprobe fuse")
def test_libraries_that_never_answer(
    container: PlainContainer, root: sysroot.Sysroot, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A program may have mapped a thousand of them: they are not waited for one by one."""
    monkeypatch.setattr(sysroot, "FILES_SECONDS", 2.0)
    monkeypatch.setattr(copying, "PATIENCE", 1.0)
    script = os.path.join(CHECKOUT, "tests/support/hanging_fs.py")
    container.run(["sh", "-c", "mkdir -p /opt/hangs; test -e /dev/fuse || mknod /dev/fuse c 10 229"], check=True)
    process = container.popen([os.path.join(BIN, "python"), script, "/opt/hangs"], stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None
        assert read_line(process.stdout.fileno(), 20, "the file system is mounted") == b"ready\n"
        begun = time.monotonic()
        root.bring_all([f"/opt/hangs/lib{number}.so" for number in range(10)])
        assert time.monotonic() - begun < 7
    finally:
        process.end()
        container.run(["sh", "-c", "umount /opt/hangs || umount -l /opt/hangs"])


@given(st.binary(max_size=300))
def test_mapped_files_of_anything(data: bytes) -> None:
    with tempfile.TemporaryFile() as file:
        file.write(ELF + data)
        file.flush()
        for compression in ("none", "zstd", "unknown"):
            assert sysroot.mapped_files(file.fileno(), compression) == []


def test_interpreter() -> None:
    program = compile_crasher("crash")
    done = subprocess.run(["readelf", "-l", program], capture_output=True, text=True, check=True)
    match = re.search(r"program interpreter: (.*)]", done.stdout)
    assert match is not None
    assert sysroot.interpreter_of(program) == match[1]


def test_temporary_files_where_everybody_may_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A debugger that is not root could not read them in a directory of root's."""
    tmp_path.chmod(0o700)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    assert sysroot._place() == "/var/tmp"
    monkeypatch.setenv("TMPDIR", "/tmp")
    assert sysroot._place() == "/tmp"


def test_no_temporary_files_where_another_user_may_swap_them(temporary: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Root would write a container's files to wherever he points."""
    monkeypatch.setenv("TMPDIR", temporary)
    assert sysroot._place() == temporary
    for owner, mode in ((65534, 0o755), (0, 0o777)):
        os.chown(temporary, owner, owner)
        os.chmod(temporary, mode)
        assert sysroot._place() == "/var/tmp"


# Names.

WEB = "9ec39b91f3d70e1beff50a308f77067065ea6be0d91a3378375056cd4422cf3d"
WEB2 = "9ec39b91f3d71e1beff50a308f77067065ea6be0d91a3378375056cd4422cf3d"


def place(pid: int, cgroup: str) -> containers.Place:
    return containers.Place(pid, -1, engine.find(cgroup), ("", (0, 0)))


def test_nobody_takes_the_name_of_roots_container(monkeypatch: pytest.MonkeyPatch) -> None:
    """A user may make a cgroup of any name below his own, with another container's id in it."""

    def process(pid: int, cgroup: str, *, users: bool) -> containers._Process:
        found = engine.find(cgroup)
        return containers._Process(users, True, 1, pid, pid, (str(found), (0, pid)), found)

    users = "/user.slice/user-1000.slice/user@1000.service"
    there = [
        process(10, f"{users}/docker-{WEB}.scope", users=True),
        process(11, f"{users}/lxc.payload.shop", users=True),
        process(20, f"/system.slice/docker-{WEB}.scope", users=False),
        process(21, "/lxc.payload.shop", users=False),
    ]
    monkeypatch.setattr(containers, "_processes", lambda: there)
    monkeypatch.setattr(Names, "of", lambda _self, found: "docker:webshop" if found.id == WEB else None)
    monkeypatch.setattr(
        containers, "_opened", lambda found: containers.Place(found.pid, -1, found.container, found.key)
    )
    for wanted, pid in (("docker:webshop", 20), ("webshop", 20), ("lxc:shop", 21), ("10", 10)):
        assert containers.chosen(containers.find(), wanted).pid == pid


PLACES = [
    place(10, f"/docker/{WEB}"),
    place(11, f"/docker/{WEB2}"),
    place(12, "/lxc.payload.web"),
    place(13, "/"),
]


@pytest.mark.parametrize(
    ("wanted", "pid"),
    [
        ("docker:9ec39b91f3d7", None),
        (WEB, 10),
        (f"docker:{WEB}", 10),
        (WEB[:13], 10),
        ("9ec3", None),
        ("9ec", None),
        ("web", 12),
        ("lxc:web", 12),
        ("docker:web", None),
        ("we", None),
        ("13", 13),
        ("pid:13", 13),
        ("12", 12),
        ("", None),
    ],
)
def test_names(wanted: str, pid: int | None) -> None:
    if pid is None:
        with pytest.raises(UsageProblem, match=r"may be any of|there is no container"):
            containers.chosen(PLACES, wanted)
    else:
        assert containers.chosen(PLACES, wanted).pid == pid


# Any record at all.

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
FIELDS = st.sampled_from(sorted(Record.__annotations__))
CORE_FIELDS = st.sampled_from(sorted(Core.__annotations__))


# To make such records is slow on a busy machine, which says nothing about them.
@settings(max_examples=200, suppress_health_check=[HealthCheck.too_slow])
@given(st.dictionaries(FIELDS, JSON, max_size=4), st.dictionaries(CORE_FIELDS, JSON, max_size=3))
def test_what_passes_can_be_shown(changed: dict[str, Any], core: dict[str, Any]) -> None:
    """By every way in which records are shown."""
    record = new_record()
    values = {**record.to_json(), **changed, "id": record.id}
    if isinstance(values["core"], dict):
        values["core"] = {**values["core"], **core}
    found = foreign.checked(record.id, json.dumps(values).encode())
    if found is None:
        return
    crash = Crash(found, foreign.Foreign(PLACES[0]))
    colours = output.Colours(None)
    output.table([crash], legend=True, colours=colours)
    assert all(line.isprintable() for line in showing.lines(crash, colours, None))
    json.dumps(found.to_json(), allow_nan=False, ensure_ascii=False).encode()
