"""What a machine counted, for reports."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pyvmm.machine.machine import Machine


def machine_statistics(machine: Machine) -> dict[str, Any]:
    """Exits by vCPU, what the work-arounds did, what devices count."""
    return {
        "cpus": [
            {
                "exits": int(v.native.exits),
                "exits_native": int(v.native.native_exits),
                "syscalls_completed": int(v.native.syscalls),
                "interrupts_completed": int(v.native.interrupts),
                "hypercalls_answered": int(v.native.hypercalls),
                "faults_passed": int(v.native.faults),
            }
            for v in machine.vcpus
        ],
        "instructions_carried_out": dict(machine.exits.carried_out),
        "devices": {each.section_id: counters for each in machine.devices if (counters := each.statistics())},
        "resets": machine.resets,
    }
