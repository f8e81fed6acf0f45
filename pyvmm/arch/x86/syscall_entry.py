"""Switches the syscall work-around on (native/syscall_entry.c does the work and tells the story)."""

from __future__ import annotations

from pyvmm.errors import HostError
from pyvmm.kvm.vcpu import Vcpu
from pyvmm.kvm.vm import Vm
from pyvmm.native import lib

MSR_LSTAR = 0xC0000082
MSR_FMASK = 0xC0000084

NEEDED = ("KVM_CAP_SYNC_REGS", "KVM_CAP_SET_GUEST_DEBUG", "KVM_CAP_X86_USER_SPACE_MSR", "KVM_CAP_X86_MSR_FILTER")


def prepare_vm(vm: Vm) -> None:
    """Before the first vCPU: have writes of LSTAR and FMASK come to user space, where they are noted."""
    for capability in NEEDED:
        if not vm.check_extension(capability):
            raise HostError(
                f"this host's KVM mishandles SYSCALL and lacks {capability}, which the work-around needs;"
                " guests without 64-bit system calls run with --quirks none"
            )
    vm.enable_cap("KVM_CAP_X86_USER_SPACE_MSR", lib.KVM_MSR_EXIT_REASON_FILTER)
    vm.set_msr_filter([(MSR_LSTAR, lib.KVM_MSR_FILTER_WRITE), (MSR_FMASK, lib.KVM_MSR_FILTER_WRITE)])


def prepare_vcpu(vcpu: Vcpu) -> None:
    """Also after a state load: the breakpoint is put where the loaded LSTAR and IDT say."""
    vcpu.enable_syscall_entry()
