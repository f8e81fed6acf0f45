"""``pyvmm doctor [--json] [--refresh]``: what the KVM of this host can do, and what pyvmm does about it.

``--json`` prints one object. Its members are stable; new ones may be added:

``version``       1
``pyvmm``         pyvmm's version
``usable``        guests can run here
``error``         why not, else null
``profile``       host/profile.py's HostProfile (field by field; ``quirks`` is what ``--quirks auto`` uses), or null
``surroundings``  host/surroundings.py's Surroundings: rights, memory, disk
``findings``      list of {``what``, ``value``, ``action``}: the table, for humans

Exit status: 0 if guests can run, else 125 with one line on stderr.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

from pyvmm.errors import HostError


def add_parser(subparsers: Any) -> None:
    """Add the subcommand; its ``run`` default is :func:`run`."""
    parser = subparsers.add_parser(
        "doctor",
        help="say what this host's KVM can do, and what pyvmm does about it",
        description="Runs micro guests on /dev/kvm and reports what they found. Exit status 125: no guest can run.",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    parser.add_argument("--refresh", action="store_true", help="measure again, even if measured since boot")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """0, or HostError after the report when guests cannot run here."""
    from pyvmm.host.findings import profile_findings, surroundings_findings
    from pyvmm.host.profile import HostProfile, load_profile
    from pyvmm.host.surroundings import look_around
    from pyvmm.kvm.system import System

    profile: HostProfile | None = None
    refusal: HostError | None = None
    try:
        # For real, each time: what was measured since boot says nothing about permission now.
        with System() as system, system.create_vm():
            pass
        profile = load_profile(refresh=args.refresh)
        if not profile.guests_run:
            reason = profile.notes[0] if profile.notes else "no reason known"
            refusal = HostError(f"/dev/kvm opens, but a micro guest does not run: {reason}; see pyvmm doctor --json")
    except HostError as error:
        refusal = error
    around = look_around()
    findings = surroundings_findings(around) + (profile_findings(profile) if profile else [])
    if args.json:
        _print_json(profile, around, findings, refusal)
    else:
        _print_table(findings)
    if refusal is not None:
        raise refusal
    return 0


def _print_json(profile: Any, around: Any, findings: list[Any], refusal: HostError | None) -> None:
    import msgspec

    from pyvmm import __version__

    report = {
        "version": 1,
        "pyvmm": __version__,
        "usable": refusal is None,
        "error": str(refusal) if refusal else None,
        "profile": profile,
        "surroundings": around,
        "findings": findings,
    }
    sys.stdout.write(msgspec.json.format(msgspec.json.encode(report), indent=2).decode() + "\n")


def _print_table(findings: list[Any]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title="pyvmm doctor")
    table.add_column("finding", style="bold")
    table.add_column("value", overflow="fold")
    table.add_column("what pyvmm does", overflow="fold")
    for finding in findings:
        # Text, not str: a host's own words must not be taken for rich's markup.
        table.add_row(Text(finding.what), Text(finding.value), Text(finding.action))
    Console().print(table)
