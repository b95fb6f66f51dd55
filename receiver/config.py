"""The receiver's settings: a file, the environment, and what holds where neither says anything.

Import budget: with Accept=yes this module is imported for each crash. Nothing at the top but `os`: a dataclass would
cost 10 ms (it imports inspect), `re` 6, `tomllib` 14. What is rare is imported where it is needed.
"""

from __future__ import annotations

import os

TYPE_CHECKING = False  # typing's own costs 10 ms; type checkers know the name
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

DEFAULT_PATH = "/etc/core_pipe/receiver.toml"
PATH_VARIABLE = "CORE_PIPE_CONFIG"

_MAX_FILE = 65536  # bytes
_MAX_SHOWN = 20  # problems in one error: a file of rubbish must not fill the journal at each crash
_MAX_SIZE = (1 << 63) - 1  # off_t
_MAX_SECONDS = 366 * 86400.0
_MAX_AGE = 100 * _MAX_SECONDS
_MAX_RULES = 256  # of keep_for: each is tried at each crash
_UNITS = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
_TIMES = {"s": 1, "min": 60, "h": 3600, "d": 86400}

# Too much is masked rather than too little: AUTHOR is no secret, but OAUTH is. `_PWD`, as in MYSQL_PWD, and not PWD.
# Passwords within an URL have no name in common; `receiver/masking.py` finds them by their form.
_SECRETS = "PASS|_PWD|SECRET|TOKEN|KEY|CRED|AUTH|COOKIE|PRIVATE|DSN|CONNECTION_?STRING"


class Problem:
    """One thing that is wrong, and what would be right.

    source: the file's path, or "environment". key: the setting or variable, empty when the file as a whole is meant.
    remedy: a sentence; for a value, "Allowed: ...".
    """

    __slots__ = ("key", "problem", "remedy", "source")

    def __init__(self, source: str, key: str, problem: str, remedy: str) -> None:
        self.source = source
        self.key = key
        self.problem = problem
        self.remedy = remedy

    def __str__(self) -> str:
        return ": ".join(part for part in (self.source, self.key, self.problem) if part) + ". " + self.remedy


class ConfigError(ValueError):
    """The settings are wrong. `problems` has all that were found; the text has a line for each."""

    def __init__(self, problems: Iterable[Problem]) -> None:
        self.problems = tuple(problems)
        lines = [str(problem) for problem in self.problems[:_MAX_SHOWN]]
        if len(self.problems) > _MAX_SHOWN:
            lines.append(f"... and {len(self.problems) - _MAX_SHOWN} more.")
        super().__init__("\n".join(lines))


class Limit:
    """A number of bytes (or of inodes), or a share of what a file system has of them."""

    __slots__ = ("_bytes", "_thousandths")

    def __init__(self, *, size: int = 0, percent: float | None = None) -> None:
        self._bytes = size
        # Whole thousandths of a percent: a float would be wrong by whole blocks on a large file system.
        self._thousandths = None if percent is None else round(percent * 1000)

    def bytes_of(self, filesystem_total: int) -> int:
        """Return the limit in bytes on a file system of that many bytes; likewise for inodes."""
        if self._thousandths is None:
            return self._bytes
        return filesystem_total * self._thousandths // 100_000

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Limit):
            return NotImplemented
        return (self._bytes, self._thousandths) == (other._bytes, other._thousandths)

    def __hash__(self) -> int:
        return hash((self._bytes, self._thousandths))

    def __repr__(self) -> str:
        if self._thousandths is None:
            return f"Limit(size={self._bytes})"
        return f"Limit(percent={self._thousandths / 1000:g})"


class Setting:
    """One row of the table below: what is read, explained and documented comes from here alone.

    default: as one would write it. parse: text to value; raises ValueError whose text completes "'...' ".
    """

    __slots__ = ("allowed", "default", "meaning", "name", "parse")

    def __init__(self, name: str, default: str, parse: Callable[[str], object], allowed: str, meaning: str) -> None:
        self.name = name
        self.default = default
        self.parse = parse
        self.allowed = allowed
        self.meaning = meaning

    @property
    def env(self) -> str:
        return "CORE_PIPE_" + self.name.upper()


def _path(text: str) -> str:
    if not text.startswith("/") or "\0" in text or len(os.fsencode(text)) > 4095:
        raise ValueError("is not an absolute path")
    parts = [part for part in text.split("/") if part not in ("", ".")]
    if not parts or ".." in parts:
        raise ValueError("is not the path of a directory of its own")
    return "/" + "/".join(parts)


def _one_of(*words: str) -> Callable[[str], str]:
    def parse(text: str) -> str:
        if text not in words:
            raise ValueError("is none of them")
        return text

    return parse


def _whole(least: int, most: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        # isdigit() knows other scripts' digits too; the length bounds the work of int().
        if not (text.isascii() and text.isdigit()) or len(text) > 10:
            raise ValueError("is not a whole number")
        if not least <= int(text) <= most:
            raise ValueError("is out of range")
        return int(text)

    return parse


def _decimal(text: str, problem: str) -> float:
    """Return 12 or 1.5; nothing else that float() would take (nan, 1_0, 1e3). Raises ValueError(problem)."""
    whole, _, fraction = text.partition(".")
    digits = whole + fraction
    if not whole or not (digits.isascii() and digits.isdigit()) or len(digits) > 20:
        raise ValueError(problem)
    return float(text)


def _seconds(least: float) -> Callable[[str], float]:
    def parse(text: str) -> float:
        value = _decimal(text, "is not a number of seconds")
        if not least <= value <= _MAX_SECONDS:
            raise ValueError("is out of range")
        return value

    return parse


def _size(text: str) -> int:
    problem = "is not a size"
    unit = _UNITS.get(text[-1:].upper(), 1)
    number = text[:-1] if unit > 1 else text
    # Bytes are whole, and a float has no room for all of them.
    value = int(_decimal(number, problem) * unit) if "." in number and unit > 1 else _whole_size(number, problem) * unit
    if value > _MAX_SIZE:
        raise ValueError("is larger than any file")
    return value


def _whole_size(text: str, problem: str) -> int:
    if not (text.isascii() and text.isdigit()) or len(text) > 20:
        raise ValueError(problem)
    return int(text)


FACTS = (
    "command_line",
    "environment",
    "files",
    "mappings",
    "limits",
    "cgroup",
    "container",
    "package",
    "journal",
    "backtrace",
)


def _facts(text: str) -> frozenset[str]:
    words = text.split()
    if not words:
        raise ValueError("is empty; write none for none of them")
    # "-environment" alone means all but that.
    found = set(FACTS) if words[0].startswith("-") else set()
    for word in words:
        name = word.removeprefix("-")
        group = {"all": FACTS, "none": ()}.get(name, (name,))
        if not set(group) <= set(FACTS) or word == "-none":
            raise ValueError("has a word that is none of them")
        if word == "none":
            found.clear()
        elif word.startswith("-"):
            found.difference_update(group)
        else:
            found.update(group)
    return frozenset(found)


def _on_off(text: str) -> bool:
    if text not in ("on", "off"):
        raise ValueError("is neither")
    return text == "on"


def _size_or_off(text: str) -> int | None:
    return None if text == "off" else _size(text)


def _limit_or_off(text: str) -> Limit | None:
    if text == "off":
        return None
    if not text.endswith("%"):
        return Limit(size=_size(text))
    percent = _decimal(text[:-1], "is not a percentage")
    if percent > 100:
        raise ValueError("is more than the whole")
    return Limit(percent=percent)


def _inodes_or_off(text: str) -> Limit | None:
    if text == "off" or text.endswith("%"):
        return _limit_or_off(text)
    value = _whole_size(text, "is neither a whole number nor a percentage")
    if value > _MAX_SIZE:
        raise ValueError("is more than any file system has")
    return Limit(size=value)


def _textfile_or_off(text: str) -> str | None:
    if text == "off":
        return None
    # node_exporter reads no others. A newline or the like in a path is somebody's mistake.
    if not text.endswith(".prom") or not text.isprintable():
        raise ValueError("is not the path of a *.prom file")
    return _path(text)


def _whole_or_off(least: int, most: int) -> Callable[[str], int | None]:
    parse = _whole(least, most)
    return lambda text: None if text == "off" else parse(text)


def duration(text: str) -> float:
    """Return 30d, 12h, 90min, 45s or plain seconds as seconds. Raises ValueError whose text completes "'...' "."""
    number = text.rstrip("dhimns")
    unit = text[len(number) :]
    problem = "is not a duration"
    if unit and unit not in _TIMES:
        raise ValueError(problem)
    value = _decimal(number, problem) * _TIMES.get(unit, 1)
    if not 1 <= value <= _MAX_AGE:
        raise ValueError("is out of range")
    return value


def _age_or_off(text: str) -> float | None:
    return None if text == "off" else duration(text)


def _keep(text: str) -> str | int:
    if text in ("full", "stacks"):
        return text
    return _size(text)


def _keep_for(text: str) -> tuple[tuple[str, str | int], ...]:
    rules = []
    for word in () if text == "off" else text.split():
        # From the right: a pattern may have a '=' of its own, and a value has none.
        pattern, _, value = word.rpartition("=")
        if not pattern:
            raise ValueError("is no list of pattern=value")
        if "\0" in word or len(pattern) > 4096:
            raise ValueError("has a pattern that no path can match")
        try:
            rules.append((pattern, _keep(value)))
        except ValueError:
            raise ValueError("has a value that is neither 'full', 'stacks' nor a size") from None
    if len(rules) > _MAX_RULES:
        raise ValueError(f"has more than {_MAX_RULES} rules")
    return tuple(rules)


def _pattern(text: str) -> str:
    if not text:
        raise ValueError("is empty and would match every name")
    if text == _SECRETS:  # spares importing re; a test compiles it
        return text
    if len(text) > 4096:
        raise ValueError("is longer than 4096 characters")
    import re  # noqa: PLC0415  (import budget)
    import warnings  # noqa: PLC0415

    try:
        with warnings.catch_warnings():
            # "Possible nested set" and the like: the pattern works.
            warnings.simplefilter("ignore")
            re.compile(text, re.IGNORECASE)
    # Besides re.error: ValueError for flags that text cannot have, the others for monsters.
    except (re.error, ValueError, OverflowError, RecursionError, MemoryError) as error:
        raise ValueError(f"is not a regular expression: {_plain(str(error))}") from None
    return text


_SIZE_TEXT = "bytes, or a number with K, M, G or T (powers of 1024), such as 512M; 'off' for no limit"
_LIMIT_TEXT = (
    "bytes, a number with K, M, G or T (powers of 1024), such as 512M, "
    "or a percentage of the store's file system, such as 10%; 'off' for no limit"
)

_KEEP_TEXT = "'full', 'stacks', or a size: bytes, or a number with K, M, G or T (powers of 1024), such as 512M"

SETTINGS: tuple[Setting, ...] = (
    Setting(
        "store",
        "/var/lib/core_pipe",
        _path,
        "an absolute path that is not /",
        "The directory that keeps the cores. Elsewhere than the default, the service's sandbox must open it: "
        "see ReadWritePaths= in the unit's 10-sandbox.conf.",
    ),
    Setting(
        "compression",
        "zstd",
        _one_of("zstd", "none"),
        "'zstd' or 'none'",
        "How cores are stored. 'none' leaves files that every debugger opens; zero pages are holes then.",
    ),
    Setting(
        "compression_level",
        "1",
        _whole(1, 19),
        "a whole number from 1 (fastest) to 19 (smallest)",
        "zstd's level. The crashed process is held until its core is read: a slow level is a slow restart.",
    ),
    Setting(
        "compression_threads",
        "1",
        _whole(0, 8),
        "a whole number from 0 to 8",
        "The threads that compress, beside the one that reads the core. With 0 that one does both.",
    ),
    Setting(
        "core_max",
        "32G",
        _size_or_off,
        _SIZE_TEXT,
        "The largest core that is stored whole, counted before compression. A larger one is reduced: what a debugger "
        "needs most is stored, within this size, and the rest is marked absent. The soft core limit of the process "
        "(ulimit -c), when it is less, is kept to in the same way.",
    ),
    Setting(
        "keep",
        "full",
        _keep,
        _KEEP_TEXT,
        "What is kept of a core. 'stacks': every thread's registers and stack, and what names its functions, which is "
        "enough for backtraces. A size: as much as fits in it before compression, the most useful first.",
    ),
    Setting(
        "keep_for",
        "off",
        _keep_for,
        f"pattern=value, any number of them with spaces between; a value is {_KEEP_TEXT}; 'off' for none",
        "What is kept of some programs' cores, instead of what 'keep' says: 'java=512M /usr/lib/*=stacks'. The "
        "patterns are the shell's (a * matches a / too), for the path of the executable, its last part, or the name of "
        "the process; the first that matches counts.",
    ),
    Setting(
        "store_max",
        "10%",
        _limit_or_off,
        _LIMIT_TEXT,
        "The most that all cores together take up in the store, on disk. Before a new one takes more, old ones go: the "
        "oldest of the user whose cores take up most.",
    ),
    Setting(
        "user_max",
        "off",
        _limit_or_off,
        "bytes, a number with K, M, G or T (powers of 1024), such as 512M, or a percentage of store_max, such as 25% "
        "(of the store's file system when store_max is off); 'off' for no limit",
        "The most that the cores of one user (uid) take up in the store. Before a new one takes more, old ones of that "
        "user go.",
    ),
    Setting(
        "cores_max",
        "1000",
        _whole_or_off(1, 1_000_000),
        "a whole number from 1 to 1000000; 'off' for no limit",
        "The cores that are kept. Before there is one more, an old one goes, as for store_max.",
    ),
    Setting(
        "age_max",
        "off",
        _age_or_off,
        "a number with d (days), h (hours), min or s, such as 30d, or seconds; 'off' for no limit",
        "How long a core is kept. Older ones go at the next crash, or with `corepipectl prune`; their records stay.",
    ),
    Setting(
        "keep_free",
        "5%",
        _limit_or_off,
        _LIMIT_TEXT,
        "The free space that is left to others on the store's file system.",
    ),
    Setting(
        "keep_free_inodes",
        "5%",
        _inodes_or_off,
        "a whole number, or a percentage of the inodes of the store's file system, such as 10%; 'off' for no limit",
        "The free inodes (files that can still be made) that are left to others on the store's file system.",
    ),
    Setting(
        "same_max",
        "256",
        _whole_or_off(1, 600),
        "a whole number from 1 to 600; 'off' for no limit",
        "The cores that are kept of the same crash (by its signature: executable, signal, innermost functions) within "
        "same_seconds. Those after them leave a record without a core.",
    ),
    Setting(
        "same_seconds",
        "3600",
        _seconds(1),
        "seconds, from 1 to a year",
        "The time that same_max is counted in.",
    ),
    Setting(
        "loop_max",
        "512",
        _whole_or_off(1, 600),
        "a whole number from 1 to 600; 'off' for no limit",
        "The cores that are kept of one executable within loop_seconds, whatever it crashes of. Those after them leave "
        "a record without a core.",
    ),
    Setting(
        "loop_seconds",
        "600",
        _seconds(1),
        "seconds, from 1 to a year",
        "The time that loop_max is counted in.",
    ),
    Setting(
        "records_max",
        "4000",
        _whole(1, 1_000_000),
        "a whole number from 1 to 1000000",
        "The records that are kept; the oldest go, first those without a core. One has a few KiB, at most 300.",
    ),
    Setting(
        "secret_pattern",
        _SECRETS,
        _pattern,
        "a regular expression (Python's); '(?!)' matches no name",
        "Environment variables and options of the command line whose name has a match, in any case, are recorded "
        "without their value. The core itself still holds it.",
    ),
    Setting(
        "facts",
        "all",
        _facts,
        f"words with spaces between: {', '.join(FACTS)}; 'all', 'none', and a word with '-' before it is left out",
        "What is recorded of a crashed process beside who it was and what it crashed of: '-environment' is all but "
        "that, 'package mappings' only these two. See facts.md.",
    ),
    Setting(
        "backtrace_seconds",
        "10",
        _seconds(0.1),
        "seconds, from 0.1 to a year",
        "The time that gdb or eu-stack has for the backtrace of a core, when `corepipectl info` shows it first.",
    ),
    Setting(
        "journal",
        "on",
        _on_off,
        "'on' or 'off'",
        "Whether each crash is an entry of the journal, such as systemd-coredump makes: `coredumpctl` shows it and "
        "opens its core. Where there is no journal nothing is missing.",
    ),
    Setting(
        "metrics",
        "off",
        _textfile_or_off,
        "an absolute path that ends with .prom; 'off' for none",
        "Where the store's numbers are written after each crash, for Prometheus: a file in the directory that "
        "node_exporter reads (--collector.textfile.directory), which must be there. The service's sandbox must open it "
        "(ReadWritePaths=): see metrics.md.",
    ),
    Setting(
        "idle_seconds",
        "60",
        _seconds(0),
        "seconds, from 0 to a year; 0 for never",
        "The service (Accept=no) leaves after so long without a crash; the next crash starts it again.",
    ),
    Setting(
        "workers",
        "16",
        _whole(1, 64),
        "a whole number from 1 to 64",
        "Crashes that the service writes at the same time; the next one waits.",
    ),
    Setting(
        "offer_seconds",
        "10",
        _seconds(0.1),
        "seconds, from 0.1 to a year",
        "The deadline for each step of the conversation with the forwarder.",
    ),
    Setting(
        "stall_seconds",
        "60",
        _seconds(0.1),
        "seconds, from 0.1 to a year",
        "A core of which no byte arrives for so long is given up; its record says so.",
    ),
)

_BY_NAME = {setting.name: setting for setting in SETTINGS}
# Settings that are lists of tables, `[[notify]]`: in the file only. What stands in them is looked at by who needs it,
# and not at each crash; and what is wrong there costs no core (receiver/notify/settings.py).
_TABLES = ("notify",)


class Config:
    """The settings as values. Immutable; `Config()` has the defaults, `Config(workers=2)` all but one of them.

    store: absolute path. compression: "zstd" or "none". compression_level: zstd's. compression_threads: beside the
    reading one.
    core_max: bytes before compression, None for no limit.
    keep: "full", "stacks", or bytes before compression. keep_for: (shell pattern, value like keep's), in their order;
    `keep_of` tells which counts.
    store_max, keep_free: None for no limit, else ask `bytes_of` with the size of the store's file system.
    user_max: likewise, with what store_max comes to, or the size of the file system when that is None.
    keep_free_inodes: likewise, with the inodes of the file system.
    cores_max, same_max, loop_max: counts, None for no limit. age_max: seconds, None for no limit.
    same_seconds, loop_seconds: seconds.
    records_max: a count.
    secret_pattern: a valid regular expression, to be searched for (not matched) with re.IGNORECASE.
    facts: the words of FACTS whose facts are recorded. backtrace_seconds: seconds.
    journal: whether crashes are entries of the journal. metrics: absolute path of a file, None for none.
    idle_seconds (0.0: never leave), offer_seconds, stall_seconds: seconds. workers: a count.
    notify: the tables as they stand in the file; receiver.notify.settings makes callbacks of them.
    """

    __slots__ = (*_BY_NAME, *_TABLES)

    store: str
    compression: str
    compression_level: int
    compression_threads: int
    core_max: int | None
    keep: str | int
    keep_for: tuple[tuple[str, str | int], ...]
    store_max: Limit | None
    user_max: Limit | None
    cores_max: int | None
    age_max: float | None
    keep_free: Limit | None
    keep_free_inodes: Limit | None
    same_max: int | None
    same_seconds: float
    loop_max: int | None
    loop_seconds: float
    records_max: int
    secret_pattern: str
    facts: frozenset[str]
    backtrace_seconds: float
    journal: bool
    metrics: str | None
    idle_seconds: float
    workers: int
    offer_seconds: float
    stall_seconds: float
    notify: tuple[dict[str, object], ...]

    def __init__(self, **values: object) -> None:
        """Take values as they are, unparsed. Raises TypeError for a name that is no setting."""
        unknown = values.keys() - _BY_NAME.keys() - set(_TABLES)
        if unknown:
            raise TypeError(f"no such settings: {', '.join(sorted(unknown))}")
        for name in _TABLES:
            object.__setattr__(self, name, values.get(name, ()))
        for setting in SETTINGS:
            value = values[setting.name] if setting.name in values else setting.parse(setting.default)
            object.__setattr__(self, setting.name, value)

    def keep_of(self, exe: str | None, comm: str) -> str | int:
        """Return what is kept of a core, by the path of the executable and the process's name (comm)."""
        if self.keep_for:
            from fnmatch import fnmatchcase  # noqa: PLC0415  (import budget)

            names = {comm, *((exe, exe.rpartition("/")[2]) if exe else ())}
            for pattern, value in self.keep_for:
                if any(fnmatchcase(name, pattern) for name in names):
                    return value
        return self.keep

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(f"a Config does not change; make a new one instead of setting '{name}'")

    def __delattr__(self, name: str) -> None:
        raise AttributeError(f"a Config does not change; '{name}' stays")

    def _values(self) -> tuple[object, ...]:
        return tuple(getattr(self, name) for name in self.__slots__)

    def __eq__(self, other: object) -> bool:
        return self._values() == other._values() if isinstance(other, Config) else NotImplemented

    def __hash__(self) -> int:
        # Without the tables, which are dicts.
        return hash(tuple(getattr(self, name) for name in _BY_NAME))

    def __repr__(self) -> str:
        return f"Config({', '.join(f'{name}={getattr(self, name)!r}' for name in self.__slots__)})"


def describe() -> list[tuple[str, str, str, str, str]]:
    """Return (name, environment variable, default, allowed, meaning) of each setting: for help and documentation."""
    return [(s.name, s.env, s.default, s.allowed, s.meaning) for s in SETTINGS]


def load(path: str | None = None, environ: Mapping[str, str] | None = None) -> Config:
    """Return the settings from the file and the environment (`os.environ` unless given), which wins.

    path: the file; without it the one that CORE_PIPE_CONFIG names; without that the default one, and only that one
    may be missing. Variables that are no setting are ignored: hooks and other programs have theirs, named alike.

    Raises ConfigError with everything that is wrong.
    """
    environ = os.environ if environ is None else environ
    problems: list[Problem] = []
    values: dict[str, object] = {}
    named = path if path is not None else environ.get(PATH_VARIABLE)
    source = DEFAULT_PATH if named is None else named
    try:
        text = _read(source, may_be_missing=named is None)
        if text is not None:
            _from_file(source, text, values, problems)
    except ConfigError as error:
        # The environment is looked at all the same: one round of corrections is enough.
        problems.extend(error.problems)
    for setting in SETTINGS:
        given = environ.get(setting.env)
        if given is not None:
            _one("environment", setting.env, setting, given, values, problems)
    if problems:
        raise ConfigError(problems)
    return Config(**values)


def _plain(text: str) -> str:
    """Another library's message, which may quote what it was given, as ASCII."""
    return text[:200].encode("ascii", "backslashreplace").decode("ascii")


def _shown(value: object) -> str:
    """A value as one short line for an error: escaped, since the journal's reader may sit at a terminal."""
    text = ascii(value[:61] if isinstance(value, str) else value)
    return text if len(text) <= 64 else text[:60] + "..."


def _one(
    source: str, key: str, setting: Setting, given: str, values: dict[str, object], problems: list[Problem]
) -> None:
    try:
        values[setting.name] = setting.parse(given)
    except ValueError as error:
        problems.append(Problem(source, key, f"{_shown(given)} {error}", f"Allowed: {setting.allowed}."))


def _read(path: str, *, may_be_missing: bool) -> bytes | None:
    """Return the file's bytes, or None when it is missing and may be. Raises ConfigError.

    Who writes this file decides where root writes cores, so only root may be able to (H17): neither a link that
    somebody put there, nor a file that somebody else owns or writes.
    """

    def wrong(problem: str, remedy: str) -> ConfigError:
        return ConfigError([Problem(ascii(path)[1:-1], "", problem, remedy)])

    try:
        # O_NONBLOCK: opening a FIFO must not wait for its writer. It changes nothing for a file.
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NOCTTY | os.O_NONBLOCK)
    except FileNotFoundError:
        if may_be_missing:
            return None
        raise wrong(
            "there is no such file", f"Write one there, or unset {PATH_VARIABLE} to use the defaults."
        ) from None
    except (OSError, ValueError) as error:
        if os.path.islink(path):
            raise wrong("is a symbolic link", "Put the file itself there, or name its target.") from None
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise wrong(f"cannot be opened: {reason}", "Make it a file that root can read.") from None
    try:
        status = os.fstat(fd)
        if status.st_mode & 0o170000 != 0o100000:  # S_ISREG; the stat module is no cheaper to say it with
            raise wrong("is not a regular file", "Put a file there.")
        if status.st_uid not in (0, os.geteuid()):
            raise wrong(f"belongs to uid {status.st_uid}", f"Run: chown root {path}")
        if status.st_mode & 0o022:
            raise wrong("can be written by others than its owner", f"Run: chmod go-w {path}")
        parts = []
        left = _MAX_FILE + 1
        while left and (data := os.read(fd, left)):
            parts.append(data)
            left -= len(data)
        if not left:
            raise wrong(f"is larger than {_MAX_FILE // 1024} KiB", "Only settings belong there.")
        return b"".join(parts)
    except OSError as error:
        raise wrong(f"cannot be read: {error.strerror}", "Make it a file that root can read.") from None
    finally:
        os.close(fd)


def _from_file(source: str, text: bytes, values: dict[str, object], problems: list[Problem]) -> None:
    """Parse the file into `values`; what is wrong goes to `problems`. Raises ConfigError when it is no TOML."""
    import tomllib  # noqa: PLC0415  (import budget)

    shown_source = ascii(source)[1:-1]
    try:
        table = tomllib.loads(text.decode("utf-8"))
    # ValueError: TOMLDecodeError, UnicodeDecodeError, and int() of more than 4300 digits. RecursionError: "[[[[[...".
    except (ValueError, RecursionError) as error:
        raise ConfigError(
            [Problem(shown_source, "", f"is not TOML: {_plain(str(error))}", "Write lines such as: core_max = '512M'")]
        ) from None
    for key, value in table.items():
        if key in _TABLES:
            if isinstance(value, list) and all(isinstance(item, dict) for item in value):
                values[key] = tuple(value)
            else:
                remedy = f"Begin each with a line [[{key}]]."
                problems.append(Problem(shown_source, key, "is no list of tables", remedy))
            continue
        setting = _BY_NAME.get(key)
        if setting is None:
            problems.append(Problem(shown_source, _shown(key)[1:-1], "there is no such setting", _nearest(key)))
            continue
        # bool is an int to isinstance, and nobody means 1 by true.
        if isinstance(value, bool) or not isinstance(value, str | int | float):
            problem = f"{_shown(value)} is neither a text nor a number"
            problems.append(Problem(shown_source, key, problem, f"Allowed: {setting.allowed}."))
            continue
        try:
            given = str(value)
        except ValueError:  # 0xfff...: more than 4300 digits
            given = "a huge number"
        _one(shown_source, key, setting, given, values, problems)


def _nearest(key: str) -> str:
    return nearest(key, (*_BY_NAME, *_TABLES))


def nearest(key: str, names: Iterable[str]) -> str:
    """Return the remedy for a name that is none of these."""
    import difflib  # noqa: PLC0415  (only for an error)

    names = tuple(names)
    # Cut: the comparison takes quadratic time.
    near = difflib.get_close_matches(key[:64].lower().replace("-", "_"), names, n=1, cutoff=0.5)
    if near:
        return f"Did you mean '{near[0]}'?"
    return f"Allowed: {', '.join(names)}."


def source(environ: Mapping[str, str] | None = None) -> str:
    """Return the path of the settings' file, whether it is there or not."""
    return (os.environ if environ is None else environ).get(PATH_VARIABLE, DEFAULT_PATH)


def shown(value: object) -> str:
    """Return a value as one short line for an error: escaped, since the journal's reader may sit at a terminal."""
    return _shown(value)
