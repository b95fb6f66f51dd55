"""Turn the manual's pages (reStructuredText, beside this file) into roff, with docutils' manpage writer.

    python docs/man/render.py DIRECTORY     # DIRECTORY/man1/corepipectl.1 and so on; look at one with `man -l`

hatch_build.py calls `render` when a wheel is made. A page's name and section are its file's: corepipectl.1.rst. A first
line `.. aliases: NAME.SECTION ...` makes further names of the same page. What docutils would only warn of is an error.
"""

from __future__ import annotations

import re
import sys
import tomllib
from pathlib import Path

HERE = Path(__file__).resolve().parent


def version() -> str:
    """Return the version of the project that this file is part of."""
    project = tomllib.loads((HERE.parent.parent / "pyproject.toml").read_text(encoding="utf-8"))
    return str(project["project"]["version"])


def render(into: Path) -> dict[Path, str]:
    """Write all pages below a directory. Returns each file with its place below a prefix, share/man/man1/NAME.1.

    Raises docutils.utils.SystemMessage for a page that has a mistake.
    """
    from docutils.core import publish_string  # noqa: PLC0415 - a build requirement only

    found = {}
    for source in sorted(HERE.glob("*.[1-8].rst")):
        page = source.name.removesuffix(".rst")
        text = source.read_text(encoding="utf-8")
        roff = publish_string(
            text.replace("|version|", version()),
            source_path=str(source),
            writer="manpage",
            # No clock and no host in it: the same source makes the same page.
            settings_overrides={"halt_level": 2, "report_level": 2, "datestamp": None, "output_encoding": "unicode"},
        )
        # As every other manual page has it.
        text = re.sub(r"^\.SH Name$", ".SH NAME", str(roff), count=1, flags=re.MULTILINE)
        found[_write(into, page, text)] = place(page)
        first = source.read_text(encoding="utf-8").partition("\n")[0]
        for alias in re.findall(r"\S+\.[1-8]\b", first) if first.startswith(".. aliases:") else ():
            found[_write(into, alias, f".so man{page[-1]}/{page}\n")] = place(alias)
    return found


def place(page: str) -> str:
    """Return where a page is installed, below a prefix."""
    return f"share/man/man{page[-1]}/{page}"


def _write(into: Path, page: str, text: str) -> Path:
    at = into / f"man{page[-1]}" / page
    at.parent.mkdir(parents=True, exist_ok=True)
    at.write_text(text, encoding="utf-8")
    return at


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(f"usage: {sys.argv[0]} DIRECTORY")
    from docutils.utils import SystemMessage

    try:
        for written in render(Path(sys.argv[1])):
            print(written)
    except SystemMessage as error:
        sys.exit(str(error))
