"""The balloon on real KVM: what the guest gives leaves the host's memory, and reads as zeros when it comes back."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from pyvmm.machine.builder import build_machine, install_kick_signal
from pyvmm.machine.config import MachineConfig
from pyvmm.machine.device_config import BalloonConfig
from pyvmm.memory.guest_memory import PAGE_SIZE
from pyvmm.virtio.balloon import VirtioBalloon
from pyvmm.virtio.mmio import VirtioMmio
from tests.kvm.test_boot_entry import build

pytestmark = pytest.mark.kvm

SOURCE = Path(__file__).parent / "virtio_balloon" / "guest.S"
TARGET = 60


def test_pages_leave_the_host_and_come_back_as_zeros(tmp_path: Path) -> None:
    image, output = build(tmp_path, str(SOURCE), 0x100000).path, tmp_path / "output"
    install_kick_signal()
    config = MachineConfig(
        image=str(image), memory=32 << 20, devices=(BalloonConfig(target=TARGET * PAGE_SIZE),), timeout=60.0,
        serial=f"file:{output}",
    )  # fmt: skip
    held: dict[str, int] = {}
    with build_machine(config, frozenset()) as machine:
        transport = next(device for device in machine.devices if isinstance(device, VirtioMmio))
        balloon = transport.device
        assert isinstance(balloon, VirtioBalloon)
        region = machine.memory.regions[0]
        give_back, take_back = balloon._inflate, balloon.set_target

        def blocks() -> int:
            return os.fstat(region.fd).st_blocks // 8

        def look() -> None:
            if balloon.actual != TARGET * PAGE_SIZE:
                machine.loop.call_later(0.05, look)
                return
            held["after"] = blocks()
            take_back(0)

        def inflate(*arguments: object) -> bool:
            held.setdefault("before", blocks())
            return give_back(balloon.queues[0])

        balloon._SERVERS = (inflate, *balloon._SERVERS[1:])
        machine.loop.call_later(0.05, look)
        ending = machine.run()
        machine.backend.flush(10.0)
        assert region.dirty.test(0x400) and not region.dirty.test(0x400 + TARGET)
    assert (ending.kind, ending.value) == ("debug-exit", 0x10)
    assert output.read_bytes() == bytes([TARGET, 1])
    assert held["before"] - held["after"] == TARGET
    assert balloon.actual == 0
