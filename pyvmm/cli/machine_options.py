"""Options that every command which starts a machine has, and the run itself with signals, console, report."""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from pyvmm import __version__
from pyvmm.cli.colo_options import add_colo_options, colo_config_of, set_up_colo
from pyvmm.cli.device_options import add_device_options
from pyvmm.cli.messages import complain
from pyvmm.cli.migration_options import add_migration_options, take_guest_in
from pyvmm.cli.monitor_options import add_monitor_options, endpoints_of, is_confined
from pyvmm.errors import EXIT_GUEST_CRASHED, ConfigError
from pyvmm.host.profile import QUIRKS
from pyvmm.machine.config import MachineConfig
from pyvmm.machine.console_output import FLUSH_DEADLINE, ConsoleOutput
from pyvmm.machine.device_config import has_card
from pyvmm.machine.ending import Ending

if TYPE_CHECKING:
    from pyvmm.machine.machine import Machine
    from pyvmm.qmp.endpoints import Endpoint



def add_machine_options(parser: argparse.ArgumentParser) -> None:
    """``--memory`` and the others that ``run`` and ``linux`` share."""
    add = parser.add_argument
    add("--memory", "-m", metavar="SIZE", help="guest memory, for example 128M (the default) or 2G")
    add("--smp", metavar="N", help="number of vCPUs (default 1)")
    add("--initrd", metavar="FILE", help="initial RAM disk (Linux), or the first module (Multiboot)")
    add("--append", metavar="TEXT", default=None, help="kernel command line")
    add("--debug-exit", metavar="PORT[,SIZE]", help="isa-debug-exit port (default 0xf4)")
    add("--no-acpi", action="store_true", help="do not hand ACPI tables to the guest")
    add_device_options(parser)
    add_migration_options(parser)
    add_colo_options(parser)
    add_run_options(parser)
    add("--quirks", metavar="auto|none|LIST", default="auto",
        help=f"work-arounds for odd hosts: auto (default), none, or some of {','.join(QUIRKS)}")  # fmt: skip


def add_run_options(parser: argparse.ArgumentParser) -> None:
    """Options about a run, which do not change what the machine is."""
    add = parser.add_argument
    add("--serial", metavar="WHERE", default="stdio", help="stdio (default), null, file:PATH or unix:PATH")
    add("--timeout", metavar="S", help="end the guest after S seconds, status 124")
    add("--no-reboot", action="store_true", help="end instead of restarting when the guest resets")
    add("--name", metavar="NAME", help="name of the machine, by which pyvmm list, stop, quit... find it")
    add_monitor_options(parser)
    add("--sandbox", choices=("auto", "on", "off"), default="auto",
        help="once set up, drop capabilities and refuse every system call that a machine has no use for: auto (default)"
        " with --colo, on always, off never")  # fmt: skip
    add("--report", metavar="FILE", help="write how it ended to FILE, as JSON")
    add("--trace", metavar="PATTERN", action="append", default=[],
        help="trace events, for example 'vcpu_*,file=t.json,format=chrome'; may be repeated")  # fmt: skip


def parse_timeout(text: str | None) -> float | None:
    """Seconds of ``--timeout``."""
    if text is None:
        return None
    try:
        return float(text)
    except ValueError:
        raise ConfigError(f"--timeout {text!r}: write a number of seconds") from None


def parse_cpus(text: str | None) -> int:
    """Number of ``--smp``."""
    if text is None:
        return 1
    try:
        return int(text)
    except ValueError:
        raise ConfigError(f"--smp {text!r}: write a number of vCPUs") from None


def parse_quirks(text: str) -> frozenset[str] | None:
    """``None`` for auto; ConfigError names an unknown quirk."""
    if text == "auto":
        return None
    if text == "none":
        return frozenset()
    chosen = frozenset(text.split(","))
    unknown = sorted(chosen - set(QUIRKS))
    if unknown:
        raise ConfigError(f"--quirks {unknown[0]!r}: the quirks are {', '.join(QUIRKS)}")
    return chosen


def resolve_quirks(chosen: frozenset[str] | None) -> frozenset[str]:
    """What ``--quirks`` says, or the host profile."""
    if chosen is not None:
        return chosen
    from pyvmm.host.profile import load_profile

    return frozenset(load_profile().quirks)


def run_machine(
    config: MachineConfig,
    quirks: frozenset[str],
    args: argparse.Namespace,
    prepare: Callable[[Machine], ConsoleOutput | None] | None = None,
    conclude: Callable[[Ending], Ending] | None = None,
    build: Callable[[MachineConfig, frozenset[str]], Machine] | None = None,
) -> tuple[Ending, dict[str, Any]]:
    """Build, run, report. Returns how it ended and the report (also when no ``--report`` was asked for).

    ``prepare`` sees the machine before it runs and may return a further output, which is flushed and closed here.
    ``conclude`` may give the ending another status and reason; the report has those. ``build`` makes the machine, if it
    is not to be made as usual.
    """
    if args.trace:
        from pyvmm.trace import control

        for option in args.trace:
            control.enable_from_option(option)
    try:
        with endpoints_of(config, args) as (named, endpoints):
            return _run(named, quirks, endpoints, args, prepare, conclude, build)
    finally:
        if "pyvmm.trace.control" in sys.modules:  # a QMP client may have turned events on
            from pyvmm.trace import control

            control.close_all()


def _run(
    config: MachineConfig,
    quirks: frozenset[str],
    endpoints: list[Endpoint],
    args: argparse.Namespace,
    prepare: Callable[[Machine], ConsoleOutput | None] | None,
    conclude: Callable[[Ending], Ending] | None,
    build: Callable[[MachineConfig, frozenset[str]], Machine] | None,
) -> tuple[Ending, dict[str, Any]]:
    from pyvmm.cli.terminal import EscapeKeys, raw_terminal, say
    from pyvmm.machine.builder import build_machine, install_kick_signal
    from pyvmm.qmp.monitor import Monitor

    report_path: str | None = args.report
    if report_path is not None:
        _check_writable(report_path)
    colo = colo_config_of(args) if hasattr(args, "colo") else None
    install_kick_signal()
    with (build or build_machine)(config, quirks) as machine, contextlib.ExitStack() as outputs:
        if endpoints or config.incoming or colo is not None or args.gdb is not None:
            monitor = outputs.enter_context(Monitor(machine, endpoints))
            if args.gdb is not None:
                from pyvmm.qmp.debugging import serve_gdb

                serve_gdb(monitor, args.gdb)
            if colo is not None:
                set_up_colo(monitor, colo, args)
            if config.incoming:
                take_guest_in(monitor, args)
        further = prepare(machine) if prepare is not None else None
        if further is not None:
            outputs.callback(further.close)

        def quit_() -> None:
            machine.request_end(Ending(kind="quit", reason="quit from the console", asked_by="console"))

        def flushed(seconds: float) -> bool:
            return machine.backend.flush(seconds) and (further is None or further.flush(seconds))

        with _ending_signals(machine) as signalled:
            with contextlib.ExitStack() as stack:
                if config.serial == "stdio" and stack.enter_context(raw_terminal()):
                    machine.backend.filter_input = EscapeKeys(quit_, say)
                    machine.backend.interactive = True
                confine(machine, args)
                ending = machine.run()
            seconds = time.monotonic() - machine.started_at
            if conclude is not None:
                ending = conclude(ending)
            if (config.serial == "stdio" or further is not None) and ending.kind not in ("quit", "timeout"):
                # As with any program in a pipe, its reader may take its time; until somebody loses patience.
                while not flushed(0.1) and not signalled:
                    machine.loop.run_once(0.0)  # a replication may have something to finish
                ending = signalled[0] if signalled else ending
            else:
                flushed(FLUSH_DEADLINE)
        if further is not None and further.problem is not None:
            complain(f"pyvmm: output is incomplete: {further.problem}")
        if machine.backend.problem is not None:
            complain(f"pyvmm: --serial {config.serial}: output is incomplete: {machine.backend.problem}")
        report = _report(machine, ending, seconds)
        if report_path is not None:
            args.reported = True
            write_report(report_path, report)  # here: a disk that hangs may keep the machine from being closed
    return ending, report


def confine(machine: Machine, args: argparse.Namespace) -> None:
    """What ``--sandbox`` asks for, for good: everything that needs more must have been done."""
    if is_confined(args):
        from pyvmm.host.sandbox import enter_sandbox

        enter_sandbox(cards=has_card(machine.config.devices))


@contextlib.contextmanager
def _ending_signals(machine: Machine) -> Iterator[list[Ending]]:
    """SIGINT, SIGTERM and SIGHUP end the machine in order; the shell sees 128 plus the signal's number.

    Yields the list of ends that were asked for in this way.
    """
    signalled: list[Ending] = []

    def handler(number: int, _frame: object) -> None:
        reason = f"ended by {signal.Signals(number).name}"
        ending = Ending(kind="quit", status=128 + number, reason=reason, asked_by="signal")
        signalled.append(ending)
        machine.request_end(ending)

    # What is ignored stays so: that is how nohup and shells keep a background job alive.
    wanted = [s for s in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP) if signal.getsignal(s) != signal.SIG_IGN]
    saved = {s: signal.signal(s, handler) for s in wanted}
    try:
        yield signalled
    finally:
        for number, old in saved.items():
            signal.signal(number, old)


def _report(machine: Machine, ending: Ending, seconds: float) -> dict[str, Any]:
    from pyvmm.machine.statistics import machine_statistics

    image = machine.image
    return {
        "pyvmm": __version__,
        "name": machine.config.name,
        "image": machine.config.image,
        "image_kind": image.kind if image else None,
        "loader_notes": list(image.notes) if image else [],
        "kind": ending.kind,
        "status": ending.status,
        "reason": ending.reason,
        "guest_value": ending.value,
        "seconds": round(seconds, 3),
        "quirks": sorted(machine.quirks),
        "run_state": machine.run_state.value,
        "statistics": machine_statistics(machine),
        "crash": ending.crash,
    }


def _check_writable(path: str) -> None:
    """Before anything runs: a report that cannot be written must not cost the run."""
    folder = os.path.dirname(path) or "."
    if os.path.isdir(path):
        raise ConfigError(f"--report {path}: is a folder; name a file in it")
    if _is_special(path):
        if not os.access(path, os.W_OK):
            raise ConfigError(f"--report {path}: is not writable")
    elif not os.access(folder, os.W_OK):
        raise ConfigError(f"--report {path}: its folder {folder} does not exist or is not writable")


def _is_special(path: str) -> bool:
    """Whether ``path`` is to be written into, not replaced: /dev/null, /dev/stdout, a FIFO, a symbolic link."""
    return os.path.islink(path) or (os.path.exists(path) and not os.path.isfile(path))


def write_report(path: str, report: dict[str, Any]) -> None:
    """Write ``report`` as JSON; a regular file is replaced, whole or not at all."""
    import msgspec

    replace = not _is_special(path)
    partial = f"{path}.{os.getpid()}.partial" if replace else path
    try:
        with open(partial, "wb") as out:
            out.write(msgspec.json.format(msgspec.json.encode(report), indent=2) + b"\n")
        if replace:
            os.replace(partial, path)
    except OSError as error:
        if replace:
            with contextlib.suppress(OSError):
                os.unlink(partial)
        raise ConfigError(f"--report {path}: {error.strerror}") from None


def report_failure(args: argparse.Namespace, status: int, reason: str) -> None:
    """A ``--report`` that says so if pyvmm refuses or fails: an older one must not speak for this run.

    Not where there is one already. Whether it can be written is not worth another line.
    """
    path: str | None = getattr(args, "report", None)
    if path is None or getattr(args, "reported", False):
        return
    with contextlib.suppress(ConfigError):
        _check_writable(path)
        write_report(path, {"pyvmm": __version__, "kind": "refused", "status": status, "reason": reason})


def explain_ending(ending: Ending) -> None:
    """What a person should know about an end that was not clean, on stderr."""
    if ending.problem is not None:
        complain(f"pyvmm: {ending.problem}")
    elif ending.kind in ("timeout", "quit", "incoming-failed") and ending.status:
        complain(f"pyvmm: {ending.reason}")
    elif ending.status == EXIT_GUEST_CRASHED and ending.crash is not None:
        from pyvmm.machine.crash_report import text_lines

        complain("\n".join([f"pyvmm: the guest crashed: {ending.reason}", *text_lines(ending.crash)]))
