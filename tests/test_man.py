"""The manual: what it says of options, settings, fields and units is what the code has, and man(1) can show it.

`.venv/bin/python -m tests.test_man --write` writes docs/man/generated anew.
"""

from __future__ import annotations

import argparse
import itertools
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import forwarder.cli
import receiver.cli
from forwarder import install
from receiver import config, protocol
from receiver.ctl import command
from receiver.notify import settings as callbacks
from receiver.record import Core, Record
from tests.support.mounts import CHECKOUT

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(CHECKOUT)
MAN = ROOT / "docs/man"
GENERATED = MAN / "generated"
PAGES = sorted(MAN.glob("*.rst"))
PARSERS = {
    "corepipectl": command.parser,
    "core-pipe-receiver": receiver.cli._parser,
    "core-pipe-forwarder": forwarder.cli._parser,
}


def escaped(text: str) -> str:
    """Text as reStructuredText that means nothing but itself."""
    # "://" would begin a link, and man(1) shows a link in pointed brackets.
    return re.sub(r"([\\*`|_<>]|:(?=//))", r"\\\1", text)


# Commands and options, from the parsers


def shown_name(action: argparse.Action) -> str:
    """How an option or a word is written: **-o** *FILE*, **--output** *FILE*."""
    name = action.metavar if isinstance(action.metavar, str) else "|".join(str(c) for c in action.choices or ())
    value = f"*{escaped(name or action.dest.upper())}*"
    if not action.option_strings:
        return {"?": f"[{value}]", "*": f"[{value}...]", "+": f"{value}..."}.get(str(action.nargs), value)
    if action.nargs == 0:
        return ", ".join(f"**{escaped(option)}**" for option in action.option_strings)
    if action.nargs == "?":
        return ", ".join(f"**{escaped(option)}**\\ [=\\ {value}]" for option in action.option_strings)
    return ", ".join(f"**{escaped(option)}** {value}" for option in action.option_strings)


def help_of(action: argparse.Action) -> str:
    text = re.sub(r"%\((\w+)\)s", lambda found: str(getattr(action, found[1], "")), action.help or "")
    return escaped(text.replace("%%", "%"))


def described(parser: argparse.ArgumentParser, indent: str = "") -> Iterator[str]:
    """Yield the lines of a definition list: a parser's options and words, then its commands with theirs."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction) or action.help == argparse.SUPPRESS:
            continue
        if isinstance(action, argparse._HelpAction) and indent:
            continue  # each command has it
        if not action.option_strings and not action.help:
            continue  # the command's own line says it all
        yield from (f"{indent}{shown_name(action)}", f"{indent}  {help_of(action)}", "")


def commands_of(parser: argparse.ArgumentParser, name: str = "") -> Iterator[str]:
    for action in parser._actions:
        if not isinstance(action, argparse._SubParsersAction):
            continue
        for choice in action._choices_actions:
            called = f"{name} {choice.dest}".strip()
            inner = action.choices[choice.dest]
            words = [shown_name(a) for a in inner._actions if not a.option_strings and a.nargs != argparse.PARSER]
            options = len([a for a in inner._actions if a.option_strings]) > 1
            head = " ".join([f"**{escaped(called)}**", *(["[*options*]"] if options else []), *words])
            yield from (head, f"  {escaped(choice.help or '')}", "")
            yield from described(inner, "  ")
            yield from epilog_of(inner, "  ")
            yield from commands_of(inner, called)


def epilog_of(parser: argparse.ArgumentParser, indent: str) -> Iterator[str]:
    """Yield what stands below a help: paragraphs, and what is set in (examples, lists) as it is."""
    for part in re.split(r"\n[ ]*\n", (parser.epilog or "").strip("\n")):
        for set_in, group in itertools.groupby(part.splitlines(), lambda line: line.startswith(" ")):
            lines = list(group)
            if set_in:
                yield from (f"{indent}::", "", *(f"{indent}  {line}" for line in lines), "")
            else:
                first = lines[0][:1].upper() + lines[0][1:]
                yield from (*(f"{indent}{escaped(line)}" for line in [first, *lines[1:]]), "")


def settings_of_the_receiver() -> Iterator[str]:
    for name, variable, default, allowed, meaning in config.describe():
        yield from (f"**{escaped(name)}** = {escaped(repr(default))}", f"  {escaped(meaning)}", "")
        yield from (f"  Allowed: {escaped(allowed)}. In the environment: **{escaped(variable)}**.", "")


def settings_of_callbacks() -> Iterator[str]:
    for of, keys in (("", callbacks.KEYS), ("when.", callbacks.WHEN)):
        for key in keys:
            yield from (f"**{escaped(of + key.name)}**", f"  {escaped(key.meaning)}", "")
            yield from (f"  Default: {escaped(key.default)}. Allowed: {escaped(key.allowed)}.", "")


def settings_of_the_forwarder() -> Iterator[str]:
    for name, (default, least, most, meaning) in install._NUMBERS.items():
        yield from (f"**{escaped(name)}** = {default:g}", f"  Seconds {escaped(meaning)}.", "")
        variable = f"{install._ENVIRONMENT}{name.upper()}"
        yield from (f"  Allowed: {least:g} to {most:g}. In the environment: **{escaped(variable)}**.", "")


def fields_of_the_protocol() -> Iterator[str]:
    """From the tables in docs/protocol.md, which is the specification."""
    text = (ROOT / "docs/protocol.md").read_text(encoding="utf-8")
    for kind, number, body in re.findall(r"^### ([A-Z]+) \((\d+)\)\n(.*?)(?=^##)", text, re.DOTALL | re.MULTILINE):
        yield from (f"**{kind}** ({number})", "")
        head: list[str] = []
        for line in body.splitlines():
            cells = [cell.strip() for cell in line.strip("|").split("|")] if line.startswith("|") else []
            if cells and cells[0] == "field":
                head = cells
            elif head and cells and cells[0].startswith("`"):
                row = dict(zip(head, cells, strict=True))
                facts = [row["form"], row.get("unit, numbering") or row.get("unit", "")]
                facts.append("required" if "yes" in row["required"] else "")
                yield f"  {plain(row['field'])} ({plain(', '.join(fact for fact in facts if fact))})"
                yield from (f"    {plain(row['meaning'])}", "")


def plain(markdown: str) -> str:
    return escaped(re.sub(r"\*\*|`|\[([^\]]*)\]\([^)]*\)", r"\1", markdown))


def fragments() -> dict[str, str]:
    """Return the name and the text of each file in docs/man/generated."""
    found: dict[str, list[str]] = {}
    for program, parser in PARSERS.items():
        found[f"{program}.options"] = list(described(parser()))
        found[f"{program}.commands"] = list(commands_of(parser()))
    found["corepipectl.notes"] = list(epilog_of(command.parser(), ""))
    found["receiver.toml"] = list(settings_of_the_receiver())
    found["receiver.toml.notify"] = list(settings_of_callbacks())
    found["forwarder.toml"] = list(settings_of_the_forwarder())
    found["protocol"] = list(fields_of_the_protocol())
    first = ".. Written by `python -m tests.test_man --write`.\n\n"
    return {f"{name}.rst": first + "\n".join(lines).rstrip() + "\n" for name, lines in found.items()}


@pytest.mark.parametrize("name", sorted(fragments()))
def test_what_comes_from_the_code_is_up_to_date(name: str) -> None:
    text = (GENERATED / name).read_text(encoding="utf-8")
    assert text == fragments()[name], "run: .venv/bin/python -m tests.test_man --write"


def test_nothing_else_is_generated() -> None:
    assert {path.name for path in GENERATED.iterdir()} == set(fragments())


# What is written by hand


def text_of(page: str) -> str:
    return (MAN / f"{page}.rst").read_text(encoding="utf-8")


def test_every_unit_has_a_page() -> None:
    """Under its own name, or as another name of a page."""
    known = {path.name.removesuffix(".rst") for path in PAGES}
    for path in PAGES:
        known |= set(path.read_text(encoding="utf-8").partition("\n")[0].split())
    for unit in [
        file for file in ROOT.glob("systemd/*.*") if file.suffix in (".service", ".socket", ".path", ".timer")
    ]:
        assert f"{unit.name}.8" in known, f"docs/man has no page for {unit.name}"


@pytest.mark.parametrize("name", [*Record.__annotations__, *Core.__annotations__])
def test_every_field_of_a_record_is_explained(name: str) -> None:
    assert re.search(rf"^ *\*\*{name}\*\*", text_of("core_pipe-store.5"), re.MULTILINE)


def test_only_fields_of_a_record_are_explained() -> None:
    fields = re.findall(r"^ *\*\*(\w+)\*\* \((?:text|number|list|table)", text_of("core_pipe-store.5"), re.MULTILINE)
    assert set(fields) == {*Record.__annotations__, *Core.__annotations__}


@pytest.mark.parametrize("name", ["MAX_BODY", "MAX_FIELDS", "MAX_NAME", "MAX_DESCRIPTORS"])
def test_limits_of_the_protocol_are_in_its_page(name: str) -> None:
    assert re.search(rf"\b{getattr(protocol, name)}\b", text_of("core_pipe-protocol.7"))


@pytest.mark.parametrize("page", [path.name for path in PAGES])
def test_pages_that_are_named_exist(page: str) -> None:
    """Of our own names, in the form name(section)."""
    known = {path.name.removesuffix(".rst") for path in PAGES}
    for path in PAGES:
        known |= set(path.read_text(encoding="utf-8").partition("\n")[0].split())
    for name, section in re.findall(r"\*\*([\w.@-]+)\*\*\\? ?\((\d)\)", (MAN / page).read_text(encoding="utf-8")):
        if name.startswith(("core", "receiver.", "forwarder.")) and name not in ("core", "coredumpctl"):
            assert f"{name}.{section}" in known, f"{page}: there is no {name}({section})"


# As it is read


@pytest.fixture(scope="module")
def rendered(tmp_path_factory: pytest.TempPathFactory) -> Path:
    into = tmp_path_factory.mktemp("man")
    done = subprocess.run(
        [sys.executable, MAN / "render.py", into], capture_output=True, text=True, check=False, timeout=60
    )
    assert (done.returncode, done.stderr) == (0, "")
    return into


def test_man_shows_every_page_without_a_warning(rendered: Path) -> None:
    if shutil.which("man") is None:
        pytest.skip("no man here; apt-get install man-db")
    pages = sorted(rendered.glob("man*/*"))
    assert len(pages) > len(PAGES)
    for page in pages:
        done = subprocess.run(
            ["man", "--warnings", "-E", "UTF-8", "-l", page],
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
            cwd=rendered,
            env={"PATH": "/usr/bin:/bin", "MANWIDTH": "100", "LC_ALL": "C.UTF-8"},
        )
        assert (done.returncode, done.stderr) == (0, ""), page.name
        for heading in ("NAME", "SEE ALSO"):
            assert re.search(rf"^{heading}$", done.stdout, re.MULTILINE), page.name


def test_mandoc_finds_nothing_wrong(rendered: Path) -> None:
    """Another reader of roff than groff, and a stricter one; alpine and the BSDs use it."""
    if shutil.which("mandoc") is None:
        pytest.skip("no mandoc here; apt-get install mandoc")
    for page in sorted(rendered.glob("man*/*")):
        done = subprocess.run(
            ["mandoc", "-T", "lint", "-W", "error", page],
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
            cwd=rendered,
        )
        assert (done.returncode, done.stdout) == (0, ""), page.name


@pytest.mark.long
def test_a_wheel_installs_the_manual_and_the_completions(tmp_path: Path) -> None:
    """Built as pip does it, from a copy of the tree, which stays as it is; needs the package index."""
    source = tmp_path / "source"
    names = ["forwarder", "receiver", "systemd", "completions", "docs"]
    for name in names:
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    files = ["pyproject.toml", "hatch_build.py", "README.md", "LICENSE"]
    for name in files:
        shutil.copy(ROOT / name, source)
    subprocess.run(["/usr/bin/python3", "-m", "venv", tmp_path / "venv"], check=True, timeout=120)
    subprocess.run(
        [tmp_path / "venv/bin/pip", "install", "--quiet", "--no-deps", source],
        check=True,
        timeout=600,
        capture_output=True,
    )
    share = tmp_path / "venv/share"
    found = {str(path.relative_to(share)) for path in share.rglob("*") if path.is_file()}
    assert found >= {f"man/man{path.stem[-1]}/{path.stem}" for path in PAGES}
    assert found >= {f"bash-completion/completions/{program}" for program in PARSERS}
    assert found >= {f"fish/vendor_completions.d/{program}.fish" for program in PARSERS}
    assert "zsh/site-functions/_core_pipe" in found
    assert sorted(path.name for path in source.iterdir()) == sorted([*names, *files])


def test_a_mistake_in_a_page_is_an_error(tmp_path: Path) -> None:
    """A page that nobody can read must not get into a wheel."""
    shutil.copytree(MAN, tmp_path / "docs/man")
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    with (tmp_path / "docs/man/corepipectl.1.rst").open("a", encoding="utf-8") as page:
        page.write("\n`an open quote\n")
    done = subprocess.run(
        [sys.executable, tmp_path / "docs/man/render.py", tmp_path / "out"],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode != 0
    assert "corepipectl.1.rst" in done.stderr


if __name__ == "__main__":
    if sys.argv[1:] != ["--write"]:
        sys.exit("usage: python -m tests.test_man --write")
    GENERATED.mkdir(exist_ok=True)
    for stale in GENERATED.iterdir():
        stale.unlink()
    for name, text in fragments().items():
        (GENERATED / name).write_text(text, encoding="utf-8")
    print(f"written: {GENERATED.relative_to(ROOT)}")
