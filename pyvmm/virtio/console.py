"""The console device (virtio 1.2, 5.3): one port, a byte stream each way, without F_MULTIPORT.

The host's end takes what :class:`VirtioConsole` gives to ``output``, asks it to ``receive`` what was typed, and is
heard both ways when it has had enough: while ``full()`` the transmit queue is not served, and input waits for buffers.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any

from pyvmm.trace import trace_group
from pyvmm.virtio.device import VirtioDevice
from pyvmm.virtio.queue import NeedsReset, VirtQueue

T = trace_group("virtio")

# 5.3.3
F_SIZE, F_EMERG_WRITE = 1 << 0, 1 << 2
# 5.3.2: without F_MULTIPORT there are the two queues of port 0
RECEIVE, TRANSMIT = 0, 1
EMERGENCY_WRITE = 8
"""Offset of emerg_wr in the configuration space (5.3.4)."""
CHAIN_MAX = 1 << 20
"""Bytes of output in one chain, more than any driver sends: what is taken at once is held in memory."""


class VirtioConsole(VirtioDevice):
    """``output(data)`` never blocks; while ``full()`` it is given no more than one chain. ``on_close`` ends it."""

    name = "virtio-console"
    device_id = 3
    features = F_SIZE | F_EMERG_WRITE
    queue_sizes = (64, 64)

    def __init__(
        self,
        memory_table: Any,
        output: Callable[[bytes], None],
        full: Callable[[], bool] = lambda: False,
        on_close: Callable[[], None] = lambda: None,
    ) -> None:
        super().__init__(memory_table)
        self.on_room: Callable[[], None] | None = None
        """Called with the lock held when the driver may have offered buffers, after :meth:`receive` took less."""
        self._output = output
        self._full = full
        self._on_close = on_close
        self._chain = self.queues[0].new_chain(), self.queues[1].new_chain()
        self._input = b""
        self._columns, self._rows = 80, 25

    # -- the host's side ------------------------------------------------------------------------

    def receive(self, data: bytes) -> int:
        """Give the driver the first bytes of ``data``; how many it had room for, none while it must not be disturbed.

        If not all were taken, :attr:`on_room` says when to come again.
        """
        with self.lock:
            self._input = data
            self.serve(RECEIVE)
            taken = len(data) - len(self._input)
            self._input = b""
        return taken

    def output_has_room(self) -> None:
        """The host's end was full and is no more; from any thread."""
        if self.transport is not None:
            self.transport.ring(TRANSMIT)

    def resize(self, columns: int, rows: int) -> None:
        """Tell the driver of a terminal's size (F_SIZE). ValueError: not 0 to 65535."""
        if not (0 <= columns <= 0xFFFF and 0 <= rows <= 0xFFFF):
            raise ValueError(f"a console of {columns} columns and {rows} rows")
        with self.lock:
            self._columns, self._rows = columns, rows
            if self.transport is not None:
                self.transport.configuration_changed()

    def close(self) -> None:
        """End the host's side."""
        self._on_close()

    # -- the driver's side ----------------------------------------------------------------------

    def configuration(self) -> bytes:
        """cols, rows, max_nr_ports, emerg_wr (5.3.4)."""
        return struct.pack("<HHII", self._columns, self._rows, 1, 0)

    def write_configuration(self, offset: int, data: bytes) -> None:
        """An emergency write: a character from a driver that is not set up yet (5.3.4)."""
        # Nobody waits for room here, so what does not fit is lost.
        if offset == EMERGENCY_WRITE and not self._full():
            self._output(data[:1])

    def serve_queue(self, queue: VirtQueue) -> bool:
        """Input into the receive queue's buffers, or output from the transmit queue's."""
        return self._transmit(queue) if queue.index == TRANSMIT else self._receive(queue)

    def _receive(self, queue: VirtQueue) -> bool:
        chain = self._chain[RECEIVE]
        if not self._input:
            if self.on_room is not None:
                self.on_room()
            return False
        while self._input:
            if not queue.pop(chain):
                # A buffer that came meanwhile rings no doorbell.
                if not queue.enable_kicks():
                    break
                continue
            if chain.readable or not chain.writable:
                raise NeedsReset(f"queue {queue.index}: a buffer that input cannot go into")
            written = chain.write(0, self._input[: chain.writable])
            self._input = self._input[written:]
            queue.push(chain, written)
            T.virtio_console_receive.on and T.virtio_console_receive(chain.writable, written)
        return False

    def _transmit(self, queue: VirtQueue) -> bool:
        chain = self._chain[TRANSMIT]
        for _ in range(queue.size):
            if self._full():
                return False  # output_has_room() rings
            if not queue.pop(chain):
                return queue.enable_kicks()
            if chain.writable or chain.readable > CHAIN_MAX:
                raise NeedsReset(f"queue {queue.index}: a buffer that output cannot come from")
            if chain.readable:
                self._output(chain.read(0, chain.readable))
            queue.push(chain, 0)
            T.virtio_console_transmit.on and T.virtio_console_transmit(chain.readable)
        return True
