"""Trace events, declared one ``trace-events`` file per folder in QEMU's format.

A module says once ``T = trace_group("kvm")`` and then, where something happens::

    T.kvm_exit.on and T.kvm_exit(cpu, reason)

which costs one attribute test while the event is off.
"""

from pyvmm.trace.events import Event, TraceGroup, trace_group

__all__ = ["Event", "TraceGroup", "trace_group"]
