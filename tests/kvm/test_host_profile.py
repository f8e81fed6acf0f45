"""The probes on this machine's real KVM.

No answer of any particular host is written down here. What is tested: the harness tells endings apart, the profile's
findings agree with each other and with what can be seen without the harness, and a probe can also say no.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from pyvmm.arch.x86.cpuid import guest_cpuid, has_feature
from pyvmm.arch.x86.cpuid_features import FEATURES
from pyvmm.arch.x86.native_oracle import NativeOracle
from pyvmm.cli import build_parser
from pyvmm.host import cache, micro_guests
from pyvmm.host.kind import cpuinfo
from pyvmm.host.micro_guests import INSTRUCTIONS
from pyvmm.host.probe_layout import CODE_CPL0, CODE_CPL3, DATA, SYSCALL_STUB, Mode
from pyvmm.host.probe_vm import End, ProbeVm
from pyvmm.host.probes import FETCH_OF_USER, measure, memfd_follows
from pyvmm.host.profile import QUIRKS, HostProfile, derive_quirks
from pyvmm.kvm.state import Regs
from pyvmm.kvm.system import System
from pyvmm.native import lib
from tests.kvm.conftest import BareVm

MODES = list(Mode)
_UNNAMED_BY_LINUX = {"fzrm", "fsrs", "fsrc", "lam"}
"""Not in /proc/cpuinfo: arch/x86/include/asm/cpufeatures.h gives them no name, or only newer kernels do."""
UD2 = b"\x0f\x0b"
SPIN = b"\xeb\xfe"  # jmp $


@pytest.fixture(scope="module")
def profile() -> HostProfile:
    with System() as system:
        return measure(system)


@pytest.fixture
def system() -> Iterator[System]:
    with System() as opened:
        yield opened


@pytest.fixture
def probe(system: System) -> Iterator[ProbeVm]:
    with ProbeVm(system) as opened:
        yield opened


class TestHarness:
    @pytest.mark.parametrize("mode", MODES)
    def test_reaching_the_end(self, probe: ProbeVm, mode: Mode) -> None:
        code = bytes.fromhex("b8 34 12" if mode is Mode.REAL16 else "b8 34 12 00 00")  # mov (e)ax, 1234h
        ending = probe.run(mode, code)
        assert (ending.end, ending.regs.rax) == (End.DONE, 0x1234)

    @pytest.mark.parametrize("mode", MODES)
    def test_an_exception_tells_vector_and_place(self, probe: ProbeVm, mode: Mode) -> None:
        ending = probe.run(mode, b"\x90" + UD2)
        start = CODE_CPL3 if mode.cpl else CODE_CPL0
        assert (ending.end, ending.vector, ending.frame_rip) == (End.EXCEPTION, 6, start + 1)
        assert ending.frame_cs & 3 == mode.cpl

    @pytest.mark.parametrize("mode", [Mode.USER32, Mode.USER64])
    def test_a_page_fault_at_cpl3(self, probe: ProbeVm, mode: Mode) -> None:
        ending = probe.run(mode, micro_guests.LOAD_BYTE.code, Regs(rbx=CODE_CPL0))
        assert (ending.end, ending.vector, ending.cr2) == (End.EXCEPTION, 14, CODE_CPL0)
        assert ending.error_code == 0x5  # present, user, read (SDM volume 3, 4.7)

    @pytest.mark.parametrize("mode", [Mode.USER32, Mode.USER64])
    def test_cpl3_has_no_privileges(self, probe: ProbeVm, mode: Mode) -> None:
        ending = probe.run(mode, b"\xfa\x90")  # cli
        assert (ending.end, ending.vector, ending.frame_rip) == (End.EXCEPTION, 13, CODE_CPL3)

    @pytest.mark.parametrize("mode", MODES)
    def test_a_deadline_ends_a_guest_that_does_not(self, system: System, mode: Mode) -> None:
        with ProbeVm(system, deadline=0.1) as probe:
            assert probe.run(mode, SPIN).end is End.DEADLINE
            assert probe.run(mode, b"").end is End.DONE

    def test_a_deadline_ends_a_guest_that_only_exits(self, system: System) -> None:
        with ProbeVm(system, deadline=0.1) as probe:
            assert probe.run(Mode.LONG64, b"\xec\xeb\xfd").end is End.DEADLINE  # in al,dx; jmp -3

    @pytest.mark.parametrize("mode", [Mode.PROT32, Mode.LONG64])
    def test_a_triple_fault_and_a_good_run_after_it(self, probe: ProbeVm, mode: Mode) -> None:
        probe.memory.write(DATA, bytes(16))
        ending = probe.run(mode, bytes.fromhex("0f 01 1b") + UD2, Regs(rbx=DATA))  # lidt [rbx]
        assert ending.end is End.SHUTDOWN
        assert probe.run(mode, b"").end is End.DONE

    def test_after_close_a_run_opens_anew(self, probe: ProbeVm) -> None:
        probe.close()
        probe.close()
        assert probe.run(Mode.LONG64, b"").end is End.DONE

    def test_code_longer_than_its_page_is_refused(self, probe: ProbeVm) -> None:
        with pytest.raises(ValueError, match="less than a page"):
            probe.run(Mode.LONG64, bytes(0x1000))


class TestProfile:
    def test_guests_run_and_every_probe_came_to_a_result(self, profile: HostProfile) -> None:
        assert profile.notes == ()
        assert profile.guests_run
        assert profile.speeds.keys() == {mode.value for mode in Mode}
        assert profile.instructions.keys() == {each.name for each in INSTRUCTIONS}

    def test_quirks_follow_from_the_findings(self, profile: HostProfile) -> None:
        assert set(profile.quirks) <= QUIRKS.keys()
        assert profile.quirks == derive_quirks(
            speeds=profile.speeds,
            instructions=profile.instructions,
            syscall_observed=profile.syscall_observed,
            int_observed=profile.int_observed,
            features_show_through=profile.features_show_through,
        )

    def test_what_is_emulated_is_far_slower_than_what_is_not(self, profile: HostProfile) -> None:
        """Two ways to tell: KVM's count says what is emulated, the clock how fast it was."""
        slow = [s.instructions_per_second for s in profile.speeds.values() if s.emulated]
        fast = [s.instructions_per_second for s in profile.speeds.values() if not s.emulated]
        assert all(rate > 0 for rate in slow + fast)
        if slow and fast:
            assert max(slow) * 5 < min(fast)

    def test_hardware_virtualization_needs_no_work_around(self, profile: HostProfile) -> None:
        if profile.kind in ("vmx", "svm"):
            assert not set(profile.quirks) & {"emulated-cpl0", "syscall-entry", "int-entry"}
        assert (profile.kind == "pvm") == Path("/sys/module/kvm_pvm").is_dir()

    @pytest.mark.parametrize(
        ("name", "code"),
        [
            ("popcnt", "f3 0f b8 c1"),
            ("clac", "0f 01 ca"),
            ("fwait", "9b"),
            ("movups", "0f 10 07"),
            ("sfence", "0f ae f8"),
        ],
    )
    def test_an_emulation_failure_is_one_without_the_harness_too(
        self, profile: HostProfile, bare: BareVm, name: str, code: str
    ) -> None:
        """The instruction in real mode, in a VM that is built by hand: KVM_RUN must say the same.

        Only where the CPU has the instruction, and KVM runs both modes the same way.
        """
        if profile.instructions[name] == "invalid-opcode":
            pytest.skip(f"this CPU has no {name}")
        if profile.speeds["real16"].emulated != profile.speeds["long64"].emulated:
            pytest.skip("real mode is emulated here and long mode is not")
        bare.vm.enable_cap("KVM_CAP_EXIT_ON_EMULATION_FAILURE", 1)
        sregs = bare.vcpu.get_sregs()
        sregs.cr4 |= 1 << 9  # OSFXSR, or SSE is #UD
        bare.vcpu.set_sregs(sregs)
        with System() as system:
            bare.vcpu.set_cpuid(system.supported_cpuid())
        bare.enter(bytes.fromhex(code) + b"\xe6\xf4\xf4")  # ...; out 0xf4, al; hlt
        kind = bare.vcpu.run()
        if name in profile.emulator_lacks:
            assert kind == lib.PV_EXIT_EMULATION
            assert bytes(bare.vcpu.exit.insn[0 : len(bytes.fromhex(code))]) == bytes.fromhex(code)
        else:
            assert (kind, bare.vcpu.exit.port) == (lib.PV_EXIT_IO, 0xF4)

    def test_an_instruction_that_is_counted_as_lacking_leaves_rip_on_itself(
        self, profile: HostProfile, probe: ProbeVm
    ) -> None:
        """The fallback decodes at RIP: a failure must not have moved it."""
        for each in INSTRUCTIONS:
            if each.name in profile.emulator_lacks:
                ending = probe.run(Mode.LONG64, each.guest.code, Regs(rax=2, rbx=DATA, rcx=each.rcx, rdx=each.rdx))
                assert (ending.end, ending.regs.rip) == (End.EMULATION_FAILURE, CODE_CPL0), each.name

    def test_syscall_leaves_its_registers_wherever_it_arrives(self, profile: HostProfile, probe: ProbeVm) -> None:
        ending = probe.run(Mode.USER64, micro_guests.SYSCALL.code)
        assert ending.regs.rcx == CODE_CPL3 + 2
        assert ending.regs.r11 & 0x2
        assert profile.syscall_reaches_cpl0 == (ending.end is End.SYSCALL)
        if "syscall-entry" in profile.quirks:
            assert (ending.vector, ending.error_code, ending.cr2) == (14, FETCH_OF_USER, SYSCALL_STUB)

    def test_a_jump_to_lstar_is_no_syscall(self, probe: ProbeVm) -> None:
        """CPL 3 may not fetch there, on any host: the harness must not take this for a SYSCALL that arrived."""
        ending = probe.run(Mode.USER64, b"\xff\xe3", Regs(rbx=SYSCALL_STUB))  # jmp rbx
        assert (ending.end, ending.vector, ending.cr2) == (End.EXCEPTION, 14, SYSCALL_STUB)

    def test_what_shows_through_is_what_the_host_has(self, profile: HostProfile) -> None:
        """Seen independently: Linux's own list of the CPU's features, or, where that has no name, the CPU's own."""
        assert profile.features_show_through is not None
        host = set(cpuinfo("flags").split())
        with NativeOracle() as oracle:
            for name in {name for names in profile.features_show_through.values() for name in names} - host:
                feature = FEATURES[name]
                assert name in _UNNAMED_BY_LINUX
                found = dict(zip(("eax", "ebx", "ecx", "edx"), oracle.cpuid(*feature[:2]), strict=True))
                assert found[feature.register] >> feature.bit & 1, name

    def test_the_guest_sees_the_cpuid_it_is_given_where_masking_holds(
        self, profile: HostProfile, system: System
    ) -> None:
        entries = guest_cpuid(
            system.supported_cpuid(), apic_id=0, cpus=3, hide=frozenset({"umip"}), tsc_deadline=False
        )
        with ProbeVm(system, cpuid=entries) as probe:
            ending = probe.run(Mode.LONG64, micro_guests.CPUID.code, Regs(rax=1))
        assert ending.end is End.DONE
        given = next(e for e in entries if e.function == 1)
        assert ending.regs.rax == given.eax
        assert ending.regs.rbx == given.ebx  # APIC ID 0 and three CPUs, whatever CPU this runs on
        if profile.cpuid_masking_holds:
            assert ending.regs.rdx & ~(1 << 9) == given.edx & ~(1 << 9)  # APIC enabled: KVM's to say

    def test_kvm_takes_the_cpuid_of_every_vcpu(self, system: System) -> None:
        supported = system.supported_cpuid()
        with system.create_vm() as vm:
            vm.create_irqchip()
            for index in range(4):
                with vm.create_vcpu(index) as vcpu:
                    vcpu.set_cpuid(guest_cpuid(supported, apic_id=index, cpus=4, hide=frozenset({"avx", "popcnt"})))
        assert has_feature(guest_cpuid(supported, apic_id=3, cpus=4), "hypervisor")

    @pytest.mark.parametrize("mode", [Mode.LONG64, Mode.USER64])
    def test_a_shared_memslot_fails_the_private_memfd_probe(self, system: System, mode: Mode) -> None:
        assert not memfd_follows(system, mode, private=False)

    def test_capabilities_the_machine_needs_are_there(self, profile: HostProfile) -> None:
        for name in ("irqchip", "immediate_exit", "set_guest_debug"):
            assert profile.capabilities[name] > 0
        assert profile.capabilities["max_vcpus"] >= profile.capabilities["nr_vcpus"] >= 1


def test_doctor_on_this_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cache, "directories", lambda: iter([str(tmp_path / "pyvmm")]))
    args = build_parser().parse_args(["doctor", "--json"])
    assert args.run(args) == 0
    first = json.loads(capsys.readouterr().out)
    assert first["usable"] is True
    assert first["surroundings"]["kvm"] == "yes"
    assert args.run(args) == 0
    second = json.loads(capsys.readouterr().out)
    assert second["profile"] == first["profile"]  # from the cache: measured times would differ
    decoded = msgspec.convert(second["profile"], HostProfile)
    assert decoded == cache.read()
