"""``info mtree``: every address and who has it, in the format of QEMU's monitor."""

from __future__ import annotations

from pyvmm.devices.bus import Bus
from pyvmm.devices.device import Device
from pyvmm.machine.machine import Machine

_IN_KVM_MEMORY = ((0xFEC00000, 0x1000, "kvm-ioapic"), (0xFEE00000, 0x1000, "kvm-apic-msi"))
_IN_KVM_PORTS = (
    (0x20, 2, "kvm-pic"), (0x40, 4, "kvm-pit"), (0x61, 1, "kvm-pit-speaker"), (0xA0, 2, "kvm-pic"),
    (0x4D0, 2, "kvm-elcr"),
)  # fmt: skip

Row = tuple[int, int, str, str]
"""First address, last address, kind, name."""


def tree_lines(machine: Machine, *, flat: bool) -> list[str]:
    """Both address spaces."""
    memory: list[Row] = [(r.gpa, r.end - 1, "ram", r.name) for r in machine.memory.regions]
    memory += _rows(machine.mmio, _IN_KVM_MEMORY)
    lines: list[str] = []
    spaces = (
        ("memory", "system", (1 << 64) - 1, sorted(memory)),
        ("I/O", "io", 0xFFFF, sorted(_rows(machine.ports, _IN_KVM_PORTS))),
    )
    for number, (space, root, last, rows) in enumerate(spaces):
        if flat:
            lines += [f"FlatView #{number}", f' AS "{space}", root: {root}', f" Root memory region: {root}"]
        else:
            lines += [f"address-space: {space}", f"  {0:016x}-{last:016x} (prio 0, i/o): {root}"]
        indent = "  " if flat else "    "
        lines += [f"{indent}{low:016x}-{high:016x} (prio 0, {kind}): {name}" for low, high, kind, name in rows]
        lines.append("")
    return lines


def _rows(bus: Bus, in_kvm: tuple[tuple[int, int, str], ...]) -> list[Row]:
    devices = [(r.base, r.end - 1, "i/o", _name(r.device)) for r in bus.ranges()]
    return devices + [(base, base + size - 1, "i/o", name) for base, size, name in in_kvm]


def _name(device: Device) -> str:
    return device.section_id or type(device).__name__.lower()
