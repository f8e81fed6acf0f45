"""One vCPU: running it, and every piece of its state as KVM exchanges it.

State may be read only while the vCPU is paused (after ``PV_EXIT_KICKED``): right after any other exit a
port or memory access may still be pending and would be lost.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
import struct
from collections.abc import Iterable
from typing import Any

from pyvmm.errors import KvmError
from pyvmm.kvm.ioctl import KvmFd
from pyvmm.kvm.state import CpuidEntry, DebugRegs, Dtable, Regs, Segment, Sregs, VcpuEvents
from pyvmm.native import ffi, lib

_SEGMENTS = ("cs", "ds", "es", "fs", "gs", "ss", "tr", "ldt")
_REGS = Regs.__struct_fields__
_SEGMENT_FIELDS = Segment.__struct_fields__
_MSR_ENTRY = struct.Struct("<I4xQ")  # struct kvm_msr_entry
_MAX_CPUID = 256  # KVM_MAX_CPUID_ENTRIES
_CONTROL = ("cr0", "cr2", "cr3", "cr4", "cr8", "efer", "apic_base")


class Vcpu(KvmFd):
    """Owns the vCPU's descriptor and its mapped kvm_run."""

    def __init__(self, fd: int, index: int, native_vm: Any, mmap_size: int) -> None:
        super().__init__(fd)
        self.index = index
        self._dirty_ring: Any = None
        self.native = lib.pv_vcpu_new(native_vm, fd, mmap_size)
        if self.native == ffi.NULL:
            error = ffi.errno
            os.close(fd)
            raise KvmError("mmap(kvm_run)", error)
        self.sinks = native_vm
        """The VM's native tables; ``sinks_pending`` counts bytes that wait for Python."""
        self.cpuid: tuple[CpuidEntry, ...] = ()
        """As :meth:`set_cpuid` had it; KVM itself goes on to change bits with CR4 and XCR0."""
        self.exit = self.native.exit
        """The native struct pv_exit that :meth:`run` fills."""

    def run(self) -> int:
        """Run until Python is needed; one of ``PV_EXIT_*``, with details in :attr:`exit`.

        Only one thread may be in here. The answer to a read goes into ``exit.data`` before the next call.
        """
        return int(lib.pv_vcpu_run(self.native))

    def kick(self) -> None:
        """From any thread: make :meth:`run` return ``PV_EXIT_KICKED`` soon. A closed vCPU needs none."""
        if self.fd >= 0:
            lib.pv_vcpu_kick(self.native)

    def map_dirty_ring(self, entries: int) -> Any:
        """The vCPU's dirty ring (``struct pv_dirty_ring *``), which goes with the vCPU; the VM was told its size."""
        ring = ffi.new("struct pv_dirty_ring *")
        result = lib.pv_dirty_ring_map(ring, self.fd, entries)
        if result:
            raise KvmError("mmap(dirty ring)", -result)
        self._dirty_ring = ring
        return ring

    def close(self) -> None:
        """Unmap kvm_run and close the descriptor; no thread may be in :meth:`run`."""
        if self.fd >= 0:
            if self._dirty_ring is not None:
                lib.pv_dirty_ring_unmap(self._dirty_ring)
            lib.pv_vcpu_free(self.native)
            self.native = self.exit = ffi.NULL
            super().close()

    # -- registers ------------------------------------------------------------------------------

    def get_regs(self) -> Regs:
        """General registers."""
        raw = ffi.new("struct kvm_regs *")
        self.ioctl("KVM_GET_REGS", raw)
        return Regs(**{name: getattr(raw, name) for name in _REGS})

    def set_regs(self, regs: Regs) -> None:
        """Set the general registers."""
        self.ioctl("KVM_SET_REGS", ffi.new("struct kvm_regs *", {name: getattr(regs, name) for name in _REGS}))

    def get_sregs(self) -> Sregs:
        """Segments, descriptor tables, control registers."""
        raw = ffi.new("struct kvm_sregs *")
        self.ioctl("KVM_GET_SREGS", raw)
        values: dict[str, Any] = {name: _segment(getattr(raw, name)) for name in _SEGMENTS}
        values |= {name: getattr(raw, name) for name in _CONTROL}
        return Sregs(
            **values,
            gdt=Dtable(base=raw.gdt.base, limit=raw.gdt.limit),
            idt=Dtable(base=raw.idt.base, limit=raw.idt.limit),
            interrupt_bitmap=(*raw.interrupt_bitmap,),
        )

    def set_sregs(self, sregs: Sregs) -> None:
        """Set segments, descriptor tables, control registers."""
        raw = ffi.new("struct kvm_sregs *")
        for name in _SEGMENTS:
            segment, source = getattr(raw, name), getattr(sregs, name)
            for field in _SEGMENT_FIELDS:
                setattr(segment, field, getattr(source, field))
        for name in _CONTROL:
            setattr(raw, name, getattr(sregs, name))
        raw.gdt.base, raw.gdt.limit = sregs.gdt.base, sregs.gdt.limit
        raw.idt.base, raw.idt.limit = sregs.idt.base, sregs.idt.limit
        for i, word in enumerate(sregs.interrupt_bitmap):
            raw.interrupt_bitmap[i] = word
        self.ioctl("KVM_SET_SREGS", raw)

    def get_msrs(self, indices: list[int]) -> dict[int, int]:
        """Values of MSRs. A short answer is a KvmError that names the first MSR KVM refused."""
        raw = _msrs(((index, 0) for index in indices), len(indices))
        done = self.ioctl("KVM_GET_MSRS", raw)
        if done != len(indices):
            raise KvmError(f"KVM_GET_MSRS(MSR {indices[done]:#x})", 22)
        entries = memoryview(ffi.buffer(raw.entries, done * _MSR_ENTRY.size))
        return dict(_MSR_ENTRY.iter_unpack(entries))

    def set_msrs(self, values: dict[int, int]) -> None:
        """Set MSRs in order. A short write is a KvmError that names the MSR KVM refused."""
        indices = list(values)
        done = self.ioctl("KVM_SET_MSRS", _msrs(values.items(), len(values)))
        if done != len(indices):
            raise KvmError(f"KVM_SET_MSRS(MSR {indices[done]:#x})", 22)

    def get_debugregs(self) -> DebugRegs:
        """The guest's own DR0-DR3, DR6, DR7."""
        raw = ffi.new("struct kvm_debugregs *")
        self.ioctl("KVM_GET_DEBUGREGS", raw)
        return DebugRegs(db=(*raw.db,), dr6=raw.dr6, dr7=raw.dr7, flags=raw.flags)

    def set_debugregs(self, regs: DebugRegs) -> None:
        """Set the guest's own debug registers."""
        raw = ffi.new("struct kvm_debugregs *")
        raw.db, raw.dr6, raw.dr7, raw.flags = list(regs.db), regs.dr6, regs.dr7, regs.flags
        self.ioctl("KVM_SET_DEBUGREGS", raw)

    def get_events(self) -> VcpuEvents:
        """Pending and injected exceptions, interrupts, NMIs."""
        raw = ffi.new("struct kvm_vcpu_events *")
        self.ioctl("KVM_GET_VCPU_EVENTS", raw)
        if raw.exception.injected and not raw.flags & lib.KVM_VCPUEVENT_VALID_PAYLOAD:
            # One that is pending is told as injected, too (api.rst, 4.31), and setting it makes it that.
            raw.exception.pending = 0
        return VcpuEvents(**{name: _follow(raw, path) for name, path in _EVENT_PATHS.items()})

    def set_events(self, events: VcpuEvents) -> None:
        """Set them; ``events.flags`` says which optional parts are meant (api.rst, 4.32)."""
        raw = ffi.new("struct kvm_vcpu_events *")
        for name, path in _EVENT_PATHS.items():
            setattr(_follow(raw, path[:-1]), path[-1], getattr(events, name))
        self.ioctl("KVM_SET_VCPU_EVENTS", raw)

    # -- floating point -------------------------------------------------------------------------

    def get_xsave(self) -> bytes:
        """x87, SSE, AVX state in XSAVE's standard format (4096 bytes)."""
        raw = ffi.new("struct kvm_xsave *")
        self.ioctl("KVM_GET_XSAVE", raw)
        return bytes(ffi.buffer(raw.region))

    def set_xsave(self, state: bytes | bytearray) -> None:
        """Set what :meth:`get_xsave` gave."""
        raw = ffi.new("struct kvm_xsave *")
        ffi.buffer(raw.region)[:] = state
        self.ioctl("KVM_SET_XSAVE", raw)

    def get_xcrs(self) -> dict[int, int]:
        """Extended control registers by number (0 is XCR0)."""
        raw = ffi.new("struct kvm_xcrs *")
        self.ioctl("KVM_GET_XCRS", raw)
        return {raw.xcrs[i].xcr: raw.xcrs[i].value for i in range(raw.nr_xcrs)}

    def set_xcrs(self, values: dict[int, int]) -> None:
        """Set extended control registers."""
        raw = ffi.new("struct kvm_xcrs *")
        raw.nr_xcrs = len(values)
        for i, (index, value) in enumerate(values.items()):
            raw.xcrs[i].xcr, raw.xcrs[i].value = index, value
        self.ioctl("KVM_SET_XCRS", raw)

    # -- the rest -------------------------------------------------------------------------------

    def get_lapic(self) -> bytes:
        """The local APIC's 1 KiB register page."""
        raw = ffi.new("struct kvm_lapic_state *")
        self.ioctl("KVM_GET_LAPIC", raw)
        return bytes(ffi.buffer(raw.regs))

    def set_lapic(self, regs: bytes) -> None:
        """Set the local APIC's registers."""
        raw = ffi.new("struct kvm_lapic_state *")
        ffi.buffer(raw.regs)[:] = regs
        self.ioctl("KVM_SET_LAPIC", raw)

    def get_mp_state(self) -> int:
        """One of ``KVM_MP_STATE_*``."""
        raw = ffi.new("struct kvm_mp_state *")
        self.ioctl("KVM_GET_MP_STATE", raw)
        return int(raw.mp_state)

    def set_mp_state(self, state: int) -> None:
        """Set ``KVM_MP_STATE_*``."""
        self.ioctl("KVM_SET_MP_STATE", ffi.new("struct kvm_mp_state *", {"mp_state": state}))

    def set_cpuid(self, entries: list[CpuidEntry]) -> None:
        """What CPUID answers in the guest; before the first run (api.rst, 4.20)."""
        self.cpuid = tuple(entries)
        raw = ffi.new("struct kvm_cpuid2 *", {"entries": len(entries)})
        raw.nent = len(entries)
        for target, source in zip(raw.entries[0 : len(entries)], entries, strict=True):
            for name in CpuidEntry.__struct_fields__:
                setattr(target, name, getattr(source, name))
        self.ioctl("KVM_SET_CPUID2", raw)

    def get_cpuid(self) -> list[CpuidEntry]:
        """What CPUID answers in the guest (api.rst, 4.88)."""
        raw = ffi.new("struct kvm_cpuid2 *", {"entries": _MAX_CPUID})
        raw.nent = _MAX_CPUID
        self.ioctl("KVM_GET_CPUID2", raw)
        names = CpuidEntry.__struct_fields__
        return [CpuidEntry(*(getattr(entry, name) for name in names)) for entry in raw.entries[0 : raw.nent]]

    def set_guest_debug(self, control: int, debugreg: tuple[int, ...] = (0,) * 8) -> None:
        """Host-side breakpoints and single step (api.rst, 4.87); ``debugreg`` is DR0-DR7."""
        raw = ffi.new("struct kvm_guest_debug *", {"control": control})
        raw.arch.debugreg = list(debugreg)
        self.ioctl("KVM_SET_GUEST_DEBUG", raw)

    def translate(self, gva: int) -> int | None:
        """GPA behind a guest-virtual address by KVM's own walk, ``None`` if not mapped."""
        raw = ffi.new("struct kvm_translation *", {"linear_address": gva})
        self.ioctl("KVM_TRANSLATE", raw)
        return int(raw.physical_address) if raw.valid else None

    def nmi(self) -> None:
        """Inject an NMI."""
        self.ioctl("KVM_NMI")

    def get_tsc_offset(self) -> int | None:
        """What KVM adds to the host's TSC, modulo 2^64; ``None`` if this KVM does not tell (devices/vcpu.rst, 4.1)."""
        value = ffi.new("uint64_t *")
        try:
            self.ioctl("KVM_GET_DEVICE_ATTR", _tsc_offset(value))
        except KvmError:
            return None
        return int(value[0])

    def set_tsc_offset(self, offset: int) -> None:
        """Set it; all vCPUs of a VM get theirs before any runs, or the guest sees them apart."""
        self.ioctl("KVM_SET_DEVICE_ATTR", _tsc_offset(ffi.new("uint64_t *", offset & (1 << 64) - 1)))

    def note_pause(self) -> None:
        """Tell a guest that uses kvm-clock that it stood still: else its watchdogs take the time for a lock-up."""
        with contextlib.suppress(KvmError):  # EINVAL: it does not use it
            self.ioctl("KVM_KVMCLOCK_CTRL")

    def tsc_khz(self) -> int:
        """Frequency of the guest's TSC."""
        return self.ioctl("KVM_GET_TSC_KHZ")

    def enable_user_entry(self, *, syscall: bool, int_n: bool) -> None:
        """Switch the native work-arounds on for this vCPU (arch/x86/user_entry.py says when)."""
        lib.pv_vcpu_enable_user_entry(self.native, syscall, int_n)

    def settle_user_entry(self) -> bool:
        """While paused: finish a SYSCALL or INT n that is half way through the work-around."""
        done = int(lib.pv_vcpu_settle_user_entry(self.native))
        if done < 0:
            raise KvmError("KVM_SET_REGS (settling a system call)", ffi.errno)
        return done == 1


def _msrs(pairs: Iterable[tuple[int, int]], count: int) -> Any:
    """struct kvm_msrs with ``count`` pairs of index and value: two hundred at each save, not one by one by cffi."""
    raw = ffi.new("struct kvm_msrs *", {"entries": count})
    raw.nmsrs = count
    entries = ffi.buffer(raw.entries, count * _MSR_ENTRY.size)
    _msr_entries(count).pack_into(entries, 0, *itertools.chain.from_iterable(pairs))
    return raw


@functools.cache
def _msr_entries(count: int) -> struct.Struct:
    return struct.Struct("<" + _MSR_ENTRY.format[1:] * count)


def _tsc_offset(value: Any) -> Any:
    attribute = ffi.new("struct kvm_device_attr *", {"group": lib.KVM_VCPU_TSC_CTRL, "attr": lib.KVM_VCPU_TSC_OFFSET})
    attribute.addr = int(ffi.cast("uintptr_t", value))
    return attribute


def _segment(raw: Any) -> Segment:
    return Segment(**{field: getattr(raw, field) for field in _SEGMENT_FIELDS})


def _follow(raw: Any, path: tuple[str, ...]) -> Any:
    for name in path:
        raw = getattr(raw, name)
    return raw


_EVENT_PATHS: dict[str, tuple[str, ...]] = {
    name: (name,)
    if name in ("sipi_vector", "flags", "exception_has_payload", "exception_payload")
    else (("triple_fault", "pending") if name == "triple_fault_pending" else tuple(name.split("_", 1)))
    for name in VcpuEvents.__struct_fields__
}
