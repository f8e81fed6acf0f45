"""The profile and the surroundings in words: each finding with what pyvmm does about it."""

from __future__ import annotations

import msgspec

from pyvmm.host.dirty_log import RING_FROM, ring_problem
from pyvmm.host.profile import (
    CPUID_SHOWS_THROUGH,
    EMULATED_CPL0,
    INSTRUCTION_FALLBACK,
    INT_ENTRY,
    SYSCALL_ENTRY,
    HostProfile,
    Speed,
)
from pyvmm.host.surroundings import Surroundings

KINDS = {
    "vmx": "Intel VMX",
    "svm": "AMD SVM",
    "pvm": "PVM (no hardware virtualization)",
    "unknown": "unknown",
}
_MODES = {
    "real16": "CPL 0, real mode",
    "prot32": "CPL 0, protected mode",
    "long64": "CPL 0, long mode",
    "user32": "CPL 3, 32-bit",
    "user64": "CPL 3, 64-bit",
}
_USES = {
    "coalesced_pio": ("serial output without an exit a byte", "serial output costs an exit a byte"),
    "manual_dirty_log_protect2": ("for clearing the dirty log in ranges", "the dirty log is cleared as a whole"),
    "dirty_log_ring": ("dirty tracking could be by ring", "dirty tracking by bitmap only"),
    "irqfd": ("for device interrupts by eventfd", "device interrupts by ioctl only"),
    "ioeventfd": ("for doorbells by eventfd", "doorbells are exits"),
    "signal_msi": ("for MSIs", "interrupt pins only"),
    "set_guest_debug": ("breakpoints without touching guest memory", "no breakpoints, no syscall work-around"),
    "x86_user_space_msr": ("MSR accesses can come to pyvmm", "no syscall work-around"),
    "x86_msr_filter": ("watches LSTAR and FMASK where SYSCALL is odd", "no syscall work-around"),
    "exit_on_emulation_failure": ("the fallback hears of every failure", "the fallback hears of those at CPL 0"),
    "immediate_exit": ("a vCPU is paused at an exact point", "cannot run guests"),
    "sync_regs": ("registers come with the exit", "no syscall work-around"),
    "guest_memfd": ("not used", "not used"),
    "tsc_deadline_timer": ("the guest's APIC timer takes deadlines", "the guest's APIC timer counts down"),
    "readonly_mem": ("for ROM", "no ROM"),
}


class Finding(msgspec.Struct, frozen=True):
    """One row of ``pyvmm doctor``."""

    what: str
    value: str
    action: str


def _yes_no(value: bool | None) -> str:
    return "unknown" if value is None else "yes" if value else "no"


def _speed(speed: Speed) -> str:
    rate = speed.instructions_per_second
    text = f"{rate / 1e9:.1f} G" if rate >= 1e9 else f"{rate / 1e6:.1f} M"
    return f"{text} instructions/s, {'emulated' if speed.emulated else 'native'}"


def _names(names: tuple[str, ...], most: int = 12) -> str:
    return " ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def profile_findings(profile: HostProfile) -> list[Finding]:
    """What KVM does here."""
    quirks = profile.quirks
    rows = [
        Finding(
            "kind of host",
            f"{KINDS[profile.kind]}{', nested' if profile.nested else ''}; Linux {profile.kernel}, {profile.cpu}",
            "adapts to what was measured, not to the name",
        )
    ]
    for mode, label in _MODES.items():
        if mode not in profile.speeds:
            rows.append(Finding(label, "unknown", "see the notes"))
            continue
        action = "nothing to do"
        if profile.speeds[mode].emulated:
            action = "use 64-bit userland" if mode == "user32" else "boots with as little CPL 0 work as possible"
        rows.append(Finding(label, _speed(profile.speeds[mode]), action))
    if profile.pio_exit_us is not None:
        value = f"{profile.pio_exit_us:.1f} µs in the native loop"
        if profile.pio_exit_python_us is not None:
            value += f", {profile.pio_exit_python_us:.1f} µs through Python"
        rows.append(Finding("cost of a port exit", value, "serves hot ports natively"))
    if profile.string_iteration_ns is not None:
        slow = profile.speeds["long64"].emulated if "long64" in profile.speeds else False
        action = "clearcpuid=erms,fsrm on Linux's command line" if slow else "nothing to do"
        rows.append(Finding("rep stosb at CPL 0", f"{profile.string_iteration_ns:.1f} ns an iteration", action))
    lacks, wrong = profile.emulator_lacks, profile.emulator_gets_wrong
    rows.append(
        Finding(
            "instructions KVM's emulator lacks",
            f"{len(lacks)} of {len(profile.instructions)}: {_names(lacks)}" if lacks else "none",
            f"carries them out itself (quirk {INSTRUCTION_FALLBACK})" if lacks else "nothing to do",
        )
    )
    if wrong:
        action = "nothing: no exit tells; CPL 0 code must do without"
        rows.append(Finding("instructions KVM gets wrong", _names(wrong), action))
    rows += [
        Finding(
            "syscall from CPL 3 reaches CPL 0",
            f"{_yes_no(profile.syscall_reaches_cpl0)} ({profile.syscall_observed})",
            f"completes it at the #PF handler (quirk {SYSCALL_ENTRY})" if SYSCALL_ENTRY in quirks else "nothing to do",
        ),
        Finding(
            "int 0x80 from CPL 3",
            ", ".join(f"{mode}: {found}" for mode, found in profile.int_observed.items()) or "unknown",
            f"takes it through its gate (quirk {INT_ENTRY})" if INT_ENTRY in quirks else "nothing to do",
        ),
        Finding("CPUID masking holds", *_masking(profile)),
        Finding(
            "guest TSC can be set",
            _yes_no(profile.guest_tsc_settable),
            "nothing to do" if profile.guest_tsc_settable else "lets Linux use kvm-clock; reads back every state write",
        ),
        Finding(
            "private memfd as guest memory",
            _yes_no(profile.private_memfd_works),
            "a COLO secondary can run on it" if profile.private_memfd_works else "no COLO secondary here",
        ),
    ]
    for name, (there, absent) in _USES.items():
        count = profile.capabilities.get(name, 0)
        rows.append(Finding(f"KVM_CAP_{name.upper()}", str(count) if count else "absent", there if count else absent))
    rows.append(_dirty_log(profile))
    rows.append(Finding("quirks", " ".join(quirks) or "none", "--quirks auto uses these" if quirks else "plain KVM"))
    if EMULATED_CPL0 in quirks and profile.kind in ("vmx", "svm"):
        rows.append(Finding("emulated CPL 0", "unexpected on this kind of host", "report it, with doctor --json"))
    rows += [Finding("note", note, "this probe came to no result") for note in profile.notes]
    return rows


def _dirty_log(profile: HostProfile) -> Finding:
    """What ``--dirty-log auto`` is."""
    paging = {True: "EPT or NPT", False: "shadowed page tables", None: "unknown paging"}[profile.two_dimensional_paging]
    problem = ring_problem(profile)
    if problem is None:
        return Finding("dirty tracking", f"{paging}: by bitmap or ring", f"ring from {RING_FROM >> 30} GiB of guest on")
    return Finding("dirty tracking", f"{paging}: by bitmap", problem)


def _masking(profile: HostProfile) -> tuple[str, str]:
    shown = profile.features_show_through
    if shown is None:
        return "unknown", "see the notes"
    if CPUID_SHOWS_THROUGH not in profile.quirks:
        return "yes", "nothing to do"
    counts = ", ".join(f"{len(names)} features show at {level.upper()}" for level, names in shown.items())
    return f"no: {counts}", "asks Linux not to use what CPL 0 cannot run (clearcpuid=)"


def surroundings_findings(around: Surroundings) -> list[Finding]:
    """What there is beside KVM."""
    gib = 1 << 30
    tap, namespace = around.tap == "yes", not around.network_namespace.startswith("no")
    return [
        Finding("/dev/kvm", around.kvm, "runs guests" if around.kvm == "yes" else "cannot run guests"),
        Finding("tap device", around.tap, "guests can have a network" if tap else "guests without a network"),
        Finding(
            "network namespace",
            around.network_namespace,
            "network tests run apart from this host's network" if namespace else "no network tests",
        ),
        Finding(
            "bridge",
            around.bridge,
            "pyvmm net up makes networks" if around.bridge == "yes" else "no networks by name; --net tap: or stream:",
        ),
        Finding(
            "nftables",
            around.nftables,
            "pyvmm net up --nat leads guests outside" if around.nftables == "yes" else "networks without --nat",
        ),
        Finding("memfd", around.memfd, "guest memory" if around.memfd == "yes" else "cannot run guests"),
        Finding("CPUs", str(around.cpus), "more vCPUs than that share them"),
        Finding(
            "memory",
            f"{around.memory_available / gib:.1f} GiB available of {around.memory_total / gib:.1f} GiB",
            "a guest takes its pages as it touches them",
        ),
        Finding("disk", f"{around.disk_free / gib:.1f} GiB free in {around.disk_path}", "overlays and caches"),
        Finding("open files", str(around.open_files), "nothing to do"),
    ]
