"""Which package a program came in, by real databases and notes, and by hostile ones."""

from __future__ import annotations

import json
import os
import shutil
import struct
import subprocess
import time
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from receiver import packages
from receiver.packages import note, package_of

if TYPE_CHECKING:
    from pathlib import Path

needs_dpkg = pytest.mark.skipif(shutil.which("dpkg-query") is None, reason="needs a Debian")


@needs_dpkg
@pytest.mark.parametrize("program", ["/usr/bin/sleep", "/usr/bin/dash", "/usr/bin/gdb", "/usr/bin/python3"])
def test_the_real_dpkg(program: str) -> None:
    """As dpkg-query says, which knows programs by their names from before /usr was merged."""
    path = os.path.realpath(program)
    if not os.path.exists(path):
        pytest.skip(f"needs {program}")
    for name in (path, path.removeprefix("/usr")):
        owner = subprocess.run(["dpkg-query", "-S", name], capture_output=True, text=True, check=False).stdout
        if owner:
            break
    form = "${Package} ${Version} ${Architecture}"
    said = subprocess.run(
        ["dpkg-query", "-W", "-f", form, owner.split(":")[0]], capture_output=True, text=True, check=True
    ).stdout.split()
    assert package_of(path) == {
        "manager": "dpkg",
        "name": said[0],
        "version": said[1],
        "architecture": said[2],
    }


@pytest.mark.parametrize(
    "exe",
    [None, "", "usr/bin/sleep", "/usr/bin/sleep (deleted)", "/usr/bin/no-such-program", "/tmp/sleep", "/bin/a\nb", "/"],
)
def test_what_has_no_package(exe: str | None) -> None:
    assert package_of(exe) is None


@needs_dpkg
def test_no_time_is_no_package() -> None:
    assert package_of("/usr/bin/sleep", seconds=0.0) is None


def database(root: Path, name: str, content: str) -> None:
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content, encoding="utf-8")


def test_dpkg_with_several_architectures(tmp_path: Path) -> None:
    for architecture in ("amd64", "i386"):
        database(tmp_path, f"var/lib/dpkg/info/tool:{architecture}.list", f"/.\n/opt/{architecture}/tool")
    stanzas = [
        f"Package: tool\nStatus: install ok installed\nArchitecture: {name}\nVersion: 1-{name}\n"
        for name in ("amd64", "i386")
    ]
    database(tmp_path, "var/lib/dpkg/status", "Package: another\nVersion: 5\n\n" + "\n".join(stanzas))
    for name in ("amd64", "i386"):
        found = package_of(f"/opt/{name}/tool", root=str(tmp_path))
        assert found == {"manager": "dpkg", "name": "tool", "version": f"1-{name}", "architecture": name}


APK = """\
C:Q1checksum=
P:musl
V:1.2.5-r0
A:x86_64
F:lib
R:ld-musl-x86_64.so.1
Z:Q1x=

C:Q1other=
P:busybox
V:1.36.1-r29
A:x86_64
F:bin
R:busybox
a:0:0:755
F:etc
R:securetty
"""


def test_apk(tmp_path: Path) -> None:
    database(tmp_path, "lib/apk/db/installed", APK)
    busybox = {"manager": "apk", "name": "busybox", "version": "1.36.1-r29", "architecture": "x86_64"}
    assert package_of("/bin/busybox", root=str(tmp_path)) == busybox
    assert package_of("/usr/bin/busybox", root=str(tmp_path)) == busybox
    assert package_of("/etc/securetty", root=str(tmp_path)) == busybox
    assert package_of("/lib/ld-musl-x86_64.so.1", root=str(tmp_path))["name"] == "musl"  # type: ignore[index]
    for other in ("/bin/securetty", "/etc/busybox", "/bin/busybo", "/in/busybox"):
        assert package_of(other, root=str(tmp_path)) is None


def test_hostile_databases(tmp_path: Path) -> None:
    """FIFOs are not waited for, and what is too large is not read."""
    info = tmp_path / "var/lib/dpkg/info"
    info.mkdir(parents=True)
    os.mkfifo(info / "a.list")
    (info / "b.list").mkdir()
    database(tmp_path, "var/lib/dpkg/info/c.list", "/opt/c")
    (tmp_path / "lib/apk/db").mkdir(parents=True)
    with (tmp_path / "lib/apk/db/installed").open("wb") as file:
        file.truncate(packages.MAX_FILE + 1)
    begun = time.monotonic()
    assert package_of("/opt/nothing", root=str(tmp_path), seconds=1.0) is None
    assert time.monotonic() - begun < 20


# No rpm is where these tests run: this says what rpm 4.18 says.
RPM = """#!/bin/sh
[ "$1 $2 $4" = "-qf --queryformat --" ] || exit 2
[ "$5" = /opt/hang ] && exec sleep 100
[ "$5" = /opt/talk ] && exec yes
[ "$5" = /usr/sbin/tool ] || { echo "file $5 is not owned by any package"; exit 1; }
printf 'mytool\\n3:1.0-2\\nnoarch\\n'
"""


def test_rpm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "rpm"
    program.write_text(RPM, encoding="utf-8")
    program.chmod(0o755)
    monkeypatch.setattr(packages, "RPM", str(program))
    monkeypatch.setattr(packages, "_RPM_DATABASES", (str(tmp_path),))
    # Fedora 42 has merged /usr/sbin into /usr/bin.
    found = package_of("/usr/bin/tool")
    assert found == {"manager": "rpm", "name": "mytool", "version": "3:1.0-2", "architecture": "noarch"}
    assert package_of("/opt/other") is None
    assert package_of("/opt/talk") is None
    assert package_of("/opt/hang", seconds=0.5) is None


# Notes

METADATA = {"type": "deb", "os": "debian", "name": "tool", "version": "1.2-3", "architecture": "amd64"}
FOUND = {"manager": "deb", "name": "tool", "version": "1.2-3", "architecture": "amd64"}


def with_note(content: bytes, *, kind: int = 0xCAFE1A7E, owner: bytes = b"FDO\0") -> bytes:
    """The first page of a 64-bit program with one note."""
    raw = struct.pack("<III", len(owner), len(content), kind) + owner + content.ljust(-(-len(content) // 4) * 4, b"\0")
    head = b"\x7fELF\2\1\1".ljust(16, b"\0")
    head += struct.pack("<HHIQQQIHHHHHH", 3, 62, 1, 0, 64, 0, 0, 64, 56, 1, 0, 0, 0)
    row = struct.pack("<IIQQQQQQ", 4, 4, 120, 120, 120, len(raw), len(raw), 4)
    return (head + row + raw).ljust(4096, b"\0")[:4096]


def test_a_note() -> None:
    assert note(with_note(json.dumps(METADATA).encode() + b"\0")) == FOUND
    # It is of what ran, whatever is installed now.
    assert package_of("/usr/bin/sleep (deleted)", with_note(json.dumps(METADATA).encode())) == FOUND


@pytest.mark.skipif(shutil.which("gcc") is None, reason="needs gcc: apt-get install gcc")
def test_a_note_by_the_linker(tmp_path: Path) -> None:
    program = tmp_path / "program"
    source = "int main(void) { return 0; }"
    option = f"-Wl,--package-metadata={json.dumps(METADATA, separators=(',', ':'))}"
    # A comma would end the linker's option.
    made = subprocess.run(
        ["gcc", "-x", "c", "-", "-o", str(program), "-Xlinker", option.removeprefix("-Wl,")],
        input=source,
        capture_output=True,
        text=True,
        check=False,
    )
    if made.returncode != 0 and "package-metadata" in made.stderr:
        pytest.skip("needs binutils 2.39")
    assert made.returncode == 0, made.stderr
    assert note(program.read_bytes()[:4096]) == FOUND


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"5", b"{}", b'{"name": 5}', b'{"name": ""}', b"[" * 3000, b"\xff\xfe", b"9" * 3000],
)
def test_hostile_notes(content: bytes) -> None:
    assert note(with_note(content)) is None


def test_notes_are_bounded() -> None:
    found = note(with_note(json.dumps({"name": "a" * 3000, "version": ["x"], "type": None}).encode()))
    assert found == {"name": "a" * packages.MAX_VALUE}
    assert note(with_note(json.dumps(METADATA).encode(), kind=3)) is None
    assert note(with_note(json.dumps(METADATA).encode(), owner=b"GNU\0")) is None


@given(st.binary(max_size=200), st.integers(0, 250), st.integers(0, 255))
def test_any_page(garbage: bytes, place: int, value: int) -> None:
    note(garbage)
    page = bytearray(with_note(json.dumps(METADATA).encode()))
    page[place] = value
    note(bytes(page))
    note(bytes(page[: place + 64]))
