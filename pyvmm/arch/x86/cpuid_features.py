"""CPU features by name: where CPUID tells them. Names are those of Linux's /proc/cpuinfo and ``clearcpuid=``.

Sources: Intel SDM volume 2A, CPUID, tables 3-8 to 3-11; AMD APM volume 3, appendix E.
"""

from __future__ import annotations

from typing import Final, Literal, NamedTuple

Register = Literal["eax", "ebx", "ecx", "edx"]


class Feature(NamedTuple):
    """One bit of one leaf."""

    function: int
    subleaf: int
    register: Register
    bit: int


def _leaf(function: int, index: int, register: Register, names: dict[int, str]) -> dict[str, Feature]:
    return {name: Feature(function, index, register, bit) for bit, name in names.items()}


_1_ECX = {
    0: "pni",
    1: "pclmulqdq",
    3: "monitor",
    9: "ssse3",
    12: "fma",
    13: "cx16",
    15: "pdcm",
    17: "pcid",
    19: "sse4_1",
    20: "sse4_2",
    21: "x2apic",
    22: "movbe",
    23: "popcnt",
    24: "tsc_deadline_timer",
    25: "aes",
    26: "xsave",
    28: "avx",
    29: "f16c",
    30: "rdrand",
    31: "hypervisor",
}
_1_EDX = {
    0: "fpu",
    1: "vme",
    2: "de",
    3: "pse",
    4: "tsc",
    5: "msr",
    6: "pae",
    7: "mce",
    8: "cx8",
    9: "apic",
    11: "sep",
    12: "mtrr",
    13: "pge",
    14: "mca",
    15: "cmov",
    16: "pat",
    17: "pse36",
    19: "clflush",
    23: "mmx",
    24: "fxsr",
    25: "sse",
    26: "sse2",
    28: "ht",
}
_7_EBX = {
    0: "fsgsbase",
    1: "tsc_adjust",
    3: "bmi1",
    4: "hle",
    5: "avx2",
    7: "smep",
    8: "bmi2",
    9: "erms",
    10: "invpcid",
    11: "rtm",
    14: "mpx",
    16: "avx512f",
    17: "avx512dq",
    18: "rdseed",
    19: "adx",
    20: "smap",
    21: "avx512ifma",
    23: "clflushopt",
    24: "clwb",
    28: "avx512cd",
    29: "sha_ni",
    30: "avx512bw",
    31: "avx512vl",
}
_7_ECX = {
    1: "avx512vbmi",
    2: "umip",
    3: "pku",
    5: "waitpkg",
    6: "avx512_vbmi2",
    8: "gfni",
    9: "vaes",
    10: "vpclmulqdq",
    11: "avx512_vnni",
    12: "avx512_bitalg",
    14: "avx512_vpopcntdq",
    16: "la57",
    22: "rdpid",
    24: "bus_lock_detect",
    25: "cldemote",
    27: "movdiri",
    28: "movdir64b",
}
_7_EDX = {4: "fsrm", 14: "serialize", 16: "tsxldtrk", 20: "ibt", 22: "amx_bf16", 24: "amx_tile", 25: "amx_int8"}
_7_1_EAX = {4: "avx_vnni", 5: "avx512_bf16", 10: "fzrm", 11: "fsrs", 12: "fsrc", 26: "lam"}
_D_1_EAX = {0: "xsaveopt", 1: "xsavec", 2: "xgetbv1", 3: "xsaves"}
_EXT_1_ECX = {
    0: "lahf_lm",
    1: "cmp_legacy",
    2: "svm",
    4: "cr8_legacy",
    5: "abm",
    6: "sse4a",
    7: "misalignsse",
    8: "3dnowprefetch",
    9: "osvw",
    11: "xop",
    16: "fma4",
    21: "tbm",
    22: "topoext",
    29: "mwaitx",
}
_EXT_1_EDX = {11: "syscall", 20: "nx", 22: "mmxext", 25: "fxsr_opt", 26: "pdpe1gb", 27: "rdtscp", 29: "lm"}
_EXT_8_EBX = {0: "clzero", 2: "xsaveerptr", 9: "wbnoinvd"}

FEATURES: Final[dict[str, Feature]] = {
    **_leaf(1, 0, "ecx", _1_ECX),
    **_leaf(1, 0, "edx", _1_EDX),
    **_leaf(7, 0, "ebx", _7_EBX),
    **_leaf(7, 0, "ecx", _7_ECX),
    **_leaf(7, 0, "edx", _7_EDX),
    **_leaf(7, 1, "eax", _7_1_EAX),
    **_leaf(0xD, 1, "eax", _D_1_EAX),
    **_leaf(0x80000001, 0, "ecx", _EXT_1_ECX),
    **_leaf(0x80000001, 0, "edx", _EXT_1_EDX),
    **_leaf(0x80000008, 0, "ebx", _EXT_8_EBX),
    "arat": Feature(6, 0, "eax", 2),
}
"""Every feature pyvmm knows by name."""
