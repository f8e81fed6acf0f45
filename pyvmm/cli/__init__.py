"""The command line: one file per subcommand, each with ``add_parser(subparsers)`` and ``run(args)``.

Exit statuses: 0 clean end; the guest's own (debug-exit, ``linux --exec``); 124 timeout; 125 pyvmm refused or
failed, one line on stderr; 126 the guest crashed.
"""

from __future__ import annotations

import argparse
import sys

from pyvmm import __version__
from pyvmm.cli import doctor, linux, run
from pyvmm.errors import EXIT_REFUSED, PyvmmError

COMMANDS = (run, linux, doctor)


class _Parser(argparse.ArgumentParser):
    """argparse with pyvmm's status for wrong usage (its own is 2, which a guest could mean)."""

    def error(self, message: str) -> None:  # type: ignore[override]
        self.exit(EXIT_REFUSED, f"{self.prog}: {message} (see {self.prog} --help)\n")


def build_parser() -> argparse.ArgumentParser:
    """The whole command line."""
    parser = _Parser(prog="pyvmm", description="A small virtual machine monitor on /dev/kvm.")
    parser.add_argument("--version", action="version", version=f"pyvmm {__version__}")
    parser.add_argument("--debug", action="store_true", help="show tracebacks of pyvmm's own errors")
    subparsers = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for command in COMMANDS:
        command.add_parser(subparsers)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Entry point of the ``pyvmm`` script; returns the exit status."""
    args = build_parser().parse_args(argv)
    try:
        return int(args.run(args))
    except PyvmmError as error:
        if args.debug:
            raise
        print(f"pyvmm: {error}", file=sys.stderr)
        return error.exit_status
    except BrokenPipeError:
        # Whoever read our output is gone; say nothing more, also not at interpreter exit.
        sys.stderr.close()
        return EXIT_REFUSED
    except KeyboardInterrupt:
        return 130
