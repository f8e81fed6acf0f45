"""Costs of a harvest: from a real guest that writes as many pages as it was told, by both methods."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pyvmm.cli import main
from pyvmm.errors import HostError
from pyvmm.kvm.vm import Vm
from pyvmm.machine.dirty_cost import measure_harvest
from pyvmm.machine.dirty_tracker import DirtyTracker
from pyvmm.machine.machine import Machine

pytestmark = [pytest.mark.kvm, pytest.mark.timeout(120)]

DIRTIER = Path(__file__).parents[2] / "guests" / "dirtier" / "dirtier.elf"
MEMORY = 64 << 20


def test_each_share_is_found_by_both_methods(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "dirty", "-m", "64M", "--dirty", "0,1,50", "--rounds", "3", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["version"] == 1 and report["memory"] == MEMORY
    rows = {(row["method"], row["percent"]): row for row in report["rows"]}
    assert set(rows) == {(method, share) for method in ("bitmap", "ring") for share in (0, 1, 50)}
    for (method, share), row in rows.items():
        if method == "ring" and row["problem"]:  # a host without rings, or one that overfills them, says so
            assert "ring" in row["problem"]
            continue
        written = int(MEMORY // 4096 * share / 100)
        assert written <= row["pages"] <= written + 64 and row["rounds"] == 3
        assert row["us"] > 0 and row["us_per_gib"] == pytest.approx(row["us"] * 16)
        assert (row["ns_per_page"] is None) == (row["pages"] == 0)


def test_the_reference_takes_turns_and_must_find_the_same() -> None:
    turns = []

    def other(machine: Machine) -> int:
        turns.append(sum(page_set.count for page_set in machine.dirty.harvest()))
        return turns[-1]

    cost = measure_harvest(DIRTIER, "bitmap", MEMORY, 1, 3, other)
    assert len(turns) == 4 and cost.pages == turns[1:] and len(cost.against) == len(cost.seconds) == 3
    with pytest.raises(HostError, match="by the reference"):
        measure_harvest(DIRTIER, "bitmap", MEMORY, 1, 3, lambda machine: other(machine) + 100)


def test_a_host_without_rings_is_told(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    has = Vm.check_extension
    monkeypatch.setenv("COLUMNS", "200")  # a narrow table breaks the sentence
    monkeypatch.setattr(Vm, "check_extension", lambda vm, name: 0 if "DIRTY_LOG_RING" in name else has(vm, name))
    options = ["bench", "dirty", "-m", "64M", "--dirty", "1", "--rounds", "1"]
    assert main([*options, "--method", "ring"]) == 125
    assert "nothing was measured: this host's KVM has no dirty rings" in capsys.readouterr().err
    assert main(options) == 0
    assert "no dirty rings" in " ".join(capsys.readouterr().out.split())


def test_a_ring_that_lost_pages_is_a_row_that_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    reap, calls = DirtyTracker.reap, []

    def lose(tracker: DirtyTracker) -> None:
        reap(tracker)
        calls.append(1)
        tracker._overran |= len(calls) > 2

    monkeypatch.setattr(DirtyTracker, "reap", lose)
    cost = measure_harvest(DIRTIER, "ring", MEMORY, 1, 5)
    assert cost.problem is not None and "ring" in cost.problem and len(cost.seconds) < 5
