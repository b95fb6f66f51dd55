"""The stub's code in a place of root's own, and the launcher that the kernel starts there.

The kernel runs the stub as root for every crash on the machine. So it never runs from where the package happens to be
installed: an upgrade in progress, a virtual environment that somebody removed, or a checkout that a user can write to
must not be what root executes at that moment. `stage` copies the code:

    <directory>/stub.py         the launcher: a literal path, literal settings, and the call of `forwarder.stub.main`
    <directory>/lib-<digest>/   one version of the code; `manifest.json` has the hash of every file in it
    .../road.bin                what the stub imports for every crash, compiled, in one file

The digest is the manifest's, so the launcher's text pins everything that it starts. The launcher is replaced by one
rename, which is the moment of the switch: before it the old code runs, after it the new, and there is nothing between.

To find and open each module by itself takes the import system longer than to run it, so the launcher reads `road.bin`
instead. That file is for one interpreter's byte code, as any compiled file is. When the interpreter is another one by
the time of a crash (a distribution's upgrade), or the file is not whole, the launcher imports the sources beside it: a
slower stub, and no core lost.
"""

from __future__ import annotations

import ast
import contextlib
import hashlib
import json
import marshal
import os
import py_compile
import re
import shutil
import stat
import sys
import time
from dataclasses import dataclass
from importlib.util import MAGIC_NUMBER
from typing import TYPE_CHECKING, Any

import forwarder
import receiver

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

# The name that an interpreter of this one's version has.
PYTHON = f"python{sys.version_info.major}.{sys.version_info.minor}"

LAUNCHER = "stub.py"
MANIFEST = "manifest.json"
ROAD = "road.bin"
# Where the road begins.
STUB = "forwarder.stub"
LIBRARY = "lib-"
# What is not finished yet. No crash looks at such a name; the next install removes what a killed one left.
UNFINISHED = ".new-"

# Secrets are not here: whoever asks `status` may look. The modes are set whatever the umask is.
DIRECTORY_MODE = 0o755
FILE_MODE = 0o644

# What root wrote for root is small; whoever made it bigger did not do it with us.
MAX_TEXT = 1 << 20

_LAUNCHER_TEXT = """\
# Written by `core-pipe-forwarder install`, which also takes its settings from the configuration: install again to
# change anything here. The kernel starts this file for every core dump (core_pattern, see core(5)).
import gc
import posix
import sys

# A stub lives for some milliseconds: a collection would look at everything, and find nothing.
gc.disable()
LIBRARY = {library!r}
SETTINGS = {settings!r}

# Last, so that no file of ours can ever stand in for a module of the standard library.
sys.path.append(LIBRARY)
try:
    try:
        import marshal
        from _frozen_importlib_external import MAGIC_NUMBER

        fd = posix.open(LIBRARY + "/road.bin", posix.O_RDONLY | posix.O_CLOEXEC)
        road = posix.read(fd, posix.fstat(fd).st_size)
        posix.close(fd)
        if road.startswith(MAGIC_NUMBER):
            begin, modules = marshal.loads(road[len(MAGIC_NUMBER) :])
            exec(begin)
    except Exception:
        # Whatever is wrong with it: the sources are there.
        for name in [name for name in sys.modules if name.startswith(("forwarder", "receiver"))]:
            del sys.modules[name]
    from forwarder.stub import main

    status = main(SETTINGS)
except Exception as error:
    # The kernel leaves descriptors 1 and 2 closed, so a traceback would go nowhere. Its log is what is always there;
    # one write is one line of at most some 900 bytes (Documentation/ABI/testing/dev-kmsg), <3> is "error".
    line = "<3>core_pipe: the stub failed, a core is lost: " + ascii(error)[:500] + " " + ascii(sys.argv[1:])[:300]
    with open("/dev/kmsg", "wb", 0) as log:
        log.write(line.encode() + b"\\n")
    status = 1
# Not sys.exit(): to take Python down costs 2 ms of a processor, which the next crash in a storm waits for.
posix._exit(status)
"""

# Runs the modules of road.bin among the launcher's names, which has LIBRARY, sys and modules.
_BEGIN_TEXT = """\
for name, path, code in modules:
    module = type(sys)(name)
    module.__file__ = LIBRARY + "/" + path
    package, _, child = name.rpartition(".")
    if path.endswith("/__init__.py"):
        module.__package__ = name
        # What is not in here is imported from there as ever.
        module.__path__ = [LIBRARY + "/" + name.replace(".", "/")]
    else:
        module.__package__ = package
    sys.modules[name] = module
    exec(code, module.__dict__)
    if package:
        setattr(sys.modules[package], child, module)
"""


class InstallError(Exception):
    """Why something was not done. `fact`: what is wrong; `mend`: what to do about it."""

    def __init__(self, fact: str, mend: str) -> None:
        super().__init__(f"{fact}: {mend}")
        self.fact = fact
        self.mend = mend


class DamagedError(Exception):
    """What is staged is not what was staged, or is not there; the text is the fact only."""


@dataclass(frozen=True)
class Staged:
    """What a launcher starts.

    library: the directory with the code. settings: what `main` gets. version: the package's, at that time.
    python: the interpreter as it stands in core_pattern. python_file: the file behind it, at that time.
    configuration: the caller's own mark of what it made the settings from.
    hashes: relative path to SHA-256 (hex) of each file of the library, the compiled ones included.
    """

    library: str
    settings: dict[str, object]
    version: str
    python: str
    python_file: str
    configuration: str
    hashes: dict[str, str]


def insecure(path: str) -> str | None:
    """Say which part of a path somebody other than root could change, None when nobody can.

    Looks at every directory and symbolic link from / to the file. Sticky directories of root's, as /tmp, are fine on
    the way: others cannot rename or replace what is root's there. A part that does not exist ends the search: root will
    make it, in a place that is root's.
    """
    parts = [part for part in os.path.abspath(path).split("/") if part][::-1]
    at = "/"
    # The kernel's own bound on symbolic links in one look-up (path_resolution(7)).
    links = 40
    while True:
        try:
            found = os.lstat(at)
        except OSError as error:
            return None if isinstance(error, FileNotFoundError) else f"{at} cannot be looked at ({error.strerror})"
        if found.st_uid != 0:
            return f"{at} belongs to uid {found.st_uid}"
        if stat.S_ISLNK(found.st_mode):
            if links == 0:
                return f"{at} leads through too many symbolic links"
            links -= 1
            target = os.readlink(at)
            parts += [part for part in target.split("/") if part and part != "."][::-1]
            at = "/" if target.startswith("/") else os.path.dirname(at)
        elif found.st_mode & 0o022 and not (parts and found.st_mode & stat.S_ISVTX):
            return f"{at} can be written by others than root (mode {stat.S_IMODE(found.st_mode):04o})"
        if not parts:
            return None
        # A link's target is resolved already where it stands in `at`, so ".." is the plain parent.
        part = parts.pop()
        at = os.path.dirname(at) if part == ".." else os.path.join(at, part)


def read_trusted(path: str) -> bytes | None:
    """Return the contents of a file that root wrote for itself, None when there is no such file.

    Raises InstallError when it is a symbolic link, no regular file, not root's alone, or too big: root must not read
    where a user points it (CVE-2019-11481), nor take orders from a file that a user can write.
    """
    try:
        # O_NONBLOCK: a FIFO must not hold us up before fstat finds it out.
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise InstallError(
            f"{path} cannot be read ({error.strerror})", "make it a regular file of root's, not a link"
        ) from error
    try:
        found = os.fstat(fd)
        if not stat.S_ISREG(found.st_mode) or found.st_uid != 0 or found.st_mode & 0o022:
            raise InstallError(
                f"{path} is no regular file that only root can write "
                f"(uid {found.st_uid}, mode {stat.S_IMODE(found.st_mode):04o})",
                "make it one: chown root:root, chmod 0644",
            )
        with open(fd, "rb", closefd=False) as file:
            contents = file.read(MAX_TEXT + 1)
    finally:
        os.close(fd)
    if len(contents) > MAX_TEXT:
        raise InstallError(f"{path} is over {MAX_TEXT} bytes, as no such file ever is", "look who wrote it")
    return contents


def make_directories(path: str) -> list[str]:
    """Make a directory and what is missing above it, 0755 whatever the umask is; return those made, outermost first."""
    missing = []
    while not os.path.isdir(path):
        missing.append(path)
        path = os.path.dirname(path)
    for name in reversed(missing):
        os.mkdir(name)
        os.chmod(name, DIRECTORY_MODE)
    return missing[::-1]


def remove_empty(directory: str) -> None:
    """Remove a directory if nothing is in it (any more)."""
    with contextlib.suppress(OSError):
        os.rmdir(directory)


def write_atomically(path: str, contents: bytes) -> None:
    """Make a file be these bytes, mode 0644, or leave it as it was; on the disk when this returns. Raises OSError."""
    directory = os.path.dirname(path)
    temporary = os.path.join(directory, f"{UNFINISHED}{os.path.basename(path)}")
    with contextlib.suppress(FileNotFoundError):
        os.unlink(temporary)
    try:
        _write(temporary, contents)
        os.rename(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise
    _sync(directory)


def replace_or_remove(path: str, contents: bytes | None) -> None:
    """Make a file be these bytes, or not be there for None."""
    if contents is not None:
        write_atomically(path, contents)
        return
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)
        _sync(os.path.dirname(path))


def packages_in_use() -> dict[str, str]:
    """Return the directories of the two packages as this process imported them (a checkout's or a wheel's)."""
    return {package.__name__: package.__path__[0] for package in (forwarder, receiver)}


def sources(packages: Mapping[str, str]) -> dict[str, bytes]:
    """Return the Python sources of packages (name to directory), by their path below the library's directory."""
    found = {}
    for name, directory in packages.items():
        for at, directories, files in os.walk(directory):
            directories[:] = sorted(d for d in directories if d != "__pycache__")
            for file in sorted(files):
                if file.endswith(".py"):
                    path = os.path.join(at, file)
                    with open(path, "rb") as source:
                        found[os.path.join(name, os.path.relpath(path, directory))] = source.read()
    return found


def launcher_text(library: str, settings: Mapping[str, object]) -> bytes:
    """Return the launcher. The settings are literals: on the crash path no file is read and nothing is parsed."""
    return _LAUNCHER_TEXT.format(library=library, settings=dict(settings)).encode()


def road(code: Mapping[str, bytes]) -> bytes:
    """Return what `road.bin` has: the modules that the stub imports at its start, compiled by this interpreter.

    code: as `sources` gives it. Raises SyntaxError.
    """
    modules = []
    for name, path in _imported(code, STUB):
        tree = ast.parse(code[path], path)
        # It speaks to the compiler, who is told here; when the module runs, it would only find and load a file.
        tree.body = [node for node in tree.body if not _is_future(node)]
        flags = annotations.compiler_flag
        # Without what is for readers. A traceback has its lines from the source beside it.
        modules.append((name, path, compile(tree, path, "exec", flags=flags, dont_inherit=True, optimize=2)))
    begin = compile(_BEGIN_TEXT, ROAD, "exec", dont_inherit=True)
    return MAGIC_NUMBER + marshal.dumps((begin, modules))


def _is_future(node: ast.stmt) -> bool:
    return isinstance(node, ast.ImportFrom) and node.module == "__future__"


def _imported(code: Mapping[str, bytes], name: str) -> list[tuple[str, str]]:
    """Return the modules among `code` that an import of one runs at once, and their paths, in the order of their ends.

    Only imports at the left margin: what is imported within a function is rare, and what is for type checkers nothing.
    """
    begun: set[str] = set()
    ended: list[tuple[str, str]] = []

    def run(name: str) -> None:
        stem = name.replace(".", "/")
        path = next((path for path in (f"{stem}.py", f"{stem}/__init__.py") if path in code), None)
        if path is None or name in begun:
            return
        begun.add(name)
        if "." in name:
            run(name.rpartition(".")[0])
        for node in ast.parse(code[path], path).body:
            if isinstance(node, ast.ImportFrom) and node.module:
                run(node.module)
                for alias in node.names:
                    run(f"{node.module}.{alias.name}")
            elif isinstance(node, ast.Import):
                for alias in node.names:
                    run(alias.name)
        ended.append((name, path))

    run(name)
    return ended


def stage(
    directory: str,
    packages: Mapping[str, str],
    settings: Mapping[str, object],
    *,
    python: str,
    version: str,
    configuration: str,
) -> Callable[[], None]:
    """Put a new version of the code into `directory` and switch the launcher to it; return how to undo that.

    Older versions stay until `remove_stale`, since stubs that started before the switch may still import from them.
    Raises InstallError or OSError; then everything is as it was.
    """
    launcher = os.path.join(directory, LAUNCHER)
    _refuse_insecure(directory)
    with contextlib.ExitStack() as undo:
        for made in make_directories(directory):
            undo.callback(remove_empty, made)
        # Again: below a sticky directory, somebody may have been faster with a name that was free.
        _refuse_insecure(directory)
        temporary = os.path.join(directory, f"{UNFINISHED}{os.getpid()}")
        shutil.rmtree(temporary, ignore_errors=True)
        undo.callback(shutil.rmtree, temporary, ignore_errors=True)
        facts = {"version": version, "python": python, "configuration": configuration}
        manifest = _fill(temporary, packages, facts)
        # A nanosecond of its time is in the manifest, so the name is always a new one.
        library = os.path.join(directory, LIBRARY + _digest(manifest))
        os.rename(temporary, library)
        undo.callback(shutil.rmtree, library, ignore_errors=True)
        before = read_trusted(launcher)
        # Its fsync of the directory also carries the library's rename.
        write_atomically(launcher, launcher_text(library, settings))
        undo.callback(replace_or_remove, launcher, before)
        done = undo.pop_all()
    return done.close


def read_staged(directory: str) -> Staged:
    """Return what the launcher in `directory` starts, after checking every byte of it. Raises DamagedError."""
    launcher = os.path.join(directory, LAUNCHER)
    text = _read(launcher)
    found = re.search(r"^LIBRARY = (.+)\nSETTINGS = (.+)$", text.decode(errors="replace"), re.MULTILINE)
    try:
        library, settings = (ast.literal_eval(literal) for literal in found.groups()) if found else (None, None)
    except (ValueError, SyntaxError):
        library = None
    if not isinstance(library, str) or not isinstance(settings, dict) or launcher_text(library, settings) != text:
        raise DamagedError(f"{launcher} is not as it was installed")
    manifest = _read(os.path.join(library, MANIFEST))
    if os.path.basename(library) != LIBRARY + _digest(manifest):
        raise DamagedError(f"{library}/{MANIFEST} is not as it was installed")
    # The digest vouches for what is in it.
    facts: dict[str, Any] = json.loads(manifest)
    hashes: dict[str, str] = facts["files"]
    there = {name for name in _files(library) if name != MANIFEST}
    for name in sorted(there | set(hashes)):
        if name not in there:
            raise DamagedError(f"{library}/{name} is missing")
        if name not in hashes:
            raise DamagedError(f"{library}/{name} was added")
        if hashlib.sha256(_read(os.path.join(library, name))).hexdigest() != hashes[name]:
            raise DamagedError(f"{library}/{name} is not as it was installed")
    return Staged(
        library=library,
        settings=settings,
        version=facts["version"],
        python=facts["python"],
        python_file=facts["python_file"],
        configuration=facts["configuration"],
        hashes=hashes,
    )


def remove_stale(directory: str) -> bool:
    """Remove the versions that the launcher does not start, unless a stub is running; return whether it did.

    A stub imports what is rare only when it needs it, from the version that it started with. The switch is made before
    this looks: a stub that starts later reads the new launcher, and one that read the old one is seen here.
    """
    if running_stubs(directory):
        return False
    current = read_staged(directory).library
    for name in os.listdir(directory):
        path = os.path.join(directory, name)
        if path != current and name.startswith((LIBRARY, UNFINISHED)):
            shutil.rmtree(path, ignore_errors=True)
    return True


def remove_all(directory: str) -> None:
    """Remove the launcher and every version of the code, and nothing else that may be in the directory."""
    replace_or_remove(os.path.join(directory, LAUNCHER), None)
    for name in os.listdir(directory):
        if name.startswith((LIBRARY, UNFINISHED)):
            shutil.rmtree(os.path.join(directory, name))
    remove_empty(directory)


def running_stubs(directory: str) -> set[int]:
    """Return the pids of root's processes that were started through the launcher in `directory`."""
    launcher = os.path.join(directory, LAUNCHER).encode()
    found = set()
    for name in os.listdir("/proc"):
        if name.isdigit():
            # It may end at any moment: ENOENT or ESRCH.
            with contextlib.suppress(OSError):
                if os.stat(f"/proc/{name}").st_uid == 0:
                    with open(f"/proc/{name}/cmdline", "rb") as file:
                        if launcher in file.read(4096).split(b"\0")[:4]:
                            found.add(int(name))
    return found - {os.getpid()}


def wait_for_stubs(directory: str, seconds: float) -> bool:
    """Wait until no stub of `directory` runs, at most that long; return whether none does.

    To be called when core_pattern names another handler already.
    """
    deadline = time.monotonic() + seconds
    # A helper that the kernel has decided to start is not to be seen before its execve, some milliseconds later.
    time.sleep(min(0.1, seconds))
    while running_stubs(directory):
        if time.monotonic() >= deadline:
            return False
        time.sleep(0.05)
    return True


def interpreter() -> str:
    """Return the Python that core_pattern names: this one's base, under the shortest lasting name it has.

    Not a virtual environment's: looking for pyvenv.cfg costs start-up time at every crash, and environments go away.
    /usr/bin/python3 rather than python3.11: it is shorter, and it is still there after the distribution's upgrade.
    """
    base = getattr(sys, "_base_executable", "") or sys.executable
    directories = ("/usr/bin", "/usr/local/bin", os.path.dirname(base))
    for name in [f"{directory}/{name}" for directory in directories for name in ("python3", PYTHON)]:
        with contextlib.suppress(OSError):
            if os.path.samefile(name, base):
                return name
    return str(base)


def _refuse_insecure(directory: str) -> None:
    if reason := insecure(directory):
        raise InstallError(
            f"the stub's code cannot go to {directory}, since root runs it at every crash: {reason}",
            "give what is named to root, writable by root only",
        )


def _fill(directory: str, packages: Mapping[str, str], facts: Mapping[str, str]) -> bytes:
    """Write one version of the code, sources and compiled, and its manifest into a new directory; return the latter."""
    os.mkdir(directory)
    os.chmod(directory, DIRECTORY_MODE)
    code = sources(packages)
    for name, source in code.items():
        path = os.path.join(directory, name)
        make_directories(os.path.dirname(path))
        _write(path, source)
        # Compiled now, since with -B the crash path never writes. "Unchecked" (PEP 552): nothing compares a source's
        # time or hash with what was compiled of it. The sources stay beside it: when the interpreter is upgraded, the
        # compiled files do not fit any more, and a slower stub is better than none.
        try:
            compiled = py_compile.compile(
                path,
                dfile=name,
                doraise=True,
                optimize=0,
                invalidation_mode=py_compile.PycInvalidationMode.UNCHECKED_HASH,
            )
        except py_compile.PyCompileError as error:
            raise InstallError(
                f"{name} of this package does not compile ({error})", "install the package anew"
            ) from error
        os.chmod(os.path.dirname(str(compiled)), DIRECTORY_MODE)
        os.chmod(str(compiled), FILE_MODE)
        _sync(str(compiled))
    _write(os.path.join(directory, ROAD), road(code))
    hashes = {name: hashlib.sha256(_read(os.path.join(directory, name))).hexdigest() for name in _files(directory)}
    manifest = {
        **facts,
        "python_file": os.path.realpath(facts["python"]),
        "staged": time.time_ns(),
        "files": hashes,
    }
    contents = json.dumps(manifest, indent=1, sort_keys=True).encode()
    _write(os.path.join(directory, MANIFEST), contents)
    for at, _, _ in os.walk(directory):
        _sync(at)
    return contents


def _files(directory: str) -> Iterator[str]:
    for at, _, files in os.walk(directory):
        for file in files:
            yield os.path.relpath(os.path.join(at, file), directory)


def _read(path: str) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read()
    except OSError as error:
        raise DamagedError(f"{path} cannot be read ({error.strerror})") from error


def _digest(manifest: bytes) -> str:
    # 64 bits: this is against accidents; whoever can write here is root.
    return hashlib.sha256(manifest).hexdigest()[:16]


def _write(path: str, contents: bytes) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, FILE_MODE)
    with open(fd, "wb") as file:
        os.fchmod(fd, FILE_MODE)
        file.write(contents)
        file.flush()
        os.fsync(fd)


def _sync(path: str) -> None:
    """Bring a file, or a directory's names, to the disk."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
