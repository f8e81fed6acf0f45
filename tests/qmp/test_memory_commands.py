"""Guest memory in files, and a core that the real gdb opens."""

from __future__ import annotations

import io
import os
import re
import struct
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from elftools.elf.elffile import ELFFile

from pyvmm.qmp.client import CommandError, QmpClient
from tests.framework.real_mode import COUNT_FOREVER, COUNTER, HLT_FOREVER
from tests.qmp.conftest import QmpMachine

Start = Callable[..., QmpMachine]
GUESTS = Path(__file__).parents[2] / "guests"
ALIAS, STAMP = 0x7ABCDEF01000, 0x1DEA11ED  # what guests/longmode maps and writes
FILL = b"\xb0\x5a\xa2\x00\x30" + HLT_FOREVER  # mov al,0x5a; mov [0x3000],al


def ended(start: Start, guest: bytes | Path, *options: str) -> tuple[QmpMachine, QmpClient]:
    """A machine whose guest has done its work, and a client."""
    machine = start(guest, "--no-shutdown", "--serial", "null", *options)
    client = machine.client()
    machine.wait_for(client, "shutdown")
    return machine, client


def gdb(core: Path, *commands: str, program: Path | None = None) -> str:
    command = ["gdb", "-nx", "-batch", "-ex", "set pagination off"]
    for text in (f"core-file {core}", *commands):
        command += ["-ex", text]
    if program is not None:
        command.append(str(program))
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_memory_by_physical_and_by_linear_address(machine_with_qmp: Start, tmp_path: Path) -> None:
    _, client = ended(machine_with_qmp, GUESTS / "longmode")
    out = tmp_path / "saved"
    with client:
        client.execute("memsave", {"val": ALIAS, "size": 8, "filename": str(out)})
        assert struct.unpack("<I", out.read_bytes()[:4]) == (STAMP,)
        # The identity map and a range over many pages: the two commands see the same.
        client.execute("memsave", {"val": 0x100123, "size": 0x5000, "filename": str(out)})
        linear = out.read_bytes()
        client.execute("pmemsave", {"val": 0x100123, "size": 0x5000, "filename": str(out)})
        assert out.read_bytes() == linear and any(linear)
        client.execute("pmemsave", {"val": 0, "size": 0, "filename": str(out)})
        assert out.read_bytes() == b""


@pytest.mark.parametrize(
    ("name", "arguments", "text"),
    [
        ("memsave", {"val": ALIAS + 4096, "size": 8}, "Invalid addr 0x00007abcdef02000/size 8 specified"),
        ("memsave", {"val": 0, "size": 1 << 63}, "Invalid addr"),
        ("memsave", {"val": 0, "size": 8, "cpu-index": 4}, "Parameter 'cpu-index' expects a CPU number"),
        ("memsave", {"val": 0, "size": 8, "cpu-index": -1}, "Parameter 'cpu-index' expects a CPU number"),
        ("memsave", {"val": -1, "size": 8}, "Parameter 'val' expects a number"),
        ("pmemsave", {"val": 15 << 20, "size": 2 << 20}, "Invalid addr 0x0000000000f00000/size 2097152 specified"),
        ("pmemsave", {"val": 0, "size": 8, "filename": "/no/such/file"}, "Could not open '/no/such/file': No such"),
        ("pmemsave", {"val": 0, "size": 8, "filename": "a\0b"}, "Could not open"),
        ("pmemsave", {"val": 0, "size": 8, "filename": "/dev/full"}, "writing '/dev/full': No space left"),
    ],
)
def test_what_cannot_be_saved(
    machine_with_qmp: Start, tmp_path: Path, name: str, arguments: dict[str, Any], text: str
) -> None:
    _, client = ended(machine_with_qmp, GUESTS / "longmode")
    with client, pytest.raises(CommandError, match=re.escape(text)):
        client.execute(name, {"filename": str(tmp_path / "out")} | arguments)


def test_a_fifo_without_a_reader_does_not_hold_the_machine_up(machine_with_qmp: Start, tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    _, client = ended(machine_with_qmp, FILL)
    with client:
        for name, arguments in [
            ("pmemsave", {"val": 0, "size": 1 << 20, "filename": str(fifo)}),
            ("dump-guest-memory", {"paging": False, "protocol": f"file:{fifo}"}),
        ]:
            with pytest.raises(CommandError):
                client.execute(name, arguments)
        assert client.execute("query-status")["status"] == "shutdown"


def test_gdb_opens_a_core_and_finds_registers_and_memory(machine_with_qmp: Start, tmp_path: Path) -> None:
    _, client = ended(machine_with_qmp, GUESTS / "longmode")
    core = tmp_path / "core"
    with client:
        client.execute("dump-guest-memory", {"paging": False, "protocol": f"file:{core}"})
        shown = client.execute("human-monitor-command", {"command-line": "info registers"})
    # Multiboot wants a 32-bit file; gdb, for 64-bit registers, one of 64.
    program = tmp_path / "longmode.elf"
    subprocess.run(["objcopy", "-O", "elf64-x86-64", GUESTS / "longmode" / "longmode.elf", program], check=True)
    text = gdb(core, "x/1xw &page", "info registers", "info symbol $rip", "x/1i $rip", program=program)
    assert f"0x{STAMP:08x}" in text, text
    assert re.search(r"^\w+ (\+ \d+ )?in section \.text", text, re.MULTILINE), text
    for name in ("rip", "rsp", "rax", "rbx", "r15", "rsi"):
        ours = re.search(rf"{name.upper():<3}=([0-9a-f]{{16}})", shown)
        its = re.search(rf"^{name}\s+0x([0-9a-f]+)", text, re.MULTILINE)
        assert ours and its and int(ours[1], 16) == int(its[1], 16), name


def test_every_vcpu_is_a_thread_of_the_core(machine_with_qmp: Start, tmp_path: Path) -> None:
    machine = machine_with_qmp(COUNT_FOREVER, "--smp", "3")
    core = tmp_path / "core"
    with machine.client() as client:
        client.execute("dump-guest-memory", {"paging": False, "protocol": f"file:{core}"})
        assert [event["event"] for event in client.events] == ["STOP", "RESUME"]
        assert client.execute("query-status")["running"]
        with pytest.raises(CommandError, match="Parameter 'length' is missing"):
            client.execute("dump-guest-memory", {"paging": False, "protocol": f"file:{core}", "begin": 0})
    text = gdb(core, "info threads", "thread 1", "info registers rip", f"x/1xw {COUNTER:#x}")
    assert len(re.findall(r"^[* ] +\d+ +", text, re.MULTILINE)) == 3, text
    counted = re.search(rf"^0x{COUNTER:x}:\s+0x([0-9a-f]+)", text, re.MULTILINE)
    assert counted and int(counted[1], 16) > 0
    rip = re.search(r"^rip\s+0x([0-9a-f]+)", text, re.MULTILINE)
    assert rip and int(rip[1], 16) in (0x7C00, 0x7C05)


def test_a_core_holds_the_memory_asked_for_and_holes_take_no_room(machine_with_qmp: Start, tmp_path: Path) -> None:
    _, client = ended(machine_with_qmp, FILL, "--memory", "64M")
    core = tmp_path / "core"
    with client:
        client.execute("dump-guest-memory", {"paging": False, "protocol": f"file:{core}"})
        assert core.stat().st_size > 64 << 20 > core.stat().st_blocks * 512 * 4
        loads = _loads(core)
        assert [(start, len(data)) for start, data in loads] == [(0, 64 << 20)]
        assert loads[0][1][0x3000] == 0x5A
        whole = tmp_path / "whole"
        client.execute("pmemsave", {"val": 0, "size": 64 << 20, "filename": str(whole)})
        assert loads[0][1] == whole.read_bytes()
        part = {"paging": False, "protocol": f"file:{core}", "begin": 0x2F00, "length": 0x200}
        client.execute("dump-guest-memory", part)
        assert _loads(core) == [(0x2F00, whole.read_bytes()[0x2F00:0x3100])]
        for change, text in [
            ({"begin": 1 << 40, "length": 1}, "no memory in that range"),
            ({"protocol": "foo:x"}, "Invalid parameter 'protocol'"),
            ({"paging": True}, "not supported"),
            ({"format": "kdump-zlib"}, "does not accept value 'kdump-zlib'"),
        ]:
            with pytest.raises(CommandError, match=text):
                client.execute("dump-guest-memory", part | change)


def test_crash_takes_a_core_for_one_of_kdumps_kind(machine_with_qmp: Start, tmp_path: Path) -> None:
    """Its rule (netdump.c, is_netdump): the first PT_LOAD is at no page of the file and says no alignment. A core that
    does not keep it made crash 8.0.2 die at once; with it, crash shows a Debian kernel's tasks and memory.
    """
    core = tmp_path / "core"
    _, client = ended(machine_with_qmp, FILL)
    with client:
        client.execute("dump-guest-memory", {"paging": False, "protocol": f"file:{core}"})
    headers = core.read_bytes()[:4096]
    note, load = (struct.unpack_from("<IIQQQQQQ", headers, 64 + 56 * index) for index in range(2))
    assert (note[0], load[0]) == (4, 1)
    assert load[2] % 4096 and load[7] == 0


def _loads(core: Path) -> list[tuple[int, bytes]]:
    elf = ELFFile(io.BytesIO(core.read_bytes()))  # type: ignore[no-untyped-call]
    assert elf["e_type"] == "ET_CORE" and elf["e_machine"] == "EM_X86_64"
    return [(s["p_paddr"], s.data()) for s in elf.iter_segments() if s["p_type"] == "PT_LOAD"]
