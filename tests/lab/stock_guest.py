"""A guest nobody made for pyvmm: Debian's cloud kernel, which finds virtio devices by ACPI alone.

Its virtio_mmio is a module without ``virtio_mmio.device=`` on the command line, so LNRO0005 in the DSDT is the one way.
Made into build/stock-guest/ before the lab starts; tests/stock runs it there, because booting a distribution's kernel
takes minutes where CPL 0 is emulated.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from guests.linux import cpio
from tests.lab.debian_kernel import LabKernel, load_order

REPOSITORY = Path(__file__).resolve().parents[2]
FOLDER = REPOSITORY / "build" / "stock-guest"
MODULES = ("virtio_mmio", "virtio_blk", "virtio_rng")

INIT = """#!/bin/sh
# The shell finds its own commands by /proc/self/exe.
/bin/busybox mount -t proc proc /proc; mount -t sysfs sysfs /sys; mount -t devtmpfs dev /dev
for module in /modules/*; do insmod $module || echo "no $module"; done
for device in /sys/bus/virtio/devices/*; do
  echo "$(basename $device) $(cat $device/device) $(basename $(readlink $device/driver))"
done
dd if=/dev/vda bs=64k count=1 2>/dev/null | sha256sum
head -c 100000 /dev/hwrng | wc -c
poweroff -f
"""


def prepare(kernel: LabKernel, busybox: Path = Path("/bin/busybox")) -> None:
    """Write ``vmlinuz`` and ``initramfs.cpio``."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    tree = kernel.bzimage.parents[1] / "lib" / "modules" / kernel.release
    modules = load_order(tree, MODULES)
    members = [
        *(cpio.folder(name) for name in ("bin", "dev", "modules", "proc", "sys")),
        cpio.character_device("dev/console", 5, 1),
        cpio.file("init", INIT.encode(), 0o755),
        cpio.file("bin/busybox", busybox.read_bytes(), 0o755),
        cpio.symlink("bin/sh", "busybox"),
        *(cpio.file(f"modules/{number:02}-{path.name}", path.read_bytes()) for number, path in enumerate(modules)),
    ]
    (FOLDER / "initramfs.cpio").write_bytes(cpio.write_archive(members))
    shutil.copyfile(kernel.bzimage, FOLDER / "vmlinuz")
