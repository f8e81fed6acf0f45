"""What CPUID answers in the guest: KVM's supported leaves, patched per vCPU.

KVM_GET_SUPPORTED_CPUID describes features, but its topology is that of whichever host CPU ran the ioctl
(its APIC ID, its core counts). The guest's is one package of ``cpus`` cores with one thread each, and APIC
IDs 0 to ``cpus - 1``. Every leaf that speaks of topology must agree, or Linux disbelieves all of them.

Sources: Intel SDM volume 2A, CPUID, leaves 1 (initial APIC ID), 4, 0BH, 1FH; AMD APM volume 3, appendix E, functions
1, 8000_0001h (CmpLegacy), 8000_0008h, 8000_001Dh, 8000_001Eh, 8000_0026h; Linux Documentation/virt/kvm/api.rst, 4.46
(the TSC-deadline bit is told by KVM_CAP_TSC_DEADLINE_TIMER, whatever the list says) and x86/cpuid.rst (KVM's own
leaves, which stay as KVM gives them, the kvm-clock stable bit among them).
"""

from __future__ import annotations

from typing import Final

import msgspec

from pyvmm.arch.x86.cpuid_features import FEATURES, Register
from pyvmm.errors import ConfigError
from pyvmm.kvm.state import CpuidEntry

MAX_CPUS: Final = 255
"""APIC ID 255 is the broadcast in xAPIC mode."""

SIGNIFICANT_INDEX: Final = 1
"""KVM_CPUID_FLAG_SIGNIFCANT_INDEX: the entry answers for its ECX only."""

_INTEL: Final = frozenset({b"GenuineIntel", b"CentaurHauls", b"  Shanghai  "})
_AMD: Final = frozenset({b"AuthenticAMD", b"HygonGenuine"})
_LEVEL_THREAD, _LEVEL_CORE = 1, 2  # leaves 0BH and 1FH
_AMD_LEVEL_CORE, _AMD_LEVEL_SOCKET = 1, 4  # leaf 8000_0026h
_TOPOLOGY_LEAVES: Final = (0xB, 0x1F, 0x80000026)


def guest_cpuid(
    supported: list[CpuidEntry],
    *,
    apic_id: int,
    cpus: int,
    hide: frozenset[str] = frozenset(),
    tsc_deadline: bool = False,
) -> list[CpuidEntry]:
    """``supported`` (System.supported_cpuid) as vCPU ``apic_id`` of ``cpus`` shall see it; the input is not changed.

    ``hide`` clears features by the names of /proc/cpuinfo (:data:`~pyvmm.arch.x86.cpuid_features.FEATURES`); whether
    the guest is held to it depends on the host (quirk ``cpuid-shows-through``). ``tsc_deadline``: whether
    KVM_CAP_TSC_DEADLINE_TIMER is there and the local APIC is in the kernel.

    ConfigError: unknown feature name, or more CPUs than xAPIC IDs. ValueError: an APIC ID that is no vCPU's.
    """
    if not 1 <= cpus <= MAX_CPUS:
        raise ConfigError(f"{cpus} CPUs: between 1 and {MAX_CPUS} are possible (xAPIC has 8-bit IDs)")
    if not 0 <= apic_id < cpus:
        raise ValueError(f"APIC ID {apic_id} with {cpus} CPUs")
    unknown = hide - FEATURES.keys()
    if unknown:
        raise ConfigError(f"unknown CPU feature {', '.join(sorted(unknown))}: use the names of /proc/cpuinfo")
    vendor = vendor_of(supported)
    entries = [msgspec.structs.replace(entry) for entry in supported if entry.function not in _TOPOLOGY_LEAVES]
    for entry in entries:
        _patch_features(entry, tsc_deadline)
        _patch_counts(entry, apic_id, cpus)
        if vendor in _AMD:
            _patch_amd(entry, apic_id, cpus)
        else:
            _patch_intel(entry, cpus)
    for name in hide:
        _clear(entries, name)
    return entries + _topology(supported, apic_id, cpus)


def vendor_of(entries: list[CpuidEntry]) -> bytes:
    """The 12 bytes of leaf 0 (``AuthenticAMD``); empty without leaf 0."""
    for entry in entries:
        if entry.function == 0:
            return b"".join(word.to_bytes(4, "little") for word in (entry.ebx, entry.edx, entry.ecx))
    return b""


def has_feature(entries: list[CpuidEntry], name: str) -> bool:
    """Whether the list offers feature ``name`` (ConfigError if there is no such name)."""
    if name not in FEATURES:
        raise ConfigError(f"unknown CPU feature {name}: use the names of /proc/cpuinfo")
    feature = FEATURES[name]
    for entry in entries:
        if (entry.function, entry.index) == (feature.function, feature.subleaf):
            return bool(register(entry, feature.register) >> feature.bit & 1)
    return False


def register(entry: CpuidEntry, which: Register) -> int:
    """One of the four registers of an entry."""
    return int(getattr(entry, which))


def _clear(entries: list[CpuidEntry], name: str) -> None:
    feature = FEATURES[name]
    for entry in entries:
        if (entry.function, entry.index) == (feature.function, feature.subleaf):
            setattr(entry, feature.register, register(entry, feature.register) & ~(1 << feature.bit))


def _id_bits(cpus: int) -> int:
    """Bits an APIC ID needs: ceil(log2(cpus))."""
    return (cpus - 1).bit_length()


def _field(value: int, high: int, low: int, field: int) -> int:
    """``value`` with bits ``high``..``low`` set to ``field``, which is cut to fit."""
    mask = (1 << (high - low + 1)) - 1
    return value & ~(mask << low) | (field & mask) << low


def _patch_features(entry: CpuidEntry, tsc_deadline: bool) -> None:
    if entry.function == 1:
        entry.ecx = _field(entry.ecx, 31, 31, 1)  # hypervisor present: Linux looks for KVM's leaves only then
        entry.ecx = _field(entry.ecx, 24, 24, int(tsc_deadline))


def _patch_counts(entry: CpuidEntry, apic_id: int, cpus: int) -> None:
    """Leaf 1: initial APIC ID, addressable IDs in the package (meaningful only with HTT)."""
    if entry.function == 1:
        entry.ebx = _field(entry.ebx, 31, 24, apic_id)
        entry.ebx = _field(entry.ebx, 23, 16, cpus)
        entry.edx = _field(entry.edx, 28, 28, int(cpus > 1))


def _patch_intel(entry: CpuidEntry, cpus: int) -> None:
    """Leaf 4: IDs sharing the cache (the third level: all, else one core), and core IDs in the package, minus one."""
    if entry.function != 4 or not entry.eax & 0x1F:
        return
    ids = (1 << _id_bits(cpus)) - 1
    level = entry.eax >> 5 & 7
    entry.eax = _field(entry.eax, 25, 14, ids if level >= 3 else 0)
    entry.eax = _field(entry.eax, 31, 26, min(ids, 63))


def _patch_amd(entry: CpuidEntry, apic_id: int, cpus: int) -> None:
    if entry.function == 0x80000001:
        entry.ecx = _field(entry.ecx, 1, 1, int(cpus > 1))  # CmpLegacy: the logical CPUs of leaf 1 are cores
    elif entry.function == 0x80000008:
        entry.ecx = _field(entry.ecx, 7, 0, cpus - 1)
        entry.ecx = _field(entry.ecx, 15, 12, _id_bits(cpus))
    elif entry.function == 0x8000001D and entry.eax & 0x1F:
        level = entry.eax >> 5 & 7
        entry.eax = _field(entry.eax, 25, 14, cpus - 1 if level >= 3 else 0)
    elif entry.function == 0x8000001E:
        entry.eax = apic_id
        entry.ebx = _field(entry.ebx, 15, 0, apic_id & 0xFF)  # core ID; one thread per core
        entry.ecx = _field(entry.ecx, 10, 0, 0)  # node 0 of one


def _topology(supported: list[CpuidEntry], apic_id: int, cpus: int) -> list[CpuidEntry]:
    """Leaves that list levels of topology, for each of them that lies within the maximum leaf of its range."""
    most = {entry.function: entry.eax for entry in supported if entry.function in (0, 0x80000000)}
    bits = _id_bits(cpus)
    entries = []
    for leaf in _TOPOLOGY_LEAVES:
        if most.get(leaf & 0x80000000, 0) < leaf:
            continue
        first, second = (_AMD_LEVEL_CORE, _AMD_LEVEL_SOCKET) if leaf >> 31 else (_LEVEL_THREAD, _LEVEL_CORE)
        # (bits to shift the ID by to get that of the next level, logical CPUs at this level, kind of level)
        levels = ((0, 1, first), (bits, cpus, second), (0, 0, 0))
        for index, (shift, count, kind) in enumerate(levels):
            entries.append(CpuidEntry(leaf, index, SIGNIFICANT_INDEX, shift, count, kind << 8 | index, apic_id))
    return entries
