"""Containers to crash in: systemd's own, one without systemd, Podman's, and the host with the same interface.

`run` and `popen` start a program the way `docker exec` does: in all of the container's namespaces and its cgroup, its
parent outside. A program with its parent inside is started by what runs inside (`run(["systemd-run", "--wait", ...])`).
"""

from __future__ import annotations

import abc
import contextlib
import json
import os
import secrets
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, ClassVar, Self

from tests.support import crashers, processes
from tests.support.cgroups import Cgroup, directories_of
from tests.support.mounts import CHECKOUT, RootCopy, why_no_shift
from tests.support.waiting import read_line, wait_until

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from types import TracebackType

# What the host's environment says is not the container's.
ENVIRONMENT = {
    "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    "LANG": "C.UTF-8",
    "HOME": "/root",
}
PRIVATE_USERS = (524288, 65536)
PLAIN_USERS = (100000, 65536)


class Inside(subprocess.Popen[bytes]):
    """A program in a container; as a Popen, the process that watches the program from outside.

    It passes SIGTERM, SIGINT, SIGHUP, SIGQUIT, SIGUSR1 and SIGUSR2 on, ends the program when the tests end, and returns
    the program's status, or 128 + its signal. kill() kills the program.
    """

    def __init__(
        self,
        enter: Sequence[str],
        argv: Sequence[str | bytes],
        *,
        env: Mapping[str, str] | None = None,
        stdin: int | IO[Any] | None = subprocess.DEVNULL,
        stdout: int | IO[Any] | None = None,
        stderr: int | IO[Any] | None = None,
        pass_fds: Sequence[int] = (),
        crash_clock: bool = False,
        start_timeout: float = 30,
    ) -> None:
        report, report_end = os.pipe()
        # Held open by this process only: when the tests are killed, its end tells the watcher.
        lifeline_end, self._lifeline = os.pipe()
        self._report = report
        self.host_pid = 0
        """The program's pid as the host sees it."""
        command: list[str | bytes] = [*enter, "--report", str(report_end), "--lifeline", str(lifeline_end)]
        command += ["--crash-clock", "--", *argv] if crash_clock else ["--", *argv]
        try:
            super().__init__(
                command,
                env={**ENVIRONMENT, **(env or {})},
                stdin=stdin,
                stdout=stdout,
                stderr=stderr,
                # A Ctrl-C is for the tests, which then end what they started.
                start_new_session=True,
                pass_fds=(report_end, lifeline_end, *pass_fds),
            )
        finally:
            os.close(report_end)
            os.close(lifeline_end)
        try:
            line = read_line(self._report, start_timeout, f"start of {argv}")
            if not line.endswith(b"\n"):
                raise RuntimeError(
                    f"{argv} did not start in the container: is it alive? status {self.wait(start_timeout)}"
                )
            started = json.loads(line)
        except BaseException:
            self.end()
            raise
        self.host_pid = int(started["host_pid"])
        self._host_started = processes.start_time(self.host_pid)
        self.inside_pid = int(started["pid"])
        """The program's pid as the container sees it."""

    def reaped(self, timeout: float) -> dict[str, int]:
        """Wait for the program's end: `status` as waitpid() gives it, `reaped_ns` and `crash_ns` (or -1), monotonic.

        Raises TimeoutError. To be called once.
        """
        line = read_line(self._report, timeout, f"the end of process {self.host_pid}")
        if not line.endswith(b"\n"):
            raise RuntimeError(f"the watcher of process {self.host_pid} was killed")
        return dict(json.loads(line))

    def kill(self) -> None:
        # Its parent must live to reap it: otherwise the machine's pid 1 does, when it likes, and a systemd that shuts
        # down in the container waits for a zombie that is not its own.
        if self.host_pid:
            processes.kill_exactly(self.host_pid, self._host_started)
        else:
            super().kill()

    def end(self) -> None:
        """Kill it if it still runs, and close everything."""
        if self.poll() is None:
            self.kill()
            try:
                self.wait(10)
            except subprocess.TimeoutExpired:
                super().kill()
        for stream in (self.stdin, self.stdout, self.stderr):
            if stream is not None:
                with contextlib.suppress(OSError):
                    stream.close()
        self.wait(30)
        for fd in (self._report, self._lifeline):
            if fd >= 0:
                os.close(fd)
        self._report = self._lifeline = -1


class Container(abc.ABC):
    """A place where processes run and crash. Between start() and stop(), `init_pid` and `root` say where that is."""

    kind: ClassVar[str]

    def __init__(self) -> None:
        self._stack = contextlib.ExitStack()
        self._inside: list[Inside] = []
        self.init_pid = 0
        """Host pid of the container's pid 1."""
        self.joins_cgroup = True
        """Whether what is started in it joins its cgroup, too, and not its namespaces only."""

    @classmethod
    @abc.abstractmethod
    def why_unavailable(cls) -> str | None:
        """Why this machine cannot have one, with the command that mends it; None when it can."""

    @abc.abstractmethod
    def _start(self) -> None:
        """Bring it up, and put on the stack what undoes each step."""

    @property
    def root(self) -> Path:
        """The container's root directory, seen from the host."""
        return Path(f"/proc/{self.init_pid}/root")

    def start(self) -> Self:
        try:
            self._start()
        except BaseException:
            self.stop()
            raise
        return self

    def stop(self) -> None:
        """End everything in it and undo everything that start() did. May be called again."""
        inside, self._inside = self._inside, []
        with self._stack:
            for process in inside:
                # Also when one of them does not end.
                self._stack.callback(process.end)
        self.init_pid = 0

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None, /
    ) -> None:
        self.stop()

    def popen(self, argv: Sequence[str | bytes], **options: Any) -> Inside:
        """Start a program in the container: environment, working directory, limits as `docker exec` would give.

        Options: env (added to a minimal one), stdin (default: /dev/null), stdout, stderr, pass_fds, crash_clock (for
        crash.c). It ends with the container, or by Inside.end().
        """
        process = Inside(self._enter(), argv, **options)
        self._inside.append(process)
        return process

    def run(
        self,
        argv: Sequence[str | bytes],
        *,
        input: str | bytes | None = None,  # noqa: A002 -- subprocess.run's name
        env: Mapping[str, str] | None = None,
        timeout: float = 60,
        check: bool = False,
    ) -> subprocess.CompletedProcess[str]:
        """Run a program in the container and return its output (undecodable bytes as surrogates) and status.

        A status of 128 + N means that it died of signal N. Raises TimeoutExpired, with check CalledProcessError.
        """
        data = os.fsencode(input) if input is not None else None
        stdin = subprocess.DEVNULL if input is None else subprocess.PIPE
        process = self.popen(argv, env=env, stdin=stdin, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        try:
            out, err = process.communicate(data, timeout)
        finally:
            process.end()
            self._inside.remove(process)
        done = subprocess.CompletedProcess(argv, process.returncode, _text(out), _text(err))
        if check and done.returncode != 0:
            command = " ".join(os.fsdecode(part) for part in argv)
            raise RuntimeError(
                f"in the {self.kind} container: {command}: {done.returncode}\n{done.stdout}{done.stderr}"
            )
        return done

    def _enter(self) -> list[str]:
        if not self.init_pid:
            raise RuntimeError(f"the {self.kind} container is not started")
        directories = directories_of(self.init_pid) if self.joins_cgroup else []
        cgroups = [part for directory in directories for part in ("--cgroup", directory)]
        return [crashers.compile_crasher("enter"), "--target", str(self.init_pid), *cgroups]


class Host(Container):
    """The machine itself."""

    kind = "host"

    @classmethod
    def why_unavailable(cls) -> str | None:
        return _why_not("")

    def _start(self) -> None:
        self.init_pid = 1

    @property
    def root(self) -> Path:
        return Path("/")

    def _enter(self) -> list[str]:
        return [crashers.compile_crasher("enter")]


class _Isolated(Container):
    """What the real containers have in common: a copy of this machine's root, and a cgroup of their own."""

    def __init__(
        self,
        *,
        prepare: Callable[[str], object] | None = None,
        users: tuple[int, int] | None = None,
        root_bytes: int = 4 << 30,
        cgroup_memory_bytes: int | None = None,
    ) -> None:
        super().__init__()
        self._prepare = prepare
        self._users = users
        self._root_bytes = root_bytes
        self._cgroup_memory_bytes = cgroup_memory_bytes
        self.cgroup: Cgroup
        self.name = f"core-pipe-test-{secrets.token_hex(4)}"

    def _make_root_and_cgroup(self) -> RootCopy:
        crashers.compile_crasher("enter")
        crashers.compile_crasher("crash")
        first, count = self._users or (0, 65536)
        copy = RootCopy(size=self._root_bytes, shift=first, count=count)
        self._stack.callback(copy.remove)
        self.cgroup = Cgroup(copy.name, self._cgroup_memory_bytes)
        self._stack.callback(self.cgroup.remove)
        # Whatever happened before: nothing but this container's processes can be in there.
        self._stack.callback(self.cgroup.kill)
        return copy

    def _prepare_root(self, directory: str) -> None:
        if self._prepare is not None:
            self._prepare(directory)
        if self._users is not None:
            # What `prepare` made belongs to the host's root, who is nobody inside.
            _give_to(os.path.join(os.path.dirname(directory), "upper"), self._users[0])

    def _started(self, copy: RootCopy, init_pid: int) -> None:
        self.init_pid = init_pid
        copy.remember_init(init_pid)

    def _log(self, copy: RootCopy) -> Path:
        return Path(copy.base, "fs", "log")


class SystemdContainer(_Isolated):
    """systemd-nspawn with systemd as pid 1, booted.

    `prepare` gets the root directory before the boot (to install units and configuration). `private_users` gives it a
    user namespace: its root is uid 524288 outside.
    """

    kind = "systemd"

    # Slow, noisy, or about hardware; none of them is what a container is for.
    _MASKED = (
        "console-getty.service",
        "getty.target",
        "systemd-networkd.service",
        "systemd-networkd.socket",
        "systemd-resolved.service",
        "systemd-udevd.service",
        "systemd-udev-trigger.service",
        "systemd-update-utmp.service",
        "systemd-update-utmp-runlevel.service",
        "systemd-pstore.service",
        "systemd-machine-id-commit.service",
        "systemd-firstboot.service",
        "systemd-logind.service",
        "systemd-sysctl.service",
        "systemd-coredump.socket",
        "dev-hugepages.mount",
    )

    def __init__(
        self,
        *,
        prepare: Callable[[str], object] | None = None,
        private_users: bool = False,
        root_bytes: int = 4 << 30,
        cgroup_memory_bytes: int | None = None,
        target: str = "multi-user.target",
        options: Sequence[str] = (),
    ) -> None:
        users = PRIVATE_USERS if private_users else None
        super().__init__(prepare=prepare, users=users, root_bytes=root_bytes, cgroup_memory_bytes=cgroup_memory_bytes)
        self._target = target
        self._options = list(options)
        self.boot_seconds = 0.0

    @classmethod
    def why_unavailable(cls) -> str | None:
        return _why_not("systemd-nspawn", "systemd-container")

    @classmethod
    def why_no_private_users(cls) -> str | None:
        return cls.why_unavailable() or why_no_shift()

    def _start(self) -> None:
        copy = self._make_root_and_cgroup()
        prepare_systemd_root(copy.directory, self._MASKED)
        _replace(os.path.join(copy.directory, "etc/hostname"), self.name + "\n")
        self._prepare_root(copy.directory)
        command = ["systemd-nspawn", "--quiet", "-D", copy.directory, f"--machine={self.name}", "--register=no"]
        command += ["--keep-unit", "--link-journal=no", "--private-network", "--console=pipe", "--settings=no"]
        command += [f"--bind-ro={CHECKOUT}", f"--bind-ro={crashers.TOOLS}"]
        if self._users is not None:
            first, count = self._users
            command += [f"--private-users={first}:{count}", "--private-users-ownership=off"]
        command += [*self._options, "-b", f"systemd.unit={self._target}"]

        begun = time.monotonic()
        enter = [crashers.compile_crasher("enter"), *_cgroup_options(self.cgroup)]
        # nspawn wants SIGTERM to end its container; killed, it leaves it running.
        enter += ["--orphaned", str(int(signal.SIGTERM))]
        with open(self._log(copy), "wb") as log:
            nspawn = Inside(enter, command, stdout=log, stderr=log)
        self._stack.callback(self._shut_down, nspawn)
        try:
            self._started(copy, wait_until(lambda: self._init_of(nspawn), 30, "systemd-nspawn's child"))
            wait_until_booted(self)
        except (TimeoutError, RuntimeError) as error:
            raise RuntimeError(f"{error}\n{' '.join(command)}\n{_tail(self._log(copy))}") from error
        self.boot_seconds = time.monotonic() - begun

    @staticmethod
    def _init_of(nspawn: Inside) -> int:
        """The container's pid 1, once it is systemd in a pid namespace of its own; 0 before."""
        if nspawn.poll() is not None:
            raise RuntimeError(f"systemd-nspawn ended with {nspawn.returncode}")
        for child in processes.children(nspawn.host_pid):
            below = [child, *processes.children(child)]
            for pid in below:
                if processes.namespace(pid, "pid") != processes.namespace("self", "pid") and _comm(pid) == "systemd":
                    return pid
        return 0

    def _shut_down(self, nspawn: Inside) -> None:
        init, started = self.init_pid, processes.start_time(self.init_pid)
        nspawn.terminate()
        try:
            nspawn.wait(15)
        except subprocess.TimeoutExpired:
            if init:
                processes.kill_exactly(init, started)
            with contextlib.suppress(subprocess.TimeoutExpired):
                nspawn.wait(5)
        nspawn.end()
        # On a host whose /run is no tmpfs, nspawn is afraid to remove it.
        with contextlib.suppress(OSError):
            os.rmdir(f"/run/systemd/nspawn/propagate/{self.name}")


class PlainContainer(_Isolated):
    """A container without systemd: its own root, tmpfs on /run, /tmp and /var/lib, and a pid 1 that only reaps.

    `prepare` gets the root directory before; what it puts where a tmpfs comes is hidden. `user_namespace`: root is uid
    100000 outside. `tmpfs`: more mounts, or other options for these (`size=64m`).
    `init`: a program as pid 1 instead of the reaper. `own_uts`: the host name in a uts namespace of its own, or None
    for the host's.
    """

    kind = "plain"

    def __init__(
        self,
        *,
        prepare: Callable[[str], object] | None = None,
        user_namespace: bool = False,
        root_bytes: int = 4 << 30,
        cgroup_memory_bytes: int | None = None,
        own_uts: str | None = "plain",
        tmpfs: Mapping[str, str] | None = None,
        init: Sequence[str] = (),
    ) -> None:
        users = PLAIN_USERS if user_namespace else None
        super().__init__(prepare=prepare, users=users, root_bytes=root_bytes, cgroup_memory_bytes=cgroup_memory_bytes)
        self._own_uts = own_uts
        self._tmpfs = {"/run": "mode=755", "/tmp": "mode=1777", "/var/lib": "mode=755", **(tmpfs or {})}
        self._init = list(init)

    @classmethod
    def why_unavailable(cls) -> str | None:
        return _why_not("")

    @classmethod
    def why_no_user_namespace(cls) -> str | None:
        return cls.why_unavailable() or why_no_shift()

    def _start(self) -> None:
        contain = crashers.compile_crasher("contain")
        copy = self._make_root_and_cgroup()
        self._prepare_root(copy.directory)
        ready, ready_end = os.pipe()
        self._stack.callback(os.close, ready)
        lifeline_end, lifeline = os.pipe()
        self._stack.callback(os.close, lifeline)
        command = [contain, "--root", copy.directory, *_cgroup_options(self.cgroup)]
        command += ["--ready", str(ready_end), "--lifeline", str(lifeline_end)]
        command += ["--share-uts"] if self._own_uts is None else ["--hostname", self._own_uts]
        if self._users is not None:
            command += ["--user", "{}:{}".format(*self._users)]
        for path, options in self._tmpfs.items():
            command += ["--tmpfs", f"{path}={options}"]
        for path in (CHECKOUT, crashers.TOOLS):
            command += ["--bind", path]
        if self._init:
            command += ["--", *self._init]
        try:
            with open(self._log(copy), "wb") as log:
                process = subprocess.Popen(
                    command,
                    env=ENVIRONMENT,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    start_new_session=True,
                    pass_fds=(ready_end, lifeline_end),
                )
        finally:
            os.close(ready_end)
            os.close(lifeline_end)
        self._stack.callback(self._end, process)
        line = read_line(ready, 30, "the plain container's init")
        if not line.endswith(b"\n"):
            raise RuntimeError(f"{' '.join(command)}\n{_tail(self._log(copy))}")
        self._started(copy, int(json.loads(line)["init"]))

    @staticmethod
    def _end(process: subprocess.Popen[bytes]) -> None:
        process.terminate()  # which is a SIGKILL to its pid 1
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(10)


class PodmanContainer(_Isolated):
    """Podman with runc and systemd inside, with a Podman state of its own.

    crun refuses hybrid cgroups, and no registry is needed: the root is a copy of this machine's.
    """

    kind = "podman"

    def __init__(
        self,
        *,
        prepare: Callable[[str], object] | None = None,
        root_bytes: int = 4 << 30,
        cgroup_memory_bytes: int | None = None,
        target: str = "multi-user.target",
        options: Sequence[str] = (),
    ) -> None:
        super().__init__(prepare=prepare, root_bytes=root_bytes, cgroup_memory_bytes=cgroup_memory_bytes)
        self._target = target
        self._options = list(options)
        self._podman: list[str] = []
        self.boot_seconds = 0.0

    @classmethod
    def why_unavailable(cls) -> str | None:
        return _why_not("podman", "podman runc") or _why_not("runc", "runc")

    def _start(self) -> None:
        copy = self._make_root_and_cgroup()
        prepare_systemd_root(copy.directory, SystemdContainer._MASKED)
        self._prepare_root(copy.directory)
        state = os.path.join(copy.base, "fs")
        # Podman wants a runroot of at most 50 characters.
        self._podman = ["podman", "--root", f"{state}/podman", "--runroot", f"{state}/r", "--tmpdir", f"{state}/tmp"]
        self._podman += ["--storage-driver=vfs", "--cgroup-manager=cgroupfs", "--events-backend=none"]
        self._podman += ["--runtime", "runc", "--runtime-flag", f"root={state}/runc"]
        begun = time.monotonic()
        self._stack.callback(self._remove)
        run = [
            "run",
            "--detach",
            "--name",
            self.name,
            "--hostname",
            self.name,
            "--systemd=always",
            f"--cgroup-parent=/{self.cgroup.name}",
        ]
        run += ["--ulimit", "nofile=1024:1024", "--ulimit", "nproc=4096:4096", "--ulimit", "core=-1:-1"]
        run += ["--net=none", "--log-driver=k8s-file"]
        run += ["--volume", f"{CHECKOUT}:{CHECKOUT}:ro", "--volume", f"{crashers.TOOLS}:{crashers.TOOLS}:ro"]
        run += [*self._options, "--rootfs", copy.directory, "/sbin/init", f"systemd.unit={self._target}"]
        self._call(run)
        self._started(copy, int(self._call(["inspect", "--format", "{{.State.Pid}}", self.name])))
        wait_until_booted(self)
        self.boot_seconds = time.monotonic() - begun

    def _call(self, arguments: Sequence[str], timeout: float = 60) -> str:
        done = subprocess.run([*self._podman, *arguments], capture_output=True, text=True, check=False, timeout=timeout)
        if done.returncode != 0:
            raise RuntimeError(f"{' '.join([*self._podman, *arguments])}\n{done.stdout}{done.stderr}")
        return done.stdout

    def _remove(self) -> None:
        init, started = self.init_pid, processes.start_time(self.init_pid)
        try:
            self._call(["rm", "--force", "--time", "10", "--ignore", self.name])
        finally:
            if init:
                processes.kill_exactly(init, started)


class Sandbox(Container):
    """What somebody makes in another place with unshare(1): his sandbox, a container in a container, part of a pod.

    options: unshare's, in full; without `--fork` its first process stays in the outer pid namespace. uid: who makes it.
    script: what sh does there before anything else. last: what its first process does then, with `stdin` to read from.
    """

    kind = "sandbox"

    def __init__(
        self, outer: Container, *options: str, uid: int = 0, script: str = ":", last: str = "exec sleep infinity"
    ) -> None:
        super().__init__()
        self._outer = outer
        self._options = options
        self._uid = uid
        self._script = f"{script}\necho ready\n{last}"
        self.stdin: IO[bytes]

    @classmethod
    def why_unavailable(cls) -> str | None:
        return _why_not("")

    def _start(self) -> None:
        ids = [f"--reuid={self._uid}", f"--regid={self._uid}", "--clear-groups"]
        command = [*(["setpriv", *ids] if self._uid else [])]
        forks = "--fork" in self._options
        if forks:
            # unshare(1) ends by the same signal as its child, which is a second crash; a limit of 1 makes it none.
            command += ["prlimit", "--core=1:"]
        command += ["unshare", *self._options, *(["--kill-child"] if forks else []), "--", "sh", "-ec", self._script]
        maker = self._outer.popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self._stack.callback(maker.end)
        assert maker.stdin is not None
        assert maker.stdout is not None
        self.stdin = maker.stdin
        if read_line(maker.stdout.fileno(), 30, "the sandbox") != b"ready\n":
            raise RuntimeError(f"{' '.join(command)}: ended with {maker.wait(30)}")
        self.init_pid = processes.children(maker.host_pid)[0] if forks else maker.host_pid


def prepare_systemd_root(directory: str, masked: Sequence[str]) -> None:
    """Make a copy of this machine's root boot as a container: its own identity, a volatile journal, no hardware."""
    system = os.path.join(directory, "etc/systemd/system")
    for unit in masked:
        os.symlink("/dev/null", os.path.join(system, unit))
    # Not the host's machine id: with the same one, nspawn and journald think that they are the host's.
    _replace(os.path.join(directory, "etc/machine-id"), secrets.token_hex(16) + "\n")
    _replace(os.path.join(directory, "etc/fstab"), "")
    journald = os.path.join(directory, "etc/systemd/journald.conf.d")
    os.makedirs(journald, exist_ok=True)
    _replace(os.path.join(journald, "tests.conf"), "[Journal]\nStorage=volatile\nRuntimeMaxUse=64M\nAudit=no\n")


def wait_until_booted(container: Container, timeout: float = 60) -> None:
    """Until systemd in the container has finished its boot. Raises TimeoutError, or RuntimeError with what failed."""

    def state() -> str | None:
        said = container.run(["systemctl", "is-system-running"], timeout=timeout).stdout.strip()
        return said if said in ("running", "degraded", "maintenance", "stopping") else None

    # `--wait` alone fails while systemd's socket is not there yet.
    if (result := wait_until(state, timeout, f"the {container.kind} container booted")) != "running":
        failed = container.run(["systemctl", "--failed", "--no-legend", "--plain"]).stdout
        raise RuntimeError(f"the {container.kind} container is {result}:\n{failed}")


def _why_not(program: str, package: str = "") -> str | None:
    if os.geteuid() != 0:
        return "needs root: sudo .venv/bin/python -m pytest"
    if program and not shutil.which(program):
        return f"needs {program}: apt-get install {package}"
    if reason := crashers.why_unavailable():
        return reason
    if subprocess.run(["unshare", "--mount", "true"], capture_output=True, check=False).returncode != 0:
        return "may not mount (in a container?): run on a host or in a virtual machine"
    return None


def _cgroup_options(cgroup: Cgroup) -> list[str]:
    return [part for directory in cgroup.directories for part in ("--cgroup", directory)]


def _comm(pid: int) -> str:
    try:
        with open(f"/proc/{pid}/comm", encoding="utf-8", errors="replace") as file:
            return file.read().strip()
    except (FileNotFoundError, ProcessLookupError):
        return ""


def _give_to(directory: str, uid: int) -> None:
    for below, directories, files in os.walk(directory):
        for name in [".", *directories, *files]:
            path = os.path.join(below, name)
            if (status := os.lstat(path)).st_uid < 65536:
                os.chown(path, status.st_uid + uid, status.st_gid + uid, follow_symlinks=False)


def _replace(path: str, text: str) -> None:
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)
    with open(path, "w", encoding="utf-8") as file:
        file.write(text)


def _tail(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace")[-4000:]


def _text(data: bytes) -> str:
    return data.decode("utf-8", "surrogateescape")
