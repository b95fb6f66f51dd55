"""Completion at a Tab, in the real shells: the right words, and nothing run that a crashed program named itself."""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import pty
import select
import shutil
import subprocess
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import forwarder.cli
import receiver.cli
from receiver import completion
from receiver.ctl import command, completing
from receiver.record import Record
from receiver.store import Store
from tests.support.containers import PlainContainer
from tests.support.mounts import CHECKOUT
from tests.support.receivers import BIN

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

SCRIPTS = Path(CHECKOUT) / "completions"
PARSERS = {
    "corepipectl": command.parser,
    "core-pipe-receiver": receiver.cli._parser,
    "core-pipe-forwarder": forwarder.cli._parser,
}

# Each begins with a letter of its own, so that one Tab is enough. Run by a shell, some would leave a file.
HOSTILE = (
    "a b",
    "b'c",
    'c"d',
    "d$(>ran)",
    "e`>ran`",
    "f;>ran",
    "g&>ran",
    "h\\i",
    "i!!j",
    "j*?[a]",
    "k|l",
    "l<m",
    "m~/n",
    "n{a,b}",
    "o#p",
    "p(q)",
    "q$HOME",
    "r%F{red}s",
    "sé",
    "t=u",
)
# Not offered: more than a line, or invisible, or an option, or another kind of match.
LEFT_OUT = ("x\ny", "y\x1b[2J", "z\u202ea", "-rf", "v/w", "")


def keep(path: Path, *comms: str, exe: str = "/usr/bin/webshop") -> list[Record]:
    store = Store(str(path))
    found = []
    for number, comm in enumerate(comms):
        record = Record.of_numbers(
            pid=4700 + number,
            tid=4700 + number,
            uid=0,
            gid=0,
            signal=11,
            time=1_700_000_000,
            comm=b"",
            core_limit=1 << 40,
            dumpable=1,
        )
        record.comm, record.exe = comm, exe
        store.begin(record).finish()
        found.append(record)
    store.close()
    return found


def words(program: str, *typed: str, values: completion.Values | None = None) -> list[str]:
    wanted = completion.want(PARSERS[program](), typed, values or {})
    assert wanted.kind == "words"
    return [word for word, _ in wanted.words]


# The program's answer


@pytest.mark.parametrize("program", PARSERS)
def test_every_command_and_option_is_offered(program: str) -> None:
    """Commands without a help text are for programs: not in --help, and not here."""
    parser = PARSERS[program]()
    (commands,) = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    offered = words(program, "")
    assert offered
    assert set(offered) == {choice.dest for choice in commands._choices_actions}

    def expected(parser: argparse.ArgumentParser) -> set[str]:
        return {
            name
            for action in parser._actions
            for name in action.option_strings
            if name.startswith("--") and action.help != argparse.SUPPRESS
        }

    assert {word for word in words(program, "-") if word.startswith("--")} == expected(parser)
    for name in offered:
        assert {word for word in words(program, name, "-") if word.startswith("--")} == expected(commands.choices[name])


@pytest.mark.parametrize(
    ("program", "typed", "kind"),
    [
        ("corepipectl", ["--store", ""], "dirs"),
        ("corepipectl", ["--store="], "dirs"),
        ("corepipectl", ["dump", "webshop", "-o", ""], "files"),
        ("corepipectl", ["dump", "webshop", "--out="], "files"),
        ("core-pipe-receiver", ["--listen", ""], "files"),
        ("core-pipe-receiver", ["install", "--root", ""], "dirs"),
    ],
)
def test_files_and_directories_are_the_shells(program: str, typed: list[str], kind: str) -> None:
    assert completion.want(PARSERS[program](), typed, {}).kind == kind


@pytest.mark.parametrize("shell", completion.SHELLS)
def test_values_of_options(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    split = ["--ingress", "=", "s"] if shell == "bash" else ["--ingress=s"]
    for typed in (["install", "--ingress", "s"], ["install", *split], ["ingress", "s"]):
        assert forwarder.cli.main(["__complete", shell, *typed]) == 0
        joined = typed[-1].startswith("--ingress=")
        assert [line.partition("\t")[0] for line in capsys.readouterr().out.splitlines()] == [
            "words",
            "--ingress=socket" if joined else "socket",
        ]


def test_crashes_are_found_by_what_their_matches_are(tmp_path: Path) -> None:
    records = keep(tmp_path / "store", "webshop", "webshop", "worker", *LEFT_OUT)
    values = {"MATCH": completing.crashes}

    def offered(word: str) -> list[str]:
        return words("corepipectl", "--store", str(tmp_path / "store"), "info", word, values=values)

    assert offered("w") == ["worker", "webshop"]
    assert offered("/") == ["/usr/bin/webshop"]
    assert offered("4702") == ["4702"]
    assert words("corepipectl", "info", "--store", str(tmp_path / "store"), "wo", values=values) == ["worker"]
    assert offered(records[0].id[:8]) == [record.id for record in reversed(records)]
    assert all(word.isdigit() or word in ("webshop", "worker") for word in offered(""))


@pytest.mark.system
@pytest.mark.skipif(PlainContainer.why_unavailable() is not None, reason=str(PlainContainer.why_unavailable()))
def test_containers_are_found_by_name() -> None:
    values = {"NAME": completing.containers}
    with PlainContainer() as container:
        assert str(container.init_pid) in words("corepipectl", "list", "-M", "", values=values)
        assert words("corepipectl", "list", f"--machine=pid:{container.init_pid}", values=values) == [
            f"pid:{container.init_pid}"
        ]


@pytest.mark.parametrize("arguments", [[], ["bash"], ["tcsh", ""], ["bash", "info", ""], ["fish", "no-such", ""]])
def test_a_call_that_is_none_or_a_store_that_is_none_is_silent(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A Tab writes into somebody's command line: an error there would only hide it."""
    (tmp_path / "file").touch()
    monkeypatch.setenv("CORE_PIPE_STORE", str(tmp_path / "file"))
    assert command.main(["__complete", *arguments]) == (0 if len(arguments) > 1 and arguments[0] != "tcsh" else 2)
    out, err = capsys.readouterr()
    assert (out, err) == ("words\n" if out else "", "")


@settings(max_examples=100, deadline=None)
@given(
    program=st.sampled_from(sorted(PARSERS)),
    shell=st.sampled_from(completion.SHELLS),
    typed=st.lists(
        st.sampled_from(
            ["--", "-", "=", "--json", "--json=", "-n", "-n5", "--store=", "-o", "list", "info", "install", "'", '"x']
        )
        | st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=8),
        min_size=1,
        max_size=6,
    ),
)
def test_whatever_is_typed_has_an_answer(program: str, shell: str, typed: list[str]) -> None:
    out = io.TextIOWrapper(io.BytesIO(), encoding="utf-8", write_through=True)
    with contextlib.redirect_stdout(out):
        assert completion.answer(PARSERS[program](), [shell, *typed]) == 0
    first, *lines = out.buffer.getvalue().decode().splitlines()
    assert first in ("words", "files", "dirs")
    assert lines == [] or first == "words"


# The shells


class Shell:
    """An interactive shell at a terminal of its own, in an empty directory."""

    KEY = "\x18w"  # Ctrl-X w: writes the command line to a file

    def __init__(self, argv: list[str], environ: Mapping[str, str], directory: Path) -> None:
        self._line = directory / "line"
        self._end = time.monotonic() + 60
        self._read = b""
        self._terminal, theirs = pty.openpty()
        try:
            self._process = subprocess.Popen(
                # fish wants a terminal that is its own
                ["setsid", "--ctty", *argv],
                stdin=theirs,
                stdout=theirs,
                stderr=theirs,
                cwd=directory / "here",
                env=dict(environ),
            )
        finally:
            os.close(theirs)

    def until(self, mark: bytes) -> None:
        """Wait for a prompt."""
        while mark not in self._read:
            self._look()

    def completed(self, typed: str) -> str:
        """Type, press Tab, and return the command line as it is then."""
        self._line.unlink(missing_ok=True)
        # Ctrl-U: whatever is there goes.
        os.write(self._terminal, f"\x15{typed}\t{self.KEY}".encode())
        while not (self._line.exists() and self._line.read_text(encoding="utf-8").endswith("\n")):
            self._look()
        return self._line.read_text(encoding="utf-8").removesuffix("\n")

    def _look(self) -> None:
        assert time.monotonic() < self._end, f"the shell does not answer: {self._read[-2000:]!r}"
        if select.select([self._terminal], [], [], 0.02)[0]:
            try:
                self._read += os.read(self._terminal, 65536)
            except OSError:
                pytest.fail(f"the shell has ended: {self._read[-2000:]!r}")

    def close(self) -> None:
        self._process.kill()
        self._process.wait(timeout=30)
        os.close(self._terminal)


def _bash(directory: Path) -> list[str]:
    (directory / "rc").write_text(
        f"PS1='READY> '\nbind 'set enable-bracketed-paste off'\nsource {SCRIPTS}/core_pipe.bash\n"
        f"""bind -x '"\\C-xw": printf "%s\\n" "$READLINE_LINE" > {directory}/line'\n""",
        encoding="utf-8",
    )
    return ["bash", "--noprofile", "--rcfile", str(directory / "rc"), "-i"]


def _zsh(directory: Path) -> list[str]:
    functions = directory / "site-functions"
    functions.mkdir()
    shutil.copy(SCRIPTS / "core_pipe.zsh", functions / "_core_pipe")
    (directory / ".zshrc").write_text(
        f"unsetopt zle_bracketed_paste prompt_sp 2>/dev/null; PS1='READY> '\nfpath=({functions} $fpath)\n"
        "autoload -U compinit; compinit -u -D\nsetopt no_auto_menu no_list_ambiguous\n"
        f'line() {{ print -r -- "$BUFFER" > {directory}/line }}; zle -N line; bindkey "^Xw" line\n'
        "bindkey '^U' kill-whole-line\n",
        encoding="utf-8",
    )
    return ["zsh", "-d", "-i"]


def _fish(directory: Path) -> list[str]:
    return [
        "fish",
        "--private",
        "-C",
        (
            f"function fish_prompt; printf 'READY> '; end; set fish_greeting; set fish_autosuggestion_enabled 0; "
            f"source {SCRIPTS}/core_pipe.fish; bind \\cxw 'commandline > {directory}/line'; bind \\cu kill-whole-line"
        ),
    ]


SHELLS = {"bash": _bash, "zsh": _zsh, "fish": _fish}


def whether_there(shell: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(shutil.which(shell) is None, reason=f"no {shell} here; apt-get install {shell}")


@pytest.fixture(scope="module", params=[pytest.param(name, marks=whether_there(name)) for name in SHELLS])
def shell(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[str, Shell, Path]]:
    directory = tmp_path_factory.mktemp(request.param)
    (directory / "here" / "images").mkdir(parents=True)
    keep(directory / "store", "webshop", *HOSTILE, *LEFT_OUT)
    environ = {
        "PATH": f"{BIN}:/usr/bin:/bin",
        "HOME": str(directory),
        "ZDOTDIR": str(directory),
        "XDG_CONFIG_HOME": str(directory),
        "XDG_DATA_HOME": str(directory),
        "TERM": "dumb" if request.param != "fish" else "xterm",
        "LC_ALL": "C.UTF-8",
        "CORE_PIPE_STORE": str(directory / "store"),
    }
    found = Shell(SHELLS[request.param](directory), environ, directory)
    try:
        found.until(b"READY> ")
        yield request.param, found, directory
    finally:
        found.close()


@pytest.mark.parametrize(
    ("typed", "becomes"),
    [
        ("corepipectl inf", "corepipectl info "),
        ("corepipectl dump --outp", "corepipectl dump --output "),
        ("corepipectl --store im", "corepipectl --store images/"),
        ("corepipectl list -F command", "corepipectl list -F command_line "),
        ("corepipectl --store=im", "corepipectl --store=images/"),
        ("corepipectl info web", "corepipectl info webshop "),
        ("corepipectl info 470", "corepipectl info 470"),
        ("corepipectl info -- web", "corepipectl info -- webshop "),
        ("corepipectl info /usr/b", "corepipectl info /usr/bin/webshop "),
        ("core-pipe-receiver uni", "core-pipe-receiver uninstall "),
        ("core-pipe-receiver install --accept n", "core-pipe-receiver install --accept no "),
        ("core-pipe-forwarder install --ingress=so", "core-pipe-forwarder install --ingress=socket "),
        ("core-pipe-forwarder ingress pi", "core-pipe-forwarder ingress pipe "),
    ],
)
def test_a_tab(shell: tuple[str, Shell, Path], typed: str, becomes: str) -> None:
    assert shell[1].completed(typed) == becomes


@pytest.mark.parametrize(
    ("quote", "comm"),
    [*(("", comm) for comm in HOSTILE), *((quote, comm) for quote in ("'", '"') for comm in HOSTILE[1:6])],
)
def test_a_name_of_a_strangers_is_one_word_and_never_run(shell: tuple[str, Shell, Path], comm: str, quote: str) -> None:
    """What is on the command line after the Tab, run by the same shell, is that name and nothing else."""
    name, terminal, directory = shell
    line = terminal.completed(f"corepipectl info {quote}{comm[0]}")
    if "=" in comm or "/" in comm:
        assert line == f"corepipectl info {quote}{comm[0]}"  # another kind of match
    elif line == f"corepipectl info {quote}{comm[0]}":
        assert quote, "nothing was offered"  # bash: it cannot stand between these quotes
    else:
        show = {
            "fish": "function corepipectl; printf '<%s>' $argv; end; ",
            "zsh": "corepipectl() { printf '<%s>' \"$@\"; }; ",
            "bash": "corepipectl() { printf '<%s>' \"$@\"; }; ",
        }[name]
        done = subprocess.run(
            [name, *([] if name == "fish" else ["-f"] if name == "zsh" else ["--norc"]), "-c", show + line],
            capture_output=True,
            text=True,
            check=True,
            timeout=30,
            cwd=directory / "here",
            env={"HOME": str(directory), "PATH": "/usr/bin:/bin", "LC_ALL": "C.UTF-8"},
        )
        said = done.stdout
        if name == "zsh" and quote == '"':
            # Between these quotes `\!` is for history, which only an interactive shell has.
            said = said.replace("\\!", "!")
        assert said == f"<info><{comm}>", line
    assert sorted(os.listdir(directory / "here")) == ["images"]


def test_no_program_in_the_working_directory_is_run(shell: tuple[str, Shell, Path]) -> None:
    """`./corepipectl` at a Tab: a directory of a stranger's has nothing to say."""
    _, terminal, directory = shell
    trap = directory / "here" / "corepipectl"
    trap.write_text(f"#!/bin/sh\ntouch {directory}/trapped\n", encoding="utf-8")
    trap.chmod(0o755)
    try:
        terminal.completed("./corepipectl inf")
        terminal.completed("corepipectl inf")
    finally:
        trap.unlink()
    assert not (directory / "trapped").exists()
