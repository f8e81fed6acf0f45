"""A machine's whole life, in this process: how it runs, stands still, resets, ends, and what it leaves."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from pyvmm.arch.x86 import layout
from pyvmm.errors import ImageError, StateError
from pyvmm.machine.config import DebugExitConfig
from pyvmm.machine.ending import Ending
from pyvmm.machine.machine import Machine
from pyvmm.machine.run_state import RunState
from pyvmm.native import lib
from tests.framework.machine_story import call, run_with
from tests.framework.port_devices import PORT, Actor, Echo
from tests.framework.real_mode import (
    COUNT_FOREVER,
    COUNTER,
    HLT_FOREVER,
    IDLE_FOREVER,
    SPIN,
    TRIPLE_FAULT,
    in8,
    out8,
    out16,
    out32,
    text,
)
from tests.unit.arch.x86.boot.images import Seg, elf

Build = Callable[..., Machine]


class TestEnds:
    @pytest.mark.parametrize("cpus", [1, 2, 4])
    def test_halted_with_interrupts_off(self, machine_of: Build, cpus: int) -> None:
        """The application processors never start; that does not keep the machine alive."""
        machine = machine_of(text(b"hi") + HLT_FOREVER, cpus=cpus)
        ending = machine.run()
        assert (ending.kind, ending.status, machine.run_state) == ("halt", 0, RunState.SHUTDOWN)
        assert machine.output == b"hi"  # type: ignore[attr-defined]

    def test_halted_with_interrupts_on_is_merely_idle(self, machine_of: Build) -> None:
        ending = machine_of(IDLE_FOREVER, timeout=1.0).run()
        assert (ending.kind, ending.status) == ("timeout", 124)

    def test_an_application_processor_that_halted_does_not_end_a_guest_whose_boot_processor_runs(
        self, machine_of: Build
    ) -> None:
        machine = machine_of(SPIN, cpus=2, timeout=1.0)
        machine.vcpus[1].set_mp_state(lib.KVM_MP_STATE_HALTED)
        assert machine.run().kind == "timeout"

    def test_the_timeout_says_where_the_guest_hangs(self, machine_of: Build) -> None:
        ending = machine_of(b"\x90" + SPIN, timeout=0.3).run()
        assert ending.kind == "timeout" and ending.crash is not None
        assert ending.crash["registers"]["rip"] == f"{0x7C01:016x}"
        assert "jmp" in ending.crash["disassembly"][0]

    @pytest.mark.parametrize("cpus", [1, 2])
    def test_triple_fault(self, machine_of: Build, cpus: int) -> None:
        machine = machine_of(TRIPLE_FAULT, cpus=cpus)
        ending = machine.run()
        assert (ending.kind, ending.status) == ("triple-fault", 126)
        assert machine.run_state is RunState.GUEST_PANICKED
        assert ending.crash is not None and "registers" in ending.crash

    @pytest.mark.parametrize(
        ("code", "size", "value"),
        [
            (out8(0xF4, 0), 1, 0),
            (out8(0xF4, 0x10), 1, 0x10),
            (out8(0xF4, 0xFF), 1, 0xFF),
            (out16(0xF4, 0x1234), 1, 0x34),  # one port: the upper byte goes to the next one, which nobody has
            (out16(0xF4, 0x1234), 2, 0x1234),
            (out32(0xF4, 0x89ABCDEF), 4, 0x89ABCDEF),
            (out8(0xF4, 0x42), 4, 0x42),
            (out32(0xF4, 0x89ABCDEF), 2, 0xCDEF),
        ],
    )
    def test_debug_exit(self, machine_of: Build, code: bytes, size: int, value: int) -> None:
        machine = machine_of(code + text(b"after") + HLT_FOREVER, debug_exit=DebugExitConfig(size=size))
        ending = machine.run()
        assert (ending.kind, ending.value, ending.status) == ("debug-exit", value, (value << 1 | 1) & 0xFF)
        assert machine.output == b""  # type: ignore[attr-defined]

    def test_debug_exit_elsewhere(self, machine_of: Build) -> None:
        code = out8(0xF4, 1) + out8(0x501, 2) + HLT_FOREVER
        ending = machine_of(code, debug_exit=DebugExitConfig(port=0x501)).run()
        assert ending.value == 2

    def test_the_first_of_two_ends_counts(self, machine_of: Build) -> None:
        machine = machine_of(SPIN)
        machine.request_end(Ending(kind="quit", reason="first"))
        machine.request_end(Ending(kind="quit", reason="second"))
        assert machine.run().reason == "first"

    def test_many_ends_at_once_are_one(self, machine_of: Build) -> None:
        machine = machine_of(COUNT_FOREVER, cpus=2)
        together = threading.Barrier(8)

        def end(number: int) -> None:
            together.wait(10)
            machine.request_end(Ending(kind="quit", reason=str(number)))

        threads = [threading.Thread(target=end, args=(n,)) for n in range(8)]
        for thread in threads:
            thread.start()
        assert machine.run().reason in "01234567"
        for thread in threads:
            thread.join(10)

    def test_what_stands_behind_a_debug_exit_never_runs(self, machine_of: Build) -> None:
        """Also when the machine is paused and resumed between the access and the loop's seeing to it."""

        def act(value: int) -> None:
            if value == 1:
                machine.loop.post(machine.pause)
                machine.loop.post(machine.resume)
                machine.loop.post(lambda: time.sleep(0.1))
                machine.debug_exit_written(3)

        actor = Actor(act)
        machine = machine_of(out8(PORT, 1) + out8(PORT, 2) + HLT_FOREVER)
        machine.ports.claim(PORT, 4, actor)
        assert machine.run().value == 3
        assert actor.written == [1]


class TestPause:
    def test_a_paused_guest_stands_still_and_goes_on(self, machine_of: Build) -> None:
        machine = machine_of(COUNT_FOREVER, cpus=2)

        def count() -> int:
            return machine.memory.read_uint(COUNTER, 4)

        def story() -> None:
            for _ in range(3):
                before = count()
                deadline = time.monotonic() + 10
                while count() == before:
                    assert time.monotonic() < deadline, "the guest does not run"
                    time.sleep(0.01)
                call(machine, machine.pause)
                assert machine.run_state is RunState.PAUSED
                still = count()
                time.sleep(0.1)
                assert count() == still
                call(machine, machine.resume)

        assert run_with(machine, story).kind == "quit"

    def test_illegal_changes_are_refused(self, machine_of: Build) -> None:
        machine = machine_of(COUNT_FOREVER)

        def story() -> None:
            with pytest.raises(StateError):
                call(machine, machine.resume)
            call(machine, machine.pause)
            with pytest.raises(StateError):
                call(machine, machine.pause)
            call(machine, machine.resume)

        run_with(machine, story)
        with pytest.raises(StateError, match="ended"):
            machine.resume()

    @pytest.mark.parametrize("cpus", [1, 2])
    def test_no_access_is_lost_or_doubled_by_pausing_in_the_middle_of_it(self, machine_of: Build, cpus: int) -> None:
        # mov dx,PORT; 1: in eax,dx; out dx,eax; jmp 1b
        machine = machine_of(b"\xba\x00\x03\x66\xed\x66\xef\xeb\xfa", cpus=cpus)
        echo = Echo()
        machine.ports.claim(PORT, 4, echo)
        cycles = 0

        def story() -> None:
            nonlocal cycles
            until = time.monotonic() + 1.0
            while time.monotonic() < until:
                call(machine, machine.pause)
                seen = (echo.reads, echo.writes)
                time.sleep(0.0005)
                assert (echo.reads, echo.writes) == seen
                call(machine, machine.resume)
                cycles += 1

        run_with(machine, story)
        assert echo.problems == []
        assert cycles > 20 and echo.reads > 50

    def test_an_idle_guest_can_be_paused(self, machine_of: Build) -> None:
        machine = machine_of(IDLE_FOREVER, cpus=2)

        def story() -> None:
            for _ in range(20):
                call(machine, machine.pause)
                call(machine, machine.resume)

        assert run_with(machine, story).kind == "quit"

    def test_a_machine_paused_before_it_starts_does_not_run(self, machine_of: Build) -> None:
        machine = machine_of(COUNT_FOREVER)
        machine.pause()
        assert machine.run_state is RunState.PAUSED
        time.sleep(0.05)
        assert machine.memory.read_uint(COUNTER, 4) == 0


RESETS = {
    "i8042": out8(0x64, 0xFE),
    "port 0x92": out8(0x92, 1),
    "port 0xcf9": out8(0xCF9, 2) + out8(0xCF9, 6),
}


class TestReset:
    @pytest.mark.parametrize("source", RESETS)
    def test_it_is_a_power_on(self, machine_of: Build, source: str) -> None:
        """The guest tells its second life from its first by a port, and prints what it finds in it."""
        first = b"\xc6\x06\x00\x30\x53\xb3\x77" + RESETS[source] + HLT_FOREVER  # mov byte [0x3000],'S'; mov bl,0x77
        second = b"\xa0\x00\x30\xe6\xe9\x88\xd8\xe6\xe9" + text(b"!") + HLT_FOREVER  # print [0x3000]; print bl
        code = in8(PORT) + b"\x84\xc0\x75" + bytes([len(first)]) + first + second  # test al,al; jnz second
        machine = machine_of(code)
        machine.ports.claim(PORT, 1, Actor(answer=lambda: machine.resets))
        assert machine.run().kind == "halt"
        assert (machine.resets, machine.output) == (1, b"\0\0!")  # type: ignore[attr-defined]

    @pytest.mark.parametrize("source", RESETS)
    def test_with_no_reboot_it_is_an_end(self, machine_of: Build, source: str) -> None:
        machine = machine_of(RESETS[source] + text(b"after") + HLT_FOREVER, no_reboot=True)
        ending = machine.run()
        assert (ending.kind, ending.status, machine.resets) == ("reset", 0, 0)
        assert source in ending.reason
        assert machine.output == b""  # type: ignore[attr-defined]

    def test_ten_lives(self, machine_of: Build) -> None:
        code = in8(PORT) + b"\x3c\x0a\x74" + bytes([len(RESETS["i8042"]) + 4])  # cmp al,10; je
        machine = machine_of(code + RESETS["i8042"] + HLT_FOREVER + text(b"end") + HLT_FOREVER, cpus=2)
        machine.ports.claim(PORT, 1, Actor(answer=lambda: machine.resets))
        assert machine.run().kind == "halt"
        assert (machine.resets, machine.output) == (10, b"end")  # type: ignore[attr-defined]

    def test_a_paused_machine_stays_paused_and_is_as_it_was_built(self, machine_of: Build) -> None:
        machine = machine_of(COUNT_FOREVER, cpus=2)

        def state() -> object:
            return [(v.get_mp_state(), v.get_regs(), v.get_sregs(), v.get_events()) for v in machine.vcpus]

        built = state()

        def story() -> None:
            time.sleep(0.05)
            call(machine, machine.pause)
            machine.vcpus[1].set_mp_state(lib.KVM_MP_STATE_HALTED)
            assert machine.memory.read_uint(COUNTER, 4) > 0
            machine.request_reset("test")
            call(machine, lambda: None)
            assert (machine.resets, machine.run_state) == (1, RunState.PAUSED)
            assert machine.memory.read_uint(COUNTER, 4) == 0
            assert state() == built
            call(machine, machine.resume)
            deadline = time.monotonic() + 10
            while machine.memory.read_uint(COUNTER, 4) == 0:
                assert time.monotonic() < deadline
                time.sleep(0.01)

        assert run_with(machine, story).kind == "quit"

    def test_several_requests_of_one_life_are_one_reset(self, machine_of: Build) -> None:
        """Two vCPUs may both reach for the reset line; the second must not hit the next life."""

        def act(value: int) -> None:
            if machine.resets == 0:
                for source in ("first", "second", "third"):
                    machine.request_reset(source)

        machine = machine_of(out8(PORT, 1) + HLT_FOREVER)
        machine.ports.claim(PORT, 1, Actor(act))
        assert machine.run().kind == "halt"
        assert machine.resets == 1

    def test_an_image_that_is_gone_by_then_is_an_error(self, machine_of: Build, tmp_path: Path) -> None:
        machine = machine_of(out8(PORT, 1) + RESETS["i8042"] + HLT_FOREVER)
        machine.ports.claim(PORT, 1, Actor(lambda value: Path(machine.config.image).unlink()))
        with pytest.raises(ImageError, match="no such file"):
            machine.run()


def test_memory_on_both_sides_of_the_hole(machine_of: Build, tmp_path: Path) -> None:
    """5 GiB: 3 below the hole, 2 from 4 GiB on. The host backs only what is touched."""
    def store(address: int, value: int) -> bytes:  # mov rbx, address; mov dword [rbx], value
        return b"\x48\xbb" + address.to_bytes(8, "little") + b"\xc7\x03" + value.to_bytes(4, "little")

    top = layout.HOLE_END + (2 << 30) - 4
    code = store(layout.HOLE_START - 4, 0x11111111) + store(layout.HOLE_END, 0x22222222) + store(top, 0x33333333)
    # mov rbx, HOLE_START; mov eax, [rbx]; out 0xf4, eax
    code += b"\x48\xbb" + layout.HOLE_START.to_bytes(8, "little") + b"\x8b\x03\xe7\xf4"
    kernel = tmp_path / "kernel"
    kernel.write_bytes(elf([Seg(1 << 20, code)], 1 << 20))
    machine = machine_of(b"", image=str(kernel), memory=5 << 30, debug_exit=DebugExitConfig(size=4))
    # The boot tables map 4 GiB; 2 MiB pages for the two addresses above, in a page that nobody uses.
    directory, pdpt = 0x90000, layout.BOOT_PAGE_TABLES + 4096
    for gib, address in ((4, layout.HOLE_END), (5, top)):
        page = directory + (gib - 4) * 4096
        machine.memory.write_uint(pdpt + gib * 8, 8, page | 3)
        machine.memory.write_uint(page + (address >> 21 & 511) * 8, 8, (address & ~((2 << 20) - 1)) | 0x83)
    ending = machine.run()
    assert ending.value == 0xFFFFFFFF, "the hole must read as all ones"
    assert machine.memory.read_uint(layout.HOLE_START - 4, 4) == 0x11111111
    assert machine.memory.read_uint(layout.HOLE_END, 4) == 0x22222222
    assert machine.memory.read_uint(top, 4) == 0x33333333
