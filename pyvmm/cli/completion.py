"""``pyvmm completion``: what a shell has to know to complete pyvmm's words."""

from __future__ import annotations

import argparse
from typing import Any

SHELLS = ("bash", "zsh", "tcsh")


def add_parser(subparsers: Any) -> None:
    """Register the subcommand."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "completion",
        help="print a shell's completions",
        description='In a shell\'s start-up file: eval "$(pyvmm completion bash)"',
    )
    parser.add_argument("shell", choices=SHELLS, help="which shell's")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print them."""
    import shtab

    from pyvmm.cli import build_parser

    print(shtab.complete(build_parser(), shell=args.shell))
    return 0
