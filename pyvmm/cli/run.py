"""``pyvmm run IMAGE``: run any guest image, or a folder of ``guests/``."""

from __future__ import annotations

import argparse
import os
from typing import TYPE_CHECKING, Any

from pyvmm.arch.x86.linux_quirks import linux_additions, split_removals
from pyvmm.cli.device_options import KERNEL_ADDRESS, devices_of, settle_address
from pyvmm.cli.machine_options import (
    add_machine_options,
    explain_ending,
    parse_cpus,
    parse_quirks,
    parse_timeout,
    resolve_quirks,
    run_machine,
)
from pyvmm.cli.migration_options import is_incoming, resolve_dirty_log
from pyvmm.machine.config import (
    DEFAULT_MEMORY,
    DebugExitConfig,
    MachineConfig,
    parse_debug_exit,
    parse_number,
    parse_size,
)
from pyvmm.machine.device_config import has_card

if TYPE_CHECKING:
    from pyvmm.machine.guest_catalog import GuestEntry


def add_parser(subparsers: Any) -> None:
    """Declare the subcommand."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "run",
        help="run a guest image",
        description="Run IMAGE: a Linux vmlinux or bzImage, a PVH or Multiboot ELF, a flat real-mode image, or a"
        " folder of guests/ (its guests.toml gives memory, vCPUs, command line and timeout).",
    )
    add_image_options(parser)
    parser.set_defaults(run=run)


def add_image_options(parser: argparse.ArgumentParser) -> None:
    """``IMAGE`` and all that says what machine it runs in; :func:`config_of` reads them."""
    parser.add_argument("image", metavar="IMAGE")
    parser.add_argument("--load-address", metavar="ADDR", help="where a flat image goes (default 0x7c00)")
    parser.add_argument("--guest-decompress", action="store_true", help="let a bzImage unpack itself in the guest")
    add_machine_options(parser)


def run(args: argparse.Namespace) -> int:
    """Run it; the status of the process."""
    quirks = resolve_quirks(parse_quirks(args.quirks))
    ending, _ = run_machine(config_of(args, quirks), quirks, args)
    explain_ending(ending)
    return ending.status


def config_of(args: argparse.Namespace, quirks: frozenset[str]) -> MachineConfig:
    """The configuration that ``args`` ask for on a host with ``quirks``.

    What is not said comes from guests.toml, then from defaults.
    """
    image, guest = args.image, None
    if os.path.isdir(image):
        guest = _find_guest(image)
        image = str(guest.image)
    default_memory = guest.memory_bytes if guest else DEFAULT_MEMORY
    load_address = None
    if args.load_address is not None:
        load_address = parse_number(args.load_address, "--load-address", maximum=0xFFFFF)
    append = args.append if args.append is not None else (guest.append if guest else "")
    words, removed = split_removals(append.split(" "), (KERNEL_ADDRESS,)) if append else ([], [])
    # Who debugs takes their time.
    guests_own = guest.timeout if guest is not None and args.gdb is None else None
    devices = settle_address(devices_of(args), words, removed)
    memory = parse_size(args.memory, "--memory") if args.memory is not None else default_memory
    return MachineConfig(
        image=image,
        name=args.name or os.path.basename(os.path.normpath(args.image)),
        memory=memory,
        cpus=parse_cpus(args.smp) if args.smp is not None else (guest.cpus if guest else 1),
        initrd=args.initrd,
        append=" ".join(words),
        linux_additions=" ".join(linux_additions(quirks, removed, base=False, cards=has_card(devices))),
        load_address=load_address,
        guest_decompress=args.guest_decompress,
        acpi=not args.no_acpi,
        serial=args.serial,
        debug_exit=parse_debug_exit(args.debug_exit) if args.debug_exit is not None else DebugExitConfig(),
        timeout=parse_timeout(args.timeout) if args.timeout is not None else guests_own,
        no_reboot=args.no_reboot,
        no_shutdown=args.no_shutdown,
        start_paused=args.start_paused,
        incoming=is_incoming(args), replica=args.colo == "secondary",
        dirty_log=resolve_dirty_log(args.dirty_log, memory),
        devices=devices,
        testdev="testdev" in args.device,
    )


def _find_guest(folder: str) -> GuestEntry:
    from pathlib import Path

    from pyvmm.machine.guest_catalog import find_guest

    return find_guest(Path(folder))
