"""Debian's gdb on the guests of guests/: the tool users have, in every mode of the CPU."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from tests.framework.debugging import GUESTS, debugged, symbols

pytestmark = pytest.mark.guest


def in_order(text: str, *parts: str) -> None:
    """Each of ``parts`` is in ``text``, behind the one before."""
    at = 0
    for part in parts:
        found = text.find(part, at)
        assert found >= 0, f"{part!r} is not behind the others in:\n{text}"
        at = found + len(part)


def test_long_mode_breakpoints_backtrace_step_watch(tmp_path: Path) -> None:
    with debugged(tmp_path, "run", str(GUESTS / "longmode"), "-S") as guest:
        text = guest.gdb(
            symbols("longmode"),
            "break guest_main", "continue", "backtrace", "stepi", "p $cr0", "p $efer",
            "watch *((unsigned long *)&alias_table + 257)", "continue", "hbreak print", "continue",
            "p/x *(unsigned long *)0x7abcdef01000", "p/x *(unsigned long *)0x7abcdef02000",
            "maintenance packet Qqemu.PhyMemMode:1", "x/1xw 0x7abcdef01000", "x/2xb &page",
            "maintenance packet Qqemu.PhyMemMode:0",
            "set $xmm3.v2_int64[0] = 0x1234", "p/x $xmm3.v2_int64[0]", "p/x $mxcsr", "p $st0",
            "delete", "continue",
        )  # fmt: skip
        in_order(
            text,
            "Breakpoint 1, 0x", "in guest_main ()", "#0 ", "in guest_main ()", "#1 ", "in in_long_mode ()",
            "in guest_main ()", "[ PE ET PG ]", "[ LME LMA ]",
            "Hardware watchpoint 2:", "Old value = 0", "New value = 1052675", "in guest_main ()",
            "Breakpoint 3, 0x", "in print ()",
            "Cannot access memory at address 0x7abcdef02000", "Cannot access memory at address 0x7abcdef01000",
            "0x1234", "0x1f80",
            "exited normally",
        )  # fmt: skip
        assert guest.running.finish()[0] == 0


def test_real_mode(tmp_path: Path) -> None:
    with debugged(tmp_path, "run", str(GUESTS / "hello"), "-S") as guest:
        text = guest.gdb(
            symbols("hello", "elf32"),
            "set architecture i8086", "info registers eip cs cs_base", "stepi", "break print", "continue", "x/1i $pc",
            "stepi", "continue", "delete", "detach",
        )  # fmt: skip
        in_order(text, '"i8086"', "eip            0x7c00 ", "in _start ()", "Breakpoint 1, 0x", "in print ()",
                 "=> 0x7c34 <print>:", "(%si),%al", "in print ()", "Breakpoint 1, 0x", "detached")  # fmt: skip
        status, out, _ = guest.running.finish()
        assert status == 0 and b"Hello from 16-bit real mode" in out, "detached, it went on"


def test_protected_mode(tmp_path: Path) -> None:
    with debugged(tmp_path, "run", str(GUESTS / "protected"), "-S") as guest:
        text = guest.gdb(symbols("protected", "elf32"), "break protected", "continue", "stepi", "p $cr0", "detach")
        in_order(text, "Breakpoint 1, 0x00007c2e in protected ()", "in protected ()", "[ PE ET ]")
        assert guest.running.finish()[0] == 0


def user_address(instruction: str) -> str:
    """Of the first such instruction in ring3's user code."""
    code = subprocess.run(
        ["objdump", "-d", "--start-address=0x400000", "--stop-address=0x400400", str(symbols("ring3"))],
        capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    found = re.search(rf"^ +([0-9a-f]+):\t[0-9a-f ]+\t{instruction}", code, re.MULTILINE)
    assert found is not None, code
    return "0x" + found[1]


def test_user_mode_and_system_calls(tmp_path: Path) -> None:
    """On a host that runs CPL 3 natively both need what guest_traps.py does; the work-arounds go on meanwhile."""
    syscall, call, fault = user_address("syscall"), user_address(r"int +\$0x80"), user_address("cli")
    with debugged(tmp_path, "run", str(GUESTS / "ring3"), "-S") as guest:
        text = guest.gdb(
            symbols("ring3"),
            "break user_main", "continue", "p $cs & 3", "stepi", "x/1i $pc", "p $eflags",
            f"tbreak *{syscall}", "continue", "x/1i $pc", "stepi", "x/1i $pc", "p $cs & 3", "p ($r11 & 0x100)",
            f"tbreak *{call}", "continue", "stepi", "x/1i $pc", "p *(long *)($rsp + 16) & 0x100",
            "tbreak on_int_call", "continue", "backtrace 1", f"tbreak *{fault}", "continue", "stepi", "p $cs & 3",
            "delete", "continue",
        )  # fmt: skip
        in_order(
            text,
            "Breakpoint 1, 0x0000000000400000 in user_main ()", "= 3", "in user_main ()", "<user_main+2>", "[ IF ]",
            "Temporary breakpoint 2, ", "syscall", "in syscall_entry ()", "<syscall_entry>", "= 0", "= 0",
            "Temporary breakpoint 3, ", "in vector_stubs ()", "push ", "= 0",
            "Temporary breakpoint 4, ", "in on_int_call ()", "Temporary breakpoint 5, ", "in vector_stubs ()", "= 0",
            "exited with code 053",
        )  # fmt: skip
        status, out, _ = guest.running.finish()
        assert status == 43
        plain = (GUESTS / "guests.toml").read_text()
        for line in out.decode().splitlines():
            assert line.strip() in plain, "the guest noticed"


def test_several_vcpus_are_threads(tmp_path: Path) -> None:
    with debugged(tmp_path, "run", str(GUESTS / "smp"), "--smp", "3", "-S") as guest:
        text = guest.gdb(
            symbols("smp"),
            "break ap_main", "continue", "info threads", "backtrace", "stepi", "continue", "thread 1", "p $cs_base",
            "stepi", "delete", "continue",
        )  # fmt: skip
        assert len(re.findall(r"Thread [23] hit Breakpoint 1", text)) == 2, text
        assert re.search(r"\* [23] +Thread [23] \(vCPU [12], CPL 0\) +0x\w+ in ap_main", text), text
        assert "  1    Thread 1 (vCPU 0, CPL 0) " in text
        in_order(text, "in ap_in_long_mode ()", "exited normally")
        status, out, _ = guest.running.finish()
        assert status == 0 and b"300 additions by 3 CPUs, none lost" in out
