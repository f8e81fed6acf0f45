"""What a machine is to be: one frozen record, checked before anything is opened."""

from __future__ import annotations

import re
from typing import Literal

import msgspec

from pyvmm.arch.x86 import layout
from pyvmm.errors import ConfigError
from pyvmm.machine.device_config import DeviceConfig

MAX_CPUS = 64
MIN_MEMORY = 1 << 20
MAX_MEMORY = 1 << 40
DEFAULT_MEMORY = 128 << 20
_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


class DebugExitConfig(msgspec.Struct, frozen=True):
    """Where isa-debug-exit answers: ``size`` ports from ``port``."""

    port: int = layout.PORT_DEBUG_EXIT[0]
    size: int = 1


class MachineConfig(msgspec.Struct, frozen=True, kw_only=True):
    """Everything the builder needs to know. Sizes are bytes, times seconds."""

    image: str
    name: str = "pyvmm"
    memory: int = DEFAULT_MEMORY
    cpus: int = 1
    initrd: str | None = None
    append: str = ""
    linux_additions: str = ""
    """Put before ``append`` if the image turns out to be Linux (see arch/x86/linux_quirks.py)."""
    load_address: int | None = None
    guest_decompress: bool = False
    acpi: bool = True
    acpi_devices: tuple[bytes, ...] = ()
    """AML of devices that the builder adds; put into the DSDT."""
    devices: tuple[DeviceConfig, ...] = ()
    """Virtio devices, in the order of their slots."""
    dirty_log: Literal["bitmap", "ring"] = "bitmap"
    """How KVM is to log written pages, once somebody wants to know (see machine/dirty_tracker.py)."""
    serial: str = "stdio"
    """``stdio``, ``stderr``, ``null``, ``file:PATH`` or ``unix:PATH``."""
    debug_exit: DebugExitConfig = DebugExitConfig()
    testdev: bool = False
    """QEMU's pc-testdev; the debug console is not there then, because it has one of its ports."""
    timeout: float | None = None
    no_reboot: bool = False
    no_shutdown: bool = False
    """When the guest ends, the machine stays, to be looked at, reset or quit."""
    start_paused: bool = False
    incoming: bool = False
    """A guest that runs elsewhere will be moved here: nothing is loaded, disks are not taken yet."""
    replica: bool = False
    """Of such a guest, which goes on to run there: disks are its replica's, and what is in them now does not count."""

    def __post_init__(self) -> None:
        if not MIN_MEMORY <= self.memory <= MAX_MEMORY or self.memory % 4096:
            raise ConfigError(
                f"--memory {self.memory}: must be whole 4 KiB pages between 1M and 1T (the default is 128M)"
            )
        if not 1 <= self.cpus <= MAX_CPUS:
            raise ConfigError(f"--smp {self.cpus}: must be 1 to {MAX_CPUS}")
        if self.timeout is not None and not 0 < self.timeout < 1e9:
            raise ConfigError(f"--timeout {self.timeout}: must be a positive number of seconds")
        kind, _, path = self.serial.partition(":")
        if self.serial not in ("stdio", "stderr", "null") and not (kind in ("file", "unix") and path):
            raise ConfigError(f"--serial {self.serial}: must be stdio, stderr, null, file:PATH or unix:PATH")
        port, size = self.debug_exit.port, self.debug_exit.size
        if not (0 <= port <= 0xFFFF and 1 <= size <= 8 and port + size <= 0x10000):
            raise ConfigError(f"--debug-exit {port:#x},{size}: must be a port below 0x10000 and 1 to 8 bytes")


def parse_size(text: str, what: str = "size") -> int:
    """Bytes in ``128M``, ``0x1000``, ``1G``... ConfigError names ``what`` when it is none."""
    match = re.fullmatch(r"(0[xX][0-9a-fA-F]{1,16}|[0-9]{1,19})([KMGT]?)i?[bB]?", text.strip())
    if match is None:
        raise ConfigError(f"{what} {text!r}: write a number with K, M, G or T, for example 128M")
    return int(match[1], 0 if match[1][:2].lower() == "0x" else 10) * _UNITS[match[2]]


def parse_number(text: str, what: str, *, maximum: int) -> int:
    """A decimal or 0x number of at most ``maximum``; ConfigError names ``what`` otherwise."""
    match = re.fullmatch(r"0[xX][0-9a-fA-F]{1,16}|[0-9]{1,19}", text.strip())
    value = int(match[0], 0 if match[0][:2].lower() == "0x" else 10) if match else -1
    if not 0 <= value <= maximum:
        raise ConfigError(f"{what} {text!r}: write a number from 0 to {maximum:#x}")
    return value


def parse_debug_exit(text: str) -> DebugExitConfig:
    """``PORT[,SIZE]``, as in QEMU's iobase and iosize."""
    port, comma, size = text.partition(",")
    return DebugExitConfig(
        parse_number(port, "--debug-exit", maximum=0xFFFF),
        parse_number(size, "--debug-exit", maximum=8) if comma else 1,
    )
