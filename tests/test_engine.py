"""Which container a cgroup belongs to: the paths that engines make, and those that nobody makes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from receiver.cgroup import cgroup_path
from receiver.engine import MAX_NAME, describe, find, unescaped
from receiver.engine_names import Names
from tests.support.containers import PodmanContainer

ID = "9ec39b91f3d70e1beff50a308f77067065ea6be0d91a3378375056cd4422cf3d"
OTHER = "00de006493bc970788d6c830beb494a58a9a2847a5eda200812d3a8b4e214814"
SHORT = ID[:12]
UID = "72f7f152-440c-66ac-9084-e0fc1d8a910c"
SLICE_UID = UID.replace("-", "_")
# A static pod's: the hash of its manifest.
STATIC_UID = "4b3a1f0c7d2e5968a0b1c2d3e4f50617"

CONTAINERS = {
    # Docker: cgroup driver cgroupfs, then systemd; rootless; in a slice of one's own; with systemd inside.
    f"/docker/{ID}": f"docker:{SHORT}",
    f"/system.slice/docker-{ID}.scope": f"docker:{SHORT}",
    f"/user.slice/user-1000.slice/user@1000.service/user.slice/docker-{ID}.scope": f"docker:{SHORT}",
    f"/machine.slice/docker-{ID}.scope": f"docker:{SHORT}",
    f"/system.slice/docker-{ID}.scope/init.scope": f"docker:{SHORT}",
    f"/docker/{ID}/system.slice/cron.service": f"docker:{SHORT}",
    # runc that was given systemd's notation without its driver.
    f"/system.slice:docker:{ID}": f"docker:{SHORT}",
    # --cgroup-parent, Amazon ECS, and an id in the root.
    f"/ecs/0123456789abcdef/{ID}": f"container:{SHORT}",
    f"/{ID}": f"container:{SHORT}",
    "/docker/buildkit/k2m5zt0a1b2c3d4e5f6g7h8i9": "buildkit:k2m5zt0a1b2c3d4e5f6g7h8i9",
    # Podman: systemd's driver, with crun's own cgroup in it; a pod; rootless; cgroupfs; a quadlet's service
    # (--cgroups=split), for root and for a user.
    f"/machine.slice/libpod-{ID}.scope": f"podman:{SHORT}",
    f"/machine.slice/libpod-{ID}.scope/container": f"podman:{SHORT}",
    f"/machine.slice/machine-libpod_pod_{OTHER}.slice/libpod-{ID}.scope": f"podman:{SHORT}",
    f"/user.slice/user-1000.slice/user@1000.service/user.slice/libpod-{ID}.scope/container": f"podman:{SHORT}",
    f"/libpod_parent/libpod-{ID}": f"podman:{SHORT}",
    f"/libpod_parent/{ID}": f"podman:{SHORT}",
    f"/QM.slice/qm.service/libpod-payload-{ID}/system.slice/dbus-broker.service": f"podman:{SHORT}",
    f"/user.slice/user-1001.slice/user@1001.service/app.slice/web.service/libpod-payload-{ID}": f"podman:{SHORT}",
    # Kubernetes: the kubelet's cgroupfs driver by class of service; systemd's, with each runtime; static pods; kind.
    f"/kubepods/besteffort/pod{UID}/{ID}": f"kubernetes:{UID}/{SHORT}",
    f"/kubepods/burstable/pod{UID}/{ID}": f"kubernetes:{UID}/{SHORT}",
    f"/kubepods/pod{UID}/{ID}": f"kubernetes:{UID}/{SHORT}",
    f"/kubepods/burstable/pod{UID}/crio-{ID}": f"kubernetes:{UID}/{SHORT}",
    f"/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod{SLICE_UID}.slice/cri-containerd-{ID}.scope": (
        f"kubernetes:{UID}/{SHORT}"
    ),
    f"/kubepods.slice/kubepods-pod{SLICE_UID}.slice/crio-{ID}.scope/container": f"kubernetes:{UID}/{SHORT}",
    f"/kubepods.slice/kubepods-besteffort.slice/kubepods-besteffort-pod{SLICE_UID}.slice/docker-{ID}.scope": (
        f"kubernetes:{UID}/{SHORT}"
    ),
    f"/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod{STATIC_UID}.slice/crio-{ID}.scope": (
        f"kubernetes:{STATIC_UID}/{SHORT}"
    ),
    f"/system.slice/containerd.service/kubepods-pod{SLICE_UID}.slice:cri-containerd:{ID}": f"kubernetes:{UID}/{SHORT}",
    f"/kubelet.slice/kubelet-kubepods.slice/kubelet-kubepods-pod{SLICE_UID}.slice/cri-containerd-{ID}.scope": (
        f"kubernetes:{UID}/{SHORT}"
    ),
    # The outermost is the host's: kind's node is a container of Docker's, and its pods are that one's own affair.
    f"/docker/{ID}/kubelet/kubepods/besteffort/pod{UID}/{OTHER}": f"docker:{SHORT}",
    # containerd by itself: nerdctl with systemd, ctr with any name.
    f"/system.slice/nerdctl-{ID}.scope": f"containerd:{SHORT}",
    f"/default/{ID}": f"containerd:{SHORT}",
    "/default/my-redis": "containerd:my-redis",
    f"/garden/{UID}": f"garden:{UID}",
    # LXC 4 and newer, LXD, Incus (a project's), Waydroid; LXC 3; before, and Proxmox; a user's own.
    "/lxc.payload.web": "lxc:web",
    "/lxc.payload.web/init.scope": "lxc:web",
    "/lxc.payload.project_web/system.slice/cron.service": "lxc:project_web",
    "/lxc.payload/web": "lxc:web",
    "/lxc/101/ns/system.slice/ssh.service": "lxc:101",
    "/user.slice/user-1000.slice/session-3.scope/lxc.payload.web": "lxc:web",
    # systemd-nspawn: by hand and as a service, in systemd's escaping; libvirt's LXC.
    "/machine.slice/machine-deb.scope/payload": "nspawn:deb",
    "/machine.slice/machine-deb\\x2dtest.scope/payload/init.scope": "nspawn:deb-test",
    "/machine.slice/systemd-nspawn@deb\\x2dtest.service/payload/system.slice/cron.service": "nspawn:deb-test",
    "/machine.slice/machine-lxc\\x2d4213\\x2dweb.scope": "libvirt:web",
}

HOSTS_OWN = [
    "",
    "/",
    "/init.scope",
    "/system.slice/ssh.service",
    "/system.slice/docker.service",
    "/system.slice/containerd.service",
    "/docker",
    "/lxc",
    "/kubepods",
    f"/kubepods/pod{UID}",
    "/default",
    "/user.slice/user-1000.slice/session-2.scope",
    "/user.slice/user-1000.slice/user@1000.service/app.slice/app-org.gnome.Terminal.slice/vte-spawn.scope",
    # What holds a container's terminal, or watches it, is the host's; so is a virtual machine.
    f"/machine.slice/libpod-conmon-{ID}.scope",
    f"/system.slice/crio-conmon-{ID}.scope",
    "/lxc.monitor.web",
    "/machine.slice/machine-deb.scope/supervisor",
    "/machine.slice/systemd-nspawn@deb.service/supervisor",
    "/machine.slice/machine-qemu\\x2d1\\x2dweb.scope/libvirt/emulator",
    # Nearly ids.
    f"/system.slice/docker-{ID[1:]}.scope",
    f"/docker/{ID.upper()}",
    f"/docker/{ID}0",
]


@pytest.mark.parametrize(("path", "name"), CONTAINERS.items())
def test_path_of_an_engine(path: str, name: str) -> None:
    assert describe(path) == name
    assert describe(path.encode()) == name


@pytest.mark.parametrize("path", HOSTS_OWN)
def test_path_of_the_host(path: str) -> None:
    assert describe(path) is None


def test_ids_are_whole() -> None:
    """What looks a container up needs all of its id."""
    found = find(f"/kubepods/pod{UID}/{ID}")
    assert found is not None
    assert (found.engine, found.id, found.pod, found.has_id) == ("kubernetes", ID, UID, True)


def test_a_path_seen_from_a_cgroup_namespace() -> None:
    assert describe(f"/../../docker/{ID}") == f"docker:{SHORT}"


def test_a_container_cannot_hide_behind_another_name() -> None:
    """What it makes below its own cgroup does not count."""
    assert describe(f"/system.slice/docker-{ID}.scope/docker/{OTHER}") == f"docker:{SHORT}"
    assert describe(f"/lxc.payload.evil/lxc.payload.good/machine.slice/libpod-{ID}.scope") == "lxc:evil"


# From what engines write, so that more than the first component is met.
PIECES = st.sampled_from(
    [
        "docker",
        "lxc",
        "lxc.payload.",
        "lxc.payload",
        "kubepods",
        f"pod{UID}",
        f"kubepods-pod{SLICE_UID}.slice",
        "machine.slice",
        "machine-",
        ".scope",
        "\\x2d",
        "\\x",
        "\\xff",
        "\\x1b[2J",
        "systemd-nspawn@",
        ".service",
        "supervisor",
        "default",
        "garden",
        "buildkit",
        "libpod-",
        ":",
        ID,
        "/",
        "..",
        "\x1b[2J",
        "\r\n",
        "\udc80",
        "x" * 300,
    ]
)


@given(st.lists(PIECES | st.text(max_size=8), max_size=24).map("".join))
def test_any_text_gives_a_name_that_can_be_shown(path: str) -> None:
    found = describe(path)
    assert found is None or (found.isprintable() and 0 < len(found) <= MAX_NAME)


@given(st.binary(max_size=200))
def test_any_bytes_give_a_name_that_can_be_shown(path: bytes) -> None:
    for text in (path, b"/lxc.payload." + path, b"/machine.slice/machine-" + path + b".scope"):
        found = describe(text)
        assert found is None or (found.isprintable() and 0 < len(found) <= MAX_NAME)


@pytest.mark.parametrize(
    ("escaped", "plain"),
    [
        ("plain", "plain"),
        ("a\\x2db", "a-b"),
        ("\\xc3\\xa4", "ä"),
        ("\\xc3", "\\xc3"),
        ("a\\x2", "a\\x2"),
        ("\\xzz", "\\xzz"),
        ("\\x", "\\x"),
    ],
)
def test_systemd_escaping(escaped: str, plain: str) -> None:
    assert unescaped(escaped) == plain


# Names.


def _write(path: Path, value: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value), encoding="utf-8")


CRI = {
    "io.kubernetes.cri.container-name": "nginx",
    "io.kubernetes.cri.sandbox-name": "nginx-768c6f9745-mn4bb",
    "io.kubernetes.cri.sandbox-namespace": "default",
}
KUBELET = {
    "io.kubernetes.container.name": "nginx",
    "io.kubernetes.pod.name": "nginx-768c6f9745-mn4bb",
    "io.kubernetes.pod.namespace": "default",
}
STORAGE = "var/lib/containers/storage"


@pytest.mark.parametrize(
    ("cgroup", "file", "content", "name"),
    [
        (f"/docker/{ID}", f"var/lib/docker/containers/{ID}/config.v2.json", {"Name": "/web"}, "docker:web"),
        (f"/ecs/0/{ID}", f"var/lib/docker/containers/{ID}/config.v2.json", {"Name": "/web"}, "container:web"),
        (
            f"/machine.slice/libpod-{ID}.scope",
            f"{STORAGE}/overlay-containers/containers.json",
            [{"id": OTHER, "names": ["other"]}, {"id": ID, "names": ["web"]}],
            "podman:web",
        ),
        (
            f"/default/{ID}",
            f"run/containerd/io.containerd.runtime.v2.task/default/{ID}/config.json",
            {"annotations": {"nerdctl/name": "web"}},
            "containerd:web",
        ),
        (
            f"/kubepods/pod{UID}/{ID}",
            f"run/containerd/io.containerd.runtime.v2.task/k8s.io/{ID}/config.json",
            {"annotations": CRI},
            "kubernetes:default/nginx-768c6f9745-mn4bb/nginx",
        ),
        (
            f"/kubepods/pod{UID}/{ID}",
            f"run/k3s/containerd/io.containerd.runtime.v2.task/k8s.io/{ID}/config.json",
            {"annotations": {key: CRI[key] for key in list(CRI)[1:]}},
            "kubernetes:default/nginx-768c6f9745-mn4bb",
        ),
        (
            f"/kubepods/pod{UID}/crio-{ID}",
            f"run/containers/storage/overlay-containers/{ID}/userdata/config.json",
            {"annotations": KUBELET},
            "kubernetes:default/nginx-768c6f9745-mn4bb/nginx",
        ),
        (
            f"/kubepods.slice/kubepods-pod{SLICE_UID}.slice/docker-{ID}.scope",
            f"var/lib/docker/containers/{ID}/config.v2.json",
            {"Name": "/k8s_nginx", "Config": {"Labels": KUBELET}},
            "kubernetes:default/nginx-768c6f9745-mn4bb/nginx",
        ),
    ],
)
def test_name_by_id(cgroup: str, file: str, content: object, name: str, tmp_path: Path) -> None:
    _write(tmp_path / file, content)
    container = find(cgroup)
    assert container is not None
    assert Names(str(tmp_path)).of(container) == name


def test_no_name_without_a_file(tmp_path: Path) -> None:
    for path in CONTAINERS:
        container = find(path)
        assert container is not None
        assert Names(str(tmp_path)).of(container) is None


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "1", '{"Name": 1}', '{"Name": ""}', "[" * 100_000, '{"Config": []}', '{"Config": {"Labels": 1}}'],
    ids=["empty", "cut", "list", "number", "type", "nothing", "nested", "config", "labels"],
)
@pytest.mark.parametrize("cgroup", [f"/docker/{ID}", f"/kubepods/pod{UID}/{ID}"])
def test_a_file_that_tells_no_name(cgroup: str, text: str, tmp_path: Path) -> None:
    path = tmp_path / f"var/lib/docker/containers/{ID}/config.v2.json"
    path.parent.mkdir(parents=True)
    path.write_text(text)
    container = find(cgroup)
    assert container is not None
    assert Names(str(tmp_path)).of(container) is None


def test_a_name_can_be_shown(tmp_path: Path) -> None:
    _write(tmp_path / f"var/lib/docker/containers/{ID}/config.v2.json", {"Name": "/we\x1b[2Jb" + "x" * 500})
    container = find(f"/docker/{ID}")
    assert container is not None
    name = Names(str(tmp_path)).of(container)
    assert name is not None
    assert name.startswith("docker:we\\x1b[2Jb")
    assert len(name) == MAX_NAME


@pytest.mark.kernel
@pytest.mark.skipif(PodmanContainer.why_unavailable() is not None, reason="needs root and podman")
def test_podman(tmp_path: Path) -> None:
    """The real one, with a state of its own."""
    with PodmanContainer() as real:
        state = real._podman[real._podman.index("--root") + 1]
        (tmp_path / "var/lib/containers").mkdir(parents=True)
        (tmp_path / STORAGE).symlink_to(state)
        found = find(cgroup_path(Path(f"/proc/{real.init_pid}/cgroup").read_bytes()))
        assert found is not None
        assert found.engine == "podman"
        assert Names(str(tmp_path)).of(found) == f"podman:{real.name}"
