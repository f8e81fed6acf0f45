"""``pyvmm explain`` as a learner runs it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from tests.framework.browser import chromium, look
from tests.framework.processes import REPOSITORY, pyvmm, refused
from tests.framework.real_mode import HLT_FOREVER, image, in8, out8, out16, out32, text

pytestmark = pytest.mark.kvm
GUESTS = REPOSITORY / "guests"


def told(*arguments: str, status: int = 0) -> list[dict[str, Any]]:
    done = pyvmm("explain", "--json", *arguments)
    assert done.returncode == status, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith(b"{")]


def kinds(events: list[dict[str, Any]], kind: str) -> list[dict[str, Any]]:
    return [event for event in events if event["kind"] == kind]


def test_real_mode_ports(tmp_path: Path) -> None:
    code = (
        out8(0x70, 0x0B) + in8(0x71) + out8(0x80, 0x42) + out16(0x3F8, 0x8321) + out32(0x1234, 0xDEADBEEF) + in8(0x999)
        + text(b"ab") + out8(0xF4, 0) + HLT_FOREVER
    )  # fmt: skip
    events = told(image(tmp_path, code), status=1)
    assert events[0]["what"] == "begins in real mode, no paging, CPL 0"
    said = [(event["instruction"], event["what"]) for event in kinds(events, "port")]
    assert said[0] == ("out dx, al", "port 0x70: MC146818 clock, INDEX (selects a register) <- 0xb")
    assert said[1] == ("in al, dx", "port 0x71: MC146818 clock, B (mode and interrupts) -> 0x2 (24H)")
    assert said[2][1] == "port 0x80: POST port, CODE (a progress code, or a short delay) <- 0x42"
    assert said[3] == ("out dx, ax", "port 0x3f8: 16550A UART, THR (transmitter holding: the byte goes out) <- 0x8321")
    assert said[4] == ("out dx, eax", "port 0x1234: nobody is there <- 0xdeadbeef")
    assert said[5] == ("in al, dx", "port 0x999: nobody is there -> 0xff")
    assert [what.partition("<- ")[2] for _, what in said[6:8]] == ['"a"', '"b"']
    assert said[8][1] == "port 0xf4: isa-debug-exit, EXIT (ends the machine) <- 0x0"
    assert events[-1]["what"] == "debug-exit 0x0"
    # Every one is told at its own place, whether KVM has moved RIP behind it or not.
    places = [event["address"] for event in kinds(events, "port")]
    assert places == sorted(set(places)) and 0x7C00 < places[0] < places[-1] < 0x7C00 + len(code)


def test_modes_symbols_and_the_console() -> None:
    events = told(str(GUESTS / "longmode"))
    begin, switch = kinds(events, "mode")
    assert begin["symbol"] == "_start" and begin["what"] == "begins in 32-bit protected mode, no paging, CPL 0"
    assert switch["what"] == "32-bit protected mode -> 64-bit mode"
    assert {"CR0.PG set (paging)", "CR4.PAE set (page-table entries of 64 bits)"} <= set(switch["details"])
    ports = kinds(events, "port")
    divisor = [event["what"] for event in ports if "DLL" in event["what"]]
    assert divisor == ["port 0x3f8: 16550A UART, DLL (divisor latch, low byte) <- 0x1"]
    assert {event["symbol"].partition("+")[0] for event in ports} == {"serial_init", "serial_write"}
    written = sum(event["count"] for event in ports if ", THR (" in event["what"])
    shown = pyvmm("run", str(GUESTS / "longmode")).stdout
    assert written == len(shown)


def test_page_tables_on_demand() -> None:
    events = told(str(GUESTS / "longmode"), "--walk", "0x7abcdef01000", "--only", "walk")
    ways = [event["details"] for event in kinds(events, "walk")]
    assert ways[0] == ["paging is off: linear 0x7abcdef01000 is physical 0xdef01000"]
    assert ways[1][-1] == "not present: an access to 0x7abcdef01000 is a page fault"
    passed = [line.partition(" ")[0] for line in ways[2][1:5]]
    assert passed == ["PML4[245]", "PDPT[243]", "directory[247]", "table[257]"]
    assert re.fullmatch(r"a page of 4 KiB at (0x[0-9a-f]+): 0x7abcdef01000 is physical \1", ways[2][-1])
    assert "(P W A D)" in ways[-1][-2], "the guest has written there"


def test_device_memory(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.write_bytes(bytes(1 << 20))
    events = told(str(GUESTS / "disk-reader"), "--disk", str(disk), "--about", "virtio-blk", status=33)
    whats = [(event["instruction"], event["what"].partition(", ")[2]) for event in kinds(events, "memory")]
    assert whats[0][1] == 'MagicValue ("virt") -> 0x74726976'
    assert any("DeviceID (what it is) -> 0x2 (disk)" in what for _, what in whats)
    assert any(what.endswith("<- 0xf (ACKNOWLEDGE DRIVER FEATURES_OK DRIVER_OK)") for _, what in whats)
    assert all(instruction and instruction.startswith("mov ") and "[" in instruction for instruction, _ in whats)
    assert {event["device"] for event in events if event["kind"] != "end"} == {"virtio-blk"}


def test_every_instruction_down_to_a_program_and_back() -> None:
    events = told(str(GUESTS / "ring3"), "--step", "1500", "--limit", "3000", status=43)
    steps = kinds(events, "step")
    assert 1400 < sum(event["count"] for event in steps) <= 1500
    switched = [event["what"] for event in kinds(events, "mode")]
    for what in ("32-bit protected mode -> compatibility mode", "compatibility mode -> 64-bit mode",
                 "CPL 0 -> CPL 3: a program", "CPL 3 -> CPL 0"):  # fmt: skip
        assert what in switched
    order = [event["instruction"] or event["what"] for event in events]
    down = order.index("iretq")
    assert order[down + 1] == "CPL 0 -> CPL 3: a program"
    assert order[order.index("syscall") + 1] == "CPL 3 -> CPL 0"
    enable = next(event for event in steps if event["instruction"] == "or eax, 0x80010000")
    assert "rax=0x8001" in enable["what"]


PIT = (
    b"\xfa\x31\xc0\x8e\xd8"  # cli; xor ax,ax; mov ds,ax
    + b"\xc7\x06\x20\x00\x00\x7d\xc7\x06\x22\x00\x00\x00"  # vector 8, the timer's: 0000:7d00
    + b"\xc7\x06\x08\x01\x08\x7d\xc7\x06\x0a\x01\x00\x00"  # vector 0x42: 0000:7d08
    + out8(0x20, 0x11) + out8(0x21, 8) + out8(0x21, 4) + out8(0x21, 1) + out8(0x21, 0xFE)
    + out8(0x43, 0x34) + out8(0x40, 0xFF) + out8(0x40, 0)  # channel 0, mode 2, 255 counts
    + b"\xcd\x42\xfb" + b"\x90" * 8 + b"\xf4\xfa" + out8(0xF4, 3) + HLT_FOREVER  # int 0x42; sti; nops; hlt; cli
)  # fmt: skip


def test_interrupts_are_seen_when_stepping(tmp_path: Path) -> None:
    handlers = b"\xb0\x20\xe6\x20\xcf".ljust(8, b"\x90") + b"\xcf"  # mov al,0x20; out 0x20,al; iret; and at 8: iret
    events = told(image(tmp_path, PIT.ljust(0x100, b"\x90") + handlers), "--step", "400", status=7)
    taken = [(event["address"], event["what"]) for event in kinds(events, "interrupt")]
    assert taken[0] == (0x7D08, "vector 0x42: interrupt")
    hardware = [(at, what) for at, what in taken[1:] if what.startswith("vector 0x08")]
    assert hardware and 0x7D00 <= hardware[0][0] <= 0x7D02


def test_a_guest_that_never_ends(tmp_path: Path) -> None:
    spin = image(tmp_path, out8(0x80, 1) + b"\x40\xee\xeb\xfc")  # 1: inc ax; out dx, al; jmp 1b
    done = pyvmm("explain", spin, "--limit", "50", "--timeout", "1.5")
    assert done.returncode == 124
    lines = done.stdout.decode().splitlines()
    assert len([line for line in lines if "POST" in line]) <= 53
    assert "50 events were told: what follows is only counted (--limit N tells more)" in lines
    total = int(next(line for line in lines if line.endswith("port post")).split()[0])
    assert total > 100, "the guest did not go on"


def test_a_triple_fault_is_the_end() -> None:
    done = pyvmm("explain", str(GUESTS / "triple-fault"))
    assert done.returncode == 126
    assert b"triple fault on vCPU 0\n" in done.stdout
    assert b"the guest crashed" in done.stderr


def test_the_page_in_a_browser(tmp_path: Path) -> None:
    html = tmp_path / "page.html"
    assert pyvmm("explain", str(GUESTS / "longmode"), "--html", str(html), "--walk", "0x1000").returncode == 0
    source = html.read_text(encoding="utf-8")
    assert re.findall(r"https?:|src=|@import|url\(|<script", source) == []  # it needs nothing from elsewhere
    dom, console = look(chromium(), html, "--dump-dom")
    assert console == []
    assert dom.count("<svg") == 1 and dom.count('class="lane"') >= 4
    assert dom.count("<tr class=") == len(re.findall(r'id="e\d+"', dom)) > 10
    for words in ("32-bit protected mode -&gt; 64-bit mode", "16550A UART, LCR (line control)", "PML4[0]"):
        assert words in dom


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--only", "ports"), "there is no 'ports'; there are port, memory"),
        (("--limit", "0"), "--limit 0: at least 1"),
        (("--walk", "nowhere"), "neither a number nor a symbol"),
        (("--symbols", "/nowhere/vmlinux"), "cannot be read"),
        (("--html", "/nowhere/page"), "does not exist"),
        (("--step", "--gdb", "tcp:127.0.0.1:0"), "both want to be the debugger"),
    ],
)
def test_refused_in_one_line(options: tuple[str, ...], says: str) -> None:
    assert says in refused("explain", str(GUESTS / "longmode"), *options)
