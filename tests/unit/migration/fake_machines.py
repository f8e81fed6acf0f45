"""A source and a target without KVM: memory, a flag for whether the guest runs, disks that one of them holds."""

from __future__ import annotations

import contextlib
import queue
import socket
import threading
from collections.abc import Callable
from typing import Any

import msgspec

from pyvmm.errors import SectionError
from pyvmm.machine.dirty_tracker import PageSet
from pyvmm.memory.guest_memory import PAGE_SIZE, GuestMemory, Region
from pyvmm.native import ffi, lib
from pyvmm.net.cards import MovingCard

PAGES = 64


class FakeDirty:
    """Harvests what the test writes to memory."""

    def __init__(self, memory: GuestMemory) -> None:
        self._memory = memory
        self.active = False

    def start(self) -> None:
        self.active = True
        self.harvest()

    def stop(self) -> None:
        self.active = False

    def harvest(self) -> list[PageSet]:
        sets = []
        for region in self._memory.regions:
            bits = ffi.new("uint64_t[]", len(region.dirty.native))
            lib.pv_dirty_harvest(region.dirty.native, bits, len(bits))
            sets.append(PageSet(region, bits, int(lib.pv_dirty_count(bits, len(bits)))))
        return sets


class Loop:
    """A machine's loop: carries out what is posted, on one thread, until it is closed."""

    def __init__(self) -> None:
        self._calls: queue.Queue[Callable[[], None] | None] = queue.Queue()
        self._thread = threading.Thread(target=self._main)
        self._thread.start()

    def post(self, call: Callable[[], None]) -> None:
        self._calls.put(call)

    def close(self) -> None:
        self._calls.put(None)
        self._thread.join(10)

    def _main(self) -> None:
        while (call := self._calls.get()) is not None:
            call()


class Machine:
    """Either side."""

    def __init__(self, *, running: bool) -> None:
        self.memory = GuestMemory([Region(0, PAGES * PAGE_SIZE)])
        self.dirty: Any = FakeDirty(self.memory)
        self.running = running
        self.holds_disks = running
        self.held = False
        self.state: dict[str, Any] = {}
        self.while_running: Callable[[], None] = lambda: None
        self.refuses: str | None = None
        self.waits = False

    def close(self) -> None:
        self.memory.close()

    def describe(self) -> dict[str, Any]:
        self.while_running()
        return {"pages": PAGES}

    def cards(self) -> tuple[MovingCard, ...]:
        return (MovingCard("52:00:00:00:00:01"),)

    def expect_cards(self, cards: tuple[MovingCard, ...]) -> None:
        assert cards == self.cards()

    def differences(self, description: dict[str, Any]) -> str | None:
        return self.refuses or (None if description == {"pages": PAGES} else "pages")

    def is_running(self) -> bool:
        return self.running

    def pause(self) -> None:
        self.running = False

    def resume(self) -> None:
        assert self.holds_disks, "a guest runs without its disks"
        self.running = True

    def save(self) -> bytes:
        assert not self.running
        return msgspec.msgpack.encode({"answer": 42})

    def rehearse(self) -> None:
        assert not self.running and not self.state

    def source_stands_still(self) -> None:
        self.waits = True

    def load(self, state: memoryview) -> None:
        try:
            decoded = msgspec.msgpack.decode(state)
        except msgspec.DecodeError as error:
            raise SectionError("all", "(state)", str(error)) from None
        self.state.update(decoded)

    def release(self) -> None:
        assert not self.running
        self.holds_disks = False

    def reclaim(self) -> None:
        self.holds_disks = True

    def handed_over(self) -> None:
        assert not self.running and not self.holds_disks

    def take_over(self, running: bool) -> None:
        assert self.waits
        self.holds_disks = True
        if running:
            self.resume()

    def hold_vcpus(self, held: bool) -> None:
        self.held = held


def relay(near: socket.socket, far: socket.socket, spoil: Callable[[int, bytes], bytes | None]) -> threading.Thread:
    """Carry bytes from ``near`` to ``far`` through ``spoil(position, data)``; ``None`` cuts the link."""

    def main() -> None:
        at = 0
        try:
            while data := near.recv(4096):
                spoilt = spoil(at, data)
                at += len(data)
                if spoilt is None:
                    break
                far.sendall(spoilt)
        except OSError:
            pass
        for sock in (near, far):
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)

    thread = threading.Thread(target=main)
    thread.start()
    return thread

