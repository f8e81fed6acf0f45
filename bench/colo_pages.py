"""What COLO does with a checkpoint's pages, by their number, against one memcpy of as many in the same round.

Both ends in one process and without a guest: what is measured is the copy into the staging buffer (``stage``, of the
pause), making it smaller while the guest runs (``shrink``), the secondary's ``check``, and ``roll_forward``: dropping
the replica's own copies of as many pages and writing the new ones. Every other page is written, so that each is a run
of its own. ``word``: one word of each page changes, ``noise``: all of it does.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from typing import Any, Literal

from figures import document, figure, main, paired_ratio, verdict

from pyvmm.colo.checkpoint import BATCH
from pyvmm.colo.delta import DeltaKind
from pyvmm.colo.replica_memory import ReplicaMemory
from pyvmm.colo.staging import Staging
from pyvmm.machine.dirty_tracker import PageSet
from pyvmm.memory.guest_memory import PAGE_SIZE, GuestMemory, Region
from pyvmm.native import ffi, lib

PAGES = (100, 1000, 4000, 16_000)
ROUNDS = 5
TARGET_STAGE = 2.5
MEMORY = 2 * max(PAGES) * PAGE_SIZE
Change = Literal["word", "noise"]
CASES: tuple[tuple[Change, DeltaKind], ...] = (("word", "off"), ("word", "xor"), ("noise", "xor"), ("noise", "lz4"))


class Marks:
    """A dirty tracker of the host's own writes."""

    def __init__(self, memory: GuestMemory) -> None:
        self._memory = memory

    def start(self) -> None:
        self.harvest()

    def harvest(self) -> Sequence[PageSet]:
        (region,) = self._memory.regions
        words = len(region.dirty.native)
        bits = ffi.new("uint64_t[]", words)
        lib.pv_dirty_harvest(region.dirty.native, bits, words)
        return [PageSet(region, bits, int(lib.pv_dirty_count(bits, words)))]


def microseconds(call: Callable[[], object]) -> float:
    began = time.perf_counter()
    call()
    return (time.perf_counter() - began) * 1e6


class Pair:
    """A primary's memory and a secondary's."""

    def __init__(self, kind: DeltaKind) -> None:
        self.kind = kind
        self.primary, self.secondary = (GuestMemory([Region(0, MEMORY)]) for _ in range(2))
        self.noise = os.urandom(1 << 20)
        for at in range(0, MEMORY, 1 << 20):
            self.primary.write(at, self.noise)
            self.secondary.write(at, self.noise)
        self.marks = Marks(self.primary)
        tracker: Any = Marks(self.secondary)
        self.replica = ReplicaMemory(self.secondary, tracker)
        self.replica.protect()
        self.marks.harvest()
        self.staging = Staging(256 << 20, self.primary.regions)
        self.staging.prepare(max(PAGES) * (PAGE_SIZE + 64))
        self.number = 0

    def write(self, pages: int, change: Change) -> None:
        """The guest, and the replica in as many pages."""
        self.number += 1
        for page in range(0, 2 * pages, 2):
            start = (page * 257 + self.number * 4099) % (len(self.noise) - PAGE_SIZE)
            new = self.noise[start : start + PAGE_SIZE] if change == "noise" else self.number.to_bytes(8, "little")
            self.primary.write(page * PAGE_SIZE, new)
            self.secondary.write(page * PAGE_SIZE + 8, b"otherwise")

    def batches(self) -> list[tuple[int, int, memoryview]]:
        """What would cross."""
        payload, at, found = memoryview(b"".join(bytes(piece) for piece in self.staging.pieces())), 0, []
        while at < len(payload):
            region, flags, size = BATCH.unpack_from(payload, at)
            at += BATCH.size
            found.append((region, flags, payload[at : at + size]))
            at += size
        return found

    def checkpoint(self, pages: int, change: Change) -> dict[str, float]:
        """Microseconds of each step, and bytes."""
        self.write(pages, change)
        sets = self.marks.harvest()
        found = {"stage": microseconds(lambda: self.staging.stage(sets))}
        found["shrink"] = microseconds(lambda: self.staging.shrink(self.kind))
        batches = self.batches()
        found["check"] = microseconds(lambda: self.replica.check(batches))
        found["roll_forward"] = microseconds(lambda: self.replica.roll_forward(batches))
        found["bytes"] = self.staging.size
        self.staging.prepare()
        return found

    def close(self) -> None:
        self.staging.close()
        self.primary.close()
        self.secondary.close()


def one(pages: int, change: Change, kind: DeltaKind) -> dict[str, Any]:
    """All figures of one case."""
    pair = Pair(kind)
    warm, copy = (ffi.new("uint8_t[]", bytes([which]) * (pages * PAGE_SIZE)) for which in (1, 2))
    try:
        for _ in range(2 + pages // 1024):  # until the encoder remembers what it has room for
            pair.checkpoint(pages, "word")
        steps: list[dict[str, float]] = []
        for _ in range(ROUNDS):
            memcpy = microseconds(lambda: ffi.memmove(copy, warm, pages * PAGE_SIZE))
            steps.append({**pair.checkpoint(pages, change), "memcpy": memcpy})
    finally:
        pair.close()
    found: dict[str, Any] = {"bytes_a_page": figure([step["bytes"] / pages for step in steps], "bytes", 0)}
    for name in ("memcpy", "stage", "shrink", "check", "roll_forward"):
        values = [step[name] for step in steps]
        found[name] = {"all": figure(values, "us", 0), "a_page": figure([value / pages for value in values], "us", 3)}
        if name != "memcpy":
            found[name]["ratio"] = paired_ratio(values, [step["memcpy"] for step in steps])
    return found


def measure() -> dict[str, Any]:
    """All numbers of pages, all cases."""
    cases = {f"{change}_{kind}": {str(n): one(n, change, kind) for n in PAGES} for change, kind in CASES}
    return document(
        what="a checkpoint's pages: staging copy, deltas, check and roll-forward, wall time",
        against="one memcpy of as many pages between warm buffers, in turns",
        cases=cases,
        target={f"stage_{n}": verdict(cases["word_off"][str(n)]["stage"]["ratio"].median, TARGET_STAGE) for n in PAGES},
    )


if __name__ == "__main__":
    main(measure)
