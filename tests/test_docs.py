"""What the documents say is so: bytes, settings, commands, links and names of tests.

`sudo .venv/bin/python -m tests.test_docs --write` writes docs/configuration.md anew.
"""

from __future__ import annotations

import ast
import functools
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import forwarder.cli
import receiver.cli
import receiver.ctl.command
from forwarder import install
from receiver import config, protocol
from receiver.notify import settings as callbacks
from tests.support.containers import PlainContainer
from tests.support.crash import compile_crasher
from tests.support.mounts import CHECKOUT
from tests.support.receivers import BIN, Forwarder, forwarder_installed

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(CHECKOUT)
DOCUMENTS = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *ROOT.glob("docs/**/*.md")])
CONFIGURATION = ROOT / "docs/configuration.md"

PROTOCOL_EXAMPLES: dict[str, tuple[int, dict[str, bytes]]] = {
    "OFFER": (
        protocol.OFFER,
        {
            "version": b"1",
            "signal": b"11",
            "time": b"1700000000",
            "dumpable": b"1",
            "core_limit": b"18446744073709551615",
            "own_pid": b"40",
            "own_tid": b"40",
            "comm": b"webshop",
            "exe": b"/usr/local/bin/webshop",
        },
    ),
    "ACCEPT": (protocol.ACCEPT, {"version": b"1", "want": b"core"}),
    "REFUSE": (protocol.REFUSE, {"reason": b"full"}),
    "CORE": (protocol.CORE, {"descriptors": b"core pidfd"}),
    "DONE": (
        protocol.DONE,
        {"state": b"stored", "reason": b"", "size": b"67559424", "id": b"20231114T221320-271828-40-5f0c9a1e"},
    ),
}


def text_of(document: Path) -> str:
    return document.read_text(encoding="utf-8")


def blocks(text: str, language: str) -> list[str]:
    """The fenced blocks of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)


def names(documents: list[Path]) -> list[str]:
    return [str(document.relative_to(ROOT)) for document in documents]


# docs/protocol.md


@pytest.mark.parametrize("kind", PROTOCOL_EXAMPLES)
def test_the_bytes_in_the_protocol_are_a_message(kind: str) -> None:
    number, fields = PROTOCOL_EXAMPLES[kind]
    found = [block for block in blocks(text_of(ROOT / "docs/protocol.md"), "text") if block.startswith(f"{kind}\n0000")]
    assert len(found) == 1, f"docs/protocol.md has {len(found)} dumps of {kind}"
    data, shown = b"", ""
    for at, line in enumerate(found[0].splitlines()[1:]):
        offset, octets, column = re.fullmatch(r"([0-9a-f]{4})  ([0-9a-f ]+?) +\|(.*)\|", line).groups()  # type: ignore[union-attr]
        assert int(offset, 16) == 16 * at
        data += bytes.fromhex(octets)
        shown += column
    assert shown == "".join(chr(byte) if 32 <= byte < 127 else "." for byte in data)
    head = protocol.decode_header(data[:8])
    assert head == (number, len(fields), len(data) - 8)
    assert protocol.decode_fields(head[1], data[8:]) == fields
    body = protocol.encode_fields(fields)
    assert protocol.encode_header(number, fields, body) + body == data


def test_the_protocol_names_every_kind_and_limit() -> None:
    text = text_of(ROOT / "docs/protocol.md")
    for name in PROTOCOL_EXAMPLES:
        assert f"| {name} | {getattr(protocol, name)} |" in text
    for what, number in (
        ("body", f"{protocol.MAX_BODY} bytes"),
        ("fields in a message", protocol.MAX_FIELDS),
        ("name of a field", f"{protocol.MAX_NAME} bytes"),
        ("descriptors with a message", protocol.MAX_DESCRIPTORS),
        ("skipped messages in a row", protocol.MAX_SKIPPED),
    ):
        assert f"| {what} | {number} |" in text
    assert f"Kinds {protocol.FIRST_OPTIONAL_KIND} to 255" in text
    assert f"The core_pipe protocol, version {protocol.VERSION}\n" in text


@pytest.mark.parametrize("package", ["forwarder", "receiver"])
def test_the_protocol_has_every_field_that_is_used(package: str) -> None:
    """What stands in the code as a key of a message's fields stands in the specification as a row."""
    text = text_of(ROOT / "docs/protocol.md")
    used: set[str] = set()
    for source in (ROOT / package).rglob("*.py"):
        if source.name in ("apart.py", "ready.py", "route.py") or source.parent.name == "ctl":
            # Own words with a process apart (the stub's, corepipectl's); the same messages, but not this protocol.
            continue
        for node in ast.walk(ast.parse(text_of(source))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.args:
                # offer.number("signal"), message.fields.get("descriptors")
                owner = ast.unparse(node.func.value)
                first = node.args[0]
                is_read = node.func.attr == "number" or (node.func.attr == "get" and owner.endswith(".fields"))
                if is_read and isinstance(first, ast.Constant) and isinstance(first.value, str):
                    used.add(first.value)
    assert used >= ({"want", "reason"} if package == "forwarder" else {"signal", "descriptors", "tried"})
    for name in used:
        assert f"| `{name}` | " in text, f"docs/protocol.md has no row for the field '{name}'"


# docs/configuration.md


CONFIGURATION_TEXT = """\
# Settings

<!-- Written by `python -m tests.test_docs --write` from receiver/config.py and forwarder/install.py. -->

Nothing has to be set. What is wrong in a file or a variable is an error that names it, and what is allowed; an unknown
name in a file is an error, too. Files must be root's and writable by root only, and links are not followed.

## The receiver

Read at each start, in a container and on the host: `@DEFAULT_PATH@` (or the file that
`@PATH_VARIABLE@` names), and the environment, which wins. `core-pipe-receiver settings` shows this list.

```toml
store = "/data/crashes"
store_max = "2G"
workers = 4
```

A receiver with wrong settings refuses every offer and says why, to the forwarder, too: the record of the crash,
wherever it is kept then, has the reason.

@RECEIVER@
## Callbacks: `[[notify]]`

Tables in the receiver's file, one for each who is to be told of crashes: [callbacks.md](callbacks.md). A mistake in one
costs no core; it is said by the service that tells.

@NOTIFY@
Conditions, in the table `when`:

@WHEN@
## The forwarder

Read by `core-pipe-forwarder install` and put into what it installs: no crash reads a file, and a change counts when it
is installed again (`status` reminds you). `/etc/core_pipe/forwarder.toml`, and the environment of `install`, which
wins.

```toml
stall_seconds = 120
```

@FORWARDER@
### `store` (forwarder)

Where records go of crashes that no receiver took: the host's store. It is the receiver's setting `store`, read from the
host's `@DEFAULT_PATH@`, so that the host's receiver and the forwarder have one store.

- Default: `@STORE@`
- In the environment: `CORE_PIPE_STORE`
"""


def configuration() -> str:
    """Return docs/configuration.md as the code has it."""
    rows = [
        f"### `{name}`\n\n{meaning}\n\n- Default: `{default}`\n"
        f"- Allowed: {allowed}\n- In the environment: `{variable}`\n"
        for name, variable, default, allowed, meaning in config.describe()
    ]
    forwarders = [
        f"### `{name}` (forwarder)\n\nSeconds {meaning}.\n\n- Default: `{default:g}`\n"
        f"- Allowed: seconds, from {least:g} to {most:g}\n"
        f"- In the environment: `{install._ENVIRONMENT}{name.upper()}`\n"
        for name, (default, least, most, meaning) in install._NUMBERS.items()
    ]
    notify, when = (
        "\n".join(
            f"### `{key.name}` ({of})\n\n{key.meaning}\n\n- Default: `{key.default}`\n- Allowed: {key.allowed}\n"
            for key in keys
        )
        for of, keys in (("notify", callbacks.KEYS), ("notify.when", callbacks.WHEN))
    )
    text = CONFIGURATION_TEXT.replace("@NOTIFY@", notify).replace("@WHEN@", when)
    text = text.replace("@RECEIVER@", "\n".join(rows)).replace("@FORWARDER@", "\n".join(forwarders))
    text = text.replace("@DEFAULT_PATH@", config.DEFAULT_PATH).replace("@PATH_VARIABLE@", config.PATH_VARIABLE)
    return text.replace("@STORE@", install.STORE)


def test_the_list_of_settings_is_up_to_date() -> None:
    assert text_of(CONFIGURATION) == configuration(), "run: .venv/bin/python -m tests.test_docs --write"


@pytest.mark.parametrize("name", [*(setting.name for setting in config.SETTINGS), *install._NUMBERS])
def test_every_setting_is_documented(name: str) -> None:
    assert f"### `{name}`" in text_of(CONFIGURATION)


@pytest.mark.parametrize("document", names(DOCUMENTS))
def test_settings_in_the_documents_are_settings(document: str) -> None:
    for block in blocks(text_of(ROOT / document), "toml"):
        known = {setting.name for setting in config.SETTINGS} | set(install._NUMBERS) | set(config._TABLES)
        assert tomllib.loads(block).keys() <= known, block


# Reasons, in docs/operations.md


def texts(node: ast.expr | None) -> list[str]:
    """The fixed parts of a text in the code."""
    match node:
        case ast.Constant(value=str(text)):
            return [text]
        case ast.JoinedStr(values=values):
            return [part.value for part in values if isinstance(part, ast.Constant) and isinstance(part.value, str)]
        case ast.IfExp(body=body, orelse=orelse):
            return texts(body) + texts(orelse)
        case _:
            return []


def reasons() -> Iterator[tuple[str, str]]:
    """Where the code says why there is no core, no whole one, or no receiver; and what it says."""
    for source in [*ROOT.glob("receiver/*.py"), *ROOT.glob("forwarder/*.py")]:
        for node in ast.walk(ast.parse(text_of(source))):
            found: list[str] = []
            if not isinstance(node, ast.Call | ast.Assign):
                continue
            if isinstance(node, ast.Call):
                if ast.unparse(node.func).rpartition(".")[2] in ("Refused", "NoRoom", "TooLarge", "PeerGone"):
                    found = [text for argument in node.args for text in texts(argument)]
                found += [text for word in node.keywords if word.arg == "reason" for text in texts(word.value)]
            elif ast.unparse(node.targets[0]) == "reason":
                found = texts(node.value)
            for text in found:
                if len(text.strip(" :;,()")) >= 10:
                    yield f"{source.relative_to(ROOT)}:{node.lineno}", text.strip(" :;,()")


def test_every_reason_is_explained_to_operators() -> None:
    text = " ".join(text_of(ROOT / "docs/operations.md").split())
    found = dict(reasons())
    assert len(found) > 25
    missing = [f"{where}: {reason}" for where, reason in found.items() if reason not in text]
    assert not missing, "docs/operations.md has no row for these:\n" + "\n".join(missing)


# Links, and names of tests


def slug(title: str) -> str:
    """GitHub's anchor for a heading."""
    return re.sub(r"[^\w\- ]", "", title.strip().lower()).replace(" ", "-")


def headings(text: str) -> set[str]:
    prose = re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE)
    return {slug(title) for title in re.findall(r"^#+ (.+)$", prose, re.MULTILINE)}


@pytest.mark.parametrize("document", names(DOCUMENTS))
def test_links_lead_somewhere(document: str) -> None:
    text = text_of(ROOT / document)
    for target in re.findall(r"\[[^\]]*\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        at = (ROOT / document).parent / path if path else ROOT / document
        assert at.exists(), f"{document}: {target}"
        if anchor:
            assert anchor in headings(text_of(at)), f"{document}: {target}: no such heading"


@pytest.mark.parametrize("document", names(DOCUMENTS))
def test_files_and_tests_that_are_named_exist(document: str) -> None:
    for path, name in re.findall(
        r"`((?:tests|forwarder|receiver|systemd)/[\w./@-]+)(?:::(\w+))?`", text_of(ROOT / document)
    ):
        at = ROOT / path
        assert at.exists(), f"{document}: there is no {path}"
        if name:
            assert re.search(rf"def {name}\(|class {name}\b", text_of(at)), f"{document}: there is no {path}::{name}"


# Commands


@functools.cache
def help_of(program: str, *arguments: str) -> str | None:
    """What `program ARGUMENTS --help` says; None when it takes no such arguments."""
    mains = {
        "core-pipe-forwarder": forwarder.cli.__file__,
        "core-pipe-receiver": receiver.cli.__file__,
        "corepipectl": receiver.ctl.command.__file__,
    }
    assert program in mains
    done = subprocess.run(
        [f"{BIN}/{program}", *arguments, "--help"], capture_output=True, text=True, check=False, timeout=30
    )
    return done.stdout if done.returncode == 0 else None


def commands(document: Path) -> list[list[str]]:
    """The calls of our own programs in the blocks of shell commands, and in Containerfiles."""
    found = []
    text = text_of(document)
    for block in [*blocks(text, "sh"), *blocks(text, "dockerfile")]:
        for line in block.replace("\\\n", " ").splitlines():
            for part in re.split(r"&&|\|\||[;|&]", line.partition(" #")[0].removeprefix("RUN ")):
                words = shlex.split(part, comments=True) if part.count("'") % 2 == 0 else []
                words = words[1:] if words[:1] == ["sudo"] else words
                if words and words[0].rpartition("/")[2] in (
                    "core-pipe-forwarder",
                    "core-pipe-receiver",
                    "corepipectl",
                ):
                    found.append([words[0].rpartition("/")[2], *words[1:]])
    return found


def test_commands_are_found() -> None:
    assert ["core-pipe-receiver", "--listen", "/run/core_pipe.socket"] in commands(ROOT / "README.md")
    assert ["core-pipe-forwarder", "install"] in commands(ROOT / "README.md")


@pytest.mark.parametrize("document", names(DOCUMENTS))
def test_commands_are_ones_that_the_programs_know(document: str) -> None:
    for program, *arguments in commands(ROOT / document):
        subcommand = [word for word in arguments[:1] if not word.startswith("-")]
        said = help_of(program, *subcommand)
        assert said is not None, f"{document}: {program} has no command {subcommand}"
        if subcommand:
            top = help_of(program)
            assert top is not None
            assert re.search(rf"^    {subcommand[0]}\s", top, re.MULTILINE), f"{document}: {program} {subcommand}"
        for word in arguments:
            if word.startswith("-"):
                option = re.escape(word.partition("=")[0])
                assert re.search(rf"(^|[\s\[,]){option}\b", said), f"{document}: {program} {arguments}: {word}"


@pytest.mark.parametrize("document", names(DOCUMENTS))
def test_targets_of_make_exist(document: str) -> None:
    known = set(re.findall(r"^([a-z-]+):", text_of(ROOT / "Makefile"), re.MULTILINE))
    for target in re.findall(r"(?:^|`)make ([a-z-]+)", text_of(ROOT / document), re.MULTILINE):
        assert target in known, f"{document}: make {target}"


# The entry point in docs/images.md


@pytest.fixture(scope="module")
def installed() -> Iterator[Forwarder]:
    with forwarder_installed() as found:
        yield found


@pytest.mark.kernel
@pytest.mark.skipif(PlainContainer.why_unavailable() is not None, reason=str(PlainContainer.why_unavailable()))
def test_the_entry_point_waits_for_the_last_core(installed: Forwarder, tmp_path: Path) -> None:
    """The main program's crash ends the container; its core is there all the same, and its status is passed on."""
    (script,) = [block for block in blocks(text_of(ROOT / "docs/images.md"), "sh") if block.startswith("#!/bin/sh")]
    entry_point = tmp_path / "entry-point"
    entry_point.write_text(script, encoding="utf-8")
    entry_point.chmod(0o755)
    store = tmp_path / "store"
    before = len(installed.records())
    program = compile_crasher("crash")
    inner = f"until [ -S /run/core_pipe.socket ]; do sleep 0.05; done; exec {program} SEGV --fill 33554432 random"
    outer = f"mount -t tmpfs none /run && exec {shlex.quote(str(entry_point))} sh -c {shlex.quote(inner)}"
    done = subprocess.run(
        ["unshare", "--mount", "--propagation=private", "--pid", "--fork", "--mount-proc", "sh", "-c", outer],
        env={"PATH": f"{BIN}:/usr/sbin:/usr/bin:/sbin:/bin", "CORE_PIPE_STORE": str(store)},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 128 + 11, done.stderr
    assert sorted(path.suffix for path in store.iterdir() if not path.name.startswith(".")) == [".json", ".zst"], (
        done.stderr
    )
    assert len(installed.records()) == before


if __name__ == "__main__":
    if sys.argv[1:] != ["--write"]:
        sys.exit("usage: python -m tests.test_docs --write")
    CONFIGURATION.write_text(configuration(), encoding="utf-8")
    print(f"written: {CONFIGURATION.relative_to(ROOT)}")
