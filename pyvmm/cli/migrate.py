"""``pyvmm migrate VM URI``: move a running machine's guest to a pyvmm that waits for it."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from pyvmm.cli.messages import complain
from pyvmm.errors import EXIT_REFUSED, ConfigError, HostError

if TYPE_CHECKING:
    from pyvmm.qmp.client import QmpClient

LOOK = 0.1
"""Seconds between looks at how it goes."""
QUIT_DEADLINE = 10.0
CANCEL_DEADLINE = 15.0
FD_NAME = "pyvmm-migrate"
_OVER = frozenset({"completed", "failed", "cancelled"})


def add_parser(subparsers: Any) -> None:
    """Declare the subcommand."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "migrate",
        help="move a running guest to another pyvmm",
        description="Move VM's guest, while it runs, to a pyvmm that was started with the same options and --incoming"
        " URI. Ctrl-C cancels: the guest goes on where it is. Afterwards VM's process ends.",
    )
    add = parser.add_argument
    add("machine", metavar="VM", help="its name (see pyvmm list), or unix:PATH, tcp:HOST:PORT of a QMP")
    add("uri", metavar="URI", help="tcp:HOST:PORT, unix:PATH or fd:NUMBER (a connected socket of the caller's)")
    add("--detach", action="store_true", help="return once it has begun; VM's process stays (see pyvmm quit)")
    add("--keep", action="store_true", help="let VM's process stay, without its guest")
    add("--bandwidth", metavar="SIZE", help="send at most so many bytes a second, for example 100M (default: no limit)")
    add("--downtime", metavar="MS", help="how long the guest may stand still at the end (default 300)")
    add("--auto-converge", action="store_true", help="slow the guest down if it writes faster than is sent")
    add("--compress", action="store_true", help="LZ4, for slow links")
    add("--tls-creds", metavar="DIR", help="credentials (pyvmm certs) that the destination must match")
    add("--json", action="store_true", help="end with query-migrate's answer, and no progress bar")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """0: the guest runs at the destination (or: it has begun). 125: it goes on here."""
    from pyvmm.migration.channel import parse_uri
    from pyvmm.qmp.client import open_client

    family, rest = parse_uri(args.uri)
    with open_client(args.machine) as client:
        _settings(client, args)
        uri = args.uri
        if family == "fd":
            _send_descriptor(client, int(rest))
            uri = f"fd:{FD_NAME}"
        elif family == "unix":
            uri = f"unix:{os.path.abspath(rest)}"  # the machine's process may live in another folder
        client.execute("migrate", {"uri": uri})
        if args.detach:
            return 0
        info = _follow(client, quiet=args.json or not sys.stderr.isatty())
        if args.json:
            _print_json(info)
        if info["status"] != "completed":
            complain(f"pyvmm: {args.machine} was not migrated: {info.get('error-desc', info['status'])}")
            return EXIT_REFUSED
        if not args.json:
            print(_summary(info))
        if not args.keep:
            client.execute("quit")
            client.wait_for_end(QUIT_DEADLINE)
    return 0


def _settings(client: QmpClient, args: argparse.Namespace) -> None:
    """Everything is set, also what is not said: an earlier migration may have left something else."""
    from pyvmm.machine.config import parse_number, parse_size

    bandwidth = parse_size(args.bandwidth, "--bandwidth") if args.bandwidth is not None else 0
    downtime = parse_number(args.downtime, "--downtime", maximum=2_000_000) if args.downtime is not None else 300
    capabilities = {"auto-converge": args.auto_converge, "compress": args.compress}
    client.execute("migrate-set-parameters", {
        "max-bandwidth": bandwidth, "downtime-limit": downtime,
        "tls-creds": os.path.abspath(args.tls_creds) if args.tls_creds else "",
    })  # fmt: skip
    client.execute("migrate-set-capabilities", {
        "capabilities": [{"capability": name, "state": state} for name, state in capabilities.items()]
    })  # fmt: skip


def _send_descriptor(client: QmpClient, fd: int) -> None:
    try:
        os.fstat(fd)
    except OSError as error:
        raise ConfigError(f"fd:{fd}: {error.strerror}; hand over a connected socket") from None
    client.execute_with_descriptor("getfd", {"fdname": FD_NAME}, fd)


def _follow(client: QmpClient, *, quiet: bool) -> dict[str, Any]:
    """Until it is over; query-migrate's last answer. Ctrl-C cancels."""
    with _progress(quiet) as show:
        deadline: float | None = None
        while True:
            try:
                info: dict[str, Any] = client.execute("query-migrate", oob=True)
                if info.get("status") in _OVER:
                    return info
                show(info)
                if deadline is not None and time.monotonic() > deadline:
                    raise HostError("the migration does not end; look with pyvmm status")
                time.sleep(LOOK)
            except KeyboardInterrupt:
                deadline = time.monotonic() + CANCEL_DEADLINE
                client.execute("migrate_cancel")


@contextlib.contextmanager
def _progress(quiet: bool) -> Iterator[Callable[[dict[str, Any]], None]]:
    """What shows an answer of query-migrate: a bar on a terminal, nothing elsewhere."""
    if quiet:
        yield lambda info: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn

    columns = (TextColumn("{task.fields[status]:8}"), BarColumn(), TextColumn("{task.fields[facts]}"))
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("", total=1, status="setup", facts="")

        def show(info: dict[str, Any]) -> None:
            ram = info["ram"]
            done = ram["total"] - ram["remaining"]
            facts = (
                f"{ram['mbps'] / 8:.0f} MB/s, {ram['remaining'] / (1 << 20):.1f} MiB remaining,"
                f" round {ram['dirty-sync-count'] + 1}"
            )
            if throttle := info.get("cpu-throttle-percentage"):
                facts += f", guest slowed by {throttle} %"
            progress.update(task, total=ram["total"], completed=done, status=info["status"], facts=facts)

        yield show


def _summary(info: dict[str, Any]) -> str:
    ram = info["ram"]
    return (
        f"migrated in {info['total-time'] / 1000:.2f} s: {ram['transferred'] / (1 << 20):.1f} MiB in"
        f" {ram['dirty-sync-count']} rounds, the guest stood still for {info['downtime']} ms"
    )


def _print_json(info: dict[str, Any]) -> None:
    import json

    json.dump(info, sys.stdout, indent=2)
    print()
