"""Moving a machine's state into another machine of this process."""

from __future__ import annotations

from pyvmm.machine.builder import build_machine
from pyvmm.machine.config import MachineConfig
from pyvmm.machine.ending import Ending
from pyvmm.machine.machine import Machine
from pyvmm.memory.guest_memory import GuestMemory, Region
from pyvmm.migration.machine_state import load_machine, save_machine
from pyvmm.migration.sections import decode_sections, encode_sections

_PIECE = 1 << 16
_ZERO = bytes(_PIECE)


def copy_ram(source: GuestMemory, target: GuestMemory) -> None:
    """All of it; what is zero stays untouched."""
    for region in source.regions:
        for gpa in range(region.gpa, region.end, _PIECE):
            piece = source.read(gpa, min(_PIECE, region.end - gpa))
            if piece != _ZERO[: len(piece)]:
                target.write(gpa, piece)


def twin_of(machine: Machine, config: MachineConfig | None = None) -> Machine:
    """A new machine that goes on where ``machine``, which is paused, stands. Everything reads back as written."""
    twin = build_machine(config or machine.config, machine.quirks, saved_ram=Region)
    try:
        stream = encode_sections(save_machine(machine))
        copy_ram(machine.memory, twin.memory)
        mismatches = load_machine(twin, decode_sections(stream))
        # A local APIC's timer may fire between its being loaded and read back, on a host that is slow.
        assert [one for one in mismatches if not one.endswith(": lapic")] == [], mismatches
    except BaseException:
        twin.close()
        raise
    return twin


def run_for(machine: Machine, seconds: float) -> Ending | None:
    """Run ``machine`` for about that long: ``None`` and it is paused, or its end."""

    def stop() -> None:
        if machine.ending is None:
            machine.pause()
        machine.loop.stop()

    machine.loop.call_later(seconds, stop)
    machine.start()
    machine.loop.run()
    return machine.ending
