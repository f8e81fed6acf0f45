"""Every deterministic instruction that may run at CPL 3, natively and in the fallback, with the same operands."""

from __future__ import annotations

import random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pyvmm.arch.x86.control_registers import FLAG_AC, FLAG_DF, STATUS_FLAGS
from pyvmm.arch.x86.native_oracle import CODE, DATA_SIZE, NativeState
from tests.unit.arch.x86.fallback.instruction_forms import Form, Snippet, all_forms, missing_feature, snippets
from tests.unit.arch.x86.fallback.native import Host, assert_same_fault, assert_same_registers, assert_same_state

PRIVILEGED_OR_RANDOM = frozenset(
    {"clac", "stac", "int", "int3", "invpcid", "rdrand", "rdseed", "rdtscp", "rdpid", "xsetbv", "xsaves", "xsaves64"}
    | {"xrstors", "xrstors64"}
)
"""Tested in test_system.py and test_delivery.py."""
STRUCTURED = frozenset({f"{name}{wide}" for name in ("xsave", "xsaveopt", "xsavec", "xrstor") for wide in ("", "64")})
STRUCTURED |= {"fxsave", "fxsave64", "fxrstor", "fxrstor64", "xgetbv"}
"""Compared with the CPU in test_xstate.py: their memory has a structure that random bytes never have."""

FORMS = [form for form in all_forms() if form.mnemonic not in PRIVILEGED_OR_RANDOM | STRUCTURED]
flags = st.integers(0, STATUS_FLAGS | FLAG_DF).map(lambda bits: bits & (STATUS_FLAGS | FLAG_DF) | 2)


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.name)
@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck), database=None)
@given(data=st.data())
def test_same_as_the_cpu(host: Host, form: Form, data: st.DataObject) -> None:
    if missing := missing_feature(form):
        pytest.skip(f"the host CPU lacks {missing}")
    snippet: Snippet = data.draw(snippets(form))
    # Whether alignment checking covers 16- and 32-byte operands is the CPU's own choice (SDM volume 3, 6.15).
    checking = [0] if any(bank in form.name for bank in ("XMM", "YMM", "M128")) else [0, 0, 0, FLAG_AC]
    snippet.regs.rflags = data.draw(flags) | data.draw(st.sampled_from(checking))
    seed = data.draw(st.integers(0, 1 << 32))
    memory = random.Random(seed).randbytes(DATA_SIZE)
    state = NativeState(
        regs=snippet.regs, fs_base=snippet.fs_base, gs_base=snippet.gs_base, xsave=host.random_state(seed)
    )

    native = host.oracle.run(snippet.code, state, memory, steps=1)
    cpu = host.cpu(snippet.code, state, memory)
    assert cpu.run()

    assert_same_fault(cpu, native)
    assert_same_registers(cpu, native, form.mnemonic)
    assert bytes(cpu.data) == native.data
    mmx_fault = bool(cpu.injected) and form.name.endswith("_MM")
    assert_same_state(host, cpu.xsave, native.state.xsave, mmx_fault=mmx_fault)
    assert native.state.regs.rip in (CODE, CODE + len(snippet.code))
