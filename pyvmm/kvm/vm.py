"""A VM's file descriptor: memslots, interrupt controllers, event descriptors, dirty log."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pyvmm.errors import GuestMemoryError, KvmError
from pyvmm.kvm.ioctl import KvmFd
from pyvmm.kvm.vcpu import Vcpu
from pyvmm.native import ffi, lib

IRQCHIPS = {"pic_master": 0, "pic_slave": 1, "ioapic": 2}


class Vm(KvmFd):
    """One virtual machine. Owns its descriptor and the native tables; vCPUs must be closed before it."""

    def __init__(self, fd: int, vcpu_mmap_size: int) -> None:
        super().__init__(fd)
        self._vcpu_mmap_size = vcpu_mmap_size
        self.native = lib.pv_vm_new()
        if self.native == ffi.NULL:
            raise MemoryError("native VM tables")

    def check_extension(self, capability: str) -> int:
        """Like System.check_extension, but for this VM (api.rst, 4.4)."""
        return self.ioctl_number("KVM_CHECK_EXTENSION", getattr(lib, capability))

    def enable_cap(self, capability: str, *args: int) -> None:
        """KVM_ENABLE_CAP on the VM with up to four arguments."""
        cap = ffi.new("struct kvm_enable_cap *", {"cap": getattr(lib, capability)})
        for i, value in enumerate(args):
            cap.args[i] = value
        try:
            self.ioctl("KVM_ENABLE_CAP", cap)
        except KvmError as error:
            raise KvmError(f"KVM_ENABLE_CAP({capability})", error.errno) from None

    # -- memory ---------------------------------------------------------------------------------

    def set_memory_region(self, slot: int, gpa: int, size: int, hva: int, flags: int = 0) -> None:
        """Install memslot ``slot``: ``size`` bytes at GPA from HVA; size 0 removes it (api.rst, 4.35)."""
        region = ffi.new("struct kvm_userspace_memory_region *")
        region.slot, region.flags = slot, flags
        region.guest_phys_addr, region.memory_size, region.userspace_addr = gpa, size, hva
        self.ioctl("KVM_SET_USER_MEMORY_REGION", region)

    def add_native_region(self, gpa: int, size: int, hva: int, dirty: Any = None) -> None:
        """Tell the native core about RAM, so that it can look at guest memory itself.

        ``dirty``: the ``native`` words of the region's DirtyBitmap, kept alive by the region.
        """
        if lib.pv_vm_add_region(self.native, gpa, size, hva, ffi.NULL if dirty is None else dirty):
            raise ValueError(f"more than {lib.PV_MAX_REGIONS} memory regions")

    def compare_exchange(self, gpa: int, old: bytes, new: bytes) -> bytes:
        """Atomically put ``new`` at ``gpa`` if it holds ``old`` (8 or 16 bytes, aligned); returns what it held."""
        held = bytearray(old)
        if not lib.pv_compare_exchange(self.native, gpa, len(old), ffi.from_buffer(held), ffi.from_buffer(new)):
            raise GuestMemoryError(gpa, len(old), "compare-exchange")
        return bytes(held)

    def reset_dirty_rings(self) -> int:
        """Write-protect again what was taken from all vCPUs' dirty rings; how many pages (api.rst, 8.29)."""
        return self.ioctl("KVM_RESET_DIRTY_RINGS")

    def set_tss_addr(self, gpa: int) -> None:
        """Three pages KVM may use on Intel hosts without unrestricted guest (api.rst, 4.42)."""
        self.ioctl_number("KVM_SET_TSS_ADDR", gpa)

    def set_identity_map_addr(self, gpa: int) -> None:
        """One page, likewise (api.rst, 4.41); before the first vCPU."""
        self.ioctl("KVM_SET_IDENTITY_MAP_ADDR", ffi.new("uint64_t *", gpa))

    # -- interrupts -----------------------------------------------------------------------------

    def create_irqchip(self) -> None:
        """PIC, IOAPIC and, for every later vCPU, a local APIC in the kernel."""
        self.ioctl("KVM_CREATE_IRQCHIP")

    def create_pit2(self) -> None:
        """The i8254 in the kernel; the speaker port answers as Linux's calibration expects."""
        self.ioctl("KVM_CREATE_PIT2", ffi.new("struct kvm_pit_config *", {"flags": lib.KVM_PIT_SPEAKER_DUMMY}))

    def irq_line(self, gsi: int, level: int) -> None:
        """Drive interrupt line ``gsi`` to ``level``."""
        line = ffi.new("struct kvm_irq_level *")
        line.irq, line.level = gsi, level
        self.ioctl("KVM_IRQ_LINE", line)

    def set_gsi_routing(self, routes: Sequence[tuple[int, str, int]]) -> None:
        """Replace the routing table by (GSI, chip as in :data:`IRQCHIPS`, pin) entries (api.rst, 4.52)."""
        table = ffi.new("struct kvm_irq_routing *", {"entries": len(routes)})
        table.nr = len(routes)
        for index, (gsi, chip, pin) in enumerate(routes):
            entry = table.entries[index]
            entry.gsi, entry.type = gsi, lib.KVM_IRQ_ROUTING_IRQCHIP
            entry.u.irqchip.irqchip, entry.u.irqchip.pin = IRQCHIPS[chip], pin
        self.ioctl("KVM_SET_GSI_ROUTING", table)

    def signal_msi(self, address: int, data: int) -> int:
        """Deliver an MSI; how many vCPUs got it (api.rst, 4.70)."""
        msi = ffi.new("struct kvm_msi *")
        msi.address_lo, msi.address_hi, msi.data = address & 0xFFFFFFFF, address >> 32, data
        return self.ioctl("KVM_SIGNAL_MSI", msi)

    def irqfd(self, eventfd: int, gsi: int, *, resample: int = -1, assign: bool = True) -> None:
        """Raise ``gsi`` whenever ``eventfd`` is signalled (api.rst, 4.75)."""
        irqfd = ffi.new("struct kvm_irqfd *")
        irqfd.fd, irqfd.gsi = eventfd, gsi
        irqfd.flags = 0 if assign else lib.KVM_IRQFD_FLAG_DEASSIGN
        if resample >= 0:
            irqfd.flags |= lib.KVM_IRQFD_FLAG_RESAMPLE
            irqfd.resamplefd = resample
        self.ioctl("KVM_IRQFD", irqfd)

    def ioeventfd(
        self,
        eventfd: int,
        address: int,
        size: int,
        *,
        datamatch: int | None = None,
        pio: bool = False,
        assign: bool = True,
    ) -> None:
        """Signal ``eventfd`` instead of exiting when the guest writes ``size`` bytes at ``address`` (api.rst, 4.59)."""
        event = ffi.new("struct kvm_ioeventfd *")
        event.fd, event.addr, event.len = eventfd, address, size
        if datamatch is not None:
            event.flags |= lib.KVM_IOEVENTFD_FLAG_DATAMATCH
            event.datamatch = datamatch
        if pio:
            event.flags |= lib.KVM_IOEVENTFD_FLAG_PIO
        if not assign:
            event.flags |= lib.KVM_IOEVENTFD_FLAG_DEASSIGN
        self.ioctl("KVM_IOEVENTFD", event)

    def register_coalesced(self, address: int, size: int, *, pio: bool) -> None:
        """Collect writes to the range in the ring instead of exiting (api.rst, 4.116)."""
        zone = ffi.new("struct kvm_coalesced_mmio_zone *")
        zone.addr, zone.size, zone.pio = address, size, int(pio)
        self.ioctl("KVM_REGISTER_COALESCED_MMIO", zone)

    def unregister_coalesced(self, address: int, size: int, *, pio: bool) -> None:
        """Exits again for the range."""
        zone = ffi.new("struct kvm_coalesced_mmio_zone *")
        zone.addr, zone.size, zone.pio = address, size, int(pio)
        self.ioctl("KVM_UNREGISTER_COALESCED_MMIO", zone)

    def set_msr_filter(self, denied: list[tuple[int, int]]) -> None:
        """Hand accesses to single MSRs to user space: (index, KVM_MSR_FILTER_READ|WRITE), all others allowed.

        Needs ``enable_cap("KVM_CAP_X86_USER_SPACE_MSR", KVM_MSR_EXIT_REASON_FILTER)`` (api.rst, 4.97).
        """
        msr_filter = ffi.new("struct kvm_msr_filter *")
        bitmaps = [ffi.new("uint8_t[1]") for _ in denied]
        for i, (index, access) in enumerate(denied):
            entry = msr_filter.ranges[i]
            entry.flags, entry.nmsrs, entry.base, entry.bitmap = access, 1, index, bitmaps[i]
        self.ioctl("KVM_X86_SET_MSR_FILTER", msr_filter)

    # -- state ----------------------------------------------------------------------------------

    def get_irqchip(self, chip: str) -> bytes:
        """Raw struct kvm_irqchip of ``pic_master``, ``pic_slave`` or ``ioapic``."""
        state = ffi.new("struct kvm_irqchip *", {"chip_id": IRQCHIPS[chip]})
        self.ioctl("KVM_GET_IRQCHIP", state)
        return bytes(ffi.buffer(state))

    def set_irqchip(self, chip: str, raw: bytes) -> None:
        """Set what :meth:`get_irqchip` gave."""
        state = _from_raw("struct kvm_irqchip", raw)
        state.chip_id = IRQCHIPS[chip]
        self.ioctl("KVM_SET_IRQCHIP", state)

    def get_pit2(self) -> bytes:
        """Raw struct kvm_pit_state2."""
        state = ffi.new("struct kvm_pit_state2 *")
        self.ioctl("KVM_GET_PIT2", state)
        return bytes(ffi.buffer(state))

    def set_pit2(self, raw: bytes) -> None:
        """Set what :meth:`get_pit2` gave."""
        self.ioctl("KVM_SET_PIT2", _from_raw("struct kvm_pit_state2", raw))

    def get_clock(self) -> tuple[int, int]:
        """(kvm-clock in ns, flags) (api.rst, 4.29)."""
        data = ffi.new("struct kvm_clock_data *")
        self.ioctl("KVM_GET_CLOCK", data)
        return int(data.clock), int(data.flags)

    def set_clock(self, nanoseconds: int) -> None:
        """Set the kvm-clock; no flags, so it is set to exactly this."""
        self.ioctl("KVM_SET_CLOCK", ffi.new("struct kvm_clock_data *", {"clock": nanoseconds}))

    # -- vCPUs ----------------------------------------------------------------------------------

    def create_vcpu(self, index: int) -> Vcpu:
        """vCPU ``index``; its APIC ID is the same number."""
        return Vcpu(self.ioctl_number("KVM_CREATE_VCPU", index), index, self.native, self._vcpu_mmap_size)

    def close(self) -> None:
        """Close the VM and free the native tables."""
        if self.fd >= 0:
            super().close()
            lib.pv_vm_free(self.native)
            self.native = ffi.NULL


def _from_raw(kind: str, raw: bytes) -> Any:
    state = ffi.new(f"{kind} *")
    buffer = ffi.buffer(state)
    if len(raw) != len(buffer):
        raise ValueError(f"{kind}: {len(raw)} bytes, {len(buffer)} expected")
    buffer[:] = raw
    return state
