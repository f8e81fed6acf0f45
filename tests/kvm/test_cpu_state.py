"""All of a vCPU's state: what is saved is what is loaded is what is saved."""

from __future__ import annotations

import msgspec
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pyvmm.arch.x86.cpu_state import RUNNING_MSRS, differences, load_cpu, readable_msrs, save_cpu
from pyvmm.kvm.state import Regs
from pyvmm.kvm.system import System
from pyvmm.native import lib
from tests.framework.real_mode import out8
from tests.kvm.conftest import BareVm

u64 = st.integers(0, (1 << 64) - 1)


def _msrs(bare: BareVm) -> list[int]:
    with System() as system:
        supported = system.supported_cpuid()
        bare.vcpu.set_cpuid(supported)
        return readable_msrs(bare.vcpu, system.msr_indices())


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(u64, min_size=16, max_size=16))
def test_general_registers_keep_every_bit(bare: BareVm, values: list[int]) -> None:
    names = [n for n in Regs.__struct_fields__ if n not in ("rip", "rflags")]
    regs = Regs(**dict(zip(names, values, strict=True)), rip=0x1234, rflags=2)
    bare.vcpu.set_regs(regs)
    assert bare.vcpu.get_regs() == regs


def test_save_load_save_is_the_identity_after_the_guest_has_run(bare: BareVm) -> None:
    msrs = _msrs(bare)
    bare.enter(out8(0xF4, 0) * 3)
    assert bare.vcpu.run() == lib.PV_EXIT_IO
    bare.vcpu.kick()
    assert bare.vcpu.run() == lib.PV_EXIT_KICKED
    first = save_cpu(bare.vcpu, msrs)
    load_cpu(bare.vcpu, first)
    second = save_cpu(bare.vcpu, msrs)
    assert differences(first, second) == []
    # Counters that run on by themselves.
    for state in (first, second):
        for index in (*RUNNING_MSRS, 0x12, 0x11, 0x4B564D00, 0x4B564D01):
            state.msrs.pop(index, None)
    assert msgspec.structs.asdict(first) == msgspec.structs.asdict(second)


def test_a_loaded_state_runs_on_where_it_was_saved(bare: BareVm) -> None:
    msrs = _msrs(bare)
    # mov cx,0; 1: inc cx; out 0xf4; jmp 1b
    bare.enter(b"\xb9\x00\x00\x41\xe6\xf4\xeb\xfb")
    for _ in range(5):
        assert bare.vcpu.run() == lib.PV_EXIT_IO
    bare.vcpu.kick()
    assert bare.vcpu.run() == lib.PV_EXIT_KICKED
    saved = save_cpu(bare.vcpu, msrs)
    for _ in range(7):
        assert bare.vcpu.run() == lib.PV_EXIT_IO
    bare.vcpu.kick()
    assert bare.vcpu.run() == lib.PV_EXIT_KICKED
    assert bare.vcpu.get_regs().rcx == 12
    load_cpu(bare.vcpu, saved)
    assert bare.vcpu.run() == lib.PV_EXIT_IO
    bare.vcpu.kick()
    assert bare.vcpu.run() == lib.PV_EXIT_KICKED
    assert bare.vcpu.get_regs().rcx == 6
