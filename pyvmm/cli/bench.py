"""``pyvmm bench dirty``: what it costs on this host to learn which pages a guest wrote.

``--json`` prints one object: ``version`` (1), ``memory`` (bytes), ``load`` (of the machine, 1 minute) and ``rows``,
one for each method and share: ``method``, ``percent``, ``rounds``, ``pages`` (median of what was found), ``us``,
``us_per_gib``, ``ns_per_page`` (medians; null where nothing was measured) and ``problem`` (null, or why not). Its
members are stable; new ones may be added.

Exit status: 0 if at least one row was measured, else 125 with one line on stderr.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pyvmm.errors import ConfigError, HostError
from pyvmm.machine.config import parse_size

if TYPE_CHECKING:
    from pyvmm.machine.dirty_cost import HarvestCost

DIRTIER = Path(__file__).resolve().parents[2] / "guests" / "dirtier" / "dirtier.elf"
METHODS = ("bitmap", "ring")


def add_parser(subparsers: Any) -> None:
    """Add the subcommand and its measurements."""
    parser = subparsers.add_parser("bench", help="measure what things cost on this host")
    what = parser.add_subparsers(title="what to measure", required=True, metavar="WHAT")
    dirty = what.add_parser(
        "dirty",
        help="learning which pages a guest wrote",
        description="A guest writes a share of its memory; then KVM is asked for the pages and runs of them are made.",
    )
    add = dirty.add_argument
    add("--memory", "-m", metavar="SIZE", default="1G", help="the guest's memory (default 1G)")
    add("--dirty", metavar="PERCENT,...", default="0,1,10,100", help="shares that are written (default 0,1,10,100)")
    add("--method", choices=METHODS, action="append", help="KVM's bitmap or its rings (default: both)")
    add("--rounds", metavar="N", default="5", help="harvests of each (default 5)")
    add("--guest", metavar="FILE", default=str(DIRTIER), help="guests/dirtier, built (default: this checkout's)")
    add("--json", action="store_true", help="print one JSON object instead of a table")
    dirty.set_defaults(run=run_dirty)


def parse_shares(text: str) -> list[float]:
    """Percentages, 0 to 100. ConfigError otherwise."""
    shares = []
    for word in text.split(","):
        try:
            share = float(word)
        except ValueError:
            share = -1.0
        if not 0 <= share <= 100:  # nor nan
            raise ConfigError(f"--dirty {text!r}: write percentages from 0 to 100, for example 0,1,10,100")
        shares.append(share)
    return shares


def run_dirty(args: argparse.Namespace) -> int:
    """0, or ConfigError or HostError."""
    import os

    from pyvmm.machine.dirty_cost import LEAST_MEMORY, MOST_MEMORY, measure_harvest

    memory, shares = parse_size(args.memory, "--memory"), parse_shares(args.dirty)
    if not LEAST_MEMORY <= memory <= MOST_MEMORY or memory % 4096:
        raise ConfigError(f"--memory {args.memory}: the guest that writes needs whole pages from 16M to 3G")
    if not (args.rounds.isascii() and args.rounds.isdecimal() and 1 <= int(args.rounds[:5]) <= 1000):
        raise ConfigError(f"--rounds {args.rounds!r}: write a number from 1 to 1000")
    image = Path(args.guest)
    if not image.is_file():
        raise ConfigError(f"--guest {image}: there is no such file; make guests builds guests/dirtier/dirtier.elf")
    costs = [
        measure_harvest(image, method, memory, share, int(args.rounds))
        for method in dict.fromkeys(args.method or METHODS) for share in shares
    ]  # fmt: skip
    rows = [_row(cost) for cost in costs]
    if args.json:
        import msgspec

        report = {"version": 1, "memory": memory, "load": os.getloadavg()[0], "rows": rows}
        sys.stdout.write(msgspec.json.format(msgspec.json.encode(report), indent=2).decode() + "\n")
    else:
        _print_table(rows, args.memory)
    if not any(cost.seconds for cost in costs):
        raise HostError(f"nothing was measured: {costs[0].problem}")
    return 0


def _row(cost: HarvestCost) -> dict[str, Any]:
    row: dict[str, Any] = {
        "method": cost.method, "percent": cost.percent, "rounds": len(cost.seconds), "pages": None, "us": None,
        "us_per_gib": None, "ns_per_page": None, "problem": cost.problem,
    }  # fmt: skip
    if cost.seconds:
        from statistics import median

        seconds, pages = median(cost.seconds), median(cost.pages)
        row |= {
            "pages": pages, "us": seconds * 1e6, "us_per_gib": seconds * 1e6 * (1 << 30) / cost.memory,
            "ns_per_page": seconds * 1e9 / pages if pages else None,
        }  # fmt: skip
    return row


def _print_table(rows: list[dict[str, Any]], memory: str) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"harvest of dirty pages, {memory} of guest memory")
    table.add_column("method", style="bold")
    for name in ("written", "pages", "harvest", "a GiB", "a page"):
        table.add_column(name, justify="right")
    table.add_column("", overflow="fold")
    for row in rows:
        table.add_row(
            row["method"], f"{row['percent']:g} %", _number(row["pages"], ""), _number(row["us"], " us"),
            _number(row["us_per_gib"], " us"), _number(row["ns_per_page"], " ns"), row["problem"] or "",
        )  # fmt: skip
    Console().print(table)


def _number(value: float | None, unit: str) -> str:
    return "-" if value is None else f"{value:,.0f}{unit}"
