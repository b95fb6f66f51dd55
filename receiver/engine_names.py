"""The names that people gave to containers, by the ids that their cgroups have: from the files of the engines.

For display, and for `-M NAME`. Files only, of root's own on the host: to ask an engine may start it, and may take
seconds. What belongs to a user (Podman's and Docker's rootless state) is not looked at; those keep their ids.
"""

from __future__ import annotations

import json
import os
import stat
from typing import Any

from receiver.engine import Container, printable

# Of a file of the engine's. That of a host with thousands of containers has some megabytes.
MAX_BYTES = 16 << 20

# With the drivers that keep it in a folder of their own.
_STORAGE = "var/lib/containers/storage"
_DRIVERS = ("overlay", "vfs", "btrfs", "zfs")
_DOCKER = "var/lib/docker/containers/{id}/config.v2.json"
# containerd's bundles, in its own place, k3s' and MicroK8s'.
_CONTAINERD = (
    "run/containerd/io.containerd.runtime.v2.task/{namespace}/{id}/config.json",
    "run/k3s/containerd/io.containerd.runtime.v2.task/{namespace}/{id}/config.json",
    "var/snap/microk8s/common/run/containerd/io.containerd.runtime.v2.task/{namespace}/{id}/config.json",
)
_CRIO = "run/containers/storage/{driver}-containers/{id}/userdata/config.json"
# Namespace, pod, container: as containerd's CRI, CRI-O and the kubelet (for Docker) annotate them.
_ANNOTATIONS = (
    ("io.kubernetes.cri.sandbox-namespace", "io.kubernetes.cri.sandbox-name", "io.kubernetes.cri.container-name"),
    ("io.kubernetes.pod.namespace", "io.kubernetes.pod.name", "io.kubernetes.container.name"),
)


class Names:
    """The names of the containers of a host. root: of its file system."""

    def __init__(self, root: str = "/") -> None:
        self._root = root
        self._podman: dict[str, str] | None = None

    def of(self, container: Container) -> str | None:
        """Return `engine:name`, in Kubernetes `kubernetes:NAMESPACE/POD/CONTAINER`; None when no file tells it."""
        if not container.has_id:
            return None
        try:
            name = self._kubernetes(container) if container.pod else self._name(container)
        except (ValueError, RecursionError):
            # One that is written just now, or a newer form.
            return None
        return None if name is None else printable(f"{container.engine}:{name}")

    def _name(self, container: Container) -> str | None:
        # An id alone does not say whose it is; that there is no such file costs nothing.
        every = container.engine == "container"
        name = None
        if every or container.engine == "docker":
            name = _text(self._read(_DOCKER.format(id=container.id)), "Name")
        if not name and (every or container.engine == "podman"):
            name = self._of_podman().get(container.id)
        if not name and (every or container.engine == "containerd"):
            name = _text(self._bundle(container.id, "default").get("annotations"), "nerdctl/name")
        return name.removeprefix("/") if name else None

    def _kubernetes(self, container: Container) -> str | None:
        found = [self._bundle(container.id, "k8s.io").get("annotations")]
        found += [_at(self._read(_CRIO.format(driver=driver, id=container.id)), "annotations") for driver in _DRIVERS]
        found.append(_at(_at(self._read(_DOCKER.format(id=container.id)), "Config"), "Labels"))
        for told in found:
            for keys in _ANNOTATIONS:
                words = [_text(told, key) for key in keys]
                if words[0] and words[1]:
                    # A pod's own container (pause) has no name.
                    return "/".join(word for word in words if word)
        return None

    def _bundle(self, number: str, namespace: str) -> dict[str, Any]:
        for path in _CONTAINERD:
            found = self._read(path.format(namespace=namespace, id=number))
            if isinstance(found, dict):
                return found
        return {}

    def _of_podman(self) -> dict[str, str]:
        """Return the names of all of root's Podman containers, by their ids."""
        if self._podman is None:
            self._podman = {}
            for driver in _DRIVERS:
                rows = self._read(f"{_STORAGE}/{driver}-containers/containers.json")
                for row in rows if isinstance(rows, list) else []:
                    number, names = _text(row, "id"), _at(row, "names")
                    if number and isinstance(names, list) and names and isinstance(names[0], str):
                        self._podman[number] = names[0]
        return self._podman

    def _read(self, path: str) -> Any:
        """Return the JSON of a file, None when there is none. Raises ValueError, RecursionError."""
        try:
            fd = os.open(os.path.join(self._root, path), os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOFOLLOW)
        except OSError:
            return None
        with os.fdopen(fd, "rb") as file:
            if not stat.S_ISREG(os.fstat(fd).st_mode):
                return None
            try:
                text = file.read(MAX_BYTES + 1)
            except OSError:
                return None
        return json.loads(text) if len(text) <= MAX_BYTES else None


def _at(value: Any, key: str) -> Any:
    return value.get(key) if isinstance(value, dict) else None


def _text(value: Any, key: str) -> str | None:
    found = _at(value, key)
    return found if isinstance(found, str) else None
