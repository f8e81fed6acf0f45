"""human-monitor-command: the texts scripts parse, in QEMU's format."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pyvmm.qmp.client import CommandError, QmpClient
from tests.framework.real_mode import COUNT_FOREVER, HLT_FOREVER, SPIN
from tests.qmp.conftest import QmpMachine, machines

Start = Callable[..., QmpMachine]
GUESTS = Path(__file__).parents[2] / "guests"

HEX8, HEX16 = "[0-9a-f]{8}", "[0-9a-f]{16}"
REAL_MODE = re.compile(
    rf"\r\nCPU#0\r\nEAX={HEX8} EBX={HEX8} ECX={HEX8} EDX={HEX8}\r\n"
    rf"ESI={HEX8} EDI={HEX8} EBP={HEX8} ESP={HEX8}\r\n"
    rf"EIP=(?P<eip>{HEX8}) EFL={HEX8} \[[-DOSZAPC]{{7}}\] CPL=0 II=0 A20=1 SMM=0 HLT=[01]\r\n"
    rf"((ES|CS|SS|DS|FS|GS|LDT|TR) *=[0-9a-f]{{4}} {HEX8} {HEX8} {HEX8}\r\n){{8}}"
    rf"GDT=     {HEX8} {HEX8}\r\nIDT=     {HEX8} {HEX8}\r\n"
    rf"CR0={HEX8} CR2={HEX8} CR3={HEX8} CR4={HEX8}\r\n"
    rf"(DR[0-3]={HEX16} ){{4}}\r\nDR6={HEX16} DR7={HEX16}\r\nEFER={HEX16}\r\n"
    r"FCW=037f FSW=0000 \[ST=0\] FTW=[0-9a-f]{2} MXCSR=00001f80\r\n"
    rf"(FPR\d={HEX16} [0-9a-f]{{4}} FPR\d={HEX16} [0-9a-f]{{4}}\r\n){{4}}"
    rf"(XMM\d\d={HEX16} {HEX16} XMM\d\d={HEX16} {HEX16}\r\n){{4}}"
)
LONG_MODE = re.compile(
    rf"\r\nCPU#0\r\n(([ER]?[A-Z0-9]+ *={HEX16} ?){{4}}\r\n){{4}}"
    rf"RIP=(?P<rip>{HEX16}) RFL={HEX8} \[[-DOSZAPC]{{7}}\] CPL=0 II=0 A20=1 SMM=0 HLT=[01]\r\n"
    rf"ES =[0-9a-f]{{4}} {HEX16} {HEX8} {HEX8} DPL=0 DS   \[-WA\]\r\n"
    rf"CS =[0-9a-f]{{4}} {HEX16} {HEX8} {HEX8} DPL=0 CS64 \[-RA\]\r\n"
)


def ask(client: QmpClient, line: str) -> str:
    text = client.execute("human-monitor-command", {"command-line": line})
    assert isinstance(text, str) and (text == "" or text.endswith("\r\n"))
    return text


def test_registers_in_real_mode(machine_with_qmp: Start) -> None:
    with machine_with_qmp(SPIN, "--smp", "2").client() as client:
        found = REAL_MODE.fullmatch(ask(client, "info registers"))
        assert found is not None, ask(client, "info registers")
        assert int(found["eip"], 16) == 0x7C00
        assert "CPU#1" in ask(client, "info registers 1")
        assert ask(client, "info registers -a").count("CPU#") == 2
        assert "Invalid CPU index" in ask(client, "info registers 7")
        assert client.execute("query-status")["running"], "looking does not stop it"


def test_registers_in_long_mode(machine_with_qmp: Start) -> None:
    machine = machine_with_qmp(GUESTS / "longmode", "--no-shutdown", "--serial", "null")
    with machine.client() as client:
        machine.wait_for(client, "shutdown")
        text = ask(client, "info registers")
        found = LONG_MODE.match(text)
        assert found is not None, text
        assert "CR0=8" in text and "EFER=0000000000000500" in text and "XMM15=" in text
        # hlt is behind it, and the disassembler agrees with the file's code
        assert "hlt" in ask(client, "x/2i $rip-1")
        assert ask(client, "x/1xw 0x7abcdef01000") == "00007abcdef01000: 0x1dea11ed\r\n"
        assert ask(client, "x/1xw 0x7abcdef02000") == "00007abcdef02000: Cannot access memory\r\n"


@pytest.mark.parametrize(
    ("line", "answer"),
    [
        # The guest is cli; hlt; jmp, then 01 02 ... ff 00: the same bytes and formats as real QEMU printed them.
        ("xp/4xb 0x7c00", "0000000000007c00: 0xfa 0xf4 0xeb 0xfc"),
        ("xp /9xb 0x7c00", "0000000000007c00: 0xfa 0xf4 0xeb 0xfc 0x01 0x02 0x03 0x04\r\n0000000000007c08: 0x05"),
        ("x/2xh 0x7c00", "0000000000007c00: 0xf4fa 0xfceb"),
        ("x 0x7c00", "0000000000007c00: 0xfcebf4fa"),
        ("x/5xw 0x7c04",
         "0000000000007c04: 0x04030201 0x08070605 0x0c0b0a09 0x100f0e0d\r\n0000000000007c14: 0x14131211"),
        ("x/1xg 0x7c04", "0000000000007c04: 0x0807060504030201"),
        ("x/2ub 0x7c00", "0000000000007c00: 250 244"),
        ("x/2db 0x7c00", "0000000000007c00:  -6 -12"),
        ("x/2dg 0x100000", "0000000000100000:" + "                    0" * 2),
        ("x/2og 0x100000", "0000000000100000:" + "                      0" * 2),
        ("x/2ob 0x7c00", "0000000000007c00: 0372 0364"),
        ("x/3cb 0x7c45", "0000000000007c45: 'B' 'C' 'D'"),
        ("x/2cb 0x7c00", "0000000000007c00: '\\xfa' '\\xf4'"),
        ("x/1xb $pc", "0000000000007c02: 0xeb"),
        ("x/1xb $rip - 2", "0000000000007c00: 0xfa"),
        ("x/1xb 0x7c00+4", "0000000000007c04: 0x01"),
        ("xp/2xb 0x3fffff", "00000000003fffff: Cannot access memory"),
        ("x/2zz 0", 'invalid char in format: \'z\'\r\nTry "help x" for more information'),
        ("x", 'unexpected end of expression\r\nTry "help x" for more information'),
        ("x $foo", 'unknown register\r\nTry "help x" for more information'),
        ("x 0x10 foo", 'invalid char \'f\' in expression\r\nTry "help x" for more information'),
        ("x/99999999999xb 0", 'at most 65536 items at once\r\nTry "help x" for more information'),
        ("info foo", "unknown command: 'info foo'"),
        ("foo", "unknown command: 'foo'"),
        ("info status", "VM status: paused (shutdown)"),
        ("info name", "text-guest"),
        ("info kvm", "kvm support: enabled"),
        ("info memory_size_summary", "base memory: 4194304\r\nplugged memory: 0"),
        ("cont", "Error: Resetting the Virtual Machine is required"),
    ],
)
def test_the_answers(halted: QmpClient, line: str, answer: str) -> None:
    assert ask(halted, line) == answer + "\r\n"


@pytest.fixture(scope="module")
def halted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[QmpClient]:
    """A machine that has halted; looking at it changes nothing, so one does for all."""
    code = HLT_FOREVER + bytes(n & 0xFF for n in range(1, 257))
    with machines(tmp_path_factory.mktemp("halted")) as start:
        machine = start(code, "--no-shutdown", "--memory", "4M", "--name", "text-guest")
        with machine.client() as client:
            machine.wait_for(client, "shutdown")
            yield client


def test_instructions_up_to_the_last_byte_of_memory(halted: QmpClient) -> None:
    lines = ask(halted, "xp/3i 0x7c00").splitlines()
    assert [line.split()[0] for line in lines] == ["0x00007c00:", "0x00007c01:", "0x00007c02:"]
    assert [line.split()[-1] for line in lines[:2]] == ["cli", "hlt"]
    assert ask(halted, "xp/9i 0x3ffffe").endswith("0x00400000: unable to read memory\r\n")


def test_the_memory_tree_tells_all_ranges(halted: QmpClient) -> None:
    text = ask(halted, "info mtree").replace("\r", "")
    assert "address-space: memory\n  0000000000000000-ffffffffffffffff (prio 0, i/o): system\n" in text
    assert "    0000000000000000-00000000003fffff (prio 0, ram): ram-low\n" in text
    assert re.search(r"    00000000000003f8-00000000000003ff \(prio 0, i/o\): serial", text)
    assert "(prio 0, i/o): kvm-ioapic" in text
    assert ask(halted, "info mtree -f").startswith('FlatView #0\r\n AS "memory", root: system\r\n')


def test_devices_and_their_registers(halted: QmpClient) -> None:
    assert "port 0x3f8-0x3ff: serial, 16550A UART" in ask(halted, "info devices").splitlines()
    lines = ask(halted, "info devices serial").splitlines()
    assert lines[0] == "serial: 16550A UART"
    status = "  0x3fd rw LSR: line status (DR 0x1 received data is there, OE 0x2 a received byte was lost,"
    assert any(line.startswith(status) for line in lines)
    assert ask(halted, "info devices nothing") == "Device 'nothing' not found\r\n"


def test_the_way_through_the_page_tables(halted: QmpClient) -> None:
    assert ask(halted, "info walk $rip") == "paging is off: linear 0x7c02 is physical 0x7c02\r\n"
    assert "help" in ask(halted, "info walk nowhere")


def test_run_control_and_what_is_refused(machine_with_qmp: Start) -> None:
    machine = machine_with_qmp(COUNT_FOREVER)
    with machine.client() as client:
        assert ask(client, "stop") == "" and ask(client, "info status") == "VM status: paused\r\n"
        assert ask(client, "cont") == "" and ask(client, "info status") == "VM status: running\r\n"
        assert "system_reset" in ask(client, "help")
        with pytest.raises(CommandError, match="There is no console to take a screendump from"):
            client.execute("screendump", {"filename": "/nowhere"})
        with pytest.raises(CommandError, match="expects a CPU number"):
            client.execute("human-monitor-command", {"command-line": "info registers", "cpu-index": 1})
        ask(client, "quit")
    assert machine.running.finish()[0] == 0
