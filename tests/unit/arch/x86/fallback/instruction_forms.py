"""Every encoding of every instruction the fallback knows, with operands that hypothesis chooses."""

from __future__ import annotations

import functools
import random
from dataclasses import dataclass
from typing import Any

import iced_x86 as iced
from hypothesis import reject
from hypothesis import strategies as st

from pyvmm.arch.x86.fallback import known_mnemonics
from pyvmm.arch.x86.fallback.operands import mnemonic_names
from pyvmm.arch.x86.native_oracle import CODE, DATA, DATA_SIZE
from pyvmm.kvm.state import Regs

M64 = (1 << 64) - 1
GPR = ("rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi", *(f"r{i}" for i in range(8, 16)))

R, K = iced.Register, iced.OpCodeOperandKind
REGISTER_BANKS: dict[int, tuple[int, int]] = {  # operand kind -> (first register, how many)
    K.R16_REG: (R.AX, 16),
    K.R16_RM: (R.AX, 16),
    K.R16_OR_MEM: (R.AX, 16),
    K.R32_REG: (R.EAX, 16),
    K.R32_RM: (R.EAX, 16),
    K.R32_VVVV: (R.EAX, 16),
    K.R32_OR_MEM: (R.EAX, 16),
    K.R64_REG: (R.RAX, 16),
    K.R64_RM: (R.RAX, 16),
    K.R64_VVVV: (R.RAX, 16),
    K.R64_OR_MEM: (R.RAX, 16),
    K.R8_OR_MEM: (R.AL, 20),
    K.XMM_REG: (R.XMM0, 16),
    K.XMM_RM: (R.XMM0, 16),
    K.XMM_VVVV: (R.XMM0, 16),
    K.XMM_OR_MEM: (R.XMM0, 16),
    K.YMM_REG: (R.YMM0, 16),
    K.YMM_VVVV: (R.YMM0, 16),
    K.YMM_OR_MEM: (R.YMM0, 16),
    K.MM_REG: (R.MM0, 8),
    K.MM_OR_MEM: (R.MM0, 8),
}
MEMORY_KINDS = frozenset(
    {K.MEM, K.R8_OR_MEM, K.R16_OR_MEM, K.R32_OR_MEM, K.R64_OR_MEM, K.XMM_OR_MEM, K.YMM_OR_MEM, K.MM_OR_MEM}
)

IMPLICIT = frozenset({"mulx", "cmpxchg8b", "cmpxchg16b", "xgetbv"})
"""Forms with operands among RAX-RDX that are not encoded."""

CPUINFO_FLAG = {
    "POPCNT": "popcnt",
    "LZCNT": "abm",
    "BMI1": "bmi1",
    "BMI2": "bmi2",
    "ADX": "adx",
    "MOVBE": "movbe",
    "SSE": "sse",
    "SSE2": "sse2",
    "SSE3": "pni",
    "SSE4_1": "sse4_1",
    "SSE4_2": "sse4_2",
    "AVX": "avx",
    "AVX2": "avx2",
    "MMX": "mmx",
    "CMPXCHG16B": "cx16",
    "CX8": "cx8",
    "FXSR": "fxsr",
    "XSAVE": "xsave",
    "XSAVEOPT": "xsaveopt",
    "XSAVEC": "xsavec",
    "FSGSBASE": "fsgsbase",
    "RDPID": "rdpid",
    "CLFSH": "clflush",
    "CLFLUSHOPT": "clflushopt",
    "CLWB": "clwb",
    "PREFETCHW": "3dnowprefetch",
}
ALWAYS = frozenset({"X64", "FPU", "FPU287", "FPU387", "INTEL8086", "INTEL386", "D3NOW", "PREFETCHWT1"})


@dataclass(frozen=True)
class Form:
    """One of iced's codes: a mnemonic with fixed operand kinds and encoding."""

    code: Any
    name: str
    mnemonic: str


@functools.cache
def all_forms() -> tuple[Form, ...]:
    """Every 64-bit legacy or VEX encoding of a known mnemonic."""
    forms = []
    codes: dict[str, Any] = {name: code for name, code in vars(iced.Code).items() if isinstance(code, int)}
    for name, code in codes.items():
        info = iced.OpCodeInfo(code)
        mnemonic = mnemonic_names()[info.mnemonic]
        usual = info.encoding in (iced.EncodingKind.LEGACY, iced.EncodingKind.VEX) and not name.startswith("VEX_KNC")
        if mnemonic in known_mnemonics() and usual and info.mode64 and name != "MOVSD_M32_M32":
            forms.append(Form(code, name, mnemonic))
    return tuple(forms)


@functools.cache
def cpu_flags() -> frozenset[str]:
    """The host CPU's flags as /proc/cpuinfo names them."""
    with open("/proc/cpuinfo", encoding="ascii") as file:
        for line in file:
            if line.startswith("flags"):
                return frozenset(line.split(":", 1)[1].split())
    return frozenset()


def missing_feature(form: Form) -> str | None:
    """The flag that the host CPU lacks for ``form``; an unmapped feature fails loudly."""
    features = {v: k for k, v in vars(iced.CpuidFeature).items() if isinstance(v, int)}
    for feature in iced.Instruction.create(form.code).cpuid_features():
        name = features[feature]
        if name in ALWAYS:
            continue
        if CPUINFO_FLAG[name] not in cpu_flags():
            return CPUINFO_FLAG[name]
    return None


EDGES = (0, 1, 2, 0x7F, 0x80, 0xFF, 0x7FFF, 0x8000, 1 << 31, (1 << 31) - 1, (1 << 32) - 1, 1 << 32, 1 << 63, M64)
words = st.one_of(st.integers(0, M64), st.sampled_from(EDGES), st.integers(0, 0x1_0000))


@dataclass
class Snippet:
    """Encoded instruction with the registers that make its memory operand point where it should."""

    code: bytes
    regs: Regs
    fs_base: int
    gs_base: int


def _memory(draw: Any, instruction: Any, regs: Regs, target: int, bases: dict[str, int]) -> None:
    """Give ``instruction`` a memory operand of any shape whose effective address is ``target``."""
    shape = draw(st.sampled_from(["base", "base", "index", "rip", "absolute", "base32", "segment"]))
    displacement = draw(st.sampled_from([0, 1, -1, 0x7F, -0x80, 0x1234, -0x54321]))
    segment = R.NONE
    if shape == "segment":
        segment = draw(st.sampled_from([R.FS, R.GS, R.DS]))
        target -= {R.FS: bases["fs"], R.GS: bases["gs"]}.get(segment, 0)
    instruction.segment_prefix = segment
    if shape == "rip":
        instruction.memory_base, instruction.memory_displ_size = R.RIP, 8
        instruction.memory_displacement = target
        return
    if shape == "absolute":
        instruction.memory_displ_size, instruction.memory_displacement = 4, target
        return
    first, mask = (R.EAX, 0xFFFFFFFF) if shape == "base32" else (R.RAX, M64)
    base = draw(st.integers(0, 15))
    total = target - displacement
    if shape == "index":
        index = draw(st.integers(0, 15).filter(lambda n: n not in (4, base)))
        scale = draw(st.sampled_from([1, 2, 4, 8]))
        instruction.memory_index, instruction.memory_index_scale = first + index, scale
        total -= getattr(regs, GPR[index]) * scale
    setattr(regs, GPR[base], total & mask | (draw(words) & M64 & ~mask))
    instruction.memory_base = first + base
    instruction.memory_displ_size, instruction.memory_displacement = 4, displacement & M64


@st.composite
def targets(draw: Any, size: int) -> Any:
    """Addresses in the data pages: aligned mostly, else anywhere, at page borders, or where nothing is mapped."""
    kind = draw(st.sampled_from(["aligned"] * 5 + ["any", "border", "outside"]))
    if kind == "aligned":
        return DATA + 64 * draw(st.integers(0, 40))
    if kind == "any":
        return DATA + draw(st.integers(0, DATA_SIZE - 1))
    if kind == "border":
        return DATA + draw(st.sampled_from([0x1000, DATA_SIZE])) - draw(st.integers(0, max(size, 1)))
    return draw(st.sampled_from([DATA - 1, DATA - 0x1000, DATA + DATA_SIZE, 0, 1 << 47, 0xFFFF800000000000, 1 << 63]))


@st.composite
def snippets(draw: Any, form: Form) -> Snippet:
    """One encoded instruction and general registers for it."""
    info = iced.OpCodeInfo(form.code)
    # Registers that are no operand of this form are filled from a seed: drawing each is slow.
    chance = random.Random(draw(st.integers(0, 1 << 32)))
    regs = Regs(**{name: chance.getrandbits(64) for name in GPR}, rip=CODE, rflags=2)
    for name in ("rax", "rbx", "rcx", "rdx") if form.mnemonic in IMPLICIT else ():
        setattr(regs, name, draw(words))
    bases = {"fs": draw(st.sampled_from([0, DATA, 0x7000])), "gs": draw(st.sampled_from([0, DATA - 64, 0x123000]))}
    instruction = iced.Instruction.create(form.code)
    in_memory = None
    for i in range(info.op_count):
        kind = info.op_kind(i)
        if kind == K.IMM8:
            instruction.set_op_kind(i, iced.OpKind.IMMEDIATE8)
            instruction.immediate8 = draw(st.integers(0, 255))
        elif kind == K.AX:
            instruction.set_op_kind(i, iced.OpKind.REGISTER)
            instruction.set_op_register(i, R.AX)
        elif kind in MEMORY_KINDS and (kind not in REGISTER_BANKS or draw(st.booleans())):
            instruction.set_op_kind(i, iced.OpKind.MEMORY)
            in_memory = iced.MemorySizeExt.size(info.memory_size)
        else:
            first, count = REGISTER_BANKS[kind]
            instruction.set_op_kind(i, iced.OpKind.REGISTER)
            register = first + draw(st.integers(0, count - 1))
            instruction.set_op_register(i, register)
            if iced.RegisterExt.is_gpr(register):
                setattr(regs, GPR[iced.RegisterExt.full_register(register) - R.RAX], draw(words))
    if in_memory is not None:  # last, since it sets its base register
        _memory(draw, instruction, regs, draw(targets(in_memory)) & M64, bases)
    encoder = iced.Encoder(64)
    try:
        encoder.encode(instruction, CODE)
    except ValueError:  # AH with REX, a RIP-relative target that is too far
        reject()
    return Snippet(encoder.take_buffer(), regs, bases["fs"], bases["gs"])
