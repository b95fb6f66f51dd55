"""Words of the command line become values, as the settings' words do."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from receiver.tables import shown

if TYPE_CHECKING:
    from collections.abc import Callable


def parsed(parse: Callable[[str], Any]) -> Callable[[str], Any]:
    """Make a setting's parser one for arguments."""

    def parse_argument(text: str) -> Any:
        try:
            return parse(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(f"{shown(text)!r} {error}") from None

    return parse_argument
