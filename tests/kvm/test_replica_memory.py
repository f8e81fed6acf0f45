"""The secondary's memory under a real guest: what it wrote is undone exactly, and it runs on from the checkpoint."""

from __future__ import annotations

import random
import struct
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from pyvmm.colo.replica_memory import ReplicaMemory
from pyvmm.host.dirty_log import Method
from pyvmm.host.profile import load_profile
from pyvmm.machine.builder import build_machine, install_kick_signal
from pyvmm.machine.config import MachineConfig
from pyvmm.machine.dirty_tracker import DirtyTracker, PageSet
from pyvmm.machine.machine import Machine
from pyvmm.memory.guest_memory import PAGE_SIZE
from pyvmm.migration.machine_state import prepare_machine, save_machine
from pyvmm.migration.sections import decode_sections, encode_sections

pytestmark = pytest.mark.kvm

DIRTIER = Path(__file__).parents[2] / "guests" / "dirtier" / "dirtier.elf"
PAGES = 1500
FIRST_PAGE = (8 << 20) // PAGE_SIZE
"""The dirtier's first."""


class Noted(DirtyTracker):
    """Keeps which pages were harvested last."""

    found: frozenset[int] = frozenset()

    def harvest(self) -> Sequence[PageSet]:
        sets = super().harvest()
        self.found = frozenset(page for s in sets for first, n in s.ranges() for page in range(first, first + n))
        return sets


def run_until(machine: Machine, reached: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not reached():
        assert time.monotonic() < deadline and machine.ending is None
        machine.loop.run_once(0.01)


@pytest.mark.parametrize("method", ["bitmap", "ring"])
def test_what_the_replica_wrote_is_undone_and_it_goes_on(tmp_path: Path, method: Method) -> None:
    config = MachineConfig(
        image=str(DIRTIER), memory=48 << 20, append=f"pages={PAGES} period=20 rounds=0", dirty_log=method, timeout=60.0,
        serial=f"file:{tmp_path / 'output'}",
    )  # fmt: skip
    install_kick_signal()

    def rounds() -> int:
        return (tmp_path / "output").read_bytes().count(b"round ")

    with build_machine(config, frozenset(load_profile().quirks)) as machine:
        machine.start()
        run_until(machine, lambda: rounds() >= 2)
        machine.pause()
        state = encode_sections(save_machine(machine))
        machine.dirty.__class__ = Noted
        noted = machine.dirty
        assert isinstance(noted, Noted)
        replica = ReplicaMemory(machine.memory, noted)
        replica.protect()
        (region,) = machine.memory.regions
        unused = range(FIRST_PAGE + PAGES, FIRST_PAGE + PAGES + 500)
        everything = region.size // PAGE_SIZE
        checkpoint = bytearray(region.pages(0, everything))
        chance = random.Random(5)
        for _ in range(4):
            apply = prepare_machine(machine, decode_sections(memoryview(state)))
            apply()
            done = rounds()
            machine.resume()
            run_until(machine, lambda done=done: rounds() >= done + 8)  # type: ignore[misc]
            machine.pause()
            machine.memory.write(unused[7] * PAGE_SIZE, b"as a device does")
            copies = {page for first, n in region.own_copies() for page in range(first, first + n)}
            assert set(range(FIRST_PAGE, FIRST_PAGE + PAGES)) | {unused[7]} <= copies
            batch = b""
            for page in sorted(chance.sample(range(FIRST_PAGE, unused.stop), 300)):
                new = chance.choice([bytes(PAGE_SIZE), chance.randbytes(PAGE_SIZE)])
                if page not in unused:  # the guest looks whether what it wrote last is there
                    new = bytes(checkpoint[page * PAGE_SIZE : page * PAGE_SIZE + 8]) + new[8:]
                checkpoint[page * PAGE_SIZE : (page + 1) * PAGE_SIZE] = new
                zero = 0 if any(new) else 1 << 31
                batch += struct.pack("<II", page, 1 | zero) + (b"" if zero else new)
            assert replica.check([(0, 0, memoryview(batch))]) == 300
            rolled = replica.roll_forward([(0, 0, memoryview(batch))])
            assert (rolled.dropped, rolled.written) == (len(noted.found), 300)
            # What has a copy is what is known to have one; but for a page that a vCPU was stopped at.
            assert noted.found <= copies and len(copies - noted.found) <= 1
            left = {page for first, n in region.own_copies() for page in range(first, first + n)}
            assert left <= copies - noted.found
            assert region.pages(0, everything) == checkpoint
        replica.release()
        prepare_machine(machine, decode_sections(memoryview(state)))()
        done = rounds()
        machine.resume()
        run_until(machine, lambda: rounds() >= done + 8)
        machine.pause()
        own = {page for first, n in region.own_copies() for page in range(first, first + n)}
        there = {page for first, n in region.present() for page in range(first, first + n)}
        assert set(range(FIRST_PAGE, FIRST_PAGE + PAGES)) <= own <= there
        before = region.pages(0, everything)
        assert region.free_covered() == len(own)
        assert region.pages(0, everything) == before
        done = rounds()
        machine.resume()
        run_until(machine, lambda: rounds() >= done + 3)
        assert region.free_covered() >= len(own)  # and while it runs, which would tell if a page were lost
        run_until(machine, lambda: rounds() >= done + 8)
