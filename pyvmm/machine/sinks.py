"""Port hints on the native tables, and the way back of what sinks and KVM's coalesced ring collected."""

from __future__ import annotations

import threading
from collections.abc import Callable

from pyvmm.devices.bus import Bus
from pyvmm.errors import ConfigError
from pyvmm.kvm.vm import Vm
from pyvmm.native import ffi, lib

_CHUNK = int(lib.PV_SINK_SIZE)


class SinkHint:
    """The :class:`~pyvmm.devices.device.PortHint` of one device: its ports, and one sink."""

    def __init__(self, vm: Vm | None, base: int, sink: int) -> None:
        """Without ``vm`` it is a hint to nobody."""
        self._vm = vm
        self._base = base
        self._sink = sink

    def set_sink(self, offset: int, on: bool) -> None:
        """Collect one-byte writes at ``offset`` natively while ``on``."""
        if self._vm is not None:
            lib.pv_vm_set_sink(self._vm.native, self._base + offset, self._sink if on else -1)

    def set_latch(self, offset: int, value: int | None) -> None:
        """Answer one-byte reads at ``offset`` natively with ``value``."""
        if self._vm is not None:
            lib.pv_vm_set_latch(self._vm.native, self._base + offset, -1 if value is None else value)


class SinkCollector:
    """Owns the VM's sinks. :meth:`drain` may be called from any thread and keeps the order of bytes."""

    def __init__(self, vm: Vm, ports: Bus, mmio: Bus, *, native: bool = True) -> None:
        """Without ``native`` ports hints are for nobody: every access comes to the bus, for who wants to see it."""
        self._vm = vm
        self._native = native
        self._ports = ports
        self._mmio = mmio
        self._deliver: list[Callable[[bytes], None] | None] = []
        # Re-entrant: delivering may make a device look at its registers, which drains again.
        self._lock = threading.RLock()
        self._buffer = ffi.new("uint8_t[]", _CHUNK)

    def hint(self, base: int, beside: SinkHint | None = None) -> SinkHint:
        """A hint for the device at ports from ``base``; :meth:`attach` completes it.

        ``beside`` another one it collects into the same sink: what goes to one place keeps its order.
        """
        vm = self._vm if self._native else None
        if beside is not None:
            return SinkHint(vm, base, beside._sink)
        if len(self._deliver) == lib.PV_SINKS:
            raise ConfigError(f"more than {lib.PV_SINKS} devices with native output")
        self._deliver.append(None)
        return SinkHint(vm, base, len(self._deliver) - 1)

    def attach(self, hint: SinkHint, deliver: Callable[[bytes], None]) -> None:
        """Collected bytes of ``hint`` go to ``deliver``."""
        self._deliver[hint._sink] = deliver

    @property
    def event(self) -> int:
        """eventfd that is signalled when the first byte is collected."""
        return int(self._vm.native.sink_event)

    def drain(self) -> None:
        """Deliver everything collected so far."""
        with self._lock:
            for number, deliver in enumerate(self._deliver):
                # Once: a chunk holds a whole sink, and a guest that keeps writing must not keep us here.
                taken = lib.pv_vm_take_sink(self._vm.native, number, self._buffer, _CHUNK)
                if taken and deliver is not None:
                    deliver(bytes(ffi.buffer(self._buffer, taken)))

    def drain_ring(self) -> None:
        """Carry out coalesced writes that no exit has drained (a guest that wrote and then halted)."""
        entry = ffi.new("struct pv_exit *")
        while kind := lib.pv_vm_drain_ring(self._vm.native, entry):
            try:
                self.drain()
                if kind == lib.PV_EXIT_IO:
                    self._ports.write(entry.port, entry.size, entry.data)
                else:
                    self._mmio.write(entry.address, entry.size, entry.data)
            finally:
                lib.pv_vm_release_ring(self._vm.native)
        self.drain()
