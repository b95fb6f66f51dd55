"""Quota warnings: what the kernel says of a container's quota is kept, named and bounded."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import secrets
import shutil
import socket
import struct
import subprocess
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from forwarder import cli, quota_command
from forwarder import ledger as ledgers
from forwarder.ledger import book as books
from forwarder.ledger.book import Book, read_book
from forwarder.ledger.notes import Notes
from forwarder.ledger.watch import Watcher
from forwarder.proc_events import Unavailable
from forwarder.quota import events as quota_events
from forwarder.quota import watch
from forwarder.quota.events import QuotaEvents, Warned, kernel_tells, parse
from forwarder.quota.owners import Owner, Owners
from forwarder.quota.tally import MAX_IDS, MAX_RECORDS, OTHERS, QuotaWarning, Tally, enter
from forwarder.quota.tell import Tell
from forwarder.quota.watch import QuotaWatch, describe
from receiver.notify.quota import MOST
from tests.support import quota_scene, uml
from tests.support.cgroups import Cgroup, hierarchies
from tests.support.mounts import CHECKOUT
from tests.support.quota_scene import CROSSINGS, FLOOD, IDS, MANY, OVERRUN, PROJECT, WEB

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root: sudo .venv/bin/python -m pytest")
needs_netlink = pytest.mark.skipif(not kernel_tells(), reason="this kernel has no disk quota netlink")

# In a mount namespace of its own; not below pytest's directories, which are root's.
POINT = "/mnt"
DOCKER = "0123456789abcdef" * 4


def can_mount(device: str, options: str) -> bool:
    command = ["unshare", "--mount", "mount", "-t", "ext4", "-o", options, device, POINT]
    return subprocess.run(command, stderr=subprocess.DEVNULL, check=False, timeout=30).returncode == 0


def scene_here(directory: Path) -> tuple[dict[str, Any], list[str]]:
    """On this machine's own kernel, if it has quotas."""
    image = directory / "image"
    quota_scene.make_image(str(image))
    with contextlib.ExitStack() as stack:
        losetup = ["losetup", "--find", "--show", str(image)]
        device = subprocess.run(losetup, check=True, capture_output=True, text=True, timeout=30).stdout.strip()
        stack.callback(subprocess.run, ["losetup", "--detach", device], check=True, timeout=30)
        # Without quotas (CONFIG_QFMT_V2) the kernel takes such an ext4 only to read it.
        if can_mount(device, "ro") and not can_mount(device, "usrquota,grpquota,prjquota"):
            pytest.skip("this kernel's ext4 has no quotas; see the test in a kernel of its own")
        cgroup = Cgroup(f"core_pipe-tests-quota-{secrets.token_hex(4)}")
        stack.callback(cgroup.remove)
        mounted = hierarchies()
        # Where it is looked up: receiver/cgroup.py.
        place = mounted.get("") or mounted["name=systemd"]
        result = directory / "result.json"
        program = "unshare", "--mount", sys.executable, "-m", "tests.support.quota_scene"
        subprocess.run(
            [*program, device, POINT, directory / "book", f"{place}/{cgroup.name}", result],
            check=True,
            cwd=CHECKOUT,
            timeout=150,
        )
        return json.loads(result.read_text(encoding="utf-8")), [f"/{cgroup.name}"]


def scene_in_a_kernel_of_its_own(directory: Path) -> tuple[dict[str, Any], list[str]]:
    reason = uml.why_unavailable()
    if reason is not None:
        pytest.skip(reason)
    image = directory / "image"
    quota_scene.make_image(str(image))
    cgroup = f"/sys/fs/cgroup/docker/{DOCKER}"
    program = sys.executable, "-m", "tests.support.quota_scene"
    said = uml.run(directory, image, *program, uml.DISK, POINT, "/run/book", cgroup, f"{uml.SHARED}/result.json")
    result = directory / "result.json"
    assert result.exists(), said
    return json.loads(result.read_text(encoding="utf-8")), [f"docker:{DOCKER[:12]}"]


@needs_root
@pytest.mark.kernel
@pytest.mark.skipif(shutil.which("mkfs.ext4") is None, reason="needs mkfs.ext4. Run: apt-get install e2fsprogs")
@pytest.mark.parametrize("scene", [scene_here, scene_in_a_kernel_of_its_own])
def test_a_container_that_uses_its_quota_up(tmp_path: Path, scene: Any) -> None:
    """For real: its write fails, and in that moment there is a record that says whose it is."""
    found, containers = scene(tmp_path)
    assert "error" not in found, found["error"]
    print({name: value for name, value in found.items() if name not in ("records", "killed")})
    assert found["whole"] is False
    records = [QuotaWarning(**record) for record in found["records"]]
    by_quota = {(one.kind, one.type, one.id): one for one in records}
    hard = by_quota["space_hard", "user", WEB]
    assert (hard.device, hard.caused_by, hard.containers) == (found["device"], WEB, containers)
    # Its second time was after the watcher was killed, within the hour: the record was there, and counted on.
    assert [(one["kind"], one["count"]) for one in found["killed"]] == [("space_soft", 1), ("space_hard", 1)]
    assert hard.at == found["killed"][1]["at"]
    assert hard.count == 2
    assert hard.last < hard.below
    assert by_quota["space_soft", "user", WEB].count == 2
    # A directory's quota. That of its user was not used up: the kernel does not say so.
    project = by_quota["space_hard", "project", PROJECT]
    assert (project.count, project.caused_by, project.containers, project.below) == (1, WEB, containers, 0)
    # A storm is one record.
    # A callback has heard of it.
    assert ("space_hard", WEB, containers) in [(one["kind"], one["id"], one["containers"]) for one in found["told"]]
    assert found["crossings"] == CROSSINGS
    flood = by_quota["inodes_soft", "user", FLOOD]
    assert flood.count + found["lost"] >= CROSSINGS + OVERRUN
    assert flood.count > CROSSINGS / 2
    heard, lost = found["overrun"]
    assert lost > OVERRUN
    assert heard + lost == 2 * (OVERRUN + 1)
    # And so are many ids of one container, from some number on.
    assert found["refused"] == IDS
    many = [one for one in records if one.kind == "inodes_hard"]
    assert len(many) <= MAX_IDS + 1
    assert sum(one.count for one in many) == IDS
    assert [one.id for one in many][-1] == OTHERS
    assert many[0].id == MANY
    assert found["counts"]["space_hard"] == 3
    # Somebody hears of it, and not of each.
    assert f"quota: user {WEB} of {containers[0]} has no space left on " in found["said"][0]
    assert len(found["said"]) <= 3
    assert found["elsewhere"] == ["", [], "unknown"]


def message(sequence: int = 1, message_type: int = 17, command: int = 1, **values: int) -> bytes:
    """A warning as the kernel writes it (fs/quota/netlink.c)."""
    said = {"type": 0, "number": 1000, "kind": 4, "major": 7, "minor": 3, "caused_by": 1001, **values}
    body = struct.pack("=BBH", command, 1, 0)
    for attribute, (name, value) in enumerate(
        {name: said[name] for name in ("type", "number", "kind", "major", "minor", "caused_by")}.items(), 1
    ):
        wide = name in ("number", "caused_by")
        body += struct.pack("=HHQ" if wide else "=HHI", 12 if wide else 8, attribute, value)
    return struct.pack("=IHHII", 16 + len(body), message_type, 0, sequence, 0) + body


def test_a_warning_is_read() -> None:
    assert parse(message(7)) == Warned(7, "space_hard", "user", 1000, "7:3", 1001)
    assert parse(message(kind=99, type=9)) == Warned(1, "other", "other", 1000, "7:3", 1001)
    # Of another command, and the controller's.
    assert parse(message(command=2)) is None
    assert parse(message(message_type=16)) is None
    assert all(parse(message()[:length]) is None for length in range(len(message())))


@given(data=st.binary(max_size=120))
def test_any_datagram(data: bytes) -> None:
    parse(data)
    parse(message()[:20] + data)


@needs_root
@needs_netlink
def test_only_the_kernel_is_believed() -> None:
    """Root of the host may send to the group as well; and whoever wants to, to the port."""
    with QuotaEvents() as events, socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 16) as forger:
        group = kernel_group()
        port = events._socket.getsockname()[0]
        forger.sendto(message(), (0, 1 << group - 1))
        forger.sendto(message(), (port, 0))
        # It came: it is in the queue of the socket, and nothing comes out.
        assert events._socket.recvfrom(4096, socket.MSG_PEEK)[0] == message()
        assert events.read() is None
        with pytest.raises(BlockingIOError):
            events._socket.recvfrom(4096)
        assert events.lost == 0


def kernel_group() -> int:
    from pyroute2.netlink.event import dquot  # type: ignore[import-untyped]

    with dquot.DQuotSocket() as asking:
        asking.bind()
        return int(asking.mcast_groups["events"])


@pytest.mark.parametrize(
    ("sequences", "lost"),
    [
        ([], 0),
        ([5], 0),
        ([5, 6, 7], 0),
        ([5, 9], 3),
        # Two processors.
        ([5, 7, 6], 0),
        ([5, 4, 6], 0),
        # It wraps.
        ([0xFFFFFFFE, 0xFFFFFFFF, 0, 1], 0),
        ([0xFFFFFFFE, 1], 2),
    ],
)
def test_what_could_not_wait_is_counted(sequences: list[int], lost: int) -> None:
    events = object.__new__(QuotaEvents)
    events._first = events._last = -1
    events._received = 0
    for sequence in sequences:
        events._count(sequence)
    assert events.lost == lost


@needs_root
@pytest.mark.parametrize("namespace", ["--net", "--user"])
def test_where_the_kernel_does_not_tell(namespace: str) -> None:
    """In a network namespace of its own there is no such family. It is no traceback, nor a line of pyroute2's."""
    program = (
        "from forwarder.quota.events import *\n"
        "print(kernel_tells())\n"
        "try:\n"
        "    QuotaEvents()\n"
        "except Unavailable as error:\n"
        "    print(error)\n"
    )
    done = subprocess.run(
        ["unshare", namespace, sys.executable, "-c", program],
        cwd=CHECKOUT,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    if namespace == "--net":
        told, why = done.stdout.splitlines()
        assert told == "False"
        assert "CONFIG_QUOTA_NETLINK_INTERFACE" in why


class Given:
    """In the place of the kernel, which warns on some machines only: these warnings."""

    def __init__(self) -> None:
        self.waiting: list[Warned] = []
        self.lost = 0

    def read(self) -> Warned | None:
        return self.waiting.pop(0) if self.waiting else None


class Known(Owners):
    """Whose an id is, is said here."""

    def of(self, kind: str, number: int, caused_by: int) -> Owner:
        del kind, caused_by
        return Owner("", (f"docker:{number >> 16}",), f"/docker/{number >> 16}")

    def mount_of(self, device: str) -> str:
        return f"/srv/{device}"


class Scene:
    """A watch on warnings that are given, at a time that is given."""

    def __init__(self, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1_000_000.0
        monkeypatch.setattr("time.time", lambda: self.now)
        self.book = Book(str(path))
        contents, _ = self.book.open()
        self.told: list[QuotaWarning] = []
        self.said: list[str] = []
        self.events = Given()
        self.watch = QuotaWatch(
            self.events,  # type: ignore[arg-type]
            self.book,
            contents.quota,
            owners=Known(),
            say=self.said.append,
            tell=self.told.append,
        )

    def warn(self, *numbers: int, kind: str = "space_hard") -> None:
        self.events.waiting = [Warned(0, kind, "user", number, "7:3", number) for number in numbers]
        while self.events.waiting:
            self.watch._resume_at = float("-inf")
            self.watch.take()

    def records(self) -> list[QuotaWarning]:
        self.watch.settle(last=True)
        return list(read_book(self.book.path).quota.records.values())


@pytest.fixture
def scene(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Scene]:
    found = Scene(tmp_path / "ledger", monkeypatch)
    yield found
    found.book.close()


def test_one_record_an_hour(scene: Scene) -> None:
    scene.warn(1000, 1000)
    scene.now += 3599
    scene.warn(1000)
    scene.warn(1000, kind="space_soft")
    (first, soft) = scene.records()
    assert (first.count, first.at, first.last, first.mount) == (3, 1_000_000, 1_003_599, "/srv/7:3")
    assert (soft.kind, soft.count) == ("space_soft", 1)
    scene.now += 2
    scene.warn(1000)
    assert [(one.kind, one.count) for one in scene.records()] == [
        ("space_hard", 3),
        ("space_soft", 1),
        ("space_hard", 1),
    ]
    # A clock that is set back does not stop it.
    scene.now -= 10**6
    scene.warn(1000)
    assert len(scene.records()) == 4
    assert [one.count for one in scene.told] == [3, 1, 1, 1]


def test_it_says_when_it_is_over(scene: Scene) -> None:
    scene.warn(1000, kind="space_below_soft")
    assert scene.records() == []
    scene.warn(1000)
    scene.warn(1000, kind="space_soft")
    scene.now += 5
    scene.warn(1000, kind="space_below_hard")
    hard, soft = scene.records()
    assert (hard.below, soft.below) == (1_000_005, 0)
    scene.warn(1000)
    assert [one.below for one in scene.records()] == [0, 0]
    scene.warn(1000, kind="space_below_soft")
    assert [one.below for one in scene.records()] == [1_000_005, 1_000_005]
    assert read_book(scene.book.path).quota.counts == {
        "space_hard": 2,
        "space_soft": 1,
        "space_below_hard": 1,
        "space_below_soft": 2,
    }


def test_one_container_does_not_drive_out_another(scene: Scene) -> None:
    scene.warn(1)
    for hour in range(MAX_RECORDS // MAX_IDS + 5):
        scene.now = 1_000_000.0 + hour * 3600
        scene.warn(*range(0x10000, 0x10000 + 2 * MAX_IDS))
    records = scene.records()
    assert len(records) <= MAX_RECORDS
    assert records[0].id == 1
    others = [one for one in records if one.id == OTHERS]
    assert {one.count for one in others} == {MAX_IDS}
    assert {tuple(one.containers) for one in others} == {("docker:1",)}
    tally = read_book(scene.book.path).quota
    assert tally.forgotten > 0
    assert tally.counts["space_hard"] == 1 + (MAX_RECORDS // MAX_IDS + 5) * 2 * MAX_IDS
    # What it remembers while it runs is bounded, too.
    assert len(scene.watch._current) < 3 * MAX_RECORDS
    assert os.path.getsize(scene.book.path) < books.MAX_BOOK


def test_a_storm_has_its_turn(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever crosses his limit as fast as he can leaves the watcher time for the others."""
    monkeypatch.setattr(watch, "MAX_A_TURN", 10)
    scene.events.waiting = [Warned(0, "space_soft", "user", 1, "7:3", 1)] * 15
    scene.watch.take()
    scene.watch.take()
    assert len(scene.events.waiting) == 5
    scene.watch._resume_at = 0.0
    scene.watch.take()
    assert scene.events.waiting == []


def test_people_hear_of_what_is_used_up(scene: Scene) -> None:
    scene.warn(1, kind="space_soft")
    scene.watch.settle()
    assert scene.said == []
    scene.warn(1, 2, 3)
    scene.watch.settle()
    scene.warn(4)
    scene.watch.settle()
    assert scene.said == [
        "quota: user 1 of docker:0 has no space left on /srv/7:3, and 2 more. See: core-pipe-forwarder quota"
    ]


class Host:
    """A host's store and settings, and who hands on what is new."""

    def __init__(self, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.store = path / "store"
        self.store.mkdir(mode=0o755)
        self.settings = path / "receiver.toml"
        monkeypatch.setenv("CORE_PIPE_CONFIG", str(self.settings))
        self.configure('events = ["quota"]')
        self.said: list[str] = []
        self.tell = Tell(str(self.store), self.said.append)

    def configure(self, line: str) -> None:
        self.settings.write_text(f'[[notify]]\nname = "x"\nrun = ["/bin/true"]\n{line}\n')

    def events(self) -> list[dict[str, Any]]:
        return [json.loads(path.read_bytes()) for path in sorted(self.store.glob("*.quota.json"))]


@pytest.fixture
def told_host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Host:
    return Host(tmp_path, monkeypatch)


def test_callbacks_are_told_of_each_new_record_once(told_host: Host, scene: Scene) -> None:
    scene.watch.tell = told_host.tell
    scene.warn(1000, 1000, 1000)
    assert [(one["id"], one["kind"], one["containers"]) for one in told_host.events()] == [
        (1000, "space_hard", ["docker:0"])
    ]
    assert (told_host.store / ".notify").exists()
    # The others come together, half a second later.
    scene.warn(1001, 1002)
    assert len(told_host.events()) == 1
    told_host.tell.settle()
    assert sorted(one["id"] for one in told_host.events()) == [1000, 1001, 1002]
    assert (told_host.said, told_host.tell.untold) == ([], 0)
    assert [path.name for path in told_host.store.iterdir() if "quota.new" in path.name] == []


def test_the_watcher_hands_on_what_is_new(told_host: Host, tmp_path: Path) -> None:
    """All of it together, but for the kernel: the last one comes when the watcher is about to end."""
    given = Given()
    given.waiting = [Warned(0, "space_hard", "user", number, "7:3", number) for number in (1000, 1001, 1000)]
    nothing, wake = os.pipe(), os.pipe()
    given.fileno = lambda: nothing[0]  # type: ignore[attr-defined]
    book, notes = Book(str(tmp_path / "ledger")), Notes(str(tmp_path / "handled"))
    try:
        watcher = Watcher(
            quota_scene.NoCrashes(),  # type: ignore[arg-type]
            book,
            notes,
            quota=given,  # type: ignore[arg-type]
            tell=told_host.tell,
        )
        os.write(wake[1], b".")
        watcher.run(wake[0])
    finally:
        book.close()
        notes.close()
        for fd in (*nothing, *wake):
            os.close(fd)
    assert sorted(one["id"] for one in told_host.events()) == [1000, 1001]


def test_nobody_wants_to_be_told(told_host: Host) -> None:
    for line in ("", 'events = ["crash"]', "events = 5"):
        told_host.configure(line)
        told_host.tell(a_warning())
        told_host.tell.settle()
        assert list(told_host.store.iterdir()) == []
    # The deliverer says what is wrong, and then tells.
    told_host.settings.write_text("nonsense")
    told_host.tell(a_warning())
    told_host.tell.settle()
    assert len(told_host.events()) == 1


def test_what_waits_is_bounded(told_host: Host) -> None:
    for number in range(2 * MOST + 11):
        told_host.tell(a_warning(id=number))
    told_host.tell.settle()
    found = told_host.events()
    assert len(found) == MOST
    # Of the first all but one came together, and the oldest of those were too many.
    assert {one["id"] for one in found} == set(range(MOST + 11, 2 * MOST + 11))
    assert told_host.tell.untold == MOST + 11
    (said,) = told_host.said
    assert said.startswith("quota: callbacks are not told of ")


@needs_root
@pytest.mark.parametrize("how", ["absent", "full", "others'", "a link", "settings"])
def test_a_store_that_cannot_be_used_costs_a_line(told_host: Host, how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    store = told_host.store
    if how == "absent":
        store.rmdir()
    elif how == "full":

        def write_all(*_: object) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr("receiver.notify.queue.write_all", write_all)
    elif how == "others'":
        store.chmod(0o777)
    elif how == "a link":
        store.rename(f"{store}.real")
        store.symlink_to(f"{store}.real")
    else:
        monkeypatch.setattr("receiver.config.load", lambda: 1 / 0)
    told_host.tell(a_warning())
    told_host.tell.settle()
    told_host.tell(a_warning())
    told_host.tell.settle()
    assert told_host.tell.untold == 2
    assert len(told_host.said) == 1
    if store.exists():
        assert [path.name for path in store.iterdir() if "quota" in path.name] == []


def a_warning(**values: Any) -> QuotaWarning:
    given = {"at": 1.0, "last": 2.0, "count": 3, "kind": "space_hard", "type": "user", "id": 1000, "device": "7:3"}
    return QuotaWarning(**{**given, "caused_by": 1000, **values})


def test_what_names_itself_in_an_odd_way() -> None:
    line = describe(a_warning(containers=["\x1b[2J\n\udcff"], name="é", mount="/srv/\n"))
    assert line.isascii()
    assert line.isprintable()
    tally = Tally()
    enter(tally, a_warning(containers=["\x1b[2J\n"], name="\x07", mount="\n"))
    shown = "\n".join(quota_command.lines(tally, 0, watched=True, told=True))
    assert "\x1b" not in shown
    assert "\x07" not in shown
    assert len(shown.splitlines()) == 2


def test_the_book_keeps_it(tmp_path: Path) -> None:
    path = str(tmp_path / "ledger")
    book = Book(path)
    book.open()
    book.write("quota", **asdict(a_warning()))
    book.write("quota", **asdict(a_warning(count=4)))
    book.write("quotas", counts={"space_hard": 4}, lost=1, forgotten=2)
    book.write("quotas", counts={"space_hard": 5}, lost=1, forgotten=2)
    for wrong in ({"count": "3"}, {"containers": [1]}, {"containers": "x"}, {"more": 1}):
        book.write("quota", **{**asdict(a_warning()), **wrong})
    contents = read_book(path)
    assert list(contents.quota.records.values()) == [a_warning(count=4)]
    assert (contents.quota.counts, contents.quota.lost, contents.quota.forgotten) == ({"space_hard": 5}, 1, 2)
    book.rewrite(contents)
    assert read_book(path) == contents
    book.close()
    assert ledgers.summary(path).quota_warnings == 5


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "ledger"
    monkeypatch.setattr(books, "BOOK", str(path))
    assert cli.main(["quota"]) == quota_command.NOT_WATCHING
    assert "warned of no quota" in capsys.readouterr().out
    book = Book(str(path))
    book.open()
    book.write("quota", **asdict(a_warning(containers=["docker:a", "docker:b"], mount="/srv")))
    book.write("quota", **asdict(a_warning(id=OTHERS, at=5.0, last=5e9)))
    assert cli.main(["quota"]) == (quota_command.OK if kernel_tells() else quota_command.NOT_WATCHING)
    shown = capsys.readouterr().out.splitlines()
    assert shown[0].split() == ["FIRST", "LAST", "COUNT", "BELOW", "KIND", "QUOTA", "NAME", "CONTAINER", "WHERE"]
    assert shown[1].endswith("3 no    space_hard user 1000 -    docker:a or docker:b /srv")
    assert shown[2].endswith("3 -     space_hard user ...  -    unknown              7:3")
    cli.main(["quota", "--json", "--since", "1h"])
    found = json.loads(capsys.readouterr().out)
    assert found["watched"] is True
    assert [one["id"] for one in found["warnings"]] == [OTHERS]
    book.close()


def test_the_line_in_status() -> None:
    watching = ledgers.Summary(watched=True, since=1.0, quota_warnings=7)
    assert quota_command.in_short(watching, told=False) == "this kernel has no disk quota netlink"
    assert quota_command.in_short(watching, told=True) == "watching; 7 so far"
    assert quota_command.in_short(ledgers.Summary(), told=True) == "not known: ask as root"
    assert quota_command.in_short(ledgers.Summary(watched=False), told=True) == "not watching; none so far"


FILES = {
    "etc/passwd": "root:x:0:0:root:/root:/bin/sh\n#web:x:5\nweb:x:1000:1000::/home/web:/bin/sh\nbroken:x\n",
    "etc/group": "staff:x:50:\n",
    "etc/subuid": "web:100000:65536\nother:xyz:1\n",
    "etc/subgid": "",
    "etc/projid": "# a comment\nmail:17\n",
    "etc/projects": "17:/srv/mail\n17:/srv/mail2\n18:/srv/list\n",
    "proc/1/mountinfo": "25 1 7:3 / /srv/with\\040blank rw - ext4 /dev/loop3 rw\n26 1 7:3 / /second rw - ext4 x rw\n",
}


@pytest.fixture
def host(tmp_path: Path) -> Path:
    for name, text in FILES.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text, encoding="utf-8")
    return tmp_path


def test_what_the_host_calls_it(host: Path) -> None:
    owners = Owners(str(host))
    assert owners.of("user", 1000, 0) == Owner("web", (), "web")
    assert owners.of("user", 100000, 0).name == "a subordinate id of web"
    assert owners.of("user", 165535, 0).name == "a subordinate id of web"
    assert owners.of("user", 165536, 0) == Owner("", (), "unknown")
    assert owners.of("group", 50, 0).name == "staff"
    assert owners.of("group", 100000, 0).name == ""
    assert owners.of("project", 17, 0).name == "mail /srv/mail"
    assert owners.of("project", 18, 0) == Owner("/srv/list", (), "project 18")
    assert owners.of("project", 19, 0) == Owner("", (), "project 19")
    assert owners.of("other", 1, 1) == Owner("", (), "")
    assert owners.mount_of("7:3") == "/srv/with blank"
    assert owners.mount_of("7:4") == ""


def process(host: Path, pid: int, cgroup: str, space: int, first: int = 0, count: int = 0, own: int = 0) -> None:
    """A process in a /proc that is made up: engines that are not here. own: what `first` is in there."""
    directory = host / f"proc/{pid}"
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "cgroup").write_text(f"0::{cgroup}\n", encoding="ascii")
    for kind in ("uid_map", "gid_map"):
        (directory / kind).write_text(f"{own} {first} {count}\n", encoding="ascii")
    spaces = host / f"spaces/{space}"
    spaces.parent.mkdir(exist_ok=True)
    spaces.touch()
    (directory / "ns").mkdir()
    (directory / "ns/user").symlink_to(spaces)


@needs_root
def test_which_containers_it_may_be(host: Path) -> None:
    a, b = (f"/system.slice/docker-{letter * 64}.scope" for letter in "ab")
    process(host, 40, a, 1, 200000, 65536)
    # What a container makes below its cgroup, and a user namespace inside of its own, are the container.
    process(host, 41, f"{a}/init.scope", 2, 201000, 1)
    process(host, 42, b, 3, 300000, 65536)
    process(host, 43, b.replace("b", "c"), 3, 300000, 65536)
    # No container: a service that has the host's ids as they are.
    process(host, 44, "/system.slice/private.service", 4, 0, 1 << 32)
    process(host, 45, "/system.slice/browser.service", 5, 1000, 1, own=1000)
    # Rootless: its root is its user, who is on the host as well.
    rootless = f"/user.slice/user-1001.slice/user@1001.service/user.slice/libpod-{DOCKER}.scope"
    process(host, 46, rootless, 6, 1001, 1)
    process(host, 47, "/user.slice/user-1001.slice/session-1.scope", 7)
    os.chown(host / "proc/47", 1001, 1001)
    owners = Owners(str(host))
    assert owners.of("user", 1001, 0).containers == ("host", f"podman:{DOCKER[:12]}")
    assert owners.of("user", 1000, 0).containers == ()
    assert owners.of("user", 201000, 0).containers == ("docker:aaaaaaaaaaaa",)
    assert owners.of("group", 201000, 0).containers == ("docker:aaaaaaaaaaaa",)
    assert owners.of("user", 265536, 0).containers == ()
    shared = owners.of("user", 300000, 0)
    assert len(shared.containers) == 2
    assert shared.containers[0] == "docker:bbbbbbbbbbbb"
    assert owners.of("project", 17, 201000) == Owner("mail /srv/mail", ("docker:aaaaaaaaaaaa",), a)


@needs_root
def test_a_container_without_a_user_namespace(host: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It shares the host's ids: whoever runs as that user may have been it."""
    process(host, 40, f"/docker/{DOCKER}", 1)
    process(host, 41, "/system.slice/cron.service", 1)
    process(host, 42, "/system.slice/cron.service", 1)
    monkeypatch.setattr("forwarder.quota.owners.PROC_USER_INIT_INO", (host / "spaces/1").stat().st_ino)
    for pid, uid in ((40, 1000), (41, 1000), (42, 1001)):
        os.chown(host / f"proc/{pid}", uid, uid)
    owners = Owners(str(host))
    assert owners.of("user", 1000, 0).containers == (f"docker:{DOCKER[:12]}", "host")
    assert owners.of("user", 1001, 0).containers == ()


def test_nobody_pays_for_pyroute2() -> None:
    program = "import sys, forwarder.cli, forwarder.quota.watch, forwarder.stub; print('pyroute2' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=CHECKOUT)
    assert done.stdout == "False\n"


def test_the_watcher_does_without() -> None:
    with pytest.raises(Unavailable, match="CONFIG_QUOTA_NETLINK_INTERFACE"), pytest.MonkeyPatch.context() as patch:
        patch.setattr(quota_events, "kernel_tells", lambda: False)
        QuotaEvents()
