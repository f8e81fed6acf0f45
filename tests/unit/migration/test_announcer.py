"""When the network is told where a guest is: QEMU's rounds, and never for a guest that is not here."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from pyvmm.machine.run_state import RunState
from pyvmm.migration.announcer import Announcer
from pyvmm.migration.parameters import Parameters


class Clock:
    """A loop whose timers the test lets go off."""

    def __init__(self) -> None:
        self.waits: list[float] = []
        self.callback: Callable[[], None] | None = None

    def call_later(self, seconds: float, callback: Callable[[], None]) -> Any:
        self.waits.append(round(seconds * 1000))
        self.callback = callback
        return SimpleNamespace(cancel=lambda: setattr(self, "callback", None))

    def run(self) -> None:
        while self.callback is not None:
            callback, self.callback = self.callback, None
            callback()


class Bench:
    def __init__(self, state: RunState = RunState.RUNNING, **parameters: int) -> None:
        self.clock = Clock()
        self.told = 0
        device = SimpleNamespace(moved=self._moved)
        self.machine: Any = SimpleNamespace(devices=[device], loop=self.clock, run_state=state)
        self.announcer = Announcer(self.machine, lambda: Parameters(**parameters))

    def _moved(self) -> None:
        self.told += 1


def test_the_rounds_are_qemus() -> None:
    bench = Bench()
    bench.announcer.start()
    assert bench.told == 1, "the first one at once"
    bench.clock.run()
    assert (bench.told, bench.clock.waits[:4]) == (5, [50, 150, 250, 350])


@pytest.mark.parametrize(
    ("parameters", "told", "waits"),
    [
        ({"announce_rounds": 0}, 0, []),
        ({"announce_rounds": 1}, 1, []),
        ({"announce_rounds": 4, "announce_initial": 500, "announce_step": 40, "announce_max": 550}, 4, [500, 540, 550]),
    ],
)
def test_parameters_count(parameters: dict[str, int], told: int, waits: list[int]) -> None:
    bench = Bench(**parameters)
    bench.announcer.start()
    bench.clock.run()
    assert (bench.told, bench.clock.waits[: len(waits)]) == (told, waits)


@pytest.mark.parametrize("state", [RunState.PAUSED, RunState.POSTMIGRATE, RunState.SHUTDOWN])
def test_nothing_is_said_for_a_guest_that_may_run_elsewhere(state: RunState) -> None:
    bench = Bench()
    bench.announcer.start()
    bench.machine.run_state = state
    bench.clock.run()
    assert bench.told == 1


def test_a_guest_that_arrived_paused_is_announced_once() -> None:
    bench = Bench(RunState.PAUSED)
    bench.announcer.start()
    bench.clock.run()
    assert bench.told == 1


def test_starting_again_starts_anew() -> None:
    bench = Bench()
    bench.announcer.start()
    bench.announcer.start()
    bench.clock.run()
    assert bench.told == 6
