"""`make screenshot`: docs/report.png, the report of a store whose crashes are made up (tests/support/made_up.py)."""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path

from receiver import report
from receiver.config import Config, Limit
from receiver.ctl import times
from receiver.retention import limits_of
from receiver.statistics import Event
from receiver.store import Store
from tests.support import browser, made_up
from tests.support.mounts import CHECKOUT

PICTURE = Path(CHECKOUT, "docs/report.png")
# To the end of the second bug.
WIDTH, HEIGHT = 1200, 1432


def page(directory: str, now: float) -> str:
    """Return the report's HTML. directory: for the store."""
    made_up.fill(directory, now)
    config = Config(store_max=Limit(size=2 << 30), user_max=Limit(percent=60), keep_free=None, cores_max=250)
    store = Store(directory, limits=limits_of(config))
    events = [Event(times.of(record), record) for _, record in store.records() if record is not None]
    lost = report.Lost([], 0, watched=True)
    text = report.page(events, now=now, host="web-01", storage=store.usage(), lost=lost)
    store.close()
    return text


def main() -> int:
    """Make the picture."""
    missing = browser.why_unavailable()
    if missing is not None:
        print(missing, file=sys.stderr)
        return 1
    with tempfile.TemporaryDirectory() as directory:
        html = Path(directory, "report.html")
        # A fixed moment would be a picture that is the same each time, but for the browser's version.
        html.write_text(page(f"{directory}/store", time.mktime((2026, 11, 23, 17, 20, 0, 0, 0, -1))), encoding="utf-8")
        said = browser.picture(html, PICTURE, width=WIDTH, height=HEIGHT)
    print(*said, f"{PICTURE}: {PICTURE.stat().st_size} bytes", sep="\n")
    return 1 if said else 0


if __name__ == "__main__":
    sys.exit(main())
