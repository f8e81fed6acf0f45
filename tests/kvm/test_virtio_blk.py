"""Disks on real KVM: the bare-metal driver of guests/disk-reader, started as a user starts it."""

from __future__ import annotations

import json
import os
import struct
import subprocess
from pathlib import Path

import pytest

from tests.framework import syscall_faults
from tests.framework.loop_device import loop_device
from tests.framework.processes import PYVMM, REPOSITORY, pyvmm

pytestmark = [pytest.mark.kvm, pytest.mark.timeout(120)]

GUEST = REPOSITORY / "guests" / "disk-reader" / "disk-reader.elf"
SECTORS = 4096


def numbered(path: Path, sectors: int = SECTORS) -> str:
    """An image in which each sector begins with its number."""
    path.write_bytes(b"".join(struct.pack("<Q", n).ljust(512, b"\xaa") for n in range(sectors)))
    return str(path)


def run(append: str, *options: str) -> subprocess.CompletedProcess[bytes]:
    return pyvmm(
        "run", str(GUEST), "--memory", "32M", "--timeout", "60", "--append", append, *options, timeout=90
    )  # fmt: skip


@pytest.mark.parametrize(("size", "depth"), [(512, 1), (4096, 8), (65536, 3), (512, 64)])
def test_a_guest_reads_what_the_image_holds(tmp_path: Path, size: int, depth: int) -> None:
    image, report = numbered(tmp_path / "disk.img"), tmp_path / "report.json"
    before = Path(image).read_bytes()
    done = run(f"size={size} depth={depth} requests=300 verify=1", "--disk", f"{image},readonly", "--report",
               str(report))  # fmt: skip
    assert done.returncode == 33, done.stdout + done.stderr
    assert done.stdout.decode().split("\r\n")[0] == f"disk-reader: {SECTORS} sectors"
    counted = json.loads(report.read_text())["statistics"]["devices"]["virtio-blk"]
    assert counted == {"reads": 300, "reads_failed": 0, "reads_bytes": 300 * size}
    assert Path(image).read_bytes() == before


def test_a_guest_that_expects_something_else_is_believed(tmp_path: Path) -> None:
    """Or else the tests above would prove nothing."""
    image = numbered(tmp_path / "disk.img")
    with open(image, "r+b") as file:
        file.seek(512 * 50)
        file.write(b"\1")
    done = run("size=4096 requests=20 verify=1", "--disk", image)
    assert done.returncode == 7 and b"sector 50 holds what belongs to 1" in done.stdout


def test_what_a_guest_writes_is_in_the_image_and_with_an_overlay_only_there(tmp_path: Path) -> None:
    empty, overlay = tmp_path / "empty.img", tmp_path / "over.img"
    empty.write_bytes(bytes(512 * SECTORS))
    options = ("--disk", f"{empty},overlay={overlay}")
    done = run("size=4096 depth=4 requests=200 write=1 verify=1", *options)
    assert done.returncode == 33, done.stdout + done.stderr
    assert empty.read_bytes() == bytes(512 * SECTORS)
    # Another machine finds it there.
    assert run("size=65536 requests=12 verify=1", *options).returncode == 33
    assert run("size=512 requests=2 verify=1", "--disk", str(empty)).returncode == 7
    done = run("size=4096 depth=4 requests=200 write=1 verify=1", "--disk", str(empty))
    assert done.returncode == 33, done.stdout + done.stderr
    content = empty.read_bytes()
    assert [struct.unpack_from("<Q", content, 512 * n)[0] for n in range(1600)] == list(range(1600))


@pytest.mark.parametrize(
    ("option", "said"),
    [
        ("{0}/none.img", "no such file; make one with: truncate -s 1G"),
        ("{0}", "is a folder"),
        ("{0}/empty.img", "a disk has at least one sector of 512"),
        ("{0}/odd.img", "are no whole sectors"),
        ("{0}/disk.img,readonly,overlay=x", "readonly and overlay exclude each other"),
        ("{0}/disk.img,overlay={0}/odd.img", "is no overlay of pyvmm's"),
        ("{0}/disk.img,cache=none", "unknown 'cache'"),
        ("{0}/disk.img,serial=123456789012345678901", "at most 20"),
    ],
)
def test_a_disk_that_cannot_be_is_refused_in_one_line(tmp_path: Path, option: str, said: str) -> None:
    numbered(tmp_path / "disk.img")
    (tmp_path / "empty.img").write_bytes(b"")
    (tmp_path / "odd.img").write_bytes(b"odd" * 333)
    done = run("", "--disk", option.format(tmp_path))
    assert done.returncode == 125
    line = done.stderr.decode()
    assert line.count("\n") == 1 and said in line, line


def test_two_machines_do_not_write_one_image(tmp_path: Path) -> None:
    image = numbered(tmp_path / "disk.img")
    done = run("", "--disk", image, "--disk", image)
    assert done.returncode == 125 and b"in use by another process" in done.stderr
    done = run("requests=8 verify=1", "--disk", f"{image},readonly", "--disk", f"{image},readonly")
    assert done.returncode == 33


@pytest.mark.skipif(os.geteuid() != 0, reason="a file system can be mounted by root only")
def test_a_full_file_system_is_an_error_for_the_guest_and_one_line_for_the_user(tmp_path: Path) -> None:
    """ENOSPC by its real cause: a sparse image on a tmpfs that is smaller, in a mount namespace of its own."""
    script = (
        f"mount -t tmpfs -o size=1m none {tmp_path} && truncate -s 4M {tmp_path}/disk.img && "
        f"exec {REPOSITORY}/.venv/bin/python -m pyvmm run {GUEST} --memory 32M --timeout 60 "
        f"--append 'size=65536 requests=64 write=1' --disk {tmp_path}/disk.img"
    )
    done = subprocess.run(
        ["unshare", "--mount", "--propagation", "private", "sh", "-c", script], capture_output=True, timeout=90,
        cwd=REPOSITORY, check=False,
    )  # fmt: skip
    assert done.returncode == 5 and b"status 1" in done.stdout, done.stdout + done.stderr
    assert done.stderr.decode() == (
        f"pyvmm: disk {tmp_path}/disk.img: writes fail: No space left on device; the guest sees I/O errors; make room"
        " on the host and the guest may try again\n"
    )


@pytest.mark.parametrize(
    ("rule", "failed"),
    [
        ("preadv2:disk.img:EIO:3:1", "reads"),
        ("pwritev2:disk.img:EIO:2:1", "writes"),
        ("fdatasync:disk.img:EIO:0:1", "flushes"),
    ],
)
def test_an_error_of_the_hosts_disk_is_one_of_the_guests(tmp_path: Path, rule: str, failed: str) -> None:
    image, report, log = numbered(tmp_path / "disk.img"), tmp_path / "report.json", tmp_path / "faults"
    done = subprocess.run(
        syscall_faults.command(
            log, [rule], str(PYVMM), "run", str(GUEST), "--memory", "32M", "--timeout", "60", "--append",
            "size=4096 requests=20 write=1", "--disk", image, "--report", str(report),
        ),
        capture_output=True, timeout=90, cwd=REPOSITORY, check=False,
    )  # fmt: skip
    assert done.returncode == 5 and b"status 1" in done.stdout, done.stdout + done.stderr
    assert log.read_text() == f"{rule.split(':')[0]} EIO\n"
    assert done.stderr.decode() == (
        f"pyvmm: disk {image}: {failed} fail: Input/output error; the guest sees I/O errors\n"
    )
    assert json.loads(report.read_text())["statistics"]["devices"]["virtio-blk"][f"{failed}_failed"] == 1


def test_a_guest_on_a_block_device_of_the_hosts(tmp_path: Path) -> None:
    file = tmp_path / "backing.img"
    file.write_bytes(bytes(512 * SECTORS))
    with loop_device(file) as path:
        done = run("size=4096 depth=4 requests=200 write=1 verify=1", "--disk", path)
        assert done.returncode == 33, done.stdout + done.stderr
        assert done.stdout.decode().split("\r\n")[0] == f"disk-reader: {SECTORS} sectors"
        assert run("size=65536 requests=12 verify=1", "--disk", f"{path},readonly").returncode == 33
    content = file.read_bytes()
    assert [struct.unpack_from("<Q", content, 512 * n)[0] for n in range(1600)] == list(range(1600))
    with loop_device(file, "--read-only") as path:
        done = run("requests=8", "--disk", path)
    assert done.returncode == 125 and b"cannot be written (Read-only file system); use it readonly" in done.stderr
