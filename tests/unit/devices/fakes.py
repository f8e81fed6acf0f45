"""What stands in for the machine: an interrupt line, hints, a clock; and one of each device."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from pyvmm.devices.acpi_pm import AcpiPm
from pyvmm.devices.debug_console import DebugConsole
from pyvmm.devices.debug_exit import DebugExit
from pyvmm.devices.fw_cfg import FwCfg
from pyvmm.devices.i8042 import I8042
from pyvmm.devices.post import PostPort
from pyvmm.devices.reset_control import ResetControl
from pyvmm.devices.rtc import Rtc
from pyvmm.devices.serial import Serial
from pyvmm.devices.shutdown_port import ShutdownPort
from pyvmm.devices.state import StatefulDevice
from pyvmm.devices.system_port_a import SystemPortA
from pyvmm.devices.task_port import TaskPort
from pyvmm.devices.testdev import LINE_COUNT, TestDevice


@dataclass
class FakeLine:
    """Remembers every level it was driven to."""

    driven: list[bool] = field(default_factory=list)

    def set_level(self, level: bool) -> None:
        self.driven.append(level)

    @property
    def level(self) -> bool:
        return bool(self.driven) and self.driven[-1]

    @property
    def edges(self) -> int:
        """Rising edges so far."""
        before = [False, *self.driven[:-1]]
        return sum(now and not then for then, now in zip(before, self.driven, strict=True))


@dataclass
class FakeHint:
    """The native loop's tables, by offset."""

    sinks: set[int] = field(default_factory=set)
    latches: dict[int, int] = field(default_factory=dict)

    def set_sink(self, offset: int, on: bool) -> None:
        if on:
            self.sinks.add(offset)
        else:
            self.sinks.discard(offset)

    def set_latch(self, offset: int, value: int | None) -> None:
        if value is None:
            self.latches.pop(offset, None)
        else:
            self.latches[offset] = value


@dataclass
class FakeClock:
    """Nanoseconds since 1970, moved by the test."""

    now: int = 1_700_000_000 * 10**9

    def __call__(self) -> int:
        return self.now


def nothing(*_: Any) -> None:
    """A callback nobody looks at."""


AnyDevice = StatefulDevice[Any]

def _task_port() -> TaskPort:
    port = TaskPort()
    port.give(b"something to do")
    return port


MAKERS: dict[str, tuple[Callable[[], AnyDevice], int]] = {
    "acpi-pm": (lambda: AcpiPm(nothing, FakeLine()), 8),
    "debug-console": (lambda: DebugConsole(nothing, FakeHint()), 1),
    "debug-exit": (lambda: DebugExit(nothing, 4), 4),
    "fw-cfg": (lambda: FwCfg(ram=1 << 30, cpus=2), 2),
    "i8042": (lambda: I8042(nothing, FakeLine()), 5),
    "post": (lambda: PostPort(FakeHint()), 1),
    "reset-control": (lambda: ResetControl(nothing), 1),
    "rtc": (lambda: Rtc(FakeClock(), low_ram=1 << 30, high_ram=1 << 32, cpus=2), 2),
    "serial": (lambda: Serial(nothing, FakeLine(), FakeHint()), 8),
    "shutdown-port": (lambda: ShutdownPort(nothing), 1),
    "system-port-a": (lambda: SystemPortA(nothing), 1),
    "task-port": (_task_port, 8),
    "testdev": (lambda: TestDevice([FakeLine() for _ in range(LINE_COUNT)], nothing), 12),
}
"""Section id -> (a fresh device, ports it has)."""
