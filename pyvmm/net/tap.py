"""A tap interface, opened: what is written to its descriptor the host's stack receives, and the other way round.

Each frame is led by 12 bytes, ``struct virtio_net_hdr`` in its VERSION_1 form (virtio 1.2, 5.1.6), which is just what a
virtio driver puts there: frames go from guest memory to the tap without a look at them. Linux,
Documentation/networking/tuntap.rst and <linux/if_tun.h>.

A tap that is not there is made, and goes with its descriptor, also if the process is killed. One that is there and
persistent (``ip tuntap add``, ``pyvmm net up``) is used and stays.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import socket
import struct
from types import TracebackType
from typing import Self

from pyvmm.errors import ConfigError, HostError
from pyvmm.trace import trace_group

T = trace_group("net")

CLONE_DEVICE = "/dev/net/tun"
NAME_MAX = 15
"""IFNAMSIZ without its NUL, in bytes."""
HEADER_SIZE = 12

# <linux/if_tun.h>
_TUNSETIFF, _TUNGETIFF = 0x400454CA, 0x800454D2
_TUNSETOFFLOAD, _TUNSETVNETHDRSZ, _TUNSETVNETLE = 0x400454D0, 0x400454D8, 0x400454DC
_IFF_TAP, _IFF_NO_PI, _IFF_VNET_HDR, _IFF_PERSIST = 0x0002, 0x1000, 0x4000, 0x0800
OFFLOAD_CSUM, OFFLOAD_TSO4, OFFLOAD_TSO6, OFFLOAD_TSO_ECN = 1, 2, 4, 8
# <linux/sockios.h>, <linux/if.h>
_SIOCGIFFLAGS, _SIOCSIFFLAGS, _SIOCGIFMTU, _SIOCSIFMTU, _SIOCGIFHWADDR = 0x8913, 0x8914, 0x8921, 0x8922, 0x8927
_IFF_UP = 1
_STALE_MAX = 4096
"""Frames; a tap keeps 500 to 1000."""
_IFREQ = struct.Struct("16s24s")


def check_name(name: str) -> str:
    """``name`` if a network interface can have it; ConfigError."""
    size = len(name.encode())
    if not 1 <= size <= NAME_MAX or name in (".", "..") or re.search(r"[\s/:%\0]", name):
        raise ConfigError(f"tap {name!r}: an interface's name has 1 to {NAME_MAX} bytes and none of / : % or spaces")
    return name


class Tap:
    """The tap ``name``; a context manager. HostError says why it cannot be had.

    ``fd`` is non-blocking. Once the interface is deleted behind its back, reads and writes of it fail with EBADFD and
    poll reports an error; so do the methods here, as HostError.
    """

    carries_header = True

    def __init__(self, name: str, *, mtu: int | None = None) -> None:
        self.name = check_name(name)
        self._silent = False
        self.fd = _open_clone()
        # A second descriptor, for questions about the interface: in the network namespace that the tap is in.
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
        try:
            self._attach()
            if mtu is not None and mtu != self.mtu:
                self._request(_SIOCSIFMTU, struct.pack("<i", mtu), f"set its MTU to {mtu}")
        except BaseException:
            self.close()
            raise
        T.tap_open.on and T.tap_open(self.name, self.persistent, self.mtu)

    def _attach(self) -> None:
        request = _IFREQ.pack(self.name.encode(), struct.pack("<H", _IFF_TAP | _IFF_NO_PI | _IFF_VNET_HDR))
        try:
            fcntl.ioctl(self.fd, _TUNSETIFF, request)
        except OSError as error:
            raise HostError(_why_not(self.name, error)) from None
        (flags,) = struct.unpack_from("<H", fcntl.ioctl(self.fd, _TUNGETIFF, bytes(_IFREQ.size)), 16)
        self.persistent = bool(flags & _IFF_PERSIST)
        """Whether the interface stays when the descriptor is closed."""
        self._tun(_TUNSETVNETHDRSZ, struct.pack("<i", HEADER_SIZE), "set the header's size")
        self._tun(_TUNSETVNETLE, struct.pack("<i", 1), "set the header's byte order")
        self.set_offload(0)

    def set_offload(self, flags: int) -> None:
        """What this end copes with (``OFFLOAD_*``): frames without checksums, and segments larger than the MTU.

        Without the flag the host's stack completes a frame before it hands it out.
        """
        try:
            fcntl.ioctl(self.fd, _TUNSETOFFLOAD, flags)
        except OSError as error:
            raise HostError(f"tap {self.name}: cannot set offloads {flags:#x}: {error.strerror}") from None
        T.tap_offload.on and T.tap_offload(self.name, flags)

    @property
    def mtu(self) -> int:
        """Bytes of a frame behind its Ethernet header."""
        value: int = struct.unpack_from("<i", self._request(_SIOCGIFMTU, b"", "read its MTU"))[0]
        return value

    @property
    def mac(self) -> bytes:
        """The host end's address, 6 bytes; the guest's is another one."""
        return self._request(_SIOCGIFHWADDR, b"", "read its address")[2:8]

    @property
    def up(self) -> bool:
        """Whether somebody has brought the interface up; frames for one that is down are lost."""
        return bool(self._flags() & _IFF_UP)

    def bring_up(self) -> None:
        """Set the interface up, unless it is (which needs no privilege)."""
        flags = self._flags()
        if not flags & _IFF_UP:
            self._request(_SIOCSIFFLAGS, struct.pack("<H", flags | _IFF_UP), "bring it up")

    def release(self) -> None:
        """The guest is not here, or no more: carry nothing, so that no bridge looks for it behind this tap.

        One that is persistent stays up: it is its owner's.
        """
        self._silent = True
        flags = self._flags()
        if flags & _IFF_UP and not self.persistent:
            self._request(_SIOCSIFFLAGS, struct.pack("<H", flags & ~_IFF_UP), "set it down")

    def claim(self) -> None:
        """The guest is here: carry its frames. Those that came to a tap that stayed up were for where it was before."""
        if self._silent:
            self._silent = False
            if self.up:
                self._drain()
            self.bring_up()

    def announce(self, frame: bytes) -> None:
        """Send ``frame`` to whatever bridge the tap is at; harmless if it has gone."""
        with contextlib.suppress(OSError):
            os.write(self.fd, bytes(HEADER_SIZE) + frame)

    def _drain(self) -> None:
        with contextlib.suppress(BlockingIOError):
            for _ in range(_STALE_MAX):
                os.read(self.fd, HEADER_SIZE)  # the rest of the frame is dropped

    def _flags(self) -> int:
        flags: int = struct.unpack_from("<H", self._request(_SIOCGIFFLAGS, b"", "read its flags"))[0]
        return flags

    def _request(self, number: int, argument: bytes, purpose: str) -> bytes:
        """An ioctl about the interface; what follows the name in its answer."""
        try:
            return fcntl.ioctl(self._socket, number, _IFREQ.pack(self.name.encode(), argument))[16:]
        except OSError as error:
            hint = "; it needs CAP_NET_ADMIN" if error.errno == errno.EPERM else ""
            raise HostError(f"tap {self.name}: cannot {purpose}: {error.strerror}{hint}") from None

    def _tun(self, number: int, argument: bytes, purpose: str) -> None:
        try:
            fcntl.ioctl(self.fd, number, argument)
        except OSError as error:
            raise HostError(f"tap {self.name}: cannot {purpose}: {error.strerror}; the kernel is too old") from None

    def fileno(self) -> int:
        """For select and poll."""
        return self.fd

    def close(self) -> None:
        """Give the descriptors back, and with them an interface that is not persistent. Harmless twice."""
        self._socket.close()
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _open_clone() -> int:
    try:
        return os.open(CLONE_DEVICE, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EPERM):
            remedy = "may be opened by others only after chmod 0666, its usual mode; or run as root"
        elif error.errno in (errno.ENOENT, errno.ENXIO, errno.ENODEV):
            remedy = "load the module: modprobe tun"
        else:
            remedy = "close other programs' descriptors"
        raise HostError(f"{CLONE_DEVICE}: {error.strerror}; {remedy}") from None


def _why_not(name: str, error: OSError) -> str:
    if error.errno in (errno.EPERM, errno.EACCES):
        return (
            f"tap {name}: not permitted: it needs CAP_NET_ADMIN, or a tap made for this user: "
            f"ip tuntap add dev {name} mode tap user {os.geteuid()}"
        )
    if error.errno == errno.EBUSY:
        who = _owner(name)
        return f"tap {name}: busy: {who or 'another program'} has it open; end that or take another tap"
    if error.errno == errno.EINVAL:
        return f"tap {name}: there is an interface of that name that is no tap of a single queue; take another name"
    return f"tap {name}: {error.strerror}"


def _owner(name: str) -> str | None:
    """The process that has the tap open, as far as /proc lets this user see."""
    wanted = f"iff:\t{name}"
    for process in (entry for entry in os.listdir("/proc") if entry.isdigit()):
        with contextlib.suppress(OSError):
            for fd in os.listdir(f"/proc/{process}/fd"):
                with contextlib.suppress(OSError):
                    if os.readlink(f"/proc/{process}/fd/{fd}") != CLONE_DEVICE:
                        continue
                    with open(f"/proc/{process}/fdinfo/{fd}", encoding="utf-8") as file:
                        if wanted in file.read().splitlines():
                            with open(f"/proc/{process}/comm", encoding="utf-8") as comm:
                                return f"process {process} ({comm.read().strip()})"
    return None
