"""The task port: a guest that is ready asks for something to do.

A window of ports. Any write says "ready": the guest stands at a point that it can be saved at, and may be brought back
to in another process any number of times. Any read gives the next byte of the task that the host has for it, so a
driver may read the window as one string; behind its end, and while there is none, zeros. What a task means is between
the host's program and the guest's (cli/fast_linux.py and guests/linux/init.c).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated

from msgspec import Meta

from pyvmm.devices.state import DeviceState, StatefulDevice
from pyvmm.registers import Register, RegisterTable
from pyvmm.trace import trace_group

T = trace_group("devices")

TASK_MAX = 128 << 10


class TaskPortState(DeviceState):
    """The task, and how much of it was read."""

    task: Annotated[bytes, Meta(max_length=TASK_MAX)] = b""
    position: Annotated[int, Meta(ge=0, le=TASK_MAX)] = 0

    def problem(self) -> tuple[str, str] | None:
        """No more is read than there is."""
        return ("position", "is behind the task's end") if self.position > len(self.task) else None


class TaskPort(StatefulDevice[TaskPortState]):
    """``on_ready`` is called with the lock held, in the thread of the vCPU that wrote."""

    section_id = "task-port"
    registers = RegisterTable("task port", (
        Register(0, "READY", "the guest asks for something to do", size=64, access="w"),
        Register(0, "TASK", "the task's next byte", size=64, access="r"),
    ))  # fmt: skip

    def __init__(self) -> None:
        super().__init__(TaskPortState)
        self.on_ready: Callable[[], None] = lambda: None

    def give(self, task: bytes) -> None:
        """The next reads give ``task``, at most :data:`TASK_MAX` bytes."""
        if len(task) > TASK_MAX:
            raise ValueError(f"a task of {len(task)} bytes")
        with self.lock:
            self.state.task, self.state.position = task, 0

    def read(self, offset: int, size: int) -> int:
        """The next byte."""
        s = self.state
        if s.position == len(s.task):
            return 0
        s.position += 1
        return s.task[s.position - 1]

    def write(self, offset: int, size: int, value: int) -> None:
        """The guest is ready."""
        T.task_port_ready.on and T.task_port_ready(value & 0xFF)
        self.on_ready()
