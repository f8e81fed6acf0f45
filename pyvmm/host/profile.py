"""What the KVM of this host can and cannot do, as measured: the profile, and the quirks that follow from it.

Nothing here is assumed from the host's name: :mod:`pyvmm.host.probes` runs micro guests and writes down what they
did. Probing takes a second or so, hence :func:`load_profile` keeps the result for as long as the host is up.
This module is on the start path of every ``pyvmm run``: it imports the probes only when there is no cached profile.
"""

from __future__ import annotations

from typing import Final

import msgspec

EMULATED_CPL0: Final = "emulated-cpl0"
INSTRUCTION_FALLBACK: Final = "instruction-fallback"
SYSCALL_ENTRY: Final = "syscall-entry"
INT_ENTRY: Final = "int-entry"
CPUID_SHOWS_THROUGH: Final = "cpuid-shows-through"

QUIRKS: Final[dict[str, str]] = {
    EMULATED_CPL0: "CPL 0 runs in KVM's instruction emulator, about a thousand times slower than the CPU",
    INSTRUCTION_FALLBACK: "that emulator lacks instructions: pyvmm carries them out itself",
    SYSCALL_ENTRY: "SYSCALL from CPL 3 does not reach CPL 0: pyvmm completes it at the guest's #PF handler",
    INT_ENTRY: "INT n from CPL 3 raises #UD: pyvmm takes it through its gate at the guest's #UD handler",
    CPUID_SHOWS_THROUGH: "features hidden by CPUID stay visible: pyvmm asks Linux to ignore them (clearcpuid=)",
}
"""Every quirk by name, with what it means."""


class Speed(msgspec.Struct, frozen=True, kw_only=True):
    """How fast a countdown loop ran."""

    instructions_per_second: int
    emulated: bool
    """Counted by KVM's ``insn_emulation`` statistic; without it, judged by speed."""


class HostProfile(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Findings about this host. ``None``: the probe did not come to a result, :attr:`notes` says why."""

    kind: str
    """``vmx``, ``svm``, ``pvm`` or ``unknown``."""
    nested: bool
    """The host is itself a virtual machine."""
    evidence: tuple[str, ...]
    """How :attr:`kind` and :attr:`nested` were told."""
    kernel: str
    cpu: str
    guests_run: bool
    """A micro guest reached its end in long mode."""
    speeds: dict[str, Speed]
    """By mode: ``real16``, ``prot32``, ``long64`` at CPL 0; ``user32`` (compatibility), ``user64`` at CPL 3."""
    pio_exit_us: float | None
    """CPU time of a port read served by the native run loop."""
    pio_exit_python_us: float | None
    """The same, served by a bare Python loop."""
    string_iteration_ns: float | None
    """CPU time of one iteration of ``rep stosb`` at CPL 0."""
    instructions: dict[str, str]
    """Instruction at CPL 0 -> ``works``, ``emulation-failure``, ``wrong-result``, ``invalid-opcode``, or an ending."""
    syscall_reaches_cpl0: bool | None
    syscall_observed: str
    """What SYSCALL at CPL 3 led to: ``reaches-cpl0``, ``fetch-fault-at-cpl3`` or an ending."""
    sysret_works: bool | None
    int_observed: dict[str, str]
    """What INT 0x80 led to in ``user32`` and ``user64``: ``reaches-gate``, ``invalid-opcode``, or an ending."""
    features_show_through: dict[str, tuple[str, ...]] | None
    """``cpl0`` and ``cpl3`` -> features the guest sees although its CPUID table does not have them."""
    two_dimensional_paging: bool | None
    """EPT or NPT; else KVM shadows the guest's page tables."""
    guest_tsc_settable: bool | None
    private_memfd_works: bool | None
    """A memslot over a private mapping of a memfd behaves as COLO's secondary needs (see probes.private_memfd)."""
    capabilities: dict[str, int]
    """KVM_CHECK_EXTENSION by name (lower case, without KVM_CAP_); 0: absent."""
    quirks: tuple[str, ...]
    """Names from :data:`QUIRKS` that this host needs, in that order."""
    notes: tuple[str, ...] = ()

    @property
    def emulator_lacks(self) -> tuple[str, ...]:
        """Instructions that end in an emulation failure at CPL 0."""
        return tuple(name for name, how in self.instructions.items() if how == "emulation-failure")

    @property
    def emulator_gets_wrong(self) -> tuple[str, ...]:
        """Instructions that end without an exit but with a wrong result at CPL 0: guests must be kept from them."""
        return tuple(name for name, how in self.instructions.items() if how == "wrong-result")

    @property
    def cpuid_masking_holds(self) -> bool | None:
        """Whether the guest sees only the features its CPUID table has, at CPL 0 and CPL 3."""
        if self.features_show_through is None:
            return None
        return not any(self.features_show_through.values())


def derive_quirks(
    *,
    speeds: dict[str, Speed],
    instructions: dict[str, str],
    syscall_observed: str,
    int_observed: dict[str, str],
    features_show_through: dict[str, tuple[str, ...]] | None,
) -> tuple[str, ...]:
    """The quirks that these findings call for. A probe without a result calls for none."""
    wanted = {
        EMULATED_CPL0: any(speeds[mode].emulated for mode in ("prot32", "long64") if mode in speeds),
        INSTRUCTION_FALLBACK: "emulation-failure" in instructions.values(),
        SYSCALL_ENTRY: syscall_observed == "fetch-fault-at-cpl3",
        INT_ENTRY: "invalid-opcode" in int_observed.values(),
        CPUID_SHOWS_THROUGH: features_show_through is not None and any(features_show_through.values()),
    }
    return tuple(name for name in QUIRKS if wanted[name])


def load_profile(*, refresh: bool = False) -> HostProfile:
    """This host's profile: cached since boot, or measured now (about a second) and cached.

    HostError when /dev/kvm cannot be used. A cache that cannot be read or written is no error; a profile with notes
    (some probe failed) is not cached.
    """
    from pyvmm.host import cache

    if not refresh and (profile := cache.read()) is not None:
        return profile
    from pyvmm.host.probes import measure
    from pyvmm.kvm.system import System

    with System() as system:
        profile = measure(system)
    if not profile.notes:  # a probe that failed may succeed next time: half a profile must not last until reboot
        cache.write(profile)
    return profile
