"""Bare-metal guests paused at arbitrary moments, moved into a fresh machine, again and again until they end."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from pyvmm.cli.machine_options import resolve_quirks
from pyvmm.machine.builder import build_machine, install_kick_signal
from pyvmm.machine.config import MachineConfig
from pyvmm.machine.ending import Ending
from pyvmm.machine.guest_catalog import GuestEntry, describe_mismatch, load_catalog
from tests.framework.moving import run_for, twin_of

CATALOG = load_catalog(Path(__file__).resolve().parents[2] / "guests" / "guests.toml")
MOVES_MAX = 12
MOVES_WANTED = 3
RUNS_MAX = 20
"""On a fast host a short guest is over after one move, or none: then another is begun."""


def run_moving(guest: GuestEntry, seed: int, longest: float) -> tuple[Ending, bytes, int]:
    """(end, output, moves) of ``guest``, which lives in a new machine every few milliseconds."""
    install_kick_signal()
    chance = random.Random(seed)
    config = MachineConfig(
        image=str(guest.image), memory=guest.memory_bytes, cpus=guest.cpus, append=guest.append, serial="null",
        timeout=60.0,
    )  # fmt: skip
    output = bytearray()
    machine = build_machine(config, resolve_quirks(None))
    moves = 0
    try:
        while True:
            machine.backend.observe = output.extend
            ending = run_for(machine, chance.uniform(0.0005, longest) if moves < MOVES_MAX else 60.0)
            if ending is not None:
                return ending, bytes(output), moves
            twin = twin_of(machine)
            machine.close()
            machine = twin
            moves += 1
    finally:
        machine.close()


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize(
    ("name", "longest"),
    # ring3 is over in milliseconds; what matters is that it is caught on its ways into the kernel.
    [("apic-timer", 0.08), ("ring3", 0.001), ("smp", 0.05), ("smp-4", 0.05), ("dirtier", 0.08)],
)
def test_a_guest_does_not_notice_that_it_moves(name: str, longest: float, seed: int) -> None:
    guest = CATALOG[name]
    moves = 0
    for run in range(RUNS_MAX):
        ending, output, moved = run_moving(guest, 1000 * run + seed, longest)
        assert describe_mismatch(guest.expected, output.decode()) is None, output
        assert ending.status == guest.status
        moves += moved
        if moves >= MOVES_WANTED:
            return
    raise AssertionError(f"{moves} moves in {RUNS_MAX} runs: this guest is over before it can be moved")
