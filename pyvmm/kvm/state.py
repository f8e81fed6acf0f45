"""vCPU registers as KVM exchanges them, as plain typed records (field names are the kernel's).

Source: arch/x86/include/uapi/asm/kvm.h (struct kvm_regs, kvm_segment, kvm_dtable, kvm_sregs).
"""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Meta

U8 = Annotated[int, Meta(ge=0, le=0xFF)]
U16 = Annotated[int, Meta(ge=0, le=0xFFFF)]
U32 = Annotated[int, Meta(ge=0, le=0xFFFFFFFF)]
U64 = Annotated[int, Meta(ge=0)]
"""msgspec cannot bound 64 bits from above; whoever takes records from outside does (devices/state.py)."""


class Regs(msgspec.Struct, kw_only=True):
    """General registers (struct kvm_regs), all unsigned 64-bit."""

    rax: U64 = 0
    rbx: U64 = 0
    rcx: U64 = 0
    rdx: U64 = 0
    rsi: U64 = 0
    rdi: U64 = 0
    rsp: U64 = 0
    rbp: U64 = 0
    r8: U64 = 0
    r9: U64 = 0
    r10: U64 = 0
    r11: U64 = 0
    r12: U64 = 0
    r13: U64 = 0
    r14: U64 = 0
    r15: U64 = 0
    rip: U64 = 0
    rflags: U64 = 2


class Segment(msgspec.Struct, kw_only=True):
    """A segment register with its hidden part (struct kvm_segment). ``limit`` is in bytes."""

    base: U64 = 0
    limit: U32 = 0xFFFF
    selector: U16 = 0
    type: U8 = 0
    present: U8 = 0
    dpl: U8 = 0
    db: U8 = 0
    s: U8 = 0
    l: U8 = 0  # noqa: E741 -- the kernel's name of the long-mode bit
    g: U8 = 0
    avl: U8 = 0
    unusable: U8 = 0


class Dtable(msgspec.Struct, kw_only=True):
    """GDTR or IDTR (struct kvm_dtable)."""

    base: U64 = 0
    limit: U16 = 0xFFFF


class Sregs(msgspec.Struct, kw_only=True):
    """Segments, control registers, EFER, APIC base, pending external interrupt (struct kvm_sregs)."""

    cs: Segment
    ds: Segment
    es: Segment
    fs: Segment
    gs: Segment
    ss: Segment
    tr: Segment
    ldt: Segment
    gdt: Dtable
    idt: Dtable
    cr0: U64
    cr2: U64
    cr3: U64
    cr4: U64
    cr8: U64
    efer: U64
    apic_base: U64
    interrupt_bitmap: tuple[U64, U64, U64, U64] = (0, 0, 0, 0)


class DebugRegs(msgspec.Struct, kw_only=True):
    """The guest's own debug registers (struct kvm_debugregs)."""

    db: tuple[U64, U64, U64, U64] = (0, 0, 0, 0)
    dr6: U64 = 0xFFFF0FF0
    dr7: U64 = 0x400
    flags: U64 = 0


class VcpuEvents(msgspec.Struct, kw_only=True):
    """Exceptions, interrupts and NMIs on their way (struct kvm_vcpu_events, nested names joined by ``_``)."""

    exception_injected: U8 = 0
    exception_nr: U8 = 0
    exception_has_error_code: U8 = 0
    exception_pending: U8 = 0
    exception_error_code: U32 = 0
    interrupt_injected: U8 = 0
    interrupt_nr: U8 = 0
    interrupt_soft: U8 = 0
    interrupt_shadow: U8 = 0
    nmi_injected: U8 = 0
    nmi_pending: U8 = 0
    nmi_masked: U8 = 0
    sipi_vector: U32 = 0
    flags: U32 = 0
    smi_smm: U8 = 0
    smi_pending: U8 = 0
    smi_smm_inside_nmi: U8 = 0
    smi_latched_init: U8 = 0
    triple_fault_pending: U8 = 0
    exception_has_payload: U8 = 0
    exception_payload: U64 = 0


class CpuidEntry(msgspec.Struct):
    """One CPUID leaf (struct kvm_cpuid_entry2)."""

    function: U32
    index: U32
    flags: U32
    eax: U32
    ebx: U32
    ecx: U32
    edx: U32
