"""Instructions that the host's KVM cannot carry out, carried out here.

On a host whose KVM emulates guest kernel code (a PVM host), KVM_RUN ends with KVM_INTERNAL_ERROR_EMULATION
at an instruction its emulator does not know. :func:`emulate` decodes that instruction and does what the CPU
would: registers, flags, memory, and the exceptions it raises. Family by family: ``integer``, ``xstate``,
``x87``, ``vector``, ``system``.

CPUID is not consulted to refuse instructions: the hosts that need this package show hardware features to the
guest that the VMM's CPUID table does not have.
"""

from __future__ import annotations

import pyvmm.arch.x86.fallback.integer  # these five register their handlers
import pyvmm.arch.x86.fallback.system
import pyvmm.arch.x86.fallback.vector
import pyvmm.arch.x86.fallback.x87
import pyvmm.arch.x86.fallback.xstate  # noqa: F401
from pyvmm.arch.x86.control_registers import FLAG_VM, code_bits
from pyvmm.arch.x86.fallback.context import CpuContext, Privilege
from pyvmm.arch.x86.fallback.execution import Execution
from pyvmm.arch.x86.fallback.operands import MAX_LENGTH, SIZE_MASK, Decoded, UndecodableError, decode
from pyvmm.arch.x86.fallback.registry import HANDLERS
from pyvmm.arch.x86.faults import CpuFault, PageFault, undefined
from pyvmm.errors import GuestMemoryError, UnknownInstructionError
from pyvmm.trace import trace_group

__all__ = ["CpuContext", "Privilege", "emulate", "known_mnemonics"]

T = trace_group("arch/x86/fallback")

LOCKABLE = frozenset({"cmpxchg8b", "cmpxchg16b"})


def known_mnemonics() -> frozenset[str]:
    """Every mnemonic that :func:`emulate` carries out (iced-x86's names, lower case)."""
    return frozenset(HANDLERS)


def emulate(context: CpuContext) -> str:
    """Carry out the instruction at RIP; returns its text.

    Afterwards either it has happened and RIP is at the next one, or it faulted and the exception is queued
    with RIP unchanged. Raises :class:`UnknownInstructionError`, with nothing changed, for an instruction that
    is not known or that touches something other than RAM.
    """
    rip = context.regs.rip
    code = b""
    text = "not decodable"
    try:
        code = _fetch(context)
        decoded = _decode(context, code)
        text, code = decoded.text, code[: decoded.length]
        T.fallback_instruction.on and T.fallback_instruction(rip, text)
        handler = HANDLERS.get(decoded.mnemonic)
        if handler is None or decoded.string or context.regs.rflags & FLAG_VM:
            raise UnknownInstructionError(rip, code, text)
        if decoded.locked and decoded.mnemonic not in LOCKABLE:
            raise undefined()
        execution = Execution(context, decoded, code)
        handler(execution)
        execution.commit()
    except CpuFault as fault:
        T.fallback_fault.on and T.fallback_fault(rip, str(fault))
        _deliver(context, fault)
    except GuestMemoryError as error:
        raise UnknownInstructionError(rip, code, f"{text} ({error})") from None
    return text


def _fetch(context: CpuContext) -> bytes:
    sregs, rip = context.sregs, context.regs.rip
    if code_bits(sregs) == 64:
        address = rip
    else:
        address = (sregs.cs.base + (rip & SIZE_MASK[4])) & SIZE_MASK[4]
    return context.fetch(address, MAX_LENGTH)


def _decode(context: CpuContext, code: bytes) -> Decoded:
    rip = context.regs.rip
    try:
        return decode(code, code_bits(context.sregs), context.regs)
    except UndecodableError as error:
        if not error.truncated:
            raise UnknownInstructionError(rip, code, "not an instruction known here") from None
        # The rest lies on a page that cannot be fetched: fetching it raises the page fault.
        sregs = context.sregs
        base = 0 if code_bits(sregs) == 64 else sregs.cs.base
        context.fetch(base + rip + len(code), 1)
        raise UnknownInstructionError(rip, code, "code changed while it was being fetched") from None


def _deliver(context: CpuContext, fault: CpuFault) -> None:
    """Queue ``fault``. Real mode pushes no error codes."""
    import msgspec

    if isinstance(fault, PageFault):
        context.sregs = msgspec.structs.replace(context.sregs, cr2=fault.address or 0)
    real = not context.sregs.cr0 & 1
    context.inject(int(fault.vector), None if real else fault.error_code)
