"""The nearest enclosing receiver wins: the root that the process sees, the containers around it, then the host."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.support.containers import Container, Host, Inside, PlainContainer, Sandbox, SystemdContainer
from tests.support.crash import compile_crasher, start_crash
from tests.support.landing import crash_lands, lands
from tests.support.receivers import (
    BIN,
    INGRESSES,
    SOCKET,
    STORE,
    Forwarder,
    forwarder_installed,
    host_receiver,
    prepare_units,
    resident,
)
from tests.support.waiting import wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

pytestmark = pytest.mark.kernel

USER = 1000
CRASH = ("SEGV", "--wait")
# A sandbox's own place for a receiver and its store.
OWN_RUN = "mount -t tmpfs -o mode=755 run /run; mount -t tmpfs -o mode=755 lib /var/lib"
BIND = "import socket; socket.socket(socket.AF_UNIX).bind"
OWN_PIDS = ("--mount", "--pid", "--fork")
OWN_USERS = ("--user", "--map-root-user", *OWN_PIDS)


@pytest.fixture(scope="module", params=INGRESSES)
def forwarder(request: pytest.FixtureRequest) -> Iterator[Forwarder]:
    if why := PlainContainer.why_unavailable():
        pytest.skip(why)
    with forwarder_installed(request.param) as found:
        yield found


@pytest.fixture(scope="module")
def host(forwarder: Forwarder) -> Iterator[Host]:
    """The host, with its own receiver."""
    with host_receiver(forwarder), Host() as found:
        yield found


@pytest.fixture(scope="module")
def outer(forwarder: Forwarder) -> Iterator[PlainContainer]:  # noqa: ARG001 - the machine must be ours
    """A container with a receiver."""
    with PlainContainer() as found, resident(found):
        yield found


@pytest.fixture(scope="module")
def bare(forwarder: Forwarder) -> Iterator[PlainContainer]:  # noqa: ARG001 - the machine must be ours
    """A container without one."""
    with PlainContainer() as found:
        yield found


class Chroot(Container):
    """A directory of a container as the root of what runs there."""

    kind = "chroot"

    def __init__(self, outer: Container, directory: str) -> None:
        super().__init__()
        self.outer = outer
        self.directory = directory

    @classmethod
    def why_unavailable(cls) -> str | None:
        return None

    def _start(self) -> None:
        self.init_pid = self.outer.init_pid

    @property
    def root(self) -> Path:
        return Path(f"{self.outer.root}{self.directory}")

    def popen(self, argv: Sequence[str | bytes], **options: Any) -> Inside:
        process = self.outer.popen(["chroot", self.directory, *argv], **options)
        self._inside.append(process)
        return process


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        pytest.param("mkdir /srv/jail/run", "there is no /run/core_pipe.socket", id="no-socket"),
        pytest.param(":", "there is no /run", id="no-run"),
        pytest.param("ln -s /run /srv/jail/run", "/run is not a directory", id="run-is-a-link"),
        pytest.param(
            f"mkdir /srv/jail/run; cd /srv/jail; python3 -c '{BIND}(\".{SOCKET}\")'",
            "nobody listens at its socket",
            id="dead-socket",
        ),
    ],
)
def test_chroot_in_a_container(
    forwarder: Forwarder, host: Host, outer: PlainContainer, script: str, reason: str
) -> None:
    outer.run(["sh", "-ec", f"rm -rf /srv/jail; mkdir -p /srv/jail; {script}"], check=True)
    crashing = start_crash(outer, *CRASH, "--chroot", "/srv/jail", "--uid", "1234")
    record = crash_lands(forwarder, crashing, outer, host).record
    assert (record["uid"], record["root"]) == (1234, "/srv/jail")
    assert len(record["tried"]) == 1
    assert record["tried"][0].startswith("own root: ")
    assert reason in record["tried"][0]


def test_chroot_with_a_receiver_of_its_own(forwarder: Forwarder, host: Host, outer: PlainContainer) -> None:
    jail = "/srv/full"
    script = f"mkdir -p {jail}; mount --rbind / {jail}; mount --make-rprivate {jail}; for d in run var/lib; do"
    outer.run(["sh", "-ec", f"{script} mount -t tmpfs -o mode=755 own {jail}/$d; done"], check=True)
    try:
        with Chroot(outer, jail) as inner, resident(inner):
            record = crash_lands(forwarder, start_crash(inner, *CRASH), inner, outer, host).record
            assert record["tried"] == []
    finally:
        outer.run(["umount", "--recursive", jail], check=True)


@pytest.mark.parametrize("uid", [0, USER], ids=["root", "user"])
@pytest.mark.parametrize("served", [True, False], ids=["with-receiver", "without-receiver"])
def test_container_in_a_container(
    forwarder: Forwarder, host: Host, outer: PlainContainer, uid: int, served: bool
) -> None:
    options = OWN_USERS if uid else OWN_PIDS
    with Sandbox(outer, *options, uid=uid, script=OWN_RUN) as inner, contextlib.ExitStack() as stack:
        if served:
            stack.enter_context(resident(inner))
        crashing = start_crash(inner, *CRASH)
        record = crash_lands(forwarder, crashing, *([inner, outer] if served else [outer, inner]), host).record
        assert record["tried"] == ([] if served else ["own root: there is no /run/core_pipe.socket"])
        assert record["uid"] == (0 if served else uid)
        assert (record["own_pid"] == record["pid"]) == served


def test_three_deep_the_one_in_the_middle(forwarder: Forwarder, host: Host, outer: PlainContainer) -> None:
    with (
        Sandbox(outer, *OWN_PIDS, script=OWN_RUN) as middle,
        resident(middle),
        Sandbox(middle, *OWN_USERS, uid=USER, script=OWN_RUN) as inner,
    ):
        record = crash_lands(forwarder, start_crash(inner, *CRASH), middle, inner, outer, host).record
        assert record["uid"] == USER


def test_nearest_that_refuses_is_passed_over(forwarder: Forwarder, host: Host, outer: PlainContainer) -> None:
    """Its own user has made its socket one that anybody may connect to."""
    with Sandbox(outer, *OWN_PIDS, script=OWN_RUN) as inner, resident(inner):
        inner.run(["chmod", "0666", SOCKET], check=True)
        record = crash_lands(forwarder, start_crash(inner, *CRASH), outer, inner, host).record
        assert record["tried"] == ["own root: its socket may be connected by others than its root (mode 0666)"]


@pytest.mark.parametrize("parent", ["inside", "outside"])
def test_parent_inside_and_outside(forwarder: Forwarder, host: Host, outer: PlainContainer, parent: str) -> None:
    """`docker exec` and nsenter leave the parent outside: of the process it says nothing."""
    program = compile_crasher("crash")
    script = f"echo $PPID >/run/parent; {'' if parent == 'inside' else 'exec '}{program} SEGV; :"
    landed = lands(forwarder, outer, [host], lambda: outer.run(["sh", "-c", script]))
    assert landed.record["own_pid"] == landed.record["pid"] > 0
    assert outer.run(["cat", "/run/parent"], check=True).stdout == "0\n"


def test_process_that_entered_only_the_mount_namespace(forwarder: Forwarder, host: Host, outer: PlainContainer) -> None:
    """`nsenter --mount`: it sees the container's files and nothing else of it. Its receiver cannot see it: pid 0."""
    enter = ("--mount", "--target", str(outer.init_pid), compile_crasher("crash"))
    record = crash_lands(forwarder, start_crash(host, *enter, *CRASH, crasher="nsenter"), outer, host).record
    assert (record["pid"], record["tid"]) == (0, 0)


@pytest.mark.parametrize("option", ["--from-thread", "--leader-exits"])
def test_thread_ids_are_the_receivers(forwarder: Forwarder, host: Host, outer: PlainContainer, option: str) -> None:
    """H21. And a leader that has exited, whose root and namespaces are gone with it, is not who is asked about."""
    with contextlib.ExitStack() as stack:
        # The program looks at its leader in /proc, which has to be its pid namespace's.
        inner = stack.enter_context(Sandbox(outer, *OWN_PIDS)) if option == "--from-thread" else outer
        crashing = stack.enter_context(start_crash(inner, *CRASH, option))
        thread = wait_until(lambda: _other_thread(crashing.host_pid), 20, "the thread")
        status = Path(f"/proc/{crashing.host_pid}/task/{thread}/status").read_text()
        (line,) = (line for line in status.splitlines() if line.startswith("NSpid:"))
        in_outer, in_inner = int(line.split()[2]), int(line.split()[-1])
        record = crash_lands(forwarder, crashing, outer, host).record
    assert (record["tid"], record["own_tid"]) == (in_outer, in_inner)
    assert record["tid"] != record["pid"]


def _other_thread(pid: int) -> int | None:
    return next((int(tid) for tid in os.listdir(f"/proc/{pid}/task") if int(tid) != pid), None)


@pytest.mark.parametrize("served", [True, False], ids=["with-receiver", "without-receiver"])
def test_pid_namespace_shared_with_the_host(forwarder: Forwarder, host: Host, served: bool) -> None:
    with Sandbox(host, "--mount", script=OWN_RUN) as inner, contextlib.ExitStack() as stack:
        if served:
            stack.enter_context(resident(inner))
        crashing = start_crash(inner, *CRASH, "--uid", "1234")
        record = crash_lands(forwarder, crashing, *([inner, host] if served else [host, inner])).record
        assert (record["pid"], record["uid"]) == (crashing.host_pid, 1234)
        assert record["tried"] == ([] if served else ["own root: there is no /run/core_pipe.socket"])


def test_pod(forwarder: Forwarder, host: Host, bare: PlainContainer) -> None:
    """One pid namespace, a mount namespace and a receiver for each container in it."""
    with (
        Sandbox(bare, "--mount", script=OWN_RUN) as one,
        Sandbox(bare, "--mount", script=OWN_RUN) as two,
        Sandbox(bare, "--mount", script=OWN_RUN) as unserved,
        resident(one),
        resident(two),
    ):
        crash_lands(forwarder, start_crash(one, *CRASH), one, two, unserved, bare, host)
        crash_lands(forwarder, start_crash(two, *CRASH), two, one, unserved, bare, host)
        # Not to its neighbours: none of them is around it.
        crash_lands(forwarder, start_crash(unserved, *CRASH), host, one, two, unserved, bare)


@pytest.mark.parametrize(
    "script",
    [
        pytest.param("mount -t tmpfs tmp /tmp", id="PrivateTmp"),
        pytest.param("mount --rbind / /; mount -o remount,bind,ro /", id="ProtectSystem"),
        pytest.param("mount -t tmpfs run /run", id="TemporaryFileSystem"),
    ],
)
def test_service_of_the_host_with_a_private_mount_namespace(forwarder: Forwarder, host: Host, script: str) -> None:
    with Sandbox(host, "--mount", "--propagation", "slave", script=script) as service:
        record = crash_lands(forwarder, start_crash(service, *CRASH), host).record
        assert len(record["tried"]) == 1


@pytest.mark.parametrize("uid", [0, USER], ids=["root", "user"])
@pytest.mark.parametrize("around", ["host", "outer"])
def test_sandbox_without_a_receiver(
    forwarder: Forwarder, request: pytest.FixtureRequest, uid: int, around: str
) -> None:
    """As browsers make them: user, pid and mount namespaces, and the /run of whoever started it."""
    place: Container = request.getfixturevalue(around)
    host: Host = request.getfixturevalue("host")
    with Sandbox(place, *OWN_USERS, uid=uid) as sandbox:
        crashing = start_crash(sandbox, *CRASH)
        record = crash_lands(forwarder, crashing, place, *([host] if place is not host else [])).record
        assert (record["uid"], record["own_pid"]) == (uid, crashing.pid)


@pytest.mark.parametrize("around", ["host", "outer"])
def test_root_directory_of_a_dead_process(forwarder: Forwarder, request: pytest.FixtureRequest, around: str) -> None:
    """H20: Chrome's sandbox changes its root to where nothing can be opened; the error may be ESRCH."""
    place: Container = request.getfixturevalue(around)
    host: Host = request.getfixturevalue("host")
    with Sandbox(place, *OWN_USERS, uid=USER) as sandbox:
        crashing = start_crash(sandbox, *CRASH, "--dead-root")
        record = crash_lands(forwarder, crashing, place, *([host] if place is not host else [])).record
        assert record["tried"][0] == "own root: there is no /run"


def test_root_that_was_unmounted_under_it(forwarder: Forwarder, host: Host, outer: PlainContainer) -> None:
    """H20: the root that snaps and bubblewrap make for a program is in no mount namespace any more."""
    outer.run(["sh", "-ec", "mkdir -p /srv/gone; mount -t tmpfs gone /srv/gone; mkdir /srv/gone/run"], check=True)
    with start_crash(outer, *CRASH, "--chroot", "/srv/gone") as crashing:
        outer.run(["umount", "--lazy", "/srv/gone"], check=True)
        record = crash_lands(forwarder, crashing, outer, host).record
    assert record["tried"] == ["own root: there is no /run/core_pipe.socket"]


def test_init_of_a_container_is_not_asked_to_serve_itself(forwarder: Forwarder, host: Host) -> None:
    init = f"mkfifo /run/go; read go </run/go; exec {compile_crasher('crash')} SEGV"
    with PlainContainer(init=["sh", "-c", init]) as container:
        go = Path(f"{container.root}/run/go")
        wait_until(go.exists, 20, "the init waits")
        receiver = container.popen([f"{BIN}/core-pipe-receiver", "--listen", SOCKET], env={"CORE_PIPE_STORE": STORE})
        wait_until(Path(f"{container.root}{SOCKET}").is_socket, 20, "the receiver listens")
        # Held, for what becomes of it: the container ends with its init.
        store = os.open(f"{container.root}/var/lib", os.O_RDONLY | os.O_DIRECTORY)
        try:
            host_pid = container.init_pid
            landed = lands(forwarder, host, [], lambda: go.write_text("go\n"))
            assert (landed.record["pid"], landed.record["own_pid"], landed.record["uid"]) == (host_pid, 1, 0)
            receiver.wait(20)
            with contextlib.suppress(FileNotFoundError):
                assert set(os.listdir(os.open("core_pipe", os.O_RDONLY, dir_fd=store))) <= {".lock"}
        finally:
            os.close(store)


def test_init_of_an_inner_container_has_the_outer_one(forwarder: Forwarder, host: Host, outer: PlainContainer) -> None:
    last = f"read go || :; exec {compile_crasher('crash')} SEGV"
    with Sandbox(outer, *OWN_PIDS, script=OWN_RUN, last=last) as inner:
        receiver = inner.popen([f"{BIN}/core-pipe-receiver", "--listen", SOCKET], env={"CORE_PIPE_STORE": STORE})
        wait_until(Path(f"{inner.root}{SOCKET}").is_socket, 20, "the receiver listens")
        landed = lands(forwarder, outer, [host], inner.stdin.close)
        assert landed.record["own_pid"] == 1 < landed.record["pid"]
        receiver.wait(20)


@pytest.mark.parametrize(
    "comm",
    [
        pytest.param(b") R 1 1 1 0 -1", id="end-of-comm"),
        pytest.param(b"a\nTgid:\t1", id="newline"),
        pytest.param(b"\rTgid:\t1", id="tgid"),
        pytest.param(b"\rCoreDumping:\t0", id="not-dumping"),
        pytest.param(b"\rNSpid:\t1", id="init"),
        pytest.param(b"x v=1 P=1 I=1", id="arguments"),
        pytest.param(b"|/bin/sh -c $p", id="pattern"),
        pytest.param(b"\xff\xfe%P\x1b[m", id="bytes"),
    ],
)
def test_name_that_looks_like_something_else(
    forwarder: Forwarder, host: Host, outer: PlainContainer, comm: bytes
) -> None:
    """H9, H13, H14: proc files are lines and words, core_pattern is cut at spaces; the name is anybody's choice."""
    with Sandbox(outer, *OWN_PIDS) as inner:
        record = crash_lands(forwarder, start_crash(inner, *CRASH, "--comm", comm), outer, host).record
    assert record["comm"] == comm[:15].decode("utf-8", "backslashreplace")


@pytest.mark.system
@pytest.mark.skipif(SystemdContainer.why_unavailable() is not None, reason=str(SystemdContainer.why_unavailable()))
def test_services_of_a_container_with_systemd(forwarder: Forwarder, host: Host) -> None:
    sandboxes = [
        ["PrivateTmp=yes", "ProtectSystem=strict", "ProtectHome=yes"],
        ["PrivateUsers=yes", "PrivateMounts=yes", "DynamicUser=yes"],
        ["TemporaryFileSystem=/run", "ProtectProc=invisible"],
        [f"InaccessiblePaths={SOCKET}"],
        ["RootDirectory=/srv/jail", f"BindReadOnlyPaths=/usr /lib /lib64 {os.path.dirname(compile_crasher('crash'))}"],
    ]
    settings = 'store_max = "off"\nkeep_free = "off"\n'
    with SystemdContainer(prepare=prepare_units(accept=True, settings=settings)) as container:
        container.run(["mkdir", "-p", "/srv/jail"], check=True)
        for properties in sandboxes:
            options = [f"--property={one}" for one in [*properties, "LimitCORE=infinity"]]
            command = ["systemd-run", "--wait", "--quiet", *options, compile_crasher("crash"), "SEGV"]
            landed = lands(forwarder, container, [host], lambda: container.run(command))  # noqa: B023 - called at once
            assert landed.record["own_pid"] == landed.record["pid"] > 1, properties
