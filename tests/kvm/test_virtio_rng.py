"""The entropy device on real KVM: a bare-metal driver rings, is served and interrupted, and breaks its ring."""

from __future__ import annotations

from pathlib import Path

import pytest

from pyvmm.kvm.vm import Vm
from pyvmm.machine.builder import build_machine, install_kick_signal
from pyvmm.machine.config import MachineConfig
from pyvmm.machine.device_config import RngConfig
from tests.kvm.test_boot_entry import build

pytestmark = pytest.mark.kvm

SOURCE = Path(__file__).parent / "virtio_rng" / "guest.S"


@pytest.mark.parametrize("event_descriptors", [True, False])
def test_a_driver_gets_bytes_and_an_interrupt_and_is_told_of_its_broken_ring(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, event_descriptors: bool
) -> None:
    """Also where KVM has neither ioeventfd nor irqfd: by an exit and by two ioctls."""
    used: list[str] = []
    has = Vm.check_extension

    def check(vm: Vm, capability: str) -> int:
        if capability in ("KVM_CAP_IOEVENTFD", "KVM_CAP_IRQFD"):
            used.append(capability)
            return has(vm, capability) if event_descriptors else 0
        return has(vm, capability)

    monkeypatch.setattr(Vm, "check_extension", check)
    image, output = build(tmp_path, str(SOURCE), 0x100000).path, tmp_path / "output"
    install_kick_signal()
    config = MachineConfig(
        image=str(image), memory=32 << 20, devices=(RngConfig(),), timeout=60.0, serial=f"file:{output}"
    )
    with build_machine(config, frozenset()) as machine:
        ending = machine.run()
        machine.backend.flush(10.0)
    assert (ending.kind, ending.value) == ("debug-exit", 0x10)
    said = output.read_bytes()
    used_length, before, after, status = said[0], said[1], said[2], said[-1]
    assert (used_length, before, after, status) == (16, 1, 0, 0x4F)
    assert len(said) == 20 and said[3:19] != bytes(16)
    assert set(used) == {"KVM_CAP_IOEVENTFD", "KVM_CAP_IRQFD"}
