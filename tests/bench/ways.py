"""The ways to keep a core that are compared: what the kernel is told, who takes it, and where it lands.

All of them write below one folder, each in its own, on the same file system: containers get theirs mounted.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import subprocess
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Self

from tests.bench import peer
from tests.support import mounts, receivers
from tests.support.containers import Container, Host, PlainContainer, SystemdContainer
from tests.support.waiting import read_line

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.support.receivers import Forwarder

LANDING = "/var/lib/core_pipe"
CLONE_NEWNS = 0x00020000
# Every core is kept, however often the same program crashes; limits have a price of their own only when they strike.
KEEP_ALL = {
    "CORE_PIPE_SAME_MAX": "off",
    "CORE_PIPE_LOOP_MAX": "off",
    "CORE_PIPE_STORE_MAX": "off",
    "CORE_PIPE_USER_MAX": "off",
    "CORE_PIPE_KEEP_FREE": "off",
    "CORE_PIPE_KEEP_FREE_INODES": "off",
}
KEEP_ALL_TOML = "".join(f'{name.removeprefix("CORE_PIPE_").lower()} = "off"\n' for name in KEEP_ALL)
PATIENT = {
    "CORE_PIPE_FORWARDER_CONNECT_SECONDS": "60",
    "CORE_PIPE_FORWARDER_BUSY_SECONDS": "90",
    "CORE_PIPE_FORWARDER_STALL_SECONDS": "60",
}

KERNEL, PEER, PEER_PLAIN = "kernel", "systemd-coredump", "systemd-coredump-none"
PIPE, PIPE_PLAIN, PIPE_DISCARD, PIPE_HOST, PIPE_SYSTEMD = (
    "pipe",
    "pipe-none",
    "pipe-discard",
    "pipe-host",
    "pipe-systemd",
)
SOCKET, SOCKET_PLAIN, SOCKET_DISCARD = "socket", "socket-none", "socket-discard"

# In the order of tables.
TITLES = {
    KERNEL: "the kernel's own file",
    PEER: "systemd-coredump, zstd",
    PEER_PLAIN: "systemd-coredump, uncompressed",
    SOCKET: "kernel socket, zstd",
    SOCKET_PLAIN: "kernel socket, uncompressed",
    SOCKET_DISCARD: "kernel socket, read and discarded",
    PIPE: "pipe, zstd",
    PIPE_PLAIN: "pipe, uncompressed",
    PIPE_DISCARD: "pipe, read and discarded",
    PIPE_HOST: "pipe, a process of the host, zstd",
    PIPE_SYSTEMD: "pipe, systemd container (starts for each crash), zstd",
}


@dataclass
class Way:
    """One of them, ready. directory: of the host's, where its cores come. arm: has the kernel take this way.

    suffixes: of a complete core's name. records: whether a visible record, `*.json`, is what completes a crash.
    keeps: whether anything is kept at all. limit: for core_pipe_limit.
    """

    key: str
    container: Container
    directory: Path
    arm: Callable[[], None]
    suffixes: tuple[str, ...] = (".core", ".core.zst")
    records: bool = True
    keeps: bool = True

    @property
    def title(self) -> str:
        return TITLES[self.key]

    def cores(self) -> list[str]:
        """The names of complete cores."""
        return [n for n in os.listdir(self.directory) if not n.startswith(".") and n.endswith(self.suffixes)]

    def complete(self) -> int:
        """How many crashes are over."""
        if not self.records:
            return len(self.cores())
        return sum(n.endswith(".json") and not n.startswith(".") for n in os.listdir(self.directory))

    def stored(self) -> int:
        """Bytes on disk of all cores."""
        return sum(os.stat(self.directory / name).st_blocks * 512 for name in self.cores())

    def empty(self) -> None:
        for name in os.listdir(self.directory):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self.directory / name)


def lend(container: Container, directory: Path, target: str = LANDING) -> None:
    """Mount a folder of the host's in a container. Raises OSError."""
    flags = ctypes.c_uint(mounts._OPEN_TREE_CLONE | mounts._OPEN_TREE_CLOEXEC)
    source = os.fsencode(directory)
    tree = mounts._syscall("open_tree", mounts._SYS_OPEN_TREE, mounts._AT_FDCWD, source, flags)
    namespace = os.open(f"/proc/{container.init_pid}/ns/mnt", os.O_RDONLY | os.O_CLOEXEC)
    try:
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                if mounts._LIBC.setns(namespace, CLONE_NEWNS) == 0:
                    os.makedirs(target, exist_ok=True)
                    to = (mounts._AT_FDCWD, os.fsencode(target), mounts._MOVE_MOUNT_F_EMPTY_PATH)
                    mounts._syscall("move_mount", mounts._SYS_MOVE_MOUNT, tree, b"", *to)
                    status = 0
            finally:
                os._exit(status)
        _, ended = os.waitpid(pid, 0)
    finally:
        os.close(tree)
        os.close(namespace)
    if ended:
        raise OSError(f"{directory} cannot be mounted in the {container.kind} container at {target}")


class Field:
    """Everything that is compared, at the same time on one machine. A context manager.

    missing: why a way is not there. forwarders: ours, by its way in. residents: host pid of each resident receiver.
    """

    def __init__(self, base: Path, *, only: frozenset[str] = frozenset()) -> None:
        self._base = base
        self._only = only
        self._stack = contextlib.ExitStack()
        self.ways: dict[str, Way] = {}
        self.missing: dict[str, str] = {}
        self.forwarders: dict[str, Forwarder] = {}
        self.residents: dict[str, int] = {}

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as stack:
            self._stack = stack
            self._build()
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _build(self) -> None:
        # The pipe is always there; the socket's installation comes on top, and core_pattern says who is asked.
        forwarder = self._stack.enter_context(receivers.forwarder_installed(**PATIENT))
        machine = forwarder.machine
        limit = machine.core_pipe_limit
        self.forwarders[PIPE] = forwarder
        patterns = {PIPE: machine.core_pattern}
        # The forwarders' own clean-up finds what it had set.
        self._stack.callback(lambda: setattr(machine, "core_pattern", patterns[PIPE]))
        ingresses = getattr(receivers, "INGRESSES", (PIPE,))
        if SOCKET in ingresses:
            try:
                self.forwarders[SOCKET] = self._stack.enter_context(receivers.forwarder_installed(SOCKET, **PATIENT))
                patterns[SOCKET] = machine.core_pattern
                self._stack.callback(lambda: setattr(machine, "core_pattern", patterns[SOCKET]))
            except Exception as error:
                self.missing[SOCKET] = f"{type(error).__name__}: {error}"
        else:
            self.missing[SOCKET] = "this kernel has no coredump socket (/proc/sys/kernel/core_modes)"

        def setter(pattern: bytes | str, pipe_limit: int) -> Callable[[], None]:
            def arm() -> None:
                machine.core_pipe_limit = pipe_limit
                machine.core_pattern = pattern

            return arm

        receiver: tuple[tuple[str, dict[str, str]], ...] = (("", {}), ("-none", {"CORE_PIPE_COMPRESSION": "none"}))
        for suffix, settings in receiver:
            container, directory = self._container(f"ours{suffix}")
            found = self._stack.enter_context(receivers.resident(container, env={**KEEP_ALL, **settings}))
            self.residents[f"resident{suffix}"] = found.process.host_pid
            for ingress, pattern in patterns.items():
                self._add(Way(ingress + suffix, container, directory, setter(pattern, limit)))
        container, directory = self._container("discard")
        self._read_only(container)
        for ingress, pattern in patterns.items():
            self._add(Way(f"{ingress}-discard", container, directory, setter(pattern, limit), keeps=False))
        container, directory = self._container("kernel")
        self._add(
            Way(
                KERNEL,
                container,
                directory,
                # core_uses_pid adds the number again, which does no harm.
                setter(f"{LANDING}/file.%p.core", 0),
                suffixes=("",),
                records=False,
            )
        )
        self._add_peer(setter)
        host = self._stack.enter_context(Host())
        directory = self._folder("host")
        self._stack.enter_context(receivers.resident(host, store=str(directory), env=KEEP_ALL))
        self._add(Way(PIPE_HOST, host, directory, setter(patterns[PIPE], limit)))
        if why := SystemdContainer.why_unavailable():
            self.missing[PIPE_SYSTEMD] = why
        elif not self._only or PIPE_SYSTEMD in self._only:
            prepare = receivers.prepare_units(accept=True, settings=KEEP_ALL_TOML)
            booted = self._stack.enter_context(SystemdContainer(prepare=prepare))
            directory = self._folder("systemd")
            lend(booted, directory)
            self._add(Way(PIPE_SYSTEMD, booted, directory, setter(patterns[PIPE], limit)))

    def _add(self, way: Way) -> None:
        if not self._only or way.key in self._only:
            self.ways[way.key] = way

    def _add_peer(self, setter: Callable[[bytes | str, int], Callable[[], None]]) -> None:
        if why := peer.why_unavailable():
            self.missing[PEER] = why
            return
        container, _ = self._container("peer")
        directory = self._folder("peer-store")
        found = self._stack.enter_context(peer.running(str(self._base), str(directory)))
        set_pattern = setter(found.pattern, peer.PIPE_LIMIT)

        def arm(*, compress: bool) -> None:
            found.configure(compress=compress)
            set_pattern()

        for key, compress in ((PEER, True), (PEER_PLAIN, False)):
            ready = partial(arm, compress=compress)
            self._add(Way(key, container, directory, ready, suffixes=("",), records=False))

    def _folder(self, name: str) -> Path:
        directory = self._base / name
        directory.mkdir(mode=0o755)
        return directory

    def _container(self, name: str) -> tuple[PlainContainer, Path]:
        container = self._stack.enter_context(PlainContainer())
        directory = self._folder(name)
        lend(container, directory)
        return container, directory

    def _read_only(self, container: Container) -> None:
        python = os.path.join(receivers.BIN, "python")
        command = [python, "-m", "tests.bench.reader", receivers.SOCKET]
        process = container.popen(command, env={"PYTHONPATH": mounts.CHECKOUT}, stdout=subprocess.PIPE)
        self._stack.callback(process.end)
        assert process.stdout is not None
        if read_line(process.stdout.fileno(), 20, "the reader listens") != b"ready\n":
            raise RuntimeError("the receiver that only reads did not start")
