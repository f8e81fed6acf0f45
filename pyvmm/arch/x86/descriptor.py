"""Segment descriptors, as they stand in a GDT or LDT."""

from __future__ import annotations

from pyvmm.kvm.state import Segment


def cached_segment(descriptor: int, selector: int) -> Segment:
    """What the CPU caches of an 8-byte descriptor (SDM volume 3, section 3.4.5)."""
    limit = descriptor & 0xFFFF | descriptor >> 32 & 0xF0000
    granular = descriptor >> 55 & 1
    return Segment(
        base=descriptor >> 16 & 0xFFFFFF | descriptor >> 32 & 0xFF000000,
        limit=limit << 12 | 0xFFF if granular else limit,
        selector=selector,
        type=descriptor >> 40 & 0xF,
        s=descriptor >> 44 & 1,
        dpl=descriptor >> 45 & 3,
        present=descriptor >> 47 & 1,
        avl=descriptor >> 52 & 1,
        l=descriptor >> 53 & 1,
        db=descriptor >> 54 & 1,
        g=granular,
    )
