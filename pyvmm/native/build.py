"""Builds ``pyvmm.native._native``: the C files beside this one, compiled with cffi's API mode.

The ``*.cdef.h`` files are what Python sees. The kernel's structures there end in ``...``,
so the C compiler fills in and checks their layout against the installed ``<linux/kvm.h>``.
"""

from __future__ import annotations

import os
from pathlib import Path

from cffi import FFI

HERE = Path(__file__).resolve().parent
SOURCES = [
    "kvm_ioctl.c", "vcpu_run.c", "coalesced_ring.c", "guest_memory.c", "dirty_bitmap.c", "user_entry.c",
    "exception_frame.c", "guest_debug.c", "virtqueue.c", "virtio_interrupt.c", "dirty_log.c", "ram_stream.c",
    "ram_file.c", "replica.c", "page_delta.c", "page_lz4.c",
    "net_backend.c", "net_frames.c", "net_pump.c", "net_filtered.c",
    "block_image.c", "block_overlay.c", "block_forward.c", "block_request.c", "block_device.c",
    "proxy_packet.c", "proxy_flow.c", "proxy_compare.c", "proxy_queues.c", "proxy_epochs.c", "proxy_tcp.c",
    "proxy_ack.c", "proxy_datagram.c", "proxy_rewriter.c", "proxy_rewrite.c",
    "sandbox.c",
]  # fmt: skip
CDEFS = [
    "kvm_api.cdef.h", "core.cdef.h", "virtqueue.cdef.h", "virtio_interrupt.cdef.h", "dirty_log.cdef.h",
    "ram_stream.cdef.h", "ram_file.cdef.h", "replica.cdef.h", "page_delta.cdef.h", "net_pump.cdef.h", "block.cdef.h",
    "proxy.cdef.h", "sandbox.cdef.h",
]  # fmt: skip
HEADERS = [
    "kvm_api.h", "core.h", "user_entry.h", "virtqueue.h", "virtio_interrupt.h", "dirty_log.h", "ram_stream.h",
    "ram_file.h", "replica.h", "page_delta.h", "net_pump.h",
    "block_image.h", "block_overlay.h", "block_forward.h", "block_device.h",
    "proxy_packet.h", "proxy_flow.h", "proxy_compare.h", "proxy_rewriter.h", "sandbox.h",
]  # fmt: skip

ffibuilder = FFI()
ffibuilder.cdef("".join((HERE / name).read_text() for name in CDEFS))
ffibuilder.set_source(
    "pyvmm.native._native",
    "".join(f'#include "{name}"\n' for name in HEADERS),
    sources=[os.path.relpath(HERE / name) for name in SOURCES],
    include_dirs=[str(HERE)],
    depends=[str(HERE / name) for name in HEADERS],
    extra_compile_args=["-O2", "-g", "-Wall", "-Wextra", "-Wno-unused-parameter", "-std=gnu11"],
    libraries=["pthread"],
)

if __name__ == "__main__":
    ffibuilder.compile(verbose=True)
