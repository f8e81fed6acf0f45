"""Debian's own kernel, which knows virtio devices only from ACPI: it finds, uses them, and switches off by ACPI."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import pytest

from tests.framework.processes import pyvmm
from tests.lab.stock_guest import FOLDER

pytestmark = [pytest.mark.kvm, pytest.mark.timeout(300)]

DEADLINE = 120.0


def test_a_distribution_s_kernel_finds_its_devices(tmp_path: Path) -> None:
    content, disk, report = os.urandom(64 << 10), tmp_path / "disk.img", tmp_path / "report.json"
    disk.write_bytes(content)
    done = pyvmm(
        "run", str(FOLDER / "vmlinuz"), "--initrd", str(FOLDER / "initramfs.cpio"), "--memory", "256M",
        "--append", "console=ttyS0 quiet panic=-1 8250.nr_uarts=1", "--disk", f"{disk},readonly", "--rng",
        "--no-reboot", "--timeout", str(DEADLINE), "--report", str(report), timeout=DEADLINE + 30,
    )  # fmt: skip
    said = done.stdout.decode().replace("\r\n", "\n")
    assert done.returncode == 0, said[-3000:] + done.stderr.decode()
    assert json.loads(report.read_text())["kind"] == "poweroff", said[-3000:]
    lines = said.splitlines()
    found = {tuple(line.split()[1:]) for line in lines if line.startswith("virtio")}  # in whatever order
    assert found == {("0x0002", "virtio_blk"), ("0x0004", "virtio_rng")}, said[-3000:]
    assert f"{hashlib.sha256(content).hexdigest()}  -" in lines and "100000" in lines
