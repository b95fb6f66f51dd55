"""Secrets are left out of what is recorded: values whose name says that they are secret, and passwords within URLs.

Too much is masked rather than too little. What has no name and no form stays: `mysql -pSECRET`, a password that is
typed as a plain word.
"""

from __future__ import annotations

import re

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

MASK = "(masked)"

# NAME=value, "NAME": value, Name: value, --name value. Each run of letters is looked at once: time is linear.
_NAMED = re.compile(r"""(?<![\w.-])([\w.-]++)(?:["']?\s*+[=:]|\s)""")
_WORD = re.compile(r"\S+")
# In a unit's log a name before a colon is often no name: "KeyError: 'colour'".
_NO_NAMES = ("Error", "Exception")


def arguments(words: Iterable[str], secret: re.Pattern[str]) -> list[str]:
    """Return a command line without what its options call secret. secret: is searched for in names."""
    found = []
    is_value = False
    for word in words:
        if is_value:
            found.append(MASK)
            is_value = False
        elif word.startswith("-") and not _NAMED.search(word):
            found.append(word if "://" not in word else _urls(word))
            # --password VALUE, whatever VALUE looks like: getopt(3) takes it as it is.
            is_value = secret.search(word) is not None
        else:
            found.append(text(word, secret))
    return found


def text(line: str, secret: re.Pattern[str]) -> str:
    """Return a text without what follows the first secret name in it, and without passwords of URLs."""
    if "=" not in line and ":" not in line and len(line.split(None, 1)) < 2:
        # Most values of an environment, and the process waits.
        return line
    for match in _NAMED.finditer(line):
        name = match[1]
        if match[0][-1] not in "=:" and not name.startswith("-"):
            continue
        if secret.search(name) and not name.endswith(_NO_NAMES):
            # All that follows: where a quoted value ends is a question for a shell.
            line = line[: match.end()] + MASK
            break
    return _urls(line) if "://" in line else line


def _urls(line: str) -> str:
    return _WORD.sub(lambda match: _url(match[0]), line)


def _url(word: str) -> str:
    """scheme://user:password@host: from the first colon to the last at sign, as a password may have either."""
    scheme = word.find("://")
    end = word.rfind("@")
    colon = word.find(":", scheme + 3, end) if 0 <= scheme < end else -1
    return word if colon < 0 else f"{word[: colon + 1]}{MASK}{word[end:]}"
