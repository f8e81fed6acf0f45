"""What each further device of a machine is to be, and how the command line says it.

An option's value is a first word and then ``name=value`` pairs, all separated by commas: ``disk.img,readonly=on``.
A comma that belongs to a value is written twice, as in QEMU.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from typing import Literal

import msgspec

from pyvmm.errors import ConfigError

MAC = re.compile(r"[0-9a-fA-F]{2}(:[0-9a-fA-F]{2}){5}")
MTU_MIN, MTU_MAX = 68, 65535
SERIAL_MAX = 20
CID_FIRST, CID_LAST = 3, 0xFFFFFFFE
VSOCK_PATH_MAX = 107 - len("_4294967295")
"""What unix(7) leaves for a path when a port is put behind it."""


class RngConfig(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """A virtio entropy device."""


class NetConfig(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """A virtio network device on a tap, or on a stream socket that carries a length and a frame.

    A named network (``pyvmm net up``) is a tap too, once the builder has taken the machine's place in it.
    """

    backend: Literal["network", "tap", "stream"]
    target: str
    """The network's or the tap's name; or ``unix:PATH`` or ``tcp:HOST:PORT`` to connect to."""
    mac: str | None = None
    """``None``: made from the machine's name, locally administered."""
    mtu: int | None = None
    bridge: str | None = None
    """Bridge that the tap is to be a port of."""
    announce: bool = True
    """In a named network: whether Linux is told its address on the command line (``ip=``)."""

    def __post_init__(self) -> None:
        if self.mac is not None:
            if MAC.fullmatch(self.mac) is None:
                raise ConfigError(f"--net mac={self.mac}: write six bytes, for example 52:54:00:12:34:56")
            if int(self.mac[:2], 16) & 1:
                raise ConfigError(f"--net mac={self.mac}: is a group address; the first byte must be even")
        if self.mtu is not None and not MTU_MIN <= self.mtu <= MTU_MAX:
            raise ConfigError(f"--net mtu={self.mtu}: must be {MTU_MIN} to {MTU_MAX}")


class DiskConfig(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """A virtio block device on a raw file or block device, perhaps with an overlay that takes what is written."""

    path: str
    readonly: bool = False
    overlay: str | None = None
    """File that takes the writes while ``path`` stays as it is; made if it is not there."""
    serial: str = ""

    def __post_init__(self) -> None:
        if not self.path:
            raise ConfigError("--disk: name a file or a block device")
        if len(self.serial.encode()) > SERIAL_MAX or not self.serial.isprintable():
            raise ConfigError(f"--disk serial={self.serial}: at most {SERIAL_MAX} printable bytes")
        if self.readonly and self.overlay is not None:
            raise ConfigError("--disk: readonly and overlay exclude each other; an overlay never writes to its base")


class ConsoleConfig(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """A virtio console (hvc0) whose other end is a unix socket that pyvmm listens on."""

    path: str


class BalloonConfig(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """A virtio memory balloon; ``target`` is what it takes from the guest at first, in bytes."""

    target: int = 0


class VsockConfig(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """A virtio socket device. ``path``: the unix socket where host programs ask for a connection to a guest's port;
    the guest's own connections to port N go to the unix socket ``path_N``.
    """

    cid: int
    path: str

    def __post_init__(self) -> None:
        if not CID_FIRST <= self.cid <= CID_LAST:
            raise ConfigError(f"--vsock {self.cid}: a guest's CID is {CID_FIRST} to {CID_LAST}")
        if len(os.fsencode(self.path)) > VSOCK_PATH_MAX:
            raise ConfigError(f"--vsock {self.cid},unix:{self.path}: a path has at most {VSOCK_PATH_MAX} bytes here")


DeviceConfig = RngConfig | NetConfig | DiskConfig | ConsoleConfig | BalloonConfig | VsockConfig


def has_card(devices: Iterable[DeviceConfig]) -> bool:
    """Whether a network card is among them."""
    return any(isinstance(device, NetConfig) for device in devices)


def split_option(option: str, text: str, known: tuple[str, ...]) -> tuple[str, dict[str, str]]:
    """(first word, the pairs) of ``text``; ConfigError names ``option`` and what is wrong.

    ``name`` alone means ``name=on``.
    """
    words = [word.replace("\0", ",") for word in text.replace(",,", "\0").split(",")]
    pairs: dict[str, str] = {}
    for word in words[1:]:
        name, equals, value = word.partition("=")
        if name not in known:
            raise ConfigError(f"{option} {text!r}: unknown {name!r}; there is {', '.join(known) or 'nothing to set'}")
        if name in pairs:
            raise ConfigError(f"{option} {text!r}: {name} is there twice")
        pairs[name] = value if equals else "on"
    return words[0], pairs


def parse_switch(option: str, name: str, text: str) -> bool:
    """``on`` or ``off``."""
    if text not in ("on", "off"):
        raise ConfigError(f"{option} {name}={text}: write on or off")
    return text == "on"
