"""For developers: a command, or a shell, on the emulated kvm_amd host.

    .venv/bin/python -m tests.lab.run_in_lab 'pyvmm doctor'          a command in the checkout; its output and status
    .venv/bin/python -m tests.lab.run_in_lab                         a shell; ``exit`` ends the lab, Ctrl-A x kills it

Logs, and what the command leaves in /lab/results, are in build/lab/run/0/.
"""

from __future__ import annotations

import argparse
import sys

from pyvmm.errors import HostError
from tests.lab.nested_host import run_in_lab
from tests.lab.root_images import REPOSITORY


def main() -> int:
    """The command's status; 124 if it did not end in its time, 125 if there can be no lab here."""
    parser = argparse.ArgumentParser(description="Run a command on an emulated kvm_amd host.")
    parser.add_argument("command", nargs="?", default="", help="for sh, in the checkout; without one: a shell")
    parser.add_argument("--deadline", type=float, default=900.0, help="seconds until the lab is ended (900)")
    arguments = parser.parse_args()
    interactive = not arguments.command
    shell = "stty -F /dev/ttyS1 sane; exec setsid -c bash -i < /dev/ttyS1 > /dev/ttyS1 2>&1"
    try:
        run = run_in_lab(
            arguments.command or shell, REPOSITORY / "build/lab/run", arguments.deadline, interactive
        )  # fmt: skip
    except HostError as error:
        print(f"run_in_lab: {error}", file=sys.stderr)
        return 125
    if run.status is None:
        print(run.why_it_failed(), file=sys.stderr)
        return 124
    if not interactive:
        print(run.output(), end="")
    print(f"run_in_lab: {run.seconds:.1f} s, status {run.status}", file=sys.stderr)
    return run.status


if __name__ == "__main__":
    sys.exit(main())
