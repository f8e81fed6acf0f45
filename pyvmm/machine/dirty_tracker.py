"""Which guest pages were written since one last asked: by vCPUs (KVM's log) or by devices (the regions' own marks).

Two methods with the same answer. ``bitmap``: KVM keeps a bit for each page; asking costs time with the memory's size.
``ring``: each vCPU publishes the pages it wrote in a ring; asking costs time with the pages written, but a ring that
fills up stops its vCPU until it is emptied, and the memory for it is there from the machine's first day, since KVM
wants to know before there are vCPUs. A KVM that shadows the guest's page tables (PVM, or no EPT or NPT) marks up to 512
pages at one go, more than the 64 it keeps room for in a ring, and then loses some: that is noticed, and an error.

A migration asks again and again::

    tracker.start()
    for page_set in tracker.harvest():
        runs, count = page_set.native_runs()
        ...                                      # read the pages only now: they are logged anew
    tracker.stop()

Whoever cannot use what it harvested gives it back (:meth:`PageSet.give_back`), or the next round misses those pages.

Somebody who only wants to look on (:mod:`pyvmm.machine.dirty_heat`) is told of each harvest, and may have pages logged
as long as nobody else does (:meth:`DirtyTracker.watch`): :meth:`DirtyTracker.start` takes the log away from it.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from pyvmm.errors import KvmError, StateError
from pyvmm.kvm.vcpu import Vcpu
from pyvmm.kvm.vm import Vm
from pyvmm.memory.guest_memory import GuestMemory, Region
from pyvmm.native import ffi, lib
from pyvmm.trace import trace_group

if TYPE_CHECKING:
    from pyvmm.host.dirty_log import Method

T = trace_group("machine")

RING_ENTRIES = 4096
"""Entries of a vCPU's ring, 16 bytes each: a power of two, and more than KVM keeps in reserve."""
RING_CAPABILITIES = ("KVM_CAP_DIRTY_LOG_RING_ACQ_REL", "KVM_CAP_DIRTY_LOG_RING")
_RANGES_AT_ONCE = 1024


def prepare_dirty_log(vm: Vm, method: Method) -> Method:
    """Before the first vCPU: have KVM log in the way wanted, or by bitmap where it has no rings. What it will be."""
    if method == "ring":
        for capability in RING_CAPABILITIES:
            # The value is the largest ring, in bytes; x86 needs no acquire and release, but newer kernels ask for it.
            if vm.check_extension(capability) >= RING_ENTRIES * 16:
                vm.enable_cap(capability, RING_ENTRIES * 16)
                return "ring"
    if vm.check_extension("KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2"):
        # Else reading the log clears and write-protects at once all that it shows, and holds up vCPUs meanwhile.
        vm.enable_cap("KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2", lib.KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE)
    return "bitmap"


class PageSet:
    """Pages of one region that were written: ``count`` of them, ``bits`` as DirtyBitmap has them."""

    def __init__(self, region: Region, bits: Any, count: int) -> None:
        self.region = region
        self.bits = bits
        self.count = count

    def ranges(self) -> Iterator[tuple[int, int]]:
        """(first page, number of pages) of each run, counted from the region's start, in order."""
        ranges = ffi.new("struct pv_page_range[]", _RANGES_AT_ONCE)
        pages, at = self.region.size // 4096, 0
        while True:
            found = lib.pv_dirty_ranges(self.bits, pages, at, ranges, _RANGES_AT_ONCE)
            for i in range(found):
                yield ranges[i].first, ranges[i].count
            if found < _RANGES_AT_ONCE:
                return
            at = ranges[found - 1].first + ranges[found - 1].count

    def native_runs(self) -> tuple[Any, int]:
        """The same for native code: ``struct pv_page_range[]`` and how many of them there are."""
        pages = self.region.size // 4096
        most = min(self.count, (pages + 1) // 2)
        runs = ffi.new("struct pv_page_range[]", max(most, 1))
        return runs, int(lib.pv_dirty_ranges(self.bits, pages, 0, runs, most))

    def give_back(self) -> None:
        """The round failed: these pages are written, still."""
        lib.pv_dirty_merge(self.region.dirty.native, self.bits, len(self.bits))


class DirtyTracker:
    """Starts, harvests and stops dirty logging of a machine's RAM. Memslot ``i`` is region ``i`` (the builder's rule).

    :meth:`harvest` and :meth:`reap` may be called from any thread.
    """

    def __init__(self, vm: Vm, memory: GuestMemory, method: Method) -> None:
        self.method = method
        self.active = False
        self.watched = False
        """Logged for somebody who only looks on; never while ``active``."""
        self.observe: Callable[[Sequence[PageSet]], None] | None = None
        """Told of each harvest, on its thread, while the guest may stand still for it: it must be quick."""
        self._overran = False
        """Whether a ring ever lost pages; what it says cannot be trusted then."""
        self.reaping = 0.0
        """Seconds spent emptying rings, also of vCPUs that had filled theirs."""
        self._vm = vm
        self._memory = memory
        self._manual = bool(vm.check_extension("KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2"))
        self.rings: list[Any] = []
        """``struct pv_dirty_ring *`` of each vCPU; none where it is the bitmap."""
        self._lock = threading.RLock()
        regions = memory.regions
        self._scratch = [ffi.new("uint64_t[]", (r.size // 4096 + 63) // 64) for r in regions]
        self._marks = ffi.new("uint64_t *[]", [r.dirty.native for r in regions])
        self._pages = ffi.new("uint64_t[]", [r.size // 4096 for r in regions])

    def add_vcpu(self, vcpu: Vcpu) -> None:
        """Map the ring of a new vCPU, if there are rings; the vCPU owns it. KvmError if that is refused."""
        if self.method == "ring":
            self.rings.append(vcpu.map_dirty_ring(RING_ENTRIES))

    def start(self) -> None:
        """Log from now on. What was written before is forgotten: the first round sends everything anyway."""
        with self._lock:
            self.unwatch()
            self._start_logging()
            self.active = True

    def stop(self) -> None:
        """Log no more; writes cost nothing again."""
        with self._lock:
            self.active = False
            self._stop_logging()

    def watch(self) -> None:
        """Log for somebody who only looks on; nothing happens if pages are logged already."""
        with self._lock:
            if not self.active and not self.watched:
                self._start_logging()
                self.watched = True

    def harvest_watched(self) -> None:
        """As :meth:`harvest`, for ``observe`` alone, and only if nobody else has the log."""
        with self._lock:
            if self.watched:
                self.harvest()

    def unwatch(self) -> None:
        """Log no more for who looks on; nothing happens if somebody else has the log."""
        with self._lock:
            if self.watched:
                self.watched = False
                try:
                    self._stop_logging()
                finally:
                    self._overran = False  # nobody was told anything wrong, and the next start protects pages anew

    def _start_logging(self) -> None:
        self._set_flags(lib.KVM_MEM_LOG_DIRTY_PAGES)
        for region in self._memory.regions:
            region.dirty.harvest()

    def _stop_logging(self) -> None:
        self._set_flags(0)
        self.reap()  # what is left in the rings would be taken for news by the next start

    def _set_flags(self, flags: int) -> None:
        for slot, region in enumerate(self._memory.regions):
            self._vm.set_memory_region(slot, region.gpa, region.size, region.hva, flags)

    def harvest(self) -> Sequence[PageSet]:
        """What was written since :meth:`start` or the last call, one set for each region.

        KvmError if KVM refuses; then nothing is lost, and the next call has it all. StateError before :meth:`start`.
        """
        with self._lock:
            if not self.active and not self.watched:
                raise StateError("dirty pages are not logged: start logging first")
            if self.method == "ring":
                self.reap()
                if self._overran:
                    raise StateError(
                        "KVM logged more pages at once than its dirty ring has room for and lost some, as it does where"
                        " it shadows page tables; start the machine with --dirty-log bitmap"
                    )
            else:
                self._get_bitmaps()
            sets = []
            for region in self._memory.regions:
                words = len(region.dirty.native)
                bits = ffi.new("uint64_t[]", words)
                lib.pv_dirty_harvest(region.dirty.native, bits, words)
                sets.append(PageSet(region, bits, int(lib.pv_dirty_count(bits, words))))
            observe = self.observe  # which may be taken away meanwhile
            if observe is not None:
                observe(sets)
        T.dirty_harvest.on and T.dirty_harvest(self.method, sum(s.count for s in sets))
        return sets

    def _get_bitmaps(self) -> None:
        for slot in range(len(self._memory.regions)):
            result = lib.pv_dirty_log_get(
                self._vm.fd, slot, self._pages[slot], self._manual, self._scratch[slot], self._marks[slot]
            )
            if result < 0:
                raise KvmError("KVM_GET_DIRTY_LOG", -result)

    def make_room(self, vcpu: Vcpu) -> None:
        """A full ring has stopped ``vcpu``: empty it."""
        with self._lock:
            if lib.pv_dirty_ring_skip(self.rings[vcpu.index]):
                self._overran = True
            self.reap()

    def reap(self) -> None:
        """Empty the rings into the regions' marks."""
        with self._lock:
            began, taken = time.perf_counter(), 0
            for ring in self.rings:
                count = lib.pv_dirty_ring_reap(ring, self._marks, self._pages, len(self._pages))
                self._overran |= count == RING_ENTRIES
                taken += count
            if not taken:
                return
            # A signal that is pending, as the one that stops a vCPU, would end KVM's work early (Linux 6.16 on): pages
            # it has not come to would stay writable, and what is written there would not be logged.
            blocked = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
            try:
                done = self._vm.reset_dirty_rings()
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
            self._overran |= done != taken
            self.reaping += time.perf_counter() - began
