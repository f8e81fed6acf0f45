"""``info devices``: who has which addresses and what is there, from the tables that the devices are written with."""

from __future__ import annotations

from pyvmm.machine.machine import Machine
from pyvmm.registers import Register


def device_lines(machine: Machine, name: str) -> list[str]:
    """All devices, a line each; with ``name`` the registers of that one."""
    lines = []
    for bus, word in ((machine.ports, "port"), (machine.mmio, "memory")):
        for one in bus.ranges():
            device = one.device
            title = device.registers.title if device.registers is not None else ""
            if not name:
                words = [device.section_id, *([title] if title else [])]
                lines.append(f"{word} {one.base:#x}-{one.end - 1:#x}: {', '.join(words)}")
            elif device.section_id == name:
                lines.append(f"{name}: {title or 'no table of registers'}")
                lines += [_line(one.base + r.offset - one.offset, r) for r in device.registers or ()
                          if one.offset <= r.offset < one.offset + one.length]  # fmt: skip
    return lines or [f"Device '{name}' not found"]


def _line(address: int, register: Register) -> str:
    bits = ", ".join(f"{bit.name} {bit.mask:#x} {bit.text}".rstrip() for bit in register.bits)
    return f"  {address:#x} {register.access:<2} {register.name}: {register.text}{f' ({bits})' if bits else ''}"
