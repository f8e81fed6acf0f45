"""KVM's own counters of a vCPU: exits, emulated instructions, halts.

Source: Linux Documentation/virt/kvm/api.rst, 4.133 KVM_GET_STATS_FD. The descriptor has to be asked for before the vCPU
runs (the ioctl waits for it to stand still); the counters may be read from any thread at any time.
"""

from __future__ import annotations

import os
import struct
from types import TracebackType
from typing import Self

from pyvmm.errors import KvmError
from pyvmm.kvm.vcpu import Vcpu

_NAME_MAX, _COUNT_MAX, _VALUES_MAX = 256, 4096, 1 << 20


class VcpuCounters:
    """Owns the descriptor; a context manager. Where KVM has no such file there are no counters."""

    def __init__(self, vcpu: Vcpu) -> None:
        try:
            self._fd = vcpu.ioctl("KVM_GET_STATS_FD")
        except KvmError:
            self._fd = -1
        self._layout: tuple[int, int, list[tuple[str, int]]] | None = None

    def read(self) -> dict[str, int]:
        """The counters by name, as far as they are single numbers."""
        if self._fd < 0:
            return {}
        start, size, fields = self._layout or self._describe()
        raw = os.pread(self._fd, size, start)
        return {name: struct.unpack_from("<Q", raw, at)[0] for name, at in fields if at + 8 <= len(raw)}

    def _describe(self) -> tuple[int, int, list[tuple[str, int]]]:
        """Where the values begin, their size together, and each one's name and place. Asked for once."""
        _, name_size, count, _, descriptors, data = struct.unpack("<6I", os.pread(self._fd, 24, 0))
        fields, end = [], 0
        if name_size <= _NAME_MAX and count <= _COUNT_MAX:
            size = 16 + name_size
            raw = os.pread(self._fd, size * count, descriptors)
            for at in range(0, len(raw) - size + 1, size):
                _, _, values, offset, _ = struct.unpack_from("<IhHII", raw, at)
                if values == 1 and offset < _VALUES_MAX:
                    name = raw[at + 16 : at + size].split(b"\0")[0].decode("ascii", "replace")
                    fields.append((name, offset))
                    end = max(end, offset + 8)
        self._layout = data, end, fields
        return self._layout

    def close(self) -> None:
        """Harmless twice."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def vcpu_statistics(vcpu: Vcpu) -> dict[str, int]:
    """The counters of a vCPU that stands still; empty when KVM has none."""
    with VcpuCounters(vcpu) as counters:
        return counters.read()
