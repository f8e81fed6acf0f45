"""KVM's own counters of a VM or a vCPU: exits, emulated instructions, halts.

The descriptor they are read from has to be had before a vCPU runs: KVM_GET_STATS_FD waits, like every call on a vCPU,
until KVM_RUN returns. Reading it waits for nobody.

Source: Linux Documentation/virt/kvm/api.rst, 4.133 KVM_GET_STATS_FD.
"""

from __future__ import annotations

import os
import struct
from types import TracebackType
from typing import Literal, NamedTuple, Self

from pyvmm.errors import KvmError
from pyvmm.kvm.vcpu import Vcpu
from pyvmm.kvm.vm import Vm

_NAME_MAX, _COUNT_MAX, _DATA_MAX = 256, 4096, 1 << 20
CounterType = Literal["cumulative", "instant", "peak"]
Unit = Literal["bytes", "seconds", "cycles", "boolean"]
TYPES: tuple[CounterType, ...] = ("cumulative", "instant", "peak")
"""By KVM's number; those behind are histograms, which are no single number."""
UNITS: tuple[Unit | None, ...] = (None, "bytes", "seconds", "cycles", "boolean")
BASES = (10, 2)


class Counter(NamedTuple):
    """What KVM says of one counter: its unit is ``unit`` times ``base`` to the power of ``exponent``."""

    name: str
    offset: int
    type: CounterType
    unit: Unit | None
    base: int
    exponent: int


class KvmCounters:
    """Owns the descriptor of the counters of ``source``; a context manager. Where KVM has none there are none."""

    def __init__(self, source: Vm | Vcpu) -> None:
        try:
            self._fd = source.ioctl("KVM_GET_STATS_FD")
        except KvmError:
            self._fd = -1
        self._counters: tuple[Counter, ...] | None = None
        self._data = 0

    def described(self) -> tuple[Counter, ...]:
        """All that are single numbers, in KVM's order."""
        if self._counters is None:  # not at each start of a machine: few are ever asked
            self._counters = self._describe() if self._fd >= 0 else ()
        return self._counters

    def _describe(self) -> tuple[Counter, ...]:
        _, name_size, count, _, descriptors, self._data = struct.unpack("<6I", os.pread(self._fd, 24, 0))
        if name_size > _NAME_MAX or count > _COUNT_MAX:
            return ()
        size = 16 + name_size
        raw = os.pread(self._fd, size * count, descriptors)
        found = []
        for at in range(0, len(raw) - size + 1, size):
            flags, exponent, values, offset, _ = struct.unpack_from("<IhHII", raw, at)
            kind, unit, base = flags & 15, flags >> 4 & 15, flags >> 8 & 15
            known = kind < len(TYPES) and unit < len(UNITS) and base < len(BASES) and offset < _DATA_MAX
            if values != 1 or not known:
                continue
            name = raw[at + 16 : at + size].split(b"\0")[0].decode("ascii", "replace")
            found.append(Counter(name, offset, TYPES[kind], UNITS[unit], BASES[base], exponent))
        return tuple(found)

    def read(self) -> dict[str, int]:
        """The counters' values by name, in one call of the kernel."""
        counters = self.described()
        if not counters:
            return {}
        raw = os.pread(self._fd, max(each.offset for each in counters) + 8, self._data)
        return {
            each.name: int.from_bytes(raw[each.offset : each.offset + 8], "little")
            for each in counters
            if each.offset + 8 <= len(raw)
        }

    def close(self) -> None:
        """Give the descriptor back, which keeps KVM's VM alive."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
