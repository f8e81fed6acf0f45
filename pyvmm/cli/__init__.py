"""The command line: one file per subcommand, each with ``add_parser(subparsers)`` and ``run(args)``.

Exit statuses: 0 clean end; the guest's own (debug-exit, ``linux --exec``); 124 timeout; 125 pyvmm refused or
failed, one line on stderr; 126 the guest crashed.
"""

from __future__ import annotations

import argparse
import os
import sys

from pyvmm import __version__
from pyvmm.cli import (
    bench,
    certs,
    colo,
    completion,
    diff_run,
    disk,
    doctor,
    explain,
    linux,
    machines,
    migrate,
    net,
    run,
    snapshot,
    test,
    top,
)
from pyvmm.cli.machine_options import report_failure
from pyvmm.cli.messages import complain, silence
from pyvmm.errors import EXIT_REFUSED, PyvmmError

COMMANDS = (
    run, linux, explain, diff_run, test, machines, top, migrate, colo, snapshot, net, disk, certs, bench, doctor,
    completion,
)  # fmt: skip


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
    _open_missing_streams()
    args = build_parser().parse_args(argv)
    try:
        status = int(args.run(args))
        sys.stdout.flush()  # here, where a reader that is gone can still be dealt with
        return status
    except PyvmmError as error:
        if args.debug:
            _print_traceback()
        complain(f"pyvmm: {error}")
        report_failure(args, error.exit_status, str(error))
        return error.exit_status
    except BrokenPipeError:
        silence(sys.stdout)  # whoever read our output is gone
        return EXIT_REFUSED
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        # A defect of pyvmm. Python's own status for it is 1, which a guest could mean.
        if args.debug:
            _print_traceback()
        text = " ".join(f"{type(error).__name__}: {error}".split())
        complain(f"pyvmm: internal error: {text} (pyvmm --debug shows where)")
        report_failure(args, EXIT_REFUSED, f"internal error: {text}")
        return EXIT_REFUSED


def _open_missing_streams() -> None:
    """Somebody who starts pyvmm with standard streams closed must not have /dev/kvm or guest memory in their place."""
    for fd, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(fd)
        except OSError:
            # The lowest free number is taken, which is fd: those below are open.
            os.open(os.devnull, os.O_RDWR)
            setattr(sys, name, open(fd, "w" if fd else "r", closefd=False))  # noqa: SIM115


def _print_traceback() -> None:
    import traceback

    complain(traceback.format_exc().rstrip())
