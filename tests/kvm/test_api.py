"""The Python API: what it yields, what it takes back, and what it refuses. Its docstrings' examples are run, too."""

from __future__ import annotations

import doctest
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import pyvmm
import pyvmm.api.machine
from pyvmm.errors import ConfigError, DeadlineError, ImageError

HLT = b"\xf4"


@pytest.fixture
def vm() -> Iterator[pyvmm.Machine]:
    with pyvmm.Machine() as made:
        yield made


@pytest.fixture
def long_vm() -> Iterator[pyvmm.Machine]:
    with pyvmm.Machine(mode="long64") as made:
        yield made


def test_the_examples_are_true() -> None:
    failed, tried = doctest.testmod(pyvmm.api.machine)
    assert (failed, tried > 2) == (0, True)


def test_importing_pyvmm_imports_nothing() -> None:
    told = "import sys, pyvmm; assert not [m for m in sys.modules if m.startswith('pyvmm.')]; pyvmm.Machine; pyvmm.Halt"
    subprocess.run([sys.executable, "-c", told], check=True, timeout=30)


def test_string_instructions_are_one_exit(vm: pyvmm.Machine) -> None:
    vm.memory.write(0xA000, b"seven words")
    # mov si,0xa000; mov cx,11; mov dx,0xe9; rep outsb; mov di,0xb000; mov cx,3; mov dx,0x60; rep insb; hlt
    vm.load(bytes.fromhex("be00a0 b90b00 bae900 f36e bf00b0 b90300 ba6000 f36c f4"))
    written, read = [], 0
    for exit in vm.steps():
        if isinstance(exit, pyvmm.PortWrite):
            assert (exit.port, exit.size) == (0xE9, 1)
            written.append(exit.data)
        elif isinstance(exit, pyvmm.PortRead):
            exit.data = bytes(range(read, read + exit.count))
            read += exit.count
    assert b"".join(written) == b"seven words"
    assert (read, vm.memory.read(0xB000, 3)) == (3, b"\0\1\2")


def test_memory_that_is_not_there_is_a_device(long_vm: pyvmm.Machine) -> None:
    vm = long_vm
    # The last page is led to where there is no memory: mov eax,[0x1ff008]; inc eax; mov [0x1ff010],eax; hlt
    vm.memory.write_uint(0x7000 + 8 * 0x1FF, 8, 0xFEC0_0000 | 0x63)
    vm.load(bytes.fromhex("8b042508f01f00 ffc0 89042510f01f00 f4"))
    seen = []
    for exit in vm.steps():
        seen.append(exit)
        if isinstance(exit, pyvmm.MmioRead):
            exit.answer(0x1233)
    assert isinstance(seen[0], pyvmm.MmioRead) and (seen[0].address, seen[0].size) == (0xFEC00008, 4)
    assert seen[1:] == [pyvmm.MmioWrite(0xFEC00010, (0x1234).to_bytes(4, "little")), pyvmm.Halt()]


def test_instruction_by_instruction(long_vm: pyvmm.Machine) -> None:
    long_vm.load(bytes.fromhex("90 48ffc0 4801c0 f4"))
    long_vm.set_regs(rax=20)
    seen = list(long_vm.steps(single=True))
    assert [exit.rip for exit in seen if isinstance(exit, pyvmm.Step)][:3] == [0x8001, 0x8004, 0x8007]
    assert isinstance(seen[-1], pyvmm.Halt) and long_vm.regs.rax == 42


def test_a_triple_fault_is_the_end_unless_one_goes_back(long_vm: pyvmm.Machine) -> None:
    long_vm.load(bytes.fromhex("0f0b"))  # ud2
    special = long_vm.sregs
    special.idt.limit = 0
    long_vm.sregs = special
    here = long_vm.save()
    assert list(long_vm.steps()) == [pyvmm.Shutdown()]
    with pytest.raises(ConfigError, match="over"):
        long_vm.step()
    long_vm.restore(here)
    long_vm.memory.write(0x8000, HLT)
    assert long_vm.step() == pyvmm.Halt()


def test_an_access_that_was_answered_is_in_what_is_saved(vm: pyvmm.Machine) -> None:
    vm.load(bytes.fromhex("e460 f4"))  # in al,0x60; hlt
    asked = vm.step()
    assert isinstance(asked, pyvmm.PortRead)
    asked.answer(7)
    kept = vm.save()
    assert (kept.regs.rax & 0xFF, kept.regs.rip) == (7, 0x8002)
    assert vm.step() == pyvmm.Halt()
    vm.restore(kept)
    assert vm.regs.rax & 0xFF == 7 and vm.step() == pyvmm.Halt()


def test_a_guest_that_runs_for_ever() -> None:
    with pyvmm.Machine(deadline=0.2) as vm:
        vm.load(b"\xeb\xfe")
        with pytest.raises(DeadlineError, match="0x8000"):
            vm.step()
        vm.memory.write(0x8000, HLT)
        assert vm.step() == pyvmm.Halt(), "it can be gone on with"
        assert vm.run() == b""


def test_a_file_and_a_limit(vm: pyvmm.Machine, tmp_path: Path) -> None:
    (tmp_path / "code").write_bytes(bytes.fromhex("e6e9 ebfc"))  # 1: out 0xe9,al; jmp 1b
    vm.load(tmp_path / "code", at=0x9000)
    assert len(list(vm.steps(limit=5))) == 5


def test_what_cannot_be(vm: pyvmm.Machine) -> None:
    for settings, says in (
        ({"memory": 4096}, "2 MiB to"), ({"memory": (2 << 20) + 1}, "in pages"), ({"mode": "v86"}, "real16"),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=says):
            pyvmm.Machine(**settings)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="are not in"):
        vm.load(HLT, at=2 << 20)
    with pytest.raises(ConfigError, match="registers are"):
        vm.set_regs(eax=1)
    with pytest.raises(ConfigError, match="64 bits"):
        vm.set_regs(rax=1 << 64)
    with pytest.raises((ConfigError, ImageError, OSError)):
        vm.load("/no/such/file")
    with pytest.raises(ValueError, match="does not fit"):
        pyvmm.PortRead(0x60, 1, 1, b"").answer(256)
    vm.load(bytes.fromhex("e460 f4"))
    asked = vm.step()
    assert isinstance(asked, pyvmm.PortRead)
    asked.data = b"too long"
    with pytest.raises(ConfigError, match="as many bytes"):
        vm.step()
    with pytest.raises(AttributeError):
        pyvmm.Nonsense  # noqa: B018
    vm.close()
    for use in (vm.step, lambda: vm.restore(None)):  # type: ignore[arg-type]
        with pytest.raises((ConfigError, AttributeError)):
            use()
