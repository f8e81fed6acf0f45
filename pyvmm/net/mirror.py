"""filter-mirror and filter-redirector: frames of a card for somebody else, too, or for nobody but them."""

from __future__ import annotations

from collections.abc import Callable

from pyvmm.net.filter import Direction, Filter, Frame

Output = Callable[[Direction, Frame], None]
"""Takes a frame, never waits. It is called in the order of frames, under the chain's lock."""


class FilterMirror(Filter):
    """Passes frames on and gives each to ``output``, too. On the primary: what its guest is to receive."""

    def __init__(self, output: Output, name: str = "filter-mirror", direction: Direction = Direction.RX) -> None:
        super().__init__(name, direction)
        self._output = output

    def handle(self, direction: Direction, frame: Frame) -> Frame | None:
        """Passed on as it is."""
        self._output(direction, frame)
        return frame


class FilterRedirector(Filter):
    """Gives frames to ``output`` and to nobody else, and brings others in. On the secondary: its guest's output goes to
    the primary's comparison, and what the primary's guest receives comes from there.

    ``open()`` ends that, at a failover: frames pass from then on.
    """

    def __init__(self, output: Output, name: str = "filter-redirector", direction: Direction = Direction.TX) -> None:
        super().__init__(name, direction)
        self._output = output
        self._closed = True

    def handle(self, direction: Direction, frame: Frame) -> Frame | None:
        """Not passed on until ``open()``."""
        if not self._closed:
            return frame
        self._output(direction, frame)
        return None

    def deliver(self, direction: Direction, frame: Frame) -> None:
        """A frame from elsewhere, on its way behind this filter. Any thread."""
        self.inject(direction, frame)

    def open(self) -> None:
        """Let frames pass; nothing goes to ``output`` after this but what is in ``handle`` now."""
        self._closed = False
