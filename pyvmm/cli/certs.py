"""``pyvmm certs FOLDER``: credentials for migration with TLS, for both sides."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any


def add_parser(subparsers: Any) -> None:
    """Declare the subcommand."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "certs",
        help="make credentials for migration with TLS",
        description="Makes an authority and a certificate for either side of a migration in FOLDER. Copy the folder to"
        " both hosts and name it with --tls-creds, or as migration parameter tls-creds.",
    )
    parser.add_argument("folder", metavar="FOLDER", type=Path)
    parser.add_argument("--host", metavar="NAME", action="append", default=[],
                        help="a name or address that destinations are reached by (default localhost)")  # fmt: skip
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """0; ConfigError if something is there already."""
    from pyvmm.migration.tls import make_credentials

    for path in make_credentials(args.folder, args.host or ["localhost", "127.0.0.1", "::1"]):
        print(path)
    return 0
