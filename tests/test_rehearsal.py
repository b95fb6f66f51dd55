"""The rehearsal: goes the way of a crash, leaves nothing behind, and is not in anybody's way."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

from receiver import rehearsal
from receiver.capture import Capture
from receiver.config import Config
from tests.support import elf

if TYPE_CHECKING:
    from receiver.record import Core


@pytest.mark.parametrize("compression", ["zstd", "none"])
def test_it_goes_all_the_way_and_leaves_nothing(monkeypatch: pytest.MonkeyPatch, compression: str) -> None:
    states: list[Core] = []
    real = Capture.run

    def run(capture: Capture) -> Core:
        states.append(real(capture))
        assert capture.witness is not None
        assert capture.witness.frames()
        return states[-1]

    monkeypatch.setattr(Capture, "run", run)
    before = os.listdir("/proc/self/fd")
    rehearsal.rehearse(Config(compression=compression))
    assert os.listdir("/proc/self/fd") == before
    assert [core.state for core in states] == ["stored"] * rehearsal.ROUNDS


def test_its_core_is_one() -> None:
    core = rehearsal._core()
    notes, loads = elf.read(core)
    assert notes
    assert len(loads) == 6
    # It has to fit into a pipe whose reader comes later.
    assert len(core) < 65536
