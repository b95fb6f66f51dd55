"""The harness itself: containers that isolate and go entirely, crashes whose end is seen, settings that come back."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from typing import TYPE_CHECKING

import pytest

from tests.support import crashers, machine, mounts, processes
from tests.support.containers import Container, Host, PlainContainer, PodmanContainer, SystemdContainer
from tests.support.crash import crash, start_crash, wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

# Every signal whose default is a core, by its real cause where it has one.
CORE_SIGNALS = ["QUIT", "ILL", "TRAP", "ABRT", "BUS", "FPE", "SEGV", "XCPU", "XFSZ", "SYS"]

KINDS = ["plain", "plain with users", "systemd", "systemd with users", "podman"]


def make(kind: str) -> Container:
    classes: dict[str, tuple[str | None, Container]] = {
        "plain": (PlainContainer.why_unavailable(), PlainContainer()),
        "plain with users": (PlainContainer.why_no_user_namespace(), PlainContainer(user_namespace=True)),
        "systemd": (SystemdContainer.why_unavailable(), SystemdContainer()),
        "systemd with users": (SystemdContainer.why_no_private_users(), SystemdContainer(private_users=True)),
        "podman": (PodmanContainer.why_unavailable(), PodmanContainer()),
    }
    why, container = classes[kind]
    if why:
        pytest.skip(why)
    return container


@pytest.fixture
def settings() -> Iterator[machine.Machine]:
    if why := machine.why_unavailable():
        pytest.skip(why)
    with machine.exclusive() as held:
        yield held


@pytest.fixture(scope="module")
def plain() -> Iterator[PlainContainer]:
    if why := PlainContainer.why_unavailable():
        pytest.skip(why)
    with PlainContainer() as container:
        yield container


def core_of(container: Container, pid: int) -> bytes:
    """The core that a pattern of "core.%p" left in the process's working directory, the container's root."""
    with open(container.root / f"core.{pid}", "rb") as file:
        return file.read()


def own_states() -> set[str]:
    """The state directories of this process's containers (other runs may have theirs)."""
    names = os.listdir(mounts.STATE) if os.path.isdir(mounts.STATE) else []
    return {name for name in names if name.startswith(f"{os.getpid():x}.")}


@pytest.mark.kernel
@pytest.mark.system
@pytest.mark.parametrize("kind", KINDS)
def test_a_container_is_a_world_of_its_own_and_goes_entirely(kind: str, settings: machine.Machine) -> None:
    settings.core_pattern = b"core.%p"
    container = make(kind)
    before = own_states()
    begun = time.monotonic()
    with container:
        print(f"{kind}: up after {time.monotonic() - begun:.2f} s")
        (state,) = own_states() - before
        spaces = {name: processes.namespace(container.init_pid, name) for name in ("pid", "mnt", "uts", "ipc", "net")}
        for name, identity in spaces.items():
            assert identity != processes.namespace("self", name)
        user = processes.namespace(container.init_pid, "user")
        assert (user != processes.namespace("self", "user")) == ("users" in kind)

        # run() is in the same world, as its root.
        for name, identity in spaces.items():
            assert container.run(["readlink", f"/proc/self/ns/{name}"], check=True).stdout.strip() == identity
        assert container.run(["id", "-u"], check=True).stdout == "0\n"
        inside = container.run(["cat", "/proc/1/comm"], check=True).stdout.strip()
        assert inside == ("init" if "plain" in kind else "systemd")

        container.run(["touch", "/run/mine", "/var/lib/mine", "/tmp/mine"], check=True)
        for directory in ("run", "var/lib", "tmp"):
            assert (container.root / directory / "mine").exists()
            assert not os.path.exists(f"/{directory}/mine")
        assert not (container.root / mounts.STATE[1:]).exists()

        # The project is there, at its own path.
        code = "import systemd.daemon, prctl; print('imported')"
        assert container.run([sys.executable, "-c", code], check=True).stdout == "imported\n"

        result = crash(container, "SEGV")
        assert result.signal == signal.SIGSEGV, result
        assert result.core_dumped
        assert core_of(container, result.pid).startswith(b"\x7fELF")
        assert not crash(container, "SEGV", "--core-limit", "0").core_dumped

        left_running = container.popen(["sleep", "1000"])
        container.stop()
        assert left_running.poll() is not None
    assert spaces["pid"] is not None
    assert processes.in_namespace(spaces["pid"], "pid") == []
    with open("/proc/self/mountinfo", encoding="utf-8") as file:
        assert state not in file.read()
    assert state not in os.listdir(mounts.STATE)
    assert (
        subprocess.run(["find", "/sys/fs/cgroup", "-name", f"*{state}*"], capture_output=True, check=True).stdout == b""
    )


@pytest.mark.kernel
@pytest.mark.parametrize("name", CORE_SIGNALS)
def test_every_core_signal_dumps_core(name: str, plain: PlainContainer, settings: machine.Machine) -> None:
    settings.core_pattern = b"core.%p"
    result = crash(plain, name)
    assert result.signal == signal.Signals[f"SIG{name}"], result
    assert result.core_dumped
    assert result.seconds is not None
    assert 0 < result.seconds < 10


@pytest.mark.kernel
def test_memory_of_a_crash_is_known(plain: PlainContainer, settings: machine.Machine) -> None:
    settings.core_pattern = b"core.%p"
    for kind in ("random", "pattern"):
        core = core_of(plain, crash(plain, "SEGV", "--fill", str(1 << 20), kind).pid)
        assert crashers.known_bytes(1 << 20, kind) in core
    core = core_of(plain, crash(plain, "SEGV", "--sparse", str(64 << 20)).pid)
    assert len(core) > 64 << 20
    assert len(re.findall(b"\xa5" + b"\0" * 4095, core)) >= 32


@pytest.mark.kernel
def test_the_two_ways_to_the_known_bytes_agree() -> None:
    import hashlib

    if why := crashers.why_unavailable():
        pytest.skip(why)
    for kind in ("random", "zero", "pattern"):
        assert crashers.known_sha256(100_003, kind) == hashlib.sha256(crashers.known_bytes(100_003, kind)).hexdigest()


@pytest.mark.kernel
def test_a_crash_waits_for_its_moment(plain: PlainContainer, settings: machine.Machine) -> None:
    settings.core_pattern = b"core.%p"
    name = b"a\xff b\n"
    with start_crash(plain, "ABRT", "--wait", "--threads", "3", "--comm", name) as crashing:
        with open(f"/proc/{crashing.host_pid}/status", "rb") as file:
            status = file.read()
        assert b"Threads:\t4\n" in status
        # The kernel has both pids, and so have we.
        assert f"NSpid:\t{crashing.host_pid}\t{crashing.pid}\n".encode() in status
        with open(f"/proc/{crashing.host_pid}/comm", "rb") as file:
            assert file.read() == name + b"\n"
        assert not crashing.ended()
        crashing.go()
        assert crashing.result().signal == signal.SIGABRT


@pytest.mark.kernel
@pytest.mark.parametrize("how", ["--from-thread", "--leader-exits"])
def test_another_thread_crashes(how: str, plain: PlainContainer, settings: machine.Machine) -> None:
    settings.core_pattern = b"core.%p"
    with start_crash(plain, "SEGV", how, "--wait", "--threads", "1") as crashing:
        with open(f"/proc/{crashing.host_pid}/stat", "rb") as file:
            state = file.read().rpartition(b") ")[2][:1]
        assert (state == b"Z") == (how == "--leader-exits")
        crashing.go()
        result = crashing.result()
    assert result.signal == signal.SIGSEGV
    assert result.core_dumped


@pytest.mark.kernel
def test_a_user_crashes_in_a_chroot(plain: PlainContainer, settings: machine.Machine) -> None:
    settings.core_pattern = b"core.%p"
    plain.run(["install", "-d", "-o", "1000", "-g", "1000", "/tmp/jail"], check=True)
    result = crash(plain, "SEGV", "--chroot", "/tmp/jail", "--uid", "1000", "--gid", "1000")
    assert result.core_dumped
    status = (plain.root / "tmp/jail" / f"core.{result.pid}").stat()
    assert (status.st_uid, status.st_gid) == (1000, 1000)
    assert not crash(plain, "SEGV", "--chroot", "/tmp/jail", "--uid", "1000", "--dumpable", "0").core_dumped


@pytest.mark.kernel
def test_the_host_has_the_same_interface(tmp_path: Path, settings: machine.Machine) -> None:
    settings.core_pattern = f"{tmp_path}/core.%p"
    with Host() as host:
        result = crash(host, "FPE")
        assert (result.signal, result.core_dumped, result.pid) == (signal.SIGFPE, True, result.host_pid)
        assert (tmp_path / f"core.{result.pid}").exists()
        assert host.run(["sh", "-c", "cat; exit 3"], input="said").stdout == "said"
        # No second crash: the watcher only returns the number.
        assert host.run(["sh", "-c", "kill -SEGV $$"]).returncode == 128 + signal.SIGSEGV


@pytest.mark.kernel
def test_signals_reach_the_program_in_the_container(plain: PlainContainer) -> None:
    process = plain.popen(["sh", "-c", "trap 'exit 7' TERM; echo up; while :; do read -r _; done"], stdout=-1, stdin=-1)
    assert process.stdout is not None
    assert process.stdout.readline() == b"up\n"
    process.terminate()
    process.stdin.close() if process.stdin else None
    assert process.wait(10) == 7
    process.end()


@pytest.mark.kernel
def test_memory_is_the_containers_own() -> None:
    if why := PlainContainer.why_unavailable():
        pytest.skip(why)
    with PlainContainer(cgroup_memory_bytes=64 << 20) as container:
        result = crash(container, "9", "--fill", str(16 << 20), "random")
        assert result.signal == signal.SIGKILL
        assert container.cgroup.memory_peak() > 16 << 20
        assert container.cgroup.out_of_memory_kills() == 0
        assert crash(container, "SEGV", "--fill", str(256 << 20), "random").signal == signal.SIGKILL
        assert container.cgroup.out_of_memory_kills() > 0


@pytest.mark.kernel
def test_settings_come_back(settings: machine.Machine) -> None:
    before = (settings.core_pattern, settings.core_pipe_limit, settings.suid_dumpable)
    with machine.exclusive() as inner:
        inner.core_pattern = b"|/bin/false %P \xff "
        inner.core_pipe_limit = 7
        inner.suid_dumpable = 2
        assert inner.core_pattern == b"|/bin/false %P \xff "
        assert os.path.exists(machine.SAVED)
        with pytest.raises(ValueError, match="reads"):
            inner.core_pattern = b"x" * 200
    assert (settings.core_pattern, settings.core_pipe_limit, settings.suid_dumpable) == before


KILLED = """
import os, sys
from tests.support import machine
from tests.support.containers import PlainContainer, SystemdContainer
with machine.exclusive() as settings, {container}() as container:
    settings.core_pattern = b"left behind"
    print(container.init_pid, flush=True)
    sys.stdin.read()
"""


@pytest.mark.kernel
@pytest.mark.system
@pytest.mark.parametrize("container", [PlainContainer, SystemdContainer])
def test_a_killed_run_leaves_nothing_to_the_next(container: type[Container]) -> None:
    if why := container.why_unavailable() or machine.why_unavailable():
        pytest.skip(why)
    with machine.exclusive() as settings:
        before = settings.core_pattern
    run = [sys.executable, "-c", KILLED.format(container=container.__name__)]
    with subprocess.Popen(run, stdin=-1, stdout=-1, cwd=mounts.CHECKOUT) as killed:
        assert killed.stdout is not None
        init = int(killed.stdout.readline())
        started = processes.start_time(init)
        killed.kill()
    # The container ends by itself; the mounts and the settings are the next run's to undo.
    wait_until(lambda: processes.start_time(init) != started, 20, "the end of the container of the killed run")
    with machine.exclusive() as settings:
        assert settings.core_pattern == before
    mounts.clean_up_killed_runs()
    assert [name for name in os.listdir(mounts.STATE) if name.startswith(f"{killed.pid:x}.")] == []
    with open("/proc/self/mountinfo", encoding="utf-8") as file:
        assert f"{mounts.STATE}/{killed.pid:x}." not in file.read()
