"""All of a vCPU's architectural state, read and written in an order that matters.

Reading (paused vCPU only):

1. MP state first: reading it makes KVM act on a pending INIT or SIPI, which changes everything below.
2. Everything else; events after registers, so that a fault noted meanwhile by a read cannot slip between.

Writing:

1. CPUID is not here: the builder sets it before the first run, and MSRs, XCRs and CR4 are checked against it.
2. Special registers before the local APIC: they carry APIC_BASE, which decides whether the APIC is on at all.
3. XCRs before XSAVE: the area is checked against XCR0.
4. The TSC before the MSRs, when it is to go on from the saved one: TSC_DEADLINE is a time of it.
5. MSRs after the local APIC, because TSC_DEADLINE is ignored while the APIC timer is not in deadline mode.
6. General registers and events late, MP state last: it may start a vCPU that waits for SIPI.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated

import msgspec
from msgspec import Meta

from pyvmm.errors import KvmError
from pyvmm.kvm.state import U32, U64, CpuidEntry, DebugRegs, Regs, Sregs, VcpuEvents
from pyvmm.kvm.vcpu import Vcpu

MSR_TSC = 0x10
MSR_TSC_DEADLINE = 0x6E0
MSR_MTRR_CAP = 0xFE
MSR_MCG_CAP = 0x179

# Intel SDM volume 3, 12.11 (MTRRs): default type, fixed ranges, then base and mask of each variable one.
_MTRRS = (0x2FF, 0x250, 0x258, 0x259, *range(0x268, 0x270))
_MTRR_VARIABLE = 0x200
_MTRR_PAIRS_MAX = 8
# Same, 17.3.2 (machine check): CTL, STATUS, ADDR and MISC of each bank.
_MC_BANK = 0x400
_MC_BANKS_MAX = 32


class CpuState(msgspec.Struct, kw_only=True):
    """One vCPU as KVM exchanges it; blobs are the kernel's raw structures."""

    mp_state: Annotated[int, Meta(ge=0, le=10)]
    regs: Regs
    sregs: Sregs
    xcrs: Annotated[dict[U32, U64], Meta(max_length=16)]
    xsave: Annotated[bytes, Meta(min_length=4096, max_length=4096)]
    debugregs: DebugRegs
    lapic: Annotated[bytes, Meta(min_length=1024, max_length=1024)]
    msrs: Annotated[dict[U32, U64], Meta(max_length=1024)]
    events: VcpuEvents
    tsc_offset: U64 | None
    """What KVM adds to the host's TSC; the difference between two vCPUs' is what counts elsewhere."""


def state_msrs(vcpu: Vcpu, listed: Iterable[int]) -> list[int]:
    """The MSRs that are this vCPU's state: those of ``listed`` (System.msr_indices) that it can read, and those that
    its CPUID implies and KVM's list leaves out: MTRRs and machine-check banks.
    """
    features = next((e.edx for e in vcpu.cpuid if e.function == 1), 0)
    found = dict.fromkeys(readable_msrs(vcpu, list(listed)))
    if features >> 12 & 1:
        pairs = min(_read(vcpu, MSR_MTRR_CAP) & 0xFF, _MTRR_PAIRS_MAX)
        found |= dict.fromkeys(readable_msrs(vcpu, [*_MTRRS, *range(_MTRR_VARIABLE, _MTRR_VARIABLE + 2 * pairs)]))
    if features >> 14 & 1:
        banks = min(_read(vcpu, MSR_MCG_CAP) & 0xFF, _MC_BANKS_MAX)
        found |= dict.fromkeys(readable_msrs(vcpu, list(range(_MC_BANK, _MC_BANK + 4 * banks))))
    return list(found)


def _read(vcpu: Vcpu, index: int) -> int:
    return vcpu.get_msrs([index])[index] if readable_msrs(vcpu, [index]) else 0


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
        tsc_offset=vcpu.get_tsc_offset(),
    )


def load_cpu(vcpu: Vcpu, state: CpuState, *, deadline_shift: int = 0) -> None:
    """Put a paused vCPU into ``state``. KvmError names the step the host refused.

    The TSC runs on (:func:`load_tscs` sets it, before this). ``deadline_shift``: what its value is ahead of the saved
    one, so that a deadline stays as far away as it was.
    """
    vcpu.set_sregs(state.sregs)
    vcpu.set_xcrs(state.xcrs)
    vcpu.set_xsave(state.xsave)
    vcpu.set_debugregs(state.debugregs)
    vcpu.set_lapic(state.lapic)
    deadline = state.msrs.get(MSR_TSC_DEADLINE, 0)
    if deadline:
        deadline = max(deadline + deadline_shift, 1)  # 0 would be none
    late = {MSR_TSC_DEADLINE: deadline} if MSR_TSC_DEADLINE in state.msrs else {}
    vcpu.set_msrs({i: v for i, v in state.msrs.items() if i not in (MSR_TSC, MSR_TSC_DEADLINE)} | late)
    vcpu.set_regs(state.regs)
    vcpu.set_events(state.events)
    vcpu.set_mp_state(state.mp_state)


def load_tscs(vcpus: list[Vcpu], states: list[CpuState]) -> int:
    """Have the TSCs go on from the saved ones, as far apart as they were. Before :func:`load_cpu`, no vCPU running.

    Some hosts accept a new offset and ignore it, so the result is read back: it is how many cycles vCPU 0's TSC is
    ahead of the saved one after all; less than a second's worth if the host complied. Where it does not, guests are to
    keep time by kvm-clock.
    """
    saved = states[0].msrs.get(MSR_TSC)
    if saved is None:
        return 0
    first, here = vcpus[0], vcpus[0].get_tsc_offset()
    if here is not None:
        base = here + saved - first.get_msrs([MSR_TSC])[MSR_TSC]
        for vcpu, state in zip(vcpus, states, strict=True):
            vcpu.set_tsc_offset(base + ((state.tsc_offset or 0) - (states[0].tsc_offset or 0)))
    else:
        # Without offsets: KVM takes values written within a second of each other for the same time.
        for vcpu in vcpus:
            vcpu.set_msrs({MSR_TSC: saved})
    return first.get_msrs([MSR_TSC])[MSR_TSC] - saved


# What need not read back as it was written, with the reason.
RUNNING_MSRS = {
    MSR_TSC: "runs on",
    MSR_TSC_DEADLINE: "moved with the TSC; 0 once it has fired",
    0x3B: "TSC_ADJUST: KVM adapts it to a new offset",
    0x40000010: "HV_X64_MSR_VP_RUNTIME: the vCPU's own time runs on; KVM lists it for guests without Hyper-V, too",
    0x40000020: "HV_X64_MSR_TIME_REF_COUNT: likewise, 100 ns units since the VM was made",
}
_LAPIC_CURRENT_COUNT = slice(0x390, 0x394)
_LAPIC_IRR = range(0x200, 0x280)


def differences(wanted: CpuState, found: CpuState) -> list[str]:
    """Names of what ``found``, read back after loading ``wanted``, has otherwise although nothing has run since.

    Left out is what has reason to differ: :data:`RUNNING_MSRS`; the timer's current count in the local APIC, which
    runs; interrupts requested meanwhile (IRR may gain bits, not lose them).
    """
    names = [
        f"{part}.{field}"
        for part in ("regs", "sregs", "debugregs", "events")
        for field in getattr(wanted, part).__struct_fields__
        if getattr(getattr(wanted, part), field) != getattr(getattr(found, part), field)
    ]
    names += [name for name in ("mp_state", "xcrs", "xsave") if getattr(wanted, name) != getattr(found, name)]
    names += [
        f"MSR {index:#x}"
        for index, value in wanted.msrs.items()
        if index not in RUNNING_MSRS and found.msrs.get(index) != value
    ]
    if any(wanted.lapic[i] & ~found.lapic[i] for i in _LAPIC_IRR):
        names.append("lapic IRR")
    if _steady(wanted.lapic) != _steady(found.lapic):
        names.append("lapic")
    return names


def _steady(lapic: bytes) -> bytes:
    steady = bytearray(lapic)
    steady[_LAPIC_CURRENT_COUNT] = bytes(4)
    for index in _LAPIC_IRR:
        steady[index] = 0
    return bytes(steady)


def cpuid_differences(wanted: Iterable[CpuidEntry], found: Iterable[CpuidEntry]) -> list[str]:
    """Where two CPUID tables differ, one line for each register: names for people, who must find the other host."""
    there = {(e.function, e.index): e for e in found}
    lines = []
    for entry in wanted:
        other = there.pop((entry.function, entry.index), CpuidEntry(entry.function, entry.index, 0, 0, 0, 0, 0))
        for name in ("eax", "ebx", "ecx", "edx"):
            had, has = getattr(entry, name), getattr(other, name)
            if had != has:
                lines.append(f"CPUID {entry.function:#x}.{entry.index} {name}: {had:#x}, here {has:#x}")
    lines += [f"CPUID {function:#x}.{index}: not there, here it is" for function, index in there]
    return lines
