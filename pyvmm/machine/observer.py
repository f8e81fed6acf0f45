"""Who wants to know what becomes of a machine (a monitor that tells its clients)."""

from __future__ import annotations

from pyvmm.machine.ending import Ending


class MachineObserver:
    """Called in the loop's thread, after the fact; must neither block nor raise. Override what is of interest."""

    def stopped(self) -> None:
        """A machine that ran stands still, and somebody asked for that."""

    def resumed(self) -> None:
        """The vCPUs may run."""

    def was_reset(self, source: str, by_guest: bool) -> None:
        """A new life begins; ``source`` is what asked for it."""

    def ended(self, ending: Ending) -> None:
        """The guest is over, or a guest that had been kept after its end is quit."""


class Observers(MachineObserver):
    """All observers of a machine, told in the order in which they came."""

    def __init__(self) -> None:
        self._all: list[MachineObserver] = []

    def add(self, observer: MachineObserver) -> None:
        """From now on ``observer`` is told, too."""
        self._all.append(observer)

    def remove(self, observer: MachineObserver) -> None:
        """From now on it is not; ValueError if it was not."""
        self._all.remove(observer)

    def stopped(self) -> None:
        """Tell all."""
        for observer in tuple(self._all):
            observer.stopped()

    def resumed(self) -> None:
        """Tell all."""
        for observer in tuple(self._all):
            observer.resumed()

    def was_reset(self, source: str, by_guest: bool) -> None:
        """Tell all."""
        for observer in tuple(self._all):
            observer.was_reset(source, by_guest)

    def ended(self, ending: Ending) -> None:
        """Tell all."""
        for observer in tuple(self._all):
            observer.ended(ending)
