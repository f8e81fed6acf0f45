"""Where the tiny Linux is: its kernel and its root file system, as ``make kernel`` and ``make rootfs`` left them."""

from __future__ import annotations

import os
from pathlib import Path

from pyvmm.errors import ConfigError

REPOSITORY = Path(__file__).resolve().parents[2]


def cache_folder() -> Path:
    """Where built kernels are kept: $PYVMM_CACHE, else pyvmm's folder in the user's cache."""
    explicit = os.environ.get("PYVMM_CACHE")
    if explicit:
        return Path(explicit)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pyvmm"


def find_kernel(explicit: str | None) -> str:
    """The kernel to boot: --kernel, $PYVMM_KERNEL, this checkout's build/kernel, the newest in the cache."""
    chosen = explicit or os.environ.get("PYVMM_KERNEL")
    if chosen:
        return chosen
    for folder in (REPOSITORY / "build" / "kernel", cache_folder() / "kernels" / "current"):
        image = folder / "vmlinux"
        if image.exists():
            return str(image)
    raise ConfigError("no tiny kernel has been built: run make kernel, or name one with --kernel")


def find_root_disk() -> str:
    """The same root file system as a disk image, for a virtio disk."""
    image = REPOSITORY / "build" / "rootfs" / "root.erofs"
    if image.exists():
        return str(image)
    raise ConfigError("no root disk has been built: run make rootfs, or use --root initramfs")


def root_disk_words(index: int) -> list[str]:
    """What tells Linux that its root is virtio disk number ``index``."""
    return [f"root=/dev/vd{chr(ord('a') + index)}", "rootfstype=erofs", "ro", "init=/init"]


def find_initramfs(explicit: str | None) -> str:
    """The initramfs to hand over: --initrd, else what ``make rootfs`` built."""
    if explicit:
        return explicit
    image = REPOSITORY / "build" / "rootfs" / "initramfs.cpio"
    if image.exists():
        return str(image)
    raise ConfigError("no root file system has been built: run make rootfs, or name one with --initrd")
