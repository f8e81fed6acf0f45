"""Rights and resources around KVM: each tried for real, not concluded from a mode or a group.

A tap is created and vanishes when its descriptor is closed; a network namespace is created in a child process that
ends at once. Nothing is left behind.
"""

from __future__ import annotations

import errno
import os
import struct
import subprocess
import sys
import tempfile
from typing import Final

import msgspec

_TUNSETIFF: Final = 0x400454CA  # <linux/if_tun.h>
_IFF_TAP: Final = 0x0002
_IFF_NO_PI: Final = 0x1000
_TIMEOUT: Final = 10.0

# Runs in a child: a network namespace of its own, as this user or inside a user namespace of its own. Prints which of
# the two worked, and in further lines whether a bridge can be made there and whether nftables answers. The numbers are
# CLONE_NEWNET and CLONE_NEWUSER (<linux/sched.h>), SIOCBRADDBR (<linux/sockios.h>), NETLINK_NETFILTER and a dump of
# NFT_MSG_GETTABLE with NLM_F_REQUEST, NLM_F_DUMP (<linux/netfilter/nfnetlink.h>, nf_tables.h); 2 is NLMSG_ERROR.
_UNSHARE: Final = """
import ctypes, fcntl, os, socket, struct
libc = ctypes.CDLL(None, use_errno=True)
for how, flags in (("yes", 0x40000000), ("in a user namespace", 0x50000000)):
    if libc.unshare(flags) == 0:
        print(how)
        break
    error = ctypes.get_errno()
else:
    print("no: " + os.strerror(error))
    raise SystemExit
def bridge():
    with socket.socket() as s:
        fcntl.ioctl(s, 0x89A0, b"pvprobe".ljust(16, b"\\0"))
def nftables():
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 12) as s:
        s.settimeout(5)
        s.send(struct.pack("=IHHIIBBH", 20, 10 << 8 | 1, 0x301, 1, 0, 2, 0, 0))
        length, kind, flags, sequence, port, error = struct.unpack_from("=IHHIIi", s.recv(4096))
        if kind == 2 and error:
            raise OSError(-error, os.strerror(-error))
for probe in (bridge, nftables):
    try:
        probe()
        print("yes")
    except OSError as error:
        print("no: " + (error.strerror or str(error)))
"""


class Surroundings(msgspec.Struct, frozen=True, kw_only=True):
    """What there is beside KVM. Texts are ``yes`` or start with ``no``, with the reason."""

    kvm: str
    """``/dev/kvm`` opens for reading and writing."""
    tap: str
    """A tap device can be made."""
    network_namespace: str
    """``yes``, ``in a user namespace`` (no rights outside it) or ``no: ...``."""
    bridge: str
    """A bridge can be made there."""
    nftables: str
    """The kernel has nftables, which ``pyvmm net up --nat`` needs."""
    memfd: str
    cpus: int
    """CPUs this process may run on."""
    memory_total: int
    """Bytes."""
    memory_available: int
    """Bytes that can be had without swapping."""
    disk_path: str
    disk_free: int
    """Bytes free where temporary files go."""
    open_files: int
    """Descriptors this process may have (soft limit)."""


def look_around() -> Surroundings:
    """Try everything; about 0.1 s, most of it the child process."""
    import resource
    import shutil

    import psutil

    memory = psutil.virtual_memory()
    namespace, bridge, nftables = try_network()
    temporary = tempfile.gettempdir()
    return Surroundings(
        kvm=try_kvm(),
        tap=try_tap(),
        network_namespace=namespace,
        bridge=bridge,
        nftables=nftables,
        memfd=try_memfd(),
        cpus=len(os.sched_getaffinity(0)),
        memory_total=memory.total,
        memory_available=memory.available,
        disk_path=temporary,
        disk_free=shutil.disk_usage(temporary).free,
        open_files=resource.getrlimit(resource.RLIMIT_NOFILE)[0],
    )


def _no(error: OSError, remedy: dict[int, str]) -> str:
    reason = os.strerror(error.errno) if error.errno else str(error)
    hint = remedy.get(error.errno or 0)
    return f"no: {reason}; {hint}" if hint else f"no: {reason}"


def try_kvm(path: str = "/dev/kvm") -> str:
    """Open ``path`` as a VMM does."""
    remedy = {
        errno.ENOENT: "load kvm_intel or kvm_amd, or enable (nested) virtualization",
        errno.EACCES: "add this user to the group kvm (usermod -aG kvm $USER) or run as root",
    }
    try:
        os.close(os.open(path, os.O_RDWR | os.O_CLOEXEC))
    except OSError as error:
        return _no(error, remedy)
    return "yes"


def try_tap(path: str = "/dev/net/tun") -> str:
    """Create a tap with a name of the kernel's choice; it goes with its descriptor."""
    import fcntl

    remedy = {
        errno.ENOENT: "modprobe tun",
        errno.EACCES: f"{path} is not this user's to open",
        errno.EPERM: "taps need CAP_NET_ADMIN: run as root, or in a network namespace of one's own",
    }
    try:
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        return _no(error, remedy)
    try:
        fcntl.ioctl(fd, _TUNSETIFF, struct.pack("16sH22x", b"pvprobe%d", _IFF_TAP | _IFF_NO_PI))
    except OSError as error:
        return _no(error, remedy)
    finally:
        os.close(fd)
    return "yes"


def try_network() -> tuple[str, str, str]:
    """Make a network namespace in a child process, so that this one's network stays as it is.

    Returns whether that works, and whether bridges and nftables do in it.
    """
    unknown = "no: without a network namespace of its own this is not tried"
    try:
        child = subprocess.run(
            [sys.executable, "-I", "-S", "-c", _UNSHARE],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=_TIMEOUT,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"no: {error}", unknown, unknown
    match child.stdout.splitlines():
        case [namespace, bridge, nftables] if child.returncode == 0:
            return namespace, bridge, nftables
        case [refusal] if child.returncode == 0:
            return refusal, unknown, unknown
    return f"no: the child ended with status {child.returncode}", unknown, unknown


def try_memfd() -> str:
    """Make a memfd: guest memory is made of them."""
    try:
        os.close(os.memfd_create("pyvmm-probe", os.MFD_CLOEXEC))
    except OSError as error:
        return _no(error, {})
    return "yes"
