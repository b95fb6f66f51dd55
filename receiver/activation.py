"""The sockets that systemd passes, or our own."""

from __future__ import annotations

import os
import socket
import stat

SD_LISTEN_FDS_START = 3


class ActivationError(Exception):
    """There is no socket to serve. The text is a fact and what to do."""


def passed() -> list[socket.socket]:
    """Return the sockets that systemd passed (sd_listen_fds(3)), none when it passed none.

    Raises ActivationError when one is not a unix stream socket.
    """
    # systemd-python costs 5 ms; no variable, no descriptors.
    if "LISTEN_FDS" not in os.environ:
        return []
    from systemd import daemon  # noqa: PLC0415

    descriptors = daemon.listen_fds(unset_environment=True)
    for fd in descriptors:
        os.set_inheritable(fd, False)
        if not daemon.is_socket_unix(fd, socket.SOCK_STREAM):
            raise ActivationError(
                f"descriptor {fd} from systemd is not a unix stream socket. Use ListenStream=/run/core_pipe.socket"
            )
    # The name is systemd-python's lapse (seen with 235): children would believe that the sockets are theirs.
    os.environ.pop("LISTEN_FDNAMES", None)
    return [socket.socket(fileno=fd) for fd in descriptors]


def tell_systemd(state: str) -> None:
    """Say `READY=1` and the like (sd_notify(3)); nothing where nobody listens."""
    if "NOTIFY_SOCKET" in os.environ:
        from systemd import daemon  # noqa: PLC0415 - as above

        daemon.notify(state)


def is_listening(sock: socket.socket) -> bool:
    """Whether connections come through it (Accept=no), or it is one (Accept=yes)."""
    return bool(sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN))


def listen(path: str, backlog: int) -> socket.socket:
    """Return a socket of our own at `path`, mode 0600. Raises ActivationError.

    A socket that stands there with nobody behind it is replaced: a resident receiver that was killed leaves one.
    """
    try:
        found = os.lstat(path)
        if not stat.S_ISSOCK(found.st_mode):
            raise ActivationError(f"{path}: is not a socket. Remove it, or name another path with --listen")
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
            probe.setblocking(False)
            try:
                probe.connect(path)
            except ConnectionRefusedError:
                os.unlink(path)
            except OSError:
                # EAGAIN: its queue is full, so somebody has it.
                raise ActivationError(f"{path}: another receiver listens there. Stop it first") from None
            else:
                raise ActivationError(f"{path}: another receiver listens there. Stop it first")
    except FileNotFoundError:
        pass
    except OSError as error:
        raise _cannot_listen(path, error) from None
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        # Not chmod afterwards: between bind(2) and it anybody could connect.
        mask = os.umask(0o177)
        try:
            sock.bind(path)
        finally:
            os.umask(mask)
        sock.listen(backlog)
    except OSError as error:
        sock.close()
        raise _cannot_listen(path, error) from None
    return sock


def _cannot_listen(path: str, error: OSError) -> ActivationError:
    # A path that is too long has no errno.
    return ActivationError(f"{path}: cannot listen there ({error.strerror or error}). Is its directory there?")
