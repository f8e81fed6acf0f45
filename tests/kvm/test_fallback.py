"""The fallback on real vCPUs: code at CPL 0 whose instructions KVM carries out, or else the fallback does.

On a host whose KVM runs CPL 0 on the CPU the fallback has nothing to do, and the answers must be the same.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from pyvmm.arch.x86.control_registers import FLAG_AC, FLAG_IF, FLAG_TF
from pyvmm.arch.x86.fallback import emulate
from pyvmm.arch.x86.fallback.kvm_context import KvmContext
from pyvmm.arch.x86.native_oracle import CODE, NativeOracle, NativeState
from pyvmm.host.kind import cpuinfo
from pyvmm.host.probe_layout import CODE_CPL0, CR4_PAE, DATA, KERNEL_CS64, STUBS, Mode
from pyvmm.host.probe_vm import End, Ending, ProbeVm
from pyvmm.kvm.state import Regs
from pyvmm.kvm.system import System
from pyvmm.native import lib

LIMIT = 200  # instructions the fallback may carry out before a test calls it a loop


class Runner:
    """A ProbeVm that carries on with the fallback where KVM's emulator gave up."""

    def __init__(self, probe: ProbeVm) -> None:
        self.probe = probe
        self.carried_out: list[str] = []

    def run(self, code: bytes, regs: Regs | None = None, mode: Mode = Mode.LONG64) -> Ending:
        ending = self.probe.run(mode, code, regs)
        final = CODE_CPL0 + len(code)
        while ending.end is End.EMULATION_FAILURE and len(self.carried_out) < LIMIT:
            self.carried_out.append(emulate(KvmContext(self.probe.vcpu, self.probe.memory)))
            kind, seconds = self.probe._run_until_end(self.probe.vcpu)
            ending = self.probe._ending(mode, self.probe.vcpu, kind, seconds, final)
        return ending


def cpuinfo_flags() -> list[str]:
    return cpuinfo("flags").split()


@pytest.fixture
def runner() -> Iterator[Runner]:
    with System() as system:
        cpuid = system.supported_cpuid()
        has_state = any(entry.function == 0xD and entry.eax for entry in cpuid)
        for entry in cpuid:
            if entry.function == 1 and has_state:  # a KVM may describe XSAVE's state and yet not offer XSAVE
                entry.ecx |= 1 << 26
        with ProbeVm(system, cpuid=cpuid) as probe:
            yield Runner(probe)


@pytest.fixture(scope="module")
def oracle() -> Iterator[NativeOracle]:
    with NativeOracle() as opened:
        yield opened


# Not among them: lzcnt, which an emulating KVM carries out as bsr, without an exit that would tell.
REGISTER_CODE = {
    "popcnt": "f3480fb8c3",
    "tzcnt": "f3480fbcc3",
    "andn": "c4e2f0f2c3",
    "pext": "c4e2f2f5c3",
    "mulx": "c4e2f3f6c3",
    "adcx, adox": "66480f38f6c3 f3480f38f6cb",
    "crc32": "f2480f38f1c3",
    "moves through xmm": "66480f6ec3 660fefc9 0f57d2 660f6fd8 66480f7ed8 66480f7ec9",
    "many": "f3480fb8c3 c4e2f0f2d3 f2480f38f1c1 0fae f0 9b",
}


@pytest.mark.parametrize("name", REGISTER_CODE)
def test_registers_end_as_on_the_cpu(runner: Runner, oracle: NativeOracle, name: str) -> None:
    code = bytes.fromhex(REGISTER_CODE[name])
    inputs = {"rax": 0x1234, "rbx": 0x00F0_0012_3456_7800, "rcx": 0x0F0F_F0F0_1111_2222, "rdx": 0xFEDC_BA98_7654_3210}
    native = oracle.run(code, NativeState(regs=Regs(**inputs, rip=CODE))).state.regs
    ending = runner.run(code, Regs(**inputs))
    assert ending.end is End.DONE, ending.text
    for register in ("rax", "rbx", "rcx", "rdx"):
        assert hex(getattr(ending.regs, register)) == hex(getattr(native, register)), (register, runner.carried_out)


def test_compare_exchange_in_memory(runner: Runner) -> None:
    runner.probe.memory.write(DATA, bytes(range(16)))
    old_low, old_high = 0x0706050403020100, 0x0F0E0D0C0B0A0908
    code = bytes.fromhex("f0480fc70f 9c 5e")  # lock cmpxchg16b [rdi]; pushfq; pop rsi
    ending = runner.run(code, Regs(rdi=DATA, rax=old_low, rdx=old_high, rbx=1, rcx=2))
    assert ending.end is End.DONE, ending.text
    assert runner.probe.memory.read(DATA, 16) == (1 | 2 << 64).to_bytes(16, "little")
    assert ending.regs.rsi & 0x40
    ending = runner.run(code, Regs(rdi=DATA, rax=old_low, rdx=old_high, rbx=3, rcx=4))
    assert (ending.regs.rax, ending.regs.rdx, ending.regs.rsi & 0x40) == (1, 2, 0)
    assert runner.probe.memory.read(DATA, 16) == (1 | 2 << 64).to_bytes(16, "little")


def test_xsave_and_xrstor_carry_registers(runner: Runner) -> None:
    if "xsave" not in cpuinfo_flags():
        pytest.skip("the host's CPU has no XSAVE")
    # movq xmm5, rbx; xsave64 [rdi]; pxor xmm5, xmm5; xrstor64 [rdi]; movq rcx, xmm5
    code = bytes.fromhex("66480f6eeb 480fae27 660fefed 480fae2f 66480f7ee9")
    runner.probe.memory.write(DATA, bytes(4096))
    ending = runner.run(code, Regs(rdi=DATA, rax=3, rbx=0x1122334455667788))
    assert ending.end is End.DONE, ending.text
    assert hex(ending.regs.rcx) == hex(0x1122334455667788), runner.carried_out
    assert runner.probe.memory.read_uint(DATA + 160 + 16 * 5, 8) == 0x1122334455667788
    assert runner.probe.memory.read_uint(DATA + 512, 8) & 2


def test_xgetbv_and_xsetbv(runner: Runner) -> None:
    if "xsave" not in cpuinfo_flags():
        pytest.skip("the host's CPU has no XSAVE")
    ending = runner.run(bytes.fromhex("31c9 31d2 b801000000 0f01d1 31c0 0f01d0"))
    assert ending.end is End.DONE, ending.text
    assert (ending.regs.rax, runner.probe.vcpu.get_xcrs()[0]) == (1, 1)
    runner.probe.vcpu.set_xcrs({0: 3})


def test_breakpoint_reaches_the_handler(runner: Runner) -> None:
    ending = runner.run(b"\x90\xcc")
    assert (ending.end, ending.vector, ending.frame_rip) == (End.EXCEPTION, 3, CODE_CPL0 + 2), ending.text
    assert ending.frame_cs == KERNEL_CS64


MODES_AND_VECTORS = [(mode, v) for mode in (Mode.LONG64, Mode.PROT32) for v in (3, 0x20, 0x80)]


@pytest.mark.parametrize(("mode", "vector"), [*MODES_AND_VECTORS, (Mode.REAL16, 3), (Mode.REAL16, 0x20)])
def test_software_interrupts_in_every_mode(runner: Runner, mode: Mode, vector: int) -> None:
    ending = runner.run(bytes([0xCD, vector]), mode=mode)
    assert (ending.end, ending.vector, ending.frame_rip) == (End.EXCEPTION, vector, CODE_CPL0 + 2), ending.text


def test_a_fault_of_a_carried_out_instruction_is_the_guests(runner: Runner) -> None:
    unmapped = 0x7000_0000
    ending = runner.run(bytes.fromhex("f3480fb803"), Regs(rbx=unmapped))  # popcnt rax, [rbx]
    assert (ending.end, ending.vector, ending.cr2) == (End.EXCEPTION, 14, unmapped), ending.text
    assert (ending.frame_rip, ending.error_code) == (CODE_CPL0, 0)
    ending = runner.run(bytes.fromhex("480fc70f"), Regs(rdi=DATA + 8))  # cmpxchg16b, misaligned
    assert (ending.end, ending.vector, ending.error_code) == (End.EXCEPTION, 13, 0), ending.text


def test_smap_flag(runner: Runner) -> None:
    ending = runner.run(bytes.fromhex("0f01cb 9c 58 0f01ca 9c 5b"))  # stac; pushfq; pop rax; clac; pushfq; pop rbx
    if ending.end is End.EXCEPTION and ending.vector == 6 and not runner.carried_out:
        pytest.skip("the host's CPU has no SMAP")
    assert ending.end is End.DONE, ending.text
    assert ending.regs.rax & FLAG_AC and not ending.regs.rbx & FLAG_AC


def test_segment_bases_reach_kvm(runner: Runner) -> None:
    ending = runner.run(bytes.fromhex("f3480faed3 f3480faec0"), Regs(rbx=0x1234_5000))  # wrfsbase rbx; rdfsbase rax
    if ending.end is End.EXCEPTION and ending.vector == 6 and not runner.carried_out:
        pytest.skip("the host's CPU has no FSGSBASE")
    assert ending.end is End.DONE, ending.text
    assert ending.regs.rax == 0x1234_5000 == runner.probe.vcpu.get_sregs().fs.base


class TestContext:
    """KvmContext itself, on a vCPU that stands at its first instruction."""

    @pytest.fixture
    def context(self, runner: Runner) -> KvmContext:
        assert runner.run(b"\x90").end is End.DONE
        return KvmContext(runner.probe.vcpu, runner.probe.memory)

    def test_memory_goes_through_the_page_tables(self, runner: Runner, context: KvmContext) -> None:
        from pyvmm.arch.x86.fallback import Privilege

        context.write(DATA + 0xFFC, b"across pages", Privilege.SUPERVISOR)
        assert runner.probe.memory.read(DATA + 0xFFC, 12) == b"across pages"
        assert context.read(DATA + 0xFFC, 12, Privilege.SUPERVISOR) == b"across pages"

    def test_flush_keeps_the_registers(self, runner: Runner, context: KvmContext) -> None:
        before = runner.probe.vcpu.get_sregs()
        context.flush_tlb()
        assert runner.probe.vcpu.get_sregs() == before and before.cr4 & CR4_PAE

    def test_stepped_instruction_traps(self, runner: Runner, context: KvmContext) -> None:
        vcpu = runner.probe.vcpu
        regs = vcpu.get_regs()
        regs.rip, regs.rflags = CODE_CPL0, 2
        runner.probe.memory.write(CODE_CPL0, bytes.fromhex("f3480fb8c3 f4"))
        vcpu.set_regs(regs)
        context = KvmContext(vcpu, runner.probe.memory)
        context.regs.rflags |= FLAG_TF
        emulate(context)
        context.regs.rflags &= ~FLAG_TF
        context.regs = context.regs
        assert vcpu.get_debugregs().dr6 & 1 << 14
        context.inject(1, None)  # KVM_SET_REGS has dropped it
        assert vcpu.run() == lib.PV_EXIT_HLT
        assert vcpu.get_regs().rip == STUBS + 16 + 1
        assert not vcpu.get_regs().rflags & FLAG_IF

    def test_interrupt_shadow_ends(self, runner: Runner, context: KvmContext) -> None:
        events = runner.probe.vcpu.get_events()
        events.interrupt_shadow, events.flags = 1, 4
        runner.probe.vcpu.set_events(events)
        if not runner.probe.vcpu.get_events().interrupt_shadow:
            pytest.skip("this KVM keeps no interrupt shadow that user space can set")
        context.instruction_done(single_stepped=False)
        assert not runner.probe.vcpu.get_events().interrupt_shadow
