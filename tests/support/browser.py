"""A real browser, without a window: what it makes of a page, and a picture of it."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

# As root it has no sandbox; the pages are ours. No network, and nothing that it does by itself.
_OPTIONS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--no-first-run",
    "--hide-scrollbars",
    "--host-resolver-rules=MAP * ~NOTFOUND",
    "--enable-logging=stderr",
    "--force-color-profile=srgb",
)
_CONSOLE = re.compile(r"^.*\bCONSOLE[:(].*$", re.MULTILINE)


def why_unavailable() -> str | None:
    return None if shutil.which("chromium") else "needs a browser: apt-get install --no-install-recommends chromium"


def _run(page: Path, *options: str) -> tuple[str, list[str]]:
    """Open a page. Returns what the browser prints, and what the page's console says."""
    with tempfile.TemporaryDirectory() as profile:
        command = ["chromium", *_OPTIONS, f"--user-data-dir={profile}", *options, page.resolve().as_uri()]
        environment = {**os.environ, "HOME": profile}
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60, env=environment)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")
    return done.stdout, _CONSOLE.findall(done.stderr)


def dom(page: Path) -> tuple[str, list[str]]:
    """Return the page as the browser understood it, as HTML again, and the lines of its console."""
    return _run(page, "--dump-dom")


def picture(page: Path, png: Path, *, width: int, height: int, dark: bool = False) -> list[str]:
    """Write a picture of a page; returns the lines of its console."""
    scheme = ["--blink-settings=preferredColorScheme=0"] if dark else []
    return _run(page, f"--window-size={width},{height}", f"--screenshot={png.resolve()}", *scheme)[1]
