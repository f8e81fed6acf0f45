"""What goes wrong with a machine: defects of devices, readers that never read, builds that fail half way."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from pyvmm.devices.device import Device
from pyvmm.errors import ConfigError, DeadlineError, HostError, ImageError, PyvmmError
from pyvmm.machine import parking, vcpu_thread
from pyvmm.machine.builder import build_machine
from pyvmm.machine.config import DebugExitConfig, MachineConfig
from pyvmm.machine.ending import Ending
from pyvmm.machine.machine import Machine
from pyvmm.machine.run_state import RunState
from pyvmm.native import lib
from tests.framework.port_devices import PORT, Actor
from tests.framework.real_mode import COUNT_FOREVER, HLT_FOREVER, SPIN, image, out8, text
from tests.unit.arch.x86.boot.images import Seg, elf

Build = Callable[..., Machine]


def test_what_a_vcpu_thread_raises_surfaces(machine_of: Build) -> None:
    def act(value: int) -> None:
        raise ZeroDivisionError("a device's defect")

    machine = machine_of(out8(PORT, 1) + SPIN, cpus=2)
    machine.ports.claim(PORT, 1, Actor(act))
    with pytest.raises(ZeroDivisionError, match="a device's defect"):
        machine.run()


def test_also_when_it_had_the_ring(machine_of: Build) -> None:
    """The write came out of KVM's ring, more are in it, and the loop's thread goes there, too."""

    def act(value: int) -> None:
        time.sleep(0.1)
        raise ZeroDivisionError("a device's defect")

    machine = machine_of(text(b"many bytes") + out8(PORT, 1) + SPIN)
    lib.pv_vm_set_sink(machine.vm.native, 0xE9, -1)
    machine.ports.release(0xE9)
    machine.ports.claim(0xE9, 1, Actor(act))
    with pytest.raises(ZeroDivisionError):
        machine.run()


def test_a_vcpu_that_a_device_keeps_is_told_and_nothing_is_taken_from_under_it(
    machine_of: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vcpu_thread, "PARK_DEADLINE", 0.3)
    monkeypatch.setattr(parking, "PARK_DEADLINE", 0.3)
    arrived, leave = threading.Event(), threading.Event()

    def act(value: int) -> None:
        arrived.set()
        assert leave.wait(30)

    machine = machine_of(out8(PORT, 1) + out8(PORT, 2) + HLT_FOREVER)
    actor = Actor(act)
    machine.ports.claim(PORT, 1, actor)
    machine.start()
    assert arrived.wait(10)
    for operation in (machine.pause, machine.close):
        with pytest.raises(DeadlineError, match="vCPU 0"):
            operation()
    assert machine.vm.fd >= 0 and machine.vcpus[0].fd >= 0
    leave.set()
    machine.close()
    assert machine.vm.fd < 0 and actor.written == [1]


class Restless(Device):
    """Counts its pauses; the first ``busy`` of them fail."""

    def __init__(self, busy: int = 0) -> None:
        self.busy = busy
        self.pauses = 0

    def pause(self) -> None:
        if self.busy:
            self.busy -= 1
            raise DeadlineError("a request did not end")
        self.pauses += 1

    def resume(self) -> None:
        self.pauses -= 1


def test_a_device_that_does_not_come_to_rest_leaves_the_machine_running(machine_of: Build) -> None:
    machine = machine_of(COUNT_FOREVER)
    quiet, busy = Restless(), Restless(busy=1)
    machine.devices += [quiet, busy]
    machine.start()
    with pytest.raises(DeadlineError, match="a request did not end"):
        machine.pause()
    assert quiet.pauses == busy.pauses == 0 and machine.run_state is RunState.RUNNING
    machine.pause()
    assert quiet.pauses == busy.pauses == 1


@pytest.mark.parametrize("interrupts", [0, 2], ids=["collected natively", "by the device"])
def test_a_console_nobody_reads_stops_the_guest_and_nothing_else(
    machine_of: Build, tmp_path: Path, interrupts: int
) -> None:
    # out 0x3f9, interrupts; mov dx,0x3f8; 1: out dx,al; jmp 1b
    code = out8(0x3F9, interrupts) + b"\xba\xf8\x03\xee\xeb\xfd"
    machine = machine_of(code, serial=f"unix:{tmp_path}/s", timeout=4.0)
    machine.backend._output = None
    client = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    client.connect(f"{tmp_path}/s")
    longest = 0

    def look() -> None:
        nonlocal longest
        if (output := machine.backend._output) is not None:
            waiting = len(output._buffer)
            longest = max(longest, waiting)
            if not machine.backend.gate.full:  # save the guest the time: it has the last kilobyte to write
                output(b"x" * max(0, (1 << 20) - 1024 - waiting))
        machine.loop.call_later(0.02, look)

    look()
    began = time.monotonic()
    assert machine.run().kind == "timeout"
    assert time.monotonic() - began < 12
    assert machine.backend.gate.full
    assert 1 << 19 <= longest < (1 << 20) + 4 * 65536
    client.close()


@pytest.mark.parametrize(
    ("error", "options"),
    [
        (ImageError, {"image": "/nonexistent"}),
        (ImageError, {"image": "/proc/version"}),
        (ImageError, {"image": "/"}),
        (ImageError, {"initrd": "/nonexistent", "image": "ELF"}),
        (ImageError, {"memory": 1 << 20, "image": "BIG"}),
        (ConfigError, {"serial": "file:/nonexistent/file"}),
        (ConfigError, {"serial": "unix:/nonexistent/socket"}),
        (ConfigError, {"serial": "unix:/" + "x" * 200}),
        (HostError, {"memory": 1 << 40}),
        (PyvmmError, {"debug_exit": DebugExitConfig(port=0x80)}),
        (ConfigError, {"debug_exit": DebugExitConfig(size=3)}),
    ],
)
def test_building_half_a_machine_leaves_nothing(
    tmp_path: Path, error: type[Exception], options: dict[str, object]
) -> None:
    """The autouse fixture looks for threads and descriptors afterwards."""
    made = {"ELF": elf([Seg(1 << 20, b"\xf4")], 1 << 20), "BIG": elf([Seg(1 << 20, b"\xf4" * 4096)], 1 << 20)}
    options = options | {"image": options.get("image", image(tmp_path, HLT_FOREVER))}
    if options["image"] in made:
        (tmp_path / "kernel").write_bytes(made[str(options["image"])])
        options["image"] = str(tmp_path / "kernel")
    settings: dict[str, object] = {"serial": "null", "memory": 4 << 20} | options
    with pytest.raises(error) as caught:
        build_machine(MachineConfig(**settings), frozenset())  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("state", ["prelaunch", "started", "paused", "ended", "resetting"])
def test_closing_in_any_state_leaves_nothing(machine_of: Build, state: str) -> None:
    machine = machine_of(COUNT_FOREVER, cpus=2, serial="null")
    if state != "prelaunch":
        machine.start()
    if state == "paused":
        machine.pause()
    elif state == "ended":
        machine.request_end(Ending(kind="quit"))
        machine.loop.run()
    elif state == "resetting":
        machine.request_reset("test")  # asked for, never carried out
    machine.close()
    assert not any(thread._thread.is_alive() for thread in machine.threads)
    machine.close()  # twice is once
    machine.request_end(Ending(kind="quit"))  # a timer that comes late finds nothing to do
