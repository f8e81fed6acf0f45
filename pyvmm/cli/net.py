"""``pyvmm net up|down|list``: networks that VMs join with ``--net NAME``.

``list --json`` prints one object: ``version`` (1) and ``networks``, a list of net/networks.py's NetworkState, field by
field. Its members are stable; new ones may be added.

Exit status: 0 if it is so now (also if it was so before), else 125 with one line on stderr.
"""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pyvmm.net.networks import NetworkState, VmState


def add_parser(subparsers: Any) -> None:
    """Add the subcommand and its own three."""
    parser = subparsers.add_parser(
        "net",
        help="make, remove and list networks for VMs",
        description="A network is a bridge with an address for the host; pyvmm linux --net NAME puts a VM on it.",
    )
    actions = parser.add_subparsers(title="actions", required=True, metavar="ACTION")
    up = actions.add_parser("up", help="make a network, or put right what is missing of it")
    up.add_argument("name", metavar="NAME", help="1 to 11 letters, digits, '-', '_', '.'")
    up.add_argument("--cidr", metavar="A.B.C.D/N",
                    help="its addresses, /8 to /30 (default: a free 10.91.x.0/24), the host's first")  # fmt: skip
    up.add_argument("--nat", action=argparse.BooleanOptionalAction, default=None,
                    help="let guests reach what the host reaches, in the host's name (nftables)")  # fmt: skip
    up.set_defaults(run=run_up)
    down = actions.add_parser("down", help="remove a network")
    down.add_argument("name", metavar="NAME")
    down.add_argument("--force", action="store_true", help="also with VMs on it: they run on without a network")
    down.set_defaults(run=run_down)
    show = actions.add_parser("list", help="show the networks and the VMs on them")
    show.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    show.set_defaults(run=run_list)


def run_up(args: argparse.Namespace) -> int:
    """0, or what networks.set_up raises."""
    from pyvmm.net.networks import set_up

    state, new = set_up(args.name, args.cidr, args.nat)
    nat = f", translated to {state.uplink}" if state.nat else ""
    print(f"network {state.name} {'is' if new else 'was'} up: {state.cidr} on {state.bridge}, host {state.host}{nat}")
    return 0


def run_down(args: argparse.Namespace) -> int:
    """0, or what networks.take_down raises."""
    from pyvmm.net.networks import take_down

    there = take_down(args.name, force=args.force)
    print(f"network {args.name} is down" if there else f"network {args.name} was not up")
    return 0


def run_list(args: argparse.Namespace) -> int:
    """0."""
    from pyvmm.net.networks import list_networks

    networks = list_networks()
    if args.json:
        import msgspec

        report = {"version": 1, "networks": networks}
        sys.stdout.write(msgspec.json.format(msgspec.json.encode(report), indent=2).decode() + "\n")
    elif networks:
        _print_table(networks)
    else:
        print("no networks; pyvmm net up NAME makes one")
    return 0


def _print_table(networks: list[NetworkState]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title="pyvmm networks")
    for title in ("network", "state", "host", "NAT", "VM", "address", "tap"):
        table.add_column(title, overflow="fold")  # all of it, also where the terminal is narrow
    for network in networks:
        host = f"{network.host}/{network.cidr.partition('/')[2]}" if network.cidr else ""
        nat = (network.uplink or "yes") if network.nat else "no" if network.cidr else ""
        rows = [[_vm_title(vm), vm.address, vm.tap] for vm in network.vms]
        rows += [["(not a VM's)", "", port] for port in network.other_ports]
        for index, row in enumerate(rows or [["", "", ""]]):
            head = [network.name, network.state, host, nat] if index == 0 else [""] * 4
            # Text, not str: a name must not be taken for rich's markup.
            table.add_row(*(Text(cell) for cell in head + row))
    Console().print(table)


def _vm_title(vm: VmState) -> str:
    return vm.vm if vm.state == "connected" else f"{vm.vm} ({vm.state})"
