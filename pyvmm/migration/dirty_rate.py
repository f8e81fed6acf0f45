"""How fast a guest writes its memory, measured for some seconds while nothing is migrated (calc-dirty-rate)."""

from __future__ import annotations

import heapq
import time
from collections.abc import Sequence
from typing import NamedTuple

from pyvmm.errors import PyvmmError, StateError
from pyvmm.machine.dirty_tracker import DirtyTracker, PageSet
from pyvmm.machine.event_loop import EventLoop, Timer
from pyvmm.memory.guest_memory import PAGE_SIZE

SPAN = 2 << 20
"""Bytes of the pieces of memory whose heat is told: what a large page covers."""
HOTTEST = 16


class HotSpan(NamedTuple):
    """``pages`` of the SPAN bytes from ``gpa`` were written."""

    gpa: int
    pages: int


class DirtyRate(NamedTuple):
    """What was found: pages a second, and where most were."""

    pages: int
    seconds: float
    hottest: list[HotSpan]

    @property
    def mib_per_second(self) -> float:
        """QEMU's unit."""
        return self.pages * PAGE_SIZE / self.seconds / (1 << 20)


class DirtyRateMeter:
    """One measurement after the other, on the machine's loop. A page that is written twice counts once."""

    def __init__(self, dirty: DirtyTracker, loop: EventLoop) -> None:
        self.found: DirtyRate | None = None
        self.problem: str | None = None
        self.seconds = 0
        self.began = 0.0
        """By the monotonic clock, as QEMU has it."""
        self._dirty = dirty
        self._loop = loop
        self._timer: Timer | None = None

    @property
    def measuring(self) -> bool:
        """Whether it is still being measured."""
        return self._timer is not None

    def start(self, seconds: int) -> None:
        """Measure for so long. StateError if that is being done, or somebody else needs the log."""
        if self.measuring or self._dirty.active:
            raise StateError("the dirty rate is being measured, or pages are logged for a migration")
        self._dirty.start()
        self.found = self.problem = None
        self.seconds, self.began = seconds, time.monotonic()
        self._timer = self._loop.call_later(seconds, self._finish)

    def give_up(self) -> None:
        """Somebody else needs the log now."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
            self._dirty.stop()

    def _finish(self) -> None:
        self._timer = None
        try:
            sets = self._dirty.harvest()
            seconds = time.monotonic() - self.began
            self.found = DirtyRate(sum(one.count for one in sets), seconds, hottest(sets))
        except PyvmmError as error:
            self.problem = str(error)
        try:
            self._dirty.stop()
        except PyvmmError as error:
            self.problem = str(error)


def hottest(sets: Sequence[PageSet]) -> list[HotSpan]:
    """The spans with most pages, the hottest first."""
    counts: dict[int, int] = {}
    per_span = SPAN // PAGE_SIZE
    for one in sets:
        for first, count in one.ranges():
            for span in range(first // per_span, (first + count - 1) // per_span + 1):
                gpa = one.region.gpa + span * SPAN
                taken = min(first + count, (span + 1) * per_span) - max(first, span * per_span)
                counts[gpa] = counts.get(gpa, 0) + taken
    return [HotSpan(gpa, pages) for gpa, pages in heapq.nlargest(HOTTEST, counts.items(), key=lambda each: each[1])]
