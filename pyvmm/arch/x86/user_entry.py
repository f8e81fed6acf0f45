"""Switches the work-arounds for entering CPL 0 on (native/user_entry.c does the work and tells the story)."""

from __future__ import annotations

import msgspec

from pyvmm.errors import HostError
from pyvmm.kvm.state import CpuidEntry
from pyvmm.kvm.vcpu import Vcpu
from pyvmm.kvm.vm import Vm
from pyvmm.native import lib

SYSCALL_QUIRK = "syscall-entry"
INT_QUIRK = "int-entry"
MSR_LSTAR = 0xC0000082
MSR_FMASK = 0xC0000084

KVM_FEATURES_LEAF = 0x40000001
HYPERCALL_FEATURES = 1 << 7 | 1 << 11 | 1 << 13 | 1 << 16 | 1 << 17
"""PV_UNHALT, PV_SEND_IPI, PV_SCHED_YIELD, HC_MAP_GPA_RANGE, MIGRATION_CONTROL (Documentation/virt/kvm/x86/cpuid.rst):
features a guest uses by hypercall."""

NEEDED = ("KVM_CAP_SYNC_REGS", "KVM_CAP_SET_GUEST_DEBUG", "KVM_CAP_X86_USER_SPACE_MSR", "KVM_CAP_X86_MSR_FILTER",
          "KVM_CAP_DISABLE_QUIRKS2")  # fmt: skip


def prepare_vm(vm: Vm, quirks: frozenset[str]) -> None:
    """Before the first vCPU: have writes of LSTAR and FMASK come to user space, where they are noted."""
    if not quirks & {SYSCALL_QUIRK, INT_QUIRK}:
        return
    for capability in NEEDED:
        if not vm.check_extension(capability):
            raise HostError(
                f"this host's KVM mishandles system calls and lacks {capability}, which the work-around needs;"
                " guests without a user mode run with --quirks none"
            )
    vm.enable_cap("KVM_CAP_X86_USER_SPACE_MSR", lib.KVM_MSR_EXIT_REASON_FILTER)
    if INT_QUIRK in quirks:
        # Else a hypercall there never ends (see native/user_entry.c).
        vm.enable_cap("KVM_CAP_DISABLE_QUIRKS2", lib.KVM_X86_QUIRK_FIX_HYPERCALL_INSN)
    vm.set_msr_filter([(MSR_LSTAR, lib.KVM_MSR_FILTER_WRITE), (MSR_FMASK, lib.KVM_MSR_FILTER_WRITE)])


def prepare_vcpu(vcpu: Vcpu, quirks: frozenset[str]) -> None:
    """Also after a state load: the breakpoints are put where the loaded LSTAR and IDT say."""
    if quirks & {SYSCALL_QUIRK, INT_QUIRK}:
        vcpu.enable_user_entry(syscall=SYSCALL_QUIRK in quirks, int_n=INT_QUIRK in quirks)


def offer_no_hypercalls(entries: list[CpuidEntry], quirks: frozenset[str]) -> list[CpuidEntry]:
    """CPUID without KVM's features that need hypercalls, on hosts where hypercalls are only answered "no such".

    A Linux that is offered PV_SEND_IPI sends its IPIs that way and does not look at the answer.
    """
    if INT_QUIRK not in quirks:
        return entries
    return [
        msgspec.structs.replace(e, eax=e.eax & ~HYPERCALL_FEATURES) if e.function == KVM_FEATURES_LEAF else e
        for e in entries
    ]
