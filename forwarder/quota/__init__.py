"""Quota warnings: the kernel says when somebody reaches a disk quota; whose it is, is found out and kept.

A container that has used up its disk fails in odd ways, and its cores are reduced or lost. Nobody in it needs to tell:

    events.py     the kernel's own word (generic netlink, VFS_DQUOT)
    owners.py     whose an id is: containers, users, projects
    tally.py      what was said, bounded: a record for each quota, kind and hour, and counts
    tell.py       hands what is new to callbacks
    watch.py      all of it together, as a part of the ledger's watcher, and in its book

Who reads along: `core-pipe-forwarder quota` (`forwarder/quota_command.py`), and the metrics (`forwarder/metrics.py`).
"""

from __future__ import annotations
