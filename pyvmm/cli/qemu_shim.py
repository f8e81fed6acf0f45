"""``pyvmm-qemu``: takes the flags that runners of test images give to QEMU, runs the image as ``pyvmm run`` does.

Exit statuses are QEMU's: ``(value << 1) | 1`` for isa-debug-exit, 1 for a command line that cannot be followed, 0 for a
machine that powered off. Beyond QEMU's: 126 when the guest crashed (a triple fault or an instruction that the host
cannot run; QEMU would reset, or stand still).

Runners treat any line on standard error as a failure; so there is none unless a wish could not be followed.
"""

from __future__ import annotations

import os
import sys

from pyvmm import __version__
from pyvmm.cli import build_parser
from pyvmm.cli.messages import complain
from pyvmm.errors import ConfigError, PyvmmError

NAME = "pyvmm-qemu"
ANSWERS = {
    # Runners look for "QEMU emulator version" and a number they can compare.
    "version": f"QEMU emulator version 7.2.0 ({NAME}, pyvmm {__version__}: runs test images on KVM, is not QEMU)",
    "help": f"usage: {NAME} -kernel IMAGE [-initrd FILE] [-append TEXT] [-smp N] [-m MIB] [-serial stdio] ...",
    "machine": "Supported machines are:\npc                   pyvmm's only machine (default)",
    "cpu": "Available CPUs:\nx86 host             this host's CPU, as KVM offers it\nx86 max              the same",
    "accel": "Accelerators supported in QEMU binary:\nkvm",
    # The bus as QEMU prints it: runners grep for the quoted name.
    "device": 'Misc devices:\nname "isa-debug-exit", bus ISA\nname "pc-testdev", bus ISA',
}


def main(argv: list[str] | None = None) -> int:
    """Entry point of the ``pyvmm-qemu`` script; returns the exit status."""
    from pyvmm.testing.qemu_flags import parse_qemu_flags

    try:
        request = parse_qemu_flags(sys.argv[1:] if argv is None else argv)
        if request.query is not None:
            print(ANSWERS[request.query])
            return 0
        if request.kernel is None:
            raise ConfigError("-kernel is missing: name the image to run")
    except ConfigError as error:
        complain(f"{NAME}: {error}")
        return 1
    for note in request.notes:
        complain(f"{NAME}: {note}")
    options = [*request.run_options(), "--serial", request.serial]
    if request.debug_exit is not None:
        port, size = request.debug_exit
        options += ["--debug-exit", f"{port:#x},{size}"]
    if request.no_reboot:
        options.append("--no-reboot")
    image = request.kernel if not request.kernel.startswith("-") else os.path.join(".", request.kernel)
    # Not through pyvmm's main(): its 125 for a refusal is also the status of a guest that wrote 62.
    args = build_parser().parse_args(["run", *options, image])
    try:
        return int(args.run(args))
    except PyvmmError as error:
        complain(f"{NAME}: {error}")
        return 1
    except KeyboardInterrupt:
        return 130
