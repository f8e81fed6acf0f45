"""Every boot protocol on real KVM: a tiny image of each kind says what it was handed.

What is proved here is the guest's own view (registers it reads, pointers it follows, descriptors it
loads); layout and limits of every structure are tests/unit/arch/x86/boot's.
"""

from __future__ import annotations

import struct
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from pyvmm.arch.x86 import layout
from pyvmm.arch.x86.boot.mptable import isa_irq_pins
from tests.unit.arch.x86.boot import images

pytestmark = pytest.mark.kvm

SOURCES = Path(__file__).parent / "boot_entry"
COMMAND_LINE = "console=ttyS0 word"
MODULE = b"contents of the first module"
DEBUG_EXIT_STATUS = 0x10 << 1 | 1


class Built(NamedTuple):
    """An image and the folder it was built in."""

    path: Path
    folder: Path

    def run(self, *options: str) -> bytes:
        """Run it; returns what it wrote to the debug console. It must end by its debug-exit."""
        output = self.folder / "output"
        start = "import sys; from pyvmm.cli import main; sys.exit(main())"
        command = [sys.executable, "-c", start, "run", str(self.path), "--serial", f"file:{output}"]
        # No quirk may be needed to enter an image.
        command += ["--timeout", "60", "--memory", "32M", "--quirks", "none", *options]
        done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
        assert done.returncode == DEBUG_EXIT_STATUS, done.stderr
        return output.read_bytes()


def build(folder: Path, source: str, address: int, *defines: str, bits: int = 32) -> Built:
    """Assemble and link one of the sources at ``address``."""
    emulation = {16: "elf_i386", 32: "elf_i386", 64: "elf_x86_64"}[bits]
    image = folder / ("image.bin" if bits == 16 else "image.elf")
    compile_ = ["gcc", "-c", "-m64" if bits == 64 else "-m32", *defines, "-o", "image.o", str(SOURCES / source)]
    link = ["ld", "-m", emulation, "-n", "-z", "noexecstack", "--no-warn-rwx-segments"]
    link += [f"-Ttext={address:#x}", "-o", image.name, "image.o"]
    if "-DPVH" in defines:  # ld would put the note at a program's default address
        link.insert(1, f"--section-start=.note.pvh={address - 0x1000:#x}")
    if bits == 16:
        link.insert(1, "--oformat=binary")
    for command in (compile_, link):
        subprocess.run(command, cwd=folder, check=True, timeout=60)
    return Built(image, folder)


def module(tmp_path: Path) -> tuple[str, ...]:
    """Options that hand over a command line and an initrd."""
    path = tmp_path / "module"
    path.write_bytes(MODULE)
    return ("--append", COMMAND_LINE, "--initrd", str(path))


def check_long_mode(said: bytes) -> None:
    """What entry64.S says when handed the module and the command line."""
    rax, rbx, _, _, rsi, rdi, rsp, rbp, rflags, cr0, cr3, cr4, efer = struct.unpack_from("<13Q", said)
    assert rsi == layout.BOOT_INFO and rsp == layout.BOOT_STACK_TOP
    assert (rax, rbx, rdi, rbp) == (0, 0, 0, 0)
    assert rflags == 2, "interrupts off, direction up"
    assert (cr0, cr3, cr4, efer) == (0x80000011, layout.BOOT_PAGE_TABLES, 0x20, 0x500)
    cs, ds, ss, tr = struct.unpack_from("<4H", said, 0x68)
    assert (cs, ds, ss, tr) == (0x10, 0x18, 0x18, 0x20)
    limit, base = struct.unpack_from("<HQ", said, 0x70)
    assert (base, limit) == (layout.BOOT_GDT, 47)
    assert struct.unpack_from("<I", said, 0x7C) == (0,), "the boot processor's APIC ID"
    assert said[0x80:] == bytes(4) + b"_MP_RSD PTR " + MODULE + COMMAND_LINE.encode()


def test_long_mode(tmp_path: Path) -> None:
    check_long_mode(build(tmp_path, "entry64.S", 0x200000, bits=64).run(*module(tmp_path)))


def test_bzimage_unpacked_on_the_host(tmp_path: Path) -> None:
    elf = build(tmp_path, "entry64.S", 0x200000, bits=64)
    image = tmp_path / "bzImage"
    image.write_bytes(images.bzimage(images.compress(elf.path.read_bytes(), "zstd")))
    check_long_mode(Built(image, tmp_path).run(*module(tmp_path)))


def test_bzimage_entered_at_its_own_64_bit_entry(tmp_path: Path) -> None:
    """The protected-mode code starts at pref_address; its 64-bit entry is 0x200 behind that."""
    elf = build(tmp_path, "entry64.S", 0x200200, bits=64)
    code = tmp_path / "code"
    subprocess.run(["objcopy", "-O", "binary", str(elf.path), str(code)], check=True, timeout=60)
    image = tmp_path / "bzImage"
    image.write_bytes(images.bzimage(code.read_bytes(), payload_gap=0x200, pref_address=0x200000))
    check_long_mode(Built(image, tmp_path).run("--guest-decompress", *module(tmp_path)))


def registers32(said: bytes) -> dict[str, int]:
    """The dump that entry32.S begins with."""
    names = ("eax", "ebx", "ecx", "edx", "esi", "edi", "esp", "ebp", "eflags", "cr0", "cr4")
    dump = dict(zip(names, struct.unpack_from("<11I", said), strict=True))
    return dump | dict(zip(("cs", "ds", "ss", "tr"), struct.unpack_from("<4H", said, 44), strict=True))


def check_protected_mode(dump: dict[str, int]) -> None:
    assert (dump["eflags"], dump["cr0"], dump["cr4"]) == (2, 0x11, 0)
    assert (dump["cs"], dump["ds"], dump["ss"], dump["tr"]) == (0x10, 0x18, 0x18, 0x20)


def test_multiboot(tmp_path: Path) -> None:
    image = build(tmp_path, "entry32.S", 0x400000, "-DMULTIBOOT")
    said = image.run(*module(tmp_path))
    dump = registers32(said)
    check_protected_mode(dump)
    assert (dump["eax"], dump["ebx"]) == (0x2BADB002, layout.BOOT_INFO)
    flags, lower, upper, modules = struct.unpack_from("<4I", said, 52)
    assert flags & 0b1001101 == 0b1001101 and (lower, upper, modules) == (639, 31 << 10, 1)
    assert said[68:] == MODULE + f"{image.path} {COMMAND_LINE}".encode()


def test_pvh(tmp_path: Path) -> None:
    image = build(tmp_path, "entry32.S", 0x400000, "-DPVH")
    said = image.run(*module(tmp_path))
    dump = registers32(said)
    check_protected_mode(dump)
    assert dump["ebx"] == layout.BOOT_INFO
    assert struct.unpack_from("<4I", said, 52) == (0x336EC578, 1, 0, 1)
    assert said[68:] == b"RSD PTR " + MODULE + COMMAND_LINE.encode()


def test_elf32(tmp_path: Path) -> None:
    image = build(tmp_path, "entry32.S", 0x400000)
    said = image.run(*module(tmp_path))
    dump = registers32(said)
    check_protected_mode(dump)
    assert (dump["esi"], dump["ebx"], dump["edi"], dump["ebp"]) == (layout.BOOT_INFO, 0, 0, 0)
    assert dump["esp"] == layout.BOOT_STACK_TOP
    assert said[52:] == MODULE + COMMAND_LINE.encode()


@pytest.mark.parametrize(
    ("address", "org", "cs", "sp"),
    [(None, 0x7C00, 0, 0x7C00), (0x6000, 0x6000, 0, 0x6000), (0x54320, 0, 0x5432, 0x7C00)],
)
def test_real_mode(tmp_path: Path, address: int | None, org: int, cs: int, sp: int) -> None:
    image = build(tmp_path, "entry16.S", org, bits=16)
    said = image.run(*(() if address is None else ("--load-address", hex(address))))
    msw, ip, *pushed = struct.unpack("<14H", said[:28])
    bp, di, si, dx, cx, bx, ax, flags, ss, es, ds, code = pushed
    assert not msw & 1, "protection is off"
    assert (code, ds, es, ss, flags) == (cs, cs, cs, 0, 2)
    assert (ax, bx, cx, dx, si, di, bp) == (0, 0, 0, 0x80, 0, 0, 0)
    assert org < ip < org + 40
    assert said[28:] == sp.to_bytes(2, "little")


def test_the_timer_arrives_at_the_pin_the_tables_name(tmp_path: Path) -> None:
    """MP table and MADT say ISA IRQ 0 is IOAPIC pin 2; KVM's default routing would make it pin 0."""
    assert dict(isa_irq_pins())[0] == 2
    said = build(tmp_path, "timer_pin.S", 0x200000, bits=64).run()
    assert said == bytes((1 << (0x42 - 0x40),))
