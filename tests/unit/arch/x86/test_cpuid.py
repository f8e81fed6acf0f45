"""CPUID patching: every leaf that speaks of topology agrees, and nothing else changes."""

from __future__ import annotations

import copy

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pyvmm.arch.x86.cpuid import MAX_CPUS, guest_cpuid, has_feature, register, vendor_of
from pyvmm.arch.x86.cpuid_features import FEATURES
from pyvmm.errors import ConfigError
from pyvmm.kvm.state import CpuidEntry

VENDORS = {"amd": b"AuthenticAMD", "intel": b"GenuineIntel"}
WORDS = st.integers(0, 0xFFFFFFFF)


def leaf(entries: list[CpuidEntry], function: int, index: int = 0) -> CpuidEntry:
    found = [e for e in entries if (e.function, e.index) == (function, index)]
    assert len(found) == 1, f"leaf {function:#x}.{index}: {len(found)} entries"
    return found[0]


@st.composite
def supported_lists(draw: st.DrawFn, vendor: str | None = None) -> list[CpuidEntry]:
    """What KVM_GET_SUPPORTED_CPUID could say on some host: any values, the structure of a real list."""
    name = VENDORS[vendor or draw(st.sampled_from(sorted(VENDORS)))]
    ebx, edx, ecx = (int.from_bytes(name[i : i + 4], "little") for i in (0, 4, 8))
    entries = [
        CpuidEntry(0, 0, 0, draw(st.integers(0x7, 0x24)), ebx, ecx, edx),
        CpuidEntry(0x80000000, 0, 0, 0x80000000 | draw(st.integers(8, 0x28)), ebx, ecx, edx),
    ]

    def words() -> list[int]:
        return [draw(WORDS) for _ in range(4)]

    for function in (1, 6, 0x80000001, 0x80000008, 0x8000001E, 0x40000000, 0x40000001):
        entries.append(CpuidEntry(function, 0, 0, *words()))
    for function in (4, 7, 0xB, 0xD, 0x1F, 0x8000001D, 0x80000026):
        entries += [CpuidEntry(function, i, 1, *words()) for i in range(draw(st.integers(0, 3)))]
    return entries


CPUS = st.integers(1, MAX_CPUS)


@settings(max_examples=60, deadline=None)
@given(supported_lists(), CPUS, st.data())
def test_every_source_of_an_apic_id_agrees(supported: list[CpuidEntry], cpus: int, data: st.DataObject) -> None:
    apic_id = data.draw(st.integers(0, cpus - 1))
    before = copy.deepcopy(supported)
    entries = guest_cpuid(supported, apic_id=apic_id, cpus=cpus)
    assert supported == before
    keys = [(e.function, e.index) for e in entries]
    assert len(keys) == len(set(keys))
    assert all(0 <= register(e, r) <= 0xFFFFFFFF for e in entries for r in ("eax", "ebx", "ecx", "edx"))

    assert leaf(entries, 1).ebx >> 24 == apic_id
    for function in (0xB, 0x1F, 0x80000026):
        highest = leaf(entries, function & 0x80000000).eax
        levels = [e for e in entries if e.function == function]
        assert bool(levels) == (highest >= function)
        assert all(e.edx == apic_id and e.ecx & 0xFF == e.index for e in levels)
    if vendor_of(entries) == VENDORS["amd"]:
        assert leaf(entries, 0x8000001E).eax == apic_id
        assert leaf(entries, 0x8000001E).ebx & 0xFFFF == apic_id  # core ID, and no second thread


@settings(max_examples=40, deadline=None)
@given(supported_lists(), CPUS)
def test_a_reader_of_leaf_0b_finds_one_package_of_single_threaded_cores(
    supported: list[CpuidEntry], cpus: int
) -> None:
    """Leaf 0BH read as the SDM tells software to (volume 3, multiple-processor management): shift by each width."""
    supported[0].eax = max(supported[0].eax, 0x1F)
    for function in (0xB, 0x1F):
        packages, cores = set(), set()
        for apic_id in range(cpus):
            entries = guest_cpuid(supported, apic_id=apic_id, cpus=cpus)
            thread, core, end = (leaf(entries, function, index) for index in range(3))
            assert (thread.ecx >> 8, core.ecx >> 8, end.ecx >> 8) == (1, 2, 0)
            assert (thread.ebx, core.ebx, end.ebx) == (1, cpus, 0)
            packages.add(thread.edx >> core.eax)
            cores.add(thread.edx >> thread.eax)
        assert packages == {0}
        assert len(cores) == cpus


@settings(max_examples=60, deadline=None)
@given(supported_lists("amd"), CPUS)
def test_amd_counts(supported: list[CpuidEntry], cpus: int) -> None:
    entries = guest_cpuid(supported, apic_id=0, cpus=cpus)
    sizes = leaf(entries, 0x80000008)
    assert (sizes.ecx & 0xFF) + 1 == cpus
    width = sizes.ecx >> 12 & 0xF
    assert 1 << width >= cpus
    assert width == 0 or 1 << (width - 1) < cpus
    assert sizes.ecx & ~0xF0FF == leaf(supported, 0x80000008).ecx & ~0xF0FF
    assert leaf(entries, 0x80000001).ecx >> 1 & 1 == (cpus > 1)
    assert leaf(entries, 0x8000001E).ecx & 0x7FF == 0
    for entry in entries:
        if entry.function == 0x8000001D and entry.eax & 0x1F:
            sharing = (entry.eax >> 14 & 0xFFF) + 1
            assert sharing == (cpus if entry.eax >> 5 & 7 >= 3 else 1)


@settings(max_examples=60, deadline=None)
@given(supported_lists("intel"), CPUS)
def test_intel_counts(supported: list[CpuidEntry], cpus: int) -> None:
    entries = guest_cpuid(supported, apic_id=0, cpus=cpus)
    for entry in entries:
        if entry.function == 4 and entry.eax & 0x1F:
            core_ids = (entry.eax >> 26) + 1
            assert core_ids == 64 or core_ids >= cpus
            sharing = (entry.eax >> 14 & 0xFFF) + 1
            assert sharing >= cpus if entry.eax >> 5 & 7 >= 3 else sharing == 1
    for function in (0x80000001, 0x80000008, 0x8000001E):  # AMD's own: none of our business here
        assert leaf(entries, function) == leaf(supported, function)


@settings(max_examples=60, deadline=None)
@given(supported_lists(), CPUS)
def test_nothing_but_topology_changes(supported: list[CpuidEntry], cpus: int) -> None:
    entries = guest_cpuid(supported, apic_id=0, cpus=cpus, tsc_deadline=True)
    for entry in supported:
        if entry.function in (0, 6, 7, 0xD, 0x40000000, 0x40000001, 0x80000000):
            assert leaf(entries, entry.function, entry.index) == entry
    was, now = leaf(supported, 1), leaf(entries, 1)
    assert (was.eax, was.ebx & 0xFFFF) == (now.eax, now.ebx & 0xFFFF)
    changed = 1 << 31 | 1 << 24
    assert was.ecx & ~changed == now.ecx & ~changed
    assert was.edx & ~(1 << 28) == now.edx & ~(1 << 28)


@settings(max_examples=30, deadline=None)
@given(supported_lists(), CPUS, st.booleans())
def test_leaf_1_flags(supported: list[CpuidEntry], cpus: int, tsc_deadline: bool) -> None:
    entries = guest_cpuid(supported, apic_id=cpus - 1, cpus=cpus, tsc_deadline=tsc_deadline)
    assert has_feature(entries, "hypervisor")
    assert has_feature(entries, "tsc_deadline_timer") == tsc_deadline
    assert has_feature(entries, "ht") == (cpus > 1)
    assert leaf(entries, 1).ebx >> 16 & 0xFF == cpus


@settings(max_examples=60, deadline=None)
@given(supported_lists(), st.frozensets(st.sampled_from(sorted(FEATURES)), max_size=10))
def test_hiding_clears_exactly_the_named_bits(supported: list[CpuidEntry], hide: frozenset[str]) -> None:
    shown = guest_cpuid(supported, apic_id=0, cpus=2)
    hidden = guest_cpuid(supported, apic_id=0, cpus=2, hide=hide)
    for name in FEATURES:
        assert has_feature(hidden, name) == (has_feature(shown, name) and name not in hide)
    bits = {(FEATURES[n].function, FEATURES[n].subleaf, FEATURES[n].register, FEATURES[n].bit) for n in hide}
    for a, b in zip(shown, hidden, strict=True):
        for name in ("eax", "ebx", "ecx", "edx"):
            difference = getattr(a, name) ^ getattr(b, name)
            allowed = sum(1 << bit for f, i, r, bit in bits if (f, i, r) == (a.function, a.index, name))
            assert difference & ~allowed == 0


def test_no_two_features_share_a_bit() -> None:
    assert len(set(FEATURES.values())) == len(FEATURES)


def test_bits_known_from_the_manuals() -> None:
    # Intel SDM volume 2A, CPUID; AMD APM volume 3, appendix E.
    known = {
        "cx16": (1, 0, "ecx", 13),
        "popcnt": (1, 0, "ecx", 23),
        "xsave": (1, 0, "ecx", 26),
        "rdrand": (1, 0, "ecx", 30),
        "fxsr": (1, 0, "edx", 24),
        "fsgsbase": (7, 0, "ebx", 0),
        "smep": (7, 0, "ebx", 7),
        "erms": (7, 0, "ebx", 9),
        "invpcid": (7, 0, "ebx", 10),
        "smap": (7, 0, "ebx", 20),
        "umip": (7, 0, "ecx", 2),
        "rdpid": (7, 0, "ecx", 22),
        "fsrm": (7, 0, "edx", 4),
        "xsaves": (0xD, 1, "eax", 3),
        "abm": (0x80000001, 0, "ecx", 5),
        "nx": (0x80000001, 0, "edx", 20),
        "lm": (0x80000001, 0, "edx", 29),
    }
    assert {name: tuple(FEATURES[name]) for name in known} == known


@pytest.mark.parametrize("cpus", [0, -1, 256, 1 << 40])
def test_impossible_number_of_cpus(cpus: int) -> None:
    with pytest.raises(ConfigError, match="255"):
        guest_cpuid([], apic_id=0, cpus=cpus)


@pytest.mark.parametrize("apic_id", [-1, 2, 255])
def test_an_apic_id_that_is_no_vcpus(apic_id: int) -> None:
    with pytest.raises(ValueError, match="APIC ID"):
        guest_cpuid([], apic_id=apic_id, cpus=2)


def test_unknown_feature_is_named() -> None:
    with pytest.raises(ConfigError, match="pocpnt"):
        guest_cpuid([], apic_id=0, cpus=1, hide=frozenset({"pocpnt", "popcnt"}))
    with pytest.raises(ConfigError, match="pocpnt"):
        has_feature([], "pocpnt")


def test_an_empty_list_stays_empty() -> None:
    assert guest_cpuid([], apic_id=0, cpus=1) == []
    assert vendor_of([]) == b""
