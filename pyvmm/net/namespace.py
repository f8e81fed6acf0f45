"""A network namespace of this process's own.

It is held by a descriptor, not by a mount in /run/netns: so the kernel takes it down, with every device in it, when the
last process that is in it or holds it dies, whatever it dies of. Nothing has to be reclaimed. It still has a name, for
messages, and a path to look into it: ``nsenter --net=/proc/PID/fd/N``.
"""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from pyvmm.errors import HostError
from pyvmm.net.bridge import attach
from pyvmm.net.links import find_link, netlink_errors, open_route

T = TypeVar("T")

CLONE_NEWNET = 0x40000000  # <linux/sched.h>

_libc = ctypes.CDLL(None, use_errno=True)


class Namespace:
    """A new one, with ``lo`` up and IPv6 off. HostError: no rights. ``name`` is followed by this process's ID."""

    def __init__(self, name: str) -> None:
        self.name = f"{name}-{os.getpid()}"
        self.fd = _in_thread(self.name, _make)
        try:
            self.call(_quiet)
        except BaseException:
            os.close(self.fd)
            raise

    @property
    def path(self) -> str:
        """For setns() by another process, while this one lives."""
        return f"/proc/{os.getpid()}/fd/{self.fd}"

    def call(self, function: Callable[[], T]) -> T:
        """Call ``function`` inside, on a thread that ends with it; its value, or its exception.

        A namespace belongs to a thread. What the function opens (sockets, taps) stays inside for good and can be
        handed out; what it starts (threads, processes) stays inside, too. No other thread of this process moves.
        """

        def inside() -> T:
            if _libc.setns(self.fd, CLONE_NEWNET):
                raise HostError(f"network namespace {self.name}: {os.strerror(ctypes.get_errno())}; run as root")
            return function()

        return _in_thread(self.name, inside)

    def command(self, *argv: str | os.PathLike[str]) -> list[str]:
        """``argv`` so that it runs inside: for subprocess.Popen. The process it starts is ``argv``'s own."""
        return ["nsenter", f"--net={self.path}", "--", *(os.fspath(word) for word in argv)]

    def set_up(self, device: str, address: str | None = None) -> None:
        """Give ``device`` an address (``A.B.C.D/N``) and set it up."""

        def inside() -> None:
            with open_route() as route:
                index = _index_of(route, device)
                if address is not None:
                    ip, _, prefix = address.partition("/")
                    with netlink_errors(f"give {device} the address {address}"):
                        route.addr("add", index=index, address=ip, prefixlen=int(prefix))
                with netlink_errors(f"set {device} up"):
                    route.link("set", index=index, state="up")

        self.call(inside)

    def add_bridge(self, name: str, *ports: str) -> None:
        """A bridge with ``ports``, all up."""

        def inside() -> None:
            with open_route() as route:
                with netlink_errors(f"make the bridge {name}"):
                    route.link("add", ifname=name, kind="bridge")
                for port in ports:
                    attach(port, name, route)

        self.call(inside)
        self.set_up(name)

    def plug(self, port: str, bridge: str | None) -> None:
        """Make ``port`` one of ``bridge``'s, or nobody's: what is sent to it then is lost without a word."""

        def inside() -> None:
            with open_route() as route, netlink_errors(f"plug {port}"):
                master = _index_of(route, bridge) if bridge is not None else 0
                route.link("set", index=_index_of(route, port), master=master)

        self.call(inside)

    def close(self) -> None:
        """Let go of it. Harmless twice."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


def add_cable(one: tuple[Namespace, str], other: tuple[Namespace, str]) -> None:
    """A veth pair, both ends up; it is gone as soon as either namespace is."""
    (near, near_name), (far, far_name) = one, other

    def inside() -> None:
        with open_route() as route, netlink_errors(f"lay a cable from {near.name} to {far.name}"):
            route.link("add", ifname=near_name, kind="veth", peer={"ifname": far_name, "net_ns_fd": far.fd})

    near.call(inside)
    for space, device in (one, other):
        space.set_up(device)


def _index_of(route: object, device: str) -> int:
    link = find_link(route, device)
    if link is None:
        raise HostError(f"there is no device {device}; somebody removed it")
    return link.index


def _make() -> int:
    if _libc.unshare(CLONE_NEWNET):
        why = os.strerror(ctypes.get_errno())
        raise HostError(f"a network namespace cannot be made: {why}; it needs CAP_SYS_ADMIN: run as root")
    return os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)


def _quiet() -> None:
    for which in ("all", "default", "lo"):
        path = Path(f"/proc/sys/net/ipv6/conf/{which}/disable_ipv6")
        if path.exists():
            path.write_text("1", encoding="ascii")
    with open_route() as route, netlink_errors("set lo up"):
        route.link("set", index=1, state="up")


def _in_thread(name: str, function: Callable[[], T]) -> T:
    """``function()`` on a thread of its own, which may change its namespace and then ends."""
    values: list[T] = []
    errors: list[BaseException] = []

    def body() -> None:
        try:
            values.append(function())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=body, name=f"namespace {name}")
    thread.start()
    thread.join()
    if errors:
        raise errors[0]
    return values[0]
