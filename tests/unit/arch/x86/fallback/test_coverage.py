"""What the fallback claims to know is what the tests exercise, neither more nor less."""

from __future__ import annotations

from pathlib import Path

import pytest

from pyvmm.arch.x86.fallback import known_mnemonics
from pyvmm.arch.x86.fallback.flags import UNDEFINED_FLAGS
from pyvmm.arch.x86.fallback.operands import decode
from pyvmm.kvm.state import Regs
from tests.unit.arch.x86.fallback import test_against_cpu, test_compatibility_mode, test_xstate
from tests.unit.arch.x86.fallback.instruction_forms import all_forms

OWN_TESTS = {
    "clac": ("test_system", "0f01ca"),
    "stac": ("test_system", "0f01cb"),
    "invpcid": ("test_system", "660f388207"),
    "rdpid": ("test_system", "f30fc7f8"),
    "rdtscp": ("test_system", "0f01f9"),
    "rdrand": ("test_system", "480fc7f0"),
    "rdseed": ("test_system", "0fc7f8"),
    "int": ("test_delivery", "cd80"),
    "int3": ("test_delivery", "cc"),
    "into": ("test_delivery", "ce"),
    "xsetbv": ("test_xstate", "0f01d1"),
    "xsaves": ("test_xstate", "0fc72f"),
    "xsaves64": ("test_xstate", "480fc72f"),
    "xrstors": ("test_xstate", "0fc71f"),
    "xrstors64": ("test_xstate", "480fc71f"),
}
"""The privileged and the random ones: mnemonic to the module that runs it and an encoding found there."""


def test_every_known_mnemonic_is_exercised() -> None:
    native = {form.mnemonic for form in test_against_cpu.FORMS}
    structured = set(test_xstate.SAVES) | set(test_xstate.RESTORES)
    structured |= {"fxsave", "fxsave64", "fxrstor", "fxrstor64", "xgetbv"}
    assert structured == test_against_cpu.STRUCTURED
    assert native | structured | set(OWN_TESTS) == known_mnemonics()
    assert not (native | structured) & set(OWN_TESTS)


@pytest.mark.parametrize("mnemonic", OWN_TESTS)
def test_own_tests_run_that_encoding(mnemonic: str) -> None:
    module, code = OWN_TESTS[mnemonic]
    bits = 32 if mnemonic == "into" else 64
    assert decode(bytes.fromhex(code), bits, Regs()).mnemonic == mnemonic
    source = Path(__file__).with_name(f"{module}.py").read_text()
    written = {"480fc72f": '{wide}0fc72f"', "480fc71f": '{wide}0fc71f"', "0fc7f8": '{prefix}0fc7{opcode}"'}
    assert written.get(code, f'"{code}"') in source


def test_undefined_flags_are_of_known_instructions() -> None:
    assert set(UNDEFINED_FLAGS) <= known_mnemonics()


def test_forms_cover_every_mnemonic_of_64_bit_mode() -> None:
    assert {form.mnemonic for form in all_forms()} == known_mnemonics() - {"into"}
    assert len(test_compatibility_mode.SNIPPETS) == len(set(test_compatibility_mode.SNIPPETS.values()))
