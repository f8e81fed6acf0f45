"""/dev/kvm itself: what this kernel offers, and the door to a VM.

Example, a whole VM in a few lines::

    with System() as system, system.create_vm() as vm:
        vm.create_irqchip()
        with vm.create_vcpu(0) as vcpu:
            print(vcpu.get_regs().rip)
"""

from __future__ import annotations

import errno
import os

from pyvmm.errors import HostError, KvmError
from pyvmm.kvm.ioctl import KvmFd
from pyvmm.kvm.state import CpuidEntry
from pyvmm.kvm.vm import Vm
from pyvmm.native import ffi, lib

API_VERSION = 12
"""The only KVM API version there ever was (api.rst, 4.1)."""


class System(KvmFd):
    """/dev/kvm, opened. HostError tells the remedy when it is missing or not permitted."""

    def __init__(self, path: str = "/dev/kvm") -> None:
        try:
            fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except FileNotFoundError:
            raise HostError(
                f"{path} does not exist: load kvm_intel or kvm_amd (modprobe), enable virtualization in the"
                " firmware, or enable nesting when this host is itself a VM"
            ) from None
        except PermissionError:
            raise HostError(
                f"{path}: permission denied; add this user to the group kvm (usermod -aG kvm $USER) or run as root"
            ) from None
        except OSError as error:
            raise HostError(f"{path}: {error.strerror}; the KVM module is there but cannot be used") from None
        super().__init__(fd)
        try:
            version = self.ioctl("KVM_GET_API_VERSION")
        except KvmError:
            self.close()
            raise HostError(f"{path} is not a KVM device") from None
        if version != API_VERSION:
            self.close()
            raise HostError(f"{path} speaks KVM API {version}, pyvmm needs {API_VERSION}")

    def check_extension(self, capability: str) -> int:
        """What the kernel says about ``KVM_CAP_...``: 0 when absent, else 1 or a number that depends on it."""
        return self.ioctl_number("KVM_CHECK_EXTENSION", getattr(lib, capability))

    def vcpu_mmap_size(self) -> int:
        """Bytes to map on a vCPU's descriptor."""
        return self.ioctl("KVM_GET_VCPU_MMAP_SIZE")

    def supported_cpuid(self) -> list[CpuidEntry]:
        """CPUID leaves KVM can give a guest here (api.rst, 4.46); leaf 1's APIC ID is the caller's CPU."""
        count = 128
        while True:
            cpuid = ffi.new("struct kvm_cpuid2 *", {"entries": count})
            cpuid.nent = count
            try:
                self.ioctl("KVM_GET_SUPPORTED_CPUID", cpuid)
            except KvmError as error:
                if error.errno != errno.E2BIG or count > 4096:
                    raise
                count *= 2
                continue
            return [
                CpuidEntry(e.function, e.index, e.flags, e.eax, e.ebx, e.ecx, e.edx)
                for e in cpuid.entries[0 : cpuid.nent]
            ]

    def _msr_list(self, name: str) -> list[int]:
        """The kernel says with E2BIG how long the list is (api.rst, 4.3)."""
        probe = ffi.new("struct kvm_msr_list *", {"indices": 0})
        try:
            self.ioctl(name, probe)
        except KvmError as error:
            if error.errno != errno.E2BIG:
                raise
        msrs = ffi.new("struct kvm_msr_list *", {"indices": probe.nmsrs})
        msrs.nmsrs = probe.nmsrs
        self.ioctl(name, msrs)
        return list(msrs.indices[0 : msrs.nmsrs])

    def msr_indices(self) -> list[int]:
        """MSRs that are part of a vCPU's state on this host."""
        return self._msr_list("KVM_GET_MSR_INDEX_LIST")

    def msr_feature_indices(self) -> list[int]:
        """MSRs that describe features of the host's KVM."""
        return self._msr_list("KVM_GET_MSR_FEATURE_INDEX_LIST")

    def create_vm(self, vm_type: int = 0) -> Vm:
        """A new VM. EINTR is retried: creating one is slow and a signal may come in between."""
        for _ in range(10):
            try:
                fd = self.ioctl_number("KVM_CREATE_VM", vm_type)
            except KvmError as error:
                if error.errno == errno.EINTR:
                    continue
                raise
            try:
                return Vm(fd, self.vcpu_mmap_size())
            except BaseException:
                os.close(fd)
                raise
        raise HostError("KVM_CREATE_VM was interrupted ten times in a row; try again")
