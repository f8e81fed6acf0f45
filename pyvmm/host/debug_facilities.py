"""Which breakpoints this host's KVM honours at CPL 0: measured with three micro guests when a debugger is wanted.

KVM_CAP_SET_GUEST_DEBUG does not tell. Seen: a KVM that emulates CPL 0 looks at no data breakpoint and cannot carry INT3
out; one on an emulated AMD processor (QEMU's TCG) reports nothing but single steps.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

from pyvmm.errors import PyvmmError
from pyvmm.host.probe_layout import CODE_CPL0, DATA, Mode
from pyvmm.host.probe_vm import End, ProbeVm
from pyvmm.kvm.system import System
from pyvmm.native import lib

_EXECUTE, _WRITE_4 = 0x402, 0x402 | 0xD << 16  # DR7: breakpoint 0, global (SDM volume 3, 17.2.4)
_KVM_EXIT_DEBUG = "exit reason 4"
_STORE = b"\xb8\x07\x00\x00\x00\x89\x04\x25" + DATA.to_bytes(4, "little") + b"\x90"  # mov eax, 7; mov [DATA], eax


@dataclass(frozen=True)
class DebugFacilities:
    """What comes to user space."""

    execute: bool
    """A breakpoint register on an instruction."""
    data: bool
    """A breakpoint register on a write."""
    int3: bool
    """INT3 in guest memory, as a debug exit or as an instruction that KVM cannot emulate."""


@functools.cache
def debug_facilities() -> DebugFacilities:
    """Measured once, in some ten milliseconds. Nothing, if the host cannot even do that."""
    try:
        with System() as system, ProbeVm(system) as probe:
            return DebugFacilities(
                execute=_stops(probe, b"\x90\x90", CODE_CPL0 + 1, _EXECUTE),
                data=_stops(probe, _STORE, DATA, _WRITE_4),
                int3=_stops(probe, b"\xcc", 0, 0),
            )
    except PyvmmError:
        return DebugFacilities(execute=False, data=False, int3=False)


def _stops(probe: ProbeVm, code: bytes, address: int, dr7: int) -> bool:
    how = lib.KVM_GUESTDBG_USE_HW_BP if dr7 else lib.KVM_GUESTDBG_USE_SW_BP
    probe.vcpu.set_guest_debug(lib.KVM_GUESTDBG_ENABLE | how, (address, 0, 0, 0, 0, 0, 0, dr7))
    try:
        ending = probe.run(Mode.LONG64, code)
    finally:
        probe.vcpu.set_guest_debug(0)
    return ending.detail == _KVM_EXIT_DEBUG or (not dr7 and ending.end is End.EMULATION_FAILURE)
