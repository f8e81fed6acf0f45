"""KVM's own counters of a vCPU: exits, emulated instructions, halts.

Source: Linux Documentation/virt/kvm/api.rst, 4.133 KVM_GET_STATS_FD.
"""

from __future__ import annotations

import os
import struct

from pyvmm.errors import KvmError
from pyvmm.kvm.vcpu import Vcpu


def vcpu_statistics(vcpu: Vcpu) -> dict[str, int]:
    """The vCPU's counters by name, as far as they are single numbers; empty when KVM has no such file."""
    try:
        fd = vcpu.ioctl("KVM_GET_STATS_FD")
    except KvmError:
        return {}
    try:
        _, name_size, count, _, descriptors, data = struct.unpack("<6I", os.pread(fd, 24, 0))
        if name_size > 256 or count > 4096:
            return {}
        size = 16 + name_size
        raw = os.pread(fd, size * count, descriptors)
        result = {}
        for i in range(count):
            _, _, values, offset, _ = struct.unpack_from("<IhHII", raw, i * size)
            if values != 1:
                continue
            name = raw[i * size + 16 : (i + 1) * size].split(b"\0")[0].decode("ascii", "replace")
            (result[name],) = struct.unpack("<Q", os.pread(fd, 8, data + offset))
        return result
    finally:
        os.close(fd)
