"""GuestMemory.zero: exact at every edge, gives whole pages back, marks what it cleared."""

from __future__ import annotations

import os

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pyvmm.errors import GuestMemoryError
from pyvmm.memory.guest_memory import PAGE_SIZE, GuestMemory, Region

SIZE = 8 * PAGE_SIZE


@pytest.mark.parametrize("private", [False, True])
@settings(max_examples=40, deadline=None)
@given(start=st.integers(0, SIZE), length=st.integers(0, SIZE))
def test_only_the_range_is_cleared(private: bool, start: int, length: int) -> None:
    length = min(length, SIZE - start)
    memory = GuestMemory([Region(0, SIZE, private=private)])
    try:
        memory.write(0, b"\xff" * SIZE)
        memory.regions[0].dirty.harvest()
        memory.zero(start, length)
        assert memory.read(0, SIZE) == b"\xff" * start + bytes(length) + b"\xff" * (SIZE - start - length)
        marked = [page for page in range(SIZE // PAGE_SIZE) if memory.regions[0].dirty.test(page)]
        expected = range(start // PAGE_SIZE, (start + length - 1) // PAGE_SIZE + 1) if length else range(0)
        assert marked == list(expected)
    finally:
        memory.close()


def test_clearing_fresh_memory_takes_none() -> None:
    memory = GuestMemory([Region(0, 64 << 20)])
    try:
        memory.zero(3, (64 << 20) - 6)
        assert os.fstat(memory.regions[0].fd).st_blocks * 512 <= 2 * PAGE_SIZE
    finally:
        memory.close()


def test_outside_memory_is_refused() -> None:
    memory = GuestMemory([Region(0, SIZE)])
    try:
        with pytest.raises(GuestMemoryError):
            memory.zero(SIZE - 1, 2)
    finally:
        memory.close()


def test_dropping_a_mapping_keeps_the_content_and_minds_no_address() -> None:
    for private in (False, True):
        memory = GuestMemory([Region(0, SIZE, private=private)])
        try:
            memory.write(0, b"\x5a" * SIZE)
            for gpa in (0, PAGE_SIZE + 17, SIZE - 1, SIZE, 0xFFFFF000):
                memory.drop_mapping(gpa)
            assert memory.read(0, SIZE) == b"\x5a" * SIZE
        finally:
            memory.close()
