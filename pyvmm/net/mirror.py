"""filter-mirror and filter-redirector: frames of a card for somebody else, too, or for nobody but them."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from pyvmm.net.filter import Direction, Filter, Frame

Output = Callable[[Direction, Frame], None]
"""Takes a frame, never waits. It is called in the order of frames, under the chain's lock."""
KEPT = 64
"""Frames that may be asked for again; a chain has one that the guest had no room for, two at most."""


class FilterMirror(Filter):
    """Passes frames on and gives each to ``output``, too. On the primary: what its guest is to receive."""

    def __init__(self, output: Output, name: str = "filter-mirror", direction: Direction = Direction.RX) -> None:
        super().__init__(name, direction)
        self._output = output
        self._recent: deque[Frame] = deque(maxlen=KEPT)

    def handle(self, direction: Direction, frame: Frame) -> Frame | None:
        """Passed on as it is."""
        self._recent.append(frame)
        self._output(direction, frame)
        return frame

    def again(self, count: int) -> None:
        """Give the last ``count`` frames to ``output`` once more, oldest first. Under the chain's lock."""
        for frame in list(self._recent)[len(self._recent) - min(count, len(self._recent)) :]:
            self._output(self.direction, frame)


class FilterRedirector(Filter):
    """Gives frames of ``direction`` to ``output`` and to nobody else, and brings others in. On the secondary: its
    guest's output goes to the primary's comparison, and what the primary's guest receives comes from there.
    Frames the other way are for nobody, until it is taken out of the chain at a failover.
    """

    def __init__(self, output: Output, name: str = "filter-redirector", direction: Direction = Direction.TX) -> None:
        super().__init__(name)
        self._redirected = direction
        self._output = output

    def handle(self, direction: Direction, frame: Frame) -> Frame | None:
        """Not passed on."""
        if direction is self._redirected:
            self._output(direction, frame)
        return None

    def deliver(self, direction: Direction, frame: Frame) -> None:
        """A frame from elsewhere, on its way behind this filter. Any thread."""
        self.inject(direction, frame)
