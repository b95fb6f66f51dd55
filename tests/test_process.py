"""Facts about a process: whatever it calls itself, its facts are its own, and they are facts."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import re
import resource
import select
import shutil
import signal
import struct
import subprocess
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from receiver import process as module
from receiver.auxv import is_secure
from receiver.cgroup import cgroup_path
from receiver.config import Config
from receiver.masking import MASK
from receiver.process import Process, arguments, mask, user_may_read
from receiver.record import Record
from receiver.store import MAX_RECORD

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

PR_SET_NAME = 15
SECRETS = re.compile(Config().secret_pattern, re.IGNORECASE)
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root: sudo .venv/bin/python -m pytest")


def new_record(**facts: Any) -> Record:
    numbers: dict[str, Any] = {"pid": 7, "tid": 7, "uid": 7, "gid": 7, "signal": 11, "time": 1_700_000_000}
    record = Record.of_numbers(**numbers, comm=b"", core_limit=0, dumpable=1)
    for name, value in facts.items():
        setattr(record, name, value)
    return record


@contextlib.contextmanager
def alive(command: list[bytes], **options: Any) -> Iterator[int]:
    """A program that reads its standard input until the block ends; lends its pid when it runs as itself."""
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, **options) as program:
        try:
            yield program.pid
        finally:
            program.kill()


@contextlib.contextmanager
def changed(change: Callable[[], object]) -> Iterator[int]:
    """A child that has changed something of itself; lends its pid."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        with contextlib.suppress(BaseException):
            change()
            os.write(write, b"x")
            signal.pause()
        os._exit(1)
    os.close(write)
    try:
        assert select.select([read], [], [], 20)[0]
        assert os.read(read, 1) == b"x"
        yield pid
    finally:
        os.close(read)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def described(pid: int, tid: int | None = None) -> Record:
    record = new_record()
    process = Process(pid, tid or pid)
    try:
        process.describe(record)
    finally:
        process.close()
    # What is written down can be read back.
    assert Record.from_json(json.loads(record.dumps())) == record
    return record


HOSTILE = [b"a\nb", b") R 1 1 (", b"\xff\xfe", b"\rUid:\tx", b"\rUid:\t0\t0\t0\t0", b"\rGroups:\t1", b"\x1b[31m", b" "]


@needs_root
@pytest.mark.parametrize("name", HOSTILE)
def test_a_name_forges_no_fact(name: bytes) -> None:
    """H13: the kernel escapes newlines in "Name:", and nothing else that begins a line somewhere."""

    def change() -> None:
        os.setgroups([5, 6])
        os.setresgid(3, 3, 3)
        os.setresuid(1, 1, 1)
        ctypes.CDLL(None).prctl(PR_SET_NAME, name)

    with changed(change) as pid:
        record = described(pid)
        process = Process(pid, pid)
        assert process.is_dumping() is False
        process.close()
    assert (record.uid, record.euid, record.gid, record.egid) == (1, 1, 3, 3)
    assert record.uids == {"real": 1, "effective": 1, "saved": 1, "filesystem": 1}
    assert record.gids == {"real": 3, "effective": 3, "saved": 3, "filesystem": 3}
    assert record.groups == [5, 6]


@pytest.mark.parametrize(
    "line", [b"CoreDumping:\t1", b"x\nCoreDumping:\t1\n"[:15], b"\rCoreDumping:\t1"[:15], b"\nCoreDumping:\t1"[:15]]
)
def test_a_name_is_no_dump(line: bytes) -> None:
    with changed(lambda: ctypes.CDLL(None).prctl(PR_SET_NAME, line)) as pid:
        process = Process(pid, pid)
        assert process.is_dumping() is False
        process.close()


@needs_root
def test_more_groups_than_a_page_has_room_for() -> None:
    """Its "CoreDumping:" comes after its groups; and thousands of them would make the record too large to be read."""
    with changed(lambda: os.setgroups(range(1 << 31, (1 << 31) + 65536))) as pid:
        process = Process(pid, pid)
        status = process.read("status", module.MAX_STATUS)
        process.close()
        assert status is not None
        assert b"\nCoreDumping:\t0\n" in status
        record = described(pid)
    assert record.groups == list(range(1 << 31, (1 << 31) + module.MAX_GROUPS))


def test_words_of_any_bytes(tmp_path: Path) -> None:
    # Not UTF-8, where the file system can have that.
    directory = os.fsencode(tmp_path) + b"/d\n\xff\x1b[31m )"
    os.mkdir(directory)
    program = directory + b"/cat\n\xfe"
    shutil.copy(b"/bin/cat", program)
    words = [b"c\nat", b"-", b"", b"\xff", b"-", b""]
    # A directory is read with an error and then comes the "-" again: cat stays.
    environment = {b"A": b"1=2", b"\xff": b"\xfe\n", b"MY_TOKEN": b"hush", b"EMPTY": b""}
    with alive(words, executable=program, env=environment, cwd=directory, stderr=subprocess.DEVNULL) as pid:
        record = described(pid)
        command_line = Path(f"/proc/{pid}/cmdline").read_bytes()
        whole = Path(f"/proc/{pid}/environ").read_bytes()
        os.unlink(program)
        again = described(pid)
    shown = str(tmp_path) + "/d\n\\xff\x1b[31m )"
    assert record.exe == shown + "/cat\n\\xfe"
    assert again.exe == record.exe + " (deleted)"
    assert record.cwd == shown
    assert record.root is None
    # Its memory is not looked at from here.
    assert (record.command_line, record.environment) == (None, None)
    assert arguments(command_line) == ["c\nat", "-", "", "\\xff", "-", ""]
    assert mask(whole, SECRETS) == {"A": "1=2", "\\xff": "\\xfe\n", "MY_TOKEN": MASK, "EMPTY": ""}


def test_limits_and_cgroup() -> None:
    def change() -> None:
        resource.setrlimit(resource.RLIMIT_CORE, (4096, 8192))
        resource.setrlimit(resource.RLIMIT_NOFILE, (100, 200))

    with changed(change) as pid:
        record = described(pid)
    assert record.limits is not None
    assert record.limits["core_file_size"] == {"soft": 4096, "hard": 8192}
    assert record.limits["open_files"] == {"soft": 100, "hard": 200}
    assert len(record.limits) == 16
    assert record.cgroup is not None
    assert record.cgroup.startswith("/")


@needs_root
def test_another_root() -> None:
    with tempfile.TemporaryDirectory() as name, changed(lambda: os.chroot(name)) as pid:
        assert described(pid).root == name


def test_a_process_that_is_not_there() -> None:
    for pid, tid in ((1 << 30, 1 << 30), (os.getpid(), 1), (0, 0)):
        with pytest.raises(OSError, match=r"No such"):
            Process(pid, tid)


def test_a_process_that_goes_leaves_nothing_half() -> None:
    with changed(lambda: None) as pid:
        process = Process(pid, pid)
    record = new_record()
    process.describe(record)
    assert (record.exe, record.environment, record.command_line, record.uids) == (None, None, None, None)
    assert process.is_dumping() is None
    assert process.is_secure() is None
    process.close()


# Who may read it.


@pytest.fixture
def program() -> Iterator[Path]:
    """A program that waits, where every user can start it."""
    with tempfile.TemporaryDirectory(prefix="core_pipe-tests.", dir="/var/tmp") as name:
        os.chmod(name, 0o755)
        path = Path(name, "cat")
        shutil.copy("/bin/cat", path)
        yield path


def secure(pid: int) -> bool | None:
    process = Process(pid, pid)
    try:
        return process.is_secure()
    finally:
        process.close()


# <linux/capability.h>: VFS_CAP_REVISION_2 with the effective bit; CAP_NET_BIND_SERVICE.
FILE_CAPABILITY = struct.pack("<5I", 0x02000001, 1 << 10, 0, 0, 0)


@needs_root
@pytest.mark.parametrize("kind", ["plain", "set-uid", "set-gid", "capability"])
def test_more_rights_than_its_user_has(program: Path, kind: str) -> None:
    """H11: what a set-uid program had read is not for who started it."""
    if kind == "set-uid":
        os.chown(program, 1001, 0)
        program.chmod(0o4755)
    elif kind == "set-gid":
        os.chown(program, 0, 1001)
        program.chmod(0o2755)
    elif kind == "capability":
        os.setxattr(program, "security.capability", FILE_CAPABILITY)
    with alive([os.fsencode(program)], user=1000, group=1000, extra_groups=[]) as pid:
        record = described(pid)
        assert secure(pid) == (kind != "plain")
        assert record.uid == 1000
        assert record.euid == (1001 if kind == "set-uid" else 1000)
        for claimed in (False, True):
            assert user_may_read(record, secure=claimed) == (kind in ("plain", "capability") and not claimed)


def test_who_may_read() -> None:
    same = {"real": 5, "effective": 5, "saved": 5, "filesystem": 5}
    fine: dict[str, Any] = {"uids": same, "gids": same, "dumpable": 1}
    assert user_may_read(new_record(**fine), secure=False)
    assert not user_may_read(new_record(**fine), secure=True)
    for dumpable in (0, 2, 3):
        assert not user_may_read(new_record(**fine | {"dumpable": dumpable}), secure=False)
    for kind in same:
        assert not user_may_read(new_record(**fine | {"uids": same | {kind: 0}}), secure=False)
        assert not user_may_read(new_record(**fine | {"gids": same | {kind: 0}}), secure=False)
    for name in ("uids", "gids"):
        assert not user_may_read(new_record(**fine | {name: None}), secure=False)


AT_PAGESZ, AT_SECURE, AT_NULL = 6, 23, 0


def auxv(form: str, *pairs: tuple[int, int]) -> bytes:
    return b"".join(struct.pack(form, *pair) for pair in (*pairs, (AT_NULL, 0)))


@pytest.mark.parametrize("form", ["<QQ", "<II"])
def test_auxv_of_both_word_sizes(form: str) -> None:
    for page in (4096, 16384, 65536):
        assert is_secure(auxv(form, (3, 0x1000), (AT_PAGESZ, page), (AT_SECURE, 1)))
        assert not is_secure(auxv(form, (3, 0x1000), (AT_PAGESZ, page), (AT_SECURE, 0)))
    # What it does not tell is not taken for granted.
    assert is_secure(auxv(form, (AT_PAGESZ, 4096)))
    assert is_secure(auxv(form, (AT_SECURE, 0)))
    assert is_secure(b"")


@given(data=st.binary(max_size=400))
def test_any_auxv_is_secure_or_not(data: bytes) -> None:
    assert is_secure(data) in (True, False)


def test_our_own_auxv() -> None:
    assert secure(os.getpid()) is False


# Parsers.


@given(pairs=st.lists(st.tuples(st.binary(min_size=1, max_size=12), st.binary(max_size=12)), max_size=8))
def test_environment_of_any_bytes(pairs: list[tuple[bytes, bytes]]) -> None:
    pairs = [(raw.replace(b"\0", b"").replace(b"=", b"") or b"x", value.replace(b"\0", b"")) for raw, value in pairs]
    found = mask(b"".join(raw + b"=" + value + b"\0" for raw, value in pairs), SECRETS)
    first: dict[str, str] = {}
    for raw, value in pairs:
        first.setdefault(raw.decode("utf-8", "backslashreplace"), value.decode("utf-8", "backslashreplace"))
    assert found == {shown: MASK if SECRETS.search(shown) else plain for shown, plain in first.items()}


@given(data=st.binary(max_size=300))
def test_any_bytes_have_words(data: bytes) -> None:
    mask(data, SECRETS)
    words = module._split(data)
    assert b"\0".join(words) == data.removesuffix(b"\0")
    assert cgroup_path(data).count(b"\n") == 0
    module._limits(data)


@pytest.mark.parametrize(
    ("raw", "words"),
    [(b"", []), (b"\0", [b""]), (b"a\0", [b"a"]), (b"a\0\0", [b"a", b""]), (b"a\0b", [b"a", b"b"])],
)
def test_words(raw: bytes, words: list[bytes]) -> None:
    assert module._split(raw) == words


@pytest.mark.parametrize(
    "name",
    ["DB_PASSWORD", "mysql_pwd", "GITHUB_TOKEN", "AWS_SECRET_ACCESS_KEY", "Authorization", "SENTRY_DSN", "api_key"],
)
def test_secrets_are_masked(name: str) -> None:
    assert mask(f"{name}=hush\0PATH=/bin\0PWD=/\0".encode(), SECRETS) == {name: MASK, "PATH": "/bin", "PWD": "/"}


def test_a_second_value_of_the_same_name_does_not_show() -> None:
    assert mask(b"A=1\0A=2\0", SECRETS) == {"A": "1"}
    # Cut in the middle of the name or of the value: never the value without its name.
    whole = b"A=1\0MY_TOKEN=hush\0"
    for length in range(len(whole)):
        assert "hu" not in str(mask(whole[:length], SECRETS))


@pytest.mark.parametrize(
    ("raw", "path"),
    [
        (b"0::/a/b\n", b"/a/b"),
        (b"0::/\n", b"/"),
        (b"5:memory:/m\n1:name=systemd:/s\n0::/\n", b"/s"),
        (b"5:memory:/m\n1:name=systemd:/\n0::/\n", b"/m"),
        (b"5:memory:/m\n0::/u\n", b"/u"),
        (b"0::/a:b::c\n", b"/a:b::c"),
        (b"0::/a\r0::/b\n", b"/a\r0::/b"),
        (b"garbage\n", b"/"),
        (b"", b"/"),
    ],
)
def test_cgroups(raw: bytes, path: bytes) -> None:
    assert cgroup_path(raw) == path


def test_a_limit_of_very_many_digits_is_none() -> None:
    assert module._limits(b"Limit\nMax core file size   " + b"9" * 5000 + b"   1  bytes\n") == {}


def test_the_worst_record_can_be_read_back() -> None:
    """Each list is bounded, and each byte takes six in JSON at the most: a record that is too long would be none."""
    path = "\x01" * 4096
    record = new_record(exe=path, cwd=path, root=path, cgroup="\x01" * 8192, comm="\x01" * 64)
    record.command_line = [""] * module.MAX_ARGUMENTS
    record.environment = mask(b"\x01=" + b"\x01" * (module.MAX_ENVIRONMENT - 2), SECRETS)
    record.groups = [(1 << 32) - 2] * module.MAX_GROUPS
    record.tried = ["\\x01" * 200] * 16
    assert len(record.dumps()) < MAX_RECORD
    names = b"".join(b"%xKEY=\0" % n for n in range(1 << 14))[: module.MAX_ENVIRONMENT]
    record.environment = mask(names, SECRETS)
    record.command_line = ["\x01" * module.MAX_ARGUMENTS]
    assert len(record.dumps()) < MAX_RECORD
