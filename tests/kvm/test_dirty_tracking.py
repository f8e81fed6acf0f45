"""Dirty tracking against the truth: what differs between two looks at memory, for both of KVM's methods."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest

from pyvmm.errors import KvmError, StateError
from pyvmm.host.dirty_log import Method, ring_problem
from pyvmm.host.profile import load_profile
from pyvmm.kvm.vm import Vm
from pyvmm.machine.builder import build_machine, install_kick_signal
from pyvmm.machine.config import MachineConfig
from pyvmm.machine.dirty_tracker import prepare_dirty_log
from pyvmm.machine.machine import Machine

pytestmark = pytest.mark.kvm

DIRTIER = Path(__file__).parents[2] / "guests" / "dirtier" / "dirtier.elf"
PAGES = 6000
"""More than a ring holds, so that a full one is seen, too."""
FIRST_PAGE = 8 << 20


def machine_of(tmp_path: Path, method: Method, append: str) -> Machine:
    config = MachineConfig(
        image=str(DIRTIER), memory=64 << 20, append=append, dirty_log=method, timeout=60.0,
        serial=f"file:{tmp_path / 'output'}",
    )  # fmt: skip
    install_kick_signal()
    return build_machine(config, frozenset(load_profile().quirks))


def run_until(machine: Machine, reached: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not reached():
        assert time.monotonic() < deadline and machine.ending is None
        machine.loop.run_once(0.01)


def rounds(tmp_path: Path) -> int:
    return (tmp_path / "output").read_bytes().count(b"round ")


def dirty_pages(machine: Machine) -> set[int]:
    """GPAs of pages in a harvest; its count and ranges must agree."""
    found = set()
    for page_set in machine.dirty.harvest():
        runs = list(page_set.ranges())
        assert sum(count for _, count in runs) == page_set.count
        found |= {page_set.region.gpa + 4096 * (first + i) for first, count in runs for i in range(count)}
    return found


def contents(machine: Machine) -> bytes:
    assert len(machine.memory.regions) == 1
    return machine.memory.read(0, machine.memory.size)


@pytest.mark.parametrize("method", ["bitmap", "ring"])
def test_every_changed_page_is_in_a_harvest_and_few_others_are(tmp_path: Path, method: Method) -> None:
    tries = 5
    for attempt in range(tries):
        folder = tmp_path / str(attempt)
        folder.mkdir()
        try:
            harvest_while_the_guest_writes(folder, method)
            return
        except StateError as error:
            # Where KVM shadows page tables a ring may overrun whatever we do: then it has to be said, and is.
            assert method == "ring" and ring_problem(load_profile()) and "--dirty-log bitmap" in str(error)
    pytest.fail(f"the ring overran in each of {tries} machines")


def harvest_while_the_guest_writes(tmp_path: Path, method: Method) -> None:
    with machine_of(tmp_path, method, f"pages={PAGES} period=50 rounds=0") as machine:
        assert machine.dirty.method == method, "this host has no dirty rings"
        machine.start()
        run_until(machine, lambda: rounds(tmp_path) >= 1)
        machine.pause()
        machine.dirty.start()
        dirty_pages(machine)
        before = contents(machine)
        for _ in range(3):
            done = rounds(tmp_path)
            machine.resume()
            # Harvests from a running guest must lose nothing between them.
            reported: set[int] = set()
            # KVM's ring may hold back four lines of output: after six more, a whole round was after the resume.
            while rounds(tmp_path) < done + 6:
                machine.loop.run_once(0.01)
                reported |= dirty_pages(machine)
            machine.pause()
            # A device's write, which no log of KVM's sees.
            last = machine.memory.size - 4096
            machine.memory.write(last, bytes([machine.memory.read(last, 1)[0] ^ 1]))
            reported |= dirty_pages(machine)
            after = contents(machine)
            changed = {at for at in range(0, len(before), 4096) if before[at : at + 4096] != after[at : at + 4096]}
            assert changed <= reported
            assert set(range(FIRST_PAGE, FIRST_PAGE + PAGES * 4096, 4096)) <= changed
            assert len(reported) < PAGES + 64, "pages are reported that nobody wrote"
            assert dirty_pages(machine) == set(), "a paused machine writes nothing"
            before = after
        machine.dirty.stop()
        machine.resume()
        done = rounds(tmp_path)
        run_until(machine, lambda: rounds(tmp_path) > done)
        with pytest.raises(StateError, match="start logging first"):
            machine.dirty.harvest()
        machine.pause()
        machine.dirty.start()
        assert dirty_pages(machine) == set(), "what was written while nobody logged is news"


def test_what_is_given_back_is_harvested_again(tmp_path: Path) -> None:
    with machine_of(tmp_path, "bitmap", "pages=10 period=50 rounds=0") as machine:
        machine.start()
        machine.dirty.start()
        run_until(machine, lambda: rounds(tmp_path) >= 2)
        machine.pause()
        first = machine.dirty.harvest()
        count = sum(s.count for s in first)
        assert count >= 10
        for page_set in first:
            page_set.give_back()
        assert sum(s.count for s in machine.dirty.harvest()) == count


def test_without_rings_it_is_the_bitmap(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    has = Vm.check_extension
    monkeypatch.setattr(Vm, "check_extension", lambda vm, name: 0 if "DIRTY_LOG_RING" in name else has(vm, name))
    with machine_of(tmp_path, "ring", "pages=1 rounds=1") as machine:
        assert machine.dirty.method == "bitmap"
        assert prepare_dirty_log(machine.vm, "ring") == "bitmap"


def test_a_refused_harvest_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """KVM refuses a slot that is not logged; what devices marked is there afterwards."""
    with machine_of(tmp_path, "bitmap", "pages=1 rounds=1") as machine:
        machine.dirty.start()
        machine.memory.write(0x5000, b"x")
        machine.dirty._set_flags(0)
        with pytest.raises(KvmError, match="KVM_GET_DIRTY_LOG"):
            machine.dirty.harvest()
        machine.dirty._set_flags(1)
        assert 0x5000 in dirty_pages(machine)
