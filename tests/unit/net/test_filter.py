"""The chain of filters by itself; tests/unit/virtio/test_net_filtering.py has it in a device."""

from __future__ import annotations

import pytest

from pyvmm.net.filter import Direction, Filter, FilterChain, Frame

TX, RX, ALL = Direction.TX, Direction.RX, Direction.ALL


def frame(text: str) -> Frame:
    return Frame(bytes(12), text.encode())


class Stamp(Filter):
    """Adds its name to a frame; keeps those that say so."""

    def __init__(self, name: str, direction: Direction = ALL) -> None:
        super().__init__(name, direction)
        self.held: list[tuple[Direction, Frame]] = []

    def handle(self, direction: Direction, frame: Frame) -> Frame | None:
        if frame.data.startswith(b"drop"):
            return None
        stamped = Frame(frame.header, frame.data + self.name.encode())
        if frame.data.startswith(b"hold " + self.name.encode()):
            self.held.append((direction, stamped))
            return None
        return stamped

    def release(self) -> list[tuple[Direction, Frame]]:
        held, self.held = self.held, []
        return held


class Changes:
    """A chain, and how often its device was called."""

    def __init__(self) -> None:
        self.count = 0
        self.chain = FilterChain(self.note)

    def note(self) -> None:
        self.count += 1

    def out(self) -> tuple[list[str], list[str]]:
        chain = self.chain
        found = [f.data.decode() for f in chain.to_guest], [f.data.decode() for f in chain.to_backend]
        chain.to_guest.clear()
        chain.to_backend.clear()
        return found


def test_frames_pass_from_their_end_to_the_other() -> None:
    c = Changes()
    for name, direction in (("a", ALL), ("b", TX), ("c", RX), ("d", ALL)):
        c.chain.add(Stamp(name, direction))
    assert c.count == 4
    c.chain.enter(TX, frame("to backend "))
    c.chain.enter(RX, frame("to guest "))
    assert c.out() == (["to guest dca"], ["to backend abd"])


def test_a_place_in_the_chain() -> None:
    c = Changes()
    for name, place in (("a", None), ("b", 0), ("c", 1)):
        c.chain.add(Stamp(name), place)
    c.chain.enter(TX, frame(""))
    assert c.out() == ([], ["bca"])


def test_dropped_held_and_injected() -> None:
    c = Changes()
    a, b = Stamp("a"), Stamp("b")
    c.chain.add(a)
    c.chain.add(b)
    for text in ("drop", "hold a ", "go "):
        c.chain.enter(TX, frame(text))
    assert c.out() == ([], ["go ab"])
    before = c.count
    a.inject(*a.held.pop())
    b.inject(RX, frame("from b "))
    assert c.count == before + 2 and not c.chain.idle
    assert c.out() == ([], [])  # not in the injector's thread
    c.chain.settle()
    assert c.out() == (["from b a"], ["hold a ab"])


def test_what_a_filter_holds_goes_on_when_it_is_removed_and_nothing_overtakes() -> None:
    c = Changes()
    a, b = Stamp("a"), Stamp("b")
    c.chain.add(a)
    c.chain.add(b)
    c.chain.enter(RX, frame("hold a 1 "))
    c.chain.enter(RX, frame("hold a 2 "))
    a.inject(RX, frame("0 "))
    c.chain.remove(a)
    assert c.out() == (["0 ", "hold a 1 ba", "hold a 2 ba"], [])
    with pytest.raises(ValueError, match="in no chain"):
        a.inject(RX, frame("late"))
    c.chain.remove(b)
    assert c.chain.idle


def test_an_injection_that_comes_too_late_is_dropped() -> None:
    """By a thread that took hold of ``inject`` before the filter was removed."""
    c = Changes()
    a = Stamp("a")
    c.chain.add(a)
    inject = a.inject
    c.chain.remove(a)
    inject(RX, frame("late"))
    c.chain.settle()
    assert c.out() == ([], []) and c.chain.idle


def test_misuse() -> None:
    c = Changes()
    a = Stamp("a")
    with pytest.raises(ValueError, match="in no chain"):
        a.inject(RX, frame(""))
    c.chain.add(a)
    with pytest.raises(ValueError, match="already"):
        c.chain.add(a)
    with pytest.raises(ValueError, match="one way"):
        a.inject(ALL, frame(""))
    with pytest.raises(NotImplementedError, match="handle is not implemented for Filter"):
        Filter("base").handle(TX, frame(""))
