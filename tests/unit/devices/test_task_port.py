"""The port that a waiting guest gets its task from."""

from __future__ import annotations

import pytest

from pyvmm.devices.bus import PORT_SPACE, Bus
from pyvmm.devices.task_port import TASK_MAX, TaskPort
from pyvmm.errors import SectionError


def test_a_task_is_read_byte_by_byte_anywhere_in_the_window_and_in_any_width() -> None:
    port, bus = TaskPort(), Bus("io", PORT_SPACE)
    bus.claim(0x580, 64, port)
    port.give(b"abcdefg")
    assert bus.read(0x580, 1) == ord("a")
    assert bus.read(0x5BF, 1) == ord("b")
    assert bus.read(0x590, 4) == int.from_bytes(b"cdef", "little")
    assert [bus.read(0x580, 1) for _ in range(3)] == [ord("g"), 0, 0]


def test_writes_say_ready_and_change_nothing() -> None:
    port = TaskPort()
    said: list[int] = []
    port.on_ready = lambda: said.append(1)
    port.give(b"xy")
    before = port.save()
    port.write(0, 1, 0x52)
    port.write(63, 1, 0)
    assert said == [1, 1] and port.save() == before


def test_what_is_read_is_not_read_again_elsewhere() -> None:
    port, other = TaskPort(), TaskPort()
    port.give(b"xyz")
    port.read(0, 1)
    other.load(port.save())
    assert [other.read(0, 1) for _ in range(3)] == [ord("y"), ord("z"), 0]


def test_limits() -> None:
    port = TaskPort()
    with pytest.raises(ValueError, match="131073 bytes"):
        port.give(bytes(TASK_MAX + 1))
    with pytest.raises(SectionError, match="position"):
        port.load({"task": b"ab", "position": 3})
    with pytest.raises(SectionError, match="task"):
        port.load({"task": bytes(TASK_MAX + 1), "position": 0})
