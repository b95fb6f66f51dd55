"""Installing the units into trees: what is there afterwards, and that nothing outside of the tree ever is."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from receiver import images
from receiver.images import ImageError, install, uninstall

UNITS = "etc/systemd/system"
NOTIFY = {
    f"{UNITS}/core_pipe-notify.path",
    f"{UNITS}/core_pipe-notify.service",
    f"{UNITS}/paths.target.wants/core_pipe-notify.path",
}
YES = NOTIFY | {
    f"{UNITS}/core_pipe-forward.socket",
    f"{UNITS}/core_pipe-forward@.service",
    f"{UNITS}/core_pipe-forward@.service.d/10-sandbox.conf",
    f"{UNITS}/sockets.target.wants/core_pipe-forward.socket",
    "etc/tmpfiles.d/core_pipe.conf",
}
NO = NOTIFY | {
    f"{UNITS}/core_pipe-forward.socket",
    f"{UNITS}/core_pipe-forward.socket.d/10-accept-no.conf",
    f"{UNITS}/core_pipe-forward.service",
    f"{UNITS}/core_pipe-forward.service.d/10-sandbox.conf",
    f"{UNITS}/sockets.target.wants/core_pipe-forward.socket",
    "etc/tmpfiles.d/core_pipe.conf",
}
HOST = NOTIFY | {
    f"{UNITS}/core_pipe-host.socket",
    f"{UNITS}/core_pipe-host.service",
    f"{UNITS}/core_pipe-host.service.d/10-sandbox.conf",
    f"{UNITS}/sockets.target.wants/core_pipe-host.socket",
    "etc/tmpfiles.d/core_pipe.conf",
}
PROGRAM = "usr/bin/core-pipe-receiver"


def add(root: Path, path: str, text: str = "#!/usr/bin/python3\n") -> Path:
    file = root / path
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)
    file.chmod(0o755)
    return file


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """An image with systemd and the receiver in it."""
    tree = tmp_path / "image"
    add(tree, PROGRAM)
    add(tree, "usr/lib/systemd/systemd")
    return tree


def found(root: Path) -> set[str]:
    """Every file and link of ours below the root."""
    return {
        str(path.relative_to(root))
        for path in root.rglob("*")
        if (path.is_symlink() or path.is_file()) and "core_pipe" in str(path.relative_to(root))
    }


def sandbox(root: Path) -> list[str]:
    return (root / f"{UNITS}/core_pipe-forward@.service.d/10-sandbox.conf").read_text().splitlines()


@pytest.mark.parametrize(("accept", "host", "files"), [(True, False, YES), (False, False, NO), (True, True, HOST)])
def test_install_and_uninstall(root: Path, accept: bool, host: bool, files: set[str]) -> None:
    said = install(str(root), accept=accept, host=host)
    assert found(root) == files
    assert not any("warning" in line for line in said)
    for path in files:
        status = (root / path).lstat()
        if stat.S_ISREG(status.st_mode):
            assert stat.S_IMODE(status.st_mode) == 0o644, path
            assert f"written: {root}/{path}" in said
    store = root / "var/lib/core_pipe"
    assert stat.S_IMODE(store.stat().st_mode) == 0o755

    (store / "a.core").touch()
    uninstall(str(root))
    assert found(root) == {"var/lib/core_pipe/a.core"}
    assert not list((root / UNITS).glob("core_pipe*"))
    assert not list((root / UNITS).glob("*.wants")), "a directory that was there for our link only"
    assert uninstall(str(root)) == [f"nothing of core_pipe is installed in {root}."]


def test_links_of_others_stay(root: Path) -> None:
    others = root / f"{UNITS}/sockets.target.wants/other.socket"
    others.parent.mkdir(parents=True)
    others.symlink_to("/usr/lib/systemd/system/other.socket")
    install(str(root))
    uninstall(str(root))
    assert list(others.parent.iterdir()) == [others]


def test_enabling_needs_no_systemctl(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert "enabled: core_pipe-forward.socket" in install(str(root))
    # As `systemctl --root=... enable` makes it: absolute as seen from inside.
    link = root / f"{UNITS}/sockets.target.wants/core_pipe-forward.socket"
    assert link.readlink() == Path(f"/{UNITS}/core_pipe-forward.socket")


def test_installing_again_changes_nothing(root: Path) -> None:
    install(str(root))
    before = {path: (root / path).lstat().st_ino for path in found(root)}
    said = install(str(root))
    assert {path: (root / path).lstat().st_ino for path in found(root)} == before
    assert [line.split(": ")[0] for line in said] == ["unchanged"] * 6 + [
        "already enabled",
        "already enabled",
        "core_pipe-forward.socket listens from the next boot on.",
    ]


def test_a_changed_file_is_written_again(root: Path) -> None:
    install(str(root))
    unit = root / f"{UNITS}/core_pipe-forward.socket"
    before = unit.read_text()
    unit.write_text("[Socket]\n")
    assert f"written: {unit}" in install(str(root))
    assert unit.read_text() == before


def test_switching_removes_the_other_form(root: Path) -> None:
    for accept, files in ((True, YES), (False, NO), (True, YES)):
        said = install(str(root), accept=accept)
        assert found(root) == files
    assert f"removed: {root}/{UNITS}/core_pipe-forward.service (the other form of Accept=)" in said
    assert not (root / f"{UNITS}/core_pipe-forward.socket.d").exists()


def test_the_hosts_receiver_and_a_containers_do_not_touch_each_other(root: Path) -> None:
    install(str(root), accept=False)
    install(str(root), host=True)
    assert found(root) == NO | HOST
    install(str(root), accept=True)
    assert found(root) == YES | HOST


def test_an_administrators_drop_ins_stay(root: Path) -> None:
    install(str(root))
    own = add(root, f"{UNITS}/core_pipe-forward@.service.d/override.conf", "[Service]\n")
    # Ours comes first by name, so that his wins.
    assert sorted(os.listdir(own.parent)) == ["10-sandbox.conf", "override.conf"]
    install(str(root), accept=False)
    uninstall(str(root))
    assert found(root) == {f"{UNITS}/core_pipe-forward@.service.d/override.conf"}


@pytest.mark.parametrize(
    "link", ["etc", "etc/systemd", "etc/systemd/system", f"{UNITS}/sockets.target.wants", "etc/tmpfiles.d"]
)
@pytest.mark.parametrize("absolute", [True, False])
def test_a_link_out_of_the_image_is_refused(root: Path, tmp_path: Path, link: str, absolute: bool) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (root / link).parent.mkdir(parents=True, exist_ok=True)
    (root / link).symlink_to(outside if absolute else os.path.relpath(outside, (root / link).parent))
    for action in (install, uninstall):
        with pytest.raises(ImageError, match=f"/{link} is a symbolic link, which could lead out of the image"):
            action(str(root))
    assert list(outside.iterdir()) == []


def test_a_link_in_the_place_of_a_unit_is_refused(root: Path, tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("mine")
    unit = root / f"{UNITS}/core_pipe-forward.socket"
    unit.parent.mkdir(parents=True)
    unit.symlink_to(victim)
    with pytest.raises(ImageError, match=r"core_pipe-forward\.socket is a symbolic link\. Move it away"):
        install(str(root))
    assert victim.read_text() == "mine"
    unit.unlink()
    unit.symlink_to("/dev/null")
    with pytest.raises(ImageError, match="the unit is masked"):
        install(str(root))


def test_other_things_in_the_way_are_refused(root: Path) -> None:
    unit = root / f"{UNITS}/core_pipe-forward.socket"
    unit.parent.mkdir(parents=True)
    os.mkfifo(unit)
    with pytest.raises(ImageError, match="is not a regular file"):
        install(str(root))
    unit.unlink()
    (root / "etc/tmpfiles.d").touch()
    with pytest.raises(ImageError, match=r"etc/tmpfiles\.d is not a directory\. Move it away"):
        install(str(root))


def test_the_store_may_be_a_link(root: Path) -> None:
    (root / "var/lib").mkdir(parents=True)
    (root / "var/lib/core_pipe").symlink_to("/data/cores")
    said = install(str(root))
    assert said[-1].startswith(f"warning: {root}/var/lib/core_pipe is a symbolic link")
    assert found(root) - {"var/lib/core_pipe"} == YES


def test_a_failed_write_leaves_nothing(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_fd: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ImageError, match="No space left on device"):
        install(str(root))
    assert found(root) == set()
    assert list((root / UNITS).iterdir()) == []


def test_the_callers_umask_is_not_the_images(root: Path) -> None:
    mask = os.umask(0o077)
    try:
        install(str(root))
    finally:
        os.umask(mask)
    for path in ("etc/systemd", UNITS, f"{UNITS}/sockets.target.wants", "etc/tmpfiles.d", "var/lib"):
        assert stat.S_IMODE((root / path).stat().st_mode) == 0o755, path


def test_no_descriptor_stays_open(root: Path) -> None:
    before = os.listdir("/proc/self/fd")
    install(str(root))
    uninstall(str(root))
    (root / "etc/tmpfiles.d").rmdir()
    (root / "etc/tmpfiles.d").symlink_to("/")
    with pytest.raises(ImageError):
        install(str(root))
    assert os.listdir("/proc/self/fd") == before


def test_no_such_root(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match=r"No such file or directory\. Name the directory that holds"):
        install(str(tmp_path / "none"))


@pytest.mark.parametrize("place", ["usr/local/bin/core-pipe-receiver", PROGRAM])
def test_the_program_is_found(tmp_path: Path, place: str) -> None:
    add(tmp_path, place)
    install(str(tmp_path))
    service = (tmp_path / f"{UNITS}/core_pipe-forward@.service").read_text()
    assert f"\nExecStart=/{place}\n" in service


def test_a_named_program(root: Path) -> None:
    add(root, "opt/core_pipe/bin/core-pipe-receiver")
    said = install(str(root), accept=False, program="/opt/core_pipe/bin/core-pipe-receiver")
    assert not any("warning" in line for line in said)
    service = (root / f"{UNITS}/core_pipe-forward.service").read_text()
    assert "\nExecStart=/opt/core_pipe/bin/core-pipe-receiver\n" in service


def test_a_missing_program_is_a_warning(root: Path) -> None:
    said = install(str(root), program="/opt/nothing")
    assert said[-1] == (
        f"warning: there is no {root}/opt/nothing. Install core_pipe into the image, "
        "or name the program's place there with --program"
    )
    assert found(root) == YES


@pytest.mark.parametrize(
    "program", ["core-pipe-receiver", "/opt/a b", "/opt/%n", "/opt/x\nExecStart=/bin/sh", "", "/ü"]
)
def test_a_program_that_cannot_stand_in_a_unit(root: Path, program: str) -> None:
    with pytest.raises(ImageError, match="cannot stand in a unit file"):
        install(str(root), program=program)
    assert found(root) == set()


def test_an_image_without_systemd_is_told(tmp_path: Path) -> None:
    add(tmp_path, PROGRAM)
    said = install(str(tmp_path))
    assert "there is no systemd in" in said[-1]
    assert said[-1].endswith("/usr/bin/core-pipe-receiver --listen /run/core_pipe.socket")


def test_systemd_is_found_behind_a_merged_usr(tmp_path: Path) -> None:
    add(tmp_path, PROGRAM)
    add(tmp_path, "usr/lib/systemd/systemd")
    (tmp_path / "lib").symlink_to("usr/lib")
    assert not any("warning" in line for line in install(str(tmp_path)))


def test_homes_stay_hidden(root: Path) -> None:
    install(str(root))
    assert "ProtectHome=yes" in sandbox(root)
    assert "InaccessiblePaths=-/tmp -/var/tmp" in sandbox(root)


@pytest.mark.parametrize("how", ["program", "link", "interpreter", "interpreter's link"])
def test_homes_are_seen_when_the_program_is_there(root: Path, how: str) -> None:
    real = add(root, "root/.local/bin/core-pipe-receiver")
    program = "/usr/local/bin/core-pipe-receiver"
    if how == "program":
        program = "/root/.local/bin/core-pipe-receiver"
    elif how == "link":
        link = root / program[1:]
        link.parent.mkdir(parents=True)
        link.symlink_to("/root/.local/bin/core-pipe-receiver")
    elif how == "interpreter":
        add(root, program[1:], "#!/home/app/venv/bin/python -I\n")
        add(root, "home/app/venv/bin/python", "\x7fELF")
    else:
        add(root, program[1:], "#!/opt/venv/bin/python\n")
        (root / "opt/venv/bin").mkdir(parents=True)
        (root / "opt/venv/bin/python").symlink_to("../../../root/.local/share/uv/python3")
        add(root, "root/.local/share/uv/python3", "\x7fELF")
    assert real.exists()
    install(str(root), program=program)
    assert "ProtectHome=read-only" in sandbox(root)
    assert "ProtectHome=yes" not in sandbox(root)


def test_temporary_directories_are_seen_when_the_program_is_there(root: Path) -> None:
    add(root, "tmp/venv/bin/core-pipe-receiver")
    install(str(root), program="/tmp/venv/bin/core-pipe-receiver")
    assert not any(line.startswith("InaccessiblePaths=") for line in sandbox(root))
    assert "ProtectHome=yes" in sandbox(root)


def test_links_of_an_image_are_looked_up_inside_of_it(root: Path) -> None:
    """/usr/bin/env exists here, but not there."""
    (root / "opt").mkdir()
    (root / "opt/program").symlink_to("/usr/bin/env")
    assert install(str(root), program="/opt/program")[-1].startswith("warning: there is no")
    (root / "opt/loop").symlink_to("loop")
    assert install(str(root), program="/opt/loop")[-1].startswith("warning: there is no")
    (root / "opt/up").symlink_to("../../../../../../" + PROGRAM)
    assert not any("warning" in line for line in install(str(root), program="/opt/up"))


STOPS = ["stop core_pipe-forward.socket", "stop core_pipe-notify.path"]
STARTS = ["start core_pipe-notify.path", "start core_pipe-forward.socket"]


class Systemctl:
    """Answers for a running systemd, and remembers what it was asked."""

    def __init__(self, state: str, *, runs: bool = True) -> None:
        self.state = state
        self.runs = runs
        self.asked: list[str] = []

    def __call__(self, *arguments: str) -> str:
        if arguments[0] == "show":
            return f"ActiveState={'inactive' if arguments[-1].endswith('.service') else self.state}\n"
        self.asked.append(" ".join(arguments))
        if arguments[0] == "start" and self.runs:
            self.state = "active"
        if arguments == ("stop", "core_pipe-notify.path"):
            self.state = "inactive"
        return ""


def running(monkeypatch: pytest.MonkeyPatch, systemctl: Systemctl) -> None:
    monkeypatch.setattr(images, "_systemctl", systemctl)
    monkeypatch.setattr(images._Tree, "is_running_system", property(lambda _self: True))


def test_on_a_running_system_the_socket_is_started(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    systemctl = Systemctl("inactive")
    running(monkeypatch, systemctl)
    assert install(str(root))[-1] == "started: core_pipe-forward.socket"
    assert systemctl.asked == ["daemon-reload", *STARTS]


def test_on_a_running_system_a_change_stops_the_old_form_first(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(str(root))
    systemctl = Systemctl("active")
    running(monkeypatch, systemctl)
    install(str(root))
    assert systemctl.asked == STARTS
    systemctl.asked.clear()
    install(str(root), accept=False)
    assert systemctl.asked == [*STOPS, "daemon-reload", *STARTS]
    systemctl.asked.clear()
    uninstall(str(root))
    assert systemctl.asked == [*STOPS, "daemon-reload"]


def test_a_condition_that_is_not_met_is_said(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    running(monkeypatch, Systemctl("inactive", runs=False))
    assert "it starts only in a container (for a host: install --host)" in install(str(root))[-1]
    assert "it starts only in the host" in install(str(root), host=True)[-1]
