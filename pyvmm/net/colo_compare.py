"""colo-compare in the primary's chain: its guest's frames wait here until the secondary's are the same.

::

    guest  -- TX -->  ColoCompare.handle()  -->  Compare  -- equal, or committed -->  inject  -->  backend
                      ColoCompare.secondary()  -->  Compare          -- due -->  wanted()

Rules are in ``compare.py`` and below; this moves frames and calls ``wanted`` once for each checkpoint that is due.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from pyvmm.net.compare import CheckpointDue, Compare, CompareTunables, Mode
from pyvmm.net.filter import Direction, Filter, Frame
from pyvmm.trace import trace_group

T = trace_group("net")


class ColoCompare(Filter):
    """``wanted`` is called, from any thread and perhaps under the chain's lock, when a checkpoint is due: it must not
    wait. ``clock`` gives ms. All methods: any thread.
    """

    def __init__(
        self,
        wanted: Callable[[CheckpointDue], None],
        tunables: CompareTunables | None = None,
        name: str = "colo-compare",
        clock: Callable[[], int] = lambda: int(time.monotonic() * 1000),
    ) -> None:
        super().__init__(name, Direction.TX)
        self.compare = Compare(tunables)
        self.dropped = 0
        """The guest's frames that there was no room for, as on a congested network; a checkpoint was due each time."""
        self._wanted = wanted
        self._clock = clock
        self._asked = False
        self._order = threading.Lock()

    def handle(self, direction: Direction, frame: Frame) -> Frame | None:
        """Kept, until it is released."""
        if not self.compare.primary(frame, self._clock()):
            self.dropped += 1
            T.compare_no_room.on and T.compare_no_room(self.name, len(frame.data))
        self._move()
        return None

    def secondary(self, frame: Frame, epoch: int) -> None:
        """What the secondary's guest sent. ChannelError if it cannot be."""
        self.compare.secondary(frame, epoch, self._clock())
        self._move()

    def scan(self) -> None:
        """Every ``compare.tunables.expired_scan_cycle`` ms."""
        self.compare.scan(self._clock())
        self._move()

    def set_mode(self, mode: Mode, epoch: int = 0) -> None:
        """See ``Compare.set_mode``: PASS when this side acts alone, and only then."""
        T.compare_mode.on and T.compare_mode(self.name, mode.name, epoch)
        self._asked = False
        self.compare.set_mode(mode, epoch, self._clock())
        self._move()

    def begin_epoch(self, epoch: int) -> None:
        """The guest is paused for the checkpoint. StateError."""
        self.compare.begin_epoch(epoch)
        self._asked = False

    def commit(self, epoch: int) -> None:
        """``vmstate-received``. StateError."""
        T.compare_commit.on and T.compare_commit(self.name, epoch)
        self.compare.commit(epoch, self._clock())
        self._move()

    def release(self) -> list[tuple[Direction, Frame]]:
        """Taken out of the chain: it holds nothing back any more."""
        with self._order:
            self.compare.set_mode(Mode.PASS, 0, self._clock())
            return [(Direction.TX, frame) for frame in self.compare.release()]

    def _move(self) -> None:
        with self._order:  # two threads must not swap frames between the two queues
            for frame in self.compare.release():
                self.inject(Direction.TX, frame)
        due = None if self._asked else self.compare.checkpoint_due
        if due is not None:
            self._asked = True
            T.compare_due.on and T.compare_due(self.name, due.epoch, due.reason.name, str(due.flow), due.position)
            self._wanted(due)
