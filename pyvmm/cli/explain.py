"""``pyvmm explain IMAGE``: run a guest and tell what it does."""

from __future__ import annotations

import argparse
import dataclasses
import os
from typing import TYPE_CHECKING, Any

import msgspec

from pyvmm.cli.machine_options import explain_ending, parse_quirks, resolve_quirks, run_machine
from pyvmm.cli.run import add_image_options, config_of
from pyvmm.errors import ConfigError
from pyvmm.explain.events import KINDS, Event
from pyvmm.machine.config import MachineConfig, parse_number
from pyvmm.machine.console_output import ConsoleOutput
from pyvmm.machine.ending import Ending

if TYPE_CHECKING:
    from pyvmm.explain.narrator import Narrator
    from pyvmm.explain.symbols import Symbols
    from pyvmm.explain.telling import Teller
    from pyvmm.machine.machine import Machine

STDOUT = 1
LIMIT = 2000
LIMIT_MAX = 1_000_000
REFRESH = 0.25
"""Seconds after which an event is told that waits for others like it."""
WALKS_MAX = 16


def add_parser(subparsers: Any) -> None:
    """Declare the subcommand."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "explain",
        help="run a guest and tell what it does",
        description="Run IMAGE and tell every exit: the instruction that caused it, the device register it touched and"
        " what the value means there; how the CPU's mode changed, which interrupts came, what this host's KVM needed"
        " help with. What the guest writes to its console is told, too, not shown (--serial stdio shows it).",
    )
    add = parser.add_argument
    add("--limit", metavar="N", help=f"tell at most N events (default {LIMIT}); the guest goes on, the rest is counted")
    add("--only", metavar="KINDS", help=f"tell only these, of {','.join(KINDS)}")
    add("--about", dest="only_devices", metavar="NAMES",
        help="tell only accesses to these devices, by the names that events have (serial,rtc,...)")  # fmt: skip
    add("--step", nargs="?", const=str(LIMIT), metavar="N",
        help=f"tell every instruction of the boot CPU, the first N of them (default {LIMIT})")  # fmt: skip
    add("--walk", action="append", default=[], metavar="ADDRESS",
        help="tell the way to this linear address, or symbol, through the page tables, whenever it changes")
    add("--symbols", metavar="FILE", help="ELF file with names for addresses (default: the image)")
    add("--html", metavar="FILE", help="also write what was told as a page with a timeline")
    add("--json", action="store_true", help="an event is a line of JSON")
    add_image_options(parser)
    parser.set_defaults(run=run, serial="null")


def run(args: argparse.Namespace) -> int:
    """Run it; the status is the guest's, as of ``pyvmm run``."""
    from pyvmm.explain.telling import Teller, line
    from pyvmm.explain.watch import unseen

    kinds, limit = _chosen(args.only), _number(args.limit, "--limit", LIMIT)
    steps = _number(args.step, "--step", LIMIT) if args.step is not None else 0
    quirks = resolve_quirks(parse_quirks(args.quirks))
    config = config_of(args, quirks)
    symbols = _symbols(args, config)
    walks = [_address(text, symbols) for text in args.walk]
    if len(walks) > WALKS_MAX:
        raise ConfigError(f"--walk: {len(walks)} addresses; {WALKS_MAX} is the most")
    if args.html is not None and not os.access(os.path.dirname(args.html) or ".", os.W_OK):
        raise ConfigError(f"--html {args.html}: its folder does not exist or is not writable")
    if steps:
        if args.gdb is not None:
            raise ConfigError("--step: it and --gdb both want to be the debugger; choose one")
        config = msgspec.structs.replace(config, start_paused=True)
    outputs: list[ConsoleOutput] = []

    def write(text: str) -> None:
        if outputs:
            outputs[0](text.encode())

    devices = frozenset(args.only_devices.split(",")) if args.only_devices else frozenset()
    teller = Teller(write, limit, kinds, devices, _json_line if args.json else line)

    def build(config: MachineConfig, quirks: frozenset[str]) -> Machine:
        from pyvmm.explain.watch import WatchedBus
        from pyvmm.machine.builder import build_machine

        return build_machine(config, quirks, make_bus=WatchedBus)

    watched: list[tuple[Machine, Narrator]] = []

    def prepare(machine: Machine) -> ConsoleOutput:
        output = ConsoleOutput(STDOUT, machine.backend.gate)
        outputs.append(output)
        watched.append((machine, _attach(machine, quirks, symbols, teller, walks, steps)))
        return output

    def conclude(ending: Ending) -> Ending:
        for machine, narrator in watched:
            narrator.ended(ending.reason)
            teller.counts.update(unseen(machine))
        teller.flush()
        if not args.json:
            write("\n" + "\n".join(["In all:", *teller.summary()]) + "\n")
        return ending

    ending, _ = run_machine(config, quirks, args, prepare, conclude, build)
    if args.html is not None:
        _write_page(args.html, config, teller, ending)
    explain_ending(ending)
    return ending.status


def _attach(
    machine: Machine, quirks: frozenset[str], symbols: Symbols, teller: Teller, walks: list[int], steps: int
) -> Narrator:
    from pyvmm.explain.narrator import Narrator
    from pyvmm.explain.watch import Watch
    from pyvmm.host.profile import EMULATED_CPL0

    narrator = Narrator(machine.memory, symbols, teller, emulated=EMULATED_CPL0 in quirks, walks=walks)
    watch = Watch(machine, narrator)
    if steps:
        from pyvmm.explain.stepper import Stepper

        machine.loop.post(Stepper(machine, narrator, steps, teller.note).begin)
    elif machine.debugger is None:
        watch.install()
        boot = machine.vcpus[0]
        narrator.looked(boot, boot.get_regs(), boot.get_sregs())

    def refresh() -> None:
        teller.flush()
        machine.loop.call_later(REFRESH, refresh)

    refresh()
    narrator.begin()
    return narrator


def _chosen(text: str | None) -> frozenset[str]:
    chosen = frozenset(text.split(",")) if text else frozenset()
    if unknown := sorted(chosen - set(KINDS)):
        raise ConfigError(f"--only {text}: there is no {unknown[0]!r}; there are {', '.join(KINDS)}")
    return chosen


def _number(text: str | None, option: str, default: int) -> int:
    if text is None:
        return default
    number = parse_number(text, option, maximum=LIMIT_MAX)
    if not number:
        raise ConfigError(f"{option} 0: at least 1")
    return number


def _symbols(args: argparse.Namespace, config: MachineConfig) -> Symbols:
    from pyvmm.explain.symbols import symbols_of

    path = args.symbols or config.image
    if args.symbols is not None and not os.access(path, os.R_OK):
        raise ConfigError(f"--symbols {path}: cannot be read")
    return symbols_of(path)


def _address(text: str, symbols: Symbols) -> int:
    known = symbols.address(text)
    if known is not None:
        return known
    if not text[:1].isdigit():
        raise ConfigError(f"--walk {text}: neither a number nor a symbol of the image")
    return parse_number(text, "--walk", maximum=(1 << 64) - 1)


def _json_line(event: Event) -> str:
    fields = {name: value for name, value in dataclasses.asdict(event).items() if name not in ("text", "characters")}
    return msgspec.json.encode(fields | {"what": event.what}).decode()


def _write_page(path: str, config: MachineConfig, teller: Teller, ending: Ending) -> None:
    from pyvmm.explain.report import page

    title = f"pyvmm explain {os.path.basename(config.image)}"
    note = f"{len(teller.told)} events, until: {ending.reason}"
    try:
        with open(path, "w", encoding="utf-8") as out:
            out.write(page(title, teller.told, teller.summary(), note))
    except OSError as error:
        raise ConfigError(f"--html {path}: {error.strerror}") from None
