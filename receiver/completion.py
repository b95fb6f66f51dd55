r"""What can come next on a command line: asked by the shells, answered from the programs' own parsers.

The scripts in completions/ run `PROGRAM __complete SHELL WORD...` at a Tab; the last word is the one under the cursor.
The answer's first line says what kind of word is wanted ("words", "files", "dirs": the last two are the shell's own
business), each further line has one word, and after a tab what it is.

Some words are of a crashed program's choice (its name, its path). No shell may run them: they are never evaluated on
the way back (the scripts use neither eval nor `compgen -W`), what is not printable or looks like an option is left out,
and what has a meaning to bash is quoted here. zsh and fish quote what they insert by themselves.
"""

from __future__ import annotations

import argparse
import re
import shlex
import sys
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    Words = Iterable[tuple[str, str]]
    # From the options that were given so far to words, each with what it is. Raises whatever it likes.
    Values = Mapping[str, Callable[[argparse.Namespace, str], Words]]

COMMAND = "__complete"
SHELLS = ("bash", "zsh", "fish")
MAX_WORDS = 2000  # a list that nobody reads to its end
_MAX_ABOUT = 72  # characters

# By the name that a value has in the help.
_FILES = frozenset({"FILE", "PATH"})
_DIRS = frozenset({"DIR"})
# What readline and the shell leave as it is.
_PLAIN = re.compile(r"[\w@%+:,./=-]", re.ASCII)
# What has a meaning within an open quote. A '!' would be history's.
_IN_QUOTES = frozenset("'\"\\$`!")


class Wanted(NamedTuple):
    """What may stand at the cursor.

    kind: "words", "files" or "dirs". words: with what they are. prefix: what of the word is there. option: `--name=`
    when the value is part of the option's word, else empty.
    """

    kind: str
    words: list[tuple[str, str]]
    prefix: str
    option: str


def answer(parser: argparse.ArgumentParser, arguments: Sequence[str], values: Values | None = None) -> int:
    """Print the answer to a shell. arguments: SHELL WORD.... Returns the exit status; 2 for a call that is none."""
    if len(arguments) < 2 or arguments[0] not in SHELLS:
        return 2
    shell, *words = arguments
    split = False
    if shell == "bash":
        words, split = _joined(words)
        typed = words[-1]
        words = [_unquoted(word) for word in words]
    else:
        typed = words[-1]
        words[-1] = _unquoted(typed) if shell == "fish" else typed
    wanted = want(parser, words, values or {})
    lines = [wanted.kind]
    for word, about in wanted.words[:MAX_WORDS]:
        if shell == "bash":
            quoted = _for_bash(word, typed)
            if quoted is None:
                continue
            # readline completes what is behind the '=', when it took that for the end of a word.
            lines.append(quoted if split else wanted.option + quoted)
        else:
            lines.append(f"{wanted.option}{word}\t{about}")
    # A word that the terminal's character set cannot say is shown, and matches nothing.
    sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    print("\n".join(lines))
    return 0


def want(parser: argparse.ArgumentParser, words: Sequence[str], values: Values) -> Wanted:
    """Return what may come next. words: what is typed, without quotes; the last one is unfinished, maybe empty."""
    *before, current = words
    defaults, given = _defaults(parser), dict[str, object]()
    options, positionals = _options(parser), _positionals(parser)
    expecting: argparse.Action | None = None
    only_positionals = False
    for word in before:
        if expecting is not None:
            given[expecting.dest] = word
            expecting = None
        elif word == "--" and not only_positionals:
            only_positionals = True
        elif word.startswith("-") and len(word) > 1 and not only_positionals:
            name, equals, value = word.partition("=")
            option = _option(options, name)
            if option is None:
                continue
            if equals or option.nargs is not None:
                given[option.dest] = value if equals else True
            elif word.startswith("--") or len(word) == 2:
                expecting = option
        elif positionals:
            found = positionals[0]
            if isinstance(found, argparse._SubParsersAction):
                if word not in found.choices:
                    return Wanted("words", [], current, "")
                parser = found.choices[word]
                defaults |= _defaults(parser)
                options, positionals = _options(parser), _positionals(parser)
            elif found.nargs not in ("*", "+", argparse.REMAINDER):
                positionals = positionals[1:]
    # What stands before the command holds for it, too.
    namespace = argparse.Namespace(**defaults | given)
    if expecting is not None:
        return _values(expecting, current, "", namespace, values)
    if current.startswith("-") and not only_positionals:
        name, equals, value = current.partition("=")
        option = _option(options, name)
        if equals and option is not None and option.nargs != 0:
            return _values(option, value, name + equals, namespace, values)
        return Wanted("words", _named(options, current), current, "")
    if positionals:
        return _values(positionals[0], current, "", namespace, values)
    return Wanted("words", [], current, "")


def _defaults(parser: argparse.ArgumentParser) -> dict[str, object]:
    told = (action for action in parser._actions if argparse.SUPPRESS not in (action.dest, action.default))
    return {action.dest: action.default for action in told} | parser._defaults


def _options(parser: argparse.ArgumentParser) -> dict[str, argparse.Action]:
    return parser._option_string_actions


def _positionals(parser: argparse.ArgumentParser) -> list[argparse.Action]:
    return [action for action in parser._actions if not action.option_strings]


def _option(options: Mapping[str, argparse.Action], name: str) -> argparse.Action | None:
    """Return the option that is meant, also by its beginning, as argparse takes it; -n5 is -n."""
    if name in options:
        return options[name]
    if name.startswith("--"):
        near = {id(action): action for long, action in options.items() if long.startswith(name)}
        return next(iter(near.values())) if len(near) == 1 else None
    return options.get(name[:2])


def _named(options: Mapping[str, argparse.Action], prefix: str) -> list[tuple[str, str]]:
    """Return the options, an option's long name only, where it has one."""
    found = {}
    for action in options.values():
        if action.help == argparse.SUPPRESS:
            continue
        long = [name for name in action.option_strings if name.startswith("--")]
        for name in [name for name in action.option_strings if name.startswith(prefix)]:
            if not long or name in long or prefix == name:
                found[name] = _about(action)
    return sorted(found.items())


def _values(action: argparse.Action, prefix: str, option: str, given: argparse.Namespace, values: Values) -> Wanted:
    name = action.metavar if isinstance(action.metavar, str) else ""
    words: list[tuple[str, str]] = []
    if isinstance(action, argparse._SubParsersAction):
        words = [(choice.dest, _short(choice.help or "")) for choice in action._choices_actions]
    elif action.choices is not None:
        words = [(str(choice), "") for choice in action.choices]
    elif name in _FILES or name in _DIRS:
        return Wanted("files" if name in _FILES else "dirs", [], prefix, option)
    elif name in values:
        try:
            words = list(values[name](given, prefix))
        except Exception:
            # A Tab is no place for an error; the command itself will tell.
            words = []
    found: dict[str, str] = {}
    for word, about in words:
        if word.startswith(prefix) and harmless(word):
            found.setdefault(word, about)
    return Wanted("words", [(word, _short(about)) for word, about in found.items()], prefix, option)


def harmless(word: str) -> bool:
    """Whether a word of a stranger's may be offered: one line, nothing invisible, and no option."""
    return bool(word) and word.isprintable() and not word.startswith("-")


def _about(action: argparse.Action) -> str:
    text = (action.help or "").replace("%%", "%")
    return _short(re.sub(r"%\((\w+)\)s", lambda found: str(getattr(action, found[1], "")), text))


def _short(text: str) -> str:
    text = "".join(c if c.isprintable() else " " for c in text)
    return text if len(text) <= _MAX_ABOUT else text[: _MAX_ABOUT - 3] + "..."


def _joined(words: Sequence[str]) -> tuple[list[str], bool]:
    """Undo what readline does to `--name=value`: three words. Also returns whether it did that to the last one."""
    found: list[str] = []
    split = False
    glue = False
    for word in words:
        split = False
        if word == "=" and found and found[-1].startswith("--") and "=" not in found[-1]:
            found[-1] += "="
            glue = split = True
        elif glue:
            found[-1] += word
            glue, split = False, True
        else:
            found.append(word)
    return found, split


def _unquoted(word: str) -> str:
    """Return a word without its quotes, which may be open still. Nothing in it is looked up or run."""
    for tail in ("", "'", '"', "\\"):
        try:
            parts = shlex.split(word + tail)
        except ValueError:
            continue
        return parts[0] if len(parts) == 1 else "".join(parts)
    return word


def _for_bash(word: str, typed: str) -> str | None:
    """Return a word as bash takes it from COMPREPLY; None when it cannot stand where the cursor is."""
    value = typed.partition("=")[2] if typed.startswith("--") else typed
    if value[:1] in ("'", '"'):
        # readline puts it between the quotes as it is.
        return None if _IN_QUOTES & set(word) else word
    return "".join(c if _PLAIN.match(c) or ord(c) > 127 else "\\" + c for c in word)
