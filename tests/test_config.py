"""Settings: every value, every error, and that nothing but a Config or a ConfigError ever comes out."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from receiver import config
from receiver.config import SETTINGS, Config, ConfigError, Limit, describe, load

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    Write = Callable[..., str]

MIB = 1 << 20


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def write(text: str | bytes, mode: int = 0o644) -> str:
        path = tmp_path / "receiver.toml"
        path.write_bytes(text.encode() if isinstance(text, str) else text)
        path.chmod(mode)
        return str(path)

    return write


def problems_of(path: str | None = None, **environ: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load(path, {f"CORE_PIPE_{name.upper()}": value for name, value in environ.items()})
    assert str(caught.value)
    return [str(problem) for problem in caught.value.problems]


def test_a_missing_default_file_means_the_defaults(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(config, "DEFAULT_PATH", str(tmp_path / "none" / "receiver.toml"))
    assert load(environ={}) == Config()


def test_every_default_is_a_value_that_one_may_write() -> None:
    loaded = Config()
    for setting in SETTINGS:
        assert getattr(loaded, setting.name) == setting.parse(setting.default), setting.name
    re.compile(loaded.secret_pattern, re.IGNORECASE)


def test_the_table_and_the_class_have_the_same_names() -> None:
    # The last one is the list of tables, which is no row.
    assert list(Config.__annotations__) == [*(setting.name for setting in SETTINGS), "notify"]


def test_describe_has_a_row_for_each_setting() -> None:
    rows = describe()
    assert [row[0] for row in rows] == [setting.name for setting in SETTINGS]
    assert next(row[:3] for row in rows if row[0] == "workers") == ("workers", "CORE_PIPE_WORKERS", "16")
    for row in rows:
        assert all(row), row
        assert row[4].endswith("."), row


def test_the_environment_wins_over_the_file(write: Write) -> None:
    path = write("workers = 3\ncore_max = '1M'\n")
    loaded = load(path, {"CORE_PIPE_WORKERS": "4"})
    assert (loaded.workers, loaded.core_max) == (4, MIB)


def test_the_file_that_the_environment_names_is_read(write: Write) -> None:
    assert load(environ={"CORE_PIPE_CONFIG": write("workers = 3")}).workers == 3


def test_a_named_file_must_exist(tmp_path: Path) -> None:
    path = str(tmp_path / "none.toml")
    expected = f"{path}: there is no such file. Write one there, or unset CORE_PIPE_CONFIG to use the defaults."
    assert problems_of(path) == [expected]
    assert problems_of(config=path) == [expected]


def test_other_variables_are_nobodys_error() -> None:
    load(environ={"CORE_PIPE_ID": "x", "CORE_PIPE": "y", "PATH": "/bin"})


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("0", 0),
        ("512", 512),
        ("512M", 512 * MIB),
        ("1.5g", 1536 * MIB),
        ("2T", 2 << 40),
        ("9223372036854775807", (1 << 63) - 1),
        ("off", None),
    ],
)
def test_sizes(text: str, value: int | None) -> None:
    assert load(environ={"CORE_PIPE_CORE_MAX": text}).core_max == value


@pytest.mark.parametrize(
    ("text", "total", "value"),
    [("10%", 1000, 100), ("2.5%", 1 << 60, (1 << 60) // 40), ("100%", 7, 7), ("0%", 7, 0), ("3K", 7, 3072)],
)
def test_limits(text: str, total: int, value: int) -> None:
    limit = load(environ={"CORE_PIPE_STORE_MAX": text}).store_max
    assert limit is not None
    assert limit.bytes_of(total) == value


def test_limits_compare_by_value() -> None:
    assert Limit(percent=10) == load(environ={"CORE_PIPE_STORE_MAX": "10%"}).store_max
    assert len({Limit(size=1), Limit(size=1), Limit(percent=1)}) == 2
    assert Limit(size=1) != "1"
    assert [repr(Limit(size=1)), repr(Limit(percent=2.5))] == ["Limit(size=1)", "Limit(percent=2.5)"]
    assert load(environ={"CORE_PIPE_KEEP_FREE": "off"}).keep_free is None


@pytest.mark.parametrize(("text", "value"), [("5%", 50), ("20", 20), ("0", 0), ("2.5%", 25)])
def test_inodes(text: str, value: int) -> None:
    limit = load(environ={"CORE_PIPE_KEEP_FREE_INODES": text}).keep_free_inodes
    assert limit is not None
    assert limit.bytes_of(1000) == value


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("30d", 30 * 86400.0),
        ("12h", 43200.0),
        ("90min", 5400.0),
        ("45s", 45.0),
        ("45", 45.0),
        ("1.5h", 5400.0),
        ("3660d", 3660 * 86400.0),
        ("off", None),
    ],
)
def test_durations(text: str, value: float | None) -> None:
    assert load(environ={"CORE_PIPE_AGE_MAX": text}).age_max == value


def test_what_may_be_off() -> None:
    names = ("core_max", "store_max", "user_max", "cores_max", "age_max", "keep_free", "keep_free_inodes", "same_max")
    loaded = load(environ={f"CORE_PIPE_{name.upper()}": "off" for name in (*names, "loop_max")})
    assert [getattr(loaded, name) for name in (*names, "loop_max")] == [None] * 9


@pytest.mark.parametrize(("text", "value"), [("full", "full"), ("stacks", "stacks"), ("512M", 512 * MIB), ("0", 0)])
def test_what_is_kept(text: str, value: str | int) -> None:
    assert load(environ={"CORE_PIPE_KEEP": text}).keep == value
    assert load(environ={"CORE_PIPE_KEEP_FOR": f"*={text}"}).keep_for == (("*", value),)


def test_what_is_kept_of_some_programs(write: Write) -> None:
    loaded = load(write("keep = '1G'\nkeep_for = \"java=512M  /usr/lib/*=stacks a=b=full [x=1\\tpyth?n3=2\"\n"), {})
    assert loaded.keep_for == (
        ("java", 512 * MIB),
        ("/usr/lib/*", "stacks"),
        ("a=b", "full"),
        ("[x", 1),
        ("pyth?n3", 2),
    )
    assert (
        load(environ={"CORE_PIPE_KEEP_FOR": ""}).keep_for == () == load(environ={"CORE_PIPE_KEEP_FOR": "off"}).keep_for
    )


@pytest.mark.parametrize(
    ("exe", "comm", "value"),
    [
        ("/opt/jdk/bin/java", "main", 512),
        ("/bin/other", "java", 512),
        ("/bin/java2", "java2", "full"),
        ("/usr/lib/postgresql/16/bin/postgres", "postgres", "stacks"),
        ("/usr/lib/jvm/java", "java", 512),
        # Case matters, and a name of the stranger's choice is no pattern.
        ("/bin/JAVA", "*", "full"),
        (None, "java", 512),
        (None, "", "full"),
        ("", "java\n", "full"),
    ],
)
def test_the_first_rule_that_matches_counts(exe: str | None, comm: str, value: str | int) -> None:
    loaded = Config(keep_for=(("java", 512), ("/usr/lib/*", "stacks"), ("*/jvm/*", 7)))
    assert loaded.keep_of(exe, comm) == value


def test_a_pattern_takes_no_time_that_a_stranger_chooses() -> None:
    loaded = Config(keep_for=(("*a" * 40 + "b", 1),))
    assert loaded.keep_of("/" + "a" * 4000, "x") == "full"


def test_values_of_a_file_may_be_numbers(write: Write) -> None:
    loaded = load(write("core_max = 4096\nidle_seconds = 0.5\nstall_seconds = 5\nstore = '/srv//cores/'\n"), {})
    assert (loaded.core_max, loaded.idle_seconds, loaded.stall_seconds) == (4096, 0.5, 5.0)
    assert loaded.store == "/srv/cores"


@pytest.mark.parametrize(
    ("name", "text", "problem"),
    [
        ("store", "cores", "'cores' is not an absolute path"),
        ("store", "", "'' is not an absolute path"),
        ("store", "/", "'/' is not the path of a directory of its own"),
        ("store", "/var/../etc", "'/var/../etc' is not the path of a directory of its own"),
        ("compression", "gzip", "'gzip' is none of them"),
        ("compression_level", "0", "'0' is out of range"),
        ("compression_level", "20", "'20' is out of range"),
        ("compression_level", "one", "'one' is not a whole number"),
        ("core_max", "12 parrots", "'12 parrots' is not a size"),
        ("core_max", "-1", "'-1' is not a size"),
        ("core_max", "1.5", "'1.5' is not a size"),
        ("core_max", "10%", "'10%' is not a size"),
        ("core_max", "9000000000T", "'9000000000T' is larger than any file"),
        ("core_max", "", "'' is not a size"),
        ("core_max", "M", "'M' is not a size"),
        ("core_max", "\u0663", "'\\u0663' is not a size"),
        ("store_max", "ten%", "'ten%' is not a percentage"),
        ("store_max", "101%", "'101%' is more than the whole"),
        ("keep_free", "much", "'much' is not a size"),
        ("user_max", "101%", "'101%' is more than the whole"),
        ("keep_free_inodes", "12M", "'12M' is neither a whole number nor a percentage"),
        ("keep_free_inodes", "99999999999999999999", "' is more than any file system has"),
        ("cores_max", "0", "'0' is out of range"),
        ("cores_max", "many", "'many' is not a whole number"),
        ("age_max", "30days", "'30days' is not a duration"),
        ("age_max", "d", "'d' is not a duration"),
        ("age_max", "-1d", "'-1d' is not a duration"),
        ("age_max", "1h30min", "'1h30min' is not a duration"),
        ("age_max", "5 min", "'5 min' is not a duration"),
        ("age_max", "0", "'0' is out of range"),
        ("age_max", "99999d", "'99999d' is out of range"),
        ("keep", "some", "'some' is not a size"),
        ("keep", "10%", "'10%' is not a size"),
        ("keep", "", "'' is not a size"),
        ("keep_for", "java", "'java' is no list of pattern=value"),
        ("keep_for", "java=1 =2", "'java=1 =2' is no list of pattern=value"),
        ("keep_for", "java=", "'java=' has a value that is neither 'full', 'stacks' nor a size"),
        ("keep_for", "java=much", "'java=much' has a value that is neither 'full', 'stacks' nor a size"),
        ("keep_for", "x=1 " * 257, "has more than 256 rules"),
        ("keep_for", "x" * 4097 + "=1", "has a pattern that no path can match"),
        ("same_max", "0", "'0' is out of range"),
        ("same_seconds", "0", "'0' is out of range"),
        ("loop_max", "-1", "'-1' is not a whole number"),
        ("loop_seconds", "off", "'off' is not a number of seconds"),
        ("compression_threads", "9", "'9' is out of range"),
        ("secret_pattern", "", "'' is empty and would match every name"),
        ("secret_pattern", "(", "'(' is not a regular expression: missing ), unterminated subpattern at position 0"),
        ("secret_pattern", "(?L)x", "'(?L)x' is not a regular expression: bad inline flags:"),
        ("secret_pattern", "(" * 4000, "' is not a regular expression: "),
        ("secret_pattern", "x" * 4097, "' is longer than 4096 characters"),
        ("idle_seconds", "-1", "'-1' is not a number of seconds"),
        ("idle_seconds", "nan", "'nan' is not a number of seconds"),
        ("idle_seconds", "1e3", "'1e3' is not a number of seconds"),
        ("idle_seconds", "99999999", "'99999999' is out of range"),
        ("workers", "65", "'65' is out of range"),
        ("offer_seconds", "0", "'0' is out of range"),
        ("stall_seconds", "0", "'0' is out of range"),
    ],
)
def test_each_error_says_what_is_wrong_and_what_is_allowed(name: str, text: str, problem: str) -> None:
    (said,) = problems_of(**{name: text})
    assert said.startswith(f"environment: CORE_PIPE_{name.upper()}: ")
    assert problem in said
    allowed = next(setting.allowed for setting in SETTINGS if setting.name == name)
    assert said.endswith(f". Allowed: {allowed}.")


def test_an_error_of_the_file_reads_like_this(write: Write) -> None:
    path = write("core_max = '12 parrots'")
    (said,) = problems_of(path)
    assert said == (
        f"{path}: core_max: '12 parrots' is not a size. Allowed: bytes, or a number with K, M, G or T "
        "(powers of 1024), such as 512M; 'off' for no limit."
    )


def test_every_error_is_reported_at_once(write: Write) -> None:
    path = write("core_max = 'x'\nworkers = 0\n")
    assert [line.split(": ")[1] for line in problems_of(path, compression="gzip")] == [
        "core_max",
        "workers",
        "CORE_PIPE_COMPRESSION",
    ]
    # Also when the file as a whole is wrong.
    assert len(problems_of(write("no toml"), compression="gzip")) == 2


def test_an_error_stays_short(write: Write) -> None:
    path = write("".join(f"x{number} = 1\n" for number in range(1000)))
    with pytest.raises(ConfigError, match=r"\n\.\.\. and 980 more\.\Z"):
        load(path, {})


@pytest.mark.parametrize(
    ("key", "near"),
    [("core-max", "core_max"), ("Store", "store"), ("worker", "workers"), ("idle_second", "idle_seconds")],
)
def test_an_unknown_key_is_told_its_nearest(write: Write, key: str, near: str) -> None:
    path = write(f"{key} = 1")
    assert problems_of(path) == [f"{path}: {key}: there is no such setting. Did you mean '{near}'?"]


def test_an_unknown_key_like_none_is_told_all(write: Write) -> None:
    (said,) = problems_of(write("zzz = 1"))
    assert said.endswith("Allowed: " + ", ".join([*(setting.name for setting in SETTINGS), "notify"]) + ".")


@pytest.mark.parametrize("value", ["true", "[1]", "{a = 1}", "1979-05-27"])
def test_other_types_are_refused(write: Write, value: str) -> None:
    (said,) = problems_of(write(f"workers = {value}"))
    assert "is neither a text nor a number. Allowed: a whole number from 1 to 64." in said


@pytest.mark.parametrize(
    "text",
    [
        b"no toml",
        b"\xff",
        b"a = " + b"[" * 30000,
        b"workers = " + b"9" * 5000,
        b"workers = 0x" + b"f" * 20000,
        b"workers = 1\nworkers = 2",
        b"store = '/\\u0000'\nstore2 = \"\\u0000\"",
    ],
)
def test_strange_files_are_errors_of_the_settings(write: Write, text: bytes) -> None:
    assert problems_of(write(text))


def test_a_link_is_not_followed(write: Write, tmp_path: Path) -> None:
    link = tmp_path / "link.toml"
    link.symlink_to(write("workers = 1"))
    assert problems_of(str(link)) == [f"{link}: is a symbolic link. Put the file itself there, or name its target."]


def test_a_fifo_does_not_hold_us(tmp_path: Path) -> None:
    path = tmp_path / "fifo"
    os.mkfifo(path)
    assert problems_of(str(path)) == [f"{path}: is not a regular file. Put a file there."]
    assert problems_of(str(tmp_path)) == [f"{tmp_path}: is not a regular file. Put a file there."]


@pytest.mark.parametrize("mode", [0o664, 0o646])
def test_nobody_else_may_write_it(write: Write, mode: int) -> None:
    path = write("workers = 1", mode)
    assert problems_of(path) == [f"{path}: can be written by others than its owner. Run: chmod go-w {path}"]


@pytest.mark.skipif(os.geteuid() != 0, reason="chown needs root. Run: sudo make test")
def test_it_must_be_ours(write: Write) -> None:
    path = write("workers = 1")
    os.chown(path, 65534, 65534)
    assert problems_of(path) == [f"{path}: belongs to uid 65534. Run: chown root {path}"]


def test_a_huge_file_is_refused(write: Write) -> None:
    assert load(write("#" * 65536), {}) == Config()
    path = write("#" * 65537)
    assert problems_of(path) == [f"{path}: is larger than 64 KiB. Only settings belong there."]


def test_paths_that_cannot_be_opened_are_errors(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (said,) = problems_of(str(tmp_path / "file" / "x"))
    assert "cannot be opened: Not a directory" in said
    for path in ("", "a\0b", "x" * 5000):
        assert problems_of(path)


def test_no_descriptor_stays_open(write: Write) -> None:
    before = os.listdir("/proc/self/fd")
    for path in (write("workers = 1"), write("workers = 0"), write("x", 0o666), write("#" * 70000)):
        try:
            load(path, {})
        except ConfigError:
            pass
    assert os.listdir("/proc/self/fd") == before


def test_a_config_does_not_change() -> None:
    loaded = Config(workers=2)
    with pytest.raises(AttributeError, match="'workers'"):
        loaded.workers = 3
    with pytest.raises(AttributeError, match="'workers'"):
        del loaded.workers
    with pytest.raises(TypeError, match="no such settings: wrokers"):
        Config(wrokers=3)
    assert hash(loaded) == hash(Config(workers=2))
    assert loaded != "Config"
    assert "workers=2" in repr(loaded)


@pytest.mark.parametrize(
    ("name", "secret"),
    [
        ("DB_PASSWORD", True),
        ("mysql_pwd", True),
        ("PGPASSFILE", True),
        ("GITHUB_TOKEN", True),
        ("AWS_SECRET_ACCESS_KEY", True),
        ("SENTRY_DSN", True),
        ("AzureConnectionString", True),
        ("PWD", False),
        ("OLDPWD", False),
        ("PATH", False),
        ("LANG", False),
        ("HOSTNAME", False),
    ],
)
def test_the_default_pattern_knows_secrets(name: str, secret: bool) -> None:
    assert bool(re.search(Config().secret_pattern, name, re.IGNORECASE)) is secret


# A busy machine is no error of the settings.
patient = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])

# What the environment can hold: any byte but NUL, undecodable ones as surrogates.
texts = st.one_of(
    st.text(st.characters(exclude_characters="\0")),
    st.binary().map(lambda data: os.fsdecode(data.replace(b"\0", b""))),
    st.from_regex(r"-?[0-9_.]{0,30}([KMGTkmgt%edhs]|min)?[0-9]?", fullmatch=True),
    st.from_regex(r"([a-z*?\[\]!=]{0,9}=(full|stacks|[0-9]{1,3}M?) ?){0,4}", fullmatch=True),
)


@patient
@given(st.fixed_dictionaries({}, optional={setting.env: texts for setting in SETTINGS}))
def test_any_environment_gives_a_config_or_a_config_error(environ: dict[str, str]) -> None:
    try:
        loaded = load(environ=environ)
    except ConfigError as error:
        assert str(error).isascii()
        assert all(problem.remedy.endswith(".") for problem in error.problems)
    else:
        assert loaded.store.startswith("/")
        assert loaded.core_max is None or 0 <= loaded.core_max < 1 << 63
        assert 1 <= loaded.workers <= 64
        assert loaded.age_max is None or loaded.age_max >= 1
        assert loaded.keep_of("/bin/x", "x") in ("full", "stacks") or isinstance(loaded.keep_of("/bin/x", "x"), int)


@patient
@given(st.one_of(st.binary(max_size=300), st.text(max_size=300).map(lambda text: text.encode("utf-8", "replace"))))
def test_any_file_gives_a_config_or_a_config_error(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "any.toml"
    path.write_bytes(data)
    path.chmod(0o600)
    try:
        load(str(path), {})
    except ConfigError as error:
        assert error.problems


def test_importing_and_loading_it_imports_nothing_more() -> None:
    """Each crash pays for it (Accept=yes)."""
    program = (
        "import os, sys; before = set(sys.modules)\n"
        "import receiver.config; receiver.config.load(environ={})\n"
        "print(*sorted(set(sys.modules) - before))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=30)
    assert done.stdout.split() == ["__future__", "receiver", "receiver.config"]
