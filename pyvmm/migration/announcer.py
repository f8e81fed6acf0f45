"""The network is told where a guest is now, several times: a frame may be lost, and a switch may still be starting.

QEMU's rounds (docs/devel/migration, net/announce.c) and its parameters ``announce-initial``, ``-max``, ``-rounds`` and
``-step``.
"""

from __future__ import annotations

from collections.abc import Callable

from pyvmm.devices.device import Device
from pyvmm.machine.event_loop import Timer
from pyvmm.machine.machine import Machine
from pyvmm.machine.run_state import RunState
from pyvmm.migration.parameters import Parameters
from pyvmm.trace import trace_group

T = trace_group("migration")


class Announcer:
    """In the machine's loop. It never speaks for a guest that has moved on.

    For one that is paused devices keep the first round until it runs.
    """

    def __init__(
        self, machine: Machine, parameters: Callable[[], Parameters], wanted: Callable[[Device], bool] = lambda _: True
    ) -> None:
        self._machine = machine
        self._wanted = wanted
        self._parameters = parameters
        self._timer: Timer | None = None
        self._made = 0

    def start(self) -> None:
        """The first round, now, and those that follow."""
        self.stop()
        self._made = 0
        self._round()

    def stop(self) -> None:
        """Say nothing more."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _round(self) -> None:
        parameters = self._parameters()
        if self._made >= parameters.announce_rounds or (self._made and self._machine.run_state is not RunState.RUNNING):
            return
        self._made += 1
        T.migration_announce.on and T.migration_announce(self._made)
        for device in filter(self._wanted, self._machine.devices):
            device.moved()
        wait = min(parameters.announce_initial + (self._made - 1) * parameters.announce_step, parameters.announce_max)
        self._timer = self._machine.loop.call_later(wait / 1000, self._round)
