"""32-bit code on the CPU (a compatibility-mode code segment) and in the fallback."""

from __future__ import annotations

import random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pyvmm.arch.x86.control_registers import STATUS_FLAGS
from pyvmm.arch.x86.native_oracle import CODE, DATA, DATA_SIZE, USER_CS_32, NativeState
from pyvmm.kvm.state import Regs
from tests.unit.arch.x86.fallback.native import Host, assert_same_fault, assert_same_registers, assert_same_state

# EBX points into the data, ESI is a small index; 67h makes addressing 16-bit, which nothing is mapped for.
SNIPPETS = {
    "popcnt eax, [ebx]": "f30fb803",
    "popcnt cx, [ebx+4*esi+8]": "66f30fb84cb308",
    "popcnt eax, [bx+si]": "67f30fb800",
    "popcnt eax, [bp+1234h]": "67f30fb8863412",
    "lzcnt edx, [absolute]": "f30fbd1510000020",
    "tzcnt eax, esp": "f30fbcc4",
    "crc32 eax, ah": "f20f38f0c4",
    "crc32 eax, dword [ebx]": "f20f38f103",
    "movbe eax, [ebx]": "0f38f003",
    "movbe [ebx], cx": "660f38f10b",
    "adcx eax, [ebx]": "660f38f603",
    "andn eax, ecx, [ebx]": "c4e270f203",
    "mulx eax, ecx, edx": "c4e273f6c2",
    "cmpxchg8b [ebx]": "0fc70b",
    "lock cmpxchg8b [ebx+esi]": "f00fc70c33",
    "movups xmm7, [ebx]": "0f103b",
    "movdqa [ebx], xmm3": "660f7f1b",
    "vmovdqu ymm1, [ebx]": "c5fe6f0b",
    "vzeroupper": "c5f877",
    "vzeroall": "c5fc77",
    "movd mm3, [ebx]": "0f6e1b",
    "movnti [ebx], esi": "0fc333",
    "fxsave [ebx]": "0fae03",
    "xsave [ebx]": "0fae23",
    "fnstcw [ebx]": "d93b",
}


@pytest.mark.parametrize("name", SNIPPETS)
@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck), database=None)
@given(seed=st.integers(0, 1 << 32), offset=st.sampled_from([0, 0, 64, 1, DATA_SIZE - 3, 0x10000]), match=st.booleans())
def test_same_as_the_cpu(host: Host, name: str, seed: int, offset: int, match: bool) -> None:
    code = bytes.fromhex(SNIPPETS[name])
    chance = random.Random(seed)
    memory = bytearray(chance.randbytes(DATA_SIZE))
    memory[offset + 512 : offset + 576] = bytes(64) if offset < 65 else memory[offset + 512 : offset + 576]
    regs = Regs(**{r: chance.getrandbits(32) for r in ("rax", "rcx", "rdx", "rsp", "rbp", "rdi")}, rip=CODE)
    regs.rbx, regs.rsi = DATA + offset, chance.choice([0, 8, 64])
    regs.rflags = chance.getrandbits(12) & STATUS_FLAGS | 2
    if name.startswith("xsave"):
        regs.rax, regs.rdx = 7, 0
    if match and offset == 0 and "cmpxchg8b" in name:
        at = regs.rsi if "esi" in name else 0
        memory[at : at + 8] = regs.rax.to_bytes(4, "little") + regs.rdx.to_bytes(4, "little")
    state = NativeState(regs=regs, xsave=host.random_state(seed))

    native = host.oracle.run(code, state, bytes(memory), steps=1, cs=USER_CS_32)
    cpu = host.cpu(code, state, bytes(memory), bits=32)
    cpu.run()

    mnemonic = name.removeprefix("lock ").split()[0]
    areas = {"fxsave": 512, "xsave": host.oracle.xsave_size}
    assert_same_fault(cpu, native, area=areas.get(mnemonic, 1))
    for register in ("r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15"):
        setattr(native.state.regs, register, 0)  # mean nothing here
    assert_same_registers(cpu, native, mnemonic)
    if mnemonic == "fxsave" and not cpu.injected:  # reserved bytes, which CPUs write or not
        theirs = bytearray(native.data)
        theirs[offset + 416 : offset + 464] = cpu.data[offset + 416 : offset + 464]
        assert bytes(cpu.data) == theirs
    elif mnemonic != "xsave":  # XSTATE_BV is the CPU's choice: test_xstate.py
        assert bytes(cpu.data) == native.data
    else:
        header = offset + 512
        assert bytes(cpu.data[:header]) == native.data[:header]
        assert bytes(cpu.data[header + 64 :]) == native.data[header + 64 :]
    assert_same_state(host, cpu.xsave, native.state.xsave)
