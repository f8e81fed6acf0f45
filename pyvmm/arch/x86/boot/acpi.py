"""Minimal ACPI tables: RSDP, XSDT, FADT (with FACS), MADT and a DSDT that can grow devices.

Source: ACPI 6.5: 5.2.5 RSDP, 5.2.6 system description table header, 5.2.8 XSDT, 5.2.9 FADT, 5.2.10 FACS,
5.2.12 MADT, 7.4.2.6 _S5. Fixed hardware: PM1a event and control block with the power button (4.8.3); no PM
timer; one general-purpose event, of the VM generation counter. SMI_CMD is 0: the machine is always in ACPI mode.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

from pyvmm.arch.x86 import layout
from pyvmm.arch.x86.boot import aml
from pyvmm.arch.x86.boot.mptable import isa_irq_pins
from pyvmm.errors import ConfigError
from pyvmm.memory.guest_memory import GuestMemory

S5_SLEEP_TYPE = 5
"""SLP_TYP value of soft off in ``\\_S5``; the PM1 control device acts on the same."""

_HEADER = struct.Struct("<4sIBB6s8sI4sI")
_OEM_ID, _OEM_TABLE_ID, _CREATOR_ID = b"PYVMM ", b"PYVMM   ", b"PYVM"
_RSDP_SIZE = 36
_FADT_SIZE = 276  # revision 6
_FACS_SIZE = 64
_FACS_ALIGNMENT = 64
_TABLE_ALIGNMENT = 16

_RESET_VALUE = 0x06  # RST_CPU | SYS_RST of port 0xCF9
_RTC_CENTURY = 0x32  # the RTC's RAM index
_ENTERPRISE_SERVER = 4
_NO_C_STATE = 0x0FFF  # a latency above 1000 us says the state does not exist (5.2.9, P_LVL3_LAT)

# FADT flags (table 5.10).
_WBINVD = 1 << 0
_PROC_C1 = 1 << 2
_NO_SLEEP_BUTTON = 1 << 5  # the power button's bit 4 is clear: it is a fixed-hardware button
_NO_RTC_WAKE = 1 << 6
_RESET_REGISTER = 1 << 10
# FADT boot architecture flags (table 5.11). The 8042 bit stays clear: there is no keyboard to probe for.
_LEGACY_DEVICES = 1 << 0
_NO_VGA = 1 << 2

_IRQ_EDGE_HIGH = 0x5
_IRQ_LEVEL_HIGH = 0xD


def table(signature: bytes, revision: int, body: bytes) -> bytes:
    """``body`` behind the standard header (5.2.6), checksum included."""
    length = _HEADER.size + len(body)
    header = (signature, length, revision, 0, _OEM_ID, _OEM_TABLE_ID, 1, _CREATOR_ID, 1)
    raw = bytearray(_HEADER.pack(*header) + body)
    raw[9] = -sum(raw) & 0xFF
    return bytes(raw)


def build_dsdt(devices: Sequence[bytes] = ()) -> bytes:
    """The DSDT: ``\\_S5``, the VM generation counter with its event, and, in ``\\_SB``, the given device terms (see
    :mod:`pyvmm.arch.x86.boot.aml`).
    """
    sleep = aml.integer(S5_SLEEP_TYPE)
    terms = aml.name("_S5", aml.package(sleep, sleep, aml.integer(0), aml.integer(0)))
    terms += aml.scope("_SB", aml.generation_id(layout.VMGENID), *devices)
    terms += aml.scope("_GPE", aml.notify_method("_E00", "\\_SB.VGEN", 0x80))  # edge of GPE0's bit 0 (5.6.4.1)
    return table(b"DSDT", 2, terms)


def build_madt(cpus: int) -> bytes:
    """Local APICs 0 to ``cpus - 1``, the IOAPIC with ID ``cpus``, the ISA overrides, NMI on LINT1."""
    entries = [struct.pack("<BBBBI", 0, 8, uid, uid, 1) for uid in range(cpus)]
    entries.append(struct.pack("<BBBBII", 1, 12, cpus, 0, layout.IOAPIC, 0))
    for irq, pin in isa_irq_pins():
        if irq == layout.IRQ_ACPI_SCI:
            # The SCI is level-triggered, which no ISA interrupt is (5.2.9, SCI_INT).
            entries.append(struct.pack("<BBBBIH", 2, 10, 0, irq, pin, _IRQ_LEVEL_HIGH))
        elif irq != pin:
            entries.append(struct.pack("<BBBBIH", 2, 10, 0, irq, pin, _IRQ_EDGE_HIGH))
    entries.append(struct.pack("<BBBHB", 4, 6, 0xFF, 0, 1))
    pcat_compatible = 1  # the machine also has two 8259s
    return table(b"APIC", 4, struct.pack("<II", layout.LOCAL_APIC, pcat_compatible) + b"".join(entries))


def _system_io(port: int, size: int) -> bytes:
    """A Generic Address Structure (5.2.3.2) of ``size`` bytes in I/O space; access by bytes or words."""
    return struct.pack("<BBBBQ", 1, 8 * size, 0, 1 if size == 1 else 2, port)


def build_fadt(facs: int, dsdt: int) -> bytes:
    """The FADT (5.2.9) for a FACS and a DSDT at these addresses."""
    event = layout.PORT_ACPI_PM[0]
    control = event + 4
    raw = bytearray(_FADT_SIZE - _HEADER.size)

    def put(offset: int, form: str, *values: int) -> None:
        struct.pack_into("<" + form, raw, offset - _HEADER.size, *values)

    put(36, "II", facs, dsdt)
    put(45, "B", _ENTERPRISE_SERVER)
    put(46, "H", layout.IRQ_ACPI_SCI)
    put(56, "I", event)  # PM1a_EVT_BLK
    put(64, "I", control)  # PM1a_CNT_BLK
    put(80, "I", event + 6)  # GPE0_BLK
    put(88, "BB", 4, 2)  # PM1_EVT_LEN, PM1_CNT_LEN
    put(92, "B", 2)  # GPE0_BLK_LEN
    put(96, "HH", _NO_C_STATE, _NO_C_STATE)
    put(108, "B", _RTC_CENTURY)
    put(109, "H", _LEGACY_DEVICES | _NO_VGA)
    put(112, "I", _WBINVD | _PROC_C1 | _NO_SLEEP_BUTTON | _NO_RTC_WAKE | _RESET_REGISTER)
    put(128, "B", _RESET_VALUE)
    put(140, "Q", dsdt)  # X_DSDT; X_FIRMWARE_CTRL stays 0, as only one of the two may be set
    for offset, structure in (
        (116, _system_io(layout.PORT_RESET_CONTROL[0], 1)),
        (148, _system_io(event, 4)),
        (172, _system_io(control, 2)),
        (220, _system_io(event + 6, 2)),
    ):
        raw[offset - _HEADER.size : offset - _HEADER.size + 12] = structure
    return table(b"FACP", 6, bytes(raw))


def build_rsdp(xsdt: int) -> bytes:
    """The RSDP, revision 2 (5.2.5.3): both checksums, no RSDT."""
    raw = bytearray(struct.pack("<8sB6sBIIQB3s", b"RSD PTR ", 0, _OEM_ID, 2, 0, _RSDP_SIZE, xsdt, 0, bytes(3)))
    raw[8] = -sum(raw[:20]) & 0xFF
    raw[32] = -sum(raw) & 0xFF
    return bytes(raw)


def build_acpi(cpus: int, devices: Sequence[bytes] = ()) -> list[tuple[int, bytes]]:
    """All tables as (guest-physical address, bytes), RSDP first at ``layout.ACPI_TABLES``.

    ConfigError if they outgrow the area (128 KiB).
    """
    if not 1 <= cpus <= 254:
        raise ConfigError(f"--smp {cpus}: xAPIC IDs allow 1 to 254 CPUs")
    facs = layout.ACPI_TABLES + _FACS_ALIGNMENT
    next_free = facs + _FACS_SIZE
    placed = [(facs, struct.pack("<4sI24xB31x", b"FACS", _FACS_SIZE, 2))]

    def place(data: bytes) -> int:
        nonlocal next_free
        gpa = next_free
        next_free = (gpa + len(data) + _TABLE_ALIGNMENT - 1) & -_TABLE_ALIGNMENT
        placed.append((gpa, data))
        return gpa

    dsdt = place(build_dsdt(devices))
    tables = [place(build_fadt(facs, dsdt)), place(build_madt(cpus))]
    xsdt = place(table(b"XSDT", 1, struct.pack(f"<{len(tables)}Q", *tables)))
    if next_free > layout.VMGENID:
        raise ConfigError(f"ACPI tables need {next_free - layout.ACPI_TABLES} bytes, more than their area has")
    return [(layout.ACPI_TABLES, build_rsdp(xsdt)), *placed]


def write_acpi(memory: GuestMemory, cpus: int, devices: Sequence[bytes] = ()) -> None:
    """Write all tables into guest memory."""
    for gpa, data in build_acpi(cpus, devices):
        memory.write(gpa, data)
