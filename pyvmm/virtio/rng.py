"""The entropy device (virtio 1.2, 5.4): one queue, into whose buffers go random bytes."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from pyvmm.trace import trace_group
from pyvmm.virtio.device import VirtioDevice
from pyvmm.virtio.queue import NeedsReset, VirtQueue

T = trace_group("virtio")

FILL_MAX = 4096
"""Bytes given at once; a driver that wants more asks again (5.4.6.2 allows less than the buffer's length)."""


class VirtioRng(VirtioDevice):
    """``source(n)`` returns 1 to ``n`` random bytes, or raises OSError; the host's own generator unless given."""

    name = "virtio-rng"
    device_id = 4
    queue_sizes = (64,)

    def __init__(self, memory_table: Any, source: Callable[[int], bytes] = os.urandom) -> None:
        super().__init__(memory_table)
        self._source = source
        self._chain = self.queues[0].new_chain()

    def serve_queue(self, queue: VirtQueue) -> bool:
        """Fill each buffer that is there."""
        chain = self._chain
        for _ in range(queue.size):
            if not queue.pop(chain):
                return queue.enable_kicks()
            # 5.4.6.1: no driver-readable buffers. And one without room could never get the byte it must (5.4.6.2).
            if chain.readable or not chain.writable:
                raise NeedsReset(f"queue {queue.index}: a buffer that entropy cannot go into")
            wanted = min(chain.writable, FILL_MAX)
            try:
                data = self._source(wanted)
            except OSError as error:
                raise NeedsReset(f"no entropy: {error.strerror}") from None
            if not 1 <= len(data) <= wanted:
                raise ValueError(f"the entropy source gave {len(data)} bytes, 1 to {wanted} were asked for")
            queue.push(chain, chain.write(0, data))
            T.virtio_rng_fill.on and T.virtio_rng_fill(chain.writable, len(data))
        return True
