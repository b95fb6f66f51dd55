"""What the kernel warned of, bounded: a record for each quota, kind and hour with a count, and counts of all.

The kernel warns each time a limit is crossed. A container that makes and removes a file at its limit is worth one line,
and one that has many ids is not to drive out what is known of the others.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

# One record for the same within so long, which counts.
RECORD_SECONDS = 3600.0
MAX_RECORDS = 2000
# So many ids of one owner get records of their own within RECORD_SECONDS. The others share one: `id` is OTHERS.
MAX_IDS = 100
OTHERS = -1


@dataclass(slots=True)
class QuotaWarning:
    """One record. Numbers are the host's. What cannot be known is empty.

    at, last: seconds since the epoch, the first and the last of `count`. below: when the limit was last no longer
    reached, 0 while it is. kind, type: words, see
    `forwarder/quota/events.py`. id: whose quota, OTHERS for those past MAX_IDS. device: "MAJOR:MINOR". caused_by: the
    uid of the process that got there. mount: where the device is on the host. name: the user, group or project as the
    host calls it. containers: each that it may be of. key: whose allowance of records it counts on.
    """

    at: float
    last: float
    count: int
    kind: str
    type: str
    id: int
    device: str
    caused_by: int
    below: float = 0.0
    mount: str = ""
    name: str = ""
    containers: list[str] = field(default_factory=list)
    key: str = ""

    @property
    def quota(self) -> tuple[str, str, int, str, str]:
        """What counts on the same record."""
        return self.kind, self.type, self.id, self.device, self.key if self.id == OTHERS else ""


@dataclass(slots=True)
class Tally:
    """What the book says of quotas.

    records: the oldest first. counts: all warnings ever, by kind. lost: more came than could be taken in. forgotten:
    records that were dropped.
    """

    records: dict[tuple[object, ...], QuotaWarning] = field(default_factory=dict)
    counts: Counter[str] = field(default_factory=Counter)
    lost: int = 0
    forgotten: int = 0


def enter(tally: Tally, warning: QuotaWarning) -> None:
    """Enter a record as it is now, in the place of what was said of it before."""
    tally.records[warning.quota, warning.at] = warning
    if len(tally.records) > MAX_RECORDS:
        # Whoever has the most gives the oldest of his.
        ((most, _),) = Counter(one.key for one in tally.records.values()).most_common(1)
        del tally.records[next(name for name, one in tally.records.items() if one.key == most)]
        tally.forgotten += 1
