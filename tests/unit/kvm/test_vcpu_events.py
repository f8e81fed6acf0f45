"""What KVM_GET_VCPU_EVENTS tells, and what is kept of it."""

from __future__ import annotations

from typing import Any

import pytest

from pyvmm.kvm.vcpu import Vcpu
from pyvmm.native import lib


@pytest.mark.parametrize(
    ("flags", "kept"), [(0, 0), (lib.KVM_VCPUEVENT_VALID_SMM, 0), (lib.KVM_VCPUEVENT_VALID_PAYLOAD, 1)]
)
def test_an_exception_that_kvm_tells_as_both_is_kept_as_injected(flags: int, kept: int) -> None:
    """Without KVM_CAP_EXCEPTION_PAYLOAD one that is pending is told as both, and read back as injected alone."""

    class Told(Vcpu):
        def __init__(self) -> None:
            pass

        def ioctl(self, name: str, argument: Any = None) -> int:
            argument.exception.injected = argument.exception.pending = 1
            argument.exception.nr, argument.flags = 6, flags
            return 0

    events = Told().get_events()
    assert (events.exception_injected, events.exception_pending, events.exception_nr) == (1, kept, 6)
