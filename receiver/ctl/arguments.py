"""Words of the command line become values, as the settings' words do; and the options that several commands share.

coredumpctl(1) takes its options before the command and after it. So does corepipectl: those that stand before it are
given to the command by `settle`, if it takes them (`add_*` puts that down), and refused if it does not.
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from receiver.ctl import times
from receiver.tables import shown

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

JSON_MODES = ("short", "pretty", "off")
_EARLY = "early_"
MATCH_HELP = "an id or its beginning, a pid, a comm, a path, a signature's beginning, or FIELD=VALUE"


def parsed(parse: Callable[[str], Any]) -> Callable[[str], Any]:
    """Make a setting's parser one for arguments."""

    def parse_argument(text: str) -> Any:
        try:
            return parse(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(f"{shown(text)!r} {error}") from None

    return parse_argument


def _count(text: str) -> int:
    number = int(text) if text.isascii() and text.isdigit() else 0
    if number < 1:
        raise ValueError("is no number of at least 1")
    return number


class _JsonMode(argparse.Action):
    """`--json` alone is `--json=pretty`, and does not take a MATCH that follows it for its mode."""

    def __call__(
        self, _parser: argparse.ArgumentParser, namespace: argparse.Namespace, value: Any, _option: str | None = None
    ) -> None:
        if value not in JSON_MODES:
            namespace.spare = [*getattr(namespace, "spare", ()), value]
            value = "pretty"
        setattr(namespace, self.dest, None if value == "off" else value)


# What each group adds: option strings, and what argparse is told.
_Options = tuple[tuple[tuple[str, ...], dict[str, Any]], ...]
_RANGE: _Options = (
    (
        ("-S", "--since"),
        {"type": parsed(times.parse), "metavar": "DATE", "help": "only crashes since then, as in systemd.time(7)"},
    ),
    (("-U", "--until"), {"type": parsed(times.parse), "metavar": "DATE", "help": "only crashes until then"}),
)
_ROWS: _Options = (
    (("-n",), {"dest": "rows", "type": parsed(_count), "metavar": "N", "help": "at most so many, the newest"}),
    (("-1",), {"dest": "rows", "action": "store_const", "const": 1, "help": "only the newest"}),
    (("-r", "--reverse"), {"action": "store_true", "help": "the newest first"}),
)
_JSON: _Options = (
    (
        ("--json",),
        {"metavar": "MODE", "help": "as JSON, for programs: short, pretty (the same as --json alone), or off"},
    ),
)
_TABLE: _Options = (
    (("--no-legend",), {"action": "store_true", "help": "without the heading"}),
    (("--no-pager",), {"action": "store_true", "help": "not through a pager"}),
)
_QUIET: _Options = ((("-q", "--quiet"), {"action": "store_true", "help": "say nothing that is only a hint"}),)
_FIELD: _Options = (
    (("-F", "--field"), {"metavar": "FIELD", "help": "only the values of this field, of a crash on each line"}),
)
_OUTPUT: _Options = (
    (("-o", "--output"), {"metavar": "FILE", "help": "write the core there (default: standard output)"}),
)
_DEBUGGER: _Options = (
    (
        ("--debugger",),
        {"metavar": "PROGRAM", "help": "this one (default: $COREPIPECTL_DEBUGGER, $SYSTEMD_DEBUGGER, gdb, lldb)"},
    ),
    (
        ("-A", "--debugger-arguments"),
        {"metavar": "ARGS", "help": "more arguments for the debugger, quoted as for a shell: -A '-batch -ex bt'"},
    ),
)
_CONTAINERS: _Options = (
    (
        ("-M", "--machine"),
        {
            "metavar": "NAME",
            "help": "in this container of the host: its name, its id's beginning, ENGINE:NAME, or a pid",
        },
    ),
    (("-a", "--all"), {"action": "store_true", "help": "here and in all containers of the host that run"}),
)
GROUPS = {
    "range": _RANGE,
    "rows": _ROWS,
    "json": _JSON,
    "table": _TABLE,
    "quiet": _QUIET,
    "field": _FIELD,
    "output": _OUTPUT,
    "debugger": _DEBUGGER,
    "containers": _CONTAINERS,
}


def add_matches(parser: argparse.ArgumentParser, *, least: str = "*", text: str = MATCH_HELP) -> None:
    """Let a command have MATCHes: as many as one likes."""
    parser.add_argument("match", nargs=least, metavar="MATCH", help=text)


def add_options(parser: argparse.ArgumentParser, groups: str, *, hidden: bool = False) -> None:
    """Let a command have the options of these groups (see GROUPS). hidden: without offering them to anybody."""
    taken: set[str] = set(parser.get_default("taken") or ())
    for group in groups.split():
        for names, told in GROUPS[group]:
            more: dict[str, Any] = {"nargs": "?", "const": "pretty", "action": _JsonMode} if group == "json" else {}
            if hidden:
                more["help"] = argparse.SUPPRESS
            taken.add(parser.add_argument(*names, **{**told, **more}).dest)
    parser.set_defaults(taken=frozenset(taken))


def add_early(parser: argparse.ArgumentParser) -> None:
    """Let all of these options stand before the command."""
    for options in GROUPS.values():
        for names, told in options:
            dest = told.get("dest") or next(name for name in names if name.startswith("--"))[2:].replace("-", "_")
            more: dict[str, Any] = {"dest": _EARLY + dest, "default": argparse.SUPPRESS}
            if options is _JSON:
                more["choices"] = JSON_MODES
            # The help of the program is about its commands; each one's help has its options.
            parser.add_argument(*names, **{**told, **more, "help": argparse.SUPPRESS})


# Their values may begin with a '-', as in `--since -1h`: argparse would take such a one for an option.
_JOINED = {"-S": "--since", "-U": "--until", "-A": "--debugger-arguments"}


def spelled_out(arguments: Sequence[str], commands: Iterable[str]) -> list[str]:
    """Return the words as argparse takes them for what they mean (see _JOINED).

    A bare `--json` before the command gets its mode, so that it does not take the command for one.
    """
    found: list[str] = []
    before = True
    words = iter(enumerate(arguments))
    for number, word in words:
        following = arguments[number + 1] if number + 1 < len(arguments) else ""
        if word == "--":
            return [*found, *arguments[number:]]
        before = before and word not in commands
        name = _JOINED.get(word, word)
        if name in _JOINED.values() and following.startswith("-"):
            found.append(f"{name}={following}")
            next(words)
        elif before and word == "--json" and following not in JSON_MODES:
            found.append("--json=pretty")
        else:
            found.append(word)
    return found


def settle(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """Give the command what stood before it. Ends the program (argparse's way) when it does not take that."""
    taken: frozenset[str] = getattr(options, "taken", frozenset())
    for name, value in list(vars(options).items()):
        if not name.startswith(_EARLY):
            continue
        delattr(options, name)
        dest = name.removeprefix(_EARLY)
        if dest not in taken:
            spelled = next(
                names[-1]
                for group in GROUPS.values()
                for names, told in group
                if dest == told.get("dest", names[-1].lstrip("-").replace("-", "_"))
            )
            parser.error(f"'{options.command}' does not take {spelled} from before it")
        if dest == "json" and value == "off":
            value = None  # noqa: PLW2901
        if getattr(options, dest) in (None, False):
            setattr(options, dest, value)
    spare = getattr(options, "spare", ())
    if spare:
        if not isinstance(getattr(options, "match", None), list):
            parser.error(f"--json={shown(spare[0])}: there are {', '.join(JSON_MODES)}")
        options.match += spare
    if getattr(options, "since", None) is not None and getattr(options, "until", None) is not None:
        since, until = options.since, options.until
        if since > until:
            parser.error("--since= must be before --until=")


def limits_of(options: argparse.Namespace) -> dict[str, Any]:
    """Return what `matching.crashes` is to be told of a command with "range" and "quiet"."""
    return {"since": options.since, "until": options.until, "quiet": options.quiet}
