"""core-pipe-forwarder: register the forwarder with the kernel, take it back, and look how it is."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys

from forwarder import __version__, ingress, install, ledger_command, ledger_unit, metrics, quota_command
from forwarder.staging import InstallError
from forwarder.status import status
from receiver import completion
from receiver.activation import ActivationError

# As systemctl(1): 3 for what is not active because it was never started.
OK, FAILED, NOT_INSTALLED = 0, 1, 3

_EPILOG = """\
Examples:
  core-pipe-forwarder install            cores go home from now on, and after every boot
  core-pipe-forwarder install --runtime  the same, until the next boot
  core-pipe-forwarder install --ingress pipe
                                         have the kernel start a process for each crash, and keep no service
  core-pipe-forwarder status             who gets the cores, and what is wrong with that
  core-pipe-forwarder status --json | jq -r '.problems[] | .mend'
  core-pipe-forwarder serve              without systemd: be the service of the kernel's socket, until SIGTERM
  core-pipe-forwarder uninstall          everything as it was before

Settings, read by `install`:
  /etc/core_pipe/forwarder.toml          connect_seconds, stall_seconds
  CORE_PIPE_FORWARDER_STALL_SECONDS=...  the same from the environment, which wins
  CORE_PIPE_STORE=...                    where records go of crashes that nobody took

Exit status:
  0  done; status: active, and nothing is wrong
  1  failed; status: something is wrong
  2  wrong usage
  3  status: not installed
"""


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments[:1] == [completion.COMMAND]:
        return completion.answer(_parser(), arguments[1:])
    options = _parser().parse_args(arguments)
    # Values from the kernel can have any bytes in them.
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    try:
        if options.command == "install":
            return _install(options.ingress, runtime=options.runtime)
        if options.command == "uninstall":
            return _uninstall()
        if options.command == "ingress":
            return _say(ingress.switch(install.HOST, options.way))
        if options.command == "serve":
            ingress.serve(install.HOST, idle_seconds=options.idle_seconds, say=_say_now)
            return OK
        if options.command == "ledger":
            return ledger_command.run(options)
        if options.command == "quota":
            return quota_command.run(options)
        if options.command == "metrics":
            return metrics.run(options)
        return _status(json=options.json)
    except InstallError as error:
        return _fail(error.fact, error.mend)
    except ActivationError as error:
        return _fail(*str(error).split(". ", 1))
    except OSError as error:
        return _fail(*_explain(error))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="core-pipe-forwarder",
        description="Has the kernel hand each crashed process's core to the receiver of the container it was in.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    command = commands.add_parser("install", help="point the kernel's core_pattern at the forwarder")
    command.add_argument("--runtime", action="store_true", help="until the next boot only")
    command.add_argument(
        "--ingress",
        choices=(ingress.AUTO, ingress.SOCKET, ingress.PIPE),
        default=ingress.AUTO,
        help="the way in: the kernel's socket (from 6.17 on) with a service behind it, or a process for each crash by "
        "the kernel's pipe; auto, the default: the socket where there is one and systemd keeps it",
    )
    commands.add_parser("uninstall", help="give back what was there before")
    command = commands.add_parser("serve", help="be the service of the kernel's socket; the way in while it runs")
    command.add_argument(
        "--idle-seconds",
        type=_seconds,
        default=0.0,
        metavar="N",
        help="with systemd's socket: leave after so long without a crash (default: 0, never)",
    )
    command = commands.add_parser("ingress", help="change the way in of what is installed, until the next boot")
    command.add_argument("way", choices=(ingress.SOCKET, ingress.PIPE))
    command = commands.add_parser("status", help="show who gets the cores, and what is wrong")
    command.add_argument("--json", action="store_true", help="for programs")
    ledger_command.register(commands)
    quota_command.register(commands)
    metrics.register(commands)
    return parser


def _seconds(text: str) -> float:
    number = float(text)
    # No range contains "nan".
    if not 0 <= number <= 365 * 86400:
        raise argparse.ArgumentTypeError(f"{text} is not from 0 to a year")
    return number


def _install(way: str, *, runtime: bool) -> int:
    _say(install.install(install.HOST, runtime=runtime))
    _say(ledger_unit.set_up(install.HOST, runtime=runtime))
    _say(ingress.set_up(install.HOST, way, runtime=runtime))
    # What the installation cannot mend by itself is best heard now.
    for problem in status(install.HOST).problems:
        print(f"warning: {problem.what}\n   mend: {problem.mend}", file=sys.stderr)
    return OK


def _uninstall() -> int:
    done = [*ingress.take_down(install.HOST), *install.uninstall(install.HOST)]
    # Last: it sees the others go.
    return _say([*done, *ledger_unit.take_down(install.HOST)] or ["nothing is installed"])


def _say_now(line: str) -> None:
    # Whoever read this may be gone; the service has more important things to end.
    with contextlib.suppress(OSError):
        print(line, flush=True)


def _say(lines: list[str]) -> int:
    for line in lines:
        print(line)
    return OK


def _status(*, json: bool) -> int:
    found = status(install.HOST)
    if json:
        print(found.as_json())
    else:
        installed = found.installed or "no"
        if found.version["staged"]:
            installed += f", version {found.version['staged']}"
        modes = found.features.get("core_modes")
        features = ["pidfd"] if found.features.get("pidfd") else []
        features += [f"core_modes {' '.join(modes)}"] if isinstance(modes, list) else []
        rows = [
            ("active", f"yes, by {found.ingress}" if found.active else "no"),
            ("installed", installed),
            ("core_pattern", found.core_pattern),
            ("core_pipe_limit", str(found.core_pipe_limit)),
            ("suid_dumpable", str(found.suid_dumpable)),
            ("kernel has", ", ".join(features) or "nothing that could be told without a crash"),
            ("host's receiver", "there" if found.host_receiver else "not there"),
            ("ledger", ledger_command.in_short(found.ledger)),
            ("quota warnings", quota_command.in_short(found.ledger, told=bool(found.features["quota_netlink"]))),
        ]
        for name, value in rows:
            print(f"{name:>15}: {value}")
        for problem in found.problems:
            print(f"{'problem':>15}: {problem.what}\n{'':17}mend: {problem.mend}")
    if found.installed is None:
        return NOT_INSTALLED
    return OK if found.active and not found.problems else FAILED


def _explain(error: OSError) -> tuple[str, str]:
    """Return the fact and what to do, for what the system refused."""
    fact = f"{error.filename or 'a system call'}: {error.strerror or error}"
    if isinstance(error, PermissionError) and os.geteuid() != 0:
        return fact, "run it again with sudo"
    if error.filename and str(error.filename).startswith("/proc/sys/"):
        return fact, "mount /proc/sys writable, or run this on the host itself"
    return fact, "make that path writable; on a host with a read-only /usr, use install --runtime"


def _fail(fact: str, mend: str) -> int:
    print(f"core-pipe-forwarder: {fact}\n  {mend}", file=sys.stderr)
    return FAILED


if __name__ == "__main__":
    sys.exit(main())
