"""How often a guest that writes a lot wakes the main loop, and that its first byte needs no tick."""

from __future__ import annotations

import struct
import time
from collections.abc import Callable

import pytest

from pyvmm.machine import output_watch
from pyvmm.machine.machine import Machine
from pyvmm.machine.output_watch import RING_TICK
from tests.framework.real_mode import SPIN, out8

BYTES = 4096


def test_a_stream_of_bytes_wakes_the_loop_by_the_tick_not_by_the_byte(machine_of: Callable[..., Machine]) -> None:
    # mov cx, BYTES; mov dx, 0x3f8; 1: out dx, al; loop 1b
    machine = machine_of(b"\xb9" + struct.pack("<H", BYTES) + b"\xba\xf8\x03\xee\xe2\xfd" + out8(0xF4, 0))
    machine.vm.unregister_coalesced(0x3F8, 1, pio=True)
    pieces: list[bytes] = []
    machine.backend.observe = pieces.append
    started = time.monotonic()
    machine.run()
    ticks = (time.monotonic() - started) / RING_TICK
    assert len(b"".join(pieces)) == BYTES
    # Each tick drains, and so does the first byte after it; the end drains, too.
    assert len(pieces) <= 2 * ticks + 4


def test_the_first_byte_does_not_wait_for_a_tick(
    machine_of: Callable[..., Machine], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(output_watch, "RING_TICK", 1000.0)
    machine = machine_of(out8(0x3F8, ord("x")) + SPIN)
    machine.vm.unregister_coalesced(0x3F8, 1, pio=True)
    seen: list[bytes] = []
    machine.backend.observe = seen.append
    machine.start()
    deadline = time.monotonic() + 10
    while not seen and time.monotonic() < deadline:
        machine.loop.run_once(0.5)
    machine.pause()
    assert seen == [b"x"]
