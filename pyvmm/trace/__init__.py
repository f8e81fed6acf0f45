"""Trace events, declared one ``trace-events`` file per folder in QEMU's format.

A module says once ``T = trace_group("kvm")`` and then, where something happens::

    T.kvm_exit.on and T.kvm_exit(cpu, reason)

which costs one attribute test while the event is off. Turned on by :mod:`pyvmm.trace.control`.
"""

from pyvmm.trace.events import Event, TraceGroup, all_declared_events, trace_group

__all__ = ["Event", "TraceGroup", "all_declared_events", "trace_group"]
