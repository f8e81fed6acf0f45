"""MP tables: processors, the ISA bus, the IOAPIC and its wiring, for kernels without ACPI.

Source: Intel MultiProcessor Specification 1.4, chapter 4: 4.1 floating pointer structure, 4.2 configuration
table header, 4.3.1 processor, 4.3.2 bus, 4.3.3 I/O APIC, 4.3.4 I/O interrupt, 4.3.5 local interrupt entries.
"""

from __future__ import annotations

import struct

from pyvmm.arch.x86 import layout
from pyvmm.errors import ConfigError
from pyvmm.memory.guest_memory import GuestMemory

_FLOATING_POINTER_SIZE = 16
_HEADER_SIZE = 44
_SPEC_1_4 = 4
_LOCAL_APIC_VERSION = 0x14  # integrated APIC, what KVM's APIC_LVR says
_IOAPIC_VERSION = 0x11  # what KVM's IOAPIC says
_CPU_ENABLED = 1 << 0
_CPU_BOOTSTRAP = 1 << 1
_CPU_SIGNATURE = 0x600  # family 6; kernels take the real one from CPUID
_CPU_FEATURES = 0x201  # FPU, APIC
_INT, _NMI, _EXT_INT = 0, 1, 3
_ALL_LOCAL_APICS = 0xFF
_ISA_BUS_ID = 0
_ISA_IRQS = 16

BDA_EBDA_SEGMENT = 0x40E  # u16: where kernels learn of the EBDA
BDA_BASE_MEMORY = 0x413  # u16: KiB of low RAM


def isa_irq_pins() -> list[tuple[int, int]]:
    """(ISA IRQ, IOAPIC pin): IRQ 0, the timer, is wired to pin 2; IRQ 2, the cascade, to none.

    So every PC wires it. In KVM it needs a GSI routing entry 0 -> IOAPIC pin 2, not KVM's default.
    """
    return [(irq, 2 if irq == 0 else irq) for irq in range(_ISA_IRQS) if irq != 2]


def build_mp_table(cpus: int) -> bytes:
    """The configuration table for CPUs with APIC IDs 0 to ``cpus - 1``; the IOAPIC's ID is ``cpus``."""
    ioapic_id = cpus
    entries = [
        struct.pack(
            "<BBBBIIII",
            0,
            apic_id,
            _LOCAL_APIC_VERSION,
            _CPU_ENABLED | (_CPU_BOOTSTRAP if apic_id == 0 else 0),
            _CPU_SIGNATURE,
            _CPU_FEATURES,
            0,
            0,
        )
        for apic_id in range(cpus)
    ]
    entries.append(struct.pack("<BB6s", 1, _ISA_BUS_ID, b"ISA   "))
    entries.append(struct.pack("<BBBBI", 2, ioapic_id, _IOAPIC_VERSION, 1, layout.IOAPIC))
    # Flags 0: polarity and trigger as the bus has them (ISA: edge, active high).
    entries += [
        struct.pack("<BBHBBBB", 3, _INT, 0, _ISA_BUS_ID, irq, ioapic_id, pin) for irq, pin in isa_irq_pins()
    ]
    entries += [
        struct.pack("<BBHBBBB", 4, kind, 0, _ISA_BUS_ID, 0, _ALL_LOCAL_APICS, lint)
        for lint, kind in enumerate((_EXT_INT, _NMI))
    ]
    body = b"".join(entries)
    header = bytearray(
        struct.pack(
            "<4sHBB8s12sIHHIHBB",
            b"PCMP",
            _HEADER_SIZE + len(body),
            _SPEC_1_4,
            0,
            b"PYVMM   ",
            b"PYVMM       ",
            0,
            0,
            len(entries),
            layout.LOCAL_APIC,
            0,
            0,
            0,
        )
    )
    header[7] = -(sum(header) + sum(body)) & 0xFF
    return bytes(header) + body


def write_mp_table(memory: GuestMemory, cpus: int) -> None:
    """Write floating pointer and table into the EBDA, and where the EBDA is into the BIOS data area."""
    table = build_mp_table(cpus)
    room = layout.EBDA_END - layout.EBDA - _FLOATING_POINTER_SIZE
    if len(table) > room:
        raise ConfigError(f"--smp {cpus}: the MP table holds at most {cpus - (len(table) - room + 19) // 20} CPUs")
    pointer = bytearray(
        struct.pack("<4sIBBB5s", b"_MP_", layout.EBDA + _FLOATING_POINTER_SIZE, 1, _SPEC_1_4, 0, bytes(5))
    )
    pointer[10] = -sum(pointer) & 0xFF
    memory.write(layout.EBDA, bytes(pointer) + table)
    memory.write(BDA_EBDA_SEGMENT, struct.pack("<H", layout.EBDA >> 4))
    memory.write(BDA_BASE_MEMORY, struct.pack("<H", layout.EBDA // layout.KIB))
