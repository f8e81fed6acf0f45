"""The micro guests: a few bytes of machine code each, with its assembly (Intel syntax) beside it.

A unit test decodes every one of them and compares it with the text, so the two cannot drift apart. Each is
followed by the HLT that :class:`~pyvmm.host.probe_vm.ProbeVm` appends.
"""

from __future__ import annotations

from typing import Final, NamedTuple

from pyvmm.host.probe_layout import DATA, USER_VECTOR, Mode


class MicroGuest(NamedTuple):
    """Code for one mode. ``text`` has one instruction per ``;``."""

    text: str
    code: bytes
    bits: int = 64


_LOOP_16 = MicroGuest("dec ecx; jne short 8000h", bytes.fromhex("66 ff c9 75 fb"), 16)
_LOOP_32 = MicroGuest("dec ecx; jne short 8000h", bytes.fromhex("ff c9 75 fc"), 32)
_LOOP_64 = MicroGuest("dec ecx; jne short 8000h", bytes.fromhex("ff c9 75 fc"))

COUNTDOWN: Final = {
    Mode.REAL16: _LOOP_16,
    Mode.PROT32: _LOOP_32,
    Mode.LONG64: _LOOP_64,
    Mode.USER32: _LOOP_32,
    Mode.USER64: _LOOP_64,
}
"""ECX rounds of two instructions."""

READ_PORT: Final = MicroGuest("in al,dx; dec ecx; jne short 8000h", bytes.fromhex("ec ff c9 75 fb"))
"""ECX port reads, one exit each."""

FILL: Final = MicroGuest("rep stosb", bytes.fromhex("f3 aa"))
"""ECX bytes at RDI."""

CPUID: Final = MicroGuest("cpuid", bytes.fromhex("0f a2"))
SYSCALL: Final = MicroGuest("syscall", bytes.fromhex("0f 05"))
SYSRET: Final = MicroGuest("sysretq", bytes.fromhex("48 0f 07"))
INT_80: Final = {
    Mode.USER32: MicroGuest("int 80h", bytes.fromhex("cd 80"), 32),
    Mode.USER64: MicroGuest("int 80h", bytes.fromhex("cd 80")),
}
READ_TSC: Final = MicroGuest("rdtsc", bytes.fromhex("0f 31"))
LOAD_BYTE: Final = MicroGuest("mov al,[rbx]", bytes.fromhex("8a 03"))
STORE_BYTE: Final = MicroGuest("mov [rbx],al", bytes.fromhex("88 03"))


class Instruction(NamedTuple):
    """One instruction to try at CPL 0 in long mode."""

    name: str
    guest: MicroGuest
    vector: int = -1
    """The exception it is meant to raise."""
    rcx: int = 0
    rdx: int = 0
    rax: int | None = None
    """RAX afterwards, where that tells a wrong result: an emulator that skips a prefix takes LZCNT for BSR."""


def _instruction(
    name: str, text: str, code: str, *, vector: int = -1, rcx: int = 0, rdx: int = 0, rax: int | None = None
) -> Instruction:
    return Instruction(name, MicroGuest(text, bytes.fromhex(code)), vector, rcx, rdx, rax)


# Registers at entry: RAX 2 (INVPCID's kind of flush), RBX a zeroed, 64-byte aligned page (an XRSTOR or FXRSTOR
# from it is valid), RCX and RDX 0 unless said (XCR0; with EAX the state components to save).
INSTRUCTIONS: Final = (
    _instruction("int3", "int 3", "cc", vector=3),
    _instruction("int", "int 80h", "cd 80", vector=USER_VECTOR),
    _instruction("popcnt", "popcnt rax,rcx", "f3 48 0f b8 c1", rcx=0x50, rax=2),
    _instruction("lzcnt", "lzcnt rax,rcx", "f3 48 0f bd c1", rax=64),
    _instruction("tzcnt", "tzcnt rax,rcx", "f3 48 0f bc c1", rax=64),
    _instruction("andn", "andn rax,rcx,rbx", "c4 e2 f0 f2 c3", rcx=0x50, rax=DATA),
    _instruction("blsr", "blsr rax,rcx", "c4 e2 f8 f3 c9", rcx=0x50, rax=0x40),
    _instruction("bextr", "bextr rax,rcx,rdx", "c4 e2 e8 f7 c1", rcx=0x50, rdx=0x404, rax=5),
    _instruction("bzhi", "bzhi rax,rcx,rdx", "c4 e2 e8 f5 c1", rcx=0x57, rdx=4, rax=7),
    _instruction("rorx", "rorx rax,rcx,1", "c4 e3 fb f0 c1 01", rcx=0x50, rax=0x28),
    _instruction("shlx", "shlx rax,rcx,rdx", "c4 e2 e9 f7 c1", rcx=0x50, rdx=4, rax=0x500),
    _instruction("mulx", "mulx rax,rcx,rbx", "c4 e2 f3 f6 c3", rdx=1 << 63, rax=DATA >> 1),
    _instruction("pdep", "pdep rax,rcx,rdx", "c4 e2 f3 f5 c2", rcx=3, rdx=0x50, rax=0x50),
    _instruction("adcx", "adcx rax,rcx", "66 48 0f 38 f6 c1", rcx=0x50, rax=0x52),
    _instruction("adox", "adox rax,rcx", "f3 48 0f 38 f6 c1", rcx=0x50, rax=0x52),
    _instruction("movbe", "movbe eax,[rbx]", "0f 38 f0 03", rax=0),
    _instruction("crc32", "crc32 eax,ecx", "f2 0f 38 f1 c1"),
    _instruction("cmpxchg8b", "cmpxchg8b [rbx]", "0f c7 0b", rax=0),
    _instruction("cmpxchg16b", "cmpxchg16b [rbx]", "48 0f c7 0b", rax=0),
    _instruction("clac", "clac", "0f 01 ca"),
    _instruction("stac", "stac", "0f 01 cb"),
    _instruction("xsave", "xsave [rbx]", "0f ae 23"),
    _instruction("xsaveopt", "xsaveopt [rbx]", "0f ae 33"),
    _instruction("xsavec", "xsavec [rbx]", "0f c7 23"),
    _instruction("xsaves", "xsaves [rbx]", "0f c7 2b"),
    _instruction("xrstor", "xrstor [rbx]", "0f ae 2b"),
    _instruction("xrstors", "xrstors [rbx]", "0f c7 1b"),
    _instruction("xgetbv", "xgetbv", "0f 01 d0"),
    _instruction("fxsave", "fxsave64 [rbx]", "48 0f ae 03"),
    _instruction("fxrstor", "fxrstor64 [rbx]", "48 0f ae 0b"),
    _instruction("fwait", "wait", "9b"),
    _instruction("fninit", "fninit", "db e3"),
    _instruction("fnclex", "fnclex", "db e2"),
    _instruction("fnstcw", "fnstcw [rbx]", "d9 3b"),
    _instruction("fldcw", "fldcw [rbx]", "d9 2b"),
    _instruction("fnstsw", "fnstsw ax", "df e0"),
    _instruction("emms", "emms", "0f 77"),
    _instruction("ldmxcsr", "ldmxcsr [rbx]", "0f ae 13"),
    _instruction("stmxcsr", "stmxcsr [rbx]", "0f ae 1b"),
    _instruction("movups", "movups xmm0,[rbx]", "0f 10 03"),
    _instruction("movaps", "movaps [rbx],xmm0", "0f 29 03"),
    _instruction("movdqa", "movdqa xmm0,[rbx]", "66 0f 6f 03"),
    _instruction("movdqu", "movdqu [rbx],xmm0", "f3 0f 7f 03"),
    _instruction("movq", "movq xmm0,rax", "66 48 0f 6e c0"),
    _instruction("pxor", "pxor xmm0,xmm0", "66 0f ef c0"),
    _instruction("movntdq", "movntdq [rbx],xmm0", "66 0f e7 03"),
    _instruction("movnti", "movnti [rbx],rax", "48 0f c3 03"),
    _instruction("rdrand", "rdrand rax", "48 0f c7 f0"),
    _instruction("rdseed", "rdseed rax", "48 0f c7 f8"),
    _instruction("rdpid", "rdpid rax", "f3 0f c7 f8"),
    _instruction("rdtscp", "rdtscp", "0f 01 f9"),
    _instruction("rdfsbase", "rdfsbase rax", "f3 48 0f ae c0"),
    _instruction("wrfsbase", "wrfsbase rax", "f3 48 0f ae d0"),
    _instruction("rdgsbase", "rdgsbase rax", "f3 48 0f ae c8"),
    _instruction("wrgsbase", "wrgsbase rax", "f3 48 0f ae d8"),
    _instruction("swapgs", "swapgs", "0f 01 f8"),
    _instruction("invpcid", "invpcid rax,[rbx]", "66 0f 38 82 03"),
    _instruction("invlpg", "invlpg [rbx]", "0f 01 3b"),
    _instruction("wbinvd", "wbinvd", "0f 09"),
    _instruction("clflush", "clflush [rbx]", "0f ae 3b"),
    _instruction("clflushopt", "clflushopt [rbx]", "66 0f ae 3b"),
    _instruction("clwb", "clwb [rbx]", "66 0f ae 33"),
    _instruction("lfence", "lfence", "0f ae e8"),
    _instruction("mfence", "mfence", "0f ae f0"),
    _instruction("sfence", "sfence", "0f ae f8"),
    _instruction("prefetcht0", "prefetcht0 [rbx]", "0f 18 0b"),
    _instruction("pause", "pause", "f3 90"),
    _instruction("lsl", "lsl eax,ecx", "0f 03 c1", rax=2),
    _instruction("lar", "lar eax,ecx", "0f 02 c1", rax=2),
    _instruction("verw", "verw [rbx]", "0f 00 2b"),
    _instruction("sgdt", "sgdt [rbx]", "0f 01 03"),
    _instruction("smsw", "smsw eax", "0f 01 e0"),
)
"""What Linux runs at CPL 0 and an instruction emulator may not know."""
