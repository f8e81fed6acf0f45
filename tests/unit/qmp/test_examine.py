"""What a person may type behind ``x``: any text, and memory with holes."""

from __future__ import annotations

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pyvmm.kvm.state import Regs
from pyvmm.qmp.human.examine import BadExpression, dump_lines, parse_address

REGS = Regs(rax=1, rsp=0x1000, rip=0xFFFF_FFFF_FFFF_FFF0)
MEMORY = bytes(range(256))


def read(at: int, size: int) -> bytes | None:
    return MEMORY[at : at + size] if at >= 0 and at + size <= len(MEMORY) else None


@pytest.mark.parametrize(
    ("text", "value"),
    [("0x10", 16), ("010", 8), ("10", 10), ("$rsp+8", 0x1008), (" $sp - 0x10 ", 0xFF0), ("$rip + 0x20", 0x10),
     ("-1", (1 << 64) - 1), ("$rax+$rax+1", 3)],
)  # fmt: skip
def test_addresses(text: str, value: int) -> None:
    assert parse_address(text, REGS) == value


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=12) | st.text("$rsipax0123x+- ", max_size=12))
def test_any_text_is_an_address_or_told_to_be_none(text: str) -> None:
    try:
        value = parse_address(text, REGS)
    except BadExpression as error:
        assert "\n" not in str(error).strip() or "\n" in text
    else:
        assert 0 <= value < 1 << 64


@settings(max_examples=200, deadline=None)
@given(
    st.integers(0, 260), st.integers(1, 80), st.sampled_from("xduo"), st.sampled_from([1, 2, 4, 8])
)
def test_what_is_shown_is_what_is_there(at: int, count: int, letter: str, size: int) -> None:
    lines = dump_lines(read, at, count, letter, size)
    shown = []
    for line in lines:
        address, _, cells = line.partition(":")
        if "Cannot" in cells:
            assert line is lines[-1]
            break
        assert int(address, 16) == at + size * len(shown)
        shown += [int(cell, 8 if letter == "o" else 0) for cell in cells.split()]
    else:
        assert len(shown) == count
    for number, value in enumerate(shown):
        piece = MEMORY[at + size * number :][:size]
        assert value == int.from_bytes(piece, "little", signed=letter == "d")
    if letter == "x":
        assert all(re.fullmatch(r"[0-9a-f]{16}:( 0x[0-9a-f]+)+", line) for line in lines if "Cannot" not in line)
