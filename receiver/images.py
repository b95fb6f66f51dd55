"""The receiver's units in an image's tree, or in the running system: install, enable, and take away again.

An image's tree is somebody else's. Nothing in it is trusted: every directory below the root is opened from its parent
by a descriptor, links are refused instead of followed, and files appear whole or not at all.

The units go to /etc/systemd/system and not to /usr/lib: an administrator looks there, packages do not own it, it is a
directory in every image (/lib is a link in merged ones), and it can be written where /usr cannot.
"""

from __future__ import annotations

import errno
import os
import secrets
import shutil
import stat
import subprocess
import sys
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from collections.abc import Iterator

_UNITS = "etc/systemd/system"
# Tells of crashes, in a container as on the host.
_NOTIFY = "core_pipe-notify.path"
_NOTIFY_SERVICE = "core_pipe-notify.service"
# Before anybody's drop-in by name, also before the override.conf that `systemctl edit` makes.
_SANDBOX = "10-sandbox.conf"
# In the source the folder's name is a prefix, so that systemd finds it for each of our services (systemd.unit(5)).
_SANDBOX_SOURCE = f"core_pipe-.service.d/{_SANDBOX}"
_ACCEPT_NO = "10-accept-no.conf"

# Made here, because the units' sandbox cannot make it: tmpfiles.d does only at the next boot.
_STORE = "var/lib/core_pipe"

_PROGRAM = "core-pipe-receiver"
# As the units in the source have it.
_DEFAULT_PROGRAM = f"/usr/bin/{_PROGRAM}"
_PROGRAM_PLACES = (f"/usr/local/bin/{_PROGRAM}", _DEFAULT_PROGRAM)
# What ProtectHome= hides.
_HOMES = ("/home", "/root", "/run/user")
_TEMPORARY = ("/tmp", "/var/tmp")  # noqa: S108 - compared with, not written to
_PATH_CHARACTERS = frozenset("/abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._-+~")
_MAX_LINKS = 40  # as the kernel's


class ImageError(Exception):
    """The units cannot be installed or removed. The text is a fact, then what to do."""


def install(root: str = "/", *, accept: bool = True, host: bool = False, program: str | None = None) -> list[str]:
    """Put the units into the tree at `root` and enable the socket. Returns what was done, line by line.

    accept: True for a process per crash (Accept=yes), False for one service that forks; the other form is removed.
    host: the host's own receiver (always one service) instead of a container's; the two do not touch each other.
    program: the receiver's absolute path as seen inside the tree; found when None.

    When `root` is the running system's and systemd is its init, the units are loaded and the socket is started.

    Raises ImageError; what was written before stays, and installing again completes it.
    """
    socket_unit = "core_pipe-host.socket" if host else "core_pipe-forward.socket"
    with _Tree(root) as tree:
        program, warnings = _find_program(tree, program)
        said = []
        wanted = {path: _prepared(source, program, tree) for path, source in _files(accept=accept, host=host).items()}
        surplus = [] if host else sorted(_files(accept=not accept, host=False).keys() - wanted.keys())
        fresh = [path for path, data in wanted.items() if tree.read(path) != data]
        surplus = [path for path in surplus if tree.read(path) is not None]
        live = tree.is_running_system
        if live and (fresh or surplus):
            # With the files it was started from: they say how long a running write may take.
            _stop(socket_unit)
            _stop(_NOTIFY)
        for path, data in wanted.items():
            if path in fresh:
                tree.write(path, data)
            said.append(f"{'written' if path in fresh else 'unchanged'}: {tree.shown(path)}")
        for path in surplus:
            tree.remove(path)
            said.append(f"removed: {tree.shown(path)} (the other form of Accept=)")
        for unit in (socket_unit, _NOTIFY):
            linked = tree.link(_link_of(unit), f"/{_UNITS}/{unit}")
            said.append(f"{'enabled' if linked else 'already enabled'}: {unit}")
        try:
            if tree.make_directory(_STORE):
                said.append(f"made: {tree.shown(_STORE)}")
        except ImageError as error:
            # Perhaps somebody has reasons for a link there; the receiver says what does not work.
            warnings.append(f"warning: {error}")
        if live:
            if fresh or surplus:
                _systemctl("daemon-reload")
            said += [*_start(_NOTIFY), *_start(socket_unit)]
        elif not any(tree.find(f"{directory}/systemd/systemd") for directory in ("/usr/lib", "/lib")):
            warnings.append(
                f"warning: there is no systemd in {root}, so nothing reads these units. Start the receiver as a "
                f"resident process there: {program} --listen /run/core_pipe.socket"
            )
        else:
            said.append(f"{socket_unit} listens from the next boot on.")
    return said + warnings


def uninstall(root: str = "/") -> list[str]:
    """Take the units of every form out of the tree at `root`. Returns what was done, line by line.

    Cores and settings stay. Raises ImageError.
    """
    said: list[str] = []
    paths = sorted({p for accept in (True, False) for host in (True, False) for p in _files(accept=accept, host=host)})
    enabled = ("core_pipe-forward.socket", "core_pipe-host.socket", _NOTIFY)
    with _Tree(root) as tree:
        live = tree.is_running_system
        for name in enabled:
            if live and tree.read(f"{_UNITS}/{name}") is not None:
                _stop(name)
            if tree.unlink(_link_of(name)):
                # As systemctl disable does: the directory may be there only because of our link.
                tree.remove_empty(os.path.dirname(_link_of(name)))
                said.append(f"disabled: {name}")
        for path in paths:
            if tree.read(path) is not None:
                tree.remove(path)
                said.append(f"removed: {tree.shown(path)}")
        if live and said:
            _systemctl("daemon-reload")
    if not said:
        return [f"nothing of core_pipe is installed in {root}."]
    return [*said, "The cores in the store stay."]


def _files(*, accept: bool, host: bool) -> dict[str, str]:
    """Return the source's name by the path in the tree."""
    if host:
        socket_unit, service = "core_pipe-host.socket", "core_pipe-host.service"
    elif accept:
        socket_unit, service = "core_pipe-forward.socket", "core_pipe-forward@.service"
    else:
        socket_unit, service = "core_pipe-forward.socket", "core_pipe-forward.service"
    files = {
        f"{_UNITS}/{socket_unit}": socket_unit,
        f"{_UNITS}/{service}": service,
        f"{_UNITS}/{service}.d/{_SANDBOX}": _SANDBOX_SOURCE,
        f"{_UNITS}/{_NOTIFY}": _NOTIFY,
        f"{_UNITS}/{_NOTIFY_SERVICE}": _NOTIFY_SERVICE,
        "etc/tmpfiles.d/core_pipe.conf": "tmpfiles.d/core_pipe.conf",
    }
    if not host and not accept:
        files[f"{_UNITS}/{socket_unit}.d/{_ACCEPT_NO}"] = "accept-no.conf"
    return files


def _link_of(unit: str) -> str:
    """Return the link that enables a unit."""
    return f"{_UNITS}/{unit.rpartition('.')[2]}s.target.wants/{unit}"


def _source(name: str) -> str:
    """Return the text of a unit file of ours: in the wheel beside this module, in a source tree beside the package."""
    here = os.path.dirname(os.path.abspath(__file__))
    for directory in (os.path.join(here, "units"), os.path.join(os.path.dirname(here), "systemd")):
        try:
            with open(os.path.join(directory, name), encoding="utf-8") as file:
                return file.read()
        except FileNotFoundError:
            continue
    raise ImageError(f"{name} did not come with this installation of core_pipe. Install the package again")


def _prepared(name: str, program: str, tree: _Tree) -> bytes:
    """Return a unit file for where the program is."""
    text = _source(name)
    if name.endswith(".service"):
        rest = " notify" if name == _NOTIFY_SERVICE else ""
        text = _replaced(text, f"ExecStart={_DEFAULT_PROGRAM}{rest}", f"ExecStart={program}{rest}")
    if name in (_SANDBOX_SOURCE, _NOTIFY_SERVICE):
        places = _places(tree, program)
        if _below(places, _HOMES):
            because = "# Not yes: the program itself is in one of the directories that this would hide.\n"
            text = _replaced(text, "ProtectHome=yes", because + "ProtectHome=read-only")
        if _below(places, _TEMPORARY):
            line = "PrivateTmp=yes" if name == _NOTIFY_SERVICE else "InaccessiblePaths=-/tmp -/var/tmp"
            text = _replaced(text, line, f"# No {line}: the program itself is there.")
    return text.encode()


def _replaced(text: str, line: str, by: str) -> str:
    if text.count(f"\n{line}\n") != 1:
        raise ImageError(f"the unit files have no line '{line}'. Install the package again")
    return text.replace(f"\n{line}\n", f"\n{by}\n")


def _below(paths: list[str], directories: tuple[str, ...]) -> bool:
    return any(path.startswith(directory + "/") for path in paths for directory in directories)


def _find_program(tree: _Tree, program: str | None) -> tuple[str, list[str]]:
    """Return the receiver's path as seen in the tree, and a warning when it is not there. Raises ImageError."""
    if program is None:
        places: tuple[str, ...] = _PROGRAM_PLACES
        # What runs here is the best guess on the running system, and the last for a tree. sudo's PATH has no
        # environment's directory.
        own = os.path.join(os.path.dirname(sys.executable), _PROGRAM)
        found = own if os.path.exists(own) else shutil.which(_PROGRAM)
        if found is not None:
            own = os.path.abspath(found)
            places = (own, *places) if tree.is_root else (*places, own)
        program = next((place for place in places if tree.find(place)), _DEFAULT_PROGRAM)
    if not program.startswith("/") or not _PATH_CHARACTERS.issuperset(program):
        raise ImageError(
            f"{program!a} cannot stand in a unit file. "
            "With --program, name an absolute path of letters, digits and ._-+~"
        )
    if tree.find(program):
        return program, []
    warning = (
        f"warning: there is no {tree.shown(program[1:])}. Install core_pipe into the image, "
        "or name the program's place there with --program"
    )
    return program, [warning]


def _places(tree: _Tree, program: str) -> list[str]:
    """Return every path that running the program goes through, as far as can be seen: links, and its interpreter."""
    places = [program, *tree.find(program)]
    interpreter = tree.interpreter(places[-1])
    if interpreter is not None:
        # Not only its target: an environment's settings and packages are beside the link.
        places += [interpreter, *tree.find(interpreter)]
    if tree.is_root:
        # An editable installation has the code somewhere else.
        places.append(os.path.abspath(__file__))
    return places


def _systemctl(*arguments: str) -> str:
    """Run systemctl. Returns what it printed. Raises ImageError."""
    command = shutil.which("systemctl")
    if command is None:
        raise ImageError("systemctl is not in PATH. Run it yourself: systemctl " + " ".join(arguments))
    done = subprocess.run([command, *arguments], capture_output=True, text=True, check=False)  # noqa: S603
    if done.returncode:
        raise ImageError(
            f"systemctl {' '.join(arguments)} failed: {done.stderr.strip()}. See journalctl -xe; then install again"
        )
    return done.stdout


def _stop(unit: str) -> None:
    """Stop a unit and its service; with a socket, that waits for the cores that are being written."""
    both = [unit, unit.rpartition(".")[0] + ".service"]
    # A name that systemd does not know is no error to `show`, but is one to `stop`.
    for name in both:
        if "ActiveState=inactive" not in _systemctl("show", "--property=ActiveState", name):
            _systemctl("stop", name)


def _start(unit: str) -> list[str]:
    _systemctl("start", unit)
    if "ActiveState=active" in _systemctl("show", "--property=ActiveState", unit):
        return [f"started: {unit}"]
    # An unmet condition is no failure to systemctl.
    meant = "the host" if unit == "core_pipe-host.socket" else "a container (for a host: install --host)"
    why = "" if unit == _NOTIFY else f": it starts only in {meant}"
    return [f"warning: {unit} is not running{why}. See systemctl status {unit}"]


class _Tree:
    """A directory tree, and the only way in which this module touches it. Owns a descriptor of its root.

    Paths are relative to the root, except where "as seen inside" is said: those begin with a slash.
    """

    def __init__(self, root: str) -> None:
        """Raise ImageError when there is no such directory. A link as the root is the caller's own word."""
        self._root = os.path.abspath(root)
        try:
            self._fd = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError as error:
            raise ImageError(
                f"{root}: {error.strerror}. Name the directory that holds the image's root file system"
            ) from None
        self.is_root = os.path.samestat(os.fstat(self._fd), os.stat("/"))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._fd)

    @property
    def is_running_system(self) -> bool:
        # sd_booted(3)
        return self.is_root and os.path.isdir("/run/systemd/system")

    def shown(self, path: str) -> str:
        return os.path.join(self._root, path)

    @contextmanager
    def _directory(self, path: str, *, create: bool = False) -> Iterator[int]:
        """Lend a descriptor of a directory. Raises FileNotFoundError when it is missing, ImageError for all else."""
        with ExitStack() as stack:
            at = self._fd
            done = ""
            for name in path.split("/"):
                done = os.path.join(done, name)
                try:
                    at = self._descend(at, name, create=create)
                except FileNotFoundError:
                    raise
                except OSError as error:
                    raise self._blocked(at, name, done, error) from None
                stack.callback(os.close, at)
            yield at

    @staticmethod
    def _descend(at: int, name: str, *, create: bool) -> int:
        flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
        try:
            return os.open(name, flags, dir_fd=at)
        except FileNotFoundError:
            if not create:
                raise
        os.mkdir(name, 0o755, dir_fd=at)
        fd = os.open(name, flags, dir_fd=at)
        # The caller's umask is not the image's.
        os.fchmod(fd, 0o755)
        return fd

    def _blocked(self, at: int, name: str, path: str, error: OSError) -> ImageError:
        """Say why a component cannot be used: O_DIRECTORY|O_NOFOLLOW has ENOTDIR for a link, too."""
        try:
            found = os.stat(name, dir_fd=at, follow_symlinks=False)
        except OSError:
            found = None
        if found is not None and stat.S_ISLNK(found.st_mode):
            return ImageError(
                f"{self.shown(path)} is a symbolic link, which could lead out of the image. "
                "Make it a directory, or run the installation inside the image"
            )
        if error.errno == errno.ENOTDIR:
            return ImageError(f"{self.shown(path)} is not a directory. Move it away")
        return ImageError(f"{self.shown(path)}: {error.strerror}. Run as root, on a tree that can be written")

    def read(self, path: str) -> bytes | None:
        """Return a file's first MiB, None when it is missing. Raises ImageError when it is anything but a file."""
        directory, name = os.path.split(path)
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
        try:
            with self._directory(directory) as at:
                # Looked at before it is opened: opening a device can have effects of its own.
                found = os.stat(name, dir_fd=at, follow_symlinks=False)
                if stat.S_ISLNK(found.st_mode):
                    raise self._link_in_the_way(os.readlink(name, dir_fd=at), path)
                if not stat.S_ISREG(found.st_mode):
                    raise ImageError(f"{self.shown(path)} is not a regular file. Move it away")
                with open(os.open(name, flags, dir_fd=at), "rb") as file:
                    return file.read(1 << 20)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise self._failed(path, error) from None

    def _link_in_the_way(self, target: str, path: str) -> ImageError:
        if target == "/dev/null":
            return ImageError(f"{self.shown(path)}: the unit is masked. Remove that link, then try again")
        return ImageError(f"{self.shown(path)} is a symbolic link. Move it away")

    def _failed(self, path: str, error: OSError) -> ImageError:
        return ImageError(f"{self.shown(path)}: {error.strerror}. Run as root, on a tree that can be written")

    def make_directory(self, path: str) -> bool:
        """Make a directory, mode 0755; returns False when it is there. Raises ImageError."""
        try:
            with self._directory(path):
                return False
        except FileNotFoundError:
            with self._directory(path, create=True):
                return True

    def write(self, path: str, data: bytes) -> None:
        """Write a file, mode 0644, whole or not at all. Raises ImageError."""
        directory, name = os.path.split(path)
        temporary = f".{name}.{secrets.token_hex(8)}"
        try:
            with self._directory(directory, create=True) as at:
                fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600, dir_fd=at)
                try:
                    with open(fd, "wb") as file:
                        file.write(data)
                        file.flush()
                        os.fchmod(fd, 0o644)
                        os.fsync(fd)
                    # Replaces a link that appears just now, and does not follow it.
                    os.rename(temporary, name, src_dir_fd=at, dst_dir_fd=at)
                except BaseException:
                    os.unlink(temporary, dir_fd=at)
                    raise
        except OSError as error:
            raise self._failed(path, error) from None

    def link(self, path: str, target: str) -> bool:
        """Make a symbolic link. Returns False when something of that name is there. Raises ImageError."""
        directory, name = os.path.split(path)
        try:
            with self._directory(directory, create=True) as at:
                os.symlink(target, name, dir_fd=at)
        except FileExistsError:
            # systemd takes the name in a .wants directory, whatever the link says.
            return False
        except OSError as error:
            raise self._failed(path, error) from None
        return True

    def unlink(self, path: str) -> bool:
        """Remove a file or a link itself; returns False when it is not there. Raises ImageError."""
        directory, name = os.path.split(path)
        try:
            with self._directory(directory) as at:
                os.unlink(name, dir_fd=at)
        except FileNotFoundError:
            return False
        except OSError as error:
            raise self._failed(path, error) from None
        return True

    def remove(self, path: str) -> None:
        """Remove a file, and the directory of drop-ins that it leaves empty. Raises ImageError."""
        self.unlink(path)
        directory = os.path.dirname(path)
        name = os.path.basename(directory)
        if name.startswith("core_pipe-") and name.endswith(".d"):
            self.remove_empty(directory)

    def remove_empty(self, path: str) -> None:
        """Remove a directory when nothing is in it: somebody's own drop-ins or links may be. Raises ImageError."""
        above, name = os.path.split(path)
        try:
            with self._directory(above) as at:
                os.rmdir(name, dir_fd=at)
        except OSError:
            pass

    def find(self, path: str) -> list[str]:
        """Return the paths that an existing file's path goes through, as seen inside; the last is the file itself.

        Empty when it does not exist. Links are followed as inside the tree, and nothing is opened: this answers where
        things are, and no more.
        """
        through = [path]
        left = [part for part in path.split("/") if part]
        done: list[str] = []
        links = 0
        while left:
            part = left.pop(0)
            if part in (".", ".."):
                del done[-1 if part == ".." else len(done) :]
                continue
            here = os.path.join(self._root, *done, part)
            try:
                target = os.readlink(here)
            except OSError as error:
                if error.errno != errno.EINVAL:
                    return []
                done.append(part)  # not a link
                continue
            links += 1
            if links > _MAX_LINKS:
                return []
            if target.startswith("/"):
                done = []
            left = [piece for piece in target.split("/") if piece] + left
            through.append("/" + "/".join([*done, *left]))
        return [*through, "/" + "/".join(done)]

    def interpreter(self, path: str) -> str | None:
        """Return what a script's first line names; None when it cannot be told. Both paths as seen inside."""
        try:
            data = self.read(path[1:])
        except ImageError:
            data = None
        if data is None or not data.startswith(b"#!"):
            return None
        words = os.fsdecode(data[2:256].split(b"\n", 1)[0]).split()
        return words[0] if words and words[0].startswith("/") else None
