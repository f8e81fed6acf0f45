"""A checkpoint's two parts: what was put in comes out, and nothing else is taken for one."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyvmm.colo.checkpoint import (
    BATCH,
    CHECKSUM,
    HEAD,
    STATE_MAX,
    Batch,
    Summed,
    decode_pages,
    decode_state,
    head_of,
    pages_size,
    state_size,
)
from pyvmm.errors import ChannelError

SECTIONS = st.binary(max_size=300)
BATCHES = st.lists(
    st.tuples(st.integers(0, 3), st.integers(0, 1), st.binary(max_size=200)).map(
        lambda each: Batch(each[0], each[1], memoryview(each[2]))
    ),
    max_size=4,
)


def packed(batches: list[Batch]) -> bytes:
    return b"".join(BATCH.pack(region, flags, len(data)) + data for region, flags, data in batches)


def parts(sections: bytes, pages: bytes, *, term: int = 3, epoch: int = 7, running: bool = True) -> tuple[bytes, bytes]:
    summed = Summed()
    state = b"".join(summed.part((head_of(term, epoch, len(sections), running=running), sections)))
    return state, b"".join(summed.part((pages,)))


def decoded(state: bytes, pages: bytes) -> tuple[bytes, bool, list[Batch]]:
    first = decode_state(memoryview(state), term=3, epoch=7)
    return bytes(first.sections), first.running, list(decode_pages(memoryview(pages), first))


@given(SECTIONS, BATCHES, st.booleans())
def test_what_was_put_in_comes_out(sections: bytes, batches: list[Batch], running: bool) -> None:
    state, pages = parts(sections, packed(batches), running=running)
    assert (len(state), len(pages)) == (state_size(len(sections)), pages_size(len(packed(batches))))
    assert decoded(state, pages) == (sections, running, batches)


@given(SECTIONS, BATCHES, st.data())
def test_any_damage_is_found(sections: bytes, batches: list[Batch], data: st.DataObject) -> None:
    state, pages = parts(sections, packed(batches))
    both = bytearray(state + pages)
    both[data.draw(st.integers(0, len(both) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    with pytest.raises(ChannelError):
        decoded(bytes(both[: len(state)]), bytes(both[len(state) :]))


@given(SECTIONS, BATCHES, st.data())
def test_a_part_that_was_cut_short_is_none(sections: bytes, batches: list[Batch], data: st.DataObject) -> None:
    state, pages = parts(sections, packed(batches))
    which = data.draw(st.sampled_from(["state", "pages"]))
    part = state if which == "state" else pages
    short = part[: data.draw(st.integers(0, len(part) - 1))]
    with pytest.raises(ChannelError):
        decoded(*((short, pages) if which == "state" else (state, short)))


@pytest.mark.parametrize(("term", "epoch"), [(3, 6), (3, 8), (2, 7), (4, 7)])
def test_another_checkpoints_state_is_refused(term: int, epoch: int) -> None:
    state, pages = parts(b"x", b"", term=term, epoch=epoch)
    with pytest.raises(ChannelError, match=f"checkpoint {epoch} of term {term} came where 7 of 3 was due"):
        decoded(state, pages)


def test_pages_of_another_checkpoint_are_refused() -> None:
    """They have no number of their own: the checksum is over the state before them."""
    pages = packed([Batch(0, 0, memoryview(b"page"))])
    with pytest.raises(ChannelError, match="damaged"):
        decoded(parts(b"this one", pages)[0], parts(b"another", pages)[1])


@given(st.binary(max_size=200))
def test_hostile_batches_are_bounded(pages: bytes) -> None:
    state, part = parts(b"", pages)
    try:
        batches = decoded(state, part)[2]
    except ChannelError:
        return
    assert packed(batches) == pages


@pytest.mark.parametrize(
    "head",
    [
        HEAD.pack(b"PVMX", 2, 3, 7, 0, 0),
        HEAD.pack(b"PVMC", 1, 3, 7, 0, 0),
        HEAD.pack(b"PVMC", 2, 3, 7, 0, 2),
        HEAD.pack(b"PVMC", 2, 3, 7, 1, 0),
        HEAD.pack(b"PVMC", 2, 3, 7, STATE_MAX + 1, 0),
        HEAD.pack(b"PVMC", 2, 3, 7, 2**64 - HEAD.size, 0),
    ],
    ids=["magic", "version", "flags", "size", "too-large", "overflow"],
)
def test_a_head_that_says_otherwise(head: bytes) -> None:
    whole = b"".join(Summed().part((head,)))
    with pytest.raises(ChannelError):
        decode_state(memoryview(whole), term=3, epoch=7)
    assert len(whole) == HEAD.size + CHECKSUM.size
