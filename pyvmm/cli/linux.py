"""``pyvmm linux``: the tiny Linux in one word, to a shell or to run commands in it."""

from __future__ import annotations

import argparse
import os
from typing import TYPE_CHECKING, Any

import msgspec

from pyvmm.arch.x86.linux_quirks import linux_additions, split_removals
from pyvmm.cli.device_options import KERNEL_ADDRESS, devices_of, settle_address
from pyvmm.cli.exec_console import CommandResult, ExecConsole, check_command_line, exec_argument, exec_script
from pyvmm.cli.machine_options import (
    add_machine_options,
    explain_ending,
    parse_cpus,
    parse_quirks,
    parse_timeout,
    resolve_quirks,
    run_machine,
)
from pyvmm.cli.messages import complain
from pyvmm.cli.migration_options import is_incoming, resolve_dirty_log
from pyvmm.errors import EXIT_REFUSED, ConfigError
from pyvmm.machine.config import DEFAULT_MEMORY, DebugExitConfig, MachineConfig, parse_debug_exit, parse_size
from pyvmm.machine.console_output import ConsoleOutput
from pyvmm.machine.device_config import DiskConfig, has_card
from pyvmm.machine.ending import Ending
from pyvmm.machine.tiny_linux import find_initramfs, find_kernel, find_root_disk, root_disk_words

if TYPE_CHECKING:
    from pyvmm.machine.machine import Machine


STDOUT = 1
NOT_RUN = "commands-not-run"


def add_parser(subparsers: Any) -> None:
    """Declare the subcommand."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "linux",
        help="boot the tiny Linux",
        description="Boot the tiny Linux to a shell on this terminal (Ctrl-A x quits), or run commands in it:"
        " with --exec only their output is printed and the last one's exit status is pyvmm's.",
    )
    parser.add_argument("--exec", metavar="CMD", action="append", default=[], help="run CMD by sh; may be repeated")
    parser.add_argument("--kernel", metavar="FILE", help="another kernel (vmlinux or bzImage)")
    parser.add_argument("--root", choices=("initramfs", "disk"), default="initramfs",
                        help="the root file system: unpacked into memory (default), or a read-only disk, the last one")
    parser.add_argument("--fast", action="store_true",
                        help="start from a snapshot of a booted Linux; the first start in a way boots, and keeps one")
    parser.add_argument("--console", action="store_true", help="with --exec: show the kernel's messages on stderr")
    parser.add_argument("--summary", action="store_true", help="end with a table: what was run, how long it took")
    parser.add_argument("--acpi", action="store_true", help="hand ACPI tables over (the tiny kernel ignores them)")
    add_machine_options(parser)
    parser.add_argument("kernel_args", nargs="*", metavar="-- KERNEL ARGS", help="added to the kernel command line;"
                        " -NAME removes an addition of pyvmm's that starts with NAME")  # fmt: skip
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run it; the status of the process."""
    console = ExecConsole(args.exec)
    quirks = resolve_quirks(parse_quirks(args.quirks))
    config = config_of(args, quirks)

    def prepare(machine: Machine) -> ConsoleOutput | None:
        machine.backend.observe = console
        console.restart_clock()
        if not args.exec or args.summary:
            return None
        # Through a writer of its own: a reader that stops must not stop the machine's loop.
        console.write = output = ConsoleOutput(STDOUT, machine.backend.gate)
        return output

    def conclude(ending: Ending) -> Ending:
        console.finish(ending.value & 0xFF if ending.kind == "debug-exit" and ending.value is not None else None)
        return _concluded(console, ending) if args.exec else ending

    build = None
    if args.fast:
        from pyvmm.cli.fast_linux import fast_machine

        script = exec_script(args.exec) if args.exec else ""

        def build(config: MachineConfig, quirks: frozenset[str]) -> Machine:
            return fast_machine(config, quirks, script)

    ending, report = run_machine(config, quirks, args, prepare, conclude, build)
    if ending.kind == NOT_RUN:
        last_words = bytes(console.log[-2000:]).decode(errors="replace")
        complain(f"pyvmm: {ending.reason}; its last words were:\n{last_words}")
    explain_ending(ending)
    if args.summary:
        _print_summary(config, report, console)
    return ending.status


def config_of(args: argparse.Namespace, quirks: frozenset[str]) -> MachineConfig:
    """The configuration that ``args`` ask for on a host with ``quirks``."""
    if args.exec and args.debug_exit is not None:
        raise ConfigError("--debug-exit cannot be moved with --exec: init reports the command's status there")
    if args.incoming and (args.exec or args.fast):
        raise ConfigError("--incoming excludes --exec and --fast: the guest that comes is running already")
    kernel, devices, root_words = find_kernel(args.kernel), devices_of(args), []
    initramfs = None
    if args.root == "disk":
        if args.initrd:
            raise ConfigError("--root disk and --initrd exclude each other: there is one root file system")
        # Last, so that the user's own disks are vda, vdb...
        root_words = root_disk_words(sum(isinstance(device, DiskConfig) for device in devices))
        devices = (*devices, DiskConfig(path=find_root_disk(), readonly=True))
    else:
        initramfs = find_initramfs(args.initrd)
    said = [*(args.append.split() if args.append else []), *args.kernel_args]
    words, removed = split_removals(said, (KERNEL_ADDRESS,))
    devices = settle_address(devices, words, removed)
    additions = linux_additions(quirks, removed, base=True, cards=has_card(devices)) + root_words
    if args.fast:
        words.append("pyvmm.wait")
    elif args.exec:
        words.append(exec_argument(args.exec))
    check_command_line(" ".join(additions + words))
    serial = args.serial
    if args.exec and serial == "stdio":
        serial = "stderr" if args.console else "null"
    memory = parse_size(args.memory, "--memory") if args.memory is not None else DEFAULT_MEMORY
    return MachineConfig(
        image=kernel,
        name=args.name or "linux",
        memory=memory,
        cpus=parse_cpus(args.smp),
        initrd=initramfs,
        append=" ".join(words),
        linux_additions=" ".join(additions),
        acpi=args.acpi,
        serial=serial,
        debug_exit=parse_debug_exit(args.debug_exit) if args.debug_exit is not None else DebugExitConfig(),
        timeout=parse_timeout(args.timeout),
        # A kernel that panics resets: without this it would boot and panic for ever, unseen.
        no_reboot=args.no_reboot or bool(args.exec),
        no_shutdown=args.no_shutdown,
        start_paused=args.start_paused,
        incoming=is_incoming(args), replica=args.colo == "secondary",
        dirty_log=resolve_dirty_log(args.dirty_log, memory),
        devices=devices,
        testdev="testdev" in args.device,
    )


def _concluded(console: ExecConsole, ending: Ending) -> Ending:
    """How the commands ended: init hands the last one's status over by debug-exit, unshifted.

    A command may well be ``poweroff``; but Linux ending before it was run is a failure.
    """
    if ending.problem is not None:
        return ending
    if ending.kind == "debug-exit" and ending.value is not None:
        return msgspec.structs.replace(ending, status=ending.value & 0xFF)
    if ending.status == 0 and ending.kind != "quit" and not console.began_all:
        reason = f"Linux ended ({ending.kind}) before it ran all commands"
        return Ending(kind=NOT_RUN, status=EXIT_REFUSED, reason=reason)
    return ending


def _print_summary(config: MachineConfig, report: dict[str, Any], console: ExecConsole) -> None:
    from rich.console import Console
    from rich.table import Table

    from pyvmm.host.profile import load_profile

    profile = load_profile()
    facts = Table(title="pyvmm linux", show_header=False)
    rows = [
        ("kernel", f"{os.path.realpath(config.image)} ({report['image_kind']})"),
        ("host", f"{profile.kind}{' (nested)' if profile.nested else ''}"),
        ("quirks used", ", ".join(report["quirks"]) or "none"),
        ("time to /init", f"{console.init_at:.1f} s" if console.init_at is not None else "not reached"),
        ("whole run", f"{report['seconds']:.1f} s, ended by {report['kind']}"),
        ("exits", _exits(report)),
    ]
    for name, value in rows:
        facts.add_row(name, value)
    commands = Table("command", "status", "after", "output", title="commands", show_lines=True)
    for result in console.results:
        commands.add_row(*_command_row(result))
    terminal = Console()
    terminal.print(facts)
    if console.results:
        terminal.print(commands)


def _exits(report: dict[str, Any]) -> str:
    cpus = report["statistics"]["cpus"]
    total, native = sum(c["exits"] for c in cpus), sum(c["exits_native"] for c in cpus)
    syscalls = sum(c["syscalls_completed"] for c in cpus)
    text = f"{total:,}, of them {native:,} served natively"
    return f"{text}, {syscalls:,} system calls completed" if syscalls else text


def _command_row(result: CommandResult) -> tuple[str, str, str, str]:
    from rich.markup import escape

    status = "did not end" if result.status is None else str(result.status)
    output = result.output.decode(errors="replace").rstrip("\n")
    return escape(result.command), status, f"{result.ended:.1f} s", escape(output)
