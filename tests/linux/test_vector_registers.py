"""What user code keeps in vector registers must survive task switches, also where XSAVE is carried out by pyvmm."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from pyvmm.machine.tiny_linux import find_initramfs
from tests.framework.processes import pyvmm
from tests.linux.conftest import BOOT_DEADLINE
from tests.unit.linux.scripts import load_script

pytestmark = [pytest.mark.linux, pytest.mark.timeout(BOOT_DEADLINE + 60)]


def test_vector_registers_survive_task_switches(tmp_path: Path) -> None:
    program = tmp_path / "vector_registers"
    source = Path(__file__).with_name("vector_registers.c")
    subprocess.run(["gcc", "-O1", "-static", "-mno-avx", "-o", str(program), str(source)], check=True)
    cpio = load_script("guests/linux/cpio.py")
    extra = cpio.write_archive([cpio.file("vector_registers", program.read_bytes(), 0o755)])
    # The kernel unpacks archives that follow each other into one root file system.
    initrd = tmp_path / "initramfs.cpio"
    initrd.write_bytes(Path(find_initramfs(None)).read_bytes() + extra)
    done = pyvmm(
        "linux", "--initrd", str(initrd), "--timeout", str(BOOT_DEADLINE), "--exec", "/vector_registers",
        timeout=BOOT_DEADLINE + 30,
    )  # fmt: skip
    assert (done.returncode, done.stdout) in ((0, b"kept\n"), (0, b"no AVX\n")), done
