"""Fetches guest output that no exit delivers: from native sinks and KVM's coalesced ring."""

from __future__ import annotations

from pyvmm.machine.console_output import OutputGate
from pyvmm.machine.event_loop import EventLoop, clear_eventfd
from pyvmm.machine.sinks import SinkCollector

RING_TICK = 0.02
"""Seconds after which output of a guest that makes no exits is fetched from KVM's coalesced ring."""


class OutputWatch:
    """The first byte goes out at once, what follows with the next tick.

    Being woken for each handful of bytes would slow a guest that writes a lot: waking costs the vCPU's thread
    more than an exit.
    """

    def __init__(self, loop: EventLoop, collector: SinkCollector, gate: OutputGate) -> None:
        self._loop = loop
        self._collector = collector
        self._gate = gate
        self._watching = False

    def start(self) -> None:
        """Watch as long as the loop runs."""
        self._tick()

    def _drain(self) -> None:
        self._loop.remove_reader(self._collector.event)
        self._watching = False
        # A full console is drained by the vCPUs, which then wait; the loop must not.
        if not self._gate.full:
            self._collector.drain()

    def _tick(self) -> None:
        clear_eventfd(self._collector.event)  # before draining: a byte that comes later signals again
        if not self._gate.full:
            self._collector.drain_ring()
        if not self._watching:
            self._loop.add_reader(self._collector.event, self._drain)
            self._watching = True
        self._loop.call_later(RING_TICK, self._tick)
