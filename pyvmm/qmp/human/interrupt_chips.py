"""``info pic`` and ``info lapic``: the interrupt controllers as KVM holds them, worded as QEMU's monitor words them.

Layouts: struct kvm_pic_state and kvm_ioapic_state (arch/x86/include/uapi/asm/kvm.h); the local APIC's register page,
Intel SDM volume 3, table 11-1; redirection entries, Intel 82093AA datasheet, 3.2.4.
"""

from __future__ import annotations

import struct

from pyvmm.kvm.vcpu import Vcpu
from pyvmm.kvm.vm import Vm

_DELIVERY = ("Fixed", "LowPri", "SMI", "...", "NMI", "INIT", "SIPI", "ExtINT")
_LVTS = (("LVT0", 0x350), ("LVT1", 0x360), ("LVTPC", 0x340), ("LVTERR", 0x370), ("LVTTHMR", 0x330), ("LVTT", 0x320))
_TIMER_MODES = ("one-shot", "periodic", "tsc-deadline", "...")
_SHORTHANDS = ("no-shorthand", "self", "all-including-self", "all-excluding-self")
_PIC_FIELDS = (
    "last_irr", "irr", "imr", "isr", "priority", "base", "select", "poll", "special", "init", "auto_eoi", "rotate",
    "nested", "init4", "elcr", "elcr_mask",
)  # fmt: skip
_IOAPIC_VERSION = 0x11  # KVM's: 24 pins, no directed EOI


def pic_lines(vm: Vm) -> list[str]:
    """The I/O APIC's pins, then both PICs."""
    raw = vm.get_irqchip("ioapic")[8:]
    select, identity, irr = struct.unpack_from("<3I", raw, 8)
    lines = [f"ioapic0: ver={_IOAPIC_VERSION:#x} id={identity:#04x} sel={select:#04x}"]
    for pin, entry in enumerate(struct.unpack_from("<24Q", raw, 24)):
        how = " ".join(
            (
                "level" if entry >> 15 & 1 else "edge",
                "active-lo" if entry >> 13 & 1 else "active-hi",
                f"dest={entry >> 56:x}({'logical' if entry >> 11 & 1 else 'physical'})",
            )
        )
        flags = f"{' remote-irr' if entry >> 14 & 1 else ''}{' masked' if entry >> 16 & 1 else ''}"
        lines.append(f"  pin {pin:<2} {entry:#018x} {how} vec={entry & 0xFF} {_DELIVERY[entry >> 8 & 7]}{flags}")
    lines.append(f"  IRR    {_set_bits(irr, 24)}")
    for number, chip in ((1, "pic_slave"), (0, "pic_master")):
        state = dict(zip(_PIC_FIELDS, vm.get_irqchip(chip)[8:], strict=False))
        lines.append(
            "pic{0}: irr={irr:02x} imr={imr:02x} isr={isr:02x} hprio={priority} irq_base={base:02x} rr_sel={select}"
            " elcr={elcr:02x} fnm={nested}".format(number, **state)
        )
    return lines


def lapic_lines(vcpu: Vcpu) -> list[str]:
    """One vCPU's local APIC; in its flat xAPIC layout, whatever mode it is in."""
    page = vcpu.get_lapic()

    def register(at: int) -> int:
        return int.from_bytes(page[at : at + 4], "little")

    def vectors(at: int) -> int:
        return sum(register(at + 16 * word) << 32 * word for word in range(8))

    lines = [f"dumping local APIC state for CPU {vcpu.index}", ""]
    for name, at in _LVTS:
        value = register(at)
        kind = _TIMER_MODES[value >> 17 & 3] if name == "LVTT" else _DELIVERY[value >> 8 & 7]
        polarity, trigger = "active-lo" if value >> 13 & 1 else "active-hi", "level" if value >> 15 & 1 else "edge"
        masked = "masked" if value >> 16 & 1 else ""
        lines.append(f"{name:<8} {value:#010x} {polarity} {trigger:<5} {masked:<6} {kind} (vec {value & 0xFF})")
    divide = register(0x3E0)
    shift = (divide & 3 | divide >> 1 & 4) + 1 & 7
    spurious, icr = register(0xF0), register(0x300)
    lines += [
        f"Timer    DCR={divide:#x} (divide by {1 << shift}) initial_count = {register(0x380)}"
        f" current_count = {register(0x390)}",
        f"SPIV     {spurious:#010x} APIC {'enabled' if spurious >> 8 & 1 else 'disabled'},"
        f" focus={'off' if spurious >> 9 & 1 else 'on'}, spurious vec {spurious & 0xFF}",
        f"ICR      {icr:#010x} {'logical' if icr >> 11 & 1 else 'physical'} {'level' if icr >> 15 & 1 else 'edge'}"
        f" {'assert' if icr >> 14 & 1 else 'de-assert'} {_SHORTHANDS[icr >> 18 & 3]}",
        f"ICR2     {register(0x310):#010x}",
        f"ESR      {register(0x280):#010x}",
        f"ISR      {_set_bits(vectors(0x100), 256)}",
        f"IRR      {_set_bits(vectors(0x200), 256)}",
        "",
        f"APR {register(0x90):#04x} TPR {register(0x80):#04x} DFR {register(0xE0) >> 28:#04x}"
        f" LDR {register(0xD0) >> 24:#04x} PPR {register(0xA0):#04x}",
    ]
    return lines


def _set_bits(value: int, count: int) -> str:
    return " ".join(str(bit) for bit in range(count) if value >> bit & 1) or "(none)"
