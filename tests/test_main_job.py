"""The main job, on a real kernel: a process crashes somewhere; its core appears there, and nowhere else."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import secrets
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.support.cgroups import hierarchies
from tests.support.containers import Container, Host, PlainContainer, PodmanContainer, SystemdContainer
from tests.support.crash import compile_crasher, crash, start_crash
from tests.support.crashers import known_sha256
from tests.support.receivers import (
    INGRESSES,
    STORE,
    Forwarder,
    dump,
    forwarder_installed,
    gdb,
    host_receiver,
    prepare_units,
    resident,
    wait_for_records,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

MIB = 1 << 20
FILL = 100 * MIB


@pytest.fixture(scope="module", params=INGRESSES)
def forwarder(request: pytest.FixtureRequest) -> Iterator[Forwarder]:
    with forwarder_installed(request.param) as found:
        yield found


def check(container: Container, forwarder: Forwarder, store: str, tmp_path: Path) -> None:
    """Crash with a known 100 MiB; its record and core must be in `store` of the container, whole, and nowhere else."""
    before = len(forwarder.records()) if store != forwarder.store else 0
    found = crash(container, "SEGV", "--fill", str(FILL), "random")
    assert found.core_dumped
    record = wait_for_records(container, store=store)[-1]
    assert record["pid"] == found.pid
    assert record["tid"] == found.pid
    assert (record["signal"], record["signal_name"], record["comm"]) == (11, "SIGSEGV", "crash")
    assert record["core"]["state"] == "stored", record["core"]
    assert record["exe"] == compile_crasher("crash")
    assert record["command_line"][1:3] == ["SEGV", "--fill"]
    core = dump(container, str(found.pid), tmp_path / "core", store)
    assert core.stat().st_size == record["core"]["size_bytes"] > FILL
    program = compile_crasher("crash")
    said = gdb(program, core, "bt", f"dump binary memory {tmp_path}/buffer known_buffer known_buffer+known_size")
    assert "SIGSEGV" in said
    assert "main (" in said
    buffer = tmp_path / "buffer"
    assert buffer.stat().st_size == FILL
    with buffer.open("rb") as file:
        assert hashlib.file_digest(file, "sha256").hexdigest() == known_sha256(FILL)
    buffer.unlink()
    core.unlink()
    if store != forwarder.store:
        assert len(forwarder.records()) == before, "something of a container's crash is on the host"


@pytest.mark.system
@pytest.mark.skipif(SystemdContainer.why_unavailable() is not None, reason=str(SystemdContainer.why_unavailable()))
@pytest.mark.parametrize("accept", [True, False], ids=["accept-yes", "accept-no"])
def test_systemd_container(forwarder: Forwarder, tmp_path: Path, accept: bool) -> None:
    settings = 'idle_seconds = 3\nstore_max = "off"\nkeep_free = "off"\n'
    with SystemdContainer(prepare=prepare_units(accept=accept, settings=settings)) as container:
        check(container, forwarder, STORE, tmp_path)


@pytest.mark.kernel
def test_container_without_systemd(forwarder: Forwarder, tmp_path: Path) -> None:
    with PlainContainer() as container, resident(container):
        check(container, forwarder, STORE, tmp_path)


@pytest.mark.kernel
@pytest.mark.skipif(
    PlainContainer.why_no_user_namespace() is not None, reason=str(PlainContainer.why_no_user_namespace())
)
def test_user_namespace(forwarder: Forwarder, tmp_path: Path) -> None:
    with PlainContainer(user_namespace=True) as container, resident(container):
        check(container, forwarder, STORE, tmp_path)


@pytest.mark.system
@pytest.mark.skipif(PodmanContainer.why_unavailable() is not None, reason=str(PodmanContainer.why_unavailable()))
def test_podman(forwarder: Forwarder, tmp_path: Path) -> None:
    with PodmanContainer(prepare=prepare_units(accept=True)) as container:
        check(container, forwarder, STORE, tmp_path)


@pytest.mark.kernel
def test_host_process(forwarder: Forwarder, tmp_path: Path) -> None:
    with host_receiver(forwarder), Host() as host:
        check(host, forwarder, forwarder.store, tmp_path)
    shutil.rmtree(forwarder.store)
    assert not os.path.exists(STORE)


@pytest.mark.kernel
@pytest.mark.usefixtures("forwarder")
def test_a_container_below_system_slice() -> None:
    """H4: Apport took cgroups named system.slice/docker-*.scope for the host's. What counts is namespaces."""
    name = f"system.slice/docker-{secrets.token_hex(32)}.scope"
    with PlainContainer() as container, resident(container), contextlib.ExitStack() as stack:
        crashing = stack.enter_context(start_crash(container, "SEGV", "--wait"))
        for hierarchy in hierarchies().values():
            directory = os.path.join(hierarchy, name)
            parent = os.path.dirname(directory)
            if not os.path.exists(parent):
                os.mkdir(parent)
                stack.callback(os.rmdir, parent)
            os.mkdir(directory)
            stack.callback(os.rmdir, directory)
            try:
                Path(directory, "cgroup.procs").write_text(str(crashing.host_pid), encoding="ascii")
            except OSError as error:
                # cpuset wants its processors named first, a threaded hierarchy wants no processes: others remain.
                assert error.errno in (errno.ENOSPC, errno.EOPNOTSUPP)
        assert name in Path(f"/proc/{crashing.host_pid}/cgroup").read_text(encoding="utf-8")
        crashing.go()
        found = crashing.result()
        assert found.core_dumped
        assert wait_for_records(container)[-1]["pid"] == found.pid
