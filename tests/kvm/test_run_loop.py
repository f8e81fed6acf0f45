"""The native run loop: what it serves itself, what it hands to Python, in which order, and how it is stopped."""

from __future__ import annotations

import os
import threading
import time

import pytest

from pyvmm.errors import KvmError
from pyvmm.kvm.system import System
from pyvmm.native import ffi, lib
from tests.framework.real_mode import HLT_FOREVER, in8, out8, out16
from tests.kvm.conftest import BareVm


def test_exits_carry_port_size_direction_and_data(bare: BareVm) -> None:
    bare.enter(out8(0x80, 0x12) + out16(0x300, 0xBEEF) + in8(0x64) + b"\xa2\x00\x20" + out8(0xF4, 0))
    seen = []
    for answer in (0, 0, 0x5A, 0):
        assert bare.vcpu.run() == lib.PV_EXIT_IO
        exit_ = bare.vcpu.exit
        seen.append((exit_.port, exit_.size, exit_.is_write, exit_.count, exit_.data))
        exit_.data = answer
    assert seen == [(0x80, 1, 1, 1, 0x12), (0x300, 2, 1, 1, 0xBEEF), (0x64, 1, 0, 1, 0), (0xF4, 1, 1, 1, 0)]
    # mov [0x2000], al: the answer arrived in the guest.
    assert bare.memory.read_uint(0x2000, 1) == 0x5A


def test_string_output_is_one_port_with_advancing_data(bare: BareVm) -> None:
    bare.memory.write(0x3000, b"hello")
    # cld; mov si,0x3000; mov cx,5; mov dx,0x402; rep outsb; out 0xf4
    bare.enter(b"\xfc\xbe\x00\x30\xb9\x05\x00\xba\x02\x04\xf3\x6e" + out8(0xF4, 0))
    got = b""
    while bare.vcpu.run() == lib.PV_EXIT_IO and bare.vcpu.exit.port == 0x402:
        exit_ = bare.vcpu.exit
        if exit_.count == 1:
            got += bytes([exit_.data])
        else:
            got += bytes(ffi.buffer(exit_.bytes, exit_.size * exit_.count))
    assert got == b"hello"


def test_unmapped_memory_is_mmio(bare: BareVm) -> None:
    # mov ax,0xffff; mov ds,ax; mov byte [0x10],0x77 -> 0x100000, just past RAM; mov al,[0x11]; mov cs:[0x2000],al
    bare.enter(b"\xb8\xff\xff\x8e\xd8\xc6\x06\x10\x00\x77\xa0\x11\x00\x2e\xa2\x00\x20" + out8(0xF4, 0))
    assert bare.vcpu.run() == lib.PV_EXIT_MMIO
    exit_ = bare.vcpu.exit
    assert (exit_.address, exit_.size, exit_.is_write, exit_.data) == (0x100000, 1, 1, 0x77)
    assert bare.vcpu.run() == lib.PV_EXIT_MMIO
    assert (exit_.address, exit_.is_write) == (0x100001, 0)
    exit_.data = 0x99
    assert bare.vcpu.run() == lib.PV_EXIT_IO
    assert bare.memory.read_uint(0x2000, 1) == 0x99


def test_sinks_and_latches_make_no_exit(bare: BareVm) -> None:
    lib.pv_vm_set_sink(bare.vm.native, 0x3F8, 2)
    lib.pv_vm_set_latch(bare.vm.native, 0x3FD, 0x60)
    bare.enter(out8(0x3F8, ord("h")) + out8(0x3F8, ord("i")) + in8(0x3FD) + b"\xa2\x00\x20" + out8(0xF4, 1))
    assert bare.vcpu.run() == lib.PV_EXIT_IO
    assert bare.vcpu.exit.port == 0xF4
    assert bare.vcpu.native.native_exits == 3
    assert bare.vm.native.sinks_pending == 2
    buffer = ffi.new("uint8_t[16]")
    assert lib.pv_vm_take_sink(bare.vm.native, 2, buffer, 16) == 2
    assert bytes(ffi.buffer(buffer, 2)) == b"hi"
    assert bare.memory.read_uint(0x2000, 1) == 0x60
    lib.pv_vm_set_latch(bare.vm.native, 0x3FD, -1)
    lib.pv_vm_set_sink(bare.vm.native, 0x3F8, -1)
    assert lib.pv_vm_set_sink(bare.vm.native, 0x3F8, lib.PV_SINKS) < 0


def test_a_full_sink_falls_back_to_the_device(bare: BareVm) -> None:
    lib.pv_vm_set_sink(bare.vm.native, 0xE9, 0)
    # mov dx,0xe9; mov al,'x'; 1: out dx,al; jmp 1b
    bare.enter(b"\xba\xe9\x00\xb0\x78\xee\xeb\xfd")
    assert bare.vcpu.run() == lib.PV_EXIT_IO
    assert bare.vcpu.exit.data == ord("x")
    assert bare.vm.native.sinks_pending == 65536


@pytest.fixture
def coalesced(bare: BareVm) -> BareVm:
    if not bare.vm.check_extension("KVM_CAP_COALESCED_PIO"):
        pytest.skip("this host's KVM has no coalesced PIO")
    bare.vm.register_coalesced(0x3F8, 1, pio=True)
    return bare


def test_coalesced_writes_come_before_the_exit_that_drains_them(coalesced: BareVm) -> None:
    coalesced.enter(out8(0x3F8, 1) + out8(0x3F8, 2) + out8(0xF4, 3))
    ports = []
    for _ in range(3):
        assert coalesced.vcpu.run() == lib.PV_EXIT_IO
        ports.append((coalesced.vcpu.exit.port, coalesced.vcpu.exit.data))
    assert ports == [(0x3F8, 1), (0x3F8, 2), (0xF4, 3)]
    assert coalesced.vcpu.native.exits == 1


def test_a_ring_that_nobody_drains_by_an_exit_is_drained_from_outside(coalesced: BareVm) -> None:
    coalesced.enter(out8(0x3F8, 7) + HLT_FOREVER)
    thread = threading.Thread(target=coalesced.vcpu.run)
    thread.start()
    entry = ffi.new("struct pv_exit *")
    deadline = time.monotonic() + 10
    while not (kind := lib.pv_vm_drain_ring(coalesced.vm.native, entry)) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert (kind, entry.port, entry.data) == (lib.PV_EXIT_IO, 0x3F8, 7)
    lib.pv_vm_release_ring(coalesced.vm.native)
    coalesced.vcpu.kick()
    thread.join(10)
    assert not thread.is_alive()


def test_more_coalesced_writes_than_the_ring_holds_keep_their_order(coalesced: BareVm) -> None:
    lib.pv_vm_set_sink(coalesced.vm.native, 0x3F8, 0)
    # mov cx,1000; mov dx,0x3f8; 1: mov al,cl; out dx,al; loop 1b; out 0xf4
    coalesced.enter(b"\xb9\xe8\x03\xba\xf8\x03\x88\xc8\xee\xe2\xfb" + out8(0xF4, 0))
    assert coalesced.vcpu.run() == lib.PV_EXIT_IO
    assert coalesced.vcpu.exit.port == 0xF4
    buffer = ffi.new("uint8_t[2000]")
    taken = lib.pv_vm_take_sink(coalesced.vm.native, 0, buffer, 2000)
    assert bytes(ffi.buffer(buffer, taken)) == bytes(i & 0xFF for i in range(1000, 0, -1))


def test_kick_ends_a_halted_vcpu_and_one_that_spins(bare: BareVm) -> None:
    for code in (HLT_FOREVER, b"\xeb\xfe"):
        bare.enter(code)
        result: list[int] = []
        thread = threading.Thread(target=lambda into=result: into.append(bare.vcpu.run()))
        thread.start()
        time.sleep(0.05)
        bare.vcpu.kick()
        thread.join(10)
        assert result == [lib.PV_EXIT_KICKED]
        bare.vcpu.set_mp_state(lib.KVM_MP_STATE_RUNNABLE)


def test_a_kick_before_the_run_is_not_lost_and_completes_the_access(bare: BareVm) -> None:
    bare.enter(in8(0x64) + b"\xa2\x00\x20" + out8(0xF4, 0))
    assert bare.vcpu.run() == lib.PV_EXIT_IO
    before = bare.vcpu.get_regs().rip
    bare.vcpu.exit.data = 0x42
    bare.vcpu.kick()
    assert bare.vcpu.run() == lib.PV_EXIT_KICKED
    regs = bare.vcpu.get_regs()
    assert regs.rax & 0xFF == 0x42
    assert regs.rip >= before
    assert bare.vcpu.run() == lib.PV_EXIT_IO
    assert bare.vcpu.exit.port == 0xF4


def test_a_triple_fault_is_a_shutdown(bare: BareVm) -> None:
    # Protected mode with empty tables: mov eax,cr0; or al,1; mov cr0,eax; mov ax,0x28; mov ds,ax -> #GP, no IDT
    bare.enter(b"\x0f\x20\xc0\x0c\x01\x0f\x22\xc0\xb8\x28\x00\x8e\xd8")
    sregs = bare.vcpu.get_sregs()
    sregs.idt.limit = sregs.gdt.limit = 0
    bare.vcpu.set_sregs(sregs)
    assert bare.vcpu.run() == lib.PV_EXIT_SHUTDOWN


def test_a_refused_msr_is_named(bare: BareVm) -> None:
    with pytest.raises(KvmError, match="0xdeadbeef"):
        bare.vcpu.get_msrs([0x10, 0xDEADBEEF])
    with pytest.raises(KvmError, match="0xdeadbeef"):
        bare.vcpu.set_msrs({0xDEADBEEF: 1})


def test_filtered_msr_writes_come_to_user_space(bare: BareVm) -> None:
    if not bare.vm.check_extension("KVM_CAP_X86_MSR_FILTER"):
        pytest.skip("this host's KVM has no MSR filter")
    bare.vm.enable_cap("KVM_CAP_X86_USER_SPACE_MSR", lib.KVM_MSR_EXIT_REASON_FILTER)
    bare.vm.set_msr_filter([(0xC0000082, lib.KVM_MSR_FILTER_WRITE)])
    # mov ecx,0xc0000082; mov eax,0x1234; xor edx,edx; wrmsr; out 0xf4
    bare.enter(b"\x66\xb9\x82\x00\x00\xc0\x66\xb8\x34\x12\x00\x00\x66\x31\xd2\x0f\x30" + out8(0xF4, 0))
    assert bare.vcpu.run() == lib.PV_EXIT_MSR
    assert (bare.vcpu.exit.address, bare.vcpu.exit.data, bare.vcpu.exit.is_write) == (0xC0000082, 0x1234, 1)
    bare.vcpu.exit.error = 0
    assert bare.vcpu.run() == lib.PV_EXIT_IO


def test_nothing_leaks_when_creation_fails_half_way() -> None:
    """The autouse fixture looks at this process's descriptors afterwards."""
    with (
        System() as system,
        system.create_vm() as vm,
        vm.create_vcpu(0),
        pytest.raises(KvmError, match="KVM_CREATE_VCPU"),
    ):
        vm.create_vcpu(0)


def test_a_forked_thread_is_known_by_its_own_id(bare: BareVm) -> None:
    """Kicks go to the thread that runs the vCPU; the native loop remembers its ID."""
    bare.enter(out8(0xF4, 0) + out8(0xF4, 0))
    assert bare.vcpu.run() == lib.PV_EXIT_IO
    assert bare.vcpu.native.thread_id == threading.get_native_id()
    child = os.fork()
    if not child:
        # KVM refuses a VM of another process; who asked is noted all the same.
        refused = bare.vcpu.run() == lib.PV_EXIT_ERRNO
        os._exit(0 if refused and bare.vcpu.native.thread_id == threading.get_native_id() else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert bare.vcpu.run() == lib.PV_EXIT_IO
