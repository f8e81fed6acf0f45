"""The oracle itself: what it reports, and that its child never outlives it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator

import psutil
import pytest

from pyvmm.arch.x86.native_oracle import CODE, DATA, DATA_SIZE, NativeOracle, NativeState
from pyvmm.errors import HostError
from pyvmm.kvm.state import Regs


def children() -> set[int]:
    return {child.pid for child in psutil.Process().children()}


@pytest.fixture
def oracle() -> Iterator[NativeOracle]:
    with NativeOracle() as opened:
        yield opened


def test_registers_and_memory(oracle: NativeOracle) -> None:
    regs = Regs(rax=0x1234, rdi=DATA + DATA_SIZE - 8, r15=7)
    code = bytes.fromhex("488907 49ffc7")  # mov [rdi], rax; inc r15
    result = oracle.run(code, NativeState(regs=regs), bytes(DATA_SIZE))
    assert result.signal is None and result.steps == 2
    assert result.data[-8:] == (0x1234).to_bytes(8, "little")
    assert (result.state.regs.r15, result.state.regs.rip) == (8, CODE + 6)


def test_runs_do_not_see_each_other(oracle: NativeOracle) -> None:
    first = oracle.run(b"\x48\xff\xc0", NativeState(regs=Regs(rax=1)), b"\x11" * 64)
    second = oracle.run(b"\x48\xff\xc0", NativeState(regs=Regs(rbx=5)), b"\x22" * 64)
    assert (first.state.regs.rax, second.state.regs.rax, second.state.regs.rbx) == (2, 1, 5)
    assert (first.data, second.data) == (b"\x11" * 64, b"\x22" * 64)


def test_a_fault_is_reported_and_survived(oracle: NativeOracle) -> None:
    fault = oracle.run(bytes.fromhex("488b00"), NativeState(regs=Regs(rax=DATA + DATA_SIZE)))
    assert fault.signal is not None
    assert (fault.signal.number, fault.signal.address) == (signal.SIGSEGV, DATA + DATA_SIZE)
    assert fault.state.regs.rip == CODE
    assert oracle.run(b"\x90", NativeState(regs=Regs())).signal is None


def test_vector_state(oracle: NativeOracle) -> None:
    state = oracle.run(b"\x0f\x57\xc0", NativeState(regs=Regs())).state
    image = bytearray(state.xsave)
    image[160:176], image[512] = bytes(range(16)), image[512] | 3
    after = oracle.run(bytes.fromhex("0f28c8"), NativeState(regs=Regs(), xsave=bytes(image))).state  # movaps xmm1, xmm0
    assert after.xsave[176:192] == bytes(range(16))


def test_code_without_end_is_refused(oracle: NativeOracle) -> None:
    with pytest.raises(HostError, match="did not end"):
        oracle.run(b"\xeb\xfe", NativeState(regs=Regs()))
    assert oracle.run(b"\xeb\xfe", NativeState(regs=Regs()), steps=5).steps == 5


@pytest.mark.parametrize(("code", "data"), [(bytes(4097), b""), (b"\x90", bytes(DATA_SIZE + 1))])
def test_what_does_not_fit_is_refused(oracle: NativeOracle, code: bytes, data: bytes) -> None:
    with pytest.raises(ValueError, match="does not fit"):
        oracle.run(code, NativeState(regs=Regs()), data)


def test_cpuid_is_the_hosts(oracle: NativeOracle) -> None:
    _, ebx, ecx, edx = oracle.cpuid(0)
    vendor = b"".join(v.to_bytes(4, "little") for v in (ebx, edx, ecx)).decode()
    with open("/proc/cpuinfo", encoding="ascii") as file:
        assert any(line.split(":")[-1].strip() == vendor for line in file if line.startswith("vendor_id"))


def test_the_child_ends_with_the_oracle() -> None:
    before = children()
    with NativeOracle() as oracle:
        assert len(children() - before) == 1
        oracle.run(b"\x90", NativeState(regs=Regs()))
    assert children() == before
    oracle.close()  # twice is harmless
    with pytest.raises(ZeroDivisionError), NativeOracle():
        raise ZeroDivisionError
    assert children() == before


def test_a_failing_start_leaves_no_child(monkeypatch: pytest.MonkeyPatch) -> None:
    import ptrace.binding.func as func

    def refuse(pid: int, options: int) -> None:
        raise PermissionError("refused by the test")

    before = children()
    monkeypatch.setattr(func, "ptrace_setoptions", refuse)
    with pytest.raises(HostError, match="cannot trace"):
        NativeOracle()
    assert children() == before


def test_the_child_dies_with_its_tracer() -> None:
    script = (
        "import os, sys; from pyvmm.arch.x86.native_oracle import NativeOracle\n"
        "o = NativeOracle(); print(o._pid, flush=True); sys.stdin.read()"
    )
    with subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as tracer:
        assert tracer.stdout is not None
        child = psutil.Process(int(tracer.stdout.readline()))
        os.kill(tracer.pid, signal.SIGKILL)
    _, alive = psutil.wait_procs([child], timeout=10)
    assert all(process.status() == psutil.STATUS_ZOMBIE for process in alive)
