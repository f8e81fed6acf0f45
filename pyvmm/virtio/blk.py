"""The block device (virtio 1.2, 5.2): one queue, served by native threads (``native/block_device.h``).

Several requests are in flight at once and complete in any order; a flush is about the writes that completed before it
was made available (5.2.6.2), and those are in the image by then.
"""

from __future__ import annotations

import errno
import os
import struct
import threading
import time
from collections.abc import Callable
from typing import Any

from pyvmm.block.image import SECTOR, Image
from pyvmm.devices.state import DeviceState, decode_state
from pyvmm.errors import ChannelError, DeadlineError, HostError, SectionError
from pyvmm.native import ffi, lib
from pyvmm.trace import trace_group
from pyvmm.virtio.device import VirtioDevice
from pyvmm.virtio.queue import PROBLEMS

T = trace_group("virtio")

# 5.2.3
F_SEG_MAX, F_RO, F_BLK_SIZE, F_FLUSH, F_TOPOLOGY, F_CONFIG_WCE = 1 << 2, 1 << 5, 1 << 6, 1 << 9, 1 << 10, 1 << 11
F_DISCARD, F_WRITE_ZEROES = 1 << 13, 1 << 14

QUEUE_SIZE = 256
WORKERS = 4
"""Requests that may wait for the host's disk at the same time."""
IO_DEADLINE = 30.0
"""Seconds a request in flight may take when the device has to come to rest."""

# 5.2.4, struct virtio_blk_config up to write_zeroes_may_unmap: capacity, size_max, seg_max, geometry, blk_size,
# topology, writeback, num_queues, and the limits of discard and write_zeroes.
_CONFIGURATION = struct.Struct("<QII4xIBBHIBxHIIIIIBxxx")
WRITEBACK_AT = 32

KINDS = ("reads", "writes", "flushes", "discards", "write_zeroes", "others")


class BlkState(DeviceState):
    """``capacity`` and ``read_only`` are the image's: a state fits only a disk like the one it was saved with."""

    writeback: bool = True
    capacity: int = 0
    read_only: bool = False


class VirtioBlk(VirtioDevice):
    """A disk on ``image``, which it owns. ``report`` gets one line when the host's disk first fails in some way."""

    name = "virtio-blk"
    device_id = 2
    queue_sizes = (QUEUE_SIZE,)
    state_type = BlkState

    def __init__(
        self, memory_table: Any, image: Image, serial: str = "", report: Callable[[str], None] = lambda line: None
    ) -> None:
        super().__init__(memory_table)
        self.image = image
        self.io_deadline = IO_DEADLINE
        self.on_host_error: Callable[[str], None] | None = None
        """Told of each failure instead of the user, on a thread of the device's: a replica's is not the guest's."""
        self.features = F_SEG_MAX | F_BLK_SIZE | F_FLUSH | F_TOPOLOGY | F_CONFIG_WCE
        self.features |= F_RO if image.read_only else F_DISCARD | F_WRITE_ZEROES
        self._report = report
        self._reported: set[tuple[int, int]] = set()
        self._physical_block = image.block_size
        self._native = lib.pv_block_new(image.native, self.queues[0].native)
        if self._native == ffi.NULL:
            raise MemoryError("no memory for a disk")
        self._native.read_only = image.read_only
        ffi.memmove(self._native.id, serial.encode().ljust(lib.PV_BLOCK_ID_SIZE, b"\0"), lib.PV_BLOCK_ID_SIZE)
        self._threads: list[threading.Thread] = []
        self._waits = False
        self._closed = False

    # -- the configuration space ----------------------------------------------------------------

    def configuration(self) -> bytes:
        """5.2.4. A field whose feature is not offered is zero."""
        ranges = 0 if self.image.read_only else 1
        most, segments = ranges * lib.PV_BLOCK_RANGE_SECTORS, ranges * lib.PV_BLOCK_RANGES
        block = self._physical_block // SECTOR
        return _CONFIGURATION.pack(
            self.image.size // SECTOR, 0, QUEUE_SIZE - 2, SECTOR, block.bit_length() - 1, 0, 1, 0,
            self.state.writeback, 1, most, segments, ranges * block, most, segments, ranges,
        )  # fmt: skip

    def write_configuration(self, offset: int, data: bytes) -> None:
        """5.2.5: ``writeback`` is the only field that a driver may write."""
        if self.negotiated & F_CONFIG_WCE and offset <= WRITEBACK_AT < offset + len(data):
            self.state.writeback = bool(data[WRITEBACK_AT - offset])
            self._choose_durability()

    def _choose_durability(self) -> None:
        """5.2.6.2: without FLUSH a driver has no way to ask, so every write is made durable."""
        writeback = self.state.writeback if self.negotiated & F_CONFIG_WCE else bool(self.negotiated & F_FLUSH)
        self._native.write_through = not writeback
        T.virtio_blk_writeback.on and T.virtio_blk_writeback(self.image.path, writeback)

    # -- serving --------------------------------------------------------------------------------

    def take_doorbells(self, doorbells: list[int], interrupt: Any) -> bool:
        """Start the threads."""
        self._native.doorbell = doorbells[0]
        self._native.interrupt = interrupt
        for index in range(WORKERS):
            # daemon: one that the host's disk keeps for ever must not keep the process, too.
            thread = threading.Thread(target=self._work, name=f"{self.name} {index}", daemon=True)
            self._threads.append(thread)
            thread.start()
        return True

    def _work(self) -> None:
        worker = ffi.new("struct pv_block_worker *")
        while (result := lib.pv_block_work(self._native, worker)) != lib.PV_BLOCK_END:
            if result == lib.PV_BLOCK_FAILED:
                self._host_failed(worker.kind, worker.error)
            else:
                self._queue_broken(worker.problem)

    def _queue_broken(self, problem: int) -> None:
        with self.lock:
            if self.queues[0].native.broken:  # else the driver has reset the device already
                self.fail(f"queue 0: {PROBLEMS.get(problem, 'a request without room for its status')}")

    def _host_failed(self, kind: int, error: int) -> None:
        """The guest has got VIRTIO_BLK_S_IOERR; the user is told once of each kind of failure."""
        T.virtio_blk_error.on and T.virtio_blk_error(self.image.path, KINDS[kind], os.strerror(error))
        if self.on_host_error is not None:
            self.on_host_error(f"{KINDS[kind]} fail: {os.strerror(error)}")
            return
        if (kind, error) in self._reported:
            return
        self._reported.add((kind, error))
        remedy = "; make room on the host and the guest may try again" if error == errno.ENOSPC else ""
        self._report(
            f"disk {self.image.path}: {KINDS[kind]} fail: {os.strerror(error)}; the guest sees I/O errors{remedy}"
        )

    def resume_io(self) -> None:
        """Let the threads take requests."""
        self._native.discard = bool(self.negotiated & F_DISCARD)
        self._native.write_zeroes = bool(self.negotiated & F_WRITE_ZEROES)
        self._choose_durability()
        lib.pv_block_resume(self._native)

    def suspend_io(self) -> None:
        """Wait for what is in flight. DeadlineError if the host's disk does not answer; it goes on then."""
        self._waits = True
        try:
            if lib.pv_block_suspend(self._native, int(self.io_deadline * 1000)):
                lib.pv_block_resume(self._native)
                raise DeadlineError(self._unanswered(self.io_deadline))
        finally:
            self._waits = False

    def waits_for(self) -> str | None:
        """The host's disk, while it is waited for."""
        return self._unanswered(self.io_deadline) if self._waits else None

    def _unanswered(self, seconds: float) -> str:
        return f"disk {self.image.path}: a request did not end within {seconds:g} s; is the host's disk well?"

    def end_io(self, deadline: float) -> None:
        """One deadline for all threads, since one disk keeps them all."""
        lib.pv_block_end(self._native)
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))
            if thread.is_alive():
                raise DeadlineError(self._unanswered(self.io_deadline))

    def close(self) -> None:
        """End the threads and close the image. DeadlineError, and nothing is given back, if one does not end."""
        if self._closed:
            return
        self.end_io(time.monotonic() + self.io_deadline)
        self._closed = True
        lib.pv_block_free(self._native)
        try:
            self.image.close()
        except OSError as error:
            self._report(f"disk {self.image.path}: cannot be flushed at the end: {error.strerror}")

    # -- what is written, once more, for the secondary of a protected guest (native/block_forward.h) -----------

    def forward_begin(self, event: int, limit: int, timeout_ms: int) -> None:
        """Nothing is in flight. From now on writes are recorded, up to ``limit`` bytes that nobody took; the eventfd
        ``event`` says when there are some. The first checkpoint is to hold them.
        """
        lib.pv_forward_begin(self._forward, event, 1, limit, timeout_ms)

    def forward_copy(self, offset: int, size: int) -> None:
        """Record what is there now. ChannelError: nobody takes the records. HostError: it cannot be read."""
        result = lib.pv_forward_copy(self._forward, self.image.native, offset, size)
        if result:
            self._forward_problem(result)

    def forward_mark(self, epoch: int) -> None:
        """Nothing is in flight: what comes is for the checkpoint after ``epoch``. As :meth:`forward_copy`."""
        result = lib.pv_forward_mark(self._forward, epoch)
        if result:
            self._forward_problem(result)

    def forward_take(self, buffer: bytearray) -> int:
        """Records into ``buffer``, whole ones; bytes, 0 if there are none now. As :meth:`forward_copy`."""
        size = int(lib.pv_forward_take(self._forward, ffi.from_buffer("uint8_t[]", buffer), len(buffer)))
        if size < 0:
            self._forward_problem(size)
        return size

    def forward_end(self) -> None:
        """Writes are not recorded any more."""
        if not self._closed:
            lib.pv_forward_end(self._forward)

    def _forward_problem(self, result: int) -> None:
        if -result in (errno.ETIMEDOUT, errno.ESHUTDOWN):
            raise ChannelError(f"disk {self.image.path}: the secondary does not take what is written")
        raise HostError(f"disk {self.image.path}: {os.strerror(-result)}: the secondary's would be another one")

    @property
    def _forward(self) -> Any:
        return ffi.addressof(self._native, "forward")

    # -- reports and state ----------------------------------------------------------------------

    def release(self) -> None:
        """Another process may write to the disk now, and finds everything there."""
        self.image.release()

    def claim(self) -> None:
        """The disk is ours."""
        self.image.claim()

    def statistics(self) -> dict[str, int]:
        """Requests, failed ones and bytes, by kind; kinds that there were none of are left out."""
        if self._closed:
            return {}
        counters = ffi.new("struct pv_block_counter[]", lib.PV_BLOCK_KINDS)
        lib.pv_block_count(self._native, counters)
        found: dict[str, int] = {}
        for kind, counter in zip(KINDS, counters, strict=True):
            if counter.requests:
                found |= {kind: counter.requests, f"{kind}_failed": counter.errors, f"{kind}_bytes": counter.bytes}
        return found

    def _own_state(self, writeback: bool) -> BlkState:
        return BlkState(writeback=writeback, capacity=self.image.size // SECTOR, read_only=self.image.read_only)

    def save_state(self) -> dict[str, Any]:
        """What the driver chose, and what disk it is."""
        self.state = self._own_state(self.state.writeback)
        return super().save_state()

    def decode(self, section: str, data: object) -> Callable[[], None]:
        """SectionError also for a disk of another size."""
        decoded = decode_state(section, BlkState, data)
        own = self._own_state(decoded.writeback)
        for field in ("capacity", "read_only"):
            if getattr(decoded, field) != getattr(own, field):
                raise SectionError(section, field, f"{getattr(decoded, field)}, this disk's is {getattr(own, field)}")

        def apply() -> None:
            self.state = decoded

        return apply
