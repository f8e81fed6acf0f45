"""``pyvmm list|status|stop|cont|reset|powerdown|quit``: running machines, found by name."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from pyvmm.errors import PyvmmError

if TYPE_CHECKING:
    from pyvmm.qmp.client import QmpClient

LIST_TIMEOUT = 2.0
QUIT_DEADLINE = 10.0

_SIMPLE = {
    "stop": ("stop", "stop a machine's vCPUs"),
    "cont": ("cont", "let a machine's vCPUs go on"),
    "reset": ("system_reset", "reset a machine"),
    "powerdown": ("system_powerdown", "press a machine's ACPI power button"),
}


def add_parser(subparsers: Any) -> None:
    """Declare the subcommands."""
    listing = subparsers.add_parser("list", help="list running machines", description="The machines that run now.")
    listing.add_argument("--json", action="store_true", help="for programs")
    listing.set_defaults(run=run_list)
    status = _machine_parser(subparsers, "status", "what a machine is doing", run_status)
    status.add_argument("--json", action="store_true", help="for programs")
    for name, (_, text) in _SIMPLE.items():
        _machine_parser(subparsers, name, text, run_simple).set_defaults(verb=name)
    _machine_parser(subparsers, "quit", "end a machine and its process", run_quit)


def _machine_parser(
    subparsers: Any, name: str, text: str, run: Callable[[argparse.Namespace], int]
) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = subparsers.add_parser(name, help=text, description=f"{text.capitalize()}.")
    parser.add_argument("machine", metavar="VM", help="its name (see pyvmm list), or unix:PATH, tcp:HOST:PORT of a QMP")
    parser.set_defaults(run=run)
    return parser


def run_simple(args: argparse.Namespace) -> int:
    """One command without arguments."""
    from pyvmm.qmp.client import open_client

    with open_client(args.machine) as client:
        client.execute(_SIMPLE[args.verb][0])
    return 0


def run_quit(args: argparse.Namespace) -> int:
    """Quit, and wait until the machine has hung up: what it had to write is written then."""
    from pyvmm.qmp.client import open_client

    with open_client(args.machine) as client:
        client.execute("quit")
        client.wait_for_end(QUIT_DEADLINE)
    return 0


def run_status(args: argparse.Namespace) -> int:
    """One machine's facts."""
    from pyvmm.qmp.client import open_client

    with open_client(args.machine) as client:
        facts = _facts(client)
    if args.json:
        _print_json(facts)
    else:
        for name, value in facts.items():
            print(f"{name:8} {_memory_text(value) if name == 'memory' else value}")
    return 0


def run_list(args: argparse.Namespace) -> int:
    """All machines; one that does not answer is listed as such."""
    from pyvmm.qmp.client import open_client
    from pyvmm.qmp.control import running_names

    rows: list[dict[str, Any]] = []
    for name in running_names():
        try:
            with open_client(name, LIST_TIMEOUT) as client:
                rows.append(_facts(client))
        except PyvmmError as error:
            if name in running_names():  # or it has ended meanwhile
                rows.append({"name": name, "status": "not answering", "problem": str(error)})
    if args.json:
        _print_json(rows)
        return 0
    if rows:
        print(f"{'NAME':20} {'STATUS':15} {'CPUS':>4} {'MEMORY':>9} {'PID':>8}")
    for row in rows:
        memory = _memory_text(row["memory"]) if "memory" in row else "-"
        print(f"{row['name']:20} {row['status']:15} {row.get('cpus', '-'):>4} {memory:>9} {row.get('pid', '-'):>8}")
    return 0


def _facts(client: QmpClient) -> dict[str, Any]:
    """Out-of-band, so that a machine whose loop is stuck is shown, too."""
    return {
        "name": client.execute("query-name", oob=True).get("name", ""),
        "status": client.execute("query-status", oob=True)["status"],
        "cpus": len(client.execute("query-cpus-fast", oob=True)),
        "memory": client.execute("query-memory-size-summary", oob=True)["base-memory"],
        "pid": client.peer_pid(),
    }


def _memory_text(size: int) -> str:
    return f"{size / (1 << 20):g} MiB"


def _print_json(document: Any) -> None:
    import json

    json.dump(document, sys.stdout, indent=2)
    print()
