"""Devices brought to rest; if one does not come to it, that one is named and not the vCPU that waits for it."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

from pyvmm.devices.device import Device
from pyvmm.errors import DeadlineError

CLOSE_DEADLINE = 5.0
"""Seconds that all devices' threads together have to end."""
OVERDUE_DEADLINE = 0.5
"""The same, when one of them has had its time already."""


class DeviceRest:
    """Whether ``devices`` stand still."""

    def __init__(self, devices: list[Device]) -> None:
        self._devices = devices
        self._paused = False
        self._overdue = False

    def pause(self) -> None:
        """Let no device touch guest memory; DeadlineError, and all go on, if one does not come to rest."""
        if self._paused:
            return
        with contextlib.ExitStack() as undo:
            for device in self._one_by_one():
                device.pause()
                undo.callback(device.resume)
            undo.pop_all()
        self._paused = True

    def resume(self) -> None:
        """Let them again."""
        if self._paused:
            for device in self._devices:
                device.resume()
            self._paused = False

    def reset(self) -> None:
        """Every device as at power-on; DeadlineError if one has something under way that does not end."""
        for device in self._one_by_one():
            device.reset()

    def _one_by_one(self) -> Iterator[Device]:
        for device in self._devices:
            self._overdue = True
            yield device
            self._overdue = False  # not reached if it raised

    def end_io(self) -> None:
        """End the threads that devices have. DeadlineError if one does not: nothing may be given back then."""
        deadline = time.monotonic() + (OVERDUE_DEADLINE if self._overdue else CLOSE_DEADLINE)
        for device in self._devices:
            device.end_io(deadline)

    @contextlib.contextmanager
    def named(self) -> Iterator[None]:
        """A DeadlineError inside becomes one that names the device that is to blame, if one is."""
        try:
            yield
        except DeadlineError as error:
            reason = next(filter(None, (device.waits_for() for device in self._devices)), None)
            raise DeadlineError(reason or str(error)) from None
