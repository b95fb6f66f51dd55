"""Take each defence out, one at a time, and see its test go red: `make test-defences`.

A regression test that passes without its defence shows nothing. Each row names a hole (H1 to H23 of docs/security.md)
or a promise, the lines that close it, what they are replaced with, and the tests that must then fail. The files are
changed in place and put back, so the tree must be clean. About ten minutes.
"""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Defence:
    """One change that must be noticed. `old` stands exactly once in the file; `tests` are pytest's arguments."""

    hole: str
    file: str
    old: str
    new: str
    tests: str


DEFENCES = [
    Defence(
        "H1 a full backlog is waited for with a deadline",
        "forwarder/rendezvous.py",
        "sock.setsockopt(_socket.SOL_SOCKET, _socket.SO_SNDTIMEO",
        "False and sock.setsockopt(_socket.SOL_SOCKET, _socket.SO_SNDTIMEO",
        "tests/test_fallback.py -k backlog",
    ),
    Defence(
        "H2 no link is followed at the socket",
        "forwarder/rendezvous.py",
        "sock = posix.open(NAME, posix.O_PATH | posix.O_NOFOLLOW | posix.O_CLOEXEC, dir_fd=directory)",
        "sock = posix.open(NAME, posix.O_PATH | posix.O_CLOEXEC, dir_fd=directory)",
        "tests/test_rendezvous.py -k 'link'",
    ),
    Defence(
        "H2 no link is followed at /run",
        "forwarder/rendezvous.py",
        "DIRECTORY, posix.O_PATH | posix.O_NOFOLLOW | posix.O_DIRECTORY | posix.O_CLOEXEC, dir_fd=root",
        "DIRECTORY, posix.O_PATH | posix.O_DIRECTORY | posix.O_CLOEXEC, dir_fd=root",
        "tests/test_rendezvous.py -k 'link'",
    ),
    Defence(
        "H3 the range of mapped ids is half-open",
        "forwarder/namespaces.py",
        "outside <= number < outside + count",
        "outside <= number <= outside + count",
        "tests/test_owners.py",
    ),
    Defence(
        "H5 descriptors are counted",
        "receiver/protocol.py",
        "if len(descriptors) > MAX_DESCRIPTORS:",
        "if False:",
        "tests/test_protocol.py -k descriptors",
    ),
    Defence(
        "H6 an offer without credentials is refused",
        "receiver/worker.py",
        "if process.pid == 0 and _sees_every_process():",
        "if False:",
        "tests/test_receiver.py -k credentials",
    ),
    Defence(
        "H7 who keeps the descriptor is ended",
        "forwarder/handoff.py",
        "if self.crash.still_dumps(END_SECONDS):",
        "if False:",
        "tests/test_fallback.py -k keep",
    ),
    Defence(
        "H7 who reads nothing is ended",
        "forwarder/handoff.py",
        "elif time.monotonic() >= patience:",
        "elif False:",
        "tests/test_fallback.py -k stop",
    ),
    Defence(
        "H7 who reads next to nothing is ended",
        "forwarder/handoff.py",
        "if now >= written + LEAST_RATE * self.stall_seconds:",
        "if now >= written:",
        "tests/test_fallback.py -k drip",
    ),
    Defence(
        "H8 the pidfd still names the process",
        "forwarder/crash.py",
        "if pid != self.pid:",
        "if False:",
        "tests/test_identity.py",
    ),
    Defence(
        "H8 the process dumps core",
        "forwarder/crash.py",
        'if namespaces.status_value(status, b"CoreDumping") != [b"1"]:',
        "if False:",
        "tests/test_identity.py",
    ),
    Defence(
        "H9 the listener is inside the place",
        "forwarder/rendezvous.py",
        "if not inside:",
        "if False:",
        "tests/test_rendezvous.py -k 'host'",
    ),
    Defence(
        "H10 socket and listener are root's",
        "forwarder/rendezvous.py",
        "if root is None or found.uid != root or peer.uid != root:",
        "if False:",
        "tests/test_rendezvous.py -k 'root'",
    ),
    Defence(
        "H11 no access for the user of a set-uid program",
        "receiver/process.py",
        "if secure or record.dumpable != 1",
        "if False and secure or record.dumpable == 99",
        "tests/test_owners.py tests/test_process.py",
    ),
    Defence(
        "H12 a prepared name is not opened",
        "receiver/store.py",
        "return os.open(name, flags | os.O_CLOEXEC | os.O_NOFOLLOW, mode, dir_fd=self.directory)",
        "return os.open(name, (flags & ~os.O_EXCL) | os.O_CLOEXEC, mode, dir_fd=self.directory)",
        "tests/test_store.py",
    ),
    Defence(
        "H13 stat is split at the last parenthesis",
        "forwarder/namespaces.py",
        'rpartition(b")")',
        'partition(b")")',
        "tests/test_identity.py",
    ),
    Defence(
        "H14 no name of the process's choice is an argument",
        "forwarder/install.py",
        'u=%u g=%g F=%F"',
        'u=%u g=%g F=%F e=%e"',
        "tests/test_install.py tests/test_stub.py",
    ),
    Defence(
        "H15 the stub's interpreter is isolated",
        "forwarder/install.py",
        'FLAGS = "-IBS"',
        'FLAGS = "-BS"',
        "tests/test_install.py",
    ),
    Defence(
        "H16 the host's log is bounded for each container",
        "forwarder/allowance.py",
        "return used <= LINES, used <= RECORDS, kept_back",
        "return True, True, kept_back",
        "tests/test_confinement.py",
    ),
    Defence(
        "H17 configuration is not read through a link",
        "receiver/config.py",
        "os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NOCTTY",
        "os.O_RDONLY | os.O_CLOEXEC | os.O_NOCTTY",
        "tests/test_config.py",
    ),
    Defence(
        "H19 a short write is continued",
        "receiver/store.py",
        "        rest = rest[os.write(fd, rest) :]",
        "        os.write(fd, rest)\n        break",
        "tests/test_capture.py tests/test_store.py",
    ),
    Defence(
        "H21 pid and thread are in the container's numbering",
        "forwarder/handoff.py",
        "thread = Credentials(crash.tid, crash.uid, crash.gid)",
        "thread = Credentials(crash.pid, crash.uid, crash.gid)",
        "tests/test_signals.py -k thread",
    ),
    Defence(
        "H22 the environment in an offer is bounded",
        "forwarder/crash.py",
        'self.read("environ", MAX_ENVIRONMENT)',
        'self.read("environ", 1 << 24)',
        "tests/test_signals.py -k huge",
    ),
    Defence(
        "H23 after the core was passed nobody else is asked",
        "forwarder/handoff.py",
        'raise Lost(f"its receiver ended without a result after it had the core ({error})") from None',
        'raise Refused("its receiver ended without a result") from None',
        "tests/test_fallback.py -k vanish",
    ),
    Defence(
        "a mount namespace's owner owns the process",
        "forwarder/route.py",
        "if place.owner not in self.owners:",
        "if False:",
        "tests/test_owners.py",
    ),
    Defence(
        "the listener's user namespace owns the process",
        "forwarder/rendezvous.py",
        "if user_ns not in owners:",
        "if False:",
        "tests/test_rendezvous.py -k namespace",
    ),
    Defence(
        "an unreadable host program in a user's sandbox stays with the host",
        "forwarder/route.py",
        'if namespaces.is_mapped(self.crash.task, answer.number("uid")):',
        "if True:",
        "tests/test_owners.py",
    ),
    Defence(
        "a dying init is not asked to serve itself",
        "forwarder/route.py",
        "dying = self._pid_chain[0] if self.crash.own_pid == 1 else None",
        "dying = None",
        "tests/test_nearest.py",
    ),
    Defence(
        "no container has more than its share of the kernel's slots",
        "forwarder/share.py",
        "if _is_free(limit, mine, others):\n            return None",
        "if True:\n            return None",
        "tests/test_storm.py -k 'share or holds'",
    ),
    Defence(
        "a busy receiver is tried again",
        "forwarder/handoff.py",
        "if time.monotonic() + pause >= busy:",
        "if True:",
        "tests/test_storm.py -k 64",
    ),
    Defence(
        "cores come from the host",
        "receiver/worker.py",
        "        check_sender(channel)\n",
        "",
        "tests/test_receiver.py -k 'inside or host'",
    ),
    Defence(
        "a worker gives up its capabilities",
        "receiver/privileges.py",
        "        kind.limit()",
        "        pass",
        "tests/test_confinement.py -k nothing_else",
    ),
    Defence(
        "the receiver's own crash is not dumped",
        "receiver/cli.py",
        "    prctl.set_dumpable(0)",
        "    return",
        "tests/test_confinement.py tests/test_receiver.py -k 'goes_nowhere or loop'",
    ),
    Defence(
        "a crash is sealed before its process is let go",
        "receiver/worker.py",
        "        entry.seal(readers=offered.reader)\n    finally:",
        "    finally:",
        "tests/test_sizes.py -k main_program",
    ),
    Defence(
        "a log line does not wait for its reader",
        "receiver/log.py",
        "if any(events & select.POLLOUT for _, events in poll.poll(PATIENCE_MS)):",
        "if True:",
        "tests/test_receiver.py -k 'log or stderr or standard_error'",
    ),
    Defence(
        "absent memory is not zeros",
        "receiver/elfcore.py",
        "segment.memory_size if is_end else at + length",
        "segment.memory_size",
        "tests/test_capture.py -k budget",
    ),
    Defence(
        "what matters more takes the room of what matters less",
        "receiver/capture.py",
        "if not self._displace(frame.rank):",
        "if True:",
        "tests/test_capture.py -k room_that_ends",
    ),
    Defence(
        "the look reads what the dump reads",
        "receiver/peek.py",
        'raise Unreadable(f"{address:#x} is not in the core")',
        "index = 0",
        "tests/test_peek.py -k only_what",
    ),
    Defence(
        "the look leaves no child",
        "receiver/peek.py",
        "        _reap(child)",
        "        pass",
        "tests/test_peek.py -k no_child",
    ),
    Defence(
        "one user's crashes are not counted against another",
        "receiver/worker.py",
        'return f"{record.uid} {record.signature}"',
        'return f"{record.signature}"',
        "tests/test_quota.py -k another_user",
    ),
    Defence(
        "compression gives way to a cpu quota",
        "receiver/press.py",
        "if self._throttle.struck():",
        "if False:",
        "tests/test_quota.py -k cpu",
    ),
    Defence(
        "a loop that is refused pushes nothing out of the history",
        "receiver/history.py",
        "if kind == REFUSED:",
        "if False:",
        "tests/test_history.py -k refused",
    ),
    Defence(
        "globals of libraries are kept with the stacks",
        "receiver/plan.py",
        "*_globals(memory, notes), *known",
        "*known",
        "tests/test_reduced.py -k last_values",
    ),
    Defence(
        "samples that were wrong once are not asked again",
        "receiver/frames.py",
        "self._believed = self._believed and dense",
        "pass",
        "tests/test_capture.py",
    ),
    Defence(
        "what a receiver began to say is read to its end",
        "forwarder/handoff.py",
        "channel.receive_any(time.monotonic() + self.connect_seconds)",
        "channel.receive_any(time.monotonic() + WATCH_SECONDS)",
        "tests/test_fallback.py -k halting",
    ),
    Defence(
        "a handler that was killed after it had asked is looked up in the store",
        "forwarder/ledger/stores.py",
        "found[index] = FOUND",
        "pass",
        "tests/test_ledger.py -k 'which_record or exactly'",
    ),
    Defence(
        "quota warnings: only the kernel is believed",
        "forwarder/quota/events.py",
        "if sender[0] == 0 and (found",
        "if (found",
        "tests/test_quota_warnings.py -k only_the_kernel",
    ),
    Defence(
        "quota warnings: a storm is one record",
        "forwarder/quota/watch.py",
        "if one is not None and abs(now - one.at) >= RECORD_SECONDS:",
        "if one is not None:",
        "tests/test_quota_warnings.py -k an_hour",
    ),
    Defence(
        "quota warnings: a storm leaves the watcher time for the others",
        "forwarder/quota/watch.py",
        "self._resume_at = time.monotonic() + TURN_SECONDS",
        "self._resume_at = 0.0",
        "tests/test_quota_warnings.py -k its_turn",
    ),
    Defence(
        "quota warnings: many ids of one container share a record",
        "forwarder/quota/watch.py",
        "if self._ids[owner.key] > MAX_IDS:",
        "if self._ids[owner.key] > 1 << 60:",
        "tests/test_quota_warnings.py -k drive_out",
    ),
    Defence(
        "quota warnings: whoever has the most records gives one",
        "forwarder/quota/tally.py",
        "if one.key == most)",
        "if one.key or most)",
        "tests/test_quota_warnings.py -k drive_out",
    ),
    Defence(
        "quota warnings: where several containers share an id, none is picked",
        "forwarder/quota/owners.py",
        "            if size == most:\n                found |= space.cgroups",
        "            if size == most:\n                found = {min(space.cgroups)}",
        "tests/test_quota_warnings.py -k may_be",
    ),
]


def check(defence: Defence) -> str:
    """Return "red" (noticed), or what is wrong."""
    path = HERE / defence.file
    whole = path.read_text(encoding="utf-8")
    if whole.count(defence.old) != 1:
        return f"STALE: the lines stand {whole.count(defence.old)} times in {defence.file}"
    path.write_text(whole.replace(defence.old, defence.new), encoding="utf-8")
    try:
        # A hang is noticed, too: pytest's own limit is for one test, this for all of them.
        command = f"{sys.executable} -m pytest -q -x -p no:cacheprovider --timeout=60 {defence.tests}"
        done = subprocess.run(command, shell=True, cwd=HERE, capture_output=True, text=True, timeout=600, check=False)
    except subprocess.TimeoutExpired:
        return "red (hung)"
    finally:
        path.write_text(whole, encoding="utf-8")
    if done.returncode == 1:
        return "red"
    return f"NOT NOTICED (pytest: {done.returncode})" + (f"\n{done.stdout[-2000:]}" if done.returncode > 1 else "")


def main() -> int:
    """Check those whose hole or file has one of the arguments in it, or all. Returns 1 when one goes unnoticed."""
    if subprocess.run(
        ["git", "diff", "--quiet", "HEAD", "--", "forwarder", "receiver"], cwd=HERE, check=False
    ).returncode:
        print("commit or stash your changes first: files are changed in place and put back", file=sys.stderr)
        return 2
    os.environ["PYTHONDONTWRITEBYTECODE"] = "1"
    words = sys.argv[1:]
    chosen = [d for d in DEFENCES if not words or any(word in d.hole or word in d.file for word in words)]
    unnoticed = 0
    for defence in chosen:
        result = check(defence)
        unnoticed += not result.startswith("red")
        print(f"{result:<6} {defence.hole}", flush=True)
    print(f"{len(chosen) - unnoticed} of {len(chosen)} defences are missed when they are gone")
    return 1 if unnoticed else 0


if __name__ == "__main__":
    sys.exit(main())
