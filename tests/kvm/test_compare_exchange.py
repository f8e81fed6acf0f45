"""CMPXCHG8B/16B on guest memory: the right answer, and atomic between threads."""

from __future__ import annotations

import threading

import pytest

from pyvmm.errors import GuestMemoryError
from tests.kvm.conftest import BareVm


@pytest.mark.parametrize("size", [8, 16])
def test_it_exchanges_only_what_matches(bare: BareVm, size: int) -> None:
    one, two = bytes(range(size)), bytes(reversed(range(size)))
    bare.memory.write(0x2000, one)
    assert bare.vm.compare_exchange(0x2000, two, two) == one
    assert bare.memory.read(0x2000, size) == one
    assert bare.vm.compare_exchange(0x2000, one, two) == one
    assert bare.memory.read(0x2000, size) == two


@pytest.mark.parametrize("size", [8, 16])
def test_no_increment_of_four_threads_is_lost(bare: BareVm, size: int) -> None:
    def add() -> None:
        for _ in range(500):
            held = bare.memory.read(0x3000, size)
            while (seen := bare.vm.compare_exchange(0x3000, held, _plus_one(held))) != held:
                held = seen

    threads = [threading.Thread(target=add) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert int.from_bytes(bare.memory.read(0x3000, size), "little") == 2000


def _plus_one(value: bytes) -> bytes:
    return (int.from_bytes(value, "little") + 1).to_bytes(len(value), "little")


@pytest.mark.parametrize("gpa", [0x2008, (1 << 20) - 8, 1 << 40, (1 << 64) - 16])
def test_what_is_not_aligned_ram_is_refused(bare: BareVm, gpa: int) -> None:
    with pytest.raises(GuestMemoryError):
        bare.vm.compare_exchange(gpa, bytes(16), bytes(16))
