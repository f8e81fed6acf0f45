"""Bitmap or ring: by which of KVM's two ways a machine's written pages are logged (machine/dirty_tracker.py).

The ring is chosen only where it is both

reliable
    A ring keeps 64 entries free for what one entry into the guest may log; KVM looks whether it is full only between
    entries. With EPT or NPT a fault logs one page. A KVM that shadows the guest's page tables logs up to 512 at once
    when it takes a changed page table over (``kvm_sync_page`` walks all of its entries), and the pages that no longer
    fit are lost. Whether that happens depends on what the guest does with its page tables, so a probe that happened to
    lose nothing would prove nothing: it is the way of paging that decides.

useful
    A harvest of the bitmap copies 32 KiB for each GiB of guest memory, written or not; the ring's costs nothing for
    pages that were not written but more for each that was, and stops a vCPU each time it fills up.
"""

from __future__ import annotations

from typing import Final, Literal

from pyvmm.host.profile import HostProfile

Method = Literal["bitmap", "ring"]

RING_FROM: Final = 64 << 30
"""Bytes of guest memory from which the bitmap alone (2 MiB, passed over several times) is a millisecond a harvest."""


def ring_problem(profile: HostProfile) -> str | None:
    """Why the ring is not to be trusted with a guest's pages here; ``None`` if it is."""
    if not (profile.capabilities.get("dirty_log_ring") or profile.capabilities.get("dirty_log_ring_acq_rel")):
        return "this KVM has no dirty ring"
    if profile.two_dimensional_paging is None:
        return "whether KVM shadows page tables, and may overrun a dirty ring, is not known"
    if not profile.two_dimensional_paging:
        return "KVM shadows page tables here and may log more pages at once than a dirty ring has room for"
    return None


def choose_dirty_log(profile: HostProfile, memory: int) -> tuple[Method, str]:
    """The method for a guest of ``memory`` bytes, and why."""
    problem = ring_problem(profile)
    if problem is not None:
        return "bitmap", problem
    if memory < RING_FROM:
        return "bitmap", f"a guest of less than {RING_FROM >> 30} GiB has a small one"
    return "ring", f"a guest of {RING_FROM >> 30} GiB or more has a bitmap that takes long to pass over"
