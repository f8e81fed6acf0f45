"""The probes: each runs micro guests and returns one finding. :func:`measure` puts them together.

Times are CPU time of the probing thread, which includes the guest's: other work on the host disturbs them less than
wall time. Each is the best of a few tries.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from typing import Final, TypeVar

import msgspec

from pyvmm.arch.x86.cpuid import has_feature, register
from pyvmm.arch.x86.cpuid_features import FEATURES
from pyvmm.errors import PyvmmError
from pyvmm.host import micro_guests
from pyvmm.host.kind import cpuinfo, read_kind, read_two_dimensional_paging
from pyvmm.host.micro_guests import COUNTDOWN, INSTRUCTIONS, Instruction
from pyvmm.host.probe_layout import CODE_CPL3, DATA, DATA_2, HLT, SYSCALL_STUB, USER_VECTOR, Mode
from pyvmm.host.probe_vm import End, Ending, ProbeVm
from pyvmm.host.profile import HostProfile, Speed, derive_quirks
from pyvmm.kvm.state import CpuidEntry, Regs
from pyvmm.kvm.system import System
from pyvmm.native import lib

T = TypeVar("T")

TRIES: Final = 3
EMULATED_BELOW: Final = 20_000_000
"""Instructions a second; judges only where KVM does not count emulated instructions."""
MSR_TSC: Final = 0x10
_USER_MODES: Final = (Mode.USER32, Mode.USER64)
PROBE_PORT: Final = 0x2F0  # nothing in the kernel answers here
FETCH_OF_USER: Final = 0x15
"""Page-fault error code: present, user, instruction fetch (SDM volume 3, 4.7)."""

CAPABILITIES: Final = (
    "IRQCHIP",
    "SPLIT_IRQCHIP",
    "PIT2",
    "IRQFD",
    "IRQFD_RESAMPLE",
    "IOEVENTFD",
    "SIGNAL_MSI",
    "COALESCED_MMIO",
    "COALESCED_PIO",
    "MANUAL_DIRTY_LOG_PROTECT2",
    "DIRTY_LOG_RING",
    "DIRTY_LOG_RING_ACQ_REL",
    "READONLY_MEM",
    "SET_GUEST_DEBUG",
    "X86_MSR_FILTER",
    "X86_USER_SPACE_MSR",
    "EXIT_ON_EMULATION_FAILURE",
    "IMMEDIATE_EXIT",
    "SYNC_REGS",
    "GUEST_MEMFD",
    "ADJUST_CLOCK",
    "TSC_CONTROL",
    "GET_TSC_KHZ",
    "TSC_DEADLINE_TIMER",
    "XSAVE",
    "XSAVE2",
    "XCRS",
    "DEBUGREGS",
    "VCPU_EVENTS",
    "MP_STATE",
    "EXCEPTION_PAYLOAD",
    "X86_TRIPLE_FAULT_EVENT",
    "X86_DISABLE_EXITS",
    "X86_SMM",
    "HYPERV",
    "XEN_HVM",
    "NESTED_STATE",
    "PMU_CAPABILITY",
    "BINARY_STATS_FD",
    "NR_VCPUS",
    "MAX_VCPUS",
    "MAX_VCPU_ID",
    "NR_MEMSLOTS",
)
"""Names after KVM_CAP_ that pyvmm uses or reports."""


def capabilities(system: System) -> dict[str, int]:
    """KVM_CHECK_EXTENSION of :data:`CAPABILITIES`."""
    return {name.lower(): system.check_extension(f"KVM_CAP_{name}") for name in CAPABILITIES}


def speed(probe: ProbeVm, mode: Mode) -> Speed:
    """Instructions per second of a countdown loop, and whether KVM emulated them."""
    rounds = 500
    before = probe.statistics().get("insn_emulation")
    seconds = _countdown(probe, mode, rounds)
    after = probe.statistics().get("insn_emulation")
    while seconds < 0.002 and rounds < 100_000_000:  # short: mostly entry and exit
        rounds *= 10
        seconds = _countdown(probe, mode, rounds)
    best = min(seconds, *(_countdown(probe, mode, rounds) for _ in range(TRIES - 1)))
    rate = int(2 * rounds / best)
    if before is None or after is None:
        return Speed(instructions_per_second=rate, emulated=rate < EMULATED_BELOW)
    return Speed(instructions_per_second=rate, emulated=after - before > 500)


def _countdown(probe: ProbeVm, mode: Mode, rounds: int) -> float:
    ending = probe.run(mode, COUNTDOWN[mode].code, Regs(rcx=rounds))
    if ending.end is not End.DONE:
        raise PyvmmError(f"the loop ended with {ending.text}")
    return max(ending.cpu_seconds, 1e-9)


def pio_exit_us(probe: ProbeVm, *, python: bool) -> float:
    """Microseconds of CPU time for a port read, the loop around it taken off."""
    rounds = 200
    lib.pv_vm_set_latch(probe.vm.native, PROBE_PORT, -1 if python else 0)
    best = min(_read_port(probe, rounds) for _ in range(TRIES))
    loop = min(_countdown(probe, Mode.LONG64, rounds) for _ in range(TRIES))
    return round(max(best - loop, 0.0) / rounds * 1e6, 2)


def _read_port(probe: ProbeVm, rounds: int) -> float:
    ending = probe.run(Mode.LONG64, micro_guests.READ_PORT.code, Regs(rcx=rounds, rdx=PROBE_PORT))
    if ending.end is not End.DONE:
        raise PyvmmError(f"the port reads ended with {ending.text}")
    return ending.cpu_seconds


def string_iteration_ns(probe: ProbeVm) -> float:
    """Nanoseconds of CPU time for one iteration of ``rep stosb`` at CPL 0."""

    def fill(size: int) -> float:
        ending = probe.run(Mode.LONG64, micro_guests.FILL.code, Regs(rcx=size, rdi=DATA))
        if ending.end is not End.DONE:
            raise PyvmmError(f"rep stosb ended with {ending.text}")
        return ending.cpu_seconds

    short, long = (min(fill(size) for _ in range(TRIES)) for size in (1, 4097))
    return round(max(long - short, 0.0) / 4096 * 1e9, 2)


def instruction(probe: ProbeVm, which: Instruction) -> str:
    """How one instruction ends at CPL 0 in long mode.

    ``works``, ``emulation-failure``, ``wrong-result`` (no exit tells the VMM, so no fallback can help),
    ``invalid-opcode`` (the CPU does not have it, or the guest's CPUID does not offer it), or another ending.
    """
    probe.memory.write(DATA, bytes(0x1000))
    ending = probe.run(Mode.LONG64, which.guest.code, Regs(rax=2, rbx=DATA, rcx=which.rcx, rdx=which.rdx))
    if ending.end is End.EMULATION_FAILURE:
        return "emulation-failure"
    if which.vector < 0:
        as_meant = ending.end is End.DONE
    else:
        as_meant = ending.end is End.EXCEPTION and ending.vector == which.vector
    if as_meant:
        return "works" if which.rax in (None, ending.regs.rax) else "wrong-result"
    if ending.end is End.EXCEPTION and ending.vector == 6:
        return "invalid-opcode"
    return ending.text


def syscall_entry(probe: ProbeVm) -> str:
    """What SYSCALL at CPL 3 does: ``reaches-cpl0``, ``fetch-fault-at-cpl3``, or an ending.

    ``fetch-fault-at-cpl3``: RIP is LSTAR, RCX and R11 are as SYSCALL leaves them, but the fetch there was made at
    CPL 3, so the guest's #PF handler runs (error code 0x15: present, user, fetch).
    """
    ending = probe.run(Mode.USER64, micro_guests.SYSCALL.code)
    back = CODE_CPL3 + len(micro_guests.SYSCALL.code)
    if ending.end is End.SYSCALL:
        return "reaches-cpl0" if ending.regs.rcx == back else f"reaches-cpl0 with RCX {ending.regs.rcx:#x}"
    if (
        (ending.end, ending.vector, ending.error_code) == (End.EXCEPTION, 14, FETCH_OF_USER)
        and ending.frame_rip == ending.cr2 == SYSCALL_STUB
        and ending.frame_cs & 3 == 3
        and ending.regs.rcx == back
    ):
        return "fetch-fault-at-cpl3"
    return ending.text


def sysret(probe: ProbeVm) -> bool:
    """Whether SYSRET at CPL 0 arrives at CPL 3 (where a HLT waits, that is #GP)."""
    probe.memory.write(CODE_CPL3, HLT)
    ending = probe.run(Mode.LONG64, micro_guests.SYSRET.code, Regs(rcx=CODE_CPL3, r11=2))
    return (ending.end, ending.vector, ending.frame_rip) == (End.EXCEPTION, 13, CODE_CPL3) and ending.frame_cs & 3 == 3


def int_from_cpl3(probe: ProbeVm, mode: Mode) -> str:
    """What INT 0x80 at CPL 3 does: ``reaches-gate``, ``invalid-opcode`` (which INT n never raises), or an ending."""
    ending = probe.run(mode, micro_guests.INT_80[mode].code)
    if (ending.end, ending.vector) == (End.EXCEPTION, USER_VECTOR):
        return "reaches-gate"
    if (ending.end, ending.vector, ending.frame_rip) == (End.EXCEPTION, 6, CODE_CPL3) and ending.frame_cs & 3 == 3:
        return "invalid-opcode"
    return ending.text


_NEEDED_BY_THE_PROBE: Final = frozenset(
    {"lm", "nx", "syscall", "pae", "pse", "pge", "fxsr", "sse", "sse2", "fpu", "msr", "tsc", "cx8", "cmov", "pat"}
)
_CHANGED_BY_KVM: Final = frozenset({"apic", "monitor", "tsc_deadline_timer"})
"""Bits KVM itself sets by the vCPU's state (api.rst, 4.46; arch/x86/kvm/cpuid.c)."""


def features_show_through(system: System) -> dict[str, tuple[str, ...]]:
    """Hide every feature the probe can do without, and list those the guest still sees, per privilege level."""
    given = [msgspec.structs.replace(entry) for entry in system.supported_cpuid()]
    leaves = {(entry.function, entry.index): entry for entry in given}
    for name, feature in FEATURES.items():
        entry = leaves.get((feature.function, feature.subleaf))
        if entry is not None and name not in _NEEDED_BY_THE_PROBE:
            setattr(entry, feature.register, register(entry, feature.register) & ~(1 << feature.bit))
    with ProbeVm(system, cpuid=given) as probe:
        return {
            "cpl0": _unexpected(_guest_leaves(probe, Mode.LONG64, given), given),
            "cpl3": _unexpected(_guest_leaves(probe, Mode.USER64, given), given),
        }


def _guest_leaves(probe: ProbeVm, mode: Mode, given: list[CpuidEntry]) -> list[CpuidEntry]:
    seen = []
    highest = {entry.function: entry.eax for entry in given if entry.function in (0, 0x80000000)}
    for function, index in sorted({(f.function, f.subleaf) for f in FEATURES.values()}):
        if function > highest.get(function & 0x80000000, 0):
            continue  # Intel answers a leaf beyond the last with the last one's content
        ending = probe.run(mode, micro_guests.CPUID.code, Regs(rax=function, rcx=index))
        if ending.end is not End.DONE:
            raise PyvmmError(f"CPUID leaf {function:#x} ended with {ending.text}")
        answer = (value & 0xFFFFFFFF for value in (ending.regs.rax, ending.regs.rbx, ending.regs.rcx, ending.regs.rdx))
        seen.append(CpuidEntry(function, index, 1, *answer))
    return seen


def _unexpected(seen: list[CpuidEntry], given: list[CpuidEntry]) -> tuple[str, ...]:
    names = FEATURES.keys() - _CHANGED_BY_KVM
    return tuple(sorted(name for name in names if has_feature(seen, name) and not has_feature(given, name)))


def guest_tsc_settable(probe: ProbeVm) -> bool:
    """Whether a TSC set with KVM_SET_MSRS is what the guest then reads at CPL 0 and CPL 3, and KVM_GET_MSRS too."""
    leap = 1 << 44  # hours ahead of anything that passes meanwhile; KVM takes small steps for synchronization
    vcpu = probe.vcpu
    target = vcpu.get_msrs([MSR_TSC])[MSR_TSC] + leap
    vcpu.set_msrs({MSR_TSC: target})
    readings = [vcpu.get_msrs([MSR_TSC])[MSR_TSC]]
    for mode in (Mode.LONG64, Mode.USER64):
        ending = probe.run(mode, micro_guests.READ_TSC.code)
        if ending.end is not End.DONE:
            raise PyvmmError(f"rdtsc ended with {ending.text}")
        readings.append((ending.regs.rdx & 0xFFFFFFFF) << 32 | ending.regs.rax & 0xFFFFFFFF)
    return all(target <= reading < target + leap // 2 for reading in readings)


def private_memfd(system: System) -> bool:
    """Whether a memslot over a MAP_PRIVATE mapping of a memfd does what COLO's secondary needs, at CPL 0 and CPL 3.

    A page the guest has written is its own and leaves the memfd alone; one it has only read follows ``pwrite`` to
    the memfd; and MADV_DONTNEED brings the memfd's content back to a written one.
    """
    return all(memfd_follows(system, mode, private=True) for mode in (Mode.LONG64, Mode.USER64))


def memfd_follows(system: System, mode: Mode, *, private: bool) -> bool:
    """The checks of :func:`private_memfd` in one mode; over a shared mapping they must fail."""
    with ProbeVm(system, private=private) as probe:
        region = probe.region

        def load(at: int) -> int:
            return _move_byte(probe, mode, micro_guests.LOAD_BYTE.code, at, 0) & 0xFF

        for at, value in ((DATA, 0x11), (DATA_2, 0x22)):
            os.pwrite(region.fd, bytes([value]), at)
        if (load(DATA), load(DATA_2)) != (0x11, 0x22):
            return False
        _move_byte(probe, mode, micro_guests.STORE_BYTE.code, DATA, 0x77)
        if os.pread(region.fd, 1, DATA) != b"\x11":
            return False
        os.pwrite(region.fd, b"\x33", DATA_2)
        os.pwrite(region.fd, b"\x44", DATA)
        if (load(DATA), load(DATA_2)) != (0x77, 0x33):
            return False
        region.drop_private_pages(DATA, 0x1000)
        return load(DATA) == 0x44


def _move_byte(probe: ProbeVm, mode: Mode, code: bytes, at: int, value: int) -> int:
    ending = probe.run(mode, code, Regs(rax=value, rbx=at))
    if ending.end is not End.DONE:
        raise PyvmmError(f"a byte moved at {at:#x} ended with {ending.text}")
    return ending.regs.rax


def measure(system: System) -> HostProfile:
    """Run every probe. One that fails leaves ``None`` (or nothing) and a note; KvmError when no VM can be made."""
    notes: list[str] = []
    first: Ending | None = None

    def attempt(what: str, probing: Callable[[], T]) -> T | None:
        if first is None or first.end is not End.DONE:
            return None  # nothing runs here: one note is enough, and each probe would only wait for its deadline
        try:
            return probing()
        except PyvmmError as error:
            notes.append(f"{what}: {error}")
            return None

    kind = read_kind()
    with ProbeVm(system) as probe:
        first = probe.run(Mode.LONG64, CODE_NOTHING)
        if first.end is not End.DONE:
            notes.append(f"long mode: an empty guest ended with {first.text}")
        measured = {mode.value: attempt(f"speed of {mode.value}", partial(speed, probe, mode)) for mode in Mode}
        speeds = {mode: found for mode, found in measured.items() if found is not None}
        tried = {each.name: attempt(each.name, partial(instruction, probe, each)) for each in INSTRUCTIONS}
        instructions = {name: found for name, found in tried.items() if found is not None}
        syscall_observed = attempt("syscall", lambda: syscall_entry(probe)) or "unknown"
        called = {m.value: attempt(f"int from {m.value}", partial(int_from_cpl3, probe, m)) for m in _USER_MODES}
        int_observed = {mode: found for mode, found in called.items() if found is not None}
        shown = attempt("CPUID masking", lambda: features_show_through(system))
        return HostProfile(
            kind=kind.kind,
            nested=kind.nested,
            evidence=(*kind.evidence, _cpl0_evidence(speeds)),
            kernel=os.uname().release,
            cpu=cpuinfo("model name"),
            guests_run=first.end is End.DONE,
            speeds=speeds,
            pio_exit_us=attempt("port exit", lambda: pio_exit_us(probe, python=False)),
            pio_exit_python_us=attempt("port exit in Python", lambda: pio_exit_us(probe, python=True)),
            string_iteration_ns=attempt("rep stosb", lambda: string_iteration_ns(probe)),
            instructions=instructions,
            syscall_reaches_cpl0=None if syscall_observed == "unknown" else syscall_observed == "reaches-cpl0",
            syscall_observed=syscall_observed,
            sysret_works=attempt("sysret", lambda: sysret(probe)),
            int_observed=int_observed,
            features_show_through=shown,
            two_dimensional_paging=read_two_dimensional_paging(kind.kind),
            guest_tsc_settable=attempt("guest TSC", lambda: guest_tsc_settable(probe)),
            private_memfd_works=attempt("private memfd", lambda: private_memfd(system)),
            capabilities=capabilities(system),
            quirks=derive_quirks(
                speeds=speeds,
                instructions=instructions,
                syscall_observed=syscall_observed,
                int_observed=int_observed,
                features_show_through=shown,
            ),
            notes=tuple(notes),
        )


CODE_NOTHING: Final = b""
"""Only the HLT that follows every micro guest."""


def _cpl0_evidence(speeds: dict[str, Speed]) -> str:
    if "long64" not in speeds:
        return "behaviour of CPL 0 unknown"
    if speeds["long64"].emulated:
        return "behaviour: CPL 0 runs in KVM's instruction emulator"
    return "behaviour: CPL 0 runs on the CPU"
