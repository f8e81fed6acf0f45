"""Devices brought to rest, and who is blamed when they are not."""

from __future__ import annotations

import time

import pytest

from pyvmm.devices.device import Device
from pyvmm.errors import DeadlineError
from pyvmm.machine.device_rest import CLOSE_DEADLINE, OVERDUE_DEADLINE, DeviceRest


class Spy(Device):
    """Notes what is asked of it."""

    def __init__(self, stuck: bool = False, reason: str | None = None) -> None:
        super().__init__()
        self.calls: list[str] = []
        self.stuck = stuck
        self.reason = reason
        self.given = 0.0

    def pause(self) -> None:
        self.calls.append("pause")
        if self.stuck:
            raise DeadlineError("stuck")

    def resume(self) -> None:
        self.calls.append("resume")

    def end_io(self, deadline: float) -> None:
        self.given = deadline - time.monotonic()

    def waits_for(self) -> str | None:
        return self.reason


def test_if_one_does_not_come_to_rest_all_go_on() -> None:
    first, second, third = Spy(), Spy(stuck=True), Spy()
    rest = DeviceRest([first, second, third])
    with pytest.raises(DeadlineError):
        rest.pause()
    rest.resume()  # nothing is at rest
    assert [spy.calls for spy in (first, second, third)] == [["pause", "resume"], ["pause"], []]
    second.stuck = False
    rest.pause()
    rest.pause()
    rest.resume()
    assert third.calls == ["pause", "resume"]


def test_all_devices_together_have_one_deadline_a_short_one_if_one_was_overdue() -> None:
    devices = [Spy(), Spy()]
    rest = DeviceRest(list(devices))
    rest.end_io()
    assert CLOSE_DEADLINE - 1 < devices[1].given <= devices[0].given <= CLOSE_DEADLINE
    devices[1].stuck = True
    with pytest.raises(DeadlineError):
        rest.pause()
    rest.end_io()
    assert devices[0].given <= OVERDUE_DEADLINE
    devices[1].stuck = False
    rest.pause()
    rest.end_io()
    assert devices[0].given > CLOSE_DEADLINE - 1


def test_the_device_that_keeps_a_vcpu_is_named_and_not_the_vcpu() -> None:
    rest = DeviceRest([Spy(), Spy(reason="disk a: is slow"), Spy(reason="disk b")])
    with pytest.raises(DeadlineError, match=r"^disk a: is slow$"), rest.named():
        raise DeadlineError("vCPU 0 did not stop")
    with pytest.raises(DeadlineError, match=r"^vCPU 0 did not stop$"), DeviceRest([Spy()]).named():
        raise DeadlineError("vCPU 0 did not stop")
