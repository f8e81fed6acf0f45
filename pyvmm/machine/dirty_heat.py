"""Where in its memory a guest writes, counted as long as somebody asks: buckets of pages, for a map of heat.

KVM's log has one reader. While a migration or a replication has it, what they harvest is counted here on the way;
otherwise pages are logged for this alone, and no longer than ``LINGER`` after somebody asked last. A guest that nobody
watches pays for none of it.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Literal, NamedTuple

from pyvmm.errors import PyvmmError
from pyvmm.machine.dirty_tracker import DirtyTracker, PageSet
from pyvmm.machine.event_loop import EventLoop, Timer
from pyvmm.memory.guest_memory import PAGE_SIZE, Region
from pyvmm.native import lib

LINGER = 3.0
BUCKETS = 256
"""Of a region, at most."""
_LEAST = 64
"""Pages of a bucket: a word of the bitmap."""


class HeatRegion(NamedTuple):
    """``written[i]``: pages found written, harvest by harvest, in the ``i``-th piece of ``bucket`` bytes."""

    gpa: int
    size: int
    bucket: int
    written: list[int]


def bucket_pages(size: int) -> int:
    """Pages in a bucket of a region of ``size`` bytes: a power of two, so that no bucket begins within a word."""
    pages = _LEAST
    while pages * PAGE_SIZE * BUCKETS < size:
        pages *= 2
    return pages


def add_counts(found: PageSet, pages: int, written: list[int]) -> None:
    """Count the pages of ``found`` in buckets of ``pages``, a multiple of 64."""
    words, per = len(found.bits), pages // 64
    for index in range(len(written)):
        first = index * per
        written[index] += lib.pv_dirty_count(found.bits + first, min(per, words - first))


class DirtyHeat:
    """Of one machine; its methods are called on the machine's loop. Counts only grow while it is watched."""

    def __init__(self, dirty: DirtyTracker, loop: EventLoop, regions: Sequence[Region]) -> None:
        self.began = 0.0
        """By the monotonic clock: when counting began; counts of another beginning say nothing about these."""
        self.harvests = 0
        self._dirty = dirty
        self._loop = loop
        self._regions = regions
        self._pages = [bucket_pages(region.size) for region in regions]
        self._written: list[list[int]] = []
        self._timer: Timer | None = None

    def look(self, *, may_log: bool) -> list[HeatRegion]:
        """What was found since ``began``; from now on, if nothing was counted. Without ``may_log`` nothing is logged
        for this: only what others harvest is counted. KvmError, StateError: KVM's log cannot be had.
        """
        if self._timer is None:
            self._written = [
                [0] * -(-region.size // (pages * PAGE_SIZE))
                for region, pages in zip(self._regions, self._pages, strict=True)
            ]
            self.began, self.harvests = time.monotonic(), 0
            self._dirty.observe = self._count
        else:
            self._timer.cancel()
        self._timer = self._loop.call_later(LINGER, self.close)
        try:
            if may_log:
                self._dirty.watch()
            self._dirty.harvest_watched()
        except PyvmmError:
            self.close()  # a ring that overran is good for nothing, but a new start is
            raise
        return [
            HeatRegion(region.gpa, region.size, pages * PAGE_SIZE, list(written))
            for region, pages, written in zip(self._regions, self._pages, self._written, strict=True)
        ]

    @property
    def log(self) -> Literal["others", "own", "none"]:
        """Whose harvests are counted: ``others``, ``own`` or ``none``."""
        return "others" if self._dirty.active else "own" if self._dirty.watched else "none"

    def close(self) -> None:
        """Nobody asks any more."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._dirty.observe = None
        self._dirty.unwatch()

    def _count(self, sets: Sequence[PageSet]) -> None:
        """In the harvest's thread, under the tracker's lock."""
        self.harvests += 1
        for one, pages, written in zip(sets, self._pages, self._written, strict=True):
            if one.count:
                add_counts(one, pages, written)
