"""vCPU registers as KVM exchanges them, as plain typed records (field names are the kernel's).

Source: arch/x86/include/uapi/asm/kvm.h (struct kvm_regs, kvm_segment, kvm_dtable, kvm_sregs).
"""

from __future__ import annotations

import msgspec


class Regs(msgspec.Struct, kw_only=True):
    """General registers (struct kvm_regs), all unsigned 64-bit."""

    rax: int = 0
    rbx: int = 0
    rcx: int = 0
    rdx: int = 0
    rsi: int = 0
    rdi: int = 0
    rsp: int = 0
    rbp: int = 0
    r8: int = 0
    r9: int = 0
    r10: int = 0
    r11: int = 0
    r12: int = 0
    r13: int = 0
    r14: int = 0
    r15: int = 0
    rip: int = 0
    rflags: int = 2


class Segment(msgspec.Struct, kw_only=True):
    """A segment register with its hidden part (struct kvm_segment). ``limit`` is in bytes."""

    base: int = 0
    limit: int = 0xFFFF
    selector: int = 0
    type: int = 0
    present: int = 0
    dpl: int = 0
    db: int = 0
    s: int = 0
    l: int = 0  # noqa: E741 -- the kernel's name of the long-mode bit
    g: int = 0
    avl: int = 0
    unusable: int = 0


class Dtable(msgspec.Struct, kw_only=True):
    """GDTR or IDTR (struct kvm_dtable)."""

    base: int = 0
    limit: int = 0xFFFF


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
    cr0: int
    cr2: int
    cr3: int
    cr4: int
    cr8: int
    efer: int
    apic_base: int
    interrupt_bitmap: tuple[int, int, int, int] = (0, 0, 0, 0)


class DebugRegs(msgspec.Struct, kw_only=True):
    """The guest's own debug registers (struct kvm_debugregs)."""

    db: tuple[int, int, int, int] = (0, 0, 0, 0)
    dr6: int = 0xFFFF0FF0
    dr7: int = 0x400
    flags: int = 0


class VcpuEvents(msgspec.Struct, kw_only=True):
    """Exceptions, interrupts and NMIs on their way (struct kvm_vcpu_events, nested names joined by ``_``)."""

    exception_injected: int = 0
    exception_nr: int = 0
    exception_has_error_code: int = 0
    exception_pending: int = 0
    exception_error_code: int = 0
    interrupt_injected: int = 0
    interrupt_nr: int = 0
    interrupt_soft: int = 0
    interrupt_shadow: int = 0
    nmi_injected: int = 0
    nmi_pending: int = 0
    nmi_masked: int = 0
    sipi_vector: int = 0
    flags: int = 0
    smi_smm: int = 0
    smi_pending: int = 0
    smi_smm_inside_nmi: int = 0
    smi_latched_init: int = 0
    triple_fault_pending: int = 0
    exception_has_payload: int = 0
    exception_payload: int = 0


class CpuidEntry(msgspec.Struct):
    """One CPUID leaf (struct kvm_cpuid_entry2)."""

    function: int
    index: int
    flags: int
    eax: int
    ebx: int
    ecx: int
    edx: int
