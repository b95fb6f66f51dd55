"""HTML and SVG, made of elements: what is text is escaped, and nothing can be forgotten.

What a crashed program called itself comes here. `tag` takes a plain str for text, and only its own results for markup.
"""

from __future__ import annotations

import html

from receiver.tables import shown

# HTML's elements without an end tag. (SVG's have one.)
_VOID = frozenset(("meta", "br"))


class Markup(str):
    """Text that is markup already: made here, and nowhere else."""

    __slots__ = ()


def text(value: object) -> Markup:
    """Return a value as text: no markup, and no control characters, which HTML has no way to write."""
    return Markup(html.escape("\n".join(shown(line) for line in str(value).split("\n"))))


def tag(_name: str, *children: object, **attributes: object) -> Markup:
    """Return an element. children: markup, or anything else as text; None is left out.

    attributes: `class_` is class and `view_box` viewBox, other `_` are `-`. None leaves one out, True has no value.
    """
    words = [_name]
    for name, value in attributes.items():
        written = {"class_": "class", "view_box": "viewBox", "preserve": "preserveAspectRatio"}.get(name)
        written = written or name.replace("_", "-")
        if value is True:
            words.append(written)
        elif value is not None:
            words.append(f'{written}="{text(_short(value))}"')
    start = f"<{' '.join(words)}>"
    if _name in _VOID:
        return Markup(start)
    return Markup(f"{start}{joined(*children)}</{_name}>")


def joined(*children: object) -> Markup:
    """Return markup and texts in their order."""
    return Markup(
        "".join(child if isinstance(child, Markup) else text(child) for child in children if child is not None)
    )


def _short(value: object) -> object:
    return f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else value
