"""What a wheel has besides the packages: the manual's pages, made from docs/man, and the shells' completions.

They land below the prefix that the package is installed into, in share/, where man(1) and the shells look when that is
/usr or /usr/local. A virtual environment's are copied there by hand (README.md).
"""

from __future__ import annotations

import importlib.util
import shutil
import tempfile
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

# bash and fish look for a file by the program's name, zsh reads the names in its first line.
PROGRAMS = ("corepipectl", "core-pipe-receiver", "core-pipe-forwarder")
PLACES = {
    **{f"share/bash-completion/completions/{program}": "core_pipe.bash" for program in PROGRAMS},
    **{f"share/fish/vendor_completions.d/{program}.fish": "core_pipe.fish" for program in PROGRAMS},
    "share/zsh/site-functions/_core_pipe": "core_pipe.zsh",
}


class CustomBuildHook(BuildHookInterface):  # type: ignore[type-arg]
    _made: Path | None = None

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        # An editable installation is for those who have the sources to read.
        if self.target_name != "wheel" or version == "editable":
            return
        root = Path(self.root)
        # Not in the source tree: who installs from it may have it read-only, and it stays clean.
        self._made = Path(tempfile.mkdtemp(prefix="core_pipe-build-"))
        spec = importlib.util.spec_from_file_location("render", root / "docs/man/render.py")
        assert spec is not None  # noqa: S101 - for the type checker
        assert spec.loader is not None  # noqa: S101
        render = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(render)
        shared = {str(made): place for made, place in render.render(self._made).items()}
        for place, source in PLACES.items():
            copy = self._made / place
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(root / "completions" / source, copy)
            shared[str(copy)] = place
        build_data["shared_data"].update(shared)

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:  # noqa: ARG002
        if self._made is not None:
            shutil.rmtree(self._made)
