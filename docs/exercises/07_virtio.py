"""A disk's request in a virtqueue: read a sector. Chapter 7."""

from pyvmm.memory.guest_memory import GuestMemory

DESCRIPTORS, AVAILABLE = 0x1000, 0x2000  # of a split queue of 8 (virtio 1.2, 2.7)


def offer_read(memory: GuestMemory, sector: int, header: int, data: int, status: int) -> None:
    """Put a request into the queue: three descriptors in a chain, for 16 bytes at ``header`` (u32 type 0, u32 0, u64
    sector), 512 bytes at ``data`` and one at ``status``, which the device writes; then make it available.

    ``memory.write(address, bytes)``; a descriptor is u64 address, u32 length, u16 flags (1 NEXT, 2 WRITE), u16 next.
    """
