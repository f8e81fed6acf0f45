"""Three descriptors, the ring's first entry, its index."""

import struct
from collections.abc import Callable

from pyvmm.memory.guest_memory import GuestMemory


def _offer(flags: tuple[int, int, int], index: int) -> Callable[..., None]:
    def offer(memory: GuestMemory, sector: int, header: int, data: int, status: int) -> None:
        memory.write(header, struct.pack("<IIQ", 0, 0, sector))
        for number, (address, length) in enumerate(((header, 16), (data, 512), (status, 1))):
            memory.write(0x1000 + 16 * number, struct.pack("<QIHH", address, length, flags[number], number + 1))
        memory.write(0x2000, struct.pack("<HHH", 0, index, 0))

    return offer


offer_read = _offer((1, 3, 2), 1)
WRONG = {
    "nothing for the device to write": _offer((1, 1, 0), 1), "never made available": _offer((1, 3, 2), 0),
    "a chain without an end": _offer((1, 3, 3), 1),
}  # fmt: skip
