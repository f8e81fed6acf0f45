"""The way from CPL 3 into CPL 0 under stress: parked, saved and loaded in the middle, and with forgeries.

On a host without the quirks this runs as well (the CPU does it all) and must end the same.
"""

from __future__ import annotations

import random
import shlex
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from pyvmm.arch.x86.cpu_state import load_cpu, readable_msrs, save_cpu
from pyvmm.host.profile import load_profile
from pyvmm.machine.builder import build_machine, install_kick_signal
from pyvmm.machine.config import MachineConfig
from pyvmm.machine.machine import Machine
from pyvmm.machine.run_state import RunState
from pyvmm.native import lib
from tests.framework.moving import twin_of

GUESTS = Path(__file__).parents[2] / "guests"
SOURCES = Path(__file__).parent / "syscall_storm"
ROUNDS = 2000
STATUS_GOOD = 21
CFLAGS = shlex.split(
    "-std=gnu11 -O2 -march=x86-64 -m64 -ffreestanding -fno-pie -fno-stack-protector -fcf-protection=none"
    " -fno-asynchronous-unwind-tables -fno-tree-loop-distribute-patterns -mgeneral-regs-only -mno-red-zone"
)


def _build(folder: Path, *defines: str) -> str:
    """Compile the storm against the guests' library (``make guests`` has built it)."""
    objects = []
    for source in (SOURCES / "main.c", SOURCES / "user.c", GUESTS / "ring3" / "syscall.S"):
        target = folder / f"{source.stem}.o"
        command = ["gcc", f"-I{SOURCES}", f"-I{GUESTS}/lib", *defines, *CFLAGS, "-c", "-o", str(target), str(source)]
        subprocess.run(command, check=True)
        objects.append(str(target))
    elf64, elf32 = folder / "storm.elf64", folder / "storm.elf"
    link = "ld -m elf_x86_64 -static -nostdlib --build-id=none -z noexecstack -z max-page-size=4096"
    inputs = [str(GUESTS / "build/lib/start.o"), *objects, str(GUESTS / "build/lib.a")]
    script = str(GUESTS / "lib/multiboot.ld")
    subprocess.run([*link.split(), "--no-warn-rwx-segments", "-T", script, "-o", str(elf64), *inputs], check=True)
    subprocess.run(["objcopy", "-O", "elf32-i386", str(elf64), str(elf32)], check=True)
    return str(elf32)


def _machine(image: str) -> Machine:
    install_kick_signal()
    config = MachineConfig(image=image, serial="null", memory=16 << 20, timeout=60.0)
    return build_machine(config, frozenset(load_profile().quirks))


def _every(machine: Machine, seconds: Callable[[], float], action: Callable[[], None]) -> None:
    def tick() -> None:
        if machine.run_state is RunState.RUNNING:
            action()
            machine.loop.call_later(seconds(), tick)

    machine.loop.call_later(seconds(), tick)


@pytest.mark.parametrize("fmask", [0x47700, 0], ids=["fmask", "no-fmask"])
def test_parked_saved_and_loaded_in_the_middle_of_system_calls(tmp_path: Path, fmask: int) -> None:
    """The seed is printed; which instruction a pause hits is the host's choice anyway."""
    seed = random.randrange(1 << 32)
    print("seed", seed)
    chance = random.Random(seed)
    with _machine(_build(tmp_path, f"-DFMASK={fmask:#x}")) as machine:
        vcpu = machine.vcpus[0]
        msrs = readable_msrs(vcpu, machine.system.msr_indices())
        pauses = 0

        def disturb() -> None:
            nonlocal pauses
            machine.pause()
            pauses += 1
            entry = vcpu.native
            if chance.random() < 0.5:
                load_cpu(vcpu, save_cpu(vcpu, msrs))
            # Settled: whoever reads this state needs no work-around to go on with it.
            assert not lib.pv_vcpu_settle_user_entry(entry)
            machine.resume()

        _every(machine, lambda: chance.uniform(0, 0.004), disturb)
        ending = machine.run()
        assert (ending.kind, ending.value) == ("debug-exit", STATUS_GOOD)
        quirks = machine.quirks
        if "syscall-entry" in quirks:
            assert pauses > 5  # elsewhere system calls are over before there is time for that
            assert vcpu.native.syscalls == ROUNDS + 1
        if "int-entry" in quirks:
            assert vcpu.native.interrupts == ROUNDS


def _run_until_ud_waits(machine: Machine, chance: random.Random) -> bool:
    """Park it again and again until the #UD of an INT n waits for delivery; paused then. False: the guest has ended."""
    vcpu = machine.vcpus[0]

    def look() -> None:
        machine.parking.park()
        events = vcpu.get_events()
        waits = events.exception_injected or events.exception_pending
        if waits and events.exception_nr == 6 and vcpu.get_sregs().cs.selector & 3 == 3:
            machine.pause()
            machine.loop.stop()
        machine.parking.let_run()

    _every(machine, lambda: chance.uniform(0, 0.001), look)
    machine.start()
    machine.loop.run()
    return machine.ending is None


def test_moved_while_the_ud_of_an_int_waits_for_delivery(tmp_path: Path) -> None:
    """The very moment: KVM has made a #UD of an INT n and not delivered it. About one pause in a hundred hits it."""
    if "int-entry" not in load_profile().quirks:
        pytest.skip("this host's INT n raises no #UD")
    seed = random.randrange(1 << 32)
    print("seed", seed)
    chance = random.Random(seed)
    image = _build(tmp_path, "-DFMASK=0x47700")
    moves = 0
    for _ in range(20):
        machine = _machine(image)
        try:
            while _run_until_ud_waits(machine, chance):
                moves += 1
                twin = twin_of(machine)
                cpu = twin.vcpus[0]
                machine.close()
                machine = twin
                # What is saved knows nothing of it: the INT n is still to come, on whatever host.
                events, regs = cpu.get_events(), cpu.get_regs()
                assert not events.exception_injected and not events.exception_pending
                assert machine.memory.read(regs.rip, 2) == b"\xcd\x80"  # this guest's addresses are physical ones
            assert machine.ending is not None
            assert (machine.ending.kind, machine.ending.value) == ("debug-exit", STATUS_GOOD)
        finally:
            machine.close()
        if moves >= 3:
            return
    pytest.fail(f"in twenty storms only {moves} pauses hit that moment")
