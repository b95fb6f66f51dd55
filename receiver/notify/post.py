"""A request, as the process that is made for it sends it: no privileges, and killed at its deadline.

So nothing in here counts the time: a name server that is silent, a server that sends a byte a minute, an endless head,
all end in the same way. What comes back is bounded in size, and read by nobody with a privilege.
"""

from __future__ import annotations

import http.client
import socket
import ssl
import time
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING, Any

from receiver.notify.events import CONTENT_TYPE

if TYPE_CHECKING:
    from receiver.notify.settings import Address

# Of an answer's body: as much as says what was wrong.
MAX_ANSWER = 512


class _UnixConnection(http.client.HTTPConnection):
    """HTTP over a unix socket."""

    def __init__(self, path: str, timeout: float) -> None:
        super().__init__("localhost", timeout=timeout)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._path)


def send(address: Address, body: bytes, headers: dict[str, str], ca: str | None, timeout: float) -> dict[str, Any]:
    """Post it. Returns `ok`, `text`, and `retry_after` in seconds. timeout: seconds, for each step of it."""
    try:
        connection = _connection(address, ca, timeout)
        sent = {"User-Agent": "core_pipe", "Connection": "close", **headers, "Content-Type": CONTENT_TYPE}
        connection.request("POST", address.path, body, sent)
        answer = connection.getresponse()
    except (OSError, http.client.HTTPException, ValueError) as error:
        return {"ok": False, "text": _said(error)}
    text = f"{answer.status} {answer.reason}"
    if 200 <= answer.status < 300:
        return {"ok": True, "text": text}
    if 300 <= answer.status < 400:
        text += f", a redirect to {answer.getheader('Location', 'nowhere')}, which is not followed"
        return {"ok": False, "text": text}
    try:
        first = answer.read(MAX_ANSWER).decode("utf-8", "replace").strip().partition("\n")[0]
    except (OSError, http.client.HTTPException, ValueError):
        first = ""
    return {
        "ok": False,
        "text": f"{text}: {first}" if first else text,
        "retry_after": _seconds(answer.getheader("Retry-After", "")),
    }


def _connection(address: Address, ca: str | None, timeout: float) -> http.client.HTTPConnection:
    if address.scheme == "unix":
        return _UnixConnection(address.socket, timeout)
    if address.scheme == "https":
        # Checks the certificate and the name in it.
        context = ssl.create_default_context(cafile=ca)
        return http.client.HTTPSConnection(address.host, address.port, timeout=timeout, context=context)
    return http.client.HTTPConnection(address.host, address.port, timeout=timeout)


def _said(error: Exception) -> str:
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"its certificate is not trusted: {error.verify_message}"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return f"{type(error).__name__}: {error}"


def _seconds(text: str) -> float:
    """Return what Retry-After says, a number of seconds or a date, as seconds; 0 for anything else."""
    if text.isascii() and text.isdigit():
        return float(text[:9])
    try:
        return max(0.0, parsedate_to_datetime(text).timestamp() - time.time())
    except (ValueError, TypeError, OverflowError):
        return 0.0
