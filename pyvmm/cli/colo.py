"""``pyvmm colo``: look at how a running guest is protected, and change it."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from pyvmm.cli import colo_demo
from pyvmm.cli.messages import complain
from pyvmm.errors import EXIT_REFUSED, ConfigError, HostError

if TYPE_CHECKING:
    from rich.table import Table

    from pyvmm.qmp.client import QmpClient

LOOK = 0.1
"""Seconds between looks at how it goes."""
PROTECT_DEADLINE = 600.0
FAILOVER_DEADLINE = 30.0
CHECKPOINT_DEADLINE = 30.0
SHOWN = 20
"""Of the answers that were not alike, the last."""


def add_parser(subparsers: Any) -> None:
    """Declare the subcommand and its own."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "colo",
        help="protected guests: status, protect, failover, checkpoint, why, top, replay, demo",
        description="A guest that is protected runs in two pyvmm: when one dies the other goes on (see README, COLO).",
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    def add(name: str, run: Callable[[argparse.Namespace], int], text: str, *, json_too: bool = False) -> Any:
        one = commands.add_parser(name, help=text, description=text)
        if name != "replay":
            one.add_argument("machine", metavar="VM", help="its name (see pyvmm list), or unix:PATH, tcp:HOST:PORT")
        if json_too:
            one.add_argument("--json", action="store_true", help="for programs")
        one.set_defaults(run=run)
        return one

    add("status", _status, "how VM is protected", json_too=True)
    protect = add("protect", _protect, "protect VM by a secondary that waits (--colo secondary --incoming URI)")
    protect.add_argument("--to", metavar="URI", required=True, help="where it waits: tcp:HOST:PORT or unix:PATH")
    protect.add_argument("--tls-creds", metavar="DIR", help="credentials (pyvmm certs) that it must match")
    protect.add_argument("--detach", action="store_true", help="return once it has begun")
    add("failover", _failover, "VM's other side is gone, or is to go: VM goes on alone, if the arbiter agrees")
    add("checkpoint", _checkpoint, "make a checkpoint now")
    compare = add("compare", _compare, "compare VM's disks with its secondary's, as of a checkpoint", json_too=True)
    compare.add_argument("peer", metavar="PEER", help="the secondary, in the same ways")
    add("why", _why, "why checkpoints were made", json_too=True)
    top = add("top", _top, "watch VM's checkpoints")
    top.add_argument("--interval", metavar="S", type=float, default=1.0, help="seconds between two looks (default 1)")
    top.add_argument("--once", action="store_true", help="look once and end")
    replay = add("replay", _replay, "print a recorded conversation (--colo-record) and judge it", json_too=True)
    replay.add_argument("file", metavar="FILE")
    colo_demo.add_parser(commands)


def _ask(client: QmpClient) -> tuple[dict[str, Any], dict[str, Any]]:
    return client.execute("query-colo-status", oob=True), client.execute("query-colo-stats", oob=True)


def _open(args: argparse.Namespace) -> QmpClient:
    from pyvmm.qmp.client import open_client

    return open_client(args.machine)


def _status(args: argparse.Namespace) -> int:
    with _open(args) as client:
        status, stats = _ask(client)
    if args.json:
        _print_json({"status": status, "stats": stats})
        return 0
    from rich.console import Console

    Console(highlight=False).print(_table(args.machine, status, stats))
    return 0


def _table(name: str, status: dict[str, Any], stats: dict[str, Any]) -> Table:
    from rich.table import Table

    table = Table(show_header=False, box=None, pad_edge=False)
    role = status["mode"]
    table.add_row("machine", name)
    table.add_row("role", role if role != "none" else f"none: not protected{_since(status)}")
    if role != "none":
        table.add_row("mode", status["x-checkpoint-mode"])
    if status["x-pair"]:
        table.add_row("pair", f"{status['x-pair']}, term {status['x-term']}, epoch {status['x-epoch']}")
    if role == "primary":
        table.add_row("secondary", status.get("x-peer", "-"))
    if stats["checkpoints"]:
        pause, received = stats["pause"], stats["received"]
        table.add_row("checkpoints", f"{stats['checkpoints']}, {stats['bytes'] / (1 << 20):.1f} MiB")
        table.add_row("last", f"{stats['pages']} pages, {stats['size'] / 1024:.0f} KiB")
        table.add_row("pause", f"median {pause['median']:.2f} ms, longest {pause['largest']:.2f} ms")
        table.add_row("received", f"median {received['median']:.2f} ms after the request")
    if stats["held-bytes"]:
        table.add_row("held output", f"{stats['held-bytes']} bytes of console output")
    for number, card in enumerate(stats["cards"] if role == "primary" else ()):
        table.add_row(
            f"card {number}",
            f"{card['primary-frames']} frames: {card['released']} let out as alike, {card['committed']} by checkpoints",
        )
    if role != "none":
        heard, silence = stats["heartbeats-heard"], stats["longest-silence"]
        table.add_row("heartbeats", f"{heard} heard, longest silence {silence:.0f} ms")
    if stats["failovers"]:
        table.add_row("failovers", f"{stats['failovers']}, the last in {stats.get('last-failover', 0):.1f} ms")
    return table


def _since(status: dict[str, Any]) -> str:
    if status["last-mode"] == "none":
        return ""
    problem = status.get("x-problem")
    return f" any more (was {status['last-mode']}; {status['reason']}{f': {problem}' if problem else ''})"


def _protect(args: argparse.Namespace) -> int:
    """0: protected (or begun). 125: not; the guest goes on as before."""
    from pyvmm.migration.channel import parse_uri

    family, rest = parse_uri(args.to)
    uri = f"unix:{os.path.abspath(rest)}" if family == "unix" else args.to
    with _open(args) as client:
        if args.tls_creds:
            client.execute("migrate-set-parameters", {"tls-creds": os.path.abspath(args.tls_creds)})
        before = client.execute("query-colo-status", oob=True)["x-term"]
        client.execute("x-colo-protect", {"uri": uri})
        if args.detach:
            return 0
        until = time.monotonic() + PROTECT_DEADLINE
        while time.monotonic() < until:
            status = client.execute("query-colo-status", oob=True)
            if status["mode"] == "primary" and status["x-epoch"]:
                print(f"{args.machine} is protected by {uri}: pair {status['x-pair']}, term {status['x-term']}")
                return 0
            info = client.execute("query-migrate", oob=True)
            if info.get("status") in ("failed", "cancelled", "completed"):
                why = info.get("error-desc") or status.get("x-problem") or info["status"]
                complain(f"pyvmm: {args.machine} is not protected: {why}")
                return EXIT_REFUSED
            time.sleep(LOOK)
    raise HostError(f"{args.machine} is not protected after {PROTECT_DEADLINE:g} s (term {before}); look with status")


def _failover(args: argparse.Namespace) -> int:
    """0: VM runs alone. 125: the other side has the guest."""
    with _open(args) as client:
        client.execute("x-colo-lost-heartbeat", oob=True)
        until = time.monotonic() + FAILOVER_DEADLINE
        while time.monotonic() < until:
            status, stats = _ask(client)
            if status["mode"] == "none":
                took = stats.get("last-failover")
                print(f"{args.machine} goes on alone" + (f", {took:.1f} ms after it was told" if took else ""))
                return 0
            time.sleep(LOOK / 5)
    raise HostError(f"{args.machine}: the failover has not ended after {FAILOVER_DEADLINE:g} s: is the arbiter there?")


def _checkpoint(args: argparse.Namespace) -> int:
    with _open(args) as client:
        before = client.execute("query-colo-stats", oob=True)["checkpoints"]
        client.execute("colo-checkpoint-now")
        until = time.monotonic() + CHECKPOINT_DEADLINE
        while time.monotonic() < until:
            stats = client.execute("query-colo-stats", oob=True)
            if stats["checkpoints"] > before:
                print(f"{stats['pages']} pages, {stats['size'] / 1024:.0f} KiB")
                return 0
            time.sleep(LOOK / 5)
    raise HostError(f"{args.machine}: no checkpoint within {CHECKPOINT_DEADLINE:g} s")


def _compare(args: argparse.Namespace) -> int:
    """0: the same. 1: not."""
    from pyvmm.cli.colo_compare import compare_disks
    from pyvmm.qmp.client import open_client

    with _open(args) as primary, open_client(args.peer) as secondary:
        found = compare_disks(primary, secondary)
    if args.json:
        _print_json({"epoch": found.epoch, "bytes": found.size, "paused-ms": found.paused * 1000,
                     "differences": [list(one) for one in found.differences]})  # fmt: skip
    else:
        for disk, offset, size in found.differences:
            print(f"disk {disk}: {size} bytes from {offset:#x} on")
        result = "the same" if not found.differences else "not the same"
        print(f"{result} as of checkpoint {found.epoch}: {found.disks} disks, {found.size / (1 << 20):.1f} MiB;"
              f" the guest stood still for {found.paused * 1000:.0f} ms")  # fmt: skip
    return 1 if found.differences else 0


def _why(args: argparse.Namespace) -> int:
    with _open(args) as client:
        stats = client.execute("query-colo-stats", oob=True)
    if args.json:
        _print_json({"reasons": stats["reasons"], "differences": stats["differences"]})
    else:
        for one in sorted(stats["reasons"], key=lambda entry: -entry["count"]):
            print(f"{one['count']:8}  {one['reason']}")
        for one in stats["differences"][-SHOWN:]:
            print(f"{time.strftime('%H:%M:%S', time.localtime(one['time']))}  {one['what']}")
    return 0


def _top(args: argparse.Namespace) -> int:
    """Until Ctrl-C, or the machine ends."""
    if args.interval <= 0:
        raise ConfigError(f"--interval {args.interval:g}: has to be above 0")
    from rich.console import Console
    from rich.live import Live

    with _open(args) as client:
        if args.once:
            Console(highlight=False).print(_table(args.machine, *_ask(client)))
            return 0
        with Live(_table(args.machine, *_ask(client)), console=Console(highlight=False), auto_refresh=False) as live:
            try:
                while True:
                    time.sleep(args.interval)
                    live.update(_table(args.machine, *_ask(client)), refresh=True)
            except KeyboardInterrupt:
                return 0


def _replay(args: argparse.Namespace) -> int:
    """1 if the conversation breaks the protocol's order."""
    from pyvmm.colo.recording import replay

    wrong = 0
    for one in replay(args.file):
        line = one.line
        wrong += one.problem is not None
        if args.json:
            json.dump({"t": line.t, "side": line.side, "message": line.message, "size": line.size,
                       "checkpoint": one.checkpoint, "problem": one.problem}, sys.stdout)  # fmt: skip
            print()
            continue
        arrow = "------>" if line.side == "primary" else "<------"
        size = f" {line.size} bytes" if line.size else ""
        print(f"{line.t:12.6f}  {one.checkpoint:6}  {arrow}  {line.message}{size}" +
              (f"   WRONG: {one.problem}" if one.problem else ""))  # fmt: skip
    return 1 if wrong else 0


def _print_json(value: Any) -> None:
    json.dump(value, sys.stdout, indent=2)
    print()
