"""Which container a cgroup belongs to: engines name the cgroups that they make, each in its own way.

The name is for people's eyes. Nothing is decided by it: whoever may make cgroups (a user, below his own service) may
call them like an engine's. Of several on one path the outermost counts, which is the one that this host made: what
stands below a container's own cgroup is the container's to choose (a Kubernetes node in Docker, a systemd in LXC).

The paths are those that runc, crun, systemd, the kubelet and LXC make, with each of their cgroup drivers:
tests/test_engine.py has the table.
"""

from __future__ import annotations

from receiver.tables import shown

# docker, podman, crictl and nerdctl show and take so much of an id.
SHORT = 12
# The ids that Docker, Podman, containerd's CRI and CRI-O give: 32 random bytes.
ID_LENGTH = 64
# A name of ours: in a table's column and in a metric's label.
MAX_NAME = 120
# A cgroup path of a container's own making: PATH_MAX, and no component is longer than NAME_MAX.
MAX_PATH = 4096

_HEX = frozenset("0123456789abcdef")
# By what stands before an id: a prefix, or a folder (of containerd's namespaces: its own, Kubernetes', Docker's).
_RUNTIMES = {
    "docker": "docker",
    "libpod": "podman",
    "libpod-payload": "podman",
    "cri-containerd": "containerd",
    "nerdctl": "containerd",
    "crio": "cri-o",
    "libpod_parent": "podman",
    "default": "containerd",
    "k8s.io": "containerd",
    "moby": "docker",
}
# Where an engine puts nothing but containers, whatever their ids look like.
_FOLDERS = {("default",): "containerd", ("garden",): "garden", ("docker", "buildkit"): "buildkit"}


class Container:
    """A container by its cgroup.

    engine: docker, podman, containerd, cri-o, kubernetes (whichever runtime it uses), buildkit, lxc (LXD and Incus
    too), libvirt (its LXC driver), nspawn, garden; "container" for one whose cgroup only has the usual kind of id.
    id: whole, as the engine made it, or the name where its cgroups have that. pod: the pod's uid in Kubernetes.
    """

    __slots__ = ("engine", "id", "pod")

    def __init__(self, engine: str, id: str, pod: str | None = None) -> None:  # noqa: A002 - as everybody calls it
        self.engine = engine
        self.id = id
        self.pod = pod

    @property
    def has_id(self) -> bool:
        """Whether its engine gave it an id, and not only a name."""
        return _is_id(self.id)

    def __str__(self) -> str:
        """Return `engine:name`: an id as short as engines show it, in Kubernetes `POD-UID/ID`."""
        name = self.id[:SHORT] if self.has_id else self.id
        return printable(f"{self.engine}:{self.pod}/{name}" if self.pod else f"{self.engine}:{name}")


def describe(cgroup_path: str | bytes) -> str | None:
    """Return `engine:name` of the container that a cgroup belongs to; None for the host's own. Reads nothing.

    cgroup_path: as the host sees it, `receiver/cgroup.py`.
    """
    container = find(cgroup_path)
    return None if container is None else str(container)


def find(cgroup_path: str | bytes) -> Container | None:
    """Return the container that a cgroup belongs to; None for the host's own."""
    path = cgroup_path.decode(errors="backslashreplace") if isinstance(cgroup_path, bytes) else cgroup_path
    parts = [part for part in path[:MAX_PATH].split("/") if part not in ("", ".", "..")]
    pod = None
    for place, part in enumerate(parts):
        pod = _pod(part) or pod
        found = _at(parts, place)
        if found is not None:
            if pod is None:
                return found
            return Container("kubernetes", found.id, pod)
    return None


def printable(text: str) -> str:
    """Return a name that fits a column and moves no cursor."""
    text = shown(text)
    return text if len(text) <= MAX_NAME else text[: MAX_NAME - 3] + "..."


def _at(parts: list[str], place: int) -> Container | None:
    """Return the container whose own cgroup is this component of a path."""
    part = parts[place]
    before = parts[place - 1] if place else ""
    after = parts[place + 1] if place + 1 < len(parts) else ""
    return _of_id(part, before) or _of_lxc(part, before) or _of_machine(part, before, after) or _of_folder(part, parts)


def _of_id(part: str, before: str) -> Container | None:
    """`docker-ID.scope` and its like with systemd's driver, `ID` with cgroupfs."""
    # A runtime without systemd's driver that is given its notation makes a folder of it: SLICE:PREFIX:ID.
    words = part.split(":")
    prefix, number = (words[-2], words[-1]) if len(words) == 3 else ("", part)
    if not prefix:
        prefix, _, number = part.removesuffix(".scope").rpartition("-")
    if not _is_id(number):
        return None
    if prefix.endswith("conmon"):
        # The process of the host's that holds a container's terminal.
        return None
    if not prefix:
        prefix = before
    # Amazon's agent and others only choose the folder (--cgroup-parent), and tell nobody whose it is.
    return Container(_RUNTIMES.get(prefix, "container"), number)


def _of_lxc(part: str, before: str) -> Container | None:
    """`lxc.payload.NAME` since LXC 4; `lxc.payload/NAME` in 3.x; `lxc/NAME` before that, and in Proxmox."""
    # lxc.monitor.NAME is the host's process that watches it.
    name = part.removeprefix("lxc.payload.")
    if name != part or before in ("lxc", "lxc.payload"):
        return Container("lxc", name) if name else None
    return None


def _of_machine(part: str, before: str, after: str) -> Container | None:
    """`machine-NAME.scope` and `systemd-nspawn@NAME.service`, in systemd's escaping."""
    # nspawn's own process is the host's.
    if after == "supervisor":
        return None
    if part.startswith("systemd-nspawn@") and part.endswith(".service"):
        return Container("nspawn", unescaped(part[15:-8]))
    if not (part.startswith("machine-") and part.endswith(".scope") and before == "machine.slice"):
        return None
    name = unescaped(part[8:-6])
    driver, _, rest = name.partition("-")
    if driver in ("qemu", "vmspawn", "ch"):
        # A virtual machine: what crashes there in sight of this kernel is the host's emulator.
        return None
    if driver == "lxc" and rest.partition("-")[0].isdigit():
        return Container("libvirt", rest.partition("-")[2])
    return Container("nspawn", name) if name else None


def _of_folder(part: str, parts: list[str]) -> Container | None:
    """`/default/NAME` of containerd without Kubernetes (ctr: any name), and others that have ids of their own."""
    for folder, name in _FOLDERS.items():
        if parts[: len(folder) + 1] == [*folder, part]:
            return Container(name, part)
    return None


def _pod(part: str) -> str | None:
    """Return the uid in a pod's cgroup: `podUID` with cgroupfs, `kubepods-...-podUID.slice` with systemd."""
    name = part.partition(":")[0]
    uid = name
    if name.endswith(".slice"):
        start, mark, uid = name.removesuffix(".slice").rpartition("-pod")
        if not mark or "kubepods" not in start:
            return None
    elif name.startswith("pod"):
        uid = name.removeprefix("pod")
    else:
        return None
    # systemd's dash is a slice below a slice. A static pod's uid is a hash, without any.
    uid = uid.replace("_", "-")
    plain = uid.replace("-", "")
    return uid if len(plain) == 32 and _HEX.issuperset(plain) else None


def _is_id(text: str) -> bool:
    return len(text) == ID_LENGTH and _HEX.issuperset(text)


def unescaped(name: str) -> str:
    r"""Return a name of systemd's without its `\xNN` (systemd-escape(1))."""
    if "\\x" not in name:
        return name
    first, *rest = name.split("\\x")
    raw = first.encode(errors="surrogatepass")
    for piece in rest:
        number = piece[:2].lower()
        if len(number) == 2 and _HEX.issuperset(number):
            raw += bytes((int(number, 16),)) + piece[2:].encode(errors="surrogatepass")
        else:
            raw += b"\\x" + piece.encode(errors="surrogatepass")
    return raw.decode(errors="backslashreplace")
