"""The machine code of every micro guest is what its text says (an assembler's mistake would be a wrong finding)."""

from __future__ import annotations

import pytest
from iced_x86 import Decoder, DecoderError, Formatter, FormatterSyntax

from pyvmm.host import micro_guests
from pyvmm.host.micro_guests import COUNTDOWN, INSTRUCTIONS, INT_80, MicroGuest
from pyvmm.host.probe_layout import DESCRIPTORS, KERNEL_CS64, USER_CS32, USER_CS64, USER_DS, Mode, segment

SINGLE = [value for value in vars(micro_guests).values() if isinstance(value, MicroGuest)]
ALL = {(g.text, g.bits): g for g in [*SINGLE, *COUNTDOWN.values(), *INT_80.values(), *(i.guest for i in INSTRUCTIONS)]}


@pytest.mark.parametrize("guest", ALL.values(), ids=[f"{text} ({bits})" for text, bits in ALL])
def test_code_is_what_the_text_says(guest: MicroGuest) -> None:
    formatter = Formatter(FormatterSyntax.MASM)
    formatter.branch_leading_zeros = False
    decoder = Decoder(guest.bits, guest.code, ip=0x8000)
    decoded = []
    for instruction in decoder:
        assert decoder.last_error == DecoderError.NONE
        decoded.append(formatter.format(instruction))
    # MASM's "qword ptr" and the like add nothing that the register operands do not say.
    plain = "; ".join(decoded)
    for size in ("byte", "word", "dword", "fword", "qword", "xmmword", "oword"):
        plain = plain.replace(f" {size} ptr ", " ").replace(f",{size} ptr ", ",")
    assert plain == guest.text


def test_instruction_names_are_unique() -> None:
    names = [each.name for each in INSTRUCTIONS]
    assert len(names) == len(set(names))


def test_every_mode_has_its_loop() -> None:
    assert COUNTDOWN.keys() == set(Mode)
    for mode, guest in COUNTDOWN.items():
        assert guest.bits == (16 if mode is Mode.REAL16 else 64 if mode.value.endswith("64") else 32)


def test_descriptors_hold_what_sysret_and_syscall_expect() -> None:
    """AMD APM volume 2, 6.1.1: SYSRET takes CS from STAR + 16 (64-bit) and SS from STAR + 8."""
    assert USER_CS64 == USER_CS32 + 16
    assert USER_DS == USER_CS32 + 8
    assert all(segment(s).dpl == 3 for s in (USER_CS32, USER_CS64, USER_DS))
    assert segment(USER_CS64).l == segment(KERNEL_CS64).l == 1
    assert (segment(USER_CS32).l, segment(USER_CS32).db) == (0, 1)
    assert len(DESCRIPTORS) == 9
