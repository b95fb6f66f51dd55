"""Why there is no core, or not the whole of one: a record's sentence as one of a few words, to be counted by.

The sentence is for people, and has numbers and names in it. The word is told by how it begins, or by the setting that
it names: records of older versions, and of other containers, are counted as well. A test holds this table against every
sentence that the code can write.
"""

from __future__ import annotations

TYPE_CHECKING = False  # typing's own costs 10 ms, and this is imported at each crash
if TYPE_CHECKING:
    from receiver.record import Core

# What each word means, and what to do about it.
REASONS: dict[str, str] = {
    "ulimit": "The process's own soft core limit (ulimit -c) allows no core, or no whole one. Raise it where the "
    "program is started.",
    "keep": "The settings keep only a part of such cores (keep, keep_for).",
    "limit": "A limit of the store has no room for it (core_max, store_max, user_max, cores_max, keep_free). "
    "'corepipectl usage' shows which one is used up.",
    "full": "The file system, its quota or the memory was full.",
    "same": "The same crash has left enough cores lately (same_max). Those are kept: look at one of them.",
    "loop": "The program crashes in a loop (loop_max). Its first cores are kept: look at one of them.",
    "share": "Its container had as many dumps under way as it may. See core-pipe-forwarder(8).",
    "no_receiver": "No receiver took it: none was installed in its container, or it refused. The record says who was "
    "asked.",
    "receiver": "The receiver failed, or was too slow, after it had accepted the core.",
    "identity": "The process was gone, or another one, before it could be looked at.",
    "cut": "The kernel ended the dump too early: the process was killed meanwhile, or no byte came any more.",
    "interrupted": "The receiver was ended while it wrote: by a reboot, or with its container.",
    "evicted": "It was stored, and had to make room for newer ones.",
    "pruned": "It was stored, and was removed on request.",
    "gone": "It was stored, and somebody removed its file.",
    "error": "Something else went wrong. The record says what.",
}
# What becomes of a core later: it has been counted as stored when it came.
LATER = ("evicted", "pruned", "gone")
# Of a core of which a part is stored, and of one that is not there at all.
OF_REDUCED = ("ulimit", "keep", "limit", "full", "cut", "error")
OF_NONE = tuple(word for word in REASONS if word not in (*LATER, "keep"))

_BEGINS = (
    ("no receiver took the core", "no_receiver"),
    ("the soft core limit", "ulimit"),
    ("the same crash", "same"),
    ("it crashes in a loop", "loop"),
    ("its container has", "share"),
    ("interrupted:", "interrupted"),
    ("evicted:", "evicted"),
    ("pruned:", "pruned"),
    ("its file is not in the store", "gone"),
    ("process ", "identity"),
    ("the process that connected", "identity"),
    ("thread ", "identity"),
)
# In this order: what was decided before the core came, then what came in between.
_HAS = (
    ("soft core limit", "ulimit"),
    ("keep = 'stacks'", "keep"),
    ("keep allows", "keep"),
    ("keep_for", "keep"),
    ("(keep)", "keep"),
    ("core_max", "limit"),
    ("store_max", "limit"),
    ("user_max", "limit"),
    ("cores_max", "limit"),
    ("keep_free", "limit"),
    ("a file may not be so large", "full"),
    ("(memory)", "full"),
    ("quota", "full"),
    ("is full", "full"),
    ("No space left on device", "full"),
    ("File too large", "full"),
    ("the kernel ended the dump", "cut"),
    ("no byte of the core came", "cut"),
    ("its receiver ", "receiver"),
)


def word_for(core: Core) -> str:
    """Return the word for why a core is not stored whole; "" for one that is."""
    if core.state == "stored":
        return ""
    reason = core.reason or ""
    if core.state != "reduced":
        for beginning, word in _BEGINS:
            if reason.startswith(beginning):
                return word
    for part, word in _HAS:
        if part in reason:
            return word
    return "error"
