"""Escape keys, and a terminal that is put back."""

from __future__ import annotations

import os
import pty
import termios

from hypothesis import given
from hypothesis import strategies as st

from pyvmm.cli.terminal import EscapeKeys, raw_terminal


@given(st.binary(max_size=50), st.integers(1, 5))
def test_input_passes_unless_it_is_an_escape_sequence(data: bytes, step: int) -> None:
    """Ctrl-A doubled is Ctrl-A; how input is cut into reads does not matter."""
    quits: list[None] = []
    keys = EscapeKeys(lambda: quits.append(None), lambda text: None)
    doubled = data.replace(b"\x01", b"\x01\x01")
    out = b"".join(keys(doubled[i : i + step]) for i in range(0, len(doubled), step))
    assert out == data
    assert not quits


def test_ctrl_a_x_quits_also_when_split() -> None:
    quits: list[None] = []
    keys = EscapeKeys(lambda: quits.append(None), lambda text: None)
    assert keys(b"ab\x01") + keys(b"xcd") == b"abcd"
    assert len(quits) == 1


def test_raw_mode_is_undone() -> None:
    master, slave = pty.openpty()
    before = termios.tcgetattr(slave)
    with raw_terminal(slave) as raw:
        assert raw
        assert not termios.tcgetattr(slave)[3] & termios.ICANON
    assert termios.tcgetattr(slave) == before
    os.close(master)
    os.close(slave)


def test_what_is_no_terminal_is_left_alone() -> None:
    out, into = os.pipe()
    with raw_terminal(out) as raw:
        assert not raw
    os.close(out)
    os.close(into)
