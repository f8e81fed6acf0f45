"""``pyvmm top``: all running machines and what they do, again and again."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING, Any

from pyvmm.errors import EXIT_REFUSED, ConfigError, HostError

if TYPE_CHECKING:
    from pyvmm.cli.top_watch import Seen

INTERVAL_MIN, INTERVAL_MAX = 0.1, 3600.0


def add_parser(subparsers: Any) -> None:
    """Declare the subcommand."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "top",
        help="watch running machines: CPU time, exits, pages written, queues, COLO",
        description="Show all running machines, or only those named, until q is pressed. s sorts by another column,"
        " Enter shows one machine's exits by kind, its queues and checkpoints. A machine that does not answer is shown"
        " as such and keeps nobody waiting.",
    )
    parser.add_argument("names", metavar="NAME", nargs="*", help="only these (default: all)")
    parser.add_argument("--interval", metavar="S", type=float, default=1.0, help="seconds between looks (default 1)")
    parser.add_argument("--once", action="store_true", help="look twice, print a table and end")
    parser.add_argument("--json", action="store_true", help="with --once: print JSON")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """0. 125: there is no terminal, or no machine of such a name."""
    from pyvmm.cli.top_watch import Watch

    if not INTERVAL_MIN <= args.interval <= INTERVAL_MAX:
        raise ConfigError(f"--interval {args.interval:g}: {INTERVAL_MIN:g} to {INTERVAL_MAX:g} seconds")
    if args.json and not args.once:
        raise ConfigError("--json: only with --once")
    if not args.once and not (sys.stdin.isatty() and sys.stdout.isatty()):
        raise HostError("pyvmm top needs a terminal; --once prints a table without one")
    with Watch(args.names, args.interval) as watch:
        if args.once:
            return _once(watch.look_twice(), as_json=args.json)
        from pyvmm.cli.top_screen import TopApp

        app = TopApp(watch)
        app.run()
    return EXIT_REFUSED if app.return_code else 0


def _once(seen: list[Seen], *, as_json: bool) -> int:
    from pyvmm.cli.top_watch import COLUMNS, row

    if as_json:
        import json

        json.dump([each.document() for each in seen], sys.stdout, indent=2)
        print()
        return 0
    from rich.console import Console
    from rich.table import Table

    table = Table(*COLUMNS, box=None, pad_edge=False)
    for each in seen:
        table.add_row(*row(each))
    # In a pipe nothing says how wide a line may be, so none is folded.
    Console(highlight=False, width=None if sys.stdout.isatty() else 200).print(table)
    return 0
