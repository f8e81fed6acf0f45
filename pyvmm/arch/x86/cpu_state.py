"""All of a vCPU's architectural state, read and written in an order that matters.

Reading (paused vCPU only):

1. MP state first: reading it makes KVM act on a pending INIT or SIPI, which changes everything below.
2. Everything else; events after registers, so that a fault noted meanwhile by a read cannot slip between.

Writing:

1. CPUID is not here: the builder sets it before the first run, and MSRs, XCRs and CR4 are checked against it.
2. Special registers before the local APIC: they carry APIC_BASE, which decides whether the APIC is on at all.
3. XCRs before XSAVE: the area is checked against XCR0.
4. MSRs after the local APIC, because TSC_DEADLINE is ignored while the APIC timer is not in deadline mode.
5. General registers and events late, MP state last: it may start a vCPU that waits for SIPI.
"""

from __future__ import annotations

import msgspec

from pyvmm.errors import KvmError
from pyvmm.kvm.state import DebugRegs, Regs, Sregs, VcpuEvents
from pyvmm.kvm.vcpu import Vcpu

MSR_TSC = 0x10
MSR_TSC_DEADLINE = 0x6E0


class CpuState(msgspec.Struct, kw_only=True):
    """One vCPU as KVM exchanges it; blobs are the kernel's raw structures."""

    mp_state: int
    regs: Regs
    sregs: Sregs
    xcrs: dict[int, int]
    xsave: bytes
    debugregs: DebugRegs
    lapic: bytes
    msrs: dict[int, int]
    events: VcpuEvents


def readable_msrs(vcpu: Vcpu, indices: list[int]) -> list[int]:
    """Those of ``indices`` this vCPU can read.

    KVM lists MSRs by what the host could have, so some fail on a vCPU whose CPUID lacks the feature. Each
    round drops the one KVM stopped at.
    """
    left = list(indices)
    while left:
        try:
            vcpu.get_msrs(left)
            return left
        except KvmError as error:
            stopped = error.name.partition("MSR ")[2].rstrip(")")
            if not stopped:
                raise
            left.remove(int(stopped, 16))
    return left


def save_cpu(vcpu: Vcpu, msrs: list[int]) -> CpuState:
    """Everything :func:`load_cpu` needs; the vCPU is paused."""
    return CpuState(
        mp_state=vcpu.get_mp_state(),
        regs=vcpu.get_regs(),
        sregs=vcpu.get_sregs(),
        xcrs=vcpu.get_xcrs(),
        xsave=vcpu.get_xsave(),
        debugregs=vcpu.get_debugregs(),
        lapic=vcpu.get_lapic(),
        msrs=vcpu.get_msrs(msrs),
        events=vcpu.get_events(),
    )


def load_cpu(vcpu: Vcpu, state: CpuState) -> None:
    """Put a paused vCPU into ``state``. KvmError names the step the host refused."""
    vcpu.set_sregs(state.sregs)
    vcpu.set_xcrs(state.xcrs)
    vcpu.set_xsave(state.xsave)
    vcpu.set_debugregs(state.debugregs)
    vcpu.set_lapic(state.lapic)
    # The TSC runs on: setting it back would be seen by the other vCPUs, and some hosts ignore it anyway.
    late = {MSR_TSC_DEADLINE: state.msrs[MSR_TSC_DEADLINE]} if MSR_TSC_DEADLINE in state.msrs else {}
    vcpu.set_msrs({i: v for i, v in state.msrs.items() if i not in (MSR_TSC, MSR_TSC_DEADLINE)} | late)
    vcpu.set_regs(state.regs)
    vcpu.set_events(state.events)
    vcpu.set_mp_state(state.mp_state)
