"""Options about a machine's monitors, and opening them: ``--qmp`` endpoints and the control socket."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Iterator

import msgspec

from pyvmm.cli.messages import complain
from pyvmm.errors import ConfigError, HostError
from pyvmm.machine.config import MachineConfig
from pyvmm.qmp.control import claim_name
from pyvmm.qmp.endpoints import Endpoint, open_endpoint


def add_monitor_options(parser: argparse.ArgumentParser) -> None:
    """``--qmp`` and what goes with it."""
    add = parser.add_argument
    add("--qmp", metavar="WHERE", action="append", default=[],
        help="listen for QMP clients at unix:PATH or tcp:HOST:PORT (who reaches it rules the machine);"
        " may be repeated")  # fmt: skip
    add("-S", dest="start_paused", action="store_true",
        help="do not start the vCPUs; a debugger, QMP cont or pyvmm cont does")  # fmt: skip
    add("--gdb", metavar="WHERE[,arch=NAME]",
        help="listen for a debugger at tcp:HOST:PORT or unix:PATH (who reaches it rules the machine); arch: x86-64,"
        " i386 or i8086, if what the first vCPU is in when it connects is not it")  # fmt: skip
    add("--dashboard", metavar="ADDR",
        help="a web page that shows the machine at work, at HOST:PORT (whoever reaches it may look) or unix:PATH")
    add("--dashboard-token", metavar="FILE",
        help="the token without which the page's failover button does nothing (default: made up, and printed)")
    add("--no-shutdown", action="store_true", help="when the guest ends keep the machine, to look at, reset or quit it")
    add("--no-control", action="store_true", help="do not let pyvmm list, stop, quit... find the machine")


@contextlib.contextmanager
def endpoints_of(config: MachineConfig, args: argparse.Namespace) -> Iterator[tuple[MachineConfig, list[Endpoint]]]:
    """Everything a machine listens at, before it is built, and ``config`` with the name it got.

    A control folder that cannot be had costs the machine its being found, not its start.
    """
    with contextlib.ExitStack() as stack:
        endpoints: list[Endpoint] = []

        def keep(endpoint: Endpoint) -> None:
            stack.callback(endpoint.close)
            endpoints.append(endpoint)

        if not args.no_control:
            try:
                name, control = claim_name(config.name, exact=args.name is not None)
            except HostError as error:
                complain(f"pyvmm: no control socket (--no-control wants none): {error}")
            else:
                keep(control)
                config = msgspec.structs.replace(config, name=name)
        for option in args.qmp:
            keep(open_endpoint(option))
        if args.dashboard is not None:
            from pyvmm.dashboard.launch import dashboard

            page = dashboard(args.dashboard, args.dashboard_token, confined=is_confined(args), say=complain)
            endpoints.append(stack.enter_context(page))
        elif args.dashboard_token is not None:
            raise ConfigError("--dashboard-token goes with --dashboard")
        yield config, endpoints


def is_confined(args: argparse.Namespace) -> bool:
    """What ``--sandbox`` asks for."""
    chosen = getattr(args, "sandbox", "off")
    return chosen == "on" or (chosen == "auto" and getattr(args, "colo", None) is not None)
