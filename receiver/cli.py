"""core-pipe-receiver: the receiver's program, and its installation into an image."""

from __future__ import annotations

import os
import resource
import sys
from typing import TYPE_CHECKING

import prctl

if TYPE_CHECKING:
    import argparse

    from receiver.config import Config

EXIT_OK = 0
EXIT_FAILURE = 1
EXIT_USAGE = 2
# <sysexits.h>, which systemd shows as CONFIG (systemd.exec(5))
EX_CONFIG = 78
BACKLOG = 128

EPILOG = """\
examples:
  core-pipe-receiver --listen /run/core_pipe.socket   a resident receiver, for a container without systemd
  core-pipe-receiver install --root /srv/image        put the units into an image and enable the socket
  core-pipe-receiver install --accept no              one process that forks a worker for each crash
  core-pipe-receiver settings                         every setting, its default and what is allowed
  core-pipe-receiver notify --test NAME               tell a callback of a crash that never was
"""


def protect() -> None:
    """Make sure that a crash of the receiver is never a crash for the receiver: no loop of dumps.

    Not dumpable: the kernel does not even begin (coredump.c). A core limit of 1 stops it at a pipe (core(5)), should
    something make us dumpable again. And no other process of our user may look into cores as they pass.
    """
    prctl.set_dumpable(0)
    try:
        resource.setrlimit(resource.RLIMIT_CORE, (1, resource.getrlimit(resource.RLIMIT_CORE)[1]))
    except (OSError, ValueError):
        # A hard limit of 0, or a sandbox that keeps limits as they are (and sets LimitCORE=1 itself).
        pass


def main(arguments: list[str] | None = None) -> int:
    """Run the program. Returns its exit status."""
    arguments = sys.argv[1:] if arguments is None else arguments
    protect()
    # The way of each crash with Accept=yes: argparse would cost it 20 ms, and a resident process 1 MiB for good.
    if not arguments:
        return _serve(None)
    if len(arguments) == 2 and arguments[0] == "--listen" and not arguments[1].startswith("-"):
        return _serve(arguments[1])
    if arguments[0] == "__complete":
        from receiver import completion  # noqa: PLC0415 - see above

        return completion.answer(_parser(), arguments[1:])
    found = _parser().parse_args(arguments)
    if found.command is None:
        return _serve(found.listen)
    return int(found.run(found))


def _parser() -> argparse.ArgumentParser:
    import argparse  # noqa: PLC0415 - see main

    from receiver import __version__  # noqa: PLC0415
    from receiver.notify import command as notify  # noqa: PLC0415

    parser = argparse.ArgumentParser(
        prog="core-pipe-receiver",
        description="Takes cores of crashed processes over a socket and keeps them, under this container's own limits. "
        "Without arguments it serves the socket that systemd passes.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"core_pipe {__version__}")
    parser.add_argument("--listen", metavar="PATH", help="listen there by itself, and stay (no systemd needed)")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    install = commands.add_parser("install", help="put the units into an image, and enable the socket offline")
    for command in (install, commands.add_parser("uninstall", help="take the units out of an image")):
        command.add_argument("--root", default="/", metavar="DIR", help="the image's root directory (default: /)")
    install.add_argument(
        "--accept",
        choices=("yes", "no"),
        default="yes",
        help="yes (default): systemd starts a process for each crash; no: one process that forks, and leaves when idle",
    )
    install.add_argument("--program", metavar="PATH", help="core-pipe-receiver's path in the image, where it differs")
    install.add_argument("--host", action="store_true", help="the host's own receiver, for its own processes")
    install.set_defaults(run=_install)
    commands.choices["uninstall"].set_defaults(run=_uninstall)
    commands.add_parser("settings", help="show every setting").set_defaults(run=_settings)
    notify.add(commands.add_parser("notify", help="tell who is to be told of crashes; test that, and show its state"))
    return parser


def _serve(path: str | None) -> int:
    from receiver import activation  # noqa: PLC0415 - --help needs none of these
    from receiver.config import Config, ConfigError, load  # noqa: PLC0415
    from receiver.log import log  # noqa: PLC0415
    from receiver.service import Service, serve_one  # noqa: PLC0415
    from receiver.worker import refuse_all  # noqa: PLC0415

    os.umask(0o077)
    wrong: ConfigError | None = None
    config = Config()
    try:
        config = load()
    except ConfigError as error:
        wrong = error
        for line in str(error).splitlines():
            log(line, error=True)
    try:
        sockets = [activation.listen(path, BACKLOG)] if path is not None and wrong is None else activation.passed()
    except activation.ActivationError as error:
        log(str(error), error=True)
        return EXIT_FAILURE
    if path is not None and wrong is not None:
        return EX_CONFIG
    if not sockets:
        log("systemd passed no socket. Start core_pipe-forward.socket, or listen with --listen PATH", error=True)
        return EXIT_USAGE
    if wrong is not None:
        # Said to the forwarder too: its record on the host will tell why this container gets no cores.
        return refuse_all(sockets[0], f"its settings are wrong: {wrong.problems[0]}", config)
    if activation.is_listening(sockets[0]):
        return Service(sockets[0], config, may_leave=path is None).run() if _warm(config) else EXIT_FAILURE
    return serve_one(sockets[0], config)


def _warm(config: Config) -> bool:
    """Import what workers need, so that each fork has it."""
    if config.compression == "zstd":
        import zstandard  # noqa: F401, PLC0415
    return True


def _install(found: argparse.Namespace) -> int:
    from receiver import images  # noqa: PLC0415

    try:
        lines = images.install(found.root, accept=found.accept == "yes", program=found.program, host=found.host)
    except images.ImageError as error:
        print(f"core-pipe-receiver: {error}", file=sys.stderr)
        return EXIT_FAILURE
    print("\n".join(lines))
    return EXIT_OK


def _uninstall(found: argparse.Namespace) -> int:
    from receiver import images  # noqa: PLC0415

    try:
        lines = images.uninstall(found.root)
    except images.ImageError as error:
        print(f"core-pipe-receiver: {error}", file=sys.stderr)
        return EXIT_FAILURE
    print("\n".join(lines))
    return EXIT_OK


def _settings(_found: argparse.Namespace) -> int:
    from receiver.config import DEFAULT_PATH, describe  # noqa: PLC0415
    from receiver.notify.settings import KEYS, WHEN  # noqa: PLC0415

    print(f"# {DEFAULT_PATH}; each also as a variable of the environment, which wins.")
    for name, variable, default, allowed, meaning in describe():
        print(f"\n{name} = {default!r}    # {variable}\n  {meaning}\n  Allowed: {allowed}.")
    print("\n# Callbacks: who is told of crashes. In the file only, a table [[notify]] for each.")
    for keys, prefix in ((KEYS, ""), (WHEN, "when.")):
        for key in keys:
            print(f"\n{prefix}{key.name}    # default: {key.default}\n  {key.meaning}\n  Allowed: {key.allowed}.")
    return EXIT_OK
