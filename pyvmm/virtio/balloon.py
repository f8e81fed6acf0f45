"""The memory balloon (virtio 1.2, 5.5): pages the guest gives up go back to the host.

Three ways lead there: the balloon itself (inflate and deflate towards a target), free page reporting (the guest tells
of pages it does not use at the moment), and, for a migration only, free page hinting: those pages need not be sent,
but keep what is in them. Every page given back reads as zeros afterwards and is marked dirty.
"""

from __future__ import annotations

import struct
from array import array
from collections.abc import Callable, Iterator
from typing import Annotated, Any

from msgspec import Meta

from pyvmm.devices.state import DeviceState
from pyvmm.memory.guest_memory import PAGE_SIZE, GuestMemory
from pyvmm.trace import trace_group
from pyvmm.virtio.device import VirtioDevice
from pyvmm.virtio.queue import Chain, NeedsReset, VirtQueue

T = trace_group("virtio")

# 5.5.3. Not F_PAGE_POISON: a driver whose free pages must keep a pattern then reports none (5.5.6.7).
F_STATS_VQ, F_DEFLATE_ON_OOM, F_FREE_PAGE_HINT, F_PAGE_REPORTING = 1 << 1, 1 << 2, 1 << 3, 1 << 5

# 5.5.2
INFLATE, DEFLATE, STATS, HINT, REPORT = range(5)
_QUEUE_FEATURES = {STATS: F_STATS_VQ, HINT: F_FREE_PAGE_HINT, REPORT: F_PAGE_REPORTING}
LIST_MAX = 16384
"""Pages in one list (Linux sends 256): the machine's loop waits while they are given back."""

# 5.5.4
ACTUAL = 4
"""Offset of ``actual`` in the configuration space."""

# 5.5.6.6: free_page_hint_cmd_id; other values are commands
HINT_STOP, HINT_DONE, HINT_FIRST = 0, 1, 2

# 5.5.6.4, and what Linux 6.12 sends besides
STATISTICS = ("swap_in", "swap_out", "major_faults", "minor_faults", "free_memory", "total_memory", "available_memory",
              "disk_caches", "hugetlb_allocations", "hugetlb_failures", "oom_kills", "allocation_stalls",
              "asynchronous_scans", "direct_scans", "asynchronous_reclaims", "direct_reclaims")  # fmt: skip
_STATISTIC = struct.Struct("<HQ")
_UNAVAILABLE = 2**64 - 1

_U32 = 0xFFFFFFFF
Unsigned32 = Annotated[int, Meta(ge=0, le=_U32)]


class BalloonState(DeviceState):
    """Pages of 4 KiB. ``hint_command``: what the driver reads; ``hinting``: it has begun to answer that command."""

    target: Unsigned32 = 0
    actual: Unsigned32 = 0
    hint_command: Unsigned32 = HINT_STOP
    last_hint_command: Unsigned32 = HINT_DONE
    hinting: bool = False

    def problem(self) -> tuple[str, str] | None:
        """A command is answered only while there is one."""
        if self.hinting and self.hint_command <= HINT_DONE:
            return "hinting", "there is no command to answer"
        return None


class VirtioBalloon(VirtioDevice):
    """``target``: bytes to take from the guest at first. All methods may be called from any thread."""

    name = "virtio-balloon"
    device_id = 5
    features = F_STATS_VQ | F_DEFLATE_ON_OOM | F_FREE_PAGE_HINT | F_PAGE_REPORTING
    queue_sizes = (128, 128, 64, 128, 64)
    state_type = BalloonState

    def __init__(self, memory_table: Any, memory: GuestMemory, target: int = 0) -> None:
        super().__init__(memory_table)
        self._memory = memory
        self._chain = self.queues[INFLATE].new_chain()
        self._stats_chain = self.queues[STATS].new_chain()
        self._stats_queue: VirtQueue | None = None  # where _stats_chain is out, if it is
        self._stats_wanted = False
        self._on_hint: Callable[[int, int], None] = lambda gpa, size: None
        self._on_hints_end: Callable[[], None] = lambda: None
        self.guest_statistics: dict[str, int] = {}
        """What the guest said last, bytes and counts by the names of STATISTICS; replaced as a whole."""
        self.on_statistics: Callable[[dict[str, int]], None] = lambda statistics: None
        """Called with the lock held when there are new ones."""
        self.reported = 0
        """Bytes given back by free page reporting since the machine started."""
        self.state.target = self._pages(target)

    # -- the host's side ------------------------------------------------------------------------

    @property
    def target(self) -> int:
        """Bytes the balloon is to have."""
        return int(self.state.target) * PAGE_SIZE

    @property
    def actual(self) -> int:
        """Bytes the balloon has, as the driver says."""
        return int(self.state.actual) * PAGE_SIZE

    def set_target(self, size: int) -> None:
        """Let the balloon take ``size`` bytes (rounded down to pages) from the guest. ValueError: not 0 to all RAM."""
        pages = self._pages(size)
        with self.lock:
            self.state.target = pages
            self._configuration_changed()

    def _pages(self, size: int) -> int:
        if not 0 <= size <= min(self._memory.size, _U32 * PAGE_SIZE):
            raise ValueError(f"a balloon of {size} bytes in a guest of {self._memory.size}")
        return size // PAGE_SIZE

    def statistics(self) -> dict[str, int]:
        """Bytes, for the machine's report; what the guest says of itself is ``guest_statistics``."""
        return {"target": self.target, "actual": self.actual, "reported_free": self.reported}

    def request_statistics(self) -> None:
        """Ask the guest for new ones; ``on_statistics`` tells when they are there."""
        with self.lock:
            self._stats_wanted = True
            if self.transport is not None:
                self.transport.ring(STATS)  # packed or not: it comes first

    def start_hinting(self, on_hint: Callable[[int, int], None], on_end: Callable[[], None]) -> bool:
        """Ask for free pages; ``False`` if this driver gives none.

        ``on_hint(gpa, size)`` gets each range: whole pages of RAM that were free after this call. A page the guest
        uses again it writes first, so the dirty log has it. ``on_end()``: there are no more, also because the driver
        was reset. Both are called with the lock held. Then, or earlier, :meth:`stop_hinting`.
        """
        with self.lock:
            if not (self.active and self.negotiated & F_FREE_PAGE_HINT):
                return False
            self._forget_hint_receiver()()
            s = self.state
            # 5.5.6.6.2: another value than the last one, and neither STOP nor DONE.
            s.last_hint_command = max(HINT_FIRST, s.last_hint_command + 1 & _U32)
            s.hint_command, s.hinting = s.last_hint_command, False
            self._on_hint, self._on_hints_end = on_hint, on_end
            self._configuration_changed()
            return True

    def stop_hinting(self) -> None:
        """The hints are of no use any more: the driver may use those pages again (DONE). Harmless without hinting."""
        with self.lock:
            if self.state.hint_command > HINT_DONE:
                self.state.hint_command, self.state.hinting = HINT_DONE, False
                self._forget_hint_receiver()
                self._configuration_changed()

    def _forget_hint_receiver(self) -> Callable[[], None]:
        ended, self._on_hints_end = self._on_hints_end, lambda: None
        self._on_hint = lambda gpa, size: None
        return ended

    def _configuration_changed(self) -> None:
        if self.transport is not None:
            self.transport.configuration_changed()

    # -- the driver's side ----------------------------------------------------------------------

    def configuration(self) -> bytes:
        """num_pages, actual, free_page_hint_cmd_id, poison_val (5.5.4)."""
        s = self.state
        return struct.pack("<IIII", s.target, s.actual, s.hint_command, 0)

    def write_configuration(self, offset: int, data: bytes) -> None:
        """``actual``, which the driver keeps (5.5.6.2); the rest is not its."""
        if offset == ACTUAL and len(data) == 4:
            self.state.actual = int.from_bytes(data, "little")
            T.virtio_balloon_actual.on and T.virtio_balloon_actual(self.actual, self.target)

    def reset(self) -> None:
        """The target is the host's: it stays."""
        target, last = self.state.target, self.state.last_hint_command
        super().reset()
        self.state.target, self.state.last_hint_command = target, last

    def suspend_io(self) -> None:
        """The statistics' buffer, which the device keeps until it wants new ones (5.5.6.3), is not kept over this."""
        queue, self._stats_queue = self._stats_queue, None
        if queue is not None and queue.in_flight:
            queue.put_back()

    def resume_io(self) -> None:
        """Take it again."""
        if self.transport is not None:
            self.transport.ring(STATS)

    def deactivated(self) -> None:
        """No more hints will come."""
        self._stats_wanted = False
        self._forget_hint_receiver()()

    def serve_queue(self, queue: VirtQueue) -> bool:
        """What the queue is for decides."""
        return self._SERVERS[self._purpose(queue)](self, queue)

    def _purpose(self, queue: VirtQueue) -> int:
        """INFLATE to REPORT.

        Queues have fixed numbers (5.5.2), but Linux over MMIO leaves no gaps for those that were not negotiated: one
        that is ready without its feature gives it away.
        """
        there = [index for index, feature in _QUEUE_FEATURES.items() if self.negotiated & feature]
        packed = any(self.queues[index].ready for index in _QUEUE_FEATURES if index not in there)
        purposes = [INFLATE, DEFLATE, *there] if packed else [INFLATE, DEFLATE, *_QUEUE_FEATURES]
        if queue.index >= len(purposes):
            raise NeedsReset(f"queue {queue.index}: in use without the feature it belongs to")
        return purposes[queue.index]

    def _inflate(self, queue: VirtQueue) -> bool:
        """5.5.6.1. One list at a time: giving back thousands of pages takes a while."""
        if not queue.pop(self._chain):
            return queue.enable_kicks()
        given = 0
        for gpa, size in _runs(self._page_list(queue)):
            given += self._give_back(gpa, size)
        T.virtio_balloon_inflate.on and T.virtio_balloon_inflate(self._chain.readable // 4, given // PAGE_SIZE)
        queue.push(self._chain, 0)
        return True

    def _deflate(self, queue: VirtQueue) -> bool:
        """5.5.6.1: the guest may use the pages at once; the host has nothing to do, they are zero and come back."""
        if not queue.pop(self._chain):
            return queue.enable_kicks()
        pages = self._page_list(queue)
        T.virtio_balloon_deflate.on and T.virtio_balloon_deflate(len(pages))
        queue.push(self._chain, 0)
        return True

    def _page_list(self, queue: VirtQueue) -> array[int]:
        chain = self._chain
        if chain.writable or chain.readable % 4 or chain.readable > 4 * LIST_MAX:
            raise NeedsReset(f"queue {queue.index}: no list of 1 to {LIST_MAX} page numbers")
        return array("I", chain.read(0, chain.readable))

    def _give_back(self, gpa: int, size: int) -> int:
        """Zero the part of ``[gpa, gpa + size)`` that is whole pages of RAM and free it; bytes of it."""
        given = 0
        for first, end in _whole_pages_of_ram(self._memory, gpa, size):
            try:
                self._memory.zero(first, end - first)
            except OSError as error:  # locked memory, or no memory to note the hole
                raise NeedsReset(f"the host does not take {end - first:#x} bytes: {error.strerror}") from None
            given += end - first
        return given

    def _statistics(self, queue: VirtQueue) -> bool:
        """5.5.6.3: the driver's buffer holds what is new when it arrives; giving it back asks for more."""
        if self._stats_queue is None:
            if not queue.pop(self._stats_chain):
                return queue.enable_kicks()
            self._stats_queue = queue
            chain = self._stats_chain
            if chain.writable:
                raise NeedsReset(f"queue {queue.index}: statistics in a buffer that the device writes")
            # Twice the tags there are, for drivers that know more of them or repeat some.
            data = chain.read(0, 2 * len(STATISTICS) * _STATISTIC.size)
            usable = len(data) - len(data) % _STATISTIC.size
            self.guest_statistics = {
                STATISTICS[tag]: value
                for tag, value in _STATISTIC.iter_unpack(data[:usable])
                if tag < len(STATISTICS) and value != _UNAVAILABLE
            }
            T.virtio_balloon_statistics.on and T.virtio_balloon_statistics(len(self.guest_statistics))
            self.on_statistics(self.guest_statistics)
        if self._stats_wanted:
            self._stats_wanted = False
            self._stats_queue = None
            queue.push(self._stats_chain, 0)
            return queue.enable_kicks()
        return False

    def _hints(self, queue: VirtQueue) -> bool:
        """5.5.6.6: a command id to read, then buffers to write that are the free pages, then STOP to read."""
        chain, s = self._chain, self.state
        for _ in range(queue.size):
            if not queue.pop(chain):
                return queue.enable_kicks()
            if chain.readable:
                if chain.readable < 4:
                    raise NeedsReset(f"queue {queue.index}: a command of {chain.readable} bytes")
                command = int.from_bytes(chain.read(0, 4), "little")
                T.virtio_balloon_hint_command.on and T.virtio_balloon_hint_command(command, s.hint_command)
                if s.hinting and command == HINT_STOP:
                    s.hinting = False
                    self._forget_hint_receiver()()
                else:
                    # Another id than the one wanted now answers a command that is over.
                    s.hinting = command == s.hint_command > HINT_DONE
            if s.hinting:
                for gpa, size in self._ranges(chain):
                    for first, end in _whole_pages_of_ram(self._memory, gpa, size):
                        self._on_hint(first, end - first)
            queue.push(chain, 0)
        return True

    def _report(self, queue: VirtQueue) -> bool:
        """5.5.6.7: the buffers are the pages, which the guest uses again only once they came back. One chain at a time.

        Without F_PAGE_POISON they may become zeros.
        """
        if not queue.pop(self._chain):
            return queue.enable_kicks()
        if self._chain.readable:
            raise NeedsReset(f"queue {queue.index}: reported pages in a buffer that the device reads")
        given = sum(self._give_back(gpa, size) for gpa, size in self._ranges(self._chain))
        self.reported += given
        T.virtio_balloon_report.on and T.virtio_balloon_report(given)
        queue.push(self._chain, 0)
        return True

    def _ranges(self, chain: Chain) -> list[tuple[int, int]]:
        return [(self._memory.gpa_of(hva), size) for hva, size in chain.writable_segments()]

    _SERVERS: tuple[Callable[[VirtioBalloon, VirtQueue], bool], ...] = (
        _inflate, _deflate, _statistics, _hints, _report
    )  # fmt: skip


def _runs(pages: array[int]) -> Iterator[tuple[int, int]]:
    """(GPA, bytes) of runs of page numbers, which come in any order and repeat."""
    first = end = -1
    for page in sorted(set(pages)):
        if page != end:
            if end > first:
                yield first * PAGE_SIZE, (end - first) * PAGE_SIZE
            first = page
        end = page + 1
    if end > first:
        yield first * PAGE_SIZE, (end - first) * PAGE_SIZE


def _whole_pages_of_ram(memory: GuestMemory, gpa: int, size: int) -> Iterator[tuple[int, int]]:
    """(first GPA, end) of the whole pages of RAM in a range, region by region; the rest is ignored."""
    for region in memory.regions:
        first = max(-(-gpa // PAGE_SIZE) * PAGE_SIZE, region.gpa)
        end = min((gpa + size) // PAGE_SIZE * PAGE_SIZE, region.end)
        if first < end:
            yield first, end
