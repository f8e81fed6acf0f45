"""Events that belong together are one, memory is bounded, nothing is lost from the counts."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from pyvmm.explain.events import SAMPLE, Event
from pyvmm.explain.modes import Mode, changes
from pyvmm.explain.report import page
from pyvmm.explain.symbols import REACH, Symbols
from pyvmm.explain.telling import Teller


def put(text: str) -> Event:
    event = Event("port", 0.1, 0, "THR", 0x100, "put", "out dx, al", "serial", values=[ord(text)])
    event.characters = event.write = True
    return event


def status(value: int = 0x60) -> Event:
    return Event("port", 0.1, 0, "LSR", 0x90, "put", "in al, dx", "serial", values=[value])


def test_a_string_is_a_string() -> None:
    lines: list[str] = []
    teller = Teller(lines.append, 100)
    for letter in "Hello":
        teller(status())
        teller(put(letter))
    teller.flush()
    assert [event.what for event in teller.told] == ["LSR -> 0x60  [5 times]", 'THR <- "Hello"  [5 times]']
    assert "put" in lines[1] and "out dx, al" in lines[1]
    assert teller.counts == {"port serial": 10}


def test_another_value_is_another_event() -> None:
    teller = Teller(lambda text: None, 100)
    for value in (0x60, 0x60, 0x61):
        teller(status(value))
    teller.flush()
    assert [event.count for event in teller.told] == [2, 1]


@given(st.lists(st.sampled_from("abm"), max_size=300), st.integers(1, 20))
def test_memory_is_bounded_and_everything_counted(what: list[str], limit: int) -> None:
    written: list[str] = []
    teller = Teller(written.append, limit)
    for one in what:
        teller(Event("mode", 0, 0, "x") if one == "m" else put(one) if one == "a" else status())
    teller(Event("end", 0, 0, "over"))
    teller.flush()
    assert sum(teller.counts.values()) == len(what) + 1
    assert len(teller.told) <= limit + 4  # what was waiting when the limit was reached, and the end
    assert all(len(event.values) <= SAMPLE for event in teller.told)
    assert teller.told[-1].kind == "end"
    if len(teller.told) < limit:
        assert sum(event.count for event in teller.told) == len(what) + 1


def test_filters_leave_the_counts_alone() -> None:
    teller = Teller(lambda text: None, 10, {"mode"}, {"serial"})
    for event in (put("a"), Event("mode", 0, 0, "x"), Event("end", 0, 0, "over")):
        teller(event)
    teller.flush()
    assert [event.kind for event in teller.told] == ["end"]
    assert sum(teller.counts.values()) == 3


def test_symbols() -> None:
    symbols = Symbols([(0x100, 0x10, "first"), (0x200, 0, "label")])
    assert [symbols.name(at) for at in (0xFF, 0x100, 0x10F, 0x110)] == [None, "first", "first+0xf", None]
    assert (symbols.name(0x200 + REACH - 1), symbols.name(0x200 + REACH)) == (f"label+{REACH - 1:#x}", None)
    assert (symbols.start(0x105), symbols.start(0x110), symbols.address("label")) == (0x100, None, 0x200)


def test_mode_changes() -> None:
    real = Mode("real", "no paging", 0, 0x10, 0, 0)
    long = Mode("64-bit", "4-level paging", 0, 0x80000011, 0x20, 0x500)
    assert changes(real, real) == []
    assert changes(real, long) == [
        "real mode -> 64-bit mode", "no paging -> 4-level paging", "CR0.PE set (protected mode)",
        "CR0.PG set (paging)", "CR4.PAE set (page-table entries of 64 bits)", "EFER.LME set (long mode enabled)",
        "EFER.LMA set (long mode active)",
    ]  # fmt: skip


def test_what_a_guest_writes_is_no_markup() -> None:
    event = put("<")
    event.values = list(b"<script>\x00\xff")
    made = page("<title>", [event], ["1 <b>"], "<i>")
    assert "<script" not in made and "&lt;script&gt;" in made and "<i>" not in made
