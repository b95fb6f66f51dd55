"""Installing on the real kernel: its sysctls are the machine's, every file is below a prefix of the test's own."""

from __future__ import annotations

import contextlib
import errno
import json
import marshal
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from dataclasses import replace
from importlib.util import MAGIC_NUMBER
from typing import TYPE_CHECKING, Any

import pytest

from forwarder import __version__, cli, ingress, install, ledger_unit, staging
from forwarder.install import LIMIT, PATTERN, SUID, Paths, Place, core_pattern, read_sysctl, write_sysctl
from forwarder.ledger.book import BOOK, Book
from forwarder.staging import InstallError
from forwarder.status import status
from tests.support.machine import exclusive, why_unavailable
from tests.support.waiting import wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator

# Something that no default is, to be given back exactly.
BEFORE = {PATTERN: "core.%p of %e", LIMIT: "7", SUID: "0"}

needs_root = pytest.mark.skipif(
    os.geteuid() != 0, reason="needs root, whose files are checked: sudo .venv/bin/python -m pytest"
)
needs_machine = pytest.mark.skipif(why_unavailable() is not None, reason=why_unavailable() or "")

# Writes what it was started with to the file that the settings name.
STUB = """\
import os, sys

def main(settings):
    size = 0
    while part := os.read(0, 1 << 20):
        size += len(part)
    with open(settings["store"] + b".new", "w") as file:
        file.write(repr({
            "arguments": sys.argv[1:], "size": size, "path": sys.path, "file": __file__,
            # What the import system says of a module that it found itself.
            "cached": globals().get("__cached__"),
            "flags": (sys.flags.isolated, sys.flags.dont_write_bytecode, sys.flags.no_site),
            "loaded": sorted(sys.modules), "settings": settings, "pidfd": os.path.exists("/proc/self/fd/3"),
        }))
    os.rename(settings["store"] + b".new", settings["store"])
    return 0
"""


@pytest.fixture
def prefix() -> Iterator[str]:
    # core_pattern has room for 13 bytes beside our own paths. This is /tmp/ and 8 more: the longest line there is.
    path = tempfile.mkdtemp(prefix="", dir="/tmp")
    yield path
    shutil.rmtree(path)


@pytest.fixture
def paths(prefix: str, monkeypatch: pytest.MonkeyPatch) -> Paths:
    for name in list(os.environ):
        if name.startswith("CORE_PIPE_"):
            monkeypatch.delenv(name)
    packages = {name: f"{prefix}/src/{name}" for name in ("forwarder", "receiver")}
    for directory in packages.values():
        os.makedirs(directory)
        write(f"{directory}/__init__.py", "")
    write(f"{prefix}/src/forwarder/stub.py", STUB)
    write(f"{prefix}/etc/core_pipe/receiver.toml", f'store = "{prefix}/crash"\nother = 1\n')
    return Paths(prefix, packages)


@pytest.fixture
def machine(paths: Paths) -> Iterator[Paths]:
    """The machine's sysctls to ourselves, with values to be found again; `exclusive` puts back the real ones."""
    with exclusive():
        for name in install.SYSCTLS:
            write_sysctl(name, BEFORE[name])
        yield paths


def write(path: str, text: str) -> None:
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, "w", encoding="utf-8") as file:
        file.write(text)


def read(path: str) -> str:
    with open(path, encoding="utf-8") as file:
        return file.read()


def sysctls() -> dict[str, str]:
    return {name: read_sysctl(name) for name in install.SYSCTLS}


def files(prefix: str) -> set[str]:
    """Every file below the prefix but the lock, which stays."""
    found = {os.path.join(at, name) for at, _, names in os.walk(prefix) for name in names}
    return found - {f"{prefix}/run/core_pipe_forwarder.lock"}


def of_kind(paths: Paths, kind: str) -> Place:
    return {"persistent": paths.persistent, "runtime": paths.runtime}[kind]


def mentions(paths: Paths, *words: str) -> bool:
    """Whether a problem has these words in it, and tells what to do about it."""
    problems = status(paths).problems
    return any(all(word in problem.what for word in words) and problem.mend for problem in problems)


def crash() -> None:
    assert subprocess.run(["sh", "-c", "kill -SEGV $$"], check=False).returncode == -signal.SIGSEGV


both_kinds = pytest.mark.parametrize("kind", ["persistent", "runtime"])


@needs_machine
@pytest.mark.kernel
class TestInstall:
    @both_kinds
    def test_everything_comes_back_exactly(self, machine: Paths, kind: str) -> None:
        before = files(machine.prefix)
        install.install(machine, runtime=kind == "runtime")

        place = of_kind(machine, kind)
        assert sysctls() == {
            PATTERN: f"|{staging.interpreter()} -IBS {place.launcher} {install.ARGUMENTS}",
            LIMIT: "1024",
            SUID: "2",
        }
        assert json.loads(read(place.state)) == BEFORE
        assert os.path.exists(machine.persistent.sysctl_file or "") == (kind == "persistent")

        assert install.uninstall(machine)
        assert sysctls() == BEFORE
        assert files(machine.prefix) == before
        assert not os.path.exists(place.code)

    @both_kinds
    def test_a_second_time_changes_nothing(self, machine: Paths, kind: str) -> None:
        install.install(machine, runtime=kind == "runtime")
        after_first = sysctls()
        install.install(machine, runtime=kind == "runtime")

        assert sysctls() == after_first
        place = of_kind(machine, kind)
        assert json.loads(read(place.state)) == BEFORE
        assert len([name for name in os.listdir(place.code) if name.startswith(staging.LIBRARY)]) == 1

        assert install.uninstall(machine)
        assert install.uninstall(machine) == []
        assert sysctls() == BEFORE

    @pytest.mark.parametrize("order", [("runtime", "persistent"), ("persistent", "runtime")])
    def test_both_kinds_remember_the_first_values(self, machine: Paths, order: tuple[str, str]) -> None:
        before = files(machine.prefix)
        for kind in order:
            install.install(machine, runtime=kind == "runtime")
        assert status(machine).installed == order[1]
        for place in machine.places:
            assert json.loads(read(place.state)) == BEFORE

        install.uninstall(machine)
        assert sysctls() == BEFORE
        assert files(machine.prefix) == before

    @pytest.mark.parametrize("name", [LIMIT, PATTERN, SUID])
    def test_a_failure_is_taken_back(self, machine: Paths, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
        def fail(which: str, value: str) -> None:
            if which == name and value != BEFORE[name]:
                raise OSError(errno.EROFS, "Read-only file system", f"/proc/sys/{name}")
            write_sysctl(which, value)

        before = files(machine.prefix)
        monkeypatch.setattr(install, "write_sysctl", fail)
        with pytest.raises(OSError, match="Read-only"):
            install.install(machine)
        assert sysctls() == BEFORE
        assert files(machine.prefix) == before

    def test_a_failed_upgrade_leaves_the_old_version(self, machine: Paths, monkeypatch: pytest.MonkeyPatch) -> None:
        install.install(machine)
        before, values = files(machine.prefix), sysctls()
        write(f"{machine.prefix}/src/forwarder/stub.py", STUB + "# newer\n")

        def fail(_: str, __: str) -> None:
            raise InstallError("no", "yes")

        monkeypatch.setattr(install, "write_sysctl", fail)
        # Taking back fails as well here; the files come back all the same.
        with pytest.raises(InstallError):
            install.install(machine)
        assert files(machine.prefix) == before
        assert sysctls() == values
        # Raises if it is not whole.
        staging.read_staged(machine.persistent.code)

    def test_killed_half_way_it_can_still_be_undone(self, machine: Paths, monkeypatch: pytest.MonkeyPatch) -> None:
        before = files(machine.prefix)
        child = os.fork()
        if child == 0:

            def die(name: str, value: str) -> None:
                if name == PATTERN:
                    os.kill(os.getpid(), signal.SIGKILL)
                write_sysctl(name, value)

            monkeypatch.setattr(install, "write_sysctl", die)
            with contextlib.suppress(BaseException):
                install.install(machine)
            os._exit(0)
        assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
        assert sysctls() == {**BEFORE, LIMIT: "1024"}
        assert not status(machine).active

        install.uninstall(machine)
        assert sysctls() == BEFORE
        assert files(machine.prefix) == before

    def test_modes_do_not_depend_on_the_umask(self, machine: Paths) -> None:
        umask = os.umask(0o077)
        try:
            install.install(machine)
        finally:
            os.umask(umask)
        for at, directories, names in os.walk(f"{machine.prefix}/usr"):
            for name in directories:
                assert os.stat(f"{at}/{name}").st_mode & 0o7777 == 0o755
            for name in names:
                assert os.stat(f"{at}/{name}").st_mode & 0o7777 == 0o644

    def test_code_goes_only_where_root_alone_writes(self, machine: Paths) -> None:
        os.makedirs(f"{machine.prefix}/usr")
        os.chmod(f"{machine.prefix}/usr", 0o777)
        with pytest.raises(InstallError, match=f"{machine.prefix}/usr can be written by others"):
            install.install(machine)
        assert sysctls() == BEFORE

    def test_a_package_that_does_not_compile_is_not_installed(self, machine: Paths) -> None:
        write(f"{machine.prefix}/src/forwarder/stub.py", "def main(:")
        before = files(machine.prefix)
        with pytest.raises(InstallError, match=r"forwarder/stub.py .* does not compile"):
            install.install(machine)
        assert files(machine.prefix) == before

    @pytest.mark.parametrize("tool", [("sysctl", "-q", "-p"), ("/lib/systemd/systemd-sysctl",)])
    def test_the_boot_sets_the_same_values(self, machine: Paths, tool: tuple[str, ...]) -> None:
        if not shutil.which(tool[0]):
            pytest.skip(f"needs {tool[0]}: apt install procps systemd")
        install.install(machine)
        ours = sysctls()
        for name in reversed(install.SYSCTLS):
            write_sysctl(name, BEFORE[name])
        subprocess.run([*tool, str(machine.persistent.sysctl_file)], check=True)
        assert sysctls() == ours


@needs_machine
@pytest.mark.kernel
class TestCrash:
    def test_the_kernel_starts_the_launcher(self, machine: Paths) -> None:
        install.install(machine)
        crash()
        # The kernel waits for the helper (core_pipe_limit), so the answer is there when the process has been reaped.
        seen: dict[str, Any] = eval(read(f"{machine.prefix}/crash"))

        arguments = dict(argument.split("=", 1) for argument in seen["arguments"])
        assert set(arguments) == set("vPIpistcdugF")
        assert arguments["v"] == "1"
        assert arguments["s"] == str(int(signal.SIGSEGV))
        assert arguments["F"] == ("3" if seen["pidfd"] else "")
        assert seen["pidfd"] or not status(machine).features.get("pidfd")
        assert seen["size"] > 4096

        library = staging.read_staged(machine.persistent.code).library
        assert seen["path"][-1] == library
        assert not any(path.startswith(machine.prefix) for path in seen["path"][:-1])
        assert seen["flags"] == (1, 1, 1)
        assert seen["file"] == f"{library}/forwarder/stub.py"
        assert seen["cached"] is None, "it was not read from road.bin"
        assert not {"site", "json", "argparse"} & set(seen["loaded"])
        assert seen["settings"] == install.stub_settings(machine)

    @pytest.mark.parametrize("damage", ["another magic", "missing", "empty", "cut", "no code", "fails half-way"])
    def test_a_road_that_does_not_fit_costs_no_core(self, machine: Paths, damage: str) -> None:
        """An upgrade of the interpreter comes without asking us; its byte code is another one."""
        install.install(machine)
        road = os.path.join(staging.read_staged(machine.persistent.code).library, staging.ROAD)
        with open(road, "rb") as file:
            whole = file.read()
        magic, code = whole[: len(MAGIC_NUMBER)], whole[len(MAGIC_NUMBER) :]
        begin, modules = marshal.loads(code)
        assert [name for name, _, _ in modules] == ["forwarder", "forwarder.stub"]
        broken = compile("gone", "stub.py", "exec")
        contents = {
            # And what is behind it may be anything to this interpreter.
            "another magic": b"\x01\x02\r\n" + marshal.dumps((compile("while True: pass", "", "exec"), [])),
            "empty": b"",
            "cut": whole[: len(whole) // 2],
            "no code": magic + marshal.dumps(1),
            "fails half-way": magic
            + marshal.dumps((begin, [modules[0], ("forwarder.stub", "forwarder/stub.py", broken)])),
        }
        os.unlink(road)
        if damage in contents:
            with open(road, "wb") as file:
                file.write(contents[damage])
        crash()
        seen: dict[str, Any] = eval(read(f"{machine.prefix}/crash"))
        assert seen["size"] > 4096
        assert os.path.exists(seen["cached"])

    def test_a_stub_that_cannot_start_is_heard_of(self, machine: Paths) -> None:
        write(f"{machine.prefix}/src/forwarder/stub.py", "raise RuntimeError('gone\\nmad')")
        install.install(machine)
        kmsg = os.open("/dev/kmsg", os.O_RDONLY | os.O_NONBLOCK)
        try:
            os.lseek(kmsg, 0, os.SEEK_END)
            crash()
            log = []
            with contextlib.suppress(BlockingIOError):
                while True:
                    log.append(os.read(kmsg, 8192).decode())
        finally:
            os.close(kmsg)
        assert any("core_pipe: the stub failed" in line and "gone" in line and "P=" in line for line in log), log

    def test_staged_code_of_this_package_needs_no_site_packages(self, machine: Paths) -> None:
        install.install(replace(machine, packages=staging.packages_in_use()))
        staged = staging.read_staged(machine.persistent.code)
        # What the launcher imports, and what the stub does only for a crash that nobody took.
        modules = "forwarder.stub, forwarder.unhandled, receiver.record, receiver.store"
        program = f"import sys; sys.path.append({staged.library!r}); import {modules}"
        done = subprocess.run([staged.python, "-IBS", "-c", program], check=False, capture_output=True, cwd="/")
        assert done.stderr == b""

    def test_a_running_stub_keeps_its_version(self, machine: Paths) -> None:
        write(f"{machine.prefix}/src/forwarder/stub.py", "import time\ndef main(_):\n    time.sleep(600)\n")
        install.install(machine)
        first = staging.read_staged(machine.persistent.code).library
        command = [staging.interpreter(), "-IBS", machine.persistent.launcher]
        with subprocess.Popen(command) as stub:
            try:
                wait_until(lambda: staging.running_stubs(machine.persistent.code) == {stub.pid}, 20, "the stub runs")
                assert any("kept" in line for line in install.install(machine))
                assert os.path.isdir(first)
                assert not staging.wait_for_stubs(machine.persistent.code, 0.2)
            finally:
                stub.kill()
        assert staging.wait_for_stubs(machine.persistent.code, 20)
        install.install(machine)
        assert not os.path.isdir(first)

    def test_uninstall_does_not_wait_for_ever(self, machine: Paths, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(install, "STUB_SECONDS", 0.2)
        write(f"{machine.prefix}/src/forwarder/stub.py", "import time\ndef main(_):\n    time.sleep(600)\n")
        install.install(machine)
        with subprocess.Popen([staging.interpreter(), "-IBS", machine.persistent.launcher]) as stub:
            try:
                wait_until(lambda: bool(staging.running_stubs(machine.persistent.code)), 20, "the stub runs")
                assert any("still running" in line for line in install.uninstall(machine))
            finally:
                stub.kill()
        assert not os.path.exists(machine.persistent.code)


@needs_machine
@pytest.mark.kernel
class TestUninstall:
    def test_another_handler_is_left_alone(self, machine: Paths) -> None:
        install.install(machine)
        write_sysctl(PATTERN, "|/usr/lib/systemd/systemd-coredump %P")
        write_sysctl(LIMIT, "16")
        assert not status(machine).active
        assert mentions(machine, "systemd-coredump is in our place")

        done = install.uninstall(machine)
        assert any(f"left {PATTERN} alone" in line for line in done)
        assert any(f"left {LIMIT} alone" in line for line in done)
        assert sysctls() == {PATTERN: "|/usr/lib/systemd/systemd-coredump %P", LIMIT: "16", SUID: BEFORE[SUID]}
        assert status(machine).installed is None

    def test_killed_half_way_it_goes_on(self, machine: Paths, monkeypatch: pytest.MonkeyPatch) -> None:
        before = files(machine.prefix)
        install.install(machine)

        def fail(_: str) -> None:
            raise OSError(errno.EIO, "no")

        with monkeypatch.context() as broken:
            broken.setattr(staging, "remove_all", fail)
            with pytest.raises(OSError, match="no"):
                install.uninstall(machine)
        assert sysctls() == BEFORE
        assert not any("left" in line for line in install.uninstall(machine))
        assert files(machine.prefix) == before

    def test_over_another_handler_it_is_that_one_that_comes_back(self, machine: Paths) -> None:
        install.install(machine, runtime=True)
        write_sysctl(PATTERN, "|/other %P")
        install.install(machine)
        install.uninstall(machine)
        assert sysctls() == {**BEFORE, PATTERN: "|/other %P"}

    @pytest.mark.parametrize("contents", [None, "not json", "[]", '{"kernel.core_pattern": 1}'])
    def test_without_memory_it_goes_back_to_the_kernels_defaults(self, machine: Paths, contents: str | None) -> None:
        install.install(machine)
        if contents is None:
            os.unlink(machine.persistent.state)
        else:
            write(machine.persistent.state, contents)
        assert any("not remembered" in line for line in install.install(machine))
        install.uninstall(machine)
        assert sysctls() == install.KERNEL_DEFAULTS

    def test_an_empty_pattern_comes_back_too(self, machine: Paths) -> None:
        write_sysctl(PATTERN, "")
        install.install(machine)
        install.uninstall(machine)
        assert read_sysctl(PATTERN) == ""

    def test_files_of_others_stay(self, machine: Paths) -> None:
        install.install(machine, runtime=True)
        write(f"{machine.runtime.code}/of-another", "")
        install.uninstall(machine)
        assert os.listdir(machine.runtime.code) == ["of-another"]


@needs_machine
@pytest.mark.kernel
class TestStatus:
    def test_not_installed(self, machine: Paths) -> None:
        found = status(machine)
        assert (found.active, found.ingress, found.installed, found.problems) == (False, None, None, [])
        assert found.version == {"staged": None, "current": __version__}
        assert found.core_pattern == BEFORE[PATTERN]

    @both_kinds
    def test_active(self, machine: Paths, kind: str, listener: str) -> None:
        assert listener
        install.install(machine, runtime=kind == "runtime")
        found = status(machine)
        assert json.loads(found.as_json()) == {
            "active": True,
            "ingress": "pipe",
            "core_pattern": read_sysctl(PATTERN),
            "core_pipe_limit": 1024,
            "suid_dumpable": 2,
            "installed": kind,
            "version": {"staged": __version__, "current": __version__},
            "features": found.features,
            "host_receiver": True,
            "ledger": {"watched": False, "since": None, "lost": 0, "passed": 0, "unclear": 0, "quota_warnings": 0},
            "problems": [],
        }

    @pytest.mark.parametrize(
        ("damage", "words"),
        [
            ("echo >> {code}/stub.py", "stub.py is not as it was installed"),
            ("rm {code}/stub.py", "stub.py cannot be read"),
            ("sed -i 's/^SETTINGS.*/SETTINGS = os.system/' {code}/stub.py", "stub.py is not as it was installed"),
            ("cd {code}/lib-* && echo >> forwarder/stub.py", "forwarder/stub.py is not as it was installed"),
            ("cd {code}/lib-*/forwarder && echo | tee -a __pycache__/stub.*.pyc", ".pyc is not as it was installed"),
            ("cd {code}/lib-* && echo >> road.bin", "road.bin is not as it was installed"),
            ("cd {code}/lib-* && echo >> json.py", "json.py was added"),
            ("rm {code}/lib-*/receiver/__init__.py", "receiver/__init__.py is missing"),
            ("cd {code}/lib-* && echo >> manifest.json", "manifest.json is not as it was installed"),
            ("rm -r {code}/lib-*", "manifest.json cannot be read"),
        ],
    )
    def test_damage_is_found_and_mended(self, machine: Paths, damage: str, words: str) -> None:
        install.install(machine)
        subprocess.run(damage.format(code=machine.persistent.code), shell=True, check=True)
        assert not status(machine).active
        assert mentions(machine, words)

        install.install(machine)
        assert status(machine).active
        assert not mentions(machine, words)

    def test_another_version(self, machine: Paths) -> None:
        install.install(machine)
        write(f"{machine.prefix}/src/forwarder/stub.py", STUB + "# newer\n")
        assert mentions(machine, "not this package's")
        assert status(machine).active
        install.install(machine)
        assert not mentions(machine, "not this package's")

    def test_changed_limits(self, machine: Paths) -> None:
        install.install(machine)
        write_sysctl(LIMIT, "0")
        write_sysctl(SUID, "1")
        assert mentions(machine, f"{LIMIT} is 0, not 1024")
        assert mentions(machine, f"{SUID} is 1, not 2")

    def test_changed_configuration(self, machine: Paths, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("CORE_PIPE_FORWARDER_STALL_SECONDS", "7")
        install.install(machine)
        monkeypatch.delenv("CORE_PIPE_FORWARDER_STALL_SECONDS")
        # The environment was that of `install`; it is no change that another shell has another one.
        assert not mentions(machine, "configuration")
        write(f"{machine.prefix}/etc/core_pipe/forwarder.toml", "stall_seconds = 8")
        assert mentions(machine, "configuration was changed")
        write(f"{machine.prefix}/etc/core_pipe/forwarder.toml", "stall_seconds = 0")
        assert mentions(machine, "stall_seconds is 0")

    def test_other_arguments(self, machine: Paths) -> None:
        install.install(machine)
        write_sysctl(PATTERN, f"|{staging.interpreter()} {machine.persistent.launcher} %P")
        assert status(machine).active
        assert mentions(machine, "in another way")

    def test_what_others_can_write(self, machine: Paths) -> None:
        install.install(machine)
        os.chown(machine.persistent.launcher, 65534, 0)
        assert mentions(machine, f"{machine.persistent.launcher} belongs to uid 65534")

    def test_the_interpreter_is_gone_or_another(self, machine: Paths, monkeypatch: pytest.MonkeyPatch) -> None:
        python = f"{machine.prefix}/p"
        os.symlink(staging.interpreter(), python)
        monkeypatch.setattr(staging, "interpreter", lambda: python)
        # Both paths below the prefix would be too long for the kernel.
        monkeypatch.setattr(install, "ARGUMENTS", "v=1")
        install.install(machine)
        assert not mentions(machine, "another Python")
        os.unlink(python)
        assert mentions(machine, python, "cannot be started")
        os.symlink("/bin/sh", python)
        assert mentions(machine, python, "another Python")

    @pytest.mark.parametrize(
        ("file", "text", "is_problem"),
        [
            ("/etc/sysctl.d/99-x.conf", "kernel.core_pattern = core", True),
            ("/usr/lib/sysctl.d/61-x.conf", "# c\n -kernel/core_pattern=|/x", True),
            ("/run/sysctl.d/99-x.conf", "fs.suid_dumpable=0", True),
            ("/etc/sysctl.conf", "kernel.core_pipe_limit=0", True),
            ("/usr/lib/sysctl.d/50-coredump.conf", "kernel.core_pattern=core", False),
            ("/etc/sysctl.d/99-x.conf", "#kernel.core_pattern=core\n;kernel.core_pattern=core", False),
            ("/etc/sysctl.d/99-x.conf", "kernel.core_pipe_limit = 1024", False),
            ("/etc/sysctl.d/99-x.conf.bak", "kernel.core_pattern=core", False),
        ],
    )
    def test_files_that_come_later_at_boot(self, machine: Paths, file: str, text: str, is_problem: bool) -> None:
        install.install(machine)
        write(machine.prefix + file, text)
        assert mentions(machine, file, "comes after") == is_problem

    def test_a_masked_file_says_nothing(self, machine: Paths) -> None:
        install.install(machine)
        write(f"{machine.prefix}/usr/lib/sysctl.d/99-x.conf", "kernel.core_pattern=core")
        os.symlink("/dev/null", f"{machine.prefix}/etc/sysctl.d/99-x.conf")
        assert not mentions(machine, "comes after")

    def test_debians_link_to_sysctl_conf_counts_once(self, machine: Paths) -> None:
        install.install(machine)
        write(f"{machine.prefix}/etc/sysctl.conf", "kernel.core_pattern=core")
        os.symlink("../sysctl.conf", f"{machine.prefix}/etc/sysctl.d/99-sysctl.conf")
        assert len([p for p in status(machine).problems if "comes after" in p.what]) == 1

    def test_the_file_for_the_boot(self, machine: Paths) -> None:
        install.install(machine)
        file = str(machine.persistent.sysctl_file)
        write(file, "kernel.core_pattern=core")
        assert mentions(machine, file, "does not say what is installed")
        os.unlink(file)
        assert mentions(machine, file, "next boot")


class Systemd:
    """What systemd does with the units, as far as `install` sees it; and what was asked of it."""

    def __init__(self, paths: Paths) -> None:
        self.paths = paths
        self.asked: list[str] = []
        self.listener: socket.socket | None = None
        self.broken = False
        self.book: Book | None = None

    def watch(self, *, watching: bool) -> None:
        """Be the ledger's service, or not any more; its book would stay, and so would tell nothing of `uninstall`."""
        if self.book is not None:
            self.book.close()
            for path in (self.book.path, f"{self.book.path}.lock"):
                os.unlink(path)
            staging.remove_empty(os.path.dirname(self.book.path))
        self.book = None
        if watching:
            self.book = Book(self.paths.at(BOOK))
            self.book.open()

    def __call__(self, *arguments: str) -> None:
        self.asked.append(" ".join(arguments))
        if arguments[-1] == ledger_unit.UNIT and arguments[0] in ("start", "disable"):
            self.watch(watching=arguments[0] == "start")
        if arguments == ("start", ingress.SOCKET_UNIT):
            if self.broken:
                raise InstallError("systemctl start failed", "see journalctl -xe")
            path = self.paths.kernel_socket
            os.makedirs(os.path.dirname(path), exist_ok=True)
            self.listener = socket.socket(socket.AF_UNIX)
            self.listener.bind(path)
            self.listener.listen()
            assert cli.main(["ingress", "socket"]) == 0
        if arguments[-1] == ingress.SOCKET_UNIT and arguments[0] in ("disable", "stop"):
            assert cli.main(["ingress", "pipe"]) == 0
            if self.listener is not None:
                self.listener.close()
                os.unlink(self.paths.kernel_socket)
            self.listener = None


@pytest.fixture
def systemd(machine: Paths, monkeypatch: pytest.MonkeyPatch) -> Iterator[Systemd]:
    found = Systemd(machine)
    monkeypatch.setattr(install, "HOST", machine)
    monkeypatch.setattr(ingress, "systemd_keeps", lambda _paths: True)
    monkeypatch.setattr(ingress, "_systemctl", found)
    yield found
    if found.listener is not None:
        found.listener.close()


@needs_machine
@pytest.mark.kernel
@pytest.mark.skipif(not ingress.kernel_has_socket(), reason="this kernel has no coredump socket")
class TestSocketIngress:
    @both_kinds
    def test_installed_and_gone_without_a_trace(self, systemd: Systemd, listener: str, kind: str) -> None:
        assert listener
        paths = systemd.paths
        before = files(paths.prefix)
        options = ["--runtime"] if kind == "runtime" else []
        assert cli.main(["install", *options]) == 0

        assert sysctls()[PATTERN] == f"@@{paths.kernel_socket}"
        found = status(paths)
        assert (found.active, found.ingress, found.installed) == (True, "socket", kind)
        assert found.problems == []
        units = paths.at("/run/systemd/system" if kind == "runtime" else "/etc/systemd/system")
        program = os.path.join(os.path.dirname(sys.executable), "core-pipe-forwarder")
        assert f"ExecStopPre={program} ingress pipe\n" in read(f"{units}/core_pipe-forwarder.socket")
        assert f"ExecStart={program} serve" in read(f"{units}/core_pipe-forwarder.service")
        assert ("enable core_pipe-forwarder.socket" in systemd.asked) == (kind == "persistent")
        # The boot begins with the pipe: it needs nobody.
        if kind == "persistent":
            assert "@@" not in read(str(paths.persistent.sysctl_file))

        assert cli.main(["uninstall"]) == 0
        assert sysctls() == BEFORE
        assert files(paths.prefix) == before

    def test_a_second_time_changes_nothing(self, systemd: Systemd) -> None:
        assert cli.main(["install"]) == 0
        first = sysctls()
        assert cli.main(["install"]) == 0
        assert sysctls() == first
        # The old service finishes what it has begun before the new one listens.
        assert systemd.asked[-7:] == [
            "disable --now core_pipe-forwarder.socket",
            "disable --now core_pipe-forwarder.service",
            "daemon-reload",
            "daemon-reload",
            "enable core_pipe-forwarder.socket",
            "start core_pipe-forwarder.socket",
            "start core_pipe-forwarder.service",
        ]
        assert json.loads(read(systemd.paths.persistent.state)) == BEFORE
        assert cli.main(["uninstall"]) == 0
        assert sysctls() == BEFORE

    def test_back_to_the_pipe(self, systemd: Systemd) -> None:
        assert cli.main(["install"]) == 0
        assert cli.main(["install", "--ingress", "pipe"]) == 0
        assert status(systemd.paths).ingress == "pipe"
        assert ingress.unit_files(systemd.paths) == []

    def test_a_service_that_does_not_start_leaves_the_pipe(
        self, systemd: Systemd, capsys: pytest.CaptureFixture[str]
    ) -> None:
        systemd.broken = True
        assert cli.main(["install"]) == 0
        assert "the way in is the pipe: systemctl start failed" in capsys.readouterr().out
        assert status(systemd.paths).ingress == "pipe"
        assert ingress.unit_files(systemd.paths) == []
        assert cli.main(["install", "--ingress", "socket"]) == 1
        assert "systemctl start failed" in capsys.readouterr().err
        assert status(systemd.paths).ingress == "pipe"

    def test_a_kernel_that_refuses_the_pattern(self, systemd: Systemd, monkeypatch: pytest.MonkeyPatch) -> None:
        """6.17.0 to 6.17.4 do."""

        def refuse(name: str, value: str) -> None:
            if value.startswith("@@"):
                raise OSError(errno.EINVAL, "Invalid argument", "/proc/sys/kernel/core_pattern")
            write_sysctl(name, value)

        monkeypatch.setattr(ingress, "write_sysctl", refuse)
        # As systemd: the unit's ExecStartPost= fails, so its start does.
        monkeypatch.setattr(Systemd, "__call__", lambda self, *arguments: self.asked.append(" ".join(arguments)))
        assert cli.main(["install"]) == 0
        assert status(systemd.paths).ingress == "pipe"

    def test_what_status_says(self, systemd: Systemd) -> None:
        assert cli.main(["install"]) == 0
        assert systemd.listener is not None
        systemd.listener.close()
        assert mentions(systemd.paths, "nobody listens")
        assert not status(systemd.paths).active
        assert cli.main(["ingress", "pipe"]) == 0
        assert mentions(systemd.paths, "is installed, and the way in is the pipe")
        assert status(systemd.paths).active
        systemd.listener = None
        os.unlink(systemd.paths.kernel_socket)
        unit = systemd.paths.at("/etc/systemd/system/core_pipe-forwarder.service")
        write(unit, "[Service]\nExecStart=/nowhere/core-pipe-forwarder serve\n")
        assert mentions(systemd.paths, "/nowhere/core-pipe-forwarder cannot be started")

    def test_only_roots_program_becomes_a_service(self, systemd: Systemd, monkeypatch: pytest.MonkeyPatch) -> None:
        program = f"{systemd.paths.prefix}/core-pipe-forwarder"
        write(program, "")
        os.chmod(program, 0o755)
        os.chown(program, 65534, 0)
        monkeypatch.setattr(sys, "executable", f"{systemd.paths.prefix}/python")
        with pytest.raises(InstallError, match=r"as a service, and .* belongs to uid 65534"):
            ingress._program()


@pytest.fixture
def listener(paths: Paths) -> Iterator[str]:
    path = paths.at("/run/core_pipe.socket")
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(path)
        yield path


@needs_machine
@pytest.mark.kernel
class TestCommandLine:
    def test_exit_status(
        self,
        machine: Paths,
        listener: str,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        monkeypatch.setattr(install, "HOST", machine)
        assert cli.main(["status"]) == 3
        assert cli.main(["install"]) == 0
        capsys.readouterr()
        assert cli.main(["status"]) == 0
        assert "active: yes, by pipe" in capsys.readouterr().out
        os.unlink(listener)
        assert cli.main(["status", "--json"]) == 1
        assert json.loads(capsys.readouterr().out)["problems"]
        assert cli.main(["status"]) == 1
        # Nothing reads units below this prefix, as on a host without systemd.
        assert "core-pipe-receiver --listen /run/core_pipe.socket" in capsys.readouterr().out
        with monkeypatch.context() as systemd:
            systemd.setattr(ingress, "systemd_keeps", lambda _: True)
            assert cli.main(["status"]) == 1
            assert "mend: core-pipe-receiver install --host" in capsys.readouterr().out
        assert cli.main(["install", "--runtime"]) == 0
        assert "core-pipe-receiver --listen" in capsys.readouterr().err
        assert cli.main(["uninstall"]) == 0
        capsys.readouterr()
        assert cli.main(["uninstall"]) == 0
        assert capsys.readouterr().out == "nothing is installed\n"

    @pytest.mark.parametrize("kind", ["--pid", "--user"])
    @pytest.mark.parametrize("command", ["install", "uninstall", "status"])
    @pytest.mark.usefixtures("machine")
    def test_refused_in_a_container(self, kind: str, command: str) -> None:
        unshare = ["unshare", "--fork", "--mount-proc", "--pid"]
        if kind == "--user":
            unshare = ["unshare", "--user", "--map-root-user"]
        done = subprocess.run(
            [*unshare, sys.executable, "-m", "forwarder.cli", command],
            check=False,
            capture_output=True,
            text=True,
            cwd=os.path.dirname(os.path.dirname(install.__file__)),
        )
        assert done.returncode == 1
        assert "this is a container" in done.stderr
        assert "core-pipe-receiver install" in done.stderr
        assert sysctls() == BEFORE

    def test_a_mount_namespace_of_its_own(self, monkeypatch: pytest.MonkeyPatch) -> None:
        # Whether init's can be read depends on the machine; what is compared does not.
        real = os.stat
        monkeypatch.setattr(os, "stat", lambda path, **more: real(path if path != "/proc/1/ns/mnt" else "/", **more))
        with pytest.raises(InstallError, match="mount namespace of its own"):
            install.refuse_elsewhere()

    @pytest.mark.parametrize("command", ["install", "uninstall"])
    @pytest.mark.usefixtures("machine")
    def test_refused_without_root(self, command: str, capsys: pytest.CaptureFixture[str]) -> None:
        os.seteuid(65534)
        try:
            assert cli.main([command]) == 1
        finally:
            os.seteuid(0)
        assert "only root" in capsys.readouterr().err
        assert sysctls() == BEFORE


def test_usage(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, code in ((["--help"], 0), (["--version"], 0), ([], 2), (["start"], 2)):
        with pytest.raises(SystemExit) as exited:
            cli.main(arguments)
        assert exited.value.code == code
    assert "Examples:" in capsys.readouterr().out


class TestPattern:
    def test_at_most_what_the_kernel_takes(self) -> None:
        surplus = len(core_pattern("/", "/l")) - 127
        assert len(core_pattern("/" + "p" * -surplus, "/l")) == 127
        with pytest.raises(InstallError, match=r"128 bytes.* is 1 bytes too long.*ln -s"):
            core_pattern("/p" + "p" * -surplus, "/l")

    @pytest.mark.parametrize("python", ["/a b", "/a%P", "/a\n", "/ä"])
    def test_only_plain_paths(self, python: str) -> None:
        with pytest.raises(InstallError, match="cannot have"):
            core_pattern(python, "/l")

    def test_starts_as_core_5_wants_it(self) -> None:
        assert core_pattern("/usr/bin/python3", "/l").startswith("|/usr/bin/python3 -IBS /l v=1 P=%P I=%I ")

    def test_the_interpreter_is_the_base_one(self) -> None:
        python = staging.interpreter()
        assert not os.path.exists(os.path.join(os.path.dirname(os.path.dirname(python)), "pyvenv.cfg"))
        program = "import sys; print(sys.version, sys.prefix == sys.base_prefix)"
        done = subprocess.run([python, "-IBS", "-c", program], check=True, capture_output=True, text=True)
        assert done.stdout == f"{sys.version} True\n"


@needs_root
class TestSettings:
    def test_defaults(self, paths: Paths) -> None:
        os.unlink(f"{paths.prefix}/etc/core_pipe/receiver.toml")
        assert install.stub_settings(paths) == {
            "store": b"/var/lib/core_pipe",
            "connect_seconds": 10.0,
            "busy_seconds": 30.0,
            "stall_seconds": 60.0,
        }

    def test_files_then_environment(self, paths: Paths, monkeypatch: pytest.MonkeyPatch) -> None:
        write(f"{paths.prefix}/etc/core_pipe/forwarder.toml", "connect_seconds = 2\nstall_seconds = 1.5\n")
        expected: dict[str, object] = {"store": os.fsencode(f"{paths.prefix}/crash")}
        assert install.stub_settings(paths) == {
            **expected,
            "connect_seconds": 2.0,
            "busy_seconds": 30.0,
            "stall_seconds": 1.5,
        }
        monkeypatch.setenv("CORE_PIPE_STORE", "/cr\udcffash")
        monkeypatch.setenv("CORE_PIPE_FORWARDER_CONNECT_SECONDS", "0.5")
        assert install.stub_settings(paths) == {
            "store": b"/cr\xffash",
            "connect_seconds": 0.5,
            "busy_seconds": 30.0,
            "stall_seconds": 1.5,
        }

    @pytest.mark.parametrize(
        ("text", "words"),
        [
            ("stall_seconds = 0", "stall_seconds is 0.*from 1 to 86400"),
            ("stall_seconds = true", "stall_seconds is True"),
            ("stall_seconds = 'long'", "stall_seconds is 'long'"),
            ("stall_seconds = nan", "stall_seconds is nan"),
            ("connect_seconds = inf", "connect_seconds is inf.*from 0.1 to 60"),
            ("conect_seconds = 1", "conect_seconds is not known.*connect_seconds, busy_seconds, stall_seconds"),
            ("[stall_seconds]", "stall_seconds is {}"),
            ("stall_seconds = ", "is not TOML"),
            ("store = '/x'", "store is not known"),
        ],
    )
    def test_wrong_values_in_the_file(self, paths: Paths, text: str, words: str) -> None:
        write(f"{paths.prefix}/etc/core_pipe/forwarder.toml", text)
        with pytest.raises(InstallError, match=f"{paths.prefix}/etc/core_pipe/forwarder.toml.*{words}"):
            install.stub_settings(paths)

    @pytest.mark.parametrize(
        ("name", "value", "words"),
        [
            ("CORE_PIPE_FORWARDER_STALL_SECONDS", "soon", "is 'soon': give seconds"),
            ("CORE_PIPE_FORWARDER_STALL_SECONDS", "nan", "is 'nan': give seconds"),
            ("CORE_PIPE_FORWARDER_STAL_SECONDS", "1", "is not known"),
            ("CORE_PIPE_STORE", "crash", "is 'crash': give the absolute path"),
            ("CORE_PIPE_STORE", "", "is '': give the absolute path"),
        ],
    )
    def test_wrong_values_in_the_environment(
        self, paths: Paths, monkeypatch: pytest.MonkeyPatch, name: str, value: str, words: str
    ) -> None:
        monkeypatch.setenv(name, value)
        with pytest.raises(InstallError, match=f"{name} in the environment {words}"):
            install.stub_settings(paths)

    @pytest.mark.parametrize("text", ["store = 1", "store = 'crash'", 'store = "/a\\u0000"', "store = ['/x']"])
    def test_wrong_store(self, paths: Paths, text: str) -> None:
        write(f"{paths.prefix}/etc/core_pipe/receiver.toml", text)
        with pytest.raises(InstallError, match=r"receiver\.toml: store is .*give the absolute path"):
            install.stub_settings(paths)

    @pytest.mark.parametrize("what", ["link", "fifo", "directory", "owner", "group", "others", "big", "place"])
    def test_files_that_root_must_not_believe(self, paths: Paths, what: str) -> None:
        file = f"{paths.prefix}/etc/core_pipe/forwarder.toml"
        if what == "link":
            write(f"{paths.prefix}/real", "")
            os.symlink(f"{paths.prefix}/real", file)
        elif what == "fifo":
            os.mkfifo(file)
        elif what == "directory":
            os.mkdir(file)
        elif what == "owner":
            write(file, "")
            os.chown(file, 65534, 0)
        elif what in ("group", "others"):
            write(file, "")
            os.chmod(file, 0o664 if what == "group" else 0o646)
        elif what == "big":
            write(file, "#" * (staging.MAX_TEXT + 1))
        else:
            write(file, "")
            os.chmod(os.path.dirname(file), 0o777)
        with pytest.raises(InstallError, match="core_pipe"):
            install.stub_settings(paths)


@needs_root
class TestInsecure:
    def test_roots_own(self, prefix: str) -> None:
        write(f"{prefix}/a/file", "")
        assert staging.insecure(f"{prefix}/a/file") is None
        assert staging.insecure(f"{prefix}/a/not/there") is None
        assert staging.insecure("/") is None
        assert staging.insecure(sys.executable) is None or "uid" in str(staging.insecure(sys.executable))

    def test_the_way_matters(self, prefix: str) -> None:
        write(f"{prefix}/a/b/file", "")
        os.chmod(f"{prefix}/a", 0o775)
        assert str(staging.insecure(f"{prefix}/a/b/file")).startswith(f"{prefix}/a can be written")
        os.chmod(f"{prefix}/a", 0o1777)
        assert staging.insecure(f"{prefix}/a/b/file") is None
        # Sticky protects what is there; but whoever is asked to put something *into* it shares it with everybody.
        assert staging.insecure(f"{prefix}/a") is not None
        os.chown(f"{prefix}/a", 65534, 0)
        assert str(staging.insecure(f"{prefix}/a/b/file")).startswith(f"{prefix}/a belongs to uid 65534")

    def test_links_are_followed_and_their_way_counts(self, prefix: str) -> None:
        write(f"{prefix}/real/file", "")
        write(f"{prefix}/open/x", "")
        os.symlink("../real/file", f"{prefix}/open/hop")
        os.symlink(f"{prefix}/open/hop", f"{prefix}/link")
        assert staging.insecure(f"{prefix}/link") is None
        os.chmod(f"{prefix}/open", 0o777)
        assert str(staging.insecure(f"{prefix}/link")).startswith(f"{prefix}/open can be written")
        os.chmod(f"{prefix}/open", 0o755)
        os.chown(f"{prefix}/open/hop", 65534, 0, follow_symlinks=False)
        assert str(staging.insecure(f"{prefix}/link")).startswith(f"{prefix}/open/hop belongs to uid 65534")

    def test_a_loop_ends(self, prefix: str) -> None:
        os.symlink("loop", f"{prefix}/loop")
        assert "too many" in str(staging.insecure(f"{prefix}/loop"))
