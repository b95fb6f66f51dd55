"""A core only flows to those who own the process, whoever else has a receiver, a root or a namespace on its way."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from forwarder import namespaces
from tests.support.containers import Container, Host, PlainContainer, Sandbox
from tests.support.crash import compile_crasher, crash, start_crash
from tests.support.landing import Landed, crash_lands, lands, names, store_of
from tests.support.receivers import INGRESSES, SOCKET, Forwarder, forwarder_installed, host_receiver, resident
from tests.support.waiting import wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.kernel

USER, STRANGER = 1000, 1001
CRASH = ("SEGV", "--wait")
OWN_RUN = "mount -t tmpfs -o mode=755 run /run; mount -t tmpfs -o mode=755 lib /var/lib"
OWN_MOUNTS = ("--user", "--map-root-user", "--mount")
OWN_PIDS = (*OWN_MOUNTS, "--pid", "--fork")
NOT_HIS = "own root: its mount namespace's owner does not own the process"
ACL = "system.posix_acl_access"


@pytest.fixture(scope="module", params=INGRESSES)
def forwarder(request: pytest.FixtureRequest) -> Iterator[Forwarder]:
    if why := PlainContainer.why_unavailable():
        pytest.skip(why)
    with forwarder_installed(request.param) as found:
        assert found.machine.suid_dumpable == 2
        yield found


@pytest.fixture(scope="module")
def host(forwarder: Forwarder) -> Iterator[Host]:
    """The host, with its own receiver."""
    with host_receiver(forwarder), Host() as found:
        yield found


@pytest.fixture(scope="module")
def plain(forwarder: Forwarder) -> Iterator[PlainContainer]:  # noqa: ARG001 - the machine must be ours
    with PlainContainer() as found, resident(found):
        yield found


@pytest.fixture(scope="module")
def users(forwarder: Forwarder) -> Iterator[PlainContainer]:  # noqa: ARG001 - the machine must be ours
    """A container with a user namespace."""
    if why := PlainContainer.why_no_user_namespace():
        pytest.skip(why)
    with PlainContainer(user_namespace=True) as found, resident(found):
        yield found


@pytest.fixture(params=["host", "plain", "users"])
def place(request: pytest.FixtureRequest, host: Host) -> Container:  # noqa: ARG001 - always there, to get what others do not
    found: Container = request.getfixturevalue(request.param)
    return found


@pytest.fixture(scope="module")
def sandbox(host: Host) -> Iterator[Sandbox]:
    """A user's own sandbox on the host, with a receiver of his, in the host's pid namespace."""
    with Sandbox(host, *OWN_MOUNTS, uid=USER, script=OWN_RUN) as found, resident(found):
        yield found


@pytest.fixture
def folder() -> Iterator[Path]:
    """A place for programs of the host's that users may run."""
    path = Path(tempfile.mkdtemp(prefix="core_pipe-owners-", dir="/var/tmp"))
    path.chmod(0o755)
    yield path
    shutil.rmtree(path)


def as_user(uid: int, *command: str) -> list[str]:
    # setpriv(1) keeps root's capabilities until its execve(2), which so would be of one who may read everything.
    return ["setpriv", f"--reuid={uid}", f"--regid={uid}", "--clear-groups", "env", *command]


def elsewhere(place: Container, host: Host) -> list[Container]:
    return [] if place is host else [host]


@contextlib.contextmanager
def program(place: Container, *make_it: str) -> Iterator[str]:
    """A copy of the crash program that is the place's root's; then `make_it`, a command with its path at the end."""
    directory = place.run(["mktemp", "-d", "/usr/local/bin/owners.XXXXXX"], check=True).stdout.strip()
    path = f"{directory}/crash"
    try:
        place.run(["sh", "-ec", f"chmod 755 {directory}; cp {compile_crasher('crash')} {path}"], check=True)
        if make_it:
            done = place.run([*make_it, path])
            if done.returncode != 0:
                pytest.skip(f"{' '.join(make_it)} does not work on this file system: {done.stderr.strip()}")
        yield path
    finally:
        place.run(["rm", "-r", directory], check=True)


def can_read(place: Container, uid: int, landed: Landed) -> tuple[bool, bool]:
    """Whether a user of the place can read the record, and the core."""
    paths = (landed.record_path, landed.core_path)
    inside = [f"/{path.relative_to(place.root)}" for path in paths]
    record, core = (place.run(as_user(uid, "cat", path)).returncode == 0 for path in inside)
    return record, core


def assert_for_root_only(place: Container, landed: Landed) -> None:
    process = os.open(f"/proc/{place.init_pid}", os.O_PATH)
    try:
        root = namespaces.mapped_root(process)
    finally:
        os.close(process)
    for path in (landed.record_path, landed.core_path):
        found = path.stat()
        assert (found.st_uid, found.st_gid, found.st_mode & 0o7777) == (root, root, 0o640), path
        with pytest.raises(OSError, match="No data available"):
            os.getxattr(path, ACL)
    assert can_read(place, USER, landed) == (False, False)


# A process of an ordinary user is his.


@pytest.mark.parametrize("uid", [USER, 0])
def test_user_reads_his_own(forwarder: Forwarder, host: Host, place: Container, uid: int) -> None:
    command = as_user(uid, compile_crasher("crash"), *CRASH)
    crashing = start_crash(place, *command[1:], crasher=command[0])
    landed = crash_lands(forwarder, crashing, place, *elsewhere(place, host))
    assert (landed.record["uid"], landed.record["dumpable"]) == (uid, 1)
    if uid == 0:
        assert_for_root_only(place, landed)
    else:
        assert can_read(place, uid, landed) == (True, True)
    assert can_read(place, STRANGER, landed) == (False, False)


# A process that its own user may not look into is for root.


@pytest.mark.parametrize(
    "make_it",
    [
        pytest.param(("chmod", "4755"), id="set-uid"),
        pytest.param(("chmod", "2755"), id="set-gid"),
        pytest.param(("chmod", "0711"), id="unreadable"),
        pytest.param(("setcap", "cap_net_raw+ep"), id="capabilities"),
    ],
)
def test_program_with_more_rights_than_its_user(
    forwarder: Forwarder, host: Host, place: Container, make_it: tuple[str, ...]
) -> None:
    """H11."""
    with program(place, *make_it) as path:
        command = as_user(USER, path, *CRASH)
        crashing = start_crash(place, *command[1:], crasher=command[0])
        landed = crash_lands(forwarder, crashing, place, *elsewhere(place, host))
    assert landed.record["dumpable"] == 2
    assert landed.record["uid"] == USER
    if make_it == ("chmod", "4755"):
        assert landed.record["euid"] == 0
    assert_for_root_only(place, landed)


@pytest.mark.parametrize("mode", ["4755", "2755"], ids=["set-uid", "set-gid"])
def test_program_with_more_rights_that_says_it_is_dumpable(
    forwarder: Forwarder, host: Host, place: Container, mode: str
) -> None:
    """H11: it gave its rights up and called prctl(PR_SET_DUMPABLE, 1); what it had read before is still in there."""
    with program(place, "chmod", mode) as path:
        command = as_user(USER, path, *CRASH, "--dumpable", "1")
        crashing = start_crash(place, *command[1:], crasher=command[0])
        landed = crash_lands(forwarder, crashing, place, *elsewhere(place, host))
    assert landed.record["dumpable"] == 1
    assert_for_root_only(place, landed)


def test_process_that_has_changed_its_user(forwarder: Forwarder, host: Host, place: Container) -> None:
    """A daemon that was root and dropped it: the kernel lets its new user not look into it."""
    with program(place) as path:
        crashing = start_crash(place, *CRASH, "--uid", str(USER), "--gid", str(USER), "--dumpable", "2", crasher=path)
        landed = crash_lands(forwarder, crashing, place, *elsewhere(place, host))
    assert (landed.record["uid"], landed.record["euid"], landed.record["dumpable"]) == (USER, USER, 2)
    assert_for_root_only(place, landed)


def test_process_that_is_not_dumpable_at_all(forwarder: Forwarder, host: Host, place: Container) -> None:
    """prctl(PR_SET_DUMPABLE, 0): the kernel dumps nothing, nobody hangs, nothing is left anywhere."""
    places = [place, *elsewhere(place, host)]
    before = [names(store_of(one, forwarder)) for one in places]
    found = crash(place, "SEGV", "--dumpable", "0", timeout=20)
    assert found.signal is not None
    assert not found.core_dumped
    # One after it, that is all there is when it is there.
    crash_lands(forwarder, start_crash(place, *CRASH), place, *elsewhere(place, host))
    after = [names(store_of(one, forwarder)) for one in places]
    assert [len(now - then) for now, then in zip(after, before, strict=True)] == [2, 0][: len(places)]


# Who is mapped, and who is one past it.


def test_ends_of_a_map(users: PlainContainer, sandbox: Sandbox) -> None:
    """H3."""
    for place, first, count in ((users, 100000, 65536), (sandbox, USER, 1)):
        process = os.open(f"/proc/{place.init_pid}", os.O_PATH)
        try:
            wanted = {first - 1: False, first: True, first + count - 1: True, first + count: False, 0: False}
            assert {number: namespaces.is_mapped(process, number) for number in wanted} == wanted
            assert namespaces.mapped_root(process) == first
        finally:
            os.close(process)
    everyone = os.open("/proc/self", os.O_PATH)
    try:
        assert [namespaces.is_mapped(everyone, number) for number in (0, (1 << 32) - 2, (1 << 32) - 1)] == [
            True,
            True,
            False,
        ]
    finally:
        os.close(everyone)


@pytest.mark.parametrize(("owner", "is_theirs"), [(165535, True), (165536, False), (99999, False), (0, False)])
def test_unreadable_program_of_somebody_outside(
    forwarder: Forwarder, host: Host, users: PlainContainer, owner: int, is_theirs: bool
) -> None:
    """Whose program it is decides, up to the last id of the container's range and not one further (H3)."""
    with program(users) as path:
        seen = f"{users.root}{path}"
        os.chown(seen, owner, owner)
        os.chmod(seen, 0o711)
        crashing = start_crash(users, *as_user(USER, path, *CRASH)[1:], crasher="setpriv")
        at, other = (users, host) if is_theirs else (host, users)
        landed = crash_lands(forwarder, crashing, at, other)
    assert landed.record["dumpable"] == 2
    assert_for_root_only(at, landed)
    if not is_theirs:
        reason = "its program belongs to somebody outside its user namespace"
        assert [reason in line for line in landed.record["tried"]] == [True]


# A user's own sandbox, with a receiver of his own.


def test_sandbox_has_its_own(forwarder: Forwarder, host: Host, sandbox: Sandbox) -> None:
    landed = crash_lands(forwarder, start_crash(sandbox, *CRASH), sandbox, host)
    assert landed.record["uid"] == 0
    assert landed.core_path.stat().st_uid == USER


def test_unreadable_program_of_the_hosts_in_a_sandbox(
    forwarder: Forwarder, host: Host, sandbox: Sandbox, folder: Path
) -> None:
    """Otherwise anybody could have the memory of a program that he may run but not read."""
    path = folder / "crash"
    shutil.copy(compile_crasher("crash"), path)
    path.chmod(0o711)
    crashing = start_crash(sandbox, *CRASH, crasher=str(path))
    landed = crash_lands(forwarder, crashing, host, sandbox)
    assert (landed.record["uid"], landed.record["dumpable"]) == (USER, 2)
    assert_for_root_only(host, landed)
    # His own program, which nobody may read, is his.
    os.chown(path, USER, USER)
    path.chmod(0o111)
    crash_lands(forwarder, start_crash(sandbox, *CRASH, crasher=str(path)), sandbox, host)


@pytest.mark.parametrize("mode", [0o4755, 0o2755])
def test_set_uid_program_of_the_hosts_in_a_sandbox(
    forwarder: Forwarder, host: Host, sandbox: Sandbox, folder: Path, mode: int
) -> None:
    """The kernel gives no rights of somebody who is not mapped there: it runs as its user, and is his."""
    path = folder / "crash"
    shutil.copy(compile_crasher("crash"), path)
    path.chmod(mode)
    record = crash_lands(forwarder, start_crash(sandbox, *CRASH, crasher=str(path)), sandbox, host).record
    assert (record["uids"]["effective"], record["gids"]["effective"], record["dumpable"]) == (0, 0, 1)


# Root's processes come near users' receivers.


def entered(sandbox: Sandbox, *options: str, uid: int = 0) -> list[str]:
    user = as_user(uid) if uid else []
    return [*options, "--target", str(sandbox.init_pid), *user, compile_crasher("crash"), *CRASH]


@pytest.mark.parametrize("uid", [0, STRANGER], ids=["root", "stranger"])
@pytest.mark.parametrize("options", [("--mount",), ("--mount", "--root", "--wd")], ids=["mount", "mount-and-root"])
def test_process_of_the_hosts_that_entered_a_users_mount_namespace(
    forwarder: Forwarder, host: Host, sandbox: Sandbox, options: tuple[str, ...], uid: int
) -> None:
    """It sees the user's /run and what listens there; but the user does not own it."""
    crashing = start_crash(host, *entered(sandbox, *options, uid=uid), crasher="nsenter")
    record = crash_lands(forwarder, crashing, host, sandbox).record
    assert (record["uid"], record["tried"]) == (uid, [NOT_HIS])


@pytest.mark.parametrize("namespace", ["--pid", "--pid --mount"])
def test_process_of_the_hosts_in_a_users_pid_namespace(forwarder: Forwarder, host: Host, namespace: str) -> None:
    """There the user's init is around it, with a root directory and a receiver of the user's choice."""
    with Sandbox(host, *OWN_PIDS, "--mount-proc", uid=USER, script=OWN_RUN) as sandbox, resident(sandbox):
        script = f"{compile_crasher('crash')} SEGV; :"
        command = ["nsenter", *namespace.split(), "--target", str(sandbox.init_pid), "sh", "-c", script]
        landed = lands(forwarder, host, [sandbox], lambda: host.run(command, check=True))
        assert landed.record["uid"] == 0
        assert landed.record["own_pid"] != landed.record["pid"]
        assert any("owner does not own the process" in line for line in landed.record["tried"])
        # And the user's own process there is his.
        crash_lands(forwarder, start_crash(sandbox, *CRASH), sandbox, host)


def test_socket_mounted_over_the_hosts(forwarder: Forwarder, host: Host) -> None:
    """In the user's mount namespace, at the host's own name in the host's own /run."""
    own = "/var/lib/own.socket"
    script = "mount -t tmpfs -o mode=755 lib /var/lib"
    with Sandbox(host, *OWN_MOUNTS, uid=USER, script=script) as sandbox, resident(sandbox, path=own):
        sandbox.run(["mount", "--bind", own, SOCKET], check=True)
        crashing = start_crash(host, *entered(sandbox, "--mount"), crasher="nsenter")
        assert crash_lands(forwarder, crashing, host, sandbox).record["tried"] == [NOT_HIS]
        crash_lands(forwarder, start_crash(sandbox, *CRASH), sandbox, host)


@pytest.mark.parametrize("listener", ["user", "sandbox"])
def test_process_of_roots_in_a_users_directory(
    forwarder: Forwarder, host: Host, place: Container, listener: str
) -> None:
    """Its root is a directory of the user's, with a socket of his: as himself, or as root of a sandbox of his."""
    directory = place.run(["mktemp", "-d", "/tmp/owners.XXXXXX"], check=True).stdout.strip()
    place.run(["sh", "-ec", f"mkdir {directory}/run; chown -R {USER} {directory}"], check=True)
    try:
        with contextlib.ExitStack() as stack:
            if listener == "sandbox":
                inside: Container = stack.enter_context(Sandbox(place, *OWN_MOUNTS, uid=USER))
            else:
                inside = place
            script = (
                "import socket, os, time; os.umask(0o177); s = socket.socket(socket.AF_UNIX);"
                f"s.bind('{directory}{SOCKET}'); s.listen(8); time.sleep(1e6)"
            )
            command = ["python3", "-c", script]
            process = inside.popen(command if listener == "sandbox" else as_user(USER, *command))
            stack.callback(process.end)
            wait_until(lambda: place.run(["test", "-S", f"{directory}{SOCKET}"]).returncode == 0, 20, "his socket")
            crashing = start_crash(place, *CRASH, "--chroot", directory)
            record = crash_lands(forwarder, crashing, place, *elsewhere(place, host)).record
        assert record["tried"][0].startswith("own root: its ")
        assert "its socket's" not in record["tried"][0]
    finally:
        place.run(["rm", "-r", directory], check=True)


def test_listener_that_a_user_left_at_roots_socket(forwarder: Forwarder, host: Host, plain: PlainContainer) -> None:
    """The root of a sandbox in a container is not the container's: his receiver gets his own cores only."""
    with Sandbox(plain, *OWN_MOUNTS, uid=USER, script=OWN_RUN) as sandbox, resident(sandbox):
        crash_lands(forwarder, start_crash(sandbox, *CRASH), sandbox, plain, host)
        enter = [*entered(sandbox, "--mount")]
        # From inside the container, where the sandbox's first process has another number.
        enter[2] = str(_number_in_container(sandbox))
        crashing = start_crash(plain, *enter, crasher="nsenter")
        record = crash_lands(forwarder, crashing, plain, sandbox, host).record
        assert record["tried"] == [NOT_HIS]


def _number_in_container(sandbox: Sandbox) -> int:
    status = Path(f"/proc/{sandbox.init_pid}/status").read_text(encoding="ascii", errors="replace")
    (line,) = (line for line in status.split("\n") if line.startswith("NSpid:"))
    return int(line.split()[2])
