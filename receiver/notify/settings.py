"""The tables `[[notify]]` of the settings, as callbacks.

Looked at by the deliverer, and not when a crash is taken: a mistake in here must not cost a core.
"""

from __future__ import annotations

import signal
from typing import TYPE_CHECKING, Any, NamedTuple

from receiver.config import ConfigError, Problem, duration, nearest, shown

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from receiver.config import Config

MOST = 32  # callbacks: each has a process of its own while it is told something
_MAX_TEXT = 4096
_MAX_WORDS = 64
_MAX_RULES = 256
_MAX_TIMEOUT = 3600
_MAX_QUEUE = 100_000
_MAX_EVERY = 1_000_000
_SUN_PATH = 107  # unix(7), without the final NUL
_NAME = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._-")
# RFC 9110, 5.6.2
_TOKEN = frozenset("!#$%&'*+-.^_`|~0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ")
_OURS = ("content-length", "content-type", "transfer-encoding", "host", "connection")
STATES = ("stored", "reduced", "none")
CRASH, QUOTA = EVENTS = ("crash", "quota")


class Address(NamedTuple):
    """Where a request goes. scheme: http, https or unix. host, port: of the former two. socket: path, of the latter.

    path: of the URL. text: as it stands in the settings.
    """

    scheme: str
    host: str
    port: int
    socket: str
    path: str
    text: str


class Header(NamedTuple):
    """A header of a request. The value is in the settings, or is what comes after `prefix` in a file."""

    name: str
    value: str
    file: str | None = None


class Filter(NamedTuple):
    """Which crashes are told; an empty one is no condition. first, every: of the same bug. exe: shell patterns."""

    first: bool = False
    every: int = 0
    signal: frozenset[int] = frozenset()
    exe: tuple[str, ...] = ()
    state: frozenset[str] = frozenset()


class Callback(NamedTuple):
    """Who is told, and how. Either `run` (program and arguments) or `post` is there. timeout: seconds.

    events: what it is told of, words of EVENTS. when: which crashes.
    """

    name: str
    run: tuple[str, ...] = ()
    post: Address | None = None
    headers: tuple[Header, ...] = ()
    ca: str | None = None
    timeout: float = 10.0
    user: str = "nobody"
    full: bool = False
    queue_max: int = 1000
    events: frozenset[str] = frozenset({CRASH})
    when: Filter = Filter()

    @property
    def target(self) -> str:
        """Whom it tells, as one word or more."""
        return self.post.text if self.post else " ".join(self.run)


class Key(NamedTuple):
    """One row of the tables below: what is read, explained and documented. parse: raises ValueError as a Setting's."""

    name: str
    default: str
    parse: Callable[[Any], Any]
    allowed: str
    meaning: str


def _text(value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise ValueError("is no text")
    if len(value) > _MAX_TEXT or "\0" in value:
        raise ValueError("is no text that can be used")
    return value


def _name(value: Any) -> str:
    if not isinstance(value, str) or not value or len(value) > 64 or not _NAME.issuperset(value):
        raise ValueError("is no name")
    return value


def _path(value: Any) -> str:
    if not _text(value).startswith("/"):
        raise ValueError("is not an absolute path")
    return str(value)


def _words(value: Any) -> tuple[str, ...]:
    if not isinstance(value, list) or not value or len(value) > _MAX_WORDS:
        raise ValueError("is no list of a program and its arguments")
    if not all(isinstance(word, str) and len(word) <= _MAX_TEXT and "\0" not in word for word in value):
        raise ValueError("has a word that cannot be an argument")
    if not value[0].startswith("/"):
        raise ValueError("does not begin with an absolute path")
    return tuple(value)


def _visible(text: str) -> bool:
    return all("!" <= c <= "~" for c in text)


def _address(value: Any) -> Address:
    """Return where a URL leads. By hand: urllib.parse takes more than is meant, and no unix sockets."""
    text = _text(value)
    if not _visible(text):
        raise ValueError("has characters that belong escaped (%20)")
    if text.startswith("unix:"):
        path, colon, below = text.removeprefix("unix:").partition(":")
        if not path.startswith("/") or len(path) > _SUN_PATH or (colon and not below.startswith("/")):
            raise ValueError("is not the absolute path of a socket, and perhaps a colon and a path after that")
        return Address("unix", "", 0, path, below or "/", text)
    scheme, separator, rest = text.partition("://")
    if not separator or scheme not in ("http", "https"):
        raise ValueError("begins with none of http://, https:// and unix:/")
    end = min((at for at in (rest.find(c) for c in "/?#") if at >= 0), default=len(rest))
    authority, path = rest[:end], rest[end:].partition("#")[0]
    if "@" in authority:
        raise ValueError("has a password or a user in it, which belong into a header from a file")
    if authority.startswith("["):
        host, bracket, port = authority[1:].partition("]")
        if not bracket or (port and not port.startswith(":")):
            raise ValueError("has no host that can be told")
        port = port[1:]
    else:
        host, _, port = authority.partition(":")
    if not host or len(host) > 255 or (port and not (port.isascii() and port.isdigit() and 0 < int(port[:6]) < 65536)):
        raise ValueError("has no host and port that can be told")
    number = int(port) if port else (443 if scheme == "https" else 80)
    return Address(scheme, host, number, "", path if path.startswith("/") else f"/{path}", text)


def _value(text: str) -> str:
    # What a line of a request may have (RFC 9110, 5.5): nothing that begins a new one.
    if len(text) > _MAX_TEXT or not all(" " <= c <= "~" or c == "\t" for c in text):
        raise ValueError("has a value that no header can have")
    return text


def _header(name: str, value: Any) -> Header:
    if not name or len(name) > 256 or not _TOKEN.issuperset(name) or name.lower() in _OURS:
        raise ValueError("has a name that is none, or that is not for you to set")
    if isinstance(value, str):
        return Header(name, _value(value))
    if isinstance(value, dict) and value.keys() <= {"file", "prefix"} and "file" in value:
        prefix = value.get("prefix", "")
        if isinstance(prefix, str):
            return Header(name, _value(prefix), _path(value["file"]))
    raise ValueError("has a value that is neither a text nor {file = PATH, prefix = TEXT}")


def _headers(value: Any) -> tuple[Header, ...]:
    if not isinstance(value, dict) or len(value) > _MAX_WORDS:
        raise ValueError("is no table of names and values")
    return tuple(_header(name, content) for name, content in value.items())


def _seconds(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise ValueError("is not a duration")
    seconds = duration(str(value))
    if seconds > _MAX_TIMEOUT:
        raise ValueError("is out of range")
    return seconds


def _switch(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError("is neither true nor false")
    return value


def _whole(least: int, most: int) -> Callable[[Any], int]:
    def parse(value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, int):
            raise ValueError("is not a whole number")
        if not least <= value <= most:
            raise ValueError("is out of range")
        return value

    return parse


def _list(value: Any) -> list[Any]:
    found = value if isinstance(value, list) else [value]
    if not found or len(found) > _MAX_RULES:
        raise ValueError("is no list of conditions")
    return found


def _signal(value: Any) -> int:
    if isinstance(value, str):
        name = value.upper()
        known = signal.Signals.__members__.get(name if name.startswith("SIG") else f"SIG{name}")
        if known is not None:
            return int(known)
    elif isinstance(value, int) and not isinstance(value, bool) and 0 < value <= 64:
        return value
    raise ValueError("has a signal that is none")


def _signals(value: Any) -> frozenset[int]:
    return frozenset(_signal(item) for item in _list(value))


def _patterns(value: Any) -> tuple[str, ...]:
    return tuple(_text(item) for item in _list(value))


def _states(value: Any) -> frozenset[str]:
    found = _list(value)
    if not all(isinstance(item, str) and item in STATES for item in found):
        raise ValueError("has a state that is none")
    return frozenset(found)


def _events(value: Any) -> frozenset[str]:
    found = value if isinstance(value, list) else [value]
    if not found:
        raise ValueError("is no list of events")
    if not all(isinstance(item, str) and item in EVENTS for item in found):
        raise ValueError("has an event that is none")
    return frozenset(found)


WHEN: tuple[Key, ...] = (
    Key(
        "first",
        "false",
        _switch,
        "true or false",
        "Only the first crash of each bug (its signature and its user), as far as is remembered: a thousand bugs.",
    ),
    Key(
        "every",
        "none",
        _whole(1, _MAX_EVERY),
        f"a whole number from 1 to {_MAX_EVERY}",
        "Only every n-th crash of each bug; with `first`, the first one, too.",
    ),
    Key(
        "signal",
        "any",
        _signals,
        'a signal\'s name or number, or a list of them: ["SIGSEGV", "ABRT", 7]',
        "Only crashes by one of these signals.",
    ),
    Key(
        "exe",
        "any",
        _patterns,
        "a pattern, or a list of them",
        "Only crashes of these programs. The patterns are those of `keep_for`: for the path of the executable, its "
        "last part, or the name of the process.",
    ),
    Key(
        "state",
        "any",
        _states,
        "'stored', 'reduced', 'none', or a list of them",
        "Only crashes whose core has become this.",
    ),
)


def _when(value: Any) -> Filter:
    if not isinstance(value, dict):
        raise ValueError("is no table of conditions")
    keys = {key.name: key for key in WHEN}
    found = {}
    for name, content in value.items():
        if name not in keys:
            raise ValueError(f"has the key {shown(name)}, which is none. {nearest(name, keys)}")
        try:
            found[name] = keys[name].parse(content)
        except ValueError as error:
            raise ValueError(f"has under '{name}' what {error} (allowed: {keys[name].allowed})") from None
    return Filter(**found)


KEYS: tuple[Key, ...] = (
    Key(
        "name",
        "none",
        _name,
        "up to 64 letters, digits, dots, dashes and underscores, in no other callback",
        "What the callback is called in messages, and in what is remembered of it: another name is another callback.",
    ),
    Key(
        "run",
        "none",
        _words,
        'a list of an absolute path and arguments, such as ["/usr/local/bin/tell", "--quiet"]',
        "A program to run, without a shell, with the record as JSON on its standard input. It has been told when it "
        "ends with status 0.",
    ),
    Key(
        "post",
        "none",
        _address,
        "'http://...', 'https://...', or 'unix:/path/of/the/socket' and perhaps ':/path' of the URL",
        "Where to post the record, as a CloudEvent. It has been told when the answer is 2xx. A "
        "redirect is not followed.",
    ),
    Key(
        "headers",
        "none",
        _headers,
        'a table of names and values; a value is a text, or {file = "/path", prefix = "Bearer "}',
        "Headers of the request. A secret belongs into a file of root's, which is read at each request.",
    ),
    Key(
        "ca",
        "the system's",
        _path,
        "an absolute path",
        "The certificates that the server of an https:// URL is checked with, as PEM.",
    ),
    Key(
        "timeout",
        "10s",
        _seconds,
        "seconds, or a number with h, min or s, from 1 s to 1 h",
        "How long it may take in all. After that it is killed, with all that it has started.",
    ),
    Key(
        "user",
        "nobody",
        _text,
        "a user's name or number",
        "Who runs the program, or sends the request.",
    ),
    Key(
        "full",
        "false",
        _switch,
        "true or false",
        "Also tell the environment, the command line, and the lines of the journal: programs have secrets there.",
    ),
    Key(
        "queue_max",
        "1000",
        _whole(1, _MAX_QUEUE),
        f"a whole number from 1 to {_MAX_QUEUE}",
        "The crashes that wait for it while it fails. When there is one more, the oldest is dropped, and counted.",
    ),
    Key(
        "events",
        '["crash"]',
        _events,
        "'crash', 'quota', or a list of them",
        "What it is told of: crashes, or disk quotas that are used up, which only the host knows of.",
    ),
    Key(
        "when",
        "{}",
        _when,
        "a table of the conditions below; all of them must hold",
        "Which crashes it is told.",
    ),
)
_BY_NAME = {key.name: key for key in KEYS}


def callbacks_of(config: Config, source: str) -> tuple[Callback, ...]:
    """Return the callbacks of the settings. source: the file's path. Raises ConfigError with all that is wrong."""
    problems: list[Problem] = []
    found: list[Callback] = []
    for number, table in enumerate(config.notify, 1):
        at = f"[[notify]] {number}"
        values: dict[str, Any] = {}
        for name, value in table.items():
            key = _BY_NAME.get(name)
            if key is None:
                problem = f"there is no such key: {shown(name)}"
                problems.append(Problem(source, at, problem, nearest(name, _BY_NAME)))
                continue
            try:
                values[name] = key.parse(value)
            except ValueError as error:
                problems.append(Problem(source, f"{at}: {name}", f"{shown(value)} {error}", f"Allowed: {key.allowed}."))
        problems += _missing(source, at, table, values.get("name"), [callback.name for callback in found])
        if "when" in table and values.get("events") == {QUOTA}:
            problem = "'when' has conditions for crashes, of which it is not told"
            problems.append(Problem(source, at, problem, 'Leave it out, or have events = ["crash", "quota"].'))
        if "name" in values:
            found.append(Callback(**values))
    if len(found) > MOST:
        problems.append(Problem(source, "[[notify]]", f"there are {len(found)}", f"At most {MOST} are allowed."))
    if problems:
        raise ConfigError(problems)
    return tuple(found)


def _missing(source: str, at: str, table: dict[str, object], name: object, others: list[str]) -> Iterable[Problem]:
    """Yield what is wrong with a table as a whole."""
    if "name" not in table:
        yield Problem(source, at, "it has no name", 'Add a line such as: name = "chat"')
    elif name in others:
        yield Problem(source, at, f"there is another one of the name {shown(name)}", "Give each its own.")
    if ("run" in table) == ("post" in table):
        yield Problem(source, at, "it has not exactly one of 'run' and 'post'", "Say whom to tell: one of the two.")
    elif "run" in table and ("headers" in table or "ca" in table):
        yield Problem(source, at, "a program has neither 'headers' nor 'ca'", "Those belong to 'post'.")
