"""Guest memory as the debugger asks for it: by linear address through a vCPU's page tables, or by physical address.

Rights do not count: a debugger reads what is not readable and plants breakpoints where nobody may write.
"""

from __future__ import annotations

from collections.abc import Iterator

from pyvmm.arch.x86.faults import PageFault
from pyvmm.arch.x86.paging import Access, Translation, walk
from pyvmm.errors import GuestMemoryError
from pyvmm.kvm.state import Sregs
from pyvmm.memory.guest_memory import PAGE_SIZE, GuestMemory

_ANY_RIGHTS = Access(smap_override=True)
_WRAP = (1 << 64) - 1


def translate(memory: GuestMemory, sregs: Sregs, address: int) -> Translation | None:
    """What is behind linear ``address``, if that is RAM."""
    try:
        found = walk(memory, sregs, address & _WRAP, _ANY_RIGHTS)
    except (PageFault, GuestMemoryError):
        return None
    return found if memory.contains(found.gpa) else None


def _pieces(memory: GuestMemory, sregs: Sregs | None, address: int, size: int) -> Iterator[tuple[int | None, int]]:
    """(GPA or ``None``, length) of each page's part. ``sregs`` is ``None`` for physical addresses."""
    while size:
        length = min(size, PAGE_SIZE - address % PAGE_SIZE)
        if sregs is None:
            yield (address if memory.contains(address, length) else None), length
        else:
            found = translate(memory, sregs, address)
            yield (found.gpa if found is not None else None), length
        address = (address + length) & _WRAP
        size -= length


def read_memory(memory: GuestMemory, sregs: Sregs | None, address: int, size: int) -> bytes:
    """As much of ``[address, address + size)`` as there is before the first hole."""
    parts = []
    for gpa, length in _pieces(memory, sregs, address, size):
        if gpa is None:
            break
        parts.append(memory.read(gpa, length))
    return b"".join(parts)


def write_memory(memory: GuestMemory, sregs: Sregs | None, address: int, data: bytes) -> bool:
    """All of it or, if there is a hole, nothing."""
    pieces = list(_pieces(memory, sregs, address, len(data)))
    if any(gpa is None for gpa, _ in pieces):
        return False
    at = 0
    for gpa, length in pieces:
        assert gpa is not None
        memory.write(gpa, data[at : at + length])
        at += length
    return True
