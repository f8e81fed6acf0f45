"""What a machine asks of the debugger that is attached to it (pyvmm/gdb); nothing while none is."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from pyvmm.machine.vcpu_thread import VcpuThread


class DebugHook(Protocol):
    """Called in the thread of the vCPU concerned, but for the first."""

    def about_to_run(self) -> None:
        """In the loop's thread: the machine goes on, no vCPU runs yet."""

    def debug_exit(self, thread: VcpuThread) -> None:
        """KVM_EXIT_DEBUG that is not the work-arounds' business."""

    def breakpoint_met(self, thread: VcpuThread) -> bool:
        """KVM's emulator gave up on an instruction: True if it is the debugger's INT3, and is to be stopped at."""

    def carried_out(self, thread: VcpuThread) -> None:
        """The fallback did an instruction in KVM's stead, which was perhaps one to be stepped over."""
