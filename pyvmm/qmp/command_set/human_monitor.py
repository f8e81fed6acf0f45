"""human-monitor-command: the commands of QEMU's monitor for people that scripts use most. Source: qapi/misc.json.

Also the commands that exist to be refused properly.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from pyvmm.arch.x86.page_walk import levels
from pyvmm.errors import ConfigError
from pyvmm.qmp.arguments import QmpStruct
from pyvmm.qmp.command_set import migration, run_state
from pyvmm.qmp.commands import CommandContext, command
from pyvmm.qmp.debugging import serve_gdb
from pyvmm.qmp.errors import QmpError
from pyvmm.qmp.human.device_registers import device_lines
from pyvmm.qmp.human.examine import BadExpression, examine, parse_address
from pyvmm.qmp.human.interrupt_chips import lapic_lines, pic_lines
from pyvmm.qmp.human.memory_tree import tree_lines
from pyvmm.qmp.human.page_tables import memory_lines, tlb_lines
from pyvmm.qmp.human.registers import register_lines
from pyvmm.qmp.session import Session
from pyvmm.qmp.version import version_info

if TYPE_CHECKING:
    from pyvmm.qmp.monitor import Monitor


class HumanMonitorArguments(QmpStruct):
    """One line as a person would type it; ``cpu_index`` is what register names mean."""

    command_line: str
    cpu_index: int = 0


class ScreendumpArguments(QmpStruct):
    """QEMU's."""

    filename: str


Handler = Callable[[CommandContext, str, int], list[str]]


@command("human-monitor-command")
def human_monitor_command(context: CommandContext, arguments: HumanMonitorArguments) -> str:
    """The lines it prints, each ended by CR LF; mistakes are told there, too, as a person would see them."""
    if not 0 <= arguments.cpu_index < len(context.machine.vcpus):
        raise QmpError("Parameter 'cpu-index' expects a CPU number")
    lines = _carry_out(context, arguments.command_line.strip(), arguments.cpu_index)
    return "".join(line + "\r\n" for line in lines)


@command("screendump")
def screendump(context: CommandContext, arguments: ScreendumpArguments) -> None:
    """Refused: there is nothing to see."""
    raise QmpError("There is no console to take a screendump from: the machine has a serial line only")


def human_lines(monitor: Monitor, line: str, cpu: int) -> list[str]:
    """The lines of one command of somebody who is not at a QMP socket: a debugger's ``monitor``."""
    session = Session(0, lambda _session, _request, _oob: None)
    return _carry_out(CommandContext(monitor.machine, monitor, session), line.strip(), cpu)


def _carry_out(context: CommandContext, line: str, cpu: int) -> list[str]:
    name, slash, rest = line.partition("/")
    if slash and name.strip() in ("x", "xp"):
        name, rest = name.strip(), "/" + rest
    else:
        name, _, rest = line.partition(" ")
    if name == "info":
        topic, _, rest = rest.strip().partition(" ")
        if not topic:
            return [f"info {known}" for known in sorted(_INFO)]
        handler = _INFO.get(topic)
        name = f"info {topic}"
    else:
        handler = _COMMANDS.get(name)
    if not line:
        return []
    if handler is None:
        return [f"unknown command: '{name}'"]
    try:
        return handler(context, rest.strip(), cpu)
    except QmpError as error:
        return [f"Error: {error}"]
    except BadExpression as error:
        return [str(error), f'Try "help {name}" for more information']


def _registers(context: CommandContext, words: str, cpu: int) -> list[str]:
    vcpus = context.machine.vcpus
    if words and words != "-a":
        if not (words.isascii() and words.isdecimal() and len(words) < 5 and int(words) < len(vcpus)):
            return ["Invalid CPU index" if words.isdecimal() else "invalid char in expression"]
        cpu = int(words)
    with context.machine.standing_still():
        chosen = vcpus if words == "-a" else [vcpus[cpu]]
        return [line for vcpu in chosen for line in register_lines(vcpu)]


def _lapic(context: CommandContext, words: str, cpu: int) -> list[str]:
    vcpus = context.machine.vcpus
    if words:
        if not (words.isascii() and words.isdecimal() and len(words) < 5 and int(words) < len(vcpus)):
            return ["No local APIC"]  # QEMU means APIC IDs; ours are the vCPUs' numbers
        cpu = int(words)
    with context.machine.standing_still():
        return lapic_lines(vcpus[cpu])


def _pic(context: CommandContext, words: str, cpu: int) -> list[str]:
    with context.machine.standing_still():
        return pic_lines(context.machine.vm)


def _mem(context: CommandContext, words: str, cpu: int) -> list[str]:
    with context.machine.standing_still():
        return memory_lines(context.machine.memory, context.machine.vcpus[cpu].get_sregs())


def _tlb(context: CommandContext, words: str, cpu: int) -> list[str]:
    with context.machine.standing_still():
        return tlb_lines(context.machine.memory, context.machine.vcpus[cpu].get_sregs())


def _walk(context: CommandContext, words: str, cpu: int) -> list[str]:
    vcpu = context.machine.vcpus[cpu]
    with context.machine.standing_still():
        sregs = vcpu.get_sregs()
        address = parse_address(words, vcpu.get_regs())
        return list(levels(context.machine.memory, sregs, address))


def _status(context: CommandContext, words: str, cpu: int) -> list[str]:
    state = context.machine.run_state.value
    if state in ("running", "paused"):
        return [f"VM status: {state}"]
    return [f"VM status: paused ({state})"]


def _cpus(context: CommandContext, words: str, cpu: int) -> list[str]:
    return [
        f"{'*' if t.vcpu.index == cpu else ' '} CPU #{t.vcpu.index}: thread_id={t.thread_id or 0}"
        for t in context.machine.threads
    ]


def _mtree(context: CommandContext, words: str, cpu: int) -> list[str]:
    if words not in ("", "-f"):
        return [f"unsupported option {words}"]
    return tree_lines(context.machine, flat=words == "-f")


def _memory_size(context: CommandContext, words: str, cpu: int) -> list[str]:
    return [f"base memory: {context.machine.memory.size}", "plugged memory: 0"]


def _x(context: CommandContext, words: str, cpu: int) -> list[str]:
    return examine(context.machine, words, physical=False, cpu=cpu)


def _xp(context: CommandContext, words: str, cpu: int) -> list[str]:
    return examine(context.machine, words, physical=True, cpu=cpu)


def _dirty_rate(context: CommandContext, words: str, cpu: int) -> list[str]:
    found = migration.query_dirty_rate(context)
    return [
        f"Status: {found.status}",
        f"Start Time: {found.start_time} (ms)",  # QEMU 7.2 says so of its seconds
        f"Sample Pages: {found.sample_pages} (per GB)",
        f"Period: {found.calc_time} (sec)",
        f"Mode: {found.mode}",
        f"Dirty rate: {'(not ready)' if found.dirty_rate is None else f'{found.dirty_rate} (MB/s)'}",
    ]


def _calc_dirty_rate(context: CommandContext, words: str, cpu: int) -> list[str]:
    *flags, seconds = words.split() or [""]
    if not (seconds.isascii() and seconds.isdecimal() and len(seconds) < 4 and 1 <= int(seconds) <= 60):
        return ["Incorrect period length specified!"]
    modes: dict[str, migration.DirtyRateMode] = {"-r": "dirty-ring", "-b": "dirty-bitmap"}
    if len(flags) > 1 or any(flag not in modes for flag in flags):
        return ["Either dirty ring or dirty bitmap can be specified!"]
    mode = modes[flags[0]] if flags else None
    migration.calc_dirty_rate(context, migration.CalcDirtyRateArguments(calc_time=int(seconds), mode=mode))
    return [
        f"Starting dirty rate measurement with period {int(seconds)} seconds",
        "[Please use 'info dirty_rate' to check results]",
    ]


def _gdbserver(context: CommandContext, words: str, cpu: int) -> list[str]:
    try:
        address = serve_gdb(context.monitor, words or "tcp:localhost:1234")
    except ConfigError as error:
        return [f"Could not open gdbserver on device '{words}': {error}"]
    return ["Disabled gdbserver" if address is None else f"Waiting for gdb connection on device '{address}'"]


def _silently(handler: Callable[[CommandContext], None]) -> Handler:
    def carry_out(context: CommandContext, words: str, cpu: int) -> list[str]:
        handler(context)
        return []

    return carry_out


_INFO: dict[str, Handler] = {
    "cpus": _cpus,
    "dirty_rate": _dirty_rate,
    "devices": lambda context, words, cpu: device_lines(context.machine, words),
    "kvm": lambda context, words, cpu: ["kvm support: enabled"],
    "lapic": _lapic,
    "mem": _mem,
    "memory_size_summary": _memory_size,
    "mtree": _mtree,
    "name": lambda context, words, cpu: [context.machine.config.name],
    "pic": _pic,
    "registers": _registers,
    "status": _status,
    "tlb": _tlb,
    "walk": _walk,
    "version": lambda context, words, cpu: [version_info().package],
}

_COMMANDS: dict[str, Handler] = {
    "calc_dirty_rate": _calc_dirty_rate,
    "c": _silently(run_state.cont),
    "cont": _silently(run_state.cont),
    "gdbserver": _gdbserver,
    "help": lambda context, words, cpu: sorted([*_COMMANDS, *(f"info {topic}" for topic in _INFO)]),
    "q": _silently(run_state.quit_),
    "quit": _silently(run_state.quit_),
    "s": _silently(run_state.stop),
    "stop": _silently(run_state.stop),
    "system_powerdown": _silently(run_state.system_powerdown),
    "system_reset": _silently(run_state.system_reset),
    "x": _x,
    "xp": _xp,
}
