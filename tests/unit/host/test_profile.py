"""What follows from the findings: quirks, and the words for them."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pyvmm.host.findings import profile_findings, surroundings_findings
from pyvmm.host.kind import VENDOR_MODULES, tell_kind
from pyvmm.host.profile import (
    CPUID_SHOWS_THROUGH,
    EMULATED_CPL0,
    INSTRUCTION_FALLBACK,
    INT_ENTRY,
    QUIRKS,
    SYSCALL_ENTRY,
    HostProfile,
    Speed,
    derive_quirks,
)
from pyvmm.host.surroundings import Surroundings
from tests.unit.host.conftest import plain_profile

SPEEDS = st.dictionaries(
    st.sampled_from(["real16", "prot32", "long64", "user32", "user64"]),
    st.builds(Speed, instructions_per_second=st.integers(0, 10**11), emulated=st.booleans()),
)
ENDINGS = st.sampled_from(["works", "emulation-failure", "wrong-result", "invalid-opcode", "exception 13 at 0x8000"])
INSTRUCTIONS = st.dictionaries(st.sampled_from(["popcnt", "int3", "clac", "lzcnt"]), ENDINGS)
SYSCALLS = st.sampled_from(["reaches-cpl0", "fetch-fault-at-cpl3", "unknown", "shutdown"])
INTS = st.dictionaries(
    st.sampled_from(["user32", "user64"]), st.sampled_from(["reaches-gate", "invalid-opcode", "shutdown"])
)
NAMES = st.lists(st.sampled_from(["avx", "erms"]), max_size=2).map(tuple)
SHOWN = st.none() | st.fixed_dictionaries({"cpl0": NAMES, "cpl3": NAMES})


@settings(max_examples=150, deadline=None)
@given(SPEEDS, INSTRUCTIONS, SYSCALLS, INTS, SHOWN)
def test_each_quirk_follows_from_its_finding(
    speeds: dict[str, Speed],
    instructions: dict[str, str],
    syscall: str,
    ints: dict[str, str],
    shown: dict[str, tuple[str, ...]] | None,
) -> None:
    quirks = derive_quirks(
        speeds=speeds,
        instructions=instructions,
        syscall_observed=syscall,
        int_observed=ints,
        features_show_through=shown,
    )
    assert list(quirks) == [name for name in QUIRKS if name in quirks]
    emulated = [m for m in ("prot32", "long64") if m in speeds and speeds[m].emulated]
    assert (EMULATED_CPL0 in quirks) == bool(emulated)
    assert (INSTRUCTION_FALLBACK in quirks) == any(how == "emulation-failure" for how in instructions.values())
    assert (SYSCALL_ENTRY in quirks) == (syscall == "fetch-fault-at-cpl3")
    assert (INT_ENTRY in quirks) == any(how == "invalid-opcode" for how in ints.values())
    assert (CPUID_SHOWS_THROUGH in quirks) == (shown is not None and shown != {"cpl0": (), "cpl3": ()})


def test_emulated_real_mode_alone_is_no_quirk() -> None:
    """Intel hosts without unrestricted guest emulate real mode; everything else runs on the CPU there."""
    profile = plain_profile()
    speeds = profile.speeds | {"real16": Speed(instructions_per_second=10**6, emulated=True)}
    quirks = derive_quirks(
        speeds=speeds,
        instructions=profile.instructions,
        syscall_observed=profile.syscall_observed,
        int_observed=profile.int_observed,
        features_show_through=profile.features_show_through,
    )
    assert quirks == ()


profiles = st.builds(
    plain_profile,
    kind=st.sampled_from(["vmx", "svm", "pvm", "unknown"]),
    nested=st.booleans(),
    speeds=SPEEDS,
    pio_exit_us=st.none() | st.floats(0, 1e6),
    pio_exit_python_us=st.none() | st.floats(0, 1e6),
    string_iteration_ns=st.none() | st.floats(0, 1e6),
    instructions=INSTRUCTIONS,
    syscall_reaches_cpl0=st.none() | st.booleans(),
    syscall_observed=SYSCALLS,
    int_observed=INTS,
    features_show_through=SHOWN,
    guest_tsc_settable=st.none() | st.booleans(),
    private_memfd_works=st.none() | st.booleans(),
    capabilities=st.dictionaries(st.sampled_from(["irqfd", "coalesced_pio", "sync_regs"]), st.integers(0, 1 << 20)),
    quirks=st.sets(st.sampled_from(list(QUIRKS))).map(tuple),
    notes=st.lists(st.text(max_size=20), max_size=2).map(tuple),
)


@settings(max_examples=80, deadline=None)
@given(profiles)
def test_a_profile_survives_json(profile: HostProfile) -> None:
    assert msgspec.json.decode(msgspec.json.encode(profile), type=HostProfile) == profile


@settings(max_examples=80, deadline=None)
@given(profiles)
def test_every_profile_has_words(profile: HostProfile) -> None:
    rows = profile_findings(profile)
    assert all(row.what and row.value and row.action for row in rows if row.what != "note")
    values = {row.what: row for row in rows}
    assert set(profile.quirks) <= set(values["quirks"].value.split())
    assert [row.value for row in rows if row.what == "note"] == list(profile.notes)
    lacks = values["instructions KVM's emulator lacks"]
    assert (lacks.value == "none") == (not profile.emulator_lacks)
    assert ("instructions KVM gets wrong" in values) == bool(profile.emulator_gets_wrong)


def test_what_the_table_says_of_an_odd_host_names_the_quirk() -> None:
    profile = plain_profile(
        quirks=tuple(QUIRKS),
        syscall_reaches_cpl0=False,
        syscall_observed="fetch-fault-at-cpl3",
        instructions={"popcnt": "emulation-failure", "lzcnt": "wrong-result"},
        features_show_through={"cpl0": ("avx",), "cpl3": ()},
    )
    actions = {row.what: row.action for row in profile_findings(profile)}
    assert SYSCALL_ENTRY in actions["syscall from CPL 3 reaches CPL 0"]
    assert INT_ENTRY in actions["int 0x80 from CPL 3"]
    assert INSTRUCTION_FALLBACK in actions["instructions KVM's emulator lacks"]
    assert profile.cpuid_masking_holds is False
    assert plain_profile().cpuid_masking_holds is True
    assert plain_profile(features_show_through=None).cpuid_masking_holds is None


@pytest.mark.parametrize(
    ("flags", "modules", "kind"),
    [
        ({"vmx"}, {"kvm_intel"}, "vmx"),
        ({"svm"}, {"kvm_amd"}, "svm"),
        (set(), {"kvm_pvm"}, "pvm"),
        ({"vmx"}, {"kvm_pvm"}, "pvm"),  # hardware is there, but KVM does not use it
        ({"vmx"}, set(), "vmx"),  # built into the kernel
        ({"svm"}, set(), "svm"),
        (set(), set(), "unknown"),
        ({"vmx", "svm"}, set(), "unknown"),
        ({"svm"}, {"kvm_amd", "kvm_pvm"}, "unknown"),
    ],
)
def test_kind_of_host(flags: set[str], modules: set[str], kind: str) -> None:
    for nested in (False, True):
        told = tell_kind(frozenset(flags | ({"hypervisor"} if nested else set())), frozenset(modules))
        assert (told.kind, told.nested) == (kind, nested)
        for name in modules:
            assert any(name in line for line in told.evidence)
    assert modules <= VENDOR_MODULES.keys()


def test_surroundings_in_words() -> None:
    around = Surroundings(
        kvm="no: Permission denied; add this user to the group kvm",
        tap="no: Operation not permitted",
        network_namespace="in a user namespace",
        bridge="yes",
        nftables="yes",
        memfd="yes",
        cpus=4,
        memory_total=8 << 30,
        memory_available=3 << 30,
        disk_path="/tmp",
        disk_free=5 << 30,
        open_files=1024,
    )
    rows = {row.what: row for row in surroundings_findings(around)}
    assert rows["/dev/kvm"].action == "cannot run guests"
    assert rows["tap device"].action == "guests without a network"
    assert rows["memory"].value == "3.0 GiB available of 8.0 GiB"
    assert "no network tests" not in rows["network namespace"].action
