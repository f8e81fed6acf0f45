"""``pyvmm colo demo``: the whole of COLO on one machine, with clients that notice nothing.

Exit status: 0 if no connection and no acknowledged write was lost and the history is linearizable; 1 if not; 125 if it
could not be shown.
"""

from __future__ import annotations

import argparse
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pyvmm.errors import ConfigError

if TYPE_CHECKING:
    from pyvmm.demo.outcome import Kill, VmKind

NOTICED = 1
CLIENTS_MAX = 60
"""The guest's store has room for 64 connections."""


def add_parser(commands: Any) -> None:
    """Declare it among the subcommands of ``pyvmm colo``."""
    text = "two pyvmm protect a guest, one dies, and clients notice nothing: in network namespaces of its own"
    parser: argparse.ArgumentParser = commands.add_parser("demo", help=text, description=text)
    add = parser.add_argument
    add("--vm", choices=("linux", "bare"), help="the guest: Linux with a store behind HTTP (default, if a kernel is"
        " built), or a bare-metal UDP echo")  # fmt: skip
    add("--kill", metavar="WHAT[,WHAT...]", default="primary",
        help="what fails: primary (default), secondary or link, or several of them in turns")  # fmt: skip
    add("--kills", metavar="N", type=int, help="how often (default: once each)")
    add("--mode", choices=("hybrid", "periodic"), default="hybrid", help="default: hybrid")
    add("--clients", metavar="N", type=int, default=4, help="how many talk to it (default 4)")
    add("--seconds", metavar="S", type=float, default=10.0,
        help="how long they do, round each failure (default 10)")  # fmt: skip
    # Not "report": that is a machine's, a file that says how it ended.
    add("--report", metavar="DIR", dest="report_folder", type=Path, help="for report.html and the machines' logs")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """0 or 1; see above."""
    if not 1 <= args.clients <= CLIENTS_MAX:
        raise ConfigError(f"--clients {args.clients}: has to be 1 to {CLIENTS_MAX}")
    if not 1 <= args.seconds <= 3600:
        raise ConfigError(f"--seconds {args.seconds:g}: has to be 1 to 3600")
    kill = _kinds(args.kill)
    kills = len(kill) if args.kills is None else args.kills
    if not 1 <= kills <= 10_000:
        raise ConfigError(f"--kills {kills}: has to be 1 to 10000")
    folder: Path | None = args.report_folder
    if folder is not None and folder.exists() and not folder.is_dir():
        raise ConfigError(f"--report {folder}: is a file; name a folder")
    from rich.console import Console

    from pyvmm.demo.outcome import DemoOptions
    from pyvmm.demo.run import run_demo

    def ended(number: int, _frame: object) -> None:
        sys.exit(128 + number)  # through all the context managers

    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, ended)
    options = DemoOptions(
        vm=args.vm or _default_vm(), kill=kill, kills=kills, mode=args.mode, clients=args.clients,
        seconds=args.seconds, report=folder,
    )  # fmt: skip
    outcome = run_demo(options, lambda line: print(line, flush=True))
    Console(highlight=False).print(outcome.table())
    assert outcome.verdict is not None
    for problem in outcome.verdict.problems[:10]:
        print(f"problem: {problem}")
    if folder is not None:
        from pyvmm.demo.report import write_report

        print(f"report: {write_report(outcome, folder)}")
    return 0 if outcome.ok else NOTICED


def _kinds(text: str) -> tuple[Kill, ...]:
    known: dict[str, Kill] = {"primary": "primary", "secondary": "secondary", "link": "link"}
    for word in text.split(","):
        if word not in known:
            raise ConfigError(f"--kill {text}: write primary, secondary, link, or several of them with commas")
    return tuple(known[word] for word in text.split(","))


def _default_vm() -> VmKind:
    """What can be shown here."""
    from pyvmm.demo.store import can_be_shown

    return "linux" if can_be_shown() else "bare"
