"""The network of the demo: two hosts, a client, and the switch between them, each a network namespace.

::

             client                                 switch                         primary, secondary
      eth0 192.0.2.1/24 ------- client | bridge "lan": client primary secondary
                                       |   primary, secondary -------------- uplink | bridge br0: uplink, the VM's tap
                                       | bridge "repl": repl-primary repl-secondary
                                       |   repl-primary, repl-secondary ---- repl 198.51.100.1/24, 198.51.100.2/24

Replication has a link of its own, so that it can be cut alone: one port is taken off the bridge "repl", and what either
host sends to the other is lost without a word, which is worse than a cable that is pulled (RFC 5737's addresses are in
nobody's way; the namespaces are on no network but this one).

All of it goes when the process does that made it: see net/namespace.py.
"""

from __future__ import annotations

import contextlib
import socket
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from pyvmm.net.namespace import Namespace, add_cable

CLIENT, GUEST, PREFIX = "192.0.2.1", "192.0.2.2", 24
GUEST_MAC = "52:54:00:c0:10:02"
REPLICATION_PORT = 4444
BRIDGE, TAP = "br0", "vm0"


@dataclass(frozen=True)
class Host:
    """One of the two; ``address`` is on the replication link."""

    name: str
    space: Namespace
    address: str

    @property
    def net_option(self) -> str:
        """``--net`` of a VM here that has the guest's card."""
        return f"tap:{TAP},bridge={BRIDGE},mac={GUEST_MAC}"

    @property
    def replication_uri(self) -> str:
        """Where a secondary here waits."""
        return f"tcp:{self.address}:{REPLICATION_PORT}"


class Topology:
    """A context manager. HostError: no rights, or the kernel lacks something."""

    REPLICATION = {"primary": "198.51.100.1", "secondary": "198.51.100.2"}  # noqa: RUF012
    """Addresses of the hosts on their own link."""

    def __init__(self) -> None:
        with contextlib.ExitStack() as stack:
            self.client, self.switch, primary, secondary = (
                stack.enter_context(contextlib.closing(Namespace(name)))
                for name in ("client", "switch", "primary", "secondary")
            )
            self.primary = Host("primary", primary, self.REPLICATION["primary"])
            self.secondary = Host("secondary", secondary, self.REPLICATION["secondary"])
            self._lay_cables()
            self._stack = stack.pop_all()

    def _lay_cables(self) -> None:
        add_cable((self.client, "eth0"), (self.switch, "client"))
        self.client.set_up("eth0", f"{CLIENT}/{PREFIX}")
        for host in self.hosts:
            add_cable((host.space, "uplink"), (self.switch, host.name))
            host.space.add_bridge(BRIDGE, "uplink")
            add_cable((host.space, "repl"), (self.switch, f"repl-{host.name}"))
            host.space.set_up("repl", f"{host.address}/24")
        self.switch.add_bridge("lan", "client", "primary", "secondary")
        self.switch.add_bridge("repl", "repl-primary", "repl-secondary")

    @property
    def hosts(self) -> tuple[Host, Host]:
        """Both."""
        return self.primary, self.secondary

    @property
    def namespaces(self) -> tuple[Namespace, ...]:
        """All four."""
        return self.client, self.switch, self.primary.space, self.secondary.space

    def other(self, host: Host) -> Host:
        """The one that ``host`` is not."""
        return self.secondary if host is self.primary else self.primary

    def cut_link(self) -> None:
        """Nothing crosses the replication link any more, in either direction; neither side is told."""
        self.switch.plug("repl-primary", None)

    def mend_link(self) -> None:
        """It does again."""
        self.switch.plug("repl-primary", "repl")

    def client_socket(self, kind: socket.SocketKind) -> socket.socket:
        """An IPv4 socket in the client's namespace."""
        return self.client.call(lambda: socket.socket(socket.AF_INET, kind))

    def close(self) -> None:
        """Let go of all; what is still in there keeps its namespace until it ends."""
        self._stack.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
