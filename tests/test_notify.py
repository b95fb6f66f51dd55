"""Callbacks: real programs, real servers that fail in every way, and crashes that are told at least once."""

from __future__ import annotations

import contextlib
import http.server
import json
import os
import random
import re
import shutil
import socket
import socketserver
import ssl
import struct
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import pytest

from receiver import images, notify
from receiver.config import Config, ConfigError, load
from receiver.notify import events, queue, quota
from receiver.notify.queue import Line, Queue
from receiver.notify.settings import KEYS, WHEN, Callback, Filter, callbacks_of
from receiver.record import Core, Record
from receiver.store import MAX_RECORD, Store
from tests.support.containers import PlainContainer, SystemdContainer
from tests.support.crash import crash
from tests.support.mounts import CHECKOUT
from tests.support.receivers import BIN, INGRESSES, PIPE, STORE, forwarder_installed, prepare_units, resident
from tests.support.waiting import wait_until

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

NOBODY = 65534
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="changes users. Run: sudo make test")

# The deliverer as it is, but that it leaves at once when nobody waits, and tries again sooner.
DRIVER = """\
import os, sys
from receiver.notify import command, deliver, queue
queue.FIRST_PAUSE, queue.LONGEST_PAUSE = 0.02, 0.05
deliver.LINGER_SECONDS, deliver.STOP_SECONDS = float(os.environ["LINGER"]), float(os.environ["STOP"])
sys.exit(command.deliver_configured())
"""


class Place:
    """A store, settings with callbacks, and a deliverer when one is asked for."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.path = directory / "store"
        self.settings = directory / "receiver.toml"
        self.store = Store(str(self.path))
        self.told = directory / "told"
        self.told.mkdir()
        self.told.chmod(0o777)

    def configure(self, *tables: str) -> None:
        text = f'store = "{self.path}"\n' + "".join(f"[[notify]]\n{table}\n" for table in tables)
        self.settings.write_text(text)
        # As if it had always been so.
        os.utime(self.settings, (0, 0))

    def crash(self, *, awake: bool = True, **values: Any) -> Record:
        """Keep a crash, as far as callbacks can see."""
        record = a_record(**values)
        self.store.add_record(record)
        if awake:
            notify.wake(self.store)
        return record

    def start(self, *, linger: float = 0.0, stop: float = 10.0, **options: Any) -> subprocess.Popen[str]:
        environment = {"CORE_PIPE_CONFIG": str(self.settings), "PATH": os.environ["PATH"], "LANG": "C.UTF-8"}
        environment |= {"LINGER": str(linger), "STOP": str(stop)}
        return subprocess.Popen(
            [sys.executable, "-c", DRIVER],
            env=environment,
            cwd=CHECKOUT,
            stdin=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            **options,
        )

    def deliver(self, timeout: float = 30, **options: Any) -> list[str]:
        """Run the deliverer to its end. Returns the lines that it logs."""
        with self.start(**options) as process:
            try:
                _, said = process.communicate(timeout=timeout)
            finally:
                process.kill()
        assert process.returncode == 0, said
        return said.splitlines()

    def line(self, name: str = "x") -> Line:
        found = queue.read(self.store.directory)
        assert found is not None
        return found.lines[name]

    def program(self, script: str) -> str:
        """Make a program, and return the line of the settings that runs it. $TOLD is a directory it may write."""
        path = self.directory / f"program{len(list(self.directory.iterdir()))}"
        path.write_text(f"#!/bin/sh\nTOLD={self.told}\n{script}\n")
        path.chmod(0o755)
        return f'run = ["{path}"]'

    def ids(self) -> list[str]:
        """The ids for which a program has made a file."""
        return sorted(os.listdir(self.told))


def a_record(**values: Any) -> Record:
    record = Record.of_numbers(
        pid=41, tid=41, uid=1000, gid=1000, signal=11, time=0, comm=b"webshop", core_limit=1 << 64, dumpable=1
    )
    record.exe = "/usr/bin/webshop"
    record.command_line = ["webshop", "--password=hunter2"]
    record.environment = {"DB": "postgres://user:hunter2@db"}
    record.core = Core(state="none", reason="a test")
    record.host_name = "shop"
    for name, value in values.items():
        setattr(record, name, value)
    return record


@pytest.fixture
def place(public: Path) -> Iterator[Place]:
    found = Place(public)
    yield found
    found.store.close()


@pytest.fixture
def public() -> Iterator[Path]:
    """A directory that nobody may enter. Not tmp_path: each run of pytest makes its parent root's own again."""
    with tempfile.TemporaryDirectory(prefix="cp-", dir="/tmp") as directory:
        os.chmod(directory, 0o755)
        yield Path(directory)


class Server:
    """An HTTP server that answers as it is told to. `answers`: functions, the last of which goes on."""

    def __init__(self, listener: socketserver.TCPServer | None = None, *, path: str | None = None) -> None:
        self.requests: list[tuple[str, dict[str, str], bytes]] = []
        self.answers: list[Callable[[http.server.BaseHTTPRequestHandler], None]] = [status(204)]
        self.ended = threading.Event()
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                outer.requests.append((self.path, dict(self.headers), body))
                answer = outer.answers[0] if len(outer.answers) == 1 else outer.answers.pop(0)
                with contextlib.suppress(OSError):
                    answer(self)

            def log_message(self, *args: Any) -> None:
                pass

            def address_string(self) -> str:
                return "somebody"

        class Unix(socketserver.ThreadingMixIn, socketserver.UnixStreamServer):
            daemon_threads = True

        if path is not None:
            self.server: socketserver.BaseServer = Unix(path, Handler)
            os.chmod(path, 0o777)
        else:
            self.server = listener or http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.handler = Handler
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True)

    def __enter__(self) -> Self:
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.ended.set()
        self.server.shutdown()
        self.server.server_close()
        self.thread.join(10)

    @property
    def port(self) -> int:
        address: Any = self.server.server_address
        return int(address[1])

    @property
    def post(self) -> str:
        return f'post = "http://127.0.0.1:{self.port}/hook?a=b"'

    def ids(self) -> list[str]:
        return [json.loads(body)["id"] for _, _, body in self.requests]


def status(
    code: int, headers: dict[str, str] | None = None, body: bytes = b""
) -> Callable[[http.server.BaseHTTPRequestHandler], None]:
    def answer(handler: http.server.BaseHTTPRequestHandler) -> None:
        handler.send_response(code)
        for name, value in (headers or {}).items():
            handler.send_header(name, value)
        handler.send_header("Content-Length", str(len(body)))
        handler.end_headers()
        handler.wfile.write(body)

    return answer


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as found:
        yield found


# Settings


def parsed(text: str, tmp_path: Path) -> tuple[Callback, ...]:
    path = tmp_path / "settings.toml"
    path.write_text(text)
    return callbacks_of(load(str(path), {}), str(path))


def test_a_callback_with_all_it_can_have(tmp_path: Path) -> None:
    text = """
[[notify]]
name = "chat"
post = "https://chat.example:8443/hook?room=1#x"
headers = { "X-Team" = "cores", Authorization = { file = "/etc/token", prefix = "Bearer " } }
ca = "/etc/ca.pem"
timeout = "1min"
user = "mail"
full = true
queue_max = 10
when = { first = true, every = 100, signal = ["SEGV", "SIGABRT", 7], exe = ["/opt/*"], state = ["stored"] }

[[notify]]
name = "page"
run = ["/usr/bin/page", "-x"]
"""
    chat, page = parsed(text, tmp_path)
    assert chat.post is not None
    assert (chat.post.scheme, chat.post.host, chat.post.port) == ("https", "chat.example", 8443)
    assert chat.post.path == "/hook?room=1"
    assert chat.headers == (("X-Team", "cores", None), ("Authorization", "Bearer ", "/etc/token"))
    assert (chat.ca, chat.timeout, chat.user, chat.full, chat.queue_max) == ("/etc/ca.pem", 60.0, "mail", True, 10)
    assert chat.when == Filter(True, 100, frozenset({11, 6, 7}), ("/opt/*",), frozenset({"stored"}))
    assert page == Callback("page", run=("/usr/bin/page", "-x"))
    assert (page.timeout, page.user, page.full, page.queue_max) == (10.0, "nobody", False, 1000)


@pytest.mark.parametrize(
    ("url", "found"),
    [
        ("http://a", ("http", "a", 80, "", "/")),
        ("http://a?b", ("http", "a", 80, "", "/?b")),
        ("https://[::1]:5/x", ("https", "::1", 5, "", "/x")),
        ("unix:/run/x.sock", ("unix", "", 0, "/run/x.sock", "/")),
        ("unix:/run/x.sock:/hook", ("unix", "", 0, "/run/x.sock", "/hook")),
    ],
)
def test_addresses(tmp_path: Path, url: str, found: tuple[object, ...]) -> None:
    (callback,) = parsed(f'[[notify]]\nname = "x"\npost = "{url}"', tmp_path)
    assert callback.post is not None
    assert callback.post[:5] == found


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ('post = "ftp://a"', "begins with none of http://, https:// and unix:/"),
        ('post = "http://user:hunter2@a/"', "belong into a header from a file"),
        ('post = "http://a:0/"', "no host and port"),
        ('post = "http://:80/"', "no host and port"),
        ('post = "http://[::1/"', "no host"),
        ('post = "http://a/b c"', "belong escaped"),
        ('post = "http://a/\\u000d\\u000aX: y"', "belong escaped"),
        ('post = "unix:x"', "absolute path of a socket"),
        ('post = "unix:/a:b"', "absolute path of a socket"),
        (f'post = "unix:/{"a" * 107}"', "absolute path of a socket"),
        ("post = 1", "is no text"),
        ("run = []", "is no list of a program"),
        ('run = "/bin/true"', "is no list of a program"),
        ('run = ["true"]', "does not begin with an absolute path"),
        ('run = ["/bin/true", 1]', "has a word that cannot be"),
        ('run = ["/bin/true"]\npost = "http://a"', "not exactly one of 'run' and 'post'"),
        ("timeout = 5", "not exactly one of 'run' and 'post'"),
        ('run = ["/bin/true"]\nca = "/x"', "has neither 'headers' nor 'ca'"),
        ('post = "http://a"\nheaders = {"a b" = "c"}', "has a name that is none"),
        ('post = "http://a"\nheaders = {Host = "c"}', "not for you to set"),
        ('post = "http://a"\nheaders = {A = "c\\u000aB: d"}', "has a value that no header can have"),
        ('post = "http://a"\nheaders = {A = {file = "x"}}', "is not an absolute path"),
        ('post = "http://a"\nheaders = {A = {text = "x"}}', "neither a text nor {file"),
        ('run = ["/bin/true"]\ntimeout = 0', "is out of range"),
        ('run = ["/bin/true"]\ntimeout = "2h"', "is out of range"),
        ('run = ["/bin/true"]\ntimeout = true', "is not a duration"),
        ('run = ["/bin/true"]\nfull = 1', "is neither true nor false"),
        ('run = ["/bin/true"]\nqueue_max = 0', "is out of range"),
        ('run = ["/bin/true"]\nuser = ""', "is no text"),
        ('run = ["/bin/true"]\nwhen = 1', "is no table of conditions"),
        ('run = ["/bin/true"]\nwhen = {exes = "a"}', "Did you mean 'exe'?"),
        ('run = ["/bin/true"]\nwhen = {signal = "SIGFOO"}', "has a signal that is none"),
        ('run = ["/bin/true"]\nwhen = {signal = []}', "is no list of conditions"),
        ('run = ["/bin/true"]\nwhen = {state = ["kept"]}', "has a state that is none"),
        ('run = ["/bin/true"]\nwhen = {every = 0}', "is out of range"),
        ('run = ["/bin/true"]\nevents = []', "is no list of events"),
        ('run = ["/bin/true"]\nevents = ["quotas"]', "has an event that is none"),
        ('run = ["/bin/true"]\nevents = "quota"\nwhen = {first = true}', "conditions for crashes"),
        ('run = ["/bin/true"]\ntimout = 5', "Did you mean 'timeout'?"),
        ('run = ["/bin/true"]\nname2 = 5', "Did you mean 'name'?"),
        ('run = ["/bin/true"]\n[[notify]]\nname = "x"\nrun = ["/bin/true"]', "another one of the name 'x'"),
        ('run = ["/bin/true"]\n[[notify]]\nrun = ["/bin/true"]', "it has no name"),
        ('run = ["/bin/true"]\n[[notify]]\nname = "a b"\nrun = ["/bin/true"]', "is no name"),
    ],
)
def test_what_is_wrong_is_said(tmp_path: Path, line: str, problem: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parsed(f'[[notify]]\nname = "x"\n{line}', tmp_path)
    assert problem in str(caught.value)
    assert "[[notify]]" in str(caught.value)
    assert "hunter2" not in str(caught.value).replace("'http://user:hunter2@a/'", "")


def test_a_mistake_in_a_callback_costs_no_core(tmp_path: Path) -> None:
    path = tmp_path / "settings.toml"
    path.write_text('workers = 3\n[[notify]]\nnme = "x"\n')
    assert load(str(path), {}).workers == 3
    path.write_text("notify = 1\n")
    with pytest.raises(ConfigError, match=r"notify: is no list of tables\. Begin each with a line"):
        load(str(path), {})


def test_every_key_is_in_the_table() -> None:
    assert {key.name for key in KEYS} == set(Callback._fields)
    assert {key.name for key in WHEN} == set(Filter._fields)
    assert all(key.meaning.endswith(".") and key.allowed for key in (*KEYS, *WHEN))


def test_the_examples_in_the_documents_are_right(tmp_path: Path) -> None:
    text = Path(CHECKOUT, "docs/callbacks.md").read_text(encoding="utf-8")
    examples = re.findall(r"^```toml\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    assert len(examples) >= 6
    for example in examples:
        assert len(parsed(example, tmp_path)) == 1


# Which crash, and what of it


@pytest.mark.parametrize(
    ("when", "meant"),
    [
        (Filter(), True),
        (Filter(signal=frozenset({11})), True),
        (Filter(signal=frozenset({6})), False),
        (Filter(exe=("webshop",)), True),
        (Filter(exe=("/usr/*",)), True),
        (Filter(exe=("/opt/*", "shop")), False),
        (Filter(state=frozenset({"none"})), True),
        (Filter(state=frozenset({"stored"})), False),
        (Filter(signal=frozenset({11}), exe=("other",)), False),
    ],
)
def test_filters(when: Filter, meant: bool) -> None:
    assert events.is_meant(a_record(), when) is meant


def test_the_first_and_each_nth_of_a_bug() -> None:
    line = Line(0.0)

    def told(when: Filter, uid: int = 1) -> bool:
        return events.is_due(when, line.count_bug(events.bug_of(a_record(uid=uid, signature="s"))))

    assert [told(Filter(first=True)) for _ in range(4)] == [True, False, False, False]
    # Another user's is another bug.
    assert told(Filter(first=True), uid=2)
    line = Line(0.0)
    assert [told(Filter(every=3)) for _ in range(6)] == [False, False, True] * 2
    line = Line(0.0)
    assert [told(Filter(first=True, every=3)) for _ in range(6)] == [True, False, True, False, False, True]
    # Without a signature: the program and the signal.
    assert events.bug_of(a_record()) == events.bug_of(a_record(pid=5))
    assert events.bug_of(a_record()) != events.bug_of(a_record(signal=6))
    for number in range(3 * queue.BUGS):
        line.count_bug(str(number))
    assert len(line.bugs) == queue.BUGS


def test_what_is_private_is_told_when_it_is_asked_for() -> None:
    record = a_record(journal=["password: hunter2"])
    assert b"hunter2" not in events.body(record, Callback("x", run=("/x",)))
    assert events.body(record, Callback("x", run=("/x",), full=True)).count(b"hunter2") == 3


def test_a_cloud_event_has_what_the_specification_wants() -> None:
    (callback,) = callbacks_of(Config(notify=({"name": "x", "post": "http://a"},)), "")
    record = a_record(container="docker:we b/é")
    event = json.loads(events.body(record, callback))
    assert event["specversion"] == "1.0"
    assert (event["id"], event["type"], event["time"]) == (record.id, "org.core_pipe.crash.v1", record.timestamp)
    assert event["source"] == "/shop/docker:we%20b%2F%C3%A9"
    assert event["subject"] == "/usr/bin/webshop"
    assert event["data"]["signal_name"] == "SIGSEGV"
    assert "environment" not in event["data"]


# The queue


def test_a_queue_is_what_was_written(place: Place) -> None:
    found = Queue()
    found.seen = {a_record().id, a_record().id}
    line = found.lines["x"] = Line(5.0)
    line.add(a_record().id, 7.0, 10)
    line.failed(next(iter(line.waiting)), "no", 8.0)
    line.count_bug("b")
    queue.write(place.store.directory, found)
    again = queue.read(place.store.directory)
    assert again is not None
    assert again.dumps() == found.dumps()
    assert not [name for name in place.store.names() if name.endswith(".new")]


@pytest.mark.parametrize(
    "damage",
    [
        b"",
        b"{",
        b"[]",
        b'{"version": 2}',
        b'{"version": 1, "seen": [1], "lines": {}}',
        b"[" * 100000,
        b"\0" * 99,
        b'{"version": 1, "seen": [], "lines": {"x": {"since": 1}}}',
        b'{"version": 1, "seen": [], "lines": {"x": 5}}',
    ],
)
def test_a_damaged_queue_is_an_error(damage: bytes) -> None:
    with pytest.raises(ValueError, match=r".+"):
        Queue.loads(damage)


def test_the_oldest_is_dropped_and_counted() -> None:
    line = Line(0.0)
    for number in (3, 1, 2, 4):
        line.add(str(number), 0.0, 2)
    assert list(line.waiting) == ["3", "4"]
    assert line.counters["dropped"] == 2


def test_it_is_tried_for_a_day_and_then_given_up() -> None:
    line, now, tries = Line(0.0), 1e9, 0
    line.add("a", now, 10)
    line.add("b", now, 10)
    begun = now
    while line.waiting:
        at = line.next()
        assert at is not None
        now = max(now, at)
        owner = line.due(now)
        assert owner is not None
        line.failed(owner, "no", now)
        tries += 1
    assert begun + queue.GIVE_UP_SECONDS <= now <= begun + queue.GIVE_UP_SECONDS + 2 * queue.LONGEST_PAUSE
    assert line.counters["given_up"] == 2
    # One process in some minutes is what a failing callback costs.
    assert 86400 / queue.LONGEST_PAUSE < tries < 2.5 * 86400 / queue.LONGEST_PAUSE


def test_one_that_is_not_liked_does_not_hold_up_the_others() -> None:
    line, now = Line(0.0), 1e9
    line.add("bad", now, 10)
    line.add("good", now, 10)
    assert line.due(now) == "bad"
    line.failed("bad", "400", now)
    assert line.due(now) is None
    now = line.next() or 0.0
    assert line.due(now) == "good"


def test_a_clock_that_was_set_back_holds_nobody_up_for_long() -> None:
    line = Line(0.0)
    line.add("a", 1e9, 10)
    line.failed("a", "no", 1e9)
    assert line.due(1e9 - 1e6) == "a"


def test_a_server_may_ask_for_an_hour_at_most() -> None:
    line = Line(0.0)
    line.add("a", 1e9, 10)
    line.failed("a", "429", 1e9, retry_after=1e12)
    assert line.next() == 1e9 + queue.LONGEST_REQUEST
    line.failed("a", "429", 1e9, retry_after=float("nan"))


# Programs


@needs_root
def test_a_program_gets_the_record_and_nothing_else(place: Place) -> None:
    place.configure('name = "x"\n' + place.program('cat >"$TOLD/record"; : >"$TOLD/$CORE_PIPE_ID"'))
    record = place.crash()
    assert place.deliver() == []
    assert place.ids() == [record.id, "record"]
    found = json.loads((place.told / "record").read_text())
    assert found["id"] == record.id
    assert "environment" not in found
    owner = (place.told / "record").stat()
    assert (owner.st_uid, owner.st_gid) == (NOBODY, NOBODY)
    assert place.line().counters == {"delivered": 1, "failed": 0, "given_up": 0, "dropped": 0}


WITNESS = """\
import os, sys, json, resource
sys.stdin.read()
print(json.dumps({
    "env": dict(os.environ), "uids": os.getresuid(), "gids": os.getresgid(), "groups": os.getgroups(),
    "cwd": os.getcwd(), "fds": [fd for fd in range(64) if os.path.exists(f"/proc/self/fd/{fd}")],
    "session": os.getsid(0) == os.getpid(), "core": resource.getrlimit(resource.RLIMIT_CORE),
    "status": open("/proc/self/status").read(),
}), file=open(os.environ["CORE_PIPE_CALLBACK"].join(["TOLD/", ""]), "w"))
"""


@needs_root
def test_a_program_has_no_privileges(place: Place) -> None:
    script = place.directory / "witness.py"
    script.write_text(WITNESS.replace("TOLD", str(place.told)))
    place.configure(f'name = "x"\nrun = ["{sys.executable}", "{script}"]')
    record = place.crash()
    assert place.deliver() == []
    found = json.loads((place.told / "x").read_text())
    assert found["uids"] == found["gids"] == [NOBODY] * 3
    assert found["groups"] in ([], [NOBODY])
    assert found["cwd"] == "/"
    assert found["fds"] in ([0, 1, 2], [0, 1, 2, 3])  # the listing's own
    assert found["session"]
    assert found["core"] == [1, 1]
    assert "NoNewPrivs:\t1\n" in found["status"]
    for kind in ("CapInh", "CapPrm", "CapEff", "CapAmb"):
        assert f"{kind}:\t{'0' * 16}\n" in found["status"]
    environment = {name: found["env"][name] for name in found["env"] if name != "LC_CTYPE"}
    assert environment.keys() == {"PATH", "LANG", "CORE_PIPE_ID", "CORE_PIPE_CALLBACK"}
    assert environment["CORE_PIPE_ID"] == record.id


@needs_root
def test_root_when_it_is_asked_for(place: Place) -> None:
    place.configure('name = "x"\nuser = "root"\n' + place.program('id -u > "$TOLD/uid"'))
    place.crash()
    assert place.deliver() == []
    assert (place.told / "uid").read_text() == "0\n"


@needs_root
@pytest.mark.parametrize(
    ("script", "error"),
    [
        ("exit 3", "it ended with status 3"),
        ("echo 'it is \x1b[31m broken' >&2; exit 1", "it ended with status 1: it is \\x1b[31m broken"),
        ("kill -9 $$", "it ended with signal 9"),
        ("exec yes >&2", "it ended with signal 13: y"),
    ],
)
def test_a_program_that_fails(place: Place, script: str, error: str) -> None:
    # It works when it has failed once.
    once = f'[ -e "$TOLD/failed" ] && exit 0; : >"$TOLD/failed"; {script}'
    place.configure('name = "x"\n' + place.program(once))
    place.crash()
    said = place.deliver()
    assert len(said) == 2, said
    assert f"callback x: {error}. It is tried again" in said[0]
    assert "callback x: it works again, after 1 failures" in said[1]
    assert place.line().counters == {"delivered": 1, "failed": 1, "given_up": 0, "dropped": 0}


@needs_root
def test_what_a_program_prints_holds_nobody_up(place: Place) -> None:
    place.configure('name = "x"\n' + place.program("head -c 100000000 /dev/zero; exit 0"))
    place.crash()
    assert place.deliver() == []


@needs_root
def test_a_program_that_hangs_is_killed_with_its_children(place: Place) -> None:
    hangs = '[ -e "$TOLD/pids" ] && exit 0; sleep 1000 & (sleep 1000 & echo $! >>"$TOLD/pids"); echo $! >>"$TOLD/pids"'
    works = 'name = "y"\n' + place.program(': >"$TOLD/$CORE_PIPE_ID"')
    place.configure('name = "x"\ntimeout = 1\n' + place.program(f"{hangs}; wait"), works)
    record = place.crash()
    said = place.deliver()
    assert "callback x: not done within 1 s." in said[0]
    assert record.id in place.ids(), "one that hangs holds up the others"
    for pid in (place.told / "pids").read_text().split():
        wait_until(lambda pid=pid: not is_alive(int(pid)), 5, "it is dead")  # type: ignore[misc]


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


@needs_root
def test_what_a_program_leaves_behind_is_killed(place: Place) -> None:
    place.configure('name = "x"\n' + place.program('sleep 1000 & echo $! >"$TOLD/pid"'))
    place.crash()
    assert place.deliver() == []
    pid = int((place.told / "pid").read_text())
    wait_until(lambda: not is_alive(pid), 5, "it is dead")


@needs_root
@pytest.mark.parametrize(
    ("lines", "error"),
    [
        ('run = ["/nonexistent/program"]', "/nonexistent/program cannot be run: No such file or directory"),
        ('run = ["/bin/true"]\nuser = "no such one"', "there is no user no such one here"),
        ('post = "http://127.0.0.1:1/"', "Connection refused"),
        ('post = "unix:/nonexistent/socket"', "No such file or directory"),
        (
            'post = "http://127.0.0.1:1/"\nheaders = {A = {file = "/nonexistent"}}',
            "/nonexistent of the header A cannot be read: No such file or directory",
        ),
    ],
)
def test_what_cannot_be_done_is_a_failure_like_others(place: Place, lines: str, error: str) -> None:
    place.configure(f'name = "x"\n{lines}')
    place.crash()
    with place.start() as process:
        assert process.stderr is not None
        assert f"callback x: {error}. It is tried again" in process.stderr.readline()
        wait_until(lambda: queue.read(place.store.directory) and place.line().counters["failed"] > 2, 20, "three tries")
        process.terminate()
        # No second line.
        assert process.stderr.read() == ""
    assert process.returncode == 0
    assert len(place.line().waiting) == 1


@needs_root
def test_who_cannot_change_users_counts_it(place: Place) -> None:
    """A rootless container: root in there, but nobody is not."""
    place.configure('name = "x"\n' + place.program("exit 0"))
    os.chown(place.path, 1000, 1000)
    os.chown(place.settings, 1000, 1000)
    place.crash()
    for path in place.path.iterdir():
        os.chown(path, 1000, 1000)
    with place.start(user=1000, group=1000, extra_groups=[]) as process:
        assert process.stderr is not None
        line = process.stderr.readline()
        assert "callback x: it cannot be run as user nobody here: Operation not permitted." in line
        process.terminate()
    assert not place.ids()


# Servers


@needs_root
def test_a_server_gets_a_cloud_event(place: Place, server: Server) -> None:
    token = place.directory / "token"
    token.write_text("hunter2\n")
    token.chmod(0o600)
    headers = f'headers = {{ X-Team = "cores", Authorization = {{ file = "{token}", prefix = "Bearer " }} }}'
    place.configure(f'name = "x"\n{server.post}\n{headers}')
    record = place.crash()
    assert place.deliver() == []
    ((path, sent, body),) = server.requests
    assert path == "/hook?a=b"
    assert sent["Content-Type"] == "application/cloudevents+json; charset=utf-8"
    assert (sent["X-Team"], sent["Authorization"]) == ("cores", "Bearer hunter2")
    assert json.loads(body)["id"] == record.id


@needs_root
def test_a_server_at_a_unix_socket(place: Place) -> None:
    path = f"{place.told}/socket"
    with Server(path=path) as server:
        place.configure(f'name = "x"\npost = "unix:{path}:/hook"')
        record = place.crash()
        assert place.deliver() == []
    assert server.ids() == [record.id]
    assert server.requests[0][0] == "/hook"


@needs_root
def test_who_sends_a_request_has_nothing_of_roots(place: Place) -> None:
    path = f"{place.told}/socket"
    found: dict[str, Any] = {}

    def look(handler: http.server.BaseHTTPRequestHandler) -> None:
        peer = handler.connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
        found["pid"], found["uid"], found["gid"] = struct.unpack("3i", peer)
        directory = f"/proc/{found['pid']}/fd"
        found["fds"] = sorted(os.readlink(f"{directory}/{fd}").partition(":")[0] for fd in os.listdir(directory))
        status(200)(handler)

    with Server(path=path) as server:
        server.answers = [look]
        place.configure(f'name = "x"\npost = "unix:{path}"')
        place.crash()
        assert place.deliver() == []
    assert (found["uid"], found["gid"]) == (NOBODY, NOBODY)
    # The record, where it says what became of it, and its connection; not the store, and not its lock.
    assert found["fds"] == ["/dev/null", "/dev/null", "/memfd", "pipe", "socket"]


def reset(handler: http.server.BaseHTTPRequestHandler) -> None:
    handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    handler.connection.close()


def garbage(handler: http.server.BaseHTTPRequestHandler) -> None:
    handler.wfile.write(b"\0\xff" * 1000 + b"\r\n\r\n")


def endless(handler: http.server.BaseHTTPRequestHandler) -> None:
    while True:
        handler.wfile.write(b"HTTP/1.1 200 OK\r\nX: " + b"y" * 100000)


@needs_root
@pytest.mark.parametrize(
    ("answer", "error"),
    [
        (status(500, body=b"database\x1b[2J is down\nand more"), "500 Internal Server Error: database\\x1b[2J is down"),
        (status(404), "404 Not Found"),
        (
            status(302, {"Location": "http://127.0.0.1:1/"}),
            "302 Found, a redirect to http://127.0.0.1:1/, which is not",
        ),
        (reset, "Connection reset by peer"),
        (garbage, "BadStatusLine"),
        (endless, "LineTooLong"),
    ],
)
def test_a_server_that_fails_and_recovers(
    place: Place, server: Server, answer: Callable[[http.server.BaseHTTPRequestHandler], None], error: str
) -> None:
    server.answers = [answer, answer, status(200)]
    place.configure(f'name = "x"\n{server.post}')
    records = [place.crash() for _ in range(3)]
    said = place.deliver()
    assert len(said) == 2, said
    assert f"callback x: {error}" in said[0]
    assert "callback x: it works again, after 2 failures" in said[1]
    assert set(server.ids()) == {record.id for record in records}
    assert len(server.requests) == 5
    assert place.line().counters == {"delivered": 3, "failed": 2, "given_up": 0, "dropped": 0}


@needs_root
def test_a_server_that_drips_is_cut_at_the_timeout(place: Place, server: Server) -> None:
    def drip(handler: http.server.BaseHTTPRequestHandler) -> None:
        handler.wfile.write(b"HTTP/1.1 200 OK\r\nX: ")
        while not server.ended.wait(0.05):
            handler.wfile.write(b"y")

    server.answers = [drip, status(200)]
    place.configure(f'name = "x"\ntimeout = 1\n{server.post}')
    place.crash()
    assert "callback x: not done within 1 s." in place.deliver()[0]
    assert place.line().counters["delivered"] == 1


@needs_root
def test_a_server_that_is_busy_is_left_alone_for_so_long(place: Place, server: Server) -> None:
    server.answers = [status(429, {"Retry-After": "600"})]
    place.configure(f'name = "x"\n{server.post}')
    for _ in range(3):
        place.crash()
    begun = time.time()
    with place.start() as process:
        wait_until(lambda: queue.read(place.store.directory) and place.line().failures, 20, "it has failed")
        process.terminate()
        process.communicate(timeout=20)
    assert len(server.requests) == 1
    assert begun + 600 <= place.line().resume <= time.time() + 600
    # Also the next one.
    with place.start() as process:
        place.crash()
        wait_until(lambda: not notify.is_awaited(place.store.directory), 20, "it looks")
        process.terminate()
        process.communicate(timeout=20)
    assert len(server.requests) == 1
    assert len(place.line().waiting) == 4


@pytest.fixture
def certificate(public: Path) -> Path:
    if shutil.which("openssl") is None:
        pytest.skip("needs openssl. Run: apt install openssl")
    directory = public / "tls"
    directory.mkdir()
    command = [
        "openssl",
        "req",
        "-x509",
        "-newkey",
        "ec",
        "-pkeyopt",
        "ec_paramgen_curve:P-256",
        "-nodes",
        "-days",
        "2",
    ]
    command += ["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost"]
    command += ["-keyout", f"{directory}/key.pem", "-out", f"{directory}/cert.pem"]
    subprocess.run(command, check=True, capture_output=True, timeout=60)
    return directory


@needs_root
def test_a_certificate_that_nobody_trusts_is_refused(place: Place, server: Server, certificate: Path) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate / "cert.pem", certificate / "key.pem")
    assert isinstance(server.server, socketserver.TCPServer)
    server.server.socket = context.wrap_socket(server.server.socket, server_side=True)
    url = f"https://localhost:{server.port}/"
    names = f"https://127.0.0.1:{server.port}/"
    ca = f'ca = "{certificate}/cert.pem"'
    place.configure(
        f'name = "stranger"\npost = "{url}"',
        f'name = "x"\npost = "{url}"\n{ca}',
        f'name = "other"\npost = "{names}"\n{ca}',
    )
    record = place.crash()
    with place.start() as process:
        wait_until(
            lambda: (
                queue.read(place.store.directory)
                and place.line().counters["delivered"]
                and place.line("stranger").failures
                and place.line("other").failures
            ),
            20,
            "each was tried",
        )
        process.terminate()
        process.communicate(timeout=20)
    assert place.line("stranger").error == "its certificate is not trusted: self-signed certificate"
    assert place.line("other").error.startswith("its certificate is not trusted: IP address mismatch")
    assert server.ids() == [record.id]


# At least once


@needs_root
def test_a_crash_that_took_long_is_not_skipped(place: Place) -> None:
    """Its id is of when it came, its record of when its core was written: after others that came later."""
    place.configure('name = "x"\n' + place.program(': >"$TOLD/$CORE_PIPE_ID"'))
    slow = a_record()
    fast = place.crash()
    place.deliver()
    assert place.ids() == [fast.id]
    place.store.add_record(slow)
    notify.wake(place.store)
    place.deliver()
    assert place.ids() == sorted([slow.id, fast.id])
    assert place.line().counters["delivered"] == 2


@needs_root
def test_crashes_from_before_it_was_configured_are_not_told(place: Place) -> None:
    place.configure('name = "x"\n' + place.program(': >"$TOLD/$CORE_PIPE_ID"'))
    old, ancient = place.crash(), place.crash()
    os.utime(place.path / f"{ancient.id}.json", (1, 1))
    os.utime(place.path / f"{old.id}.json", (time.time() - 90000,) * 2)
    new = place.crash()
    place.deliver()
    assert place.ids() == [new.id]


@needs_root
def test_each_callback_is_told_what_it_wants(place: Place) -> None:
    def table(name: str, when: str) -> str:
        return f'name = "{name}"\nwhen = {{{when}}}\n' + place.program(
            'echo "$CORE_PIPE_ID" >>"$TOLD/$CORE_PIPE_CALLBACK"'
        )

    place.configure(table("first", "first = true"), table("abrt", 'signal = "ABRT"'), table("other", 'exe = "other"'))
    one, _, three = place.crash(), place.crash(), place.crash(signal=6)
    place.deliver()
    four = place.crash(signal=6)
    place.crash()
    place.deliver()
    assert (place.told / "first").read_text().split() == [one.id, three.id]
    assert (place.told / "abrt").read_text().split() == [three.id, four.id]
    assert not (place.told / "other").exists()


@needs_root
def test_a_callbacks_own_crash_is_told_to_nobody(place: Place) -> None:
    place.configure('name = "x"\n' + place.program(': >"$TOLD/$CORE_PIPE_ID"'))
    place.crash(core_limit=1)
    place.crash(environment={events.MARK: "x"})
    told = place.crash(core_limit=2)
    place.deliver()
    assert place.ids() == [told.id]


@needs_root
def test_a_killed_deliverer_loses_nothing(place: Place) -> None:
    place.configure('name = "x"\n' + place.program(': >"$TOLD/$CORE_PIPE_ID"'))
    wanted = []
    for _ in range(10):
        wanted += [place.crash().id for _ in range(3)]
        with place.start() as process:
            assert process.stderr is not None
            try:
                process.wait(random.uniform(0.0, 0.3))
            except subprocess.TimeoutExpired:
                process.kill()
    place.deliver()
    assert place.ids() == sorted(wanted)
    # Whatever was told before its last word was written was told again.
    assert len(place.line().waiting) == 0


@needs_root
def test_a_deliverer_that_is_stopped_tells_what_is_due_first(place: Place) -> None:
    place.configure('name = "x"\n' + place.program('sleep 0.2; : >"$TOLD/$CORE_PIPE_ID"'))
    wanted = [place.crash().id for _ in range(3)]
    with place.start() as process:
        wait_until(lambda: not notify.is_awaited(place.store.directory), 20, "it looks")
        process.terminate()
        assert process.communicate(timeout=20)[1] == ""
    assert process.returncode == 0
    assert place.ids() == sorted(wanted)


@needs_root
def test_a_deliverer_that_is_stopped_looks_once_more(place: Place) -> None:
    place.configure('name = "x"\n' + place.program(': >"$TOLD/$CORE_PIPE_ID"'))
    one = place.crash()
    with place.start(linger=60) as process:
        wait_until(place.ids, 20, "it is told")
        two = place.crash(awake=False)
        process.terminate()
        assert process.communicate(timeout=20)[1] == ""
    assert place.ids() == sorted([one.id, two.id])


@needs_root
def test_a_deliverer_that_is_stopped_waits_for_nobody_long(place: Place) -> None:
    place.configure('name = "x"\ntimeout = "1h"\n' + place.program('echo $$ >"$TOLD/pid"; exec sleep 1000'))
    record = place.crash()
    with place.start(stop=0.1) as process:
        wait_until(lambda: (place.told / "pid").exists() and (place.told / "pid").read_text(), 20, "it runs")
        pid = int((place.told / "pid").read_text())
        process.terminate()
        assert process.communicate(timeout=20)[1] == ""
    assert not is_alive(pid)
    # It was not the callback that failed.
    assert list(place.line().waiting) == [record.id]
    assert place.line().counters["failed"] == 0


@needs_root
def test_there_is_one_deliverer_at_a_time(place: Place) -> None:
    place.configure('name = "x"\n' + place.program('sleep 0.1; echo >>"$TOLD/$CORE_PIPE_ID"'))
    wanted = [place.crash().id for _ in range(5)]
    with place.start() as one, place.start() as two:
        for process in (one, two):
            process.communicate(timeout=30)
            assert process.returncode == 0
    assert place.ids() == sorted(wanted)
    assert all((place.told / name).read_text() == "\n" for name in wanted)


@needs_root
def test_a_full_disk_costs_a_line(place: Place) -> None:
    place.store.close()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k,mode=755", "tmpfs", str(place.path)], check=True)
    try:
        place.store = Store(str(place.path))
        place.configure('name = "x"\n' + place.program(': >"$TOLD/$CORE_PIPE_ID"'))
        wanted = [place.crash().id for _ in range(3)]
        with contextlib.suppress(OSError), (place.path / "ballast").open("wb", buffering=0) as file:
            while True:
                file.write(bytes(4096))
        said = place.deliver()
        assert len(said) == 1
        assert "the queue cannot be written: No space left on device" in said[0]
        assert place.ids() == sorted(wanted)
        assert not (place.path / ".notify.state.new").exists()
    finally:
        place.store.close()
        subprocess.run(["umount", str(place.path)], check=True)
        place.store = Store(str(place.path))


@needs_root
def test_a_user_who_locks_the_store_holds_nobody_up(place: Place) -> None:
    """Anybody may open its directory, and flock(2) asks for no more than that."""
    place.configure('name = "x"\n' + place.program(': >"$TOLD/$CORE_PIPE_ID"'))
    record = place.crash()
    command = ["flock", str(place.path), "sh", "-c", "echo; exec sleep 60"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, user=NOBODY, group=NOBODY, extra_groups=[]) as holder:
        try:
            assert holder.stdout is not None
            assert holder.stdout.readline() == b"\n"
            place.deliver()
            assert place.ids() == [record.id]
            assert (place.path / queue.LOCK).stat().st_mode & 0o777 == 0o600
        finally:
            holder.kill()


@needs_root
def test_a_damaged_queue_tells_again(place: Place) -> None:
    place.configure('name = "x"\n' + place.program('echo >>"$TOLD/$CORE_PIPE_ID"'))
    record = place.crash()
    place.deliver()
    (place.path / ".notify.state").write_bytes(b"")
    assert "callbacks: .notify.state is not usable" in place.deliver()[0]
    assert (place.told / record.id).read_text() == "\n\n"


@needs_root
def test_hostile_records_are_told_or_passed_over(place: Place, server: Server) -> None:
    place.configure(
        f'name = "x"\nfull = true\n{server.post}', 'name = "y"\n' + place.program('cat >"$TOLD/$CORE_PIPE_ID"')
    )
    huge = place.crash(environment={str(n): "\U0001f4a3" * 40 for n in range(1600)}, awake=False)
    assert MAX_RECORD // 2 < (place.path / f"{huge.id}.json").stat().st_size < MAX_RECORD
    odd = place.crash(comm="\\xff\x1b[2J\n\ud800", exe="/\u202e", host_name="a b/\ud800", awake=False)
    for data in (b"", b"\xff" * 100, b"[" * 100000, b"{}", bytes(MAX_RECORD + 5)):
        (place.path / f"{a_record().id}.json").write_bytes(data)
    nan = a_record(seconds=float("nan"))
    place.store.add_record(nan)
    fine = place.crash()
    assert place.deliver() == []
    # A host's name that is no text makes no reference.
    assert sorted(server.ids()) == sorted([huge.id, fine.id])
    assert place.line().counters["dropped"] == 2
    assert place.ids() == sorted([huge.id, odd.id, fine.id])
    assert len(json.loads((place.told / huge.id).read_bytes())["id"])


@needs_root
def test_a_record_that_has_gone_is_counted(place: Place) -> None:
    place.configure('name = "x"\n' + place.program(': >"$TOLD/$CORE_PIPE_ID"'))
    gone, stays = a_record(), place.crash()
    found = Queue()
    found.seen = {gone.id, stays.id}
    found.lines["x"] = Line(0.0)
    for record in (gone, stays):
        found.lines["x"].add(record.id, time.time(), 10)
    queue.write(place.store.directory, found)
    assert place.deliver() == []
    assert place.ids() == [stays.id]
    assert place.line().counters == {"delivered": 1, "failed": 0, "given_up": 0, "dropped": 1}


# Quotas


def an_event(**values: Any) -> dict[str, Any]:
    return quota.made_up() | {"host_name": "host7", "id": 701000} | values


def quotas_in(place: Place) -> list[str]:
    return sorted(quota.owners_in(place.store.directory))


@needs_root
def test_a_quota_event_is_told_to_whom_it_concerns(place: Place, server: Server) -> None:
    program = place.program('cat >"$TOLD/$CORE_PIPE_CALLBACK.$CORE_PIPE_ID"')
    place.configure(
        f'name = "server"\nevents = ["quota"]\n{server.post}',
        f'name = "crashes"\n{program}',
        # Not for quotas.
        f'name = "both"\nevents = ["crash", "quota"]\nwhen = {{ signal = "ABRT", first = true }}\n{program}',
    )
    record = place.crash()
    assert quota.leave(str(place.path), [an_event(), an_event(containers=["docker:a", "host"])]) == (0, "")
    one, two = quotas_in(place)
    assert (place.path / f"{one}.quota.json").stat().st_mode & 0o777 == 0o600
    assert place.deliver() == []
    assert sorted(server.ids()) == [one, two]
    told = {body["id"]: body for body in (json.loads(body) for _, _, body in server.requests)}
    assert {body["type"] for body in told.values()} == {"org.core_pipe.quota.v1"}
    by_source = {body["source"]: body for body in told.values()}
    assert by_source["/host7/docker:core_pipe-test"]["subject"] == "docker:core_pipe-test"
    assert by_source["/host7"]["subject"] == "docker:a or host"
    assert by_source["/host7"]["data"]["id"] == 701000
    assert place.ids() == sorted([f"crashes.{record.id}", f"both.{one}", f"both.{two}"])
    assert json.loads((place.told / f"both.{one}").read_text())["event"] == "org.core_pipe.quota.v1"
    # Their files have gone, and nothing is told again.
    assert quotas_in(place) == []
    notify.wake(place.store)
    assert place.deliver() == []
    assert len(server.requests) == 2
    assert place.line("both").counters == {"delivered": 2, "failed": 0, "given_up": 0, "dropped": 0}


@needs_root
def test_a_quota_event_waits_for_a_server_that_is_down(place: Place, server: Server) -> None:
    server.answers = [status(503), status(503), status(204)]
    place.configure(f'name = "x"\nevents = "quota"\n{server.post}')
    quota.leave(str(place.path), [an_event()])
    (one,) = quotas_in(place)
    assert place.deliver()
    assert server.ids() == [one] * 3
    assert (place.line().counters["failed"], place.line().counters["delivered"]) == (2, 1)
    assert quotas_in(place) == []


@needs_root
def test_a_quota_event_that_is_given_up_goes(place: Place, server: Server) -> None:
    server.answers = [status(503)]
    place.configure(f'name = "x"\nevents = "quota"\n{server.post}')
    quota.leave(str(place.path), [an_event()])
    (one,) = quotas_in(place)
    found = Queue()
    found.seen = {one}
    found.lines["x"] = Line(0.0)
    found.lines["x"].add(one, time.time() - queue.GIVE_UP_SECONDS, 10)
    queue.write(place.store.directory, found)
    place.deliver()
    assert place.line().counters["given_up"] == 1
    assert quotas_in(place) == []


@needs_root
def test_a_quota_event_that_nobody_wants_or_is_none_goes(place: Place) -> None:
    place.configure('name = "x"\n' + place.program(': >"$TOLD/$CORE_PIPE_ID"'))
    quota.leave(str(place.path), [an_event()])
    assert place.deliver() == []
    assert quotas_in(place) == []
    assert place.ids() == []
    place.configure('name = "x"\nevents = ["quota"]\n' + place.program(': >"$TOLD/$CORE_PIPE_ID"'))
    broken = (b"", b"[" * 60000, b"{}", b"x" * 70000, json.dumps(an_event(containers=[1])).encode())
    for number, data in enumerate((*broken, json.dumps(an_event(at=1e300)).encode())):
        (place.path / f"20261123T045800-000000-0-0000000{number}.quota.json").write_bytes(data)
    notify.wake(place.store)
    place.deliver()
    # A program is told of it all the same; a server could not be told the time.
    assert place.ids() == ["20261123T045800-000000-0-00000005"]
    assert place.line().counters["dropped"] == len(broken)
    assert quotas_in(place) == []


def test_a_callback_of_quotas_can_be_tested(place: Place, server: Server) -> None:
    place.configure(f'name = "x"\nevents = ["quota"]\n{server.post}')
    assert command(place, "--test", "x").returncode == 0
    assert json.loads(server.requests[0][2])["type"] == "org.core_pipe.quota.v1"


def test_a_quota_event_is_no_crash(place: Place) -> None:
    record = place.crash()
    quota.leave(str(place.path), [an_event() for _ in range(5)])
    waiting = quotas_in(place)
    assert len(waiting) == 5
    store = Store(str(place.path), records=2)
    try:
        assert [owner for owner, _ in store.records()] == [record.id]
        assert store.recover() == []
        assert {use.name: use.used for use in store.usage().uses}["records_max"] == 1
        assert store.prune() == []
        assert not [name for name in store.names() if "quota" in name]
        # A record more than there may be, and the events are none.
        other = a_record()
        store.add_record(other)
        assert sorted(owner for owner, _ in store.records()) == sorted([record.id, other.id])
    finally:
        store.close()
    assert quotas_in(place) == waiting
    listed = subprocess.run(
        [f"{BIN}/corepipectl", "list", "--json"],
        env={"CORE_PIPE_STORE": str(place.path), "PATH": os.environ["PATH"]},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert listed.returncode == 0, listed.stderr
    assert record.id in listed.stdout
    assert not any(owner in listed.stdout for owner in waiting)


# The command


def command(place: Place, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {"CORE_PIPE_CONFIG": str(place.settings), "PATH": os.environ["PATH"], "LANG": "C.UTF-8"}
    return subprocess.run(
        [f"{BIN}/core-pipe-receiver", "notify", *arguments],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )


@needs_root
def test_a_callback_can_be_tested(place: Place, server: Server) -> None:
    works = f'name = "x"\nwhen = {{ state = "stored" }}\n{server.post}'
    place.configure(works, 'name = "y"\n' + place.program("echo broken >&2; exit 7"))
    done = command(place, "--test", "x")
    assert (done.returncode, done.stdout.partition(" (")[0]) == (0, "told: 204 No Content")
    assert json.loads(server.requests[0][2])["subject"] == "/usr/bin/core_pipe-test"
    done = command(place, "--test", "y")
    assert (done.returncode, done.stdout.partition(" (")[0]) == (1, "not told: it ended with status 7: broken")
    done = command(place, "--test", "z")
    assert (done.returncode, done.stderr) == (2, "core-pipe-receiver: there is no callback z. There are: x, y\n")
    # Nothing of it is remembered.
    assert queue.read(place.store.directory) is None


@needs_root
def test_the_state_is_shown(place: Place, server: Server) -> None:
    server.answers = [status(503, {"Retry-After": "60"}, b"later")]
    place.configure(f'name = "x"\n{server.post}', 'name = "y"\n' + place.program("exit 0"))
    place.crash()
    with place.start() as process:
        wait_until(
            lambda: (
                queue.read(place.store.directory) and place.line().failures and place.line("y").counters["delivered"]
            ),
            20,
            "both were tried",
        )
        process.terminate()
        process.communicate(timeout=20)
    done = command(place, "--status")
    assert done.returncode == 0, done.stderr
    heading, x, y, error = done.stdout.splitlines()
    assert heading.split() == ["NAME", "WAITING", "DELIVERED", "FAILED", "GIVEN", "UP", "DROPPED", "TARGET"]
    assert x.split()[:6] == ["x", "1", "0", "1", "0", "0"]
    assert y.split()[:6] == ["y", "0", "1", "0", "0", "0"]
    assert error.startswith("x: 1 failures in a row: 503 Service Unavailable: later. Next: ")
    rows = json.loads(command(place, "--status", "--json").stdout)["callbacks"]
    assert [(row["name"], row["waiting"], row["delivered"]) for row in rows] == [("x", 1, 0), ("y", 0, 1)]
    assert command(place, "--json").returncode == 2


def test_wrong_settings_are_said_and_wait_for_better_ones(place: Place) -> None:
    place.configure('name = "x"\nrun = 5')
    place.crash()
    done = command(place)
    assert done.returncode == 78
    assert "[[notify]] 1: run: 5 is no list of a program and its arguments. Allowed: " in done.stderr
    # systemd would start it again and again.
    assert not notify.is_awaited(place.store.directory)
    assert queue.read(place.store.directory) is None


# Where it is started


@pytest.mark.parametrize("host", [False, True], ids=["container", "host"])
@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="needs systemd-analyze. Run: apt install systemd")
def test_the_units(tmp_path: Path, host: bool) -> None:
    program = tmp_path / "usr/bin/core-pipe-receiver"
    program.parent.mkdir(parents=True)
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    # What units of the normal boot refer to.
    for name in ("sysinit", "basic", "shutdown", "paths"):
        target = tmp_path / f"usr/lib/systemd/system/{name}.target"
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text("[Unit]\n")
    images.install(str(tmp_path), host=host)
    link = tmp_path / "etc/systemd/system/paths.target.wants/core_pipe-notify.path"
    assert link.readlink() == Path("/etc/systemd/system/core_pipe-notify.path")
    root = f"--root={tmp_path}"
    for command in (
        ["verify", root, "--man=no", "core_pipe-notify.path"],
        ["security", root, "--offline=true", "--threshold=25", "--no-pager", "core_pipe-notify.service"],
    ):
        done = subprocess.run(["systemd-analyze", *command], capture_output=True, text=True, check=False, timeout=60)
        said = [line for line in (done.stdout + done.stderr).splitlines() if "core_pipe" in line]
        assert done.returncode == 0, done.stdout
        assert command[0] == "security" or said == []
    unit = (tmp_path / "etc/systemd/system/core_pipe-notify.path").read_text()
    assert f"PathExists={STORE}/{notify.FLAG}\n" in unit
    images.uninstall(str(tmp_path))
    assert not link.is_symlink()


SETTINGS = """
[[notify]]
name = "x"
run = ["/bin/sh", "-c", "cat >/told/.new && mv /told/.new /told/$CORE_PIPE_ID"]
"""


def prepare_told(directory: str) -> None:
    Path(directory, "told").mkdir(mode=0o777)
    os.chmod(f"{directory}/told", 0o777)
    path = Path(directory, "etc/core_pipe/receiver.toml")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(SETTINGS, encoding="utf-8")


def told_in(root: str) -> list[str]:
    return sorted(name for name in os.listdir(f"{root}/told") if not name.startswith("."))


@pytest.mark.kernel
def test_a_resident_receiver_tells() -> None:
    with forwarder_installed(), PlainContainer(prepare=prepare_told) as container:
        with resident(container):
            assert crash(container, "SEGV").core_dumped
            (one,) = wait_until(lambda: told_in(str(container.root)), 30, "it is told")
            assert json.loads(Path(container.root, "told", one).read_text())["signal_name"] == "SIGSEGV"
            # The deliverer stays a little; a receiver that is stopped now tells the last crash all the same.
            assert crash(container, "ABRT").core_dumped
        assert len(told_in(str(container.root))) == 2


@pytest.mark.kernel
@pytest.mark.parametrize(
    "ingress", [pytest.param(name, marks=[pytest.mark.long] if name != PIPE else []) for name in INGRESSES]
)
def test_a_callback_that_crashes_is_not_told_of_itself(ingress: str) -> None:
    def prepare(directory: str) -> None:
        prepare_told(directory)
        path = Path(directory, "etc/core_pipe/receiver.toml")
        path.write_text('[[notify]]\nname = "x"\nrun = ["/bin/sh", "-c", "kill -SEGV $$"]\n', encoding="utf-8")

    def failed(times: int) -> bool:
        directory = os.open(f"{container.root}{STORE}", os.O_RDONLY | os.O_DIRECTORY)
        try:
            found = queue.read(directory)
        finally:
            os.close(directory)
        if found is None or found.lines["x"].counters["failed"] < times:
            return False
        assert found.lines["x"].error == "it ended with signal 11"
        assert len(found.lines["x"].waiting) == 1
        return True

    with forwarder_installed(ingress), PlainContainer(prepare=prepare) as container, resident(container):
        assert crash(container, "SEGV").core_dumped
        wait_until(lambda: failed(1), 30, "the callback has crashed")
        # By then its own crash would have been looked at.
        wait_until(lambda: failed(2), 30, "the callback has crashed again")


@pytest.mark.system
@pytest.mark.skipif(SystemdContainer.why_unavailable() is not None, reason=str(SystemdContainer.why_unavailable()))
def test_systemd_starts_the_deliverer() -> None:
    def prepare(directory: str) -> None:
        prepare_units(accept=True)(directory)
        prepare_told(directory)
        # The sandbox has the rest of the file system read-only, and a drop-in opens what a program needs.
        drop_in = Path(directory, "etc/systemd/system/core_pipe-notify.service.d/own.conf")
        drop_in.parent.mkdir(parents=True)
        drop_in.write_text("[Service]\nReadWritePaths=/told\n", encoding="utf-8")

    def show(unit: str) -> str:
        return container.run(["systemctl", "show", "--property=ActiveState", "--value", unit]).stdout.strip()

    with forwarder_installed(), SystemdContainer(prepare=prepare) as container:
        assert show("core_pipe-notify.path") == "active"
        assert show("core_pipe-notify.service") == "inactive"
        for number in range(1, 4):
            assert crash(container, "SEGV").core_dumped
            wait_until(lambda number=number: len(told_in(str(container.root))) == number, 30, "it is told")  # type: ignore[misc]
        # Nothing runs while nothing crashes.
        wait_until(lambda: show("core_pipe-notify.service") == "inactive", 30, "it leaves")
        assert crash(container, "SEGV").core_dumped
        wait_until(lambda: len(told_in(str(container.root))) == 4, 30, "it is started again")
        assert show("core_pipe-notify.path") == "active"
        said = container.run(["journalctl", "-u", "core_pipe-notify.service", "--no-pager"]).stdout
        assert "callback" not in said
