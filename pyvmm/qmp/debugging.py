"""The debugger's server as a part of the monitors: it is opened by them, and lends its user their commands."""

from __future__ import annotations

import socket
from typing import TYPE_CHECKING

from pyvmm.errors import ConfigError
from pyvmm.gdb.server import GdbServer, parse_option
from pyvmm.qmp.endpoints import open_endpoint

if TYPE_CHECKING:
    from pyvmm.qmp.monitor import Monitor


class GdbService:
    """Listens for one debugger at ``--gdb OPTION``; ConfigError. In the loop's thread."""

    def __init__(self, monitor: Monitor, option: str) -> None:
        address, architecture = parse_option(option)
        if address.startswith("tcp::"):  # as QEMU's: the default is this machine only
            address = "tcp:localhost:" + address.removeprefix("tcp::")
        self._monitor = monitor
        self._endpoint = open_endpoint(address, "--gdb")
        self._server = GdbServer(
            monitor.machine, self._endpoint.socket, address, self._carry_out, architecture
        )

    def _carry_out(self, line: str, cpu: int) -> list[str]:
        from pyvmm.qmp.command_set.human_monitor import human_lines

        return human_lines(self._monitor, line, cpu)

    @property
    def address(self) -> str:
        """Where it listens, with the port it got."""
        listener = self._endpoint.socket
        if listener.family == socket.AF_UNIX:
            return self._endpoint.label
        host, port = listener.getsockname()[:2]
        return f"tcp:{f'[{host}]' if ':' in host else host}:{port}"

    def close(self) -> None:
        """Let the debugger go and stop listening."""
        self._server.close()
        self._endpoint.close()


def serve_gdb(monitor: Monitor, option: str) -> str | None:
    """Listen at ``option`` instead of where it was; ``none``: no more. Its address. ConfigError changes nothing."""
    if option == "none":
        monitor.set_gdb(None)
        return None
    if option == "":
        raise ConfigError("--gdb: write tcp:HOST:PORT or unix:PATH")
    service = GdbService(monitor, option)
    monitor.set_gdb(service)
    return service.address
