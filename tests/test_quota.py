"""The container's own quota ends a real core's write: what fits is kept, a debugger opens it, no limit is passed."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import threading
from typing import TYPE_CHECKING, Any, Self

import pytest

from receiver.retention import CORE_SUFFIXES
from tests.support.containers import PlainContainer
from tests.support.crash import compile_crasher, crash, start_crash
from tests.support.fake_forwarder import FakeForwarder
from tests.support.receivers import SOCKET, dump, forwarder_installed, gdb, list_records, resident, wait_for_records

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

pytestmark = pytest.mark.kernel

MIB = 1 << 20
ROOMY = {"CORE_PIPE_STORE_MAX": "off", "CORE_PIPE_KEEP_FREE": "off", "CORE_PIPE_KEEP_FREE_INODES": "off"}
# The threads' stacks and what names the libraries come after it in the core.
LARGE = ("--fill", str(48 * MIB), "random", "--threads", "3")


@pytest.fixture(scope="module", autouse=True)
def forwarder() -> Iterator[None]:
    with forwarder_installed():
        yield


def check_useful(
    container: PlainContainer, record: dict[str, Any], target: Path, store: str, size: int = 48 * MIB
) -> None:
    """A reduced core whose every thread has its backtrace, and whose missing memory is not taken for zeros."""
    assert record["core"]["state"] == "reduced", record["core"]
    assert record["core"]["whole_bytes"] > size > record["core"]["stored_bytes"]
    core = dump(container, record["id"], target, store)
    said = gdb(compile_crasher("crash"), core, "thread apply all bt", f"p known_buffer[{size - 1}]")
    assert said.count("in start_thread (") == 3
    assert "in main (" in said
    assert "Cannot access memory" in said
    core.unlink()


def _loop(kind: str, size: int) -> Callable[[str], None]:
    def prepare(directory: str) -> None:
        image = f"{directory}/image"
        with open(image, "wb") as file:
            file.truncate(size)
        subprocess.run([f"mkfs.{kind}", "-q", image], check=True, timeout=30)
        os.mkdir(f"{directory}/small")
        subprocess.run(["mount", "-o", "loop", image, f"{directory}/small"], check=True)

    return prepare


def _btrfs(directory: str) -> None:
    _loop("btrfs", 256 * MIB)(directory)
    small = f"{directory}/small"
    for command in (["quota", "enable", small], ["subvolume", "create", f"{small}/sub"]):
        subprocess.run(["btrfs", *command], check=True, timeout=60, capture_output=True)
    subprocess.run(["btrfs", "qgroup", "limit", "16M", f"{small}/sub"], check=True, timeout=60, capture_output=True)
    subprocess.run(["mount", "--bind", f"{small}/sub", small], check=True)


DISKS: dict[str, dict[str, Any]] = {
    "tmpfs": {"tmpfs": {"/small": "size=16m"}},
    "ext4": {"prepare": _loop("ext4", 16 * MIB)},
    "btrfs": {"prepare": _btrfs},
}


@pytest.mark.parametrize("compression", ["zstd", "none"])
@pytest.mark.parametrize("disk", list(DISKS))
def test_a_disk_smaller_than_the_core(tmp_path: Path, disk: str, compression: str) -> None:
    if disk == "btrfs" and shutil.which("mkfs.btrfs") is None:
        pytest.skip("needs mkfs.btrfs: apt-get install btrfs-progs")
    store = "/small/store"
    with PlainContainer(**DISKS[disk]) as container:
        with resident(container, store=store, env={**ROOMY, "CORE_PIPE_COMPRESSION": compression}):
            for number in range(2):
                # The second one drives the first one out.
                found = crash(container, "SEGV", *LARGE)
                assert found.core_dumped
                record = wait_for_records(container, number + 1, store=store)[-1]
                check_useful(container, record, tmp_path / "core", store)
        records = list_records(container, store)
        assert [record["core"]["state"] for record in records] == ["none", "reduced"]
        assert "evicted" in records[0]["core"]["reason"]


SHOW_CGROUPS = """
if [ -f /sys/fs/cgroup/cgroup.controllers ]; then exit 0; fi
mount -t tmpfs cgroups /sys/fs/cgroup
mkdir /sys/fs/cgroup/memory
mount -t cgroup -o memory cgroup /sys/fs/cgroup/memory && exit 0
umount /sys/fs/cgroup
mount -t cgroup2 cgroup /sys/fs/cgroup
"""


def test_the_memory_of_the_container_is_the_limit(tmp_path: Path) -> None:
    """The store is on a tmpfs, whose pages are the container's memory: nobody is killed for them."""
    with PlainContainer(cgroup_memory_bytes=64 * MIB) as container, contextlib.ExitStack() as stack:
        # Its own cgroups, as every container engine shows them.
        container.run(["sh", "-c", SHOW_CGROUPS], check=True)
        receiver = stack.enter_context(resident(container, env={**ROOMY, "CORE_PIPE_COMPRESSION": "none"}))
        assert receiver.process.host_pid in container.cgroup.processes()
        container.joins_cgroup = False
        assert crash(container, "SEGV", "--fill", str(96 * MIB), "random", "--threads", "3").core_dumped
        record = wait_for_records(container)[-1]
        check_useful(container, record, tmp_path / "core", "/var/lib/core_pipe", 96 * MIB)
        container.joins_cgroup = True
        assert container.cgroup.out_of_memory_kills() == 0
        assert container.cgroup.memory_peak() <= 64 * MIB


class Watch:
    """Looks again and again how much the cores of a store take on disk, until it is told to stop."""

    def __init__(self, directory: str) -> None:
        self.most = 0
        self.looks = 0
        self._directory = directory
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._look)

    def _look(self) -> None:
        while not self._end.is_set():
            total = 0
            with contextlib.suppress(FileNotFoundError):
                seen: set[int] = set()
                for entry in os.scandir(self._directory):
                    if entry.name.endswith(tuple(CORE_SUFFIXES.values())):
                        with contextlib.suppress(FileNotFoundError):
                            found = entry.stat(follow_symlinks=False)
                            # While it is shown it has two names.
                            total += found.st_blocks * 512 if found.st_ino not in seen else 0
                            seen.add(found.st_ino)
            self.most = max(self.most, total)
            self.looks += 1

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join()


@pytest.mark.parametrize("compression", ["zstd", "none"])
@pytest.mark.parametrize(
    ("size", "limit"),
    [(192, 16), pytest.param(1024, 64, marks=pytest.mark.long)],
    ids=["192M-into-16M", "1G-into-64M"],
)
def test_a_store_is_never_above_its_limit(tmp_path: Path, size: int, limit: int, compression: str) -> None:
    """Sampled while a core is written that is many times larger than the store may be, with others in it before."""
    store = "/var/lib/core_pipe"
    settings = {**ROOMY, "CORE_PIPE_STORE_MAX": f"{limit}M", "CORE_PIPE_COMPRESSION": compression}
    with PlainContainer() as container, resident(container, env=settings):
        for _ in range(3):
            crash(container, "SEGV", "--fill", str(limit * MIB // 5), "random")
        wait_for_records(container, 3)
        with (
            Watch(f"{container.root}{store}") as watch,
            start_crash(container, "SEGV", "--wait", "--threads", "3", "--fill", str(size * MIB), "random") as victim,
        ):
            victim.go()
            assert victim.result(120).core_dumped
            record = wait_for_records(container, 4)[-1]
        assert watch.looks > 100
        assert limit * MIB // 5 < watch.most <= limit * MIB
        assert record["core"]["state"] == "reduced"
        assert record["core"]["stored_bytes"] > limit * MIB * 3 // 4
        core = dump(container, record["id"], tmp_path / "core")
        assert "in main (" in gdb(compile_crasher("crash"), core, "bt")


SHOW_CPU = """
if [ -f /sys/fs/cgroup/cgroup.controllers ]; then exit 0; fi
mount -t tmpfs cgroups /sys/fs/cgroup
mkdir /sys/fs/cgroup/cpu
mount -t cgroup -o cpu cgroup /sys/fs/cgroup/cpu && exit 0
umount /sys/fs/cgroup
mount -t cgroup2 cgroup /sys/fs/cgroup
"""


def test_compression_gives_way_to_a_cpu_quota() -> None:
    """A process does not wait for the compression of its core where the container's quota makes that slow."""
    with PlainContainer() as container:
        container.run(["sh", "-c", SHOW_CPU], check=True)
        with resident(container, env=ROOMY):
            container.joins_cgroup = False
            crash(container, "SEGV", "--fill", str(48 * MIB), "text")
            wait_for_records(container, 1)
            container.cgroup.limit_cpu(10)
            crash(container, "SEGV", "--fill", str(48 * MIB), "text", timeout=120)
            fast, slow = (record["core"] for record in wait_for_records(container, 2))
            container.cgroup.limit_cpu(100)
            container.joins_cgroup = True
        assert container.cgroup.throttled() > 0
        assert (fast["state"], slow["state"]) == ("stored", "stored")
        assert fast["stored_bytes"] < 4 * MIB < 16 * MIB < slow["stored_bytes"]


# The same crash again and again.


def test_the_same_crash_again_and_again() -> None:
    settings = {"CORE_PIPE_SAME_MAX": "3"}
    with PlainContainer() as container, resident(container, env=settings):
        for _ in range(5):
            crash(container, "SEGV")
        # Another bug of the same program.
        crash(container, "ABRT")
        records = wait_for_records(container, 6)
        assert [record["core"]["state"] for record in records] == ["stored"] * 3 + ["none"] * 2 + ["stored"]
        assert len({record["signature"] for record in records[:5]}) == 1
        assert records[5]["signature"] != records[0]["signature"]
        assert [record["seen"] for record in records] == [1, 2, 3, 4, 5, 1]
        assert records[4]["core"]["reason"] == (
            f"the same crash (signature {records[0]['signature']}) left 3 cores within 3600 s (same_max, same_seconds)"
        )


def test_the_same_crash_of_another_user() -> None:
    """One user's crashes do not cost another one his cores."""
    with PlainContainer() as container, resident(container, env={"CORE_PIPE_SAME_MAX": "1", "CORE_PIPE_LOOP_MAX": "3"}):
        for uid in ("1000", "1000", "1000", "1001"):
            crash(container, "SEGV", "--uid", uid)
        records = wait_for_records(container, 4)
        assert [record["core"]["state"] for record in records] == ["stored", "none", "none", "stored"]
        assert len({record["signature"] for record in records}) == 1


def test_a_program_that_crashes_in_a_loop() -> None:
    with PlainContainer() as container, resident(container, env={"CORE_PIPE_LOOP_MAX": "2"}):
        for signal in ("SEGV", "ABRT", "FPE", "ILL"):
            crash(container, signal)
        records = wait_for_records(container, 4)
        assert [record["core"]["state"] for record in records] == ["stored"] * 2 + ["none"] * 2
        assert "it crashes in a loop: 2 cores of this program were taken within 600 s" in records[3]["core"]["reason"]
        # It was told before the core came: the crashed process did not wait for anything.
        assert records[3]["core"]["whole_bytes"] == 0
        # Other programs' crashes are another matter.
        with FakeForwarder(f"{container.root}{SOCKET}") as other:
            assert other.offered(comm=b"other").send_core(b"x" * 1000)["state"] == b"stored"
