"""What the instruction fallback needs of a CPU: one abstract class, so that it runs without KVM in tests."""

from __future__ import annotations

import abc
import enum
import os

from pyvmm.kvm.state import Regs, Sregs


class Privilege(enum.Enum):
    """With whose rights memory is accessed (Intel SDM volume 3, section 4.6.1)."""

    USER = "user"
    """CPL 3."""
    SUPERVISOR = "supervisor"
    """CPL 0-2; RFLAGS.AC overrides SMAP."""
    SYSTEM = "system"
    """Descriptor tables and the TSS: supervisor whatever the CPL is, and SMAP has no override."""


class CpuContext(abc.ABC):
    """One stopped CPU.

    :func:`pyvmm.arch.x86.fallback.emulate` replaces ``regs`` and ``sregs`` as whole objects and calls the
    setters only after everything that can fault has been checked, so an instruction happens wholly or not.
    """

    regs: Regs
    sregs: Sregs

    @abc.abstractmethod
    def read(self, gva: int, size: int, privilege: Privilege) -> bytes:
        """``size`` bytes at the linear address. Raises PageFault; GuestMemoryError if it is not RAM."""

    @abc.abstractmethod
    def fetch(self, gva: int, size: int) -> bytes:
        """Up to ``size`` code bytes; fewer where the next page is not mapped. PageFault if none is."""

    @abc.abstractmethod
    def check_write(self, gva: int, size: int, privilege: Privilege) -> None:
        """Raise what :meth:`write` would raise; change nothing."""

    @abc.abstractmethod
    def write(self, gva: int, data: bytes, privilege: Privilege) -> None:
        """Write at the linear address, all or nothing. Raises like :meth:`read`."""

    @abc.abstractmethod
    def compare_exchange(self, gva: int, old: bytes, new: bytes, privilege: Privilege) -> bytes:
        """If memory holds ``old``, replace it by ``new``; returns what it held.

        The page must be writable even when nothing is exchanged. How atomic it is is the context's to say.
        """

    @abc.abstractmethod
    def get_xsave(self) -> bytes:
        """x87, SSE, AVX... state in XSAVE's standard format (KVM_GET_XSAVE)."""

    @abc.abstractmethod
    def set_xsave(self, state: bytes) -> None:
        """Set what :meth:`get_xsave` gave; XSTATE_BV says which components are not in their initial state."""

    @abc.abstractmethod
    def get_xcr0(self) -> int:
        """XCR0."""

    @abc.abstractmethod
    def set_xcr0(self, value: int) -> None:
        """Set XCR0 (already checked)."""

    @abc.abstractmethod
    def get_msr(self, index: int) -> int:
        """A model-specific register."""

    @abc.abstractmethod
    def cpuid(self, leaf: int, subleaf: int) -> tuple[int, int, int, int]:
        """EAX, EBX, ECX, EDX as the guest sees them."""

    @abc.abstractmethod
    def inject(self, vector: int, error_code: int | None) -> None:
        """Queue an exception to be delivered before the next instruction, with RIP as it then is."""

    @abc.abstractmethod
    def instruction_done(self, *, single_stepped: bool) -> None:
        """An instruction completed: the interrupt shadow ends. ``single_stepped``: RFLAGS.TF was set, so #DB
        with DR6.BS follows."""

    @abc.abstractmethod
    def flush_tlb(self) -> None:
        """Forget all translations, global ones included."""

    def random_bytes(self, size: int) -> bytes:
        """For RDRAND and RDSEED."""
        return os.urandom(size)
